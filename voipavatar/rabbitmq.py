"""A RabbitMQ queue that feeds an avatar: exactly one outcome for every message.

    async with QueueFeed(options, ledger, directory) as feed:
        ...

`Wire` is the connection: built whole, watched, and built anew on any doubt. `QueueFeed` takes
messages in their order, looks them up in the ledger, lets them be spoken and tells what happened.
Nothing here needs a broker to be there: what is being spoken goes on, what has to be told waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import socket
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from .errors import CapacityError, InputError, StageError, TransportError, VoipAvatarError
from .ledger import Entry, Ledger
from .media import Int16, Mode
from .messages import (
    EVENTS,
    MAX_BODY,
    OUTCOMES,
    SCHEMA,
    Ack,
    AudioMessage,
    ControlMessage,
    Envelope,
    Parsed,
    Refused,
    TextMessage,
    parse,
    sender_of,
)
from .metrics import MESSAGES
from .waiting import within

if TYPE_CHECKING:
    import aio_pika
    from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractQueue

    from .config import Persona, VoiceChoice

logger = logging.getLogger(__name__)

T = TypeVar("T")

AHEAD = 2
"""Messages in the session at once: the one that is spoken and the one that is made ready."""
WAITING = 64
"""Messages that may wait before the session; only those acked early can come to so many."""
OUTBOX = 2_000
"""Events that may wait for the broker; those that end a message are never dropped."""


# --- what it needs of a session -------------------------------------------------------------------


class Utterance(Protocol):
    """One turn of a session. Both futures always resolve."""

    @property
    def id(self) -> str: ...
    @property
    def error(self) -> str | None: ...
    @property
    def cause(self) -> BaseException | None: ...
    @property
    def heard(self) -> float: ...
    @property
    def backlog(self) -> float: ...
    @property
    def started(self) -> asyncio.Future[Any]: ...
    @property
    def finished(self) -> asyncio.Future[Any]:
        """Resolves to what has `heard` and `interrupted`."""

    def push(self, pcm: Int16, rate: int) -> None: ...
    def end(self) -> None: ...
    def cancel(self) -> None: ...


class Session(Protocol):
    """An avatar on air: the verbs that messages come to."""

    @property
    def id(self) -> str: ...
    @property
    def persona(self) -> Persona: ...

    async def say(
        self, text: str, *, mode: Mode = "append", voice: Sequence[VoiceChoice] | None = None
    ) -> Any: ...
    def open_turn(self, mode: Mode = "append") -> Any: ...
    async def interrupt(self) -> int: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def choose_voice(self, name: str | None) -> None: ...
    async def swap_persona(self, persona: Any) -> None: ...
    async def choose_idle(self, name: str) -> None: ...
    def events(self) -> AsyncIterator[dict[str, Any]]: ...


class Directory(Protocol):
    """Who is on air."""

    def own(self) -> Any:
        """The session of this queue, or None while there is none."""

    def find(self, session: str) -> Any:
        """A session by its id, or None."""

    def of_persona(self, persona: str) -> Any:
        """A session of that persona, or None."""

    def load(self, persona: str) -> Any:
        """A persona by name, for a session that changes to it. Raises ConfigError."""


# --- options --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QueueOptions:
    """A queue and how it is used. Names are of the broker."""

    url: str = field(repr=False)
    queue: str = "talking_face_input"
    inbox: str = "avatar.in"
    """Topic exchange for messages; keys are the queue's name and `<queue>.control`."""
    events: str = "avatar.events"
    """Topic exchange for events, `session.<id>.<type>`."""
    dead: str = "avatar.dead"
    """Direct exchange for messages that can't be used; they wait in `<queue>.dead`."""
    prefetch: int = 4
    ack: Ack = "on_spoken"
    limit: int = 10_000
    """Messages that may wait in the broker; more are refused, which their sender is told."""
    deliveries: int = 10
    """Times that a message may come before the broker takes it to be poison."""
    retries: tuple[float, ...] = (1.0, 5.0, 30.0)
    attempts: int = 3
    max_body: int = MAX_BODY
    max_seconds: float = 300.0
    """Of one sound."""
    max_fetch: int = 50_000_000
    """Bytes of a sound that is referred to."""
    urls: tuple[str, ...] = ()
    """Beginnings of the addresses that may be referred to."""
    respeak: float = 0.5
    """After a crash a message is spoken again if less than this share of it was heard."""
    gap: float = 0.5
    """Seconds that a missing chunk is waited for."""
    idle_chunks: float = 10.0
    """Seconds without a chunk after which an utterance is taken to be complete."""
    heartbeat: int = 10
    watch: float = 2.0
    """Seconds between looks whether the broker still knows us."""
    timeout: float = 5.0
    """Seconds that any one answer of the broker is waited for."""
    progress: float = 1.0

    @property
    def control(self) -> str:
        """For what must not wait behind speech."""
        return f"{self.queue}.control"

    @property
    def graveyard(self) -> str:
        return f"{self.queue}.dead"

    @property
    def lapsed(self) -> str:
        """What the broker gave up: expired, or delivered too often. Its outcome is told here."""
        return f"{self.queue}.lapsed"

    def retry(self, seconds: float) -> str:
        return f"{self.queue}.retry.{seconds:g}s"

    @property
    def own_names(self) -> frozenset[str]:
        """Queues that answers never go to."""
        retries = (self.retry(seconds) for seconds in self.retries)
        return frozenset((self.queue, self.control, self.graveyard, self.lapsed, *retries))


# --- the wire -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Delivery:
    """A message as the broker gave it, good for as long as the connection that brought it."""

    body: bytes
    envelope: Envelope
    raw: aio_pika.abc.AbstractIncomingMessage
    generation: int
    lane: str
    """The queue it came from."""
    doomed: str | None = None
    """Who dropped it before it was looked at."""


