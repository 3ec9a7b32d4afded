"""The HTTP interface and the page: sessions as URLs, errors as sentences."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import mimetypes
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import av
from fastapi import Body, FastAPI, HTTPException, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.middleware.cors import CORSMiddleware

from .. import metrics
from ..config import PACKAGE, Persona, Settings, VoiceChoice, list_personas
from ..errors import InputError
from ..follow import Follow
from ..media import Mode
from ..outputs import OutputDesk, outputs_router
from ..room import RoomOptions
from ..version import __version__
from . import models, vendor
from .access import LiveKitAccess
from .contract import Played, Studio, Utterance
from .desk import MAX_PENDING, Desk, Entry, new_id
from .guard import Guard, host_name
from .live import RATES, EventStream, LiveSound
from .problems import HANDLERS
from .upload import check_sound, read_sound

if TYPE_CHECKING:
    from .. import session

logger = logging.getLogger(__name__)

WEB = PACKAGE / "web"
WAIT_LIMIT = 900.0
"""Seconds that `?wait=` waits at most."""

_PROBLEM: dict[int | str, dict[str, Any]] = {"4XX": {"model": models.Problem}}
_BUSY: dict[int | str, dict[str, Any]] = {**_PROBLEM, 503: {"model": models.Problem}}
_TEXT = {"type": "string"}
_SOUND = {"schema": {"type": "string", "format": "binary"}}
_SAY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": models.Say.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "mode": {"type": "string", "enum": list(get_args(Mode))},
                    },
                }
            },
            "audio/wav": _SOUND,
            "audio/*": _SOUND,
        },
    }
}


def create_app(
    studio: Studio,
    settings: Settings,
    livekit: LiveKitAccess,
    *,
    personas: Callable[[], Sequence[Persona]] | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """The application: the page at `/`, the interface beside it, its description at `/docs`.

    `personas` lists the faces on offer (those of the settings, unless given). `origins` are sites
    whose pages may use the interface; none by default. Sessions opened over HTTP close with the
    application, the studio doesn't.
    """
    desk = Desk(studio, settings)
    routes = _Routes(desk, settings, livekit, personas or (lambda: list_personas(settings)))

    outputs = OutputDesk(cast("session.Studio", studio))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        reaper = asyncio.get_running_loop().create_task(desk.reap(), name="reap-sessions")
        try:
            yield
        finally:
            reaper.cancel()
            await asyncio.gather(reaper, return_exceptions=True)
            await outputs.aclose()
            await desk.aclose()

    app = FastAPI(
        title="voipavatar",
        version=__version__,
        summary="Give a voice agent a face.",
        description=_ABOUT,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        exception_handlers=HANDLERS,
    )
    app.state.desk = desk
    routes.add_to(app)
    keyed = dataclasses.replace(
        settings, livekit_api_key=livekit.api_key, livekit_api_secret=livekit.api_secret
    )
    app.include_router(outputs_router(outputs, keyed))
    app.mount("/web", _PageFiles(directory=WEB), name="web")
    app.add_middleware(
        Guard,
        token=settings.token,
        # A character is at most six bytes in JSON, and there is a little around them.
        max_json=settings.max_text * 6 + 4_096,
        max_audio=settings.max_audio_bytes,
        origins=origins,
    )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    return app


_ABOUT = """
Open a session, show its room in a browser with LiveKit's client, and let the avatar speak.

    curl -X POST localhost:8080/sessions -H 'content-type: application/json' -d '{}'
    curl -X POST localhost:8080/sessions/ID/say -H 'content-type: application/json' \\
         -d '{"text": "Hello."}'
    curl -X POST localhost:8080/sessions/ID/say -H 'content-type: audio/wav' \\
         --data-binary @hello.wav

`WS /sessions/{id}/audio?rate=48000&mode=append` takes live sound: binary messages of int16 PCM,
little endian, mono; `{"end": true}` completes the turn and `{"cancel": true}` takes it back. It
answers with `opened`, `started`, `finished` and `error` messages.

Every answer from 400 up is `{"error": "a sentence"}`.
"""


class _PageFiles(StaticFiles):
    """The page's files, asked about each time (they are small and carry an ETag)."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


