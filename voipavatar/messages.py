"""What crosses the queue: messages in, events out. Models and parsing only; no broker in here.

A message is `text`, `audio` or `control`, as JSON or (text and sound) as a raw body with a content
type. What AMQP has a property or a header for may stand there or in the body,
which wins over a property: client libraries make up ids of their own.
`voipavatar messages schema` prints the JSON schema, docs/messages.md shows an example of each.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import InputError
from .media import Mode

SCHEMA: Final = "voipavatar/1"
MAX_BODY = 1 << 20
"""Bytes of a message; a longer sound comes in chunks, or by reference."""

Ack: TypeAlias = Literal["on_accept", "on_spoken"]
Command: TypeAlias = Literal[
    "start", "stop", "pause", "resume", "clear", "persona", "voice", "idle"
]
Format: TypeAlias = Literal["wav", "mp3", "ogg", "opus", "flac", "m4a", "aac", "webm", "pcm"]
Outcome: TypeAlias = Literal["finished", "interrupted", "expired", "failed", "duplicate"]
OUTCOMES: Final[frozenset[str]] = frozenset(get_args(Outcome))
"""The events that end a message; exactly one of them for each."""


class Refused(InputError):
    """A message that can't be used; `code` is one word for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


# --- messages -------------------------------------------------------------------------------------

Name = Annotated[str, Field(min_length=1, max_length=200)]


