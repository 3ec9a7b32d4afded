"""The `viseme` engine: one portrait in, a talking face out, in real time on one CPU core.

`prepare` turns a portrait and its landmarks into a rig (see `rig`) and keeps it in an npz beside
a manifest. A session turns speech into mouth parameters (see `articulation`) and adds what a living
face does by itself: blinks and small motions of the head, a pure function of the seed and the
picture clock, so that idling and talking share it and nothing jumps at a seam. Every job holds the
whole pose of its picture; drawing keeps no state.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import shutil
import threading
import time
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, cast

import cv2
import numpy as np

from ..avatar import known_digest
from ..config import Settings
from ..errors import AvatarError, ConfigError, EngineError
from ..facemesh import FaceMesh
from ..facemodels import face_models
from ..media import ENGINE_RATE, Cue, Float32, UInt8, check_fps
from . import Avatar, Engine, EngineInfo, EngineSession, Job, Progress, Spec, filming
from .film import FilmPuppet
from .puppet import Pose, Puppet
from .rig import HEAD, Landmarks, Rig, build, parse_landmarks, smoothstep

log = logging.getLogger(__name__)

VERSION = 4

PARAMETERS = 8
"""Mouth parameters of a pose: `articulation.PARAMETERS`."""

KEPT = 128
"""Poses that a session keeps, so that an interruption can go back to what was really shown."""

_REST: Float32 = np.zeros(PARAMETERS, np.float32)
_LEVEL = 7
_FADE = 3
"""Pictures in which speech takes the mouth over from wherever it was."""
_CALM = PARAMETERS
"""Column of the slow loudness that moves head and brows."""
_MASK = (1 << 64) - 1


class Articulates(Protocol):
    """What a session needs of `articulation.Articulator`."""

    lookahead: int

    def push(self, pcm: Float32) -> Float32: ...

    def flush(self) -> Float32: ...

    def reset(self) -> None: ...

    def cue(self, cues: Sequence[Cue]) -> None: ...


def _articulator(fps: int) -> Articulates:
    from .articulation import Articulator

    return Articulator(fps)


# --- options --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """What a persona can say to this engine."""

    width: int = 1280
    height: int = 720
    fps: int = 25
    seed: int = 1
    """Another seed blinks and moves at other times."""
    motion: float = 1.0
    """How much the head moves: 0 not at all, 1 as people do, at most 2."""
    blink: float = 1.0
    """How often the eyes blink: 0 never, 1 about every four seconds, at most 3."""
    mouth: float = 1.0
    """How far the mouth opens: 0.3 mumbles, 1 speaks, at most 1.5."""
    ease: float = 0.32
    """Seconds the mouth takes to close after speech, 0.04 to 2."""
    background: tuple[int, int, int] = (208, 204, 200)
    """Red, green, blue behind a portrait that is transparent."""
    landmarks: dict[str, Any] | None = None
    """Where the face is, by hand; without it the face is found."""
    face_at: tuple[float, float] | None = None
    """Pixel of the portrait: of several faces the one nearest to it; otherwise the largest."""
    seconds: float = 30.0
    """The longest loop that is taken from a clip."""


_LIMITS: dict[str, tuple[float, float]] = {
    "width": (64, 3840),
    "height": (64, 2160),
    "seed": (0, 2**63 - 1),
    "motion": (0, 2),
    "blink": (0, 3),
    "mouth": (0.3, 1.5),
    "ease": (0.04, 2),
    "seconds": (0.2, 120),
}


def _parse(options: dict[str, Any]) -> tuple[Options, Landmarks | None]:
    known = {one.name: one for one in fields(Options)}
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise ConfigError(
                f"engine option {key!r} is not known to viseme: use {', '.join(sorted(known))}"
            )
        if value is None or key == "landmarks":
            values[key] = value
        elif key == "background":
            values[key] = _colour(value)
        elif key == "face_at":
            values[key] = _place(value)
        else:
            values[key] = _number(key, value, whole=isinstance(known[key].default, int))
    result = Options(**{key: value for key, value in values.items() if value is not None})
    check_fps(result.fps)
    for key in ("width", "height"):
        if getattr(result, key) % 2:
            raise ConfigError(f"engine option {key} must be even, not {getattr(result, key)}")
    marks = None if result.landmarks is None else parse_landmarks(result.landmarks)
    return result, marks


def _number(key: str, value: object, *, whole: bool) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"engine option {key} must be a number, not {value!r}")
    if whole and value != int(value):
        raise ConfigError(f"engine option {key} must be a whole number, not {value!r}")
    low, high = _LIMITS.get(key, (-math.inf, math.inf))
    if not low <= value <= high:
        raise ConfigError(f"engine option {key} must be {low:g} to {high:g}, not {value!r}")
    return int(value) if whole else float(value)


def _place(value: object) -> tuple[float, float]:
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    ):
        return float(value[0]), float(value[1])
    raise ConfigError("engine option face_at must be [x, y], pixels of the portrait")


def _colour(value: object) -> tuple[int, int, int]:
    if (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(c, int) and not isinstance(c, bool) and 0 <= c <= 255 for c in value)
    ):
        return value[0], value[1], value[2]
    raise ConfigError("engine option background must be [red, green, blue], each 0 to 255")


# --- the portrait ---------------------------------------------------------------------------------


def read_portrait(data: bytes, background: tuple[int, int, int]) -> UInt8:
    """A picture file as BGR, upright as its EXIF says, over `background` where it is transparent.

    AvatarError when it is no picture.
    """
    raw = np.frombuffer(data, np.uint8)
    try:
        picture = cv2.imdecode(raw, cv2.IMREAD_UNCHANGED) if len(raw) else None
        if picture is not None and not (picture.ndim == 3 and picture.shape[2] == 4):
            picture = cv2.imdecode(raw, cv2.IMREAD_COLOR)  # honours EXIF, makes 8 bits of 16
    except cv2.error:
        picture = None
    if picture is None:
        raise AvatarError(
            "the portrait can't be read as a picture or a clip: use a PNG, JPEG or WebP, or a film"
            " in a common format, that opens elsewhere"
        )
    if picture.shape[2] == 4:
        if picture.dtype == np.uint16:
            picture = (picture // 257).astype(np.uint8)
        alpha = picture[..., 3:].astype(np.float32) / 255
        behind = np.array(background[::-1], np.float32)
        picture = np.rint(picture[..., :3] * alpha + behind * (1 - alpha)).astype(np.uint8)
    return cast(UInt8, np.ascontiguousarray(picture))


def fit(picture: UInt8, marks: Landmarks, width: int, height: int) -> tuple[UInt8, Landmarks]:
    """The portrait scaled and cropped to cover `width` x `height`, the face kept well inside."""
    rows, columns = picture.shape[:2]
    left, top, right, bottom = marks.box
    if left < 0 or top < 0 or right > columns or bottom > rows:
        raise AvatarError(
            f"the landmarks reach out of the portrait, which is {columns}x{rows}: they must be"
            " pixels of this very file"
        )
    scale = max(width / columns, height / rows)
    size = (max(width, round(columns * scale)), max(height, round(rows * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = cv2.resize(picture, size, interpolation=how)
    room = marks.unit * scale
    x = (left + right) / 2 * scale - width / 2
    # The middle of the head a little above the middle of the picture, all of the hair inside.
    y = min(
        (top + bottom) / 2 * scale - 0.45 * height,
        max(0.0, (top * scale) - 0.75 * room),
    )
    x0 = int(np.clip(round(x), 0, size[0] - width))
    y0 = int(np.clip(round(y), 0, size[1] - height))
    crop = np.ascontiguousarray(scaled[y0 : y0 + height, x0 : x0 + width])
    return cast(UInt8, crop), marks.moved(scale, (-x0, -y0))


def _points_of(marks: Landmarks) -> dict[str, list[list[float]]]:
    """What a sheet shows, in pixels of the portrait."""
    lines = {
        "outer_lips": marks.outer_lips,
        "inner_lips": marks.inner_lips,
        "jaw": marks.jaw,
        "left_brow": marks.left_brow,
        "right_brow": marks.right_brow,
        "nose": marks.nose,
        "forehead": marks.forehead[None],
    }
    for name, eye in (("left_eye", marks.left_eye), ("right_eye", marks.right_eye)):
        lines[f"{name}_upper"], lines[f"{name}_lower"] = eye.upper, eye.lower
        lines[f"{name}_iris"] = eye.iris[None]
    return {name: np.round(line, 2).tolist() for name, line in lines.items()}


# --- life -----------------------------------------------------------------------------------------


def _hash(seed: int, *parts: int) -> float:
    """0 to 1, the same on every machine (the finaliser of SplitMix64)."""
    value = seed & _MASK
    for part in parts:
        value = (value + 0x9E3779B97F4A7C15 * (part + 1)) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value / 2**64


_WAVES = 4
_SLOT = 4.0
_AMPLITUDE = {  # of each head motion, and the slowest and fastest of its waves in Hz
    "yaw": (0.032, 0.05, 0.33),
    "pitch": (0.018, 0.06, 0.30),
    "roll": (0.0085, 0.05, 0.26),
    "sway": (0.014, 0.04, 0.19),
    "lift": (0.005, 0.05, 0.20),
    "brow": (0.10, 0.03, 0.15),
}
_BREATH = (0.0055, 0.24)  # face units, Hz


class Life:
    """What a face does by itself, at any moment of the picture clock."""

    def __init__(self, seed: int, fps: int, motion: float, blink: float) -> None:
        self._seed = seed
        self._fps = fps
        self._motion = motion
        self._slot = _SLOT / blink if blink > 0 else 0.0
        waves = []
        for row, (size, slow, fast) in enumerate(_AMPLITUDE.values()):
            for i in range(_WAVES):
                spread = (i + _hash(seed, 1, row, i)) / _WAVES
                rate = slow * (fast / slow) ** spread
                # Slow waves are the large ones.
                waves.append((size / (1 + 0.9 * i), rate, _hash(seed, 2, row, i)))
        table = np.asarray(waves, np.float64).reshape(len(_AMPLITUDE), _WAVES, 3)
        self._size, self._rate, self._phase = table[..., 0], table[..., 1], table[..., 2]

    def head(self, clock: int) -> Float32:
        """As `rig.HEAD`."""
        if self._motion == 0:
            return np.zeros(len(HEAD), np.float32)
        moment = clock / self._fps
        turns = self._rate * moment + self._phase
        out = (self._size * np.sin(2 * np.pi * turns)).sum(-1)
        size, rate = _BREATH
        out[HEAD.index("lift")] -= size * math.sin(2 * math.pi * rate * moment)
        out[HEAD.index("brow")] = max(0.0, out[HEAD.index("brow")] - 0.04)
        return np.asarray(out, np.float32)

    def blink(self, clock: int) -> float:
        """0 open, 1 shut. About one blink in each slot of time, sometimes two."""
        if self._slot <= 0:
            return 0.0
        moment = clock / self._fps
        slot = int(moment // self._slot)
        shut = 0.0
        for one in (slot - 1, slot):
            if one < 0:
                continue
            # On a whole picture, so that every blink has one that is quite shut.
            start = (one + 0.12 + 0.80 * _hash(self._seed, 3, one)) * self._slot
            begin = round(start * self._fps)
            shut = max(shut, _lid((clock - begin) / self._fps))
            if _hash(self._seed, 4, one) < 0.14:
                again = begin + round(0.42 * self._fps)
                shut = max(shut, 0.9 * _lid((clock - again) / self._fps))
        return shut


_DOWN, _HOLD, _UP = 0.12, 0.04, 0.18


def _lid(moment: float) -> float:
    """A lid's course, seconds from its start: down quickly, shut for a moment, up more slowly."""
    if moment <= 0 or moment >= _DOWN + _HOLD + _UP:
        return 0.0
    if moment < _DOWN:
        t = moment / _DOWN
        return t * t * (3 - 2 * t)
    if moment <= _DOWN + _HOLD:
        return 1.0
    t = (moment - _DOWN - _HOLD) / _UP
    return float((1 - t) ** 1.6)


