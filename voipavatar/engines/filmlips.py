"""What the face of a clip does: how its head moves, and how the lips of each picture differ.

Pure mathematics on the points of the face mesh. A similarity carries the mouth's frame of one
picture, the reference, to every other one; what is left, in the reference's pixels, is the motion
of lips and jaw. The canonical face is the reference with its lips closed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import AvatarError
from ..meshpoints import INNER_LIPS, JAW, OUTER_LIPS, yaw
from .rig import Float64, Landmarks, Rig, smoothstep, spline_field

Poses = npt.NDArray[np.complex128]
"""(n, 2): z -> a z + b of each picture, points being complex numbers."""

TURNED = 38.0
"""Degrees: a head turned further is left as it is."""

CUT = 22.0
"""Grey levels of mean change from one picture to the next: another scene."""

STABLE = (33, 133, 362, 263, 6, 197, 195, 5, 1, 2, 98, 327, 64, 294)
"""Points that speech doesn't move: corners of the eyes, and the nose (counted twice)."""

CHEEKS = (205, 425, 50, 280)
"""Points that lie between the mouth and what doesn't move."""

# --- the motion of the head -----------------------------------------------------------------------


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


def similarity(points: Float64, onto: Float64, weights: Float64) -> Poses:
    """(n, 2) complex a, b: z -> a z + b takes `points` (k, 2) to each of `onto` (n, k, 2)."""
    z = points[:, 0] + 1j * points[:, 1]
    w = onto[..., 0] + 1j * onto[..., 1]
    share = weights / weights.sum()
    middle, middles = (z * share).sum(), (w * share).sum(-1)
    flat = z - middle
    a = (share * np.conj(flat) * (w - middles[:, None])).sum(-1) / (share * np.abs(flat) ** 2).sum()
    return np.stack([a, middles - a * middle], -1)


def carried(pose: Poses, points: npt.NDArray[Any]) -> Float64:
    """Points through one similarity (2,)."""
    z = pose[0] * (points[..., 0] + 1j * points[..., 1]) + pose[1]
    return np.stack([z.real, z.imag], -1)


