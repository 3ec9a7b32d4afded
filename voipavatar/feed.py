"""RabbitMQ's queues and who speaks from them: what `voipavatar serve` and the worker put on air.

`voipavatar serve`: a persona that names a `queue:` has a session of its own that speaks from it;
the queue of the settings is the default persona's. Such a session is on air from the start, idling,
and is opened anew when it fails: the queue doesn't notice, but for a message that waits a little.

`voipavatar worker`: a room's avatar speaks from the queue that its dispatch or its persona names,
beside its agent or without one, for as long as it is in the room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from .config import Persona, Settings, list_personas, load_persona
from .errors import ConfigError, VoipAvatarError
from .ledger import Ledger, RedisLedger, SqliteLedger
from .rabbitmq import QueueFeed, QueueOptions
from .room import RoomOptions
from .session import Session, SinkFactory, Studio

logger = logging.getLogger(__name__)

AGAIN = (0.5, 10.0)
"""Seconds until a session that ended is opened again: at first, and at most."""


def options_for(settings: Settings, queue: str) -> QueueOptions:
    """How a queue is used, by the settings. ConfigError when they name no broker."""
    if not settings.amqp_url:
        raise ConfigError(
            "no broker is named: set VOIPAVATAR_AMQP_URL (amqp://user:password@host/vhost), or "
            "RABBITMQ_HOST and its kin"
        )
    return QueueOptions(
        url=settings.amqp_url,
        queue=queue,
        ack="on_accept" if settings.queue_ack == "on_accept" else "on_spoken",
        limit=settings.queue_limit,
        urls=settings.audio_urls,
    )


def ledger_for(settings: Settings) -> Ledger:
    """Redis if the settings name one; a file in the cache folder otherwise."""
    if settings.redis_url:
        return RedisLedger(settings.redis_url)
    return SqliteLedger(settings.cache_dir / "messages.sqlite")


def queue_of(persona: Persona, settings: Settings) -> str | None:
    """The queue that a persona speaks from; None without one, or without a broker."""
    if not settings.amqp_url:
        return None
    return persona.queue or (settings.queue if persona.name == "default" else None)


def fed_personas(settings: Settings) -> dict[str, Persona]:
    """Queue → persona: those that name one, and the default one for the settings' own queue.

    Raises ConfigError when two name the same.
    """
    found: dict[str, Persona] = {}
    for persona in list_personas(settings):
        if persona.queue is None:
            continue
        if persona.queue in found:
            raise ConfigError(
                f"{found[persona.queue].name} and {persona.name} both name the queue "
                f"{persona.queue!r}: a queue has one voice"
            )
        found[persona.queue] = persona
    if settings.queue not in found:
        found[settings.queue] = load_persona("default", settings)
    return found


class Place:
    """One queue's session, kept on air; and the other sessions, for messages that name them."""

    def __init__(
        self,
        studio: Studio,
        persona: Persona,
        name: str,
        room: RoomOptions | None = None,
        sinks: Sequence[SinkFactory] = (),
    ) -> None:
        self._studio = studio
        self._persona = persona
        self._name = name
        self._room = room
        self._sinks = sinks
        self._session: Session | None = None
        self._task: asyncio.Task[None] | None = None
        self.feed: QueueFeed | None = None
        """What speaks by it, where `feeding` made it."""

    # what the feed asks

    def own(self) -> Session | None:
        """The queue's session, or None while it is being opened again."""
        session = self._session
        return None if session is None or session.closed.is_set() else session

    def find(self, session: str) -> Session | None:
        """Any session of the process, by its id."""
        return self._studio.sessions.get(session)

    def of_persona(self, persona: str) -> Session | None:
        """The queue's own if it is that persona, else the one that was opened first."""
        own = self.own()
        if own is not None and own.persona.name == persona:
            return own
        found = [one for one in self._studio.sessions.values() if one.persona.name == persona]
        return min(found, key=lambda one: one.opened, default=None)

    def load(self, persona: str) -> Persona:
        """By name only: a message must not point at files."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", persona):
            raise ConfigError(f"{persona[:64]!r} is no persona's name")
        return load_persona(persona, self._studio.settings)

    # life

    async def open(self) -> None:
        """Go on air. Raises what `Studio.open` does: the first failure is loud."""
        self._session = await self._opened()
        self._task = asyncio.create_task(self._keep(), name="feed-keep")

    def adopt(self, session: Session | None) -> None:
        """Speak by a session that somebody else keeps; or by none for a while."""
        self._session = session

    async def aclose(self, drain: float = 0.0) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._session is not None:
            await self._session.aclose(drain)

    async def _opened(self) -> Session:
        return await self._studio.open(
            self._persona, room=self._room, sinks=self._sinks, id=self._name
        )

    async def _keep(self) -> None:
        pause, most = AGAIN
        while True:
            assert self._session is not None
            await self._session.closed.wait()
            logger.warning("the queue's session ended", extra={"session": self._name})
            await asyncio.sleep(pause)
            try:
                self._session = await self._opened()
                pause = AGAIN[0]
            except VoipAvatarError as error:
                logger.error("it can't be opened again", extra={"error": str(error)})
                pause = min(pause * 2, most)


@contextlib.asynccontextmanager
async def feeding(
    studio: Studio, persona: Persona, settings: Settings, queue: str
) -> AsyncIterator[Place]:
    """One queue for sessions that somebody else keeps on air: tell it each by `Place.adopt`.

    ConfigError when no broker is named. `Place.feed.aclose(drain)` ends it earlier, for a goodbye.
    """
    async with contextlib.AsyncExitStack() as undo:
        options = options_for(settings, queue)
        ledger = ledger_for(settings)
        undo.push_async_callback(ledger.aclose)
        place = Place(studio, persona, "stream")
        feed = place.feed = QueueFeed(options, ledger, place)
        await undo.enter_async_context(feed)
        undo.enter_context(_in_health(studio, feed))
        yield place


@contextlib.asynccontextmanager
async def fed(
    studio: Studio, session: Session, settings: Settings, queue: str, farewell: float
) -> AsyncIterator[QueueFeed]:
    """One queue for one session that is on air, with `farewell` seconds for what is being said."""
    async with feeding(studio, session.persona, settings, queue) as place:
        place.adopt(session)
        assert place.feed is not None
        try:
            yield place.feed
        finally:
            await place.feed.aclose(farewell)


@contextlib.contextmanager
def _in_health(studio: Studio, feed: QueueFeed) -> Iterator[None]:
    studio.queues.append(feed.status)
    try:
        yield
    finally:
        studio.queues.remove(feed.status)


class Feeds:
    """Every queue of the settings. `async with`; sessions are idling on air once it is entered."""

    def __init__(
        self,
        studio: Studio,
        settings: Settings,
        *,
        room: Callable[[str], RoomOptions] | None = None,
        drain: float = 5.0,
    ) -> None:
        self.feeds: list[QueueFeed] = []
        self._studio = studio
        self._settings = settings
        self._room = room
        self._drain = drain
        self._undo = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Feeds:
        settings = self._settings
        async with contextlib.AsyncExitStack() as undo:
            ledger = ledger_for(settings)
            undo.push_async_callback(ledger.aclose)
            for queue, persona in fed_personas(settings).items():
                name = re.sub(r"[^A-Za-z0-9_-]", "-", f"queue-{queue}")[:100]
                room = self._room(f"voipavatar-{name}") if self._room is not None else None
                place = Place(self._studio, persona, name, room)
                await place.open()
                undo.push_async_callback(place.aclose)
                feed = QueueFeed(options_for(settings, queue), ledger, place)
                await feed.__aenter__()
                undo.push_async_callback(feed.aclose, self._drain)
                undo.enter_context(_in_health(self._studio, feed))
                self.feeds.append(feed)
            self._undo = undo.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._undo.aclose()
