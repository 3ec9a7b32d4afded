"""The engine contract, and the Renderer: the one door to a device.

An engine makes pictures from speech. It is synchronous and knows nothing of asyncio, LiveKit or
rooms. Sessions are cheap and pure, called from the event loop; rendering is batched over sessions
and happens on the Renderer's one thread, where the engine's objects are made, used and freed.

`tests/contract.py` holds the suite that every engine must pass.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from .. import metrics
from ..errors import CapacityError, EngineError
from ..media import ENGINE_RATE, Cue, Float32, UInt8, slice_start

logger = logging.getLogger(__name__)

T = TypeVar("T")

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, 0 to 1."""

CUT = 2
"""Pictures in which the mouth closes after an interruption: the second shows it shut."""


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
    """Out of "photo", "video", "cues", "idle", "alpha", "batched", "poses"."""
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

    def reset(self, clock: int | None = None, ease: int = CUT) -> None:
        """Interruption: the turn's sound is gone. `clock` is that of the next job: pass the last
        picture really shown + 1, and what was made beyond it is unmade, so that nothing jumps.
        The mouth, from how it was in that last picture, closes within `ease` frames."""

    def cue(self, cues: Sequence[Cue]) -> None:
        """Times known from the voice, in seconds from the turn's start. May be ignored."""


@runtime_checkable
class Expressive(Protocol):
    """What a session may offer beyond the contract (`EngineInfo.can` has "poses"): a face that
    shows more than speech. Engines without it are asked for nothing.

    What is asked for begins with the next job, is a pure function of the picture clock from there
    on, comes and goes smoothly, and leaves the lips alone. An interruption forgets neither: what
    it unmakes of them begins again at its `clock`.
    """

    def pose(self, name: str) -> None:
        """One of `media.POSES`, until another is asked for; speech goes before it. EngineError for
        a name that is not known."""

    def gesture(self, name: str) -> None:
        """Once, now: as a cue of kind "gesture". EngineError for a name that is not known."""


class Engine(Protocol):
    """Makes avatars and draws them. One per process and device."""

    @property
    def info(self) -> EngineInfo: ...

    def prepare(
        self, source: Path, target: Path, options: dict[str, Any], progress: Progress
    ) -> Avatar:
        """From a portrait or clip to a prepared folder. Slow, idempotent, resumable: what is
        whole already is loaded, what is damaged is built again. AvatarError says what to do
        about a source that can't be used, ConfigError about options. With `info.device` "cpu" it
        may run on any thread, beside `render`."""

    def open(self, avatar: Avatar) -> EngineSession:
        """A new session on a prepared avatar. Under a second once the engine is warm."""

    def render(self, jobs: Sequence[Job]) -> list[UInt8]:
        """Pictures of the jobs, in order, any mix of sessions: I420, (height * 3 // 2, width),
        each its own memory."""

    def close(self) -> None:
        """Free everything. Idempotent."""


# --- the one door to a device ---------------------------------------------------------------------


class Picture:
    """A picture that is being drawn. Made by `Renderer.submit`, filled on the renderer's thread."""

    __slots__ = ("_done", "_waiter", "dropped", "error", "image", "job")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.image: UInt8 | None = None
        self.error: Exception | None = None
        self.dropped = False
        self._done = False
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def done(self) -> bool:
        """Drawn, failed or dropped."""
        return self._done

    def drop(self) -> None:
        """Nobody wants it any more: it costs nothing if its turn has not come yet."""
        self.dropped = True

    async def wait(self) -> None:
        """Until done. One waiter at a time."""
        event = asyncio.Event()
        self._waiter = (asyncio.get_running_loop(), event)
        if not self._done:
            await event.wait()
        self._waiter = None

    def settle(self, image: UInt8 | None = None, error: Exception | None = None) -> None:
        """Called by whoever draws."""
        self.image, self.error, self._done = image, error, True
        waiter = self._waiter
        if waiter is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits any more
                waiter[0].call_soon_threadsafe(waiter[1].set)


