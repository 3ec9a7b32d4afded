"""How well a face speaks, measured on the pictures that the engine makes.

The face mesh is looked for in every picture again, so that what is measured is what a viewer sees,
not what the engine meant. `docs/face-quality.md` holds the results and says how to read them.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .config import Persona, Settings, VoiceChoice, list_personas
from .engines import Avatar, Job
from .engines.articulation import JAW, shape
from .engines.film import FilmPuppet
from .engines.puppet import Pose
from .engines.rig import HEAD, Float64
from .engines.viseme import VisemeEngine, VisemeSession
from .errors import VoipAvatarError
from .facemesh import FaceMesh, Found
from .facemodels import face_models
from .media import ENGINE_RATE, Cue, Float32, UInt8, frames_for, slice_start
from .speech import make_voice, speak

Tell = Callable[[str], None]

TEXT = (
    "My baby puppy bumped the map. Bob may pay for a big blue umbrella, "
    "and Mum makes simple plum jam in the open park."
)
"""Rich in p, b and m."""

SHUT = 0.15
"""Lips count as shut below this part of the way from pressed lips to a wide open mouth."""

_BILABIAL = frozenset("pbm")


def _quiet(message: str) -> None:
    """No progress to be seen."""


@dataclass(frozen=True)
class Speech:
    """What is said: 16 kHz, with its phonemes."""

    pcm: Float32
    cues: tuple[Cue, ...]

    @property
    def phonemes(self) -> list[Cue]:
        return [cue for cue in self.cues if cue.kind == "phoneme"]


async def spoken(settings: Settings, voice: str, text: str = TEXT) -> Speech:
    """`text` by a voice that knows its phonemes, at 16 kHz."""
    made = make_voice([VoiceChoice(use=voice)], settings)
    parts, cues, rate = [], list[Cue](), 0
    try:
        async with aclosing(speak(made, text)) as chunks:
            async for chunk in chunks:
                parts.append(chunk.pcm)
                cues += chunk.cues
                rate = chunk.rate
    finally:
        await made.aclose()
    pcm = np.concatenate(parts).astype(np.float32) / 32768
    if not any(cue.kind == "phoneme" for cue in cues):
        raise VoipAvatarError(f"{voice} tells no phonemes: measure with piper or espeak")
    length = round(len(pcm) * ENGINE_RATE / rate)
    # A short low-pass keeps what would fold back out; then straight lines between samples.
    taps = np.sinc((np.arange(-24, 25)) * ENGINE_RATE / rate) * np.hanning(49)
    smooth = np.convolve(pcm, taps / taps.sum(), "same")
    at = np.arange(length) * rate / ENGINE_RATE
    heard = np.interp(at, np.arange(len(smooth)), smooth).astype(np.float32)
    return Speech(heard, tuple(cues))


# --- looking at pictures --------------------------------------------------------------------------


class Looker:
    """Measures the mouth in pictures of one face, by its mesh."""

    def __init__(self, mesh: FaceMesh, session: VisemeSession) -> None:
        self._mesh = mesh
        self._puppet = session.puppet
        # A clip's head moves as it likes: there each picture is looked for near the one before.
        self._film = session.puppet if isinstance(session.puppet, FilmPuppet) else None
        rest = self._drawn()
        # Where the face is, is known from the rig: the nearest one is ours.
        origin, axis = session.puppet.rig.frame
        unit = float(np.linalg.norm(axis))
        self.unit = unit
        self.origin = np.asarray(origin, np.float64)
        self._rest: Found = mesh.find(rest, (float(origin[0]), float(origin[1]) - 0.4 * unit))
        self._low, self._high = 0.0, 1.0
        self._low = self.opening(self._drawn(press=1.0))
        self._high = self.opening(self._drawn(jaw=1.0))

    @property
    def span(self) -> float:
        """How far the mesh sees the lips go apart, in face units."""
        return (self._high - self._low) if self._high else 0.0

    def _drawn(self, jaw: float = 0.0, press: float = 0.0) -> UInt8:
        mouth = np.array([jaw, 0, 0, press, 0, 0, 0, 0], np.float32)
        clock = self._film.reference if self._film is not None else 0
        return bgr(self._puppet.draw(Pose(mouth, np.zeros(len(HEAD), np.float32), clock=clock)))

    def opening(self, picture: UInt8) -> float:
        """0 pressed lips, 1 the widest open mouth: by the mean of three places along the lips."""
        found = self._mesh.glance(picture, self._rest)
        if self._film is not None:
            self._rest = replace(self._rest, points=found)
        points = found[:, :2]
        unit = float(np.linalg.norm(points[263] - points[33]))
        apart = [np.linalg.norm(points[a] - points[b]) for a, b in ((13, 14), (82, 87), (312, 317))]
        gap = float(np.mean(apart)) / unit
        return (gap - self._low) / max(1e-6, self._high - self._low)


def bgr(i420: UInt8) -> UInt8:
    """A picture as the mesh wants it."""
    return np.asarray(cv2.cvtColor(i420, cv2.COLOR_YUV2BGR_I420), np.uint8)


# --- one face -------------------------------------------------------------------------------------


def measure(
    engine: VisemeEngine, avatar: Avatar, mesh: FaceMesh, speech: Speech, *, cued: bool
) -> dict[str, float]:
    """Every number of one row. Blocks, for about a tenth of a second a picture."""
    session = engine.open(avatar)
    fps = session.spec.fps
    looker = Looker(mesh, session)
    before = session.idle(fps)
    if cued:
        session.cue(speech.cues)
    talk = session.push(speech.pcm)
    talk += session.flush()
    after = session.idle(2 * fps)
    pictures, times = _drawn(engine, [*before, *talk, *after])
    opening = np.array([looker.opening(bgr(picture)) for picture in pictures])
    first, last = len(before), len(before) + len(talk)
    said = opening[first:last]
    reference, envelope = _reference(speech, len(talk), fps), _envelope(speech, len(talk), fps)
    hits, total = _closures(said, speech, fps)
    lag, _ = best_lag(said, envelope)
    steps = _steps(pictures, looker)
    talking = steps[first + 2 : last - 2]
    seams = [steps[i] for i in (first - 1, first, last - 1, last) if i < len(steps)]
    moved = _outside(engine, avatar, speech, looker)
    # The mouth comes to rest over some pictures: silence is what is after that.
    quiet = np.concatenate([opening[:first], opening[last + session.spec.ease + 5 :]])
    return {
        "shut": hits,
        "bilabials": total,
        "recall": hits / max(1, total),
        "r": _correlation(said, reference),
        "lag_frames": lag,
        "jitter": float(np.abs(np.diff(quiet)).mean()) if len(quiet) > 2 else 0.0,
        "seam": max(seams) / max(1e-6, float(np.percentile(talking, 95))),
        "outside_mean": moved[0],
        "outside_max": moved[1],
        "ms": 1000 * float(np.median(times[first:last])),
        "opening_p95": float(np.percentile(said, 95)),
    }


def _drawn(engine: VisemeEngine, jobs: Sequence[Job]) -> tuple[list[UInt8], list[float]]:
    pictures, times = [], []
    for job in jobs:
        begin = time.thread_time()
        pictures += engine.render([job])
        times.append(time.thread_time() - begin)
    return pictures, times


def _closures(opening: Float64, speech: Speech, fps: int) -> tuple[int, int]:
    """Bilabials in whose time, a frame more at either end, the lips are seen to meet; and all."""
    spans: list[tuple[float, float]] = []
    for cue in speech.phonemes:
        if cue.text.strip("ˈˌː ʰ.")[:1] not in _BILABIAL or cue.end - cue.start < 0.5 / fps:
            continue
        if spans and cue.start - spans[-1][1] < 0.02:
            spans[-1] = (spans[-1][0], cue.end)  # "mp" is one closure
        else:
            spans.append((cue.start, cue.end))
    hits = 0
    for start, end in spans:
        low, high = max(0, math.floor(start * fps) - 1), math.ceil(end * fps) + 1
        hits += bool((opening[low:high] < SHUT).any())
    return hits, len(spans)


def _reference(speech: Speech, frames: int, fps: int) -> Float64:
    """The opening that the phonemes ask for, a value a picture."""
    fine = np.zeros(frames * 10)
    grid = np.arange(len(fine)) / (10 * fps)
    held = 0.0
    for cue in speech.phonemes:
        classes = shape(cue.text)
        value = sum(JAW[name] * share for name, share in classes) if classes else held
        held = value
        fine[(grid >= cue.start) & (grid < cue.end)] = value
    kernel = np.bartlett(2 * round(0.06 * 10 * fps) + 1)
    smooth = np.convolve(fine, kernel / kernel.sum(), "same")
    return np.asarray(smooth.reshape(frames, 10).mean(1), np.float64)


def _envelope(speech: Speech, frames: int, fps: int) -> Float64:
    """Loudness, a value a picture: 0 at -40 dB from the loudest, 1 at the loudest."""
    out = np.zeros(frames)
    for i in range(min(frames, frames_for(len(speech.pcm), ENGINE_RATE, fps))):
        part = speech.pcm[slice_start(i, ENGINE_RATE, fps) : slice_start(i + 1, ENGINE_RATE, fps)]
        out[i] = math.sqrt(float((part.astype(np.float64) ** 2).mean())) if len(part) else 0.0
    level = 20 * np.log10(np.maximum(out, 1e-6) / max(1e-6, float(out.max())))
    return np.clip(1 + level / 40, 0, 1)


def _correlation(a: Float64, b: Float64) -> float:
    if a.std() < 1e-9 or b.std() < 1e-9:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def best_lag(opening: Float64, envelope: Float64, reach: int = 5) -> tuple[float, float]:
    """By how many pictures the mouth is late for the sound (negative: early), and the correlation
    there; parts of a picture by the parabola through the best and its neighbours."""
    lags = range(-reach, reach + 1)
    found = []
    for lag in lags:
        a = opening[max(0, lag) : len(opening) + min(0, lag)]
        b = envelope[max(0, -lag) : len(envelope) + min(0, -lag)]
        found.append(_correlation(a, b))
    best = int(np.argmax(found))
    shift = 0.0
    if 0 < best < len(found) - 1:
        left, top, right = found[best - 1 : best + 2]
        bend = left - 2 * top + right
        shift = 0.5 * (left - right) / bend if abs(bend) > 1e-9 else 0.0
    return lags[best] + shift, found[best]


def _steps(pictures: Sequence[UInt8], looker: Looker) -> Float64:
    """How much each picture's mouth differs from the one before it: mean of luma."""
    x, y = (int(v) for v in looker.origin)
    half = int(0.5 * looker.unit)
    parts = [p[max(0, y - half) : y + half, max(0, x - half) : x + half] for p in pictures]
    return np.array(
        [
            float(np.abs(b.astype(np.int16) - a.astype(np.int16)).mean())
            for a, b in zip(parts[:-1], parts[1:], strict=True)
        ]
    )