class Wire:
    """One connection with its channels, queues and consumers, rebuilt whole on any doubt.

    Every connection is a generation. What came by an older one can't be acknowledged any more: the
    broker brings it again.
    """

    BACK_OFF = (0.3, 4.0)
    REFUSED = 20.0
    """Seconds until another try when the broker doesn't want us."""

    def __init__(self, options: QueueOptions, take: Callable[[Delivery], None]) -> None:
        self.options = options
        self.generation = 0
        self.up = asyncio.Event()
        self.connects = 0
        self.trouble: str | None = "connecting"
        """Why it is not up, in a sentence."""
        self.shared = True
        """The queue is declared as we want it. If not, somebody else declared it."""
        self._take = take
        self._connection: AbstractConnection | None = None
        self._publishing: AbstractChannel | None = None
        self._consuming: AbstractChannel | None = None
        self._exchanges: dict[str, AbstractExchange] = {}
        self._consumers: list[tuple[AbstractQueue, str]] = []
        self._doubt = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect, and stay connected until `aclose`."""
        self._task = asyncio.create_task(self._run(), name="rabbitmq-wire")

    async def aclose(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.up.clear()
        await self._drop()

    async def _run(self) -> None:
        low, high = self.BACK_OFF
        pause = low
        while True:
            try:
                await _answer(self._build(), 4 * self.options.timeout)
                pause = low
                logger.info("the broker is there", extra={"queue": self.options.queue})
                await self._watch()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # of three libraries; whatever it is, all is built anew
                refused = type(error).__name__ in _REFUSALS
                self.trouble = f"{type(error).__name__}: {error}"
                logger.warning(
                    "the broker is not there",
                    extra={"queue": self.options.queue, "error": type(error).__name__},
                )
                if refused:
                    pause = self.REFUSED
            self.up.clear()
            await self._drop()
            # A fleet must not come back in one step.
            await asyncio.sleep(pause * random.uniform(0.7, 1.3))
            pause = min(pause * 2, high)

    async def _build(self) -> None:
        import aio_pika

        options = self.options
        self._doubt = asyncio.Event()
        joint = "&" if "?" in options.url else "?"
        name = f"voipavatar@{socket.gethostname()}"
        url = f"{options.url}{joint}heartbeat={options.heartbeat}&name={name}"
        # Not by `aio_pika.connect`: what that leaves of a connection that failed wants to be
        # closed when it is collected, wherever that may be.
        connection = self._connection = aio_pika.Connection(aio_pika.connection.make_url(url))
        await connection.connect(timeout=options.timeout)
        self.generation += 1
        self.connects += 1
        doubt = self._doubt
        connection.close_callbacks.add(lambda *_: doubt.set())
        self._publishing = await self._channel(connection)
        self._consuming = await self._channel(connection)
        await self._consuming.set_qos(prefetch_count=options.prefetch)
        topic = aio_pika.ExchangeType.TOPIC
        inbox = await self._exchange(options.inbox, topic)
        await self._exchange(options.events, topic)
        dead = await self._exchange(options.dead, aio_pika.ExchangeType.DIRECT)
        self._exchanges[""] = self._publishing.default_exchange
        grave = await self._queue(options.graveyard, {})
        await grave.bind(dead, options.queue, timeout=options.timeout)
        lapsed = await self._queue(options.lapsed, {})
        await lapsed.bind(dead, options.lapsed, timeout=options.timeout)
        for seconds in options.retries:
            await self._queue(
                options.retry(seconds),
                {
                    "x-message-ttl": int(seconds * 1000),
                    # What goes on from here waits while the queue is full; else it would be lost.
                    "x-dead-letter-strategy": "at-least-once",
                    "x-overflow": "reject-publish",
                    "x-dead-letter-exchange": "",
                    "x-dead-letter-routing-key": options.queue,
                },
            )
        work = {
            "x-single-active-consumer": True,
            "x-delivery-limit": options.deliveries,
            "x-max-length": options.limit,
            "x-overflow": "reject-publish",
            "x-dead-letter-strategy": "at-least-once",
            "x-dead-letter-exchange": options.dead,
            "x-dead-letter-routing-key": options.lapsed,
        }
        self.shared = True
        for one in (options.queue, options.control):
            if not await self._declared(connection, one, work):
                # Somebody made it before, in their own way: that must not keep us from it.
                logger.warning(
                    "the queue was declared otherwise: it is used as it is", extra={"queue": one}
                )
                self.shared = False
            queue = await self._consuming.declare_queue(one, passive=True, timeout=options.timeout)
            await queue.bind(inbox, one, timeout=options.timeout)
        # What comes at once must find us able to answer.
        self.trouble = None
        self.up.set()
        for one in (options.control, options.queue, options.lapsed):
            await self._consume(one, self.generation)

    async def _channel(
        self, connection: AbstractConnection, *, vital: bool = True
    ) -> AbstractChannel:
        # A message that no queue wants comes back as an error, where it is mandatory.
        channel = connection.channel(publisher_confirms=True, on_return_raises=True)
        # Its own time limit doesn't hold for all of it.
        await _answer(channel.initialize(), self.options.timeout)
        doubt = self._doubt
        if vital:
            channel.close_callbacks.add(lambda *_: doubt.set())
        return channel

    async def _exchange(self, name: str, kind: Any) -> AbstractExchange:
        assert self._publishing is not None
        exchange = await self._publishing.declare_exchange(
            name, kind, durable=True, timeout=self.options.timeout
        )
        self._exchanges[name] = exchange
        return exchange

    async def _queue(self, name: str, arguments: dict[str, Any]) -> AbstractQueue:
        assert self._consuming is not None
        return await self._consuming.declare_queue(
            name,
            durable=True,
            arguments={"x-queue-type": "quorum", **arguments},
            timeout=self.options.timeout,
        )

    async def _declared(
        self, connection: AbstractConnection, name: str, arguments: dict[str, Any]
    ) -> bool:
        """False if it is there with other arguments: that costs the channel, so it has its own."""
        from aiormq.exceptions import ChannelPreconditionFailed

        channel = await self._channel(connection, vital=False)
        try:
            await channel.declare_queue(
                name,
                durable=True,
                arguments={"x-queue-type": "quorum", **arguments},
                timeout=self.options.timeout,
            )
        except ChannelPreconditionFailed:
            return False
        await _answer(channel.close(), self.options.timeout)
        return True

    async def _consume(self, name: str, generation: int) -> None:
        assert self._consuming is not None
        queue = await self._consuming.get_queue(name, ensure=False)

        async def taken(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            # No await before it is in our hands: callbacks are tasks, begun in the order of
            # arrival, and only so far they stay in it.
            self._take(_delivery(message, generation, name))

        tag = await queue.consume(taken, timeout=self.options.timeout)
        self._consumers.append((queue, tag))
        doubt = self._doubt
        under = await self._consuming.get_underlay_channel()
        under.on_consumer_cancel_callbacks.add(lambda *_: doubt.set())

    async def _watch(self) -> None:
        """Until something is doubtful. Raises TransportError, or what the broker said."""
        assert self._connection is not None
        probe = await self._channel(self._connection)
        # Consumers of a queue that was deleted are cancelled; one that lost them is not ours.
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self._doubt.wait(), self.options.watch)
            if self._doubt.is_set():
                raise TransportError("the connection, a channel or a consumer was closed")
            for name in (self.options.queue, self.options.control):
                queue = await _answer(probe.declare_queue(name, passive=True), self.options.timeout)
                if not queue.declaration_result.consumer_count:
                    raise TransportError("the broker has no consumer of the queue any more")

    async def ready(self, name: str) -> int:
        """Messages that wait in a queue."""
        if self._connection is None or not self.up.is_set():
            raise TransportError("the broker is not there")
        channel = await self._channel(self._connection, vital=False)
        try:
            queue = await _answer(channel.declare_queue(name, passive=True), self.options.timeout)
            return int(queue.declaration_result.message_count or 0)
        except Exception as error:
            raise TransportError(f"the broker doesn't answer: {type(error).__name__}") from error
        finally:
            with contextlib.suppress(Exception):
                await _answer(channel.close(), self.options.timeout)

    async def publish(
        self,
        exchange: str,
        key: str,
        body: bytes,
        *,
        mandatory: bool = False,
        **properties: Any,
    ) -> None:
        """Returns when the broker has it. Raises TransportError otherwise."""
        import aio_pika

        where = self._exchanges.get(exchange)
        if where is None or not self.up.is_set():
            raise TransportError("the broker is not there")
        message = aio_pika.Message(
            body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT, **properties
        )
        try:
            await _answer(
                where.publish(message, key, mandatory=mandatory, timeout=self.options.timeout),
                self.options.timeout + 1,
            )
        except Exception as error:
            raise TransportError(f"the broker didn't take it: {type(error).__name__}") from error

    async def ack(self, delivery: Delivery) -> None:
        """The broker may forget it. By an older connection nothing can be said."""
        await self._settle(delivery, delivery.raw.ack)

    async def give_back(self, delivery: Delivery) -> None:
        """The broker may bring it to another."""
        await self._settle(delivery, lambda: delivery.raw.nack(requeue=True))

    async def _settle(self, delivery: Delivery, how: Callable[[], Awaitable[None]]) -> None:
        if delivery.generation != self.generation or not self.up.is_set():
            return
        try:
            await _answer(how(), self.options.timeout)
        except Exception as error:  # it comes again, and the ledger knows it
            logger.info("an ack was lost", extra={"error": type(error).__name__})
            self._doubt.set()

    def distrust(self) -> None:
        """Build everything anew: the only way to have a message again that was left."""
        self._doubt.set()

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._exchanges = {}
        self._consumers = []
        self._publishing = self._consuming = None
        if connection is not None:
            with contextlib.suppress(Exception):
                await _answer(connection.close(), 2.0)


async def _answer(call: Awaitable[T], seconds: float) -> T:
    """What the library answers. TransportError when the connection went, or after `seconds`.

    A connection that goes cancels what waits for an answer of it. Awaited as it is, that would
    pass for somebody cancelling *us*, and end the task that asked for good.
    """
    task = asyncio.ensure_future(call)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=1.0)
    if not task.done() or task.cancelled():
        raise TransportError("the broker did not answer, or the connection went meanwhile")
    return task.result()


_REFUSALS = (
    "ProbableAuthenticationError", "AuthenticationError", "ConnectionNotAllowed",
    "ChannelAccessRefused", "IncompatibleProtocolError",
)  # fmt: skip


def _delivery(
    message: aio_pika.abc.AbstractIncomingMessage, generation: int, lane: str
) -> Delivery:
    expiration = message.expiration
    if isinstance(expiration, datetime):
        expiration = expiration.timestamp() - time.time()
    elif expiration is not None and not isinstance(expiration, (int, float)):
        expiration = expiration.total_seconds()
    envelope = Envelope(
        message_id=message.message_id or None,
        correlation_id=str(message.correlation_id) if message.correlation_id else None,
        reply_to=message.reply_to or None,
        content_type=message.content_type or None,
        timestamp=message.timestamp.timestamp() if message.timestamp else None,
        expiration=expiration,
        headers=message.headers or {},
        redelivered=bool(message.redelivered),
    )
    return Delivery(message.body, envelope, message, generation, lane)


# --- one message in hand --------------------------------------------------------------------------


@dataclass(eq=False)
class _Job:
    """A message that was taken, until its end was told and the broker has forgotten it."""

    parsed: Parsed
    entry: Entry
    delivery: Delivery | None
    """As the broker brought it last; None once acknowledged."""
    session: Any = None
    utterance: Any = None
    by: str | None = None
    """Who cut it."""
    ended: bool = False
    """Its last event is decided."""
    settled: bool = False
    """Its last event was told."""
    expired: bool = False

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def mode(self) -> Mode:
        message = self.parsed.message
        return "append" if isinstance(message, ControlMessage) else message.mode

    @property
    def late(self) -> bool:
        return self.parsed.not_after is not None and time.time() > self.parsed.not_after


class _Chunks:
    """An utterance in chunks: puts them in order, conceals what is missing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.jobs: list[_Job] = []
        """Those that were taken, the one that opened it first."""
        self.next = 0
        self.held: dict[int, tuple[_Job, list[tuple[Int16, int]]]] = {}
        self.last: int | None = None
        """The number of the final chunk."""
        self.concealed = 0.0
        self.over = False
        self.changed = asyncio.Event()
        self.seconds = 0.0

    def known(self, seq: int) -> bool:
        return seq < self.next or seq in self.held

    def add(self, job: _Job, seq: int, final: bool, sound: list[tuple[Int16, int]]) -> None:
        self.held[seq] = (job, sound)
        self.seconds += _seconds(sound)
        self.jobs.append(job)
        if final:
            self.last = seq
        self.changed.set()

    def take(self) -> list[tuple[Int16, int]] | None:
        """The next chunk's sound, if it is there."""
        found = self.held.pop(self.next, None)
        if found is None:
            return None
        self.next += 1
        return found[1]

    def conceal(self) -> list[tuple[Int16, int]]:
        """Silence for the chunks that are missing before the next one that is there."""
        import numpy as np

        if not self.held:
            return []
        first = min(self.held)
        sound = self.held[first][1]
        rate = sound[0][1] if sound else 16_000
        seconds = min(2.0, (first - self.next) * max(_seconds(sound), 0.02))
        self.next = first
        self.concealed += seconds
        return [(np.zeros(round(seconds * rate), np.int16), rate)]

    @property
    def complete(self) -> bool:
        return self.last is not None and self.next > self.last


