"""The LiveKit Agents plugin: four lines give an agent a face.

    avatar = voipavatar.AvatarSession(persona="default")
    await avatar.start(session, ctx.room)
    await session.start(agent=..., room=ctx.room)

Two modes with one interface. `local` runs the avatar in the agent's own process; `dispatch` asks
the LiveKit server for a `voipavatar worker`, keeps an eye on it, speaks voice-only while it is
gone and takes it back when it is there again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

import aiohttp
from livekit import api, rtc
from livekit.agents import (
    DEFAULT_API_CONNECT_OPTIONS,
    NOT_GIVEN,
    APIConnectionError,
    APIConnectOptions,
    APIStatusError,
    NotGivenOr,
    get_job_context,
)
from livekit.agents.types import ATTRIBUTE_PUBLISH_ON_BEHALF
from livekit.agents.utils import is_given
from livekit.agents.voice.avatar import AvatarSession as BaseAvatarSession
from pydantic import Field, TypeAdapter, ValidationError

from .agentstream import ALIVE, DISPATCH, GESTURE, LEAVE, PERSONA, POSE, Mute
from .captions import attach
from .config import Persona, Settings, Video, first_mistake, list_personas
from .errors import ConfigError, VoipAvatarError
from .mouthpiece import Direct, Mouthpiece, VoiceOnly, Wire, unanswer
from .room import RoomOptions
from .session import Studio
from .waiting import within

if TYPE_CHECKING:
    from livekit.agents import AgentSession

logger = logging.getLogger("livekit.plugins.voipavatar")

T = TypeVar("T")

IDENTITY = "voipavatar"
AGENT_NAME = "voipavatar"
"""The name under which `voipavatar worker` registers unless told otherwise."""
BEAT = 1.0
"""Seconds between two looks at a dispatched avatar."""
MISSED = 2
"""Looks in a row without an answer after which it counts as gone."""
ANSWER = 3.0
"""Seconds in which a worker must answer; the server drops a request in silence when it is busy, or
knows of no worker just then."""
GOODBYE = 4.0
"""Seconds in which an avatar leaves by itself when it is not wanted any more."""
REFUSED = 1.5
"""Seconds after a worker's refusal in which another one may take the room."""
BACKOFF = (0.5, 5.0)
"""First and longest pause before a lost avatar is asked for again, in seconds."""


class VoipAvatarException(VoipAvatarError):
    """The avatar can't be had; the message says what to check."""


class AvatarJoinTimeout(VoipAvatarException, asyncio.TimeoutError):
    """The avatar did not come in time, or every worker refused it; the message gives the reason."""


class OpensAvatars(Protocol):
    """What a local avatar is opened by: a `Studio`, or one that stands for it."""

    async def open(self, persona: str | Persona, *, room: RoomOptions) -> Any: ...


