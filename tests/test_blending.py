"""Blending: bit for bit what Pillow's masked paste gives, and several times as fast."""

from __future__ import annotations

import copy
import time

import cv2
import numpy as np
import pytest

from voipavatar.avatar import (
    Box,
    Patch,
    blend,
    blended,
    crop_box,
    fold,
    make_patch,
    paste,
    put_i420,
    to_i420,
)
from voipavatar.media import UInt8

from .musetalk_parts import needs

SIZES = [  # picture (w, h), face box
    ((640, 480), (130, 40, 524, 434)),
    ((704, 1216), (180, 260, 520, 600)),
    ((1280, 720), (475, 180, 805, 510)),
    ((1920, 1080), (700, 200, 1200, 700)),
    ((3840, 2160), (1400, 400, 2400, 1400)),
]


def scene(size: tuple[int, int], face: Box, seed: int = 0) -> tuple[UInt8, UInt8, UInt8, Box]:
    """A picture, a new face, and a soft mask over its crop box."""
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
    size_ = int(0.1 * side // 2 * 2) + 1
    return picture, new, np.asarray(cv2.GaussianBlur(mask, (size_, size_), 0), np.uint8), crop


def pillow_way(picture: UInt8, new: UInt8, face: Box, mask: UInt8, crop: Box) -> UInt8:
    """The compositing that MuseTalk publishes, as its steps are described: the picture as an image,
    the crop cut out, the face put into it, the crop put back through the mask."""
    from PIL import Image

    x1, y1, x2, y2 = face
    sized = cv2.resize(new, (x2 - x1, y2 - y1))
    body = Image.fromarray(copy.deepcopy(picture)[:, :, ::-1])
    large = body.crop(crop)
    large.paste(Image.fromarray(sized[:, :, ::-1]), (x1 - crop[0], y1 - crop[1]))
    body.paste(large, crop[:2], Image.fromarray(mask).convert("L"))
    return np.asarray(body, np.uint8)[:, :, ::-1]


def ours(picture: UInt8, new: UInt8, face: Box, mask: UInt8, crop: Box) -> UInt8:
    patch = make_patch(picture, face, mask, crop)
    out: UInt8 = picture.copy()
    if patch is not None:
        h, w = patch.mask.shape
        out[patch.y : patch.y + h, patch.x : patch.x + w] = blended(patch, new)
    return out


def test_every_combination_is_rounded_half_up() -> None:
    """All 16.7 million of face, picture and mask."""
    face, under = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for m in range(256):
        got = blend(face, under, np.full_like(face, m))
        exact = (2 * (face.astype(np.int64) * m + under.astype(np.int64) * (255 - m)) + 255) // 510
        assert np.array_equal(got, exact), m


@pytest.mark.parametrize(("size", "face"), SIZES)
def test_equal_to_pillow(size: tuple[int, int], face: Box) -> None:
    needs("PIL")
    picture, new, mask, crop = scene(size, face)
    assert np.array_equal(
        ours(picture, new, face, mask, crop), pillow_way(picture, new, face, mask, crop)
    )


@pytest.mark.parametrize(
    "face",
    [
        (10, 5, 210, 245),  # the crop box leaves to the left and above
        (420, 200, 650, 470),  # the face itself leaves to the right, past 640
        (300, 300, 500, 500),  # and below, past 480
        (3, 3, 636, 478),
        (101, 101, 132, 136),  # small, odd
    ],
)
def test_equal_to_pillow_at_the_edges(face: Box) -> None:
    needs("PIL")
    for seed in range(4):
        picture, new, mask, crop = scene((640, 480), face, seed)
        assert np.array_equal(
            ours(picture, new, face, mask, crop), pillow_way(picture, new, face, mask, crop)
        )


def test_random_boxes_are_equal_to_pillow() -> None:
    needs("PIL")
    rng = np.random.default_rng(5)
    for seed in range(60):
        x, y = (int(rng.integers(0, 250)) for _ in "xy")
        w, h = (int(rng.integers(20, 200)) for _ in "wh")
        face = (x, y, x + w, y + h)
        picture, new, mask, crop = scene((320, 240), face, seed)
        assert np.array_equal(
            ours(picture, new, face, mask, crop), pillow_way(picture, new, face, mask, crop)
        ), face


def test_a_part_converts_as_the_whole() -> None:
    """I420 of the blended picture, and the blended part put into the I420 picture: the same."""
    for size, face in SIZES[:3]:
        picture, new, mask, crop = scene(size, face)
        patch = make_patch(picture, face, mask, crop)
        assert patch is not None
        whole = to_i420(ours(picture, new, face, mask, crop))
        assert np.array_equal(paste(to_i420(picture), patch, new), whole)


def test_strength_goes_from_the_picture_to_the_face() -> None:
    picture, new, mask, crop = scene((640, 480), (130, 40, 524, 434))
    patch = make_patch(picture, (130, 40, 524, 434), mask, crop)
    assert patch is not None
    flat = to_i420(picture)
    assert np.array_equal(paste(flat, patch, new, 0.0), flat)
    away = [
        float(np.abs(paste(flat, patch, new, s).astype(int) - flat.astype(int)).mean())
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert away == sorted(away) and away[-1] > 3 * away[1] > 0


def test_a_mask_of_nothing_is_no_patch() -> None:
    picture, _, mask, crop = scene((640, 480), (130, 40, 524, 434))
    assert make_patch(picture, (130, 40, 524, 434), np.zeros_like(mask), crop) is None
    assert make_patch(picture, (900, 40, 990, 134), mask, crop_box((900, 40, 990, 134))) is None


def test_put_at_even_places_only_touches_its_place() -> None:
    picture = np.zeros((60 * 3 // 2, 80), np.uint8)
    put_i420(picture, 10, 20, np.full((8, 12, 3), 255, np.uint8))
    touched = np.argwhere(picture[:60] != 0)
    assert touched.min(0).tolist() == [20, 10] and touched.max(0).tolist() == [27, 21]
    assert int((picture[60:] != 0).sum()) == 2 * 4 * 6


def test_the_loop_runs_forward_and_back() -> None:
    assert [fold(i, 4) for i in range(8)] == [0, 1, 2, 3, 2, 1, 0, 1]
    assert [fold(i, 3, repeat_ends=True) for i in range(8)] == [0, 1, 2, 2, 1, 0, 0, 1]
    assert [fold(i, 1) for i in range(3)] == [0, 0, 0] == [fold(i, 1, True) for i in range(3)]
    assert all(abs(fold(i + 1, 7) - fold(i, 7)) == 1 for i in range(100))


def ratio(size: tuple[int, int], face: Box, seconds: float = 0.4) -> tuple[float, float]:
    """Milliseconds of Pillow's way (to BGR) and of ours (to I420), the best of many."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        picture, new, mask, crop = scene(size, face)
        flat = to_i420(picture)
        made = make_patch(picture, face, mask, crop)
        assert made is not None
        patch: Patch = made
        best = [1e9, 1e9]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for which in (0, 1):
                start = time.perf_counter()
                if which == 0:
                    pillow_way(picture, new, face, mask, crop)
                else:
                    paste(flat, patch, new)
                best[which] = min(best[which], time.perf_counter() - start)
        return best[0] * 1000, best[1] * 1000
    finally:
        cv2.setNumThreads(threads)


def test_several_times_as_fast_as_pillows_way() -> None:
    """Both in turns in the same run, the best of each: what the machine's load can't change."""
    needs("PIL")
    ratios = []
    for size, face in SIZES[:4]:
        slow, fast = ratio(size, face)
        ratios.append(slow / fast)
    assert float(np.median(ratios)) > 3, ratios
