"""The composition root: persona → engine, voice, stage, sinks. Only this file knows them all.

    async with Studio(settings) as studio:
        session = await studio.open("default", room=RoomOptions(...))
        utterance = await session.say("Hello.")
        played = await utterance.finished

A `Studio` is one process: it owns the renderers (one engine per process and device) and the loaded
voices, shared by all sessions. A `Session` is one avatar on air. The plugin, the worker, the
server, the CLI and Pipecat all go through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from . import metrics
from .config import OWN, Persona, Settings, VoiceChoice, load_persona
from .engines import Avatar, Engine, EngineSession, Progress, Renderer, Spec
from .errors import ConfigError, InputError, StageError, VoipAvatarError
from .media import POSES, Clock, Cue, Int16, ManualClock, Mode, MonotonicClock, Sink
from .stage import Options, Stage, State

if TYPE_CHECKING:
    from livekit.agents import tts

    from .room import RoomOptions, RoomSink

logger = logging.getLogger(__name__)

Event: TypeAlias = dict[str, Any]
Chunk: TypeAlias = tuple[Int16, int, Sequence[Cue]]
SinkFactory: TypeAlias = Callable[[Spec], Sink]

AHEAD = 15.0
"""Seconds of synthesised speech that may wait for being spoken."""
TEXTS = 200
"""Texts that may wait in a session."""
EVENTS = 256
"""Events that may wait for a subscriber; the oldest go first."""


# --- engines --------------------------------------------------------------------------------------


def _viseme(settings: Settings) -> Engine:
    from .engines.viseme import VisemeEngine

    return VisemeEngine(settings=settings)


def _clapper(settings: Settings) -> Engine:
    from .engines.clapper import ClapperEngine

    return ClapperEngine()


def _musetalk(settings: Settings) -> Engine:
    from .engines.musetalk import MuseTalk
    from .facemesh import FaceFinder

    return MuseTalk(settings, finder=FaceFinder(settings))


ENGINES: dict[str, Callable[[Settings], Engine]] = {
    "viseme": _viseme,
    "clapper": _clapper,
    "musetalk": _musetalk,
}
"""A new engine is one new file and one row here."""


# --- utterances -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """How an utterance ended."""

    heard: float
    """Seconds of it that were really played."""
    interrupted: bool


class Utterance:
    """One turn from its owner's side: push sound, end it, and hear how it went.

    `started` and `finished` are futures that always resolve; `started` with None when the
    utterance ended before anything of it was heard.
    """

    def __init__(self, session: Session, text: str = "") -> None:
        self.id = uuid.uuid4().hex[:12]
        self.turn = 0
        self.text = text
        self.started: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self.finished: asyncio.Future[Played] = asyncio.get_running_loop().create_future()
        self.asked: float | None = None
        """Monotonic time at which it was asked for, if nothing was before it."""
        self.error: str | None = None
        self.cause: BaseException | None = None
        """What `error` tells of."""
        self._session = session

    @property
    def done(self) -> bool:
        return self.finished.done()

    @property
    def heard(self) -> float:
        """Seconds of it that were put into frames up to now; what was played, once it is over."""
        if self.finished.done():
            return self.finished.result().heard
        return self._session.stage.played_of(self.turn)

    @property
    def backlog(self) -> float:
        """Seconds of it that came in and were not shown yet."""
        return self._session.stage.backlog_of(self.turn)

    def push(self, pcm: Int16, rate: int, cues: Sequence[Cue] = ()) -> None:
        """int16 mono. After the end of the turn it is dropped; InputError when too much waits."""
        self._session.stage.push(self.turn, pcm, rate, cues)

    def end(self) -> None:
        """All of it was pushed."""
        self._session.stage.end(self.turn)

    def cancel(self) -> None:
        """Forget it, now."""
        self._session.stage.cancel(self.turn)

    async def room(self, seconds: float = AHEAD) -> None:
        """Wait until less than `seconds` of it wait for being spoken, or it is over."""
        stage = self._session.stage
        while not self.done and (behind := stage.backlog_of(self.turn) - seconds) > 0:
            await asyncio.wait([self.finished], timeout=min(max(behind, 0.02), 0.5))


class _Owner:
    """The stage's listener: resolves an utterance's futures and tells the session's subscribers."""

    def __init__(self, session: Session, utterance: Utterance) -> None:
        self._session = session
        self._utterance = utterance

    def started(self, turn: int) -> None:
        one = self._utterance
        if not one.started.done():
            one.started.set_result(time.time())
            if one.asked is not None:
                metrics.FIRST_SOUND.observe(time.monotonic() - one.asked)
            self._session.emit("started", utterance=one.id, text=one.text)

    def finished(self, turn: int, heard: float, interrupted: bool) -> None:
        one = self._utterance
        if not one.started.done():
            one.started.set_result(None)
        if not one.finished.done():
            one.finished.set_result(Played(heard, interrupted))
        outcome = "failed" if one.error else "interrupted" if interrupted else "said"
        metrics.TURNS.labels(outcome).inc()
        metrics.HEARD.inc(heard)
        self._session.emit(
            "finished",
            utterance=one.id,
            heard=round(heard, 3),
            interrupted=interrupted,
            error=one.error,
        )

    def cue(self, turn: int, cue: Cue) -> None:
        kind = "caption" if cue.kind == "word" else "gesture"
        self._session.emit(
            kind, utterance=self._utterance.id, text=cue.text, start=cue.start, end=cue.end
        )