class AvatarSession(BaseAvatarSession[Literal["avatar_lost", "avatar_joined"]]):
    """One avatar for one `AgentSession`.

    Events: "avatar_joined" when it is seen, also each time it comes back, and "avatar_lost" with
    a sentence when it is gone and the agent speaks voice-only.
    """

    def __init__(
        self,
        *,
        persona: NotGivenOr[str | Persona] = NOT_GIVEN,
        mode: NotGivenOr[Literal["local", "dispatch"]] = NOT_GIVEN,
        agent_name: NotGivenOr[str] = NOT_GIVEN,
        avatar_participant_identity: NotGivenOr[str] = NOT_GIVEN,
        avatar_participant_name: NotGivenOr[str] = NOT_GIVEN,
        video_codec: NotGivenOr[str] = NOT_GIVEN,
        video_bitrate: NotGivenOr[int] = NOT_GIVEN,
        simulcast: NotGivenOr[bool] = NOT_GIVEN,
        join_timeout: NotGivenOr[float] = NOT_GIVEN,
        studio: NotGivenOr[OpensAvatars] = NOT_GIVEN,
        captions: NotGivenOr[bool] = NOT_GIVEN,
        conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS,
    ) -> None:
        """Everything has a default.

        Args:
            persona: Name or file of a persona, or one that was loaded (`local` only). In
                `dispatch` it is a name that the worker knows. VOIPAVATAR_PERSONA, "default".
            mode: "dispatch" when `agent_name` or VOIPAVATAR_AGENT_NAME says whom to ask,
                otherwise "local". VOIPAVATAR_MODE.
            agent_name: The workers' name. VOIPAVATAR_AGENT_NAME.
            avatar_participant_identity: Who the avatar is in the room; "voipavatar".
                VOIPAVATAR_AVATAR_PARTICIPANT_IDENTITY.
            avatar_participant_name: How people call it; the persona's title.
                VOIPAVATAR_AVATAR_PARTICIPANT_NAME.
            video_codec: "vp8", "h264", "vp9" or "av1", in place of the persona's.
                VOIPAVATAR_VIDEO_CODEC.
            video_bitrate: Bits a second of the picture, at most, in place of the persona's.
                VOIPAVATAR_VIDEO_BITRATE.
            simulcast: Whether smaller layers are sent beside it, for viewers on slow lines, in
                place of the persona's. VOIPAVATAR_SIMULCAST: true or false.
            join_timeout: Seconds in which it must be seen, 20 unless given. Speech waits for it
                that long, and is voice-only afterwards. VOIPAVATAR_JOIN_TIMEOUT.
            studio: A studio to share with other sessions of this loop (`local` only).
            captions: Whether the agent's transcript keeps to the avatar's voice word by word;
                False leaves the pacing to LiveKit, which may run ahead of it.
                VOIPAVATAR_CAPTIONS: true or false.
            conn_options: Retries and their pauses when asking for a worker.
        """
        super().__init__()
        self._persona = (
            persona
            if isinstance(persona, Persona)
            else _setting("persona", persona, str, "default")
        )
        self._agent_name: str = _setting("agent_name", agent_name, str, "")
        self._mode: str = _setting("mode", mode, str, "dispatch" if self._agent_name else "local")
        if self._mode not in ("local", "dispatch"):
            raise VoipAvatarException(
                f"mode={self._mode!r} (or VOIPAVATAR_MODE) can't be used: it is local or dispatch"
            )
        if self._mode == "dispatch" and isinstance(self._persona, Persona):
            raise VoipAvatarException("mode=dispatch takes a persona by name: the worker loads it")
        self._agent_name = self._agent_name or AGENT_NAME
        self._identity: str = _setting(
            "avatar_participant_identity", avatar_participant_identity, str, IDENTITY
        )
        self._name: str = _setting("avatar_participant_name", avatar_participant_name, str, "")
        self._video = _video(
            ("video_codec", "codec", video_codec),
            ("video_bitrate", "bitrate", video_bitrate),
            ("simulcast", "simulcast", simulcast),
        )
        self._join_timeout: float = _setting("join_timeout", join_timeout, _Seconds, 20.0)
        self._studio: OpensAvatars | None = studio or None
        self._own_studio: Studio | None = None
        self._captions: bool = _setting("captions", captions, bool, True)
        self._conn_options = conn_options
        self._started = False
        self._starting: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._mouthpiece: Mouthpiece | None = None
        self._voice: VoiceOnly | None = None
        self._avatar: Any = None  # the local session
        self._wire: Wire | None = None
        self._wired = False
        self._api: api.LiveKitAPI | None = None
        self._dispatch: str | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._silence: _Silence | None = None
        self._asking: asyncio.Task[None] | None = None
        self._here = asyncio.Event()
        self._room_name = ""
        self._request = ""  # what marks the answers to the latest request for a worker
        self._taken = False
        self._refusals: list[tuple[float, str]] = []
        self._failure = ""
        self._trouble = ""
        self._agent: AgentSession[Any] | None = None
        self._pose = ""
        self._telling: asyncio.Task[None] | None = None
        self.lost = 0
        """Times that the avatar was lost, or did not come when it was first asked for."""

    @property
    def avatar_identity(self) -> str:
        """Who the avatar is in the room."""
        return self._identity

    @property
    def provider(self) -> str:
        """Whose avatar it is, as livekit-agents' metrics tell it."""
        return "voipavatar"

    @property
    def mode(self) -> str:
        """ "local" or "dispatch"."""
        return self._mode

    @property
    def joined(self) -> bool:
        """Whether the avatar speaks now; otherwise the agent does so itself."""
        return self._here.is_set()

    # -- starting ----------------------------------------------------------------------------------

    async def start(
        self,
        agent_session: AgentSession[Any],
        room: rtc.Room,
        *,
        livekit_url: NotGivenOr[str] = NOT_GIVEN,
        livekit_api_key: NotGivenOr[str] = NOT_GIVEN,
        livekit_api_secret: NotGivenOr[str] = NOT_GIVEN,
    ) -> None:
        """Bring the avatar into `room` and let it speak for `agent_session`.

        Call it before `agent_session.start`; after it works too, and takes the agent's own track
        away. Raises VoipAvatarException, or what livekit-agents raises when a server can't be
        asked (APIStatusError, APIConnectionError); nothing is left behind then. In `dispatch` it
        returns once a worker was asked for: `wait_for_join` waits.
        """
        if self._started:
            raise VoipAvatarException("start() was called already: an AvatarSession starts once")
        if self._closing is not None:
            raise VoipAvatarException("the avatar was closed already: make another AvatarSession")
        self._started = True
        url = _given("livekit_url", livekit_url)
        key = _given("livekit_api_key", livekit_api_key)
        secret = _given("livekit_api_secret", livekit_api_secret)
        # A task of its own, so that `aclose` can end it: what it had only begun to open would
        # otherwise stay behind.
        work = self._starting = asyncio.create_task(
            self._start(agent_session, room, url, key, secret), name="avatar-start"
        )
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if self._closing is not None:
            await self.aclose()
            raise VoipAvatarException("the avatar was closed while it started")
        try:
            work.result()
        except BaseException:
            await self.aclose()
            raise

    async def _start(
        self, agent_session: AgentSession[Any], room: rtc.Room, url: str, key: str, secret: str
    ) -> None:
        await super().start(agent_session, room)
        self._room_name, agent = _place(room)
        self._voice = VoiceOnly(room)
        agent_session.on("close", self._session_over)
        room.on("track_published", self._unwatched)
        for publication in self._published(room):
            publication.set_subscribed(False)
        mouthpiece = Mouthpiece(self._join_timeout + 2.0)
        mouthpiece.otherwise(self._no_avatar)
        if self._mode == "local":
            await self._start_local(room, agent, url, key, secret, mouthpiece)
        else:
            await self._start_dispatch(room, agent, url, key, secret)
        self._mouthpiece = mouthpiece
        self._silence = _Silence(agent_session, room)
        if self._captions:
            # The session makes its text output when it starts, right after the sound's.
            mouthpiece.on_attach = functools.partial(attach, agent_session, mouthpiece)
        agent_session.output.replace_audio_tail(mouthpiece)
        self._agent = agent_session
        for event in _TURNS:
            agent_session.on(event, self._attend)
        if self._mode == "dispatch":
            self._keeper = asyncio.create_task(self._keep(room, agent), name="avatar-keeper")
            self._keeper.add_done_callback(self._kept)

    def _published(self, room: rtc.Room) -> list[rtc.RemoteTrackPublication]:
        avatar = room.remote_participants.get(self._identity)
        return list(avatar.track_publications.values()) if avatar is not None else []

    def _unwatched(
        self, publication: rtc.RemoteTrackPublication, participant: rtc.RemoteParticipant
    ) -> None:
        """An agent need not receive and decode the picture that it sends out."""
        if participant.identity == self._identity:
            publication.set_subscribed(False)

    def _no_avatar(self) -> VoiceOnly:
        assert self._voice is not None
        return self._voice

    async def _start_local(
        self, room: rtc.Room, agent: str, url: str, key: str, secret: str, mouthpiece: Mouthpiece
    ) -> None:
        studio = self._studio
        if studio is None:
            with _told():
                studio = self._own_studio = Studio(Settings.from_env())
        options = RoomOptions(
            url,
            self._room_name,
            key,
            secret,
            identity=self._identity,
            name=self._name,
            attributes={ATTRIBUTE_PUBLISH_ON_BEHALF: agent},
            video=self._video,
            guests=(Mute(),),
        )
        with _told():
            self._avatar = await studio.open(self._persona, room=options)
        mouthpiece.use(Direct(self._avatar.open_turn, lambda: self._avatar.closing))
        self._here.set()
        self._keeper = asyncio.create_task(self._keep_local(), name="avatar-keeper")

    async def _keep_local(self) -> None:
        """An avatar that ends before its time is told, and the agent speaks for itself."""
        await self._avatar.closed.wait()
        self._lose(self._avatar.failure or "the avatar's session ended")

    # -- a worker ----------------------------------------------------------------------------------

    async def _start_dispatch(
        self, room: rtc.Room, agent: str, url: str, key: str, secret: str
    ) -> None:
        self._api = api.LiveKitAPI(
            url, key, secret, timeout=aiohttp.ClientTimeout(total=self._conn_options.timeout)
        )
        room.on("data_received", self._answered)
        if not _seen(room, self._identity):
            await self._ask(self._room_name, agent)

    async def _ask(self, room: str, agent: str) -> None:
        """Ask the server for a worker, once, however often the request has to be made."""
        assert self._api is not None
        dispatches = self._api.agent_dispatch
        mark = self._request = uuid.uuid4().hex
        self._taken, self._failure = False, ""
        self._refusals.clear()
        video = self._video.model_dump(exclude_none=True)
        metadata = json.dumps(
            {
                "persona": str(self._persona),
                "agent": agent,
                "identity": self._identity,
                "name": self._name,
                "request": mark,
                **({"video": video} if video else {}),
            }
        )
        first = True

        async def ask() -> str:
            nonlocal first
            if not first:  # the answer may have got lost, not the request
                for one in await dispatches.list_dispatch(room):
                    if mark in one.metadata:
                        return str(one.id)
            first = False
            made = await dispatches.create_dispatch(
                api.CreateAgentDispatchRequest(
                    agent_name=self._agent_name, room=room, metadata=metadata
                )
            )
            return str(made.id)

        async def asked() -> None:
            self._dispatch = await _retried(ask, self._conn_options)

        # Goes on when whoever waits is cancelled: only what is known can be taken back.
        self._asking = asyncio.create_task(asked(), name="avatar-ask")
        await asyncio.shield(self._asking)

    def _answered(self, packet: rtc.DataPacket) -> None:
        """What workers say to the request: the server itself tells nothing of it."""
        if packet.topic != DISPATCH or packet.participant is not None:
            return  # only a server's own key can send without being a participant
        try:
            news = json.loads(packet.data)
            if news["request"] != self._request:
                return
            state, reason = str(news["state"]), str(news["reason"])
        except (ValueError, KeyError, TypeError):
            logger.info("a worker's answer could not be read")
            return
        if state == "taken":
            self._taken = True
        elif state == "refused":
            self._refusals.append((time.monotonic(), reason))
        elif state == "failed":
            self._failure = reason

    async def _unask(self, room: str, patience: float = 0.0) -> None:
        """Take the request back, so that the server ends its job, and free the identity.

        An avatar that answers leaves by itself within `patience` seconds, and so does one whose
        job has ended. One that is thrown out can't free what its native library holds: a thread and
        a megabyte each time.
        """
        if self._api is None:
            return
        dispatch, here = self._dispatch, self._room
        if here is not None and not here.isconnected():
            here = None  # a job's room is left before its avatars are closed
        if patience and here is not None and _seen(here, self._identity):
            await self._asked_to_leave(here)
        elif patience and here is None and dispatch is not None:
            packet = api.SendDataRequest(
                room=room, topic=LEAVE, destination_identities=[self._identity]
            )
            await self._cleaned(self._api.room.send_data(packet))
        if dispatch is not None:
            await self._cleaned(self._api.agent_dispatch.delete_dispatch(dispatch, room))
            self._dispatch = None  # not sooner: who is cancelled in between leaves it to the next
            end = time.monotonic() + patience
            while time.monotonic() < end:
                if here is None and not await self._inside(room):
                    return
                if here is not None and self._identity not in here.remote_participants:
                    return
                await asyncio.sleep(0.02 if here is not None else 0.2)
        await self._cleaned(
            self._api.room.remove_participant(
                api.RoomParticipantIdentity(room=room, identity=self._identity)
            )
        )

    async def _inside(self, room: str) -> bool:
        """Whether the server still counts the avatar among those in the room."""
        assert self._api is not None
        who = api.RoomParticipantIdentity(room=room, identity=self._identity)
        try:
            await within(self._api.room.get_participant(who), 5.0)
        except api.TwirpError as error:
            return bool(error.code != "not_found")
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return True
        return True

    async def _assigned(self) -> bool:
        """Whether the server has given the request to a worker, as far as it tells."""
        if self._api is None or self._dispatch is None:
            return False
        try:
            return await within(assigned(self._api, self._room_name, self._dispatch), 5.0)
        except (api.TwirpError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            logger.info("the server was not asked", extra={"error": type(error).__name__})
            return False

    async def _call(self, room: rtc.Room, method: str, payload: str, seconds: float) -> None:
        """Ask the avatar itself. rtc.RpcError when it refuses, is not there or too slow."""
        await room.local_participant.perform_rpc(
            destination_identity=self._identity,
            method=method,
            payload=payload,
            response_timeout=seconds,
        )

    async def _asked_to_leave(self, room: rtc.Room) -> None:
        try:
            await within(self._call(room, LEAVE, "", 1.0), 1.5)
        except (rtc.RpcError, asyncio.TimeoutError) as error:
            logger.info("the avatar was not asked to leave", extra={"error": type(error).__name__})

    async def _cleaned(self, call: Awaitable[Any]) -> None:
        try:
            await within(call, 5.0)
        except (api.TwirpError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            if not (isinstance(error, api.TwirpError) and error.code == "not_found"):
                logger.info("cleaning up failed", extra={"error": type(error).__name__})

    async def _keep(self, room: rtc.Room, agent: str) -> None:
        """See the avatar come, watch it, and have it back when it is lost."""
        pause, longest = BACKOFF
        while True:
            if await self._comes(room, agent):
                pause = BACKOFF[0]
                await self._joined(room)
                reason, alive = await self._watch(room)
            else:
                reason, alive = self._trouble, None
            self._lose(reason, alive)
            if not room.isconnected():
                return
            while True:
                await asyncio.sleep(pause)
                pause = min(longest, pause * 2)
                if await self._ask_again(agent):
                    break

    async def _ask_again(self, agent: str) -> bool:
        """Ask anew, in the place of the request before; whether the server could be asked."""
        try:
            await self._unask(self._room_name)
            await self._ask(self._room_name, agent)
        except (APIConnectionError, APIStatusError) as error:
            logger.info("no worker to be had", extra={"error": type(error).__name__})
            return False
        return True

    async def _comes(self, room: rtc.Room, agent: str) -> bool:
        """Whether the avatar is seen within the join time-out."""
        # A dispatch that found no worker is dropped by the server: once lost, ask again sooner.
        patience = min(self._join_timeout, 6.0) if self.lost else self._join_timeout
        asked = time.monotonic()
        end = asked + patience
        connected = room.isconnected()  # in a job it may be connected later, by the session
        while (now := time.monotonic()) < end:
            if connected and not room.isconnected():
                self._trouble = "the agent's own connection is gone"
                return False
            connected = room.isconnected()
            if not connected:
                end = now + patience  # it can't be seen before
            if _seen(room, self._identity):
                return True
            if self._failure:
                self._trouble = f"a worker took the room, but could not open it: {self._failure}"
                return False
            if self._refusals and not self._taken and now - self._refusals[-1][0] > REFUSED:
                reasons = "; ".join(dict.fromkeys(reason for _, reason in self._refusals))
                self._trouble = (
                    f"no worker under the name {self._agent_name!r} takes the room: {reasons}. "
                    "Start another `voipavatar worker`, or give one more --sessions"
                )
                return False
            if not connected or self._taken or self._refusals:
                asked = now
            elif now - asked > ANSWER:
                # Taken back from a worker that has it, the room might go to nobody: it has said so
                # by now, or is about to.
                if not await self._assigned():
                    await self._ask_again(agent)
                asked = time.monotonic()
            await asyncio.sleep(0.02)
        self._trouble = (
            f"no avatar joined within {patience:g} s: is a `voipavatar worker` running "
            f"under the name {self._agent_name!r}, at this LiveKit server, with room for another "
            "session? `lk dispatch list` and the worker's /health tell"
        )
        return False

    async def _joined(self, room: rtc.Room) -> None:
        assert self._mouthpiece is not None and self._voice is not None
        self._wire = Wire(room, self._identity)
        self._wired = True
        self._mouthpiece.use(self._wire)
        self._here.set()
        self._news("avatar_joined")
        if self.lost:
            logger.info("the avatar is back")
            while any(not one.over for one in self._mouthpiece.pending):
                await asyncio.sleep(0.05)  # what the agent's own voice has begun, it ends
                if not _seen(room, self._identity):
                    return
            await self._voice.hush()

    async def _watch(self, room: rtc.Room) -> tuple[str, float]:
        """Until it is gone; why, and when it was last known to be alive."""
        wire = self._wire
        assert wire is not None
        silent = asyncio.Event()
        wire.on_silent = silent.set
        alive, missed = time.monotonic(), 0
        while True:
            beat = asyncio.ensure_future(self._beats(room))
            try:
                while not beat.done():
                    if not _seen(room, self._identity):
                        return "the avatar left the room", alive
                    await asyncio.wait([beat], timeout=0.1)
                answer = beat.result()
            finally:
                beat.cancel()
                await asyncio.gather(beat, return_exceptions=True)
            if answer:
                alive, missed = time.monotonic(), 0
            else:
                missed += 1
            if missed >= MISSED:
                return "the avatar doesn't answer any more", alive
            if silent.is_set() and not answer:
                return "the avatar fell silent", alive
            end = time.monotonic() + BEAT
            while time.monotonic() < end:
                if not _seen(room, self._identity):
                    return "the avatar left the room", alive
                await asyncio.sleep(0.1)

    async def _beats(self, room: rtc.Room) -> bool:
        try:
            # Of its own accord the call waits for an acknowledgement several times as long.
            await within(self._call(room, ALIVE, "", 2.0), 2.0)
        except asyncio.TimeoutError:
            return False
        except rtc.RpcError as error:
            return bool(error.code == rtc.RpcError.ErrorCode.UNSUPPORTED_METHOD)
        return True

    def _lose(self, reason: str, alive: float | None = None) -> None:
        """Speak for itself from here on, beginning with what was not heard."""
        news = self._here.is_set() or not self.lost
        self._here.clear()
        self.lost += news
        self._trouble = reason
        if self._mouthpiece is not None and self._voice is not None:
            self._mouthpiece.take_over(self._voice, alive)
        wire, self._wire = self._wire, None
        if wire is not None:
            self._spawn(wire.aclose())
        if not news:  # asked for again in vain
            logger.info("there is still no avatar", extra={"reason": reason})
            return
        logger.warning("there is no avatar: the agent speaks voice-only", extra={"reason": reason})
        self._news("avatar_lost", reason)

    def _news(self, event: Literal["avatar_lost", "avatar_joined"], *about: str) -> None:
        try:
            self.emit(event, *about)
        except Exception:  # somebody else's mistake must not be the end of looking after the avatar
            logger.exception("a handler failed", extra={"event": event})

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        """Nobody looks after the avatar any more, which must not happen in silence."""
        if not keeper.cancelled() and keeper.exception() is not None:
            logger.error("looking after the avatar failed", exc_info=keeper.exception())
            self._lose("an error of the plugin's own")

    # -- another face ------------------------------------------------------------------------------

    async def swap_persona(self, persona: str | Persona) -> None:
        """Become another persona on air: nothing said is lost, and the participant stays.

        In `dispatch` it is a name that the worker knows. VoipAvatarException says why it can't be;
        the avatar goes on as it was then.
        """
        if not self._here.is_set() or self._room is None:
            raise VoipAvatarException("there is no avatar to change now: wait_for_join() first")
        if self._mode == "local":
            with _told():
                await self._avatar.swap_persona(persona)
        elif isinstance(persona, Persona):
            raise VoipAvatarException("mode=dispatch takes a persona by name: the worker loads it")
        else:
            try:
                await self._call(self._room, PERSONA, persona, 30.0)
            except rtc.RpcError as error:
                raise VoipAvatarException(f"the persona was not changed: {error.message}") from None
        self._persona = persona  # what a new worker is asked for, should this one be lost

    # -- while it is silent ------------------------------------------------------------------------

    async def gesture(self, name: str) -> None:
        """A nod, smile, shake, wink, tilt, brows or blink, now, also in the middle of speech.

        VoipAvatarException says why there is none.
        """
        if not self._here.is_set() or self._room is None:
            raise VoipAvatarException("there is no avatar to gesture now: wait_for_join() first")
        try:
            if self._mode == "local":
                self._avatar.gesture(name)
                return
            await self._call(self._room, GESTURE, name, 5.0)
        except rtc.RpcError as error:
            raise VoipAvatarException(f"there was no gesture: {error.message}") from None
        except VoipAvatarError as error:
            raise VoipAvatarException(f"there was no gesture: {error}") from None

    def _attend(self, _: object) -> None:
        """The conversation's turn has changed: listen, think, or be at ease."""
        agent = self._agent
        if agent is None:
            return
        if agent.user_state == "speaking":
            pose = "listening"
        else:
            pose = {"thinking": "thinking", "listening": "attentive"}.get(agent.agent_state, "")
        if pose == self._pose:
            return
        self._pose = pose
        if self._mode == "local":
            if self._here.is_set():
                self._avatar.pose(pose)
        elif self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell(), name="avatar-pose")

    async def _tell(self) -> None:
        """By an attribute of the agent's own, which a worker that comes later sees too."""
        told = None
        while self._room is not None and told != self._pose:
            told = self._pose
            try:
                await within(self._room.local_participant.set_attributes({POSE: told}), 5.0)
            except Exception as error:  # a face at ease is no reason to disturb the speech
                logger.info("a pose was not told", extra={"error": type(error).__name__})
                return

    # -- waiting and ending ------------------------------------------------------------------------

    async def wait_for_join(self, *, timeout: float | None = 30.0) -> None:
        """Until the avatar is seen in the room. AvatarJoinTimeout, a TimeoutError, otherwise.

        That it won't come is told as soon as it is known, where that is before `timeout`. Waiting
        for one that was lost goes on, since it is asked for again.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        lost = self.lost
        try:
            while not self._here.is_set():
                left = end - time.monotonic()
                if left <= 0 or (not lost and self.lost):
                    raise asyncio.TimeoutError
                with contextlib.suppress(asyncio.TimeoutError):
                    await within(self._here.wait(), min(0.1, left))
            left = end - time.monotonic()
            await super().wait_for_join(timeout=None if timeout is None else max(0.1, left))
        except asyncio.TimeoutError:
            raise AvatarJoinTimeout(
                self._trouble
                or f"the avatar was not seen within {timeout:g} s: is a `voipavatar worker` "
                f"running under the name {self._agent_name!r} at this LiveKit server?"
            ) from None

    async def aclose(self) -> None:
        """Take the avatar out of the room. The agent speaks for itself afterwards. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="avatar-close")
        await asyncio.shield(self._closing)
        await asyncio.gather(*self._leaving, return_exceptions=True)

    def _session_over(self, _: Any) -> None:
        """The agent that went on without its avatar has said its last word."""
        if self._closing is not None and self._voice is not None:
            self._spawn(self._voice.aclose())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="avatar-leave")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        room = self._room
        self._here.clear()
        if self._agent is not None:
            for event in _TURNS:
                self._agent.off(event, self._attend)
            self._agent = None
        elif self._agent_session is not None:  # it never came to speak for it
            self._agent_session.off("close", self._session_over)
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=5.0)
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        if self._mouthpiece is not None and self._voice is not None:
            for segment in list(self._mouthpiece.pending):
                segment.cleared = True  # nothing is said over again by an agent that is leaving
            self._mouthpiece.take_over(self._voice)
        if self._wire is not None:
            await self._wire.aclose()
            self._wire = None
        await asyncio.gather(*self._leaving, return_exceptions=True)
        if self._silence is not None:
            self._silence.end()
        if room is not None:
            room.off("track_published", self._unwatched)
        if room is not None and self._mode == "dispatch":
            room.off("data_received", self._answered)
            await self._unask(self._room_name, GOODBYE)
        if room is not None and self._wired:
            unanswer(room)  # not sooner: an avatar that leaves still reports
        if self._avatar is not None:
            await self._avatar.aclose()
        if self._own_studio is not None:
            await self._own_studio.aclose()
        if self._voice is not None:
            await self._voice.aclose()
        if self._api is not None:
            await self._api.aclose()
            self._api = None
        if self._mode == "local" or self._avatar is not None:
            self._room = None  # it left by itself: nobody is to be removed
        await super().aclose()


