"""Measurements that anyone can repeat: `voipavatar bench stage | sync | engine`.

Each is a coroutine that gives a flat mapping of names and numbers, times in milliseconds unless
the name says otherwise. The tests call the same functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import platform
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np

from .config import Persona, Settings, load_persona
from .engines import Job, Renderer, Spec
from .errors import ConfigError, VoipAvatarError
from .livekit_server import LiveKitServer
from .media import FRAME_RATE, Frame, Int16, UInt8
from .room import RoomOptions
from .session import Session, Studio
from .version import __version__
from .viewer import Viewer

Tell = Callable[[str], None]
Hold: TypeAlias = Callable[[], Awaitable[None]]
"""Holds something up for a second."""

BEEP = 0.16
"""Seconds a beep lasts: four frames at 25 fps."""
PERIOD = 0.64
"""Seconds from beep to beep: a whole number of frames, and long enough to pair them surely."""


def _quiet(what: str) -> None:
    """Progress that nobody watches."""


def beeps(seconds: float, rate: int = FRAME_RATE) -> Int16:
    """Beeps of `BEEP` seconds every `PERIOD`, the first after 0.16 s, int16 mono."""
    times = np.arange(round(seconds * rate)) / rate
    loud = (times + PERIOD - 0.16) % PERIOD < BEEP
    return (np.sin(2 * np.pi * 1000 * times) * loud * 16_000).astype(np.int16)


def chatter(seconds: float, rate: int = FRAME_RATE, seed: int = 1) -> Int16:
    """Sound with the rhythm of speech (syllables of 0.1 to 0.3 s, pauses), int16 mono."""
    rng = np.random.default_rng(seed)
    parts: list[Int16] = []
    made = 0
    while made < seconds * rate:
        length = int(rng.uniform(0.1, 0.3) * rate)
        times = np.arange(length) / rate
        pitch = rng.uniform(100, 180)
        voice = sum(np.sin(2 * np.pi * pitch * k * times) / k for k in range(1, 20))
        envelope = np.sin(np.pi * np.arange(length) / length) * rng.uniform(0.2, 1.0)
        parts.append((voice * envelope * 9_000).astype(np.int16))
        if rng.random() < 0.15:
            parts.append(np.zeros(int(rng.uniform(0.1, 0.4) * rate), np.int16))
        made = sum(len(part) for part in parts)
    return np.concatenate(parts)[: round(seconds * rate)]


def summary(name: str, values: list[float] | np.ndarray[Any, Any]) -> dict[str, float]:
    """Median, 95th and 99th percentile and maximum of seconds, as milliseconds."""
    ms = np.asarray(values, float) * 1000
    if not len(ms):
        return {}
    return {
        f"{name}_median": round(float(np.median(ms)), 3),
        f"{name}_p95": round(float(np.percentile(ms, 95)), 3),
        f"{name}_p99": round(float(np.percentile(ms, 99)), 3),
        f"{name}_max": round(float(ms.max()), 3),
    }


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "voipavatar": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


class _Void:
    """A sink that throws away."""

    latency = 0.0

    def put(self, frame: Frame) -> None: ...

    def clear(self) -> float:
        return 0.0

    async def aclose(self) -> None: ...


def _void(spec: Spec) -> _Void:
    return _Void()


# --- the stage ------------------------------------------------------------------------------------


async def stage(
    settings: Settings,
    *,
    persona: str = "default",
    seconds: float = 30.0,
    room: bool = False,
    tell: Tell = _quiet,
    server: LiveKitServer | None = None,
) -> Mapping[str, Any]:
    """What a session costs without encoders: half the time idle, half talking.

    `loop_*` is the event loop's thread, all that the stage does, and with `room` the publishing
    too, for nobody to see. `drawing_*` is the engine's thread, `native_*` all other threads: with
    `room` those that encode and send. Each as a percentage of one core.
    """
    async with contextlib.AsyncExitStack() as undo:
        where: RoomOptions | None = None
        if room:
            access = await undo.enter_async_context(_Server(settings, server, tell))
            name = f"stage-{time.monotonic_ns()}"
            where = RoomOptions(access.url, name, access.api_key, access.api_secret)
        studio = await undo.enter_async_context(Studio(settings))
        session = await studio.open(
            load_persona(persona, settings), room=where, sinks=() if room else (_void,)
        )
        renderer = await studio.renderer(session.persona.engine)
        spec = session.stage.engine.spec
        found: dict[str, Any] = machine() | {
            "persona": persona,
            "size": f"{spec.width}x{spec.height} at {spec.fps}",
            "into": "a room" if room else "nothing",
            "seconds": seconds,
        }
        ticks = _timed(session)
        await asyncio.sleep(1.0)
        for phase in ("idle", "talking"):
            tell(phase)
            if phase == "talking":
                turn = session.open_turn()
                turn.push(chatter(seconds), FRAME_RATE)
                turn.end()
                await turn.started
            ticks.clear()
            before = await _spent(renderer)
            await asyncio.sleep(seconds / 2)
            wall, loop, drawing, everything = await _spent(renderer) - before
            found |= summary(f"tick_{phase}", ticks)
            threads = {"loop": loop, "drawing": drawing, "native": everything - loop - drawing}
            for thread, spent in threads.items():
                found[f"{thread}_{phase}_percent"] = round(float(100 * spent / wall), 2)
        counters = session.stage.counters
        found |= {
            "frames": counters.frames,
            "late": counters.late,
            "idle_late": counters.idle_late,
            "stalls": counters.stalls,
            "ms_per_picture": round(renderer.stats()["ms_per_picture"], 3),
        }
    return found


async def _spent(renderer: Renderer) -> np.ndarray[Any, Any]:
    """Seconds up to now: by the clock, and of processor time in the loop's thread, in the
    engine's, and in all of the process."""
    drawing = await renderer.call(lambda _: time.thread_time())
    return np.array([time.perf_counter(), time.thread_time(), drawing, time.process_time()])