# --- one avatar on air ----------------------------------------------------------------------------


class Session:
    """One avatar on air. Made by `Studio.open`; methods that don't say so return at once."""

    def __init__(
        self,
        name: str,
        persona: Persona,
        stage: Stage,
        studio: Studio,
        voices: tuple[VoiceChoice, ...],
        room: RoomSink | None,
    ) -> None:
        self.id = name
        self.persona = persona
        self.idle = OWN
        """The name of the look that it has now, out of the persona's `idles`."""
        self.stage = stage
        self.room = room
        self.opened = time.time()
        self.touched = time.monotonic()
        """When it was last fed; for closing what nobody uses."""
        self._studio = studio
        self._voices = voices
        self._run: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._warm: asyncio.Task[None] | None = None
        self._texts: dict[int, tuple[Utterance, str, tuple[VoiceChoice, ...]]] = {}
        self._fillers: dict[int, asyncio.Task[None]] = {}
        self._utterances: dict[int, Utterance] = {}
        self._subscribers: set[_Subscriber] = set()
        self._closing: asyncio.Task[None] | None = None
        self._draining = False
        self._swapping = asyncio.Lock()
        self.closed = asyncio.Event()
        self.failure: str | None = None

    # -- speech ------------------------------------------------------------------------------------

    async def say(
        self, text: str, *, mode: Mode = "append", voice: Sequence[VoiceChoice] | None = None
    ) -> Utterance:
        """Speak a text, sentence by sentence as it is synthesised.

        Raises InputError for a text that is too long or when too many wait; a voice that fails
        is told by an "error" event and by `utterance.error`.
        """
        limit = self._studio.settings.max_text
        if len(text) > limit:
            raise InputError(f"a text of {len(text):,} characters is too long: {limit:,} is most")
        if len(self._texts) >= TEXTS:
            raise InputError(f"{TEXTS} texts are waiting already: send more when some were spoken")
        utterance = self.open_turn(mode, text=text)
        self._texts[utterance.turn] = (utterance, text, tuple(voice or self._voices))
        self._synthesise_next()
        return utterance

    async def play(self, source: Path | bytes, *, mode: Mode = "append") -> Utterance:
        """Speak a sound: any file that PyAV reads. InputError when it can't be read."""
        from .sources import decode_audio

        pieces = decode_audio(source)
        first = await asyncio.to_thread(next, pieces, None)
        utterance = self.open_turn(mode)
        self._fill(utterance, _decoded(first, pieces))
        return utterance

    def open_turn(self, mode: Mode = "append", *, text: str = "") -> Utterance:
        """A turn that the caller pushes sound into."""
        if self._draining:
            raise StageError("the session is closing: open a new one")
        self.touched = time.monotonic()
        utterance = Utterance(self, text)
        utterance.asked = None if self._utterances else time.monotonic()
        utterance.turn = self.stage.begin(_Owner(self, utterance), mode)
        self._utterances[utterance.turn] = utterance
        utterance.finished.add_done_callback(lambda _: self._over(utterance))
        return utterance

    async def interrupt(self) -> int:
        """Stop speaking, and forget what waits; how many turns that were."""
        self.touched = time.monotonic()
        return self.stage.interrupt()

    async def swap_persona(self, persona: Persona | str) -> None:
        """Become another persona on air: same room, same participant, nothing said is lost.

        Its picture is prepared at this session's size and rate, and shown from one frame to the
        next. Raises what `Studio.open` raises; the session goes on as it was then.
        """
        if self._draining:
            raise StageError("the session is closing: open a new one")
        self.touched = time.monotonic()
        async with self._swapping:
            self.persona = await self._studio.swap(self, persona)
            self.idle = OWN
        self._voices = self.persona.voice
        if self._warm is not None and not self._draining:
            self._warm.cancel()
            await asyncio.gather(self._warm, return_exceptions=True)
            self._warm = asyncio.create_task(self._warming(), name=f"warm-{self.id}")
        self.emit("persona", persona=self.persona.name)

    async def choose_idle(self, name: str) -> None:
        """Take on another of the persona's looks, now; "default" is its own. Or a pose, by name.

        Nothing said is lost, and it goes on speaking in that look. Raises InputError when the
        persona has none so called, and what `Studio.open` does: it goes on as it was then.
        """
        if self._draining:
            raise StageError("the session is closing: open a new one")
        self.touched = time.monotonic()
        if name and name in POSES and name not in self.persona.idles:
            self.stage.pose(name)
            self.emit("idle", idle=name)
            return
        async with self._swapping:
            look = self.persona.look(name)
            if name != self.idle:
                await self._studio.swap(self, look)
                self.idle = name
        if name == OWN:
            self.stage.pose("")
        self.emit("idle", idle=name)

    def pause(self) -> None:
        """Hold speech, with the mouth shut, until `resume`. Idempotent."""
        self.touched = time.monotonic()
        self.stage.pause()

    def resume(self) -> None:
        """Go on with the word that was held. Idempotent."""
        self.touched = time.monotonic()
        self.stage.resume()

    def pose(self, name: str) -> None:
        """How the face is held while it doesn't speak: "attentive" while the other may speak,
        "listening" while they do, "thinking" while an answer is looked for, "" as it likes.

        It stays until another is asked for; speech goes before it, and ends a "thinking".
        Raises InputError for another name.
        """
        self.touched = time.monotonic()
        self.stage.pose(name)

    def gesture(self, name: str) -> None:
        """A nod, smile, shake, wink, tilt, brows or blink, now. InputError when there is none."""
        self.touched = time.monotonic()
        self.stage.gesture(name)

    def choose_voice(self, name: str | None) -> None:
        """Speak with this one of the persona's voices from the next text on; None is its first.

        The others stand in when it fails. Raises InputError when the persona has none so called.
        """
        self._voices = self.persona.voices(name)

    def _over(self, utterance: Utterance) -> None:
        self._utterances.pop(utterance.turn, None)
        self._texts.pop(utterance.turn, None)
        task = self._fillers.get(utterance.turn)
        if task is not None:
            task.cancel()
        self._synthesise_next()

    def _synthesise_next(self) -> None:
        """Synthesise what is spoken next, and the one after it while that is being spoken."""
        for turn in [turn for turn in self.stage.waiting() if turn in self._texts][:2]:
            if turn not in self._fillers:
                utterance, text, voices = self._texts[turn]
                self._fill(utterance, self._spoken(text, voices))

    def _fill(self, utterance: Utterance, chunks: AsyncGenerator[Chunk, None]) -> None:
        turn = utterance.turn
        task = asyncio.create_task(self._filling(utterance, chunks), name="session-fill")
        self._fillers[turn] = task

        def filled(_: asyncio.Task[None]) -> None:
            self._fillers.pop(turn, None)
            self._texts.pop(turn, None)
            if not self._draining:
                self._synthesise_next()

        task.add_done_callback(filled)

    async def _filling(self, utterance: Utterance, chunks: AsyncGenerator[Chunk, None]) -> None:
        try:
            async with contextlib.aclosing(chunks):
                async for pcm, rate, cues in chunks:
                    utterance.push(pcm, rate, cues)
                    await utterance.room()
        except Exception as error:  # a voice is a plug-in: the turn ends with what there is
            utterance.error, utterance.cause = _told(error), error
            logger.warning("speech could not be had", extra={"error": type(error).__name__})
            self.emit("error", utterance=utterance.id, error=utterance.error)
        utterance.end()

    async def _spoken(
        self, text: str, voices: tuple[VoiceChoice, ...]
    ) -> AsyncGenerator[Chunk, None]:
        from .speech import speak

        voice = await self._studio.voice(voices)
        async with contextlib.aclosing(speak(voice, text)) as chunks:
            async for chunk in chunks:
                yield chunk.pcm, chunk.rate, chunk.cues

    # -- what others see ---------------------------------------------------------------------------

    @property
    def state(self) -> str:
        return self.stage.state.value

    def status(self) -> dict[str, Any]:
        """State, queue and counters, ready for JSON."""
        stage, counters = self.stage, self.stage.counters
        spec = stage.engine.spec
        room = self.room
        waiting = stage.waiting()
        return {
            "id": self.id,
            "persona": self.persona.name,
            "idle": self.idle,
            "engine": self.persona.engine,
            "state": self.state,
            "paused": self.stage.paused,
            "opened": self.opened,
            "picture": {"width": spec.width, "height": spec.height, "fps": spec.fps},
            "queue": [
                {
                    "utterance": self._utterances[turn].id,
                    "backlog": round(stage.backlog_of(turn), 3),
                }
                for turn in waiting
                if turn in self._utterances
            ],
            "latency": {
                "sink": round(stage.sinks[0].latency, 3) if stage.sinks else 0.0,
                "lookahead": spec.lookahead / 16_000,
            },
            "counters": {name: getattr(counters, name) for name in counters.__slots__},
            "room": None
            if room is None
            else {
                "name": room.options.room,
                "connected": room.connected,
                "underruns": room.underruns,
                "dropped": room.dropped,
                "ended": room.ended,
            },
            "failure": self.failure,
        }

    def add_sink(self, make: SinkFactory) -> Sink:
        """Another output, from the next frame on. Closed with the session, or by `remove_sink`."""
        if self._draining:
            raise StageError("the session is closing: open a new one")
        sink = make(self.stage.engine.spec)
        self.stage.sinks.append(sink)
        return sink

    async def remove_sink(self, sink: Sink) -> None:
        """Take an output off and close it. Of one that is not there, nothing happens."""
        if sink in self.stage.sinks:
            self.stage.sinks.remove(sink)
            await sink.aclose()

    def emit(self, kind: str, **fields: Any) -> None:
        """Tell every subscriber; None fields are left out."""
        event: Event = {"type": kind, "session": self.id, "at": time.time()}
        event.update({name: value for name, value in fields.items() if value is not None})
        for subscriber in self._subscribers:
            subscriber.put(event)

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens from now on, until the session closes. Ends with a "closed" event."""
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        try:
            if self.closed.is_set():
                return
            yield {
                "type": "state",
                "session": self.id,
                "at": time.time(),
                "state": self.state,
                "room": self.room.connected if self.room is not None else None,
            }
            while True:
                event = await subscriber.get()
                yield event
                if event["type"] == "closed":
                    return
        finally:
            self._subscribers.discard(subscriber)

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Put the stage on air. Called by the studio."""
        self._run = asyncio.create_task(self.stage.run(), name=f"stage-{self.id}")
        self._warm = asyncio.create_task(self._warming(), name=f"warm-{self.id}")
        self._watch = asyncio.create_task(self._watching(self._run), name=f"watch-{self.id}")

    @property
    def closing(self) -> bool:
        """Whether it is about to be gone, or is: by `aclose`, a failure, or the room's end."""
        return self._closing is not None

    async def aclose(self, drain: float = 0.0) -> None:
        """Stop. With `drain`, what is being spoken may go on for so many seconds. Idempotent."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(drain), name=f"close-{self.id}")
        await asyncio.shield(self._closing)

    async def _close(self, drain: float) -> None:
        self._draining = True
        waiting = [one.finished for one in self._utterances.values()]
        if waiting and drain > 0:
            await asyncio.wait(waiting, timeout=drain)
        self.stage.close()
        own = (self._watch, self._warm, self._run, *self._fillers.values())
        tasks = [task for task in own if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sink in self.stage.sinks:
            try:
                await sink.aclose()
            except VoipAvatarError as error:
                self.failure = self.failure or str(error)
                self.emit("error", error=str(error))
        self._studio.forget(self)
        self.emit("closed", error=self.failure)
        self.closed.set()

    async def _warming(self) -> None:
        """Load the voice now, so that the first sentence needn't wait for it."""
        try:
            await self._studio.voice(self._voices)
        except Exception as error:  # whoever speaks first is told; sound needs no voice
            logger.warning("the voice is not there", extra={"error": type(error).__name__})

    async def _watching(self, run: asyncio.Task[None]) -> None:
        """A stage that fails is told, never silently gone."""
        await asyncio.wait([run])
        if not run.cancelled() and run.exception() is not None:
            self.failure = _told(run.exception())
            logger.error("a stage failed", exc_info=run.exception())
            self._closing = self._closing or asyncio.create_task(
                self._close(0.0), name=f"close-{self.id}"
            )

    def room_state(self, state: str) -> None:
        """Called by the room sink."""
        self.emit("room", state=state)
        if state == "ended" and self._closing is None:
            self.failure = f"the avatar left the room: {self.room.ended if self.room else ''}"
            self._closing = asyncio.create_task(self._close(0.0), name=f"close-{self.id}")