# --- small things ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What goes wrong with an avatar in this process, as the plugin's own error."""
    try:
        yield
    except VoipAvatarException:
        raise
    except VoipAvatarError as error:
        raise VoipAvatarException(str(error)) from error


_TURNS: tuple[Literal["agent_state_changed", "user_state_changed"], ...] = (
    "agent_state_changed",
    "user_state_changed",
)
"""Events of an agent's session that tell whose turn it is."""


def _given(argument: str, value: NotGivenOr[str]) -> str:
    """An argument, or the environment variable of the same name."""
    variable = argument.upper()
    found = value or os.environ.get(variable, "")
    if not found:
        raise VoipAvatarException(f"{argument} is missing: pass it to start(), or set {variable}")
    return str(found)


_Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _setting(argument: str, value: NotGivenOr[Any], kind: Any, default: Any) -> Any:
    """An argument, or the environment's in its place, checked."""
    variable = f"VOIPAVATAR_{argument.upper()}"
    given = is_given(value) and value not in ("", None)
    found = value if given else os.environ.get(variable) or default
    try:
        return TypeAdapter(kind).validate_python(found)
    except ValidationError as error:
        raise VoipAvatarException(
            f"{argument}={found!r} (or {variable}) can't be used: {first_mistake(error)[1]}"
        ) from None