# --- gestures -------------------------------------------------------------------------------------

GESTURES: dict[str, float] = {
    "nod": 0.96,
    "shake": 1.2,
    "smile": 2.4,
    "wink": 0.44,
    "brows": 1.0,
    "tilt": 1.8,
    "blink": 0.34,
}
"""What a cue of kind "gesture" can ask for, and how long it takes in seconds."""

_NOD, _SHAKE, _TILT = 0.075, 0.065, 0.045  # radians
_SMILE = 0.75


@dataclass
class _Gestured:
    """What gestures add to a pose."""

    head: Float32
    width: float = 0.0
    blink: float = 0.0
    wink: float = 0.0


def gestured(running: Sequence[tuple[int, str]], clock: int, fps: int, motion: float) -> _Gestured:
    """The sum of the gestures (clock at which they began, name), at a moment."""
    out = _Gestured(np.zeros(len(HEAD), np.float32))
    for begin, name in running:
        moment, length = (clock - begin) / fps, GESTURES[name]
        if not 0 <= moment < length:
            continue
        t = moment / length
        swell = math.sin(math.pi * t) ** 2
        # In within a quarter, out within the last third.
        hold = float(smoothstep(t / 0.25) * smoothstep((1 - t) / 0.35))
        if name == "nod":
            # Down twice, the second time less.
            share = 1.0 if t < 0.5 else 0.6
            out.head[HEAD.index("pitch")] += motion * _NOD * share * math.sin(2 * math.pi * t) ** 2
        elif name == "shake":
            out.head[HEAD.index("yaw")] += motion * _SHAKE * math.sin(4 * math.pi * t) * swell
        elif name == "tilt":
            out.head[HEAD.index("roll")] += motion * _TILT * hold
        elif name == "brows":
            out.head[HEAD.index("brow")] += 0.8 * hold
        elif name == "smile":
            out.width += _SMILE * hold
            out.head[HEAD.index("brow")] += 0.2 * hold
        elif name == "wink":
            out.wink = max(out.wink, _lid(moment * (_DOWN + _HOLD + _UP) / length))
        else:
            out.blink = max(out.blink, _lid(moment))
    return out