async def _decoded(
    first: tuple[Int16, int] | None, pieces: Iterator[tuple[Int16, int]]
) -> AsyncGenerator[Chunk, None]:
    piece = first
    while piece is not None:
        yield *piece, ()
        piece = await asyncio.to_thread(next, pieces, None)


class _Subscriber:
    """A bounded queue of events; when it is full the oldest goes, and that is told."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._there = asyncio.Event()
        self._lost = 0

    def put(self, event: Event) -> None:
        if len(self._events) >= EVENTS:
            self._events.popleft()
            self._lost += 1
        self._events.append(event)
        self._there.set()

    async def get(self) -> Event:
        while not self._events:
            self._there.clear()
            await self._there.wait()
        event = self._events.popleft()
        if self._lost:
            event, self._lost = {**event, "lost": self._lost}, 0
        return event


def _told(error: BaseException | None) -> str:
    return str(error) if isinstance(error, VoipAvatarError) else f"{type(error).__name__}: {error}"


# --- one process ----------------------------------------------------------------------------------


class Studio:
    """One process: renderers and voices, shared by all its sessions."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings.from_env()
        self.sessions: dict[str, Session] = {}
        self.on_open: list[Callable[[Session], None]] = []
        """Called with every session that went on air; must return at once."""
        self.queues: list[Callable[[], dict[str, Any]]] = []
        """What health tells of each queue that sessions speak from; whoever feeds them adds it."""
        self._renderers: dict[str, Renderer] = {}
        self._voices: dict[str, asyncio.Task[tts.TTS[Any]]] = {}
        self._rented: dict[str, Renderer] = {}
        self._lock = asyncio.Lock()
        self._preparing: dict[str, asyncio.Lock] = {}
        self._closed = False

    async def __aenter__(self) -> Studio:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def open(
        self,
        persona: Persona | str,
        *,
        room: RoomOptions | None = None,
        sinks: Sequence[SinkFactory] = (),
        voice: Sequence[VoiceChoice] | None = None,
        id: str | None = None,
        clock: Clock | None = None,
        options: Options | None = None,
        progress: Progress | None = None,
    ) -> Session:
        """Put an avatar on air. A failure, or being cancelled, leaves nothing behind.

        Raises ConfigError, AvatarError, EngineError, CapacityError or TransportError.
        """
        if self._closed:
            raise StageError("the studio is closed")
        if isinstance(persona, str):
            persona = load_persona(persona, self.settings)
        if room is not None:
            room = dataclasses.replace(
                room, video=room.video.over(persona.video), name=room.name or persona.title
            )
        name = id or uuid.uuid4().hex[:12]
        if name in self.sessions:
            raise ConfigError(f"there is a session {name!r} already")
        async with contextlib.AsyncExitStack() as undo:
            renderer = await self.renderer(persona.engine)
            avatar = await self.prepare(persona, progress)
            for look in persona.idles:  # on air they are wanted at once
                await self.prepare(persona.look(look), progress)
            engine = await renderer.open(avatar)
            undo.callback(renderer.release)
            session = await self._compose(
                undo, name, persona, engine, renderer, room, sinks, voice, clock, options
            )
            if self._closed:  # meanwhile: nobody else would close this one
                raise StageError("the studio is closed")
            undo.pop_all()
        self._rented[name] = renderer
        self.sessions[name] = session
        session.start()
        for tell in self.on_open:
            tell(session)
        return session

    async def _compose(
        self,
        undo: contextlib.AsyncExitStack,
        name: str,
        persona: Persona,
        engine: EngineSession,
        renderer: Renderer,
        room: RoomOptions | None,
        sinks: Sequence[SinkFactory],
        voice: Sequence[VoiceChoice] | None,
        clock: Clock | None,
        options: Options | None,
    ) -> Session:
        spec = engine.spec
        session: Session | None = None

        def on_state(state: State) -> None:
            if session is not None:
                session.emit("state", state=state.value)

        def on_room(state: str) -> None:
            if session is not None:
                session.room_state(state)

        made: list[Sink] = []
        room_sink: RoomSink | None = None
        if room is not None:
            from .room import RoomSink

            room_sink = RoomSink(room, spec.width, spec.height, spec.fps, on_room)
            made.append(room_sink)
            undo.push_async_callback(room_sink.aclose)
        for make in sinks:
            sink = make(spec)
            made.append(sink)
            undo.push_async_callback(sink.aclose)
        stage = Stage(engine, renderer.submit, clock or MonotonicClock(), made, options, on_state)
        undo.callback(stage.close)
        voices = tuple(voice or persona.voice)
        first: list[Awaitable[Any]] = [stage.prime()]
        if room_sink is not None:
            first.append(room_sink.start())
        await _all(first)
        session = Session(name, persona, stage, self, voices, room_sink)
        return session

    async def swap(self, session: Session, persona: Persona | str) -> Persona:
        """Put another persona in a session's place; what it is now. Called by the session."""
        if isinstance(persona, str):
            persona = load_persona(persona, self.settings)
        spec = session.stage.engine.spec
        persona = persona.sized(spec)
        renderer = await self.renderer(persona.engine)
        engine = await renderer.open(await self.prepare(persona))
        try:
            # Drawn once before it is seen, so that its first picture isn't a slow one.
            await renderer.call(lambda one: one.render(engine.idle(1)))
            session.stage.swap(engine, renderer.submit)
        except BaseException:
            renderer.release()
            raise
        before = self._rented.get(session.id)
        self._rented[session.id] = renderer
        if before is not None:
            before.release()
        return persona

    async def renderer(self, engine: str) -> Renderer:
        """The process's renderer of an engine, made at the first call."""
        if engine not in ENGINES:
            raise ConfigError(f"there is no engine {engine!r}; there are: {', '.join(ENGINES)}")
        async with self._lock:
            renderer = self._renderers.get(engine)
            if renderer is None:
                renderer = Renderer(lambda: ENGINES[engine](self.settings), engine)
                try:
                    await renderer.start()
                except BaseException:
                    await renderer.aclose()
                    raise
                self._renderers[engine] = renderer
            return renderer

    async def prepare(self, persona: Persona, progress: Progress | None = None) -> Avatar:
        """The persona's avatar, from the cache or made now. Idempotent."""
        renderer = await self.renderer(persona.engine)
        info = await renderer.start()
        source = persona.beside(persona.portrait) if persona.portrait else Path()
        options = persona.engine_settings()
        key = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
        if source.is_file():
            from .avatar import known_digest

            key.update((await asyncio.to_thread(known_digest, source)).encode())
        folder = f"{info.name}-v{info.version}"
        target = self.settings.cache_dir / "avatars" / folder / key.hexdigest()[:24]
        lock = self._preparing.setdefault(str(target), asyncio.Lock())
        async with lock:
            return await renderer.prepare(source, target, options, progress or _quiet)

    async def probe(self, persona: Persona) -> None:
        """Draw a few pictures that nobody sees: an engine that was failing is well again then, and
        the first room's pictures are no slower than the next ones'.

        Raises what the engine raises.
        """
        renderer = await self.renderer(persona.engine)
        await renderer.probe(await self.prepare(persona))

    async def mend(self) -> None:
        """Try every engine that is failing: with no session open nothing else would draw.

        Raises what the engine raises.
        """
        for renderer in list(self._renderers.values()):
            await renderer.mend()

    async def voice(self, choices: Sequence[VoiceChoice]) -> tts.TTS[Any]:
        """The voice of these choices, loaded once. ConfigError when none of them is there."""
        key = json.dumps([choice.model_dump() for choice in choices], sort_keys=True)
        task = self._voices.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._make_voice(choices), name="studio-voice")
            self._voices[key] = task
        # Whoever asked may leave; the voice is made all the same, and closed with the studio.
        return await asyncio.shield(task)

    async def _make_voice(self, choices: Sequence[VoiceChoice]) -> tts.TTS[Any]:
        def make() -> tts.TTS[Any]:
            from .speech import make_voice  # takes a while by itself: not on a loop that is on air

            return make_voice(choices, self.settings)

        voice = await asyncio.to_thread(make)
        voice.prewarm()
        return voice

    def forget(self, session: Session) -> None:
        """Called by a session that closed."""
        self.sessions.pop(session.id, None)
        renderer = self._rented.pop(session.id, None)
        if renderer is not None:
            renderer.release()

    def health(self) -> dict[str, Any]:
        """Whether new sessions can be opened, and how the engines fare."""
        engines = {
            name: {
                **one.stats(),
                "failure": _told(one.failure) if one.failure is not None else None,
            }
            for name, one in self._renderers.items()
        }
        failing = [name for name, one in self._renderers.items() if one.failure is not None]
        return {
            "status": "failing" if failing else "ok",
            "sessions": len(self.sessions),
            "engines": engines,
            "queues": [tell() for tell in self.queues],
        }

    async def aclose(self, drain: float = 0.0) -> None:
        """Close the sessions, then voices, then engines. Idempotent."""
        self._closed = True
        await asyncio.gather(*(one.aclose(drain) for one in list(self.sessions.values())))
        voices, self._voices = self._voices, {}
        for made in await asyncio.gather(*voices.values(), return_exceptions=True):
            if not isinstance(made, BaseException):  # those were told to who asked for them
                await made.aclose()
        renderers, self._renderers = self._renderers, {}
        for renderer in renderers.values():
            await renderer.aclose()


