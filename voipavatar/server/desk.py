"""The open sessions as HTTP sees them: who watches, what is waiting, and when one was forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import metrics
from ..config import Persona, Settings, VoiceChoice
from ..errors import CapacityError, VoipAvatarError
from ..room import RoomOptions
from .contract import Session, Studio, Utterance

logger = logging.getLogger(__name__)

MAX_PENDING = 64
"""Utterances of one session that may be waiting or spoken at once."""


@dataclass(eq=False)
class Entry:
    """One session, and what HTTP knows of it beyond the session itself."""

    session: Session
    room: str | None = None
    voice: str | None = None
    ours: bool = False
    """Opened over HTTP, and so closed when nobody is left."""
    opened: float = field(default_factory=time.monotonic)
    touched: float = field(default_factory=time.monotonic)
    watchers: int = 0
    pending: dict[str, Utterance] = field(default_factory=dict)

    def touch(self) -> None:
        self.touched = time.monotonic()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts the session isn't idle."""
        self.watchers += 1
        metrics.WATCHERS.inc()
        try:
            yield
        finally:
            self.watchers -= 1
            metrics.WATCHERS.dec()
            self.touch()

    def took(self, utterance: Utterance) -> None:
        """Count an utterance as pending until it is over."""
        self.touch()
        self.pending[utterance.id] = utterance
        utterance.finished.add_done_callback(lambda _: self._over(utterance.id))

    def _over(self, utterance: str) -> None:
        self.pending.pop(utterance, None)
        self.touch()

    def idle(self, now: float) -> float:
        """Seconds since anybody watched, spoke or asked."""
        return 0.0 if self.watchers or self.pending else now - self.touched


class Desk:
    """Opens, finds and closes sessions of a studio. One per application."""

    def __init__(self, studio: Studio, settings: Settings) -> None:
        self._studio = studio
        self._settings = settings
        self._entries: dict[str, Entry] = {}
        self._opening = 0
        self.closing = asyncio.Event()
        """Set when the server stops: event streams and sockets end by themselves."""

    def __len__(self) -> int:
        return len(self._studio.sessions)

    @property
    def queues(self) -> Sequence[Callable[[], dict[str, Any]]]:
        """What the studio's queues tell of themselves."""
        return self._studio.queues

    async def open(
        self, persona: Persona, room: RoomOptions, voices: Sequence[VoiceChoice], id: str
    ) -> Entry:
        """Open a session. Raises CapacityError when there is no room for another."""
        limit = self._settings.max_sessions
        if len(self) + self._opening >= limit:
            metrics.SESSIONS_REFUSED.inc()
            raise CapacityError(
                f"all {limit} sessions are taken: try again when one has closed, or raise "
                "VOIPAVATAR_MAX_SESSIONS"
            )
        self._opening += 1
        try:
            session = await self._studio.open(persona, room=room, voice=voices, id=id)
        except CapacityError:
            metrics.SESSIONS_REFUSED.inc()
            raise
        finally:
            self._opening -= 1
        entry = Entry(session, room=room.room, ours=True)
        self._entries[session.id] = entry
        return entry

    def find(self, id: str) -> Entry | None:
        """The entry of a session that is open, however it was opened."""
        session = self._studio.sessions.get(id)
        if session is None:
            self._entries.pop(id, None)
            return None
        entry = self._entries.get(id)
        if entry is None or entry.session is not session:
            entry = self._entries[id] = Entry(session)
        return entry

    def all(self) -> list[Entry]:
        """Every open session, oldest first."""
        found = [self.find(id) for id in list(self._studio.sessions)]
        return sorted((one for one in found if one is not None), key=lambda one: one.opened)

    async def close(self, entry: Entry, drain: float = 0.0) -> None:
        """Close one; `drain` seconds are left for what is being said."""
        self._entries.pop(entry.session.id, None)
        await entry.session.aclose(drain)

    async def reap(self) -> None:
        """For ever: close what nobody has watched, fed or asked about for `idle_minutes`."""
        limit = self._settings.idle_minutes * 60
        if limit <= 0:
            return
        while True:
            await asyncio.sleep(min(15.0, limit / 4))
            now = time.monotonic()
            for entry in self.all():
                if entry.ours and entry.idle(now) > limit:
                    logger.info("closing a forgotten session", extra={"session": entry.session.id})
                    try:
                        await self.close(entry)
                    except VoipAvatarError:
                        logger.exception(
                            "a session didn't close", extra={"session": entry.session.id}
                        )

    async def aclose(self) -> None:
        """Close what was opened over HTTP."""
        self.closing.set()
        ours = [entry for entry in self.all() if entry.ours]
        for answer in await asyncio.gather(
            *(self.close(entry) for entry in ours), return_exceptions=True
        ):
            if isinstance(answer, Exception):
                logger.error("a session didn't close", exc_info=answer)


def new_id() -> str:
    """A session's id; can't be guessed."""
    return secrets.token_hex(8)