def _video(*given: tuple[str, str, NotGivenOr[Any]]) -> Video:
    """Arguments, or the environment's in their place: name, the field it is for, value."""
    chosen: dict[str, Any] = {}
    for argument, field, value in given:
        variable = f"VOIPAVATAR_{argument.upper()}"
        found = value if is_given(value) else os.environ.get(variable) or None
        if found is None:
            continue
        try:
            chosen |= Video.model_validate({field: found}).model_dump(exclude_none=True)
        except ValidationError as error:
            _, what = first_mistake(error)
            raise VoipAvatarException(
                f"{argument}={found!r} (or {variable}) can't be used: {what}"
            ) from None
    return Video(**chosen)


class _Silence:
    """Takes the track away that `AgentSession` publishes for its own voice.

    One that is there already when the avatar starts, or is just being published, would stay in the
    room: silent, but shown and counted by every client as the agent's second voice.
    """

    def __init__(self, session: AgentSession[Any], room: rtc.Room) -> None:
        self._room = room
        self._tasks: set[asyncio.Task[None]] = set()
        self._name: str | None = None
        try:
            own = session.room_io
        except RuntimeError:
            return  # not started yet: it won't publish any
        if own.audio_output is None:
            return
        # What is being said now waits for a listener, and must not do so for ever.
        subscribed = own.subscribed_fut
        if subscribed is not None and not subscribed.done():
            subscribed.set_result(None)
        options = own._options.get_audio_output_options()
        name = options.track_name if options is not None else NOT_GIVEN
        self._name = name if isinstance(name, str) else "roomio_audio"
        room.on("local_track_published", self._published)
        for publication in list(room.local_participant.track_publications.values()):
            self._published(publication)

    def _published(self, publication: rtc.LocalTrackPublication, *_: Any) -> None:
        if publication.name == self._name:
            task = asyncio.create_task(self._unpublish(publication.sid), name="avatar-silence")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _unpublish(self, sid: str) -> None:
        try:
            await within(self._room.local_participant.unpublish_track(sid), 5.0)
        except Exception as error:  # rtc raises bare exceptions
            logger.info("the agent's own track stays", extra={"error": type(error).__name__})

    def end(self) -> None:
        if self._name is not None:
            self._room.off("local_track_published", self._published)