# --- a session ------------------------------------------------------------------------------------


class VisemeSession:
    """One room on one avatar. Pure: sound and idle requests in, poses out."""

    def __init__(self, puppet: Puppet, options: Options, articulator: Articulates) -> None:
        self.puppet = puppet
        self._articulator = articulator
        self._life = Life(options.seed, options.fps, options.motion, options.blink)
        self._motion = options.motion
        self._mouth = options.mouth
        self._spec = Spec(
            width=options.width,
            height=options.height,
            fps=options.fps,
            lookahead=articulator.lookahead,
            ease=max(1, round(options.ease * options.fps)),
        )
        self._follow = 1 - math.exp(-1 / (0.45 * options.fps))
        self._clock = 0
        # Mouth and slow loudness of the last jobs, by their clock.
        self._shown: OrderedDict[int, Float32] = OrderedDict()
        self._now = np.zeros(PARAMETERS + 1, np.float32)
        # The mouth on its way to rest: from where, over how many pictures, how many are done.
        self._from = _REST
        self._length = 0
        self._eased = 0
        # Gestures that are asked for, by their seconds within the turn; and those under way.
        self._asked: list[tuple[float, str]] = []
        self._gestures: list[tuple[int, str]] = []
        self._row = 0
        # Speech on its way to take the mouth over.
        self._entered = 0
        self._entry = _REST

    @property
    def spec(self) -> Spec:
        return self._spec

    def push(self, pcm: Float32) -> list[Job]:
        return self._speak(self._articulator.push(pcm))

    def flush(self) -> list[Job]:
        jobs = self._speak(self._articulator.flush())
        # What was asked for at the very end, or after it, comes now.
        self._gestures += [(self._clock, name) for _, name in self._asked]
        self._asked, self._row = [], 0
        self._part(self._spec.ease)
        return jobs

    def idle(self, n: int) -> list[Job]:
        if self._entered:
            self._part(self._spec.ease)
        jobs = []
        for _ in range(n):
            self._eased = min(self._eased + 1, self._length)
            mouth = _REST
            if self._eased < self._length:
                t = self._eased / self._length
                mouth = (self._from * np.float32((1 - t) ** 2 * (1 + 2 * t))).astype(np.float32)
            jobs.append(self._job(mouth, speech=False))
        return jobs

    def reset(self, clock: int | None = None, ease: int = 3) -> None:
        self._articulator.reset()
        self._asked, self._row = [], 0
        if clock is not None:
            self._gestures = [one for one in self._gestures if one[0] < clock]
            if clock < 0:
                raise EngineError(f"a picture clock can't be {clock}")
            known = self._shown.get(clock - 1)
            while self._shown and next(reversed(self._shown)) >= clock:
                self._shown.popitem()
            if known is None:
                # Nothing that was made before is still on: begin as new, or from the oldest known.
                known = np.zeros(PARAMETERS + 1, np.float32)
                if self._shown and clock > self._clock:
                    known = self._now
            self._now = known
            self._clock = clock
        self._part(max(1, ease))

    def cue(self, cues: Sequence[Cue]) -> None:
        self._articulator.cue(cues)
        for cue in cues:
            if cue.kind == "gesture":
                if cue.text in GESTURES:
                    self._asked.append((cue.start, cue.text))
                else:
                    log.debug("a gesture is not known to viseme")

    def _part(self, ease: int) -> None:
        """From here on the mouth closes, until speech takes it."""
        self._from, self._length, self._eased = self._now[:PARAMETERS], ease, 0
        self._entered = 0

    def _speak(self, rows: Float32) -> list[Job]:
        jobs = []
        for row in np.asarray(rows, np.float32):
            moment = (self._row + 1) / self._spec.fps
            self._row += 1
            self._gestures += [(self._clock, name) for at, name in self._asked if at < moment]
            self._asked = [one for one in self._asked if one[0] >= moment]
            if self._entered == 0:
                self._entry = self._now[:PARAMETERS]
            self._entered += 1
            mouth = row
            if self._entered < _FADE:
                share = np.float32(self._entered / _FADE)
                mouth = self._entry + (row - self._entry) * share
            jobs.append(self._job(mouth.astype(np.float32), speech=True))
        return jobs

    def _job(self, mouth: Float32, *, speech: bool) -> Job:
        state = np.empty(PARAMETERS + 1, np.float32)
        state[:PARAMETERS] = mouth
        nod = self._now[_CALM] + (mouth[_LEVEL] - self._now[_CALM]) * np.float32(self._follow)
        state[_CALM] = nod if nod > 4e-3 else 0.0
        clock = self._clock
        self._now = state
        self._shown[clock] = state
        if len(self._shown) > KEPT:
            self._shown.popitem(last=False)
        self._clock = clock + 1
        head = self._life.head(clock)
        if self._motion > 0:
            # Who speaks up, lifts chin and brows a little.
            loud = float(state[_CALM])
            head[HEAD.index("pitch")] += 0.022 * math.sin(4.6 * loud) * loud
            head[HEAD.index("brow")] += 0.5 * loud * loud
        blink, wink = self._life.blink(clock), 0.0
        mouth = self._widened(mouth)
        if self._gestures:
            fps = self._spec.fps
            self._gestures = [
                one
                for one in self._gestures
                if clock < one[0] + (GESTURES[one[1]] + KEPT / fps) * fps
            ]
            extra = gestured(self._gestures, clock, fps, min(1.0, self._motion))
            head = head + extra.head
            blink, wink = max(blink, extra.blink), extra.wink
            if extra.width > 0:
                mouth = mouth.copy()
                # Wide and round are opposites: who smiles rounds less.
                mouth[1] = min(1.0, float(mouth[1]) + extra.width)
                mouth[2] *= 1 - 0.5 * extra.width
        pose = Pose(mouth, head, blink, wink, clock)
        return Job(self, clock, speech, pose)

    def _widened(self, mouth: Float32) -> Float32:
        if self._mouth == 1:
            return mouth
        wider: Float32 = mouth.copy()
        wider[0] = min(1.25, wider[0] * self._mouth)
        return wider


