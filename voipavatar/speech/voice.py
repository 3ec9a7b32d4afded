"""What our own voices share: chunks with cues, the thread they work on, the way into LiveKit."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from livekit.agents import APIConnectionError, APIConnectOptions, APIError, tts, utils
from livekit.agents.types import TimedString

from ..errors import InputError, TransportError, VoipAvatarError
from ..media import Cue, Int16

logger = logging.getLogger(__name__)

CUES = "voipavatar.cues"
"""Key of `rtc.AudioFrame.userdata` under which our voices put the cues that start in the frame."""

PAUSE = "_"
"""Text of a phoneme cue during which nothing is said."""

PATIENCE = 60.0
"""Seconds that a working thread may keep a voice waiting before it is given up."""

_DONE, _LATE = True, False

T = TypeVar("T")


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
    """A voice that tells when it says what. `speak` prefers this way over LiveKit's.

    LiveKit's `AudioEmitter` (1.8) cuts and joins frames on their way and keeps only word times,
    so phonemes need a path of their own.
    """

    def stream_cued(self, text: str) -> AsyncGenerator[Chunk, None]:
        """Say `text`: chunks as they are made. To be closed (`aclosing`) when left early."""


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


class CuedStream(tts.ChunkedStream):
    """A `Cued` voice as LiveKit wants it: PCM, word times, cues in the frames' userdata."""

    def __init__(self, *, voice: tts.TTS[Any], text: str, conn_options: APIConnectOptions) -> None:
        super().__init__(tts=voice, input_text=text, conn_options=conn_options)
        self._cues: list[Cue] = []
        self._sent = 0

    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        voice = self._tts
        assert isinstance(voice, Cued)
        output_emitter.initialize(
            request_id=utils.shortuuid(),
            sample_rate=voice.sample_rate,
            num_channels=1,
            mime_type="audio/pcm",
            frame_size_ms=100,
        )
        self._cues.clear()
        silent = True
        try:
            async with aclosing(voice.stream_cued(self._input_text)) as chunks:
                async for chunk in chunks:
                    silent = False
                    self._cues.extend(chunk.cues)
                    output_emitter.push_timed_transcript(
                        [
                            TimedString(cue.text + " ", start_time=cue.start, end_time=cue.end)
                            for cue in chunk.cues
                            if cue.kind == "word"
                        ]
                    )
                    output_emitter.push(chunk.pcm.tobytes())
        except TransportError as error:
            raise APIConnectionError(str(error), retryable=error.retryable) from error
        except InputError as error:
            raise APIError(str(error), retryable=False) from error
        except VoipAvatarError as error:
            raise APIError(str(error), retryable=False) from error
        if silent:  # LiveKit takes no sound for a failure, but "..." has none
            output_emitter.push(bytes(2 * (voice.sample_rate // 50)))
        output_emitter.flush()

    async def __anext__(self) -> tts.SynthesizedAudio:
        event = await super().__anext__()
        self._sent += event.frame.samples_per_channel
        end = self._sent / event.frame.sample_rate
        self._cues.sort(key=lambda cue: cue.start)
        count = len(self._cues) if event.is_final else 0
        while count < len(self._cues) and self._cues[count].start < end:
            count += 1
        event.frame.userdata[CUES] = tuple(self._cues[:count])
        del self._cues[:count]
        return event
