"""Blending: bit for bit what Pillow's masked paste gives, and several times as fast."""

from __future__ import annotations

import numpy as np
import pytest

from voipavatar.avatar import (
    Box,
    blend,
    crop_box,
    fold,
    make_patch,
    paste,
    put_i420,
    to_i420,
)
from voipavatar.blend_bench import SIZES, our_way, pillow_way, scene, table
from voipavatar.blend_bench import blend as measure
from voipavatar.media import UInt8

from .musetalk_parts import needs


def ours(picture: UInt8, new: UInt8, face: Box, mask: UInt8, crop: Box) -> UInt8:
    return our_way(picture, make_patch(picture, face, mask, crop), new)


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


def test_five_times_as_fast_as_pillows_way_at_every_size() -> None:
    """Both in turns by their processor time, the best of each: what the machine's load can't
    change. `voipavatar bench blend` is the same with more runs."""
    needs("PIL")
    rows = measure(runs=2)
    assert [row["picture"] for row in rows] == [f"{w}x{h}" for (w, h), _ in SIZES]
    assert all(row["equal"] for row in rows)
    assert min(row["ratio"] for row in rows) >= 5, rows
    assert "| 3840x2160 | 1000 |" in table(rows)