# --- the engine -----------------------------------------------------------------------------------


class VisemeEngine:
    """See `voipavatar.engines.Engine`."""

    def __init__(
        self,
        articulator: Callable[[int], Articulates] = _articulator,
        settings: Settings | None = None,
    ) -> None:
        """`articulator` makes, for an fps, what turns speech into mouth parameters; `settings`
        (otherwise the environment) say where the networks are kept that find a face."""
        self._settings = settings
        cv2.setNumThreads(1)
        self._make = articulator
        self._closed = False
        self._lock = threading.Lock()
        self._puppets: weakref.WeakValueDictionary[str, Puppet] = weakref.WeakValueDictionary()
        self._finder: FaceMesh | None = None
        self._finding = threading.Lock()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            name="viseme",
            version=VERSION,
            device="cpu",
            batch=1,
            can=("photo", "video", "cues", "idle"),
        )

    def prepare(
        self, source: Path, target: Path, options: dict[str, Any], progress: Progress
    ) -> Avatar:
        parsed, marks = _parse(options)
        if filming.is_film(source):
            return self._prepare_film(source, target, parsed, progress)
        try:
            data = source.read_bytes()
        except OSError as error:
            raise AvatarError(
                f"the portrait {source.name or source} can't be read"
                f" ({error.strerror or type(error).__name__}): check `portrait` in the persona"
            ) from error
        key = _key(data, parsed)
        avatar = Avatar(
            path=target, width=parsed.width, height=parsed.height, options=_settings(parsed)
        )
        progress("looking for what is prepared already", 0.0)
        if _whole(target, key):
            progress("ready", 1.0)
            return avatar
        progress("reading the portrait", 0.1)
        picture = read_portrait(data, parsed.background)
        advice: list[str] = []
        given = marks is not None
        if marks is None:
            progress("finding the face", 0.15)
            marks, advice = self._find(picture, parsed, lambda what: progress(what, 0.15))
        told = _points_of(marks)
        picture, marks = fit(picture, marks, parsed.width, parsed.height)
        progress("finding how the face moves", 0.3)
        rig = build(picture, marks, parsed.motion)
        progress("writing", 0.9)
        _save(target, rig, key, parsed, {"advice": advice, "given": given, "landmarks": told})
        progress("ready", 1.0)
        return avatar

    def _prepare_film(
        self, source: Path, target: Path, options: Options, progress: Progress
    ) -> Avatar:
        if options.landmarks is not None:
            raise ConfigError(
                "`landmarks` are for a picture; in a clip the face is followed: leave them out"
            )
        wanted = filming.Wanted(
            options.width,
            options.height,
            options.fps,
            options.background,
            options.face_at,
            options.seconds,
        )
        told = asdict(wanted) | {"source": known_digest(source), "film": filming.FILM}
        key = hashlib.sha256(f"viseme {VERSION}\n".encode())
        key.update(json.dumps(told, sort_keys=True).encode())

        def mesh() -> FaceMesh:
            settings = self._settings or Settings.from_env()
            return FaceMesh(face_models(settings, lambda what: progress(what, 0.03)))

        data = {"engine": "viseme", "version": VERSION}
        filming.prepare(source, target, key.hexdigest(), data, wanted, mesh, _points_of, progress)
        return Avatar(target, options.width, options.height, _settings(options))

    def _find(
        self, picture: UInt8, options: Options, tell: Callable[[str], None]
    ) -> tuple[Landmarks, list[str]]:
        """The face of a portrait (BGR), and what a person should know about it."""
        with self._finding:
            if self._finder is None:
                settings = self._settings or Settings.from_env()
                self._finder = FaceMesh(face_models(settings, tell))
            found = self._finder.find(picture, options.face_at)
        rows, columns = picture.shape[:2]
        advice = found.advice(max(options.width / columns, options.height / rows))
        if advice:
            log.info("a portrait has weaknesses", extra={"count": len(advice)})
        marks = found.landmarks()
        # A face cut off by the picture's edge still moves within it.
        limit = np.array([columns - 2.0, rows - 2.0])
        for name in ("jaw", "forehead"):
            marks[name] = np.clip(np.asarray(marks[name]), 1.0, limit).tolist()
        try:
            return parse_landmarks(marks), advice
        except ConfigError as error:
            raise AvatarError(
                "the face in the portrait can't be used as it lies there: use one that is upright "
                f"and looks at the viewer ({error})"
            ) from error

    def open(self, avatar: Avatar) -> VisemeSession:
        if self._closed:
            raise EngineError("the viseme engine is closed")
        parsed, _ = _parse(avatar.options)
        manifest = _manifest(avatar.path)
        if manifest is None:
            raise AvatarError(f"{avatar.path} holds no prepared avatar: prepare it first")
        name = f"{avatar.path.resolve()} {manifest['key']}"
        with self._lock:
            puppet = self._puppets.get(name)
            if puppet is None:
                if "film" in manifest:
                    puppet = FilmPuppet(avatar.path)
                else:
                    puppet = Puppet(_load(avatar.path, manifest))
                self._puppets[name] = puppet
        return VisemeSession(puppet, parsed, self._make(parsed.fps))

    def render(self, jobs: Sequence[Job]) -> list[UInt8]:
        if self._closed:
            raise EngineError("the viseme engine is closed")
        return [cast(VisemeSession, job.session).puppet.draw(job.data) for job in jobs]

    def close(self) -> None:
        self._closed = True
        self._puppets.clear()