class _Routes:
    """The handlers, with what they share."""

    def __init__(
        self,
        desk: Desk,
        settings: Settings,
        livekit: LiveKitAccess,
        personas: Callable[[], Sequence[Persona]],
    ) -> None:
        self._desk = desk
        self._settings = settings
        self._livekit = livekit
        self._personas = personas
        self._began = time.monotonic()

    def add_to(self, app: FastAPI) -> None:
        """Every route, with its tag and its model."""
        get, post, delete = app.get, app.post, app.delete
        get("/", include_in_schema=False)(self.page)
        get("/docs", include_in_schema=False)(self.docs)
        get("/favicon.svg", include_in_schema=False)(self.icon)
        get("/vendor/{name}", include_in_schema=False)(self.vendor)
        get("/health", tags=["server"])(self.health)
        get("/metrics", tags=["server"], response_class=Response)(self.metrics)
        get("/queues", tags=["server"])(self.queues)
        get("/personas", tags=["personas"])(self.personas)
        get("/personas/{name}/portrait", tags=["personas"], responses=_PROBLEM)(self.portrait)
        get("/sessions", tags=["sessions"])(self.list)
        post("/sessions", tags=["sessions"], status_code=201, responses=_BUSY)(self.open)
        get("/sessions/{id}", tags=["sessions"], responses=_PROBLEM)(self.status)
        delete("/sessions/{id}", tags=["sessions"], status_code=204, responses=_PROBLEM)(self.close)
        post("/sessions/{id}/ticket", tags=["sessions"], responses=_PROBLEM)(self.ticket)
        get(
            "/sessions/{id}/events",
            tags=["sessions"],
            response_class=Response,
            responses={**_PROBLEM, 200: {"content": {"text/event-stream": {"schema": _TEXT}}}},
        )(self.events)
        post(
            "/sessions/{id}/say",
            tags=["speech"],
            status_code=202,
            response_model=models.Said,
            responses={**_BUSY, 200: {"model": models.Said}},
            openapi_extra=_SAY_BODY,
        )(self.say)
        post("/sessions/{id}/persona", tags=["sessions"], status_code=204, responses=_BUSY)(
            self.become
        )
        post("/sessions/{id}/idle", tags=["sessions"], status_code=204, responses=_BUSY)(self.idle)
        post("/sessions/{id}/interrupt", tags=["speech"], status_code=204, responses=_PROBLEM)(
            self.interrupt
        )
        post("/sessions/{id}/pose", tags=["sessions"], status_code=204, responses=_PROBLEM)(
            self.pose
        )
        post("/sessions/{id}/gesture", tags=["sessions"], status_code=204, responses=_PROBLEM)(
            self.gesture
        )
        app.websocket("/sessions/{id}/audio")(self.audio)

    # --- the page ---------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        policy = _policy(self._livekit.origins(_asked_at(request)))
        return FileResponse(
            WEB / "index.html",
            media_type="text/html",
            headers={"content-security-policy": policy, "cache-control": "no-cache"},
        )

    async def docs(self) -> Response:
        # Swagger styles its parts inline and draws icons as data URLs.
        policy = (
            "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
            "style-src 'self' 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(
            (WEB / "docs.html").read_text("utf-8"), headers={"content-security-policy": policy}
        )

    async def icon(self) -> Response:
        return FileResponse(WEB / "favicon.svg", headers={"cache-control": "max-age=86400"})

    async def vendor(self, name: str) -> Response:
        asset = vendor.ASSETS.get(name)
        if asset is None:
            raise HTTPException(404, f"there is no {name!r} here")
        path = await asyncio.to_thread(vendor.ensure, name, self._settings.cache_dir)
        return FileResponse(
            path, media_type=asset.media_type, headers={"cache-control": "max-age=3600"}
        )

    # --- server and personas ----------------------------------------------------------------------

    async def health(self) -> models.Health:
        """The process is up. Needs no token."""
        return models.Health(
            version=__version__,
            uptime=round(time.monotonic() - self._began, 1),
            sessions=len(self._desk),
            max_sessions=self._settings.max_sessions,
            token=bool(self._settings.token),
            queues={one["queue"]: one["broker"] for one in await self.queues()},
        )

    async def queues(self) -> Sequence[dict[str, Any]]:
        """The RabbitMQ queues that sessions speak from: how the broker is, and what was counted."""
        return [tell() for tell in self._desk.queues]

    async def metrics(self) -> Response:
        """Counters and latencies, for Prometheus."""
        return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    async def personas(self) -> list[models.PersonaInfo]:
        """The faces there are."""
        return [_shown(persona) for persona in await self._listed()]

    async def portrait(self, name: str) -> Response:
        """The picture of a persona, or the first of its clip."""
        persona = await self._persona(name)
        if persona.portrait is None:
            raise HTTPException(404, f"persona {name!r} has no portrait")
        path = persona.beside(persona.portrait)
        kind = mimetypes.guess_type(path.name)[0] or ""
        headers = {"cache-control": "max-age=300"}
        if kind.startswith("image/"):
            return FileResponse(path, media_type=kind, headers=headers)
        picture = await asyncio.to_thread(_first_picture, path)
        return Response(picture, media_type="image/jpeg", headers=headers)

    # --- sessions ---------------------------------------------------------------------------------

    async def list(self) -> list[models.Status]:
        """Every open session."""
        return [_status(entry) for entry in self._desk.all()]

    async def open(
        self, request: Request, wish: Annotated[models.Open | None, Body()] = None
    ) -> models.Opened:
        """Open a room with an avatar in it. `url` and `token` let one browser in."""
        wish = wish or models.Open()
        persona = await self._persona(wish.persona)
        voices = _voices(persona, wish.voice)
        id = new_id()
        room = f"voipavatar-{id}"
        access = self._livekit
        follow = Follow(wish.follow) if wish.follow is not None else None
        options = RoomOptions(
            url=access.url,
            api_key=access.api_key,
            api_secret=access.api_secret,
            room=room,
            video=wish.video,
            guests=(follow,) if follow is not None else (),
        )
        entry = await self._desk.open(persona, options, voices, id)
        if follow is not None:
            follow.open_turn = entry.session.open_turn
        entry.voice = wish.voice or _voice_names(persona)[0]
        return models.Opened(
            persona=_shown(persona), voice=entry.voice, **self._ticket(request, entry, room)
        )

    async def status(self, id: str) -> models.Status:
        """State, queue and counters."""
        return _status(self._entry(id))

    async def close(
        self,
        id: str,
        drain: Annotated[
            float, Query(ge=0, le=300, description="seconds for what is being said to finish")
        ] = 0.0,
    ) -> None:
        """Close it; the avatar leaves the room."""
        await self._desk.close(self._entry(id), drain)

    async def ticket(self, id: str, request: Request) -> models.Ticket:
        """A new token for a browser: for a second viewer, or to come back after a break."""
        entry = self._entry(id)
        if entry.room is None:
            raise HTTPException(409, "this session was not opened over HTTP: its room is not ours")
        return models.Ticket(**self._ticket(request, entry, entry.room))

    async def events(self, id: str) -> EventStream:
        """Server-sent events: state, started, progress, caption, finished, error, closed."""
        return EventStream(self._desk, self._entry(id))

    # --- speech -----------------------------------------------------------------------------------

    async def say(
        self,
        id: str,
        request: Request,
        response: Response,
        mode: Annotated[Mode, Query(description="for a sound; a text says it itself")] = "append",
        wait: Annotated[models.Wait, Query(description="answer when it has come so far")] = "no",
    ) -> models.Said:
        """Say a text (JSON), or play a sound (raw or multipart; any file that FFmpeg reads)."""
        entry = self._entry(id)
        if len(entry.pending) >= MAX_PENDING:
            raise HTTPException(
                429,
                f"{MAX_PENDING} utterances are waiting already: let some be said, or replace them",
                headers={"Retry-After": "2"},
            )
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in ("", "application/json"):
            utterance = await self._say_text(entry, await request.body())
        elif kind.startswith(("audio/", "video/")) or kind in (
            "multipart/form-data",
            "application/octet-stream",
        ):
            utterance = await self._play(entry, request, kind, mode)
        else:
            raise HTTPException(
                415, f"{kind} can't be said: send application/json, audio/* or multipart/form-data"
            )
        entry.took(utterance)
        if wait != "no":
            until = utterance.finished if wait == "finished" else utterance.started
            if await _came(request, until):
                response.status_code = 200
        return _said(utterance)

    async def become(self, id: str, wish: models.Become) -> None:
        """Another face on air: same room, same participant, nothing said is lost."""
        entry = self._entry(id)
        await entry.session.swap_persona(await self._persona(wish.persona))
        entry.touch()

    async def pose(self, id: str, wish: models.Pose) -> None:
        """Listen, think, or be at ease, for as long as nothing is said."""
        entry = self._entry(id)
        entry.session.pose(wish.pose)
        entry.touch()

    async def gesture(self, id: str, wish: models.Gesture) -> None:
        """A gesture, now, also in the middle of speech."""
        entry = self._entry(id)
        entry.session.gesture(wish.gesture)
        entry.touch()

    async def idle(self, id: str, wish: models.Idle) -> None:
        """Another of the persona's looks: same face, another picture or clip, or another manner."""
        entry = self._entry(id)
        await entry.session.choose_idle(wish.idle)
        entry.touch()

    async def interrupt(self, id: str) -> None:
        """Be silent now, and forget what was queued."""
        await self._entry(id).session.interrupt()

    async def audio(self, socket: WebSocket, id: str) -> None:
        """Live PCM in; see the description at the top."""
        entry = self._desk.find(id)
        rate, mode = socket.query_params.get("rate", "48000"), socket.query_params.get("mode")
        low, high = RATES
        if entry is None:
            refusal = (404, _no_session(id))
        elif not rate.isdecimal() or not low <= int(rate[:9]) <= high:
            refusal = (422, f"rate must be a whole number of Hz from {low:,} to {high:,}")
        elif mode is not None and mode not in get_args(Mode):
            refusal = (422, f"mode must be one of {', '.join(get_args(Mode))}")
        else:
            await LiveSound(
                socket, self._desk, entry, int(rate), cast(Mode, mode or "append")
            ).run()
            return
        await socket.send_denial_response(JSONResponse({"error": refusal[1]}, refusal[0]))

    # --- shared -----------------------------------------------------------------------------------

    def _entry(self, id: str) -> Entry:
        entry = self._desk.find(id)
        if entry is None:
            raise HTTPException(404, _no_session(id))
        entry.touch()
        return entry

    async def _listed(self) -> Sequence[Persona]:
        return await asyncio.to_thread(self._personas)

    async def _persona(self, name: str) -> Persona:
        personas = await self._listed()
        for persona in personas:
            if persona.name == name:
                return persona
        names = ", ".join(one.name for one in personas) or "none"
        raise HTTPException(404, f"there is no persona {name[:64]!r}; there are: {names}")

    def _ticket(self, request: Request, entry: Entry, room: str) -> dict[str, Any]:
        identity, token, expires = self._livekit.ticket(room)
        return {
            "id": entry.session.id,
            "room": room,
            "url": self._livekit.browser_url(_asked_at(request)),
            "token": token,
            "identity": identity,
            "expires": expires,
        }

    async def _say_text(self, entry: Entry, body: bytes) -> Utterance:
        try:
            wish = models.Say.model_validate_json(body)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False)) from None
        if len(wish.text) > self._settings.max_text:
            raise HTTPException(
                413,
                f"the text has {len(wish.text):,} characters and {self._settings.max_text:,} are "
                "allowed: say it in parts",
            )
        if not wish.text.strip():
            raise InputError("the text is empty: there is nothing to say")
        voices = None if wish.voice is None else _voices(entry.session.persona, wish.voice)
        utterance: Utterance = await entry.session.say(wish.text, mode=wish.mode, voice=voices)
        return utterance

    async def _play(self, entry: Entry, request: Request, kind: str, mode: Mode) -> Utterance:
        data, fields = await read_sound(request, kind)
        if "mode" in fields:
            if fields["mode"] not in get_args(Mode):
                raise HTTPException(422, f"mode must be one of {', '.join(get_args(Mode))}")
            mode = cast(Mode, fields["mode"])
        await check_sound(data)
        utterance: Utterance = await entry.session.play(data, mode=mode)
        return utterance


