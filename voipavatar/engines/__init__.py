"""The engine contract, and the Renderer: the one door to a device.

An engine makes pictures from speech. It is synchronous and knows nothing of asyncio, LiveKit or
rooms. Sessions are cheap and pure, called from the event loop; rendering is batched over sessions
and happens on the Renderer's one thread, where the engine's objects are made, used and freed.

`tests/contract.py` holds the suite that every engine must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from ..media import ENGINE_RATE, Cue, Float32, UInt8, slice_start

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is and what it needs."""

    name: str
    version: int
    """Raised when a prepared avatar of the version before can't be used any more."""
    device: str = "cpu"
    batch: int = 1
    """Jobs that are best rendered together."""
    needs: tuple[str, ...] = ()
    """Out of "cuda", "weights", "training", "checkout"."""
    can: tuple[str, ...] = ()
    """Out of "photo", "video", "cues", "idle", "alpha", "batched"."""
    licence: str = "Apache-2.0"


@dataclass(frozen=True, slots=True)
class Avatar:
    """A persona's look, prepared for one engine and kept on disk."""

    path: Path
    """The prepared folder: `manifest.json`, written last, and arrays beside it (never pickle)."""
    width: int
    height: int
    options: dict[str, Any] = field(default_factory=dict)
    """What the persona says to this engine, already validated by it."""


@dataclass(frozen=True, slots=True)
class Spec:
    """The times and sizes of one session."""

    width: int
    height: int
    fps: int
    lookahead: int = 0
    """Samples at 16 kHz that are needed after a frame's end before it can be drawn."""
    step: int = 1
    """Frames that come out together."""
    ease: int = 8
    """Frames the mouth takes to close after speech."""

    def first(self, frame: int) -> int:
        """First 16 kHz sample of frame `frame` of a turn."""
        return slice_start(frame, ENGINE_RATE, self.fps)


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to be drawn. Everything that drawing needs is in it; `render` keeps no state."""

    session: EngineSession
    clock: int
    """The picture clock: rises by one a job, through idle, speech and reset."""
    speech: bool
    data: Any = None
    """The engine's own."""


class EngineSession(Protocol):
    """One room's state in an engine. Methods are quick (well under a frame); none blocks."""

    @property
    def spec(self) -> Spec: ...

    def push(self, pcm: Float32) -> list[Job]:
        """Mono 16 kHz in [-1, 1], any length; the jobs that can now be drawn, in order."""

    def flush(self) -> list[Job]:
        """The turn is complete: the rest of its jobs. The next `push` opens a new turn."""

    def idle(self, n: int) -> list[Job]:
        """`n` jobs without speech. In the middle of a turn it is a pause: the mouth eases shut,
        and what was pushed is kept for when speech goes on."""

    def reset(self, clock: int | None = None, ease: int = 3) -> None:
        """Interruption: the turn's sound is gone. `clock` is that of the next job: pass the last
        picture really shown + 1, and what was made beyond it is unmade, so that nothing jumps.
        The mouth, from how it was in that last picture, closes within `ease` frames."""

    def cue(self, cues: Sequence[Cue]) -> None:
        """Times known from the voice, in seconds from the turn's start. May be ignored."""


class Engine(Protocol):
    """Makes avatars and draws them. One per process and device."""

    @property
    def info(self) -> EngineInfo: ...

    def prepare(
        self, source: Path, target: Path, options: dict[str, Any], progress: Progress
    ) -> Avatar:
        """From a portrait or clip to a prepared folder. Slow, idempotent, resumable: what is
        whole already is loaded, what is damaged is built again. AvatarError says what to do
        about a source that can't be used, ConfigError about options."""

    def open(self, avatar: Avatar) -> EngineSession:
        """A new session on a prepared avatar. Under a second once the engine is warm."""

    def render(self, jobs: Sequence[Job]) -> list[UInt8]:
        """Pictures of the jobs, in order, any mix of sessions: I420, (height * 3 // 2, width),
        each its own memory."""

    def close(self) -> None:
        """Free everything. Idempotent."""
