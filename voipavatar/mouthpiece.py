"""Where an agent's speech goes: the one `AudioOutput` that stays while what is behind it changes.

An `AgentSession` gets a `Mouthpiece` once. Behind it is a route: the avatar in this process
(`Direct`), an avatar elsewhere in the room (`Wire`), or no avatar at all (`VoiceOnly`, the agent's
own track). The mouthpiece knows every segment that is not over, so whatever happens to a route,
each of them ends exactly once, and what the listener has not heard yet is said by the next route.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import numpy as np
from livekit import rtc
from livekit.agents.voice.io import AudioOutput, AudioOutputCapabilities

from .agentstream import (
    AUDIO_TOPIC,
    CLEAR_BUFFER,
    PLAYBACK_FINISHED,
    PLAYBACK_STARTED,
    SEGMENT,
    Pcm,
    Turn,
)
from .media import FRAME_RATE, Int16, Resampler
from .waiting import within

logger = logging.getLogger(__name__)

CLEAR_TIMEOUT = 2.0
"""Seconds in which a cleared segment's end must be told."""
OVERDUE = 8.0
"""Seconds beyond its length after which a segment's end is not waited for any longer."""
UNHEARD = 20.0
"""Seconds beyond those before it in which a segment must begin, at an avatar that is alive: it may
have something else to say first."""
KEPT = 600.0
"""Seconds of one segment that are kept until they were heard."""
PUBLISHED = 10.0
"""Seconds in which the agent's own track must be there; what is said goes on without it then."""
RESUMES = 0.15
"""Seconds that a voice which waited for more sound takes to go on, once there is some."""


class Segment:
    """One stretch of speech between two flushes, as the agent pushed it."""

    def __init__(self, on_started: Callable[[], None], on_over: Callable[[Segment], None]) -> None:
        self.frames: deque[rtc.AudioFrame] = deque()
        self.length = 0.0
        """Seconds pushed."""
        self.skipped = 0.0
        """Seconds that a route before the present one had played."""
        self.began: float | None = None
        """Monotonic time at which it was first heard."""
        self.flushed = False
        self.cleared = False
        self.cut = False
        """Not all of it got out, since whoever pushed it was cancelled, or it was cleared."""
        self.heard = 0.0
        self.interrupted = False
        self.over = False
        self.meter: Callable[[], float] | None = None
        """Seconds that have left at most, where its route can tell."""
        self.ended: float | None = None
        """Monotonic time at which its last sample was to be heard, once it is flushed and over."""
        self._kept = 0.0
        self._playhead: tuple[float, float] | None = None  # seconds, at which monotonic time
        self._on_started = on_started
        self._on_over = on_over

    def keep(self, frame: rtc.AudioFrame) -> None:
        self.at()  # whether the voice has been waiting for this
        self.length += frame.duration
        self._kept += frame.duration
        self.frames.append(frame)
        while self._kept > KEPT:
            self._kept -= self.frames.popleft().duration

    def started(self) -> None:
        """Its first sample is being heard, or the first that another route says of it."""
        if self._playhead is None:
            self._playhead = (self.skipped, time.monotonic())
        if self.began is None and not self.over:
            self.began = time.monotonic()
            self._on_started()

    def at(self) -> float:
        """Seconds of it that are heard by now; below 0 before that. It moves with the time, and
        waits where there is no more sound: to be asked every few frames."""
        if self._playhead is None:
            return self.skipped if self.began is not None else -1.0
        position, since = self._playhead
        now = time.monotonic()
        reached = position + max(0.0, now - since)
        position = min(self.length, reached)
        if self.meter is not None:
            position = min(position, self.skipped + self.meter())
        if position >= self.length and self.flushed and self.ended is None:
            self.ended = now - (reached - self.length)
        waits = position >= self.length and not self.flushed
        self._playhead = (position, now + RESUMES if waits else max(since, now))
        return position

    def stopped(self, heard: float) -> None:
        """Its route plays no more of it than so many seconds."""
        self.meter = lambda: heard
        if self._playhead is not None:
            self._playhead = (self.skipped + heard, time.monotonic())

    def resume_at(self, position: float) -> None:
        """It goes on from here, as soon as `started` says so."""
        self.skipped = position
        self.meter = None
        self.ended = None
        self._playhead = None

    def finished(self, heard: float, interrupted: bool) -> None:
        """It is over; only the first call counts."""
        if self.over:
            return
        self.over = True
        self.frames.clear()
        self.heard = self.skipped + heard
        self.interrupted = interrupted
        self._on_over(self)

    def rest(self, heard: float) -> list[rtc.AudioFrame]:
        """The frames after `heard` seconds, the first perhaps from its middle on."""
        at = self.length - sum(frame.duration for frame in self.frames)
        left = []
        for frame in self.frames:
            if at + frame.duration > heard:
                left.append(_from(frame, heard - at))
            at += frame.duration
        return left


