"""A clip as the portrait of the `viseme` engine: its own motion, with lips that are driven.

The clip runs forward and back under the mouth. Prepared once: the face mesh of every picture,
smoothed with the whole clip known; the similarity that carries the mouth's frame of a reference
picture to each other one; and how each picture's own lips and jaw differ from the reference with
its lips closed (two coarse fields a picture: as they are, and as they would be closed).

Drawing a picture at canonical places c (the reference, lips closed): c + closed(c) + speech(c) is
where they go, c + own(c) where they come from. So a picture whose mouth is closed stays, to the
last bit, as it was filmed while nothing is said, and one that was filmed speaking is brought to
rest. Between parted lips the clip's own inner mouths are shown, as far as it has some that fit.

Pictures are read from disk one by one as they are shown: memory does not grow with the clip.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

from ..avatar import MANIFEST, clear, fold, locked, partial, read_json, seal, whole, write_array
from ..errors import AvatarError, ConfigError
from ..facemesh import FOREHEAD, INNER_LIPS, JAW, OUTER_LIPS, FaceMesh, Found
from ..faces import Clip, Fit
from ..media import Float32, UInt8
from .puppet import Pose, Puppet, mouth_weights
from .rig import (
    INNER,
    MOUTH,
    Float64,
    Landmarks,
    Rig,
    build,
    curve,
    grid_nodes,
    luma_chroma,
    parse_landmarks,
    planes,
    smoothstep,
    spline_field,
)

log = logging.getLogger(__name__)

FILM = 1
"""Version of what is prepared from a clip."""

CHUNK = 50
"""Pictures whose points are kept together: what an interruption can cost."""

TURNED = 38.0
"""Degrees: a head turned further is left as it is."""

STABLE = (33, 133, 362, 263, 6, 197, 195, 5, 1, 2, 98, 327, 64, 294)
"""Points that speech doesn't move: corners of the eyes, and the nose (counted twice)."""

CHEEKS = (205, 425, 50, 280)
"""Points that lie between the mouth and what doesn't move."""

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
    import av
    import av.error

    try:
        with av.open(str(path)) as container:
            return bool(container.streams.video)
    except (av.error.FFmpegError, ValueError, OSError):
        return False


# --- the track ------------------------------------------------------------------------------------


@dataclass
class Track:
    """The mesh in every picture, in pixels of the source."""

    points: Float64
    """(n, 468, 2)"""
    presence: Float64
    """(n,): how sure it is that it is a face; -1 where none was found."""
    others: int
    """Further faces, at most, in the pictures that were looked at whole."""
    change: Float64
    """(n,): how much each picture differs from the one before it, in grey levels."""
    score: float
    """The detector's, of the first face."""


_ROW = 4 + 468 * 2


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
        points=table[:, 4:].reshape(-1, 468, 2),
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
            if presence < sure or change > _CUT:
                found = None
            else:
                row[0] = presence
        if found is None and (wait == 0 or change > _CUT):
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


_CUT = 22.0
"""Grey levels of mean change from one picture to the next: another scene."""


def _points(row: Float32) -> Float64:
    return np.hstack([row[4:].reshape(468, 2), np.zeros((468, 1))]).astype(np.float64)


def _look(mesh: FaceMesh, picture: UInt8, at: Any) -> Found | None:
    try:
        return mesh.find(picture, None if at is None else (float(at[0]), float(at[1])))
    except AvatarError:
        return None


# --- what moves, what doesn't ---------------------------------------------------------------------


def similarity(points: Float64, onto: Float64, weights: Float64) -> npt.NDArray[np.complex128]:
    """(n, 2) complex a, b: z -> a z + b takes `points` (k, 2) to each of `onto` (n, k, 2)."""
    z = points[:, 0] + 1j * points[:, 1]
    w = onto[..., 0] + 1j * onto[..., 1]
    share = weights / weights.sum()
    middle, middles = (z * share).sum(), (w * share).sum(-1)
    flat = z - middle
    a = (share * np.conj(flat) * (w - middles[:, None])).sum(-1) / (share * np.abs(flat) ** 2).sum()
    return np.stack([a, middles - a * middle], -1)


def carried(pose: npt.NDArray[np.complex128], points: npt.NDArray[Any]) -> Float64:
    """Points through one similarity (2,)."""
    z = pose[0] * (points[..., 0] + 1j * points[..., 1]) + pose[1]
    return np.stack([z.real, z.imag], -1)


def brought_back(poses: npt.NDArray[np.complex128], points: Float64) -> Float64:
    """(n, k, 2) of (n, k, 2): each picture's points as they lie in the reference."""
    z = points[..., 0] + 1j * points[..., 1]
    z = (z - poses[:, 1, None]) / poses[:, 0, None]
    return np.stack([z.real, z.imag], -1)