def _no_session(id: str) -> str:
    return f"there is no session {id[:64]!r}: it may have closed; POST /sessions opens one"


async def _came(request: Request, future: asyncio.Future[Any]) -> bool:
    """Wait until `future` has a result, the client has gone, or the limit has passed."""
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({future, gone}, timeout=WAIT_LIMIT, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    return future.done()


def _said(utterance: Utterance) -> models.Said:
    answer = models.Said(utterance=utterance.id, state="queued")
    if utterance.finished.done():
        played: Played = utterance.finished.result()
        failed = utterance.error is not None and played.heard == 0
        answer.state = "interrupted" if played.interrupted else "failed" if failed else "said"
        answer.heard = round(played.heard, 3)
        answer.error = utterance.error
    elif utterance.started.done():
        answer.state = "speaking"
    return answer


def _status(entry: Entry) -> models.Status:
    session = entry.session
    return models.Status(
        id=session.id,
        persona=session.persona.name,
        voice=entry.voice,
        state=session.state,
        room=entry.room,
        age=round(time.monotonic() - entry.opened, 1),
        watchers=entry.watchers,
        pending=len(entry.pending),
        stage=session.status(),
    )


# --- personas and voices --------------------------------------------------------------------------


def _shown(persona: Persona) -> models.PersonaInfo:
    return models.PersonaInfo(
        name=persona.name,
        title=persona.title or persona.name,
        description=persona.description,
        engine=persona.engine,
        width=persona.width,
        height=persona.height,
        fps=persona.fps,
        greeting=persona.greeting,
        voices=[
            models.VoiceInfo(name=name, label=_label(choice))
            for name, choice in zip(_voice_names(persona), persona.voice, strict=True)
        ],
        idles=["default", *persona.idles],
        portrait=f"/personas/{persona.name}/portrait" if persona.portrait is not None else None,
    )


def _voice_names(persona: Persona) -> list[str]:
    """A name for each voice: what it uses, numbered where a persona has two of a kind."""
    names: list[str] = []
    for choice in persona.voice:
        same = sum(1 for name in names if name.split("#")[0] == choice.use)
        names.append(choice.use if same == 0 else f"{choice.use}#{same + 1}")
    return names


_LABELS = {"piper": "Piper", "espeak": "eSpeak", "edge": "Edge (online)", "pyttsx3": "System"}


def _label(choice: VoiceChoice) -> str:
    label = _LABELS.get(choice.use, choice.use.rsplit(".", 1)[-1])
    which = choice.options.get("voice")
    return f"{label}: {which}" if isinstance(which, str) and "${" not in which else label


def _voices(persona: Persona, wish: str | None) -> list[VoiceChoice]:
    """The persona's voices, the wished one first; the others stand in when it fails.

    Only its own: a voice may be any import path, which isn't for whoever can reach a port.
    """
    names = _voice_names(persona)
    if wish is None:
        return list(persona.voice)
    if wish not in names:
        raise HTTPException(
            404, f"persona {persona.name!r} has no voice {wish[:64]!r}; it has: {', '.join(names)}"
        )
    first = names.index(wish)
    return [persona.voice[first], *persona.voice[:first], *persona.voice[first + 1 :]]


def _first_picture(path: Path) -> bytes:
    import cv2  # heavy: only for a persona that is a clip

    try:
        with av.open(str(path)) as file:
            for frame in file.decode(video=0):
                fine, data = cv2.imencode(".jpg", frame.to_ndarray(format="bgr24"))
                if fine:
                    return bytes(data)
    except (av.FFmpegError, IndexError):
        logger.warning("a portrait can't be read", exc_info=True)
    raise HTTPException(404, "the portrait can't be read")


# --- the page's policy ----------------------------------------------------------------------------


def _asked_at(request: Request) -> str:
    return host_name(request.headers.get("host", ""))


def _policy(livekit: Sequence[str]) -> str:
    connect = " ".join(("'self'", *livekit))
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
        "img-src 'self' blob: data:; media-src 'self' blob:; worker-src 'self' blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