@dataclass(eq=False)
class _Item:
    """What waits its turn in a session: a message, or an utterance in chunks."""

    job: _Job
    chunks: _Chunks | None = None

    @property
    def jobs(self) -> list[_Job]:
        return self.chunks.jobs if self.chunks is not None else [self.job]


class _Lane:
    """What waits for one session, and what is in it."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.waiting: deque[_Item] = deque()
        self.active: list[_Item] = []
        self.changed = asyncio.Event()
        self.pump: asyncio.Task[None] | None = None
        self.watch: asyncio.Task[None] | None = None
        self.begun: asyncio.Future[None] | None = None
        """Done when the item that was begun last is in the session: order here is order there."""

    def on_air(self) -> list[_Job]:
        """The messages that are spoken now."""
        for item in self.active:
            utterance = item.job.utterance
            if utterance is not None and utterance.started.done() and not utterance.finished.done():
                return item.jobs
        return self.active[0].jobs if self.active else []


# --- the feed -------------------------------------------------------------------------------------


class QueueFeed:
    """Messages of one queue, spoken by the sessions of a directory. `async with`."""

    def __init__(self, options: QueueOptions, ledger: Ledger, directory: Directory) -> None:
        self.options = options
        self.owner = uuid.uuid4().hex[:16]
        self.wire = Wire(options, self._came)
        self.counts = dict.fromkeys(("taken", "refused", "retried", *sorted(OUTCOMES)), 0)
        self._ledger = ledger
        self._directory = directory
        self._inboxes: dict[str, asyncio.Queue[Delivery]] = {
            name: asyncio.Queue() for name in (options.queue, options.control, options.lapsed)
        }
        # Not bounded by themselves: the broker sends no more than the prefetch to each.
        self._jobs: dict[str, _Job] = {}
        self._chunks: dict[str, _Chunks] = {}
        self._lanes: dict[str, _Lane] = {}
        self._utterances: dict[str, _Job] = {}
        self._skip = 0
        """So many that come next were dropped while they waited in the broker."""
        self._skip_by = ""
        self._arrived = 0
        self._undecided: set[Delivery] = set()
        """Came, and are not in a lane yet."""
        self._outbox: deque[_Notice] = deque()
        self._outgoing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._broken: str | None = None
        self._closing = False

    async def __aenter__(self) -> QueueFeed:
        await self._lasting(lambda: self._ledger.beat(self.owner))
        self.wire.start()
        for inbox in self._inboxes.values():
            self._loops.append(asyncio.create_task(self._taking(inbox), name="rabbitmq-take"))
        self._loops.append(asyncio.create_task(self._telling(), name="rabbitmq-tell"))
        self._loops.append(asyncio.create_task(self._sweeping(), name="rabbitmq-sweep"))
        for loop in self._loops:
            loop.add_done_callback(self._stopped)
        return self

    def _stopped(self, loop: asyncio.Task[None]) -> None:
        """None of them ends by itself: a feed that lost one must not look well."""
        if self._closing:
            return
        error = None if loop.cancelled() else loop.exception()
        self._broken = f"{loop.get_name()} has stopped: {type(error).__name__}"
        logger.critical("a part of the queue has stopped", extra={"part": loop.get_name()})

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self, drain: float = 0.0) -> None:
        """Take nothing more; what is spoken may end within `drain` seconds. Idempotent.

        What was not begun goes to another worker, and not before that: a consumer that is
        cancelled first lets a standby begin while this one still speaks, and what is given back
        then comes behind what the standby has by now. So the connection is kept until the end,
        which gives everything back at once and in its order.
        """
        if self._closing:
            return
        self._closing = True
        for lane in self._lanes.values():
            waiting, lane.waiting = list(lane.waiting), deque()
            for item in waiting:
                for job in item.jobs:
                    await self._release(job)
        if drain > 0 and self._tasks:
            await asyncio.wait(self._tasks, timeout=drain)
        for lane in self._lanes.values():
            for item in list(lane.active):
                item.job.by = item.job.by or "shutdown"
                if item.job.utterance is not None:
                    item.job.utterance.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)
        deadline = time.monotonic() + 3.0
        while self._outbox and self.wire.up.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        own = [*self._tasks, *self._loops]
        for lane in self._lanes.values():
            own += [task for task in (lane.pump, lane.watch) if task is not None]
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
        await self.wire.aclose()
        with contextlib.suppress(TransportError):
            await self._ledger.beat(self.owner, gone=True)

    async def connected(self, seconds: float) -> bool:
        """Whether the broker is there, or comes within so many seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await within(self.wire.up.wait(), seconds)
        return self.wire.up.is_set()

    def status(self) -> dict[str, Any]:
        """For health and people; no secrets, no speech."""
        return {
            "queue": self.options.queue,
            "broker": "up" if self.wire.up.is_set() else "down",
            "trouble": self._broken or self.wire.trouble,
            "declared_by_us": self.wire.shared,
            "connects": self.wire.connects,
            "in_hand": len(self._jobs),
            "untold": len(self._outbox),
            **self.counts,
        }

    def _count(self, what: str) -> None:
        self.counts[what] += 1
        MESSAGES.labels(what).inc()

    # -- taking ------------------------------------------------------------------------------------

    def _came(self, delivery: Delivery) -> None:
        if delivery.lane == self.options.queue:
            self._arrived += 1
            self._undecided.add(delivery)
            if self._skip > 0:
                self._skip -= 1
                delivery.doomed = self._skip_by
        if not self._left(delivery):
            self._inboxes[delivery.lane].put_nowait(delivery)

    def _left(self, delivery: Delivery) -> bool:
        """It stays with the broker, for the next worker: all but orders, once we are closing."""
        return self._closing and delivery.lane != self.options.control and delivery.doomed is None

    async def _taking(self, inbox: asyncio.Queue[Delivery]) -> None:
        while True:
            delivery = await inbox.get()
            if delivery.generation != self.wire.generation:
                self._undecided.discard(delivery)
                continue  # it comes again
            if self._left(delivery):
                continue
            try:
                if delivery.lane == self.options.lapsed:
                    await self._lapsed(delivery)
                else:
                    await self._take(delivery)
            except TransportError as error:
                # The wire went in the middle of it; the broker brings it again.
                logger.info("a message is left to come again", extra={"error": str(error)})
                if delivery.generation == self.wire.generation:
                    self.wire.distrust()
            except Exception:
                # A fault of ours must not stop the queue, nor may the message be lost in it.
                logger.exception("a message could not be handled")
                with contextlib.suppress(TransportError):
                    await self._refuse(
                        delivery, Refused("internal", "it could not be handled: see the log")
                    )
            finally:
                self._undecided.discard(delivery)

    async def _take(self, delivery: Delivery) -> None:
        try:
            parsed = parse(delivery.body, delivery.envelope, max_body=self.options.max_body)
        except Refused as error:
            await self._refuse(delivery, error)
            return
        if self._closing and delivery.doomed is None:
            if not isinstance(parsed.message, ControlMessage):
                return
        parsed = await self._identified(parsed, delivery)
        job = self._jobs.get(parsed.id)
        if job is not None and self._again(job, delivery):
            if job.settled:
                await self._forget(job)
            return
        attempt = _attempt(delivery)
        entry = Entry(
            id=parsed.id, owner=self.owner, queue=self.options.queue, attempt=attempt,
            at=time.time(), event=self._common(parsed),
        )  # fmt: skip
        known = await self._lasting(lambda: self._ledger.take(entry))
        if known is not None:
            taken = await self._known(known, entry, parsed, delivery)
            if not taken:
                return
        self._count("taken")
        job = self._jobs[parsed.id] = _Job(parsed, entry, delivery)
        if attempt == 1 and known is None:
            self._tell(job, "accepted")
        self._undecided.discard(delivery)
        if delivery.doomed is not None and not isinstance(parsed.message, ControlMessage):
            self._end(job, "interrupted", spoken_ms=0, by=delivery.doomed)
            return
        await self._dispatch(job)

    async def _identified(self, parsed: Parsed, delivery: Delivery) -> Parsed:
        """A message without an id: the same body again is another message, unless redelivered."""
        if parsed.named:
            return parsed
        for number in range(1, 1_000):
            id = parsed.id if number == 1 else f"{parsed.id}.{number}"
            held = self._jobs.get(id)
            if held is not None:
                mine = held.delivery is not None
                if mine and held.delivery.generation != delivery.generation:  # type: ignore[union-attr]
                    break
                continue
            known = await self._lasting(lambda id=id: self._ledger.find(id))  # type: ignore[misc]
            if known is None:
                break
            retry = known.outcome == "retry" and _attempt(delivery) > known.attempt
            if retry or (delivery.envelope.redelivered and not known.told):
                break
        return Parsed(parsed.message, id, True, parsed.not_after, parsed.sound)

    def _again(self, job: _Job, delivery: Delivery) -> bool:
        """It is in our hands already: the same one come again, or a copy."""
        if job.delivery is None and not job.entry.acked_early:
            job.delivery = delivery  # its ack was lost on the way
            return True
        if job.delivery is not None and job.delivery.generation != delivery.generation:
            job.delivery = delivery
            return True
        self._duplicate(delivery, job.parsed.id, job.entry.outcome)
        return True

    async def _known(self, known: Entry, entry: Entry, parsed: Parsed, delivery: Delivery) -> bool:
        """An id that the ledger knows. True if it is to be spoken now after all."""
        redelivered = delivery.envelope.redelivered
        if known.outcome == "retry":
            if entry.attempt > known.attempt:
                await self._lasting(lambda: self._ledger.put(entry))
                return True
            if redelivered:  # the ack of the try before was lost
                await self.wire.ack(delivery)
                return False
        elif known.outcome is not None:
            if not known.told:
                job = self._jobs[known.id] = _Job(parsed, known, delivery)
                job.ended = True
                self._post(_Notice(known.event, job))
            elif redelivered:
                await self.wire.ack(delivery)
            else:
                self._duplicate(delivery, known.id, known.outcome)
            return False
        elif known.owner != self.owner and redelivered:
            return await self._take_over(known, entry, parsed, delivery)
        elif known.owner == self.owner and redelivered:
            await self._lasting(lambda: self._ledger.put(entry))
            return True
        self._duplicate(delivery, known.id, known.outcome)
        return False

    async def _take_over(
        self, known: Entry, entry: Entry, parsed: Parsed, delivery: Delivery
    ) -> bool:
        """Another worker had it. While that one lives it is theirs: the broker may be wrong."""
        while True:
            alive = await self._lasting(lambda: self._ledger.alive(known.owner))
            now = await self._lasting(lambda: self._ledger.find(known.id))
            if now is None or now.outcome is not None or not alive:
                break
            if delivery.generation != self.wire.generation:
                raise TransportError("the connection went while another worker was waited for")
            await asyncio.sleep(0.25)
        if now is not None and now.outcome is not None:
            return await self._known(now, entry, parsed, delivery)
        entry.heard = known.heard
        await self._lasting(lambda: self._ledger.put(entry))
        share = known.heard / known.length if known.length else float(known.heard > 2.0)
        if known.heard > 0 and share >= self.options.respeak:
            job = self._jobs[entry.id] = _Job(parsed, entry, delivery)
            spoken = round(known.heard * 1000)
            self._end(job, "interrupted", spoken_ms=spoken, by="worker_lost")
            return False
        return True

    def _duplicate(self, delivery: Delivery, id: str, outcome: str | None) -> None:
        sender = sender_of(delivery.body, delivery.envelope)
        self._count("duplicate")
        event = {
            "schema": SCHEMA, "type": "duplicate", "message_id": id, "at": time.time(),
            "session": self.options.queue, "queue": self.options.queue,
            "correlation_id": sender.correlation_id,
            "outcome": outcome if outcome in OUTCOMES else None, "reply_to": sender.reply_to,
        }  # fmt: skip
        self._post(_Notice(event, None, delivery))

    async def _refuse(self, delivery: Delivery, error: Refused) -> None:
        """A message that no time heals: to the dead ones, with the reason. Its sender is told."""
        self._count("refused")
        sender = sender_of(delivery.body, delivery.envelope)
        assert sender.message_id is not None
        entry = Entry(
            id=sender.message_id, owner=self.owner, queue=self.options.queue, at=time.time(),
            outcome="failed",
        )  # fmt: skip
        entry.event = {
            "schema": SCHEMA, "type": "failed", "message_id": entry.id, "at": entry.at,
            "session": self.options.queue, "queue": self.options.queue,
            "correlation_id": sender.correlation_id,
            "code": error.code, "error": str(error), "retryable": False, "spoken_ms": 0,
            "attempt": 1, "reply_to": sender.reply_to,
        }  # fmt: skip
        known = await self._lasting(lambda: self._ledger.take(entry))
        await self._bury(delivery.body, delivery, error.code, str(error))
        if known is None:
            self._count("failed")
            job = _Job(_NOTHING, entry, delivery, ended=True)
            self._jobs[entry.id] = job
            self._post(_Notice(entry.event, job))
        elif known.told or known.outcome is None or known.id in self._jobs:
            await self.wire.ack(delivery)
        else:
            job = self._jobs[known.id] = _Job(_NOTHING, known, delivery, ended=True)
            self._post(_Notice(known.event, job))

    async def _bury(self, body: bytes, delivery: Delivery, code: str, why: str) -> None:
        """Publish to the dead ones. Raises TransportError."""
        headers = {
            key: value
            for key, value in delivery.envelope.headers.items()
            if isinstance(value, (str, bytes, int, bool, float))
        }
        headers |= {"x-reason": code, "x-error": why[:1000], "x-queue": self.options.queue}
        await self.wire.publish(
            self.options.dead, self.options.queue, body, mandatory=True, headers=headers,
            message_id=sender_of(body, delivery.envelope).message_id,
            content_type=delivery.envelope.content_type,
            correlation_id=delivery.envelope.correlation_id, timestamp=datetime.now(timezone.utc),
        )  # fmt: skip

    async def _lapsed(self, delivery: Delivery) -> None:
        """What the broker itself gave up gets its outcome here, then goes to the dead ones."""
        reason = _death(delivery)
        sender = sender_of(delivery.body, delivery.envelope)
        with contextlib.suppress(Refused):
            parsed = parse(delivery.body, delivery.envelope)
            parsed = await self._identified(parsed, delivery)
            sender = Envelope(parsed.id, sender.correlation_id, sender.reply_to)
        assert sender.message_id is not None
        kind = "expired" if reason == "expired" else "failed"
        event: dict[str, Any] = {
            "schema": SCHEMA, "type": kind, "message_id": sender.message_id, "at": time.time(),
            "session": self.options.queue, "queue": self.options.queue,
            "correlation_id": sender.correlation_id,
            "reply_to": sender.reply_to,
        }  # fmt: skip
        if kind == "failed":
            event |= {
                "code": reason, "retryable": False, "spoken_ms": 0, "attempt": 1,
                "error": "it was delivered again and again without an end: workers die of it",
            }  # fmt: skip
        entry = Entry(
            id=sender.message_id, owner=self.owner, queue=self.options.queue, outcome=kind,
            event=event, at=time.time(),
        )  # fmt: skip
        known = await self._lasting(lambda: self._ledger.take(entry))
        await self._bury(delivery.body, delivery, reason, "the broker gave it up")
        if known is not None and known.outcome is not None and known.told:
            await self.wire.ack(delivery)
            return
        if known is not None and known.outcome is not None:
            entry = known
        elif known is not None:
            await self._lasting(lambda: self._ledger.put(entry))
        self._count(kind)
        job = self._jobs[entry.id] = _Job(_NOTHING, entry, delivery, ended=True)
        self._post(_Notice(entry.event, job))

    # -- whom it is for ----------------------------------------------------------------------------

    async def _dispatch(self, job: _Job) -> None:
        message = job.parsed.message
        try:
            job.session = self._addressed(job)
            job.entry.event["session"] = job.session.id
            if job.late:
                self._end(job, "expired")
            elif isinstance(message, ControlMessage):
                await self._control(job, message)
            elif isinstance(message, AudioMessage) and message.utterance is not None:
                await self._chunk(job, message)
            else:
                await self._queue(job)
        except Exception as error:
            await self._fail(job, error)

    def _addressed(self, job: _Job) -> Any:
        message = job.parsed.message
        found: Any = None
        if message.session is not None:
            found = self._directory.find(message.session)
            if found is None:
                raise Refused("no_session", f"there is no session {message.session[:64]!r} here")
        elif message.persona is not None:
            found = self._directory.of_persona(message.persona)
            if found is None:
                raise Refused("no_session", f"no session here is {message.persona[:64]!r}")
        elif message.session_id:
            found = self._directory.find(message.session_id)
        found = found or self._directory.own()
        if found is None:
            raise TransportError("no avatar is on air for this queue just now")
        return found

    def _lane(self, session: Any) -> _Lane:
        lane = self._lanes.get(session.id)
        if lane is None or lane.session is not session:
            lane = self._lanes[session.id] = _Lane(session)
            lane.pump = asyncio.create_task(self._pumping(lane), name="rabbitmq-lane")
            lane.watch = asyncio.create_task(self._listening(lane), name="rabbitmq-states")
        return lane

    async def _queue(self, job: _Job) -> None:
        """Put a message where its turn comes."""
        lane = self._lane(job.session)
        item = _Item(job)
        if job.mode == "append":
            await self._append(lane, item)
        else:
            await self._cut(lane, item)
            await self._acked_early(job)

    async def _cut(self, lane: _Lane, item: _Item) -> None:
        """A message that doesn't wait."""
        job = item.job
        cut = lane.on_air()
        if job.mode == "replace":
            await self._clear(lane, job.id, broker=job.delivery)
            cut = [one for active in lane.active for one in active.jobs]
        for one in cut:
            one.by = one.by or job.id
        self._position(job, 0, 0.0)
        self._begin(lane, item)

    async def _append(self, lane: _Lane, item: _Item) -> None:
        while len(lane.waiting) >= WAITING:
            lane.changed.clear()
            await lane.changed.wait()
        before = len(lane.active) + len(lane.waiting)
        self._position(item.job, before, _ahead(lane))
        lane.waiting.append(item)
        lane.changed.set()
        await self._acked_early(item.job)

    def _position(self, job: _Job, position: int, seconds: float) -> None:
        self._tell(job, "queued", position=position, eta_ms=round(seconds * 1000))

    async def _acked_early(self, job: _Job) -> None:
        message = job.parsed.message
        chunk = isinstance(message, AudioMessage) and message.utterance is not None
        wish = None if isinstance(message, ControlMessage) else message.ack
        if not chunk and (wish or self.options.ack) != "on_accept":
            return
        job.entry.acked_early = True
        await self._lasting(lambda: self._ledger.put(job.entry))
        if job.delivery is not None:
            delivery, job.delivery = job.delivery, None
            await self.wire.ack(delivery)

    async def _clear(self, lane: _Lane, by: str, broker: Delivery | None = None) -> None:
        """Drop what waits: here, and in the broker if the order didn't come behind it."""
        if broker is not None and broker.lane == self.options.control:
            # Before anything is let go, for that makes room for more to come.
            for _ in range(5):
                arrived = self._arrived
                ready = await self.wire.ready(self.options.queue)
                if self._arrived == arrived:
                    break
            self._skip, self._skip_by = ready, by
            for delivery in self._undecided:
                left = self._left(delivery)
                delivery.doomed = by
                if left:
                    self._inboxes[delivery.lane].put_nowait(delivery)
        waiting, lane.waiting = list(lane.waiting), deque()
        for item in waiting:
            for job in item.jobs:
                self._end(job, "interrupted", spoken_ms=0, by=by)
            if item.chunks is not None:
                item.chunks.over = True
        lane.changed.set()

    # -- speaking ----------------------------------------------------------------------------------

    async def _pumping(self, lane: _Lane) -> None:
        """Keep the session supplied: one that is spoken, one that is made ready."""
        while True:
            while lane.waiting and len(lane.active) < AHEAD and not self._closing:
                item = lane.waiting.popleft()
                lane.changed.set()
                if all(job.ended for job in item.jobs):
                    continue
                if not self._begin(lane, item):
                    continue
            lane.changed.clear()
            await lane.changed.wait()

    def _begin(self, lane: _Lane, item: _Item) -> bool:
        if item.job.late:
            for job in item.jobs:
                self._end(job, "expired")
            return False
        lane.active.append(item)
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        before, lane.begun = lane.begun, ready
        self._hold(self._speaking(lane, item, before, ready), "rabbitmq-speak")
        return True

    async def _speaking(
        self,
        lane: _Lane,
        item: _Item,
        before: asyncio.Future[None] | None,
        ready: asyncio.Future[None],
    ) -> None:
        job = item.job
        try:
            sound = await self._sound(job) if item.chunks is None else None
            if before is not None and job.mode == "append":
                await asyncio.wait([before])
            if job.ended:
                return
            utterance = await self._opened(job, sound)
            job.utterance = utterance
            self._utterances[utterance.id] = job
            if not ready.done():
                ready.set_result(None)
            feeding = (
                asyncio.create_task(self._feeding(item.chunks, utterance), name="rabbitmq-chunks")
                if item.chunks is not None
                else None
            )
            try:
                await self._following(item, utterance)
            finally:
                if feeding is not None:
                    feeding.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)
            await self._judge(item, utterance)
        except Exception as error:
            for one in list(item.jobs):
                await self._fail(one, error)
        finally:
            if not ready.done():
                ready.set_result(None)
            if item.chunks is not None:
                item.chunks.over = True
            if job.utterance is not None:
                self._utterances.pop(job.utterance.id, None)
            if item in lane.active:
                lane.active.remove(item)
            lane.changed.set()

    async def _opened(self, job: _Job, sound: list[tuple[Int16, int]] | None) -> Any:
        message, session = job.parsed.message, job.session
        if isinstance(message, TextMessage):
            voices = session.persona.voices(message.voice) if message.voice else None
            return await session.say(message.data, mode=message.mode, voice=voices)
        utterance = session.open_turn(job.mode)
        if sound is not None:
            try:
                for pcm, rate in sound:
                    utterance.push(pcm, rate)
            except InputError:
                utterance.cancel()
                raise
            utterance.end()
            job.entry.length = _seconds(sound)
        return utterance

    async def _following(self, item: _Item, utterance: Any) -> None:
        """Until it is over: tell its start and its progress, and see to its last moment."""
        job = item.job
        ends = {utterance.started, utterance.finished}
        if job.parsed.not_after is not None:
            left = job.parsed.not_after - time.time()
            await asyncio.wait(ends, timeout=max(0.0, left), return_when="FIRST_COMPLETED")
            if not utterance.started.done() and not utterance.heard:
                job.expired = True
                utterance.cancel()
        await asyncio.wait(ends, return_when="FIRST_COMPLETED")
        if utterance.started.done() and utterance.started.result() is not None:
            for one in item.jobs:
                self._tell(one, "started", first_frame_ts=utterance.started.result())
        while not utterance.finished.done():
            await asyncio.wait([utterance.finished], timeout=self.options.progress)
            if utterance.finished.done():
                break
            job.entry.heard = utterance.heard
            for one in item.jobs:
                self._tell(one, "progress", spoken_ms=round(utterance.heard * 1000))
            with contextlib.suppress(TransportError):
                await self._ledger.put(job.entry)

    async def _judge(self, item: _Item, utterance: Any) -> None:
        """The outcome of a turn that is over."""
        played = utterance.finished.result()
        spoken = round(played.heard * 1000)
        for job in list(item.jobs):
            if item.job.expired and played.heard == 0:
                self._end(job, "expired")
            elif played.interrupted:
                self._end(job, "interrupted", spoken_ms=spoken, by=job.by or "session")
            elif utterance.error is not None:
                cause = utterance.cause or VoipAvatarError(utterance.error)
                await self._fail(job, cause, heard=played.heard)
            else:
                self._end(job, "finished", spoken_ms=spoken)

    async def _sound(self, job: _Job) -> list[tuple[Int16, int]] | None:
        """The decoded sound of an audio message; None of a text. Raises Refused and the like."""
        message = job.parsed.message
        if not isinstance(message, AudioMessage):
            return None
        data = job.parsed.sound
        if data is None:
            assert message.url is not None and message.sha256 is not None
            data = await fetch(
                message.url, message.sha256, self.options.urls, self.options.max_fetch
            )
        return await decoded(data, message, self.options.max_seconds)

    # -- chunks ------------------------------------------------------------------------------------

    async def _chunk(self, job: _Job, message: AudioMessage) -> None:
        assert message.utterance is not None and message.seq is not None
        chunks = self._chunks.get(message.utterance)
        if chunks is not None and not chunks.over and chunks.known(message.seq):
            late = message.seq < chunks.next
            taken = any(_seq(one) == message.seq for one in chunks.jobs)
            if late and not taken:
                self._end(job, "expired")  # it was concealed meanwhile
            else:
                self._end(job, "duplicate", outcome=None)
            return
        if chunks is not None and chunks.over:
            self._end(job, "expired")
            return
        sound = await decoded(job.parsed.sound or b"", message, self.options.max_seconds)
        if chunks is None:
            chunks = self._chunks[message.utterance] = _Chunks(message.utterance)
            while len(self._chunks) > 1_000:
                gone = next((key for key, one in self._chunks.items() if one.over), None)
                if gone is None:
                    break
                del self._chunks[gone]
            chunks.add(job, message.seq, message.final, sound)
            lane = self._lane(job.session)
            item = _Item(job, chunks)
            if job.mode == "append":
                await self._append(lane, item)
                return
            await self._cut(lane, item)
        else:
            if chunks.seconds + _seconds(sound) > self.options.max_seconds * 4:
                raise Refused("too_long", "the utterance is too long: begin another")
            self._position(job, 0, 0.0)
            chunks.add(job, message.seq, message.final, sound)
            first = chunks.jobs[0]
            if first.utterance is not None and first.utterance.started.done():
                began = first.utterance.started.result()
                if began is not None:
                    self._tell(job, "started", first_frame_ts=began)
        await self._acked_early(job)

    async def _feeding(self, chunks: _Chunks, utterance: Any) -> None:
        """Push chunks in their order; what is missing for too long is silence."""
        options = self.options
        heard_of = time.monotonic()
        while not chunks.complete:
            sound = chunks.take()
            if sound is not None:
                heard_of = time.monotonic()
                for pcm, rate in sound:
                    utterance.push(pcm, rate)
                continue
            chunks.changed.clear()
            limit = options.gap if chunks.held else options.idle_chunks
            left = heard_of + limit - time.monotonic()
            if left > 0:
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(chunks.changed.wait(), left)
                if not chunks.held or chunks.next in chunks.held:
                    continue
                if time.monotonic() - heard_of < options.gap:
                    continue
            if not chunks.held:
                break  # nobody sends the rest
            for pcm, rate in chunks.conceal():
                utterance.push(pcm, rate)
            logger.info("missing chunks are silence", extra={"queue": options.queue})
        chunks.over = True
        utterance.end()

    # -- control -----------------------------------------------------------------------------------

    async def _control(self, job: _Job, message: ControlMessage) -> None:
        session, command = job.session, message.command
        lane = self._lane(session)
        if command in ("start", "resume"):
            session.resume()
        elif command == "pause":
            session.pause()
        elif command == "clear":
            await self._clear(lane, job.id, broker=job.delivery)
        elif command == "stop":
            for item in lane.active:
                for one in item.jobs:
                    one.by = one.by or job.id
            await self._clear(lane, job.id, broker=job.delivery)
            await session.interrupt()
        elif command == "voice":
            session.choose_voice(message.value)
        elif job.delivery is not None and job.delivery.lane == self.options.control:
            # A face may have to be prepared first: the next order must not wait for that.
            self._hold(self._changing(job, session, message), "rabbitmq-change")
            return
        else:
            await self._changing(job, session, message)
            return
        self._end(job, "finished", spoken_ms=0)

    async def _changing(self, job: _Job, session: Any, message: ControlMessage) -> None:
        """Another face. One after the other, in the order in which they were asked for."""
        assert message.value is not None
        try:
            if message.command == "persona":
                await session.swap_persona(self._directory.load(message.value))
            else:
                await session.choose_idle(message.value)
        except Exception as error:
            await self._fail(job, error)
            return
        self._end(job, "finished", spoken_ms=0)

    # -- outcomes ----------------------------------------------------------------------------------

    async def _fail(self, job: _Job, error: BaseException, heard: float = 0.0) -> None:
        """Try again later what time may heal and nobody has heard of; else it has failed."""
        if job.ended:
            return
        code, retryable = _judged(error)
        attempt = job.entry.attempt
        early = job.entry.acked_early
        if retryable and heard == 0 and attempt < self.options.attempts and not early:
            try:
                await self._retry(job)
                return
            except TransportError:
                # The broker didn't take it: it has the message still, and brings it again.
                job.ended = True
                self._jobs.pop(job.id, None)
                job.entry.outcome = None
                await self._lasting(lambda: self._ledger.put(job.entry))
                if job.delivery is not None:
                    await self.wire.give_back(job.delivery)
                return
        if code not in ("worker_lost",) and job.delivery is not None:
            with contextlib.suppress(TransportError):
                await self._bury(job.delivery.body, job.delivery, code, _told(error))
        self._end(
            job, "failed", code=code, error=_told(error), retryable=retryable,
            spoken_ms=round(heard * 1000), attempt=attempt,
        )  # fmt: skip

    async def _retry(self, job: _Job) -> None:
        delivery = job.delivery
        assert delivery is not None
        attempt = job.entry.attempt
        pause = self.options.retries[min(attempt, len(self.options.retries)) - 1]
        job.entry.outcome = "retry"
        await self._lasting(lambda: self._ledger.put(job.entry))
        headers = dict(delivery.envelope.headers) | {"x-attempt": attempt + 1}
        headers.pop("x-death", None)
        envelope = delivery.envelope
        await self.wire.publish(
            "", self.options.retry(pause), delivery.body, mandatory=True, headers=headers,
            message_id=envelope.message_id, correlation_id=envelope.correlation_id,
            reply_to=envelope.reply_to, content_type=envelope.content_type,
            timestamp=envelope.timestamp,
        )  # fmt: skip
        self._count("retried")
        job.ended = True
        self._jobs.pop(job.id, None)
        await self.wire.ack(delivery)

    def _end(self, job: _Job, kind: str, **fields: Any) -> None:
        """Decide how a message ends. Only the first decision counts."""
        if job.ended:
            return
        job.ended = True
        self._count(kind)
        job.entry.outcome = kind
        job.entry.event = job.entry.event | {"type": kind, "at": time.time()} | fields
        if job.utterance is not None:
            job.entry.event["utterance"] = job.utterance.id
        job.entry.at = time.time()
        self._post(_Notice(job.entry.event, job))

    async def _release(self, job: _Job) -> None:
        """Leave a message that was not begun to the next worker."""
        if job.ended:
            return
        job.ended = True
        self._jobs.pop(job.id, None)
        if job.entry.acked_early:
            self._jobs[job.id] = job
            job.ended = False
            self._end(job, "interrupted", spoken_ms=0, by="shutdown")
            return
        with contextlib.suppress(TransportError):
            await self._ledger.drop(job.id)
        if job.delivery is not None:
            self._undecided.add(job.delivery)

    async def _forget(self, job: _Job) -> None:
        """Its end was told: the broker may forget it, and so do we."""
        delivery, job.delivery = job.delivery, None
        self._jobs.pop(job.id, None)
        if delivery is not None:
            await self.wire.ack(delivery)

    # -- telling -----------------------------------------------------------------------------------

    def _common(self, parsed: Parsed) -> dict[str, Any]:
        message = parsed.message
        return {
            "schema": SCHEMA,
            "message_id": parsed.id,
            "correlation_id": message.correlation_id,
            "session": self.options.queue,
            "queue": self.options.queue,
            "session_id": message.session_id,
            "reply_to": message.reply_to,
        }

    def _tell(self, job: _Job, kind: str, **fields: Any) -> None:
        if job.ended:
            return
        event = job.entry.event | {"type": kind, "at": time.time()} | fields
        if job.utterance is not None:
            event["utterance"] = job.utterance.id
        self._post(_Notice(event, None))

    def _post(self, notice: _Notice) -> None:
        if len(self._outbox) >= OUTBOX:
            # What ends a message is in the ledger too, but it is small: the rest goes first.
            loose = next((one for one in self._outbox if one.loose), None)
            if loose is not None:
                self._outbox.remove(loose)
            elif notice.loose:
                return
        self._outbox.append(notice)
        self._outgoing.set()

    async def _telling(self) -> None:
        """Events in their order, each until the broker has it."""
        while True:
            while not self._outbox:
                self._outgoing.clear()
                await self._outgoing.wait()
            notice = self._outbox[0]
            try:
                await self._told(notice)
            except TransportError:
                if notice.state and self._outbox and self._outbox[0] is notice:
                    self._outbox.popleft()  # of no use later
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(self.wire.up.wait(), 1.0)
                await asyncio.sleep(0.05)
                continue
            except Exception:  # one event that can't be told must not silence the others
                logger.exception("an event could not be told", extra={"type": notice.event["type"]})
                if notice.job is not None:
                    await self._forget(notice.job)
            if self._outbox and self._outbox[0] is notice:
                self._outbox.popleft()

    async def _told(self, notice: _Notice) -> None:
        job = notice.job
        event = {key: value for key, value in notice.event.items() if value is not None}
        reply_to = event.pop("reply_to", None)
        if job is not None and not notice.written:
            await self._ledger.put(job.entry)
            notice.written = True
        body = (
            EVENTS[event["type"]]
            .model_validate(event)
            .model_dump_json(by_alias=True, exclude_none=True)
        )
        if not notice.sent:
            await self.wire.publish(
                self.options.events, _key(event), body.encode(), **_properties(event)
            )
            notice.sent = True
        if reply_to and reply_to not in self.options.own_names and not notice.copied:
            await self.wire.publish("", reply_to, body.encode(), **_properties(event))
            notice.copied = True
        if job is not None:
            job.entry.told = True
            await self._ledger.put(job.entry)
            job.settled = True
            await self._forget(job)
        elif notice.delivery is not None:
            await self.wire.ack(notice.delivery)

    async def _listening(self, lane: _Lane) -> None:
        """A session's states and captions, as long as it lives."""
        session = lane.session
        async with contextlib.aclosing(session.events()) as events:
            async for event in events:
                common = {
                    "schema": SCHEMA, "session": session.id, "queue": self.options.queue,
                    "at": event["at"],
                }  # fmt: skip
                if event["type"] == "state":
                    state = str(event["state"]).upper()
                    notice = common | {"type": "state", "state": state}
                    self._post(_Notice(notice, None, state=True))
                elif event["type"] == "caption":
                    job = self._utterances.get(event["utterance"])
                    if job is not None:
                        notice = job.entry.event | common | {
                            "type": "caption", "utterance": event["utterance"],
                            "text": event["text"], "start": event["start"], "end": event["end"],
                            "reply_to": None,
                        }  # fmt: skip
                        self._post(_Notice(notice, None, state=True))
        self._lanes = {key: one for key, one in self._lanes.items() if one is not lane}
        if lane.pump is not None:
            lane.pump.cancel()
        for item in lane.waiting:
            for one in item.jobs:
                await self._fail(one, TransportError("the avatar went off the air"))

    async def _sweeping(self) -> None:
        """Signs of life; and what a worker that is gone has left without an end."""
        turn = 0
        while True:
            try:
                await self._ledger.beat(self.owner)
                if turn % 10 == 9 and self.wire.up.is_set():
                    await self._orphans()
                if turn % 60 == 5:
                    await self._ledger.prune()
            except TransportError as error:
                logger.warning("the record of messages fails", extra={"error": str(error)})
            turn += 1
            await asyncio.sleep(1.0)

    async def _orphans(self) -> None:
        for entry in await self._ledger.open(self.options.queue):
            mine = entry.owner == self.owner
            if entry.id in self._jobs or entry.outcome == "retry":
                continue
            if mine or await self._ledger.alive(entry.owner):
                continue
            if entry.outcome is None:
                if not entry.acked_early:
                    continue  # the broker brings it
                entry.owner = self.owner
                entry.outcome = "interrupted" if entry.heard else "failed"
                entry.event |= {"type": entry.outcome, "at": time.time()}
                spoken = round(entry.heard * 1000)
                entry.event |= (
                    {"spoken_ms": spoken, "by": "worker_lost"}
                    if entry.heard
                    else {
                        "code": "worker_lost", "retryable": True, "spoken_ms": 0,
                        "attempt": entry.attempt,
                        "error": "the worker that had accepted it is gone: send it again",
                    }
                )  # fmt: skip
                self._count(entry.outcome)
            job = self._jobs[entry.id] = _Job(_NOTHING, entry, None, ended=True)
            self._post(_Notice(entry.event, job))

    # -- what is shared ----------------------------------------------------------------------------

    def _hold(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lasting(self, call: Callable[[], Awaitable[T]]) -> T:
        """Ask the ledger until it answers: without it nothing can be said once and only once."""
        pause = 0.1
        while True:
            try:
                return await call()
            except TransportError as error:
                logger.warning("the record of messages fails", extra={"error": str(error)})
            await asyncio.sleep(pause)
            pause = min(2.0, pause * 2)


@dataclass(eq=False)
class _Notice:
    """An event on its way out."""

    event: dict[str, Any]
    job: _Job | None
    """Whose end it is."""
    delivery: Delivery | None = None
    """What is acknowledged once it was told."""
    state: bool = False
    """Of no use later."""
    written: bool = False
    sent: bool = False
    copied: bool = False

    @property
    def loose(self) -> bool:
        return self.job is None and self.delivery is None


_NOTHING = Parsed(ControlMessage(command="start"), "", True, None)


def _key(event: dict[str, Any]) -> str:
    session = re.sub(r"[^A-Za-z0-9_-]", "_", str(event["session"]))[:100]
    return f"session.{session}.{event['type']}"


def _properties(event: dict[str, Any]) -> dict[str, Any]:
    """`message_id` of an outcome is the same however often it comes: readers can tell."""
    message, kind = event.get("message_id"), event["type"]
    ends = kind in OUTCOMES and kind != "duplicate"
    return {
        "message_id": f"{message}:{kind}" if ends else uuid.uuid4().hex,
        "correlation_id": event.get("correlation_id"),
        "content_type": "application/json",
        "type": kind,
    }


def _attempt(delivery: Delivery) -> int:
    value = delivery.envelope.headers.get("x-attempt")
    return value if isinstance(value, int) and 1 <= value <= 100 else 1


def _death(delivery: Delivery) -> str:
    deaths = delivery.envelope.headers.get("x-death")
    first = deaths[0] if isinstance(deaths, list) and deaths else {}
    reason = first.get("reason") if isinstance(first, dict) else None
    if isinstance(reason, bytes):
        reason = reason.decode("ascii", "replace")
    return str(reason or delivery.envelope.headers.get("x-first-death-reason") or "unknown")


def _ahead(lane: _Lane) -> float:
    begun = [item.job.utterance for item in lane.active if item.job.utterance is not None]
    return float(sum(one.backlog for one in begun))


def _seq(job: _Job) -> int | None:
    message = job.parsed.message
    return message.seq if isinstance(message, AudioMessage) else None


def _seconds(sound: Sequence[tuple[Int16, int]]) -> float:
    return sum(len(pcm) / rate for pcm, rate in sound)


def _judged(error: BaseException) -> tuple[str, bool]:
    """(code, whether time may heal it)."""
    if isinstance(error, Refused):
        return error.code, False
    if isinstance(error, TransportError):
        return "out_of_reach", error.retryable
    if isinstance(error, (CapacityError, StageError)):
        return "not_now", True
    if isinstance(error, InputError):
        return "invalid", False
    if isinstance(error, VoipAvatarError):
        return "failed", False
    return "internal", False


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, VoipAvatarError) else type(error).__name__


