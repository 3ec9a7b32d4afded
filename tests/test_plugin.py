"""The plugin with a real AgentSession in real rooms."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from livekit import rtc
from livekit.agents import AgentSession

from voipavatar.config import Persona
from voipavatar.livekit_server import LiveKitServer
from voipavatar.plugin import AvatarSession, VoipAvatarException
from voipavatar.viewer import Viewer

from .scripted import Joined, Plain, agent_session, said

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


async def test_interruptions_of_a_local_avatar(livekit: LiveKitServer) -> None:
    name = new_room("barge")
    async with local(livekit, name) as (session, avatar, room):
        for pause in (0.0, 0.02, 0.2, 0.6, 0.0, 0.1):
            handle = session.say("one two three four five six seven eight")
            await asyncio.sleep(pause)
            begin = time.monotonic()
            session.interrupt(force=True)
            await asyncio.wait_for(handle.wait_for_playout(), 5)
            assert time.monotonic() - begin < 1.5
            assert handle.interrupted
        handle = await said(session, "still here")
        assert not handle.interrupted


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
        wrong = AvatarSession(persona=CLAPPER)
        with pytest.raises(Exception, match="LIVEKIT_API_SECRET"):
            await wrong.start(session, room, **{**keys(livekit), "livekit_api_secret": "x" * 40})
        assert session.output.audio is None
        assert not room.remote_participants
        await session.aclose()
    with pytest.raises(VoipAvatarException, match="local or dispatch"):
        AvatarSession(mode="somewhere")  # type: ignore[arg-type]
