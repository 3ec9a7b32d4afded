"""MuseTalk: a photoreal mouth for any portrait or clip, in real time on a GPU.

    sound -> log-mel -> whisper's hidden states -> 50 tokens a frame
    picture -> two latents (lower half masked, whole)   -> UNet, once, at t = 0 -> latent
    latent -> VAE decoder -> 256 x 256 face -> blended into the picture

`Ear` says which sound belongs to which frame, `MuseTalkSession` what is shown, `MuseTalk` draws it,
batched over sessions. The model is MuseTalk's (arXiv 2410.10122); what differs from its published
scripts is named where it happens, and `parity: true` switches the differences off.

Streaming. Whisper hears 30 s at once. Here its window is anchored at the turn's start and grows,
so that positions and what lies to the left are as they would be offline; it is heard anew for
every `step` frames, cut exactly `lookahead` after the last of them. What a frame is drawn from is
therefore a function of the sound alone, however it was cut into pushes.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..avatar import Box, Loop, digest, file_digest, fold, paste
from ..config import Settings
from ..errors import AvatarError, ConfigError, EngineError
from ..faces import (
    UPSTREAM,
    Clip,
    DwPose,
    Given,
    Landmarker,
    Mesh,
    Parser,
    Plan,
    from_yaml,
    import_loop,
    prepare_loop,
)
from ..media import ENGINE_RATE, Cue, Float32, UInt8, check_fps, frames_for, slice_start
from ..models import Recipe, is_random, load_recipe, weights_key
from . import CUT, Avatar, EngineInfo, Job, Progress, Spec
from .runtimes import (
    BATCHES,
    ArtefactKey,
    Artefacts,
    Kind,
    OnnxRuntime,
    Precision,
    Runtime,
    TensorRt,
    TorchRuntime,
    batched,
    device_arch,
    missing,
    tensorrt_module,
    torch_dtype,
)

log = logging.getLogger(__name__)

VERSION = 1
"""Of the prepared folder."""

ROW = 320
"""Samples that one row of whisper's hidden states stands for: 50 a second."""

WINDOW = 10
"""Rows that a frame is drawn from."""

BEFORE = 4
"""How many of them lie before the frame's first sample: rows 2i - 4 to 2i + 5 at 25 fps."""

BUILT_ROWS = 24
"""Rows of one hearing in exported networks, whose shapes are fixed: steps of 8 at 25 fps."""

HEARD = 2120
"""Samples after a frame's first that its last row depends on: 5 rows and 32.5 ms of mel window."""


# --- options --------------------------------------------------------------------------------------


class Options(BaseModel):
    """What a persona says to this engine under `engine_options`, with the size it is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # which networks
    recipe: str = "musetalk-v15"
    runtime: Kind = "torch"
    precision: Precision | None = None
    """fp16 on a GPU, fp32 on a CPU, unless said."""
    device: str | None = None
    models: Path | None = None
    """Where the weights are; the cache's `models` unless said."""
    # the picture
    width: int = Field(default=1280, ge=64, multiple_of=2)
    height: int = Field(default=720, ge=64, multiple_of=2)
    fps: int = Field(default=25, ge=1, le=120)
    landmarks: dict[str, Any] | None = None
    fit: Literal["cover", "contain", "native"] = "cover"
    background: tuple[int, int, int] = (0, 0, 0)
    seconds: float = Field(default=30.0, gt=0, le=600)
    """The longest loop that is taken from a clip."""
    # the face
    landmarker: Literal["auto", "given", "dwpose", "mesh"] = "auto"
    region: Box | None = None
    """The box of the person who is meant, in pixels of the loop (DWPose)."""
    face_at: tuple[float, float] | None = None
    """A point in the face that is meant, in pixels of the loop (mesh)."""
    parser: Literal["auto", "bisenet", "points"] = "auto"
    shift: int = 0
    margin: int = Field(default=10, ge=0)
    mask: Literal["raw", "neck", "jaw", "points"] = "jaw"
    cheeks: tuple[int, int] = (90, 90)
    upper: float = Field(default=0.5, ge=0, lt=1)
    softness: float = Field(default=0.1, gt=0, le=0.5)
    smoothing: float = Field(default=1.5, ge=0)
    max_side: float = Field(default=0.85, gt=0)
    # the sound
    audio: Literal["stream", "offline"] = "stream"
    legacy_audio: bool = False
    """Whisper's last state before its final norm: what v1.0 was first published with."""
    step: int = Field(default=2, ge=1, le=25)
    """Frames that are heard, and so come out, together."""
    right_ms: int = Field(default=0, ge=0, le=1000)
    """Sound beyond what a frame's rows need, for whisper's attention to the future."""
    gate: bool = True
    """Show the source while the speech pauses."""
    ease_in: int = Field(default=4, ge=1)
    ease_out: int = Field(default=8, ge=1)
    repeat_ends: bool = False
    parity: bool = False
    """As MuseTalk's published scripts do it: see `read_options`."""


PARITY: dict[str, Any] = {
    "fit": "native",
    "smoothing": 0.0,
    "max_side": 1e9,
    "audio": "offline",
    "gate": False,
    "ease_in": 1,
    "repeat_ends": True,
}


