"""Virtual sets: pictures to stand before, painted by rule at any size. Nothing is loaded.

Each is out of focus, as behind somebody before a lens, with the light from the left as on most
portraits, and a little noise against banding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import cv2
import numpy as np
import numpy.typing as npt

from .media import UInt8

Canvas: TypeAlias = npt.NDArray[Any]
Colour: TypeAlias = tuple[float, float, float]
"""Red, green, blue, 0 to 255."""


def _plane(x: Canvas, y: Canvas, *corners: Colour) -> Canvas:
    """Colours of four corners, one row after the other, blended in between. BGR."""
    a, b, c, d = (np.array(corner[::-1]) for corner in corners)
    x, y = x[..., None], y[..., None]
    return cast(Canvas, (a * (1 - x) + b * x) * (1 - y) + (c * (1 - x) + d * x) * y)


def _glow(
    canvas: Canvas, x: Canvas, y: Canvas, at: tuple[float, float], size: float, colour: Colour
) -> None:
    near = np.exp(-(((x - at[0]) ** 2 + (y - at[1]) ** 2) / size**2))
    canvas += near[..., None] * np.array(colour[::-1])


def _box(
    canvas: Canvas, x: Canvas, y: Canvas, box: tuple[float, float, float, float], colour: Colour
) -> None:
    inside = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
    canvas[inside] = colour[::-1]


def _studio(x: Canvas, y: Canvas, wide: float) -> Canvas:
    """A dark news room: panels with strips of light, and a desk's edge far away."""
    out = _plane(x / wide, y, (34, 48, 78), (18, 26, 46), (22, 30, 50), (12, 16, 28))
    for i in range(9):
        left = wide * (0.03 + 0.115 * i)
        tone = 1.0 + 0.22 * ((i * 5) % 3 - 1)
        _box(out, x, y, (left, 0.0, left + wide * 0.085, 0.78), (30 * tone, 44 * tone, 76 * tone))
    for left, strength in ((0.06, 1.0), (0.30, 0.5), (0.72, 0.7), (0.94, 0.9)):
        strip = (90 * strength + 20, 150 * strength + 30, 225 * strength + 20)
        _box(out, x, y, (wide * left, 0.06, wide * left + 0.012, 0.74), strip)
    _box(out, x, y, (0.0, 0.80, wide, 0.815), (96, 120, 160))
    _glow(out, x, y, (0.2 * wide, 0.35), 0.55, (36, 46, 60))
    return out


def _loft(x: Canvas, y: Canvas, wide: float) -> Canvas:
    """A bright room: a window on the left, shelves and a plant on the right."""
    out = _plane(x / wide, y, (236, 228, 214), (190, 176, 160), (214, 200, 184), (150, 134, 120))
    for row in range(2):
        for column in range(2):
            left, top = wide * (0.02 + 0.11 * column), 0.06 + 0.30 * row
            _box(out, x, y, (left, top, left + wide * 0.10, top + 0.28), (255, 252, 244))
    for row in range(3):
        top = 0.22 + 0.20 * row
        _box(out, x, y, (wide * 0.74, top, wide * 0.99, top + 0.016), (120, 92, 70))
        for i in range(7):
            tone = 0.75 + 0.08 * ((i * 3 + row * 5) % 6)
            colour = ((170, 110, 80), (90, 120, 130), (200, 180, 150), (110, 90, 110))[
                (i + row) % 4
            ]
            left = wide * (0.75 + 0.033 * i)
            high = 0.09 + 0.03 * ((i * 7 + row) % 3)
            box = (left, top - high, left + wide * 0.024, top)
            _box(out, x, y, box, tuple(c * tone for c in colour))  # type: ignore[arg-type]
    for i in range(9):
        angle = 0.7 + 0.22 * i
        at = (wide * 0.66 + 0.11 * np.cos(angle), 0.62 - 0.13 * np.sin(angle))
        leaf = ((x - at[0]) ** 2 / 0.0035 + (y - at[1]) ** 2 / 0.0012) < 1
        out[leaf] = (78, 118 + 4 * i, 86)
    _box(out, x, y, (wide * 0.63, 0.64, wide * 0.69, 0.78), (168, 120, 92))
    _glow(out, x, y, (0.1 * wide, 0.3), 0.5, (30, 28, 22))
    return out


def _paper(x: Canvas, y: Canvas, wide: float) -> Canvas:
    """A photographer's backdrop: one soft colour, brightest behind the shoulder."""
    out = _plane(x / wide, y, (132, 138, 150), (108, 114, 128), (116, 122, 134), (84, 90, 104))
    _glow(out, x, y, (0.38 * wide, 0.45), 0.55, (64, 62, 56))
    return out


_SETS: dict[str, tuple[Callable[[Canvas, Canvas, float], Canvas], float]] = {
    "studio": (_studio, 0.022),
    "loft": (_loft, 0.020),
    "paper": (_paper, 0.0),
}

SETS = tuple(_SETS)
"""Names of the sets."""


def make_set(name: str, width: int, height: int) -> UInt8:
    """(height, width, 3) BGR of one of `SETS`."""
    paint, blur = _SETS[name]
    wide = width / height
    columns = (np.arange(width) + 0.5) / height
    rows = (np.arange(height) + 0.5) / height
    x, y = np.meshgrid(columns, rows)
    out: Canvas = paint(x, y, wide).astype(np.float32)
    if blur:
        out = cv2.GaussianBlur(out, (0, 0), blur * height)
    out += np.random.default_rng(9).normal(0, 0.8, out.shape).astype(np.float32)
    return cast(UInt8, np.clip(np.rint(out), 0, 255).astype(np.uint8))