class Message(BaseModel):
    """What all messages have."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    version: Literal["voipavatar/1"] = Field(default=SCHEMA, alias="schema")
    message_id: Name | None = Field(
        default=None, description="the same id is spoken once, however often it is sent"
    )
    correlation_id: str | None = Field(
        default=None, max_length=255, description="given back in every event"
    )
    reply_to: str | None = Field(
        default=None, max_length=255, description="a queue that gets a copy of this one's events"
    )
    session_id: str | None = Field(
        default=None,
        max_length=200,
        description="the session that speaks; if there is none of that name, the queue's own",
    )
    session: Name | None = Field(
        default=None, description="the session that speaks; it must be there"
    )
    persona: Name | None = Field(
        default=None, description="a session of this persona speaks; there must be one"
    )
    timestamp: datetime | None = Field(default=None, description="when it was sent")
    not_after: datetime | None = Field(
        default=None, description="it is never begun after this moment"
    )

    @field_validator("timestamp", "not_after")
    @classmethod
    def _aware(cls, value: datetime | None) -> datetime | None:
        """A time without zone is UTC."""
        if value is not None and value.tzinfo is None:
            return value.replace(tzinfo=timezone.utc)
        return value


class Speech(Message):
    """What all messages that are spoken have."""

    mode: Mode = Field(
        default="append",
        description="append: after what waits; interrupt: cut what is being said; "
        "replace: cut it and drop what waits",
    )
    ack: Ack | None = Field(
        default=None,
        description="when the broker may forget it: once it waits in the session, or once it was "
        "spoken (the default)",
    )


class TextMessage(Speech):
    """A text to be said."""

    type: Literal["text"] = "text"
    data: str = Field(min_length=1, description="plain text, or SSML in <speak>")
    voice: Name | None = Field(default=None, description="one of the persona's voices")


class AudioMessage(Speech):
    """A sound to be said: inside, or by reference, or one of several chunks."""

    type: Literal["audio"] = "audio"
    data: str | None = Field(default=None, description="the sound in base64")
    url: str | None = Field(
        default=None, max_length=2_000, description="where it is; must be on the server's list"
    )
    sha256: str | None = Field(
        default=None, pattern=r"^[0-9a-fA-F]{64}$", description="of what is at `url`"
    )
    format: Format | None = Field(default=None, description="wav and the like say it themselves")
    rate: int | None = Field(default=None, ge=4_000, le=192_000, description="Hz; for pcm")
    channels: int | None = Field(default=None, ge=1, le=8, description="for pcm; 1")
    utterance: Name | None = Field(default=None, description="which the chunk belongs to")
    seq: int | None = Field(default=None, ge=0, le=1_000_000, description="of the chunk, from 0")
    final: bool = Field(default=False, description="the last chunk")

    @model_validator(mode="after")
    def _whole(self) -> AudioMessage:
        if (self.utterance is None) != (self.seq is None):
            raise ValueError("utterance and seq go together: a chunk has both")
        if self.final and self.utterance is None:
            raise ValueError("final is for chunks, which have an utterance and a seq")
        if self.utterance is not None and self.url is not None:
            raise ValueError("a chunk is sent, it can't be a reference")
        if self.url is not None and self.sha256 is None:
            raise ValueError("url wants sha256 with it, so that what is spoken is what was meant")
        if self.format == "pcm" and self.rate is None:
            raise ValueError("pcm has no header: say its rate (and channels, if not one)")
        return self


class ControlMessage(Message):
    """Something to be done, at once."""

    type: Literal["control"] = "control"
    command: Command = Field(
        description="stop: be silent and drop what waits; clear: drop what waits; pause, resume "
        "(or start); persona, voice, idle: change to `value`"
    )
    value: Name | None = Field(default=None, description="of persona, voice and idle")

    @model_validator(mode="before")
    @classmethod
    def _data(cls, values: Any) -> Any:
        """`{"type": "control", "data": "stop"}` is understood as well."""
        if isinstance(values, dict) and "data" in values and "command" not in values:
            rest = {key: value for key, value in values.items() if key != "data"}
            return rest | {"command": values["data"]}
        return values

    @model_validator(mode="after")
    def _complete(self) -> ControlMessage:
        if self.command in ("persona", "voice", "idle") and self.value is None:
            raise ValueError(f"{self.command} wants a value: its name")
        return self


AnyMessage: TypeAlias = Annotated[
    TextMessage | AudioMessage | ControlMessage, Field(discriminator="type")
]
_message: TypeAdapter[TextMessage | AudioMessage | ControlMessage] = TypeAdapter(AnyMessage)


# --- events ---------------------------------------------------------------------------------------


class Event(BaseModel):
    """What is told of a message, or of a session."""

    model_config = ConfigDict(extra="forbid")

    version: Literal["voipavatar/1"] = Field(default=SCHEMA, alias="schema")
    type: str
    message_id: str | None = Field(default=None, description="None for what is of a session")
    correlation_id: str | None = None
    session: str = Field(description="which speaks, or would have")
    queue: str | None = Field(default=None, description="that the message came from")
    session_id: str | None = Field(default=None, description="as the message had it")
    at: float = Field(description="Unix seconds")
    utterance: str | None = None


class Accepted(Event):
    """It was understood, and is not a duplicate."""

    type: Literal["accepted"] = "accepted"


class Queued(Event):
    """It waits its turn."""

    type: Literal["queued"] = "queued"
    position: int = Field(ge=0, description="messages that are spoken before it")
    eta_ms: int = Field(ge=0, description="the speech known to be before it")


class Started(Event):
    """Its first sample is heard."""

    type: Literal["started"] = "started"
    first_frame_ts: float = Field(description="Unix seconds")


class Progress(Event):
    """Once a second while it is spoken."""

    type: Literal["progress"] = "progress"
    spoken_ms: int = Field(ge=0)


class Finished(Event):
    """Spoken whole. For a control message: done."""

    type: Literal["finished"] = "finished"
    spoken_ms: int = Field(ge=0, description="what was really played")


class Interrupted(Event):
    """Cut, or dropped while it waited."""

    type: Literal["interrupted"] = "interrupted"
    spoken_ms: int = Field(ge=0)
    by: str = Field(description="a message id, or session, shutdown, worker_lost")


class Expired(Event):
    """Its time was over before it could be begun; nothing of it was spoken."""

    type: Literal["expired"] = "expired"


class Failed(Event):
    """Not spoken, or not whole."""

    type: Literal["failed"] = "failed"
    code: str = Field(description="one word, for programs")
    error: str = Field(description="a sentence, for people")
    retryable: bool = Field(description="the same message may work later")
    spoken_ms: int = Field(default=0, ge=0)
    attempt: int = Field(default=1, ge=1)


class Duplicate(Event):
    """The answer to a copy: this id was taken before. The first has its own outcome."""

    type: Literal["duplicate"] = "duplicate"
    outcome: str | None = Field(default=None, description="of the first, if it has one by now")


class StateChanged(Event):
    """Of a session."""

    type: Literal["state"] = "state"
    state: Literal["IDLE", "PROCESSING", "TALKING", "TRANSITIONING"]


class Caption(Event):
    """A word as it is heard."""

    type: Literal["caption"] = "caption"
    text: str
    start: float = Field(description="seconds from the message's first sample")
    end: float


EVENTS: Final[dict[str, type[Event]]] = {
    str(model.model_fields["type"].default): model
    for model in (
        Accepted, Queued, Started, Progress, Finished, Interrupted, Expired, Failed, Duplicate,
        StateChanged, Caption,
    )
}  # fmt: skip

AnyEvent: TypeAlias = Annotated[
    Accepted
    | Queued
    | Started
    | Progress
    | Finished
    | Interrupted
    | Expired
    | Failed
    | Duplicate
    | StateChanged
    | Caption,
    Field(discriminator="type"),
]
_event: TypeAdapter[Any] = TypeAdapter(AnyEvent)


def read_event(body: bytes) -> Event:
    """An event as it came from the broker. InputError when it is none."""
    try:
        event: Event = _event.validate_json(body)
    except ValidationError as error:
        raise InputError(f"this is no event: {error.errors()[0]['msg']}") from None
    return event


def schema() -> dict[str, Any]:
    """JSON schema of every message and event."""
    messages = _message.json_schema(ref_template="#/$defs/{model}")
    events = _event.json_schema(ref_template="#/$defs/{model}")
    defs = messages.pop("$defs") | events.pop("$defs")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "voipavatar messages and events",
        "anyOf": [{"$ref": "#/$defs/message"}, {"$ref": "#/$defs/event"}],
        "$defs": {"message": messages, "event": events, **defs},
    }


# --- from the wire --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Envelope:
    """What came around a body. Times are Unix seconds, `expiration` is seconds."""

    message_id: str | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    content_type: str | None = None
    timestamp: float | None = None
    expiration: float | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)
    redelivered: bool = False


@dataclass(frozen=True)
class Parsed:
    """A message that is understood."""

    message: TextMessage | AudioMessage | ControlMessage
    id: str
    named: bool
    """The id is the sender's; otherwise it was made of the body."""
    not_after: float | None
    """Unix seconds."""
    sound: bytes | None = None
    """Of an audio message that brought it along."""


