"""A prepared avatar: its loop of pictures, where the face is, and how a new face is put back.

On disk it is a folder: `manifest.json`, written last, says what the other files are and their
sizes and hashes; they hold arrays and nothing that could run. Pictures are mapped, not read, so
that a loop costs memory once a machine and not once a room.

The blend is exact: the integer sum `(face * mask + picture * (255 - mask)) / 255`, rounded half
up, is bit for bit what Pillow's masked paste gives, and so what MuseTalk's own compositing gives;
only where the mask is not zero, and without copying the picture through other libraries.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from .errors import AvatarError
from .media import Float32, UInt8

Box: TypeAlias = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; the last two are the first outside."""

LOOP_FPS = 25
"""Pictures a second in every prepared loop: the rate the mouths were trained at."""

FACE = 256
"""Side, in pixels, of the square that a network draws."""


# --- the loop -------------------------------------------------------------------------------------


def fold(clock: int, frames: int, repeat_ends: bool = False) -> int:
    """Which picture of a loop that runs forward and back is shown at `clock`.

    `repeat_ends` shows the first and the last twice, as MuseTalk's own list does (period 2n);
    without it the period is 2n - 2 and the motion has no stop at its turning points.
    """
    if frames < 2:
        return 0
    if repeat_ends:
        at = clock % (2 * frames)
        return at if at < frames else 2 * frames - 1 - at
    at = clock % (2 * frames - 2)
    return at if at < frames else 2 * frames - 2 - at


# --- colours --------------------------------------------------------------------------------------


def to_i420(bgr: UInt8) -> UInt8:
    """(H, W, 3) to I420 (H * 3 // 2, W), BT.601 limited range. H and W are even.

    Every 2 x 2 square is converted by itself, so a part cut at even places converts as the whole.
    """
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2YUV_I420), np.uint8)