def _quiet(what: str, share: float) -> None:
    """Progress that nobody watches."""


async def _all(work: Sequence[Awaitable[Any]]) -> None:
    """Await all; at the first failure the others are cancelled and awaited."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- one clip -------------------------------------------------------------------------------------


async def render(
    persona: Persona | str,
    out: Path,
    *,
    text: str | None = None,
    audio: Path | None = None,
    voice: Sequence[VoiceChoice] | None = None,
    settings: Settings | None = None,
    lead: float = 0.4,
    tail: float = 0.8,
    progress: Callable[[float, float], None] | None = None,
) -> float:
    """A clip of a text or a sound: the same stage on a clock that doesn't wait.

    `lead` and `tail` are seconds of idle before and after. `progress` hears seconds made and
    seconds known so far. Gives the clip's length in seconds; raises what `Studio.open` and
    `Session.say` raise, and InputError when no speech came out.
    """
    from .sinks import FileSink

    if (text is None) == (audio is None):
        raise ConfigError("a clip takes either a text or a sound")
    async with Studio(settings) as studio:
        files: list[FileSink] = []

        def file(spec: Spec) -> Sink:
            files.append(FileSink(out, spec.width, spec.height, spec.fps, lossless=True))
            return files[0]

        session = await studio.open(
            persona,
            sinks=[file],
            voice=voice,
            clock=ManualClock(),
            options=Options(patient=True, hold=1 << 30),
        )
        stage, fps = session.stage, session.stage.fps

        async def until(index: int) -> None:
            while stage.index < index:
                await _progressed(session, stage.index)

        await until(round(lead * fps))
        if text is not None:
            utterance = await session.say(text)
        else:
            assert audio is not None
            utterance = await session.play(audio)
        while not utterance.done:
            if progress is not None:
                progress(stage.index / fps, stage.index / fps + stage.backlog + tail)
            await _progressed(session, stage.index)
        played = utterance.finished.result()
        if utterance.error is not None:
            await session.aclose()
            raise InputError(f"no clip was made: {utterance.error}")
        if played.heard == 0:
            raise InputError("no clip was made: there is nothing to say in it")
        await until(stage.index + round(tail * fps))
        await session.aclose()
        length = stage.index / fps
        if session.failure is not None:
            raise VoipAvatarError(session.failure)
        if progress is not None:
            progress(length, length)
        return length


async def _progressed(session: Session, index: int) -> None:
    """Until the stage has gone on from `index`, or has failed."""
    while session.stage.index == index:
        if session.closed.is_set():
            raise VoipAvatarError(session.failure or "the session ended before the clip was done")
        await asyncio.sleep(0.002)
