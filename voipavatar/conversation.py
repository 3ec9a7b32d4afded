"""A whole conversation from a persona's YAML: an agent that hears, thinks and speaks, with a face.

It runs in the thread of a LiveKit job, as any agent does: the job's own room hears the user, an
`AgentSession` answers, and the plugin's `AvatarSession` gives it the worker's avatar. So there are
two participants, as with every LiveKit avatar: the agent, which publishes nothing, and the avatar
on its behalf, which has the one voice and the picture.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp
from livekit import api, rtc
from livekit.agents import NOT_GIVEN, Agent, AgentSession, AutoSubscribe, JobContext
from livekit.agents.job import DEFAULT_PARTICIPANT_KINDS
from livekit.agents.types import ATTRIBUTE_PUBLISH_ON_BEHALF, TOPIC_CHAT
from livekit.agents.utils import is_given
from livekit.agents.voice.room_io import RoomOptions

from .bridge import FarSession, FarStudio, post
from .config import AgentSection, Greeting, Persona, Settings, Video
from .errors import ConfigError, VoipAvatarError
from .parts import Parts, build
from .plugin import AvatarSession
from .waiting import within

logger = logging.getLogger(__name__)

GREETING = 3.0
"""Seconds that the greeting waits for somebody to hear it, once somebody is there."""
TYPED = 20
"""Texts that may wait for being answered."""
CLOSE = 10.0
"""Seconds that each part of a conversation may take to end."""


@dataclass(frozen=True)
class Place:
    """Where a conversation takes place."""

    settings: Settings
    identity: str
    """The avatar's, in the room."""
    name: str = ""
    """How people call it; the persona's title otherwise."""
    video: Video = Video()
    """How the picture is coded; what isn't given is the persona's."""


