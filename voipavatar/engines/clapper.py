"""The `clapper` engine: a picture that is white while its sound is loud.

It is the instrument with which sync is measured: whatever carries pictures and sound together, what
comes out can be decoded, and the flashes compared with the beeps. Every picture also carries its
picture clock as sixteen blocks along its lower edge, large enough to survive video coding, so that
repeated and lost pictures can be counted.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..errors import AvatarError, ConfigError, EngineError
from ..media import ENGINE_RATE, Cue, Float32, UInt8, check_fps, i420, slice_start
from . import Avatar, EngineInfo, EngineSession, Job, Progress, Spec

VERSION = 1
BITS = 16
"""Of the picture clock, the lowest on the right."""
_DARK, _BRIGHT = 16, 235
_GREY = (58, 60, 64)
_LINE_LUMA = (96, 40)
THRESHOLD = 0.02
"""Root mean square above which a frame is loud, of 1."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a picture shows."""

    loud: bool
    clock: int


def stripe(width: int, height: int) -> tuple[int, int]:
    """The clock's stripe: its first row and the width of a block."""
    return height - max(8, height // 24 // 2 * 2), width // BITS


def read_mark(luma: UInt8) -> Mark:
    """What a picture shows, from its luma (height, width), even after lossy coding."""
    height, width = luma.shape
    top, block = stripe(width, height)
    inside = luma[top + 2 : height - 2]
    clock = 0
    for i in range(BITS):
        level = inside[:, i * block + block // 4 : (i + 1) * block - block // 4].mean()
        clock = clock * 2 + int(level > 128)
    middle = luma[height // 4 : height // 2, width // 4 : width * 3 // 4]
    return Mark(bool(middle.mean() > 150), clock)


class ClapperSession:
    """Which pictures are loud: each decided by its own samples and no others."""

    def __init__(self, avatar: Avatar) -> None:
        fps = int(avatar.options["fps"])
        threshold = float(avatar.options["threshold"])
        self._spec = Spec(width=avatar.width, height=avatar.height, fps=fps, ease=1)
        self._threshold = threshold
        self._clock = 0
        self._kept = np.zeros(0, np.float32)
        self._frame = 0

    @property
    def spec(self) -> Spec:
        return self._spec

    def push(self, pcm: Float32) -> list[Job]:
        self._kept = np.concatenate([self._kept, pcm.astype(np.float32, copy=False)])
        jobs = []
        while len(self._kept) >= (size := self._size()):
            jobs.append(self._speak(self._kept[:size]))
            self._kept = self._kept[size:]
        return jobs

    def flush(self) -> list[Job]:
        rest = self._kept
        jobs = [self._speak(rest)] if len(rest) else []
        self._forget()
        return jobs

    def idle(self, n: int) -> list[Job]:
        return [self._job(loud=False, speech=False) for _ in range(n)]

    def reset(self, clock: int | None = None, ease: int = 3) -> None:
        del ease  # there is no mouth to close
        if clock is not None:
            if clock < 0:
                raise EngineError(f"a picture clock can't be {clock}")
            self._clock = clock
        self._forget()

    def cue(self, cues: Sequence[Cue]) -> None:
        """Of no use here."""

    def _size(self) -> int:
        fps = self._spec.fps
        return slice_start(self._frame + 1, ENGINE_RATE, fps) - slice_start(
            self._frame, ENGINE_RATE, fps
        )

    def _forget(self) -> None:
        self._kept, self._frame = np.zeros(0, np.float32), 0

    def _speak(self, samples: Float32) -> Job:
        # A frame that the turn's end cuts short counts as if silence followed.
        power = float(np.square(samples, dtype=np.float64).sum()) / self._size()
        self._frame += 1
        return self._job(loud=power > self._threshold**2, speech=True)

    def _job(self, *, loud: bool, speech: bool) -> Job:
        clock = self._clock
        self._clock = clock + 1
        return Job(self, clock, speech, Mark(loud, clock))


class ClapperEngine:
    """See `voipavatar.engines.Engine`. Needs no portrait: `source` is not looked at."""

    def __init__(self) -> None:
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(name="clapper", version=VERSION, device="cpu", batch=8, can=("idle",))

    def prepare(
        self, source: Path, target: Path, options: dict[str, Any], progress: Progress
    ) -> Avatar:
        told = _parse(options)
        avatar = Avatar(path=target, width=told["width"], height=told["height"], options=told)
        manifest = {"engine": "clapper", "version": VERSION, "options": told}
        file = target / "manifest.json"
        try:
            if json.loads(file.read_text("utf-8")) == manifest:
                progress("ready", 1.0)
                return avatar
        except (OSError, ValueError):
            pass  # not there, or damaged: written anew
        new = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            target.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(manifest, indent=1), "utf-8")
            new.replace(file)
        except OSError as error:
            raise AvatarError(
                f"the prepared avatar can't be written to {target}"
                f" ({error.strerror or type(error).__name__}): set VOIPAVATAR_CACHE to a folder"
                " that can be written"
            ) from error
        progress("ready", 1.0)
        return avatar

    def open(self, avatar: Avatar) -> ClapperSession:
        if self._closed:
            raise EngineError("the clapper engine is closed")
        if not (avatar.path / "manifest.json").is_file():
            raise AvatarError(f"{avatar.path} holds no prepared avatar: prepare it first")
        return ClapperSession(avatar)

    def render(self, jobs: Sequence[Job]) -> list[UInt8]:
        if self._closed:
            raise EngineError("the clapper engine is closed")
        return [_draw(job.session.spec, cast(Mark, job.data)) for job in jobs]

    def close(self) -> None:
        self._closed = True


def _parse(options: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"width": 1280, "height": 720, "fps": 25, "threshold": THRESHOLD}
    for key, value in options.items():
        if key == "landmarks":
            continue  # a persona that has a face may be clapped too
        if key not in told:
            raise ConfigError(f"engine option {key!r} is not known to clapper: {', '.join(told)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"engine option {key} must be a number, not {value!r}")
        told[key] = value
    for key, least in (("width", 64), ("height", 64)):
        if told[key] != int(told[key]) or told[key] % 2 or not least <= told[key] <= 4096:
            raise ConfigError(f"engine option {key} must be even, {least} to 4096")
        told[key] = int(told[key])
    if told["fps"] != int(told["fps"]):
        raise ConfigError("engine option fps must be a whole number")
    told["fps"] = check_fps(int(told["fps"]))
    if not 0 <= told["threshold"] <= 1:
        raise ConfigError("engine option threshold must be 0 to 1")
    return told


def _draw(spec: Spec, mark: Mark) -> UInt8:
    width, height = spec.width, spec.height
    image = i420(height, width, (255, 255, 255) if mark.loud else _GREY)
    luma = image[:height]
    top, block = stripe(width, height)
    if not mark.loud:
        # A film clapper: slanted bars, so that a frozen encoder is told from a flat grey one.
        line = max(2, height // 24)
        bar = np.arange(width)[None, :] + np.arange(line)[:, None]
        luma[height // 8 : height // 8 + line] = np.where(bar // (line * 2) % 2, *_LINE_LUMA)
    luma[top:] = _DARK
    for i in range(BITS):
        if mark.clock >> (BITS - 1 - i) & 1:
            luma[top + 2 : height - 2, i * block + 2 : (i + 1) * block - 2] = _BRIGHT
    image[height:].reshape(2, height // 2, width // 2)[:, top // 2 :] = 128
    return image
