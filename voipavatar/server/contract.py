"""What HTTP asks of a session: the part of `voipavatar.session` that the routes call.

Stated as protocols so that the routes depend on a dozen verbs, and a test can hold them to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from ..config import Persona, VoiceChoice
from ..media import Cue, Int16, Mode
from ..room import RoomOptions


class Played(Protocol):
    """How an utterance ended."""

    @property
    def heard(self) -> float:
        """Seconds of it that were played."""

    @property
    def interrupted(self) -> bool: ...


class Utterance(Protocol):
    """One turn of a session. Both futures always resolve."""

    @property
    def id(self) -> str: ...
    @property
    def error(self) -> str | None:
        """Why there was less sound than there should have been."""

    @property
    def started(self) -> asyncio.Future[Any]:
        """Resolves to None when it ended before anything was heard."""

    @property
    def finished(self) -> asyncio.Future[Any]:
        """Resolves to a `Played`."""

    def push(self, pcm: Int16, rate: int, cues: Sequence[Cue] = ()) -> None: ...
    def end(self) -> None: ...
    def cancel(self) -> None: ...
    async def room(self, seconds: float = ...) -> None:
        """Wait until less than `seconds` of it wait for being spoken, or it is over."""


class Session(Protocol):
    """An avatar in a room."""

    @property
    def id(self) -> str: ...
    @property
    def persona(self) -> Persona: ...
    @property
    def state(self) -> str: ...

    async def say(
        self, text: str, *, mode: Mode = "append", voice: Sequence[VoiceChoice] | None = None
    ) -> Any: ...
    async def play(self, sound: bytes, *, mode: Mode = "append") -> Any: ...
    def open_turn(self, mode: Mode = "append") -> Any: ...
    async def interrupt(self) -> int: ...
    def pose(self, name: str) -> None:
        """How the face is held while it doesn't speak."""

    def gesture(self, name: str) -> None: ...
    async def swap_persona(self, persona: Persona | str) -> None:
        """Become another persona on air."""

    async def choose_idle(self, name: str) -> None:
        """Take on another of the persona's looks. InputError for one that it hasn't."""

    def status(self) -> dict[str, Any]: ...
    def events(self) -> AsyncIterator[dict[str, Any]]: ...
    async def aclose(self, drain: float = 0) -> None: ...


class Studio(Protocol):
    """Every session of the process."""

    @property
    def sessions(self) -> Mapping[str, Any]: ...
    @property
    def queues(self) -> Sequence[Callable[[], dict[str, Any]]]:
        """Each tells of a queue that sessions speak from: `queue`, `broker` and more."""

    async def open(
        self,
        persona: Persona,
        *,
        room: RoomOptions | None = None,
        voice: Sequence[VoiceChoice] | None = None,
        id: str | None = None,
    ) -> Any: ...
