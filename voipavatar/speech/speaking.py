"""`speak`: any voice, any text, as a stream of chunks with cues."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from livekit.agents import APIConnectOptions, APIError, APIStatusError, tts
from livekit.agents.types import USERDATA_TIMED_TRANSCRIPT

from ..errors import TransportError
from ..media import Cue, Int16, Resampler
from .text import LIMIT, clean, split
from .voice import CUES, Chunk, Cued, shifted, stop, within

logger = logging.getLogger(__name__)

AHEAD = 8.0
"""Seconds of sound that are made before they are asked for."""

TIMEOUT = 10.0
"""Seconds that an online voice may take to connect or to give more sound."""

_RETRIES = (0.2, 1.0)
"""Seconds before each further try at a sentence of which nothing was heard yet."""


async def speak(
    voice: tts.TTS[Any],
    text: str,
    *,
    limit: int = LIMIT,
    ahead: float = AHEAD,
    timeout: float = TIMEOUT,
) -> AsyncGenerator[Chunk, None]:
    """Say `text` with any LiveKit voice; chunks of one sample rate, as they are made.

    While one sentence is listened to, the next is synthesised, up to `ahead` seconds of sound.
    Cue times count from the start of the utterance. A text with nothing to say gives no chunk.
    Use `contextlib.aclosing`: closing stops the voice and leaves no task, at any moment.

    Raises InputError for a text of more than `limit` characters, TransportError when the voice
    can't be had.
    """
    pieces = split(clean(text, limit))
    if not pieces:
        return
    line = _Line(ahead)
    task = asyncio.create_task(_produce(voice, pieces, line, timeout), name="voipavatar.speak")
    try:
        while (chunk := await line.get()) is not None:
            yield chunk
    finally:
        await stop(task)


class _Line:
    """A queue bounded in seconds of sound, closed by its producer."""

    def __init__(self, ahead: float) -> None:
        self._ahead = ahead
        self._chunks: deque[Chunk] = deque()
        self._seconds = 0.0
        self._closed: BaseException | bool = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def put(self, chunk: Chunk) -> None:
        await self._room.wait()
        self._chunks.append(chunk)
        self._seconds += chunk.seconds
        if self._seconds >= self._ahead:
            self._room.clear()
        self._changed.set()

    def close(self, error: BaseException | None = None) -> None:
        self._closed = error if error is not None else True
        self._changed.set()

    async def get(self) -> Chunk | None:
        """The next chunk; None at the end; the producer's error where it stopped."""
        while not self._chunks:
            if isinstance(self._closed, BaseException):
                raise self._closed
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        chunk = self._chunks.popleft()
        self._seconds -= chunk.seconds
        if self._seconds < self._ahead:
            self._room.set()
        return chunk


async def _produce(voice: tts.TTS[Any], pieces: list[str], line: _Line, timeout: float) -> None:
    try:
        async with aclosing(_one_rate(_say_all(voice, pieces, timeout))) as chunks:
            async for chunk in chunks:
                await line.put(chunk)
    except asyncio.CancelledError:
        raise
    except Exception as error:
        line.close(error)
    else:
        line.close()


async def _say_all(
    voice: tts.TTS[Any], pieces: list[str], timeout: float
) -> AsyncGenerator[Chunk, None]:
    if isinstance(voice, Cued):
        # Newlines end sentences in `split`, and nothing else is lost by joining.
        async with aclosing(voice.stream_cued("\n".join(pieces))) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    origin = 0.0
    groups = _groups(pieces) if voice.capabilities.streaming else pieces
    for piece in groups:
        seconds = 0.0
        async with aclosing(_say_retrying(voice, piece, timeout)) as chunks:
            async for chunk in chunks:
                seconds += chunk.seconds
                yield replace(chunk, cues=shifted(chunk.cues, origin))
        origin += seconds