def steadied(series: Float64, fps: int, runs: list[tuple[int, int]]) -> Float64:
    """(n, m) without the tracker's noise: strongly where little moves, and where much moves as
    little as keeps it (what the one-euro filter does, without its lag: the whole clip is known)."""
    out = series.copy()
    for start, end in runs:
        part = series[start:end]
        if len(part) < 5:
            continue
        size = max(5, min(round(0.28 * fps) | 1, (len(part) - 1) | 1))
        size = size if size <= len(part) else size - 2
        quick = _polynomial(part, size)
        slow = _gauss(part, 0.12 * fps)
        # The noise of all columns together: what the polynomial doesn't follow.
        noise = 1.5 * float(np.median(np.abs(part - quick))) + 1e-9
        apart = np.sqrt(((quick - slow) ** 2).mean(1))
        share = smoothstep(_gauss(apart[:, None], 1.0) / noise - 0.5)
        out[start:end] = slow + (quick - slow) * share
    return out


def _gauss(part: Float64, sigma: float) -> Float64:
    reach = min(len(part) - 1, max(1, round(3 * sigma)))
    at = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (at / max(sigma, 1e-3)) ** 2)
    # Mirrored about the first and the last picture, as the loop runs.
    padded = np.pad(part, ((reach, reach), (0, 0)), "reflect")
    return _convolved(padded, kernel / kernel.sum())


def _polynomial(part: Float64, size: int) -> Float64:
    """Savitzky and Golay's filter of second order, `size` pictures wide."""
    half = size // 2
    at = np.arange(-half, half + 1, dtype=np.float64)
    kernel = np.linalg.pinv(np.stack([np.ones(size), at, at**2], 1))[0]
    return _convolved(np.pad(part, ((half, half), (0, 0)), "reflect"), kernel)


def _convolved(padded: Float64, kernel: Float64) -> Float64:
    count = len(padded) - len(kernel) + 1
    out = np.zeros((count, padded.shape[1]))
    for i, weight in enumerate(kernel):
        out += weight * padded[i : i + count]
    return out


@dataclass
class Motion:
    """What the clip does, in pixels of the picture that is made."""

    usable: npt.NDArray[np.bool_]
    """(n,): a face that can be driven."""
    runs: list[tuple[int, int]]
    """Stretches of usable pictures without a cut."""
    cuts: int
    reference: int
    poses: npt.NDArray[np.complex128]
    """(n, 2): from the reference to each picture."""
    local: Float64
    """(n, 468, 2): steadied points, brought back to the reference."""
    unit: float
    """Of the reference: the distance of the outer corners of the eyes."""
    speed: Float64
    """(n,): how far the mouth's place moves to the next picture, in pixels."""


def analyse(seen: Track, size: tuple[int, int], points: Float64, fps: int) -> Motion:
    """`points` (n, 468, 2) are the track's in the picture that is made, of `size`."""
    width, height = size
    n = len(points)
    usable = seen.presence >= 0
    units = np.linalg.norm(points[:, 263] - points[:, 33], axis=1)
    usable &= units >= 40
    for i in np.flatnonzero(usable):
        whole_face = points[i][list(JAW)]
        low, high = whole_face.min(0), whole_face.max(0)
        inside = low[0] >= 2 and high[0] <= width - 3 and high[1] <= height - 3 and low[1] >= 2
        usable[i] = inside and abs(_found(points[i]).yaw) <= TURNED
    if not usable.any():
        raise AvatarError(
            "no picture of the clip has a face that can be driven: it must be whole in the picture "
            f"that is made ({width}x{height}), with its eyes 40 pixels apart or more, and look "
            "towards the viewer"
        )
    cut = seen.change > _CUT
    cut |= seen.change > np.maximum(12.0, 8 * np.median(seen.change[1:]) if n > 1 else 12.0)
    runs, start = [], -1
    for i in range(n + 1):
        if start >= 0 and (i == n or not usable[i] or cut[i]):
            runs.append((start, i))
            start = -1
        if i < n and usable[i] and start < 0:
            start = i
    reference = _reference(points, usable, units)
    stable = list(STABLE)
    weights = np.where(np.arange(len(stable)) >= 4, 2.0, 1.0)
    base = points[reference]
    poses = similarity(base[stable], points[:, stable], weights)
    flat = np.stack([poses.real, poses.imag], -1).reshape(n, 4)
    # Turn and size in pixels at the mouth's distance, so that all four weigh alike.
    mouth = base[list(INNER_LIPS)].mean(0)
    pivot = mouth[0] + 1j * mouth[1]
    at_mouth = poses[:, 0] * pivot + poses[:, 1]
    unit = float(units[reference])
    flat = np.stack(
        [poses[:, 0].real * unit, poses[:, 0].imag * unit, at_mouth.real, at_mouth.imag], -1
    )
    flat = steadied(flat, fps, runs)
    a = (flat[:, 0] + 1j * flat[:, 1]) / unit
    poses = np.stack([a, flat[:, 2] + 1j * flat[:, 3] - a * pivot], -1)
    poses[~usable] = (1, 0)
    local = brought_back(poses, points)
    lips = [*OUTER_LIPS, *INNER_LIPS]
    others = [*JAW, *CHEEKS, *STABLE]
    for group in (lips, others):
        series = local[:, group].reshape(n, -1)
        local[:, group] = steadied(series, fps, runs).reshape(n, len(group), 2)
    places = flat[:, 2:]
    speed = np.zeros(n)
    speed[:-1] = np.linalg.norm(np.diff(places, axis=0), axis=1)
    return Motion(usable, runs, int(cut[1:].sum()), reference, poses, local, unit, speed)