def _from(frame: rtc.AudioFrame, seconds: float) -> rtc.AudioFrame:
    """A frame without its first `seconds`."""
    skip = max(0, int(seconds * frame.sample_rate))
    if skip == 0:
        return frame
    count = frame.samples_per_channel - skip
    data = bytes(frame.data.cast("b"))[skip * frame.num_channels * 2 :]
    return rtc.AudioFrame(data, frame.sample_rate, frame.num_channels, count)


class Route(Protocol):
    """Something that speaks segments, one after the other, and tells them how it went."""

    async def push(self, segment: Segment, frame: rtc.AudioFrame) -> None:
        """More of a segment; those before it were flushed. Safe to cancel."""

    def flush(self, segment: Segment) -> None:
        """That was all of it."""

    def clear(self) -> None:
        """Be silent: every segment it was given is `finished`, at once or within a few seconds."""

    async def aclose(self) -> None: ...


class Watcher(Protocol):
    """Somebody who goes along with what is said: captions."""

    def opened(self, segment: Segment) -> None: ...
    def sounded(self, segment: Segment, frame: rtc.AudioFrame) -> None: ...
    def flushed(self, segment: Segment | None) -> None:
        """Complete; None when nothing was pushed since the last time."""

    def finished(self, segment: Segment) -> str | None:
        """Over; what of its text was shown, if that is known."""


class Mouthpiece(AudioOutput):
    """The agent's audio output. Takes any rate and channel count."""

    def __init__(self, patience: float) -> None:
        super().__init__(
            label="voipavatar", capabilities=AudioOutputCapabilities(pause=False), sample_rate=None
        )
        self.pending: deque[Segment] = deque()
        self.watcher: Watcher | None = None
        self.on_attach: Callable[[], object] | None = None
        """Called soon after a session has put it to use."""
        self.detached = False
        """The session has switched its sound off: what it says comes as text alone."""
        self._patience = patience
        self._route: Route | None = None
        self._owner: dict[Segment, Route] = {}
        self._open: Segment | None = None
        self._ready = asyncio.Event()
        self._late: Callable[[], Route] | None = None
        self._done: set[Segment] = set()

    # -- which route -------------------------------------------------------------------------------

    @property
    def route(self) -> Route | None:
        return self._route

    def use(self, route: Route) -> None:
        """The segments from the next one on go to `route`."""
        self._route = route
        self._ready.set()

    def otherwise(self, make: Callable[[], Route]) -> None:
        """What to use when no route has come within the patience given."""
        self._late = make

    def take_over(self, route: VoiceOnly, alive: float | None = None) -> None:
        """All that is pending is said by `route`, from where it was last known to be heard.

        `alive` is the monotonic time at which the route before last showed signs of life.
        """
        for segment in list(self.pending):
            if self._owner.get(segment) is route or segment.over:
                continue
            self._owner[segment] = route
            heard = _heard(segment, alive)
            if segment.cleared:
                segment.finished(heard, interrupted=True)
                continue
            rest = segment.rest(heard + segment.skipped)
            segment.resume_at(segment.skipped + heard)
            for frame in rest:
                route.put(segment, frame)
            if segment.flushed:
                route.flush(segment)
        self.use(route)

    # -- what the agent calls ----------------------------------------------------------------------

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        # Counted before anything is awaited: whoever is above has counted it already, and must be
        # told its end even if it is interrupted while the avatar is still on its way.
        await super().capture_frame(frame)
        segment = self._open
        if segment is None:
            segment = Segment(self._started, self._over)
            self._open = segment
            self.pending.append(segment)
            if self.watcher is not None:
                self.watcher.opened(segment)
        if segment not in self._owner and not segment.over:
            try:
                route = await self._found()
            except BaseException:
                segment.finished(0.0, interrupted=True)
                raise
            self._owner.setdefault(segment, route)
        if segment.cleared or segment.over:
            return  # what is still under way of something that is to be silent
        segment.keep(frame)
        if self.watcher is not None:
            self.watcher.sounded(segment, frame)
        await self._owner[segment].push(segment, frame)

    async def _found(self) -> Route:
        """The route, once there is one; the one for want of an avatar after the patience given."""
        if self._route is None:
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self._ready.wait(), self._patience)
        if self._route is None and self._late is not None:
            self.use(self._late())
        assert self._route is not None
        return self._route

    def flush(self) -> None:
        super().flush()
        segment, self._open = self._open, None
        if self.watcher is not None:
            self.watcher.flushed(segment)
        if segment is None:
            return
        segment.flushed = True
        route = self._owner.get(segment)
        if route is not None and not segment.over:
            route.flush(segment)

    def on_attached(self) -> None:
        super().on_attached()
        self.detached = False
        if self.on_attach is not None:
            asyncio.get_running_loop().call_soon(self.on_attach)

    def on_detached(self) -> None:
        super().on_detached()
        self.detached = True

    def clear_buffer(self) -> None:
        routes: list[Route] = []
        for segment in list(self.pending):
            segment.cleared = True
            route = self._owner.get(segment)
            if route is None:  # over, or nobody has it yet
                segment.finished(0.0, interrupted=True)
            elif route not in routes:
                routes.append(route)
        for route in routes:
            route.clear()

    # -- what the routes tell ----------------------------------------------------------------------

    def _started(self) -> None:
        self.on_playback_started(created_at=time.time())

    def _over(self, segment: Segment) -> None:
        self._owner.pop(segment, None)
        while self.pending and self.pending[0].over:
            first = self.pending.popleft()
            self.on_playback_finished(
                playback_position=first.heard,
                interrupted=first.interrupted,
                synchronized_transcript=self.watcher.finished(first) if self.watcher else None,
            )


