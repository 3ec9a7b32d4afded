"""Finding a face and its 468 points in any picture: photo, painting, drawing.

MediaPipe's short-range detector, face mesh and iris network, run by OpenCV on one core. The mesh is
looked at several times, each time a little turned, shifted and scaled, about where it was the last
time; the mean is steadier than any single look. `left` and `right` are as seen in the picture.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import cv2
import numpy as np
import numpy.typing as npt

from .config import Settings
from .engines.rig import shows_teeth
from .errors import AvatarError, ConfigError
from .facemodels import FaceModels, face_models
from .media import UInt8
from .meshpoints import (
    FOREHEAD,
    INNER_LIPS,
    JAW,
    LEFT_BROW,
    LEFT_EYE,
    NOSE,
    OUTER_LIPS,
    RIGHT_BROW,
    RIGHT_EYE,
    yaw,
)

Float64: TypeAlias = npt.NDArray[np.float64]

_IRIS_LIDS = (
    (0, 9, 10, 11, 12, 13, 14, 15, 8),
    (0, 1, 2, 3, 4, 5, 6, 7, 8),
)
"""Upper and lower lid of the iris network's contour, from the outer corner to the inner."""


@dataclass(frozen=True)
class Detection:
    """A face as the detector sees it."""

    box: tuple[float, float, float, float]
    """x1, y1, x2, y2"""
    score: float
    """0..1"""
    keys: Float64
    """(6, 2): left eye, right eye, nose, mouth, left ear, right ear."""

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def side(self) -> float:
        x1, y1, x2, y2 = self.box
        return max(x2 - x1, y2 - y1)


@dataclass(frozen=True)
class Found:
    """One face."""

    points: Float64
    """(468, 3): x, y in pixels, and depth in the same scale, less is nearer."""
    score: float
    """0..1: the detector's."""
    presence: float
    """0..1: how much the mesh network believes that this is a face."""
    lids: dict[str, tuple[Float64, Float64]] = field(default_factory=dict)
    """`left_eye` and `right_eye`: upper and lower lid, (9, 2) each, left to right."""
    irises: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """x, y, radius"""
    inner_lips: Float64 | None = None
    """(20, 2) as `INNER_LIPS`: the picture's own seam where the lips are closed."""
    teeth: bool = False
    """Something bright is between the lips."""
    others: tuple[Detection, ...] = ()
    """Further faces in the picture."""

    @property
    def unit(self) -> float:
        """Distance of the outer corners of the eyes, in pixels."""
        return float(np.linalg.norm(self.points[263, :2] - self.points[33, :2]))

    @property
    def roll(self) -> float:
        """Degrees that the line of the eyes falls to the right."""
        x, y = self.points[263, :2] - self.points[33, :2]
        return math.degrees(math.atan2(y, x))

    @property
    def yaw(self) -> float:
        """Degrees that the head is turned to the picture's right, roughly."""
        return yaw(self.points)

    @property
    def gap(self) -> float:
        """How far the lips are apart, in parts of `unit`."""
        inner = self.points[list(INNER_LIPS), :2] if self.inner_lips is None else self.inner_lips
        return float(np.linalg.norm(inner[5] - inner[15])) / self.unit

    def landmarks(self) -> dict[str, Any]:
        """As a persona's YAML has them: lists of [x, y], in pixels."""
        at = self.points[:, :2]

        def line(*indices: int) -> list[list[float]]:
            return _listed(at[list(indices)])

        def between(edges: tuple[tuple[int, ...], tuple[int, ...]]) -> list[list[float]]:
            return _listed((at[list(edges[0])] + at[list(edges[1])]) / 2)

        out: dict[str, Any] = {"outer_lips": line(*OUTER_LIPS)}
        inner = at[list(INNER_LIPS)] if self.inner_lips is None else self.inner_lips
        out["inner_lips"] = _listed(inner)
        for name, lids in (("left_eye", LEFT_EYE), ("right_eye", RIGHT_EYE)):
            upper, lower = self.lids.get(name) or (at[list(lids[0])], at[list(lids[1])])
            x, y, radius = self.irises.get(name) or _guess_iris(upper, lower)
            out[name] = {
                "upper": _listed(upper),
                "lower": _listed(lower),
                "iris": [round(v, 2) for v in (x, y, radius)],
            }
        out["left_brow"], out["right_brow"] = between(LEFT_BROW), between(RIGHT_BROW)
        out["nose"] = {name: line(index)[0] for name, index in NOSE.items()}
        out["jaw"] = line(*JAW)
        # The mesh ends below the hair.
        up = at[FOREHEAD] - at[9]
        out["forehead"] = _listed(
            (at[FOREHEAD] + 0.22 * self.unit * up / np.linalg.norm(up))[None]
        )[0]
        return out

    def advice(self, scale: float = 1.0) -> list[str]:
        """What a person should know about this portrait; `scale` is to the picture that is made."""
        out = []
        if self.others:
            x, y = (round(v) for v in self.points[1, :2])
            out.append(
                f"{len(self.others) + 1} faces are in the picture, the one about [{x}, {y}] is "
                "used: for another, set `face_at: [x, y]` in the persona's engine_options"
            )
        if self.unit * scale < 90:
            out.append(
                f"the face is small (the eyes are {self.unit * scale:.0f} pixels apart in the "
                "avatar): lips and teeth will be coarse; use a closer or larger portrait"
            )
        elif scale > 1.6:
            out.append(
                f"the portrait is enlarged {scale:.1f} times: it will look soft; use a larger one"
            )
        if abs(self.yaw) > 24:
            out.append(
                f"the head is turned aside by about {abs(self.yaw):.0f} degrees: the mouth will "
                "look best from the front; use a portrait that looks at the viewer"
            )
        if abs(self.roll) > 12:
            out.append(f"the head is tilted by {abs(self.roll):.0f} degrees: it will stay so")
        if self.presence < 0.5 or self.score < 0.5:
            out.append(
                "this hardly looks like a human face (a drawing, an animal?): look at the sheet "
                "whether the points lie right, or give `landmarks` in the persona's YAML"
            )
        if self.gap > 0.06:
            out.append(
                "the mouth is open in the portrait: the lips are pulled together where speech "
                "closes them; a portrait with closed lips looks better"
            )
        return out


