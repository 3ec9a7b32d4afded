"""Preparation: from a portrait or a clip to a loop with a face that can be replaced.

Three passes over the source, so that memory is bounded by one picture and a chunk, whatever the
length: find the face in every picture, encode it and draw its mask, write the loop. Each chunk is
kept as it is done; a preparation that was interrupted goes on where it stopped.

Landmarks are the usual 68 (jaw 0-16, brows 17-26, nose 27-35, eyes 36-47, mouth 48-67), "left"
as seen in the picture. They come from DWPose's whole-body network, from MediaPipe's face mesh, or
from a persona's YAML; boxes and masks are MuseTalk's (arXiv 2410.10122 and its published code).
"""

from __future__ import annotations

import io
import logging
import math
import pickle
import pickletools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import av
import av.error
import cv2
import numpy as np
import numpy.typing as npt

from .avatar import (
    FACE,
    LOOP_FPS,
    Box,
    LoopWriter,
    clear,
    crop_box,
    locked,
    make_patch,
    partial,
    whole,
    write_array,
    write_atomic,
)
from .errors import AvatarError, ConfigError
from .media import Float32, UInt8

log = logging.getLogger(__name__)

Points: TypeAlias = Float32
"""(68, 2): x, y in pixels."""

Progress: TypeAlias = Callable[[str, float], None]

CHUNK = 25
"""Pictures whose results are kept together: what an interruption can cost."""


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How a source's pixels become the loop's: scaled, then cut or framed to an even size."""

    scale: float
    left: float
    top: float
    width: int
    height: int

    @classmethod
    def plan(
        cls,
        source: tuple[int, int],
        target: tuple[int, int],
        how: Literal["cover", "contain", "native"],
    ) -> Fit:
        """`source` and `target` are (width, height). `native` keeps the size, made even."""
        w, h = source
        if how == "native":
            return cls(1.0, 0.0, 0.0, w & ~1, h & ~1)
        tw, th = target
        pick = max if how == "cover" else min
        scale = pick(tw / w, th / h)
        return cls(scale, (w * scale - tw) / 2, (h * scale - th) / 2, tw, th)

    def picture(self, bgr: UInt8, background: tuple[int, int, int] = (0, 0, 0)) -> UInt8:
        """One picture, (height, width, 3)."""
        if self.scale == 1.0 and self.left == 0.0 and self.top == 0.0:
            return np.ascontiguousarray(bgr[: self.height, : self.width])
        h, w = bgr.shape[:2]
        size = (max(1, round(w * self.scale)), max(1, round(h * self.scale)))
        shrinks = self.scale < 1.0
        sized = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        out = np.empty((self.height, self.width, 3), np.uint8)
        out[:] = background[::-1]
        x, y = round(self.left), round(self.top)
        x1, y1 = max(0, x), max(0, y)
        x2, y2 = min(size[0], x + self.width), min(size[1], y + self.height)
        out[y1 - y : y2 - y, x1 - x : x2 - x] = sized[y1:y2, x1:x2]
        return out

    def points(self, xy: Float32) -> Float32:
        """Where points of the source are in the loop."""
        return np.asarray(xy * self.scale - (round(self.left), round(self.top)), np.float32)


class Clip:
    """A picture or a film, as pictures at an even rate, 25 a second unless told otherwise.

    Rotation is undone, a variable rate made even (the picture that is shown at each tick of the
    new one), transparency laid over `background` (RGB), HDR brought down to what a screen shows.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int] = (1280, 720),
        how: Literal["cover", "contain", "native"] = "cover",
        background: tuple[int, int, int] = (0, 0, 0),
        seconds: float = 30.0,
        fps: int = LOOP_FPS,
    ) -> None:
        """`size` is (width, height). Raises AvatarError for a file that is neither."""
        self.path = path
        self.background = background
        self.fps = fps
        self.limit = max(1, int(seconds * fps))
        if not path.is_file():
            raise AvatarError(f"there is no portrait or clip at {path}")
        self.still = _still(path, background)
        if self.still is not None:
            h, w = self.still.shape[:2]
        else:
            first = next(self._raw(), None)
            if first is None:
                raise AvatarError(
                    f"{path.name} can't be read as a picture or a film: use JPEG, PNG, WebP, or "
                    "a film that ffmpeg reads"
                )
            h, w = first[1].shape[:2]
        if w < 2 or h < 2:
            raise AvatarError(f"{path.name} is {w} x {h}: too small to hold a face")
        self.source = (w, h)
        self.fit = Fit.plan((w, h), size, how)

    def __iter__(self) -> Iterator[UInt8]:
        """(height, width, 3) BGR, at most `seconds` of them. Can be run through again."""
        if self.still is not None:
            yield self.fit.picture(self.still, self.background)
            return
        shown: UInt8 | None = None
        done = 0
        for time, picture in self._raw():
            # a picture is shown from its own time on: whatever is due before it is the last one
            while shown is not None and done < self.limit and done / self.fps < time - 1e-6:
                yield shown
                done += 1
            if done >= self.limit:
                return
            if picture.shape[1::-1] != self.source:
                picture = np.asarray(cv2.resize(picture, self.source), np.uint8)
            shown = self.fit.picture(picture, self.background)
        if shown is not None and done < self.limit:
            yield shown

    def _raw(self) -> Iterator[tuple[float, UInt8]]:
        """Seconds from the start, and the picture as it should be looked at."""
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                start: float | None = None
                rate = float(stream.average_rate or LOOP_FPS)
                for n, frame in enumerate(container.decode(stream)):
                    time = float(frame.time) if frame.time is not None else n / rate
                    start = time if start is None else start
                    yield time - start, _upright(_bgr(frame, self.background), frame.rotation)
        except (av.error.FFmpegError, IndexError, ValueError) as error:
            # what was decoded before the damage is good; a file with nothing good is refused
            log.warning("a film ends early or can't be decoded", extra={"error": str(error)})


