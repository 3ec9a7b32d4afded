"""How a worker's rooms end: with its time to drain, with their dispatch, with their agent's job."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from typing import Any

import pytest
from livekit import api

from voipavatar.errors import TransportError
from voipavatar.livekit_server import LiveKitServer
from voipavatar.worker import Worker, _Server

from .scripted import Joined, said
from .test_plugin import until
from .test_worker import talking, unique
from .workers import registered, settings_of

pytestmark = pytest.mark.server


@pytest.mark.parametrize("drain", [0.0, 1.0])
async def test_when_the_time_to_drain_is_over_avatars_leave(
    livekit: LiveKitServer, drain: float
) -> None:
    """At once, and not after livekit-agents' own patience; the agent speaks on."""
    name, room_name = unique("drained"), unique("room")
    settings = settings_of(livekit)
    more: dict[str, Any] = {"capacity": 1, "personas": ("clapper",), "drain": drain}
    async with (
        registered(settings, agent_name=name, **more) as (_, task),
        talking(livekit, room_name, name) as (session, avatar, room),
    ):
        await avatar.wait_for_join(timeout=20)
        begin = time.monotonic()
        task.cancel()
        await asyncio.wait([task], timeout=20)
        took = time.monotonic() - begin
        print(f"ended {took:.1f} s after SIGTERM with a drain of {drain:g} s")
        assert task.done() and drain - 0.1 <= took <= drain + 8.0
        await until(lambda: "voipavatar" not in room.remote_participants)
        await until(lambda: not avatar.joined)
        handle = await said(session, "one two")
        assert not handle.interrupted


async def test_a_dispatch_that_is_deleted_is_the_end_of_its_avatar(livekit: LiveKitServer) -> None:
    """Soon, with the end of what it is saying: a caller need not know of any worker."""
    name, room_name = unique("deleted"), unique("room")
    settings = settings_of(livekit)
    async with (
        registered(
            settings, agent_name=name, capacity=1, personas=("clapper",), drain=1.0, grace=60.0
        ) as (worker, _),
        Joined(livekit, room_name) as room,
        api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk,
    ):
        made = await lk.agent_dispatch.create_dispatch(
            api.CreateAgentDispatchRequest(agent_name=name, room=room_name)
        )
        await until(lambda: "voipavatar" in room.remote_participants, 15)
        begin = time.monotonic()
        await lk.agent_dispatch.delete_dispatch(made.id, room_name)
        await until(lambda: "voipavatar" not in room.remote_participants)
        print(f"left {time.monotonic() - begin:.1f} s after its dispatch was deleted")
        await until(lambda: not worker.health()["taken"])


async def test_an_agent_that_left_before_its_avatar_was_closed_takes_it_along(
    livekit: LiveKitServer,
) -> None:
    """As at the end of a job: livekit-agents leaves the room, and closes avatars afterwards."""
    name, room_name = unique("left"), unique("room")
    settings = settings_of(livekit)
    async with registered(
        settings, agent_name=name, capacity=1, personas=("clapper",), drain=1.0, grace=60.0
    ) as (worker, _):
        async with talking(livekit, room_name, name) as (session, avatar, room):
            await avatar.wait_for_join(timeout=20)
            await session.aclose()
            await room.disconnect()
            begin = time.monotonic()
            await avatar.aclose()
            await until(lambda: not worker.health()["taken"])
            assert time.monotonic() - begin < 3.0, "thrown out, or not told"
            print(f"the worker is free {time.monotonic() - begin:.1f} s later")
            async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk:
                left = await lk.agent_dispatch.list_dispatch(room_name)
                assert not [one for one in left if one.agent_name == name], "still asked for"


async def test_a_server_that_never_lets_the_worker_register_is_named(
    livekit: LiveKitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """livekit-agents tries for some two minutes, and here once."""
    once = functools.partial(_Server, max_retry=0)
    monkeypatch.setattr("voipavatar.worker._Server", once)
    settings = dataclasses.replace(settings_of(livekit), livekit_api_secret="x" * 40)
    worker = Worker(settings, agent_name=unique("wrong"), capacity=1, personas=("clapper",))
    with pytest.raises(TransportError, match="LIVEKIT_API_SECRET"):
        await asyncio.wait_for(worker.run(), 30)
