"""`voipavatar worker`: a machine that takes avatars for rooms as LiveKit dispatches them.

One process, one event loop, one engine for all its rooms. livekit-agents keeps the connection to
the server and a thread for each job; the job's work, the avatar, runs on the loop of `Worker.run`.
Several workers under one name share the load, and nothing else is needed to scale out.
A persona with an `agent` section is a whole conversation: see `conversation`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web
from livekit import api, rtc
from livekit.agents import AgentServer, JobContext, JobExecutorType, JobRequest
from livekit.agents.types import ATTRIBUTE_PUBLISH_ON_BEHALF
from pydantic import ValidationError

from . import metrics
from .agentstream import DISPATCH, AgentStream
from .bridge import FarStudio
from .config import Persona, Settings, Video, first_mistake, list_personas, load_persona
from .conversation import Conversation, Place
from .errors import CapacityError, ConfigError, TransportError, VoipAvatarError
from .feed import fed, options_for, queue_of
from .follow import Follow
from .parts import rehearse
from .plugin import AGENT_NAME, ANSWER, IDENTITY, assigned
from .rabbitmq import QueueFeed
from .room import RoomOptions
from .session import Session, Studio
from .waiting import within

logger = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds that an avatar waits in a room for its agent to come (back)."""
ENCODING = 0.2
"""Cores that encoding one room's picture and sound take, for reckoning the capacity."""
_NAMES = ("LIVEKIT_AGENT_NAME_OVERRIDE", "LIVEKIT_AGENT_NAME")
FAREWELL = 2.0
"""Seconds for what is being said when an avatar leaves."""
FULL = 0.6
"""The load that a full worker reports. From 0.7 on (`agents.target_load`, pkg/agent/config.go of
LiveKit's server) a request isn't even offered to it, and who asked would hear nothing."""
ASKED = 3
"""Times that another worker is asked for: a server that is busy drops a request in silence."""
PROBE = 5.0
"""Seconds between two attempts to draw with an engine that is failing."""
AWAY = 5.0
"""Seconds without the LiveKit server after which /health tells it. A restart may take less."""


@dataclass(frozen=True)
class Order:
    """What a dispatch asks for: its metadata, a JSON object or nothing."""

    persona: str = ""
    """Name of one that the worker knows; the first that it was started with when empty."""
    agent: str = ""
    """Identity that the avatar speaks for. Without it a persona with an `agent` section holds the
    conversation itself, and any other is the face of the first agent in the room."""
    follow: str = ""
    """Identity of a participant whose audio track the avatar says, instead of an agent's speech."""
    queue: str = ""
    """A RabbitMQ queue that the avatar speaks from as well; the persona's own when empty."""
    identity: str = IDENTITY
    name: str = ""
    video: Video = Video()
    """How the picture is coded; what isn't given is the persona's."""
    request: str = field(default="", compare=False)

    @classmethod
    def parse(cls, metadata: str) -> Order:
        """Raises ConfigError for what is no order."""
        if not metadata.strip():
            return cls()
        try:
            data = json.loads(metadata)
        except ValueError:
            raise ConfigError("the dispatch's metadata is not JSON") from None
        if not isinstance(data, dict):
            raise ConfigError("the dispatch's metadata must be a JSON object")
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        if unknown := sorted(set(data) - set(known)):
            raise ConfigError(f"unknown in the dispatch's metadata: {', '.join(unknown)}")
        video = known.pop("video", {})
        if not all(isinstance(value, str) for value in known.values()):
            raise ConfigError("everything in the dispatch's metadata but video must be a string")
        known = {name: value for name, value in known.items() if value}
        try:
            return cls(**known, video=Video.model_validate(video))
        except ValidationError as error:
            where, what = first_mistake(error)
            place = f"video.{where}" if where else "video"
            raise ConfigError(f"{place} in the dispatch's metadata: {what}") from None