def _found(points: Float64) -> Found:
    flat = points if points.shape[1] == 3 else np.hstack([points, np.zeros((len(points), 1))])
    return Found(flat, 1.0, 1.0)


def _gaps(points: Float64) -> Float64:
    """(n, 9) of (n, 468, 2): how far the lips' edges are apart, column by column."""
    ring = points[:, list(INNER_LIPS)]
    axis = ring[:, 10] - ring[:, 0]
    down = np.stack([-axis[:, 1], axis[:, 0]], -1) / np.linalg.norm(axis, axis=1)[:, None]
    apart = ring[:, 19:10:-1] - ring[:, 1:10]
    return cast(Float64, (apart * down[:, None]).sum(-1))


def _reference(points: Float64, usable: npt.NDArray[np.bool_], units: Float64) -> int:
    """The picture that speaks for all: mouth closed, eyes open, from the front, held as usual."""
    gap = _gaps(points).max(1) / units
    lids = np.linalg.norm(points[:, [159, 386]] - points[:, [145, 374]], axis=2).mean(1) / units
    yaw = np.array(
        [_found(one).yaw if ok else 90.0 for one, ok in zip(points, usable, strict=True)]
    )
    usual = np.median(points[usable].mean(1), 0)
    away = np.linalg.norm(points.mean(1) - usual, axis=1) / units
    open_eyes = float(np.median(lids[usable]))
    cost = 12 * gap + np.abs(yaw) / 40 + 0.3 * away + 6 * np.maximum(0, open_eyes - lids)
    cost[~usable] = np.inf
    return int(np.argmin(cost))


# --- how the lips of each picture differ ----------------------------------------------------------


@dataclass
class Lips:
    """Own and closed lips of every picture, against the canonical face; n pictures."""

    own: Float64
    """(n, points, 2): how the control points move, see `Controls`."""
    closed: Float64
    own_ring: Float64
    """(n, 20, 2): how the inner lips move."""
    closed_ring: Float64
    gap: Float64
    """(n,): how far the own lips are apart, in face units."""
    openness: Float64
    """(n,): how much of the own opening is kept at rest, 0 to 1."""
    held: bool
    """The mouth is open all the time, and hardly moves: it is the clip's way to be at rest."""


@dataclass
class Controls:
    """Where the canonical face is held, in face units; the same for all pictures."""

    points: tuple[Float64, Float64]
    """Of the upper and of the lower layer."""
    pick: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    """For each of them, the row of what moves: inner lips 0-19 (of which 0 and 10 are corners),
    outer lips 20-39, jaw 40-62, nose and cheeks 63-; -1 stands still."""
    layer: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]


def closed_marks(marks: Landmarks) -> Landmarks:
    """The same face with its lips brought together halfway."""
    inner, outer = marks.inner_lips.copy(), marks.outer_lips.copy()
    for i in range(1, 10):
        apart = inner[20 - i] - inner[i]
        inner[i] += 0.5 * apart
        inner[20 - i] -= 0.5 * apart
        outer[i] += 0.3 * apart
        outer[20 - i] -= 0.3 * apart
    return replace(marks, inner_lips=inner, outer_lips=outer)


