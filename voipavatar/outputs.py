"""A session's outputs: direct broadcasts and LiveKit's egress behind one set of verbs.

`Outputs` belongs to one session, `OutputDesk` finds a session's and closes them with it,
`outputs_router` is their HTTP interface, `stream` the whole of `voipavatar stream`. Keys of
addresses come in and never go out again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from fastapi import APIRouter, HTTPException, Request
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from .broadcast import AvSink
from .config import Persona, Settings, first_mistake, resolve
from .egress import EgressOutputs, EgressPlan, webhook
from .encoder import PRESETS, Programme, programme, re_colour
from .errors import ConfigError, InputError, StageError, TransportError, VoipAvatarError
from .media import Frame, Sink
from .rtmp import StreamUrl
from .session import Session, Studio
from .targets import Backoff, Event, Rotation

logger = logging.getLogger(__name__)

LIMIT = 16
"""Outputs that one session may have."""
CAPTION = 4.0
"""Seconds for which burnt-in words stay after the last one."""


class OutputWish(BaseModel):
    """One or more addresses to broadcast to, and how it should look."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"urls": ["rtmps://a.rtmps.youtube.com/live2/KEY"], "preset": "youtube"}]
        },
    )

    urls: list[SecretStr] = Field(
        min_length=1,
        max_length=LIMIT,
        description="rtmp://HOST/APP/KEY, rtmps://, srt://, youtube://KEY, twitch://KEY",
    )
    via: Literal["direct", "egress"] = Field(
        default="direct",
        description="direct: encoded here, for days; egress: LiveKit's service restreams the room",
    )
    preset: str = Field(default="youtube", description=", ".join(PRESETS))
    shape: Literal["16:9", "9:16", "1:1"] | None = Field(
        default=None, description="the canvas; the avatar's own shape if absent"
    )
    height: int = Field(default=720, ge=144, le=2160, description="short side of the canvas")
    fps: Literal[25, 30, 50, 60] | None = None
    background: str = Field(default="", description="#rrggbb, or (not over HTTP) a file")
    placement: Literal["fit", "fill", "bottom"] = "fit"
    captions: bool = Field(default=False, description="burn the words into the picture")
    codec: Literal["x264", "nvenc"] = "x264"
    video_bitrate: int | None = Field(default=None, description="bits a second")
    persist: bool = Field(
        default=False, description="go on trying when even the first attempt fails"
    )
    rotate_hours: float | None = Field(
        default=None, gt=0, le=48, description="begin a new broadcast after so many hours"
    )
    room: bool = Field(default=False, description="egress: the whole room, not just the avatar")

    def look(self, width: int, height: int, fps: int) -> Programme:
        """The programme of a direct broadcast. ConfigError for what can't be."""
        changes: dict[str, Any] = {"video_bitrate": self.video_bitrate}
        return programme(
            width,
            height,
            fps,
            preset=self.preset,
            shape=self.shape,
            height=self.height,
            fps=self.fps,
            background=self.background,
            placement=self.placement,
            captions=self.captions,
            codec=self.codec,
            **changes,
        )


