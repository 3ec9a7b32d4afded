"""Portraits of many kinds, made from what is in the repository: for tests and for measuring.

    python -m tests.portraits DIR

writes them into a folder; `voipavatar bench face --portrait FILE ...` measures them.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import yaml

from . import faces

Picture = npt.NDArray[np.uint8]

PERSONAS = Path(__file__).parent.parent / "personas"


def persona(name: str) -> Picture:
    """A persona's portrait, BGR."""
    picture = cv2.imread(str(PERSONAS / name / "portrait.png"), cv2.IMREAD_COLOR)
    assert picture is not None
    return np.asarray(picture, np.uint8)


def landmarks(name: str) -> dict[str, object]:
    """What is written down about it."""
    data = yaml.safe_load((PERSONAS / name / "landmarks.yaml").read_text("utf-8"))
    found = data.get("landmarks", data)
    assert isinstance(found, dict)
    return found


def cartoon() -> Picture:
    """Flat colours, hard edges."""
    return faces.face(1280, 720)[0]


def painting() -> Picture:
    """Strokes: every patch one colour."""
    picture = persona("clara")
    smooth = cv2.bilateralFilter(picture, 11, 60, 9)
    small = cv2.medianBlur(np.asarray(smooth, np.uint8), 7)
    steps = np.asarray(np.rint(small / 12.0) * 12, np.uint8)
    rng = np.random.default_rng(3)
    canvas = cv2.GaussianBlur(rng.normal(0, 14, picture.shape[:2]), (0, 0), 1.2)[..., None]
    return np.asarray(np.clip(steps + canvas, 0, 255), np.uint8)


def pencil() -> Picture:
    """Grey lines on paper."""
    grey = cv2.cvtColor(persona("clara"), cv2.COLOR_BGR2GRAY).astype(np.float32)
    soft = cv2.GaussianBlur(grey, (0, 0), 7)
    lines = np.clip(grey / np.maximum(soft, 1) * 245, 0, 255)
    shade = 0.72 * lines + 0.28 * grey
    return np.asarray(cv2.cvtColor(shade.astype(np.uint8), cv2.COLOR_GRAY2BGR), np.uint8)


def old_photo() -> Picture:
    """Grey, grainy, soft."""
    grey = cv2.cvtColor(persona("clara"), cv2.COLOR_BGR2GRAY).astype(np.float32)
    soft = cv2.GaussianBlur(grey, (0, 0), 1.6) * 0.8 + 30
    grain = np.random.default_rng(4).normal(0, 9, grey.shape)
    return np.repeat(np.clip(soft + grain, 0, 255)[..., None], 3, 2).astype(np.uint8)


def tilted() -> Picture:
    """The head held askew by 14 degrees, off the middle."""
    picture = persona("clara")
    height, width = picture.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 14, 0.9)
    turn[0, 2] -= 90
    out = cv2.warpAffine(picture, turn, (width, height), borderMode=cv2.BORDER_REFLECT)
    return np.asarray(out, np.uint8)


def bearded() -> Picture:
    """Glasses, and a beard around the mouth."""
    picture = persona("clara")
    marks = landmarks("clara")
    overlay = picture.copy()
    jaw = np.asarray(marks["jaw"], np.float64)
    lips = np.asarray(marks["outer_lips"], np.float64)
    hair = np.zeros(picture.shape[:2], np.uint8)
    low = jaw[len(jaw) // 4 : -(len(jaw) // 4)]
    nose = marks["nose"]
    assert isinstance(nose, dict)
    base = np.asarray(nose["base"], np.float64) + (0, 8)
    outline = np.vstack([low + (0, 14), (lips[10] + (18, -14))[None], base[None]])
    outline = np.vstack([outline, (lips[0] + (-18, -14))[None]])
    cv2.fillPoly(hair, [np.rint(outline).astype(np.int32)], 255)
    cv2.fillPoly(hair, [np.rint(lips).astype(np.int32)], 0)
    rng = np.random.default_rng(6)
    strands = cv2.GaussianBlur(rng.normal(0, 60, picture.shape[:2]), (0, 0), 0.6, sigmaY=3.0)
    overlay[:] = np.clip(np.array([32, 44, 60]) + strands[..., None] * 0.6, 0, 255)
    share = cv2.GaussianBlur(hair, (0, 0), 5).astype(np.float64)[..., None] / 255 * 0.85
    out = np.asarray(picture * (1 - share) + overlay * share, np.uint8)
    for side in ("left_eye", "right_eye"):
        eye = marks[side]
        assert isinstance(eye, dict)
        x, y, _ = eye["iris"]
        cv2.ellipse(
            out, (round(x), round(y) + 4), (46, 38), 0, 0, 360, (30, 26, 24), 5, cv2.LINE_AA
        )
    bridge = [round(v) for v in nose["bridge"]]
    cv2.line(out, (bridge[0] - 16, bridge[1]), (bridge[0] + 16, bridge[1]), (30, 26, 24), 5)
    return np.asarray(out, np.uint8)


def crowd() -> Picture:
    """Two faces, the right one smaller."""
    left = cv2.resize(persona("clara"), (960, 540), interpolation=cv2.INTER_AREA)
    right = cv2.resize(left, (480, 270), interpolation=cv2.INTER_AREA)
    out = np.full((540, 1440, 3), 200, np.uint8)
    out[:, :960] = left
    out[200:470, 960:] = right
    return out


KINDS: dict[str, Callable[[], Picture]] = {
    "cartoon": cartoon,
    "painting": painting,
    "pencil": pencil,
    "old-photo": old_photo,
    "tilted": tilted,
    "bearded": bearded,
}
"""What is measured; the others are for tests."""


def turned_jpeg(picture: Picture) -> bytes:
    """A JPEG that lies on its side, and an EXIF tag that says so."""
    lying = cv2.rotate(picture, cv2.ROTATE_90_COUNTERCLOCKWISE)
    good, data = cv2.imencode(".jpg", lying, [cv2.IMWRITE_JPEG_QUALITY, 92])
    assert good
    # TIFF, little-endian, one entry: orientation (0x0112) is 6, "turn by 90 degrees to the right"
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 0)
    body = b"Exif\0\0" + tiff
    raw: bytes = data.tobytes()
    return raw[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + raw[2:]


def write(folder: Path) -> dict[str, Path]:
    """Every kind, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {}
    for name, make in KINDS.items():
        out[name] = folder / f"{name}.png"
        assert cv2.imwrite(str(out[name]), make())
    return out


if __name__ == "__main__":
    for path in write(Path(sys.argv[1])).values():
        print(path)
