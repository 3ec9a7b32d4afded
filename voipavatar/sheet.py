"""A prepared face on one page: its points, the mouth's shapes and a blink.

Made for a person who wants to see in one look whether a portrait will be good.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .engines import Avatar
from .engines.film import FilmPuppet
from .engines.filmlips import carried
from .engines.puppet import Pose
from .engines.rig import HEAD, Float64
from .engines.viseme import GREY, VisemeEngine, read_portrait
from .errors import AvatarError, ConfigError
from .media import UInt8

SHAPES: dict[str, tuple[float, float, float, float, float, float, float]] = {
    "at rest": (0, 0, 0, 0, 0, 0, 0),
    "m b p": (0, 0, 0, 1, 0, 0, 0),
    "f v": (0.08, 0.1, 0, 0, 1, 0.3, 0),
    "s z": (0.08, 0.35, 0, 0, 0, 1, 0),
    "sh ch": (0.18, 0, 0.6, 0, 0, 0.8, 0),
    "l d t": (0.25, 0.1, 0, 0, 0, 0.3, 0.7),
    "ee": (0.25, 0.8, 0, 0, 0, 0.3, 0),
    "eh": (0.55, 0.5, 0, 0, 0, 0.2, 0),
    "ah": (1, 0, 0, 0, 0, 0, 0),
    "oh": (0.6, 0, 0.7, 0, 0, 0, 0),
    "oo": (0.25, 0, 1, 0, 0, 0, 0),
}
"""Jaw, width, round, press, tuck, teeth, tongue; their targets as in `articulation`."""

_TILE = (300, 260)
_PLAN = 5
_PAPER = (250, 248, 246)
_INK = (60, 50, 40)


def make_sheet(
    engine: VisemeEngine, avatar: Avatar, portrait: Path, background: tuple[int, int, int]
) -> UInt8:
    """(H, W, 3) BGR of an avatar of the `viseme` engine that was prepared from `portrait`."""
    manifest = json.loads((avatar.path / "manifest.json").read_text("utf-8"))
    puppet = engine.open(avatar).puppet
    film = puppet if isinstance(puppet, FilmPuppet) else None
    at = film.reference if film is not None else 0
    if film is not None:
        picture = np.asarray(cv2.cvtColor(film.plain(at), cv2.COLOR_YUV2BGR_I420), np.uint8)
    else:
        picture = read_portrait(portrait.read_bytes(), background)
    origin, axis = np.asarray(puppet.rig.frame, np.float64)
    unit = float(np.linalg.norm(axis))

    def drawn(mouth: tuple[float, ...], blink: float = 0.0, **head: float) -> UInt8:
        turn = np.array([head.get(name, 0.0) for name in HEAD], np.float32)
        shape = np.array([*mouth, float(any(mouth))], np.float32)
        i420 = puppet.draw(Pose(shape, turn, blink, clock=at))
        return np.asarray(cv2.cvtColor(i420, cv2.COLOR_YUV2BGR_I420), np.uint8)

    rest = SHAPES["at rest"]
    around = (-0.72, -0.52, 0.72, 0.73)
    eyes = (-0.85, -1.42, 0.85, 0.05)
    whole = (-1.15, -1.75, 1.15, 0.95)
    tiles = [
        _tile(name, _cut(drawn(shape), origin, unit, around)) for name, shape in SHAPES.items()
    ]
    if film is not None:
        tiles += _moments(film)
    else:
        for name, blink in (("eyes half shut", 0.5), ("eyes shut", 1.0)):
            tiles.append(_tile(name, _cut(drawn(rest, blink), origin, unit, eyes)))
        turned = drawn(rest, 0, yaw=0.06, roll=-0.02)
        tiles.append(_tile("turned", _cut(turned, origin, unit, whole)))
        up = drawn(SHAPES["eh"], 0, pitch=-0.035, brow=0.6)
        tiles.append(_tile("head up", _cut(up, origin, unit, whole)))
    while len(tiles) % _PLAN:
        tiles.append(np.full((_TILE[1] + 26, _TILE[0], 3), _PAPER, np.uint8))
    rows = [np.hstack(tiles[i : i + _PLAN]) for i in range(0, len(tiles), _PLAN)]
    width = rows[0].shape[1]
    points = _points(picture, manifest["landmarks"], (width // 2, 620))
    shown = _fitted(drawn(rest), (width // 2, 620))
    head = np.hstack([_tile("what was found", points, None), _tile("the picture", shown, None)])
    page = [head, *rows]
    found = "given by hand" if manifest.get("given") else "found"
    lines = [f"{portrait.name}: points {found}; {avatar.width} x {avatar.height}"]
    if film is not None:
        lines[0] += (
            f"; {film.frames} pictures, {manifest['driven']} of them driven; "
            f"{len(film.bank.layers)} inner mouths of its own"
        )
    lines += [f"- {line}" for line in manifest.get("advice", [])]
    page.append(_text(lines, width))
    return np.asarray(np.vstack(page), np.uint8)


def _moments(film: FilmPuppet) -> list[UInt8]:
    """A clip where its head is most to one side, to the other, high, low, tilted, and nearest: as
    it is at rest, and speaking; and where its own mouth is widest."""
    origin, axis = np.asarray(film.rig.frame, np.float64)
    unit = float(np.linalg.norm(axis))
    there = np.array([carried(pose, origin) for pose in film.poses])
    usable = np.flatnonzero(film.strength >= 1)
    if not len(usable):
        usable = np.array([film.reference])
    tilt, size = np.abs(np.angle(film.poses[:, 0])), np.abs(film.poses[:, 0])
    picks = {
        "left": np.argmin(there[usable, 0]),
        "right": np.argmax(there[usable, 0]),
        "tilted": np.argmax(tilt[usable]),
        "nearest": np.argmax(size[usable]),
        "own mouth widest": np.argmax(film.gaps[usable]),
    }
    tiles = []
    for name, pick in picks.items():
        i = int(usable[int(pick)])
        for shape in ("at rest", "eh"):
            mouth = np.array([*SHAPES[shape], float(shape != "at rest")], np.float32)
            drawn = film.draw(Pose(mouth, np.zeros(len(HEAD), np.float32), clock=i))
            bgr = np.asarray(cv2.cvtColor(drawn, cv2.COLOR_YUV2BGR_I420), np.uint8)
            scale = float(size[i])
            part = _cut(bgr, there[i], unit * scale, (-0.9, -0.75, 0.9, 0.8))
            tiles.append(_tile(f"{name}: {shape}", part))
    return tiles


def write_sheet(
    engine: VisemeEngine, avatar: Avatar, portrait: Path, options: dict[str, Any], out: Path
) -> None:
    """The sheet as a picture file. AvatarError when it can't be written."""
    background = options.get("background")
    colour = GREY if background is None or isinstance(background, str) else tuple(background)
    if len(colour) != 3:
        raise ConfigError("engine option background must be [red, green, blue]")
    sheet = make_sheet(engine, avatar, portrait, (colour[0], colour[1], colour[2]))
    try:
        good, data = cv2.imencode(out.suffix or ".png", sheet)
    except cv2.error:
        good = False
    if not good:
        raise AvatarError(f"{out.name}: a sheet is written as .png, .jpg or .webp")
    try:
        out.write_bytes(data.tobytes())
    except OSError as error:
        raise AvatarError(f"the sheet can't be written to {out}: {error.strerror}") from error