def read_options(options: Mapping[str, Any]) -> tuple[Options, Recipe]:
    """A persona's options over the recipe's; ConfigError names the key that can't be used."""
    try:
        recipe = load_recipe(str(options.get("recipe", Options.model_fields["recipe"].default)))
        parity = PARITY if options.get("parity") else {}
        merged = Options.model_validate({**recipe.options, **parity, **options})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Options.model_fields)
        hint = f"; known are {known}" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"engine_options.{key}: {first['msg']}{hint}") from None
    check_fps(merged.fps)
    if recipe.version == "v15" and merged.shift:
        raise ConfigError("engine_options.shift: v1.5 has none; take margin, or musetalk-v10")
    return merged, recipe


# --- hearing --------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def mel_filters(mels: int = 80) -> Float32:
    """(201, mels): Slaney's triangles from 0 to 8000 Hz over the bins of a 400 point transform."""

    def hertz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        line, curve = 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27)
        return np.where(mel < 15, line, curve)

    top = 15 + 27 * np.log(8000 / 1000) / np.log(6.4)
    edges = hertz(np.linspace(0, top, mels + 2))
    bins = np.linspace(0, ENGINE_RATE / 2, 201)
    rise = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    area = 2 / (edges[2:] - edges[:-2])
    return np.asarray(np.maximum(0, np.minimum(rise, fall)) * area, np.float64)


def log_mel(samples: Float32, mels: int = 80) -> Float32:
    """(160 * (n - 1) + 400,) samples -> (n, mels): log10 of the mel power of n windows."""
    windows = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), 400)[::160]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.abs(np.fft.rfft(windows * hann)) ** 2
    return np.log10(np.maximum(power @ mel_filters(mels), 1e-10)).astype(np.float32)


SILENT = -10.0
"""log10 of the least power there is."""

LOUD = 0.0
"""The log-mel maximum that a turn starts with: that of speech at about -26 dBFS. Whisper's input
is cut 8 below the maximum; with a maximum of its own a quiet beginning would be heard as loud."""


