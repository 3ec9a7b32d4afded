"""From a clip to what `film` draws. Done once.

Two passes over the clip, so that memory is bounded by one picture whatever the length: follow the
face mesh through it, then write the pictures and take inner mouths out of them. The track is kept
as it grows; a preparation that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import av
import av.error
import cv2
import numpy as np
import numpy.typing as npt

from ..avatar import clear, locked, partial, seal, whole, write_array
from ..errors import AvatarError, ConfigError
from ..facemesh import FaceMesh, Found
from ..faces import Clip, Fit
from ..media import Float32, UInt8
from ..meshpoints import FOREHEAD, JAW, OUTER_LIPS, POINTS
from .film import ARRAYS, FIELDS, PICTURES, Bank, box_of, layer_place, layer_unit
from .filmlips import (
    CUT,
    Lips,
    Motion,
    Track,
    analyse,
    carried,
    closed_marks,
    compare,
    field_maps,
    gaps,
    strengths,
)
from .rig import Float64, Landmarks, Rig, build, curve, luma_chroma, parse_landmarks, smoothstep

log = logging.getLogger(__name__)

FILM = 1
"""Version of what is prepared from a clip."""

CHUNK = 50
"""Pictures whose points are kept together: what an interruption can cost."""

BANK = 12
"""Inner mouths that are kept."""

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Wanted:
    """What a persona says about a film."""

    width: int
    height: int
    fps: int
    background: tuple[int, int, int]
    face_at: tuple[float, float] | None
    seconds: float


def is_film(path: Path) -> bool:
    """Whether a file is looked at as a film: by how it begins it is none of the pictures."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except OSError:
        return False
    if len(head) < 12:
        return False
    still = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"II*\0", b"MM\0*", b"<svg", b"<?xml")
    if head.startswith(still) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return False
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"heic", b"heix", b"mif1"):
        return False
    return _has_pictures(path)


def _has_pictures(path: Path) -> bool:
    try:
        with av.open(str(path)) as container:
            # FFmpeg takes any file for a picture that is called one.
            form = container.format.name
            still = form == "image2" or form.endswith("_pipe")
            return bool(container.streams.video) and not still
    except (av.error.FFmpegError, ValueError, OSError):
        return False


# --- the track ------------------------------------------------------------------------------------


_ROW = 4 + POINTS * 2


def track(clip: Clip, kept: Path, mesh: FaceMesh, wanted: Wanted, tell: Tell) -> Track:
    """Follow one face through the clip. What is done is kept in `kept`, and gone on from.

    AvatarError when no picture has a face.
    """
    rows: list[Float32] = []
    done = 0
    while (chunk := _chunk(kept / f"track-{done:05d}.npy")) is not None:
        rows += list(chunk)
        done += 1
    if not (kept / "track-end").exists():
        rows = rows[: done * CHUNK]
        _follow(clip, kept, mesh, wanted, tell, rows)
        (kept / "track-end").touch()
    table = np.stack(rows).astype(np.float64) if rows else np.zeros((0, _ROW))
    if not (table[:, 0] >= 0).any():
        raise AvatarError(
            f"no face is found in {clip.path.name}: use a clip that shows one from the front, well "
            "lit and not too small, from its first second on"
        )
    first = int(np.argmax(table[:, 0] >= 0))
    return Track(
        points=table[:, 4:].reshape(-1, POINTS, 2),
        presence=table[:, 0],
        others=int(table[:, 1].max()),
        change=table[:, 2],
        score=float(table[first, 3]),
    )


def _chunk(path: Path) -> Float32 | None:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError):
        return None
    good = found.ndim == 2 and found.shape[1] == _ROW
    return np.asarray(found, np.float32) if good else None