def _cut(
    picture: UInt8, origin: Float64, unit: float, box: tuple[float, float, float, float]
) -> UInt8:
    x1, y1, x2, y2 = box
    (left, top), (right, bottom) = (
        np.rint(origin + np.array(corner) * unit).astype(int) for corner in ((x1, y1), (x2, y2))
    )
    rows, columns = picture.shape[:2]
    part = picture[max(0, top) : min(rows, bottom), max(0, left) : min(columns, right)]
    return _fitted(np.ascontiguousarray(part), _TILE)


def _fitted(picture: UInt8, size: tuple[int, int]) -> UInt8:
    """As large as it fits into `size`, on paper."""
    rows, columns = picture.shape[:2]
    scale = min(size[0] / columns, size[1] / rows)
    small = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    sized = cv2.resize(picture, small, interpolation=how)
    out = np.full((size[1], size[0], 3), _PAPER, np.uint8)
    x, y = (size[0] - small[0]) // 2, (size[1] - small[1]) // 2
    out[y : y + small[1], x : x + small[0]] = sized
    return out


def _tile(name: str, picture: UInt8, size: tuple[int, int] | None = _TILE) -> UInt8:
    if size is not None:
        picture = _fitted(picture, size)
    strip = np.full((26, picture.shape[1], 3), _PAPER, np.uint8)
    _write(strip, name, (8, 18))
    return np.asarray(np.vstack([strip, picture]), np.uint8)