class Conversation:
    """One room's conversation. `run` holds it, and says why it ended."""

    def __init__(self, persona: Persona, place: Place, studio: FarStudio) -> None:
        if persona.agent is None:
            raise ConfigError(f"persona {persona.name!r} has no agent section")
        self.session: AgentSession[Any] | None = None
        self.avatar: AvatarSession | None = None
        self._persona = persona
        self._section: AgentSection = persona.agent
        self._place = place
        self._studio = _Kept(studio)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()
        self._reason = "asked"
        self._busy: set[asyncio.Task[None]] = set()
        self._linked = False
        self._started = asyncio.Event()
        self._room: rtc.Room | None = None

    def end(self, reason: str = "asked") -> None:
        """Say no more and leave. From any thread."""
        if self._loop is not None:
            post(self._loop, lambda: self._end(reason))

    def _end(self, reason: str) -> None:
        if not self._over.is_set():
            self._reason = reason
            self._over.set()

    async def run(self, job: JobContext) -> str:
        """Hold the conversation in the job's room until it is over; why, as a metric's label.

        Raises ConfigError when the agent can't be made any more, and what joining a room raises.
        """
        self._loop = asyncio.get_running_loop()
        room = self._room = job.room
        parts = await build(self._persona, self._place.settings)
        try:
            room.on("disconnected", lambda *_: self._end("asked"))
            # Only whom it talks with is heard: never its own avatar, nor another.
            ears = _Ears(room, self._section.vision)
            room.register_text_stream_handler(TOPIC_CHAT, self._typed)
            await job.connect(auto_subscribe=AutoSubscribe.SUBSCRIBE_NONE)
            ears.open()
            self.session = session = AgentSession(**_session(parts))
            session.on("close", lambda _: self._end("asked"))
            await self._face(session, room)
            agent = Agent(instructions=self._section.instructions, tools=parts.tools)
            options = RoomOptions(
                video_input=self._section.vision,
                close_on_disconnect=False,  # `_attend` decides: who reloads a page comes back
                text_input=False,  # `_typed` reads what anybody types, not only who is talked with
            )
            await session.start(agent, room=room, room_options=options)
            self._started.set()
            room.on("participant_connected", lambda _: self._link(session, room))
            room.on("participant_disconnected", lambda _: self._link(session, room))
            self._do(self._greet(session))
            await self._attend(session, room)
        finally:
            await self._close(parts)
        if self._reason == "idle" and self._section.close_room:
            await self._close_room(room)
        return self._reason

    async def _face(self, session: AgentSession[Any], room: rtc.Room) -> None:
        """The avatar, before the session starts; without it the conversation is voice-only."""
        settings = self._place.settings
        coded = self._place.video.over(self._persona.video)
        avatar = AvatarSession(
            persona=self._persona,
            mode="local",
            avatar_participant_identity=self._place.identity,
            avatar_participant_name=self._place.name or self._persona.title or self._persona.name,
            studio=self._studio,
            video_codec=coded.codec or NOT_GIVEN,
            video_bitrate=coded.bitrate or NOT_GIVEN,
            simulcast=NOT_GIVEN if coded.simulcast is None else coded.simulcast,
        )
        try:
            await avatar.start(
                session,
                room,
                livekit_url=settings.livekit_url,
                livekit_api_key=settings.livekit_api_key,
                livekit_api_secret=settings.livekit_api_secret,
            )
        except (VoipAvatarError, asyncio.TimeoutError) as error:
            logger.error("no avatar could be had: voice only", extra={"error": str(error)})
            return
        self.avatar = avatar

    async def _greet(self, session: AgentSession[Any]) -> None:
        """The first words, once there is somebody who hears them."""
        greeting = self._section.greeting
        if greeting is None and self._persona.greeting:
            greeting = Greeting(say=self._persona.greeting)
        if greeting is None:
            return
        await session.room_io.wait_for_ready()  # somebody is there, and captions have an address
        avatar = self._studio.opened
        if avatar is not None:
            await avatar.listened(GREETING)
        can_say = session.tts is not None or (
            getattr(getattr(session.llm, "capabilities", None), "supports_say", False)
        )
        if greeting.say and can_say:
            session.say(greeting.say, allow_interruptions=greeting.interruptible)
            return
        wish = greeting.instructions or f"Greet with these words, and no others: {greeting.say}"
        session.generate_reply(instructions=wish, allow_interruptions=greeting.interruptible)

    # -- what is typed -----------------------------------------------------------------------------

    def _typed(self, reader: rtc.TextStreamReader, identity: str) -> None:
        if len(self._busy) >= TYPED:
            logger.warning("too much is typed at once: a text was left out")
            reader.close()
            return
        self._do(self._answer(reader, identity))

    async def _answer(self, reader: rtc.TextStreamReader, identity: str) -> None:
        """Answer what somebody typed, at once: it interrupts as a voice does."""
        try:
            text = (await reader.read_all()).strip()
        except rtc.StreamError:  # whoever typed it is gone
            return
        await self._started.wait()
        room, session = self._room, self.session
        assert room is not None and session is not None
        end = time.monotonic() + 2.0  # a text may be here before the server tells whose it is
        while (someone := room.remote_participants.get(identity)) is None:
            if time.monotonic() > end:
                return
            await asyncio.sleep(0.02)
        if not text or not _is_person(someone):
            return
        if len(text) > self._place.settings.max_text:
            logger.warning("a typed text is too long", extra={"characters": len(text)})
            return
        try:
            await session.interrupt()
        except RuntimeError:  # what may not be interrupted is said first
            logger.debug("what is said may not be interrupted")
        session.generate_reply(user_input=text)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="conversation")
        self._busy.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._busy.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            logger.warning("something could not be said", extra={"error": type(error).__name__})

    # -- who is there ------------------------------------------------------------------------------

    async def _attend(self, session: AgentSession[Any], room: rtc.Room) -> None:
        """Until the session is over, or nobody has been there for a while.

        The agent talks with one participant at a time: the first that came, and when that one
        has left, with the next that is there.
        """
        last = time.monotonic()
        while not self._over.is_set():
            if self._link(session, room):
                last = time.monotonic()
            elif time.monotonic() - last > self._section.stay:
                logger.info("nobody came (back)")
                self._end("idle")
            try:
                await within(self._over.wait(), 0.2)
            except asyncio.TimeoutError:
                continue

    def _link(self, session: AgentSession[Any], room: rtc.Room) -> bool:
        """See to it that somebody who is there is talked with; False when nobody is."""
        people = _people(room)
        if self._over.is_set():
            return bool(people)
        linked = session.room_io.linked_participant
        if not people:
            if linked is not None or self._linked:
                self._linked = False
                session.room_io.unset_participant()  # whoever comes next is welcome
            return False
        self._linked = True
        if linked is None or linked.identity not in people:
            session.room_io.set_participant(next(iter(people)))
        return True

    # -- the end -----------------------------------------------------------------------------------

    async def _close(self, parts: Parts) -> None:
        self._over.set()  # also after a failure
        busy = list(self._busy)
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        session, avatar = self.session, self.avatar
        for what, closing in (
            ("session", session.aclose() if session is not None else None),
            ("avatar", avatar.aclose() if avatar is not None else None),
            ("parts", parts.aclose()),
        ):
            if closing is None:
                continue
            try:
                await within(closing, CLOSE)
            except asyncio.TimeoutError:
                logger.error("a conversation did not end in time", extra={"part": what})

    async def _close_room(self, room: rtc.Room) -> None:
        """A room in which there was only this agent would keep the next one that comes waiting:
        LiveKit dispatches when a room is made. So the next one gets a new room."""
        others = set(room.remote_participants) - {self._place.identity}  # which is just leaving
        if not room.isconnected() or others:
            return
        settings = self._place.settings
        timeout = aiohttp.ClientTimeout(total=CLOSE)
        async with api.LiveKitAPI(
            settings.livekit_url,
            settings.livekit_api_key,
            settings.livekit_api_secret,
            timeout=timeout,
        ) as livekit:
            try:
                await livekit.room.delete_room(api.DeleteRoomRequest(room=room.name))
            except (api.TwirpError, aiohttp.ClientError, asyncio.TimeoutError) as error:
                if not (isinstance(error, api.TwirpError) and error.code == "not_found"):
                    logger.info("the room was not closed", extra={"error": type(error).__name__})


