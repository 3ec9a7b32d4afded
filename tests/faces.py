"""Drawn faces for tests: the points are known exactly, because the face is drawn through them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def face(
    width: int = 1280,
    height: int = 720,
    *,
    centre: tuple[float, float] | None = None,
    unit: float | None = None,
    gap: float = 0.0,
    skin: tuple[int, int, int] = (150, 178, 222),
) -> tuple[npt.NDArray[np.uint8], dict[str, Any]]:
    """A cartoon face (BGR) and its landmarks, as a persona's YAML holds them.

    `unit` is the distance of the outer corners of the eyes, `gap` how far the lips are apart, in
    units. Nothing in it is random.
    """
    unit = unit if unit is not None else height * 0.22
    cx, cy = centre if centre is not None else (width / 2, height * 0.47)
    marks = _marks(cx, cy, unit, gap)
    fine = 2
    y, x = np.mgrid[0 : height * fine, 0 : width * fine].astype(np.float32) / fine
    canvas = np.empty((height * fine, width * fine, 3), np.float32)
    fade = y / height
    canvas[:] = np.stack([150 + 40 * fade, 140 + 30 * fade, 120 + 40 * fade], -1)
    canvas += (6 * np.sin(x / 37) * np.cos(y / 53))[..., None]

    def fill(points: Array, colour: tuple[float, float, float]) -> None:
        fixed = np.rint((points + 0.5) * fine * 16 - 8).astype(np.int32)
        cv2.fillPoly(canvas, [fixed], colour, cv2.LINE_AA, 4)

    def stroke(points: Array, colour: tuple[float, float, float], thick: float) -> None:
        fixed = np.rint((points + 0.5) * fine * 16 - 8).astype(np.int32)
        cv2.polylines(canvas, [fixed], False, colour, max(1, round(thick * fine)), cv2.LINE_AA, 4)

    def oval(ox: float, oy: float, rx: float, ry: float, count: int = 90) -> Array:
        t = np.linspace(0, 2 * math.pi, count, endpoint=False)
        return np.stack([cx + (ox + rx * np.cos(t)) * unit, cy + (oy + ry * np.sin(t)) * unit], -1)

    blue, green, red = (float(c) for c in skin)
    dark = (blue * 0.82, green * 0.82, red * 0.86)
    hair = (45.0, 60.0, 85.0)
    fill(oval(0, -0.30, 0.98, 1.05), hair)
    fill(oval(0, 2.35, 1.75, 1.05), (120.0, 80.0, 50.0))
    neck = np.array([[-0.38, 0.7], [0.38, 0.7], [0.44, 1.5], [-0.44, 1.5]]) * unit + (cx, cy)
    fill(neck, dark)
    contour = np.asarray(marks["jaw"])
    arc = np.linspace(0, math.pi, 60)
    brow = np.stack([cx + 0.78 * np.cos(arc) * unit, cy + (0.02 - 0.80 * np.sin(arc)) * unit], -1)
    fill(np.vstack([contour, brow]), skin)
    arc = np.linspace(0.12, math.pi - 0.12, 40)
    fringe = np.stack([np.cos(arc) * 0.86, -0.42 - 0.62 * np.sin(arc)], -1) * unit + (cx, cy)
    fill(fringe, hair)
    for side in ("left", "right"):
        eye = marks[f"{side}_eye"]
        lid = np.vstack([eye["upper"], np.asarray(eye["lower"])[::-1]])
        keep = canvas.copy()
        fill(lid, (238.0, 240.0, 244.0))
        ix, iy, radius = eye["iris"]
        for share, colour in ((1.0, (95.0, 70.0, 45.0)), (0.45, (20.0, 18.0, 16.0))):
            t = np.linspace(0, 2 * math.pi, 60)
            ring = np.stack([np.cos(t), np.sin(t)], -1) * radius * share + (ix, iy)
            fill(ring, colour)
        mask = np.zeros(canvas.shape[:2], np.uint8)
        fixed = np.rint((lid + 0.5) * fine * 16 - 8).astype(np.int32)
        cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, 4)
        share_mask = (mask.astype(np.float32) / 255)[..., None]
        canvas[:] = keep + (canvas - keep) * share_mask
        stroke(np.asarray(eye["upper"]), (40.0, 38.0, 42.0), 0.016 * unit)
        stroke(np.asarray(eye["lower"]), (blue * 0.7, green * 0.7, red * 0.75), 0.007 * unit)
        stroke(np.asarray(marks[f"{side}_brow"]), (50.0, 62.0, 84.0), 0.05 * unit)
    nose = marks["nose"]
    base = np.array([nose["left"], nose["base"], nose["right"]])
    stroke(_bend(base), dark, 0.018 * unit)
    outer, inner = np.asarray(marks["outer_lips"]), np.asarray(marks["inner_lips"])
    fill(outer, (105.0, 100.0, 190.0))
    if gap > 0:
        fill(inner, (30.0, 25.0, 60.0))
    stroke(inner[0:11], (60.0, 50.0, 120.0), 0.010 * unit)
    # Some shape: light from the upper left, and a little grain that is the same every time.
    ox, oy = (x - cx) / unit, (y - cy) / unit
    shade = 1 + 0.06 * np.exp(-((ox + 0.3) ** 2 + (oy + 0.1) ** 2) / 0.3) - 0.05 * np.clip(ox, 0, 2)
    canvas *= shade[..., None]
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    grain = np.random.default_rng(5).normal(0, 1.2, (height, width, 1))
    return np.clip(np.rint(small + grain), 0, 255).astype(np.uint8), marks


def save_face(path: Path, **options: Any) -> dict[str, Any]:
    """Draw a face into a PNG; its landmarks."""
    picture, marks = face(**options)
    assert cv2.imwrite(str(path), picture)
    return marks


def _bend(points: Array) -> Array:
    t = np.linspace(0, 1, 20)[:, None]
    return np.asarray((1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2])


def _marks(cx: float, cy: float, unit: float, gap: float) -> dict[str, Any]:
    def at(x: Any, y: Any) -> list[list[float]]:
        xs, ys = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
        return [[float(cx + a * unit), float(cy + b * unit)] for a, b in zip(xs, ys, strict=True)]

    def one(x: float, y: float) -> list[float]:
        return at([x], [y])[0]

    mouth, half = 0.57, 0.27
    t = np.linspace(-1, 1, 11)
    seam = mouth - 0.012 * t**2 + 0.006 * np.cos(3 * t)
    upper_rim = seam - 0.062 * (1 - t**2) * (1 - 0.20 * np.exp(-((t / 0.16) ** 2)))
    lower_rim = seam + 0.085 * (1 - t**2) ** 0.8
    part = gap / 2 * (1 - t**2)
    outer_x = np.concatenate([t * (half + 0.012), t[9:0:-1] * (half + 0.012)])
    inner_x = np.concatenate([t * half, t[9:0:-1] * half])
    outer = at(outer_x, np.concatenate([upper_rim - part, (lower_rim + part)[9:0:-1]]))
    inner = at(inner_x, np.concatenate([seam - part, (seam + part)[9:0:-1]]))
    eyes: dict[str, Any] = {}
    for side, ex in (("left", -0.34), ("right", 0.34)):
        u = np.linspace(-1, 1, 9)
        eyes[f"{side}_eye"] = {
            "upper": at(ex + 0.16 * u, -0.082 * (1 - u**2) ** 0.75),
            "lower": at(ex + 0.16 * u, 0.050 * (1 - u**2) ** 0.85),
            "iris": [float(cx + ex * unit), float(cy - 0.018 * unit), float(0.068 * unit)],
        }
        v = np.linspace(-1, 1, 7)
        eyes[f"{side}_brow"] = at(ex + 0.20 * v, -0.235 - 0.03 * (1 - v**2))
    angle = np.linspace(math.pi, 0, 17)
    jaw = at(0.78 * np.cos(angle), 0.02 + 1.0 * np.sin(angle) ** 1.15)
    return {
        "outer_lips": outer,
        "inner_lips": inner,
        **eyes,
        "nose": {
            "bridge": one(0, 0.02),
            "tip": one(0, 0.27),
            "base": one(0, 0.36),
            "left": one(-0.13, 0.31),
            "right": one(0.13, 0.31),
        },
        "jaw": jaw,
        "forehead": one(0, -0.55),
    }
