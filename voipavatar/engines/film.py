"""Draws a prepared clip: its own motion, with lips that are driven.

The clip runs forward and back under the mouth. At canonical places c (the reference picture's face,
its lips closed): c + closed(c) + speech(c) is where they go, c + own(c) where they come from, both
carried to the picture by its similarity (see `filmlips`). So a picture whose mouth is closed stays,
to the last bit, as it was filmed while nothing is said, and one that was filmed speaking is brought
to rest. Between parted lips the clip's own inner mouths are shown, as far as it has some that fit.

Pictures are read from disk one by one as they are shown: memory does not grow with the clip.
"""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from ..avatar import MANIFEST, fold, read_json, whole
from ..errors import AvatarError
from ..media import Float32, UInt8
from .filmlips import Poses, carried
from .puppet import Pose, Puppet, mouth_weights
from .rig import INNER, MOUTH, Float64, Rig, curve, grid_nodes, planes, smoothstep

PICTURES = "frames.i420"
FIELDS = "lips.f16"
ARRAYS = "film.npz"
"""What a prepared folder holds: the pictures, I420, one after the other; for each the fields of its
lips, float16; all else."""

ROUNDS = 4
"""Iterations in which a motion is inverted."""


@dataclass
class Bank:
    """What the clip shows between its lips, in the geometry of `Rig.teeth`."""

    layers: UInt8
    """(k, h, w, 4): Y U V alpha; up and down from the lips it goes on as at their edges."""
    facts: Float32
    """(k, 4): opening and lower edge in pixels of the layer, teeth 0 to 1, upper edge."""


def layer_unit(rig: Rig) -> float:
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


def box_of(rig: Rig, pose: Poses, size: tuple[int, int]) -> tuple[int, ...]:
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
            self._pictures = _opened(self, folder / PICTURES)
            self._fields = _opened(self, folder / FIELDS)
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
        self._boxes = [box_of(self.rig, pose, (self.width, self.height)) for pose in self.poses]
        # Pictures whose own mouth must be brought to rest, and those it is kept open in.
        ajar = np.abs(self._own_ring - self._closed_ring).max((1, 2)) > 0.02
        self._corrects = ajar & (self._openness < 0.999) & (self.strength > 0)
        self._differs = ajar

    def picture_of(self, clock: int) -> int:
        """Which picture of the clip is shown at a picture clock: forward, and back."""
        return fold(clock, self.frames)

    def place(self, clock: int) -> Poses:
        """(2,): the similarity from the reference's pixels to those of the picture shown."""
        return cast("Poses", self.poses[self.picture_of(clock)])

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
        _read(self._fields, raw.data.cast("B"), i * raw.nbytes)
        return raw.astype(np.float32)

    def _share(self, i: int, weights: Float32) -> float:
        """How far the own lips are brought together: speech opens a mouth from closed lips, also
        one that is open at rest."""
        kept = float(self._openness[i])
        active = float(smoothstep(float(np.abs(weights).max()) / 0.3))
        return 1.0 - kept * (1.0 - float(weights[MOUTH.index("shut")])) * (1.0 - 0.75 * active)

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
        anchors, upper, lower = self._lips_at(i, pose, weights)
        line, soft = self._dividing(x, width, upper, lower)
        first = math.floor((line - soft / 2).min() - y) // 4 * 4 - 4
        last = -(-math.ceil((line + soft / 2).max() - y) // 4) * 4 + 4
        first = min(max(first, 0), height - 12)
        last = min(max(last, first + 8), height - 4)
        # Motion is smooth within a layer: it is followed on every fourth pixel of the box, and one
        # node more on every side.
        nodes = grid_nodes((x, y, width, height), 4, pad=1).astype(np.float32)
        over_nodes = nodes[: last // 4 + 2]
        under_nodes = nodes[first // 4 :]
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

    def _lips_at(self, i: int, pose: Poses, weights: Float32) -> tuple[Float32, Float64, Float64]:
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
        pose: Poses,
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
            at = np.asarray(cv2.scaleAdd(step, -0.5, base), np.float32)
        back = cv2.transform(_sampled(change, at), turn)
        return np.asarray(nodes - back, np.float32)

    def _taken(self, plane: UInt8, colours: UInt8, nodes: Float32) -> tuple[UInt8, UInt8]:
        """Luma and chroma of the picture where padded quarter-resolution `nodes` say."""
        rows, columns = nodes.shape[:2]
        full = cv2.resize(nodes, (columns * 4, rows * 4), interpolation=cv2.INTER_LINEAR)
        half = cv2.resize(nodes, (columns * 2, rows * 2), interpolation=cv2.INTER_LINEAR)
        half = (half[2:-2, 2:-2] - np.float32(0.5)) * np.float32(0.5)
        luma = _cubic(plane, np.ascontiguousarray(full[4:-4, 4:-4], np.float32))
        chroma = cv2.merge((_cubic(colours[0], half), _cubic(colours[1], half)))
        return luma, np.asarray(chroma, np.uint8)

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


def _opened(owner: object, path: Path) -> int:
    """A file that stays open as long as `owner` lives."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    weakref.finalize(owner, os.close, file)
    return file


def _read(file: int, into: memoryview, at: int) -> None:
    """Fill `into` from a place in a file, without moving its position: drawing keeps no state."""
    done = 0
    while done < len(into):
        got = os.preadv(file, [into[done:]], at + done)
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
