"""What the user says: settings from the environment, personas from YAML.

The environment is read once, here; everything else takes values. A mistake in a persona is one
ConfigError that names file, line and key. Secrets are masked in `repr`, and `${NAME}` in a
persona takes the value of an environment variable when the value is needed, not when it is read.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol
from urllib.parse import quote

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import ConfigError, InputError
from .media import check_fps

PACKAGE = Path(__file__).resolve().parent


# --- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the environment says. Secrets don't appear in `repr`."""

    livekit_url: str = ""
    livekit_api_key: str = ""
    livekit_api_secret: str = field(default="", repr=False)
    cache_dir: Path = Path("~/.cache/voipavatar")
    persona_dirs: tuple[Path, ...] = ()
    """Looked in before the built-in personas; VOIPAVATAR_PERSONAS, separated like PATH."""
    face_models: Path | None = None
    """A folder with the networks that find a face, or with the wheel that holds them; for
    machines without a network."""
    host: str = "127.0.0.1"
    port: int = 8080
    token: str = field(default="", repr=False)
    """Bearer token of the HTTP interface; required to listen anywhere but on loopback."""
    max_sessions: int = 8
    idle_minutes: float = 10.0
    """A session that nobody watches or feeds for so long is closed."""
    max_text: int = 20_000
    """Characters in one text."""
    max_audio_bytes: int = 50_000_000
    log_level: str = "info"
    amqp_url: str = field(default="", repr=False)
    """RabbitMQ's address; VOIPAVATAR_AMQP_URL, or made of RABBITMQ_HOST and its kin."""
    queue: str = "talking_face_input"
    """The queue that the default persona speaks from; VOIPAVATAR_QUEUE or RABBITMQ_QUEUE."""
    queue_ack: str = "on_spoken"
    """When the broker may forget a message that doesn't say: on_accept or on_spoken."""
    queue_limit: int = 10_000
    """Messages that may wait in the broker; more are refused."""
    redis_url: str = field(default="", repr=False)
    """Where workers on several machines remember messages; a file in the cache otherwise."""
    audio_urls: tuple[str, ...] = ()
    """Beginnings of the addresses that messages may refer to, separated by spaces; none."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read `LIVEKIT_URL`, `LIVEKIT_API_KEY`, `LIVEKIT_API_SECRET`, `VOIPAVATAR_*`, and
        `RABBITMQ_HOST`, `_PORT`, `_USER`, `_PASSWORD`, `_VHOST` and `_QUEUE`.

        Raises ConfigError naming the variable that can't be read.
        """
        env = os.environ if env is None else env
        values: dict[str, Any] = {}
        for one in fields(cls):
            name = _variable(one.name)
            raw = env.get(name)
            if raw is None or raw == "":
                continue
            try:
                values[one.name] = _read(one.name, raw)
            except ValueError as error:
                shown = name if one.name in ("amqp_url", "redis_url") else f"{name}={raw!r}"
                raise ConfigError(f"{shown} can't be used: {error}") from None
        if "amqp_url" not in values and env.get("RABBITMQ_HOST"):
            values["amqp_url"] = _amqp_url(env)
        if "queue" not in values and env.get("RABBITMQ_QUEUE"):
            values["queue"] = env["RABBITMQ_QUEUE"]
        values["cache_dir"] = Path(values.get("cache_dir", cls.cache_dir)).expanduser()
        return cls(**values)


def _variable(name: str) -> str:
    if name.startswith("livekit_"):
        return name.upper()
    return {
        "cache_dir": "VOIPAVATAR_CACHE",
        "persona_dirs": "VOIPAVATAR_PERSONAS",
    }.get(name, f"VOIPAVATAR_{name.upper()}")


def _amqp_url(env: Mapping[str, str]) -> str:
    """An address of the variables that RabbitMQ's clients are commonly given."""
    host = env["RABBITMQ_HOST"]
    # Kubernetes and Docker links put tcp://HOST:PORT into RABBITMQ_PORT.
    port = env.get("RABBITMQ_PORT", "").rpartition(":")[2] or "5672"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"RABBITMQ_PORT={env['RABBITMQ_PORT']!r} can't be used: no port number")
    user = quote(env.get("RABBITMQ_USER") or "guest", safe="")
    password = quote(env.get("RABBITMQ_PASSWORD") or "guest", safe="")
    vhost = env.get("RABBITMQ_VHOST") or "/"
    path = "" if vhost == "/" else quote(vhost, safe="")
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"amqp://{user}:{password}@{host}:{port}/{path}"


