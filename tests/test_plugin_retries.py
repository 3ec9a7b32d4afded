"""Asking for a worker: what is asked again, what is not, and never twice for one answer lost."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from livekit import api
from livekit.agents import APIConnectionError, APIConnectOptions, APIStatusError
from livekit.protocol.agent_dispatch import AgentDispatch, ListAgentDispatchResponse

from voipavatar.plugin import AvatarSession

from .scripted import agent_session

QUICK = APIConnectOptions(max_retry=3, retry_interval=0.01, timeout=2.0)


class FakeRoom:
    """As much of a connected room as asking for a worker needs."""

    name = "somewhere"
    local_participant = type("Participant", (), {"identity": "agent"})()
    remote_participants: dict[str, Any] = {}

    def isconnected(self) -> bool:
        return True

    def on(self, *_: Any) -> None: ...

    def off(self, *_: Any) -> None: ...


class FakeServer:
    """LiveKit's dispatch service; `answers` are statuses, or None to hang up after doing it."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.created: list[AgentDispatch] = []
        self.asked = 0

    async def create(self, request: web.Request) -> web.Response:
        self.asked += 1
        wish = api.CreateAgentDispatchRequest.FromString(await request.read())
        status = self.answers.pop(0) if self.answers else 200
        if status is None or status == 200:
            made = AgentDispatch(id=f"AD_{len(self.created)}", metadata=wish.metadata)
            self.created.append(made)
            if status is None:
                assert request.transport is not None
                request.transport.abort()
            return web.Response(body=made.SerializeToString(), content_type="application/protobuf")
        body = json.dumps({"code": "internal", "msg": "told to"})
        return web.Response(status=status, text=body, content_type="application/json")

    async def list(self, request: web.Request) -> web.Response:
        found = ListAgentDispatchResponse(agent_dispatches=self.created)
        return web.Response(body=found.SerializeToString(), content_type="application/protobuf")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        service = "/twirp/livekit.AgentDispatchService/"
        app.add_routes(
            [
                web.post(service + "CreateDispatch", self.create),
                web.post(service + "ListDispatch", self.list),
            ]
        )
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


async def ask(url: str) -> AvatarSession:
    room: Any = FakeRoom()
    avatar = AvatarSession(persona="clapper", mode="dispatch", conn_options=QUICK, join_timeout=0.1)
    session = agent_session()
    try:
        await avatar.start(
            session, room, livekit_url=url, livekit_api_key="k", livekit_api_secret="s" * 40
        )
    finally:
        await avatar.aclose()
        await session.aclose()
    return avatar


async def test_trouble_at_the_server_is_asked_again() -> None:
    """Also a 408: what the server answers when its own inner call was too slow."""
    server = FakeServer(503, 500, 408)
    async with server.running() as url:
        await ask(url)
    assert server.asked == 4 and len(server.created) == 1


async def test_a_refusal_is_not() -> None:
    server = FakeServer(401)
    async with server.running() as url:
        with pytest.raises(APIStatusError) as caught:
            await ask(url)
    assert caught.value.status_code == 401 and server.asked == 1


async def test_it_ends_after_so_many_tries() -> None:
    server = FakeServer(*[503] * 9)
    async with server.running() as url:
        with pytest.raises(APIStatusError):
            await ask(url)
    assert server.asked == QUICK.max_retry + 1


async def test_an_answer_that_is_lost_makes_no_second_avatar() -> None:
    server = FakeServer(None)
    async with server.running() as url:
        await ask(url)
    assert server.asked == 1 and len(server.created) == 1


async def test_a_handler_that_fails_does_not_end_looking_after_the_avatar(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One for both events takes an argument that only one of them has."""
    avatar = AvatarSession(mode="dispatch")
    heard: list[str] = []
    avatar.on("avatar_joined", lambda why: heard.append(why))
    avatar.on("avatar_lost", lambda why: heard.append(why))
    avatar._news("avatar_joined")
    avatar._lose("it left")
    assert heard == ["it left"] and "a handler failed" in caplog.text


async def test_nobody_there_says_what_to_check() -> None:
    with pytest.raises(APIConnectionError, match="LIVEKIT_URL"):
        await ask("http://127.0.0.1:9")
