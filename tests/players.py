"""Small parts for testing a stage without a clock, a thread or a codec.

`FakeSession` keeps the engine contract and draws 2x4 pictures that say what they are: the picture
clock, whether they speak, and a running number of the turn's frame. `FakeSink` plays in the stage's
own time with a fixed delay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from voipavatar.engines import CUT, Job, Picture, Spec
from voipavatar.media import Cue, Float32, Frame, Int16, ManualClock, UInt8
from voipavatar.stage import Options, Stage, State

HOP = 640


class FakeSession:
    """An engine session with lookahead whose job data is ("idle", 0) or (sum of samples, frame)."""

    def __init__(self, fps: int = 25, lookahead: int = 1280, step: int = 1) -> None:
        self.spec = Spec(width=4, height=4, fps=fps, lookahead=lookahead, step=step, ease=8)
        self.clock = 0
        self.resets: list[int | None] = []
        self.cues: list[Cue] = []
        self._pcm = np.zeros(0, np.float32)
        self._made = 0

    def push(self, pcm: Float32) -> list[Job]:
        self._pcm = np.concatenate([self._pcm, pcm])
        jobs: list[Job] = []
        while len(self._pcm) >= self.spec.first(self._made + self.spec.step) + self.spec.lookahead:
            jobs.extend(self._speech() for _ in range(self.spec.step))
        return jobs

    def flush(self) -> list[Job]:
        jobs: list[Job] = []
        while self.spec.first(self._made) < len(self._pcm):
            jobs.append(self._speech())
        self._pcm, self._made = np.zeros(0, np.float32), 0
        return jobs

    def idle(self, n: int) -> list[Job]:
        return [self._job(False, ("idle", 0.0)) for _ in range(n)]

    def reset(self, clock: int | None = None, ease: int = CUT) -> None:
        self.resets.append(clock)
        if clock is not None:
            self.clock = clock
        self._pcm, self._made = np.zeros(0, np.float32), 0

    def cue(self, cues: Sequence[Cue]) -> None:
        self.cues.extend(cues)

    def _speech(self) -> Job:
        begin, end = self.spec.first(self._made), self.spec.first(self._made + 1)
        level = float(np.abs(self._pcm[begin:end]).max(initial=0.0))
        self._made += 1
        return self._job(True, (self._made - 1, level))

    def _job(self, speech: bool, data: object) -> Job:
        self.clock += 1
        return Job(self, self.clock - 1, speech, data)


def draw(job: Job) -> UInt8:
    """A picture that tells its job: [clock, speech, frame of the turn, level]."""
    image = np.zeros((6, 4), np.uint8)
    image[0, 0] = job.clock % 256
    image[0, 1] = job.speech
    if job.speech:
        image[0, 2] = job.data[0] % 256
        image[0, 3] = round(job.data[1] * 255)
    return image


class FakeSink:
    """Remembers frames; what was put within `delay` is still unplayed when it is cleared."""

    def __init__(self, clock: ManualClock, delay: float = 0.0) -> None:
        self.frames: list[Frame] = []
        self.cleared: list[float] = []
        self.closed = 0
        self.latency = delay
        self._clock = clock
        self._ends = 0.0

    def put(self, frame: Frame) -> None:
        self.frames.append(frame)
        self._ends = max(self._ends, self._clock.now() + self.latency) + len(frame.audio) / 48_000

    def clear(self) -> float:
        dropped = max(0.0, self._ends - self._clock.now())
        self._ends = 0.0
        self.cleared.append(dropped)
        return dropped

    async def aclose(self) -> None:
        self.closed += 1


class Owner:
    """A turn's owner that writes down what it is told."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []

    def started(self, turn: int) -> None:
        self.log.append(("started", turn))

    def finished(self, turn: int, heard: float, interrupted: bool) -> None:
        self.log.append(("finished", turn, round(heard, 4), interrupted))

    def cue(self, turn: int, cue: Cue) -> None:
        self.log.append(("cue", turn, cue.text))

    def ends(self) -> list[tuple[object, ...]]:
        return [entry for entry in self.log if entry[0] == "finished"]


class Player:
    """A stage, its fakes and a clock that a test turns by hand."""

    def __init__(
        self,
        *,
        fps: int = 25,
        lookahead: int = 1280,
        step: int = 1,
        delay: float = 0.0,
        options: Options | None = None,
        slow: Callable[[Job], bool] = lambda job: False,
    ) -> None:
        self.clock = ManualClock(100.0)
        self.engine = FakeSession(fps, lookahead, step)
        self.sink = FakeSink(self.clock, delay)
        self.owner = Owner()
        self.states: list[State] = []
        self.pictures: list[Picture] = []
        self._slow = slow
        self.stage = Stage(
            self.engine, self.submit, self.clock, [self.sink], options, self.states.append
        )

    def submit(self, jobs: Sequence[Job], due: Sequence[float]) -> list[Picture]:
        made = []
        for job in jobs:
            picture = Picture(job)
            if not self._slow(job):
                picture.settle(draw(job))
            made.append(picture)
        self.pictures.extend(made)
        return made

    async def tick(self, count: int = 1) -> list[Frame]:
        before = len(self.sink.frames)
        for _ in range(count):
            self.stage.tick()
            await self.clock.sleep_until(self.clock.now() + 1 / self.stage.fps)
        self.stage.notify()
        return self.sink.frames[before:]

    def say(
        self, seconds: float, rate: int = 16_000, end: bool = True, mode: str = "append"
    ) -> int:
        number = self.stage.begin(self.owner, mode)  # type: ignore[arg-type]
        self.stage.push(number, tone(seconds, rate), rate)
        if end:
            self.stage.end(number)
        return number

    def clocks(self) -> list[int]:
        """Picture clocks of the frames that were shown."""
        return [int(frame.image[0, 0]) for frame in self.sink.frames]


def tone(seconds: float, rate: int = 16_000, hz: float = 300.0, level: float = 0.5) -> Int16:
    times = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * hz * times) * level * 32767).astype(np.int16)