def _still(path: Path, background: tuple[int, int, int]) -> UInt8 | None:
    """A picture file as BGR, turned as its EXIF says; None if it is not one."""
    try:
        data = np.fromfile(path, np.uint8)
        if len(data) == 0:
            return None
        raw = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
        if raw is not None and raw.ndim == 3 and raw.shape[2] == 4:
            deep = 257.0 if raw.dtype == np.uint16 else 1.0
            return _flat(np.asarray(raw / deep, np.float32), background)
        colour = cv2.imdecode(data, cv2.IMREAD_COLOR) if raw is not None else None
    except cv2.error:
        return None
    return None if colour is None else np.asarray(colour, np.uint8)


def _flat(bgra: Float32, background: tuple[int, int, int]) -> UInt8:
    """(H, W, 4), 0..255, laid over a colour (RGB)."""
    alpha = bgra[..., 3:] / 255.0
    under = np.array(background[::-1], np.float32)
    return np.asarray(np.rint(bgra[..., :3] * alpha + under * (1.0 - alpha)), np.uint8)


def _upright(bgr: UInt8, degrees: int) -> UInt8:
    """Turned by `degrees` against the clock, as a player would."""
    turns = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(bgr, turns)) if turns else bgr


_PQ, _HLG = 16, 18
"""`color_trc` of SMPTE ST 2084 and ARIB STD-B67."""


def _bgr(frame: av.VideoFrame, background: tuple[int, int, int]) -> UInt8:
    if int(frame.color_trc) in (_PQ, _HLG):
        rgb = frame.to_ndarray(format="rgb48le").astype(np.float32) / 65535.0
        return np.ascontiguousarray(tone(rgb, int(frame.color_trc))[..., ::-1])
    if any(component.is_alpha for component in frame.format.components):
        return _flat(frame.to_ndarray(format="bgra").astype(np.float32), background)
    return np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)


def tone(rgb: Float32, transfer: int) -> UInt8:
    """HDR (BT.2020, PQ or HLG), 0..1, as 8 bit sRGB.

    White at 203 nits (ITU-R BT.2408), highlights rolled off above it, BT.2020 to BT.709.
    """
    if transfer == _PQ:
        m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
        p = rgb ** (1 / m2)
        light = (np.maximum(p - c1, 0) / (c2 - c3 * p)) ** (1 / m1) * (10000 / 203)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(rgb <= 0.5, rgb**2 / 3, (np.exp((rgb - c) / a) + b) / 12)
        light = scene**1.2 * (1000 / 203)
    matrix = np.array(
        [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
        np.float32,
    )
    light = np.maximum(light @ matrix.T, 0)
    peak = light.max(-1, keepdims=True)
    # unchanged up to 3/4 of white, then an even approach to it
    knee = np.where(peak > 0.75, 1 - 0.25 * np.exp(-(peak - 0.75) / 0.25), peak)
    light = np.clip(light * (knee / np.maximum(peak, 1e-6)), 0, 1)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(srgb * 255), np.uint8)


# --- finding the face -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    """What a landmarker found."""

    points: Points
    score: float = 1.0
    """0..1; how sure it is that this is a face."""
    others: int = 0
    """Further faces in the picture."""


class Landmarker(Protocol):
    """Finds one face in a picture."""

    def __call__(self, picture: UInt8) -> Face | None:
        """(H, W, 3) BGR; None when there is no face."""


