"""The plugin with a real AgentSession in real rooms."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from livekit import api, rtc
from livekit.agents import AgentServer, AgentSession, JobContext, JobExecutorType

from voipavatar.config import Persona
from voipavatar.livekit_server import LiveKitServer
from voipavatar.plugin import AvatarSession, VoipAvatarException
from voipavatar.viewer import Viewer

from .scripted import Joined, Plain, agent_session, said
from .workers import registered, settings_of

pytestmark = pytest.mark.server

CLAPPER = Persona(name="clapper", engine="clapper", width=640, height=360)


def viewer(livekit: LiveKitServer, room: str, **more: Any) -> Viewer:
    return Viewer(livekit.url, room, livekit.api_key, livekit.api_secret, **more)


def keys(livekit: LiveKitServer) -> dict[str, str]:
    return {
        "livekit_url": livekit.url,
        "livekit_api_key": livekit.api_key,
        "livekit_api_secret": livekit.api_secret,
    }


def new_room(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:6]}"


@asynccontextmanager
async def local(
    livekit: LiveKitServer, name: str, *lines: str
) -> AsyncIterator[tuple[AgentSession[Any], AvatarSession, rtc.Room]]:
    """An agent with a local avatar in a room of that name."""
    async with Joined(livekit, name) as room:
        session = agent_session(*lines)
        avatar = AvatarSession(persona=CLAPPER, mode="local")
        try:
            await avatar.start(session, room, **keys(livekit))
            await session.start(Plain(), room=room, record=False)
            yield session, avatar, room
        finally:
            await session.aclose()
            await avatar.aclose()


async def test_a_local_avatar_says_shows_and_reports(livekit: LiveKitServer) -> None:
    name = new_room("local")
    async with local(livekit, name) as (session, avatar, room):
        begin = time.monotonic()
        await avatar.wait_for_join(timeout=10)
        print(f"joined after {time.monotonic() - begin:.2f} s")
        async with viewer(livekit, name) as seen:
            await seen.wait()
            await asyncio.sleep(0.5)
            events: list[Any] = []
            session.on("agent_state_changed", lambda event: events.append(event.new_state))
            handle = await said(session, "one two three four")
            assert not handle.interrupted
            await asyncio.sleep(0.5)
            assert len(seen.flashes()) == 1
            loud = sum(last - first for first, last in seen.loud_spans())
            assert loud / 48_000 == pytest.approx(1.0, abs=0.1)  # whole, if not in one piece
            assert events[-1] == "listening" and "speaking" in events
        sound = [
            one
            for who in room.remote_participants.values()
            for one in who.track_publications.values()
            if one.kind == rtc.TrackKind.KIND_AUDIO
        ]
        own = room.local_participant.track_publications
        assert len(sound) == 1 and not own, "one voice, and it is the avatar's"
        [who] = [one for one in room.remote_participants.values() if one.identity != "viewer"]
        assert who.attributes["lk.publish_on_behalf"] == "agent"
        assert who.kind == rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
    assert not room.isconnected()


async def test_it_is_called_as_its_persona_is_titled(livekit: LiveKitServer) -> None:
    titled = CLAPPER.model_copy(update={"title": "The Clapper"})
    for given, wanted in (("", "The Clapper"), ("Ada", "Ada")):
        async with Joined(livekit, new_room("titled")) as room:
            session = agent_session()
            avatar = AvatarSession(persona=titled, mode="local", avatar_participant_name=given)
            try:
                await avatar.start(session, room, **keys(livekit))
                await avatar.wait_for_join(timeout=10)
                assert room.remote_participants["voipavatar"].name == wanted
            finally:
                await session.aclose()
                await avatar.aclose()


async def test_metrics_tell_when_it_joined_and_how_late_it_speaks(livekit: LiveKitServer) -> None:
    async with Joined(livekit, new_room("metrics")) as room:
        session = agent_session("one two three")
        avatar = AvatarSession(persona=CLAPPER, mode="local")
        own: list[Any] = []
        through: list[Any] = []
        avatar.on("metrics_collected", own.append)
        session.on("metrics_collected", lambda event: through.append(event.metrics))
        try:
            await avatar.start(session, room, **keys(livekit))
            await session.start(Plain(), room=room, record=False)
            await avatar.wait_for_join(timeout=10)
            handle = session.generate_reply(user_input="count")
            await asyncio.wait_for(handle.wait_for_playout(), 10)
            end = time.monotonic() + 2
            while len(own) < 2 and time.monotonic() < end:
                await asyncio.sleep(0.02)
        finally:
            await session.aclose()
            await avatar.aclose()
    joined, spoke = own
    assert joined.avatar_joined_time >= joined.session_started_time
    print(f"playback latency {spoke.playback_latency * 1000:.0f} ms")
    assert 0 < spoke.playback_latency < 1.0
    assert joined.metadata.model_provider == "voipavatar"
    assert [one for one in through if one in own] == own


def voices(room: rtc.Room) -> list[str]:
    """The sound tracks that somebody who looks at `room` is offered, by name."""
    return [
        one.name
        for who in room.remote_participants.values()
        for one in who.track_publications.values()
        if one.kind == rtc.TrackKind.KIND_AUDIO
    ]


@pytest.mark.parametrize("published", [True, False], ids=["published", "being published"])
async def test_an_avatar_for_a_session_that_runs_already(
    livekit: LiveKitServer, published: bool
) -> None:
    """The session's own track goes, also when it is only on its way: there is one voice."""
    name = new_room("after")
    async with Joined(livekit, name) as room, Joined(livekit, name, "person", "standard") as person:
        session = agent_session()
        avatar = AvatarSession(persona=CLAPPER, mode="local")
        own = room.local_participant.track_publications
        try:
            await session.start(Plain(), room=room, record=False)
            if published:
                await until(lambda: bool(own))
            await avatar.start(session, room, **keys(livekit))
            linked = session.room_io
            await until(lambda: linked.linked_participant is not None)
            await asyncio.sleep(0.3)
            await until(lambda: not own)
            handle = await said(session, "one two three")
            assert not handle.interrupted
            assert voices(person) == ["avatar_audio"]
            # Taken away again, it leaves the agent its voice.
            await avatar.aclose()
            begin = time.monotonic()
            await said(session, "one two")
            assert time.monotonic() - begin >= 0.4 and voices(person) == ["agent_audio"]
        finally:
            await session.aclose()
            await avatar.aclose()


