"""Who is in the picture, and what is behind: a matte of a portrait, made once.

MediaPipe's small network for selfies (Apache-2.0, see `facemodels`) says roughly where the person
is; without it OpenCV's GrabCut does, begun from the face. Along the outline, where hair is, the
colours decide: how far each pixel lies between the person's and the background's colours near it,
smoothed along the picture's own edges (K. He, J. Sun, X. Tang, "Guided Image Filtering", 2010). The
person's own colours, free of the old background, are found as M. Forte and F. Pitie do it
("Approximate Fast Foreground Colour Estimation", 2021).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias, cast

import cv2
import numpy as np
import numpy.typing as npt

from .errors import AvatarError
from .media import Float32, UInt8

Floats: TypeAlias = npt.NDArray[Any]

_SIDE = 256


def roughly(picture: UInt8, network: Path) -> Float32:
    """(H, W), 0 to 1: where the network sees a person in (H, W, 3) BGR.

    AvatarError when it can't be read.
    """
    read: Any = cv2.dnn.readNetFromTFLite
    try:
        net = read(str(network))
        net.setInput(cv2.dnn.blobFromImage(picture, 1 / 255, (_SIDE, _SIDE), swapRB=True))
        out = np.asarray(net.forward(), np.float32).reshape(_SIDE, _SIDE)
    except cv2.error as error:
        raise AvatarError(
            f"the network {network} can't be read by OpenCV {cv2.__version__}: remove it, so that "
            f"it is fetched again ({error.err})"
        ) from None
    height, width = picture.shape[:2]
    return _unit(cv2.resize(out, (width, height), interpolation=cv2.INTER_CUBIC))


def by_colours(picture: UInt8, face: tuple[float, float, float, float]) -> Float32:
    """The same without a network, from where the face is (left, top, right, bottom)."""
    height, width = picture.shape[:2]
    scale = min(1.0, 480 / max(width, height))
    small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    left, top, right, bottom = (v * scale for v in face)
    wide, high = right - left, bottom - top
    x, y = (left + right) / 2, (top + bottom) / 2
    mask = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)

    def oval(cx: float, cy: float, rx: float, ry: float, value: int) -> None:
        centre, axes = (round(cx), round(cy)), (max(1, round(rx)), max(1, round(ry)))
        cv2.ellipse(mask, centre, axes, 0, 0, 360, int(value), -1)

    # Hair and shoulders may be anywhere about the face; the face itself is sure.
    oval(x, y - 0.15 * high, 1.15 * wide, 1.05 * high, cv2.GC_PR_BGD)
    oval(x, bottom + 1.2 * high, 1.9 * wide, 1.15 * high, cv2.GC_PR_BGD)
    oval(x, y - 0.12 * high, 0.62 * wide, 0.72 * high, cv2.GC_PR_FGD)
    oval(x, bottom + 1.2 * high, 1.2 * wide, 0.9 * high, cv2.GC_PR_FGD)
    oval(x, y, 0.42 * wide, 0.46 * high, cv2.GC_FGD)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(1)
    cv2.grabCut(small, mask, None, *models, 5, cv2.GC_INIT_WITH_MASK)  # type: ignore[call-overload]
    person = ((mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)).astype(np.uint8)
    # Of all pieces the one with the face, without holes.
    _, names = cv2.connectedComponents(person)
    at = names[int(np.clip(y, 0, len(names) - 1)), int(np.clip(x, 0, names.shape[1] - 1))]
    person = (names == at).astype(np.uint8)
    outlines, _ = cv2.findContours(person, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(person, outlines, -1, 1, -1)
    out = cv2.GaussianBlur(person.astype(np.float32), (0, 0), 1.5)
    return _unit(cv2.resize(out, (width, height), interpolation=cv2.INTER_LINEAR))


def refined(picture: UInt8, rough: Float32, unit: float) -> Float32:
    """The matte's outline by the picture's colours. `unit` is the distance of the eyes' outer
    corners in pixels: what is far from the outline, by this measure, stays as it is."""
    image: Float32 = (picture / np.float32(255)).astype(np.float32)
    reach = max(2.0, 0.10 * unit)
    hard = (rough > 0.5).astype(np.uint8)
    inside = cv2.distanceTransform(hard, cv2.DIST_L2, 5)
    outside = cv2.distanceTransform(1 - hard, cv2.DIST_L2, 5)
    # Colours of either side, from where it is sure.
    person = (inside > 0.55 * reach).astype(np.float32)
    ground = (outside > 1.0 * reach).astype(np.float32)
    one, other = (_spread(image, side, 0.9 * reach) for side in (person, ground))
    axis = one - other
    length = (axis * axis).sum(-1)
    along = ((image - other) * axis).sum(-1) / np.maximum(length, 1e-6)
    told = np.clip((along - 0.08) / 0.72, 0, 1)
    # Where the two sides look alike, their colours tell nothing.
    clear = np.clip((np.sqrt(length) - 0.15) / 0.15, 0, 1)
    # Colours count where the network isn't sure; far in and far out they don't.
    near = np.clip(1 - inside / (0.55 * reach), 0, 1) * (hard > 0)
    near = np.maximum(near, np.clip(1 - outside / (1.0 * reach), 0, 1) * (hard == 0))
    share = clear * np.clip(near * 1.8, 0, 1)
    mixed = rough + (told - rough) * share
    smooth = _guided(image, mixed.astype(np.float32), max(2, round(0.02 * unit)), 2e-4)
    smooth = np.clip((smooth - 0.05) / 0.90, 0, 1)
    out = np.where(inside > 0.7 * reach, 1.0, smooth)
    return _unit(np.where(outside > 1.1 * reach, 0.0, out))


def own_colours(picture: UInt8, alpha: Float32) -> UInt8:
    """The person's colours everywhere, as if nothing were behind; also beyond the outline."""
    image = picture.astype(np.float32)
    cover = alpha[..., None]
    colour = image
    for size in (91, 7):
        weight = cv2.blur(alpha, (size, size))[..., None]
        mine = cv2.blur(colour * cover, (size, size)) / (weight + 1e-5)
        rest = cv2.blur(image * (1 - cover), (size, size)) / (1 - weight + 1e-5)
        colour = np.clip(mine + cover * (image - cover * mine - (1 - cover) * rest), 0, 255)
    # Where the person is whole it is as it was.
    colour = colour + (image - colour) * np.clip((cover - 0.9) / 0.1, 0, 1)
    return cast(UInt8, np.rint(colour).astype(np.uint8))