def _heard(segment: Segment, alive: float | None) -> float:
    """Seconds that the present route has surely played of a segment by `alive`: rather too few,
    since what is said twice is better than what is never said."""
    position = segment.at()
    until = segment.ended if segment.ended is not None else time.monotonic()
    since = max(0.0, until - alive) if alive is not None else 0.0
    return max(0.0, position - segment.skipped - since)


# --- the avatar in this process -------------------------------------------------------------------


class Direct:
    """Speaks through turns of a session on this loop.

    `ending` tells that the session is about to be gone: what it has not said is left to the next
    route then, and not taken for interrupted.
    """

    AHEAD = 15.0

    def __init__(
        self, open_turn: Callable[[], Turn], ending: Callable[[], bool] = lambda: False
    ) -> None:
        self._open_turn = open_turn
        self._ending = ending
        self._turns: dict[Segment, tuple[Turn, dict[int, Pcm]]] = {}

    async def push(self, segment: Segment, frame: rtc.AudioFrame) -> None:
        if self._ending():
            return
        if segment not in self._turns:
            turn = self._open_turn()
            self._turns[segment] = (turn, {})
            segment.meter = lambda: turn.heard
            turn.started.add_done_callback(
                lambda future: segment.started() if future.result() is not None else None
            )
            turn.finished.add_done_callback(lambda future: self._finished(segment, future))
        turn, pcms = self._turns[segment]
        pcm = pcms.setdefault(frame.num_channels, Pcm(frame.num_channels))
        turn.push(pcm.push(bytes(frame.data.cast("b"))), frame.sample_rate)
        while (behind := turn.backlog - self.AHEAD) > 0 and not turn.finished.done():
            await asyncio.wait([turn.finished], timeout=min(max(behind, 0.02), 0.5))

    def flush(self, segment: Segment) -> None:
        if segment in self._turns:
            self._turns[segment][0].end()

    def clear(self) -> None:
        for turn, _ in reversed(list(self._turns.values())):
            turn.cancel()

    def _finished(self, segment: Segment, future: asyncio.Future[Any]) -> None:
        self._turns.pop(segment, None)
        played = future.result()
        if played.interrupted and not segment.cleared and self._ending():
            segment.stopped(played.heard)
            return
        segment.finished(played.heard, played.interrupted)

    async def aclose(self) -> None:
        self.clear()
        await asyncio.sleep(0)


# --- the avatar elsewhere in the room -------------------------------------------------------------


