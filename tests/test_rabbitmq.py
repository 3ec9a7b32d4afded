"""The queue on a real RabbitMQ: receipts, order, and everything that can go wrong on the way."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import hashlib
import json
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import aio_pika
import psutil
import pytest
import pytest_asyncio
from aiohttp import web

from voipavatar.config import Settings
from voipavatar.errors import TransportError
from voipavatar.feed import feeding
from voipavatar.ledger import Entry, SqliteLedger
from voipavatar.media import ManualClock
from voipavatar.messages import Failed, Interrupted
from voipavatar.rabbitmq import QueueOptions, _below, fetch
from voipavatar.session import Studio
from voipavatar.stage import Options

from .conftest import MakeProxy
from .queues import CLAPPER, Client, Rig, Watch, audio, tone, wav, working
from .servers import Ports, RabbitMQ

pytestmark = [pytest.mark.server]

ROOT = Path(__file__).parent.parent


@pytest.fixture
def options(rabbitmq: RabbitMQ) -> QueueOptions:
    return QueueOptions(
        url=rabbitmq.url, queue=f"q{uuid.uuid4().hex[:8]}", retries=(0.2, 0.5, 1.0), watch=0.5,
        heartbeat=5,
    )  # fmt: skip


@pytest_asyncio.fixture
async def client(rabbitmq: RabbitMQ, options: QueueOptions) -> AsyncIterator[Client]:
    async with Client(rabbitmq.url, options) as one:
        yield one


@pytest_asyncio.fixture
async def rig(options: QueueOptions, client: Client, tmp_path: Path) -> AsyncIterator[Rig]:
    async with working(options, tmp_path) as one:
        yield one


def now(seconds: float = 0.0) -> str:
    return (datetime.now(timezone.utc) + timedelta(seconds=seconds)).isoformat()


# --- messages and receipts ------------------------------------------------------------------------


async def test_receipts_tell_everything_in_order(rig: Rig, client: Client) -> None:
    assert client._channel is not None
    reply = await client._channel.declare_queue(exclusive=True)
    copies: list[str] = []

    async def heard(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        copies.append(json.loads(message.body)["type"])
        await message.ack()

    await reply.consume(heard)
    await client.send(audio(1.6), message_id="a", correlation_id="order-7", reply_to=reply.name)
    await client.send(audio(0.4, "b"))
    assert await client.ended("a", "b") == ["finished", "finished"]
    kinds = [event.type for event in client.of("a")]
    assert [kind for kind in kinds if kind not in ("caption", "progress")] == [
        "accepted", "queued", "started", "finished",
    ]  # fmt: skip
    assert "progress" in kinds
    assert {event.correlation_id for event in client.of("a")} == {"order-7"}
    assert client.ends("a")[0].model_dump()["spoken_ms"] == pytest.approx(1600, abs=2)
    assert client.order() == ["a", "b"]
    second = next(event for event in client.of("b") if event.type == "queued")
    assert second.model_dump()["position"] == 1
    states = [event.model_dump()["state"] for event in client.events if event.type == "state"]
    assert {"PROCESSING", "TALKING", "TRANSITIONING"} <= set(states)
    await client.until(lambda: copies[-1:] == ["finished"])
    assert [kind for kind in copies if kind != "progress"] == [
        "accepted", "queued", "started", "finished",
    ]  # fmt: skip
    assert rig.feed.status()["broker"] == "up"
    await client.until(lambda: rig.feed.status()["in_hand"] == 0)


async def test_a_broadcast_speaks_from_a_queue_whoever_carries_it(
    rabbitmq: RabbitMQ, options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    """What `voipavatar stream --queue` does: the queue outlives the session that speaks for it."""
    settings = Settings(cache_dir=tmp_path, amqp_url=rabbitmq.url)
    async with Studio(settings) as studio, feeding(studio, CLAPPER, settings, options.queue) as at:
        first = await studio.open(CLAPPER, sinks=[Watch], id=options.queue)
        at.adopt(first)
        await asyncio.sleep(3.0)  # the queue is declared by whoever feeds from it
        await client.send(audio(0.4, "one"))
        assert await client.ended("one") == ["finished"]
        await first.aclose()
        at.adopt(await studio.open(CLAPPER, sinks=[Watch], id=options.queue))
        await client.send(audio(0.4, "two"))
        assert await client.ended("two") == ["finished"]


async def test_the_forms_of_the_first_day(rig: Rig, client: Client) -> None:
    """No id, a session that isn't there, a text: it is spoken. The same again is another one."""
    text = {
        "type": "text",
        "data": "Hello, this is a test message for talking face generation.",
        "session_id": "unique-session-id",
        "timestamp": "2024-01-01T00:00:00Z",
    }
    await client.send(text)
    await client.send(text)
    await client.send(audio(0.3, session_id="unique-session-id", timestamp="2024-01-01T00:00:00Z"))
    await client.until(lambda: len(client.order("finished")) == 3)
    assert {event.session_id for event in client.events if event.message_id} == {
        "unique-session-id"
    }
    assert {event.session for event in client.events} == {rig.session.id}
    await client.send({"type": "control", "data": "stop"})
    await client.until(lambda: len(client.order("finished")) == 4)