class Segment:
    """What whisper hears at once: up to 30 s of a turn, and its log-mel as far as it is known.

    Columns are made when they are first wanted, always in the same blocks, so that they don't
    depend on who asked when. Sound is appended on one thread while another reads what was there.
    """

    BLOCK = 32

    def __init__(
        self, start: int, rows: int, mels: int, earlier: Segment | None, running: bool
    ) -> None:
        """`start`: the turn's sample that is the first here.
        `running`: the maximum is that of the turn so far, not of this segment alone."""
        self.start = start
        self.rows = rows
        self.mels = mels
        self.pcm = np.zeros(rows * ROW, np.float32)
        self.length = 0
        self._earlier = earlier
        self._running = running
        self._blocks: list[Float32] = []
        self._peaks: list[float] = []
        self._floor: float | None = None
        self._lock = threading.Lock()

    @property
    def room(self) -> int:
        """Samples that still fit. The last window's end is kept free of its mirror image."""
        return len(self.pcm) - self.length

    def append(self, pcm: Float32) -> None:
        self.pcm[self.length : self.length + len(pcm)] = pcm
        self.length += len(pcm)

    def mel(self, end: int) -> Float32:
        """(mels, 2 * rows): as whisper wants it, of the first `end` samples; silence after."""
        columns = 2 * self.rows
        with self._lock:
            final = max(0, (end - 200) // 160 + 1) if end >= 200 else 0
            blocks = min(final, columns) // self.BLOCK
            for i in range(len(self._blocks), blocks):
                block = self._columns(i * self.BLOCK, (i + 1) * self.BLOCK, end)
                self._blocks.append(block)
                self._peaks.append(float(block.max()))
            out = np.full((columns, self.mels), SILENT, np.float32)
            first = blocks * self.BLOCK
            if blocks:
                np.concatenate(self._blocks[:blocks], out=out[:first])
            last = min(columns, -(-(end + 200) // 160))
            if last > first:
                out[first:last] = self._columns(first, last, end)
            peak = max([SILENT, *self._peaks[:blocks]])
            if last > first:
                peak = max(peak, float(out[first:last].max()))
            if self._running:
                peak = max(peak, self._before())
        out = np.maximum(out, np.float32(peak - 8.0))
        return np.ascontiguousarray(((out + np.float32(4.0)) / np.float32(4.0)).T)

    def _before(self) -> float:
        """The maximum of everything before this segment."""
        if self._floor is None:
            self._floor = LOUD if self._earlier is None else self._earlier.peak()
            self._earlier = None
        return self._floor

    def peak(self) -> float:
        """The turn's maximum up to this segment's end."""
        self.mel(self.length)
        with self._lock:
            return max([SILENT, *self._peaks, self._before()])

    def _columns(self, first: int, last: int, end: int) -> Float32:
        """Log-mel of columns [first, last), with silence from sample `end` on.

        The waveform is mirrored at both ends of the segment, as a centred transform does.
        """
        at = np.abs(np.arange(160 * first - 200, 160 * (last - 1) + 200))
        size = len(self.pcm)
        at = np.where(at >= size, 2 * size - 2 - at, at)
        return log_mel(np.where(at < end, self.pcm[at], np.float32(0)), self.mels)


@dataclass(frozen=True, slots=True, eq=False)
class Hop:
    """One hearing: a segment up to some sample, and which rows are wanted of it."""

    segment: Segment
    end: int
    rows: npt.NDArray[np.int64]

    def mel(self) -> Float32:
        return self.segment.mel(self.end)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [first, first + count) of a hop are rows [place, place + count) of a window."""

    hop: Hop
    first: int
    count: int
    place: int


Spans = tuple[Span, ...]
"""A frame's window. What no span fills is zero."""


@dataclass(frozen=True)
class Hearing:
    """The times of an ear."""

    fps: int = 25
    step: int = 2
    right: int = 0
    """Samples."""
    offline: bool = False
    positions: int = 1500
    mels: int = 80

    @property
    def lookahead(self) -> int:
        """Samples after a frame's end that must be there before it can be drawn."""
        if self.offline:
            return self.positions * ROW + HEARD
        return max(0, HEARD - ENGINE_RATE // self.fps) + self.right

    @property
    def reach(self) -> int:
        """Rows of one hop."""
        return WINDOW + -(-(self.step - 1) * 50 // self.fps)

    @property
    def before(self) -> int:
        """Rows of a window before its frame. MuseTalk's scripts put the window elsewhere at other
        rates than the 25 they were trained at; that is kept for comparison only."""
        return 2 * -(-50 // self.fps) if self.offline else BEFORE

    def base(self, frame: int) -> int:
        """First row of a frame's window, counted from the turn's first sample."""
        return frame * 50 // self.fps - self.before


class Ear:
    """One turn's sound, as windows. Pure: no clock, no thread, no network.

    `push` and `flush` give `(spans, speaking)` for each frame that can now be drawn.
    """

    QUIET = 10 ** (-54 / 20)
    """Frames below this level (RMS), or 34 dB below the turn's loudest, are a pause."""
    HOLD = 6
    """Pausing frames before the mouth starts to close."""

    def __init__(self, hearing: Hearing) -> None:
        h = self.hearing = hearing
        self.samples = 0
        self.frames = 0
        self._context = min(100, h.positions // 5)  # rows kept to the left of a seam
        self._segment = Segment(0, h.positions, h.mels, None, not h.offline)
        self._segments = [self._segment]  # all, when offline
        self._levels: list[float] = []
        self._loudest = 0.0
        self._pausing = self.HOLD

    def push(self, pcm: Float32) -> list[tuple[Spans, bool]]:
        """Any length. What comes out does not depend on how the sound was cut."""
        out: list[tuple[Spans, bool]] = []
        start = 0
        while True:
            end = self._due(self.frames + self.hearing.step)
            take = min(len(pcm) - start, end - self.samples)
            if take > 0:
                self._append(pcm[start : start + take])
                start += take
            if self.samples < end:
                return out
            out += self._emit(self.frames + self.hearing.step, end)

    def flush(self) -> list[tuple[Spans, bool]]:
        """The rest of the turn's frames."""
        total = frames_for(self.samples, ENGINE_RATE, self.hearing.fps)
        out: list[tuple[Spans, bool]] = []
        while self.frames < total:
            out += self._emit(min(total, self.frames + self.hearing.step), self.samples)
        return out

    def tail(self, n: int) -> list[Spans]:
        """Windows of the `n` frames after the turn's last: a mouth that comes to rest."""
        if self.hearing.offline or self.samples == 0:
            return []
        out: list[Spans] = []
        frame = self.frames
        while len(out) < n:
            more = self._windows(frame, frame + self.hearing.step, self.samples)
            frame += self.hearing.step
            out += more
        return out[:n]

    def _due(self, frames: int) -> int:
        """How much sound must be there before the frames up to `frames` can be drawn."""
        h = self.hearing
        end = slice_start(frames, ENGINE_RATE, h.fps) + h.lookahead
        if h.offline:
            # up to the end of the 30 s that hold the last row
            whole = h.positions * ROW
            last = h.base(frames - 1) + WINDOW - 1
            end = max(end - h.lookahead, (max(0, last) // h.positions + 1) * whole)
        return end

    def _append(self, pcm: Float32) -> None:
        self.samples += len(pcm)
        while len(pcm):
            if self.hearing.offline and self._segment.room == 0:
                start = self._segment.start + len(self._segment.pcm)
                self._segment = Segment(
                    start, self.hearing.positions, self.hearing.mels, None, False
                )
                self._segments.append(self._segment)
            if not self.hearing.offline and len(pcm) + 400 > self._segment.room:
                self._renew(self.frames)
            take = min(len(pcm), self._segment.room)
            self._segment.append(pcm[:take])
            pcm = pcm[take:]

    def _renew(self, frame: int) -> None:
        """A new segment for the frames from `frame` on, with some of the sound before them."""
        old = self._segment
        start = (self.hearing.base(frame) - self._context) * ROW
        new = Segment(start, old.rows, old.mels, old, True)
        new.append(old.pcm[start - old.start : old.length])
        self._segment = new

    def _emit(self, until: int, end: int) -> list[tuple[Spans, bool]]:
        speaking = [self._speaks(frame, end) for frame in range(self.frames, until)]
        if not self.hearing.offline:
            # the seam is put where nobody speaks, if there is such a place in good time
            age = (self.hearing.base(until) * ROW - self._segment.start) / len(self._segment.pcm)
            if age > 0.7 and not any(speaking):
                self._renew(self.frames)
        windows = self._windows(self.frames, until, end)
        self.frames = until
        return list(zip(windows, speaking, strict=True))

    def _windows(self, first: int, until: int, end: int) -> list[Spans]:
        h = self.hearing
        if h.offline:
            return self._cut_windows(first, until)
        segment = self._segment
        base = h.base(first) - segment.start // ROW
        # before the turn's first row there is that row again, where MuseTalk's scripts put zeros:
        # whisper never says zero, and a mouth jumps at it
        rows = np.clip(np.arange(base, base + h.reach), 0, h.positions - 1)
        hop = Hop(segment, min(end - segment.start, segment.length), rows)
        return [
            (Span(hop, h.base(frame) - h.base(first), WINDOW, 0),) for frame in range(first, until)
        ]

    def _cut_windows(self, first: int, until: int) -> list[Spans]:
        """Windows over segments that know nothing of each other, zeros at both ends of the turn:
        what MuseTalk does with a file."""
        h = self.hearing
        known = self.samples // ROW
        hops: dict[int, Hop] = {}
        out: list[Spans] = []
        start = max(0, h.base(first))
        for frame in range(first, until):
            base = h.base(frame)
            spans: list[Span] = []
            lo, hi = max(0, base), min(known, base + WINDOW)
            while lo < hi:
                number = lo // h.positions
                stop = min(hi, (number + 1) * h.positions)
                inside = max(start, number * h.positions)  # first row of this hop
                if number not in hops:
                    segment = self._segments[number]
                    at = inside - number * h.positions
                    rows = np.clip(np.arange(at, at + h.reach), 0, h.positions - 1)
                    hops[number] = Hop(segment, segment.length, rows)
                spans.append(Span(hops[number], lo - inside, stop - lo, lo - base))
                lo = stop
            out.append(tuple(spans))
        return out

    def _speaks(self, frame: int, end: int) -> bool:
        """False in a pause. Looks as far ahead as the sound is known, so that lips part in time."""
        h = self.hearing
        ahead = frame + 1 + (0 if h.offline else h.lookahead * h.fps // ENGINE_RATE)
        while len(self._levels) < ahead:
            self._levels.append(self._level(len(self._levels), end))
            self._loudest = max(self._loudest, self._levels[-1])
        threshold = max(self.QUIET, 0.02 * self._loudest)
        if max(self._levels[frame:ahead]) > threshold:
            self._pausing = 0
        else:
            self._pausing += 1
        return self._pausing < self.HOLD

    def _level(self, frame: int, end: int) -> float:
        lo = slice_start(frame, ENGINE_RATE, self.hearing.fps)
        hi = min(end, slice_start(frame + 1, ENGINE_RATE, self.hearing.fps))
        segments = self._segments if self.hearing.offline else [self._segment]
        power = 0.0
        for segment in segments:
            a, b = max(0, lo - segment.start), min(segment.length, hi - segment.start)
            if b > a:
                power += float(np.square(segment.pcm[a:b]).sum())
        return float(np.sqrt(power / max(1, hi - lo)))


# --- a session ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shot:
    """What a job draws: a picture of the loop, and how much of a new mouth in it."""

    face: Networks
    loop: Loop
    picture: int
    strength: float
    spans: Spans


class MuseTalkSession:
    """One room: sound in, jobs out. The mouth's strength rises and falls; it never jumps."""

    def __init__(self, options: Options, networks: Networks, loop: Loop) -> None:
        self._options = options
        self._networks = networks
        self._loop = loop
        self._hearing = Hearing(
            options.fps,
            25 if options.audio == "offline" else options.step,
            options.right_ms * ENGINE_RATE // 1000,
            options.audio == "offline",
            networks.positions,
            networks.mels,
        )
        self._spec = Spec(
            loop.width,
            loop.height,
            options.fps,
            self._hearing.lookahead,
            self._hearing.step,
            options.ease_out,
        )
        self._ear = Ear(self._hearing)
        self._clock = 0
        self._strength = 0.0
        self._closing = 1 / options.ease_out
        self._spans: Spans = ()
        self._after: deque[Spans] = deque()
        # what each job showed, for as far back as an interruption may go
        self._shown: deque[tuple[int, float, Spans]] = deque(maxlen=4096)

    @property
    def spec(self) -> Spec:
        return self._spec

    @property
    def reach(self) -> int:
        """Rows of one hearing."""
        return self._hearing.reach

    def push(self, pcm: Float32) -> list[Job]:
        self._after.clear()
        return [self._speech(spans, speaking) for spans, speaking in self._ear.push(pcm)]

    def flush(self) -> list[Job]:
        jobs = [self._speech(spans, speaking) for spans, speaking in self._ear.flush()]
        self._after = deque(self._ear.tail(self._options.ease_out))
        self._ear = Ear(self._hearing)
        return jobs

    def idle(self, n: int) -> list[Job]:
        jobs = []
        for _ in range(n):
            self._strength = max(0.0, self._strength - self._closing)
            if self._strength < 1e-6:
                self._strength = 0.0
                self._closing = 1 / self._options.ease_out
            if self._after:
                self._spans = self._after.popleft()
            jobs.append(self._job(False))
        return jobs

    def reset(self, clock: int | None = None, ease: int = CUT) -> None:
        self._ear = Ear(self._hearing)
        self._after.clear()
        if clock is not None and clock != self._clock:
            while self._shown and self._shown[-1][0] >= clock:
                self._shown.pop()
            last = self._shown[-1] if self._shown else None
            self._strength, self._spans = (last[1], last[2]) if last else (0.0, ())
            self._clock = clock
        self._closing = self._strength / max(1, ease) or 1 / self._options.ease_out

    def cue(self, cues: Sequence[Cue]) -> None:
        """Whisper hears what there is to know."""

    def _speech(self, spans: Spans, speaking: bool) -> Job:
        self._closing = 1 / self._options.ease_out
        if speaking or not self._options.gate:
            self._strength = min(1.0, self._strength + 1 / self._options.ease_in)
        else:
            self._strength = max(0.0, self._strength - self._closing)
        self._spans = spans
        return self._job(True)

    def _job(self, speech: bool) -> Job:
        picture = fold(
            self._clock * 25 // self._options.fps, self._loop.frames, self._options.repeat_ends
        )
        shot = Shot(self._networks, self._loop, picture, self._strength, self._spans)
        job = Job(self, self._clock, speech, shot)
        self._shown.append((self._clock, self._strength, self._spans))
        self._clock += 1
        return job


# --- networks -------------------------------------------------------------------------------------


@dataclass
class Networks:
    """A recipe's networks on a runtime, and what of them the rest must know."""

    recipe: Recipe
    hear: Runtime
    imagine: Runtime
    draw: Runtime
    look: Callable[[], Runtime]
    """Only preparation needs it: made when asked for."""
    parse: Callable[[], Runtime]
    width: int
    """Of a row: whisper's."""
    layers: int
    positions: int
    mels: int
    sizes: tuple[int, ...]
    """Batches that are run; the last is the largest."""
    key: str
    """Names the weights that decide what is prepared and drawn."""
    built: bool = False
    """Exported: every hearing has `BUILT_ROWS` rows."""
    random: bool = False
    """Random weights: for tests, and to measure speed."""
    spare: list[Runtime] = field(default_factory=list)
    failed: bool = False

    def close(self) -> None:
        for run in (self.hear, self.imagine, self.draw, *self.spare):
            run.close()
        self.spare.clear()

    def rows(self, hops: Sequence[Hop]) -> Float32:
        """(B, R, layers, width): what whisper makes of each hop's rows."""
        mel = np.stack([hop.mel() for hop in hops])
        rows = np.stack([hop.rows for hop in hops])
        if self.built:
            rows = np.pad(rows, ((0, 0), (0, BUILT_ROWS - rows.shape[1])), mode="edge")
        return np.asarray(batched(self.hear, {"mel": mel, "rows": rows}, self.sizes)["heard"])

    def faces(self, latents: Float32, heard: Float32) -> tuple[UInt8, npt.NDArray[np.bool_]]:
        """(B, 8, 32, 32), (B, 50, width) -> (B, 256, 256, 3) BGR, and which of them are sound."""
        feeds = {"latents": latents, "heard": heard}
        latent = batched(self.imagine, feeds, self.sizes)["latent"]
        good = np.isfinite(latent).all((1, 2, 3))
        drawn = batched(self.draw, {"latent": latent}, self.sizes)
        return np.asarray(drawn["face"], np.uint8), good & (drawn["sound"] != 0)


def default_device() -> str:
    """ "cuda:0" where torch or pycuda finds one, else "cpu"."""
    try:
        import torch

        return "cuda:0" if torch.cuda.is_available() else "cpu"
    except ImportError:
        return "cuda:0" if device_arch() != "none" else "cpu"


def models_folder(options: Options, settings: Settings) -> Path:
    """Where the weights of a persona's recipe are."""
    return (options.models or settings.cache_dir / "models").expanduser()


def built_folder(recipe: str, runtime: str, precision: str, settings: Settings) -> Path:
    """Where `voipavatar build` puts a recipe's networks."""
    return settings.cache_dir / "engines" / f"{recipe}-{runtime}-{precision}"


def torch_networks(
    recipe: Recipe, folder: Path, device: str, precision: Precision, legacy: bool = False
) -> Networks:
    """The recipe's checkpoints, in torch."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise missing("torch", "musetalk") from None
    from . import musetalk_nets as nets

    files = nets.Files(recipe, folder)
    if recipe.generated is not None and not any(files.has(name) for name in recipe.networks):
        nets.generate(recipe, folder, recipe.generated)
    dtype = torch_dtype(precision)
    hearing = files.hearing()

    def runtime(module: Any, at: Precision = precision) -> TorchRuntime:
        return TorchRuntime(module, device, at)

    spare: list[Runtime] = []

    def kept(make: Callable[[], Runtime]) -> Callable[[], Runtime]:
        def once() -> Runtime:
            if not made:
                made.append(make())
                spare.append(made[0])
            return made[0]

        made: list[Runtime] = []
        return once

    return Networks(
        recipe=recipe,
        hear=runtime(nets.Hear(files.whisper(dtype, legacy))),
        imagine=runtime(nets.Imagine(files.unet(dtype))),
        draw=runtime(nets.Draw(files.vae(dtype))),
        # latents are made once and shown for ever: always fp32
        look=kept(lambda: runtime(nets.Look(files.vae()), "fp32")),
        parse=kept(lambda: runtime(nets.Parse(files.parser()), "fp32")),
        width=hearing.width,
        layers=hearing.layers + 1,
        positions=hearing.positions,
        mels=hearing.mels,
        sizes=_sizes(device),
        key=files.key("unet", "vae", "whisper"),
        random=is_random(recipe.networks["vae"].weights, folder),
        spare=spare,
    )


def _sizes(device: str) -> tuple[int, ...]:
    """On a CPU one by one: nothing is gained by more, and a batch of one is the same in any
    company. On a GPU as many as its memory holds, at 0.15 GB a frame with room to spare."""
    if device == "cpu":
        return (1,)
    try:
        import torch

        free = torch.cuda.mem_get_info(device)[0]
    except (ImportError, RuntimeError):
        return BATCHES
    return tuple(size for size in BATCHES if size == 1 or size * 0.3e9 < free)


def built_networks(
    recipe: Recipe,
    settings: Settings,
    kind: Kind,
    device: str,
    precision: Precision,
    models: Path | None = None,
) -> Networks:
    """What `voipavatar build` made, on ONNX Runtime or TensorRT. Needs no torch, and no weights;
    with those in `models` it is compared."""
    folder = built_folder(recipe.name, kind, precision, settings)
    artefacts = Artefacts.load(folder)
    command = (
        f"voipavatar build --engine musetalk --recipe {recipe.name} --runtime {kind} "
        f"--precision {precision}"
    )
    arch = "any"
    if kind == "onnxruntime":
        import onnxruntime

        version = str(onnxruntime.__version__)
    else:
        version = str(tensorrt_module(kind).__version__)
        arch = device_arch(device)
    said = artefacts.data
    # plans are enough to draw with; where the weights are too, they must be the same
    weights = weights_key(recipe, models, "unet", "vae", "whisper") if models else None
    weights = weights or str(said.get("key", {}).get("weights", ""))
    key = ArtefactKey(
        recipe.name,
        weights,
        precision,
        kind,
        version,
        arch=arch,
    )
    artefacts.check(key, command)

    def plan(name: str) -> Runtime:
        if kind == "onnxruntime":
            return OnnxRuntime(folder / f"{name}.onnx", device)
        return TensorRt(folder / f"{name}.plan", kind, device)

    def onnx(name: str) -> Callable[[], Runtime]:
        def make() -> Runtime:
            path = folder / f"{name}.onnx"
            if not path.is_file():
                raise ConfigError(f"{folder.name} was built without {name}: run `{command}`")
            return OnnxRuntime(path)

        return make

    whisper = said["whisper"]
    networks = Networks(
        recipe=recipe,
        hear=plan("hear"),
        imagine=plan("imagine"),
        draw=plan("draw"),
        look=onnx("look"),
        parse=onnx("parse"),
        width=int(whisper["width"]),
        layers=int(whisper["layers"]) + 1,
        positions=int(whisper["positions"]),
        mels=int(whisper["mels"]),
        sizes=(1,) if device == "cpu" else BATCHES,
        key=str(said["key"]["weights"]),
        built=True,
        random=bool(said.get("random")),
    )
    if kind != "onnxruntime":
        _prove(networks, artefacts, precision, arch)
    return networks


def _prove(networks: Networks, artefacts: Artefacts, precision: Precision, arch: str) -> None:
    """A plan's first run on a device is on golden inputs, and nobody sees it."""
    from .runtimes import Golden, golden_gate

    for name, run in (
        ("hear", networks.hear),
        ("imagine", networks.imagine),
        ("draw", networks.draw),
    ):
        if artefacts.is_proved(name, arch):
            continue
        with np.load(artefacts.folder / f"{name}.golden.npz", allow_pickle=False) as data:
            feeds = {k[3:]: data[k] for k in data.files if k.startswith("in_")}
            wants = {k[4:]: data[k] for k in data.files if k.startswith("out_")}
        try:
            gate = golden_gate(run, Golden(feeds, wants), precision, f"{name}.plan")
        except EngineError:
            networks.close()
            raise
        artefacts.proved(name, gate, arch)


# --- the engine -----------------------------------------------------------------------------------


class Finder(Protocol):
    """Finds a face in a picture by itself."""

    def __call__(
        self, picture: UInt8, at: tuple[float, float] | None
    ) -> tuple[Mapping[str, Any], int] | None:
        """Finds the face nearest to a point (or the largest) in a BGR picture: its landmarks as a
        persona's YAML holds them, and how many other faces there are. None when there is none."""


def mesh_finder(settings: Settings) -> Finder:
    """MediaPipe's networks, as the rest of the package has them. TransportError if they can't be
    had; it says how to bring them by hand."""
    from ..facemesh import FaceMesh
    from ..facemodels import face_models

    mesh = FaceMesh(face_models(settings))

    def find(
        picture: UInt8, at: tuple[float, float] | None
    ) -> tuple[Mapping[str, Any], int] | None:
        try:
            found = mesh.find(picture, at)
        except AvatarError:
            return None
        return found.landmarks(), len(found.others)

    return find


class MuseTalk:
    """Makes avatars and draws them. Networks are loaded when the first persona asks for them."""

    def __init__(
        self, settings: Settings, device: str | None = None, finder: Finder | None = None
    ) -> None:
        """`finder` serves `landmarker: mesh`; `mesh_finder`'s unless given."""
        self.settings = settings
        self._finder = finder
        self._device = device or default_device()
        self._networks: dict[tuple[str, ...], Networks] = {}
        self._closed = False
        self._heard: OrderedDict[Hop, Float32] = OrderedDict()
        self._lock = threading.Lock()
        cpu = self._device == "cpu"
        self.info = EngineInfo(
            name="musetalk",
            version=VERSION,
            device="cpu" if cpu else "cuda",
            batch=4 if cpu else _sizes(self._device)[-1],
            needs=("weights",) if cpu else ("cuda", "weights"),
            can=("photo", "video", "idle", "batched"),
            licence="code Apache-2.0; weights: see `voipavatar models list`",
        )

    def networks(self, options: Options, recipe: Recipe) -> Networks:
        """The networks a persona's options ask for, loaded once."""
        if self._closed:
            raise EngineError("this engine is closed: make another one")
        device = options.device or self._device
        precision = options.precision or ("fp32" if device == "cpu" else "fp16")
        folder = models_folder(options, self.settings)
        key = (
            recipe.name,
            options.runtime,
            precision,
            device,
            str(folder),
            str(options.legacy_audio),
        )
        with self._lock:
            if key not in self._networks:
                if options.runtime == "torch":
                    made = torch_networks(recipe, folder, device, precision, options.legacy_audio)
                elif options.legacy_audio:
                    raise ConfigError("engine_options.legacy_audio: needs runtime: torch")
                else:
                    made = built_networks(
                        recipe, self.settings, options.runtime, device, precision, folder
                    )
                if not made.random:
                    self_test(made)
                elif recipe.generated is None:
                    log.warning("random weights: what they draw means nothing")
                self._networks[key] = made
            return self._networks[key]

    def prepare(
        self, source: Path, target: Path, options: dict[str, Any], progress: Progress
    ) -> Avatar:
        chosen, recipe = read_options(options)
        if source.name == UPSTREAM:
            return self._import(source, target, chosen, recipe, progress)
        networks = self.networks(chosen, recipe)
        clip = Clip(
            source,
            (chosen.width, chosen.height),
            chosen.fit,
            chosen.background,
            chosen.seconds,
        )
        landmarker, how = self._landmarker(chosen, recipe, clip)
        parser, mask = self._parser(chosen, recipe, networks)
        # what a session needs is not part of what is prepared
        kept = chosen.model_dump(
            mode="json",
            include={
                *("width", "height", "landmarks", "fit", "background", "seconds", "region"),
                *("face_at", "shift", "margin", "cheeks", "upper", "softness", "smoothing"),
                "max_side",
            },
        )
        plan = Plan(
            key=digest(VERSION, file_digest(source), kept, how, mask, networks.key),
            data={
                "engine": "musetalk",
                "version": VERSION,
                "recipe": recipe.name,
                "source": source.name,
                "options": kept,
                "landmarks_by": how,
                "mask_by": mask,
            },
            shift=chosen.shift,
            margin=chosen.margin,
            smoothing=chosen.smoothing,
            upper=chosen.upper,
            softness=chosen.softness,
            max_side=chosen.max_side,
        )

        def encode(pictures: Float32) -> Float32:
            run = networks.look()
            return np.concatenate([run({"picture": one[None]})["latent"] for one in pictures])

        manifest = prepare_loop(clip, target, plan, landmarker, encode, parser, progress)
        avatar_options = chosen.model_dump(mode="json", exclude={"landmarks"})
        return Avatar(target, int(manifest["width"]), int(manifest["height"]), avatar_options)

    def _import(
        self, source: Path, target: Path, options: Options, recipe: Recipe, progress: Progress
    ) -> Avatar:
        """An avatar that MuseTalk's own script prepared: `source` is the JSON in its folder."""
        folder = source.parent

        def latents(path: Path) -> list[Float32]:
            try:
                import torch
            except ImportError:
                raise missing("torch", "musetalk") from None
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
                return [one.float().numpy().reshape(8, *one.shape[-2:]) for one in found]
            except pickle.UnpicklingError:
                raise AvatarError("latents.pt is refused: it wants to run code") from None
            except (
                RuntimeError,
                ValueError,
                OSError,
                AttributeError,
                TypeError,
                EOFError,
            ) as error:
                text = str(error).splitlines()[0]
                raise AvatarError(f"latents.pt is refused or damaged: {text}") from None

        names = [folder / name for name in ("coords.pkl", "mask_coords.pkl", "latents.pt")]
        content = [file_digest(path) for path in names if path.is_file()]
        about = {"engine": "musetalk", "version": VERSION, "source": folder.name}
        manifest = import_loop(
            folder, target, digest(VERSION, "imported", content), about, latents, progress
        )
        avatar_options = options.model_dump(mode="json", exclude={"landmarks"})
        return Avatar(target, int(manifest["width"]), int(manifest["height"]), avatar_options)

    def _landmarker(self, options: Options, recipe: Recipe, clip: Clip) -> tuple[Landmarker, str]:
        """The landmarker a persona asks for, and its name."""
        folder = models_folder(options, self.settings)
        how = options.landmarker
        dwpose = recipe.networks.get("landmarks")
        there = dwpose is not None and (folder / dwpose.weights).is_file()
        if how == "auto":
            how = "given" if options.landmarks else "dwpose" if there else "mesh"
        if how == "given":
            if not options.landmarks:
                raise ConfigError("landmarker: given, but the persona has no landmarks")
            return Given(clip.fit.points(from_yaml(options.landmarks))), how
        if how == "mesh":
            finder = self._finder or mesh_finder(self.settings)
            return Mesh(partial(finder, at=options.face_at)), how
        if dwpose is None or not there:
            raise ConfigError(
                "DWPose's weights are not in the models folder: run `voipavatar models pull "
                f"{recipe.name}`, or write landmarks into the persona"
            )
        return DwPose(OnnxRuntime(folder / dwpose.weights), region=options.region), how

    def _parser(
        self, options: Options, recipe: Recipe, networks: Networks
    ) -> tuple[Callable[[UInt8], UInt8] | None, str]:
        """What draws the mask (None: the landmarks), and its name."""
        how = options.parser
        if options.mask == "points":
            how = "points"
        if how == "auto":
            net = recipe.networks.get("parser")
            there = net is not None and (
                options.runtime != "torch"
                or (models_folder(options, self.settings) / net.weights).is_file()
            )
            how = "bisenet" if there else "points"
            if how == "points":
                log.warning("no face parser: the mask is drawn by landmarks")
        if how == "points":
            return None, "points"
        return Parser(networks.parse(), options.mask, options.cheeks), f"bisenet {options.mask}"

    def open(self, avatar: Avatar) -> MuseTalkSession:
        options, recipe = read_options(avatar.options)
        networks = self.networks(options, recipe)
        session = MuseTalkSession(options, networks, Loop(avatar.path))
        if networks.built and session.reach > BUILT_ROWS:
            raise ConfigError(
                "engine_options: offline hearing, or so large a step, needs runtime: torch"
            )
        return session

    def render(self, jobs: Sequence[Job]) -> list[UInt8]:
        shots: list[Shot] = [job.data for job in jobs]
        pictures = [shot.loop.picture(shot.picture) for shot in shots]
        out: dict[int, UInt8] = {}
        for networks, mine in _by_networks(shots):
            faces, good = self._faces(networks, [shots[i] for i in mine])
            for i, face, sound in zip(mine, faces, good, strict=True):
                patch = shots[i].loop.patch(shots[i].picture)
                if sound and patch is not None:
                    out[i] = paste(pictures[i], patch, face, shots[i].strength)
                elif not networks.failed:
                    networks.failed = True
                    log.error(
                        "the network's answer is not a number: the source is shown instead",
                        extra={"recipe": networks.recipe.name},
                    )
        return [out[i] if i in out else pictures[i].copy() for i in range(len(jobs))]

    def _faces(
        self, networks: Networks, shots: Sequence[Shot]
    ) -> tuple[UInt8, npt.NDArray[np.bool_]]:
        hops = list(dict.fromkeys(span.hop for shot in shots for span in shot.spans))
        new = [hop for hop in hops if hop not in self._heard]
        if new:
            for hop, rows in zip(new, networks.rows(new), strict=True):
                self._heard[hop] = rows
        windows = np.zeros((len(shots), WINDOW, networks.layers, networks.width), np.float32)
        for window, shot in zip(windows, shots, strict=True):
            for span in shot.spans:
                window[span.place : span.place + span.count] = self._heard[span.hop][
                    span.first : span.first + span.count
                ]
        for hop in hops:
            self._heard.move_to_end(hop)
        while len(self._heard) > 64:
            self._heard.popitem(last=False)
        latents = np.stack([shot.loop.latents(shot.picture) for shot in shots])
        heard = windows.reshape(len(shots), WINDOW * networks.layers, networks.width)
        return networks.faces(latents, heard)

    def close(self) -> None:
        self._closed = True
        for networks in self._networks.values():
            networks.close()
        self._networks.clear()
        self._heard.clear()


def _by_networks(shots: Sequence[Shot]) -> Iterator[tuple[Networks, list[int]]]:
    """Shots that need a face drawn, by the networks that draw it."""
    groups: dict[int, tuple[Networks, list[int]]] = {}
    for i, shot in enumerate(shots):
        if shot.strength > 0 and shot.loop.has_face(shot.picture):
            groups.setdefault(id(shot.face), (shot.face, []))[1].append(i)
    yield from groups.values()


def self_test(networks: Networks) -> None:
    """Encode and decode a picture: EngineError with the symptom if it doesn't come back.

    A wrong VAE, or a precision that is too small for it, draws black, grey or false colours.
    """
    y, x = np.mgrid[0:256, 0:256] / 255.0
    picture = np.stack([0.3 + 0.5 * x, 0.2 + 0.5 * y, 0.6 - 0.3 * x * y]).astype(np.float32)
    try:
        run = networks.look()
    except ConfigError:
        return  # built without the encoder: what it draws was proved when it was built
    latent = run({"picture": (picture * 2 - 1)[None]})["latent"]
    back = networks.draw({"latent": latent})["face"][0, ..., ::-1].astype(np.float32) / 255
    wrong = float(np.abs(back.transpose(2, 0, 1) - picture).mean())
    if not wrong < 0.12:
        raise EngineError(
            f"the VAE gives a picture back that differs by {wrong:.0%} on average: its weights are "
            "not sd-vae-ft-mse's, or the precision is too small for this device. Run `voipavatar "
            f"models verify {networks.recipe.name}`, or set precision: fp32"
        )
