"""A seeded source of messages that nobody should send, by what is wrong with them."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import av
import numpy as np

from .queues import audio, tone, wav


@dataclass(frozen=True)
class Bad:
    """One message. `surely`: it can't be of any use; otherwise it may just be played."""

    kind: str
    body: bytes
    properties: dict[str, Any] = field(default_factory=dict)
    surely: bool = True


FORMS: tuple[dict[str, Any], ...] = (
    {"type": "text", "data": "Hello.", "mode": "append", "ack": "on_spoken", "voice": "espeak",
     "not_after": "2100-01-01T00:00:00Z", "timestamp": "2024-01-01T00:00:00Z"},
    {"type": "audio", "data": "AAABAAIA", "format": "pcm", "rate": 16000, "channels": 1,
     "utterance": "u", "seq": 0, "final": True, "reply_to": "r"},
    {"type": "audio", "url": "https://media.example/a.wav", "sha256": "0" * 64, "format": "wav"},
    {"type": "control", "command": "voice", "value": "espeak", "correlation_id": "c"},
)  # fmt: skip

NUMBERS = {"rate", "channels", "seq"}
CHOICES = {"type", "mode", "ack", "format", "command", "schema"}
TIMES = {"not_after", "timestamp"}


def malformed(seed: int, each: int) -> Iterator[Bad]:
    """`each` messages of every kind; the same seed gives the same."""
    for make in (truncated, wrong_type, huge, not_utf8, not_an_object, bad_header, bad_sound, bomb):
        rng = random.Random(f"{make.__name__} {seed}")
        for number in range(each):
            yield make(rng, number)


def truncated(rng: random.Random, number: int) -> Bad:
    form = rng.choice((*FORMS, audio(0.2)))
    whole = json.dumps(form).encode()
    return Bad("truncated", whole[: rng.randrange(len(whole))])


def wrong_type(rng: random.Random, number: int) -> Bad:
    """One field with a value that it can't have."""
    form = dict(rng.choice(FORMS))
    name = rng.choice(sorted({*form, "message_id", "session", "persona", "schema", "session_id"}))
    values: list[Any] = [[], {}, [1], {"a": "b"}, [[["x"]]]]
    if name in NUMBERS:
        values += ["many", -1, 1.5, 10**7]
    elif name in CHOICES:
        values += ["loud", "", 3, True, None] if name == "type" else ["loud", "", 3, True]
    elif name in TIMES:
        values += ["soon", "2024-13-01", True]
    elif name == "final":
        values += ["perhaps", 7]
    else:
        values += [3, True, 1.5, "x" * 2_001 if name not in ("data", "correlation_id") else {}]
    return Bad("wrong type", json.dumps(form | {name: rng.choice(values)}).encode())


def huge(rng: random.Random, number: int) -> Bad:
    """Numbers that fit nowhere, as they stand in JSON."""
    form = dict(rng.choice(FORMS[:2]))
    name = rng.choice([one for one in form if one in NUMBERS | TIMES] or ["not_after"])
    digits = rng.choice(["1e400", "-1e400", "9" * 5_000, "9" * 400, "1" + "0" * 25, "-" + "9" * 30])
    body = json.dumps(form | {name: "@"}).replace('"@"', digits)
    return Bad("huge", body.encode())


def not_utf8(rng: random.Random, number: int) -> Bad:
    wrong = rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82"])
    if rng.random() < 0.3:
        return Bad("not UTF-8", b"Hello " + wrong + b" there.", {"content_type": "text/plain"})
    if rng.random() < 0.3:
        headers = {"utterance": bytearray(wrong), "seq": 0}
        return Bad(
            "not UTF-8", tone(0.1),
            {"content_type": "audio/pcm;rate=16000", "headers": headers},
        )  # fmt: skip
    body = bytearray(json.dumps(rng.choice(FORMS)).encode())
    at = rng.randrange(len(body) + 1)
    body[at:at] = wrong
    return Bad("not UTF-8", bytes(body))