async def assigned(server: api.LiveKitAPI, room: str, dispatch: str) -> bool:
    """Whether a worker has accepted the dispatch. TwirpError or aiohttp.ClientError."""
    found = await server.agent_dispatch.get_dispatch(dispatch, room)
    return found is not None and bool(found.state.jobs)


def _place(room: rtc.Room) -> tuple[str, str]:
    """The room's name and who the agent is in it, also before a job's room is connected."""
    job = get_job_context(required=False)
    if job is not None and not job.is_fake_job():
        return str(job.job.room.name), str(job.local_participant_identity)
    if not room.isconnected():
        raise VoipAvatarException(
            "the room is not connected: outside of a job, connect it before start()"
        )
    return str(room.name), str(room.local_participant.identity)


def _seen(room: rtc.Room, identity: str) -> bool:
    """Whether the participant is in the room and shows a picture."""
    one = room.remote_participants.get(identity)
    return one is not None and any(
        publication.kind == rtc.TrackKind.KIND_VIDEO
        for publication in one.track_publications.values()
    )


async def _retried(work: Callable[[], Awaitable[T]], options: APIConnectOptions) -> T:
    """`work`, again where that may help; the errors that livekit-agents knows otherwise."""
    for attempt in range(options.max_retry + 1):
        error: APIStatusError | APIConnectionError
        try:
            return await within(work(), options.timeout)
        except api.TwirpError as found:
            status = int(getattr(found, "status", 500) or 500)
            error = APIStatusError(
                "the LiveKit server refused the request for an avatar",
                status_code=status,
                body={"code": found.code},
            )
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as found:
            error = APIConnectionError(
                f"the LiveKit server can't be reached ({type(found).__name__}): "
                "is LIVEKIT_URL right?"
            )
        if not error.retryable or attempt == options.max_retry:
            raise error from None
        await asyncio.sleep(options._interval_for_retry(attempt))
    raise AssertionError("unreachable")


