"""Which of the face mesh's points is what. `left` and `right` are as seen in the picture."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

POINTS = 468

OUTER_LIPS = (
    (61, 185, 40, 39, 37, 0, 267, 269, 270, 409)
    + (291, 375, 321, 405, 314, 17, 84, 181, 91, 146)
)  # fmt: skip
INNER_LIPS = (
    (78, 191, 80, 81, 82, 13, 312, 311, 310, 415)
    + (308, 324, 318, 402, 317, 14, 87, 178, 88, 95)
)  # fmt: skip
LEFT_EYE = (
    (33, 246, 161, 160, 159, 158, 157, 173, 133),
    (33, 7, 163, 144, 145, 153, 154, 155, 133),
)
"""Upper and lower lid, left to right."""
RIGHT_EYE = (
    (362, 398, 384, 385, 386, 387, 388, 466, 263),
    (362, 382, 381, 380, 374, 373, 390, 249, 263),
)
LEFT_BROW = ((70, 63, 105, 66, 107), (46, 53, 52, 65, 55))
"""Upper and lower edge, left to right."""
RIGHT_BROW = ((336, 296, 334, 293, 300), (285, 295, 282, 283, 276))
JAW = (
    (127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152)
    + (377, 400, 378, 379, 365, 397, 288, 361, 323, 454, 356)
)  # fmt: skip
NOSE = {"bridge": 6, "tip": 4, "base": 2, "left": 64, "right": 294}
FOREHEAD = 10


def yaw(points: npt.NDArray[np.float64]) -> float:
    """Degrees that the head of (468, 2 or more) points is turned to the right, roughly."""
    axis = points[263, :2] - points[33, :2]
    axis = axis / np.linalg.norm(axis)
    across = (points[[234, 454, 1], :2] - points[168, :2]) @ axis
    left, right = -across[0], across[1]
    # A head's half width against how far its nose stands out: about 1 to 0.75.
    half = (left + right) / 2
    offset = across[2] - (right - left) / 2
    return math.degrees(math.asin(float(np.clip(offset / (0.9 * half), -1, 1))))
