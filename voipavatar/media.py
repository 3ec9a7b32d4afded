"""What moves: speech in, frames out, and the clock that paces them.

Pure values and small functions; nothing here knows a room, a codec or an engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import av
import numpy as np
import numpy.typing as npt

from .errors import ConfigError, InputError

Int16: TypeAlias = npt.NDArray[np.int16]
Float32: TypeAlias = npt.NDArray[np.float32]
UInt8: TypeAlias = npt.NDArray[np.uint8]

FRAME_RATE = 48_000
"""Sample rate, in Hz, of the sound in a `Frame`: what WebRTC and AAC both take as it is."""

ENGINE_RATE = 16_000
"""Sample rate, in Hz, of the sound that engines hear."""

Mode: TypeAlias = Literal["append", "interrupt", "replace"]
"""How a new turn meets those before it: waits, cuts the present one, or drops them all."""


# --- speech in ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cue:
    """Something a voice knows about its own sound: a phoneme, a word, a gesture.

    `start` and `end` are seconds from the first sample of the turn. Phonemes are IPA symbols.
    """

    kind: Literal["phoneme", "word", "gesture"]
    text: str
    start: float
    end: float


POSES = ("", "attentive", "listening", "thinking")
"""How a face can be held while it doesn't speak: as it likes; looking at who may speak; following
who speaks, with small nods; looking for an answer."""


@dataclass(frozen=True, slots=True)
class Begin:
    """A turn is on its way (its text is being synthesised, say). Optional: `Audio` opens it too."""

    turn: int
    mode: Mode = "append"


@dataclass(frozen=True, slots=True)
class Audio:
    """A stretch of speech: int16 mono, any rate, any length, with the cues that came with it."""

    pcm: Int16
    rate: int
    turn: int
    cues: tuple[Cue, ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """The utterance is complete."""

    turn: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget the utterance, now. Overtakes everything queued."""

    turn: int


Speech: TypeAlias = Begin | Audio | End | Cancel


class Source(Protocol):
    """Where speech comes from. Turn numbers are the source's own and rise.

    Every turn that was announced (by `Begin`, `Audio` or `End`) gets exactly one `finished`.
    """

    def __aiter__(self) -> AsyncIterator[Speech]: ...

    def started(self, turn: int) -> None:
        """The first sample of the turn is being heard."""

    def finished(self, turn: int, heard: float, interrupted: bool) -> None:
        """The turn is over; `heard` is seconds of it that were really played."""


# --- frames out -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture and exactly the samples that belong to it."""

    index: int
    """Counts from 0 for the life of the stage; time is `index / fps`."""
    image: UInt8
    """I420, shape (height * 3 // 2, width), C-contiguous."""
    audio: Int16
    """Mono at `FRAME_RATE`; zeros when silent, never empty."""
    turn: int | None
    """None when idle."""


class Sink(Protocol):
    """Where frames go. Never paces, never blocks: a slow sink drops pictures first, sound last."""

    @property
    def latency(self) -> float:
        """Seconds from `put` to being played, as it stands now."""

    def put(self, frame: Frame) -> None:
        """Take a frame. Returns at once."""

    def clear(self) -> float:
        """Drop what is queued and not yet played; the seconds of sound that were dropped."""

    async def aclose(self) -> None:
        """Finish what can be finished and let go. Idempotent."""


@runtime_checkable
class PatientSink(Protocol):
    """A sink that can be waited for, where nothing may be lost (a file, on a clock that waits)."""

    async def drain(self) -> None:
        """Until `put` has room for a frame. Raises what made going on impossible."""


def check_fps(fps: int) -> int:
    """`fps`, if pictures and samples can be paired exactly at it; ConfigError otherwise."""
    if not (1 <= fps <= 120 and FRAME_RATE % fps == 0):
        raise ConfigError(f"fps {fps} can't be used: take one of 20, 24, 25, 30, 40, 48, 50, 60")
    return fps


def slice_start(index: int, rate: int, fps: int) -> int:
    """First sample of frame `index`. Frame i holds [slice_start(i), slice_start(i + 1))."""
    return rate * index // fps


def frames_for(samples: int, rate: int, fps: int) -> int:
    """How many frames `samples` fill, the last perhaps in part: the least n that covers them."""
    return -(-samples * fps // rate)


def i420(height: int, width: int, rgb: tuple[int, int, int] = (0, 0, 0)) -> UInt8:
    """A plain I420 picture of one colour (BT.601, limited range)."""
    r, g, b = (c / 255.0 for c in rgb)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    image = np.empty((height * 3 // 2, width), np.uint8)
    image[:height] = round(16 + 219 * luma)
    chroma = image[height:].reshape(2, -1)
    chroma[0] = round(128 + 224 * 0.5 * (b - luma) / (1 - 0.114))
    chroma[1] = round(128 + 224 * 0.5 * (r - luma) / (1 - 0.299))
    return image


# --- sound ----------------------------------------------------------------------------------------


class Resampler:
    """Streaming sample-rate conversion of int16 mono, the same samples however the input is cut."""

    def __init__(self, source: int, target: int) -> None:
        if not 4_000 <= source <= 384_000:
            raise InputError(
                f"a sample rate of {source} Hz can't be used: send 8,000 to 192,000 Hz"
            )
        self.source = source
        self.target = target
        self._inner: av.AudioResampler | None = None

    def push(self, pcm: Int16) -> Int16:
        """Samples in, at `source`; what is ready out, at `target`. Any length, 0 included."""
        if self.source == self.target or len(pcm) == 0:
            return pcm
        if self._inner is None:
            self._inner = av.AudioResampler(format="s16", layout="mono", rate=self.target)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(pcm).reshape(1, -1), format="s16", layout="mono"
        )
        frame.sample_rate = self.source
        return _joined(self._inner.resample(frame))

    def flush(self) -> Int16:
        """The rest; the resampler is as new afterwards."""
        inner, self._inner = self._inner, None
        return _joined(inner.resample(None)) if inner is not None else np.zeros(0, np.int16)


def _joined(frames: Sequence[av.AudioFrame]) -> Int16:
    parts = [frame.to_ndarray().reshape(-1) for frame in frames if frame is not None]
    return np.concatenate(parts).astype(np.int16, copy=False) if parts else np.zeros(0, np.int16)


def to_float(pcm: Int16) -> Float32:
    """int16 to float32 in [-1, 1)."""
    scaled: Float32 = pcm.astype(np.float32) / np.float32(32768)
    return scaled


# --- time -----------------------------------------------------------------------------------------


class Clock(Protocol):
    """The one clock of a stage. Monotonic, in seconds from any origin."""

    def now(self) -> float: ...

    async def sleep_until(self, when: float) -> None: ...


class MonotonicClock:
    """Real time."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep_until(self, when: float) -> None:
        await asyncio.sleep(max(0.0, when - time.monotonic()))


class ManualClock:
    """A clock that doesn't wait: sleeping sets it. For files, and for tests."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    async def sleep_until(self, when: float) -> None:
        self._now = max(self._now, when)
        await asyncio.sleep(0)