def parse(
    body: bytes, envelope: Envelope, *, max_body: int = MAX_BODY, now: float | None = None
) -> Parsed:
    """A message from its body and what came around it. Raises Refused, with a sentence."""
    if len(body) > max_body:
        raise Refused(
            "too_large",
            f"a message of {len(body):,} bytes is too large: {max_body:,} is most. Send a sound in "
            "chunks, or by reference (url and sha256)",
        )
    values, sound = _values(body, envelope)
    try:
        message = _message.validate_python(values)
    except ValidationError as error:
        raise Refused("invalid", _sentence(error)) from None
    except RecursionError:
        raise Refused("invalid", "the message is nested too deeply") from None
    if isinstance(message, AudioMessage):
        sound = _sound(message, sound)
    now = time.time() if now is None else now
    named = message.message_id is not None
    return Parsed(
        message, message.message_id or _made_id(body, envelope), named,
        _deadline(message, envelope, now), sound,
    )  # fmt: skip


def sender_of(body: bytes, envelope: Envelope) -> Envelope:
    """What can be known of whom to answer, also when the message itself is of no use."""
    found: dict[str, str] = {}
    if len(body) <= MAX_BODY:
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict):
            for key in ("message_id", "correlation_id", "reply_to"):
                value = data.get(key)
                if isinstance(value, str) and 0 < len(value) <= 200:
                    found[key] = value
    id = found.get("message_id") or envelope.message_id
    return Envelope(
        message_id=id if id and len(id) <= 200 else _made_id(body, envelope),
        correlation_id=found.get("correlation_id") or envelope.correlation_id,
        reply_to=found.get("reply_to") or envelope.reply_to,
    )


_HEADERS = {
    "schema": str, "session": str, "session_id": str, "persona": str, "utterance": str,
    "voice": str, "mode": str, "priority": str, "ack": str, "format": str, "not_after": object,
    "seq": int, "rate": int, "channels": int, "final": bool,
}  # fmt: skip


