"""From a portrait and its landmarks to a rig: all that is needed to draw it moving. Done once.

The motion of the lips is a sum of smooth fields, one a mouth parameter, each a thin-plate spline
(F. L. Bookstein, "Principal Warps", 1989) through a few dozen points, for two layers of the same
picture: what the upper lip carries, and what lower lip and jaw carry. The head turns by the
parallax of a rounded depth map. Shut eyes and the inside of the mouth, which the portrait does not
show, are painted in its own colours.

Everything is in pixels of the prepared picture, x right, y down, unless it says "face units":
then the unit is the distance between the outer corners of the eyes, the origin the middle of the
mouth, and x runs along the mouth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, cast

import cv2
import numpy as np
import numpy.typing as npt

from ..errors import AvatarError, ConfigError
from ..media import Float32, UInt8

Float64: TypeAlias = npt.NDArray[np.float64]

MOUTH = ("jaw", "width", "round", "press", "tuck", "teeth", "tongue", "shut", "oval")
"""The mouth's motions. `shut` closes lips that the portrait shows apart, `oval` is what rounding
does to an opening; the rest is named as in `articulation.PARAMETERS`."""

HEAD = ("yaw", "pitch", "roll", "sway", "lift", "brow")
"""The head's motions: radians, radians, radians, face units, face units, 0 to 1."""

BLINKS = 12
"""Steps from an open eye to a shut one."""

JAW = 0.165
"""How far the lower lip drops at `jaw` 1, in face units."""


# --- landmarks ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Eye:
    """One eye: lid edges from its left to its right corner, and the iris."""

    upper: Float64
    lower: Float64
    iris: Float64
    """(cx, cy, r)"""


@dataclass(frozen=True, slots=True)
class Landmarks:
    """Where a face is in a picture. Shapes are (points, 2)."""

    outer_lips: Float64
    inner_lips: Float64
    left_eye: Eye
    right_eye: Eye
    left_brow: Float64
    right_brow: Float64
    nose: Float64
    """bridge, tip, base, left wing, right wing"""
    jaw: Float64
    forehead: Float64
    """(2,)"""

    @property
    def unit(self) -> float:
        """Distance of the outer corners of the eyes."""
        return float(np.linalg.norm(self.right_eye.upper[-1] - self.left_eye.upper[0]))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the face."""
        points = np.vstack([self.jaw, self.forehead[None]])
        low, high = points.min(0), points.max(0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    def moved(self, scale: float, shift: Sequence[float]) -> Landmarks:
        """The same face in a picture that was scaled, then shifted. Pixel centres are kept."""
        offset = np.asarray(shift, np.float64)

        def move(points: Float64) -> Float64:
            return (points + 0.5) * scale - 0.5 + offset

        def move_eye(eye: Eye) -> Eye:
            iris = np.append(move(eye.iris[:2]), eye.iris[2] * scale)
            return Eye(move(eye.upper), move(eye.lower), iris)

        return Landmarks(
            outer_lips=move(self.outer_lips),
            inner_lips=move(self.inner_lips),
            left_eye=move_eye(self.left_eye),
            right_eye=move_eye(self.right_eye),
            left_brow=move(self.left_brow),
            right_brow=move(self.right_brow),
            nose=move(self.nose),
            jaw=move(self.jaw),
            forehead=move(self.forehead),
        )


def parse_landmarks(value: object) -> Landmarks:
    """Landmarks from a persona's YAML; ConfigError names the key that is wrong."""
    top = _mapping(value, "landmarks")
    known = {field.name for field in fields(Landmarks)}
    for key in top:
        if key not in known:
            raise ConfigError(f"landmarks.{key} is not known: use {', '.join(sorted(known))}")
    eyes = {}
    for side in ("left_eye", "right_eye"):
        eye = _mapping(_need(top, side, "landmarks"), f"landmarks.{side}")
        iris = _numbers(_need(eye, "iris", f"landmarks.{side}"), f"landmarks.{side}.iris", (3,))
        eyes[side] = Eye(
            _points(eye, "upper", f"landmarks.{side}", 7),
            _points(eye, "lower", f"landmarks.{side}", 7),
            iris,
        )
    nose = _mapping(_need(top, "nose", "landmarks"), "landmarks.nose")
    forehead = _numbers(_need(top, "forehead", "landmarks"), "landmarks.forehead", (2,))
    marks = Landmarks(
        outer_lips=_points(top, "outer_lips", "landmarks", 20, exact=True),
        inner_lips=_points(top, "inner_lips", "landmarks", 20, exact=True),
        left_eye=eyes["left_eye"],
        right_eye=eyes["right_eye"],
        left_brow=_points(top, "left_brow", "landmarks", 5),
        right_brow=_points(top, "right_brow", "landmarks", 5),
        nose=np.stack(
            [
                _numbers(_need(nose, part, "landmarks.nose"), f"landmarks.nose.{part}", (2,))
                for part in ("bridge", "tip", "base", "left", "right")
            ]
        ),
        jaw=_points(top, "jaw", "landmarks", 15),
        forehead=forehead,
    )
    _check_order(marks)
    return marks