async def test_sound_may_be_the_body(rig: Rig, client: Client) -> None:
    await client.send(wav(0.4), message_id="wav", content_type="audio/wav")
    await client.send(
        tone(0.5, 24_000), message_id="pcm", content_type="audio/pcm;rate=24000;channels=1"
    )
    await client.send(b"Guten Tag.", message_id="plain", content_type="text/plain")
    assert await client.ended("wav", "pcm", "plain") == ["finished"] * 3
    assert client.ends("pcm")[0].model_dump()["spoken_ms"] == pytest.approx(500, abs=2)


async def test_modes_and_who_cut_whom(rig: Rig, client: Client) -> None:
    await client.send(audio(20, "long"))
    await client.send(audio(0.3, "next"))
    await client.until(lambda: "long" in client.order())
    await client.send(audio(0.3, "now", mode="interrupt"))
    assert await client.ended("long", "now", "next") == ["interrupted", "finished", "finished"]
    cut = client.ends("long")[0]
    assert isinstance(cut, Interrupted) and cut.by == "now" and 0 < cut.spoken_ms < 20_000
    assert client.order() == ["long", "now", "next"]
    for id in ("one", "two", "three"):
        await client.send(audio(20, id))
    await client.until(lambda: "one" in client.order())
    await client.send(audio(0.3, "instead", mode="replace"))
    outcomes = await client.ended("one", "two", "three", "instead")
    assert outcomes == ["interrupted"] * 3 + ["finished"]
    dropped = client.ends("three")[0]
    assert isinstance(dropped, Interrupted) and dropped.by == "instead" and dropped.spoken_ms == 0
    assert "two" not in client.order() and "three" not in client.order()


async def test_control_does_not_wait_behind_speech(
    rig: Rig, client: Client, options: QueueOptions
) -> None:
    """More waits in the broker than is read ahead, and still: stop is now, and of all."""
    ids = [f"m{i}" for i in range(15)]
    for id in ids:
        await client.send(audio(5, id))
    await client.until(lambda: "m0" in client.order())

    async def control(id: str, command: str, **more: Any) -> str:
        body = {"type": "control", "command": command, "message_id": id} | more
        await client.send(body, to=options.control)
        return (await client.ended(id))[0]

    assert await control("p", "pause") == "finished"
    await asyncio.sleep(0.5)
    heard = rig.session.stage.played_of(1)
    await asyncio.sleep(0.5)
    assert rig.session.stage.played_of(1) == heard > 0
    assert await control("r", "resume") == "finished"
    await client.until(lambda: rig.session.stage.played_of(1) > heard)
    assert await control("s", "stop") == "finished"
    assert await client.ended(*ids) == ["interrupted"] * 15
    assert client.order() == ["m0"]
    assert {event.model_dump()["by"] for id in ids for event in client.ends(id)} == {"s"}
    await client.send(audio(0.3, "after"))
    assert await client.ended("after") == ["finished"]
    assert await control("v", "voice", value="espeak") == "finished"
    assert await control("w", "voice", value="os.system") == "failed"
    assert await control("i", "idle", value="waving") == "failed"


async def test_whom_it_is_for(rig: Rig, client: Client) -> None:
    await client.send(audio(0.2, "own", session=rig.session.id))
    await client.send(audio(0.2, "persona", persona="clapper"))
    await client.send(audio(0.2, "nobody", session="nobody"))
    await client.send(audio(0.2, "stranger", persona="stranger"))
    outcomes = await client.ended("own", "persona", "nobody", "stranger")
    assert outcomes == ["finished", "finished", "failed", "failed"]
    failed = client.ends("nobody")[0]
    assert isinstance(failed, Failed) and failed.code == "no_session" and not failed.retryable
    assert {one.headers["x-reason"] for one in await client.dead()} == {"no_session"}


async def test_an_early_ack_lets_many_wait(rig: Rig, client: Client) -> None:
    ids = [f"e{i}" for i in range(20)]
    for id in ids:
        await client.send(audio(0.2, id, ack="on_accept"))
    await client.until(lambda: len(client.order("queued")) == 20, 20)
    assert len(client.order("finished")) < 20
    assert await client.ended(*ids) == ["finished"] * 20
    assert client.order() == ids


