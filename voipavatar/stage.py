"""The stage: the one paced loop of a room. Speech in, frames out, one a tick, for ever.

`Turn` holds a turn's sound and hands it out frame by frame. `Stage` keeps the queue of turns, a
short deck of pictures being drawn ahead, and the state that viewers see; all of that is plain
calls without await, so it is tested without a clock. `Stage.run` is the only loop.

    begin / push / end / cancel ─► turns ─► engine session ─► jobs ─► renderer
                                     │                                  │ pictures
                                     └────────── tick ◄─── deck ◄───────┘ ─► Frame ─► sinks
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from . import metrics
from .engines import CUT, EngineSession, Expressive, Job, Picture
from .errors import EngineError, InputError, StageError
from .media import (
    ENGINE_RATE,
    FRAME_RATE,
    POSES,
    Audio,
    Begin,
    Cancel,
    Clock,
    Cue,
    End,
    Float32,
    Frame,
    Int16,
    Mode,
    PatientSink,
    Resampler,
    Sink,
    Source,
    UInt8,
    frames_for,
    i420,
    slice_start,
    to_float,
)

logger = logging.getLogger(__name__)

NOTHING = np.zeros(0, np.int16)

LATE = 0.25
"""Share of a turn's pictures that may be late before the log says so."""


# --- what the viewer sees -------------------------------------------------------------------------


class State(enum.Enum):
    """What the viewer sees."""

    IDLE = "idle"
    PROCESSING = "processing"
    TALKING = "talking"
    TRANSITIONING = "transitioning"


MOVES: dict[State, frozenset[State]] = {
    State.IDLE: frozenset({State.PROCESSING}),
    State.PROCESSING: frozenset({State.TALKING, State.IDLE}),
    State.TALKING: frozenset({State.TRANSITIONING}),
    State.TRANSITIONING: frozenset({State.IDLE, State.TALKING}),
}


def move(state: State, to: State) -> State:
    """`to`, if that is a legal move; StageError otherwise."""
    if to not in MOVES[state]:
        raise StageError(f"a stage that is {state.name} can't become {to.name}")
    return to


# --- a turn's sound -------------------------------------------------------------------------------


class Fifo:
    """Samples in, samples out, in order."""

    def __init__(self) -> None:
        self._parts: deque[Int16] = deque()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, pcm: Int16) -> None:
        if len(pcm):
            self._parts.append(pcm)
            self._length += len(pcm)

    def take(self, count: int) -> Int16:
        """The first `count` samples, or all there are if those are fewer."""
        taken: list[Int16] = []
        while count > 0 and self._parts:
            part = self._parts[0]
            if len(part) <= count:
                taken.append(self._parts.popleft())
            else:
                taken.append(part[:count])
                self._parts[0] = part[count:]
            count -= len(taken[-1])
            self._length -= len(taken[-1])
        if len(taken) == 1:
            return taken[0]
        return np.concatenate(taken) if taken else NOTHING


class Listener(Protocol):
    """Who owns a turn, and hears back. Called on the stage's loop; must return at once."""

    def started(self, turn: int) -> None: ...

    def finished(self, turn: int, heard: float, interrupted: bool) -> None: ...

    def cue(self, turn: int, cue: Cue) -> None:
        """The cue's sound is being heard."""