async def until(true: Callable[[], bool], limit: float = 8.0) -> None:
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("mode", ["local", "dispatch"])
@pytest.mark.parametrize("connected", [True, False], ids=["connected", "not connected yet"])
async def test_inside_a_job(
    livekit: LiveKitServer, monkeypatch: pytest.MonkeyPatch, connected: bool, mode: str
) -> None:
    """As an agent's worker runs it, configured by nothing but the environment, also before the
    job's room is connected."""
    name, room_name = new_room("jobs"), new_room("job")
    for variable, value in {
        **{argument.upper(): value for argument, value in keys(livekit).items()},
        "VOIPAVATAR_PERSONA": "clapper",
        "VOIPAVATAR_AVATAR_PARTICIPANT_IDENTITY": "face",
    }.items():
        monkeypatch.setenv(variable, value)
    if mode == "dispatch":
        monkeypatch.setenv("VOIPAVATAR_AGENT_NAME", name + "-avatars")
    done: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
    begun = threading.Event()

    async def entry(job: JobContext) -> None:
        begun.set()
        try:
            session = agent_session()
            avatar = AvatarSession()
            assert avatar.mode == mode
            if connected:
                await job.connect()
            await avatar.start(session, job.room)
            await session.start(Plain(), room=job.room, record=False)
            await avatar.wait_for_join(timeout=20)
            await until(lambda: bool(voices(job.room)))
            handle = await said(session, "one two")
            [face] = job.room.remote_participants.values()
            done.set_result(
                {
                    "interrupted": handle.interrupted,
                    "voices": voices(job.room),
                    "face": face.identity,
                    "own": len(job.room.local_participant.track_publications),
                    "behalf": face.attributes.get("lk.publish_on_behalf"),
                    "agent": job.room.local_participant.identity,
                }
            )
        except BaseException as error:
            done.set_exception(error)
            raise
        finally:
            job.shutdown("that was all")

    server = AgentServer(
        job_executor_type=JobExecutorType.THREAD, load_fnc=lambda *_: 0.0, load_threshold=1.0,
        num_idle_processes=1, ws_url=livekit.url, api_key=livekit.api_key,
        api_secret=livekit.api_secret, host="127.0.0.1", port=0,
    )  # fmt: skip
    server.rtc_session(agent_name=name)(entry)
    ready = asyncio.Event()
    server.on("worker_registered", lambda *_: ready.set())
    serving = asyncio.create_task(server.run())
    try:
        await asyncio.wait_for(ready.wait(), 20)
        async with contextlib.AsyncExitStack() as undo:
            lk = await undo.enter_async_context(
                api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret)
            )
            if mode == "dispatch":
                settings = settings_of(livekit)
                await undo.enter_async_context(
                    registered(
                        settings, agent_name=name + "-avatars", capacity=1, personas=("clapper",),
                        drain=10.0,
                    )
                )  # fmt: skip
            wish = api.CreateAgentDispatchRequest(agent_name=name, room=room_name)
            # A LiveKit server that is busy drops a request now and then, and tells nobody.
            for _ in range(3):
                await lk.agent_dispatch.create_dispatch(wish)
                if await asyncio.to_thread(begun.wait, 8):
                    break
            found = await asyncio.wait_for(asyncio.wrap_future(done), 40)
            assert found["voices"] == ["avatar_audio"] and not found["interrupted"]
            assert found["own"] == 0 and found["face"] == "face"
            assert found["behalf"] == found["agent"]
            end = time.monotonic() + 10
            while True:  # the end of the job is the end of its avatar
                inside = await lk.room.list_participants(
                    api.ListParticipantsRequest(room=room_name)
                )
                if not inside.participants:
                    break
                assert time.monotonic() < end, "the avatar stayed"
                await asyncio.sleep(0.1)
    finally:
        await server.aclose()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def test_the_face_follows_the_conversation(livekit: LiveKitServer) -> None:
    """Attentive while the user may speak, listening while they do, thinking while the answer is
    made; and a gesture when the agent asks for one."""
    name = new_room("poses")
    async with local(livekit, name, "one two") as (session, avatar, _):
        await avatar.wait_for_join(timeout=10)
        stage = avatar._avatar.stage
        told: list[str] = []
        usual = stage.pose

        def noted(pose: str) -> None:
            told.append(pose)
            usual(pose)

        stage.pose = noted
        session._update_user_state("speaking")
        session._update_user_state("listening")
        await asyncio.wait_for(session.generate_reply(user_input="hello").wait_for_playout(), 20)
        await asyncio.sleep(0.3)
        assert told[0] == "listening" and told[-1] == "attentive"
        assert "thinking" in told and "" in told
        assert told.index("thinking") < told.index(""), "it thinks before it speaks"
        with pytest.raises(VoipAvatarException, match="no gestures"):
            await avatar.gesture("nod")


