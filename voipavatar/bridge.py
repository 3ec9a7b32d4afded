"""An avatar that lives on another thread's loop, as a session on this one uses it.

A worker has one loop for all its avatars; a conversation runs in its job's own thread, so that a
tool or a model's client that blocks stops nobody else's face. Between the two there are calls that
are posted to the other loop and futures that are resolved from there: no lock, and nothing waits
for the other thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from .config import Persona
from .errors import StageError, VoipAvatarError
from .media import Int16
from .session import Played
from .waiting import within

if TYPE_CHECKING:
    from livekit import rtc

    from .room import RoomOptions
    from .session import Session, Studio, Utterance

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 30.0
"""Seconds that a call to the other loop may take before it is given up."""
OPENING = 120.0
"""The same for opening an avatar, which may have to be prepared first."""


class FarStudio:
    """Opens avatars of `studio`, which lives on `loop`, for the loop that calls."""

    def __init__(self, studio: Studio, loop: asyncio.AbstractEventLoop, id: str) -> None:
        self._studio = studio
        self._loop = loop
        self._id = id

    async def open(self, persona: Persona | str, *, room: RoomOptions) -> FarSession:
        """What `Studio.open` does, over there. Being cancelled leaves no avatar behind."""
        work = self._studio.open(persona, room=room, id=self._id)
        try:
            session = await there(self._loop, work, OPENING)
        except BaseException:
            # It may have been opened just as it was given up.
            post(self._loop, self._undo)
            raise
        return FarSession(session, self._loop)

    def _undo(self) -> None:
        session = self._studio.sessions.get(self._id)
        if session is not None:
            closing = asyncio.ensure_future(session.aclose())
            _held.add(closing)
            closing.add_done_callback(_held.discard)


_held: set[asyncio.Future[None]] = set()


class FarSession:
    """One avatar on air on another loop."""

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        self.closed = asyncio.Event()
        self._session = session
        self._loop = loop
        here = asyncio.get_running_loop()
        self._watch = asyncio.run_coroutine_threadsafe(session.closed.wait(), loop)
        self._watch.add_done_callback(lambda _: post(here, self.closed.set))

    @property
    def failure(self) -> str | None:
        return self._session.failure

    @property
    def closing(self) -> bool:
        return self._session.closing

    def open_turn(self) -> FarTurn:
        """A turn that the caller pushes sound into. One that can't be had is over at once."""
        return FarTurn(self._session, self._loop)

    async def swap_persona(self, persona: Persona | str) -> None:
        await there(self._loop, self._session.swap_persona(persona))

    def pose(self, name: str) -> None:
        """How the face is held while it doesn't speak, as of a moment later."""
        self._there(lambda: self._session.pose(name))

    def gesture(self, name: str) -> None:
        """One gesture, a moment later. One that the avatar doesn't know is logged."""
        self._there(lambda: self._session.gesture(name))

    def _there(self, call: Callable[[], None]) -> None:
        def tried() -> None:
            try:
                call()
            except VoipAvatarError as error:
                logger.info("the face did not change", extra={"lk.pii.error": str(error)})

        post(self._loop, tried)

    async def listened(self, seconds: float) -> bool:
        """Whether somebody has subscribed to its sound, waiting so long at most."""
        return await there(self._loop, _subscribed(self._session, seconds))

    async def aclose(self, drain: float = 0.0) -> None:
        await there(self._loop, self._session.aclose(drain))
        self._watch.cancel()


async def _subscribed(session: Session, seconds: float) -> bool:
    from livekit import rtc

    room = session.room.room if session.room is not None else None
    publications: list[rtc.LocalTrackPublication] = (
        list(room.local_participant.track_publications.values()) if room is not None else []
    )
    for publication in publications:
        if publication.kind == rtc.TrackKind.KIND_AUDIO:
            try:
                await within(publication.wait_for_subscription(), seconds)
            except asyncio.TimeoutError:
                return False
            return True
    return False


class FarTurn:
    """One utterance of an avatar on another loop: what `agentstream.Turn` asks for."""

    def __init__(self, session: Session, loop: asyncio.AbstractEventLoop) -> None:
        self._here = asyncio.get_running_loop()
        self.started: asyncio.Future[float | None] = self._here.create_future()
        self.finished: asyncio.Future[Any] = self._here.create_future()
        self._session = session
        self._loop = loop
        self._turn: Utterance | None = None  # belongs to the other loop
        self._sent = 0.0  # seconds that were pushed here,
        self._arrived = 0.0  # and that have come there
        self._waiting = 0.0  # seconds of those not shown yet, when it was last looked
        self._heard = 0.0
        self._there(self._open)

    @property
    def backlog(self) -> float:
        """Seconds not shown yet, as of a moment ago."""
        self._there(self._look)
        return self._sent - self._arrived + self._waiting

    @property
    def heard(self) -> float:
        """Seconds put into frames, as of a moment ago."""
        self._there(self._look)
        return self._heard

    def push(self, pcm: Int16, rate: int) -> None:
        self._sent += len(pcm) / rate
        self._there(lambda: self._push(pcm, rate))

    def end(self) -> None:
        self._there(lambda: self._turn.end() if self._turn is not None else None)

    def cancel(self) -> None:
        self._there(lambda: self._turn.cancel() if self._turn is not None else None)

    # -- on the other loop -------------------------------------------------------------------------

    def _there(self, call: Callable[[], None]) -> None:
        if not post(self._loop, call):
            self._finish(Played(0.0, True))

    def _open(self) -> None:
        try:
            turn = self._session.open_turn()
        except VoipAvatarError as error:
            logger.info("a turn was refused", extra={"error": type(error).__name__})
            post(self._here, lambda: self._finish(Played(0.0, True)))
            return
        self._turn = turn
        turn.started.add_done_callback(
            lambda future: post(self._here, lambda: self._start(future.result()))
        )
        turn.finished.add_done_callback(
            lambda future: post(self._here, lambda: self._finish(future.result()))
        )

    def _push(self, pcm: Int16, rate: int) -> None:
        if self._turn is not None:
            try:
                self._turn.push(pcm, rate)
            except VoipAvatarError as error:
                logger.warning("a turn was cut short", extra={"error": str(error)})
                self._turn.cancel()
        self._look()
        self._arrived += len(pcm) / rate

    def _look(self) -> None:
        if self._turn is not None:
            self._waiting, self._heard = self._turn.backlog, self._turn.heard

    # -- back here ---------------------------------------------------------------------------------

    def _start(self, when: float | None) -> None:
        if not self.started.done():
            self.started.set_result(when)

    def _finish(self, played: Played) -> None:
        self._start(None)
        if not self.finished.done():
            self.finished.set_result(played)


def post(loop: asyncio.AbstractEventLoop, call: Callable[[], Any]) -> bool:
    """Run `call` on another loop, soon; False when that loop is no more."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        return False
    return True


async def there(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], patience: float = PATIENCE
) -> T:
    """The result of `work`, done on another loop."""
    try:
        future = asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError:  # that loop is no more
        work.close()
        raise StageError("the worker has ended") from None
    return await within(asyncio.wrap_future(future), patience)