Run: TypeAlias = Callable[[Mapping[str, npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]]
"""A network as `engines.runtimes` gives it."""


class DwPose:
    """RTMPose-l whole-body (DWPose), 384 x 288, from its ONNX file: points 23 to 90 are the face.

    As MuseTalk runs it: the whole picture is the person's box, padded by 1.25; the answer is the
    mean of the picture's and its mirror image's.
    """

    WIDTH, HEIGHT = 288, 384
    MEAN = np.array([123.675, 116.28, 103.53], np.float32)
    STD = np.array([58.395, 57.12, 57.375], np.float32)

    def __init__(
        self, run: Run, flip: bool = True, region: Box | None = None, threshold: float = 0.3
    ) -> None:
        """`region` is the box of the person who is meant, when there are several."""
        self.run = run
        self.flip = flip
        self.region = region
        self.threshold = threshold

    def __call__(self, picture: UInt8) -> Face | None:
        height, width = picture.shape[:2]
        x1, y1, x2, y2 = self.region or (0, 0, width, height)
        centre = np.array([(x1 + x2) / 2, (y1 + y2) / 2], np.float32)
        w, h = (x2 - x1) * 1.25, (y2 - y1) * 1.25
        if w > h * (self.WIDTH / self.HEIGHT):
            h = w * (self.HEIGHT / self.WIDTH)
        else:
            w = h * (self.WIDTH / self.HEIGHT)
        scale = self.WIDTH / w
        move = np.array([self.WIDTH / 2, self.HEIGHT / 2]) - centre * scale
        warp = np.array([[scale, 0, move[0]], [0, scale, move[1]]], np.float64)
        small = cv2.warpAffine(picture, warp, (self.WIDTH, self.HEIGHT), flags=cv2.INTER_LINEAR)
        x, y = self._heat(np.asarray(small, np.uint8))
        if self.flip:
            fx, fy = self._heat(np.ascontiguousarray(small[:, ::-1]))
            x = (x + fx[MIRROR][:, ::-1]) * 0.5
            y = (y + fy[MIRROR]) * 0.5
        at = np.stack([x.argmax(1), y.argmax(1)], 1) / 2.0  # two bins a pixel
        score = float(np.minimum(x.max(1), y.max(1)).mean())
        if not score >= self.threshold:
            return None
        size = np.array([w, h])
        found = at / (self.WIDTH, self.HEIGHT) * size + centre - size / 2
        return Face(found.astype(np.float32), min(1.0, score))

    def _heat(self, bgr: UInt8) -> tuple[Float32, Float32]:
        """(68, 576) and (68, 768): how likely each half pixel is, across and down."""
        rgb = (bgr[..., ::-1].astype(np.float32) - self.MEAN) / self.STD
        out = self.run({"input": np.ascontiguousarray(rgb.transpose(2, 0, 1)[None])})
        # told apart by length, not by name: two bins a pixel, 576 across and 768 down
        x, y = sorted(out.values(), key=lambda heat: int(heat.shape[-1]))
        return np.asarray(x[0, 23:91], np.float32), np.asarray(y[0, 23:91], np.float32)


def _mirror() -> npt.NDArray[np.int64]:
    """Which of the 68 points each becomes in a mirror."""
    out = np.arange(68)
    out[:17] = np.arange(16, -1, -1)
    out[17:27] = np.arange(26, 16, -1)
    out[31:36] = np.arange(35, 30, -1)
    for a, b in ((36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46)):
        out[a], out[b] = b, a
    out[48:55] = np.arange(54, 47, -1)
    out[55:60] = np.arange(59, 54, -1)
    out[60:65] = np.arange(64, 59, -1)
    out[65:68] = np.arange(67, 64, -1)
    return out


MIRROR = _mirror()


class Mesh:
    """MediaPipe's face mesh: the light alternative, an order faster on a CPU.

    Compatible, not equal: its chin and cheeks lie some pixels from DWPose's.
    """

    def __init__(self, find: Callable[[UInt8], tuple[Mapping[str, Any], int] | None]) -> None:
        """`find`: landmarks as a persona's YAML has them, and the number of other faces."""
        self.find = find

    def __call__(self, picture: UInt8) -> Face | None:
        found = self.find(picture)
        if found is None:
            return None
        marks, others = found
        return Face(from_yaml(marks), 1.0, others)


@dataclass(frozen=True)
class Given:
    """Landmarks that somebody wrote down, in pixels of the loop."""

    points: Points

    def __call__(self, picture: UInt8) -> Face | None:
        return Face(self.points)


def from_yaml(data: Mapping[str, Any]) -> Points:
    """A persona's `landmarks` as the 68, in the portrait's pixels; ConfigError names what lacks."""

    def line(*keys: str) -> Float32:
        value: Any = data
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        try:
            found = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            found = np.zeros(0, np.float32)
        if found.ndim == 1 and found.shape == (2,):
            found = found[None]
        if found.ndim != 2 or found.shape[1] != 2 or not np.isfinite(found).all():
            raise ConfigError(f"landmarks: {'.'.join(keys)} must be points [x, y]")
        return found

    def closed(points: Float32, at: Sequence[float]) -> Float32:
        """Points at fractional places of a closed line of 20."""
        ring = np.concatenate([points, points[:1]])
        places = np.asarray(at) / 20 * len(points)
        return np.stack([np.interp(places, np.arange(len(ring)), ring[:, k]) for k in (0, 1)], 1)

    bridge, tip = line("nose", "bridge")[0], line("nose", "tip")[0]
    base = line("nose", "base")[0]
    left, right = line("nose", "left")[0], line("nose", "right")[0]
    eyes = []
    for side in ("left_eye", "right_eye"):
        upper, lower = along(line(side, "upper"), 4), along(line(side, "lower"), 4)
        eyes.append(np.concatenate([upper, lower[2:0:-1]]))
    outer, inner = line("outer_lips"), line("inner_lips")
    parts = [
        along(line("jaw"), 17),
        along(line("left_brow"), 5),
        along(line("right_brow"), 5),
        bridge + (tip - bridge) * np.linspace(0, 1, 4, dtype=np.float32)[:, None],
        np.stack([left, (left + base) / 2, base, (right + base) / 2, right]),
        *eyes,
        closed(
            outer, [0, 5 / 3, 10 / 3, 5, 20 / 3, 25 / 3, 10, 35 / 3, 40 / 3, 15, 50 / 3, 55 / 3]
        ),
        closed(inner, [0, 2.5, 5, 7.5, 10, 12.5, 15, 17.5]),
    ]
    return np.concatenate(parts).astype(np.float32)


def along(points: Float32, n: int) -> Float32:
    """`n` points at even distances along a line."""
    if len(points) < 2:
        raise ConfigError("landmarks: a line of one point can't be followed: give two or more")
    steps = np.hypot(*np.diff(points, axis=0).T)
    at = np.concatenate([[0.0], np.cumsum(steps)])
    want = np.linspace(0, at[-1], n)
    return np.stack([np.interp(want, at, points[:, k]) for k in (0, 1)], 1).astype(np.float32)


# --- boxes ----------------------------------------------------------------------------------------


def face_box(
    points: npt.NDArray[Any], shift: int = 0, margin: int = 10, height: int = 1 << 30
) -> Box | None:
    """MuseTalk's box of 68 points: as far above the middle of the nose as the chin is below it.

    Points are cut to whole pixels first. `shift` moves the upper edge's mirror (v1.0: more is a
    more open mouth), `margin` is added below the chin (v1.5: 10) down to `height`. None for points
    that make no box: upstream then takes its detector's.
    """
    at = points.astype(np.int32).copy()
    at[29, 1] += shift
    middle = int(at[29, 1])
    bottom = int(at[:, 1].max())
    left, right = int(at[:, 0].min()), int(at[:, 0].max())
    top = max(0, middle - (bottom - middle))
    if bottom <= top or right <= left or left < 0:
        return None
    return left, top, right, min(bottom + margin, height) if margin else bottom


def smooth(boxes: Sequence[Box | None], sigma: float) -> list[Box | None]:
    """The boxes of a clip without their tremble: a Gaussian over time (`sigma` in pictures).

    Centre and size are smoothed, each stretch with a face by itself, and rounded once.
    """
    out: list[Box | None] = list(boxes)
    start = 0
    while start < len(boxes):
        if boxes[start] is None:
            start += 1
            continue
        end = start
        while end < len(boxes) and boxes[end] is not None:
            end += 1
        stretch = np.array(boxes[start:end], np.float64)
        shape = np.stack(
            [
                (stretch[:, 0] + stretch[:, 2]) / 2,
                (stretch[:, 1] + stretch[:, 3]) / 2,
                stretch[:, 2] - stretch[:, 0],
                stretch[:, 3] - stretch[:, 1],
            ],
            1,
        )
        reach = int(math.ceil(3 * sigma))
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        for k in range(len(shape)):
            lo, hi = max(0, k - reach), min(len(shape), k + reach + 1)
            w = weights[lo - k + reach : hi - k + reach, None]
            x, y, wide, tall = (shape[lo:hi] * w).sum(0) / w.sum()
            x1, y1 = round(x - wide / 2), max(0, round(y - tall / 2))
            out[start + k] = (max(0, x1), y1, round(x + wide / 2), round(y + tall / 2))
        start = end
    return out


def cut(picture: UInt8, box: Box, fill: Literal["edge", "black"] = "edge") -> UInt8:
    """`picture[box]`, filled where the box leaves the picture."""
    height, width = picture.shape[:2]
    x1, y1, x2, y2 = box
    inner = picture[max(0, y1) : max(0, min(height, y2)), max(0, x1) : max(0, min(width, x2))]
    sides = (max(0, -y1), max(0, y2 - height), max(0, -x1), max(0, x2 - width))
    if inner.size == 0:
        return np.zeros((y2 - y1, x2 - x1, 3), np.uint8)
    if not any(sides):
        return inner
    how = cv2.BORDER_REPLICATE if fill == "edge" else cv2.BORDER_CONSTANT
    return np.asarray(cv2.copyMakeBorder(inner, *sides, how, value=(0, 0, 0)), np.uint8)


def crops(picture: UInt8, box: Box) -> Float32:
    """(2, 3, 256, 256), RGB in -1..1: the face with its lower half at -1, and the whole face."""
    face = cv2.resize(cut(picture, box), (FACE, FACE), interpolation=cv2.INTER_LANCZOS4)
    rgb = np.asarray(face, np.float32)[..., ::-1].transpose(2, 0, 1) / 255.0
    both = np.stack([rgb, rgb])
    both[0, :, FACE // 2 :] = 0
    return np.asarray((both - 0.5) / 0.5, np.float32)


# --- masks ----------------------------------------------------------------------------------------

MaskMode = Literal["raw", "neck", "jaw", "points"]

SKIN, NOSE, NECK = 1, 10, 14
LIPS = (11, 12, 13)
"""Classes of the face parser (CelebAMask-HQ): inner mouth, upper and lower lip."""


def _jaw_kernel() -> UInt8:
    """33 x 33: a cone of rows 10 to 20, widths 1, 3 .. 21, and a stem of width 21 below it."""
    kernel = np.zeros((33, 33), np.uint8)
    for row in range(10, 33):
        half = min(row - 10, 10)
        kernel[row, 16 - half : 16 + half + 1] = 1
    return kernel


def parse_mask(
    classes: npt.NDArray[Any], mode: MaskMode = "jaw", cheeks: tuple[int, int] = (90, 90)
) -> UInt8:
    """(512, 512) classes to a mask of 0 and 255.

    `jaw` lets the skin grow downwards, so that a jaw can drop, but not at the cheeks: further than
    `cheeks` pixels to the left and right of the middle it is worn down instead.
    """
    if mode == "raw":
        return np.where(np.isin(classes, (SKIN, *LIPS)), 255, 0).astype(np.uint8)
    if mode == "neck":
        return np.where(np.isin(classes, (SKIN, NECK, *LIPS)), 255, 0).astype(np.uint8)
    skin = np.where(classes == SKIN, 255, 0).astype(np.uint8)
    grown = cv2.dilate(skin, _jaw_kernel())
    worn = cv2.erode(grown, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (35, 3)), iterations=2)
    middle = classes.shape[1] // 2
    out = np.asarray(grown, np.uint8).copy()
    out[:, : middle - cheeks[0] + 1] = worn[:, : middle - cheeks[0] + 1]
    out[:, middle + cheeks[1] :] = worn[:, middle + cheeks[1] :]
    out[classes == NOSE] = 0
    out[np.isin(classes, LIPS)] = 255
    return np.where(out == 255, 255, 0).astype(np.uint8)


def points_mask(points: Points, crop: Box) -> UInt8:
    """The lower face by landmarks alone, over `crop`: without a parser. 0 and 255."""
    jaw = points[2:15]
    top = np.array([points[14], points[35], points[33], points[31], points[2]])
    outline = np.concatenate([jaw, top]) - (crop[0], crop[1])
    mask = np.zeros((crop[3] - crop[1], crop[2] - crop[0]), np.uint8)
    cv2.fillPoly(mask, [np.rint(outline).astype(np.int32)], 255)
    # skin under the line of the jaw moves with it
    grow = max(1, (crop[3] - crop[1]) // 40)
    return np.asarray(cv2.dilate(mask, np.ones((2 * grow + 1, 2 * grow + 1), np.uint8)), np.uint8)


def finish_mask(
    mask: UInt8, face: Box, crop: Box, upper: float = 0.5, softness: float = 0.1
) -> UInt8:
    """A mask over `crop`: only within the face box, only below `upper`, its edge softened.

    `softness` is the blur's width as a part of the crop's: 0.1 in MuseTalk's real-time script,
    0.05 in its offline one.
    """
    h, w = mask.shape
    out = np.zeros_like(mask)
    x1, y1 = max(0, face[0] - crop[0]), max(0, face[1] - crop[1])
    x2, y2 = min(w, face[2] - crop[0]), min(h, face[3] - crop[1])
    out[y1:y2, x1:x2] = mask[y1:y2, x1:x2]
    out[: int(h * upper)] = 0
    size = int(softness * w // 2 * 2) + 1
    return np.asarray(cv2.GaussianBlur(out, (size, size), 0), np.uint8)


def resample(image: UInt8, size: tuple[int, int], how: Literal["bilinear", "bicubic"]) -> UInt8:
    """Pillow's resize, exactly: `image` (H, W) or (H, W, C) to `size` (width, height).

    Widened filters when shrinking, 22 bit coefficients, across first and rounded between.
    """
    out = image
    for axis, n in ((1, size[0]), (0, size[1])):
        if out.shape[axis] == n:
            continue
        weights = _weights(out.shape[axis], n, how)  # (n, old)
        moved = np.moveaxis(out, axis, 0)
        total = weights @ moved.reshape(moved.shape[0], -1).astype(np.float64)
        value = np.clip(np.floor((total + 2**21) / 2**22), 0, 255).astype(np.uint8)
        out = np.moveaxis(value.reshape(n, *moved.shape[1:]), 0, axis)
    return np.ascontiguousarray(out)


def _weights(old: int, new: int, how: str) -> npt.NDArray[np.float64]:
    """(new, old): whole numbers, 2 ** 22 to the one (sums stay far below 2 ** 53: exact)."""
    reach = 1.0 if how == "bilinear" else 2.0
    scale = old / new
    wide = max(scale, 1.0)
    out = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale
        lo = max(0, int(centre - reach * wide + 0.5))
        hi = min(old, int(centre + reach * wide + 0.5))
        x = np.abs((np.arange(lo, hi) - centre + 0.5) / wide)
        if how == "bilinear":
            w = np.maximum(0.0, 1.0 - x)
        else:
            near = (1.5 * x - 2.5) * x * x + 1
            far = ((-0.5 * x + 2.5) * x - 4) * x + 2
            w = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        w = w / w.sum()
        out[i, lo:hi] = np.trunc(w * 2**22 + np.where(w < 0, -0.5, 0.5))
    return out


class Parser:
    """BiSeNet, 19 classes, through a runtime: (H, W, 3) BGR to a mask over the same."""

    MEAN = np.array([0.485, 0.456, 0.406], np.float32)
    STD = np.array([0.229, 0.224, 0.225], np.float32)

    def __init__(self, run: Run, mode: MaskMode, cheeks: tuple[int, int] = (90, 90)) -> None:
        self.run = run
        self.mode: MaskMode = mode
        self.cheeks = cheeks

    def __call__(self, crop: UInt8) -> UInt8:
        rgb = resample(np.ascontiguousarray(crop[..., ::-1]), (512, 512), "bilinear")
        x = (rgb.astype(np.float32) / 255.0 - self.MEAN) / self.STD
        logits = self.run({"picture": np.ascontiguousarray(x.transpose(2, 0, 1)[None])})["classes"]
        mask = parse_mask(logits[0].argmax(0), self.mode, self.cheeks)
        return resample(mask, (crop.shape[1], crop.shape[0]), "bicubic")


# --- avatars that MuseTalk's own script prepared --------------------------------------------------

UPSTREAM = "avator_info.json"
"""The file that such a folder has (its own spelling)."""


class _Numbers(pickle.Unpickler):
    """Lists of numbers, plain or numpy's, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy", "dtype"): _number_type,
            ("numpy.core.multiarray", "scalar"): _number,
            ("numpy._core.multiarray", "scalar"): _number,
            ("_codecs", "encode"): _latin,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return known[module, name]


def _number_type(kind: str, *_: object) -> np.dtype[Any]:
    if str(kind) not in ("i2", "i4", "i8", "u1", "u2", "u4", "f4", "f8"):
        raise pickle.UnpicklingError(f"{kind!r} is no type of number")
    return np.dtype(str(kind))


def _number(kind: object, data: object = b"") -> float:
    if not isinstance(kind, np.dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a number is damaged")
    return float(np.frombuffer(data, kind, 1)[0])


def _latin(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("a number is damaged")
    return text.encode("latin1")


def read_boxes(path: Path, limit: int = 1 << 24) -> list[tuple[float, float, float, float]]:
    """Boxes from one of the script's pickles, without running what is in it; AvatarError if it
    holds anything but numbers."""
    try:
        if path.stat().st_size > limit:
            raise pickle.UnpicklingError("it is too large for boxes")
        data = path.read_bytes()
        for code, place, _ in pickletools.genops(data):
            # a memo's number is a size that the reader asks memory for
            if "PUT" in code.name and int(place or 0) > len(data):
                raise pickle.UnpicklingError("it wants more memory than it can need")
        rows = _Numbers(io.BytesIO(data)).load()
        boxes = [tuple(float(one) for one in row) for row in rows]
    except (OSError, ValueError, TypeError, EOFError, LookupError, AttributeError) as error:
        raise AvatarError(f"{path.name} can't be read as boxes: {error}") from None
    except pickle.UnpicklingError as error:
        raise AvatarError(f"{path.name} is refused: {error}") from None
    if any(len(box) != 4 or not all(map(math.isfinite, box)) for box in boxes):
        raise AvatarError(f"{path.name} does not hold boxes")
    return [(a, b, c, d) for a, b, c, d in boxes]


def import_loop(
    folder: Path,
    target: Path,
    key: str,
    data: Mapping[str, Any],
    latents: Callable[[Path], Sequence[Float32]],
    progress: Progress,
) -> dict[str, Any]:
    """A folder that MuseTalk's real-time script prepared, as a loop: its first half, for the
    second is the first backwards. `latents` reads `latents.pt`.

    Only files of the known names directly in the folder are read, no links, no code. AvatarError
    names what is missing or refused. Pictures without a face have no latents there: the lists are
    brought into step again.
    """
    with locked(target):
        ready = whole(target, key)
        if ready is not None:
            return ready
        clear(target)
        boxes = read_boxes(_plain(folder, "coords.pkl"))
        crops_ = read_boxes(_plain(folder, "mask_coords.pkl"))
        found = list(latents(_plain(folder, "latents.pt")))
        n = (len(boxes) + 1) // 2
        faces = [any(box) for box in boxes]
        if n == 0 or len(crops_) != len(boxes):
            raise AvatarError(f"{folder.name}: coords.pkl and mask_coords.pkl don't fit together")
        if len(found) not in (len(boxes), sum(faces)):
            raise AvatarError(
                f"{folder.name}: {len(found)} latents for {len(boxes)} pictures: "
                "prepare it again from its source"
            )
        if {one.shape for one in found} - {(8, FACE // 8, FACE // 8)}:
            raise AvatarError(f"{folder.name}: its latents are not of a face of {FACE} pixels")
        order = iter(found)
        rows = [next(order) if face or len(found) == len(boxes) else None for face in faces[:n]]
        blank = np.zeros_like(found[0])
        writer: LoopWriter | None = None
        try:
            for i in range(n):
                picture = _image(folder, f"full_imgs/{i:08d}.png", cv2.IMREAD_COLOR)
                h, w = (side_ & ~1 for side_ in picture.shape[:2])
                writer = writer or LoopWriter(target, w, h)
                if (w, h) != (writer.width, writer.height):
                    raise AvatarError(f"{folder.name}: its pictures differ in size")
                picture = np.ascontiguousarray(picture[:h, :w])
                patch = None
                if faces[i]:
                    mask = _image(folder, f"mask/{i:08d}.png", cv2.IMREAD_GRAYSCALE)
                    box, crop = _whole_box(boxes[i]), _whole_box(crops_[i])
                    if mask.shape != (crop[3] - crop[1], crop[2] - crop[0]):
                        raise AvatarError(f"{folder.name}: mask {i} has another size than its box")
                    patch = make_patch(picture, box, mask, crop)
                writer.add(picture, patch)
                progress("importing", (i + 1) / n)
            assert writer is not None
            filled = [blank if row is None else row for row in rows]
            writer.finish(np.stack(filled), {**data, "key": key})
        finally:
            if writer is not None:
                writer.close()
        ready = whole(target, key, hashes=False)
        if ready is None:
            raise AvatarError(f"{target.name} could not be written whole: is the disk full?")
        return ready


def _whole_box(box: tuple[float, float, float, float]) -> Box:
    x1, y1, x2, y2 = (int(one) for one in box)
    if not (-(1 << 15) < x1 < x2 < 1 << 15 and -(1 << 15) < y1 < y2 < 1 << 15):
        raise AvatarError(f"the box {box} is not one")
    return x1, y1, x2, y2


def _plain(folder: Path, name: str) -> Path:
    """A file of that name within the folder itself, not one that a link leads to."""
    path = folder / name
    if not path.is_file():
        raise AvatarError(f"{folder.name} has no {name}: it is not an avatar of MuseTalk's script")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise AvatarError(f"{name} leads out of {folder.name}: refused")
    return path


def _image(folder: Path, name: str, how: int) -> UInt8:
    image = cv2.imread(str(_plain(folder, name)), how)
    if image is None:
        raise AvatarError(f"{folder.name}/{name} can't be read as a picture")
    return np.asarray(image, np.uint8)


# --- advice ---------------------------------------------------------------------------------------


def side(points: Points) -> float:
    """How far the head is turned: 0 frontal, 1 when the nose is at the edge of the face."""
    left, right, nose = points[:17, 0].min(), points[:17, 0].max(), points[30, 0]
    width = float(right - left)
    return 1.0 if width <= 0 else float(abs(2 * (nose - left) / width - 1))


def opening(points: Points) -> float:
    """How far the lips are apart, as a part of the mouth's width."""
    gap = float(points[65:68, 1].mean() - points[61:64, 1].mean())
    width = float(np.hypot(*(points[54] - points[48])))
    return 0.0 if width <= 0 else max(0.0, gap / width)


def advice(faces: Sequence[Face | None], boxes: Sequence[Box | None]) -> list[str]:
    """What about a source will show in the result, in sentences."""
    found = [(f, b) for f, b in zip(faces, boxes, strict=True) if f is not None and b is not None]
    if not found:
        return []
    said = []
    tall = float(np.median([b[3] - b[1] for _, b in found]))
    if tall < 100:
        said.append(
            f"the face is {tall:.0f} pixels tall: below 100 it is too small to be drawn well"
        )
    elif tall > 400:
        said.append(
            f"the face is {tall:.0f} pixels tall: the network draws 256, so it will look soft; "
            "a smaller picture or a wider shot is sharper"
        )
    turned = sum(side(f.points) > 0.6 for f, _ in found)
    if turned:
        said.append(f"the head is turned to the side in {turned} of {len(found)} pictures")
    gaps = [opening(f.points) for f, _ in found]
    if np.median(gaps) > 0.15:
        said.append(
            "the mouth is open in most pictures: footage with a closed mouth gives the best lips"
        )
    elif max(gaps) < 0.05:
        said.append("no teeth are seen in the source: their shape will be invented")
    if any(f.others for f, _ in found):
        said.append("there are several faces: say which one with face_at: [x, y]")
    missing = len(faces) - len(found)
    if missing:
        said.append(f"no face was found in {missing} of {len(faces)} pictures: they stay untouched")
    return said


# --- preparing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Everything that says how a source is prepared."""

    key: str
    """Names source, options and versions: what a cache must have been made for."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What else the manifest shall say."""
    shift: int = 0
    margin: int = 10
    smoothing: float = 0.0
    """Pictures; 0 leaves boxes as they are found, as MuseTalk does."""
    upper: float = 0.5
    softness: float = 0.1
    max_side: float = 1.0
    """Heads turned further (0..1) are left untouched."""


def prepare_loop(
    clip: Clip,
    target: Path,
    plan: Plan,
    landmarker: Landmarker,
    encode: Callable[[Float32], Float32],
    parser: Callable[[UInt8], UInt8] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Prepare `clip` into `target` and give the manifest. Idempotent, resumable.

    `encode` makes (B, 4, s, s) latents of (B, 3, 256, 256) pictures. Without `parser` the mask is
    drawn by the landmarks. Raises AvatarError when no picture has a face.
    """
    with locked(target):
        ready = whole(target, plan.key)
        if ready is not None:
            progress("ready", 1.0)
            return ready
        clear(target)
        kept = partial(target, plan.key)
        faces = _find(clip, kept, landmarker, progress)
        boxes = _boxes(faces, plan, clip.fit)
        if not any(box is not None for box in boxes):
            raise AvatarError(
                f"no face was found in {clip.path.name}: use a frontal, well lit face of 100 "
                "pixels or more, or write landmarks into the persona"
            )
        said = advice(faces, boxes)
        for one in said:
            log.warning("about this source", extra={"advice": one})
        latents = _encode(clip, kept, faces, boxes, plan, encode, parser, progress)
        writer = LoopWriter(target, clip.fit.width, clip.fit.height)
        try:
            for i, picture in enumerate(clip):
                if i >= len(boxes):
                    break
                box = boxes[i]
                patch = None
                if box is not None:
                    mask = _mask(kept, i)
                    patch = make_patch(picture, box, mask, crop_box(box))
                writer.add(picture, patch)
                progress("writing", (i + 1) / len(boxes))
            writer.finish(latents, {**plan.data, "key": plan.key, "advice": said})
        finally:
            writer.close()
        ready = whole(target, plan.key, hashes=False)
        if ready is None:
            raise AvatarError(f"{target.name} could not be written whole: is the disk full?")
        return ready


def _find(clip: Clip, kept: Path, landmarker: Landmarker, progress: Progress) -> list[Face | None]:
    """A face, or none, for every picture of the clip."""
    # one row a picture: score (-1: no face), others, 136 coordinates
    rows: list[Float32] = []
    done = 0
    while (chunk := _load(kept / f"faces-{done:05d}.npy")) is not None:
        rows.extend(chunk)
        done += 1
    last = (kept / "faces-end").exists()
    if not last:
        del rows[done * CHUNK :]
        fresh: list[Float32] = []
        for i, picture in enumerate(clip):
            if i < done * CHUNK:
                continue
            face = landmarker(picture)
            row = np.full(138, -1, np.float32)
            if face is not None:
                row[0], row[1], row[2:] = face.score, face.others, face.points.reshape(-1)
            fresh.append(row)
            progress("finding the face", min(1.0, (i + 1) / clip.limit))
            if len(fresh) == CHUNK:
                write_array(kept / f"faces-{done:05d}.npy", np.stack(fresh))
                rows.extend(fresh)
                fresh = []
                done += 1
        if fresh:
            write_array(kept / f"faces-{done:05d}.npy", np.stack(fresh))
            rows.extend(fresh)
        (kept / "faces-end").touch()
    return [
        Face(row[2:].reshape(68, 2), float(row[0]), int(row[1])) if row[0] >= 0 else None
        for row in rows
    ]


def _load(path: Path) -> npt.NDArray[Any] | None:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError):
        return None


SMALLEST = 32
"""Pixels: a box smaller than this is not worth a network's answer."""


def _boxes(faces: Sequence[Face | None], plan: Plan, fit: Fit) -> list[Box | None]:
    boxes: list[Box | None] = []
    for face in faces:
        box = None
        if face is not None and side(face.points) <= plan.max_side:
            box = face_box(face.points, plan.shift, plan.margin, fit.height)
        boxes.append(box if box is not None and _usable(box, fit) else None)
    return smooth(boxes, plan.smoothing) if plan.smoothing > 0 else boxes


def _usable(box: Box, fit: Fit) -> bool:
    """Large enough, and at least half of it in the picture."""
    x1, y1, x2, y2 = box
    seen = (min(x2, fit.width) - max(x1, 0)) * (min(y2, fit.height) - max(y1, 0))
    return min(x2 - x1, y2 - y1) >= SMALLEST and (
        x1 < fit.width and y1 < fit.height and seen * 2 >= (x2 - x1) * (y2 - y1)
    )


def _encode(
    clip: Clip,
    kept: Path,
    faces: Sequence[Face | None],
    boxes: Sequence[Box | None],
    plan: Plan,
    encode: Callable[[Float32], Float32],
    parser: Callable[[UInt8], UInt8] | None,
    progress: Progress,
) -> Float32:
    """(n, 8, s, s) latents; the masks are left in `kept`, one file a picture."""
    latents: list[Float32] = []
    chunk: list[Float32] = []
    for i, picture in enumerate(clip):
        if i >= len(boxes):
            break
        name = kept / f"latents-{i // CHUNK:05d}.npy"
        if i % CHUNK == 0:
            chunk = []
            ready = _load(name)
            if ready is not None:
                latents.extend(ready)
        if i < len(latents):
            continue
        box = boxes[i]
        if box is None:
            chunk.append(np.zeros(0, np.float32))
        else:
            both = encode(crops(picture, box))  # (2, 4, s, s)
            chunk.append(both.reshape(-1, *both.shape[2:]))
            crop = crop_box(box)
            if parser is not None:
                mask = parser(cut(picture, crop, "black"))
            else:
                face = faces[i]
                assert face is not None
                mask = points_mask(face.points, crop)
            mask = finish_mask(mask, box, crop, plan.upper, plan.softness)
            _store(kept / f"mask-{i:05d}.png", mask)
        if len(chunk) == CHUNK or i == len(boxes) - 1:
            shape = next((one.shape for one in chunk if one.size), (8, FACE // 8, FACE // 8))
            filled = [one if one.size else np.zeros(shape, np.float32) for one in chunk]
            write_array(name, np.stack(filled))
            latents.extend(filled)
        progress("encoding", (i + 1) / len(boxes))
    return np.stack(latents)


def _store(path: Path, mask: UInt8) -> None:
    """A mask as PNG (without loss), atomically."""
    good, data = cv2.imencode(".png", mask)
    if not good:
        raise AvatarError("a mask could not be written: is the disk full?")
    write_atomic(path, lambda beside: void_write(beside, data.tobytes()))


def void_write(path: Path, data: bytes) -> None:
    """`data` as the file's whole content."""
    path.write_bytes(data)


def _mask(kept: Path, i: int) -> UInt8:
    mask = cv2.imread(str(kept / f"mask-{i:05d}.png"), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise AvatarError(f"the mask of picture {i} is damaged: run the preparation again")
    return np.asarray(mask, np.uint8)