def _read(name: str, raw: str) -> Any:
    if name in ("port", "max_sessions", "max_text", "max_audio_bytes", "queue_limit"):
        number = int(raw)
        if number < 0 or (name == "port" and number > 65535):
            raise ValueError("out of range")
        return number
    if name == "idle_minutes":
        return float(raw)
    if name in ("cache_dir", "face_models"):
        return Path(raw).expanduser()
    if name == "queue_ack" and raw not in ("on_accept", "on_spoken"):
        raise ValueError("on_accept or on_spoken")
    if name == "amqp_url" and not raw.startswith(("amqp://", "amqps://")):
        raise ValueError("an address that begins with amqp:// or amqps:// is wanted")
    if name == "audio_urls":
        return tuple(raw.split())
    if name == "persona_dirs":
        return tuple(Path(part).expanduser() for part in raw.split(os.pathsep) if part)
    return raw


_PLACE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def resolve(value: Any, env: Mapping[str, str] | None = None) -> Any:
    """`value` with every `${NAME}` in it replaced from the environment; ConfigError if unset."""
    env = os.environ if env is None else env
    if isinstance(value, str):

        def one(match: re.Match[str]) -> str:
            name = match.group(1)
            if name not in env:
                raise ConfigError(f"the environment variable {name} is not set: a persona needs it")
            return env[name]

        return _PLACE.sub(one, value)
    if isinstance(value, Mapping):
        return {key: resolve(item, env) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [resolve(item, env) for item in value]
    return value


# --- personas -------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)
"""Names of options whose values are never shown."""


def masked(value: Any) -> Any:
    """`value` as it may be shown: what is named like a secret is a row of dots."""
    if isinstance(value, Mapping):
        return {
            name: "..." if SECRET.search(str(name)) and item is not None else masked(item)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [masked(item) for item in value]
    return value


class _Chosen(_Strict):
    """Something by name or import path, with options; secrets among them don't appear in `repr`."""

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, masked(value) if name == "options" else value


class VoiceChoice(_Chosen):
    """A voice by name or import path, with its own options."""

    use: str = Field(
        description="piper, espeak, edge, pyttsx3, or the import path of a LiveKit TTS",
        min_length=1,
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments of that voice; ${NAME} is taken from the environment",
    )


def _voices(value: Any) -> Any:
    """`piper`, `{use: piper}` and lists of either are all a list of choices."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [{"use": item} if isinstance(item, str) else item for item in items]


Voices = Annotated[tuple[VoiceChoice, ...], BeforeValidator(_voices), Field(min_length=1)]


# --- the agent of a persona -----------------------------------------------------------------------


class Part(_Chosen):
    """A model, a voice, a tool, ... of the agent: by name or import path, with its options."""

    use: str = Field(
        min_length=1,
        description="a LiveKit plugin (openai), one of its classes (openai.LLM), the import path "
        "of a class or of a function that makes one (my.module.make), or a model of LiveKit "
        "Inference (openai/gpt-4.1-mini)",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="its keyword arguments; ${NAME} is taken from the environment",
    )


def _part(value: Any) -> Any:
    """`openai` is `{use: openai}`; `vad: false` and `vad: none` are no VAD."""
    if value is False:
        return {"use": "none"}
    return {"use": value} if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """One or several."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [_part(item) for item in items]


One = Annotated[Part, BeforeValidator(_part)]
Several = Annotated[tuple[Part, ...], BeforeValidator(_parts), Field(min_length=1)]


class Greeting(_Strict):
    """What the agent says first."""

    say: str = Field(default="", max_length=1000, description="word for word")
    instructions: str = Field(
        default="", max_length=4000, description="what the model is told to greet with, instead"
    )
    interruptible: bool = True

    @model_validator(mode="after")
    def _either(self) -> Greeting:
        if bool(self.say) == bool(self.instructions):
            raise ValueError("give one of say and instructions")
        return self


def _greeting(value: Any) -> Any:
    return {"say": value} if isinstance(value, str) else value


class Endpointing(_Strict):
    """When a pause of the user is the end of the turn."""

    mode: Literal["fixed", "dynamic"] | None = None
    min_delay: float | None = Field(default=None, ge=0, le=30, description="seconds, at least")
    max_delay: float | None = Field(default=None, ge=0, le=60, description="seconds, at most")
    alpha: float | None = Field(default=None, gt=0, le=1)


class Interruption(_Strict):
    """What the user may cut short."""

    enabled: bool | None = None
    mode: Literal["adaptive", "vad"] | None = None
    min_duration: float | None = Field(default=None, ge=0, le=30, description="seconds of speech")
    min_words: int | None = Field(default=None, ge=0, le=100)
    discard_audio_if_uninterruptible: bool | None = None


class Preemptive(_Strict):
    """Answering before the turn is surely over."""

    enabled: bool | None = None
    preemptive_tts: bool | None = None
    max_speech_duration: float | None = Field(default=None, gt=0)
    max_retries: int | None = Field(default=None, ge=0)


class TurnLimit(_Strict):
    """When a user who goes on and on is answered all the same."""

    max_words: int | None = Field(default=None, ge=1)
    max_duration: float | None = Field(default=None, gt=0)


class TurnHandling(_Strict):
    endpointing: Endpointing = Endpointing()
    interruption: Interruption = Interruption()
    preemptive_generation: Preemptive = Preemptive()
    user_turn_limit: TurnLimit = TurnLimit()


class SessionOptions(_Strict):
    """Options of LiveKit's `AgentSession`, by their names there; theirs is the default."""

    turn_handling: TurnHandling = TurnHandling()
    max_tool_steps: int | None = Field(default=None, ge=0, le=100)
    min_consecutive_speech_delay: float | None = Field(default=None, ge=0, le=60)
    use_tts_aligned_transcript: bool = Field(
        default=True, description="captions by the voice's own times, where it tells them"
    )
    tts_text_transforms: tuple[str, ...] | None = None
    user_away_timeout: float | None = Field(default=15.0, gt=0)
    transcription_timeout: float | None = Field(default=None, gt=0)
    aec_warmup_duration: float | None = Field(
        default=3.0,
        ge=0,
        description="seconds from its first word in which the agent can't be interrupted by sound",
    )
    ivr_detection: bool | None = None


class AgentSection(_Strict):
    """The conversation of a persona: `voipavatar worker` holds it without a line of Python.

    The agent hears by `stt`, thinks by `llm` and speaks by `tts`, or by the persona's `voice`
    without it; or `realtime` does all of that.
    """

    instructions: str = Field(min_length=1, description="who it is and what it does")
    greeting: Annotated[Greeting | None, BeforeValidator(_greeting)] = Field(
        default=None, description="said when somebody comes; the persona's greeting otherwise"
    )
    llm: Several | None = Field(default=None, description="one, or several: the next one stands in")
    realtime: One | None = Field(default=None, description="a speech-to-speech model")
    stt: Several | None = Field(
        default=None, description="without it, the agent only reads what is typed (lk.chat)"
    )
    tts: Several | None = Field(default=None, description="the persona's voice otherwise")
    vad: One | None = Field(default=None, description="the built-in Silero; none: without one")
    turn_detection: One | None = Field(
        default=None,
        description="vad, stt, realtime_llm, manual, or the import path of a turn detector",
    )
    tools: Annotated[tuple[Part, ...], BeforeValidator(_parts)] = Field(
        default=(),
        description="import paths of function tools, of lists of them, or of what makes them",
    )
    session: SessionOptions = SessionOptions()
    vision: bool = Field(default=False, description="whether the model sees the user's camera")
    stay: float = Field(
        default=20.0,
        ge=0,
        le=86_400,
        description="seconds that it waits in a room where nobody is (any more)",
    )
    close_room: bool = Field(
        default=True, description="end the room with the conversation when nobody else is there"
    )

    @model_validator(mode="after")
    def _whole(self) -> AgentSection:
        if (self.llm is None) == (self.realtime is None):
            raise ValueError("give one of llm and realtime")
        return self


# --- the persona ----------------------------------------------------------------------------------


class Sized(Protocol):
    """What has the size and rate of a picture."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def fps(self) -> int: ...


class Look(_Strict):
    """How a persona looks while it is told to: what differs from the persona's own."""

    portrait: Path | None = Field(default=None, description="as the persona's")
    landmarks: dict[str, Any] | Path | None = Field(
        default=None, description="as the persona's; belongs to the portrait of this entry"
    )
    engine_options: dict[str, Any] = Field(
        default_factory=dict, description="these win over the persona's own, key by key"
    )


def _looks(value: Any) -> Any:
    """`{reading: reading.mp4}` is short for `{reading: {portrait: reading.mp4}}`."""
    if not isinstance(value, Mapping):
        return value
    return {
        name: {"portrait": look} if isinstance(look, (str, Path)) else look
        for name, look in value.items()
    }


NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
LookName = Annotated[str, Field(pattern=NAME)]
OWN = "default"
"""The name of a persona's own look."""


class Video(_Strict):
    """How the picture is coded for a room; what isn't given is decided elsewhere."""

    codec: Literal["vp8", "h264", "vp9", "av1"] | None = Field(
        default=None, description="vp8 unless given: every browser decodes it"
    )
    bitrate: int | None = Field(
        default=None, ge=50_000, le=50_000_000, description="bits a second, at most; 2,500,000"
    )
    simulcast: bool | None = Field(
        default=None,
        description="smaller layers beside it, for viewers on slow lines; each costs coding time",
    )

    def over(self, below: Video) -> Video:
        """This one, and of `below` what isn't given here."""
        return Video(**(below.model_dump(exclude_none=True) | self.model_dump(exclude_none=True)))


class Persona(_Strict):
    """Who the avatar is."""

    name: str = Field(pattern=NAME, description="how it is asked for")
    title: str = Field(default="", max_length=80, description="how people call it")
    description: str = Field(default="", max_length=500)
    engine: str = Field(default="viseme", description="viseme, musetalk, clapper, ...")
    engine_options: dict[str, Any] = Field(
        default_factory=dict, description="what this engine is told beyond the common"
    )
    portrait: Path | None = Field(
        default=None, description="picture or clip of the face, relative to this file"
    )
    landmarks: dict[str, Any] | Path | None = Field(
        default=None, description="where lips, eyes and jaw are in the portrait, or a YAML with it"
    )
    voice: Voices = Field(
        default=(VoiceChoice(use="piper"), VoiceChoice(use="espeak")),
        description="one voice, or several: the next is taken when one fails",
    )
    width: int = Field(default=1280, ge=64, le=3840, multiple_of=2)
    height: int = Field(default=720, ge=64, le=2160, multiple_of=2)
    fps: int = Field(default=25, description="pictures a second; must divide 48,000")
    video: Video = Field(default=Video(), description="how a room gets the picture")
    greeting: str = Field(default="", max_length=1000, description="said when a page opens")
    queue: str | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="a RabbitMQ queue that `voipavatar serve` lets this persona speak from",
    )
    idles: Annotated[dict[LookName, Look], BeforeValidator(_looks)] = Field(
        default_factory=dict,
        description="other looks by name, that it takes on air when it is told to: a picture or "
        "clip, or engine options; default is its own",
    )
    outputs: tuple[dict[str, Any], ...] = Field(
        default=(),
        description="where it broadcasts to from the start: what POST /sessions/{id}/outputs "
        "takes; ${NAME} is taken from the environment, so that no key stands here",
    )
    agent: AgentSection | None = Field(
        default=None,
        description="the conversation that `voipavatar worker` holds as this persona",
    )
    path: Path | None = Field(default=None, exclude=True, description="set by the loader")

    @field_validator("fps")
    @classmethod
    def _fps(cls, value: int) -> int:
        try:
            return check_fps(value)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @field_validator("idles")
    @classmethod
    def _own_is_taken(cls, value: dict[str, Look]) -> dict[str, Look]:
        if OWN in value:
            raise ValueError(f"{OWN} is the name of the persona's own look: call it otherwise")
        return value

    def look(self, name: str) -> Persona:
        """The persona as it looks under that name. InputError when there is none so called."""
        if name == OWN:
            return self
        found = self.idles.get(name)
        if found is None:
            raise InputError(
                f"persona {self.name!r} has no idle {name[:64]!r}; it has: "
                f"{', '.join((OWN, *self.idles))}"
            )
        changed: dict[str, Any] = {"engine_options": self.engine_options | found.engine_options}
        if found.portrait is not None:
            # Where a face is in one picture says nothing of another.
            changed |= {"portrait": found.portrait, "landmarks": found.landmarks}
        return self.model_copy(update=changed)

    def sized(self, like: Sized) -> Persona:
        """The persona at another's size and rate: what a session keeps for life."""
        return self.model_copy(update={"width": like.width, "height": like.height, "fps": like.fps})

    def beside(self, path: Path) -> Path:
        """`path` as seen from the persona's file."""
        if path.is_absolute() or self.path is None:
            return path
        return self.path.parent / path

    def voices(self, name: str | None = None) -> tuple[VoiceChoice, ...]:
        """Its voices, the one named `name` first; the others stand in when that one fails.

        A name is what the voice uses; of two of a kind the second is `piper#2`. InputError when
        there is none so called: only its own, for a voice may be any import path.
        """
        if name is None:
            return self.voice
        names: list[str] = []
        for choice in self.voice:
            same = sum(one.partition("#")[0] == choice.use for one in names)
            names.append(choice.use if same == 0 else f"{choice.use}#{same + 1}")
        if name not in names:
            raise InputError(
                f"persona {self.name!r} has no voice {name[:64]!r}; it has: {', '.join(names)}"
            )
        first = names.index(name)
        return (self.voice[first], *self.voice[:first], *self.voice[first + 1 :])

    def engine_settings(self) -> dict[str, Any]:
        """What `Engine.prepare` is given: size, rate, landmarks, and the engine's own options."""
        options: dict[str, Any] = {"width": self.width, "height": self.height, "fps": self.fps}
        if self.landmarks is not None:
            options["landmarks"] = self._landmarks()
        options |= self.engine_options
        behind = options.get("background")
        if isinstance(behind, str) and self.beside(Path(behind)).is_file():
            options["background"] = str(self.beside(Path(behind)))
        return options

    def _landmarks(self) -> dict[str, Any]:
        if not isinstance(self.landmarks, Path):
            return self.landmarks or {}
        file = self.beside(self.landmarks)
        data, _ = _parse(file)
        found = data.get("landmarks", data)
        if not isinstance(found, dict):
            raise ConfigError(f"{file}: landmarks must be a mapping")
        return found


def first_mistake(error: ValidationError) -> tuple[str, str]:
    """Where and what, without what was written there: it may be a secret."""
    [first, *_] = error.errors(include_input=False, include_url=False)
    return ".".join(map(str, first["loc"])), str(first["msg"])


def persona_schema() -> dict[str, Any]:
    """JSON schema of a persona's YAML, for editors."""
    schema = Persona.model_json_schema()
    schema["properties"].pop("path", None)
    choice = {"$ref": "#/$defs/VoiceChoice"}
    one = {"anyOf": [{"type": "string"}, choice]}
    schema["$defs"]["Look"] = {
        "anyOf": [{"type": "string", "description": "a portrait"}, schema["$defs"]["Look"]]
    }
    voice = schema["properties"]["voice"]
    schema["properties"]["voice"] = {
        "description": voice.get("description", ""),
        "anyOf": [*one["anyOf"], {"type": "array", "items": one, "minItems": 1}],
    }
    _short_forms(schema["$defs"]["AgentSection"]["properties"])
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "voipavatar persona"
    return schema


def _short_forms(agent: dict[str, Any]) -> None:
    """What the loader accepts in the agent's section beyond the long forms."""
    text: dict[str, Any] = {"type": "string"}
    part = {"anyOf": [text, {"$ref": "#/$defs/Part"}]}
    several = {"anyOf": [*part["anyOf"], {"type": "array", "items": part, "minItems": 1}]}
    forms: dict[str, dict[str, Any]] = {
        "greeting": {"anyOf": [text, {"$ref": "#/$defs/Greeting"}]},
        "realtime": part,
        "vad": {"anyOf": [*part["anyOf"], {"const": False}]},
        "turn_detection": part,
        "llm": several,
        "stt": several,
        "tts": several,
        "tools": {"anyOf": [*part["anyOf"], {"type": "array", "items": part}]},
    }
    for name, form in forms.items():
        agent[name] = {"description": agent[name].get("description", ""), **form}


def place(persona: Persona, *key: str | int) -> str:
    """`FILE:LINE: KEY` of something in a persona's YAML, for an error that is found later."""
    name = ".".join(str(part) for part in key)
    if persona.path is None:
        return f"persona {persona.name!r}: {name}"
    try:
        _, lines = _parse(persona.path)
    except ConfigError:  # gone or broken since it was loaded
        return f"{persona.path}: {name}"
    return f"{persona.path}:{_line(lines, key)}: {name}"


def load_persona(which: str | Path, settings: Settings | None = None) -> Persona:
    """A persona by name, or from a file.

    Raises ConfigError with file, line and key of what is wrong, or with the names there are.
    """
    text = str(which)
    if text.endswith((".yaml", ".yml")) or "/" in text or os.sep in text:
        return _load(Path(which).expanduser())
    names: list[str] = []
    for file in _persona_files(settings):
        if file.stem == text:
            return _load(file)
        names.append(file.stem)
    raise ConfigError(
        f"there is no persona {text!r}; there are: {', '.join(sorted(set(names))) or 'none'}. "
        "`voipavatar personas` lists them"
    )


def list_personas(settings: Settings | None = None) -> list[Persona]:
    """Every persona that can be found, the user's own before the built-in ones."""
    found: dict[str, Persona] = {}
    for file in _persona_files(settings):
        if file.stem not in found:
            found[file.stem] = _load(file)
    return sorted(found.values(), key=lambda one: (one.name != "default", one.name))


def _persona_files(settings: Settings | None) -> Iterator[Path]:
    own = settings.persona_dirs if settings is not None else ()
    built_in = (
        PACKAGE / "personas" if (PACKAGE / "personas").is_dir() else PACKAGE.parent / "personas"
    )
    for folder in (*own, built_in):
        if folder.is_dir():
            yield from sorted(folder.glob("*.yaml"))


def _load(file: Path) -> Persona:
    data, lines = _parse(file)
    data.setdefault("name", file.stem)
    try:
        persona = Persona.model_validate({**data, "path": file.resolve()})
    except ValidationError as error:
        raise ConfigError("\n".join(_told(file, lines, one) for one in error.errors())) from None
    places: list[tuple[tuple[str, ...], Any]] = [((), persona)]
    places += [(("idles", name), look) for name, look in persona.idles.items()]
    for where, holder in places:
        for last in ("portrait", "landmarks"):
            path, key = getattr(holder, last), (*where, last)
            if isinstance(path, Path) and not persona.beside(path).is_file():
                line = lines.get(key) or lines.get(where, 1)
                raise ConfigError(
                    f"{file}:{line}: {'.'.join(key)}: {path} is not there; the path is taken "
                    "from the persona's file"
                )
    return persona


def _told(file: Path, lines: Mapping[tuple[str | int, ...], int], error: Any) -> str:
    key = tuple(
        part for part in error["loc"] if part not in ("str", "Path", "path", "dict[str,any]")
    )
    if error["type"] == "extra_forbidden":
        known = _known(key[:-1])
        what = f"unknown key; known are {', '.join(known)}" if known else "unknown key"
    else:
        what = str(error["msg"]).removeprefix("Value error, ")
    return f"{file}:{_line(lines, key)}: {'.'.join(str(part) for part in key)}: {what}"


def _line(lines: Mapping[tuple[str | int, ...], int], key: tuple[str | int, ...]) -> int:
    """The line of a key, or of what it is in where a short form stands."""
    return next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), 1)


def _known(key: tuple[str | int, ...]) -> list[str]:
    """Names of the keys that may stand at a place."""
    model: Any = Persona
    for part in key:
        # What is no field is the key of a mapping whose values are of this model.
        if model is not None and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation)
    return [name for name in model.model_fields if name != "path"] if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


def _parse(file: Path) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int]]:
    """The mapping in a YAML file, and the line of each key path."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: can't be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise ConfigError(f"{file}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}:1: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}:1: a mapping of keys to values is wanted here")
    lines: dict[tuple[str | int, ...], int] = {}
    _mark(node, (), lines, file)
    return data, lines


def _mark(
    node: Any, key: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int], file: Path
) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = (*key, str(name.value))
            if inner in lines:
                where = f"{file}:{name.start_mark.line + 1}"
                raise ConfigError(f"{where}: {'.'.join(map(str, inner))}: the key is there twice")
            lines[inner] = name.start_mark.line + 1
            _mark(value, inner, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            item = (*key, index)
            lines[item] = value.start_mark.line + 1
            _mark(value, item, lines, file)
