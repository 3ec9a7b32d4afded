"""What an avatar's token lets its holder do: publish in one room, for ten minutes, nothing else."""

from __future__ import annotations

from typing import Any, cast

import jwt
import pytest
from livekit import rtc

from voipavatar import plugin
from voipavatar.config import Persona, Settings
from voipavatar.errors import ConfigError
from voipavatar.follow import Follow
from voipavatar.plugin import AvatarSession, VoipAvatarException
from voipavatar.room import RoomOptions
from voipavatar.worker import Order, Worker

from .scripted import agent_session

KEY, SECRET = "APIkey", "a-secret-of-at-least-thirty-two-characters"
LONGEST = 600
"""Seconds that a token may be good for; joining again makes a new one."""


class Door:
    """Stands for a studio: keeps with what an avatar would join, and lets none in."""

    def __init__(self) -> None:
        self.options: RoomOptions | None = None

    async def open(self, persona: str | Persona, *, room: RoomOptions, id: str = "") -> Any:
        self.options = room
        raise ConfigError("nobody gets in")


def claims(options: RoomOptions | None) -> dict[str, Any]:
    """Everything that the token says, checked as LiveKit's server checks it."""
    assert options is not None, "no avatar was asked for"
    return jwt.decode(
        options.make_token(), SECRET, algorithms=["HS256"], options={"require": ["exp", "nbf"]}
    )


def minimal(found: dict[str, Any], room: str, *, hears: bool = False) -> None:
    """Whatever is not listed here is not in the token, so that a new grant has to be looked at."""
    assert found["video"] == {
        "roomJoin": True,
        "room": room,
        "canPublish": True,
        "canPublishSources": ["camera", "microphone"],
        "canPublishData": True,
        "canSubscribe": hears,
    }
    assert found["kind"] == "agent" and found["iss"] == KEY
    assert 0 < found["exp"] - found["nbf"] <= LONGEST + 1
    known = {"iss", "sub", "nbf", "exp", "kind", "name", "video", "attributes"}
    assert set(found) <= known, "more than is needed to publish"
    assert SECRET not in repr(found)


def test_nothing_but_publishing_in_one_room_unless_something_is_heard_there() -> None:
    options = RoomOptions("ws://127.0.0.1:9", "a room", KEY, SECRET, identity="avatar")
    found = claims(options)
    minimal(found, "a room")
    assert found["sub"] == found["name"] == "avatar" and not found["attributes"]
    follows = RoomOptions("ws://127.0.0.1:9", "a room", KEY, SECRET, guests=(Follow("caller"),))
    minimal(claims(follows), "a room", hears=True)


async def test_the_plugins_avatar_speaks_on_behalf_of_the_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "_place", lambda room: ("a room", "the-agent"))
    door = Door()
    avatar = AvatarSession(persona="default", mode="local", studio=door)
    session = agent_session()
    try:
        with pytest.raises(VoipAvatarException, match="nobody gets in"):
            await avatar.start(
                session, rtc.Room(),
                livekit_url="ws://127.0.0.1:9", livekit_api_key=KEY, livekit_api_secret=SECRET,
            )  # fmt: skip
    finally:
        await session.aclose()
    found = claims(door.options)
    minimal(found, "a room")
    assert found["attributes"] == {"lk.publish_on_behalf": "the-agent"}


@pytest.mark.parametrize("agent", ["the-agent", ""])
async def test_a_workers_avatar_does_so_too_where_it_has_an_agent(agent: str) -> None:
    settings = Settings.from_env(
        {
            "LIVEKIT_URL": "ws://127.0.0.1:9",
            "LIVEKIT_API_KEY": KEY,
            "LIVEKIT_API_SECRET": SECRET,
        }
    )
    worker, door = Worker(settings, capacity=1), Door()
    worker._studio = cast(Any, door)
    with pytest.raises(ConfigError, match="nobody gets in"):
        await worker._avatar("a job", "a room", Order(agent=agent, identity="avatar-7"))
    found = claims(door.options)
    # It subscribes to nothing: who may not isn't told either who is in the room.
    minimal(found, "a room", hears=True)
    assert found["sub"] == "avatar-7"
    assert found["attributes"] == ({"lk.publish_on_behalf": agent} if agent else {})