def brought_back(poses: Poses, points: Float64) -> Float64:
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
        # Odd, and no longer than there are pictures.
        size = max(5, min(round(0.28 * fps) | 1, (len(part) - 1) // 2 * 2 + 1))
        quick = _polynomial(part, size)
        slow = _gauss(part, 0.12 * fps)
        # The noise of all columns together: what the polynomial doesn't follow.
        noise = 1.5 * float(np.median(np.abs(part - quick))) + 1e-9
        apart = np.sqrt(((quick - slow) ** 2).mean(1))
        share = smoothstep(_gauss(apart[:, None], 1.0) / noise - 0.5)
        out[start:end] = slow + (quick - slow) * share
    return cast(Float64, out)


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
    poses: Poses
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
    # Where no face is, some face stands in, so that all arithmetic is sound; it is not used.
    points = np.where(usable[:, None, None], points, points[int(np.argmax(usable))])
    units = np.linalg.norm(points[:, 263] - points[:, 33], axis=1)
    usable &= units >= 40
    for one in np.flatnonzero(usable):
        whole_face = points[one][list(JAW)]
        low, high = whole_face.min(0), whole_face.max(0)
        inside = low[0] >= 2 and high[0] <= width - 3 and high[1] <= height - 3 and low[1] >= 2
        usable[one] = inside and abs(yaw(points[one])) <= TURNED
    if not usable.any():
        raise AvatarError(
            "no picture of the clip has a face that can be driven: it must be whole in the picture "
            f"that is made ({width}x{height}), with its eyes 40 pixels apart or more, and look "
            "towards the viewer"
        )
    cut = seen.change > CUT
    cut |= seen.change > np.maximum(12.0, 8 * np.median(seen.change[1:]) if n > 1 else 12.0)
    runs: list[tuple[int, int]] = []
    start = -1
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


def gaps(points: Float64) -> Float64:
    """(n, 9) of (n, 468, 2): how far the lips' edges are apart, column by column."""
    ring = points[:, list(INNER_LIPS)]
    axis = ring[:, 10] - ring[:, 0]
    down = np.stack([-axis[:, 1], axis[:, 0]], -1) / np.linalg.norm(axis, axis=1)[:, None]
    apart = ring[:, 19:10:-1] - ring[:, 1:10]
    return cast(Float64, (apart * down[:, None]).sum(-1))


def _reference(points: Float64, usable: npt.NDArray[np.bool_], units: Float64) -> int:
    """The picture that speaks for all: mouth closed, eyes open, from the front, held as usual."""
    gap = gaps(points).max(1) / units
    lids = np.linalg.norm(points[:, [159, 386]] - points[:, [145, 374]], axis=2).mean(1) / units
    turned = np.array([yaw(one) if ok else 90.0 for one, ok in zip(points, usable, strict=True)])
    usual = np.median(points[usable].mean(1), 0)
    away = np.linalg.norm(points.mean(1) - usual, axis=1) / units
    open_eyes = float(np.median(lids[usable]))
    cost = 12 * gap + np.abs(turned) / 40 + 0.3 * away + 6 * np.maximum(0, open_eyes - lids)
    cost[~usable] = np.inf
    return int(np.argmin(cost))


# --- how the lips of each picture differ ----------------------------------------------------------


@dataclass
class Lips:
    """Own and closed lips of every picture, against the canonical face; n pictures."""

    own: Float64
    """(n, points, 2): how control points move, see `field_maps`: inner lips 0-19, outer lips 20-39,
    jaw 40-62, nose and cheeks, and last the lower layer's corners of the mouth."""
    closed: Float64
    own_ring: Float64
    """(n, 20, 2): how the inner lips move; a little into the lips where they part."""
    seen_ring: Float64
    """The same as it was seen."""
    closed_ring: Float64
    gap: Float64
    """(n,): how far the own lips are apart, in face units."""
    openness: Float64
    """(n,): how much of the own opening is kept at rest, 0 to 1."""
    held: bool
    """The mouth is open all the time, and hardly moves: it is the clip's way to be at rest."""


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
    # The reference was chosen for its small gap: those that are nearly as small are closed, too.
    alike = motion.usable & ((raw - seen).max(1) < 0.015)
    if true.max() < 0.004 and alike.any():
        bias = np.maximum(bias, np.percentile(raw[alike], 90, axis=0))
    gap = raw * smoothstep((raw - bias - 0.005) / 0.016)
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
    shutness = 1 - smoothstep((opening - 0.004) / 0.012)
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
    # Where lips part, their edges are skin, not what is between them; of a narrow gap the mesh
    # sees least.
    narrow = smoothstep(opening / 0.012) * (1 - smoothstep((opening - 0.05) / 0.06))
    seen_ring = own_ring.copy()
    inset = (0.006 * smoothstep(opening / 0.03) + 0.012 * narrow)[:, None]
    own_ring[:, 1:10, 1] -= inset
    own_ring[:, 11:, 1] += inset
    own[:, :20] = own_ring
    # The mesh's corners lie a little inside: there, too, an open mouth is to be closed.
    part = np.stack([gap[:, 0], gap[:, -1]], 1) * 0.40
    corner = own_ring[:, [0, 10]].copy()
    own[:, [0, 10], 1] -= part
    corner[..., 1] += part
    own = np.concatenate([own, corner], 1)
    closed = np.concatenate([closed, closed[:, [0, 10]]], 1)
    keeps = 1.0 if held else 0.0
    openness = 1 - strength * (1 - keeps)
    back = turn * unit
    return Lips(
        own=own @ back,
        closed=closed @ back,
        own_ring=own_ring @ back,
        seen_ring=seen_ring @ back,
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
    moving = 40 + len(jaw) + len(rest) + 2
    for lower in (False, True):
        places: list[Float64] = []
        moves: list[int] = []
        for i in range(20):
            corner = i in (0, 10)
            if corner or lower == (i > 10):
                places += [inner[i], outer[i]]
                # Of the corners each layer has its own, the last two rows are the lower one's.
                moves += [moving - 2 + i // 10 if corner and lower else i, 20 + i]
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
        out = np.zeros((len(where), moving))
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