class Wire:
    """Speaks through byte streams to `identity`, and hears back by RPC."""

    _wires: dict[tuple[int, str], Wire] = {}
    """By room and avatar: RPC methods belong to a participant, and it may have several avatars."""

    def __init__(self, room: rtc.Room, identity: str) -> None:
        self.fallbacks = 0
        """Ends that had to be assumed since the avatar didn't tell them."""
        self.on_silent: Callable[[], None] | None = None
        """Called when the avatar owes an end for too long."""
        self._room = room
        self._identity = identity
        self._segments: deque[Segment] = deque()
        self._names: dict[str, Segment] = {}
        self._writers: dict[Segment, asyncio.Task[rtc.ByteStreamWriter]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._clearing: asyncio.Task[None] | None = None
        self._wires[(id(room), identity)] = self
        _answer(room, PLAYBACK_STARTED)
        _answer(room, PLAYBACK_FINISHED)

    async def push(self, segment: Segment, frame: rtc.AudioFrame) -> None:
        while self._clearing is not None and not self._clearing.done():
            # A stream must not overtake the clear that was before it.
            await asyncio.wait([self._clearing], timeout=CLEAR_TIMEOUT)
        if segment.over or segment.cleared:
            return
        if segment not in self._writers:
            name = f"AUDIO_{time.monotonic_ns():x}"
            self._segments.append(segment)
            self._names[name] = segment
            self._writers[segment] = self._spawn(self._opening(name, frame))
        sent = False
        try:
            writer = await asyncio.shield(self._writers[segment])
            if not (segment.over or segment.cleared):
                await writer.write(bytes(frame.data.cast("b")))
                sent = True
        finally:
            segment.cut |= not sent

    async def _opening(self, name: str, frame: rtc.AudioFrame) -> rtc.ByteStreamWriter:
        return await within(
            self._room.local_participant.stream_bytes(
                name=name,
                topic=AUDIO_TOPIC,
                destination_identities=[self._identity],
                attributes={
                    "sample_rate": str(frame.sample_rate),
                    "num_channels": str(frame.num_channels),
                    SEGMENT: name,
                },
            ),
            10.0,
        )

    def flush(self, segment: Segment) -> None:
        writer = self._writers.get(segment)
        if writer is None:
            segment.finished(0.0, interrupted=True)  # nothing of it was ever sent
            return
        self._spawn(self._close(writer))
        self._spawn(self._expect(segment))

    async def _close(self, opening: asyncio.Task[rtc.ByteStreamWriter]) -> None:
        try:
            await (await opening).aclose()
        except (rtc.RpcError, OSError, RuntimeError, asyncio.TimeoutError) as error:
            logger.info("a segment's stream was not closed", extra={"error": type(error).__name__})

    async def _expect(self, segment: Segment) -> None:
        """A segment whose end is never told must not be waited for without end."""
        waited = 0.0
        while not segment.over:
            await asyncio.sleep(0.25)
            waited += 0.25
            if segment.began is not None:
                limit = OVERDUE
                if segment.at() < segment.length:
                    waited = 0.0  # it is being said
            else:
                limit = UNHEARD
                if next((one for one in self._segments if not one.over), segment) is not segment:
                    waited = 0.0  # those before it have limits of their own
            if waited > limit and not segment.over:
                self.fallbacks += 1
                logger.warning("the avatar did not tell a segment's end")
                if self.on_silent is not None:
                    self.on_silent()
                segment.finished(segment.length, interrupted=False)

    def clear(self) -> None:
        if self._clearing is None or self._clearing.done():
            self._clearing = self._spawn(self._clear())

    async def _clear(self) -> None:
        mine = [segment for segment in self._segments if not segment.over]
        for segment in mine:
            segment.cleared = True
            with contextlib.suppress(Exception):  # one that can't be opened has nothing to clear
                await asyncio.shield(self._writers[segment])
        if not mine:
            return
        try:
            await self._room.local_participant.perform_rpc(
                destination_identity=self._identity,
                method=CLEAR_BUFFER,
                payload="",
                response_timeout=CLEAR_TIMEOUT + 1.0,
            )
        except rtc.RpcError as error:
            logger.warning("the avatar did not answer a clear", extra={"code": int(error.code)})
        else:
            end = time.monotonic() + CLEAR_TIMEOUT
            while time.monotonic() < end and not all(one.over for one in mine):
                await asyncio.sleep(0.005)
        for segment in mine:
            if not segment.over:
                self.fallbacks += 1
                logger.warning("the avatar did not tell a cleared segment's end")
                segment.finished(_heard(segment, None), interrupted=True)

    def _told_started(self, name: str) -> None:
        segment = self._meant(name)
        if segment is not None:
            segment.started()

    def _told_finished(self, heard: float, interrupted: bool, name: str = "") -> None:
        segment = self._meant(name)
        if segment is not None:
            # The avatar says all that it got, to the end: it can't know that there was more.
            segment.finished(heard, interrupted or segment.cut)
        while self._segments and self._segments[0].over:
            self._forget(self._segments.popleft())

    def _meant(self, name: str) -> Segment | None:
        """The segment that a report is about, unless that is over: an end may be told after it had
        to be assumed. A report without a name stands for the first that isn't."""
        if name:
            segment = self._names.get(name)
            return segment if segment is not None and not segment.over else None
        return next((one for one in self._segments if not one.over), None)

    def _forget(self, segment: Segment) -> None:
        self._names = {name: one for name, one in self._names.items() if one is not segment}
        writer = self._writers.pop(segment, None)
        if writer is not None and not segment.flushed:
            self._spawn(self._close(writer))

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name="mouthpiece-wire")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        if self._wires.get((id(self._room), self._identity)) is self:
            del self._wires[(id(self._room), self._identity)]
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @classmethod
    def told(cls, room: int, call: rtc.RpcInvocationData) -> str | None:
        """A report for one of this room's wires; None when it is for none of them."""
        wire = cls._wires.get((room, call.caller_identity))
        if wire is None:
            return None
        told = json.loads(call.payload or "{}")
        name = str(told.get("segment", ""))
        if call.method == PLAYBACK_STARTED:
            wire._told_started(name)
            return "ok"
        heard, interrupted = float(told["playback_position"]), bool(told["interrupted"])
        wire._told_finished(heard, interrupted, name)
        return "ok"


