"""`voipavatar bench queue`: from a message at the broker to its first talking frame; and endurance.

Needs a broker. Its queues are of their own name and are deleted at the end.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import time
import uuid
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .config import Persona, Settings, load_persona
from .engines import Spec
from .errors import TransportError
from .feed import Place
from .ledger import SqliteLedger
from .media import Frame, ManualClock
from .messages import OUTCOMES
from .rabbitmq import QueueFeed, QueueOptions
from .session import Session, Studio
from .stage import Options
from .version import __version__
from .waiting import within

Tell = Callable[[str], None]

SENTENCES = (
    "Hello, how can I help you today?",
    "Your parcel will be there tomorrow before noon.",
    "That is a good question.",
    "Please hold the line, I am looking it up.",
    "The next train leaves at a quarter past nine.",
)


def _quiet(what: str) -> None:
    """Progress that nobody watches."""


class _Mouth:
    """A sink that notes when each turn's first frame with sound goes out, and the longest gap."""

    latency = 0.0

    def __init__(self, spec: Spec) -> None:
        self.first: dict[int, float] = {}
        self.new = asyncio.Event()
        self.turns = 0
        """Turns that were heard."""
        self.gap = 0.0
        """The longest time without a picture, in seconds."""
        self._last: float | None = None

    def put(self, frame: Frame) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.gap = max(self.gap, now - self._last)
        self._last = now
        if frame.turn is not None and frame.turn not in self.first and frame.audio.any():
            self.first[frame.turn] = now
            self.turns += 1
            while len(self.first) > 100:
                del self.first[next(iter(self.first))]
            self.new.set()

    def clear(self) -> float:
        return 0.0

    async def aclose(self) -> None: ...


async def queue(
    settings: Settings,
    *,
    url: str,
    persona: str = "default",
    messages: int = 20,
    soak: float = 0.0,
    hours: float = 0.0,
    tell: Tell = _quiet,
) -> Mapping[str, Any]:
    """Milliseconds from publishing a text to its first talking frame, one at a time, voice warm.

    With `soak`, two sounds a second in real time for so many minutes; with `hours`, so many hours
    of a message a second on a clock that doesn't wait: memory, backlog and refusals.
    Raises TransportError when there is no broker at `url`.
    """
    found: dict[str, Any] = {"voipavatar": __version__, "persona": persona}
    with TemporaryDirectory(prefix="voipavatar-bench-") as folder:
        found |= await _latency(settings, url, persona, messages, Path(folder), tell)
        if soak:
            found |= await _endure(settings, url, Path(folder), soak * 60, 0.0, tell)
        if hours:
            found |= await _endure(settings, url, Path(folder), 0.0, hours * 3600, tell)
    return found


class _Hurry(ManualClock):
    """Faked time that dawdles while there is nothing to say: to idle at full speed would take the
    machine from the broker."""

    def __init__(self) -> None:
        super().__init__()
        self.session: Session | None = None

    async def sleep_until(self, when: float) -> None:
        if self.session is not None and not self.session.stage.waiting():
            await asyncio.sleep(0.005)
        await super().sleep_until(when)


class _Bench:
    """A worker, and a channel to send to it and to hear from it."""

    def __init__(self, url: str, options: QueueOptions) -> None:
        self.options = options
        self.ends: dict[str, str] = {}
        self.begun: list[str] = []
        """Ids in the order in which they were begun."""
        self.new = asyncio.Event()
        self._url = url
        self._undo = contextlib.AsyncExitStack()
        self._channel: Any = None

    async def __aenter__(self) -> _Bench:
        import aio_pika

        try:
            connection = await aio_pika.connect(self._url, timeout=5)
        except Exception as error:  # of three libraries
            raise TransportError(
                f"no broker can be reached ({type(error).__name__}): start one, say where with "
                "--amqp"
            ) from None
        await self._undo.enter_async_context(connection)
        self._channel = await connection.channel(on_return_raises=True)
        exchange = await self._channel.declare_exchange(
            self.options.events, aio_pika.ExchangeType.TOPIC, durable=True
        )
        ear = await self._channel.declare_queue(exclusive=True)
        await ear.bind(exchange, f"session.{self.options.queue}.*")
        await ear.consume(self._heard, no_ack=True)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for name in self.options.own_names:
            with contextlib.suppress(Exception):
                await self._channel.queue_delete(name)
        await self._undo.aclose()

    async def _heard(self, message: Any) -> None:
        if message.type not in OUTCOMES and message.type != "started":
            return
        id = json.loads(message.body)["message_id"]
        if message.type == "started":
            self.begun.append(id)
        elif message.type != "duplicate":
            self.ends[id] = message.type if id not in self.ends else "twice"
            self.new.set()

    async def send(self, body: dict[str, Any]) -> None:
        import aio_pika

        await self._channel.default_exchange.publish(
            aio_pika.Message(json.dumps(body).encode(), delivery_mode=2),
            self.options.queue, timeout=10,
        )  # fmt: skip


def _named(url: str, **more: Any) -> QueueOptions:
    return QueueOptions(url=url, queue=f"bench-{uuid.uuid4().hex[:8]}", **more)