async def test_a_duplicate_a_hundred_times(rig: Rig, client: Client) -> None:
    for _ in range(50):
        await client.send(audio(0.5, "twin"))
    assert await client.ended("twin") == ["finished"]
    for _ in range(50):
        await client.send(audio(0.5, "twin"))
    await client.until(lambda: sum(e.type == "duplicate" for e in client.events) == 99)
    await client.send(audio(0.2, "other"))
    assert await client.ended("other", "twin") == ["finished", "finished"]
    assert len(rig.watch.turns) == 2
    last = [event for event in client.events if event.type == "duplicate"][-1]
    assert last.model_dump()["outcome"] == "finished"


async def test_expired_is_never_spoken(rig: Rig, client: Client) -> None:
    await client.send(audio(0.3, "past", not_after=now(-1)))
    await client.send(audio(2.0, "long"))
    await client.send(audio(0.3, "waits", not_after=now(1.0)))
    await client.send(audio(0.3, "fine", not_after=now(60)))
    outcomes = await client.ended("past", "long", "waits", "fine")
    assert outcomes == ["expired", "finished", "expired", "finished"]
    assert client.order() == ["long", "fine"] and len(rig.watch.turns) == 2


async def test_what_the_broker_lets_expire_has_an_outcome_too(
    rig: Rig, client: Client, options: QueueOptions
) -> None:
    for i in range(6):  # more than is read ahead
        await client.send(audio(0.7, f"b{i}"))
    await client.send(audio(0.3, "brief"), expiration=0.5)
    assert (await client.ended("brief", timeout=60)) == ["expired"]
    assert await client.ended(*(f"b{i}" for i in range(6))) == ["finished"] * 6
    assert "brief" not in client.order()


async def test_two_megabytes_are_refused_with_advice(rig: Rig, client: Client) -> None:
    await client.send(b"x" * 2_000_000, message_id="huge", content_type="audio/wav")
    await client.send(audio(0.3, "good"))
    assert await client.ended("huge", "good") == ["failed", "finished"]
    [dead] = await client.dead()
    assert dead.headers["x-reason"] == "too_large" and len(dead.body) == 2_000_000
    assert "in chunks, or by reference" in str(dead.headers["x-error"])


# --- chunks ---------------------------------------------------------------------------------------


def chunk(utterance: str, seq: int, final: bool = False, seconds: float = 0.4) -> dict[str, Any]:
    return audio(seconds, f"{utterance}-{seq}", utterance=utterance, seq=seq, final=final)


async def test_chunks_out_of_order_missing_and_late(rig: Rig, client: Client) -> None:
    for seq in (0, 2, 1, 4, 3):
        await client.send(chunk("u", seq, final=seq == 4))
    assert await client.ended(*(f"u-{i}" for i in range(5))) == ["finished"] * 5
    assert client.ends("u-0")[0].model_dump()["spoken_ms"] == pytest.approx(2000, abs=5)
    for seq in (0, 1, 3):
        await client.send(chunk("gap", seq))
    await asyncio.sleep(2.0)
    await client.send(chunk("gap", 2))
    await client.send(chunk("gap", 3) | {"message_id": "again"})
    await client.send(chunk("gap", 4, final=True))
    outcomes = await client.ended(*(f"gap-{i}" for i in range(5)))
    assert outcomes == ["finished", "finished", "expired", "finished", "finished"]
    assert [event.type for event in client.of("again")][-1] == "duplicate"
    # the missing one is silence of its length
    assert client.ends("gap-0")[0].model_dump()["spoken_ms"] == pytest.approx(2000, abs=5)
    await client.send(chunk("gap", 5) | {"message_id": "after"})
    assert await client.ended("after") == ["expired"]
    assert len(rig.watch.turns) == 2


async def test_chunks_begin_before_the_last_one_is_there(rig: Rig, client: Client) -> None:
    for seq in range(12):  # more than is read ahead: chunks are acked as they come
        await client.send(chunk("live", seq, final=seq == 11, seconds=0.2))
        await asyncio.sleep(0.15)
    await client.until(lambda: "live-0" in client.order())
    assert await client.ended(*(f"live-{i}" for i in range(12))) == ["finished"] * 12