def blurred(picture: UInt8, alpha: Float32) -> UInt8:
    """What is behind the person, as a wide lens sees it: without the person, out of focus."""
    ground = np.clip(1 - cv2.dilate(alpha, np.ones((9, 9))) * 1.2, 0, 1)
    out = _spread(picture.astype(np.float32), ground, 0.022 * picture.shape[0])
    out += np.random.default_rng(9).normal(0, 0.8, out.shape).astype(np.float32)
    return cast(UInt8, np.clip(np.rint(out), 0, 255).astype(np.uint8))


def _spread(image: Float32, where: Float32, sigma: float) -> Float32:
    """Colours of the places in `where`, near and then further around; a quarter as fine."""
    height, width = where.shape
    size = (max(1, width // 4), max(1, height // 4))
    some = cv2.resize(where, size, interpolation=cv2.INTER_AREA)
    held = cv2.resize(image * where[..., None], size, interpolation=cv2.INTER_AREA)
    out: Floats = np.zeros_like(held)
    for times in (8.0, 3.0, 1.0):
        total = cv2.GaussianBlur(some, (0, 0), sigma / 4 * times)[..., None]
        mean = cv2.GaussianBlur(held, (0, 0), sigma / 4 * times) / np.maximum(total, 1e-6)
        out = out + (mean - out) * np.clip(total / 0.02, 0, 1)
    return cast(Float32, cv2.resize(out, (width, height), interpolation=cv2.INTER_LINEAR))


def _guided(guide: Float32, source: Float32, radius: int, smooth: float) -> Float32:
    """`source` as a local linear function of the guide's colours."""
    size = (2 * radius + 1, 2 * radius + 1)

    def mean(of: Floats) -> Floats:
        return cast(Floats, cv2.blur(of, size))

    middle, level = mean(guide), mean(source)
    p, q, r = cv2.split(mean(guide * source[..., None]) - middle * level[..., None])
    one, two, three = cv2.split(guide)
    m1, m2, m3 = cv2.split(middle)
    # The inverse of a symmetric 3 x 3 matrix, everywhere at once.
    a, d, f = (mean(x * x) - m * m + smooth for x, m in ((one, m1), (two, m2), (three, m3)))
    b, c, e = mean(one * two) - m1 * m2, mean(one * three) - m1 * m3, mean(two * three) - m2 * m3
    aa, bb, cc = d * f - e * e, c * e - b * f, b * e - c * d
    dd, ee, ff = a * f - c * c, b * c - a * e, a * d - b * b
    whole = a * aa + b * bb + c * cc
    x, y, z = (aa * p + bb * q + cc * r), (bb * p + dd * q + ee * r), (cc * p + ee * q + ff * r)
    x, y, z = x / whole, y / whole, z / whole
    offset = level - (x * m1 + y * m2 + z * m3)
    return cast(Float32, mean(x) * one + mean(y) * two + mean(z) * three + mean(offset))


def _unit(values: Floats) -> Float32:
    return np.clip(values, 0, 1).astype(np.float32)