def _groups(pieces: list[str], most: int = 1500) -> list[str]:
    """Sentences together, for voices that keep the melody over several."""
    groups: list[str] = []
    for piece in pieces:
        if groups and len(groups[-1]) + len(piece) < most:
            groups[-1] += " " + piece
        else:
            groups.append(piece)
    return groups


async def _say_retrying(
    voice: tts.TTS[Any], piece: str, timeout: float
) -> AsyncGenerator[Chunk, None]:
    for delay in (*_RETRIES, None):
        heard = False
        try:
            async with aclosing(say_piece(voice, piece, timeout)) as chunks:
                async for chunk in chunks:
                    heard = True
                    yield chunk
            return
        except TransportError as error:
            if heard or delay is None or not error.retryable:
                raise
            logger.warning("voice failed, trying again", extra={"voice": voice.label})
            await asyncio.sleep(delay)


async def say_piece(voice: tts.TTS[Any], piece: str, timeout: float) -> AsyncGenerator[Chunk, None]:
    """Say one piece through LiveKit's interface, once. Times count from the piece's start.

    Raises TransportError, with nothing of the text in it, when the voice fails or gives no sound.
    """
    options = APIConnectOptions(max_retry=0, timeout=timeout)
    stream: tts.SynthesizeStream | tts.ChunkedStream
    if voice.capabilities.streaming:
        stream = voice.stream(conn_options=options)
        stream.push_text(piece)
        stream.end_input()
    else:
        stream = voice.synthesize(piece, conn_options=options)
    sent = 0.0
    try:
        async with stream:
            while True:
                try:
                    event = await within(stream.__anext__(), timeout)
                except StopAsyncIteration:
                    break
                frame = event.frame
                pcm = np.frombuffer(frame.data, np.int16)
                if frame.num_channels > 1:
                    pcm = pcm.reshape(-1, frame.num_channels).mean(axis=1).astype(np.int16)
                chunk = Chunk(pcm.copy(), frame.sample_rate, _cues(frame.userdata))
                if len(chunk.pcm) or chunk.cues:
                    sent += chunk.seconds
                    yield chunk
    except TimeoutError:
        raise TransportError(f"the voice {voice.label} stalled for {timeout:g} s") from None
    except APIStatusError as error:
        raise TransportError(
            f"the voice {voice.label} was refused with status {error.status_code}"
            + (": check its key" if error.status_code in (401, 403) else ""),
            retryable=error.retryable,
        ) from None
    except APIError as error:
        raise TransportError(
            f"the voice {voice.label} failed ({type(error).__name__})", retryable=error.retryable
        ) from None
    if sent == 0.0:
        raise TransportError(f"the voice {voice.label} gave no sound")


def _cues(userdata: dict[str, Any]) -> tuple[Cue, ...]:
    """Cues of a frame: ours if it has them, else LiveKit's timed words."""
    own = userdata.get(CUES)
    if own is not None:
        return tuple(own)
    cues = []
    for word in userdata.get(USERDATA_TIMED_TRANSCRIPT) or ():
        start, end = word.start_time, word.end_time
        text = str(word).strip()
        if text and isinstance(start, (int, float)) and isinstance(end, (int, float)):
            cues.append(Cue("word", text, float(start), float(max(start, end))))
    return tuple(cues)


async def _one_rate(chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """All chunks at the rate of the first."""
    rate = 0
    resampler: Resampler | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            rate = rate or chunk.rate
            if resampler is not None and resampler.source != chunk.rate:
                if len(rest := resampler.flush()):
                    yield Chunk(rest, rate)
                resampler = None
            if chunk.rate == rate:
                yield chunk
                continue
            if resampler is None:
                resampler = Resampler(chunk.rate, rate)
            pcm: Int16 = resampler.push(chunk.pcm)
            yield Chunk(pcm, rate, chunk.cues)
    if resampler is not None and len(rest := resampler.flush()):
        yield Chunk(rest, rate)