def _answer(room: rtc.Room, method: str) -> None:
    """Register for reports, and pass on what other avatars' plugins registered for."""
    handlers = getattr(room.local_participant, "_rpc_handlers", {})
    before = handlers.get(method)
    if getattr(before, "voipavatar", False):
        return
    number = id(room)

    def answer(call: rtc.RpcInvocationData) -> Any:
        told = Wire.told(number, call)
        if told is not None:
            return told
        return before(call) if before is not None else "reject"

    answer.voipavatar = True  # type: ignore[attr-defined]
    answer.before = before  # type: ignore[attr-defined]
    room.local_participant.register_rpc_method(method, answer)


def unanswer(room: rtc.Room) -> None:
    """Take the answers to reports back, once the room has no wire any more.

    The native library's room holds a method, and the method the room: one that is never taken back
    keeps the whole connection in memory, half a megabyte each, also after it has ended.
    """
    if any(number == id(room) for number, _ in Wire._wires):
        return
    me = room.local_participant
    for method in (PLAYBACK_STARTED, PLAYBACK_FINISHED):
        answer = getattr(me, "_rpc_handlers", {}).get(method)
        if not getattr(answer, "voipavatar", False):
            continue  # somebody else's by now
        before = getattr(answer, "before", None)
        if before is not None:
            me.register_rpc_method(method, before)
        else:
            me.unregister_rpc_method(method)


# --- no avatar ------------------------------------------------------------------------------------