def _check_order(marks: Landmarks) -> None:
    for key, left, right in (
        ("outer_lips", marks.outer_lips[0], marks.outer_lips[10]),
        ("inner_lips", marks.inner_lips[0], marks.inner_lips[10]),
        ("left_eye.upper", marks.left_eye.upper[0], marks.left_eye.upper[-1]),
        ("right_eye.upper", marks.right_eye.upper[0], marks.right_eye.upper[-1]),
        ("jaw", marks.jaw[0], marks.jaw[-1]),
    ):
        if right[0] - left[0] < 4:
            raise ConfigError(f"landmarks.{key} must run from left to right as seen in the picture")
    if not (
        marks.left_eye.iris[1] < marks.nose[2, 1] < marks.inner_lips[:, 1].mean()
        and marks.inner_lips[:, 1].mean() < marks.jaw[len(marks.jaw) // 2, 1]
    ):
        raise ConfigError(
            "landmarks are out of order: from top to bottom come eyes, nose.base, lips and the chin"
            " (the middle point of jaw); the face must be upright"
        )


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping")
    return cast("Mapping[str, object]", value)


def _need(value: Mapping[str, object], key: str, where: str) -> object:
    if key not in value:
        raise ConfigError(f"{where}.{key} is missing")
    return value[key]


def _numbers(value: object, where: str, shape: tuple[int, ...]) -> Float64:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.shape != shape or not np.isfinite(array).all():
        raise ConfigError(f"{where} must be {shape[-1]} numbers")
    return array


def _points(
    value: Mapping[str, object], key: str, where: str, count: int, *, exact: bool = False
) -> Float64:
    entry = _need(value, key, where)
    try:
        array = np.asarray(entry, np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.ndim != 2 or array.shape[1] != 2 or not np.isfinite(array).all():
        raise ConfigError(f"{where}.{key} must be a list of [x, y]")
    if len(array) < count or (exact and len(array) != count):
        least = "" if exact else "at least "
        raise ConfigError(f"{where}.{key} must hold {least}{count} points, not {len(array)}")
    return array


# --- small mathematics ----------------------------------------------------------------------------


def smoothstep(x: Any) -> Any:
    """0 below 0, 1 above 1, smooth between."""
    x = np.clip(x, 0.0, 1.0)
    return x * x * (3.0 - 2.0 * x)


def spline_field(points: Float64, values: Float64, where: Float64) -> Float64:
    """Thin-plate spline through `values` (n, m) at `points` (n, 2), evaluated at `where` (k, 2)."""
    count = len(points)
    system = np.zeros((count + 3, count + 3))
    system[:count, :count] = _plate(points, points)
    system[:count, :count] += np.eye(count) * 1e-5
    system[:count, count] = 1.0
    system[:count, count + 1 :] = points
    system[count:, :count] = system[:count, count:].T
    right = np.zeros((count + 3, values.shape[1]))
    right[:count] = values
    weights = np.linalg.solve(system, right)
    out = np.empty((len(where), values.shape[1]))
    for start in range(0, len(where), 8192):
        part = where[start : start + 8192]
        out[start : start + 8192] = (
            _plate(part, points) @ weights[:count] + weights[count] + part @ weights[count + 1 :]
        )
    return out


def _plate(a: Float64, b: Float64) -> Float64:
    square = np.maximum(((a[:, None, :] - b[None, :, :]) ** 2).sum(-1), 1e-12)
    return cast(Float64, 0.5 * square * np.log(square))


def curve(points: Float64, count: int) -> Float64:
    """`count` points along a smooth curve (Catmull-Rom) through `points`."""
    ends = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    t = np.linspace(0, len(points) - 1, count)
    i = np.minimum(t.astype(int), len(points) - 2)
    u = (t - i)[:, None]
    a, b, c, d = ends[i], ends[i + 1], ends[i + 2], ends[i + 3]
    return cast(
        Float64,
        b + 0.5 * u * (c - a + u * (2 * a - 5 * b + 4 * c - d + u * (3 * (b - c) + d - a))),
    )


def double(plane: UInt8, boost: float = 0.0) -> UInt8:
    """Twice the size; sample (2i, 2j) is exactly the old (i, j), the rest is Lanczos between.

    With `boost` the samples between are sharper than that, to make up for what is lost when
    pixels are fetched from between samples; see `boost_for`.
    """
    if boost:
        fine = double(plane).astype(np.float32)
        soft = double(np.asarray(cv2.GaussianBlur(plane, (0, 0), 0.8), np.uint8)).astype(np.float32)
        sharp = np.clip(np.rint(fine + boost * (fine - soft)), 0, 255).astype(np.uint8)
        sharp[::2, ::2] = plane
        return sharp
    height, width = plane.shape[:2]
    x = np.arange(width * 2, dtype=np.float32) / 2
    y = np.arange(height * 2, dtype=np.float32) / 2
    return cast(
        UInt8,
        cv2.remap(
            plane,
            np.ascontiguousarray(np.broadcast_to(x, (height * 2, width * 2))),
            np.ascontiguousarray(np.broadcast_to(y[:, None], (height * 2, width * 2))),
            cv2.INTER_LANCZOS4,
            borderMode=cv2.BORDER_REPLICATE,
        ),
    )


_PHASES = ((0.25, 0.25), (0.5, 0.5), (0.5, 0), (0, 0.5), (0.25, 0.75), (0.75, 0.5), (0.1, 0.9))


def boost_for(luma: UInt8) -> float:
    """The boost of `double` with which a picture that is moved by parts of a pixel stays, on
    average, nearly as sharp and as grainy as it is: by the variance of its Laplacian."""

    def sharpness(picture: UInt8) -> float:
        found = cv2.Laplacian(picture, cv2.CV_32F)
        return float(found[2:-2, 2:-2].var())

    height, width = luma.shape
    x = np.arange(width, dtype=np.float32) * 2
    y = np.arange(height, dtype=np.float32)[:, None] * 2
    still = sharpness(luma)
    best = 0.0
    for boost in (0.0, 0.1, 0.2, 0.3, 0.4):
        fine = double(luma, boost)
        found = [
            sharpness(_pull_8(fine, np.broadcast_to(x + 2 * a, luma.shape), y + 2 * b))
            for a, b in _PHASES
        ]
        best = boost
        if np.mean(found) >= 0.95 * still:
            break
    return best


def _pull_8(picture: UInt8, x: Any, y: Any) -> UInt8:
    x, y = np.broadcast_arrays(x, y)
    x, y = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(y, np.float32)
    return cast(UInt8, cv2.remap(picture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))


def luma_chroma(bgr: npt.NDArray[Any]) -> tuple[Float32, Float32]:
    """Luma (h, w) and chroma (h, w, 2) of BGR 0..255, BT.601 limited range, not rounded."""
    blue, green, red = (bgr[..., i].astype(np.float32) for i in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    u = (blue - luma) * np.float32(224 / 255 * 0.5 / (1 - 0.114)) + 128
    v = (red - luma) * np.float32(224 / 255 * 0.5 / (1 - 0.299)) + 128
    return luma * np.float32(219 / 255) + 16, np.stack([u, v], -1)


def to_i420(bgr: UInt8) -> UInt8:
    """A whole picture, even in width and height; chroma is the mean of its four pixels."""
    height, width = bgr.shape[:2]
    luma, chroma = luma_chroma(bgr)
    small = cv2.resize(chroma, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    out = np.empty((height * 3 // 2, width), np.uint8)
    out[:height] = np.rint(luma)
    out[height:].reshape(2, height // 2, width // 2)[:] = np.rint(small).transpose(2, 0, 1)
    return out


# --- what is prepared -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rig:
    """Everything that drawing needs, and nothing else. Boxes are (x, y, width, height)."""

    image: UInt8
    """The portrait, I420."""
    boost: Float32
    """(): what `double` is to be told of the luma."""
    region: npt.NDArray[np.int32]
    """No pixel outside this box ever changes. Multiples of 4."""
    head: Float32
    """(len(HEAD), h/4 + 2, w/4 + 2, 2): backward motion on a quarter grid of the region, which
    begins two half-resolution samples outside of it."""
    mouth_box: npt.NDArray[np.int32]
    """The part of the region that mouth parameters move. Multiples of 4."""
    mouth: Float32
    """(len(MOUTH), 2, h/2, w/2, 2): forward motion of the upper and the lower layer."""
    ring: Float32
    """(20, 2): the inner lips at rest."""
    ring_motion: Float32
    """(len(MOUTH), 20, 2)"""
    frame: Float32
    """(2, 2): origin and x axis (one face unit long) of the mouth."""
    teeth: UInt8
    """(5, h, w, 4): hollow, tongue, lower teeth, upper teeth as Y U V alpha; see `INNER`. The last
    is what the portrait itself shows between its lips, if that is teeth: then they are used as they
    are, in place of painted ones."""
    lid_boxes: npt.NDArray[np.int32]
    """(2, 4): the boxes of the eyes, multiples of 4."""
    left_luma: UInt8
    """(BLINKS, 2h, 2w): the left eye's luma at twice the resolution, closing."""
    left_chroma: UInt8
    """(BLINKS, h/2, w/2, 2)"""
    right_luma: UInt8
    right_chroma: UInt8
    irises: Float32
    """(2, 4): x, y, radius of each iris, and how far it may move, in pixels; 0 where it can't."""
    gaze_boxes: npt.NDArray[np.int32]
    """(2, 4): the part of the picture in which an iris moves; multiples of 4."""
    left_ball_luma: Float32
    """(5, 2h, 2w): the white of the eye, how much the iris covers (0 to 1), the iris times that,
    what the light that is reflected in it adds, and the eye as it is in the portrait; luma at twice
    the resolution."""
    left_ball_chroma: Float32
    """(5, h/2, w/2, 2): the same, less 128."""
    left_seen: UInt8
    """(BLINKS + 1, 2h, 2w): how much of the eyeball is seen, 0 to 255, at every step of a blink."""
    right_ball_luma: Float32
    right_ball_chroma: Float32
    right_seen: UInt8
    alpha: UInt8
    """(h, w): how much of a pixel is the person, where something else is to be behind; then `image`
    holds the person's colours alone. (0, 0) without that."""
    behind: UInt8
    """What is behind, I420; (0, 0) without that."""


INNER = (-0.36, -0.12, 0.72, 0.48)
"""What the inner-mouth layers cover, in face units from the seam: x, y, width, height."""


def _even(ring: Float64) -> Float64:
    """Twenty lip points at even distances along the mouth, whatever the spacing they came in."""
    start, end = ring[0], ring[10]
    length = float(np.linalg.norm(end - start))
    turn = np.stack([end - start, [start[1] - end[1], end[0] - start[0]]]) / length
    edges = []
    for points in (ring[0:11], ring[np.r_[0, 19:10:-1, 10]]):
        line = curve(points, 400) @ turn.T
        along = np.maximum.accumulate(line[:, 0] + np.arange(400) * 1e-7)
        even = np.linspace(along[0], along[-1], 11)
        edges.append(np.stack([even, np.interp(even, along, line[:, 1])], -1) @ turn)
    upper, lower = edges
    return np.vstack([upper, lower[9:0:-1]])


def build(bgr: UInt8, marks: Landmarks, motion: float) -> Rig:
    """The rig of a picture (even height and width). `motion` scales the head's, 0 for none.

    AvatarError when the face can't be used as it lies in the picture.
    """
    height, width = bgr.shape[:2]
    _check_face(marks, width, height)
    marks = replace(marks, inner_lips=_even(marks.inner_lips), outer_lips=_even(marks.outer_lips))
    frame = _mouth_frame(marks)
    mouth_box, mouth, ring_motion = _mouth_fields(marks, frame, width, height)
    region, head = _head_fields(marks, frame, mouth_box, width, height, motion)
    boxes, lumas, chromas, seens, balls = [], [], [], [], []
    image = to_i420(bgr)
    left, top, right, bottom = (round(v) for v in marks.box)
    face = planes(image)[0][max(0, top) : bottom, max(0, left) : right]
    boost = boost_for(np.ascontiguousarray(face))
    for eye, brow in ((marks.left_eye, marks.left_brow), (marks.right_eye, marks.right_brow)):
        box, luma, chroma, seen = _lids(bgr, image, marks, eye, brow, boost)
        boxes.append(box)
        lumas.append(luma)
        chromas.append(chroma)
        seens.append(seen)
    eyes = marks.left_eye, marks.right_eye
    for eye, box, seen, iris in zip(eyes, boxes, seens, _limbi(bgr, *eyes), strict=True):
        balls.append(_eyeball(bgr, marks.unit, replace(eye, iris=np.array(iris)), box, seen))
    return Rig(
        image=image,
        boost=np.asarray(boost, np.float32),
        region=np.asarray(region, np.int32),
        head=head,
        mouth_box=np.asarray(mouth_box, np.int32),
        mouth=mouth,
        ring=marks.inner_lips.astype(np.float32),
        ring_motion=ring_motion,
        frame=frame.astype(np.float32),
        teeth=_inner_layers(bgr, marks, frame),
        lid_boxes=np.asarray(boxes, np.int32),
        left_luma=lumas[0],
        left_chroma=chromas[0],
        right_luma=lumas[1],
        right_chroma=chromas[1],
        irises=np.asarray([ball.iris for ball in balls], np.float32),
        gaze_boxes=np.asarray([ball.box for ball in balls], np.int32),
        left_ball_luma=balls[0].luma,
        left_ball_chroma=balls[0].chroma,
        left_seen=balls[0].seen,
        right_ball_luma=balls[1].luma,
        right_ball_chroma=balls[1].chroma,
        right_seen=balls[1].seen,
        alpha=np.zeros((0, 0), np.uint8),
        behind=np.zeros((0, 0), np.uint8),
    )


def _check_face(marks: Landmarks, width: int, height: int) -> None:
    unit = marks.unit
    if unit < 40:
        raise AvatarError(
            f"the face is too small: the eyes' outer corners are {unit:.0f} pixels apart in the"
            f" picture of {width}x{height}, 40 are needed: use a closer portrait"
        )
    low_x, low_y, high_x, high_y = marks.box
    if low_x < 0 or low_y < -unit or high_x > width - 1 or high_y > height - 1:
        raise AvatarError(
            "the face reaches out of the picture: check that the landmarks are pixels of this"
            " portrait file, or use a portrait with more room around the face"
        )


def _mouth_frame(marks: Landmarks) -> Float64:
    left, right = marks.inner_lips[0], marks.inner_lips[10]
    axis = (right - left) / np.linalg.norm(right - left)
    return np.stack([(left + right) / 2, axis * marks.unit])


def _box(
    left: float, top: float, right: float, bottom: float, width: int, height: int
) -> tuple[int, int, int, int]:
    """The box in multiples of 4, inside the picture."""
    x, y = (max(0, math.floor(v / 4) * 4) for v in (left, top))
    far_x = min(width // 4 * 4, math.ceil(right / 4) * 4)
    far_y = min(height // 4 * 4, math.ceil(bottom / 4) * 4)
    return x, y, far_x - x, far_y - y


def grid_nodes(box: tuple[int, int, int, int], step: int, pad: int = 0) -> Float64:
    """(h, w, 2): picture positions of a grid whose every sample stands for step x step pixels."""
    x, y, width, height = box
    columns = x + (np.arange(-pad, width // step + pad) + 0.5) * step - 0.5
    rows = y + (np.arange(-pad, height // step + pad) + 0.5) * step - 0.5
    return np.stack(np.meshgrid(columns, rows), -1)


# --- the mouth's motion ---------------------------------------------------------------------------


def _lip_motion(x: float, half: float, *, lower: bool, outer: bool, thick: float) -> Float64:
    """(len(MOUTH), 2) in face units: how a point of a lip's edge moves, by its place along it."""
    t = float(np.clip(x / half, -1, 1))
    middle = 1 - t * t
    corner = abs(t) ** 3
    out = dict.fromkeys(MOUTH, (0.0, 0.0))
    if lower:
        shape = middle ** (0.8 if outer else 1.05)
        drop = JAW * (0.14 + 0.86 * shape) * (0.96 if outer else 1.0)
        out["jaw"] = (-0.036 * t, drop)
        out["width"] = (0.052 * t, -0.016 * corner - (0.010 * middle if outer else 0.0))
        out["round"] = (-0.30 * x, 0.022 * middle if outer else 0.0)
        out["press"] = (0.0, -0.20 * thick if outer else 0.0)
        out["tuck"] = (0.0, (-0.026 if outer else -0.004) * middle)
        out["teeth"] = (0.012 * t, 0.034 * middle if outer else 0.040 * middle**1.1)
        out["tongue"] = (0.0, 0.016 * middle)
        out["oval"] = (0.0, 0.010 * middle if outer else 0.014 * middle**0.6)
    else:
        out["jaw"] = (-0.036 * t, JAW * 0.14 * corner - (0.014 if outer else 0.020) * middle)
        out["width"] = (0.052 * t, -0.016 * corner + (0.008 * middle if outer else 0.0))
        out["round"] = (-0.30 * x, -0.016 * middle if outer else 0.0)
        out["press"] = (0.0, 0.16 * thick if outer else 0.0)
        out["tuck"] = (0.0, (-0.018 if outer else -0.028) * middle**1.1)
        out["teeth"] = (0.012 * t, (-0.012 if outer else -0.018) * middle**1.1)
        out["tongue"] = (0.0, -0.004 * middle)
        out["oval"] = (0.0, -0.014 * middle if outer else -0.024 * middle**0.6)
    return np.asarray([out[name] for name in MOUTH])


def _mouth_fields(
    marks: Landmarks, frame: Float64, width: int, height: int
) -> tuple[tuple[int, int, int, int], Float32, Float32]:
    unit = marks.unit
    axis = frame[1] / unit
    turn = np.stack([axis, [-axis[1], axis[0]]])  # rows: the mouth's x and y in the picture

    def local(points: Float64) -> Float64:
        return cast(Float64, (points - frame[0]) @ turn.T / unit)

    inner, outer = local(marks.inner_lips), local(marks.outer_lips)
    nose, jaw = local(marks.nose), local(marks.jaw)
    half_in = (inner[10, 0] - inner[0, 0]) / 2
    half_out = (outer[10, 0] - outer[0, 0]) / 2
    upper_edge, lower_edge = inner[0:11], np.vstack([inner[10:], inner[:1]])[::-1]
    gap = np.maximum(0.0, lower_edge[:, 1] - upper_edge[:, 1])
    thick_up = float(np.median(upper_edge[3:8, 1]) - np.median(outer[3:8, 1]))
    thick_low = float(np.median(outer[13:18, 1]) - np.median(lower_edge[3:8, 1]))

    points: dict[bool, list[Float64]] = {False: [], True: []}
    values: dict[bool, list[Float64]] = {False: [], True: []}
    shut = MOUTH.index("shut")
    ring_motion = np.zeros((len(MOUTH), 20, 2))

    def place(lower: bool, point: Float64, value: Float64) -> None:
        points[lower].append(point)
        values[lower].append(value)

    for lower in (False, True):
        thick = max(0.02, thick_low if lower else thick_up)
        for i in range(20):
            is_lower = i > 10
            corner = i in (0, 10)
            edge = _lip_motion(inner[i, 0], half_in, lower=lower, outer=False, thick=thick)
            rim = _lip_motion(outer[i, 0], half_out, lower=lower, outer=True, thick=thick)
            column = i if i <= 10 else 20 - i
            edge[shut, 1] = gap[column] * (-0.5 if lower else 0.5)
            rim[shut, 1] = 0.6 * edge[shut, 1]
            if corner:
                rim = edge.copy()
            if corner or lower == is_lower:
                # The layer's own lip.
                place(lower, inner[i], edge)
                place(lower, outer[i], rim)
                ring_motion[:, i] = edge
            else:
                # The other lip's place: carried along rigidly, so that the motion, which is
                # inverted by iteration, changes slowly wherever a layer's pixels come from.
                place(lower, np.array([outer[i, 0], outer[i, 1]]), edge)
        # Mouth corners reach into the cheeks.
        for side in (-1.0, 1.0):
            for reach, share in ((0.10, 0.62), (0.24, 0.22)):
                value = _lip_motion(side * half_out, half_out, lower=True, outer=False, thick=thick)
                value[MOUTH.index("round"), 0] *= 0.8
                value[:, 0] *= share
                value[:, 1] *= share
                value[MOUTH.index("jaw"), 1] = JAW * (0.10 if reach < 0.2 else 0.09)
                place(lower, np.array([side * (half_out + reach), inner[:, 1].mean()]), value)
        still = np.zeros((len(MOUTH), 2))
        # The nose and the cheeks beside it stay.
        for point in (nose[2], nose[3], nose[4], nose[1]):
            place(lower, point, still)
        for side in (-1.0, 1.0):
            for reach in (0.45, 0.75):
                place(lower, np.array([side * reach, nose[2, 1]]), still)
        # The jaw turns about the ears: the nearer the chin, the further it drops.
        ear, chin = (jaw[0, 1] + jaw[-1, 1]) / 2, jaw[len(jaw) // 2, 1]
        centre = np.array([jaw[len(jaw) // 2, 0], (ear + chin) / 2 - 0.1])
        for point in jaw:
            share = float(np.clip((point[1] - ear) / (chin - ear), 0, 1))
            value = np.zeros((len(MOUTH), 2))
            value[MOUTH.index("jaw")] = (0.0, 0.80 * JAW * share**2.2)
            value[MOUTH.index("tuck")] = (0.0, -0.008 * share**3)
            value[MOUTH.index("press")] = (0.0, -0.008 * share**3)
            place(lower, point, value)
            away = (point - centre) / np.linalg.norm(point - centre)
            if abs(away[0]) > 0.45:
                # Hair, collar and background beside the face stay.
                place(lower, point + 0.13 * away, 0.22 * value)
                place(lower, point + 0.26 * away, still)
        for side in (-1.0, 1.0):
            for x, y in ((0.62, 0.05), (0.62, 0.35), (0.95, 0.0), (0.95, 0.45)):
                place(lower, np.array([centre[0] + side * x, chin + y]), still)
        # The throat folds up under the chin.
        for x in (-0.3, -0.15, 0.0, 0.15, 0.3):
            for reach, share in ((0.17, 0.30), (0.31, 0.07), (0.46, 0.0)):
                value = np.zeros((len(MOUTH), 2))
                value[MOUTH.index("jaw")] = (0.0, JAW * share * (1 - 1.6 * abs(x)))
                place(lower, np.array([jaw[len(jaw) // 2, 0] + x, chin + reach]), value)

    low, high = marks.jaw.min(0), marks.jaw.max(0)
    box = _box(
        low[0] - 0.16 * unit,
        float(marks.nose[1, 1]) - 0.06 * unit,
        high[0] + 0.16 * unit,
        high[1] + 0.56 * unit,
        width,
        height,
    )
    nodes = grid_nodes(box, 2)
    where = local(nodes.reshape(-1, 2))
    window = _window(nodes, box, 0.16 * unit)
    fields_out = np.empty((len(MOUTH), 2, *nodes.shape[:2], 2), np.float32)
    for lower in (False, True):
        flat = np.stack(values[lower]).reshape(len(values[lower]), -1)
        found = spline_field(np.stack(points[lower]), flat, where)
        motion = found.reshape(*nodes.shape[:2], len(MOUTH), 2) @ turn * unit
        fields_out[:, int(lower)] = (motion * window[..., None, None]).transpose(2, 0, 1, 3)
    return box, fields_out, (ring_motion @ turn * unit).astype(np.float32)


def _window(nodes: Float64, box: tuple[int, int, int, int], soft: float) -> Float64:
    """1 inside, falling smoothly to 0 at the box's edge."""
    x, y, width, height = box
    near = np.minimum(
        np.minimum(nodes[..., 0] - x - 1, x + width - 2 - nodes[..., 0]),
        np.minimum(nodes[..., 1] - y - 1, y + height - 2 - nodes[..., 1]),
    )
    return cast(Float64, smoothstep(near / soft))


# --- the head's motion ----------------------------------------------------------------------------


def _head_fields(
    marks: Landmarks,
    frame: Float64,
    mouth_box: tuple[int, int, int, int],
    width: int,
    height: int,
    motion: float,
) -> tuple[tuple[int, int, int, int], Float32]:
    """Backward motion of the whole head: a rounded depth that turns, and a mask that shifts it."""
    unit = marks.unit
    left, top, right, chin = marks.box
    crown = top - 0.45 * unit  # the hair
    centre = np.array([(left + right) / 2, (crown + chin) / 2])
    radius = np.array([(right - left) / 2 + 0.18 * unit, (chin - crown) / 2 + 0.05 * unit])
    soft = 0.62 * unit
    if motion > 0:
        box = _box(
            centre[0] - radius[0] - soft,
            crown - soft,
            centre[0] + radius[0] + soft,
            chin + 1.0 * unit,
            width,
            height,
        )
    else:
        eyes = np.vstack([marks.left_brow, marks.right_brow, marks.left_eye.lower])
        eyes = np.vstack([eyes, marks.right_eye.lower, marks.left_eye.upper])
        x, y, w, h = mouth_box
        box = _box(
            min(x, eyes[:, 0].min() - 0.2 * unit),
            min(y, eyes[:, 1].min() - 0.2 * unit),
            max(x + w, eyes[:, 0].max() + 0.2 * unit),
            y + h,
            width,
            height,
        )
    nodes = grid_nodes(box, 4, pad=1)
    offset = nodes - centre
    distance = np.sqrt(((offset / radius) ** 2).sum(-1))
    # Depth: a ball, with the nose upon it, that flattens towards the outline.
    ball = np.sqrt(np.clip(1 - np.minimum(distance, 1) ** 2, 0, 1)) * smoothstep(
        (1.04 - distance) / 0.35
    )
    tip = marks.nose[1]
    nose = np.exp(-(((nodes - tip) / (0.17 * unit)) ** 2).sum(-1))
    depth = 0.62 * ball + 0.16 * nose
    depth = cv2.GaussianBlur(depth, (0, 0), 0.035 * unit)

    beyond = np.maximum(distance - 1, 0) * radius.min() / soft
    mask = 1 - smoothstep(beyond / 0.98)
    # Below the chin the neck turns less and less, to nothing at the shoulders.
    below = np.clip((nodes[..., 1] - (chin - 0.15 * unit)) / (0.95 * unit), 0, 1)
    mask = mask * (1 - smoothstep(below))
    edge = _window(nodes, box, 0.25 * unit)
    # Where the picture ends there is nothing to pull in; its edge may move along itself only.
    mask, depth = mask * edge, depth * edge
    pivot = np.array([centre[0], chin + 0.35 * unit])

    zero = np.zeros_like(mask)
    arm = nodes - pivot
    brows = zero.copy()
    for brow in (marks.left_brow, marks.right_brow):
        line = curve(brow, 60)
        away = np.sqrt(((nodes[..., None, :] - line) ** 2).sum(-1).min(-1))
        brows = np.maximum(brows, np.exp(-((away / (0.075 * unit)) ** 2)))
    brows = cv2.GaussianBlur(brows, (0, 0), 0.02 * unit) * edge
    out = np.zeros((len(HEAD), *nodes.shape[:2], 2), np.float32)
    size = unit * motion
    out[0] = np.stack([depth * size, zero], -1)
    out[1] = np.stack([zero, depth * size], -1)
    out[2] = np.stack([-arm[..., 1] * mask, arm[..., 0] * mask], -1) * motion
    out[3] = np.stack([mask * size, zero], -1)
    out[4] = np.stack([zero, mask * size], -1)
    out[5] = np.stack([zero, -0.035 * unit * brows], -1)
    return box, out


# --- the eyes -------------------------------------------------------------------------------------


def _lids(
    bgr: UInt8, image: UInt8, marks: Landmarks, eye: Eye, brow: Float64, boost: float
) -> tuple[tuple[int, int, int, int], UInt8, UInt8, Float32]:
    """The eye's box, its pixels for every step of a blink, and how much of the eyeball is seen
    (0 to 1, from the open eye on)."""
    height, width = bgr.shape[:2]
    unit = marks.unit
    low = np.minimum(eye.upper.min(0), eye.lower.min(0))
    high = np.maximum(eye.upper.max(0), eye.lower.max(0))
    opening = float(high[1] - low[1])
    box = _box(
        low[0] - 0.10 * unit,
        low[1] - 0.9 * opening - 0.09 * unit,
        high[0] + 0.10 * unit,
        high[1] + 0.5 * opening + 0.03 * unit,
        width,
        height,
    )
    x0, y0, box_w, box_h = box
    # Work at twice the resolution, where luma is kept.
    source = double(np.ascontiguousarray(bgr[y0 : y0 + box_h, x0 : x0 + box_w])).astype(np.float32)
    origin = np.array([x0, y0])

    def edge(points: Float64) -> tuple[Float64, Float64]:
        line = (curve(points, 200) - origin) * 2
        order = np.argsort(line[:, 0], kind="stable")
        return line[order, 0], line[order, 1]

    columns = np.arange(box_w * 2, dtype=np.float64)
    up_x, up_y = edge(eye.upper)
    low_x, low_y = edge(eye.lower)
    upper = np.interp(columns, up_x, up_y)
    lower = np.maximum(np.interp(columns, low_x, low_y), upper)
    first, last = float(up_x[0]), float(up_x[-1])
    place = (columns - first) / (last - first)  # 0 to 1 along the lid
    taper = 0.15 + 0.85 * smoothstep(np.minimum(place, 1 - place) / 0.16 + 0.35)  # at the corners
    size = 2 * unit
    rows = np.arange(box_h * 2, dtype=np.float64)[:, None]

    # The skin around the eye without lashes: a closing takes away what is dark and thin.
    brow_y = float((curve(brow, 50)[:, 1].max() - y0) * 2)
    wide, high = (max(3, round(share * size)) | 1 for share in (0.15, 0.016))
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (wide, high))
    clean = cv2.morphologyEx(source, cv2.MORPH_CLOSE, kernel, borderType=cv2.BORDER_REPLICATE)
    clean = cv2.GaussianBlur(clean, (0, 0), 0.03 * size, sigmaY=0.006 * size)
    # Above the eye that skin is all there is; the lid's own edge and the eye must not colour it.
    foot = upper - 0.016 * size
    above = np.minimum(np.broadcast_to(rows, (box_h * 2, box_w * 2)), foot[None])
    across = np.broadcast_to(columns, above.shape)
    clean = _pull(clean, across, above)
    clean = cv2.GaussianBlur(clean, (0, 0), 0.03 * size, sigmaY=0.004 * size)
    # Lashes: the darkest of the lid's own edge.
    near = []
    for shift in np.linspace(-0.012, 0.012, 7) * size:
        row = np.clip(np.rint(upper + shift), 0, box_h * 2 - 1).astype(int)
        near.append(source[row, np.arange(box_w * 2)])
    strip = np.stack(near)[:, (place > 0.1) & (place < 0.9)].reshape(-1, 3)
    lash = strip[np.argsort(strip.sum(-1))[: max(1, len(strip) // 12)]].mean(0).astype(np.float64)
    # How much darker lashes make what is above the lid's edge, by their height over it.
    long = 0.075 * size
    heights = np.arange(math.ceil(long) + 2, dtype=np.float64)[:, None]
    edge_at = upper[None] - heights
    lashes = np.maximum(
        _pull(clean, np.broadcast_to(columns, edge_at.shape), edge_at)
        - _pull(source, np.broadcast_to(columns, edge_at.shape), edge_at),
        0,
    )
    fade = smoothstep((long - heights) / (0.3 * long)) * smoothstep((edge_at - brow_y) / 6)
    # As a share of the lash's own colour.
    contrast = max(40.0, float(np.median(clean.mean(-1))) - float(lash.mean()))
    thick = lashes.mean(-1)
    lashes = np.clip(np.where(thick > 10, thick, 0) * fade / contrast, 0, 0.95)
    # Where they stand, and the skin just above them.
    thin = np.maximum(clean - source, 0).max(-1) * (rows < upper + 1) * (rows > upper - 1.2 * long)
    stand = cv2.dilate((thin > 12).astype(np.float32), np.ones((5, 5), np.uint8))
    stand = cv2.GaussianBlur(stand, (0, 0), 2.0).astype(np.float64)
    stand = stand * smoothstep((rows - brow_y) / 8)
    over = np.maximum(upper - 1.1 * long, np.minimum(brow_y + 8, foot))
    skin = _pull(clean, columns[None], over[None])
    skin = cv2.GaussianBlur(skin, (0, 0), 0.04 * size, borderType=cv2.BORDER_REPLICATE)
    shut = upper + 0.86 * (lower - upper)
    arch = np.sin(np.pi * place.clip(0, 1)) ** 0.7
    lid_top = upper - (0.40 * (lower - upper) + 0.03 * size) * arch
    luma0, chroma0 = _eye_planes(image, box, boost)
    lumas, chromas = [], []
    ends = smoothstep(np.minimum(place, 1 - place) * 12 + 0.5)
    # The eyeball is what is between the lids, but for their lashes and the wet rim of the lower.
    opening = smoothstep((rows - upper) / (0.011 * size)) * smoothstep(
        (lower - rows) / (0.009 * size) + 0.4
    )
    opening = opening * smoothstep(np.minimum(place, 1 - place) * 14)
    dark = _pull(lashes, across, (upper - rows).clip(-1, len(heights) - 1))
    opening = opening * (1 - smoothstep(dark / 0.3) * (rows < upper + 1))
    solid = _solid(source, opening, size)[..., None]
    opening = opening * (1 - solid[..., 0])
    seen = [opening]
    grain = _grain(bgr[y0 : y0 + box_h, x0 : x0 + box_w])[..., None]
    for step in range(1, BLINKS + 1):
        close = step / BLINKS
        edge_y = upper + close * (shut - upper)
        rise_y = lower + close * (shut - lower)
        # The lower lid slides up: its skin stretches.
        stretch = 0.05 * size
        t = (rows - rise_y) / np.maximum(lower + stretch - rise_y, 1e-3)
        slid = _pull(source, across, np.where(t < 1, lower + t.clip(0, 1) * stretch, rows))
        low_lid = np.clip(rows - rise_y + 0.5, 0, 1)[..., None]
        picture = source * (1 - low_lid) + slid * low_lid
        # The lid's shadow falls on the eyeball.
        under = np.clip((rows - edge_y) / (0.035 * size), 0, 1)
        eyeball = (rows > edge_y - 1) & (rows < rise_y + 1) & (place > 0) & (place < 1)
        shade = np.where(eyeball, 1 - 0.40 * close**0.5 * (1 - under) ** 2, 1.0)
        picture *= shade[..., None]
        # The lid: the skin above the eye, unfolded.
        span = np.maximum(edge_y - lid_top, 1.0)
        depth = ((rows - lid_top) / span).clip(0, 1)
        lid = _pull(clean, across, lid_top + depth * (foot - lid_top))
        lid += (skin - lid) * 0.75
        light = 1 + close * (0.05 * np.sin(np.pi * depth) - 0.05 * depth)
        light -= close * 0.03 * np.abs(2 * place.clip(0, 1) - 1) ** 2.5
        light -= close * 0.05 * np.exp(-(((rows - lid_top) / (0.014 * size)) ** 2)) * arch
        lid = lid * light[..., None] + grain
        swift = smoothstep(close * 3)
        cover = np.clip(edge_y - rows + 0.5, 0, 1) * ends * swift
        cover = cover * smoothstep((rows - lid_top) / (0.35 * (upper - lid_top) + 2))
        # Lashes that stood up are gone from where they stood.
        cover = np.maximum(cover, stand * swift)
        # Lashes: the dark line that the moving edge carries.
        thick = 0.013 * size * taper
        off = rows - edge_y
        line = np.exp(-(np.where(off < 0, off / (0.75 * thick), off / (0.95 * thick)) ** 2))
        line = line * smoothstep(np.minimum(place, 1 - place) * 16 + 0.4) * smoothstep(close * 4)
        picture = picture * (1 - cover[..., None]) + lid * cover[..., None]
        amount = 0.88 * line[..., None]
        # And the lashes themselves, which turn from pointing up to pointing down.
        turned = 1 - 1.75 * close
        height = (edge_y - rows) / (turned if abs(turned) > 0.12 else math.copysign(0.12, turned))
        hairs = _pull(lashes, across, height.clip(-1, len(heights) - 1))
        sides = smoothstep(np.minimum(place + 0.06, 1.06 - place) * 12)
        hairs = (hairs * smoothstep(height + 0.5) * sides * swift)[..., None]
        picture = picture * (1 - hairs) + lash * hairs
        picture = picture * (1 - amount) + lash * amount
        picture = picture * (1 - solid) + source * solid
        border = _window(
            grid_nodes((0, 0, box_w * 2, box_h * 2), 1), (0, 0, box_w * 2, box_h * 2), 8
        )
        seen.append(
            opening
            * (1 - low_lid[..., 0])
            * shade
            * (1 - cover)
            * (1 - hairs[..., 0])
            * (1 - amount[..., 0])
        )
        luma, chroma = luma_chroma(picture)
        old_luma, old_chroma = luma_chroma(source)
        lumas.append(np.clip(np.rint(luma0 + (luma - old_luma) * border), 16, 235))
        change = cv2.resize(
            ((chroma - old_chroma) * border[..., None]).astype(np.float32),
            (box_w // 2, box_h // 2),
            interpolation=cv2.INTER_AREA,
        )
        chromas.append(np.clip(np.rint(chroma0 + change), 16, 240))
    closing = np.stack(lumas).astype(np.uint8), np.stack(chromas).astype(np.uint8)
    return box, *closing, np.stack(seen).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Ball:
    """An eyeball's moving parts; see `Rig`."""

    iris: tuple[float, float, float, float]
    box: tuple[int, int, int, int]
    luma: Float32
    chroma: Float32
    seen: UInt8


def _eyeball(
    bgr: UInt8, unit: float, eye: Eye, lid_box: tuple[int, int, int, int], seen: Float32
) -> _Ball:
    """Takes an eye apart: the white, and upon it the iris and the light in it.

    What the portrait hides of them is made up: the white behind the iris from the white beside it,
    the iris under the lids from what is seen of it at the same distance from the pupil.
    """
    height, width = bgr.shape[:2]
    x, y, radius = (float(v) for v in eye.iris)
    low = np.minimum(eye.upper.min(0), eye.lower.min(0))
    high = np.maximum(eye.upper.max(0), eye.lower.max(0))
    reach = 1.3 * radius + 0.02 * unit
    far_x, far_y = lid_box[0] + lid_box[2], lid_box[1] + lid_box[3]
    box = _box(
        max(lid_box[0], min(low[0], x - reach)),
        max(lid_box[1], min(low[1], y - reach)),
        min(far_x, max(high[0], x + reach)),
        min(far_y, max(high[1], y + reach)),
        width,
        height,
    )
    box_x, box_y, box_w, box_h = box
    source = double(np.ascontiguousarray(bgr[box_y : box_y + box_h, box_x : box_x + box_w]))
    pixels = source.astype(np.float64)
    top, left = (box_y - lid_box[1]) * 2, (box_x - lid_box[0]) * 2
    part = seen[:, top : top + 2 * box_h, left : left + 2 * box_w]
    opening = part[0].astype(np.float64)
    columns = np.arange(box_w * 2, dtype=np.float64)
    rows = np.arange(box_h * 2, dtype=np.float64)[:, None]
    big = 2 * radius
    across, down = columns - 2 * (x - box_x), rows - 2 * (y - box_y)
    away = np.sqrt(across**2 + down**2) / big

    # The white: bright, in the opening, not of the iris.
    luma = luma_chroma(pixels)[0].astype(np.float64)
    sure = cv2.erode(opening, np.ones((3, 3))) * smoothstep((away - 1.14) / 0.06)
    bright = float(np.percentile(luma[sure > 0.8], 75)) if (sure > 0.8).sum() > 12 else 0.0
    sure = sure * smoothstep((luma - 0.70 * bright) / (0.16 * bright + 1))

    def spread(along: float, tall: float) -> tuple[Float64, Float64]:
        blur = (0.4 * big * along, 0.4 * big * tall)
        total = cv2.GaussianBlur(sure, (0, 0), blur[0], sigmaY=blur[1])
        mean = cv2.GaussianBlur(pixels * sure[..., None], (0, 0), blur[0], sigmaY=blur[1])
        return cast(Float64, mean / np.maximum(total, 1e-9)[..., None]), cast(Float64, total)

    white, weight = spread(4.0, 3.0)
    for along, tall in ((2.2, 1.0), (1.4, 0.4)):
        finer, total = spread(along, tall)
        share = smoothstep(total / 0.02)[..., None]
        white = white + (finer - white) * share

    # The iris as it is on average at each distance from its middle.
    inside = cv2.erode(opening, np.ones((3, 3))) > 0.9
    steps = np.linspace(0, 1.24, 32)
    ring = np.minimum((away / steps[1]).astype(int), len(steps) - 1)
    means = np.zeros((len(steps), 3))
    known = []
    for i in range(len(steps)):
        some = pixels[inside & (ring == i)]
        if len(some) >= 4:
            means[i] = np.median(some, 0)
            known.append(i)
    usable = len(known) >= 8 and (sure > 0.5).sum() > 0.12 * big * big
    usable = usable and float(eye.lower[:, 1].max() - eye.upper[:, 1].min()) > 0.55 * radius
    if usable:
        for c in range(3):
            means[:, c] = np.interp(np.arange(len(steps)), known, means[known, c])
        model = np.stack([np.interp(away, steps, means[:, c]) for c in range(3)], -1)
        # What is made up has the portrait's grain.
        grain = _grain(bgr[box_y : box_y + box_h, box_x : box_x + box_w])[..., None]
        white, model = white + grain, model + grain
        covered = smoothstep((1.13 - away) / 0.11)
        deep = cv2.erode(opening, np.ones((5, 5)))
        deep = smoothstep(cv2.GaussianBlur(deep, (0, 0), 0.05 * big) * 1.6 - 0.5)
        # Light in the eye: much brighter than the iris is there.
        glint = smoothstep((luma - luma_chroma(model)[0] - 34) / 30) * (away < 0.98) * deep
        glint = cv2.GaussianBlur(cv2.dilate(glint, np.ones((3, 3))), (0, 0), 0.7)
        own = np.maximum(deep, smoothstep((away - 1.06) / 0.1))[..., None]
        full = pixels * own + model * (1 - own)
        plain = full + (model - full) * glint[..., None]
        light = (full - plain) * covered[..., None]
        # Beside the iris the white is as it is, behind it as it was made up.
        behind = smoothstep((1.26 - away) / 0.14)[..., None]
        # The lids shade it at its edge.
        depth = cv2.GaussianBlur(opening, (0, 0), 0.13 * big, sigmaY=0.16 * big)
        white = white * (0.80 + 0.20 * smoothstep((depth - 0.42) / 0.45))[..., None]
        ball = pixels + (white - pixels) * behind
        usable = float(np.abs(plain - white)[(away < 0.9) & inside].mean()) > 9
    if not usable:
        covered = np.zeros_like(away)
        ball, plain, light = pixels, pixels, np.zeros_like(pixels)
    lumas, chromas = [], []
    half = (box_w // 2, box_h // 2)
    for layer, times in ((ball, None), (plain, covered), (light, None), (pixels, None)):
        bright_part, colour = luma_chroma(layer)
        colour = colour - 128
        if layer is light:  # a difference: no offset
            bright_part = bright_part - 16
        if times is not None:
            lumas.append(times)
            small = cv2.resize(times, half, interpolation=cv2.INTER_AREA)
            chromas.append(np.repeat(small[..., None], 2, -1))
            bright_part, colour = bright_part * times, colour * times[..., None]
        lumas.append(bright_part)
        chromas.append(cv2.resize(colour, half, interpolation=cv2.INTER_AREA))
    room = min(x - 0.7 * radius - low[0], high[0] - x - 0.7 * radius)
    reach = float(np.clip(room, 0, 0.8 * radius)) if usable else 0.0
    return _Ball(
        (x, y, radius, reach),
        box,
        np.stack(lumas).astype(np.float32),
        np.stack(chromas).astype(np.float32),
        np.rint(part * 255).astype(np.uint8),
    )


def noise_of(grey: Float32) -> float:
    """The deviation of a picture's noise, by J. Immerkaer, "Fast Noise Variance Estimation" (1996),
    the median in place of the mean, since edges are no noise."""
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    found = np.abs(cv2.filter2D(grey, -1, mask))[1:-1, 1:-1]
    return float(np.median(found)) / 0.6745 / 6 if found.size else 0.0


def _grain(bgr: UInt8) -> Float64:
    """Noise (2h, 2w) as fine and as strong as the picture's own, at twice its resolution."""
    grey = bgr.mean(-1, dtype=np.float32)
    strength = noise_of(grey)
    noise = np.random.default_rng(5).normal(0, strength, grey.shape).astype(np.float32)
    return cast(Float64, cv2.resize(noise, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC) * 1.0)


_GROW = np.geomspace(0.8, 1.75, 20)


def _limbi(bgr: UInt8, left: Eye, right: Eye) -> list[tuple[float, float, float]]:
    """Both irises (x, y, radius), moved to where their edge against the white is clearest; both
    larger or smaller than they were found by the same share."""
    sides = [_limbus(bgr, eye) for eye in (left, right)]
    best = int((sides[0][0] + sides[1][0]).argmax())
    out = []
    for eye, (_, middles) in zip((left, right), sides, strict=True):
        x, y = (float(v) for v in middles[best])
        out.append((x, y, float(eye.iris[2] * _GROW[best])))
    return out


def _limbus(bgr: UInt8, eye: Eye) -> tuple[Float64, Float64]:
    """How clear an iris's edge is at its best place, for every size of it; and those places."""
    x, y, radius = (float(v) for v in eye.iris)
    reach = math.ceil(3.2 * radius) + 4
    x0, y0 = max(0, round(x) - reach), max(0, round(y) - reach)
    part = np.ascontiguousarray(bgr[y0 : round(y) + reach, x0 : round(x) + reach])
    grey = cv2.GaussianBlur(part, (0, 0), max(0.6, 0.05 * radius)).mean(-1, dtype=np.float32)
    angles = np.radians(np.r_[-36:37:4, 144:217:4])
    around = np.stack([np.cos(angles), np.sin(angles)], -1)
    # How far aside; what is far from where it was found counts less.
    aside = np.stack(np.meshgrid(np.linspace(-0.24, 0.24, 13), np.linspace(-0.2, 0.2, 5)), -1)
    aside = aside.reshape(-1, 2)
    middles = np.array([x - x0, y - y0]) + aside * radius
    scores, places = [], []
    for grow in _GROW:
        rims = []
        for step in (0.12, -0.12):
            at = middles[:, None] + around * (grow * (1 + step) * radius)
            rims.append(_pull(grey, at[..., 0], at[..., 1]))
        # Both sides must have an edge, where the eye is open.
        rise = np.clip(rims[0] - rims[1], -20, 60)
        half = len(angles) // 2
        clear = np.minimum(rise[:, :half].mean(1), rise[:, half:].mean(1))
        clear -= 20 * (aside**2).sum(1) + 12 * math.log(grow) ** 2
        scores.append(clear.max())
        places.append(middles[int(clear.argmax())] + (x0, y0))
    return np.array(scores), np.array(places)


def _solid(source: Float32, opening: Float64, size: float) -> Float64:
    """Where something dark reaches into an eye's box from outside: a frame of glasses, hair, a
    brow. A blink leaves it as it is. 0 to 1."""
    luma = luma_chroma(source)[0]
    wide = max(3, round(0.17 * size)) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (wide, wide))
    skin = cv2.morphologyEx(luma, cv2.MORPH_CLOSE, kernel, borderType=cv2.BORDER_REPLICATE)
    near = max(3, round(0.055 * size)) | 1
    lashes = cv2.dilate((opening > 0.3).astype(np.uint8), np.ones((near, near), np.uint8))
    dark = ((skin - luma > 0.35 * skin) & (lashes == 0)).astype(np.uint8)
    count, names = cv2.connectedComponents(dark)
    border = np.concatenate([names[0], names[-1], names[:, 0], names[:, -1]])
    outside = np.isin(names, np.setdiff1d(np.unique(border), [0])).astype(np.uint8)
    if count < 2 or not outside.any():
        return np.zeros(luma.shape)
    # What of it runs on among the lashes, as far as it is as dark and joined to it.
    more = cv2.dilate(outside, np.ones((near, near), np.uint8)) > 0
    more &= skin - luma > 0.5 * skin
    more &= (cv2.erode(lashes, np.ones((5, 5), np.uint8)) == 0) | (outside > 0)
    grown = cv2.dilate(((outside > 0) | more).astype(np.uint8), np.ones((5, 5), np.uint8))
    return cast(Float64, cv2.GaussianBlur(grown.astype(np.float64), (0, 0), 1.2))


def _pull(picture: npt.NDArray[Any], x: Any, y: Any) -> npt.NDArray[Any]:
    """`picture` sampled at (x, y)."""
    return cast(
        "npt.NDArray[Any]",
        cv2.remap(
            picture.astype(np.float32),
            np.ascontiguousarray(x, np.float32),
            np.ascontiguousarray(y, np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        ),
    ).astype(np.float64)


def _eye_planes(
    image: UInt8, box: tuple[int, int, int, int], boost: float
) -> tuple[Float32, Float32]:
    luma, chroma = planes(image)
    x, y, width, height = box
    big = double(luma, boost)[2 * y : 2 * (y + height), 2 * x : 2 * (x + width)]
    small = chroma[:, y // 2 : (y + height) // 2, x // 2 : (x + width) // 2]
    return big.astype(np.float32), small.transpose(1, 2, 0).astype(np.float32)


def planes(image: UInt8) -> tuple[UInt8, UInt8]:
    """Views of an I420 picture: luma (h, w) and chroma (2, h/2, w/2)."""
    rows, width = image.shape
    height = rows * 2 // 3
    return image[:height], image[height:].reshape(2, height // 2, width // 2)


# --- the inner mouth ------------------------------------------------------------------------------


def _inner_layers(bgr: UInt8, marks: Landmarks, frame: Float64) -> UInt8:
    """Hollow, tongue, lower teeth and upper teeth, painted in the portrait's own colours."""
    unit = marks.unit
    axis = frame[1] / unit
    turn = np.stack([axis, [-axis[1], axis[0]]])
    inner = (marks.inner_lips - frame[0]) @ turn.T / unit
    half = float(inner[10, 0])
    lips = _colour(bgr, np.vstack([marks.outer_lips]), 50, hole=marks.inner_lips)
    lids = [np.vstack([eye.upper, eye.lower[::-1]]) for eye in (marks.left_eye, marks.right_eye)]
    whites = np.stack(
        [
            _colour(bgr, lid, 78, iris=eye.iris)
            for lid, eye in zip(lids, (marks.left_eye, marks.right_eye), strict=True)
        ]
    ).max(0)
    cheek = (marks.left_eye.lower.mean(0) + marks.outer_lips[0]) / 2
    patch = 0.08 * unit * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    skin = _colour(bgr, cheek + patch, 50)
    # As bright as the whites of the eyes, within what the light on the skin allows; a warm white.
    bright = float(np.clip(whites.mean(), 0.90 * skin.mean() + 8, 1.25 * skin.mean() + 8))
    tint = 0.35 * whites / whites.mean() + 0.65 * np.array([0.905, 1.005, 1.09])
    tooth = np.minimum(bright * tint, 246.0)
    teeth_shown = shows_teeth(bgr, marks.inner_lips, marks.outer_lips)
    if teeth_shown:
        tooth = np.minimum(_colour(bgr, marks.inner_lips, 80), 246.0)

    scale = 2.0 * unit  # twice the picture's resolution
    left, top, wide, high = INNER
    shape = (round(high * scale), round(wide * scale))
    x = left + (np.arange(shape[1]) + 0.5) / scale
    y = top + (np.arange(shape[0])[:, None] + 0.5) / scale
    soft = 1.2 / scale
    layers = np.zeros((5, *shape, 4), np.float32)

    # A grey picture stays grey.
    tinted = float(np.abs(luma_chroma(np.stack([lips, skin])[None])[1] - 128).max())
    colourful = float(smoothstep((tinted - 1.5) / 6))

    def put(index: int, colour: Float64, alpha: Float64) -> None:
        luma, chroma = luma_chroma(np.clip(colour, 0, 255))
        chroma = (chroma - 128) * np.float32(colourful) + 128
        layers[index, ..., 0] = luma
        layers[index, ..., 1:3] = chroma
        layers[index, ..., 3] = 255 * np.broadcast_to(alpha, shape)

    hollow = lips * np.array([0.17, 0.16, 0.24])
    deep = 0.75 + 0.5 * smoothstep((y + 0.02) / 0.25)
    put(
        0,
        np.broadcast_to(hollow, (*shape, 3)) * np.broadcast_to(deep, shape)[..., None],
        np.ones(shape),
    )

    # The tongue, its tip towards the viewer, in the place it has while the jaw is up.
    flesh = lips * 0.55 + np.array([112.0, 108.0, 196.0]) * 0.45 * (lips.max() / 200)
    across = x / (0.80 * half)
    upper_y = 0.012 + 0.05 * across**2
    body = (y - upper_y) / 0.11
    light = (
        0.60 + 0.30 * np.exp(-(((body - 0.30) / 0.35) ** 2)) - 0.12 * np.exp(-((x / 0.012) ** 2))
    )
    light = light - 0.25 * np.clip(np.abs(across), 0, 1) ** 3
    alpha = smoothstep((y - upper_y) / 0.012) * smoothstep((1 - np.abs(across)) / 0.16)
    put(1, flesh * np.clip(light, 0, 1.1)[..., None], alpha)

    def band(
        width: float, marks_at: tuple[float, ...], edge: npt.NDArray[Any], root: float, sign: float
    ) -> tuple[Float64, Float64]:
        """Brightness and alpha of one row of teeth; `sign` 1 when it hangs."""
        along = x / (width * half)
        notch = np.zeros_like(along)
        for at in marks_at:
            for side in {at, -at}:
                notch = np.maximum(notch, np.exp(-(((along - side) / 0.028) ** 2)))
        tip = edge - sign * 0.002 * notch
        inwards = sign * (tip - y)
        alpha = np.clip(inwards / soft + 0.5, 0, 1) * smoothstep((1 - np.abs(along)) / 0.20)
        depth = np.clip(1 - inwards / root, 0, 1)
        light = (0.70 + 0.30 * depth) * (1 - 0.42 * np.clip(np.abs(along), 0, 1) ** 2.2)
        light = light * (1 - 0.13 * notch * (0.4 + 0.6 * depth))
        light = light * (1 - 0.10 * np.exp(-((inwards / 0.008) ** 2)))
        return light, alpha

    seats = (0.0, 0.25, 0.46, 0.64, 0.80)
    edge = 0.043 - 0.020 * (x / (0.80 * half)) ** 2
    light, alpha = band(0.86, seats, edge, 0.105, 1.0)
    gum = smoothstep((edge - y - 0.098) / 0.02)[..., None]
    tone = tooth * (1 - gum) + lips * 0.80 * gum
    put(3, tone * light[..., None], alpha)
    edge = 0.036 + 0.014 * (x / (0.70 * half)) ** 2
    light, alpha = band(0.72, (0.0, 0.21, 0.41, 0.60, 0.78), edge, 0.085, -1.0)
    gum = smoothstep((y - edge - 0.075) / 0.02)[..., None]
    tone = tooth * 0.90 * (1 - gum) + lips * 0.7 * gum
    put(2, tone * light[..., None], alpha)
    if teeth_shown:
        own = _own_teeth(bgr, marks, frame, x, y)
        layers[4, ..., :3], layers[4, ..., 3] = own[0], own[1] * 255
        # Painted ones would stand beside them.
        layers[3, ..., 3] = 0
    return np.clip(np.rint(layers), 0, 255).astype(np.uint8)


def _own_teeth(
    bgr: UInt8,
    marks: Landmarks,
    frame: Float64,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
) -> tuple[Float32, Float32]:
    """Y U V and alpha (0 to 1) of the portrait's own teeth, at places in face units.

    Above the upper lip's edge, where a lip that rises uncovers more, they go on as they are at the
    edge; below the lower lip's edge they end.
    """
    unit = marks.unit
    axis = frame[1] / unit
    turn = np.stack([axis, [-axis[1], axis[0]]])
    inner = (marks.inner_lips - frame[0]) @ turn.T / unit
    columns = x.ravel()
    upper = np.interp(columns, inner[0:11, 0], inner[0:11, 1])[None]
    lower = np.interp(columns, inner[10:, 0][::-1], inner[10:, 1][::-1])
    left = columns < inner[19, 0]
    lower[left] = np.interp(columns[left], [inner[0, 0], inner[19, 0]], [inner[0, 1], inner[19, 1]])
    lower = np.maximum(lower[None], upper)
    y = y + (inner[5, 1] + inner[15, 1]) / 2  # the layers are at the seam
    pixel = 1.0 / unit
    margin = np.minimum(1.5 * pixel, (lower - upper) / 2)
    row = np.clip(y, upper + margin, lower - margin)
    where = np.stack(np.broadcast_arrays(x, row), -1) * unit @ turn + frame[0]
    luma, chroma = luma_chroma(_pull(bgr, where[..., 0], where[..., 1]))
    ends = smoothstep((columns - inner[0, 0]) / 0.03) * smoothstep((inner[10, 0] - columns) / 0.03)
    foot = smoothstep((lower - y) / (3 * pixel) + 0.2)
    deep = smoothstep((y - upper + 0.06) / 0.02)
    thick = smoothstep((lower - upper) / 0.02)
    alpha = foot * deep * thick * ends[None]
    return np.concatenate([luma[..., None], chroma], -1), np.asarray(alpha, np.float32)


def shows_teeth(picture: UInt8, inner: Float64, outer: Float64) -> bool:
    """Teeth: a good part of what is between the lips is brighter than they are, and hardly red."""
    height, width = picture.shape[:2]
    inside, lips = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    cv2.fillPoly(inside, [np.rint(inner).astype(np.int32)], 255)
    cv2.fillPoly(lips, [np.rint(outer).astype(np.int32)], 255)
    lips[cv2.dilate(inside, np.ones((3, 3), np.uint8)) > 0] = 0
    there, around = picture[inside > 0].astype(np.float64), picture[lips > 0].astype(np.float64)
    if len(there) < 12 or len(around) < 12:
        return False
    typical = np.median(around, 0)
    light = there.mean(1) > typical.mean() + 12
    grey = there[:, 2] - there[:, 1] < 0.7 * max(8.0, typical[2] - typical[1])
    return bool((light & grey).mean() > 0.18)


def _colour(
    bgr: UInt8,
    outline: Float64,
    percentile: float,
    *,
    hole: Float64 | None = None,
    iris: Float64 | None = None,
) -> Float64:
    """A typical colour (BGR) inside an outline: the mean of the pixels about that brightness."""
    mask = np.zeros(bgr.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.rint(outline).astype(np.int32)], 255)
    if hole is not None:
        cv2.polylines(mask, [np.rint(hole).astype(np.int32)], True, 0, 3)
    if iris is not None:
        centre = (round(float(iris[0])), round(float(iris[1])))
        cv2.circle(mask, centre, round(float(iris[2]) * 1.15), 0, -1)
    pixels = bgr[mask > 0].astype(np.float64)
    if not len(pixels):
        return np.array([120.0, 120.0, 160.0])
    level = pixels.sum(-1)
    low, high = np.percentile(level, [max(0, percentile - 12), min(100, percentile + 12)])
    return cast(Float64, pixels[(level >= low) & (level <= high)].mean(0))