def read_urls(values: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
    """Addresses as the command line gives them.

    `@FILE` reads one address a line, `-` the same from standard input, and `${NAME}` in an address
    is taken from the environment, so that no key has to stand where `ps` and the shell's history
    show it. ConfigError for what isn't there.
    """
    found: list[str] = []
    for value in values:
        if value == "-":
            lines = sys.stdin.read().splitlines()
        elif value.startswith("@"):
            try:
                lines = Path(value[1:]).expanduser().read_text("utf-8").splitlines()
            except OSError as error:
                raise ConfigError(f"{value[1:]} can't be read: {error.strerror}") from None
        else:
            lines = [value]
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ConfigError("there is no address to stream to: --to rtmp://HOST/APP/KEY")
    return [str(resolve(one, env)) for one in found]


# --- one session ----------------------------------------------------------------------------------


class Room(Protocol):
    """What egress must know of the avatar's room."""

    url: str
    api_key: str
    api_secret: str
    room: str
    identity: str


class Outputs:
    """Everything that one session broadcasts to. Closed by `aclose`, or with the session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sink: AvSink | None = None
        self._look: Programme | None = None
        self._egress: EgressOutputs | None = None
        self._plan: EgressPlan | None = None
        self._where: dict[str, AvSink | EgressOutputs] = {}
        self._lock = asyncio.Lock()
        self._captions: asyncio.Task[None] | None = None
        self._closed = False

    async def add(self, wish: OutputWish, *, files: bool = False) -> list[Event]:
        """Begin to broadcast; the new outputs' states. ConfigError, StageError, TransportError.

        `files`: addresses and backgrounds may be files of this machine (not for the network).
        """
        urls = [StreamUrl.parse(one.get_secret_value()) for one in wish.urls]
        if not files and any(one.kind == "file" for one in urls):
            raise ConfigError("an address must be rtmp://, rtmps:// or srt://")
        if not files and wish.background and re_colour(wish.background) is None:
            raise ConfigError("the background must be a colour: #rrggbb")
        async with self._lock:
            if self._closed:
                raise StageError("the session is closing: open a new one")
            if len(self._where) + len(urls) > LIMIT:
                raise StageError(f"a session has at most {LIMIT} outputs: take one away first")
            names = [f"out-{secrets.token_hex(3)}" for _ in urls]
            if wish.via == "egress":
                await self._add_egress(wish, urls, names)
            else:
                await self._add_direct(wish, urls, names)
        return [one for one in await self.status() if one["id"] in names]

    async def remove(self, id: str) -> bool:
        """End one output; whether there was one of that name."""
        where = self._where.pop(id, None)
        if where is None:
            return False
        await where.remove(id)
        return True

    async def status(self) -> list[Event]:
        """The state of every output."""
        found: list[Event] = []
        with contextlib.suppress(StageError):
            if self._sink is not None:
                found += await self._sink.status()
        if self._egress is not None:
            found += self._egress.status()
        return found

    def hear(self, info: Any) -> None:
        """News from a verified webhook."""
        if self._egress is not None:
            self._egress.hear(info)

    async def aclose(self) -> None:
        """End every output. Idempotent."""
        async with self._lock:
            self._closed = True
            task, self._captions = self._captions, None
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            self._where.clear()
            sink, egress = self._sink, self._egress
            self._sink = self._egress = None
            if sink is not None:
                with contextlib.suppress(ValueError):
                    self._session.stage.sinks.remove(sink)
                await sink.aclose()
            if egress is not None:
                await egress.aclose()

    async def _add_direct(
        self, wish: OutputWish, urls: Sequence[StreamUrl], names: Sequence[str]
    ) -> None:
        spec = self._session.stage.engine.spec
        look = wish.look(spec.width, spec.height, spec.fps)
        if self._sink is not None and look != self._look:
            if any(where is self._sink for where in self._where.values()):
                raise StageError(
                    "this session is on air with another look: one encode feeds all its outputs; "
                    "end those, or ask for the same"
                )
            sink, self._sink = self._sink, None
            self._session.stage.sinks.remove(sink)
            await sink.aclose()
        if self._sink is None:
            sink = AvSink(look, on_event=self._tell)
            await sink.open()
            self._session.stage.sinks.append(sink)
            self._sink, self._look = sink, look
        if look.captions and self._captions is None:
            self._captions = asyncio.create_task(self._caption(), name="burn-captions")
        rotation = Rotation(after=wish.rotate_hours * 3600) if wish.rotate_hours else None
        for url, name in zip(urls, names, strict=True):
            await self._sink.add(url, id=name, persist=wish.persist, rotation=rotation)
            self._where[name] = self._sink

    async def _add_egress(
        self, wish: OutputWish, urls: Sequence[StreamUrl], names: Sequence[str]
    ) -> None:
        room = self._session.room
        if room is None:
            raise StageError("egress restreams a LiveKit room, and this session is in none")
        options = room.options
        spec = self._session.stage.engine.spec
        look = wish.look(spec.width, spec.height, spec.fps)
        plan = EgressPlan(
            room=wish.room,
            width=look.width,
            height=look.height,
            fps=look.fps,
            video_bitrate=look.video_bitrate,
            audio_bitrate=look.audio_bitrate,
            sample_rate=look.sample_rate,
        )
        if self._egress is not None and plan != self._plan:
            if any(where is self._egress for where in self._where.values()):
                raise StageError(
                    "egress restreams this room already with another look: end that first"
                )
            await self._egress.aclose()
            self._egress = None
        if self._egress is None:
            if not (options.api_key and options.api_secret):
                raise ConfigError("egress takes LIVEKIT_API_KEY and LIVEKIT_API_SECRET")
            self._egress = EgressOutputs(
                options.url,
                options.api_key,
                options.api_secret,
                options.room,
                options.identity,
                self._tell,
                plan=plan,
                persist=wish.persist,
            )
            self._plan = plan
            await self._egress.open()
        for url, name in zip(urls, names, strict=True):
            self._egress.add(url, name)
            self._where[name] = self._egress

    def _tell(self, event: Event) -> None:
        fields = {name: value for name, value in event.items() if name not in ("type", "at")}
        self._session.emit("output", **fields)

    async def _caption(self) -> None:
        def show(text: str) -> None:
            if self._sink is not None:
                self._sink.caption(text, CAPTION)

        await burn_captions(self._session, show)


async def burn_captions(session: Session, show: Callable[[str], object]) -> None:
    """Follow a session's words and show the newest: word by word where the voice tells them."""
    words: deque[str] = deque(maxlen=9)
    utterance = ""
    async with contextlib.aclosing(session.events()) as events:
        async for event in events:
            if event["type"] == "started":
                utterance = event["utterance"]
                words.clear()
                if text := str(event.get("text", "")):
                    show(_shortened(text))
            elif event["type"] == "caption":
                if event["utterance"] != utterance:
                    utterance = event["utterance"]
                    words.clear()
                words.append(str(event["text"]))
                show(" ".join(words))
            elif event["type"] == "finished" and event.get("interrupted"):
                show("")


def _shortened(text: str, most: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


# --- all sessions, and HTTP -----------------------------------------------------------------------


def persona_wishes(persona: Persona) -> list[OutputWish]:
    """A persona's own `outputs:`, keys taken from the environment. ConfigError naming the entry."""
    wishes = []
    for number, entry in enumerate(persona.outputs):
        try:
            wishes.append(OutputWish.model_validate(resolve(entry)))
        except ValidationError as error:
            where, what = first_mistake(error)
            raise ConfigError(f"persona {persona.name}: outputs.{number}.{where}: {what}") from None
    return wishes


class OutputDesk:
    """The outputs of a studio's sessions; each ends with its session.

    A session whose persona names `outputs:` broadcasts there as soon as it is on air; what is
    wrong with one is told by the session's "error" event, and the session goes on.
    """

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._outputs: dict[str, Outputs] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._starting: set[asyncio.Task[None]] = set()
        studio.on_open.append(self._opened)

    def of(self, id: str) -> Outputs | None:
        """A session's outputs; None when there is no such session."""
        session = self._studio.sessions.get(id)
        if session is None:
            return None
        if id not in self._outputs:
            self._outputs[id] = Outputs(session)
            self._watchers[id] = asyncio.create_task(self._until_closed(session), name="outputs")
        return self._outputs[id]

    def hear(self, info: Any) -> None:
        """News of an egress, from a verified webhook."""
        for outputs in list(self._outputs.values()):
            outputs.hear(info)

    async def aclose(self) -> None:
        """End all outputs. Idempotent."""
        if self._opened in self._studio.on_open:
            self._studio.on_open.remove(self._opened)
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for watcher in self._watchers.values():
            watcher.cancel()
        await asyncio.gather(*self._watchers.values(), return_exceptions=True)
        self._watchers.clear()
        outputs, self._outputs = self._outputs, {}
        await asyncio.gather(*(one.aclose() for one in outputs.values()))

    def _opened(self, session: Session) -> None:
        if session.persona.outputs:
            task = asyncio.create_task(self._start(session), name="persona-outputs")
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _start(self, session: Session) -> None:
        outputs = self.of(session.id)
        try:
            for wish in persona_wishes(session.persona):
                if outputs is not None:
                    await outputs.add(wish, files=True)
        except VoipAvatarError as error:
            logger.error("a persona's outputs can't be begun", extra={"reason": str(error)})
            session.emit("error", error=str(error))

    async def _until_closed(self, session: Session) -> None:
        await session.closed.wait()
        outputs = self._outputs.pop(session.id, None)
        self._watchers.pop(session.id, None)
        if outputs is not None:
            await outputs.aclose()


def outputs_router(desk: OutputDesk, settings: Settings) -> APIRouter:
    """`/sessions/{id}/outputs` and `/livekit/webhook`.

    The webhook carries LiveKit's own signature in `Authorization` instead of our token.
    """
    router = APIRouter(tags=["outputs"])

    def find(id: str) -> Outputs:
        outputs = desk.of(id)
        if outputs is None:
            raise HTTPException(404, f"there is no session {id[:64]!r}")
        return outputs

    @router.get("/sessions/{id}/outputs")
    async def list_outputs(id: str) -> list[dict[str, Any]]:
        """Where the session broadcasts to, and how that goes. Keys are never shown."""
        return await find(id).status()

    @router.post("/sessions/{id}/outputs", status_code=201)
    async def add_outputs(id: str, wish: OutputWish) -> list[dict[str, Any]]:
        """Broadcast the session to one or more addresses."""
        try:
            return await find(id).add(wish)
        except ConfigError as error:
            raise InputError(str(error)) from None

    @router.get("/sessions/{id}/outputs/{output}")
    async def show_output(id: str, output: str) -> dict[str, Any]:
        """One output."""
        for one in await find(id).status():
            if one["id"] == output:
                return one
        raise HTTPException(404, f"there is no output {output[:64]!r}")

    @router.delete("/sessions/{id}/outputs/{output}", status_code=204)
    async def remove_output(id: str, output: str) -> None:
        """Stop broadcasting there."""
        if not await find(id).remove(output):
            raise HTTPException(404, f"there is no output {output[:64]!r}")

    @router.post("/livekit/webhook", status_code=204)
    async def hear(request: Request) -> None:
        """Where livekit-server's `webhook.urls` point to: egress is followed without delay."""
        body = await request.body()
        try:
            event = webhook(
                body,
                request.headers.get("authorization", ""),
                settings.livekit_api_key,
                settings.livekit_api_secret,
            )
        except TransportError as error:
            raise HTTPException(401, str(error)) from None
        if event.event.startswith("egress_"):
            desk.hear(event.egress_info)

    return router


# --- `voipavatar stream` --------------------------------------------------------------------------


class _Tap:
    """A sink of a session that comes and goes, in front of a broadcast that stays."""

    def __init__(self, sink: AvSink) -> None:
        self._sink = sink

    @property
    def latency(self) -> float:
        return 0.0

    def put(self, frame: Frame) -> None:
        self._sink.put(frame)

    def clear(self) -> float:
        return 0.0

    async def aclose(self) -> None:
        """The broadcast goes on without the session."""


async def stream(
    studio: Studio,
    persona: Persona | str,
    wish: OutputWish,
    *,
    stop: asyncio.Event,
    on_session: Callable[[Session], None] = lambda session: None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> None:
    """Broadcast a persona until `stop` is set, whatever happens to its engine.

    `on_session` is told every session that carries the broadcast: the first, and each that
    follows one that failed (connect speech to it there). `on_event` hears the outputs' events.
    Raises ConfigError and what `Studio.open` raises at the first start, and TransportError when
    every output has failed for good.
    """
    sink: AvSink | None = None
    session: Session | None = None
    backoff = Backoff()
    failed: dict[str, str] = {}
    names: list[str] = []
    over = asyncio.Event()

    def hear(event: Event) -> None:
        if event["event"] == "failed":
            failed[event["id"]] = event["reason"]
            if names and set(names) <= set(failed):
                over.set()
        on_event(event)

    urls = [StreamUrl.parse(one.get_secret_value()) for one in wish.urls]
    rotation = Rotation(after=wish.rotate_hours * 3600) if wish.rotate_hours else None
    captions: asyncio.Task[None] | None = None
    try:
        while not stop.is_set() and not over.is_set():
            try:
                session = await _open(studio, persona, wish, sink, hear)
                if sink is None:
                    sink = next(one for one in session.stage.sinks if isinstance(one, AvSink))
                    session.stage.sinks[session.stage.sinks.index(sink)] = _Tap(sink)
                    for number, url in enumerate(urls, 1):
                        names.append(f"out-{number}")
                        await sink.add(url, id=names[-1], persist=wish.persist, rotation=rotation)
            except VoipAvatarError as error:
                if sink is None:
                    raise
                logger.error("the avatar can't be opened", extra={"reason": str(error)})
                await _first(stop, over, timeout=backoff.next(0.0))
                continue
            opened = time.monotonic()
            on_session(session)
            if wish.captions:
                captions = asyncio.create_task(burn_captions(session, sink.caption))
            await _first(stop, over, session.closed)
            if captions is not None:
                captions.cancel()
                await asyncio.gather(captions, return_exceptions=True)
            if session.closed.is_set() and not stop.is_set() and not over.is_set():
                logger.error("the avatar is opened again", extra={"reason": session.failure})
                if time.monotonic() - opened > 30:
                    backoff.reset()
                await _first(stop, over, timeout=backoff.next(0.0))
        if over.is_set() and not stop.is_set():
            raise TransportError("; ".join(failed.values()), retryable=False)
    finally:
        if session is not None:
            await session.aclose()
        if sink is not None:
            await sink.aclose()


async def _open(
    studio: Studio,
    persona: Persona | str,
    wish: OutputWish,
    sink: AvSink | None,
    hear: Callable[[Event], None],
) -> Session:
    made: list[AvSink] = []

    def make(spec: Any) -> Sink:
        if sink is not None:
            return _Tap(sink)
        made.append(AvSink(wish.look(spec.width, spec.height, spec.fps), on_event=hear))
        return made[0]

    session = await studio.open(persona, sinks=[make])
    try:
        for one in made:
            await one.open()
    except BaseException:
        await session.aclose()
        raise
    return session


async def _first(*events: asyncio.Event, timeout: float | None = None) -> None:
    """Until one of the events is set, or the time has passed."""
    tasks = [asyncio.ensure_future(one.wait()) for one in events]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
