"""What the tests of the queue share: a worker on air, who sends, and who listens to the events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import time
import uuid
import wave
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aio_pika
import numpy as np
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractRobustConnection

from voipavatar.config import Persona, Settings
from voipavatar.engines import Spec
from voipavatar.feed import Place
from voipavatar.ledger import Ledger, SqliteLedger
from voipavatar.media import Clock, Frame, UInt8
from voipavatar.messages import OUTCOMES, Event, read_event
from voipavatar.rabbitmq import QueueFeed, QueueOptions
from voipavatar.session import Session, Studio
from voipavatar.stage import Options

CLAPPER = Persona.model_validate(
    {"name": "clapper", "engine": "clapper", "width": 128, "height": 128, "voice": "espeak"}
)
ENDS = OUTCOMES - {"duplicate"}


def tone(seconds: float, rate: int = 16_000) -> bytes:
    """int16 little endian."""
    times = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * 440 * times) * 8_000).astype("<i2").tobytes()


def wav(seconds: float, rate: int = 16_000) -> bytes:
    """A WAV of a tone."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(tone(seconds, rate))
    return out.getvalue()


def audio(seconds: float, id: str | None = None, **more: Any) -> dict[str, Any]:
    """An audio message, in the form of the first."""
    message: dict[str, Any] = {
        "type": "audio", "data": base64.b64encode(wav(seconds)).decode(), "format": "wav",
    }  # fmt: skip
    return message | ({"message_id": id} if id else {}) | more


class Watch:
    """A sink that keeps what went out: when, and which turn."""

    latency = 0.0

    def __init__(self, spec: Spec) -> None:
        self.turns: list[int] = []
        """Every turn of which a frame was shown, in order of their first."""
        self.last: float | None = None
        self.gap = 0.0
        """The longest time between two frames, in seconds."""
        self.frames = 0
        self.image: UInt8 | None = None
        """The last picture."""

    def put(self, frame: Frame) -> None:
        now = time.monotonic()
        if self.last is not None:
            self.gap = max(self.gap, now - self.last)
        self.last = now
        self.frames += 1
        self.image = frame.image
        if frame.turn is not None and frame.turn not in self.turns[-3:]:
            self.turns.append(frame.turn)

    def clear(self) -> float:
        return 0.0

    async def aclose(self) -> None: ...


class Rig:
    """A worker with one clapper on air, fed from one queue."""

    def __init__(self, studio: Studio, place: Place, feed: QueueFeed, watch: list[Watch]) -> None:
        self.studio = studio
        self.place = place
        self.feed = feed
        self._watch = watch

    @property
    def watch(self) -> Watch:
        return self._watch[-1]

    @property
    def session(self) -> Session:
        session = self.place.own()
        assert session is not None
        return session


@contextlib.asynccontextmanager
async def working(
    options: QueueOptions,
    folder: Path,
    *,
    ledger: Ledger | None = None,
    clock: Callable[[], Clock] | None = None,
    stage: Options | None = None,
    wait: bool = True,
    persona: Persona = CLAPPER,
) -> AsyncIterator[Rig]:
    """A worker. With `wait` its broker is there before this goes on."""
    own = ledger or SqliteLedger(folder / "messages.sqlite")
    watch: list[Watch] = []

    def sink(spec: Spec) -> Watch:
        watch.append(Watch(spec))
        return watch[-1]

    async with contextlib.AsyncExitStack() as undo:
        undo.push_async_callback(own.aclose)
        studio = await undo.enter_async_context(Studio(Settings(cache_dir=folder)))
        place = Place(studio, persona, options.queue, sinks=[sink])
        if clock is not None:
            session = await studio.open(
                persona, id=options.queue, sinks=[sink], clock=clock(), options=stage
            )
            place.adopt(session)
        else:
            await place.open()
        undo.push_async_callback(place.aclose)
        feed = await undo.enter_async_context(QueueFeed(options, own, place))
        if wait:
            await asyncio.wait_for(feed.wire.up.wait(), 30)
        yield Rig(studio, place, feed, watch)