# --- sounds ---------------------------------------------------------------------------------------


async def decoded(
    data: bytes, message: AudioMessage, max_seconds: float
) -> list[tuple[Int16, int]]:
    """int16 mono pieces and their rate. Raises Refused for what is no sound, or too long."""
    if message.format == "pcm":
        return _plain(data, message, max_seconds)
    return await asyncio.to_thread(_decode, data, max_seconds)


def _plain(data: bytes, message: AudioMessage, max_seconds: float) -> list[tuple[Int16, int]]:
    import numpy as np

    rate, channels = message.rate or 16_000, message.channels or 1
    if len(data) % (2 * channels):
        raise Refused("no_sound", "pcm is 16-bit samples: these bytes are no whole number of them")
    pcm = np.frombuffer(data, "<i2").reshape(-1, channels)
    if len(pcm) / rate > max_seconds:
        raise Refused("too_long", f"the sound is longer than {max_seconds:g} s: send it in parts")
    mono = pcm[:, 0] if channels == 1 else pcm.mean(axis=1).astype(np.int16)
    return [(np.ascontiguousarray(mono), rate)]


def _decode(data: bytes, max_seconds: float) -> list[tuple[Int16, int]]:
    from .sources import decode_audio

    pieces: list[tuple[Int16, int]] = []
    seconds = 0.0
    try:
        for pcm, rate in decode_audio(data):
            seconds += len(pcm) / rate
            if seconds > max_seconds:
                # A few bytes may hold hours of it.
                raise Refused("too_long", f"the sound is longer than {max_seconds:g} s")
            pieces.append((pcm, rate))
    except Refused:
        raise
    except InputError as error:
        raise Refused("no_sound", str(error)) from None
    except Exception as error:  # decoders meet what nobody has foreseen
        raise Refused("no_sound", f"the sound can't be decoded: {type(error).__name__}") from None
    if seconds == 0:
        raise Refused("no_sound", "there is not one sample in the sound")
    return pieces


