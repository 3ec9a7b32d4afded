"""What voices share: chunks with cues, and the thread that a C library works on."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from ..errors import ConfigError, TransportError
from ..media import Cue, Int16
from .script import Piece

logger = logging.getLogger(__name__)

CUES = "voipavatar.cues"
"""Key of `rtc.AudioFrame.userdata` under which our voices put the cues that start in the frame."""

PAUSE = "_"
"""Text of a phoneme cue during which nothing is said."""

PATIENCE = 60.0
"""Seconds that a working thread may keep a voice waiting before it is given up."""

_DONE, _LATE = True, False

T = TypeVar("T")


class Missing(ConfigError):
    """A voice can't be had on this machine as it is; another one may do instead."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch of speech: int16 mono at `rate` Hz, with the cues that came with it.

    Cue times are seconds from the first sample of the whole utterance; a cue comes with the
    chunk in which it starts, or before.
    """

    pcm: Int16
    rate: int
    cues: tuple[Cue, ...] = ()

    @property
    def seconds(self) -> float:
        return len(self.pcm) / self.rate


def shifted(cues: Iterable[Cue], by: float) -> tuple[Cue, ...]:
    """The cues `by` seconds later."""
    return tuple(replace(cue, start=cue.start + by, end=cue.end + by) for cue in cues)


@runtime_checkable
class Cued(Protocol):
    """A voice that tells when it says what; `Chain` prefers this way over LiveKit's.

    LiveKit's `AudioEmitter` (1.8) cuts and joins frames on their way and keeps only word times,
    so phonemes need a path of their own.
    """

    pause: float
    """Seconds of silence between sentences."""
    loudness: float | None
    """LUFS as it comes, where that is known beforehand."""

    def ipa(self, transcription: str) -> str | None:
        """How a transcription is written into a text for this voice; None: it can't read IPA."""

    def stream_piece(self, piece: Piece) -> AsyncGenerator[Chunk, None]:
        """Say one piece: chunks as they are made, times from its beginning. To be closed
        (`aclosing`) when left early."""


class Door(Generic[T]):
    """One thread that does the work of a C library, shared by those who hold it.

    The thread starts with the first job and ends when the last holder lets go.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._guard = threading.Lock()
        self._holders = 0
        self._executor: ThreadPoolExecutor | None = None

    def hold(self) -> None:
        with self._guard:
            self._holders += 1

    async def release(self) -> None:
        with self._guard:
            self._holders -= 1
            executor, self._executor = (
                (self._executor, None) if self._holders == 0 else (None, self._executor)
            )
        if executor is not None:
            # The last job in the queue: once it is done, joining the thread takes no time.
            last = executor.submit(int)
            executor.shutdown(wait=False)
            await within(asyncio.wrap_future(last), PATIENCE)
            executor.shutdown(wait=True)

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        with self._guard:
            if self._holders <= 0:
                raise RuntimeError("this voice is closed")
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix=self._name)
            return self._executor.submit(job)

    async def run(self, job: Callable[[], Any]) -> Any:
        """What `job` returns."""
        return await within(asyncio.wrap_future(self.submit(job)), PATIENCE)

    async def stream(self, job: Callable[[Callable[[T], bool]], None]) -> AsyncGenerator[T, None]:
        """Run `job(emit)` on the thread; what it emits comes out here.

        `emit` returns False when nobody listens any more: the job should end then. A job is one
        sentence, so what it emits needs no bound.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[T] | bool] = asyncio.Queue()
        left = threading.Event()

        def send(item: tuple[T] | bool) -> bool:
            if left.is_set():
                return False
            try:
                loop.call_soon_threadsafe(queue.put_nowait, item)
            except RuntimeError:  # the loop was closed meanwhile
                left.set()
                return False
            return True

        def work() -> None:
            try:
                if not left.is_set():
                    job(lambda item: send((item,)))
            finally:
                send(_DONE)

        future = self.submit(work)
        try:
            while True:
                late = loop.call_later(PATIENCE, queue.put_nowait, _LATE)
                try:
                    item = await queue.get()
                finally:
                    late.cancel()
                if isinstance(item, tuple):
                    yield item[0]
                elif item is _DONE:
                    break
                else:
                    raise TransportError(
                        f"the thread {self._name} gave no sound for {PATIENCE:.0f} s: the machine "
                        "is overloaded, or the voice's library hangs"
                    )
            await within(asyncio.wrap_future(future), PATIENCE)
        finally:
            left.set()
            future.cancel()


class Hold(Generic[T]):
    """A voice's hold on a door: taken when the voice is first used, let go once."""

    def __init__(self, door: Door[T]) -> None:
        self._door = door
        self._guard = threading.Lock()
        self._held = False
        self._closed = False

    @property
    def door(self) -> Door[T]:
        with self._guard:
            if self._closed:
                raise RuntimeError("this voice is closed")
            if not self._held:
                self._held = True
                self._door.hold()
            return self._door

    async def release(self) -> None:
        """Idempotent."""
        with self._guard:
            held, self._held, self._closed = self._held, False, True
        if held:
            await self._door.release()


async def within(awaitable: Awaitable[T], seconds: float) -> T:
    """The result, or TimeoutError. Unlike `asyncio.wait_for` before Python 3.12, never swallows a
    cancellation that arrives together with the result."""
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise TimeoutError(f"nothing for {seconds:g} s")
        return task.result()
    finally:
        await stop(task)


async def stop(task: asyncio.Future[Any]) -> None:
    """Cancel and wait until it is over. Asks again: third parties lose cancellations."""
    for _ in range(40):
        if task.done():
            break
        task.cancel()
        await asyncio.wait([task], timeout=0.25)
    else:
        logger.error("a voice's task can't be stopped")
        return
    if not task.cancelled():
        task.exception()  # seen; who wants it asks the task