def put_i420(image: UInt8, x: int, y: int, bgr: UInt8) -> None:
    """Convert `bgr` and write it into the I420 picture `image` at (x, y), all even."""
    h, w = bgr.shape[:2]
    part = to_i420(bgr)
    height, width = image.shape[0] * 2 // 3, image.shape[1]
    image[y : y + h, x : x + w] = part[:h]
    planes = image[height:].reshape(2, height // 2, width // 2)
    planes[:, y // 2 : (y + h) // 2, x // 2 : (x + w) // 2] = part[h:].reshape(2, h // 2, w // 2)


# --- blending -------------------------------------------------------------------------------------


def blend(face: UInt8, under: UInt8, mask: UInt8) -> UInt8:
    """`(face * mask + under * (255 - mask)) / 255`, rounded half up; exact.

    All three (H, W, 3). 16 bits are enough: 255 * 255 + 128 < 65536, and dividing by 255 is
    `t + (t >> 8) >> 8` for every such t.
    """
    out = np.empty_like(under)
    # in strips that stay in the cache, with the same two buffers for all of them
    rows = max(1, min(len(under), 32_000 // max(1, under[:1].size)))
    sums = np.empty((2, rows, *under.shape[1:]), np.uint16)
    for top in range(0, len(under), rows):
        part = slice(top, top + rows)
        total, other = sums[:, : len(under[part])]
        np.multiply(face[part], mask[part], out=total, dtype=np.uint16)
        np.multiply(under[part], np.invert(mask[part]), out=other, dtype=np.uint16)
        total += other
        total += 128
        np.right_shift(total, 8, out=other)
        total += other
        np.right_shift(total, 8, out=total)
        out[part] = total
    return out


def crop_box(face: Box, expand: float = 1.5) -> Box:
    """The square about a face box in which its mask is drawn. May leave the picture."""
    x1, y1, x2, y2 = face
    x, y = (x1 + x2) // 2, (y1 + y2) // 2
    s = int(max(x2 - x1, y2 - y1) // 2 * expand)
    return x - s, y - s, x + s, y + s


@dataclass(frozen=True, slots=True)
class Patch:
    """Where a face goes into one picture of the loop, and what is there."""

    face: Box
    """The face box. May leave the picture to the right or below."""
    x: int
    y: int
    under: UInt8
    """(h, w, 3) BGR of the picture at (x, y); h, w, x, y are even."""
    mask: UInt8
    """(h, w): 255 where the new face is all, 0 where the picture is."""


def make_patch(picture: UInt8, face: Box, mask: UInt8, crop: Box) -> Patch | None:
    """What is left of `mask` (over `crop`) within the face box and the picture.

    `picture` is (H, W, 3) BGR with H and W even. None when nothing is left.
    """
    height, width = picture.shape[:2]
    x1, y1 = max(0, face[0], crop[0]), max(0, face[1], crop[1])
    x2, y2 = min(width, face[2], crop[2]), min(height, face[3], crop[3])
    if x2 <= x1 or y2 <= y1:
        return None
    inner = mask[y1 - crop[1] : y2 - crop[1], x1 - crop[0] : x2 - crop[0]]
    rows, columns = np.flatnonzero(inner.any(1)), np.flatnonzero(inner.any(0))
    if len(rows) == 0:
        return None
    x2, y2 = x1 + int(columns[-1]) + 1, y1 + int(rows[-1]) + 1
    x1, y1 = x1 + int(columns[0]), y1 + int(rows[0])
    left, top, right, bottom = x1 & ~1, y1 & ~1, x2 + (x2 & 1), y2 + (y2 & 1)
    even = np.zeros((bottom - top, right - left), np.uint8)
    even[y1 - top : y2 - top, x1 - left : x2 - left] = mask[
        y1 - crop[1] : y2 - crop[1], x1 - crop[0] : x2 - crop[0]
    ]
    under = np.ascontiguousarray(picture[top:bottom, left:right])
    return Patch(face, left, top, under, even)


def blended(patch: Patch, face: UInt8, strength: float = 1.0) -> UInt8:
    """The patch with a new face in it, BGR. `strength` below 1 leaves more of the picture."""
    x1, y1, x2, y2 = patch.face
    h, w = patch.mask.shape
    sized = np.asarray(cv2.resize(face, (x2 - x1, y2 - y1)), np.uint8)
    # the patch may be a pixel wider than the box, to be even: there the mask is 0
    top, left = max(0, y1 - patch.y), max(0, x1 - patch.x)
    bottom, right = min(h, y2 - patch.y), min(w, x2 - patch.x)
    new = sized[
        patch.y + top - y1 : patch.y + bottom - y1, patch.x + left - x1 : patch.x + right - x1
    ]
    mask = patch.mask[top:bottom, left:right]
    if strength < 1.0:
        part = np.uint16(round(256 * max(0.0, strength)))
        mask = np.asarray((mask.astype(np.uint16) * part) >> 8, np.uint8)
    out: UInt8 = patch.under.copy()
    out[top:bottom, left:right] = blend(
        new,
        patch.under[top:bottom, left:right],
        np.asarray(cv2.merge((mask, mask, mask)), np.uint8),
    )
    return out


def paste(picture: UInt8, patch: Patch, face: UInt8, strength: float = 1.0) -> UInt8:
    """A copy of the I420 `picture` with `face`, (256, 256, 3) BGR, blended in."""
    out: UInt8 = picture.copy()
    put_i420(out, patch.x, patch.y, blended(patch, face, strength))
    return out


# --- the folder -----------------------------------------------------------------------------------


MANIFEST = "manifest.json"
PARTIAL = "partial"


def digest(*parts: Any) -> str:
    """A short name for everything that `parts` say (JSON, sorted)."""
    text = json.dumps(parts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    done = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            done.update(block)
    return done.hexdigest()


def known_digest(path: Path) -> str:
    """The same, computed once as long as neither size nor time of the file changes: a clip's
    pictures are gigabytes, and every session asks whether they are whole."""
    stat = path.stat()
    return _digest_at(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest_at(path: str, size: int, changed: int) -> str:
    return file_digest(Path(path))


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a neighbour of `path`, then put it in its place at once."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """`data` as JSON, atomically."""
    text = json.dumps(data, indent=1, sort_keys=True)
    write_atomic(path, lambda beside: void(beside.write_text(text, "utf-8")))


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """`array` as .npy, atomically. Never an object array."""

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.save(file, array, allow_pickle=False)

    write_atomic(path, write)


def void(_: object) -> None:
    """For callbacks whose result nobody wants."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one if there is none that can be read."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time prepares a folder; the others wait and find it done."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:  # not "w": it would look written
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def seal(folder: Path, data: Mapping[str, Any]) -> None:
    """Write the manifest, with size and hash of every file there is. The folder is whole now."""
    files = {
        one.name: {"bytes": one.stat().st_size, "sha256": known_digest(one)}
        for one in sorted(folder.iterdir())
        if one.is_file() and one.name != MANIFEST and not one.name.startswith(".")
    }
    write_json(folder / MANIFEST, {**data, "files": files})
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def whole(folder: Path, key: str, hashes: bool = True) -> dict[str, Any] | None:
    """The manifest, if it is for `key` and every file is as it says; None otherwise."""
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if manifest.get("key") != key or not isinstance(files, dict):
        return None
    for name, said in files.items():
        path = folder / str(name)
        if Path(str(name)).name != name or not isinstance(said, dict) or not path.is_file():
            return None
        if path.stat().st_size != said.get("bytes"):
            return None
        if hashes and known_digest(path) != said.get("sha256"):
            return None
    return manifest


def partial(folder: Path, key: str) -> Path:
    """Where a preparation for `key` keeps what it has so far. Another key's is thrown away."""
    path = folder / PARTIAL
    if read_json(path / "key.json").get("key") != key:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        write_json(path / "key.json", {"key": key})
    return path


def clear(folder: Path) -> None:
    """Away with what is not whole, but for what a preparation may go on from."""
    for one in folder.iterdir():
        if one.is_file() and one.name != ".lock":
            one.unlink()


class Loop:
    """A prepared folder, mapped: pictures, patches, latents. Cheap to open, shared by sessions.

    frames.i420    every picture, one after the other, (H * 3 // 2) * W bytes each
    patches.bin    every patch: `under` (h * w * 3), then `mask` (h * w)
    index.npy      (n, 9) int64: face box, x, y, w, h of the patch, its place; place -1: no face
    latents.npy    (n, 8, 32, 32) float32: masked half, then the reference
    """

    def __init__(self, folder: Path) -> None:
        """Raises AvatarError when the folder is not whole (prepare it again)."""
        manifest = read_json(folder / MANIFEST)
        if whole(folder, str(manifest.get("key", "")), hashes=False) is None:
            raise AvatarError(
                f"the prepared avatar {folder.name} is not whole: "
                "run `voipavatar prepare` for its persona"
            )
        self.folder = folder
        self.manifest = manifest
        self.width = int(manifest["width"])
        self.height = int(manifest["height"])
        self.frames = int(manifest["frames"])
        shape = (self.frames, self.height * 3 // 2, self.width)
        try:
            self._pictures = np.memmap(folder / "frames.i420", np.uint8, "r", shape=shape)
            self._patches = np.memmap(folder / "patches.bin", np.uint8, "r")
            self._index = np.load(folder / "index.npy", allow_pickle=False)
            self._latents = np.load(folder / "latents.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise AvatarError(
                f"the prepared avatar {folder.name} can't be read ({error}): delete it and run "
                "`voipavatar prepare` again"
            ) from None

    def picture(self, i: int) -> UInt8:
        """Picture `i`, I420, as it is on disk: copy before changing it."""
        return np.asarray(self._pictures[i])

    def patch(self, i: int) -> Patch | None:
        """Where the face of picture `i` goes; None if there is no face in it."""
        x1, y1, x2, y2, x, y, w, h, place = (int(one) for one in self._index[i])
        if place < 0:
            return None
        size = w * h
        data = np.asarray(self._patches[place : place + 4 * size])
        under = data[: 3 * size].reshape(h, w, 3)
        return Patch((x1, y1, x2, y2), x, y, under, data[3 * size :].reshape(h, w))

    def has_face(self, i: int) -> bool:
        return bool(self._index[i, 8] >= 0)

    def latents(self, i: int) -> Float32:
        """(8, 32, 32): what the UNet is shown of picture `i`."""
        return np.asarray(self._latents[i])


class LoopWriter:
    """Writes a `Loop` picture by picture, so that memory does not grow with it."""

    def __init__(self, folder: Path, width: int, height: int) -> None:
        self.folder = folder
        self.width = width
        self.height = height
        self._files = contextlib.ExitStack()
        self._pictures = self._files.enter_context((folder / "frames.i420").open("wb"))
        self._patches = self._files.enter_context((folder / "patches.bin").open("wb"))
        self._index: list[tuple[int, ...]] = []
        self._place = 0

    def add(self, picture: UInt8, patch: Patch | None) -> None:
        """One more picture, (H, W, 3) BGR, and where its face goes."""
        self._pictures.write(to_i420(picture).tobytes())
        if patch is None:
            self._index.append((0, 0, 0, 0, 0, 0, 0, 0, -1))
            return
        h, w = patch.mask.shape
        self._index.append((*patch.face, patch.x, patch.y, w, h, self._place))
        self._patches.write(patch.under.tobytes() + patch.mask.tobytes())
        self._place += 4 * w * h

    def finish(self, latents: Float32, data: Mapping[str, Any]) -> None:
        """`latents` (n, 8, s, s) for every picture; the manifest last."""
        if self._place == 0:
            self._patches.write(b"\0")  # an empty file can't be mapped
        self._files.close()
        write_array(self.folder / "index.npy", np.array(self._index, np.int64).reshape(-1, 9))
        write_array(self.folder / "latents.npy", latents.astype(np.float32, copy=False))
        seal(
            self.folder,
            {
                **data,
                "frames": len(self._index),
                "width": self.width,
                "height": self.height,
                "fps": LOOP_FPS,
            },
        )

    def close(self) -> None:
        self._files.close()