def _outside(
    engine: VisemeEngine, avatar: Avatar, speech: Speech, looker: Looker
) -> tuple[float, float]:
    """What speech changes above the nose, with the head held still: mean and largest of luma."""
    still = Avatar(
        path=avatar.path,
        width=avatar.width,
        height=avatar.height,
        options={**avatar.options, "motion": 0.0, "blink": 0.0},
    )
    session, silent = engine.open(still), engine.open(still)
    jobs = session.push(speech.pcm[: 3 * ENGINE_RATE])
    # At the same moments, for a clip moves by itself.
    alone = silent.idle(len(jobs))
    rows = slice(0, max(1, int(looker.origin[1] - 0.42 * looker.unit)))
    apart = [
        np.abs(picture[rows].astype(np.int16) - rest[rows].astype(np.int16))
        for picture, rest in zip(engine.render(jobs[::4]), engine.render(alone[::4]), strict=True)
    ]
    if not apart:
        return 0.0, 0.0
    return float(np.mean([one.mean() for one in apart])), float(max(one.max() for one in apart))


# --- all of them ----------------------------------------------------------------------------------


def subjects(settings: Settings, portraits: Sequence[Path]) -> list[tuple[str, Persona]]:
    """The built-in personas that `viseme` draws, and a persona for each further picture."""
    found = [(one.name, one) for one in list_personas(settings) if one.engine == "viseme"]
    for path in portraits:
        persona = Persona(name="portrait", portrait=path.resolve())
        found.append((path.stem, persona))
    return found


