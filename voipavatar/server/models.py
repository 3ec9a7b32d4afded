"""What crosses the HTTP interface, with the examples that /docs shows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..config import Video
from ..media import Mode

Wait = Literal["no", "started", "finished"]


class Problem(BaseModel):
    """Every answer from 400 up."""

    error: str = Field(description="what is wrong and what to do, as a sentence")

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"error": "there is no persona 'bob'; there are: default"}]}
    )


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"
    version: str
    uptime: float = Field(description="seconds since the start")
    sessions: int
    max_sessions: int
    token: bool = Field(description="whether requests need a bearer token")
    queues: dict[str, str] = Field(
        default_factory=dict,
        description="the RabbitMQ queues that sessions speak from: up, or down without a broker",
    )


class VoiceInfo(BaseModel):
    """A voice that a persona has."""

    name: str = Field(description="how it is asked for")
    label: str


class PersonaInfo(BaseModel):
    """A face that can be asked for."""

    name: str
    title: str
    description: str
    engine: str
    width: int
    height: int
    fps: int
    greeting: str
    voices: list[VoiceInfo]
    idles: list[str] = Field(description="the looks that it can be told to take on")
    portrait: str | None = Field(description="path of its picture, None if it has none")


class Open(BaseModel):
    """Whom to call."""

    persona: str = Field(default="default", max_length=64)
    voice: str | None = Field(
        default=None, max_length=200, description="one of the persona's voices; its first if absent"
    )
    follow: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="identity of a participant: the avatar says what its audio track says",
    )
    video: Video = Field(
        default=Video(), description="how the picture is coded; what isn't given is the persona's"
    )

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"persona": "default", "voice": "piper"}]}
    )


class Ticket(BaseModel):
    """What a browser needs to watch: hand `url` and `token` to LiveKit's `room.connect`."""

    id: str
    room: str
    url: str
    token: str
    identity: str
    expires: int = Field(description="Unix seconds until which the token opens the door")


class Become(BaseModel):
    """Which face from now on."""

    persona: str = Field(max_length=64)

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"persona": "default"}]}
    )


class Pose(BaseModel):
    """How the face is held while it doesn't speak."""

    pose: str = Field(
        max_length=32,
        description="listening: the other speaks; attentive: they may; thinking: an answer is "
        'looked for; "": as it likes. It stays until another is asked for; speech goes before it',
    )

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"pose": "listening"}]}
    )


class Gesture(BaseModel):
    """One gesture, now."""

    gesture: str = Field(max_length=32, description="nod, shake, smile, wink, tilt, brows or blink")

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"gesture": "nod"}]})


class Idle(BaseModel):
    """Which of the persona's looks from now on."""

    idle: str = Field(max_length=64, description="one of its `idles`; default is its own")

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"idle": "default"}]})


class Opened(Ticket):
    """A session that now runs."""

    persona: PersonaInfo
    voice: str


class Say(BaseModel):
    """Something to say."""

    text: str
    mode: Mode = Field(
        default="append",
        description="append: after what is queued; interrupt: cut what is being said; "
        "replace: cut it and drop the queue",
    )
    voice: str | None = Field(default=None, max_length=200, description="one of the persona's")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"text": "Hello, how can I help?", "mode": "append"}]},
    )


class Said(BaseModel):
    """An utterance that was taken."""

    utterance: str
    state: Literal["queued", "speaking", "said", "interrupted", "failed"]
    heard: float | None = Field(default=None, description="seconds that were played, once over")
    error: str | None = Field(default=None, description="why there was less sound than expected")


class Status(BaseModel):
    """A session, with what its stage counts."""

    id: str
    persona: str
    voice: str | None
    state: str
    room: str | None
    age: float = Field(description="seconds since it was opened")
    watchers: int = Field(description="event streams and live-audio sockets open now")
    pending: int = Field(description="utterances taken over HTTP that are not over yet")
    stage: dict[str, Any] = Field(description="queue, counters and latencies")