def download() -> None:
    """Bring what personas need before their first call: they are prepared, with all their looks;
    the networks that find a face are fetched where a portrait comes without landmarks; Piper's
    network is cut. What is there is only checked, what is damaged is brought again.

    A persona whose engine can't be had here is left out with a warning. VoipAvatarException, once
    everything else is done, names those that failed otherwise, and why.
    """
    failed = asyncio.run(_download())
    if failed:
        raise VoipAvatarException("not everything could be made ready: " + "; ".join(failed))


async def _download() -> list[str]:
    from .facemodels import face_models
    from .speech import bring

    settings = Settings.from_env()
    failed: list[str] = []
    async with Studio(settings) as studio:
        for persona in list_personas(settings):
            about = {"persona": persona.name}
            try:
                for look in (persona, *map(persona.look, persona.idles)):
                    if _finds_the_face(look):
                        await asyncio.to_thread(face_models, settings)
                    await studio.prepare(look)
                logger.info("a persona is ready", extra=about)
            except ConfigError as error:
                logger.warning("a persona was left out", extra={**about, "error": str(error)})
                continue
            except VoipAvatarError as error:
                failed.append(f"{persona.name}: {error}")
                continue
            try:
                await asyncio.to_thread(bring, persona.voice, settings)
            except ConfigError as error:  # an agent speaks with a voice of its own
                logger.info("a voice can't be had here", extra={**about, "error": str(error)})
    return failed


def _finds_the_face(persona: Persona) -> bool:
    """Whether the face is looked for when the persona is prepared."""
    given = persona.engine_settings().get("landmarks") is not None
    return persona.engine == "viseme" and persona.portrait is not None and not given