def not_an_object(rng: random.Random, number: int) -> Bad:
    return Bad(
        "no object",
        rng.choice(
            [b"", b"null", b"[]", b'"text"', b"17", b"NaN", b"\x00" * 40, b"[" * 100_000,
             b'{"a":' * 50_000, b"{}", b'{"type": "text"}', b'{"type": null, "data": "x"}',
             b'{"type": "text", "data": "x"} {"type": "text", "data": "y"}',
             b"<text>x</text>", b'{"type": "text", "data": "x", "sesion": "y"}']
        ),
    )  # fmt: skip


def bad_header(rng: random.Random, number: int) -> Bad:
    """AMQP headers that say what they can't."""
    headers: dict[str, Any] = rng.choice(
        [{"seq": "first"}, {"seq": 1}, {"final": [1]}, {"mode": "shout"}, {"mode": {"a": 1}},
         {"not_after": "soon"}, {"voice": {}}, {"session": ["x"]}, {"schema": "other/9"},
         {"rate": 10**12, "format": "pcm"}, {"channels": -2}, {"ack": "never"}, {"persona": 5},
         {"utterance": "u", "seq": -5}, {"utterance": "u", "seq": "9" * 9}]
    )  # fmt: skip
    return Bad("bad header", wav(0.1), {"content_type": "audio/wav", "headers": headers})


def bad_sound(rng: random.Random, number: int) -> Bad:
    """A sound whose header lies, or that is none: what can be played after all may be."""
    whole = bytearray(rng.choice((wav(0.2), flac(1_600), flac(1_600))))
    if number % 4 == 0:  # of one kind, with the other's name, or nothing that is a sound
        nonsense = [
            b"RIFF",
            b"\x00" * 900,
            rng.randbytes(900),
            b"#EXTM3U\nfile:///etc/passwd\n",
            b"ffconcat version 1.0\nfile /etc/passwd\n",
            b"GIF89a" + rng.randbytes(60),
        ]
        body = rng.choice(nonsense)
        if rng.random() < 0.5:
            return Bad("bad sound", body, {"content_type": "audio/wav"})
        inside = {"type": "audio", "data": base64.b64encode(body).decode(), "format": "wav"}
        return Bad("bad sound", json.dumps(inside).encode())
    for _ in range(rng.randrange(1, 6)):
        whole[rng.randrange(44)] = rng.randrange(256)
    if rng.random() < 0.3:
        del whole[rng.randrange(8, len(whole)) :]
    return Bad("bad sound", bytes(whole), {"content_type": "audio/wav"}, surely=False)


def bomb(rng: random.Random, number: int) -> Bad:
    """Little on the wire that wants to become much, in base64."""
    ways: list[Callable[[], bytes]] = [
        lambda: flac(4_096 * 1_000),  # eight minutes and a half of silence in a few kilobytes
        lambda: b"\x00" * 700_000,
        lambda: b"\x1f\x8b\x08" + b"\x00" * 600_000,
        lambda: wav_of_length(0xFFFFFFFF),
        lambda: b"A",
    ]
    way = rng.randrange(len(ways)) if number >= len(ways) else number
    data = ways[way]()
    text = base64.b64encode(data).decode()
    if way == 4:
        text = rng.choice(["A", "A===", "%%%%", "AAA\n=", "AAAA====", "ÄÄÄÄ", "A" * 999_999, " "])
    body = json.dumps({"type": "audio", "data": text, "format": "wav"}).encode()
    # A WAV that says it is four gigabytes long is read as far as it goes.
    return Bad("bomb", body, surely=way != 3)


def wav_of_length(size: int) -> bytes:
    """A WAV of 0.1 s that says it has `size` bytes."""
    body = bytearray(wav(0.1))
    body[4:8] = body[40:44] = size.to_bytes(4, "little")
    return bytes(body)


@cache
def flac(samples: int) -> bytes:
    """A FLAC of silence: hours of it are a few kilobytes."""
    out = io.BytesIO()
    with av.open(out, "w", format="flac") as file:
        stream = file.add_stream("flac", rate=8_000, layout="mono")
        for begin in range(0, samples, 4_096):
            count = min(4_096, samples - begin)
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, count), np.int16), format="s16", layout="mono"
            )
            frame.sample_rate = 8_000
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()