async def face(
    settings: Settings,
    *,
    portraits: Sequence[Path] = (),
    personas: Sequence[str] = (),
    voice: str = "piper",
    tell: Tell = _quiet,
) -> list[dict[str, Any]]:
    """Rows of numbers: every face with cues, and by its sound alone.

    A face that can't be prepared gives a row with `error`.
    """
    import asyncio

    tell(f"speaking ({voice})")
    speech = await spoken(settings, voice)
    rows: list[dict[str, Any]] = []

    def work() -> None:
        mesh = FaceMesh(face_models(settings, tell))
        engine = VisemeEngine(settings=settings)
        with tempfile.TemporaryDirectory(prefix="voipavatar-") as folder:
            for i, (name, persona) in enumerate(subjects(settings, portraits)):
                if personas and name not in personas and persona.path is not None:
                    continue
                tell(f"looking at {name}")
                try:
                    if persona.portrait is None:
                        continue
                    source = persona.beside(persona.portrait)
                    options = persona.engine_settings()
                    avatar = engine.prepare(source, Path(folder) / str(i), options, _still)
                    for cued in (True, False):
                        row = measure(engine, avatar, mesh, speech, cued=cued)
                        rows.append({"face": name, "cues": cued, **row})
                except VoipAvatarError as error:
                    rows.append({"face": name, "error": str(error)})
        engine.close()

    await asyncio.to_thread(work)
    return rows


def _still(what: str, share: float) -> None:
    """No progress to be seen."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| face | driven by | lips shut at p b m | r | lag | jitter | seam | outside | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['face']} | refused: {row['error']} | | | | | | | |")
            continue
        lines.append(
            f"| {row['face']} | {'cues' if row['cues'] else 'sound'} "
            f"| {row['shut']:.0f}/{row['bilabials']:.0f} ({row['recall']:.0%}) | {row['r']:.2f} "
            f"| {row['lag_frames']:+.1f} | {row['jitter']:.3f} | {row['seam']:.2f} "
            f"| {row['outside_mean']:.2f} | {row['ms']:.1f} |"
        )
    return "\n".join(lines)