async def test_what_is_missing_is_named(
    livekit: LiveKitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LIVEKIT_URL", "LIVEKIT_API_KEY", "LIVEKIT_API_SECRET"):
        monkeypatch.delenv(variable, raising=False)
    async with Joined(livekit, new_room("missing")) as room:
        session = agent_session()
        avatar = AvatarSession(persona=CLAPPER)
        with pytest.raises(VoipAvatarException, match="livekit_url.*LIVEKIT_URL"):
            await avatar.start(session, room)
        with pytest.raises(VoipAvatarException, match="already"):
            await avatar.start(session, room, **keys(livekit))
        shut = AvatarSession(persona=CLAPPER, mode="local")
        await shut.aclose()
        with pytest.raises(VoipAvatarException, match="closed already"):
            await shut.start(session, room, **keys(livekit))
        nobody = AvatarSession(persona="nobody", mode="local")
        with pytest.raises(VoipAvatarException, match="nobody"):
            await nobody.start(session, room, **keys(livekit))
        wrong = AvatarSession(persona=CLAPPER)
        with pytest.raises(VoipAvatarException, match="LIVEKIT_API_SECRET"):
            await wrong.start(session, room, **{**keys(livekit), "livekit_api_secret": "x" * 40})
        assert session.output.audio is None
        assert not room.remote_participants
        await session.aclose()
    with pytest.raises(VoipAvatarException, match="local or dispatch"):
        AvatarSession(mode="somewhere")  # type: ignore[arg-type]


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument by a variable of its name; an argument goes before it."""
    for variable, value in {
        "PERSONA": "guide",
        "AGENT_NAME": "faces",
        "AVATAR_PARTICIPANT_IDENTITY": "face",
        "AVATAR_PARTICIPANT_NAME": "Ada",
        "JOIN_TIMEOUT": "7.5",
        "CAPTIONS": "false",
    }.items():
        monkeypatch.setenv(f"VOIPAVATAR_{variable}", value)
    avatar = AvatarSession()
    assert avatar.mode == "dispatch" and avatar.avatar_identity == "face"
    chosen = avatar._persona, avatar._agent_name, avatar._name
    assert chosen == ("guide", "faces", "Ada")
    assert avatar._join_timeout == 7.5 and avatar._captions is False
    given = AvatarSession(persona="other", mode="local", join_timeout=3, captions=True)
    assert (given.mode, given._persona, given._join_timeout) == ("local", "other", 3.0)
    assert given._captions is True
    with pytest.raises(VoipAvatarException, match=r"join_timeout='soon'.*VOIPAVATAR_JOIN_TIMEOUT"):
        AvatarSession(join_timeout="soon")  # type: ignore[arg-type]
    with pytest.raises(VoipAvatarException, match="join_timeout=0"):
        AvatarSession(join_timeout=0)
    monkeypatch.setenv("VOIPAVATAR_CAPTIONS", "perhaps")
    with pytest.raises(VoipAvatarException, match="VOIPAVATAR_CAPTIONS"):
        AvatarSession()
