"""How fast faces are put back into pictures: ours against the way through Pillow.

Both are timed by the processor time of their one thread, in turns, the best of several: what else
the machine does then changes little.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np

from .avatar import Box, Patch, blended, crop_box, make_patch, paste, to_i420
from .errors import ConfigError
from .media import UInt8

SIZES: tuple[tuple[tuple[int, int], Box], ...] = (
    ((640, 480), (130, 40, 524, 434)),
    ((704, 1216), (180, 260, 520, 600)),
    ((1280, 720), (475, 180, 805, 510)),
    ((1920, 1080), (700, 200, 1200, 700)),
    ((3840, 2160), (1400, 400, 2400, 1400)),
)
"""Width and height of pictures, and the box of the face in each."""


def scene(size: tuple[int, int], face: Box, seed: int = 0) -> tuple[UInt8, UInt8, UInt8, Box]:
    """A picture, a new face (256 x 256), and a soft mask over the face's crop box."""
    rng = np.random.default_rng(seed)
    w, h = size
    noise = rng.integers(0, 256, (max(2, h // 8), max(2, w // 8), 3), np.uint8)
    picture = np.asarray(cv2.resize(noise, (w, h), interpolation=cv2.INTER_CUBIC), np.uint8)
    new = rng.integers(0, 256, (256, 256, 3), np.uint8)
    crop = crop_box(face)
    side = crop[2] - crop[0]
    mask = np.zeros((side, side), np.uint8)
    x1, y1, x2, y2 = (a - b for a, b in zip(face, crop[:2] * 2, strict=True))
    mask[max(0, y1) : y2, max(0, x1) : x2] = 255
    mask[: side // 2] = 0
    width = int(0.1 * side // 2 * 2) + 1
    return picture, new, np.asarray(cv2.GaussianBlur(mask, (width, width), 0), np.uint8), crop


def pillow_way(picture: UInt8, new: UInt8, face: Box, mask: UInt8, crop: Box) -> UInt8:
    """MuseTalk's published compositing, by the description of its steps: the picture copied and
    made an image, its crop cut out, the face put into that, and all put back through the mask."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            "Pillow, which is compared with, is not installed: pip install pillow"
        ) from None
    x1, y1, x2, y2 = face
    sized = cv2.resize(new, (x2 - x1, y2 - y1))
    body = Image.fromarray(picture.copy()[:, :, ::-1])
    large = body.crop(crop)
    large.paste(Image.fromarray(sized[:, :, ::-1]), (x1 - crop[0], y1 - crop[1]))
    body.paste(large, crop[:2], Image.fromarray(mask).convert("L"))
    return np.asarray(body, np.uint8)[:, :, ::-1]


def our_way(picture: UInt8, patch: Patch | None, new: UInt8) -> UInt8:
    """The same in BGR, for comparison; what is shown is converted as it is written."""
    out: UInt8 = picture.copy()
    if patch is not None:
        h, w = patch.mask.shape
        out[patch.y : patch.y + h, patch.x : patch.x + w] = blended(patch, new)
    return out


def compare(size: tuple[int, int], face: Box, runs: int) -> dict[str, Any]:
    """One size: milliseconds of both ways, and whether the pictures are equal."""
    picture, new, mask, crop = scene(size, face)
    flat, patch = to_i420(picture), make_patch(picture, face, mask, crop)
    assert patch is not None
    same = np.array_equal(our_way(picture, patch, new), pillow_way(picture, new, face, mask, crop))
    ways = (
        partial(pillow_way, picture, new, face, mask, crop),
        partial(paste, flat, patch, new),
    )
    best = [float("inf")] * 2
    for _ in range(runs):
        for which in (0, 1):
            for _again in range(
                3
            ):  # in a row, so that neither finds the other's pictures in the cache
                start = time.thread_time()
                ways[which]()
                best[which] = min(best[which], time.thread_time() - start)
    return {
        "picture": f"{size[0]}x{size[1]}",
        "face": face[2] - face[0],
        "pillow_ms": round(best[0] * 1000, 2),
        "ours_ms": round(best[1] * 1000, 2),
        "ratio": round(best[0] / best[1], 1),
        "equal": bool(same),
    }


def blend(
    sizes: Sequence[tuple[tuple[int, int], Box]] = SIZES, runs: int = 8
) -> list[dict[str, Any]]:
    """Pillow's way (to a BGR picture) and ours (to the I420 picture that is published)."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return [compare(size, face, runs) for size, face in sizes]
    finally:
        cv2.setNumThreads(threads)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, with the versions that they were measured with."""
    import PIL

    lines = [
        f"`voipavatar bench blend`, one thread: Python {platform.python_version()}, "
        f"numpy {np.__version__}, OpenCV {cv2.__version__}, Pillow {PIL.__version__}",
        "",
        "| picture | face | Pillow's way ms | ours ms | ratio | equal |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['picture']} | {one['face']} | {one['pillow_ms']} | {one['ours_ms']} | "
        f"{one['ratio']} | {'yes' if one['equal'] else 'NO'} |"
        for one in rows
    ]
    return "\n".join(lines)