# --- sounds by reference --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def files(ports: Ports, **content: Any) -> AsyncIterator[str]:
    async def get(request: web.Request) -> web.Response:
        found = content[request.match_info["name"]]
        if callable(found):
            found = found()
        if isinstance(found, int):
            raise (web.HTTPFound("/sounds/a") if found == 302 else web.HTTPServiceUnavailable())
        return web.Response(body=found)

    app = web.Application()
    app.router.add_get("/sounds/{name}", get)
    app.router.add_get("/private/{name}", get)
    runner = web.AppRunner(app)
    await runner.setup()
    port = ports()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def test_references_are_fetched_from_the_list_only(
    options: QueueOptions, client: Client, tmp_path: Path, ports: Ports
) -> None:
    sound = wav(0.5)
    hash = hashlib.sha256(sound).hexdigest()
    busy = iter([503, sound])
    async with files(ports, a=sound, moved=302, busy=lambda: next(busy)) as base:
        allowed = QueueOptions(
            url=options.url, queue=options.queue, retries=(0.2,), urls=(f"{base}/sounds/",)
        )
        async with working(allowed, tmp_path):
            for id, path in (
                ("ok", "/sounds/a"), ("moved", "/sounds/moved"), ("private", "/private/a"),
                ("dots", "/sounds/../private/a"), ("coded", "/sounds/%2e%2e/private/a"),
                ("busy", "/sounds/busy"),
            ):  # fmt: skip
                body = {"type": "audio", "url": base + path, "sha256": hash, "message_id": id}
                await client.send(body)
            body = {"type": "audio", "url": f"{base}/sounds/a", "sha256": "0" * 64}
            await client.send(body | {"message_id": "other"})
            ids = ("ok", "moved", "private", "dots", "coded", "busy", "other")
            outcomes = await client.ended(*ids)
    assert outcomes == ["finished", *["failed"] * 4, "finished", "failed"]
    codes = {id: client.ends(id)[0].model_dump().get("code") for id in ids}
    assert codes["private"] == codes["dots"] == codes["coded"] == "not_allowed"
    assert codes["moved"] == "not_there" and codes["other"] == "wrong_hash"


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("https://media.example/speech/a.wav", True),
        ("https://media.example/speechless/a.wav", False),
        ("https://media.example.evil/speech/a.wav", False),
        ("https://u:p@media.example/speech/a.wav", False),
        ("https://media.example:444/speech/a.wav", False),
        ("http://media.example/speech/a.wav", False),
        ("file:///speech/a.wav", False),
        ("https://media.example/speech/%252e%252e/b", False),
        ("https://[media/speech/", False),
    ],
)
def test_what_is_below_an_address(url: str, fine: bool) -> None:
    assert _below(url, "https://media.example/speech") is fine


async def test_a_large_reference_is_not_read_to_its_end(ports: Ports) -> None:
    async with files(ports, big=b"x" * 300_000) as base:
        with pytest.raises(Exception, match="larger than 100,000"):
            await fetch(f"{base}/sounds/big", "0" * 64, [f"{base}/sounds"], 100_000)
    with pytest.raises(TransportError, match="can't be had"):
        await fetch(f"{base}/sounds/big", "0" * 64, [f"{base}/sounds"], 100_000)


# --- what nobody should send ----------------------------------------------------------------------


