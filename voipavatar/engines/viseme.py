"""The `viseme` engine: one portrait in, a talking face out, in real time on one CPU core.

`prepare` turns a portrait and its landmarks into a rig (see `rig`) and keeps it in an npz beside
a manifest. A session turns speech into mouth parameters (see `articulation`) and adds what a living
face does besides (see `life`). Every job holds the whole pose of its picture; drawing keeps no
state.
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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, cast

import cv2
import numpy as np

from ..avatar import known_digest
from ..config import Settings
from ..errors import AvatarError, ConfigError, EngineError, TransportError
from ..facemesh import FaceMesh
from ..facemodels import face_models, matte_model
from ..matte import blurred, by_colours, own_colours, refined, roughly
from ..media import ENGINE_RATE, Cue, Float32, UInt8, check_fps
from ..sets import SETS, make_set
from . import (
    CUT,
    Avatar,
    Engine,
    EngineInfo,
    EngineSession,
    Expressive,
    Job,
    Progress,
    Spec,
    filming,
)
from .film import FilmPuppet
from .life import GESTURES, KEPT, Body
from .puppet import Pose, Puppet
from .rig import Landmarks, Rig, build, parse_landmarks, to_i420

log = logging.getLogger(__name__)

VERSION = 5

PARAMETERS = 8
"""Mouth parameters of a pose: `articulation.PARAMETERS`."""

_REST: Float32 = np.zeros(PARAMETERS, np.float32)
_LEVEL = 7
_FADE = 3
"""Pictures in which speech takes the mouth over from wherever it was."""


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
    gaze: float = 1.0
    """How much the eyes move: 0 not at all, at most 1.5. With `motion` 0 they don't either."""
    mouth: float = 1.0
    """How far the mouth opens: 0.3 mumbles, 1 speaks, at most 1.5."""
    ease: float = 0.32
    """Seconds the mouth takes to close after speech, 0.04 to 2."""
    background: tuple[int, int, int] | str | None = None
    """What is behind: red, green, blue; "blur"; a virtual set ("studio", "loft", "paper"); or a
    picture's file. Without it, what the portrait has there; grey if that is transparent."""
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
    "gaze": (0, 1.5),
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
            values[key] = _background(value)
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


GREY = (208, 204, 200)
"""What is behind a transparent portrait, unless something is asked for."""


def _background(value: object) -> tuple[int, int, int] | str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    return _colour(value)


def _colour(value: object) -> tuple[int, int, int]:
    if (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(isinstance(c, int) and not isinstance(c, bool) and 0 <= c <= 255 for c in value)
    ):
        return value[0], value[1], value[2]
    raise ConfigError(
        "engine option background must be [red, green, blue], each 0 to 255, or blur, "
        f"{', '.join(SETS)}, or a picture's file"
    )


# --- the portrait ---------------------------------------------------------------------------------


def read_portrait(data: bytes, background: tuple[int, int, int] = GREY) -> UInt8:
    """A picture file as BGR, upright as its EXIF says, over `background` where it is transparent.

    AvatarError when it is no picture.
    """
    picture = _pixels(data)
    if picture.shape[2] == 4:
        alpha = picture[..., 3:].astype(np.float32) / 255
        behind = np.array(background[::-1], np.float32)
        picture = np.rint(picture[..., :3] * alpha + behind * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(picture)


def _pixels(data: bytes) -> UInt8:
    """BGR, or BGRA where something is transparent."""
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
        if picture[..., 3].min() == 255:
            picture = picture[..., :3]
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


def _stands(background: tuple[int, int, int] | str | None, own: UInt8 | None) -> bool:
    """Whether the person is to be told from what is behind. Before one colour a transparent
    portrait needs no more than to be laid on it."""
    return background is not None and not (isinstance(background, tuple) and own is not None)


def _behind(background: tuple[int, int, int] | str | None, picture: UInt8, alpha: Float32) -> UInt8:
    """(H, W, 3) BGR of what an option asks for, as large as `picture`.

    ConfigError when it names no picture.
    """
    height, width = picture.shape[:2]
    if isinstance(background, tuple):
        out = np.empty_like(picture)
        out[:] = background[::-1]
        return out
    if background == "blur":
        return blurred(picture, alpha)
    if background in SETS:
        return make_set(background, width, height)
    return cover(_pixels(_file_of(background)), width, height)


def _file_of(background: object) -> bytes:
    try:
        return Path(str(background)).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"engine option background: {background} can't be read as a picture's file "
            f"({error.strerror or type(error).__name__}); it may also be blur, {', '.join(SETS)}, "
            "or [red, green, blue]"
        ) from error


