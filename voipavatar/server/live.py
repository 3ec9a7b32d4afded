"""The two long connections of a session: live sound in, events out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import numpy as np
from fastapi import WebSocket
from fastapi.responses import StreamingResponse
from starlette.types import Send
from starlette.websockets import WebSocketDisconnect

from ..errors import InputError, VoipAvatarError
from ..media import Mode
from .contract import Played, Utterance
from .desk import Desk, Entry

logger = logging.getLogger(__name__)

HEARTBEAT = 10.0
"""Seconds between signs of life on an event stream."""
AHEAD = 30.0
"""Seconds of sound that may be sent before they are heard; then the socket isn't read."""
STALL = 20.0
"""Seconds without sound after which an open turn is taken to be complete."""
MAX_MESSAGE = 1_048_576
"""Bytes of one message; `serve` has the socket refuse more."""
RATES = (8_000, 192_000)

_LOOK = 2.0


class EventStream(StreamingResponse):
    """`text/event-stream` of a session, until it closes, the client goes or the server stops."""

    media_type = "text/event-stream"

    def __init__(self, desk: Desk, entry: Entry) -> None:
        self._events = _events(desk, entry)
        super().__init__(self._events, headers={"x-accel-buffering": "no"})

    async def stream_response(self, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await super().stream_response(send)


async def _events(desk: Desk, entry: Entry) -> AsyncGenerator[bytes, None]:
    events = entry.session.events()
    closing: asyncio.Future[Any] = asyncio.ensure_future(desk.closing.wait())
    coming: asyncio.Future[Any] = asyncio.ensure_future(_next(events))
    with entry.watched():
        try:
            yield b"retry: 1000\n\n"
            while True:
                await asyncio.wait(
                    [coming, closing], timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED
                )
                if coming.done():
                    try:
                        event = coming.result()
                    except StopAsyncIteration:
                        return
                    yield _event(event)
                    coming = asyncio.ensure_future(_next(events))
                elif closing.done():
                    return
                else:
                    yield b": still here\n\n"
        finally:
            for task in (coming, closing):
                task.cancel()
            await asyncio.gather(coming, closing, return_exceptions=True)
            if isinstance(events, AsyncGenerator):
                await events.aclose()


async def _next(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    return await events.__anext__()


def _event(event: dict[str, Any]) -> bytes:
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event['type']}\ndata: {data}\n\n".encode()


class LiveSound:
    """int16 PCM from a WebSocket into turns of a session.

    Binary messages are samples (little endian, mono); the first one opens a turn. `{"end": true}`
    completes it, `{"cancel": true}` takes it back, and the next samples open another. What goes
    wrong with one message is answered in a sentence and harms nothing else.
    """

    def __init__(self, socket: WebSocket, desk: Desk, entry: Entry, rate: int, mode: Mode) -> None:
        self._socket = socket
        self._desk = desk
        self._entry = entry
        self._rate = rate
        self._mode = mode
        self._turn: Utterance | None = None
        self._half = b""
        self._reports: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Future[Any] = asyncio.ensure_future(desk.closing.wait())

    async def run(self) -> None:
        """Until the client goes, the session closes or the server stops."""
        try:
            await self._socket.accept()
            with self._entry.watched():
                await self._read()
        finally:
            self._closing.cancel()
            if self._turn is not None:
                # Whoever hung up in mid-sentence is heard to the end of what arrived.
                self._turn.end()
            for task in self._reports:
                task.cancel()
            await asyncio.gather(self._closing, *self._reports, return_exceptions=True)

    async def _read(self) -> None:
        coming: asyncio.Future[Any] = asyncio.ensure_future(self._socket.receive())
        last = time.monotonic()
        try:
            while True:
                await asyncio.wait(
                    [coming, self._closing], timeout=_LOOK, return_when=asyncio.FIRST_COMPLETED
                )
                if (
                    self._closing.done()
                    or self._desk.find(self._entry.session.id) is not self._entry
                ):
                    with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # gone already
                        await self._socket.close(1001, "the session is closed")
                    return
                if not coming.done():
                    if time.monotonic() - last > STALL:
                        await self._stalled()
                    continue
                message = coming.result()
                if message["type"] == "websocket.disconnect":
                    return
                try:
                    await self._take(message)
                except VoipAvatarError as error:
                    await self._tell({"type": "error", "error": str(error)})
                last = time.monotonic()
                coming = asyncio.ensure_future(self._socket.receive())
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)

    async def _take(self, message: Any) -> None:
        data, text = message.get("bytes"), message.get("text")
        if data is not None:
            await self._sound(data)
        elif text is not None:
            self._command(text)

    async def _sound(self, data: bytes) -> None:
        if len(data) > MAX_MESSAGE:
            raise InputError(f"a message holds at most {MAX_MESSAGE:,} bytes: send shorter pieces")
        data = self._half + data
        whole = len(data) & ~1
        self._half = data[whole:]
        if whole == 0:
            return
        turn = self._turn if self._turn is not None else self._open()
        pcm = np.frombuffer(data[:whole], "<i2").astype(np.int16)
        turn.push(pcm, self._rate)
        await self._room_for_more(turn)

    def _open(self) -> Utterance:
        turn: Utterance = self._entry.session.open_turn(self._mode)
        self._turn = turn
        self._entry.took(turn)
        task = asyncio.get_running_loop().create_task(self._report(turn), name="live-report")
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)
        return turn

    async def _room_for_more(self, turn: Utterance) -> None:
        """Wait while far more was sent than was heard: the sender feels it."""
        room = asyncio.ensure_future(turn.room(AHEAD))
        try:
            await asyncio.wait([room, self._closing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            room.cancel()
            await asyncio.gather(room, return_exceptions=True)

    def _command(self, text: str) -> None:
        try:
            command = json.loads(text)
        except (ValueError, RecursionError):
            command = None
        if command == {"end": True} or command == {"cancel": True}:
            turn, self._turn, self._half = self._turn, None, b""
            if turn is not None:
                turn.end() if "end" in command else turn.cancel()
            return
        raise InputError(
            'text messages are {"end": true} or {"cancel": true}; sound goes in binary ones'
        )

    async def _stalled(self) -> None:
        turn, self._turn, self._half = self._turn, None, b""
        if turn is not None:
            turn.end()
            await self._tell(
                {
                    "type": "error",
                    "utterance": turn.id,
                    "error": f"no sound for {STALL:.0f} s: the turn was taken to be complete",
                }
            )

    async def _report(self, turn: Utterance) -> None:
        await self._tell({"type": "opened", "utterance": turn.id})
        await asyncio.wait({turn.started})
        if turn.started.result() is not None:
            await self._tell({"type": "started", "utterance": turn.id})
        await asyncio.wait({turn.finished})
        if self._turn is turn:
            self._turn = None  # interrupted from elsewhere: what comes now is a new turn
        played: Played = turn.finished.result()
        await self._tell(
            {
                "type": "finished",
                "utterance": turn.id,
                "heard": round(played.heard, 3),
                "interrupted": played.interrupted,
            }
        )

    async def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # gone: `_read` sees it next
            await self._socket.send_json(message)