class VoiceOnly:
    """Speaks through a track of the agent's own, published when first needed."""

    def __init__(self, room: rtc.Room) -> None:
        self._room = room
        self._queue: deque[tuple[Segment, rtc.AudioFrame | None]] = deque()
        self._work = asyncio.Event()
        self._source: rtc.AudioSource | None = None
        self._shown: rtc.LocalTrackPublication | None = None
        self._mute: Segment | None = None  # the one that could not be given a track
        self._publishing: asyncio.Task[rtc.LocalTrackPublication] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._heard = 0.0

    def put(self, segment: Segment, frame: rtc.AudioFrame | None) -> None:
        """`push` without waiting; None is the segment's end."""
        self._queue.append((segment, frame))
        self._work.set()
        if self._task is None:
            self._task = asyncio.create_task(self._speak(), name="mouthpiece-voice")

    async def push(self, segment: Segment, frame: rtc.AudioFrame) -> None:
        self.put(segment, frame)
        while len(self._queue) > 200 and not segment.over:
            await asyncio.sleep(0.05)

    def flush(self, segment: Segment) -> None:
        self.put(segment, None)

    def clear(self) -> None:
        waiting = list(dict.fromkeys(segment for segment, _ in self._queue))
        self._queue.clear()
        left = 0.0
        if self._source is not None:
            left = self._source.queued_duration
            self._source.clear_queue()
        if self._now is not None and not self._now.over:
            self._now.finished(max(0.0, self._heard - left), interrupted=True)
        for segment in waiting:
            segment.finished(0.0, interrupted=True)

    _now: Segment | None = None

    async def _speak(self) -> None:
        resampler: Resampler | None = None
        pcm: Pcm | None = None
        channels = 0
        while True:
            while not self._queue:
                self._work.clear()
                await self._work.wait()
            segment, frame = self._queue.popleft()
            if segment.over:
                continue
            if segment is not self._now:
                self._now, self._heard = segment, 0.0
            if frame is None:
                if resampler is not None:
                    await self._play(segment, resampler.flush())
                if self._source is not None:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await within(self._source.wait_for_playout(), 2.0)
                segment.finished(self._heard, interrupted=False)
                continue
            if pcm is None or channels != frame.num_channels:
                pcm, channels = Pcm(frame.num_channels), frame.num_channels
            if resampler is None or resampler.source != frame.sample_rate:
                resampler = Resampler(frame.sample_rate, FRAME_RATE)
            await self._play(segment, resampler.push(pcm.push(bytes(frame.data.cast("b")))))

    async def _play(self, segment: Segment, pcm: Int16) -> None:
        if self._shown is None and segment is not self._mute:
            await self._publish()
            self._mute = segment if self._shown is None else None
        for begin in range(0, len(pcm), FRAME_RATE // 50):
            piece = np.ascontiguousarray(pcm[begin : begin + FRAME_RATE // 50])
            if segment.over:
                return
            length = len(piece) / FRAME_RATE
            if self._shown is None or self._source is None or not self._room.isconnected():
                await asyncio.sleep(length)  # nobody there to hear it, but time goes on
            else:
                try:
                    await self._source.capture_frame(
                        rtc.AudioFrame(piece.tobytes(), FRAME_RATE, 1, len(piece))
                    )
                except Exception as error:  # rtc raises bare exceptions
                    logger.info("sound was not taken", extra={"error": type(error).__name__})
            if not segment.over:
                self._heard += length
                segment.started()

    async def _publish(self) -> None:
        """Have a track, or give up waiting for one: the next segment may wait again. On a
        connection that is away publishing can't be called off, and must not be asked for twice:
        each would come true when it is back."""
        work = self._publishing
        if work is None:
            self._source = rtc.AudioSource(FRAME_RATE, 1, queue_size_ms=100)
            track = rtc.LocalAudioTrack.create_audio_track("agent_audio", self._source)
            options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
            work = self._publishing = asyncio.create_task(
                self._room.local_participant.publish_track(track, options), name="mouthpiece-track"
            )
            work.add_done_callback(self._published)
        await asyncio.wait([work], timeout=PUBLISHED)
        if self._shown is None:
            return
        try:
            await within(work.result().wait_for_subscription(), 2.0)
        except asyncio.TimeoutError:
            logger.info("nobody listens to the agent's own voice yet")

    def _published(self, work: asyncio.Task[rtc.LocalTrackPublication]) -> None:
        if work is not self._publishing:
            return  # it is not wanted any more
        self._publishing = None
        if not work.cancelled() and work.exception() is None:
            self._shown = work.result()  # what is being said goes on aloud
            return
        error = asyncio.CancelledError() if work.cancelled() else work.exception()
        logger.warning("no voice without avatar", extra={"error": type(error).__name__})
        source, self._source = self._source, None
        if source is not None:
            self._spawn(source.aclose())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="mouthpiece-hush")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def hush(self) -> None:
        """Take the track away, once nothing is being said: the avatar speaks again."""
        shown, self._shown = self._shown, None
        source, self._source = self._source, None
        work, self._publishing = self._publishing, None
        if work is not None:
            self._spawn(self._undo(work, source))
            return
        if shown is not None:
            await self._unpublish(shown)
        if source is not None:
            await source.aclose()

    async def _undo(
        self, work: asyncio.Task[rtc.LocalTrackPublication], source: rtc.AudioSource | None
    ) -> None:
        """Take a track away that is not there yet."""
        with contextlib.suppress(Exception):  # rtc raises bare exceptions
            await self._unpublish(await work)
        if source is not None:
            await source.aclose()

    async def _unpublish(self, shown: rtc.LocalTrackPublication) -> None:
        if self._room.isconnected():
            me = self._room.local_participant
            with contextlib.suppress(Exception):  # the room may be gone any moment
                # By the id that it has now: a connection that came back has given it a new one.
                await within(me.unpublish_track(shown.sid), 5.0)

    async def aclose(self) -> None:
        self.clear()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self.hush()
        leaving = list(self._leaving)
        if leaving and self._room.isconnected():
            await asyncio.wait(leaving, timeout=5.0)
        for one in leaving:
            one.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