async def fetch(url: str, sha256: str, allowed: Sequence[str], limit: int) -> bytes:
    """What is at `url`. Raises Refused, or TransportError for what may work later.

    Only addresses below one of `allowed`, no redirects, at most `limit` bytes, and only what has
    the hash: otherwise a message could make this server read what its sender may not.
    """
    import hashlib

    import aiohttp

    if not any(_below(url, one) for one in allowed):
        raise Refused("not_allowed", "the address is not on this server's list (audio_urls)")
    time_limit = aiohttp.ClientTimeout(total=20, connect=5)
    try:
        async with (
            aiohttp.ClientSession(timeout=time_limit) as client,
            client.get(url, allow_redirects=False) as answer,
        ):
            if answer.status >= 500 or answer.status == 429:
                raise TransportError(f"the sound's server answers {answer.status}")
            if answer.status != 200:
                raise Refused("not_there", f"the sound's server answers {answer.status}")
            data = bytearray()
            async for piece in answer.content.iter_chunked(1 << 16):
                data += piece
                if len(data) > limit:
                    raise Refused("too_large", f"the sound is larger than {limit:,} bytes")
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        raise TransportError(f"the sound can't be had: {type(error).__name__}") from None
    if hashlib.sha256(data).hexdigest() != sha256.lower():
        raise Refused("wrong_hash", "what is at the address has another sha256")
    return bytes(data)


def _below(url: str, allowed: str) -> bool:
    """`url` has scheme, host and port of `allowed`, and its path begins with that one's."""
    try:
        one, other = urlsplit(url), urlsplit(allowed)
        if one.scheme not in ("http", "https") or one.username or one.password:
            return False
        if (one.scheme, one.hostname, one.port) != (other.scheme, other.hostname, other.port):
            return False
    except ValueError:
        return False
    path = unquote(unquote(one.path))
    if ".." in path.split("/") or "\\" in path:
        return False
    root = other.path if other.path.endswith("/") else other.path + "/"
    return one.path.startswith(root)
