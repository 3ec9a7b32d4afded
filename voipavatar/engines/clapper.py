"""clapper: the instrument with which sync is measured.

The picture turns white while its own 40 ms of sound are loud, and carries its picture clock as 16
black or white blocks along the bottom, so that a viewer (or a decoded file) can tell which frame
it sees and when its sound should have been heard. A product feature: any persona may use it, and
`voipavatar bench sync` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, EngineError
from ..media import Cue, Float32, UInt8, check_fps, i420
from . import CUT, Avatar, EngineInfo, Job, Progress, Spec

LOUD = 0.02
"""RMS, of full scale, from which a frame's sound is loud."""
BITS = 16
DARK, WHITE = 40, 235


class ClapperSession:
    """Flashes for the frames whose own samples are loud; no lookahead."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._clock = 0
        self._pcm = np.zeros(0, np.float32)
        self._begin = 0  # sample of the turn at which _pcm starts
        self._made = 0

    @property
    def spec(self) -> Spec:
        return self._spec

    def push(self, pcm: Float32) -> list[Job]:
        self._pcm = np.concatenate([self._pcm, pcm])
        jobs = []
        while self._begin + len(self._pcm) >= self._spec.first(self._made + 1):
            jobs.append(self._next())
        return jobs

    def flush(self) -> list[Job]:
        jobs = []
        while len(self._pcm):
            jobs.append(self._next())
        self._begin = self._made = 0
        return jobs

    def idle(self, n: int) -> list[Job]:
        return [self._job(speech=False, loud=False) for _ in range(n)]

    def reset(self, clock: int | None = None, ease: int = CUT) -> None:
        if clock is not None:
            self._clock = clock
        self._pcm = np.zeros(0, np.float32)
        self._begin = self._made = 0

    def cue(self, cues: Sequence[Cue]) -> None:
        """A clapper goes by the sound alone."""

    def _next(self) -> Job:
        count = self._spec.first(self._made + 1) - self._begin
        own, self._pcm = self._pcm[:count], self._pcm[count:]
        self._begin += count
        self._made += 1
        return self._job(speech=True, loud=bool(np.sqrt(np.mean(own**2)) > LOUD))

    def _job(self, *, speech: bool, loud: bool) -> Job:
        self._clock += 1
        return Job(self, self._clock - 1, speech, loud)


class ClapperEngine:
    """Needs no portrait; `prepare` only checks the options."""

    info = EngineInfo("clapper", 1, can=("idle",))

    def __init__(self) -> None:
        self._closed = False

    def prepare(
        self, source: Path, target: Path, options: dict[str, Any], progress: Progress
    ) -> Avatar:
        told = {"width": 1280, "height": 720, "fps": 25}
        for key, value in options.items():
            if key == "landmarks":
                continue  # a persona with a face may clap too
            if key not in told:
                raise ConfigError(f"the clapper engine has no option {key}")
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"engine option {key} must be a whole number, not {value!r}")
            told[key] = value
        check_fps(told["fps"])
        for key in ("width", "height"):
            if told[key] % 2 or not 64 <= told[key] <= 4096:
                raise ConfigError(f"engine option {key} must be even, 64 to 4096, not {told[key]}")
        progress("ready", 1.0)
        return Avatar(target, told["width"], told["height"], dict(told))

    def open(self, avatar: Avatar) -> ClapperSession:
        if self._closed:
            raise EngineError("the clapper engine is closed")
        fps = int(avatar.options.get("fps", 25))
        return ClapperSession(Spec(avatar.width, avatar.height, fps, ease=1))

    def render(self, jobs: Sequence[Job]) -> list[UInt8]:
        return [self._draw(job) for job in jobs]

    def close(self) -> None:
        self._closed = True

    def _draw(self, job: Job) -> UInt8:
        spec = job.session.spec
        grey = (WHITE,) * 3 if job.data else (DARK,) * 3
        image = i420(spec.height, spec.width, grey)
        write_clock(image, job.clock)
        return image


def write_clock(image: UInt8, clock: int) -> None:
    """A picture clock, mod 2^16, as blocks along the bottom of an I420 picture."""
    height, width = image.shape[0] * 2 // 3, image.shape[1]
    top = height - height // 8
    for bit in range(BITS):
        begin, end = width * bit // BITS, width * (bit + 1) // BITS
        image[top:height, begin:end] = 235 if clock >> (BITS - 1 - bit) & 1 else 16


def read_clapper(luma: UInt8) -> tuple[bool, int]:
    """Whether a picture's luma plane (height, width) is a flash, and its picture clock mod 2^16."""
    height, width = luma.shape
    flash = bool(luma[height // 8 : height // 2 : 4, ::4].mean() > 128)
    row = luma[height - height // 12 : height - height // 24]
    clock = 0
    for bit in range(BITS):
        begin, end = width * bit // BITS, width * (bit + 1) // BITS
        inset = max(1, (end - begin) // 4)
        clock = clock << 1 | bool(row[:, begin + inset : end - inset].mean() > 126)
    return flash, clock
