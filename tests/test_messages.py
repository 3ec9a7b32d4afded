"""Messages and events without a broker: every form, every mistake, and the documents' examples."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from voipavatar.errors import TransportError
from voipavatar.ledger import Entry, Ledger, RedisLedger, SqliteLedger
from voipavatar.messages import (
    EVENTS,
    AudioMessage,
    ControlMessage,
    Envelope,
    Refused,
    TextMessage,
    parse,
    read_event,
    schema,
    sender_of,
)

from . import servers

DOCS = Path(__file__).parent.parent / "docs"


def read(body: Any, **around: Any) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse(data, Envelope(**around), now=1_000.0)


def test_the_forms_of_the_first_day() -> None:
    text = read({
        "type": "text", "data": "Hello.", "session_id": "unique-session-id",
        "timestamp": "2024-01-01T00:00:00Z",
    })  # fmt: skip
    assert isinstance(text.message, TextMessage) and text.message.session_id == "unique-session-id"
    assert not text.named and text.id.startswith("body-")
    sound = read({
        "type": "audio", "data": base64.b64encode(b"RIFF").decode(), "format": "wav",
        "session_id": "s", "timestamp": "2024-01-01T00:00:00Z",
    })  # fmt: skip
    assert isinstance(sound.message, AudioMessage) and sound.sound == b"RIFF"
    assert isinstance(read({"type": "control", "data": "stop"}).message, ControlMessage)


def test_properties_and_headers_say_what_a_body_does_not() -> None:
    found = read(
        b"\x00\x01" * 10,
        message_id="m",
        correlation_id="c",
        reply_to="r",
        content_type='audio/pcm; rate="24000"; channels=1',
        headers={"utterance": "u", "seq": "3", "final": "true", "priority": "interrupt"},
    )
    message = found.message
    assert isinstance(message, AudioMessage)
    assert (message.rate, message.seq, message.final, message.mode) == (
        24_000,
        3,
        True,
        "interrupt",
    )
    assert (found.id, message.correlation_id, message.reply_to) == ("m", "c", "r")
    # client libraries make up ids: what the sender wrote counts
    assert read({"type": "text", "data": "x", "message_id": "mine"}, message_id="auto").id == "mine"
    assert read(b"Hi.", content_type="text/plain; charset=utf-8").message.data == "Hi."


def test_the_last_moment_is_the_earliest_of_those_named() -> None:
    text = {"type": "text", "data": "x"}
    assert read(text).not_after is None
    assert read(text | {"not_after": "1970-01-01T00:20:00"}).not_after == 1_200.0
    assert read(text, expiration=5.0).not_after == 1_005.0
    assert read(text, expiration=5.0, timestamp=990.0).not_after == 996.0
    assert read(text | {"not_after": 900}, expiration=500.0).not_after == 900.0


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (b"", "not_json", "not JSON"),
        (b"[1]", "not_json", "no object"),
        (b'{"type": "text", "data": Infinity}', "not_json", "Infinity"),
        (b"[" * 50_000, "not_json", "JSON|nested"),
        (b'\xff{"type": "text"}', "not_text", "UTF-8"),
        ({"type": "song"}, "invalid", "type must be one of text, audio, control"),
        ({"data": "x"}, "invalid", "type must be one of"),
        ({"type": "text", "data": "x", "sesion": 1}, "invalid", "'sesion' is no field"),
        ({"type": "audio"}, "invalid", "in one place"),
        ({"type": "audio", "data": "A" * 5}, "not_base64", "not base64"),
        ({"type": "audio", "data": ""}, "no_sound", "not one byte"),
        ({"type": "audio", "data": "AAAA", "utterance": "u"}, "invalid", "go together"),
        ({"type": "audio", "url": "https://x"}, "invalid", "wants sha256"),
        ({"type": "audio", "data": "AAAA", "format": "pcm"}, "invalid", "say its rate"),
        ({"type": "control", "command": "voice"}, "invalid", "wants a value"),
        (b"x" * 1_100_000, "too_large", "in chunks, or by reference"),
    ],
)
def test_mistakes_are_told_in_a_sentence(body: Any, code: str, said: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        read(body)
    assert caught.value.code == code


def test_what_the_sender_wrote_is_not_in_the_reason() -> None:
    with pytest.raises(Refused) as caught:
        read({"type": "text", "data": {"secret": "my speech"}, "mode": "my speech"})
    assert "speech" not in str(caught.value)


def test_fuzzed_bodies_are_read_or_refused_and_nothing_else() -> None:
    rng = random.Random(5)
    seeds: list[dict[str, Any]] = [
        {"type": "text", "data": "x", "not_after": 5, "mode": "append", "ack": "on_accept"},
        {"type": "audio", "data": "AAAA", "utterance": "u", "seq": 1, "final": True, "rate": 8000},
        {"type": "control", "command": "voice", "value": "piper"},
    ]
    values: list[Any] = [
        None, True, -1, 0, 1e308, 10**400, "", "x" * 1000, [], {}, [[]], "\ud800", "\x00", 1.5,
    ]  # fmt: skip
    refused = 0
    for i in range(3_000):
        body = dict(rng.choice(seeds))
        if i % 2:
            body[rng.choice([*body, "timestamp", "message_id", "x"])] = rng.choice(values)
        data = bytearray(json.dumps(body).encode())
        if not i % 3:
            data[rng.randrange(len(data))] = rng.randrange(256)
            del data[rng.randrange(1, len(data)) :]
        try:
            parse(bytes(data), Envelope())
        except Refused as error:
            refused += 1
            assert str(error)
        assert sender_of(bytes(data), Envelope()).message_id
    assert refused > 1_000


def test_every_example_of_the_documents_is_one() -> None:
    text = (DOCS / "messages.md").read_text()
    examples = [json.loads(one) for one in re.findall(r"```json\n(.*?)```", text, re.S)]
    messages = [one for one in examples if one["type"] in ("text", "audio", "control")]
    events = [one for one in examples if one not in messages]
    for one in messages:
        parse(json.dumps(one).encode(), Envelope())
    for one in events:
        read_event(json.dumps(one).encode())
    assert {one["type"] for one in events} == set(EVENTS)
    assert {one["type"] for one in messages} == {"text", "audio", "control"}


def test_the_schema_knows_every_message_and_event() -> None:
    found = schema()
    assert set(found["$defs"]) >= {"message", "event", "TextMessage", "AudioMessage", "Failed"}
    assert json.loads(json.dumps(found)) == found
    refs = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(found)))
    assert refs <= set(found["$defs"])


# --- the ledger -----------------------------------------------------------------------------------


@pytest_asyncio.fixture(params=["sqlite", "redis"])
async def ledgers(
    request: pytest.FixtureRequest, tmp_path: Path, ports: servers.Ports
) -> AsyncIterator[tuple[Ledger, Ledger]]:
    """Two workers' views of one ledger."""
    if request.param == "sqlite":
        pair: tuple[Ledger, Ledger] = (
            SqliteLedger(tmp_path / "deep" / "l.sqlite"),
            SqliteLedger(tmp_path / "deep" / "l.sqlite"),
        )
        yield pair
        for one in pair:
            await one.aclose()
            await one.aclose()
        return
    program = servers.redis()
    if program is None:
        servers.missing("no Redis is installed: apt-get install redis-server")
    port = ports()
    server = subprocess.Popen(  # noqa: ASYNC220 - starts in no time
        [str(program), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir",
         str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await _listening(port)
        url = f"redis://127.0.0.1:{port}/0"
        pair = RedisLedger(url), RedisLedger(url)
        yield pair
        for one in pair:
            await one.aclose()
    finally:
        server.kill()
        server.wait()


async def _listening(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_a_message_is_taken_once(ledgers: tuple[Ledger, Ledger]) -> None:
    one, other = ledgers
    entries = [Entry(id=f"m{i}", owner="a", queue="q", at=time.time()) for i in range(20)]
    for entry in entries:
        taken = await asyncio.gather(one.take(entry), other.take(entry))
        assert [found is None for found in taken].count(True) == 1
    assert {entry.id for entry in await other.open("q")} == {entry.id for entry in entries}
    last = entries[3]
    last.outcome, last.told, last.heard = "finished", True, 1.5
    await one.put(last)
    found = await other.find("m3")
    assert found is not None and found == last
    assert len(await one.open("q")) == 19 and await one.open("other") == []
    await other.drop("m4")
    assert await one.find("m4") is None and len(await one.open("q")) == 18
    await one.prune()


async def test_owners_live_as_long_as_they_say_so(ledgers: tuple[Ledger, Ledger]) -> None:
    one, other = ledgers
    assert not await one.alive("a")
    await one.beat("a")
    assert await other.alive("a")
    await one.beat("a", gone=True)
    assert not await other.alive("a")


async def test_old_outcomes_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voipavatar.ledger.MOST", 50)
    ledger = SqliteLedger(tmp_path / "l.sqlite")
    for i in range(80):
        at = time.time() - (10_000 if i < 5 else 0) + i / 1000
        await ledger.put(Entry(id=f"m{i}", queue="q", outcome="finished", told=i != 70, at=at))
    await ledger.prune()
    left = [i for i in range(80) if await ledger.find(f"m{i}") is not None]
    assert left == list(range(30, 80))
    await ledger.aclose()


async def test_a_ledger_that_can_not_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ledger = SqliteLedger(tmp_path / "file" / "l.sqlite")
    with pytest.raises(TransportError, match="record of messages"):
        await ledger.find("x")
    await ledger.aclose()
    (tmp_path / "broken.sqlite").write_bytes(b"no base at all" * 100)
    broken = SqliteLedger(tmp_path / "broken.sqlite")
    with pytest.raises(TransportError):
        await broken.find("x")
    await broken.aclose()