class Turn:
    """One utterance: its sound, converted lazily, and how far engine and frames have come."""

    CONVERT = 0.1
    """Seconds of source sound converted at a time."""

    def __init__(self, number: int, owner: Listener, fps: int) -> None:
        self.number = number
        self.owner = owner
        self.ended = False
        self.frames = 0
        """Frames of it that were shown."""
        self.flushed = False
        """The engine has given all its jobs."""
        self.played = 0
        """Its own samples at 48 kHz that were put into frames."""
        self.held = 0
        """Ticks that its first frame was waited for."""
        self.late = 0
        """Its frames whose picture was not ready."""
        self.primed = False
        """Enough is there to start (again) without stuttering."""
        self.announced = False
        """Its owner was told that it is being heard."""
        self.over = False
        """Its owner was told that it is over."""
        self.arrived: float | None = None
        """When its first sound came, if it had to wait for nobody."""
        self._fps = fps
        self._raw: deque[tuple[Int16, int]] = deque()
        self._received = 0.0
        self._to_frames: Resampler | None = None
        self._to_engine = Resampler(FRAME_RATE, ENGINE_RATE)
        self._frame_pcm = Fifo()
        self._engine_pcm = Fifo()
        self._total_frames = 0  # samples at 48 kHz converted so far
        self._total_engine = 0  # samples at 16 kHz converted so far
        self._converted = False
        self._fed = 0
        self._log: deque[Int16] = deque()  # what the engine got for frames that were not shown yet
        self._origin = 0  # frame of the turn at which the engine's own turn began
        self._new_cues: list[Cue] = []
        self._all_cues: list[Cue] = []
        self._caption_cues: deque[Cue] = deque()

    @property
    def received(self) -> float:
        """Seconds of sound that came in."""
        return self._received

    @property
    def backlog(self) -> float:
        """Seconds that came in and are not in frames yet."""
        return max(0.0, self._received - self.frames / self._fps)

    @property
    def total(self) -> int | None:
        """Frames of the whole turn, once that is known."""
        return frames_for(self._total_frames, FRAME_RATE, self._fps) if self._converted else None

    @property
    def shown(self) -> bool:
        """The last frame was shown."""
        return self.flushed and self.frames == self.total

    def push(self, pcm: Int16, rate: int, cues: Sequence[Cue] = ()) -> None:
        if self.ended:
            raise InputError("sound came after the turn's end: open a new turn for it")
        if len(pcm):
            Resampler(rate, FRAME_RATE)  # refuses an impossible rate here, not in the loop
            self._raw.append((pcm, rate))
            self._received += len(pcm) / rate
        self._new_cues.extend(cues)
        self._caption_cues.extend(cue for cue in cues if cue.kind != "phoneme")

    def ready(self, seconds: float) -> bool:
        """`seconds` beyond what was shown are there, or all there ever will be."""
        return self.ended or self.backlog >= seconds

    def feed(self) -> Float32 | None:
        """The engine's next piece, one frame long (the last one shorter); None if not there yet."""
        want = slice_start(self._fed + 1, ENGINE_RATE, self._fps) - slice_start(
            self._fed, ENGINE_RATE, self._fps
        )
        while len(self._engine_pcm) < want and self._convert():
            pass
        if len(self._engine_pcm) < want and not self._converted:
            return None
        piece = self._engine_pcm.take(want)
        if len(piece) == 0:
            return None
        self._fed += 1
        self._log.append(piece)
        return to_float(piece)

    @property
    def fed_all(self) -> bool:
        return self._converted and len(self._engine_pcm) == 0

    def take_cues(self) -> list[Cue]:
        """Cues that the engine has not seen, in seconds from where its own turn began."""
        cues, self._new_cues = self._new_cues, []
        self._all_cues.extend(cues)
        begin = self._origin / self._fps
        if not begin:
            return cues
        return [replace(cue, start=cue.start - begin, end=cue.end - begin) for cue in cues]

    def heard_cues(self) -> Iterator[Cue]:
        """Words and gestures that begin in what was shown up to now, each once."""
        now = self.frames / self._fps
        while self._caption_cues and self._caption_cues[0].start < now:
            yield self._caption_cues.popleft()

    def rest_of_cues(self) -> Iterator[Cue]:
        while self._caption_cues:
            yield self._caption_cues.popleft()

    def take_frame(self, count: int) -> Int16:
        """The next frame's `count` samples; the last frame is filled up with zeros."""
        while len(self._frame_pcm) < count and self._convert():
            pass
        pcm = self._frame_pcm.take(count)
        self.frames += 1
        self.played += len(pcm)
        if self._log:
            self._log.popleft()
        if len(pcm) == count:
            return np.ascontiguousarray(pcm)
        filled = np.zeros(count, np.int16)
        filled[: len(pcm)] = pcm
        return filled

    def rewind(self) -> None:
        """The engine has forgotten it: feed it again, from the first frame that was not shown."""
        again = Fifo()
        for piece in self._log:
            again.push(piece)
        again.push(self._engine_pcm.take(len(self._engine_pcm)))
        self._engine_pcm = again
        self._log.clear()
        self._fed = self._origin = self.frames
        self.flushed = False
        now = self.frames / self._fps
        seen, self._all_cues = self._all_cues, []
        self._new_cues = [cue for cue in seen if cue.end > now] + self._new_cues

    def _convert(self) -> bool:
        """Convert a little more of the source sound; False if there is nothing to convert."""
        if self._converted:
            return False
        if not self._raw:
            if not self.ended:
                return False
            self._keep(self._flush())
            # The two rates must agree on the turn's length to the sample.
            rest = self._to_engine.flush()
            want = -(-self._total_frames * ENGINE_RATE // FRAME_RATE) - self._total_engine
            self._engine_pcm.push(np.pad(rest, (0, max(0, want - len(rest))))[: max(0, want)])
            self._converted = True
            return True
        pcm, rate = self._raw.popleft()
        if self._to_frames is not None and self._to_frames.source != rate:
            self._keep(self._flush())
        if self._to_frames is None:
            self._to_frames = Resampler(rate, FRAME_RATE)
        piece = max(1, int(rate * self.CONVERT))
        if len(pcm) > piece:
            self._raw.appendleft((pcm[piece:], rate))
        self._keep(self._to_frames.push(pcm[:piece]))
        return True

    def _flush(self) -> Int16:
        inner, self._to_frames = self._to_frames, None
        return inner.flush() if inner is not None else NOTHING

    def _keep(self, pcm: Int16) -> None:
        self._frame_pcm.push(pcm)
        self._total_frames += len(pcm)
        for_engine = self._to_engine.push(pcm)
        self._engine_pcm.push(for_engine)
        self._total_engine += len(for_engine)


# --- the stage ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Slot:
    """A frame to come: its picture, and the turn it belongs to."""

    picture: Picture
    turn: Turn | None


@dataclass(frozen=True, slots=True)
class Options:
    """How a stage behaves; the defaults suit a room."""

    ahead: int = 4
    """Frames of speech drawn ahead."""
    idle_ahead: int = 2
    """Idle frames drawn ahead: speech that arrives waits for no more than these."""
    margin: int = 2
    """Frames beyond the engine's lookahead that must be there before a turn starts or resumes."""
    ease: int = CUT
    """Frames in which the mouth closes after an interruption."""
    hold: int = 12
    """Ticks that a turn's first picture is waited for before its sound goes on without it."""
    backlog: float = 600.0
    """Seconds of speech that may wait, over all turns."""
    stall: float = 0.16
    """Seconds behind from which the schedule starts anew and doesn't catch up."""
    patient: bool = False
    """For files: wait for pictures and for sound, so that nothing is late."""


@dataclass(slots=True)
class Counters:
    """What happened since the stage began."""

    frames: int = 0
    talking: int = 0
    late: int = 0
    """Talking frames that showed the picture before, since theirs was not drawn in time."""
    idle_late: int = 0
    """The same among idle frames."""
    failed: int = 0
    """Pictures that the engine could not draw."""
    paused: int = 0
    """Ticks in which a turn waited for more sound."""
    stalls: int = 0
    """Times the loop was held so long that the schedule began anew."""
    stalled: float = 0.0
    """Seconds that went by without a frame in them."""
    turns: int = 0
    interrupted: int = 0
    sink_errors: int = 0


Submit = Callable[[Sequence[Job], Sequence[float]], list[Picture]]


class Stage:
    """Speech in, frames out. Everything but `prime`, `run` and `attach` returns at once."""

    def __init__(
        self,
        engine: EngineSession,
        submit: Submit,
        clock: Clock,
        sinks: Sequence[Sink] = (),
        options: Options | None = None,
        on_state: Callable[[State], None] | None = None,
    ) -> None:
        self.engine = engine
        self.sinks = list(sinks)
        self.options = options or Options()
        self.counters = Counters()
        self.state = State.IDLE
        self.clock = clock
        self.fps = engine.spec.fps
        self._submit = submit
        self._on_state = on_state
        self._turns: deque[Turn] = deque()
        self._numbers = 0
        self._deck: deque[Slot] = deque()
        self._next_clock = 0  # of the picture after the last shown one
        self._index = 0
        self._image: UInt8 = i420(engine.spec.height, engine.spec.width, (24, 24, 28))
        self._closing_frames = 0
        self._notices: list[tuple[float, Turn, Callable[[], None]]] = []
        self._tail: Turn | None = None  # shown whole, perhaps still being heard
        self._wake = asyncio.Event()
        self._closed = False
        self._paused = False
        self._asked = ""  # the pose that somebody wants
        self._posed = ""  # the one that the engine was told

    # -- speech in ---------------------------------------------------------------------------------

    def begin(self, owner: Listener, mode: Mode = "append") -> int:
        """Announce a turn; its number. With `interrupt` and `replace` the cut is made here."""
        if self._closed:
            raise StageError("the stage is closed: open a new session")
        if mode == "replace":
            self.interrupt()
        elif mode == "interrupt" and self._turns:
            self.cancel(self._turns[0].number)
        self._numbers += 1
        turn = Turn(self._numbers, owner, self.fps)
        if mode == "interrupt":
            if any(self._in_engine(one) for one in self._turns):
                self._rewind(self._first_slot_of_queue())
            self._turns.appendleft(turn)
        else:
            self._turns.append(turn)
        self.counters.turns += 1
        if self.state is State.IDLE:
            self._move(State.PROCESSING)
        self._wake.set()
        return turn.number

    def push(self, number: int, pcm: Int16, rate: int, cues: Sequence[Cue] = ()) -> None:
        """More sound of a turn; of one that is over, it is dropped.

        Raises InputError when the turn has ended, the rate is impossible, or more than
        `Options.backlog` seconds are waiting already.
        """
        turn = self._find(number)
        if turn is None:
            return
        if self.backlog > self.options.backlog:
            raise InputError(
                f"{self.options.backlog:.0f} s of speech are waiting already: "
                "send more when some of it has been spoken"
            )
        if len(pcm) and not turn.received and self.state is not State.TALKING:
            turn.arrived = self.clock.now()
        turn.push(pcm, rate, cues)
        self._wake.set()

    def end(self, number: int) -> None:
        """The turn is complete. Idempotent."""
        turn = self._find(number)
        if turn is not None:
            turn.ended = True
            self._wake.set()

    def cancel(self, number: int) -> None:
        """Forget a turn, now. Of one that is over, nothing happens."""
        turn = self._find(number)
        if turn is None:
            if self._tail is not None and self._tail.number == number and not self._on_air():
                self._cut(self._tail)
            return
        first = next((i for i, slot in enumerate(self._deck) if slot.turn is turn), None)
        self._turns.remove(turn)
        if first is None and turn.frames == 0 and not self._in_engine(turn):
            self._over(turn, 0.0, interrupted=True)
        else:
            self._rewind(len(self._deck) if first is None else first)
            if turn.frames:
                self._cut(turn)
            else:
                self._over(turn, 0.0, interrupted=True)
        if self.state is State.TALKING and not self._on_air():
            self._transition(self.options.ease)
        self._settle()
        self._produce()

    def interrupt(self) -> int:
        """Cancel every turn, present and queued; how many those were."""
        numbers = [turn.number for turn in reversed(self._turns)]
        if self._tail is not None:
            numbers.append(self._tail.number)
        for number in numbers:
            self.cancel(number)
        return len(numbers)

    def swap(self, engine: EngineSession, submit: Submit) -> None:
        """Go on with another engine session from the next frame on: same sinks, same turns.

        What was shown stays shown, and what is being said goes on at its next frame. Raises
        StageError when size or rate differ, since the sinks have one of each for life.
        """
        if self._closed:
            raise StageError("the stage is closed: open a new session")
        was, spec = self.engine.spec, engine.spec
        if (was.width, was.height, was.fps) != (spec.width, spec.height, spec.fps):
            raise StageError(
                f"a stage of {was.width}x{was.height} at {was.fps} can't go on with "
                f"{spec.width}x{spec.height} at {spec.fps}: prepare the persona at its size"
            )
        for slot in self._deck:
            slot.picture.drop()
        self._deck.clear()
        for turn in self._turns:
            if self._in_engine(turn):
                turn.rewind()
        engine.reset(clock=self._next_clock, ease=self.options.ease)
        self.engine, self._submit = engine, submit
        self._posed = ""
        self._pose()
        self._produce()
        self._wake.set()

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self) -> None:
        """Hold speech: what is drawn is shown (`Options.ahead` frames), then the mouth closes.

        Nothing is lost; turns can still be begun, pushed and cancelled. Idempotent.
        """
        self._paused = True

    def resume(self) -> None:
        """Go on where it was held. Idempotent."""
        self._paused = False
        self._wake.set()

    def pose(self, name: str) -> None:
        """How the face is held while it doesn't speak: one of `media.POSES`, until another is
        asked for. A turn that waits for its first sound makes it think; its own speech ends a
        "thinking". An engine that has no poses goes on as it is. Raises InputError."""
        if name not in POSES:
            known = ", ".join(repr(one) for one in POSES)
            raise InputError(f"there is no pose {name!r}: use one of {known}")
        self._asked = name
        self._pose()

    def gesture(self, name: str) -> None:
        """One gesture, now, whoever speaks. Raises InputError when the engine doesn't know it."""
        if not isinstance(self.engine, Expressive):
            raise InputError("this persona's engine makes no gestures")
        try:
            self.engine.gesture(name)
        except EngineError as error:
            raise InputError(str(error)) from None

    def _pose(self) -> None:
        """Tell the engine, if it is another one now."""
        if self.state is State.TALKING and self._asked == "thinking":
            self._asked = ""  # here is the answer
        name = "thinking" if self.state is State.PROCESSING else self._asked
        if name != self._posed and isinstance(self.engine, Expressive):
            self.engine.pose(name)
        self._posed = name

    def waiting(self) -> list[int]:
        """Numbers of the turns that are not over, in the order they will be spoken."""
        return [turn.number for turn in self._turns]

    def backlog_of(self, number: int) -> float:
        """Seconds of a turn that came in and were not shown yet; 0 of one that is over."""
        turn = self._find(number)
        return turn.backlog if turn is not None else 0.0

    def played_of(self, number: int) -> float:
        """Seconds of a turn that were put into frames; 0 of one that is over."""
        turn = self._find(number)
        return turn.played / FRAME_RATE if turn is not None else 0.0

    @property
    def backlog(self) -> float:
        """Seconds of speech that came in and were not shown yet."""
        return sum(turn.backlog for turn in self._turns)

    @property
    def index(self) -> int:
        """Of the next frame."""
        return self._index

    # -- one tick ----------------------------------------------------------------------------------

    def tick(self) -> Frame:
        """Make the next frame and hand it to the sinks."""
        begin = time.perf_counter()
        self._produce()
        count = slice_start(self._index + 1, FRAME_RATE, self.fps) - slice_start(
            self._index, FRAME_RATE, self.fps
        )
        turn = self._next_turn()
        if turn is None:
            audio = np.zeros(count, np.int16)
        else:
            first = turn.frames == 0
            audio = turn.take_frame(count)
            if self.state is not State.TALKING:
                self._move(State.TALKING)
            self.counters.talking += 1
        frame = Frame(self._index, self._image, audio, turn.number if turn is not None else None)
        self._put(frame)
        self._index += 1
        self.counters.frames += 1
        metrics.frame("idle" if turn is None else "talking")
        if turn is not None:
            self._after(turn, first)
        elif self.state is State.TRANSITIONING:
            self._closing_frames -= 1
        self._settle()
        self._produce()
        self.notify()
        metrics.TICK.observe(time.perf_counter() - begin)
        return frame

    def notify(self) -> None:
        """Tell owners what has been heard by now."""
        if not self._notices:
            return
        now = self.clock.now()
        due = [notice for notice in self._notices if notice[0] <= now]
        self._notices = [notice for notice in self._notices if notice[0] > now]
        for _, _, tell in due:
            tell()

    def _next_turn(self) -> Turn | None:
        """Move to the next picture. The turn whose sound goes with it; None if it is silent."""
        if not self._deck:
            self.counters.idle_late += 1
            return None
        slot = self._deck[0]
        turn = slot.turn
        if turn is not None and turn.frames == 0 and turn.held < self.options.hold:
            if not slot.picture.done:
                turn.held += 1  # picture and sound begin together
                self.counters.idle_late += 1
                return None
        self._deck.popleft()
        self._next_clock = slot.picture.job.clock + 1
        if slot.picture.image is not None:
            self._image = slot.picture.image
        else:
            slot.picture.drop()
            metrics.LATE_FRAMES.inc()
            if slot.picture.error is not None:
                self.counters.failed += 1
            if turn is not None:
                self.counters.late += 1
                turn.late += 1
            else:
                self.counters.idle_late += 1
        if turn is None and self._turns and self._turns[0].frames:
            self.counters.paused += 1
        return turn

    def _after(self, turn: Turn, first: bool) -> None:
        """A frame of `turn` was put."""
        latency = self.sinks[0].latency if self.sinks else 0.0
        now = self.clock.now()
        if first:
            self._notices.append((now + latency, turn, lambda: self._started(turn)))
            if turn.arrived is not None:
                metrics.FIRST_PICTURE.observe(now - turn.arrived)
        for cue in turn.heard_cues():
            self._notice_cue(turn, cue, now + latency)
        if turn.shown:
            for cue in turn.rest_of_cues():
                self._notice_cue(turn, cue, now + latency)
            self._turns.remove(turn)
            self._tail = turn
            if turn.late >= max(LATE * turn.frames, self.fps / 2):
                logger.warning(
                    "pictures came too late: drawing does not keep up with speech on this machine",
                    extra={"late": turn.late, "pictures": turn.frames},
                )
            heard = turn.played / FRAME_RATE
            self._notices.append(
                (
                    now + latency + 1 / self.fps,
                    turn,
                    lambda: self._over(turn, heard, interrupted=False),
                )
            )
            if not self._on_air():
                self._transition(self.engine.spec.ease)

    def _notice_cue(self, turn: Turn, cue: Cue, when: float) -> None:
        self._notices.append((when, turn, lambda: turn.owner.cue(turn.number, cue)))

    def _on_air(self) -> bool:
        """Speech comes next, or the turn that was being shown is only waiting for sound."""
        if self._deck and self._deck[0].turn is not None:
            return True
        return bool(self._turns) and self._turns[0].frames > 0

    def _put(self, frame: Frame) -> None:
        for sink in self.sinks:
            try:
                sink.put(frame)
            except Exception:  # one sink's fault must not end the picture for the others
                self.counters.sink_errors += 1
                if self.counters.sink_errors < 10:
                    logger.exception("a sink failed", extra={"sink": type(sink).__name__})

    # -- drawing ahead -----------------------------------------------------------------------------

    def _produce(self) -> None:
        """Fill the deck: speech as far as it goes, idle frames otherwise."""
        options = self.options
        while True:
            turn = next((one for one in self._turns if not one.flushed), None)
            if turn is not None and self._may_feed(turn):
                if len(self._deck) >= options.ahead:
                    return
                if self._feed(turn):
                    continue
                turn.primed = False  # it ran dry: gather a little before going on
            # A turn without sound brings no picture: it is over when the next one is shown.
            waits = options.patient and bool(self._turns) and not self._soundless()
            waits = waits and not self._paused
            if len(self._deck) >= options.idle_ahead or waits:
                return
            self._append(self.engine.idle(1), None)

    def _may_feed(self, turn: Turn) -> bool:
        if self._paused:
            return False
        if not turn.primed:
            spec = self.engine.spec
            frames = self.options.margin + spec.step - 1
            turn.primed = turn.ready(spec.lookahead / ENGINE_RATE + frames / self.fps)
        return turn.primed

    def _feed(self, turn: Turn) -> bool:
        """One more piece of a turn to the engine; False if there is none."""
        cues = turn.take_cues()
        if cues:
            self.engine.cue(cues)
        piece = turn.feed()
        if piece is not None:
            self._append(self.engine.push(piece), turn)
        if turn.fed_all:
            jobs = self.engine.flush()
            turn.flushed = True
            self._append(jobs, turn)
            self._check_count(turn)
            return True
        return piece is not None

    def _check_count(self, turn: Turn) -> None:
        """The contract's frame count; an engine that breaks it must not wedge the queue."""
        made = turn.frames + sum(slot.turn is turn for slot in self._deck)
        if made == turn.total:
            return
        logger.error(
            "engine broke the frame count of a turn", extra={"made": made, "total": turn.total}
        )
        while made > (turn.total or 0):
            self._deck.pop().picture.drop()
            made -= 1
        while made < (turn.total or 0):
            lost = Picture(Job(self.engine, self._end_clock(), speech=True))
            lost.settle(error=EngineError("the engine made no picture for this frame"))
            self._deck.append(Slot(lost, turn))
            made += 1

    def _append(self, jobs: Sequence[Job], turn: Turn | None) -> None:
        now = self.clock.now()
        due = [now + (len(self._deck) + i) / self.fps for i in range(len(jobs))]
        for picture in self._submit(jobs, due):
            self._deck.append(Slot(picture, turn))

    def _in_engine(self, turn: Turn) -> bool:
        return turn.primed or turn.flushed

    def _first_slot_of_queue(self) -> int:
        """Where in the deck the first turn begins that has shown nothing yet."""
        for i, slot in enumerate(self._deck):
            if slot.turn is not None and slot.turn.frames == 0:
                return i
        return len(self._deck)

    def _rewind(self, first: int) -> None:
        """Unmake the deck from slot `first` on. Turns in it that showed nothing start over."""
        deck = list(self._deck)
        clock = deck[first].picture.job.clock if first < len(deck) else self._end_clock()
        for slot in deck[first:]:
            slot.picture.drop()
        self._deck = deque(deck[:first])
        self.engine.reset(clock=clock, ease=self.options.ease)
        for turn in self._turns:
            if turn.frames == 0 and self._in_engine(turn):
                if not any(slot.turn is turn for slot in self._deck):
                    turn.rewind()

    def _end_clock(self) -> int:
        return self._deck[-1].picture.job.clock + 1 if self._deck else self._next_clock

    # -- the end of turns --------------------------------------------------------------------------

    def _cut(self, turn: Turn) -> None:
        """A turn that is on air, or still being heard, ends here."""
        dropped = self._clear_sinks()
        metrics.INTERRUPTIONS.inc()
        if self._tail is turn:
            self._tail = None
        self._over(turn, max(0.0, turn.played / FRAME_RATE - dropped), interrupted=True)

    def _clear_sinks(self) -> float:
        dropped = [sink.clear() for sink in self.sinks]
        return dropped[0] if dropped else 0.0

    def _over(self, turn: Turn, heard: float, *, interrupted: bool) -> None:
        """Exactly one `finished` a turn."""
        if turn.over:
            return
        turn.over = True
        self._notices = [notice for notice in self._notices if notice[1] is not turn]
        if heard > 0:
            self._started(turn)
        if self._tail is turn:
            self._tail = None
        self.counters.interrupted += interrupted
        turn.owner.finished(turn.number, heard, interrupted)

    @staticmethod
    def _started(turn: Turn) -> None:
        if not turn.announced:
            turn.announced = True
            turn.owner.started(turn.number)

    def _settle(self) -> None:
        """Turns without sound end as their time comes, and the state follows."""
        while self._tail is None and self._soundless():
            self._over(self._turns.popleft(), 0.0, interrupted=False)
        if self.state is State.TRANSITIONING and self._closing_frames <= 0:
            self._move(State.IDLE)
        if self.state is State.IDLE and self._turns:
            self._move(State.PROCESSING)
        elif self.state is State.PROCESSING and not self._turns:
            self._move(State.IDLE)

    def _soundless(self) -> bool:
        """The next turn is complete, and has no sound."""
        return bool(self._turns) and self._turns[0].flushed and self._turns[0].total == 0

    def _transition(self, frames: int) -> None:
        self._move(State.TRANSITIONING)
        self._closing_frames = frames

    def _move(self, to: State) -> None:
        self.state = move(self.state, to)
        self._pose()
        if self._on_state is not None:
            self._on_state(to)

    def _find(self, number: int) -> Turn | None:
        return next((turn for turn in self._turns if turn.number == number), None)

    # -- time --------------------------------------------------------------------------------------

    async def prime(self) -> None:
        """Wait for the first pictures, so that the first frame is a face."""
        self._produce()
        for slot in list(self._deck):
            await slot.picture.wait()
            if slot.picture.error is not None:
                raise slot.picture.error

    async def run(self) -> None:
        """Emit a frame every 1/fps until cancelled. Call `prime` first."""
        start = self.clock.now()
        origin = self._index
        while not self._closed:
            due = start + (self._index - origin) / self.fps
            await self.clock.sleep_until(due)
            if self.options.patient:
                await self._everything()
            elif (behind := self.clock.now() - due) > self.options.stall:
                self.counters.stalls += 1
                self.counters.stalled += behind
                start, origin = due + behind, self._index
            self.tick()

    async def _everything(self) -> None:
        """For files: the next picture is drawn, its sound is there, and the file has room."""
        for sink in self.sinks:
            if isinstance(sink, PatientSink):
                await sink.drain()
        while True:
            self._wake.clear()
            self._settle()
            self._produce()
            if self._deck:
                await self._deck[0].picture.wait()
                return
            await self._wake.wait()

    async def attach(self, source: Source, mode: Mode = "append") -> None:
        """Play a source until it ends. Its turns are cancelled if this call is."""
        owner = _Relay(source)
        try:
            async for item in source:
                if item.turn not in owner.numbers and not isinstance(item, Cancel):
                    first = item.mode if isinstance(item, Begin) else mode
                    owner.opened(item.turn, self.begin(owner, first))
                number = owner.numbers.get(item.turn)
                if number is None:
                    continue
                if isinstance(item, Audio):
                    self.push(number, item.pcm, item.rate, item.cues)
                elif isinstance(item, End):
                    self.end(number)
                elif isinstance(item, Cancel):
                    self.cancel(number)
        except BaseException:
            for number in list(owner.numbers.values()):
                self.cancel(number)
            raise
        for number in list(owner.numbers.values()):
            self.end(number)

    def close(self) -> None:
        """Cancel what is left and accept nothing more. Idempotent."""
        if self._closed:
            return
        self.interrupt()
        self._closed = True
        for slot in self._deck:
            slot.picture.drop()
        self._deck.clear()
        self._wake.set()


class _Relay:
    """Carries a source's own turn numbers to the stage's and back."""

    def __init__(self, source: Source) -> None:
        self.numbers: dict[int, int] = {}
        """The stage's number of each of the source's turns that is not over."""
        self._source = source
        self._own: dict[int, int] = {}

    def opened(self, own: int, number: int) -> None:
        self.numbers[own] = number
        self._own[number] = own

    def started(self, turn: int) -> None:
        self._source.started(self._own[turn])

    def finished(self, turn: int, heard: float, interrupted: bool) -> None:
        own = self._own.pop(turn)
        del self.numbers[own]
        self._source.finished(own, heard, interrupted)

    def cue(self, turn: int, cue: Cue) -> None:
        """Sources say what they know; they don't want it back."""