def _timed(session: Session) -> list[float]:
    """Measure every tick of a session's stage from now on."""
    times: list[float] = []
    tick = session.stage.tick

    def timed() -> Frame:
        begin = time.perf_counter()
        frame = tick()
        times.append(time.perf_counter() - begin)
        return frame

    session.stage.tick = timed  # type: ignore[method-assign]
    return times


# --- sync -----------------------------------------------------------------------------------------


async def sync(
    settings: Settings,
    *,
    minutes: float = 2.0,
    tell: Tell = _quiet,
    server: LiveKitServer | None = None,
    width: int = 640,
    height: int = 360,
    holds: Mapping[str, float] | None = None,
) -> Mapping[str, Any]:
    """Flash against beep at a viewer in a real room. Positive: the picture is late.

    `seen_*` is what the viewer sees and hears. `source_*` is what was sent: less what the viewer's
    own jitter buffers add, by WebRTC's statistics of the same second (exact to about 10 ms), and
    `steady_*` are running medians of five of that, which no single late wake-up moves.
    `steady_within_40` is how many of a hundred are within 40 ms of sync, `source_drift` the median
    of the last tenth less that of the first.

    Of `beeps`, those around the machine's own `stalls` are not in `source_*` and `steady_*`, but
    for `left_out`; nor are the `unknown`, of whose second WebRTC told nothing.

    `holds` says what is held for a second, the "loop" or the "engine", and after how many seconds;
    `after_loop_*` and `after_engine_*` tell the offsets at the source from two seconds after it
    on, until the next. `late` and `stalled` (in seconds) are also theirs, `stalls` are not.
    """
    async with _Server(settings, server, tell) as access:
        tell(f"measuring for {minutes:g} min")
        persona = Persona(name="clapper", engine="clapper", width=width, height=height)
        room = f"sync-{time.monotonic_ns()}"
        async with Studio(settings) as studio:
            session = await studio.open(
                persona, room=RoomOptions(access.url, room, access.api_key, access.api_secret)
            )
            renderer = await studio.renderer(persona.engine)
            known: dict[str, Hold] = {
                "loop": _hold_loop,
                "engine": partial(_hold_engine, renderer),
            }
            async with Viewer(access.url, room, access.api_key, access.api_secret) as viewer:
                await viewer.wait()
                later = {what: (known[what], after) for what, after in (holds or {}).items()}
                measured = await _measure(session, viewer, minutes * 60, later)
                status = session.status()
    if not measured.seen:
        raise VoipAvatarError("the viewer saw no flash and heard no beep: is the machine too busy?")
    source = measured.source()
    values = [value for _, value in source]
    steady = _smooth(values)
    found: dict[str, Any] = machine() | {
        "minutes": minutes,
        "beeps": len(measured.seen),
        "left_out": measured.left_out,
        "unknown": len(measured.seen) - measured.left_out - len(source),
        **_spread("seen", [value for _, value in measured.seen]),
        **_spread("source", values),
        **_spread("steady", steady),
        "steady_within_40": round(100 * float(np.mean(np.abs(steady) <= 0.04)), 2),
        "source_drift": _drift(values),
        **summary("gap", measured.gaps),
        "underruns": status["room"]["underruns"],
        "late": status["counters"]["late"],
        "stalls": measured.stalled,
        "stalled": round(status["counters"]["stalled"], 2),
    }
    for what, held in measured.held.items():
        until = min((one for one in measured.held.values() if one > held), default=math.inf)
        after = [value for at, value in source if held + 2.0 < at < until - 1.0]
        found |= _spread(f"after_{what}", _smooth(after))
    return found