class _Kept:
    """The studio for the plugin, which keeps what was opened for the greeting to look at."""

    def __init__(self, studio: FarStudio) -> None:
        self.opened: FarSession | None = None
        self._studio = studio

    async def open(self, persona: Persona | str, *, room: Any) -> FarSession:
        self.opened = await self._studio.open(persona, room=room)
        return self.opened


class _Ears:
    """Subscribes to people's sound, and to their picture where that is wanted; to nobody else."""

    def __init__(self, room: rtc.Room, vision: bool) -> None:
        self._room = room
        self._kinds = {rtc.TrackKind.KIND_AUDIO}
        if vision:
            self._kinds.add(rtc.TrackKind.KIND_VIDEO)
        room.on("track_published", self._published)

    def open(self) -> None:
        """What was published before."""
        for someone in self._room.remote_participants.values():
            for publication in someone.track_publications.values():
                self._published(publication, someone)

    def _published(
        self, publication: rtc.RemoteTrackPublication, someone: rtc.RemoteParticipant
    ) -> None:
        if publication.kind in self._kinds and _is_person(someone):
            publication.set_subscribed(True)


def _is_person(someone: rtc.RemoteParticipant) -> bool:
    """Whom LiveKit's agents talk with: people, phones, and what stands for them."""
    return (
        someone.kind in DEFAULT_PARTICIPANT_KINDS
        and ATTRIBUTE_PUBLISH_ON_BEHALF not in someone.attributes
    )


def _people(room: rtc.Room) -> dict[str, rtc.RemoteParticipant]:
    return {name: one for name, one in room.remote_participants.items() if _is_person(one)}


def _session(parts: Parts) -> dict[str, Any]:
    """What `AgentSession` is given; the rest is left to it."""
    given = {"llm": parts.llm, "vad": parts.vad, **parts.options}
    if parts.stt is not None:
        given["stt"] = parts.stt
    if parts.tts is not None:
        given["tts"] = parts.tts
    if is_given(parts.turn_detection):
        given["turn_handling"] = {**given["turn_handling"], "turn_detection": parts.turn_detection}
    return given