def _write(picture: npt.NDArray[Any], text: str, at: tuple[int, int]) -> None:
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, _INK, 1, cv2.LINE_AA)


def _text(lines: list[str], width: int) -> UInt8:
    fits = max(20, width // 9)
    folded: list[str] = []
    for line in lines:
        current = ""
        for word in line.split():
            if len(current) + len(word) + 1 > fits:
                folded.append(current)
                current = "  "
            current = f"{current} {word}".strip() if current != "  " else f"  {word}"
        folded.append(current)
    out = np.full((22 * len(folded) + 16, width, 3), _PAPER, np.uint8)
    for i, line in enumerate(folded):
        # The drawn letters are ASCII only.
        _write(out, line.encode("ascii", "replace").decode(), (10, 22 + 22 * i))
    return out


_COLOURS = {
    "outer_lips": (80, 220, 80),
    "inner_lips": (0, 230, 255),
    "jaw": (255, 150, 40),
    "left_brow": (160, 255, 160),
    "right_brow": (160, 255, 160),
    "nose": (40, 140, 255),
    "forehead": (60, 60, 255),
}


def _points(picture: UInt8, lines: dict[str, Any], size: tuple[int, int]) -> UInt8:
    """The face with its points, enlarged."""
    every = np.vstack([np.asarray(line, np.float64)[:, :2] for line in lines.values()])
    low, high = every.min(0), every.max(0)
    margin = 0.18 * (high - low).max()
    rows, columns = picture.shape[:2]
    x1, y1 = (max(0, int(v)) for v in low - margin)
    x2, y2 = min(columns, int(high[0] + margin)), min(rows, int(high[1] + margin))
    part = np.ascontiguousarray(picture[y1:y2, x1:x2])
    scale = min(size[0] / part.shape[1], size[1] / part.shape[0])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    big = np.ascontiguousarray(cv2.resize(part, None, fx=scale, fy=scale, interpolation=how))
    for name, line in lines.items():
        points = np.asarray(line, np.float64)
        where = np.rint((points[:, :2] - (x1, y1) + 0.5) * scale - 0.5).astype(np.int32)
        colour = _COLOURS.get(name, (255, 90, 255))
        if name.endswith("iris"):
            radius = max(1, round(float(points[0, 2]) * scale))
            cv2.circle(big, tuple(map(int, where[0])), radius, (60, 60, 255), 1, cv2.LINE_AA)
            continue
        if len(where) > 1 and name != "nose":
            cv2.polylines(big, [where], name.endswith("lips"), colour, 1, cv2.LINE_AA)
        for point in where:
            cv2.circle(big, tuple(map(int, point)), 2, colour, -1, cv2.LINE_AA)
    return _fitted(np.asarray(big, np.uint8), size)