def _listed(points: Float64) -> list[list[float]]:
    return [[round(float(x), 2), round(float(y), 2)] for x, y in points]


def _guess_iris(upper: Float64, lower: Float64) -> tuple[float, float, float]:
    """Where the network for it sees none: the middle, as large as irises are beside their eye."""
    x, y = (upper.mean(0) + lower.mean(0)) / 2
    return float(x), float(y), 0.21 * float(np.linalg.norm(upper[-1] - upper[0]))


class FaceMesh:
    """Finds faces. Not for two threads at once."""

    LOOKS = ((0, 0, 0, 1), (3, 0.02, 0, 1.04), (-3, -0.02, 0, 0.96), (2, 0, 0.025, 0.94)) + (
        (-2, 0, -0.025, 1.06),
    )
    """Degrees, shifts in parts of the crop, and scale, of one look at the mesh."""

    def __init__(self, models: FaceModels) -> None:
        """TFLite files, read by OpenCV. ConfigError when it can't."""
        self._detector = _network(models.detector)
        self._mesh = _network(models.mesh)
        self._iris = _network(models.iris)
        self._anchors = anchors()

    # --- where faces are ---

    def detect(self, picture: UInt8, least: float = 0.5) -> list[Detection]:
        """Every face in (H, W, 3) BGR, the surest first; also small ones, and one that fills it."""
        height, width = picture.shape[:2]
        long, short = max(width, height), min(width, height)
        found = []
        # All of it; with room around it, for a face that fills it; then parts, for small faces.
        views = [
            (0.0, 0.0, float(long)),
            ((width - 1.6 * long) / 2, (height - 1.6 * long) / 2, 1.6 * long),
        ]
        for share in (1.0, 0.6):
            side = share * short
            steps_x = max(1, math.ceil((width - side) / (0.6 * side)) + 1)
            steps_y = max(1, math.ceil((height - side) / (0.6 * side)) + 1)
            if steps_x * steps_y == 1:
                continue
            for i in range(steps_x):
                for j in range(steps_y):
                    x = (width - side) * (i / max(1, steps_x - 1) if steps_x > 1 else 0.5)
                    y = (height - side) * (j / max(1, steps_y - 1) if steps_y > 1 else 0.5)
                    views.append((x, y, side))
        for n, view in enumerate(views):
            for one in self._look_for(picture, view, least):
                x1, y1, x2, y2 = one.box
                x, y, side = view
                cut = x1 < x + 2 or y1 < y + 2 or x2 > x + side - 2 or y2 > y + side - 2
                if n < 2 or not cut:
                    found.append(one)
        found.sort(key=lambda one: -one.score)
        kept: list[Detection] = []
        for one in found:
            if all(_apart(one, other) for other in kept):
                kept.append(one)
        return kept

    def _look_for(
        self, picture: UInt8, view: tuple[float, float, float], least: float
    ) -> list[Detection]:
        x, y, side = view
        scale = 128 / side
        if scale < 1:
            # Averaged first, so that nothing is skipped.
            left, top = round(x), round(y)
            whole = round(side)
            square = np.zeros((whole, whole, 3), np.uint8)
            height, width = picture.shape[:2]
            x1, y1 = max(0, left), max(0, top)
            x2, y2 = min(width, left + whole), min(height, top + whole)
            square[y1 - top : y2 - top, x1 - left : x2 - left] = picture[y1:y2, x1:x2]
            small = cv2.resize(square, (128, 128), interpolation=cv2.INTER_AREA)
            x, y, side = float(left), float(top), float(whole)
        else:
            warp = np.array([[scale, 0, -x * scale], [0, scale, -y * scale]])
            small = cv2.warpAffine(picture, warp, (128, 128), flags=cv2.INTER_LINEAR)
        feed = np.asarray(small, np.float32)[..., ::-1] / 127.5 - 1.0
        out = _forward(self._detector, feed, ("regressors", "classificators"))
        raw, logits = out[0].reshape(896, 16) / 128, out[1].reshape(896)
        scores = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
        found: list[Detection] = []
        for i in np.argsort(-scores)[:40]:
            if scores[i] < least:
                break
            centre = raw[i, :2] + self._anchors[i]
            half = raw[i, 2:4] / 2
            keys = (raw[i, 4:].reshape(6, 2) + self._anchors[i]) * side + (x, y)
            (x1, y1), (x2, y2) = ((centre + sign * half) * side + (x, y) for sign in (-1, 1))
            one = Detection((x1, y1, x2, y2), float(scores[i]), keys.astype(np.float64))
            if all(_apart(one, other) for other in found):
                found.append(one)
        return found

    # --- its points ---

    def find(self, picture: UInt8, at: Sequence[float] | None = None) -> Found:
        """The face nearest to `at`, or the largest. AvatarError when none is there, or it lies."""
        faces = self.detect(picture)
        # What is much less sure than the surest is a pattern in the background.
        faces = [one for one in faces if one.score > faces[0].score - 0.2]
        if not faces:
            # Drawings and animals: less sure, and only as the last resort.
            faces = self.detect(picture, 0.2)[:1]
        if not faces:
            raise AvatarError(
                "no face is found in the portrait: use a picture that shows one from the front, "
                "not too small; for a drawing that isn't recognised give `landmarks` in the "
                "persona's YAML"
            )

        def rank(one: Detection) -> float:
            if at is None:
                return -one.side
            return math.hypot(one.centre[0] - at[0], one.centre[1] - at[1])

        chosen = min(faces, key=rank)
        others = tuple(one for one in faces if one is not chosen and one.side > 0.25 * chosen.side)
        found = self.trace(picture, chosen, others)
        if abs(found.roll) > 45:
            raise AvatarError("the portrait lies on its side or head: turn it upright")
        return found

    def trace(self, picture: UInt8, face: Detection, others: tuple[Detection, ...] = ()) -> Found:
        """All points of a face that was detected."""
        left, right = face.keys[0], face.keys[1]
        angle = math.atan2(right[1] - left[1], right[0] - left[0])
        points, presence = self._look(picture, face.centre, 1.5 * face.side, angle)
        return self._finish(picture, points, face.score, others)

    def glance(self, picture: UInt8, near: Found) -> Float64:
        """One quick look about where the face was: (468, 3), as `Found.points`."""
        return self._look(picture, *_frame(near.points))[0]

    def follow(self, picture: UInt8, points: Float64) -> tuple[Float64, float]:
        """The face of the picture before in the next one of a clip: (468, 3), and `presence`.

        Three looks about where it was: a tenth of the work of `again`, for a track that is
        smoothed later.
        """
        centre, side, angle = _frame(points)
        # Only what the looks see: large pictures are averaged down before they are turned.
        reach = 0.85 * side
        height, width = picture.shape[:2]
        left, top = (max(0, math.floor(v - reach)) for v in centre)
        right, bottom = (
            min(size, math.ceil(v + reach)) for v, size in zip(centre, (width, height), strict=True)
        )
        if right - left < 8 or bottom - top < 8:
            return points, 0.0
        part = np.ascontiguousarray(picture[top:bottom, left:right])
        looks = []
        for turn, dx, dy, scale in self.LOOKS[:3]:
            middle = (centre[0] + dx * side - left, centre[1] + dy * side - top)
            looks.append(self._look(part, middle, side * scale, angle + math.radians(turn)))
        found = np.mean([one[0] for one in looks], 0) + (left, top, 0)
        return found, float(np.mean([one[1] for one in looks]))

    def again(self, picture: UInt8, before: Found) -> Found:
        """The same face in the next picture of a clip, or in another pose."""
        return self._finish(picture, before.points, before.score, ())

    def _finish(
        self,
        picture: UInt8,
        points: Float64,
        score: float,
        others: tuple[Detection, ...],
    ) -> Found:
        for _ in range(2):
            looks = []
            centre, side, angle = _frame(points)
            for turn, dx, dy, scale in self.LOOKS:
                middle = (centre[0] + dx * side, centre[1] + dy * side)
                looks.append(self._look(picture, middle, side * scale, angle + math.radians(turn)))
            points = np.mean([one[0] for one in looks], 0)
            presence = float(np.mean([one[1] for one in looks]))
        lids, irises = {}, {}
        for name, (upper, lower), mirrored in (
            ("left_eye", LEFT_EYE, False),
            ("right_eye", RIGHT_EYE, True),
        ):
            edges, iris = self._eye(picture, points, upper, lower, mirrored)
            lids[name] = edges
            if iris is not None:
                irises[name] = iris
        inner, teeth = _part(picture, points)
        return Found(points, score, presence, lids, irises, inner, teeth, others)

    def _look(
        self, picture: UInt8, centre: tuple[float, float], side: float, angle: float
    ) -> tuple[Float64, float]:
        warp = _warp(centre, side, angle, 192)
        crop = _crop(picture, warp, 192)
        out = _forward(self._mesh, crop[..., ::-1].astype(np.float32) / 255, None)
        flat = max(out, key=lambda one: one.size).reshape(-1, 3).astype(np.float64)
        logit = float(min(out, key=lambda one: one.size).ravel()[0])
        back = cv2.invertAffineTransform(warp)
        xy = flat[:, :2] @ back[:, :2].T + back[:, 2]
        depth = flat[:, 2:] * (side / 192)
        return np.hstack([xy, depth]), 1 / (1 + math.exp(-max(-50.0, min(50.0, logit))))

    def _eye(
        self,
        picture: UInt8,
        points: Float64,
        upper: tuple[int, ...],
        lower: tuple[int, ...],
        mirrored: bool,
    ) -> tuple[tuple[Float64, Float64], tuple[float, float, float] | None]:
        """Lids and iris. The network knows the eye on the left; the other one in a mirror."""
        at = points[:, :2]
        start, end = at[upper[0]], at[upper[-1]]
        side = 2.3 * float(np.linalg.norm(end - start))
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        middle = (start + end) / 2
        warp = _warp((float(middle[0]), float(middle[1])), side, angle, 64)
        if mirrored:
            warp = np.array([[-1.0, 0, 63], [0, 1.0, 0]]) @ np.vstack([warp, [0, 0, 1]])
        crop = _crop(picture, warp, 64)
        out = _forward(
            self._iris,
            crop[..., ::-1].astype(np.float32) / 255,
            ("output_eyes_contours_and_brows", "output_iris"),
        )
        back = cv2.invertAffineTransform(warp)

        def place(raw: npt.NDArray[Any]) -> Float64:
            flat = raw.reshape(-1, 3)[:, :2].astype(np.float64)
            return cast(Float64, flat @ back[:, :2].T + back[:, 2])

        contour, iris = place(out[0]), place(out[1])
        mesh = (at[list(upper)], at[list(lower)])
        seen = [contour[list(order)] for order in _IRIS_LIDS]
        if mirrored:
            seen = [line[::-1] for line in seen]
        eye_width = float(np.linalg.norm(end - start))
        # Two networks that disagree by much see no eye there (glasses, hair, a drawing).
        agree = max(
            float(np.linalg.norm(a - b, axis=1).max()) for a, b in zip(seen, mesh, strict=True)
        )
        radius = float(np.linalg.norm(iris[1:] - iris[0], axis=1).mean())
        if agree > 0.25 * eye_width:
            return mesh, None
        lids = _wider((seen[0], seen[1]), mesh)
        good = 0.10 * eye_width < radius < 0.34 * eye_width
        circle = (float(iris[0, 0]), float(iris[0, 1]), radius) if good else None
        return lids, circle