class Worker:
    """One worker process. `run` returns when it was cancelled and has drained."""

    def __init__(
        self,
        settings: Settings,
        *,
        agent_name: str = AGENT_NAME,
        capacity: int | None = None,
        personas: Sequence[str] = ("default",),
        host: str = "127.0.0.1",
        port: int = 0,
        drain: float = 3600.0,
        grace: float = GRACE,
        every_room: bool = False,
        ready: Callable[[str], None] | None = None,
    ) -> None:
        for name in ("livekit_url", "livekit_api_key", "livekit_api_secret"):
            if not getattr(settings, name):
                raise ConfigError(f"a worker needs a LiveKit server: set {name.upper()}")
        named = [name for name in _NAMES if every_room and os.environ.get(name)]
        if named:  # livekit-agents takes it from there, whatever it is told
            raise ConfigError(f"every room and a name don't go together: unset {named[0]}")
        self.settings = settings
        self.agent_name = "" if every_room else agent_name
        """Empty: LiveKit sends every room that is made."""
        self.capacity = capacity or 0
        """Rooms at once; measured when the worker starts unless it was given."""
        self.refused = 0
        self.url = ""
        """Where /health and /metrics are."""
        self._personas = personas
        self._host, self._port = host, port
        self._drain = drain
        self._grace = grace
        self._ready = ready
        self._studio: Studio | None = None
        self._server: AgentServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taken: dict[str, float] = {}  # job id: when it was accepted
        self._conversations: dict[str, Conversation] = {}  # by job id
        self._rehearsed: set[str] = set()  # agents of personas, as their YAML was
        self._draining = False
        self._reached: float | None = None  # when the LiveKit server was last connected
        self._api: api.LiveKitAPI | None = None
        self._telling: set[asyncio.Task[None]] = set()

    # -- life --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled; then take nothing more, let rooms end, and stop."""
        self._loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as undo:
            studio = await undo.enter_async_context(Studio(self.settings))
            self._studio = studio
            for name in self._personas:
                persona = load_persona(name, self.settings)
                for look in persona.idles:
                    await studio.prepare(persona.look(look))
                await studio.probe(persona)  # what is slow the first time is done before a room
                await self._rehearse(persona)
            if not self.agent_name and self._persona("").agent is None:
                raise ConfigError(
                    "every room wants somebody who talks: give a --persona with an agent section"
                )
            await self._rehearse_others()
            if not self.capacity:
                self.capacity = await _measure(studio, self._personas[0])
            server = self._server = _Server(
                self._end,
                job_executor_type=JobExecutorType.THREAD,
                load_fnc=self._load,
                load_threshold=float("inf"),  # `_request` decides, and passes on what is too much
                num_idle_processes=min(2, self.capacity),
                drain_timeout=int(self._drain),
                ws_url=self.settings.livekit_url,
                api_key=self.settings.livekit_api_key,
                api_secret=self.settings.livekit_api_secret,
                host="127.0.0.1",
                port=0,
            )
            server.rtc_session(agent_name=self.agent_name, on_request=self._request)(self._entry)
            self._api = await undo.enter_async_context(
                api.LiveKitAPI(
                    self.settings.livekit_url,
                    self.settings.livekit_api_key,
                    self.settings.livekit_api_secret,
                    timeout=aiohttp.ClientTimeout(total=5.0),
                )
            )
            undo.push_async_callback(self._told)
            await self._listen(undo)
            mending = asyncio.create_task(self._mend(studio), name="worker-mend")
            undo.push_async_callback(_ended, mending)
            looking = asyncio.create_task(self._look(server), name="worker-look")
            undo.push_async_callback(_ended, looking)
            serving = asyncio.create_task(server.run(), name="worker-server")
            try:
                server.on("worker_registered", lambda *_: self._registered())
                await asyncio.shield(serving)
            except asyncio.CancelledError:
                await self._leave(server)
                await asyncio.gather(serving, return_exceptions=True)
                raise
            except RuntimeError as error:  # livekit-agents gives up after some two minutes
                raise TransportError(
                    f"the worker can't register at {self.settings.livekit_url}: {error}. Is the "
                    "server running, and are LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET "
                    "the server's?"
                ) from None
            finally:
                await server.aclose()

    def _registered(self) -> None:
        logger.info("registered", extra={"capacity": self.capacity})
        self._reached = time.monotonic()
        if self._ready is not None:
            self._ready(self.url)

    async def _leave(self, server: AgentServer) -> None:
        self._draining = True
        try:
            # It takes whole seconds, and 0 for no limit.
            await within(server.drain(timeout=None), self._drain)
        except asyncio.TimeoutError:
            logger.warning("rooms were still open when the time to drain was over")
            for job in list(self._taken):
                self._end(job)
        await server.aclose()

    def _end(self, job: str) -> None:
        """Let a room's avatar say what it is saying, and leave. livekit-agents by itself waits for
        it, and breaks off after a quarter of a minute."""
        conversation = self._conversations.get(job)
        if conversation is not None:
            conversation.end()
        session = self._studio.sessions.get(job) if self._studio is not None else None
        if conversation is None and session is not None:
            task = asyncio.create_task(session.aclose(FAREWELL), name="worker-end")
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _look(self, server: AgentServer) -> None:
        """Note when the LiveKit server was last connected: of losing it livekit-agents has no
        event."""
        while True:
            if self._reached is not None and not getattr(server, "_connecting", False):
                self._reached = time.monotonic()
            await asyncio.sleep(0.25)

    async def _mend(self, studio: Studio) -> None:
        """An engine that fails is tried again: with no room open nothing else would draw."""
        while True:
            await asyncio.sleep(PROBE)
            if studio.health()["status"] == "ok":
                continue
            try:
                await studio.mend()
                logger.info("the engine draws again")
            except Exception as error:  # an engine is a plug-in; /health goes on telling
                logger.info("the engine still fails", extra={"error": type(error).__name__})

    # -- personas ----------------------------------------------------------------------------------

    def _persona(self, name: str) -> Persona:
        """As its YAML is now: by name, also of a file that the worker was started with."""
        if not name:
            return load_persona(self._personas[0], self.settings)
        for given in self._personas:
            if given.endswith((".yaml", ".yml")):
                persona = load_persona(given, self.settings)
                if persona.name == name:
                    return persona
        return load_persona(name, self.settings)

    async def _rehearse(self, persona: Persona) -> None:
        """Make its agent once, so that a mistake is told now. ConfigError when it can't be."""
        if persona.agent is None:
            return
        if persona.queue is not None:
            raise ConfigError(
                f"persona {persona.name!r} holds a conversation (agent) and would speak from the "
                f"queue {persona.queue!r} too: a worker does one of both. Remove one of them, or "
                'ask for its face alone with {"queue": ...} in a dispatch'
            )
        key = repr((persona.path, persona.agent, persona.voice))
        if key not in self._rehearsed:
            await rehearse(persona, self.settings)
            self._rehearsed.add(key)

    async def _rehearse_others(self) -> None:
        """The personas that may be asked for: the first import of a plugin is best made now."""
        try:
            others = list_personas(self.settings)
        except ConfigError as error:
            logger.warning("a persona can't be used", extra={"error": str(error)})
            return
        for persona in others:
            try:
                await self._rehearse(persona)
            except ConfigError as error:
                logger.warning("a persona's agent can't be used", extra={"error": str(error)})

    # -- who gets in -------------------------------------------------------------------------------

    def _load(self, server: AgentServer) -> float:
        return FULL * min(1.0, len(self._taken) / max(1, self.capacity))

    def refusal(self) -> str | None:
        """Why no further room is taken now."""
        if self._draining:
            return "draining"
        if len(self._taken) >= self.capacity:
            return f"full ({len(self._taken)} of {self.capacity} rooms)"
        if self._studio is None or self._studio.health()["status"] != "ok":
            return "the engine is failing"
        return None

    def _tell(self, room: str, order: Order, state: str, reason: str = "") -> None:
        """Let who asked know what became of it: the LiveKit server doesn't."""
        if not order.request or self._api is None:
            return
        news = {"request": order.request, "state": state, "reason": reason}
        packet = api.SendDataRequest(
            room=room,
            data=json.dumps(news).encode(),
            topic=DISPATCH,
            destination_identities=[order.agent] if order.agent else [],
        )
        task = asyncio.create_task(self._send(packet), name="worker-tell")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _send(self, packet: api.SendDataRequest) -> None:
        assert self._api is not None
        try:
            await self._api.room.send_data(packet)
        except (api.TwirpError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            # Whoever asked has a time limit of its own.
            logger.info("who asked was not told", extra={"error": type(error).__name__})

    async def _told(self) -> None:
        if self._telling:
            await asyncio.wait(self._telling, timeout=5.0)

    async def _request(self, request: JobRequest) -> None:
        """Take a room, or pass it on to another worker."""
        reason = self.refusal()
        order, persona, talks = Order(), None, False
        try:
            order = Order.parse(request.job.metadata)
            persona = self._persona(order.persona)
            if order.queue:
                options_for(self.settings, order.queue)
            talks = _talks(persona, order)
            if talks and reason is None:
                await self._rehearse(persona)
                reason = self.refusal()  # that may have taken a moment
        except ConfigError as error:
            reason = reason or str(error)
        if reason is not None or persona is None:
            self.refused += 1
            metrics.SESSIONS_REFUSED.inc()
            logger.info("a room was passed on", extra={"reason": reason})
            await request.reject(terminate=False)
            self._tell(request.job.room.name, order, "refused", reason or "no such persona")
            return
        self._taken[request.id] = time.monotonic()  # before anything is awaited: the cap is hard
        try:
            if talks:  # the job's participant is the agent, and the avatar one of its own
                title = persona.title or persona.name
                await request.accept(identity=f"{order.identity}-agent", name=order.name or title)
            else:
                await request.accept(
                    identity=order.identity,
                    name=order.name or order.identity,
                    attributes={ATTRIBUTE_PUBLISH_ON_BEHALF: order.agent} if order.agent else None,
                )
        except BaseException:
            self._taken.pop(request.id, None)
            raise
        self._tell(request.job.room.name, order, "taken")

    # -- one room ----------------------------------------------------------------------------------

    async def _entry(self, job: JobContext) -> None:
        """The job's own thread: a conversation runs here; an avatar alone is only waited for, it
        lives on the worker's loop."""
        assert self._loop is not None
        try:
            order = Order.parse(job.job.metadata)
            persona = self._persona(order.persona)
        except ConfigError as error:  # edited since it was accepted
            logger.error("a persona can't be used any more", extra={"error": str(error)})
            self._taken.pop(job.job.id, None)
            job.shutdown("the persona can't be used")
            return
        if _talks(persona, order):
            await self._converse(job, order, persona)
            return
        # The avatar joins by a connection of the worker's own, under the job's identity: the
        # job's room stays unused, and livekit-agents must not take that for a mistake.
        getattr(job, "_on_connect", lambda: None)()
        work = asyncio.run_coroutine_threadsafe(self._serve(job.job), self._loop)
        try:
            await asyncio.wrap_future(work)
        except asyncio.CancelledError:
            work.cancel()
            raise
        finally:
            job.shutdown("the avatar has left")

    async def _converse(self, job: JobContext, order: Order, persona: Persona) -> None:
        """A whole conversation, in the job's own thread, with an avatar on the worker's loop."""
        assert self._loop is not None and self._studio is not None
        id = job.job.id
        place = Place(self.settings, order.identity, order.name, order.video)
        studio = FarStudio(self._studio, self._loop, id)
        conversation = self._conversations[id] = Conversation(persona, place, studio)
        metrics.SESSIONS.inc()
        metrics.SESSIONS_OPENED.inc()
        reason = "failed"
        try:
            reason = await conversation.run(job)
        except VoipAvatarError as error:
            logger.error("a conversation failed", extra={"error": str(error)})
        finally:
            metrics.SESSIONS.dec()
            metrics.SESSIONS_CLOSED.labels(reason).inc()
            self._conversations.pop(id, None)
            self._taken.pop(id, None)
            job.shutdown("the conversation is over")

    async def _serve(self, job: Any) -> None:
        order = Order.parse(job.metadata)
        try:
            if await self._avatar(job.id, job.room.name, order) == "shutdown":
                await self._ask_another(job)
        except CapacityError as error:
            logger.warning("a room could not be taken after all", extra={"reason": str(error)})
            self._tell(job.room.name, order, "failed", str(error))
        except VoipAvatarError as error:
            logger.error("an avatar failed", extra={"error": str(error)})
            self._tell(job.room.name, order, "failed", str(error))
        finally:
            self._taken.pop(job.id, None)

    async def _avatar(self, job: str, room: str, order: Order) -> str:
        studio = self._studio
        assert studio is not None
        persona = self._persona(order.persona)
        session: Session | None = None

        async def become(name: str) -> None:
            if session is None:
                raise ConfigError("the avatar is not on air yet: ask again")
            await session.swap_persona(name)

        async def leave() -> None:
            if session is not None:
                await session.aclose()

        def pose(name: str) -> None:
            if session is not None:
                session.pose(name)

        def gesture(name: str) -> None:
            if session is None:
                raise ConfigError("the avatar is not on air yet: ask again")
            session.gesture(name)

        stream = AgentStream(
            agent=order.agent,
            on_persona=become,
            on_pose=pose,
            on_gesture=gesture,
            on_leave=leave,
        )
        follow = Follow(order.follow) if order.follow else None
        options = RoomOptions(
            self.settings.livekit_url,
            room,
            self.settings.livekit_api_key,
            self.settings.livekit_api_secret,
            identity=order.identity,
            name=order.name or persona.title,
            attributes={ATTRIBUTE_PUBLISH_ON_BEHALF: order.agent} if order.agent else {},
            video=order.video,
            guests=(stream,) if follow is None else (stream, follow),
        )
        session = await studio.open(persona, room=options, id=job)
        stream.open_turn = session.open_turn
        if follow is not None:
            follow.open_turn = session.open_turn
        metrics.SESSIONS.inc()
        metrics.SESSIONS_OPENED.inc()
        reason = "failed"
        try:
            async with contextlib.AsyncExitStack() as undo:
                queue = order.queue or queue_of(persona, self.settings)
                feed = (
                    await undo.enter_async_context(
                        fed(studio, session, self.settings, queue, FAREWELL)
                    )
                    if queue
                    else None
                )
                reason = await self._stay(session, order, feed)
            return reason
        finally:
            metrics.SESSIONS.dec()
            metrics.SESSIONS_CLOSED.labels(reason).inc()
            await stream.aclose()
            if follow is not None:
                await follow.aclose()
            await session.aclose(FAREWELL)

    async def _stay(self, session: Session, order: Order, feed: QueueFeed | None) -> str:
        """Until the session ends, or nobody is there to speak for; why, as a metric's label.

        A queue is enough to stay for, unless the avatar is somebody's. When the worker drains,
        the queue goes to a standby once what is being said has ended.
        """
        assert session.room is not None
        last = time.monotonic()
        alone = feed is not None and not order.agent and not order.follow
        while not session.closed.is_set():
            wanted = _wanted(session.room.room, order.follow)
            alone = alone and not wanted
            if feed is not None and self._draining:
                await feed.aclose(self._drain)
                if alone:
                    return "shutdown"
                feed = None
            if alone or wanted or not (session.room.connected and _online(session.room.room)):
                last = time.monotonic()
            elif time.monotonic() - last > self._grace:
                logger.info("no agent came back")
                return "idle"
            with contextlib.suppress(asyncio.TimeoutError):
                await within(session.closed.wait(), 0.25)
        return "asked" if session.failure is None else "failed"

    async def _ask_another(self, job: Any) -> None:
        """For a room whose avatar nobody else would ask for again: one that speaks from a queue."""
        assert self._api is not None
        room = str(job.room.name)
        wish = api.CreateAgentDispatchRequest(
            agent_name=self.agent_name, room=room, metadata=job.metadata
        )
        reason = "nobody has taken it"
        try:  # around all of it: asking anew while a request may stand would bring two
            for _ in range(ASKED):
                made = await self._api.agent_dispatch.create_dispatch(wish)
                end = time.monotonic() + ANSWER
                while time.monotonic() < end:
                    if await assigned(self._api, room, made.id):
                        return
                    await asyncio.sleep(0.1)
                await self._api.agent_dispatch.delete_dispatch(made.id, room)
        except (api.TwirpError, aiohttp.ClientError, asyncio.TimeoutError) as error:
            reason = type(error).__name__
        logger.error("no other worker has the room", extra={"reason": reason})

    # -- what others see ---------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether the LiveKit server can send rooms; a loss counts after `AWAY` seconds."""
        return self._reached is not None and time.monotonic() - self._reached <= AWAY

    def health(self) -> dict[str, Any]:
        """Engines, rooms and capacity, ready for JSON.

        `status` is "ok" where rooms are served, "failing" where an engine is not, "disconnected"
        where the LiveKit server is away. A worker that drains wants no more rooms, so it is "ok"
        while its engines are, and `draining` tells: whoever ends unhealthy processes must not cut
        its conversations short.
        """
        found = self._studio.health() if self._studio is not None else {"status": "starting"}
        if found["status"] == "ok" and not (self.connected or self._draining):
            found["status"] = "disconnected"
        return found | {
            "agent_name": self.agent_name,
            "capacity": self.capacity,
            "taken": len(self._taken),
            "conversations": len(self._conversations),
            "refused": self.refused,
            "draining": self._draining,
            "connected": self.connected,
        }

    async def _listen(self, undo: contextlib.AsyncExitStack) -> None:
        async def health(request: web.Request) -> web.Response:
            found = self.health()
            return web.json_response(found, status=200 if found["status"] == "ok" else 503)

        async def numbers(request: web.Request) -> web.Response:
            return web.Response(
                body=metrics.exposition(), headers={"Content-Type": metrics.CONTENT_TYPE}
            )

        app = web.Application()
        app.add_routes(
            [web.get("/", health), web.get("/health", health), web.get("/metrics", numbers)]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        undo.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, self._host, self._port).start()
        except OSError as error:
            raise ConfigError(
                f"can't listen on {self._host}:{self._port}: {error.strerror}"
            ) from None
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"


class _Server(AgentServer):
    """One that tells which job the LiveKit server wants ended: its request was taken back."""

    def __init__(self, on_end: Callable[[str], None], **options: Any) -> None:
        super().__init__(**options)
        self._on_end = on_end

    async def _handle_termination(self, msg: Any) -> None:
        self._on_end(str(msg.job_id))
        await super()._handle_termination(msg)


def _talks(persona: Persona, order: Order) -> bool:
    """Whether the worker holds the conversation itself, and isn't only somebody's face."""
    return persona.agent is not None and not (order.agent or order.follow or order.queue)


def _wanted(room: rtc.Room | None, follow: str) -> bool:
    """Whether somebody is there that the avatar may speak for."""
    if room is None:
        return False
    if follow:
        return follow in room.remote_participants
    return any(
        one.kind == rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
        and ATTRIBUTE_PUBLISH_ON_BEHALF not in one.attributes
        for one in room.remote_participants.values()
    )


def _online(room: rtc.Room | None) -> bool:
    """Whether the connection stands: one that is being made anew knows of nobody in the room."""
    return room is not None and room.connection_state == rtc.ConnectionState.CONN_CONNECTED


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _measure(studio: Studio, name: str) -> int:
    """How many rooms this machine carries: drawing has one thread, encoding the cores."""
    persona = load_persona(name, studio.settings)
    avatar = await studio.prepare(persona)
    renderer = await studio.renderer(persona.engine)

    def draw(engine: Any) -> float:
        session = engine.open(avatar)
        noise = np.random.default_rng(1).standard_normal(16_000 * 2).astype(np.float32) * 0.1
        jobs = session.push(noise) + session.flush()
        engine.render(jobs[: engine.info.batch])  # the first is always slow
        clock = time.thread_time if engine.info.device == "cpu" else time.perf_counter
        begin = clock()
        for i in range(0, len(jobs), engine.info.batch):
            engine.render(jobs[i : i + engine.info.batch])
        return float((clock() - begin) / max(1, len(jobs)))

    share = await renderer.call(draw) * persona.fps
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    on_cpu = share if (await renderer.start()).device == "cpu" else 0.0
    found = int(min(renderer.HEADROOM / max(share, 1e-3), cores / (on_cpu + ENCODING)))
    if found < 1:
        logger.warning(
            "this machine hardly keeps up with one room: pictures may be late",
            extra={"persona": name, "engine": persona.engine, "share_of_time": round(share, 2)},
        )
    return max(1, found)
