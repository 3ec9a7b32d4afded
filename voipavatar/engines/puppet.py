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
    noise_of,
    planes,
    smoothstep,
)

Pixels = TypeVar("Pixels", UInt8, Float32)

_TILE = 32
"""Pixels; where a person stands before something else, tiles that are all person cost nothing."""

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
    gaze: tuple[float, float] = (0.0, 0.0)
    """Where the eyes look, right and down from the portrait's own look, in radii of the iris."""
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
        self._luma = double(luma, float(rig.boost))
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
        # The balls of the eyes, in luma and in chroma, each with its parts put together at rest.
        self._balls = [
            [(*ball[:4], ball[0] * (1 - ball[1]) + ball[2] + ball[3], ball[4]) for ball in both]
            for both in (
                (rig.left_ball_luma, rig.left_ball_chroma),
                (rig.right_ball_luma, rig.right_ball_chroma),
            )
        ]
        self._glints = [bool(np.abs(both[0][3]).max() > 1) for both in self._balls]
        self._open = [_covers(rig.left_seen[0]), _covers(rig.right_seen[0])]
        # What is painted between the lips is as grainy as the portrait.
        box = _cut(rig.image, region)[0]
        strength = noise_of(box.astype(np.float32))
        self._grain: Float32 | None = None
        if strength > 0.8:
            noise = np.random.default_rng(7).normal(0, strength, (256, 256))
            self._grain = noise.astype(np.float32)
        self._still: UInt8 = rig.image
        self._alpha: UInt8 | None = None
        if rig.alpha.size:
            self._alpha = double(rig.alpha)
            self._still = self._before(rig)
            self._edges = self._outline(rig)
            self._behind = _cut(rig.behind, region)
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
        out: UInt8 = self._still.copy()
        both = min(BLINKS, round(float(pose.blink) * BLINKS))
        blink = (max(both, min(BLINKS, round(float(pose.wink) * BLINKS))), both)
        weights = mouth_weights(pose.mouth)
        talks = bool(np.any(np.abs(weights) > 1e-4))
        moves = bool(np.any(pose.head))
        looks = bool(pose.gaze[0] or pose.gaze[1])
        if not (talks or moves or looks or any(blink)):
            return out
        kept = self._shut_eyes(blink)
        try:
            if looks:
                kept += self._turn_eyes(pose.gaze, blink)
            self._draw(out, pose, weights, talks, moves)
        finally:
            for view, pixels in reversed(kept):
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

    def _turn_eyes(
        self, gaze: tuple[float, float], blink: tuple[int, int]
    ) -> list[tuple[UInt8, UInt8]]:
        """Move the irises in the source; gives what was there. The light in them, which is a
        reflection, moves half as far."""
        kept = []
        rig = self.rig
        for i, seen in enumerate((rig.left_seen, rig.right_seen)):
            radius, reach = float(rig.irises[i, 2]), float(rig.irises[i, 3])
            dx, dy = (float(np.clip(v * radius, -reach, reach)) for v in gaze)
            if blink[i] == BLINKS or not (dx or dy):
                continue
            x, y, width, height = _ints(rig.gaze_boxes[i])
            big = self._luma[2 * y : 2 * (y + height), 2 * x : 2 * (x + width)]
            small = self._chroma[y // 2 : (y + height) // 2, x // 2 : (x + width) // 2]
            # What was put together is nearly what the portrait has; the difference goes with the
            # first bit of the way, so that nothing jumps where an eye begins to move.
            gone = np.float32(smoothstep(math.hypot(dx, dy) / (0.25 * radius)))
            share, less = self._open[i] if blink[i] == 0 else _covers(seen[blink[i]])
            for view, ball, part, scale in (
                (big, self._balls[i][0], share, 2.0),
                (small, self._balls[i][1], less, 0.5),
            ):
                white, covered, iris, light, rest, own = ball
                kept.append((view, view.copy()))
                change = white * (1 - _slid(covered, dx * scale, dy * scale))
                change += _slid(iris, dx * scale, dy * scale)
                if self._glints[i]:
                    change += _slid(light, dx * scale / 2, dy * scale / 2)
                change -= own if gone == 1 else rest + (own - rest) * gone
                change *= part
                change += view
                view[:] = np.clip(np.rint(change), 16, 240)
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
            luma, chroma, full = self._sample(nodes)
        else:
            luma, chroma, full = self._talking(nodes, shift, weights)
        if self._alpha is not None:
            self._stand(full, luma, chroma)
        plane, colours = planes(out)
        plane[y : y + height, x : x + width] = luma
        colours[:, y // 2 : (y + height) // 2, x // 2 : (x + width) // 2] = chroma.transpose(
            2, 0, 1
        )

    @staticmethod
    def _before(rig: Rig) -> UInt8:
        """The person as in the portrait, before what is behind."""
        out: UInt8 = rig.behind.copy()
        for view, person, share in zip(
            planes(out), planes(rig.image), _shares(rig.alpha), strict=True
        ):
            mixed = view.astype(np.float32)
            mixed += (person - mixed) * share
            view[:] = np.rint(mixed)
        return out

    def _outline(self, rig: Rig) -> list[tuple[bool, int, int, int, int]]:
        """Boxes of the region (top, bottom, left, right) in which the person isn't all there is,
        however the head moves; True for those in which nothing of it ever is."""
        x, y, width, height = self._region
        reach = 2 * math.ceil(0.13 * self._unit) + 1
        kernel = np.ones((reach, reach), np.uint8)
        part = np.ascontiguousarray(rig.alpha[y : y + height, x : x + width])
        most, least = cv2.dilate(part, kernel), cv2.erode(part, kernel)
        out: list[tuple[bool, int, int, int, int]] = []
        for top in range(0, height, _TILE):
            bottom = min(height, top + _TILE)
            before: bool | None = None
            for left in range(0, width, _TILE):
                right = min(width, left + _TILE)
                tile = np.s_[top:bottom, left:right]
                kind = None if least[tile].min() == 255 else not most[tile].any()
                if kind is not None and kind == before:
                    out[-1] = (*out[-1][:4], right)
                elif kind is not None:
                    out.append((kind, top, bottom, left, right))
                before = kind
        return out

    def _stand(self, full: Float32, luma: UInt8, chroma: UInt8) -> None:
        """Put the region before what is behind, which stays while the head moves. `full` is where
        the luma was sampled."""
        assert self._alpha is not None
        for empty, top, bottom, left, right in self._edges:
            box = np.s_[top:bottom, left:right]
            small = np.s_[top // 2 : bottom // 2, left // 2 : right // 2]
            if empty:
                luma[box], chroma[small] = self._behind[0][box], self._behind[1][small]
                continue
            cover = _at(self._alpha, full[box])
            size = ((right - left) // 2, (bottom - top) // 2)
            less = np.asarray(cv2.resize(cover, size, interpolation=cv2.INTER_AREA), np.uint8)
            for view, behind, share in (
                (luma[box], self._behind[0][box], cover),
                (chroma[small], self._behind[1][small], np.dstack((less, less))),
            ):
                mine = cv2.multiply(view, share, scale=1 / 255)
                view[:] = cv2.add(mine, cv2.multiply(behind, ~share, scale=1 / 255))

    def _talking(
        self, nodes: Float32, shift: Float32 | None, weights: Float32
    ) -> tuple[UInt8, UInt8, Float32]:
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
        luma, chroma, full = self._sample(nodes)
        low_luma, low_chroma, _ = self._sample(band)
        rows = self._rows[first:last]
        share = np.clip((rows - line) / soft + np.float32(0.5), 0, 1)
        dy, dx = y - self._region[1] + first, x - self._region[0]
        _blend(luma[dy : dy + last - first, dx : dx + width], low_luma, share)
        tones = chroma[dy // 2 : (dy + last - first) // 2, dx // 2 : (dx + width) // 2]
        half = _resized(share, width // 2, (last - first) // 2, cv2.INTER_AREA)
        _blend(tones, low_chroma, half[..., None])
        self._inner_over(luma, chroma, anchors, upper, lower, weights, self._region)
        return luma, chroma, full

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

    def _sample(self, nodes: Float32) -> tuple[UInt8, UInt8, Float32]:
        """Luma and chroma where padded half-resolution `nodes` (h + 2, w + 2, 2) say, and those
        places for luma, at twice the picture's resolution."""
        rows, columns = nodes.shape[:2]
        full = _resized(nodes * np.float32(2.0), columns * 2, rows * 2, cv2.INTER_LINEAR)
        half = (nodes[1:-1, 1:-1] - np.float32(0.5)) * np.float32(0.5)
        full = full[2:-2, 2:-2]
        return _at(self._luma, full), _at(self._chroma, half), full

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
        if self._grain is not None:
            down_rows, along_columns = np.arange(y0, y1) % 256, np.arange(x0, x1) % 256
            paint[..., 0] += self._grain[np.ix_(down_rows, along_columns)]
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


def _covers(seen: UInt8) -> tuple[Float32, Float32]:
    """How much of an eyeball is seen, 0 to 1, for luma (2h, 2w) and for chroma (h/2, w/2, 1)."""
    share = seen.astype(np.float32) * np.float32(1 / 255)
    size = (seen.shape[1] // 4, seen.shape[0] // 4)
    return share, _resized(share, *size, cv2.INTER_AREA)[..., None]


def _slid(picture: Float32, dx: float, dy: float) -> Float32:
    """`picture` moved right and down, nothing beyond its edges."""
    move = np.array([[1.0, 0.0, dx], [0.0, 1.0, dy]])
    size = (picture.shape[1], picture.shape[0])
    return cast(Float32, cv2.warpAffine(picture, move, size, flags=cv2.INTER_LINEAR))


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


def _cut(image: UInt8, box: tuple[int, int, int, int]) -> tuple[UInt8, UInt8]:
    """Luma (h, w) and chroma (h/2, w/2, 2) of a box of an I420 picture, their own memory."""
    x, y, width, height = box
    plane, colours = planes(image)
    part = colours[:, y // 2 : (y + height) // 2, x // 2 : (x + width) // 2]
    return plane[y : y + height, x : x + width].copy(), np.ascontiguousarray(
        part.transpose(1, 2, 0)
    )


def _shares(alpha: UInt8) -> tuple[Float32, Float32]:
    """How much of luma and of chroma is the person, 0 to 1."""
    share: Float32 = (alpha / np.float32(255)).astype(np.float32)
    size = (alpha.shape[1] // 2, alpha.shape[0] // 2)
    return share, _resized(share, *size, cv2.INTER_AREA)


def _ints(box: npt.NDArray[np.int32]) -> tuple[int, int, int, int]:
    x, y, width, height = (int(v) for v in box)
    return x, y, width, height