def _wider(one: tuple[Float64, Float64], other: tuple[Float64, Float64]) -> tuple[Float64, Float64]:
    """The lids that hold both: what of an eye is left out stays open when it shuts."""
    start, end = other[0][0], other[0][-1]
    axis = (end - start) / np.linalg.norm(end - start)
    turn = np.stack([axis, [-axis[1], axis[0]]])
    flat = [[(line - start) @ turn.T for line in lids] for lids in (one, other)]
    left = min(line[:, 0].min() for lids in flat for line in lids)
    right = max(line[:, 0].max() for lids in flat for line in lids)
    ends = [
        np.mean([lids[0][i, 1] for lids in flat if abs(lids[0][i, 0] - x) < 0.02 * (right - left)])
        for i, x in ((0, left), (-1, right))
    ]
    place = np.linspace(left, right, 9)
    out = []
    for row, pick in ((0, np.minimum), (1, np.maximum)):
        heights = [
            np.interp(place, *(lids[row][np.argsort(lids[row][:, 0], kind="stable")].T))
            for lids in flat
        ]
        line = pick(*heights)
        line[0], line[-1] = ends
        out.append(np.stack([place, line], 1) @ turn + start)
    return out[0], out[1]


def _part(picture: UInt8, points: Float64) -> tuple[Float64, bool]:
    """The inner lips by the picture itself, and whether teeth show.

    The mesh sees a small gap wherever lips have a dark seam. Here lips count as closed when what
    is darker than they are is only a thin line, with nothing bright in it; then both edges lie on
    that line.
    """
    unit = float(np.linalg.norm(points[263, :2] - points[33, :2]))
    inner, outer = points[list(INNER_LIPS), :2].copy(), points[list(OUTER_LIPS), :2]
    axis = inner[10] - inner[0]
    down = np.array([-axis[1], axis[0]]) / np.linalg.norm(axis)
    gaps = np.array([(inner[20 - i] - inner[i]) @ down for i in range(1, 10)]) / unit
    if gaps.max() > 0.085:
        return inner, shows_teeth(picture, inner, outer)
    soft = cv2.GaussianBlur(picture, (0, 0), max(0.5, 0.006 * unit))
    grey = cv2.cvtColor(soft, cv2.COLOR_BGR2GRAY).astype(np.float32)
    steps = max(24, round(0.22 * unit) * 2)
    seams, bands = np.zeros((9, 2)), np.zeros(9)
    for i in range(1, 10):
        middle = (inner[i] + inner[20 - i]) / 2
        reach = max(
            0.03 * unit, min(0.75 * abs((outer[20 - i] - outer[i]) @ down) / 2, 0.11 * unit)
        )
        at = np.linspace(-reach, reach, steps)
        line = middle + at[:, None] * down
        x = np.ascontiguousarray(line[None, :, 0], np.float32)
        y = np.ascontiguousarray(line[None, :, 1], np.float32)
        light = cv2.remap(grey, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]
        # Near what the mesh has, the darkest place.
        near = np.abs(at) < 0.5 * abs(gaps[i - 1]) * unit + 0.02 * unit
        low = int(np.argmin(np.where(near, light, 1e9)))
        # How dark it is against the lips just above and below it.
        beside = max(2, round(0.05 * unit / (2 * reach) * steps))
        above, below = light[max(0, low - beside)], light[min(steps - 1, low + beside)]
        edge = light[low] + 0.4 * max(2.0, float(min(above, below) - light[low]))
        first, last = low, low
        while first > 0 and light[first - 1] < edge:
            first -= 1
        while last < steps - 1 and light[last + 1] < edge:
            last += 1
        seams[i - 1] = line[first] * 0.5 + line[last] * 0.5
        bands[i - 1] = (at[last] - at[first]) / unit
    if np.median(bands[2:7]) > 0.045 or shows_teeth(picture, inner, outer):
        return inner, shows_teeth(picture, inner, outer)
    # A smooth seam from corner to corner, near where the mesh has it.
    place = np.linspace(-1, 1, 11)[1:-1]
    middles = np.stack([(inner[i] + inner[20 - i]) / 2 for i in range(1, 10)])
    offset = np.clip((seams - middles) @ down, -0.03 * unit, 0.03 * unit)
    basis = np.stack([np.ones(9), place, place**2, place**4], 1)
    fitted = basis @ np.linalg.lstsq(basis, offset, rcond=None)[0]
    seam = middles + (fitted * (1 - place**6))[:, None] * down
    inner[1:10] = seam
    inner[11:20] = seam[::-1]
    return inner, False