class Renderer:
    """One thread that owns an engine: earliest deadline first, batches over all rooms.

    The engine is made, used and freed on that thread. Safe to call from any event loop.
    """

    HEADROOM = 0.9
    """Share of real time that drawing may take before another session is refused."""
    PENDING = 4096
    """Jobs that may wait; beyond it the latest are given up, so that memory stays bounded."""

    def __init__(self, make: Callable[[], Engine], name: str = "engine") -> None:
        self._make = make
        self._name = name
        self._lock = threading.Condition()
        self._jobs: list[tuple[float, int, Picture]] = []
        self._calls: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._closing = False
        self._cost = 0.0
        self._drawn = 0
        self._failed = 0
        self._sessions = 0
        self._latest: Avatar | None = None
        self.failure: Exception | None = None
        """What the last batch failed with; None while drawing works."""

    async def start(self) -> EngineInfo:
        """Make the engine; idempotent. EngineError or ConfigError when it can't be made."""
        with self._lock:
            if self._closing:
                raise EngineError(f"the {self._name} renderer is closed")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name=f"renderer-{self._name}", daemon=True
                )
                self._thread.start()
        return await self.call(lambda engine: engine.info)

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Run `work(engine)` on the thread, between batches."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> T:
            if self._engine is None:
                self._engine = self._make()
            return work(self._engine)

        with self._lock:
            if self._closing or self._thread is None:
                raise EngineError(f"the {self._name} renderer is not running")
            self._calls.append((run, future))
            self._lock.notify()
        return await asyncio.wrap_future(future)

    async def prepare(
        self, source: Path, target: Path, options: dict[str, Any], progress: Progress
    ) -> Avatar:
        """`Engine.prepare`. On a CPU it runs beside the drawing: rooms don't wait for it."""
        engine = await self.call(lambda engine: engine)
        if engine.info.device == "cpu":
            return await asyncio.to_thread(engine.prepare, source, target, options, progress)
        return await self.call(lambda engine: engine.prepare(source, target, options, progress))

    async def open(self, avatar: Avatar) -> EngineSession:
        """A session on this engine. CapacityError when drawing would not keep up with it."""
        session = await self.call(lambda engine: engine.open(avatar))
        self._latest = avatar
        load = (self._sessions + 1) * session.spec.fps * self._cost
        if self._sessions and self._drawn > 50 and load > self.HEADROOM:
            raise CapacityError(
                f"{self._sessions} sessions run and a picture takes {self._cost * 1000:.1f} ms: "
                f"one more would need {load:.0%} of the {self._name} engine's time. "
                "End a session, start another worker, or make the picture smaller"
            )
        self._sessions += 1
        return session

    async def probe(self, avatar: Avatar) -> None:
        """Draw a few pictures now, as a room would. That it works ends a `failure`, and makes the
        next ones as fast as they come; raises what it fails with."""
        await self.call(lambda engine: _try(engine, avatar))
        self.failure = None

    async def mend(self) -> None:
        """Where drawing fails, draw the avatar that was opened last; `probe` tells the rest."""
        if self.failure is not None and self._latest is not None:
            await self.probe(self._latest)

    def release(self) -> None:
        """A session that `open` gave is over."""
        self._sessions = max(0, self._sessions - 1)

    def submit(self, jobs: Sequence[Job], due: Sequence[float]) -> list[Picture]:
        """Queue jobs; `due` says when each is wanted, in the caller's clock. Never blocks."""
        pictures = [Picture(job) for job in jobs]
        with self._lock:
            closed = self._closing or self._thread is None
            full = len(self._jobs) + len(pictures) > self.PENDING
            if not (closed or full):
                for when, picture in zip(due, pictures, strict=True):
                    heapq.heappush(self._jobs, (when, next(self._order), picture))
                self._lock.notify()
        if closed or full:
            reason = "is closed" if closed else f"has {self.PENDING} jobs waiting"
            for picture in pictures:
                picture.settle(error=EngineError(f"the {self._name} renderer {reason}"))
        return pictures

    def stats(self) -> dict[str, float]:
        """Counters since the start, and the smoothed cost of a picture."""
        return {
            "sessions": self._sessions,
            "drawn": self._drawn,
            "failed": self._failed,
            "waiting": len(self._jobs),
            "ms_per_picture": self._cost * 1000,
        }

    async def aclose(self) -> None:
        """Stop: what waits is dropped, the engine is freed, the thread joined. Idempotent."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        thread = self._thread
        if thread is not None:
            await asyncio.to_thread(thread.join, 30.0)
            if thread.is_alive():
                logger.error("renderer thread did not end", extra={"engine": self._name})

    def _run(self) -> None:
        while True:
            with self._lock:
                while not (self._jobs or self._calls or self._closing):
                    self._lock.wait()
                if self._closing:
                    break
                call = self._calls.popleft() if self._calls else None
                batch = [] if call else self._batch()
            if call is not None:
                _answer(*call)
            elif batch:
                self._draw(batch)
        self._end()

    def _batch(self) -> list[Picture]:
        """The most urgent jobs that somebody still wants. The lock is held."""
        engine, batch = self._engine, list[Picture]()
        limit = engine.info.batch if engine is not None else 1
        while self._jobs and len(batch) < limit:
            picture = heapq.heappop(self._jobs)[2]
            if picture.dropped:
                picture.settle()
            else:
                batch.append(picture)
        return batch

    def _draw(self, batch: list[Picture]) -> None:
        begin = time.perf_counter()
        try:
            if self._engine is None:
                raise EngineError(f"the {self._name} engine was never made")
            images = self._engine.render([picture.job for picture in batch])
        except (
            Exception
        ) as error:  # the engine is a plug-in: whatever it raises must not end the thread
            if self.failure is None:
                logger.exception("engine failed to draw", extra={"engine": self._name})
            self.failure = error
            self._failed += len(batch)
            for picture in batch:
                picture.settle(error=error)
            return
        self.failure = None
        took = time.perf_counter() - begin
        metrics.RENDER.labels(self._name).observe(took)
        each = took / len(batch)
        self._cost = each if self._drawn == 0 else 0.95 * self._cost + 0.05 * each
        self._drawn += len(batch)
        for picture, image in zip(batch, images, strict=True):
            picture.settle(image)

    def _end(self) -> None:
        closed = EngineError(f"the {self._name} renderer is closed")
        for _, _, picture in self._jobs:
            picture.settle(error=closed)
        self._jobs.clear()
        while self._calls:
            future = self._calls.popleft()[1]
            if future.set_running_or_notify_cancel():
                future.set_exception(closed)
        engine, self._engine = self._engine, None
        if engine is not None:
            try:
                engine.close()
            except Exception:  # closing goes on: there is nobody left to tell but the log
                logger.exception("engine failed to close", extra={"engine": self._name})


def _try(engine: Engine, avatar: Avatar) -> None:
    """Idle and speaking: an engine that shows a film of its own until somebody speaks would have
    none of its networks at work without it. One by one and together, as rooms ask for them."""
    session = engine.open(avatar)
    noise = np.random.default_rng(1).standard_normal(ENGINE_RATE // 5).astype(np.float32) * 0.1
    idle, speech = session.idle(1), [*session.push(noise), *session.flush()]
    for jobs in (idle, speech[:1], speech[1 : 1 + engine.info.batch]):
        if jobs:
            engine.render(jobs)


def _answer(call: Callable[[], Any], future: concurrent.futures.Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