def malformed(seed: int, count: int) -> list[tuple[bytes, dict[str, Any]]]:
    """Messages that are wrong in one way each."""
    rng = random.Random(seed)
    good = json.dumps(audio(0.2)).encode()
    bomb = base64.b64encode(b"\x00" * 700_000).decode()
    header = bytearray(wav(0.1))
    deep = b"[" * 100_000
    fixed: list[tuple[bytes, dict[str, Any]]] = [
        (b"", {}),
        (b"null", {}),
        (b"[]", {}),
        (deep, {}),
        (b'{"type": "text"}', {}),
        (b'{"type": "text", "data": ""}', {}),
        (b'{"type": "text", "data": 5}', {}),
        (b'{"type": "text", "data": NaN}', {}),
        (b'{"type": "song", "data": "x"}', {}),
        (b'{"type": "text", "data": "x", "sesion": "y"}', {}),
        (b'{"type": "text", "data": "x", "mode": "shout"}', {}),
        (b'{"type": "text", "data": "x", "not_after": "soon"}', {}),
        (b'{"type": "text", "data": "x", "not_after": 1e400}', {}),
        (b'{"type": "audio", "data": "%%%"}', {}),
        (b'{"type": "audio", "data": "AAAA", "format": "pcm"}', {}),
        (b'{"type": "audio", "data": "AAA=", "format": "pcm", "rate": 1' + b"0" * 400 + b"}", {}),
        (b'{"type": "audio", "data": "AAAA", "seq": 1}', {}),
        (b'{"type": "audio", "data": "AAAA", "utterance": "u", "seq": -1}', {}),
        (b'{"type": "audio", "url": "http://169.254.169.254/", "sha256": "x"}', {}),
        (b'{"type": "control", "command": "explode"}', {}),
        (b'{"type": "control", "command": "voice"}', {}),
        (b'\xff\xfe{"type": "text"}', {}),
        (b"\xc3\x28", {"content_type": "text/plain"}),
        (json.dumps({"type": "audio", "data": bomb}).encode(), {}),
        (bytes(header[:30]), {"content_type": "audio/wav"}),
        (b"\x00" * 1000, {"content_type": "audio/wav"}),
        (b"abc", {"content_type": "audio/pcm;rate=16000"}),
        (b"ab", {"content_type": "audio/pcm"}),
        (b"#EXTM3U\nhttp://127.0.0.1:9/a.wav\n", {"content_type": "audio/mpegurl"}),
    ]
    for field, value in ((22, 0), (24, 0), (24, 0xFFFFFFFF), (20, 0x7777), (34, 0)):
        wrong = bytearray(header)
        wrong[field : field + 2] = (value & 0xFFFF).to_bytes(2, "little")
        if field == 24:
            wrong[24:28] = value.to_bytes(4, "little")
        fixed.append((bytes(wrong), {"content_type": "audio/wav"}))
    while len(fixed) < count:
        broken = bytearray(good[: rng.randrange(1, len(good) - 1)])
        for _ in range(rng.randrange(3)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        fixed.append((bytes(broken), {}))
    return fixed[:count]


@pytest.mark.slow
async def test_malformed_messages_end_among_the_dead_and_the_next_is_spoken(
    rig: Rig, client: Client
) -> None:
    wrong = malformed(7, 120)
    for i, (body, properties) in enumerate(wrong):
        await client.send(body, message_id=f"bad-{i}", **properties)
        if i % 20 == 19:
            await client.send(audio(0.1, f"good-{i}"))
    bad = [f"bad-{i}" for i in range(len(wrong))]
    good = [f"good-{i}" for i in range(19, len(wrong), 20)]
    assert await client.ended(*good, timeout=60) == ["finished"] * len(good)
    outcomes = dict(zip(bad, await client.ended(*bad), strict=True))
    # A WAV whose header lies may still be one that can be played.
    spoken = [id for id, outcome in outcomes.items() if outcome != "failed"]
    assert set(spoken) <= {f"bad-{i}" for i in range(29, 34)}, spoken
    dead = {one.message_id: one for one in await client.dead()}
    assert set(dead) == set(bad) - set(spoken)
    assert all(one.headers["x-reason"] and one.headers["x-error"] for one in dead.values())
    await client.until(lambda: rig.feed.status()["in_hand"] == 0)


async def test_hours_of_silence_in_few_bytes_are_refused(rig: Rig, client: Client) -> None:
    import io

    import av
    import numpy as np

    out = io.BytesIO()
    with av.open(out, "w", format="flac") as file:
        stream = file.add_stream("flac", rate=8_000, layout="mono")
        for _ in range(1_000):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 4_096), np.int16), format="s16", layout="mono"
            )
            frame.sample_rate = 8_000
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert len(out.getvalue()) < 100_000
    await client.send(out.getvalue(), message_id="flat", content_type="audio/flac")
    await client.send(audio(0.2, "good"))
    assert await client.ended("flat", "good") == ["failed", "finished"]
    assert client.ends("flat")[0].model_dump()["code"] == "too_long"


# --- what fails and comes back --------------------------------------------------------------------


async def test_what_time_heals_is_tried_again(rig: Rig, client: Client) -> None:
    session = rig.session
    rig.place.adopt(None)
    await client.send(audio(0.3, "patient"))
    await client.until(lambda: rig.feed.counts["retried"] == 1)
    rig.place.adopt(session)
    assert await client.ended("patient") == ["finished"]
    rig.place.adopt(None)
    await client.send(audio(0.3, "hopeless"))
    assert await client.ended("hopeless") == ["failed"]
    rig.place.adopt(session)
    failed = client.ends("hopeless")[0]
    assert isinstance(failed, Failed) and failed.retryable and failed.attempt == 3
    [dead] = await client.dead()
    assert dead.message_id == "hopeless" and dead.headers["x-reason"] == "out_of_reach"


async def test_a_session_that_fails_is_opened_again(rig: Rig, client: Client) -> None:
    await client.send(audio(5, "lost"))
    await client.until(lambda: "lost" in client.order())
    await rig.session.aclose()
    assert await client.ended("lost") == ["interrupted"]
    await client.send(audio(0.3, "next"))
    assert await client.ended("next") == ["finished"]