def cover(picture: UInt8, width: int, height: int) -> UInt8:
    """The middle of a picture, as large as it must be to cover `width` x `height`; BGR."""
    rows, columns = picture.shape[:2]
    scale = max(width / columns, height / rows)
    size = (max(width, round(columns * scale)), max(height, round(rows * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = cv2.resize(np.ascontiguousarray(picture[..., :3]), size, interpolation=how)
    x, y = (size[0] - width) // 2, (size[1] - height) // 2
    return cast(UInt8, np.ascontiguousarray(scaled[y : y + height, x : x + width]))


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


# --- a session ------------------------------------------------------------------------------------


class VisemeSession:
    """One room on one avatar. Pure: sound and idle requests in, poses out."""

    def __init__(self, puppet: Puppet, options: Options, articulator: Articulates) -> None:
        self.puppet = puppet
        self._articulator = articulator
        self._body = Body(options.seed, options.fps, options.motion, options.blink, options.gaze)
        self._mouth = options.mouth
        self._spec = Spec(
            width=options.width,
            height=options.height,
            fps=options.fps,
            lookahead=articulator.lookahead,
            ease=max(1, round(options.ease * options.fps)),
        )
        self._clock = 0
        # The mouth of the last jobs, by their clock.
        self._shown: OrderedDict[int, Float32] = OrderedDict()
        self._now = _REST
        # The mouth on its way to rest: from where, over how many pictures, how many are done.
        self._from = _REST
        self._length = 0
        self._eased = 0
        # Gestures that are asked for, by their seconds within the turn.
        self._asked: list[tuple[float, str]] = []
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
        for _, name in self._asked:
            self._body.gesture(self._clock, name)
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

    def reset(self, clock: int | None = None, ease: int = CUT) -> None:
        self._articulator.reset()
        self._asked, self._row = [], 0
        if clock is not None:
            if clock < 0:
                raise EngineError(f"a picture clock can't be {clock}")
            known = self._shown.get(clock - 1)
            while self._shown and next(reversed(self._shown)) >= clock:
                self._shown.popitem()
            # Nothing that was made before is still on: begin as new, or from the oldest known.
            fresh = known is None and not (self._shown and clock > self._clock)
            if known is not None or fresh:
                self._now = _REST if known is None else known
            self._body.rewind(clock, fresh=fresh)
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

    def pose(self, name: str) -> None:
        self._body.pose(self._clock, name)

    def gesture(self, name: str) -> None:
        if name not in GESTURES:
            raise EngineError(f"there is no gesture {name!r}; there are: {', '.join(GESTURES)}")
        self._body.gesture(self._clock, name, free=True)

    def _part(self, ease: int) -> None:
        """From here on the mouth closes, until speech takes it."""
        self._from, self._length, self._eased = self._now, ease, 0
        self._entered = 0

    def _speak(self, rows: Float32) -> list[Job]:
        jobs = []
        for row in np.asarray(rows, np.float32):
            moment = (self._row + 1) / self._spec.fps
            self._row += 1
            for at, name in self._asked:
                if at < moment:
                    self._body.gesture(self._clock, name)
            self._asked = [one for one in self._asked if one[0] >= moment]
            if self._entered == 0:
                self._entry = self._now
            self._entered += 1
            mouth = row
            if self._entered < _FADE:
                share = np.float32(self._entered / _FADE)
                mouth = self._entry + (row - self._entry) * share
            jobs.append(self._job(mouth.astype(np.float32), speech=True))
        return jobs

    def _job(self, mouth: Float32, *, speech: bool) -> Job:
        clock = self._clock
        self._now = mouth
        self._shown[clock] = mouth
        if len(self._shown) > KEPT:
            self._shown.popitem(last=False)
        self._clock = clock + 1
        held = self._body.step(clock, float(mouth[_LEVEL]))
        mouth = self._widened(mouth)
        if held.smile > 0:
            mouth = mouth.copy()
            # Wide and round are opposites: who smiles rounds less.
            mouth[1] = min(1.0, float(mouth[1]) + held.smile)
            mouth[2] *= 1 - 0.5 * held.smile
        pose = Pose(mouth, held.head, held.blink, held.wink, held.gaze, clock)
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
            can=("photo", "video", "cues", "idle", "poses"),
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
        pixels = _pixels(data)
        shown = parsed.background if isinstance(parsed.background, tuple) else GREY
        picture = read_portrait(data, shown)
        advice: list[str] = []
        given = marks is not None
        if marks is None:
            progress("finding the face", 0.15)
            marks, advice = self._find(picture, parsed, lambda what: progress(what, 0.15))
        told = _points_of(marks)
        own = np.ascontiguousarray(pixels[..., 3]) if pixels.shape[2] == 4 else None
        if own is not None:
            own = fit(own, marks, parsed.width, parsed.height)[0]
        picture, marks = fit(picture, marks, parsed.width, parsed.height)
        stands = _stands(parsed.background, own)
        if stands:
            progress("telling the person from the background", 0.2)
            alpha = self._matte(picture, own, marks, advice, lambda what: progress(what, 0.2))
            behind = _behind(parsed.background, picture, alpha)
            picture = own_colours(picture, alpha)
        progress("finding how the face moves", 0.3)
        rig = build(picture, marks, parsed.motion)
        if stands:
            cover = np.rint(alpha * 255).astype(np.uint8)
            rig = replace(rig, alpha=cover, behind=to_i420(behind))
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
        if isinstance(options.background, str):
            raise ConfigError(
                "engine option background: a clip keeps its own; only a picture stands before "
                "another one"
            )
        wanted = filming.Wanted(
            options.width,
            options.height,
            options.fps,
            options.background or GREY,
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

    def _matte(
        self,
        picture: UInt8,
        own: UInt8 | None,
        marks: Landmarks,
        advice: list[str],
        tell: Callable[[str], None],
    ) -> Float32:
        """How much of each pixel is the person, 0 to 1; `own` is what the portrait says of it."""
        if own is not None:
            return np.asarray(own / np.float32(255), np.float32)
        try:
            network = matte_model(self._settings or Settings.from_env(), tell)
        except TransportError as error:
            log.warning("the matte is made without its network", extra={"error": str(error)})
            advice.append(
                "the outline before the background was found by colours alone, since its network "
                "can't be had: look at hair and shoulders, or use a portrait that is transparent"
            )
            rough = by_colours(picture, marks.box)
        else:
            rough = roughly(picture, network)
            left, top, right, bottom = (round(v) for v in marks.box)
            seen = rough[max(0, top) : bottom, max(0, left) : right]
            if seen.mean() < 0.6:  # it knows people, not drawings of them
                advice.append(
                    "the network sees no person here, so the outline before the background was "
                    "found by colours: look at it, or use a portrait that is transparent"
                )
                rough = by_colours(picture, marks.box)
        return refined(picture, rough, marks.unit)

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
    names = ("width", "height", "fps", "seed", "motion", "blink", "gaze", "mouth", "ease")
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
    if isinstance(options.background, str) and options.background not in ("blur", *SETS):
        digest.update(hashlib.sha256(_file_of(options.background)).digest())
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
_expressive: type[Expressive] = VisemeSession
_engine: type[Engine] = VisemeEngine