async def _latency(
    settings: Settings, url: str, persona: str, count: int, folder: Path, tell: Tell
) -> dict[str, Any]:
    options = _named(url)
    mouths: list[_Mouth] = []

    def sink(spec: Spec) -> _Mouth:
        mouths.append(_Mouth(spec))
        return mouths[0]

    async with contextlib.AsyncExitStack() as undo:
        bench = await undo.enter_async_context(_Bench(url, options))
        studio = await undo.enter_async_context(Studio(settings))
        ledger = SqliteLedger(folder / "latency.sqlite")
        undo.push_async_callback(ledger.aclose)
        place = Place(studio, load_persona(persona, settings), options.queue, sinks=[sink])
        tell("preparing")
        await place.open()
        undo.push_async_callback(place.aclose)
        feed = await undo.enter_async_context(QueueFeed(options, ledger, place))
        await within(feed.wire.up.wait(), 30)
        await studio.voice(load_persona(persona, settings).voice)
        took: list[float] = []
        mouth = mouths[0]
        for i in range(count + 1):
            tell(f"measuring: {i} of {count}")
            mouth.new.clear()
            text = SENTENCES[i % len(SENTENCES)]
            begin = time.perf_counter()
            # A beginning that nobody has said before: no voice may have it in its cache.
            new = f"Number {time.time_ns() // 1000 % 1_000_000}, {text[0].lower()}{text[1:]}"
            body = {"type": "text", "data": new, "message_id": f"l{i}"}
            await bench.send(body)
            await within(mouth.new.wait(), 30)
            if i:  # the first one also loads what is loaded once
                took.append(list(mouth.first.values())[-1] - begin)
            own = place.own()
            assert own is not None
            await own.interrupt()
            await asyncio.sleep(0.3)
        ms = np.array(took) * 1000
        return {
            "messages": count,
            "first_frame_p50": round(float(np.percentile(ms, 50)), 1),
            "first_frame_p95": round(float(np.percentile(ms, 95)), 1),
            "first_frame_max": round(float(ms.max()), 1),
        }


def _sound(seconds: float) -> str:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        times = np.arange(round(seconds * 16_000)) / 16_000
        file.writeframes((np.sin(2 * np.pi * 300 * times) * 8000).astype("<i2").tobytes())
    return base64.b64encode(out.getvalue()).decode()


async def _endure(
    settings: Settings, url: str, folder: Path, real: float, faked: float, tell: Tell
) -> dict[str, Any]:
    import psutil
    from aio_pika.exceptions import DeliveryError

    name = "soak" if real else "faked"
    clapper = Persona(name="clapper", engine="clapper", width=128, height=128)
    options = _named(url, limit=100)
    process = psutil.Process()
    sizes: list[float] = []
    taken: list[str] = []
    refused, unsure, deepest = 0, 0, 0
    # In real time half as much again as can be spoken: the queue fills up, and says so.
    sound = _sound(0.75 if real else 0.9)
    mouths: list[_Mouth] = []

    def sink(spec: Spec) -> _Mouth:
        mouths.append(_Mouth(spec))
        return mouths[0]

    async with contextlib.AsyncExitStack() as undo:
        bench = await undo.enter_async_context(_Bench(url, options))
        studio = await undo.enter_async_context(Studio(settings))
        ledger = SqliteLedger(folder / f"{name}.sqlite")
        undo.push_async_callback(ledger.aclose)
        place = Place(studio, clapper, options.queue, sinks=[sink])
        if faked:
            clock = _Hurry()
            clock.session = await studio.open(
                clapper, id=options.queue, sinks=[sink], clock=clock,
                options=Options(patient=True, hold=1 << 30),
            )  # fmt: skip
            place.adopt(clock.session)
        else:
            await place.open()
        undo.push_async_callback(place.aclose)
        feed = await undo.enter_async_context(QueueFeed(options, ledger, place))
        await within(feed.wire.up.wait(), 30)
        begin = time.monotonic()
        total = round(faked) if faked else round(real * 2)
        while len(taken) + refused < total:
            id = f"{name}{len(taken) + refused}"
            try:
                await bench.send({"type": "audio", "data": sound, "message_id": id})
                taken.append(id)
            except asyncio.TimeoutError:
                # Nobody knows whether the broker has it: the same id again is the way to be sure.
                unsure += 1
                continue
            except DeliveryError:  # the queue is full: the producer is told, and waits
                refused += 1
                if faked:
                    total += 1
                    await asyncio.sleep(0.2)
            deepest = max(deepest, len(taken) - len(bench.ends))
            if (len(taken) + refused) % 100 == 0:
                tell(f"{name}: {len(taken)} sent, {refused} refused")
                sizes.append(process.memory_info().rss / 1e6)
            if real:
                ahead = begin + (len(taken) + refused) / 2 - time.monotonic()
                await asyncio.sleep(max(0.0, ahead))
        deadline = time.monotonic() + 600
        while len(bench.ends) < len(taken) and time.monotonic() < deadline:
            bench.new.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await within(bench.new.wait(), 1.0)
        sizes.append(process.memory_info().rss / 1e6)
        outcomes = list(bench.ends.values())
        found = {
            "sent": len(taken),
            "refused": refused,
            "sent_again": unsure,
            "finished": outcomes.count("finished"),
            "lost": len(taken) - len(outcomes),
            "said_twice": mouths[0].turns - len(set(bench.begun)) + outcomes.count("twice"),
            "in_order": bench.begun == taken,
            "deepest_backlog": deepest,
            "seconds": round(time.monotonic() - begin, 1),
            "megabytes_at_a_third": round(sizes[len(sizes) // 3], 1),
            "megabytes_at_the_end": round(sizes[-1], 1),
        }
        if real:
            found["longest_gap_ms"] = round(mouths[0].gap * 1000)
        return {f"{name}_{key}": value for key, value in found.items()}