def compare(motion: Motion, told: Landmarks, rig: Rig, fps: int, strength: Float64) -> Lips:
    """`told` is the reference's own face, as it was looked at closely; `rig` its closed one."""
    unit = motion.unit
    axis = np.asarray(rig.frame[1], np.float64) / float(np.linalg.norm(rig.frame[1]))
    turn = np.stack([axis, [-axis[1], axis[0]]])
    local = (motion.local - np.asarray(rig.frame[0], np.float64)) @ turn.T / unit
    n = len(local)
    ring, rim = local[:, list(INNER_LIPS)], local[:, list(OUTER_LIPS)]
    base = ring[motion.reference]
    # What the mesh calls a gap where lips are closed; the close look knows better.
    shown = (told.inner_lips - rig.frame[0]) @ turn.T / unit
    seen = np.maximum(0.0, base[19:10:-1, 1] - base[1:10, 1])
    true = np.maximum(0.0, shown[19:10:-1, 1] - shown[1:10, 1])
    bias = np.maximum(0.0, seen - true)
    raw = np.maximum(0.0, ring[:, 19:10:-1, 1] - ring[:, 1:10, 1])
    gap = raw * smoothstep((raw - bias - 0.006) / 0.030)
    middle = (ring[:, 19:10:-1] + ring[:, 1:10]) / 2
    middle = middle - middle[motion.reference]
    corners = ring[:, [0, 10]] - base[[0, 10]]
    # Edges against the canonical seam, at the mesh's columns.
    columns = np.concatenate([base[:1, 0], (base[19:10:-1, 0] + base[1:10, 0]) / 2, base[10:11, 0]])
    seams = np.concatenate([corners[:, :1], middle, corners[:, 1:]], 1)
    apart = np.concatenate([np.zeros((n, 1)), gap, np.zeros((n, 1))], 1)
    even = (np.asarray(rig.ring, np.float64) - rig.frame[0]) @ turn.T / unit
    line = np.stack(
        [
            np.stack([np.interp(even[:11, 0], columns, seams[i, :, k]) for k in (0, 1)], -1)
            for i in range(n)
        ]
    )
    half = np.stack([np.interp(even[:11, 0], columns, apart[i]) for i in range(n)]) / 2
    order = np.r_[np.arange(11), np.arange(9, 0, -1)]
    closed_ring = line[:, order]
    own_ring = closed_ring.copy()
    own_ring[:, 1:10, 1] -= half[:, 1:10]
    own_ring[:, 11:, 1] += half[:, 9:0:-1]
    outer = rim - rim[motion.reference]
    jaw = local[:, list(JAW)] - local[motion.reference][list(JAW)]
    rest = [2, 98, 327, *CHEEKS]
    far = local[:, rest] - local[motion.reference][rest]
    own = np.concatenate([own_ring, outer, jaw, far], 1)
    # The reference itself may be open: then its canonical face is not its own.
    lips_apart = (told.outer_lips - rig.frame[0]) @ turn.T / unit
    shut = closed_marks(told)
    own[:, 20:40] += lips_apart - (shut.outer_lips - rig.frame[0]) @ turn.T / unit

    opening = gap.max(1)
    ajar = opening[motion.usable]
    low, usual, high = np.percentile(ajar, [25, 50, 90])
    held = bool(low > 0.03 and high - np.percentile(ajar, 10) < 0.6 * usual)
    # Closed pictures say how a picture nearby would look if it were.
    shutness = 1 - smoothstep((opening - 0.004) / 0.020)
    shutness[~motion.usable] = 0
    whole_own = np.concatenate([closed_ring, own[:, 20:]], 1).reshape(n, -1)
    near = np.zeros_like(whole_own)
    for start, end in motion.runs:
        weight = shutness[start:end, None]
        spread = 0.45 * fps
        total = _gauss(weight, spread) if end - start > 1 else weight
        summed = (
            _gauss(weight * whole_own[start:end], spread)
            if end - start > 1
            else (weight * whole_own[start:end])
        )
        near[start:end] = summed / (total + 0.02)
    closed = whole_own * shutness[:, None] + near * (1 - shutness[:, None])
    closed = closed.reshape(n, -1, 2)
    # Where lips part, their edges are skin, not what is between them.
    inset = 0.006 * smoothstep(opening / 0.03)[:, None]
    own_ring[:, 1:10, 1] -= inset
    own_ring[:, 11:, 1] += inset
    own[:, :20] = own_ring
    keeps = 1.0 if held else 0.0
    openness = 1 - strength * (1 - keeps)
    back = turn * unit
    return Lips(
        own=own @ back,
        closed=closed @ back,
        own_ring=own_ring @ back,
        closed_ring=closed[:, :20] @ back,
        gap=opening,
        openness=openness,
        held=held,
    )


def field_maps(rig: Rig, told: Landmarks, motion: Motion) -> tuple[tuple[int, int], list[Float64]]:
    """The coarse grid (rows, columns) over the mouth's box, and, for the upper and the lower layer,
    the matrix (rows * columns, moving points) from motions of `Lips` to it."""
    unit = motion.unit
    frame = np.asarray(rig.frame, np.float64)
    axis = frame[1] / float(np.linalg.norm(frame[1]))
    turn = np.stack([axis, [-axis[1], axis[0]]])

    def flat(points: npt.NDArray[Any]) -> Float64:
        return cast(Float64, (np.asarray(points, np.float64) - frame[0]) @ turn.T / unit)

    shut = closed_marks(told)
    inner, outer = flat(rig.ring), flat(shut.outer_lips)
    base = motion.local[motion.reference]
    jaw, rest = flat(base[list(JAW)]), flat(base[[2, 98, 327, *CHEEKS]])
    x, y, width, height = (int(v) for v in rig.mouth_box)
    columns, rows = (max(8, min(48, round(size / unit * 28))) for size in (width, height))
    step = np.array([width / columns, height / rows])
    nodes = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1)
    where = flat((nodes.reshape(-1, 2) + 0.5) * step + (x, y) - 0.5)
    near = np.minimum(
        np.minimum(nodes[..., 0], columns - 1 - nodes[..., 0]) * step[0],
        np.minimum(nodes[..., 1], rows - 1 - nodes[..., 1]) * step[1],
    )
    window = smoothstep(near / (0.16 * unit)).reshape(-1, 1)
    centre = np.array([jaw[11, 0], (jaw[0, 1] + jaw[11, 1]) / 2])
    maps = []
    for lower in (False, True):
        places: list[Float64] = []
        moves: list[int] = []
        for i in range(20):
            corner = i in (0, 10)
            if corner or lower == (i > 10):
                places += [inner[i], outer[i]]
                moves += [i, 20 + i]
            else:
                # The other lip's place is carried along rigidly.
                places.append(outer[i])
                moves.append(20 - i)
        places += list(jaw) + list(rest)
        moves += list(range(40, 40 + len(jaw) + len(rest)))
        for point in jaw:
            away = (point - centre) / np.linalg.norm(point - centre)
            places.append(point + 0.28 * away)
            moves.append(-1)
        points, pick = np.stack(places), np.array(moves)
        solved = spline_field(points, np.eye(len(points)), where) * window
        out = np.zeros((len(where), 40 + len(jaw) + len(rest)))
        for column, row in enumerate(pick):
            if row >= 0:
                out[:, row] += solved[:, column]
        maps.append(out)
    return (rows, columns), maps