def _apart(one: Detection, other: Detection) -> bool:
    ax1, ay1, ax2, ay2 = one.box
    bx1, by1, bx2, by2 = other.box
    wide, tall = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    if wide <= 0 or tall <= 0:
        return True
    least = min((ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1))
    return wide * tall < 0.35 * least


def _frame(points: Float64) -> tuple[tuple[float, float], float, float]:
    """Centre, side and angle of the crop that the mesh network wants around a known mesh."""
    axis = points[263, :2] - points[33, :2]
    angle = math.atan2(axis[1], axis[0])
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    flat = points[:, :2] @ turn.T
    low, high = flat.min(0), flat.max(0)
    x, y = ((low + high) / 2) @ turn
    return (float(x), float(y)), 1.5 * float((high - low).max()), angle


def _warp(centre: tuple[float, float], side: float, angle: float, size: int) -> Float64:
    scale = size / side
    c, s = math.cos(angle) * scale, math.sin(angle) * scale
    x, y = centre
    return np.array([[c, s, size / 2 - c * x - s * y], [-s, c, size / 2 + s * x - c * y]])


def _crop(picture: UInt8, warp: Float64, size: int) -> UInt8:
    scale = float(np.linalg.norm(warp[0, :2]))
    if scale < 0.5:
        # Averaged first, so that nothing is skipped.
        less = 1 / math.ceil(0.5 / scale)
        picture = np.asarray(
            cv2.resize(picture, None, fx=less, fy=less, interpolation=cv2.INTER_AREA), np.uint8
        )
        warp = warp @ np.array([[1 / less, 0, 0], [0, 1 / less, 0], [0, 0, 1]])
    out = cv2.warpAffine(
        picture, warp, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(out, np.uint8)


def _network(path: Any) -> Any:
    """A TFLite file in OpenCV; its newer engine would see only one of several outputs."""
    read: Any = cv2.dnn.readNetFromTFLite
    classic = getattr(cv2.dnn, "ENGINE_CLASSIC", None)
    try:
        return read(str(path)) if classic is None else read(str(path), engine=classic)
    except cv2.error as error:
        raise ConfigError(
            f"the face model {path} can't be read by OpenCV {cv2.__version__}: remove it, so that "
            f"it is fetched again ({error.err})"
        ) from None


def _forward(
    network: Any, picture: npt.NDArray[Any], names: Sequence[str] | None
) -> list[npt.NDArray[Any]]:
    """Outputs for one (H, W, 3) picture of numbers."""
    network.setInput(np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32))
    wanted = names if names is not None else network.getUnconnectedOutLayersNames()
    return [np.array(one) for one in network.forward(list(wanted))]


def anchors() -> Float64:
    """(896, 2): centres of the short-range detector's cells: 16 x 16 twice, 8 x 8 six times."""
    out = []
    for cells, each in ((16, 2), (8, 6)):
        y, x = np.mgrid[0:cells, 0:cells]
        centre = np.stack([(x + 0.5) / cells, (y + 0.5) / cells], -1).reshape(-1, 2)
        out.append(np.repeat(centre, each, 0))
    return np.concatenate(out)


class FaceFinder:
    """For engines that look through a clip: landmarks as a persona's YAML has them, and how many
    other faces there are; None where no face is.

    The networks are brought and read at the first picture; TransportError when they can't be had.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._mesh: FaceMesh | None = None
        self._lock = threading.Lock()

    def __call__(
        self, picture: UInt8, at: tuple[float, float] | None = None
    ) -> tuple[dict[str, Any], int] | None:
        with self._lock:
            if self._mesh is None:
                self._mesh = FaceMesh(face_models(self._settings))
            try:
                found = self._mesh.find(picture, at)
            except AvatarError:
                return None
            return found.landmarks(), len(found.others)
