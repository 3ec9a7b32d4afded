"""Draws a rig (see `rig`): a pose in, a picture out.

The mouth is drawn as two layers of the same portrait, one carried by the upper lip and one by the
lower lip and jaw, with an inner mouth where they part. All motion is composed on a half-resolution
grid before the portrait is sampled, once, from a copy of twice its resolution, so that the picture
stays as sharp as the portrait; that grid is also exactly the grid of the chroma samples. Only the
rig's region is touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import cv2
import numpy as np
import numpy.typing as npt

from ..media import Float32, UInt8
from .rig import (
    BLINKS,
    HEAD,
    INNER,
    JAW,
    MOUTH,
    Float64,
    Rig,
    curve,
    double,
    grid_nodes,
    planes,
    smoothstep,
)

Pixels = TypeVar("Pixels", UInt8, Float32)

# --- drawing --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pose:
    """How the portrait is held in one picture."""

    mouth: Float32
    """`articulation.PARAMETERS`, 0 to 1: jaw, width, round, press, tuck, teeth, tongue, level."""
    head: Float32
    """As `HEAD`."""
    blink: float = 0.0
    """0 open, 1 shut."""
    wink: float = 0.0
    """The same, of the eye on the left alone."""
    clock: int = 0
    """The picture clock: which picture of a film is under the mouth."""


def mouth_weights(mouth: Float32) -> Float32:
    """Weights of `MOUTH` from articulation parameters: what closes lips wins over what opens."""
    jaw, width, rounded, press, tuck, teeth, tongue = (float(v) for v in mouth[:7])
    closing = float(smoothstep(press / 0.8))
    opening = 1.0 - closing
    tuck *= opening
    return np.array(
        [
            jaw * opening * (1.0 - 0.8 * tuck),
            width * (1.0 - 0.4 * closing),
            rounded * (1.0 - 0.3 * closing),
            closing,
            tuck,
            teeth * opening * (1.0 - 0.7 * tuck),
            tongue * opening,
            closing,
            rounded * min(1.0, 2.5 * jaw) * opening,
        ],
        np.float32,
    )


class Puppet:
    """Draws a rig. Not for two threads at once: while it draws, it swaps the eyes."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        luma, chroma = planes(rig.image)
        self.height, self.width = luma.shape
        self._luma = double(luma)
        self._chroma = np.ascontiguousarray(chroma.transpose(1, 2, 0))
        region = _ints(rig.region)
        self._region = region
        # Half-resolution nodes of the region, one more on every side than it has.
        self._nodes = grid_nodes(region, 2, pad=1).astype(np.float32)
        x, y, width, height = _ints(rig.mouth_box)
        self._mouth_box = (x, y, width, height)
        self._mouth_at = ((y - region[1]) // 2 + 1, (x - region[0]) // 2 + 1)
        self._head = np.ascontiguousarray(rig.head.reshape(len(HEAD), -1, rig.head.shape[3]))
        self._mouth = rig.mouth.reshape(len(MOUTH), -1, 2)
        self._unit = float(np.linalg.norm(rig.frame[1]))
        self._axis = rig.frame[1] / self._unit
        self._down = np.array([-self._axis[1], self._axis[0]], np.float32)
        upper, lower = rig.ring[0:11], rig.ring[np.r_[0, 19:10:-1, 10]]
        self._rest_gap = float(((lower - upper) @ self._down).max())
        # The seam in the middle of the mouth, in face units below its origin.
        seam = ((upper + lower)[5] / 2 - rig.frame[0]) @ self._down
        self._seam = float(seam) / self._unit
        self._own_teeth = bool(rig.teeth[4, ..., 3].any())
        self._grain = np.random.default_rng(7).normal(0, 1.0, (256, 256)).astype(np.float32)
        self._columns = np.arange(width, dtype=np.float32) + x
        self._rows = (np.arange(height, dtype=np.float32) + y)[:, None]

    def gap(self, pose: Pose) -> float:
        """How far the lips are apart at most, in pixels, before the head moves."""
        ring = self._ring(mouth_weights(pose.mouth))
        upper, lower = ring[0:11], ring[np.r_[0, 19:10:-1, 10]]
        return float(((lower - upper) @ self._down).max())

    def _ring(self, weights: Float32) -> Float32:
        return self.rig.ring + np.tensordot(weights, self.rig.ring_motion, 1).astype(np.float32)

    def draw(self, pose: Pose) -> UInt8:
        """The picture, I420, its own memory."""
        out: UInt8 = self.rig.image.copy()
        both = min(BLINKS, round(float(pose.blink) * BLINKS))
        blink = (max(both, min(BLINKS, round(float(pose.wink) * BLINKS))), both)
        weights = mouth_weights(pose.mouth)
        talks = bool(np.any(np.abs(weights) > 1e-4))
        moves = bool(np.any(pose.head))
        if not (talks or moves or any(blink)):
            return out
        kept = self._shut_eyes(blink)
        try:
            self._draw(out, pose, weights, talks, moves)
        finally:
            for view, pixels in kept:
                view[:] = pixels
        return out

    def _shut_eyes(self, blink: tuple[int, int]) -> list[tuple[UInt8, UInt8]]:
        """Swap the eyes' pixels in the source, to these steps; gives what was there."""
        kept = []
        rig = self.rig
        for shut, box, luma, chroma in (
            (blink[0], rig.lid_boxes[0], rig.left_luma, rig.left_chroma),
            (blink[1], rig.lid_boxes[1], rig.right_luma, rig.right_chroma),
        ):
            if shut <= 0:
                continue
            step = shut - 1
            x, y, width, height = _ints(box)
            big = self._luma[2 * y : 2 * (y + height), 2 * x : 2 * (x + width)]
            small = self._chroma[y // 2 : (y + height) // 2, x // 2 : (x + width) // 2]
            for view, pixels in ((big, luma[step]), (small, chroma[step])):
                kept.append((view, view.copy()))
                view[:] = pixels
        return kept

    def _draw(self, out: UInt8, pose: Pose, weights: Float32, talks: bool, moves: bool) -> None:
        x, y, width, height = self._region
        nodes = self._nodes
        shift = None
        if moves:
            small = _sum(self._head, pose.head).reshape(height // 4 + 2, width // 4 + 2, 2)
            # A quarter grid becomes a half grid with two nodes around it, of which one is kept.
            shift = _resized(small, width // 2 + 4, height // 2 + 4, cv2.INTER_LINEAR)[1:-1, 1:-1]
            nodes = nodes - shift
        if not talks:
            luma, chroma = self._sample(nodes)
        else:
            luma, chroma = self._talking(nodes, shift, weights)
        plane, colours = planes(out)
        plane[y : y + height, x : x + width] = luma
        colours[:, y // 2 : (y + height) // 2, x // 2 : (x + width) // 2] = chroma.transpose(
            2, 0, 1
        )

    def _talking(
        self, nodes: Float32, shift: Float32 | None, weights: Float32
    ) -> tuple[UInt8, UInt8]:
        """The region with the mouth in it: two layers, and the inner mouth where they part."""
        x, y, width, height = self._mouth_box
        anchors, upper, lower = self._lips(weights, shift)
        line, soft = self._seam_line(upper, lower)
        # Rows from `first` to `last` of the mouth's box hold both layers, a little more than need.
        first = math.floor((line - soft / 2).min() - y) // 4 * 4 - 4
        last = -(-math.ceil((line + soft / 2).max() - y) // 4) * 4 + 4
        first = min(max(first, 0), height - 12)
        last = min(max(last, first + 8), height - 4)
        field = _sum(self._mouth, weights).reshape(2, height // 2, width // 2, 2)
        row, column = self._mouth_at
        part = nodes[row : row + height // 2, column : column + width // 2]
        under = self._carried(field[1], part[first // 2 :])
        over = self._carried(field[0], part[: last // 2])
        # The band of both, with one node around it: those at its sides have no motion of a mouth.
        above = row + first // 2 - 1
        band = nodes[above : row + last // 2 + 1, column - 1 : column + width // 2 + 1].copy()
        band[1:, 1:-1] = under[: (last - first) // 2 + 1]
        if nodes is self._nodes:
            nodes = nodes.copy()
        part = nodes[row : row + height // 2, column : column + width // 2]
        part[: last // 2 - 1] = over[:-1]
        part[last // 2 - 1 :] = under[(last - first) // 2 - 1 :]
        luma, chroma = self._sample(nodes)
        low_luma, low_chroma = self._sample(band)
        rows = self._rows[first:last]
        share = np.clip((rows - line) / soft + np.float32(0.5), 0, 1)
        dy, dx = y - self._region[1] + first, x - self._region[0]
        _blend(luma[dy : dy + last - first, dx : dx + width], low_luma, share)
        tones = chroma[dy // 2 : (dy + last - first) // 2, dx // 2 : (dx + width) // 2]
        half = _resized(share, width // 2, (last - first) // 2, cv2.INTER_AREA)
        _blend(tones, low_chroma, half[..., None])
        self._inner_over(luma, chroma, anchors, upper, lower, weights, self._region)
        return luma, chroma

    def _lips(self, weights: Float32, shift: Float32 | None) -> tuple[Float32, Float64, Float64]:
        """The mouth's frame (its origin, a point along it, a point below it), and both lips'
        edges, from the left corner to the right."""
        frame = self.rig.frame
        down = self._down * self._unit
        anchors = np.stack([frame[0], frame[0] + 0.2 * frame[1], frame[0] + 0.2 * down])
        points = np.vstack([anchors, self._ring(weights)]).astype(np.float32)
        if shift is not None:
            points = self._carry_points(points, shift)
        ring = points[3:].astype(np.float64)
        return points[:3], curve(ring[0:11], 81), curve(ring[np.r_[0, 19:10:-1, 10]], 81)

    def _seam_line(self, upper: Float64, lower: Float64) -> tuple[Float32, Float32]:
        """Where, column by column, the upper layer gives way to the lower one, and how softly:
        sharply between the corners of the mouth, ever more softly beyond them."""
        seam = (upper + lower) / 2
        left, right = seam[0], seam[-1]
        slope = (right[1] - left[1]) / max(1.0, right[0] - left[0])
        beyond = np.minimum(self._columns - left[0], 0) + np.maximum(self._columns - right[0], 0)
        line = np.interp(self._columns, seam[:, 0], seam[:, 1]) + slope * beyond
        soft = 1.5 + np.minimum(np.abs(beyond) * 0.9, 0.30 * self._unit)
        return line.astype(np.float32), soft.astype(np.float32)

    def _carried(self, field: Float32, here: Float32) -> Float32:
        """Where the pixels now at `here` come from: the forward motion, inverted by iteration."""
        x, y, _, _ = self._mouth_box
        origin = np.array([x + 0.5, y + 0.5], np.float32)
        base = (here - origin) * np.float32(0.5)
        at = base
        for _ in range(4):
            at = base - _at(field, at, cv2.BORDER_CONSTANT) * np.float32(0.5)
        carried: Float32 = at * np.float32(2.0) + origin
        return carried

    def _sample(self, nodes: Float32) -> tuple[UInt8, UInt8]:
        """Luma and chroma where padded half-resolution `nodes` (h + 2, w + 2, 2) say."""
        rows, columns = nodes.shape[:2]
        full = _resized(nodes * np.float32(2.0), columns * 2, rows * 2, cv2.INTER_LINEAR)
        half = (nodes[1:-1, 1:-1] - np.float32(0.5)) * np.float32(0.5)
        return _at(self._luma, full[2:-2, 2:-2]), _at(self._chroma, half)

    def _carry_points(self, points: Float32, shift: Float32) -> Float32:
        """Where the head's motion takes points: the backward motion, inverted by iteration."""
        x, y, _, _ = self._region
        origin = np.array([x - 1.5, y - 1.5], np.float32)
        at = points
        for _ in range(3):
            where = ((at - origin) * np.float32(0.5))[None]
            at = points + _at(shift, where)[0]
        return at

    def _inner_over(
        self,
        luma: UInt8,
        chroma: UInt8,
        anchors: Float32,
        upper: Float64,
        lower: Float64,
        weights: Float32,
        region: tuple[int, int, int, int],
        strength: float = 1.0,
    ) -> None:
        """Paint what is seen between the lips over `luma` and `chroma`, which hold `region`."""
        unit = self._unit
        apart = (lower - upper) @ self._down.astype(np.float64)
        gap = float(apart.max())
        shown = float(smoothstep((gap - 1.1 * self._rest_gap - 0.004 * unit) / (0.022 * unit)))
        shown *= strength
        if shown <= 0:
            return
        region_x, region_y, region_w, region_h = region
        outline = np.vstack([upper, lower[::-1]])
        low, high = outline.min(0) - 2, outline.max(0) + 3
        x0 = max(region_x, math.floor(low[0] / 2) * 2)
        y0 = max(region_y, math.floor(low[1] / 2) * 2)
        x1 = min(region_x + region_w, math.ceil(high[0] / 2) * 2)
        y1 = min(region_y + region_h, math.ceil(high[1] / 2) * 2)
        width, height = x1 - x0, y1 - y0
        if width < 2 or height < 2:
            return
        # The opening, antialiased: drawn four times as large.
        mask = np.zeros((height * 4, width * 4), np.uint8)
        fine = ((outline - (x0, y0) + 0.5) * 4 - 0.5) * 16
        cv2.fillPoly(mask, [np.rint(fine).astype(np.int32)], 255, cv2.LINE_AA, 4)
        alpha = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
        alpha *= np.float32(shown / 255)

        # From the layers' pixels to the picture's.
        scale = 2.0 * unit
        along = (anchors[1] - anchors[0]) / 0.2 / scale
        down = (anchors[2] - anchors[0]) / 0.2 / scale
        start = anchors[0] + (INNER[0] * along + (INNER[1] + self._seam) * down) * scale
        start = start + 0.5 * along + 0.5 * down - (x0, y0)
        jaw = JAW * (0.92 * float(weights[0])) + 0.012 * float(weights[5])
        raised = float(weights[6])

        def layer(index: int, drop: float) -> Float32:
            move = start + drop * down * scale
            matrix = np.array([[along[0], down[0], move[0]], [along[1], down[1], move[1]]])
            return cv2.warpAffine(
                self.rig.teeth[index],
                matrix,
                (width, height),
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_CONSTANT if index else cv2.BORDER_REPLICATE,
            ).astype(np.float32)

        paint = layer(0, 0.3 * jaw)[..., :3]

        def over(index: int, drop: float, strength: float = 1.0) -> None:
            top = layer(index, drop)
            cover = top[..., 3:] * np.float32(strength / 255)
            paint[:] += (top[..., :3] - paint) * cover

        over(1, 0.62 * jaw + 0.018 * (1 - raised) * min(1.0, jaw / 0.06) - 0.040 * raised)
        over(2, jaw)
        shows, rounds, tucks = (float(weights[MOUTH.index(n)]) for n in ("teeth", "round", "tuck"))
        # Rounded lips stand out in front of the teeth.
        over(3, -0.011 * (1 - shows) * (1 - tucks) - 0.022 * rounds)
        tip = float(smoothstep((raised - 0.45) / 0.3))
        if tip > 0:
            # Between the teeth, as for English "th".
            over(1, 0.5 * jaw - 0.004, tip)

        # Light falls in from the front: less under the upper lip, at the corners, in a narrow gap.
        columns = np.arange(x0, x1, dtype=np.float64)
        rows = np.arange(y0, y1, dtype=np.float32)[:, None]
        top = np.interp(columns, upper[:, 0], upper[:, 1]).astype(np.float32)
        bottom = np.interp(columns, lower[:, 0], lower[:, 1]).astype(np.float32)
        span = max(1.0, float(upper[-1, 0] - upper[0, 0]))
        across = (2 * (columns - upper[0, 0]) / span - 1).astype(np.float32)
        light = 0.50 + 0.50 * smoothstep((rows - top) / (0.050 * unit) + 0.12)
        light = light * (0.80 + 0.20 * smoothstep((bottom - rows) / (0.030 * unit) + 0.2))
        light = light * (1 - 0.50 * np.abs(across) ** 3)
        wide = float(smoothstep(gap / (0.085 * unit)))
        light = light * min(1.0, 0.64 + 0.36 * wide + 0.3 * tucks) * (1 - 0.25 * rounds)
        shade = np.asarray(light, np.float32)
        paint[..., 0] = (paint[..., 0] - 16) * shade + 16
        # Shade takes colour with it, though less.
        fade = (0.35 + 0.65 * shade)[..., None]
        paint[..., 1:] = (paint[..., 1:] - 128) * fade + 128

        if self._own_teeth:
            # They have the portrait's own light.
            over(4, 0.0)
        place = np.array([[along[0], down[0], start[0]], [along[1], down[1], start[1]]])
        self._seen_inside(paint, place, upper - (x0, y0), lower - (x0, y0), weights)

        at_y, at_x = y0 - region_y, x0 - region_x
        _blend(luma[at_y : at_y + height, at_x : at_x + width], paint[..., 0], alpha)
        # Colour counts as much as the opening covers.
        small = _resized(alpha, width // 2, height // 2, cv2.INTER_AREA)
        tint = _resized(paint[..., 1:] * alpha[..., None], width // 2, height // 2, cv2.INTER_AREA)
        tint = np.asarray(tint / np.maximum(small, 1e-3)[..., None], np.float32)
        down_y, down_x = at_y // 2, at_x // 2
        view = chroma[down_y : down_y + height // 2, down_x : down_x + width // 2]
        _blend(view, tint, small[..., None])

    def _seen_inside(
        self, paint: Float32, place: Float64, upper: Float64, lower: Float64, weights: Float32
    ) -> None:
        """For a puppet that knows more of its mouth than what is painted. `paint` (h, w, 3) is
        Y U V; `place` (2, 3) takes pixels of the inner layers to it, the lips' edges lie in it."""


def _at(picture: Pixels, where: Float32, outside: int = cv2.BORDER_REPLICATE) -> Pixels:
    """`picture` sampled at `where` (h, w, 2), as (x, y)."""
    remap: Any = cv2.remap  # its stub has no room for the second map's None
    return cast(
        Pixels, remap(picture, where, None, cv2.INTER_LINEAR, borderMode=outside, borderValue=0)
    )


def _resized(picture: Float32, width: int, height: int, how: int) -> Float32:
    return cast(Float32, cv2.resize(picture, (width, height), interpolation=how))


def _sum(fields: Float32, weights: Float32) -> Float32:
    """The weighted sum over the first axis, on this thread only: a matrix product would call up
    the threads of a BLAS, which cost more than they bring on a machine that is busy."""
    out = np.zeros(fields.shape[1:], np.float32)
    for field_, weight in zip(fields, weights, strict=True):
        if weight:
            cv2.scaleAdd(field_, float(weight), out, out)
    return out


def _blend(under: UInt8, over: npt.NDArray[Any], share: Float32) -> None:
    """`under` becomes `over` as far as `share` (0 to 1) says."""
    base = under.astype(np.float32)
    base += (over - base) * share
    under[:] = np.rint(base)


def _ints(box: npt.NDArray[np.int32]) -> tuple[int, int, int, int]:
    x, y, width, height = (int(v) for v in box)
    return x, y, width, height