def strengths(usable: npt.NDArray[np.bool_], fps: int) -> Float64:
    """(n,): 1 where the mouth is driven, 0 where it can't be, and eased between."""
    n = len(usable)
    missing = np.flatnonzero(~usable)
    if not len(missing):
        return np.ones(n)
    away = np.abs(np.arange(n)[:, None] - missing).min(1)
    return cast(Float64, smoothstep(away / (0.28 * fps)))


# --- the inner mouths -----------------------------------------------------------------------------


@dataclass
class Bank:
    """What the clip shows between its lips, in the geometry of `Rig.teeth`."""

    layers: UInt8
    """(k, h, w, 4): Y U V alpha; up and down from the lips it goes on as at their edges."""
    facts: Float32
    """(k, 4): opening and lower edge in pixels of the layer, teeth 0 to 1, upper edge."""


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
                unit = motion_unit(rig)
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
        top = np.interp(x, up[:, 0], up[:, 1])
        bottom = np.maximum(np.interp(x, low[:, 0], low[:, 1]), top)
        scale = 2.0
        margin = np.minimum(1.6 * scale, (bottom - top) / 2)
        rows = np.clip(np.arange(height, dtype=np.float64)[:, None], top + margin, bottom - margin)
        spot = np.stack(np.broadcast_arrays(x, rows), -1) @ to_picture[:, :2].T + to_picture[:, 2]
        pose = self._motion.poses[i]
        spot = carried(pose, spot) - at
        seen = cv2.remap(
            part,
            np.ascontiguousarray(spot[..., 0], np.float32),
            np.ascontiguousarray(spot[..., 1], np.float32),
            cv2.INTER_CUBIC,
            borderMode=cv2.BORDER_REPLICATE,
        )
        luma, chroma = luma_chroma(seen)
        ends = smoothstep((x - up[0, 0]) / (0.03 * width)) * smoothstep(
            (up[-1, 0] - x) / (0.03 * width)
        )
        thick = smoothstep((bottom - top) / (4.0 * scale))
        alpha = np.broadcast_to(ends * thick * 255, (height, width))
        layer = np.concatenate([luma[..., None], chroma, alpha[..., None]], -1)
        inside = (rows > top + margin) & (rows < bottom - margin)
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


def motion_unit(rig: Rig) -> float:
    """Pixels of a layer in a face unit."""
    return 2.0 * float(np.linalg.norm(rig.frame[1]))


def layer_place(rig: Rig) -> Float64:
    """(2, 3): from pixels of the inner layers to those of the reference, as `Puppet` lays them."""
    unit = float(np.linalg.norm(rig.frame[1]))
    axis = np.asarray(rig.frame[1], np.float64) / unit
    down = np.array([-axis[1], axis[0]])
    ring = np.asarray(rig.ring, np.float64)
    upper, lower = ring[0:11], ring[np.r_[0, 19:10:-1, 10]]
    seam = float(((upper + lower)[5] / 2 - rig.frame[0]) @ down)
    start = rig.frame[0] + INNER[0] * unit * axis + (INNER[1] * unit + seam) * down
    start = start + 0.25 * axis + 0.25 * down
    return np.array([[axis[0] / 2, down[0] / 2, start[0]], [axis[1] / 2, down[1] / 2, start[1]]])


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


PICTURES = "frames.i420"
FIELDS = "lips.f16"
ARRAYS = "film.npz"


def prepare(
    source: Path,
    target: Path,
    key: str,
    data: Mapping[str, Any],
    wanted: Wanted,
    mesh: Callable[[], FaceMesh],
    progress: Tell,
) -> None:
    """Prepare a clip into `target`. Idempotent, resumable; the manifest, written last, holds
    `data`. AvatarError says what is wrong with the clip."""
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
            _finish(target, key, data, wanted, clip, seen, motion, looker, step(0.6, 0.4))
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
    tell: Tell,
) -> None:
    n = len(motion.local)
    gap = _gaps(motion.local).max(1) / motion.unit
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
    bank = collector.bank(rig, np.asarray(rig.ring, np.float64) + lips.own_ring)
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