def _settings(options: Options) -> dict[str, Any]:
    """Options that a session needs; where the face is stays in the rig."""
    names = ("width", "height", "fps", "seed", "motion", "blink", "mouth", "ease")
    return {name: getattr(options, name) for name in names}


# --- what is kept on disk -------------------------------------------------------------------------

_FILE = "rig.npz"
_LARGEST = 1 << 30


def _key(source: bytes, options: Options) -> str:
    """Changes with everything that changes the rig; not with what only a session uses."""
    told = {
        name: getattr(options, name)
        for name in ("width", "height", "motion", "background", "landmarks", "face_at")
    }
    digest = hashlib.sha256(f"viseme {VERSION}\n".encode())
    digest.update(json.dumps(told, sort_keys=True, default=float).encode())
    digest.update(hashlib.sha256(source).digest())
    return digest.hexdigest()


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and found.get("engine") == "viseme"
    return found if good and found.get("version") == VERSION else None


def _whole(folder: Path, key: str) -> bool:
    manifest = _manifest(folder)
    if manifest is None or manifest.get("key") != key:
        return False
    try:
        return _digest(folder / _FILE) == manifest.get("sha256")
    except OSError:
        return False


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _save(folder: Path, rig: Rig, key: str, options: Options, found: Mapping[str, object]) -> None:
    """Arrays first, the manifest last, each by renaming: what is there is whole or not counted."""
    buffer = io.BytesIO()
    arrays = {one.name: getattr(rig, one.name) for one in fields(Rig)}
    np.savez(buffer, **arrays)
    data = buffer.getvalue()
    x, y, width, height = (int(v) for v in rig.region)
    manifest = {
        "engine": "viseme",
        "version": VERSION,
        "key": key,
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": options.width,
        "height": options.height,
        "region": {"x": x, "y": y, "width": width, "height": height},
        "arrays": {name: list(array.shape) for name, array in arrays.items()},
        **found,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / _FILE, data)
        _replace(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    except OSError as error:
        free = shutil.disk_usage(folder.anchor or ".").free // 2**20
        raise AvatarError(
            f"the prepared avatar can't be written to {folder}"
            f" ({error.strerror or type(error).__name__}, {free} MB free): make room, or set"
            " VOIPAVATAR_CACHE to a folder that can be written"
        ) from error


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _load(folder: Path, manifest: dict[str, Any]) -> Rig:
    try:
        with np.load(folder / _FILE, allow_pickle=False) as stored:
            arrays = {one.name: stored[one.name] for one in fields(Rig)}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise AvatarError(
            f"the prepared avatar in {folder} is damaged: prepare it again"
        ) from error
    shapes = {name: list(array.shape) for name, array in arrays.items()}
    if shapes != manifest.get("arrays"):
        raise AvatarError(f"the prepared avatar in {folder} is damaged: prepare it again")
    return Rig(**arrays)


# --- how fast it is -------------------------------------------------------------------------------


def bench(engine: VisemeEngine, avatar: Avatar, seconds: float = 5.0) -> dict[str, float]:
    """Draw a talking mouth for `seconds`, on this thread; times in milliseconds a picture.

    `cpu_` times are of this thread alone, so they hold on a machine that is busy; `draw_` times are
    by the wall's clock. The sound is a made-up babble (a buzz whose loudness and pitch move), so
    that nothing but the engine is needed. `prepare` the avatar first.
    """
    session = engine.open(avatar)
    fps = session.spec.fps
    t = np.arange(ENGINE_RATE * 2) / ENGINE_RATE
    pitch = 110 + 25 * np.sin(2 * np.pi * 0.9 * t)
    buzz = np.sign(np.sin(2 * np.pi * np.cumsum(pitch) / ENGINE_RATE))
    sound = (0.3 * buzz * np.clip(np.sin(2 * np.pi * 4 * t), 0, 1)).astype(np.float32)
    wall: list[float] = []
    cpu: list[float] = []
    hears = 0.0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for start in range(0, len(sound), 320):
            before = time.thread_time()
            jobs = session.push(sound[start : start + 320])
            hears += time.thread_time() - before
            for job in jobs:
                before, then = time.thread_time(), time.perf_counter()
                engine.render([job])
                wall.append(time.perf_counter() - then)
                cpu.append(time.thread_time() - before)
    session.flush()
    session.idle(3 * fps)
    still: list[float] = []
    for job in session.idle(2 * fps):
        before = time.thread_time()
        engine.render([job])
        still.append(time.thread_time() - before)
    speech = hears / len(wall)
    total = float(np.median(cpu)) + speech
    return {
        "frames": float(len(wall)),
        "draw_ms_median": float(np.median(wall) * 1e3),
        "draw_ms_p95": float(np.percentile(wall, 95) * 1e3),
        "cpu_ms_median": float(np.median(cpu) * 1e3),
        "cpu_ms_p95": float(np.percentile(cpu, 95) * 1e3),
        "idle_cpu_ms_median": float(np.median(still) * 1e3),
        "speech_cpu_ms_mean": speech * 1e3,
        "sessions_per_core": 1.0 / fps / total,
    }


def region(avatar: Avatar) -> tuple[int, int, int, int]:
    """The box (x, y, width, height) outside of which no pixel of the avatar ever changes."""
    manifest = _manifest(avatar.path)
    if manifest is None:
        raise AvatarError(f"{avatar.path} holds no prepared avatar: prepare it first")
    box = manifest["region"]
    return box["x"], box["y"], box["width"], box["height"]


# Proved by mypy: the classes are what the contract asks for.
_session: type[EngineSession] = VisemeSession
_engine: type[Engine] = VisemeEngine