def _follow(
    clip: Clip, kept: Path, mesh: FaceMesh, wanted: Wanted, tell: Tell, rows: list[Float32]
) -> None:
    """Fill `rows` on: presence (-1: no face), others, change, score, 936 coordinates."""
    known = len(rows)
    small: Float32 | None = None
    before: Float64 | None = None
    sure = 0.5
    wait, missed = 0, 0
    at = wanted.face_at
    for row in rows:
        if row[0] >= 0:
            before, sure = _points(row), min(sure, 0.6 * float(row[0]))
        else:
            before = None
    for i, picture in enumerate(clip):
        grey = cv2.cvtColor(
            cv2.resize(picture, (64, 36), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2GRAY
        ).astype(np.float32)
        change = 0.0 if small is None else float(np.abs(grey - small).mean())
        small = grey
        if i < known:
            continue
        row = np.zeros(_ROW, np.float32)
        row[0], row[2] = -1, change
        found: Float64 | None = None
        if before is not None:
            found, presence = mesh.follow(picture, before)
            if presence < sure or change > CUT:
                found = None
            else:
                row[0] = presence
        if found is None and (wait == 0 or change > CUT):
            spot = before[1, :2] if before is not None else at
            seen = _look(mesh, picture, spot)
            if seen is None:
                # A clip without a face is not looked through picture by picture.
                missed += 1
                wait = max(1, wanted.fps // (5 if missed < 40 else 1))
            else:
                found, missed, wait = seen.points, 0, 1
                row[0], row[1], row[3] = seen.presence, len(seen.others), seen.score
                sure = min(sure, 0.6 * seen.presence)
        wait = max(0, wait - 1)
        if found is not None:
            row[4:] = found[:, :2].reshape(-1)
            # As it will be read again, so that going on gives what going through gives.
            before = _points(row)
        else:
            before = None
        rows.append(row)
        tell("following the face", (i + 1) / clip.limit)
        if len(rows) % CHUNK == 0:
            number = len(rows) // CHUNK - 1
            write_array(kept / f"track-{number:05d}.npy", np.stack(rows[-CHUNK:]))
    if len(rows) % CHUNK:
        number = len(rows) // CHUNK
        write_array(kept / f"track-{number:05d}.npy", np.stack(rows[number * CHUNK :]))


def _points(row: Float32) -> Float64:
    return np.hstack([row[4:].reshape(POINTS, 2), np.zeros((POINTS, 1))]).astype(np.float64)


def _found(points: Float64) -> Found:
    return Found(np.hstack([points, np.zeros((len(points), 1))]), 1.0, 1.0)


def _look(mesh: FaceMesh, picture: UInt8, at: Any) -> Found | None:
    try:
        return mesh.find(picture, None if at is None else (float(at[0]), float(at[1])))
    except AvatarError:
        return None


# --- the inner mouths -----------------------------------------------------------------------------


class Collector:
    """Takes inner mouths out of pictures as they pass by."""

    def __init__(self, motion: Motion, gap: Float64, fps: int) -> None:
        self._motion = motion
        self._gap = gap
        self._kept: list[tuple[int, UInt8, tuple[int, int]]] = []
        self._wanted = set(self._candidates(fps))

    def _candidates(self, fps: int) -> list[int]:
        """Of every size of opening some pictures, the stillest first."""
        gap, speed = self._gap, self._motion.speed
        ajar = np.flatnonzero(self._motion.usable & (gap > 0.030))
        if not len(ajar):
            return []
        edges = np.linspace(0.030, max(0.0301, float(gap[ajar].max())), 9)
        out: list[int] = []
        for low, high in zip(edges[:-1], edges[1:], strict=True):
            some = ajar[(gap[ajar] >= low) & (gap[ajar] <= high)]
            out += [int(i) for i in some[np.argsort(speed[some], kind="stable")][:5]]
        return out

    def see(self, i: int, picture: UInt8) -> None:
        if i not in self._wanted:
            return
        motion = self._motion
        ring = carried(motion.poses[i], motion.local[i][list(OUTER_LIPS)])
        margin = 0.15 * motion.unit
        low, high = np.floor(ring.min(0) - margin), np.ceil(ring.max(0) + margin)
        height, width = picture.shape[:2]
        x0, y0 = max(0, int(low[0])), max(0, int(low[1]))
        x1, y1 = min(width, int(high[0])), min(height, int(high[1]))
        self._kept.append((i, picture[y0:y1, x0:x1].copy(), (x0, y0)))

    def bank(self, rig: Rig, rings: Float64) -> Bank:
        """`rings` (n, 20, 2): every picture's inner lips in the reference's pixels."""
        shape = rig.teeth.shape[1:3]
        taken = [self._layer(rig, i, part, at, rings[i]) for i, part, at in self._kept]
        layers: list[UInt8] = []
        facts: list[Float32] = []
        # Far apart in opening and in teeth: greedily the one that is most unlike those taken.
        left = [one for one in taken if one is not None]
        while left and len(layers) < BANK:
            if not facts:
                best = int(np.argmax([fact[0] for _, fact in left]))
                apart = 1.0
            else:
                unit = layer_unit(rig)
                far = [
                    min(
                        math.hypot((fact[0] - one[0]) / (0.05 * unit), (fact[2] - one[2]) / 0.35)
                        for one in facts
                    )
                    for _, fact in left
                ]
                best = int(np.argmax(far))
                apart = far[best]
            if apart < 0.25:
                break
            layer, fact = left.pop(best)
            layers.append(layer)
            facts.append(fact)
        if not layers:
            return Bank(np.zeros((0, *shape, 4), np.uint8), np.zeros((0, 4), np.float32))
        return Bank(np.stack(layers), np.stack(facts))

    def _layer(
        self, rig: Rig, i: int, part: UInt8, at: tuple[int, int], ring: Float64
    ) -> tuple[UInt8, Float32] | None:
        height, width = rig.teeth.shape[1:3]
        to_picture = layer_place(rig)
        upper, lower = ring[0:11], ring[np.r_[0, 19:10:-1, 10]]
        inverse = cv2.invertAffineTransform(to_picture)

        def into(points: Float64) -> Float64:
            return cast(Float64, curve(points, 81) @ inverse[:, :2].T + inverse[:, 2])

        up, low = into(upper), into(lower)
        x = np.arange(width, dtype=np.float64)
        every = np.arange(height, dtype=np.float64)[:, None]

        def look(rows: Float64) -> tuple[Float32, Float32]:
            spot = np.stack(np.broadcast_arrays(x, rows), -1)
            spot = spot @ to_picture[:, :2].T + to_picture[:, 2]
            spot = carried(self._motion.poses[i], spot) - at
            seen = cv2.remap(
                part,
                np.ascontiguousarray(spot[..., 0], np.float32),
                np.ascontiguousarray(spot[..., 1], np.float32),
                cv2.INTER_CUBIC,
                borderMode=cv2.BORDER_REPLICATE,
            )
            return luma_chroma(seen)

        mesh_top = np.interp(x, up[:, 0], up[:, 1])
        mesh_bottom = np.maximum(np.interp(x, low[:, 0], low[:, 1]), mesh_top)
        luma, chroma = look(every)
        top, bottom = _between_lips(luma, chroma, mesh_top, mesh_bottom)
        pixel = 2.0
        margin = np.minimum(0.8 * pixel, (bottom - top) / 2)
        rows = np.clip(every, top + margin, bottom - margin)
        luma, chroma = look(rows)
        ends = smoothstep((x - up[0, 0]) / (0.05 * width)) * smoothstep(
            (up[-1, 0] - x) / (0.05 * width)
        )
        thick = smoothstep((bottom - top) / (4.0 * pixel))
        # What it goes on with beyond the lips it was filmed with, gives way to what is painted.
        reach = 0.022 * layer_unit(rig)
        beyond = np.maximum(np.maximum(top - every, every - bottom), 0)
        alpha = ends * thick * (1 - smoothstep(beyond / reach - 0.4)) * 255
        layer = np.concatenate([luma[..., None], chroma, alpha[..., None]], -1)
        inside = (every > top + margin) & (every < bottom - margin)
        count = int(inside.sum())
        if count < 30:
            return None
        # Teeth: bright beside what is darkest in there, and hardly red.
        bright = luma[inside] > np.percentile(luma[inside], 5) + 45
        pale = chroma[..., 1][inside] < 148
        teeth = float((bright & pale).mean())
        gap = float((low[:, 1] - up[:, 1]).max())
        fact = np.array([gap, low[40, 1], teeth, up[40, 1]], np.float32)
        return np.clip(np.rint(layer), 0, 255).astype(np.uint8), fact


def _between_lips(
    luma: Float32, chroma: Float32, top: Float64, bottom: Float64
) -> tuple[Float64, Float64]:
    """Column by column where what is between the lips begins and ends: the mesh's edges, moved
    inwards past what still has the lips' own colour."""
    height, width = luma.shape
    rows = np.arange(height)[:, None]
    gap = float((bottom - top).max())
    wide = (bottom - top) > 0.25 * gap
    out = [top.copy(), bottom.copy()]
    for lower in (False, True):
        edge, sign = (bottom, -1.0) if lower else (top, 1.0)
        depth = (rows - edge) * sign  # inwards
        band = (depth < -2) & (depth > -8) & wide
        if int(band.sum()) < 20:
            continue
        tone, red, blue = (
            float(np.median(plane[band])) for plane in (luma, chroma[..., 1], chroma[..., 0])
        )
        unlike = np.hypot((luma - tone) / 34, (chroma[..., 1] - red) / 9)
        unlike = np.hypot(unlike, (chroma[..., 0] - blue) / 9)
        lip = (unlike < 1) & (depth >= 0) & (depth < 0.4 * gap)
        # As far as it is lip without a break.
        shift = np.zeros(width)
        for column in np.flatnonzero(wide):
            line = lip[:, column][depth[:, column] >= 0]
            line = line[::-1] if lower else line
            shift[column] = int(np.argmin(np.append(line, False)))
        shift = cv2.GaussianBlur(shift[None], (0, 0), 0.015 * width)[0]
        out[int(lower)] = edge + sign * shift
    middle = (out[0] + out[1]) / 2
    return np.minimum(out[0], middle), np.maximum(out[1], middle)


# --- preparing ------------------------------------------------------------------------------------


def fitted(clip: Clip, seen: Track, wanted: Wanted) -> Fit:
    """The clip scaled to cover the picture, cut so that the face stays in it and high enough."""
    columns, rows = clip.source
    there = seen.points[seen.presence >= 0]
    face = there[:, [*JAW, FOREHEAD]]
    unit = float(np.median(np.linalg.norm(there[:, 263] - there[:, 33], axis=1)))
    low = np.percentile(face.min(1), 10, axis=0)
    high = np.percentile(face.max(1), 90, axis=0)
    scale = max(wanted.width / columns, wanted.height / rows)
    size = (max(wanted.width, round(columns * scale)), max(wanted.height, round(rows * scale)))
    top = float(low[1]) - 0.22 * unit  # the mesh ends below the hair
    x = (low[0] + high[0]) / 2 * scale - wanted.width / 2
    y = min(
        (top + high[1]) / 2 * scale - 0.45 * wanted.height,
        max(0.0, top * scale - 0.75 * unit * scale),
    )
    left = int(np.clip(round(x), 0, size[0] - wanted.width))
    above = int(np.clip(round(y), 0, size[1] - wanted.height))
    return Fit(scale, float(left), float(above), wanted.width, wanted.height)


def moved(fit: Fit, points: Float64) -> Float64:
    """Points of the source in the picture that is made, pixel centres kept."""
    at: Float64 = (points + 0.5) * fit.scale - 0.5 - (round(fit.left), round(fit.top))
    return at


def prepare(
    source: Path,
    target: Path,
    key: str,
    data: Mapping[str, Any],
    wanted: Wanted,
    mesh: Callable[[], FaceMesh],
    describe: Callable[[Landmarks], object],
    progress: Tell,
) -> None:
    """Prepare a clip into `target`. Idempotent, resumable; the manifest, written last, holds
    `data` and, as `landmarks`, what `describe` says of the reference's face. AvatarError says what
    is wrong with the clip."""
    with locked(target):
        progress("looking for what is prepared already", 0.0)
        if whole(target, key) is not None:
            progress("ready", 1.0)
            return
        clear(target)
        kept = partial(target, key)
        progress("reading the clip", 0.02)
        clip = Clip(source, how="native", background=wanted.background, seconds=wanted.seconds,
                    fps=wanted.fps)  # fmt: skip
        looker = mesh()

        def step(begin: float, share: float) -> Tell:
            return lambda what, done: progress(what, begin + share * min(1.0, done))

        seen = track(clip, kept, looker, wanted, step(0.05, 0.55))
        clip.fit = fitted(clip, seen, wanted)
        points = moved(clip.fit, seen.points)
        motion = analyse(seen, (wanted.width, wanted.height), points, wanted.fps)
        _room(target, wanted, len(points))
        try:
            _finish(target, key, data, wanted, clip, seen, motion, looker, describe, step(0.6, 0.4))
        except OSError as error:
            raise _unwritable(target, error) from error
        progress("ready", 1.0)


_TO_CHROMA = np.array(
    [
        [0.5 / (1 - 0.114) * (1 - 0.114), -0.5 / (1 - 0.114) * 0.587, -0.5 / (1 - 0.114) * 0.299],
        [-0.5 / (1 - 0.299) * 0.114, -0.5 / (1 - 0.299) * 0.587, 0.5 / (1 - 0.299) * (1 - 0.299)],
    ]
) * (224 / 255)


def quick_i420(bgr: UInt8) -> UInt8:
    """As `rig.to_i420`, for every picture of a clip: chroma is the mean of its four pixels."""
    height, width = bgr.shape[:2]
    out = np.empty((height * 3 // 2, width), np.uint8)
    out[:height] = cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_I420)[:height]
    small = cv2.resize(bgr, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    chroma = cv2.transform(small, np.hstack([_TO_CHROMA, [[128.0], [128.0]]]))
    out[height:].reshape(2, height // 2, width // 2)[:] = chroma.transpose(2, 0, 1)
    return out


def _room(target: Path, wanted: Wanted, pictures: int) -> None:
    need = pictures * wanted.width * wanted.height * 3 // 2
    free = shutil.disk_usage(target).free
    if free < need * 1.05 + 50e6:
        raise AvatarError(
            f"the clip needs {need // 2**20} MB in {target} and {free // 2**20} MB are free: make "
            "room, set VOIPAVATAR_CACHE to another disk, or take less of the clip "
            "(`seconds` in the persona's engine_options)"
        )


def _unwritable(target: Path, error: OSError) -> AvatarError:
    free = shutil.disk_usage(target.anchor or ".").free // 2**20
    return AvatarError(
        f"the prepared avatar can't be written to {target}"
        f" ({error.strerror or type(error).__name__}, {free} MB free): make room, or set"
        " VOIPAVATAR_CACHE to a folder that can be written"
    )


def _finish(
    target: Path,
    key: str,
    data: Mapping[str, Any],
    wanted: Wanted,
    clip: Clip,
    seen: Track,
    motion: Motion,
    looker: FaceMesh,
    describe: Callable[[Landmarks], object],
    tell: Tell,
) -> None:
    n = len(motion.local)
    gap = gaps(motion.local).max(1) / motion.unit
    collector = Collector(motion, gap, wanted.fps)
    reference: UInt8 | None = None
    with (target / PICTURES).open("wb") as file:
        for i, picture in enumerate(clip):
            if i >= n:
                break
            file.write(quick_i420(picture).data)
            collector.see(i, picture)
            if i == motion.reference:
                reference = picture.copy()
            tell("writing the pictures", 0.6 * (i + 1) / n)
        count = i + 1
    if count < n or reference is None:
        raise AvatarError(f"{clip.path.name} changed while it was read: prepare it again")
    tell("finding how the face moves", 0.65)
    told, found = _look_closely(looker, reference, motion)
    rig = build(reference, closed_marks(told), 0.0)
    strength = strengths(motion.usable, wanted.fps)
    lips = compare(motion, told, rig, wanted.fps, strength)
    (rows, columns), maps = field_maps(rig, told, motion)
    tell("writing", 0.8)
    with (target / FIELDS).open("wb") as file:
        for i in range(n):
            out = np.empty((2, 2, rows, columns, 2), np.float16)
            for which, moves in enumerate((lips.own[i], lips.closed[i] - lips.own[i])):
                for layer, matrix in enumerate(maps):
                    out[which, layer] = (matrix @ moves).reshape(rows, columns, 2)
            file.write(out.tobytes())
    bank = collector.bank(rig, np.asarray(rig.ring, np.float64) + lips.seen_ring)
    arrays: dict[str, npt.NDArray[Any]] = {
        f"rig_{one.name}": getattr(rig, one.name) for one in fields(Rig)
    }
    arrays |= {
        "poses": motion.poses,
        "usable": motion.usable,
        "strength": strength.astype(np.float32),
        "openness": lips.openness.astype(np.float32),
        "gap": lips.gap.astype(np.float32),
        "own_ring": lips.own_ring.astype(np.float32),
        "closed_ring": lips.closed_ring.astype(np.float32),
        "grid": np.array([rows, columns]),
        "bank": bank.layers,
        "bank_facts": bank.facts,
    }
    with (target / ARRAYS).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    x0, y0, x1, y1 = _union(rig, motion, wanted)
    advice = advise(clip, seen, motion, lips, bank, found, wanted)
    for line in advice:
        log.info("about this clip", extra={"advice": line})
    seal(
        target,
        {
            **data,
            "key": key,
            "film": FILM,
            "frames": n,
            "fps": wanted.fps,
            "width": wanted.width,
            "height": wanted.height,
            "reference": motion.reference,
            "driven": int(motion.usable.sum()),
            "inner_mouths": len(bank.layers),
            "region": {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0},
            "advice": advice,
            "given": False,
            "landmarks": describe(told),
        },
    )


def _look_closely(looker: FaceMesh, reference: UInt8, motion: Motion) -> tuple[Landmarks, Found]:
    """The reference's face by everything that is known about faces."""
    at = carried(motion.poses[motion.reference], motion.local[motion.reference])
    found = looker.again(reference, _found(at))
    marks = found.landmarks()
    height, width = reference.shape[:2]
    limit = np.array([width - 2.0, height - 2.0])
    for name in ("jaw", "forehead"):
        marks[name] = np.clip(np.asarray(marks[name]), 1.0, limit).tolist()
    try:
        return parse_landmarks(marks), found
    except ConfigError as error:
        raise AvatarError(
            "the face in the clip can't be used as it lies there: use one that is upright and "
            f"looks at the viewer ({error})"
        ) from error


def _union(rig: Rig, motion: Motion, wanted: Wanted) -> tuple[int, int, int, int]:
    size = (wanted.width, wanted.height)
    boxes = np.array([box_of(rig, motion.poses[i], size) for i in np.flatnonzero(motion.usable)])
    x1, y1 = (boxes[:, :2] + boxes[:, 2:]).max(0)
    return int(boxes[:, 0].min()), int(boxes[:, 1].min()), int(x1), int(y1)


def advise(
    clip: Clip,
    seen: Track,
    motion: Motion,
    lips: Lips,
    bank: Bank,
    found: Found,
    wanted: Wanted,
) -> list[str]:
    """What a person should know about the clip, in sentences."""
    said = []
    n = len(motion.local)
    seconds = n / wanted.fps
    if seconds < 3:
        said.append(
            f"the clip is {seconds:.1f} s long: what it does comes again and again; 8 to 30 s of "
            "listening look natural"
        )
    if n >= clip.limit:
        said.append(
            f"only the first {wanted.seconds:g} s of the clip are used: `seconds` in the persona's "
            "engine_options takes more"
        )
    if motion.cuts:
        said.append(
            f"the picture jumps {motion.cuts} time(s) in the clip (a cut?): the jump will be seen "
            "each time; use one unbroken shot"
        )
    driven = int(motion.usable.sum())
    if driven < n:
        said.append(
            f"in {n - driven} of {n} pictures there is no face, or it is turned aside or cut off: "
            "they are shown as they are, and the mouth doesn't speak there"
        )
    if lips.held:
        said.append(
            "the mouth is open all the time: it is shown so at rest, and lips are pulled together "
            "where speech closes them; a clip with closed lips looks better"
        )
    else:
        share = float((lips.gap[motion.usable] > 0.03).mean())
        if share > 0.15:
            said.append(
                f"the mouth is open in {share:.0%} of the clip: there it is pulled shut at rest, "
                "which looks less natural than a clip of somebody who listens"
            )
    if not len(bank.layers):
        said.append(
            "the clip never shows the inside of the mouth: teeth and tongue are painted; a word or "
            "a laugh in the clip would give real ones"
        )
    close = replace(
        found,
        score=seen.score,
        presence=float(np.median(seen.presence[motion.usable])),
        inner_lips=None,
    )
    for line in close.advice(1.0):
        if "open in the portrait" not in line:
            said.append(line.replace("portrait", "clip"))
    if clip.fit.scale > 1.6:
        said.append(
            f"the clip is enlarged {clip.fit.scale:.1f} times: it will look soft; use a larger one"
        )
    if seen.others:
        x, y = (round(float(v)) for v in seen.points[int(np.argmax(seen.presence >= 0)), 1])
        said.append(
            f"{seen.others + 1} faces are in the clip, the one about [{x}, {y}] is used: for "
            "another, set `face_at: [x, y]` (in its first picture) in the persona's engine_options"
        )
    return said