async def test_a_poisonous_message_is_given_up(
    rabbitmq: RabbitMQ, options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    """Workers that die of a message: the broker counts, and then its outcome is told."""
    async with working(options, tmp_path):
        pass  # declares
    async with await aio_pika.connect(rabbitmq.url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue(options.queue)
        came: list[bool] = []

        async def die(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            came.append(bool(message.redelivered))
            await message.nack(requeue=True)

        await queue.consume(die)
        await client.send(audio(0.2, "poison"))
        await client.until(lambda: len(came) > options.deliveries)
        await asyncio.sleep(0.5)
        assert len(came) == options.deliveries + 1
    async with working(options, tmp_path):
        await client.send(audio(0.2, "good"))
        assert await client.ended("poison", "good") == ["failed", "finished"]
    assert client.ends("poison")[0].model_dump()["code"] == "delivery_limit"
    assert [one.message_id for one in await client.dead()] == ["poison"]


async def test_a_producer_ten_times_too_fast_is_refused_and_nothing_is_lost(
    options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    small = QueueOptions(url=options.url, queue=options.queue, limit=10)
    async with working(small, tmp_path) as rig:
        taken, refused = [], 0
        for i in range(60):  # 0.3 s of speech each 0.03 s
            try:
                await client.send(audio(0.3, f"p{i}"))
                taken.append(f"p{i}")
            except aio_pika.exceptions.DeliveryError:
                refused += 1
            await asyncio.sleep(0.03)
        assert refused > 10 and len(taken) > 10
        assert await client.ended(*taken, timeout=60) == ["finished"] * len(taken)
        assert client.order() == taken
        assert len(rig.watch.turns) == len(taken)


async def test_a_queue_that_others_declared_is_used_as_it_is(
    options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    assert client._channel is not None
    await client._channel.declare_queue(options.queue, durable=True)
    async with working(options, tmp_path) as rig:
        assert rig.feed.status()["declared_by_us"] is False
        await client.send(audio(0.2, "classic"))
        assert await client.ended("classic") == ["finished"]


# --- chaos ----------------------------------------------------------------------------------------


def check(client: Client, rig: Rig, ids: list[str]) -> None:
    """Order kept, one end each, nothing lost, nothing said twice, idle never stopped."""
    assert [len(client.ends(id)) for id in ids] == [1] * len(ids)
    assert [client.ends(id)[0].type for id in ids] == ["finished"] * len(ids)
    spoken = [id for id in client.order() if id in ids]
    assert spoken == ids
    assert len(rig.watch.turns) == len(set(client.order()))
    assert rig.watch.gap < 1.0


@pytest.mark.slow
async def test_the_broker_is_killed_while_it_speaks(
    rabbitmq: RabbitMQ, rig: Rig, client: Client
) -> None:
    ids = [f"k{i}" for i in range(6)]
    for id in ids:
        await client.send(audio(2.0, id))
    await client.until(lambda: "k1" in client.order())
    await rabbitmq.kill()
    await asyncio.sleep(2.5)
    await rabbitmq.start()
    back = time.monotonic()
    await client.until(lambda: len(rig.watch.turns) >= 4 and rig.feed.wire.up.is_set(), 30)
    assert time.monotonic() - back <= 10.0
    await client.ended(*ids, timeout=40)
    check(client, rig, ids)


@pytest.mark.slow
async def test_the_network_is_cut_for_thirty_seconds(
    rabbitmq: RabbitMQ, options: QueueOptions, client: Client, tmp_path: Path,
    make_proxy: MakeProxy,
) -> None:  # fmt: skip
    proxy = await make_proxy("127.0.0.1", rabbitmq.port)
    away = QueueOptions(
        url=f"amqp://guest:guest@127.0.0.1:{proxy.port}/", queue=options.queue, watch=0.5
    )
    async with working(away, tmp_path) as rig:
        ids = [f"n{i}" for i in range(5)]
        for id in ids:
            await client.send(audio(1.5, id))
        await client.until(lambda: "n0" in client.order())
        await proxy.cut()
        await asyncio.sleep(30)
        assert "n1" not in client.order("finished")  # it was said; nobody could be told
        await proxy.mend()
        mended = time.monotonic()
        await asyncio.wait_for(rig.feed.wire.up.wait(), 10)
        last = len(ids)
        await client.until(lambda: len(rig.watch.turns) == last, 15)
        assert time.monotonic() - mended <= 15.0
        await client.ended(*ids)
        check(client, rig, ids)


@pytest.mark.slow
async def test_a_link_that_is_dead_but_not_cut_is_noticed(
    rabbitmq: RabbitMQ, options: QueueOptions, client: Client, tmp_path: Path,
    make_proxy: MakeProxy,
) -> None:  # fmt: skip
    proxy = await make_proxy("127.0.0.1", rabbitmq.port)
    url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
    quick = QueueOptions(url=url, queue=options.queue, watch=0.5, timeout=2.0, heartbeat=5)
    async with working(quick, tmp_path) as rig:
        proxy.stall()
        await client.send(audio(0.5, "while"))
        await client.until(lambda: not rig.feed.wire.up.is_set(), 10)
        await proxy.drop()
        proxy.resume()
        assert await client.ended("while", timeout=30) == ["finished"]
        check(client, rig, ["while"])


async def test_the_queue_is_deleted_under_the_consumer(rig: Rig, client: Client) -> None:
    await client.send(audio(2.0, "before"))
    await client.until(lambda: "before" in client.order())
    await client.delete_queue()
    await client.until(lambda: rig.feed.wire.connects == 2, 10)
    await asyncio.wait_for(rig.feed.wire.up.wait(), 10)
    await client.send(audio(0.3, "after"))
    assert await client.ended("before", "after") == ["finished", "finished"]
    check(client, rig, ["before", "after"])


async def test_the_broker_is_away_at_the_start(
    rabbitmq: RabbitMQ, options: QueueOptions, client: Client, tmp_path: Path,
    make_proxy: MakeProxy,
) -> None:  # fmt: skip
    proxy = await make_proxy("127.0.0.1", rabbitmq.port)
    await proxy.cut()
    url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
    late = QueueOptions(url=url, queue=options.queue)
    async with working(late, tmp_path, wait=False) as rig:
        await asyncio.sleep(3.0)
        assert rig.feed.status()["broker"] == "down" and rig.feed.status()["trouble"]
        assert rig.watch.frames > 30  # idling all the while
        await proxy.mend()
        mended = time.monotonic()
        await asyncio.wait_for(rig.feed.wire.up.wait(), 10)
        assert time.monotonic() - mended < 10
        await client.send(audio(0.3, "first"))
        assert await client.ended("first") == ["finished"]


async def test_a_wrong_password_is_said_and_not_hammered(
    options: QueueOptions, tmp_path: Path
) -> None:
    wrong = QueueOptions(url=options.url.replace("guest:guest", "guest:wrong"), queue="none")
    async with working(wrong, tmp_path, wait=False) as rig:
        await asyncio.sleep(2.0)
        assert rig.feed.wire.connects == 0
        trouble = str(rig.feed.status()["trouble"])
        assert "ACCESS_REFUSED" in trouble or "Auth" in trouble
        assert "wrong" not in trouble


@contextlib.asynccontextmanager
async def worker(url: str, queue: str, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.queue_worker", url, queue, str(folder),
        cwd=ROOT, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.slow
async def test_a_worker_is_killed_while_it_speaks_and_a_standby_goes_on(
    rabbitmq: RabbitMQ, options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    """What was hardly begun is said again from its start (that is stated); the rest once."""
    async with worker(rabbitmq.url, options.queue, tmp_path) as first:
        async with working(options, tmp_path) as standby:
            ids = [f"w{i}" for i in range(4)]
            await client.send(audio(1.0, ids[0]))
            await client.send(audio(8.0, ids[1]))
            for id in ids[2:]:
                await client.send(audio(1.0, id))
            await client.until(lambda: any(e.type == "progress" for e in client.of("w1")))
            assert not standby.watch.turns  # one speaks, the other waits
            first.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            await client.until(lambda: standby.watch.turns, 20)
            assert time.monotonic() - killed <= 15.0
            assert await client.ended(*ids, timeout=40) == ["finished"] * 4
            assert client.order() == ids
            assert len(standby.watch.turns) == 3  # not the one that had been said
            again = [event for event in client.of("w1") if event.type == "started"]
            assert len(again) == 2
            assert standby.watch.gap < 1.0


@pytest.mark.slow
async def test_what_was_heard_for_the_most_part_is_not_said_again(
    rabbitmq: RabbitMQ, options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    async with worker(rabbitmq.url, options.queue, tmp_path) as first:
        await client.send(audio(5.0, "mostly"))
        await client.send(audio(3.0, "early", ack="on_accept"))
        await client.until(
            lambda: any(e.model_dump().get("spoken_ms", 0) > 3000 for e in client.of("mostly"))
        )
        first.send_signal(signal.SIGKILL)
        await first.wait()
        async with working(options, tmp_path) as second:
            assert await client.ended("mostly", "early", timeout=40) == ["interrupted", "failed"]
            assert client.ends("mostly")[0].model_dump()["by"] == "worker_lost"
            assert client.ends("early")[0].model_dump()["code"] == "worker_lost"
            assert not second.watch.turns


async def test_closing_hands_over_what_was_not_begun_and_in_order(
    options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    """A standby waits for it: it begins when the one that leaves has ended, with what is next."""
    ids = [f"c{i}" for i in range(8)]
    async with working(options, tmp_path) as first, working(options, tmp_path) as standby:
        for id in ids:
            await client.send(audio(0.6, id))
        await client.until(lambda: "c0" in client.order())
        await first.feed.aclose(drain=10)
        said = len(first.watch.turns)
        assert 0 < said < 8
        assert await client.ended(*ids) == ["finished"] * 8
        assert client.order() == client.order("finished") == ids
        assert len(first.watch.turns) == said and len(standby.watch.turns) == 8 - said
        last, next = client.ends(ids[said - 1])[0], client.of(ids[said])
        assert next[-1].at > last.at
        assert min(one.at for one in next if one.type == "started") >= last.at
    assert not await client.dead()


async def test_an_order_is_obeyed_while_it_closes(
    options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    ids = [f"d{i}" for i in range(8)]
    async with working(options, tmp_path) as rig:
        for id in ids:
            await client.send(audio(20, id))
        await client.until(lambda: "d0" in client.order())
        closing = asyncio.create_task(rig.feed.aclose(drain=30))
        await asyncio.sleep(0.3)
        assert not closing.done()
        stop = {"type": "control", "command": "stop", "message_id": "stop"}
        await client.send(stop, to=options.control)
        assert await client.ended("stop", *ids, timeout=10) == ["finished"] + ["interrupted"] * 8
        await asyncio.wait_for(closing, 10)
        assert client.order() == ["d0"]


# --- the ledger under it --------------------------------------------------------------------------


async def test_a_ledger_that_fails_holds_messages_and_loses_none(
    options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    class Moody(SqliteLedger):
        down = False

        async def _do(self, work: Callable[..., Any]) -> Any:
            if self.down:
                raise TransportError("the disk is full")
            return await super()._do(work)

    ledger = Moody(tmp_path / "moody.sqlite")
    async with working(options, tmp_path, ledger=ledger) as rig:
        ledger.down = True
        await client.send(audio(0.3, "held"))
        await asyncio.sleep(1.0)
        assert not client.events or not client.of("held")
        ledger.down = False
        assert await client.ended("held") == ["finished"]
        check(client, rig, ["held"])


async def test_an_end_that_nobody_was_told_is_told_by_the_next(
    options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    """The worker died between the last frame and the telling."""
    ledger = SqliteLedger(tmp_path / "messages.sqlite")
    event = {
        "schema": "voipavatar/1", "type": "finished", "message_id": "said", "at": time.time(),
        "session": options.queue, "spoken_ms": 700,
    }  # fmt: skip
    await ledger.put(
        Entry(id="said", owner="gone", queue=options.queue, outcome="finished", event=event,
              at=time.time())
    )  # fmt: skip
    await ledger.aclose()
    async with working(options, tmp_path) as rig:
        await client.send(audio(0.7, "said"))
        assert await client.ended("said") == ["finished"]
        assert not rig.watch.turns


# --- for a long time ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_hours_in_faked_time_leave_nothing_behind(
    options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    """A message a second, on a clock that doesn't wait. `bench queue --hours` runs it longer."""
    count, batch = 600, 50
    process = psutil.Process()
    sizes: list[int] = []
    async with working(
        options, tmp_path, clock=ManualClock, stage=Options(patient=True, hold=1 << 30)
    ) as rig:
        for begin in range(0, count, batch):
            ids = [f"h{i}" for i in range(begin, begin + batch)]
            for id in ids:
                await client.send(audio(0.8, id))
            assert await client.ended(*ids, timeout=120) == ["finished"] * batch
            assert client.order() == ids
            client.events.clear()
            client.raw.clear()
            gc.collect()
            sizes.append(process.memory_info().rss)
        assert rig.session.stage.counters.turns == count
        await client.until(lambda: not rig.feed.status()["in_hand"])
        assert not rig.feed.status()["untold"]
        assert len(rig.feed._lanes) == 1 and not rig.feed._utterances
    third = len(sizes) // 3
    assert sizes[-1] - sizes[third] < 15e6, sizes


# --- from the command line ------------------------------------------------------------------------


async def say(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "voipavatar", "say", *arguments,
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, (out + err).decode()


async def test_say_follows_a_message_to_its_end(
    rig: Rig, client: Client, options: QueueOptions
) -> None:
    where = ("--amqp", options.url, "--queue", options.queue)
    code, said = await say("Hello there.", *where, "--id", "once")
    assert code == 0 and "started" in said and "finished" in said, said
    assert (await say("Hello there.", *where, "--id", "once"))[0] == 5
    code, said = await say("Hello there.", *where, "--session", "nobody", "--json")
    assert code == 1 and '"code": "no_session"' in said
    await client.send(audio(20, "long"))
    await client.until(lambda: "long" in client.order())
    assert (await say("Now.", *where, "--mode", "replace"))[0] == 0
    assert await client.ended("long") == ["interrupted"]
    code, said = await say("Hello.", "--amqp", options.url, "--queue", "not-there")
    assert code == 1 and "there is no queue" in said
    code, said = await say("Hello.", "--amqp", "amqp://127.0.0.1:1/")
    assert code == 1 and "can't be reached" in said


async def test_the_producer_of_the_examples(
    rig: Rig, options: QueueOptions, rabbitmq: RabbitMQ
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "examples/producer.py", 'He said "go".',
        cwd=ROOT, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "VOIPAVATAR_AMQP_URL": rabbitmq.url, "RABBITMQ_QUEUE": options.queue},
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    kinds = [json.loads(line)["type"] for line in out.splitlines()]
    assert process.returncode == 0 and kinds[0] == "accepted" and kinds[-1] == "finished"
