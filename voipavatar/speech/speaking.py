"""`speak`: any voice, any text, as a stream of chunks with cues, made ahead of being heard."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from livekit.agents import tts

from .chain import Chain, Link
from .script import Format, Item, script
from .text import LIMIT
from .voice import Chunk, shifted, stop

AHEAD = 8.0
"""Seconds of sound that are made before they are asked for."""


async def speak(
    voice: tts.TTS[Any],
    text: str,
    *,
    format: Format = "auto",
    limit: int = LIMIT,
    ahead: float = AHEAD,
) -> AsyncGenerator[Chunk, None]:
    """Say `text` with any LiveKit voice; chunks of one sample rate, as they are made.

    Text is plain or SSML (see `script`; "auto" takes what begins with `<speak` for SSML). While
    one sentence is listened to, the next is synthesised, up to `ahead` seconds of sound. Cue
    times count from the start of the utterance. A text with nothing to say gives no chunk.
    Use `contextlib.aclosing`: closing stops the voice and leaves no task, at any moment.

    Raises InputError for SSML that can't be read and for a text of more than `limit` characters,
    TransportError when the voice can't be had.
    """
    prepared = Prepared(voice, script(text, format=format, limit=limit), ahead)
    try:
        while (chunk := await prepared.get()) is not None:
            yield chunk
    finally:
        await prepared.aclose()


def prefetch(
    voice: tts.TTS[Any],
    text: str,
    *,
    format: Format = "auto",
    limit: int = LIMIT,
    ahead: float = AHEAD,
) -> Prepared:
    """Begin to say `text` now, to be listened to later, while another is still speaking.

    `async for chunk in prepared` gives what `speak` would; `ahead` seconds are made meanwhile.
    Close it (`aclose`), listened to or not. Raises what `speak` does, InputError at once.
    """
    return Prepared(voice, script(text, format=format, limit=limit), ahead)


class Prepared:
    """An utterance in the making: a task that runs at most some seconds of sound ahead."""

    def __init__(self, voice: tts.TTS[Any], items: Sequence[Item], ahead: float) -> None:
        self._ahead = ahead
        self._chunks: deque[Chunk] = deque()
        self._seconds = 0.0
        self._error: BaseException | None = None
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._task: asyncio.Task[None] | None = None
        if items:
            self._task = asyncio.create_task(self._make(voice, items), name="voipavatar.speak")

    async def get(self) -> Chunk | None:
        """The next chunk; None at the end. Raises what the voice did."""
        while not self._chunks:
            if self._task is None or self._task.done():
                if self._error is not None:
                    raise self._error
                return None
            self._changed.clear()
            await self._changed.wait()
        chunk = self._chunks.popleft()
        self._seconds -= chunk.seconds
        if self._seconds < self._ahead:
            self._room.set()
        return chunk

    def __aiter__(self) -> Prepared:
        return self

    async def __anext__(self) -> Chunk:
        chunk = await self.get()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Stop. Idempotent."""
        if self._task is not None:
            await stop(self._task)

    async def _make(self, voice: tts.TTS[Any], items: Sequence[Item]) -> None:
        task = self._task
        assert task is not None
        task.add_done_callback(lambda _: self._changed.set())
        try:
            async with aclosing(_chain(voice).say(items)) as chunks:
                async for chunk in chunks:
                    if len(chunk.pcm) == 0 and not chunk.cues:
                        continue
                    await self._room.wait()
                    self._chunks.append(chunk)
                    self._seconds += chunk.seconds
                    if self._seconds >= self._ahead:
                        self._room.clear()
                    self._changed.set()
        except Exception as error:
            self._error = error


async def utter(
    voice: tts.TTS[Any], text: str, *, origin: float = 0.0
) -> AsyncGenerator[Chunk, None]:
    """Say `text`, chunk by chunk and no faster than asked; times count from `origin` seconds."""
    async with aclosing(_chain(voice).say(script(text))) as chunks:
        async for chunk in chunks:
            yield replace(chunk, cues=shifted(chunk.cues, origin))


def _chain(voice: tts.TTS[Any]) -> Chain:
    """The voice as a chain. One made here holds nothing that would have to be closed."""
    return voice if isinstance(voice, Chain) else Chain([Link(voice)])