def _box_of(rig: Rig, pose: npt.NDArray[np.complex128], size: tuple[int, int]) -> tuple[int, ...]:
    """Where the mouth's box lies in a picture: multiples of 4, inside it."""
    x, y, width, height = (int(v) for v in rig.mouth_box)
    corners = np.array([[x, y], [x + width, y], [x, y + height], [x + width, y + height]], float)
    there = carried(pose, corners - 0.5) + 0.5
    low, high = there.min(0), there.max(0)
    left, top = (max(0, math.floor(v / 4) * 4) for v in low)
    right, bottom = (
        min(limit // 4 * 4, math.ceil(v / 4) * 4) for v, limit in zip(high, size, strict=True)
    )
    return left, top, right - left, bottom - top


def _union(rig: Rig, motion: Motion, wanted: Wanted) -> tuple[int, int, int, int]:
    size = (wanted.width, wanted.height)
    boxes = np.array([_box_of(rig, motion.poses[i], size) for i in np.flatnonzero(motion.usable)])
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


# --- drawing --------------------------------------------------------------------------------------


class FilmPuppet(Puppet):
    """Draws a prepared clip: `Pose.clock` says which picture, its mouth what the lips do.

    The head does what it did before the camera; motions and blinks of a pose are not drawn.
    """

    def __init__(self, folder: Path) -> None:
        """AvatarError when the folder is not whole."""
        manifest = read_json(folder / MANIFEST)
        if whole(folder, str(manifest.get("key", "")), hashes=False) is None:
            raise AvatarError(f"the prepared avatar in {folder} is damaged: prepare it again")
        try:
            with np.load(folder / ARRAYS, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            self._pictures = (folder / PICTURES).open("rb", buffering=0)
            self._fields = (folder / FIELDS).open("rb", buffering=0)
        except (OSError, ValueError, KeyError) as error:
            raise AvatarError(
                f"the prepared avatar in {folder} is damaged: prepare it again"
            ) from error
        super().__init__(Rig(**{one.name: arrays[f"rig_{one.name}"] for one in fields(Rig)}))
        self.frames = int(manifest["frames"])
        self.reference = int(manifest["reference"])
        self.poses = arrays["poses"]
        self.strength = arrays["strength"]
        self.gaps = arrays["gap"]
        self.bank = Bank(arrays["bank"], arrays["bank_facts"])
        self._openness = arrays["openness"]
        self._own_ring, self._closed_ring = arrays["own_ring"], arrays["closed_ring"]
        rows, columns = (int(v) for v in arrays["grid"])
        self._shape = (2, 2, rows, columns, 2)
        self._boxes = [_box_of(self.rig, pose, (self.width, self.height)) for pose in self.poses]
        # Pictures whose own mouth must be brought to rest, and those it is kept open in.
        ajar = np.abs(self._own_ring - self._closed_ring).max((1, 2)) > 0.02
        self._corrects = ajar & (self._openness < 0.999) & (self.strength > 0)
        self._differs = ajar

    def picture_of(self, clock: int) -> int:
        """Which picture of the clip is shown at a picture clock: forward, and back."""
        return fold(clock, self.frames)

    def place(self, clock: int) -> npt.NDArray[np.complex128]:
        """(2,): the similarity from the reference's pixels to those of the picture shown."""
        return cast("npt.NDArray[np.complex128]", self.poses[self.picture_of(clock)])

    def gap(self, pose: Pose) -> float:
        i = self.picture_of(pose.clock)
        weights = mouth_weights(pose.mouth) * self.strength[i]
        ring = self._ring_at(i, weights)
        upper, lower = ring[0:11], ring[np.r_[0, 19:10:-1, 10]]
        return float(((lower - upper) @ self._down).max())

    def plain(self, clock: int) -> UInt8:
        """The clip's own picture, its own memory."""
        return self._picture(self.picture_of(clock))

    def draw(self, pose: Pose) -> UInt8:
        i = self.picture_of(pose.clock)
        out = self._picture(i)
        strength = self.strength[i]
        if strength <= 0:
            return out
        weights = mouth_weights(pose.mouth) * strength
        if self._corrects[i] or bool(np.any(np.abs(weights) > 1e-4)):
            self._speak(out, i, weights)
        return out

    def _picture(self, i: int) -> UInt8:
        out = np.empty((self.height * 3 // 2, self.width), np.uint8)
        _read(self._pictures, out.data.cast("B"), i * out.nbytes)
        return out

    def _lips_of(self, i: int) -> Float32:
        """(2, 2, rows, columns, 2): own, and closed less own; of the upper and the lower layer."""
        raw = np.empty(self._shape, np.float16)
        _read(self._fields, memoryview(raw).cast("B"), i * raw.nbytes)
        return raw.astype(np.float32)

    def _share(self, i: int, weights: Float32) -> float:
        """How far the own lips are brought together."""
        kept = float(self._openness[i])
        return 1.0 - kept * (1.0 - float(weights[MOUTH.index("shut")]))

    def _ring_at(self, i: int, weights: Float32) -> Float32:
        share = np.float32(self._share(i, weights))
        ring = self._own_ring[i] + share * (self._closed_ring[i] - self._own_ring[i])
        return cast(Float32, self._ring(weights) + ring)

    def _speak(self, out: UInt8, i: int, weights: Float32) -> None:
        x, y, width, height = self._boxes[i]
        if width < 24 or height < 24:
            return
        pose = self.poses[i]
        turn = np.array([[pose[0].real, -pose[0].imag], [pose[0].imag, pose[0].real]])
        anchors, upper, lower = self._edges(i, pose, weights)
        line, soft = self._dividing(x, width, upper, lower)
        first = math.floor((line - soft / 2).min() - y) // 4 * 4 - 4
        last = -(-math.ceil((line + soft / 2).max() - y) // 4) * 4 + 4
        first = min(max(first, 0), height - 12)
        last = min(max(last, first + 8), height - 4)
        # Half-resolution nodes of the box, one more on every side than it has.
        nodes = grid_nodes((x, y, width, height), 2, pad=1).astype(np.float32)
        over_nodes = nodes[: last // 2 + 2]
        under_nodes = nodes[first // 2 :]
        over, under = self._flows(i, weights)
        over_from = self._sources(over_nodes, over, pose, turn)
        under_from = self._sources(under_nodes, under, pose, turn)
        plane, colours = planes(out)
        luma = np.empty((height, width), np.uint8)
        chroma = np.empty((height // 2, width // 2, 2), np.uint8)
        luma[:last], chroma[: last // 2] = self._taken(plane, colours, over_from)
        low_luma, low_chroma = self._taken(plane, colours, under_from)
        luma[last:], chroma[last // 2 :] = (
            low_luma[last - first :],
            low_chroma[(last - first) // 2 :],
        )
        rows = np.arange(y + first, y + last, dtype=np.float32)[:, None]
        share = np.clip((rows - line) / soft + np.float32(0.5), 0, 1)
        _mix(luma[first:last], low_luma[: last - first], share)
        half = cv2.resize(share, (width // 2, (last - first) // 2), interpolation=cv2.INTER_AREA)
        _mix(
            chroma[first // 2 : last // 2],
            low_chroma[: (last - first) // 2],
            np.asarray(half, np.float32)[..., None],
        )
        # What a mouth that is open at rest shows gives way to what speech shows, without a jump.
        strength = 1.0
        if self._differs[i]:
            kept = 1.0 - self._share(i, weights)
            active = float(smoothstep(float(np.abs(weights).max()) / 0.25))
            strength = 1.0 - kept * (1.0 - active)
        box = (x, y, width, height)
        self._inner_over(luma, chroma, anchors, upper, lower, weights, box, strength)
        plane[y : y + height, x : x + width] = luma
        colours[:, y // 2 : (y + height) // 2, x // 2 : (x + width) // 2] = chroma.transpose(
            2, 0, 1
        )

    def _edges(
        self, i: int, pose: npt.NDArray[np.complex128], weights: Float32
    ) -> tuple[Float32, Float64, Float64]:
        frame = self.rig.frame
        down = self._down * self._unit
        anchors = np.stack([frame[0], frame[0] + 0.2 * frame[1], frame[0] + 0.2 * down])
        ring = carried(pose, self._ring_at(i, weights))
        return (
            carried(pose, anchors).astype(np.float32),
            curve(ring[0:11], 81),
            curve(ring[np.r_[0, 19:10:-1, 10]], 81),
        )

    def _dividing(
        self, x: int, width: int, upper: Float64, lower: Float64
    ) -> tuple[Float32, Float32]:
        """As `_seam_line`, for the columns of a box."""
        columns = np.arange(width, dtype=np.float32) + x
        seam = (upper + lower) / 2
        left, right = seam[0], seam[-1]
        slope = (right[1] - left[1]) / max(1.0, right[0] - left[0])
        beyond = np.minimum(columns - left[0], 0) + np.maximum(columns - right[0], 0)
        line = np.interp(columns, seam[:, 0], seam[:, 1]) + slope * beyond
        soft = 1.5 + np.minimum(np.abs(beyond) * 0.9, 0.30 * self._unit)
        return line.astype(np.float32), soft.astype(np.float32)

    def _flows(self, i: int, weights: Float32) -> tuple[tuple[Float32, Float32], ...]:
        """For each layer, on the half-resolution grid of the mouth's box: how canonical places
        move, and that less how the own lips differ; in the reference's pixels."""
        _, _, width, height = (int(v) for v in self.rig.mouth_box)
        size = (width // 2, height // 2)
        own, closing = self._lips_of(i)
        share = self._share(i, weights)
        out = []
        for layer in (0, 1):
            change = _summed(self._mouth, weights, layer, (*size[::-1], 2))
            if share > 0 and self._differs[i]:
                more = cv2.resize(closing[layer], size, interpolation=cv2.INTER_LINEAR)
                cv2.scaleAdd(more, share, change, change)
            whole_flow = change + cv2.resize(own[layer], size, interpolation=cv2.INTER_LINEAR)
            out.append((np.asarray(whole_flow, np.float32), change))
        return tuple(out)

    def _sources(
        self,
        nodes: Float32,
        flow: tuple[Float32, Float32],
        pose: npt.NDArray[np.complex128],
        turn: Float64,
    ) -> Float32:
        """Where the pixels at `nodes` come from: the motion inverted by iteration, in canonical
        places, and from there back to the picture."""
        forward, change = flow
        x, y, _, _ = (int(v) for v in self.rig.mouth_box)
        # From the picture to samples of the field, in one affine map.
        inverse = np.linalg.inv(turn) / 2
        shift = -inverse @ np.array([pose[1].real, pose[1].imag]) - np.array([x + 0.5, y + 0.5]) / 2
        matrix = np.hstack([inverse, shift[:, None]])
        base = np.asarray(cv2.transform(nodes, matrix), np.float32)
        at = base
        for _ in range(ROUNDS):
            step = _sampled(forward, at)
            at = cv2.scaleAdd(step, -0.5, base)
        back = cv2.transform(_sampled(change, at), turn)
        return np.asarray(nodes - back, np.float32)

    def _taken(self, plane: UInt8, colours: UInt8, nodes: Float32) -> tuple[UInt8, UInt8]:
        """Luma and chroma of the picture where padded half-resolution `nodes` say."""
        rows, columns = nodes.shape[:2]
        full = cv2.resize(
            nodes * np.float32(2.0), (columns * 2, rows * 2), interpolation=cv2.INTER_LINEAR
        )
        full = full[2:-2, 2:-2] * np.float32(0.5)
        half = (nodes[1:-1, 1:-1] - np.float32(0.5)) * np.float32(0.5)
        luma = _cubic(plane, full)
        chroma = np.stack([_cubic(colours[0], half), _cubic(colours[1], half)], -1)
        return luma, chroma

    def _seen_inside(
        self, paint: Float32, place: Float64, upper: Float64, lower: Float64, weights: Float32
    ) -> None:
        """The clip's own inner mouths over the painted one, as far as some of them fit."""
        facts = self.bank.facts
        if not len(facts):
            return
        rows, columns = paint.shape[:2]
        inverse = cv2.invertAffineTransform(place)
        middle = np.stack([upper[40], lower[40]]) @ inverse[:, :2].T + inverse[:, 2]
        apart = lower - upper
        gap = float(np.linalg.norm(apart, axis=1).max()) * float(np.linalg.norm(inverse[:, 1]))
        unit = 2 * self._unit
        teeth = float(weights[MOUTH.index("teeth")])
        drop = float(middle[1, 1]) - facts[:, 1]
        # A picture that would have to be pulled out or pushed together by much doesn't fit.
        fits = 1 - smoothstep((np.abs(drop) / max(gap, 0.02 * unit) - 0.30) / 0.35)
        off = ((gap - facts[:, 0]) / (0.04 * unit)) ** 2 + (0.7 * (teeth - facts[:, 2])) ** 2
        likely = np.exp(-off) * fits
        if float(likely.max()) <= 1e-3:
            return
        # The nearest three; the fourth fades out before another takes its place.
        order = np.argsort(-likely, kind="stable")
        least = float(likely[order[3]]) if len(order) > 3 else 0.0
        chosen = [(int(j), float(likely[j]) - least) for j in order[:3] if likely[j] > least]
        total = sum(share for _, share in chosen)
        if total <= 0:
            return
        x = np.arange(columns, dtype=np.float32)
        y = np.arange(rows, dtype=np.float32)[:, None]
        top = np.interp(x, upper[:, 0], upper[:, 1])
        bottom = np.maximum(np.interp(x, lower[:, 0], lower[:, 1]), top + 1)
        depth = smoothstep(((y - top) / (bottom - top) - 0.25) / 0.5).astype(np.float32)
        there = inverse.astype(np.float32)
        at_x = there[0, 0] * x + there[0, 1] * y + there[0, 2]
        at_y = there[1, 0] * x + there[1, 1] * y + there[1, 2]
        mixed = np.zeros((rows, columns, 4), np.float32)
        for j, share in chosen:
            seen = cv2.remap(
                self.bank.layers[j],
                at_x,
                at_y - np.float32(drop[j]) * depth,
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
            mixed += seen.astype(np.float32) * np.float32(share / total)
        cover = mixed[..., 3:] * np.float32(float(smoothstep(float(likely.max()) / 0.3)) / 255)
        paint += (mixed[..., :3] - paint) * cover


ROUNDS = 4
"""Iterations in which a motion is inverted."""


def _read(file: Any, into: memoryview, at: int) -> None:
    """Fill `into` from a place in a file, without moving its position: drawing keeps no state."""
    done = 0
    while done < len(into):
        got = os.preadv(file.fileno(), [into[done:]], at + done)
        if got <= 0:
            raise AvatarError("the prepared avatar is damaged: prepare it again")
        done += got


def _summed(mouth: Float32, weights: Float32, layer: int, shape: tuple[int, ...]) -> Float32:
    """The motion of one layer that the weights ask for (on this thread only, see `puppet._sum`)."""
    out = np.zeros(shape, np.float32)
    each = out.size // 2
    for motion, weight in zip(mouth, weights, strict=True):
        if weight:
            part = motion[layer * each : (layer + 1) * each].reshape(shape)
            cv2.scaleAdd(part, float(weight), out, out)
    return out


def _sampled(field_: Float32, at: Float32) -> Float32:
    remap: Any = cv2.remap  # its stub has no room for the second map's None
    return cast(
        Float32,
        remap(field_, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0),
    )


def _cubic(plane: UInt8, at: Float32) -> UInt8:
    remap: Any = cv2.remap
    return cast(UInt8, remap(plane, at, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE))


def _mix(under: UInt8, over: UInt8, share: Float32) -> None:
    """`under` becomes `over` as far as `share` (0 to 1) says."""
    base = under.astype(np.float32)
    base += (over - base) * share
    under[:] = np.rint(base)
