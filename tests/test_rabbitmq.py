"""The queue on a real RabbitMQ: receipts, order, and everything that can go wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import aio_pika
import numpy as np
import psutil
import pytest
import pytest_asyncio
from aiohttp import web

from voipavatar.config import Persona, Settings, load_persona
from voipavatar.errors import TransportError
from voipavatar.feed import feeding
from voipavatar.ledger import Entry, SqliteLedger
from voipavatar.media import Cue, ManualClock, UInt8
from voipavatar.messages import Failed, Interrupted
from voipavatar.rabbitmq import QueueOptions, _below, fetch
from voipavatar.session import Studio
from voipavatar.stage import Options

from .malformed import malformed
from .proxy import Proxy
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
        assert at.feed is not None and await at.feed.connected(20)
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


async def test_another_look_and_another_persona_while_it_speaks(
    options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    """Each within two seconds, nothing is lost, and a name that isn't there is told with those
    that are."""
    marcus = load_persona("default")
    assert marcus.path is not None
    looks = {"still": {"engine_options": {"motion": 0.0}}, "guest": "clara/portrait.png"}
    data = marcus.model_dump() | {"width": 320, "height": 180, "idles": looks, "voice": "espeak"}
    who = Persona.model_validate(data | {"path": marcus.path})
    async with working(options, tmp_path, persona=who) as rig:
        ids = ["s0", "s1", "s2"]
        for id in ids:
            await client.send(audio(2.0, id))
        await client.until(lambda: "s0" in client.order())

        async def control(command: str, value: str) -> tuple[str, UInt8]:
            """How it ended, and a picture from after it."""
            begin = time.monotonic()
            body = {"type": "control", "command": command, "value": value}
            await client.send(body | {"message_id": f"{command}-{value}"}, to=options.control)
            [outcome] = await client.ended(f"{command}-{value}")
            assert time.monotonic() - begin < 2.0
            shown = rig.watch.frames
            await client.until(lambda: rig.watch.frames > shown + 3)
            assert rig.watch.image is not None
            return outcome, rig.watch.image[:180]

        def far(one: UInt8, other: UInt8) -> float:
            return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())

        assert rig.watch.image is not None
        own = rig.watch.image[:180]
        outcome, guest = await control("idle", "guest")
        assert outcome == "finished" and rig.session.idle == "guest"
        outcome, still = await control("idle", "still")
        assert outcome == "finished"
        # Another portrait is another picture; another manner of the same one is nearly the same.
        print(f"guest {far(own, guest):.1f}, still {far(own, still):.1f}")
        assert far(own, guest) > 4 * far(own, still)
        assert (await control("idle", "waving"))[0] == "failed"
        failed = client.ends("idle-waving")[0]
        assert isinstance(failed, Failed) and not failed.retryable and failed.code == "invalid"
        assert "default, still, guest" in failed.error
        assert (await control("idle", "thinking"))[0] == "finished", "a pose of any face"
        assert rig.session.idle == "still"
        outcome, other = await control("persona", "clapper")
        assert outcome == "finished" and rig.session.persona.name == "clapper"
        assert far(own, other) > far(own, still) * 4
        for wrong in ("nobody", "../../etc/passwd"):
            assert (await control("persona", wrong))[0] == "failed"
        assert (await control("idle", "dancing"))[0] == "failed"
        failed = client.ends("idle-dancing")[0]
        assert isinstance(failed, Failed) and failed.error.endswith("it has: default")
        assert rig.session.persona.name == "clapper"
        check(client, rig, [id for id in ids if await client.ended(id)])
        spoken = [client.ends(id)[0].model_dump()["spoken_ms"] for id in ids]
        assert spoken == pytest.approx([2000] * 3, abs=5)


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


async def test_words_come_with_their_times_and_phonemes_reach_the_engine(
    options: QueueOptions, client: Client, tmp_path: Path
) -> None:
    """From a text in the queue to captions on the events exchange, and to the mouth."""
    kept = {"cache_dir": str(Settings.from_env().cache_dir)}
    voices = ["espeak", {"use": "piper", "options": kept}]
    who = Persona.model_validate(CLAPPER.model_dump() | {"voice": voices})
    text = "Your train, the 9:15, is late; please wait."
    async with working(options, tmp_path, persona=who) as rig:
        engine: Any = rig.session.stage.engine
        cues: list[Cue] = []
        pass_on = engine.cue

        def noted(some: Sequence[Cue]) -> None:
            cues.extend(some)
            pass_on(some)

        engine.cue = noted
        for voice in ("espeak", "piper"):
            cues.clear()
            body = {"type": "text", "data": text, "message_id": voice, "voice": voice}
            await client.send(body | {"correlation_id": f"call-{voice}"})
            assert await client.ended(voice) == ["finished"]
            of = [event.model_dump() for event in client.of(voice)]
            words = [event for event in of if event["type"] == "caption"]
            [begun] = [event["first_frame_ts"] for event in of if event["type"] == "started"]
            spoken = client.ends(voice)[0].model_dump()["spoken_ms"] / 1000
            assert " ".join(word["text"] for word in words) == text
            for one, other in zip(words, words[1:], strict=False):
                assert 0 <= one["start"] < one["end"] <= other["start"] + 1e-6
            assert spoken / 2 < words[-1]["end"] <= spoken
            # Each is told when it is heard.
            late = [word["at"] - begun - word["start"] for word in words]
            print(f"{voice}: words are told {min(late):.3f} to {max(late):.3f} s after their start")
            assert -0.1 < np.median(late) < 0.3
            assert {word["correlation_id"] for word in words} == {f"call-{voice}"}
            phonemes = [cue for cue in cues if cue.kind == "phoneme"]
            assert sum(cue.end - cue.start for cue in phonemes) == pytest.approx(spoken, abs=0.1)
            assert [cue.text for cue in cues if cue.kind == "word"] == text.split()


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


@pytest.mark.slow
async def test_malformed_messages_end_among_the_dead_and_the_next_is_spoken(
    rig: Rig, client: Client
) -> None:
    """Truncated, of wrong types, with wrong headers of both sorts, with huge numbers, no UTF-8,
    bombs: after each kind a good one."""
    wrong = list(malformed(seed=7, each=15))
    good: list[str] = []
    for i, bad in enumerate(wrong):
        await client.send(bad.body, message_id=f"bad-{i}", **bad.properties)
        if i % 15 == 14:
            good.append(f"good-{bad.kind}")
            await client.send(audio(0.1, good[-1]))
    names = {f"bad-{i}": bad for i, bad in enumerate(wrong)}
    assert await client.ended(*good, timeout=60) == ["finished"] * 8
    assert client.order("finished")[-1] == "good-bomb"
    outcomes = dict(zip(names, await client.ended(*names), strict=True))
    # A sound whose header lies may still be one that can be played.
    spoken = {id for id, outcome in outcomes.items() if outcome != "failed"}
    assert not [names[id] for id in spoken if names[id].surely]
    failed = {id: client.ends(id)[0] for id in outcomes if id not in spoken}
    assert all(isinstance(one, Failed) and not one.retryable for one in failed.values())
    codes = {one.model_dump()["code"] for one in failed.values()}
    # No "internal" and no "failed": what is wrong was foreseen, and is told.
    assert codes == {"invalid", "not_json", "not_text", "not_base64", "no_sound", "too_long"}
    dead = {str(one.message_id): one for one in await client.dead()}
    assert set(dead) == set(failed)
    for id, one in dead.items():
        assert one.headers["x-reason"] == failed[id].model_dump()["code"]
        assert one.headers["x-error"] and one.body == names[id].body
    await client.until(lambda: rig.feed.status()["in_hand"] == 0)


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


async def test_the_queue_is_deleted_under_the_consumer(rig: Rig, client: Client) -> None:
    await client.send(audio(2.0, "before"))
    await client.until(lambda: "before" in client.order())
    await client.delete_queue()
    await client.until(lambda: rig.feed.wire.connects == 2, 10)
    await asyncio.wait_for(rig.feed.wire.up.wait(), 10)
    await client.send(audio(0.3, "after"))
    assert await client.ended("before", "after") == ["finished", "finished"]
    check(client, rig, ["before", "after"])


@dataclasses.dataclass
class Scene:
    """A queue of its own at the common broker, reached through a proxy; its client is not."""

    options: QueueOptions
    client: Client
    folder: Path
    proxy: Proxy
    url: str
    """Of the broker itself."""


@contextlib.asynccontextmanager
async def scene(rabbitmq: RabbitMQ, folder: Path, **more: Any) -> AsyncIterator[Scene]:
    queue = f"q{uuid.uuid4().hex[:8]}"
    folder = folder / queue
    folder.mkdir()
    async with contextlib.AsyncExitStack() as undo:
        proxy = await undo.enter_async_context(Proxy("127.0.0.1", rabbitmq.port))
        url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
        options = QueueOptions(url=url, queue=queue, watch=0.5, **more)
        client = await undo.enter_async_context(Client(rabbitmq.url, options))
        yield Scene(options, client, folder, proxy, rabbitmq.url)


async def cut_for_thirty_seconds(at: Scene) -> None:
    client = at.client
    async with working(at.options, at.folder) as rig:
        ids = [f"n{i}" for i in range(5)]
        for id in ids:
            await client.send(audio(1.5, id))
        await client.until(lambda: "n0" in client.order())
        await at.proxy.cut()
        await asyncio.sleep(30)
        assert "n1" not in client.order("finished")  # it was said; nobody could be told
        last = len(ids)
        assert 1 < len(rig.watch.turns) < last  # what was read ahead, and no more
        await at.proxy.mend()
        mended = time.monotonic()
        await client.until(lambda: len(rig.watch.turns) == last, 15)
        assert time.monotonic() - mended <= 10.0
        await client.ended(*ids)
        check(client, rig, ids)


async def dead_but_not_cut(at: Scene) -> None:
    client = at.client
    async with working(at.options, at.folder) as rig:
        # With events on their way out: they wait for an answer when the connection is given up.
        await client.send(audio(6.0, "before"))
        await client.until(lambda: "before" in client.order())
        at.proxy.stall()
        await client.send(audio(0.5, "while"))
        await client.until(lambda: not rig.feed.wire.up.is_set(), 10)
        await at.proxy.drop()
        at.proxy.resume()
        assert await client.ended("before", "while", timeout=30) == ["finished", "finished"]
        check(client, rig, ["before", "while"])


async def dropped_again_and_again(at: Scene) -> None:
    """Resets in the middle of whatever is under way: a publish, an ack, a question, a rebuild."""
    client = at.client
    rng = random.Random(3)
    ids = [f"r{i}" for i in range(20)]
    async with working(at.options, at.folder) as rig:
        for id in ids:
            await client.send(audio(0.3, id))
        for _ in range(12):
            await asyncio.sleep(rng.uniform(0.2, 1.2))
            at.proxy.stall()  # so that an answer is waited for
            await asyncio.sleep(rng.uniform(0.0, 0.3))
            await at.proxy.drop()
            at.proxy.resume()
        await client.ended(*ids, timeout=40)
        check(client, rig, ids)
        await client.until(lambda: not rig.feed.status()["in_hand"])


async def away_at_the_start(at: Scene) -> None:
    client = at.client
    await at.proxy.cut()
    async with working(at.options, at.folder, wait=False) as rig:
        await asyncio.sleep(3.0)
        assert rig.feed.status()["broker"] == "down" and rig.feed.status()["trouble"]
        assert rig.watch.frames > 30  # idling all the while
        await at.proxy.mend()
        mended = time.monotonic()
        assert await rig.feed.connected(10)
        assert time.monotonic() - mended < 10
        await client.send(audio(0.3, "first"))
        assert await client.ended("first") == ["finished"]


async def worker_killed_with_a_standby(at: Scene) -> None:
    """What was hardly begun is said again from its start (that is stated); the rest once."""
    client = at.client
    async with worker(at.url, at.options.queue, at.folder) as first:
        async with working(at.options, at.folder) as standby:
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
            assert time.monotonic() - killed <= 10.0
            assert await client.ended(*ids, timeout=40) == ["finished"] * 4
            assert client.order() == ids
            assert len(standby.watch.turns) == 3  # not the one that had been said
            again = [event for event in client.of("w1") if event.type == "started"]
            assert len(again) == 2
            assert standby.watch.gap < 1.0


async def mostly_heard_is_not_said_again(at: Scene) -> None:
    client = at.client
    async with worker(at.url, at.options.queue, at.folder) as first:
        await client.send(audio(5.0, "mostly"))
        await client.send(audio(3.0, "early", ack="on_accept"))
        await client.until(
            lambda: any(e.model_dump().get("spoken_ms", 0) > 3000 for e in client.of("mostly"))
        )
        first.send_signal(signal.SIGKILL)
        await first.wait()
        async with working(at.options, at.folder) as second:
            assert await client.ended("mostly", "early", timeout=40) == ["interrupted", "failed"]
            assert client.ends("mostly")[0].model_dump()["by"] == "worker_lost"
            assert client.ends("early")[0].model_dump()["code"] == "worker_lost"
            assert not second.watch.turns


@pytest.mark.slow
async def test_cuts_and_deaths(rabbitmq: RabbitMQ, tmp_path: Path) -> None:
    """The network is cut for thirty seconds; meanwhile, each at a queue of its own: a link that is
    dead but not cut, a broker that is away at the start, workers that are killed."""

    async def at_a_queue(play: Callable[[Scene], Awaitable[None]], **more: Any) -> None:
        async with scene(rabbitmq, tmp_path, **more) as at:
            await play(at)

    plays = [
        at_a_queue(cut_for_thirty_seconds),
        at_a_queue(dead_but_not_cut, timeout=2.0, heartbeat=5),
        at_a_queue(dropped_again_and_again),
        at_a_queue(away_at_the_start),
        at_a_queue(worker_killed_with_a_standby),
        at_a_queue(mostly_heard_is_not_said_again),
    ]
    # Each to its end, so that nothing is left behind; the traceback names the one that failed.
    failures = await asyncio.gather(*plays, return_exceptions=True)
    for failure in failures:
        if failure is not None:
            raise failure


async def test_what_the_library_cancels_does_not_end_us(
    rig: Rig, client: Client, options: QueueOptions
) -> None:
    """A connection that goes cancels whatever waits for an answer of it: each place in turn."""
    wire: Any = rig.feed.wire
    loop = asyncio.get_running_loop()
    came: list[str] = []

    async def cancelled(what: str) -> Any:
        came.append(what)
        gone = loop.create_future()
        gone.cancel()
        return await gone

    events = wire._exchanges[options.events]
    events.publish = lambda *_, **__: cancelled("publish")
    await client.send(audio(0.3, "a"))
    await client.until(lambda: "publish" in came)
    del events.publish
    assert await client.ended("a") == ["finished"]
    settle = wire._settle

    async def settled(delivery: Any, how: Any) -> None:
        wire._settle = settle
        await settle(delivery, lambda: cancelled("ack"))

    wire._settle = settled
    await client.send(audio(0.3, "b"))
    assert await client.ended("b") == ["finished"]
    await client.until(lambda: "ack" in came)
    await client.until(lambda: wire.connects == 2 and wire.up.is_set())  # it was in doubt
    close = wire._connection.close

    async def closed(*_: Any) -> Any:
        await close()
        return await cancelled("close")

    wire._connection.close = closed
    wire.distrust()
    await client.until(lambda: "close" in came and wire.connects == 3 and wire.up.is_set())
    await client.send(audio(0.3, "c"))
    assert await client.ended("c") == ["finished"]
    assert set(came) == {"publish", "ack", "close"}
    check(client, rig, ["a", "b", "c"])
    assert rig.feed.status()["trouble"] is None


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
    count, batch = 300, 25
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