def _values(body: bytes, envelope: Envelope) -> tuple[dict[str, Any], bytes | None]:
    """The message's fields from body, properties and headers; and a sound that is the body."""
    kind, parameters = _content_type(envelope.content_type)
    sound: bytes | None = None
    if kind.startswith("audio/") or kind == "application/octet-stream":
        values: dict[str, Any] = {"type": "audio", **_of_sound(kind, parameters)}
        sound = body
    elif kind == "text/plain":
        values = {"type": "text", "data": _utf8(body)}
    else:
        values = _json(body)
    for name, wanted in _HEADERS.items():
        value = envelope.headers.get(name)
        if value is None:
            continue
        if isinstance(value, bytes):
            value = _utf8(value)
        if wanted is int and isinstance(value, str) and value.isdecimal() and len(value) < 10:
            value = int(value)
        if wanted is bool and isinstance(value, str):
            value = value.lower() in ("1", "true", "yes")
        # AMQP has its own priority, a number, which is the broker's affair.
        key = "mode" if name == "priority" else name
        if name == "priority" and value not in get_args(Mode):
            continue
        values[key] = value
    for name in ("message_id", "correlation_id", "reply_to"):
        value = getattr(envelope, name)
        # The body first: client libraries make up a message id where none was given.
        if value and values.get(name) is None:
            values[name] = value
    return values, sound


def _json(body: bytes) -> dict[str, Any]:
    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        data = json.loads(_utf8(body), parse_constant=constant)
    except RecursionError:
        raise Refused("not_json", "the message is nested too deeply") from None
    except ValueError as error:
        raise Refused("not_json", f"the message is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refused("not_json", "the message is JSON but no object: send {...}")
    return data


def _utf8(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            "not_text", f"the text is not UTF-8: byte {error.start} is none of it"
        ) from None


def _content_type(value: str | None) -> tuple[str, dict[str, str]]:
    kind, *rest = (value or "").lower().split(";")
    parameters = {}
    for one in rest:
        name, _, what = one.partition("=")
        parameters[name.strip()] = what.strip().strip('"')
    return kind.strip(), parameters


def _of_sound(kind: str, parameters: Mapping[str, str]) -> dict[str, Any]:
    """`audio/pcm;rate=16000;channels=1` (or audio/L16, little endian here) has no header inside."""
    if kind not in ("audio/pcm", "audio/l16", "audio/x-raw"):
        return {}
    found: dict[str, Any] = {"format": "pcm"}
    for name in ("rate", "channels"):
        value = parameters.get(name, "")
        if re.fullmatch(r"[0-9]{1,7}", value):
            found[name] = int(value)
    return found


def _sound(message: AudioMessage, body: bytes | None) -> bytes | None:
    ways = sum(x is not None for x in (message.data, message.url, body))
    if ways != 1:
        raise Refused(
            "invalid", "an audio message has its sound in one place: data, url, or the raw body"
        )
    if message.url is not None:
        return None
    if message.data is not None:
        try:
            body = base64.b64decode(message.data, validate=True)
        except (binascii.Error, ValueError):
            raise Refused("not_base64", "data is not base64: nothing else goes there") from None
    if not body:
        raise Refused("no_sound", "there is not one byte of sound in the message")
    return body


def _deadline(message: Message, envelope: Envelope, now: float) -> float | None:
    """The moment after which it isn't begun: not_after, or what the broker's own expiry means."""
    known = []
    if message.not_after is not None:
        known.append(message.not_after.timestamp())
    if envelope.expiration is not None:
        sent = envelope.timestamp
        # AMQP has whole seconds: up to one more may be left than this says.
        known.append((sent + 1 if sent is not None and sent <= now else now) + envelope.expiration)
    return min(known) if known else None


def _made_id(body: bytes, envelope: Envelope) -> str:
    what = hashlib.sha256(body)
    what.update(repr(envelope.timestamp).encode())
    return f"body-{what.hexdigest()[:24]}"


def _sentence(error: ValidationError) -> str:
    """The first mistake, without what the sender wrote: it may be speech."""
    first = error.errors(include_input=False, include_url=False)[0]
    types = ("text", "audio", "control")
    where = ".".join(str(part) for part in first["loc"] if part not in types)
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"type must be one of {', '.join(types)}"
    if first["type"] == "extra_forbidden":
        return f"{where[:60]!r} is no field of this message: see `voipavatar messages schema`"
    what = str(first["msg"]).removeprefix("Value error, ")
    return f"{where[:60]}: {what}" if where else what
