"""Queues in `voipavatar serve` and `voipavatar worker`, with a real broker and a real LiveKit."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from livekit import api

from voipavatar.config import Persona, Settings
from voipavatar.errors import ConfigError
from voipavatar.feed import fed_personas, queue_of
from voipavatar.livekit_server import LiveKitServer
from voipavatar.rabbitmq import QueueOptions
from voipavatar.viewer import Viewer

from .queues import Client, audio
from .scripted import Joined
from .servers import RabbitMQ
from .workers import registered

pytestmark = [pytest.mark.server]

ROOT = Path(__file__).parent.parent


@pytest.fixture
def options(rabbitmq: RabbitMQ) -> QueueOptions:
    return QueueOptions(url=rabbitmq.url, queue=f"f{uuid.uuid4().hex[:8]}")


@pytest.fixture
def settings(livekit: LiveKitServer, rabbitmq: RabbitMQ, tmp_path: Path) -> Settings:
    return Settings(
        livekit_url=livekit.url, livekit_api_key=livekit.api_key,
        livekit_api_secret=livekit.api_secret, amqp_url=rabbitmq.url, cache_dir=tmp_path,
        persona_dirs=(tmp_path,),
    )  # fmt: skip


def persona(folder: Path, name: str, **more: Any) -> None:
    look = {"name": name, "engine": "clapper", "width": 128, "height": 128, "voice": "espeak"}
    (folder / f"{name}.yaml").write_text(json.dumps(look | more))


# --- whose queue it is ----------------------------------------------------------------------------


def test_which_queue_a_persona_speaks_from(tmp_path: Path) -> None:
    settings = Settings(amqp_url="amqp://nowhere/", queue="common", persona_dirs=(tmp_path,))
    persona(tmp_path, "default")
    persona(tmp_path, "host", queue="show")
    persona(tmp_path, "guest")
    found = fed_personas(settings)
    assert {queue: one.name for queue, one in found.items()} == {
        "show": "host", "common": "default",
    }  # fmt: skip
    assert queue_of(found["common"], settings) == "common"
    assert queue_of(found["show"], settings) == "show"
    guest = Persona(name="guest")
    assert queue_of(guest, settings) is None
    assert queue_of(found["show"], dataclasses.replace(settings, amqp_url="")) is None
    persona(tmp_path, "double", queue="show")
    with pytest.raises(ConfigError, match="both name the queue 'show'"):
        fed_personas(settings)


# --- serve ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(
    settings: Settings, queue: str
) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """`voipavatar serve` as a person runs it; the address of its page."""
    env = {
        **os.environ,
        "VOIPAVATAR_CACHE": str(Settings.from_env().cache_dir),  # has the page's files
        "VOIPAVATAR_PERSONAS": str(settings.cache_dir),
        "VOIPAVATAR_TOKEN": "only-for-this-test",
        "LIVEKIT_URL": settings.livekit_url,
        "LIVEKIT_API_KEY": settings.livekit_api_key,
        "LIVEKIT_API_SECRET": settings.livekit_api_secret,
    }
    arguments = ["serve", "--port", "0", "--amqp", settings.amqp_url, "--queue", queue]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "voipavatar", *arguments, env=env, cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    try:
        said = ""
        while "Ctrl-C" not in said:
            line = (await asyncio.wait_for(child.stdout.readline(), 90)).decode()
            assert line, said
            said += line
        page = next(line.split()[1] for line in said.splitlines() if line.startswith("page:"))
        yield page.rstrip("/"), child
    finally:
        if child.returncode is None:
            child.kill()
        await child.stdout.read()
        await child.wait()


async def test_serve_speaks_from_its_queues_and_says_how_they_are(
    settings: Settings, options: QueueOptions, rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    persona(tmp_path, "default")
    other = dataclasses.replace(options, queue=options.queue + "-other")
    persona(tmp_path, "host", queue=other.queue)
    async with contextlib.AsyncExitStack() as undo:
        client = await undo.enter_async_context(Client(rabbitmq.url, options, "*"))
        second = await undo.enter_async_context(Client(rabbitmq.url, other, "*"))
        base, child = await undo.enter_async_context(serving(settings, options.queue))
        # Said by the avatar of the settings' queue, and by the one that names its own.
        a, b, last = (f"{options.queue}-{name}" for name in ("a", "b", "last"))
        await client.send({"type": "text", "data": "Hello there.", "message_id": a})
        await second.send(audio(0.4, b))
        assert await client.ended(a) == await second.ended(b) == ["finished"]
        assert client.ends(a)[0].session == f"queue-{options.queue}"
        async with aiohttp.ClientSession(
            headers={"authorization": "Bearer only-for-this-test"}
        ) as http:
            health = await (await http.get(f"{base}/health")).json()
            assert health["queues"] == {options.queue: "up", other.queue: "up"}
            told = {one["queue"]: one for one in await (await http.get(f"{base}/queues")).json()}
            assert told[options.queue]["finished"] == 1 and told[options.queue]["trouble"] is None
            assert "guest:guest" not in json.dumps(told)
            numbers = await (await http.get(f"{base}/metrics")).text()
            assert 'voipavatar_messages_total{outcome="finished"} 2.0' in numbers
        async with (
            aiohttp.ClientSession() as stranger,
            stranger.get(f"{base}/queues") as refused,  # unread, it would be open until collected
        ):
            assert refused.status == 401
        # The example of the documents, word by word, with nothing but a shell and curl.
        process = await asyncio.create_subprocess_exec(
            "sh", "examples/producer.sh", 'He said "go\\on"; it\'s $HOME.', cwd=ROOT,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={
                **os.environ, "VOIPAVATAR_URL": base, "VOIPAVATAR_TOKEN": "only-for-this-test",
                "VOIPAVATAR_SESSION": f"queue-{options.queue}",
            },
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, err
        answer = json.loads(out)
        assert answer["state"] == "said" and answer["heard"] > 1.0 and answer.get("error") is None
        # What is being said ends before the server does, and is told.
        await client.send(audio(1.5, last))
        await client.until(lambda: last in client.order())
        child.send_signal(signal.SIGINT)
        assert await client.ended(last) == ["finished"]
        assert await asyncio.wait_for(child.wait(), 20) in (0, 130)


# --- worker ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def working(settings: Settings, name: str, **more: Any) -> AsyncIterator[asyncio.Task[None]]:
    chosen: dict[str, Any] = {"capacity": 1, "drain": 20.0, "personas": ("clapper",), **more}
    async with registered(settings, agent_name=name, **chosen) as (worker, task):
        task.worker = worker  # type: ignore[attr-defined]
        yield task


async def health(task: asyncio.Task[None]) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http:
        answer = await http.get(task.worker.url + "/health")  # type: ignore[attr-defined]
        found: dict[str, Any] = await answer.json()
        return found


@contextlib.asynccontextmanager
async def dispatched(
    livekit: LiveKitServer, name: str, room: str, metadata: dict[str, str]
) -> AsyncIterator[api.LiveKitAPI]:
    async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as server:
        await server.agent_dispatch.create_dispatch(
            api.CreateAgentDispatchRequest(
                agent_name=name, room=room, metadata=json.dumps(metadata)
            )
        )
        try:
            yield server
        finally:
            with contextlib.suppress(api.TwirpError):  # the test may have done so itself
                await server.room.delete_room(api.DeleteRoomRequest(room=room))


async def test_a_room_is_fed_and_a_drain_hands_room_and_queue_over(
    livekit: LiveKitServer, settings: Settings, options: QueueOptions, rabbitmq: RabbitMQ
) -> None:
    """No agent is there, and the avatar stays: it has a queue to speak from."""
    name, room = f"fed-{options.queue}", f"room-{options.queue}"
    persona(settings.cache_dir, "small", width=640, height=360)
    wish = {"persona": "small", "queue": options.queue}
    async with contextlib.AsyncExitStack() as undo:
        client = await undo.enter_async_context(Client(rabbitmq.url, options, "*"))
        first = await undo.enter_async_context(working(settings, name, grace=1.0))
        server = await undo.enter_async_context(dispatched(livekit, name, room, wish))
        viewer = await undo.enter_async_context(
            Viewer(livekit.url, room, livekit.api_key, livekit.api_secret)
        )
        await viewer.wait(20)
        end = time.monotonic() + 10
        while not (found := (await health(first))["queues"]) or found[0]["broker"] != "up":
            assert time.monotonic() < end, found
            await asyncio.sleep(0.1)
        assert found[0]["queue"] == options.queue
        await asyncio.sleep(1.5)  # longer than it waits for an agent
        await client.send(audio(0.6, "heard"))
        assert await client.ended("heard") == ["finished"]
        await asyncio.sleep(0.3)
        assert len(viewer.flashes()) == 1
        speaker = client.ends("heard")[0].session
        # Somebody deploys: the first one drains while it speaks, with more waiting.
        ids = [f"m{i}" for i in range(6)]
        for id in ids:
            await client.send(audio(1.0, id))
        await client.until(lambda: "m0" in client.order())
        second = await undo.enter_async_context(working(settings, name, grace=1.0))
        assert (await health(second))["queues"] == []
        first.cancel()
        assert await client.ended(*ids) == ["finished"] * 6
        assert client.order() == client.order("finished") == ["heard", *ids]
        speakers = [client.ends(id)[0].session for id in ids]
        assert speakers[0] == speaker != speakers[-1]
        await asyncio.wait([first], timeout=20)
        assert first.done()
        assert [one["queue"] for one in (await health(second))["queues"]] == [options.queue]
        await asyncio.sleep(0.3)
        # A viewer's buffers stretch what comes late: how often it was said, the receipts know.
        heard = sum(last - begin for begin, last in viewer.loud_spans(gap=0.05)) / 48_000
        assert heard > 6.0
        begun = [one.message_id for one in client.events if one.type == "started"]
        assert begun == ["heard", *ids]
        spoken = sum(client.ends(id)[0].model_dump()["spoken_ms"] for id in begun if id)
        assert spoken == pytest.approx(6_600, abs=10)
        # Otherwise the second one would look for a third as it ends.
        await server.room.delete_room(api.DeleteRoomRequest(room=room))


async def test_an_avatar_that_has_an_agent_leaves_with_it_queue_or_not(
    livekit: LiveKitServer, settings: Settings, options: QueueOptions, rabbitmq: RabbitMQ,
    tmp_path: Path,
) -> None:  # fmt: skip
    name, room = f"agent-{options.queue}", f"room-{options.queue}"
    persona(tmp_path, "host", queue=options.queue)
    async with contextlib.AsyncExitStack() as undo:
        client = await undo.enter_async_context(Client(rabbitmq.url, options, "*"))
        task = await undo.enter_async_context(working(settings, name, grace=1.0))
        async with Joined(livekit, room):
            wish = {"persona": "host", "agent": "agent"}
            await undo.enter_async_context(dispatched(livekit, name, room, wish))
            end = time.monotonic() + 15
            while not (queues := (await health(task))["queues"]) or queues[0]["broker"] != "up":
                assert time.monotonic() < end
                await asyncio.sleep(0.1)
            await client.send(audio(0.3, "beside"))
            assert await client.ended("beside") == ["finished"]
        end = time.monotonic() + 15
        while (found := await health(task))["sessions"] or found["queues"]:
            assert time.monotonic() < end, "it stayed behind"
            await asyncio.sleep(0.1)


async def test_a_queue_without_a_broker_is_passed_on(
    livekit: LiveKitServer, settings: Settings
) -> None:
    name, room = f"bare-{uuid.uuid4().hex[:6]}", f"room-{uuid.uuid4().hex[:6]}"
    bare = dataclasses.replace(settings, amqp_url="")
    async with working(bare, name) as task:
        wish = {"persona": "clapper", "queue": "q"}
        async with contextlib.AsyncExitStack() as undo:
            # A LiveKit server that is busy drops a request now and then, and tells nobody.
            for again in range(3):
                await undo.enter_async_context(dispatched(livekit, name, f"{room}-{again}", wish))
                end = time.monotonic() + 6
                while (found := await health(task))["refused"] == 0 and time.monotonic() < end:
                    await asyncio.sleep(0.1)
                if found["refused"]:
                    break
            assert found["refused"] and found["taken"] == 0