class Client:
    """Sends to a queue and hears its events, over a connection of its own."""

    def __init__(self, url: str, options: QueueOptions, session: str | None = None) -> None:
        """Hears of `session`; by default of that which has the queue's name, "*" is all."""
        self.events: list[Event] = []
        self.raw: list[AbstractIncomingMessage] = []
        self.options = options
        self._url = url
        self._session = session or options.queue
        self._connection: AbstractRobustConnection | None = None
        self._channel: AbstractChannel | None = None
        self._new = asyncio.Event()
        self._ear = f"ear-{uuid.uuid4().hex[:8]}"

    async def __aenter__(self) -> Client:
        self._connection = await aio_pika.connect_robust(
            self._url, timeout=20, reconnect_interval=0.5
        )
        self._channel = await self._connection.channel()
        exchange = await self._channel.declare_exchange(
            self.options.events, aio_pika.ExchangeType.TOPIC, durable=True
        )
        queue = await self._channel.declare_queue(self._ear, durable=True)
        await queue.bind(exchange, f"session.{self._session}.*")
        await queue.consume(self._heard, no_ack=False)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._connection is not None and self._channel is not None
        # The broker is everybody's: what hundreds of queues take of it, later tests would miss.
        for name in (self._ear, *self.options.own_names):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._channel.queue_delete(name), 5.0)
        await self._connection.close()

    async def _heard(self, message: AbstractIncomingMessage) -> None:
        event = read_event(message.body)
        if event.queue in (None, self.options.queue):
            self.raw.append(message)
            self.events.append(event)
        self._new.set()
        with contextlib.suppress(Exception):
            await message.ack()

    async def send(
        self, body: dict[str, Any] | bytes, *, to: str | None = None, **properties: Any
    ) -> None:
        """Returns when the broker has it; raises DeliveryError when it refuses."""
        assert self._channel is not None
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        message = aio_pika.Message(body, delivery_mode=2, **properties)
        await asyncio.wait_for(
            self._channel.default_exchange.publish(message, to or self.options.queue), 20
        )

    async def dead(self) -> list[AbstractIncomingMessage]:
        """Takes what is among the dead."""
        assert self._channel is not None
        queue = await self._channel.get_queue(self.options.graveyard)
        found: list[AbstractIncomingMessage] = []
        while (message := await queue.get(no_ack=True, fail=False)) is not None:
            found.append(message)
        return found

    async def delete_queue(self) -> None:
        assert self._channel is not None
        await self._channel.queue_delete(self.options.queue)

    def of(self, id: str) -> list[Event]:
        return [event for event in self.events if event.message_id == id]

    def ends(self, id: str) -> list[Event]:
        """The last events of a message; of one that came twice over the wire, one."""
        seen: dict[str, Event] = {}
        for raw, event in zip(self.raw, self.events, strict=True):
            if event.message_id == id and event.type in ENDS:
                seen.setdefault(str(raw.message_id), event)
        return list(seen.values())

    def order(self, kind: str = "started") -> list[str]:
        """Ids in the order of their first event of a kind."""
        return list(
            dict.fromkeys(one.message_id for one in self.events if one.type == kind)  # type: ignore[misc]
        )

    async def until(self, met: Callable[[], object], timeout: float = 30.0) -> None:
        """Wait until it is so, looking at every event."""
        deadline = time.monotonic() + timeout
        while not met():
            left = deadline - time.monotonic()
            if left <= 0:
                kinds = Counter(event.type for event in self.events)
                said = [(one.type, one.message_id) for one in self.events[-12:]]
                raise AssertionError(f"not within {timeout:g} s: {dict(kinds)}, last {said}")
            self._new.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._new.wait(), min(left, 0.1))

    async def ended(self, *ids: str, timeout: float = 30.0) -> list[str]:
        """The outcomes of these, in their order."""
        await self.until(lambda: all(self.ends(id) for id in ids), timeout)
        assert [len(self.ends(id)) for id in ids] == [1] * len(ids)
        return [self.ends(id)[0].type for id in ids]
