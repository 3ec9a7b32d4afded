"""Clips of a person, made from the portraits in the repository: for tests and for measuring.

    python -m tests.films DIR

writes a few into a folder. Where the face is in every picture of them is known exactly: they are a
portrait, drawn with a mouth and laid over itself with a known shift, turn and size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt

from voipavatar.engines.articulation import PARAMETERS
from voipavatar.engines.puppet import Pose, Puppet
from voipavatar.engines.rig import HEAD, Landmarks, build, parse_landmarks
from voipavatar.engines.viseme import fit

from . import portraits

Picture = npt.NDArray[np.uint8]
Points = npt.NDArray[np.float64]

Move = Callable[[float], tuple[float, float, float, float]]
"""At a time in seconds: shift right and down in parts of the height, degrees, size."""
Mouth = Callable[[float], dict[str, float]]
"""At a time in seconds: mouth parameters, and `blink`."""


@lru_cache(maxsize=4)
def drawn(name: str, width: int, height: int) -> tuple[Puppet, Landmarks]:
    """A persona that can be posed, and where its face is."""
    marks = parse_landmarks(portraits.landmarks(name))
    picture, marks = fit(portraits.persona(name), marks, width, height)
    return Puppet(build(picture, marks, 0.0)), marks


def quiet(t: float) -> dict[str, float]:
    """A closed mouth, and a blink now and then."""
    return {"blink": max(0.0, 1 - abs(t % 3.1 - 1.2) / 0.12)}


def talking(t: float) -> dict[str, float]:
    """As if speaking: the mouth opens and closes four times a second."""
    jaw = max(0.0, math.sin(2 * math.pi * 1.9 * t)) * (0.7 + 0.3 * math.sin(2.3 * t))
    wide = 0.4 + 0.4 * math.sin(2 * math.pi * 0.8 * t)
    return {"jaw": jaw, "width": wide * min(1.0, 3 * jaw), "teeth": 0.5 * (1 - jaw) * (jaw > 0.1)}


def smiling(t: float) -> dict[str, float]:
    return {"width": 0.6 + 0.3 * math.sin(2 * math.pi * 0.3 * t)}


def gaping(t: float) -> dict[str, float]:
    """Open all the time, and quite still."""
    return {"jaw": 0.5 + 0.02 * math.sin(3 * t), "width": 0.3}


def both(t: float) -> dict[str, float]:
    """A second of silence, a second of speech, and so on."""
    return talking(t) if t % 2.0 > 1.0 else quiet(t)


def still(t: float) -> tuple[float, float, float, float]:
    return 0.0, 0.0, 0.0, 1.0


def swaying(t: float) -> tuple[float, float, float, float]:
    """As a person moves who stands and listens."""
    return (
        0.025 * math.sin(2 * math.pi * 0.31 * t),
        0.012 * math.sin(2 * math.pi * 0.47 * t + 1),
        4.0 * math.sin(2 * math.pi * 0.23 * t + 2),
        1.0 + 0.03 * math.sin(2 * math.pi * 0.17 * t),
    )


def leaning(t: float) -> tuple[float, float, float, float]:
    """The head held askew, and moving."""
    x, y, turn, size = swaying(t)
    return x, y, 12 + 2 * turn, 0.95 * size


@dataclass
class Film:
    """What is in a clip."""

    path: Path
    fps: int
    size: tuple[int, int]
    pictures: list[Picture] = field(default_factory=list)
    """BGR, before coding."""
    moves: list[Points] = field(default_factory=list)
    """(2, 3): from the portrait's pixels to each picture's."""
    mouths: list[dict[str, float]] = field(default_factory=list)
    marks: Landmarks | None = None
    """The portrait's."""

    def place(self, i: int, points: Points) -> Points:
        """Where points of the portrait are in picture `i`."""
        moved: Points = points @ self.moves[i][:, :2].T + self.moves[i][:, 2]
        return moved


def film(
    path: Path,
    seconds: float = 2.0,
    fps: int = 25,
    size: tuple[int, int] = (640, 360),
    persona: str = "clara",
    move: Move = swaying,
    mouth: Mouth = quiet,
    grain: float = 1.5,
    spoil: Callable[[int, Picture], Picture] | None = None,
    **how: Any,
) -> Film:
    """Make a clip. `spoil` changes pictures before they are coded; `how` goes to `write`."""
    puppet, marks = drawn(persona, *size)
    out = Film(path, fps, size, marks=marks)
    width, height = size
    rng = np.random.default_rng(5)
    noise = rng.normal(0, grain, (4, height, width, 1)) if grain else None
    for i in range(round(seconds * fps)):
        t = i / fps
        said = mouth(t)
        values = np.array([said.get(name, 0.0) for name in PARAMETERS], np.float32)
        head = np.zeros(len(HEAD), np.float32)
        i420 = puppet.draw(Pose(values, head, said.get("blink", 0.0)))
        picture = np.asarray(cv2.cvtColor(i420, cv2.COLOR_YUV2BGR_I420), np.uint8)
        x, y, degrees, scale = move(t)
        centre = (width / 2, height * 0.55)
        matrix = cv2.getRotationMatrix2D(centre, -degrees, scale)
        matrix[:, 2] += np.array([x * height, y * height])
        if (x, y, degrees, scale) != (0, 0, 0, 1):
            picture = np.asarray(
                cv2.warpAffine(
                    picture, matrix, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
                ),
                np.uint8,
            )
        if noise is not None:
            picture = np.clip(picture + noise[i % 4], 0, 255).astype(np.uint8)
        if spoil is not None:
            picture = spoil(i, picture)
        out.pictures.append(picture)
        out.moves.append(np.asarray(matrix, np.float64))
        out.mouths.append(said)
    write(path, out.pictures, fps, **how)
    return out


def write(
    path: Path,
    pictures: list[Picture],
    fps: int,
    times: list[float] | None = None,
    quality: int = 14,
    codec: str = "libx264",
) -> None:
    """Code pictures; `times` (seconds) instead of an even rate."""
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(quality), "preset": "ultrafast"}
        stream.codec_context.time_base = Fraction(1, 1000 if times else fps)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="bgr24")
            frame.pts = round(times[i] * 1000) if times else i
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


KINDS: dict[str, dict[str, Any]] = {
    "idle": {"mouth": quiet},
    "both": {"mouth": both},
    "leaning": {"mouth": both, "move": leaning},
    "smiling": {"mouth": smiling},
    "gaping": {"mouth": gaping},
}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tall = int(sys.argv[2]) if len(sys.argv) > 2 else 720
    for kind, options in KINDS.items():
        made = film(folder / f"{kind}.mp4", 6.0, size=(tall * 16 // 9, tall), **options)
        print(made.path)