async def _hold_loop() -> None:
    time.sleep(1.0)  # noqa: ASYNC251 - the stall is what is measured


async def _hold_engine(renderer: Renderer) -> None:
    """One picture takes a second to draw."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()

    def arm(engine: Any) -> None:
        def slow(jobs: Sequence[Job]) -> list[UInt8]:
            del engine.render  # its own again
            time.sleep(1.0)
            loop.call_soon_threadsafe(over.set)
            return cast(list[UInt8], engine.render(jobs))

        engine.render = slow

    await renderer.call(arm)
    await over.wait()


def _smooth(values: list[float]) -> list[float]:
    """Running medians of five: the viewer's buffers are known by the second, not by the beep."""
    return [float(np.median(values[i : i + 5])) for i in range(max(1, len(values) - 4))]


def _drift(values: list[float]) -> float:
    """Milliseconds between the median of the last tenth and that of the first."""
    tenth = max(1, len(values) // 10)
    if not values:
        return 0.0
    return round(float(np.median(values[-tenth:]) - np.median(values[:tenth])) * 1000, 1)


def _spread(name: str, values: list[float]) -> dict[str, float]:
    """Median and extremes, in milliseconds."""
    ms = np.asarray(values) * 1000
    if not len(ms):
        return {}
    return {
        f"{name}_median": round(float(np.median(ms)), 1),
        f"{name}_min": round(float(ms.min()), 1),
        f"{name}_max": round(float(ms.max()), 1),
    }


@dataclass
class _Measured:
    """Offsets as seen, and what the viewer's buffers did at the time."""

    seen: list[tuple[float, float]] = field(default_factory=list)
    buffers: list[tuple[float, float]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    held: dict[str, float] = field(default_factory=dict)
    """When what was held was let go again."""
    stalls: list[float] = field(default_factory=list)
    """When it was seen that the machine itself had held the stage."""
    stalled: int = 0
    """How often it did."""

    def source(self) -> list[tuple[float, float]]:
        """Offsets less the viewer's buffers, where their state is known to the second, and not
        around stalls of the machine."""
        times = np.array([at for at, _ in self.buffers])
        if not len(times):
            return []
        found = []
        for at, value in self.seen:
            nearest = int(np.argmin(np.abs(times - at)))
            if abs(times[nearest] - at) < 1.0 and not self._stalled(at):
                found.append((at, value - self.buffers[nearest][1]))
        return found

    @property
    def left_out(self) -> int:
        """How many beeps fell into stalls of the machine."""
        return sum(self._stalled(at) for at, _ in self.seen)

    def _stalled(self, at: float) -> bool:
        return any(0 < at - stall + 1.0 < 4.0 for stall in self.stalls)


async def _measure(
    session: Session, viewer: Viewer, seconds: float, holds: Mapping[str, tuple[Hold, float]]
) -> _Measured:
    """Beep for `seconds`, collecting offsets as they come, so that hours fit into memory.

    `holds` are, by name, what holds something for a second, and seconds after which it does.
    """
    turn = session.open_turn()
    counters = session.stage.counters
    begin, pushed = time.monotonic(), 0.0
    measured = _Measured()
    stalls = counters.stalls
    seen: dict[float, float] = {}
    piece = beeps(10 * PERIOD)
    await viewer.buffering()
    while time.monotonic() - begin < seconds:
        while pushed < time.monotonic() - begin + 2.0:
            turn.push(piece, FRAME_RATE)
            pushed += len(piece) / FRAME_RATE
        await asyncio.sleep(0.7)
        if counters.stalls > stalls:
            measured.stalled += counters.stalls - stalls
            measured.stalls.append(time.monotonic())
        stalls = counters.stalls
        for what, (hold, after) in holds.items():
            if what not in measured.held and time.monotonic() - begin > after:
                await hold()
                measured.held[what] = time.monotonic()
                await asyncio.sleep(0.1)  # the stage sees now that it was held
                stalls = counters.stalls
        delay = await viewer.buffering()
        if delay is not None:
            measured.buffers.append((time.monotonic() - 0.35, delay))
        seen.update(_settled(viewer))
        if len(viewer.pictures) > 2000:
            measured.gaps.extend(viewer.gaps()[:1500])
            del viewer.pictures[:1500]
    turn.cancel()
    await turn.finished
    await asyncio.sleep(0.5)
    seen.update(_settled(viewer))
    measured.seen = sorted(seen.items())
    measured.gaps = [*measured.gaps, *viewer.gaps()][25:]
    return measured


def _settled(viewer: Viewer) -> dict[float, float]:
    """Offsets of the beeps that are kept, by rounded time so that each counts once."""
    return {round(when / PERIOD * 2) * PERIOD / 2: value for when, value in viewer.offsets()}


class _Server:
    """The server that was given, or one of our own for as long as it is needed."""

    def __init__(self, settings: Settings, server: LiveKitServer | None, tell: Tell) -> None:
        self._given = server
        self._own = (
            LiveKitServer(settings.cache_dir, progress=lambda what, _: tell(what))
            if server is None
            else None
        )

    async def __aenter__(self) -> LiveKitServer:
        if self._own is not None:
            await self._own.start()
            return self._own
        assert self._given is not None
        return self._given

    async def __aexit__(self, *exc: object) -> None:
        if self._own is not None:
            await self._own.stop()


# --- engines --------------------------------------------------------------------------------------


async def engine(
    settings: Settings,
    *,
    persona: str = "default",
    portrait: Path | None = None,
    size: tuple[int, int] | None = None,
    seconds: float = 10.0,
    tell: Tell = _quiet,
) -> Mapping[str, Any]:
    """Milliseconds a picture, idle and talking, and how many sessions one core would carry.

    A `portrait`, picture or clip, stands in for a persona's; `size` for its width and height. On a
    CPU it is the drawing thread's processor time, which a busy machine doesn't change.
    """
    found: dict[str, Any] = machine() | {"persona": portrait.name if portrait else persona}
    async with Studio(settings) as studio:
        if portrait is not None:
            who = Persona(name="portrait", portrait=portrait.resolve())
        else:
            who = load_persona(persona, settings)
        if size is not None:
            shape = {"width": size[0], "height": size[1]}
            try:
                who = Persona.model_validate(who.model_dump() | shape | {"path": who.path})
            except ValueError as error:
                raise ConfigError(f"a picture can't be {size[0]}x{size[1]}: {error}") from None
        tell("preparing")
        avatar = await studio.prepare(who)
        renderer = await studio.renderer(who.engine)

        def draw(the_engine: Any) -> dict[str, list[float]]:
            session = the_engine.open(avatar)
            batch = the_engine.info.batch
            clock = time.thread_time if the_engine.info.device == "cpu" else time.perf_counter
            times: dict[str, list[float]] = {"idle": [], "talking": []}
            frames = int(session.spec.fps * seconds / 2)
            pcm = chatter(seconds / 2, 16_000).astype(np.float32) / 32768
            begin = clock()
            jobs = {"talking": session.push(pcm) + session.flush(), "idle": session.idle(frames)}
            times["hearing"] = [(clock() - begin) / max(1, len(jobs["talking"]))]
            for kind, many in jobs.items():
                for i in range(0, len(many), batch):
                    begin = clock()
                    the_engine.render(many[i : i + batch])
                    each = (clock() - begin) / len(many[i : i + batch])
                    times[kind].append(each)
            return times

        tell("drawing")
        times = await renderer.call(draw)
        info = await renderer.start()
        found |= {
            "engine": info.name,
            "device": info.device,
            "batch": info.batch,
            "size": f"{avatar.width}x{avatar.height}",
        }
        for kind in ("idle", "talking"):
            found |= summary(f"{kind}_picture", times[kind])
        found["hearing_per_frame"] = round(times["hearing"][0] * 1000, 3)
        each = float(np.median(times["talking"])) + times["hearing"][0]
        found["sessions_per_core"] = round(1 / (each * who.fps), 1)
    return found
