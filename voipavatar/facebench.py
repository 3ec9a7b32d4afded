"""How well a face speaks, measured on the pictures that the engine makes.

The face mesh is looked for in every picture again, so that what is measured is what a viewer sees,
not what the engine meant. `docs/face-quality.md` holds the results and says how to read them.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import subprocess
import tempfile
import time
import wave
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

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
    "and Mum makes simple plum jam in the open park. "
    "Maybe Pamela will mop up the bubbles by the pump. "
    "A happy beaver built a dam above the deep pool. "
    "Please remember to bring my purple cap and both brown boots. "
    "A mob of sheep climbed up the steep slope by the bay. "
    "The boy jumped over a puddle, bumped a lamp, and told nobody. "
    "Number nine stops at the top of the hill, but not on Sunday. "
    "The computer beeps whenever a member pays by post. "
    "In summer, ten tame rabbits nibble cabbage behind the barn. "
    "Could somebody help me open the cupboard before breakfast? "
    "A pair of plump robins popped up near the garden gate. "
    "Most people prefer tea with lemon, and talk about peace and hope. "
    "Tell the captain that the ship may stop at a remote island today."
)
"""Rich in p, b and m: more than a hundred closures, and sounds that only look like them."""

SHORT = TEXT[: TEXT.index(" Maybe")]
"""The first sentences, for a quick look."""

VOICES = ("piper", "espeak", "flite")
"""What speaks by default: a neural voice, formants, recorded pieces. See `spoken`."""

SHUT = 0.15
"""Lips count as shut below this part of the way from pressed lips to a wide open mouth."""


@dataclass(frozen=True)
class Limit:
    """What a number must be for a face to pass."""

    key: str
    words: str
    holds: Callable[[float], bool]


LIMITS = (
    Limit("recall", "lips shut at 95 % of p, b, m or more", lambda v: v >= 0.95),
    # Not 0: a vowel of a tenth of a second between two closures ("pop") may have no picture left.
    Limit("vowels", "at most 5 % of the long vowels with shut lips", lambda v: v <= 0.05),
    Limit("r", "correlation with the phonemes' opening 0.5 or more", lambda v: v >= 0.5),
    Limit("lag_frames", "mouth within one picture of the sound", lambda v: abs(v) <= 1.0),
    Limit("jitter", "in silence no more jitter than the same face at rest", lambda v: v <= 1.0),
    Limit("seam", "no jump where speech begins or ends (below 1)", lambda v: v < 1.0),
    Limit("outside_mean", "above the nose unchanged (below 0.05 of 255)", lambda v: v < 0.05),
    Limit("ms", "8 ms a picture of 720p or less", lambda v: v <= 8.0),
)
"""What the sheet is held against."""

_BILABIAL = frozenset("pbm")

# The phone names of flite's (and festival's) English voices.
ARPABET: dict[str, str] = dict(
    pair.split("|", 1)
    for pair in """
    pau|_ aa|ɑ ae|æ ah|ʌ ao|ɔ aw|aʊ ax|ə ay|aɪ eh|ɛ er|ɹ ey|eɪ ih|ɪ iy|i ow|oʊ oy|ɔɪ uh|ʊ uw|u
    b|b ch|tʃ d|d dh|ð dx|ɾ f|f g|ɡ hh|h hv|h jh|dʒ k|k l|l m|m n|n ng|ŋ p|p r|ɹ s|s sh|ʃ t|t
    th|θ v|v w|w y|j z|z zh|ʒ el|l em|m en|n axr|ɹ
    """.split()
)
"""Phones of English voices of flite and festival, in IPA."""


def _quiet(message: str) -> None:
    """No progress to be seen."""


@dataclass(frozen=True)
class Speech:
    """What is said: 16 kHz, with its phonemes."""

    voice: str
    pcm: Float32
    cues: tuple[Cue, ...]
    told: bool
    """Whether the voice tells them to an engine, too; otherwise they are for measuring only."""

    @property
    def phonemes(self) -> list[Cue]:
        return [cue for cue in self.cues if cue.kind == "phoneme"]


async def spoken(settings: Settings, voice: str, text: str = TEXT) -> Speech:
    """`text` at 16 kHz by a voice that knows its phonemes: piper, espeak, or flite and its voice.

    flite ("flite" for its voice rms, "flite:slt") is a program of its own, which no avatar speaks
    with; it is here for its sound. VoipAvatarError if the voice isn't there.
    """
    if voice.partition(":")[0] == "flite":
        return await asyncio.to_thread(_flite, voice.partition(":")[2] or "rms", text)
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
    pcm = np.concatenate(parts).astype(np.float32) / np.float32(32768)
    if not any(cue.kind == "phoneme" for cue in cues):
        raise VoipAvatarError(f"{voice} tells no phonemes: measure with piper or espeak")
    return Speech(voice, _to_engine(pcm, rate), tuple(cues), told=True)


def _flite(voice: str, text: str) -> Speech:
    program = shutil.which("flite")
    if program is None:
        raise VoipAvatarError(
            "flite isn't installed: install it (apt-get install flite), or name other voices"
        )
    with tempfile.TemporaryDirectory(prefix="voipavatar-") as folder:
        path = Path(folder) / "said.wav"
        try:
            done = subprocess.run(
                [program, "-voice", voice, "-psdur", "-t", text, "-o", str(path)],
                capture_output=True, text=True, check=True, timeout=120,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            raise VoipAvatarError(
                f"flite did not speak as {voice} ({error}): `flite -lv` lists its voices"
            ) from error
        with wave.open(str(path)) as file:
            rate = file.getframerate()
            pcm = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    cues = []
    # "name:end name:end ...", a listing for every sentence, whose times go on.
    begin = 0.0
    for item in done.stdout.split():
        name, _, end = item.rpartition(":")
        if name not in ARPABET:
            raise VoipAvatarError(f"flite says an unknown phone, {name}: its version is too new")
        if float(end) > begin:
            cues.append(Cue("phoneme", ARPABET[name], begin, float(end)))
        begin = float(end)
    sound = _to_engine(pcm.astype(np.float32) / np.float32(32768), rate)
    return Speech(f"flite {voice}", sound, tuple(cues), told=False)


def _to_engine(pcm: Float32, rate: int) -> Float32:
    if rate == ENGINE_RATE:
        return pcm
    length = round(len(pcm) * ENGINE_RATE / rate)
    # A short low-pass keeps what would fold back out; then straight lines between samples.
    taps = np.sinc((np.arange(-24, 25)) * ENGINE_RATE / rate) * np.hanning(49)
    smooth = np.convolve(pcm, taps / taps.sum(), "same")
    at = np.arange(length) * rate / ENGINE_RATE
    return np.interp(at, np.arange(len(smooth)), smooth).astype(np.float32)


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
    """Every number of one row. Blocks, for about a fiftieth of a second a picture."""
    session = engine.open(avatar)
    fps = session.spec.fps
    looker = Looker(mesh, session)
    before = session.idle(fps)
    if cued:
        session.cue(speech.cues)
    talk = session.push(speech.pcm)
    talk += session.flush()
    after = session.idle(2)
    seen, times, steps = _watched(engine, [*before, *talk, *after], looker)
    first, last = len(before), len(before) + len(talk)
    said = seen[first:last]
    reference, envelope = _reference(speech, len(talk), fps), _envelope(speech, len(talk), fps)
    hits, total = _closures(said, speech, fps)
    vowels, long = _vowels(said, speech, fps)
    lag, _ = best_lag(said, envelope)
    talking = steps[first + 2 : last - 2]
    seams = [steps[i] for i in (first - 1, first, last - 1, last) if i < len(steps)]
    moved = _outside(engine, avatar, speech, looker)
    silent, rest = _silence(engine, avatar, looker)
    return {
        "shut": hits,
        "bilabials": total,
        "recall": hits / max(1, total),
        "vowels_shut": vowels,
        "vowels_long": long,
        "vowels": vowels / max(1, long),
        "r": _correlation(said, reference),
        "lag_frames": lag,
        "jitter": silent / max(1e-9, rest),
        "jitter_rest": rest,
        "seam": max(seams) / max(1e-6, float(np.percentile(talking, 95))),
        "outside_mean": moved[0],
        "outside_max": moved[1],
        "ms": 1000 * float(np.median(times[first:last])),
        "opening_p95": float(np.percentile(said, 95)),
    }


def _watched(
    engine: VisemeEngine, jobs: Sequence[Job], looker: Looker
) -> tuple[Float64, list[float], Float64]:
    """Of pictures one after the other: how far the lips are apart, seconds of drawing, and how much
    the mouth differs from the picture before (mean of luma)."""
    x, y = (int(v) for v in looker.origin)
    half = int(0.5 * looker.unit)
    seen, times, steps = [], [], []
    old: npt.NDArray[np.int16] | None = None
    for job in jobs:
        begin = time.thread_time()
        picture = engine.render([job])[0]
        times.append(time.thread_time() - begin)
        seen.append(looker.opening(bgr(picture)))
        part = picture[max(0, y - half) : y + half, max(0, x - half) : x + half].astype(np.int16)
        if old is not None:
            steps.append(float(np.abs(part - old).mean()))
        old = part
    return np.array(seen), times, np.array(steps)


def _silence(engine: VisemeEngine, avatar: Avatar, looker: Looker) -> tuple[float, float]:
    """Mean change of the opening from picture to picture: while a turn is silent but for the noise
    of a microphone, and at the same moments of a face that was never spoken to."""
    speaks, rests = engine.open(avatar), engine.open(avatar)
    noise = np.random.default_rng(5).standard_normal(2 * ENGINE_RATE) * 10 ** (-60 / 20)
    jobs = speaks.push(noise.astype(np.float32)) + speaks.flush()
    seen = _watched(engine, jobs, looker)[0]
    alone = _watched(engine, rests.idle(len(jobs)), looker)[0]
    return float(np.abs(np.diff(seen)).mean()), float(np.abs(np.diff(alone)).mean())


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


def _vowels(opening: Float64, speech: Speech, fps: int) -> tuple[int, int]:
    """Open vowels of 80 ms and more in whose middle half the lips are seen shut; and all."""
    hits = total = 0
    for cue in speech.phonemes:
        classes = shape(cue.text)
        if cue.end - cue.start < 0.08 or not classes or JAW[classes[0][0]] < 0.5:
            continue
        quarter = (cue.end - cue.start) / 4
        low = round((cue.start + quarter) * fps)
        high = max(low + 1, round((cue.end - quarter) * fps))
        middle = opening[low:high]
        total += 1
        hits += bool(len(middle) and (middle < SHUT).all())
    return hits, total


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
    voices: Sequence[str] = VOICES,
    text: str = TEXT,
    tell: Tell = _quiet,
) -> list[dict[str, Any]]:
    """Rows of numbers: every face with every voice, by its cues (if it tells any) and by its sound
    alone. `failed` of a row names the `LIMITS` that don't hold.

    A face that can't be prepared gives a row with `error`, and so does a voice that isn't there.
    """
    rows: list[dict[str, Any]] = []
    speeches = []
    for voice in voices:
        tell(f"speaking ({voice})")
        try:
            speeches.append(await spoken(settings, voice, text))
        except VoipAvatarError as error:
            rows.append({"face": "-", "voice": voice, "error": str(error), "failed": ["voice"]})

    def work() -> None:
        mesh = FaceMesh(face_models(settings, tell))
        engine = VisemeEngine(settings=settings)
        with tempfile.TemporaryDirectory(prefix="voipavatar-") as folder:
            for i, (name, persona) in enumerate(subjects(settings, portraits)):
                if personas and name not in personas and persona.path is not None:
                    continue
                if persona.portrait is None:
                    continue
                try:
                    source = persona.beside(persona.portrait)
                    options = persona.engine_settings()
                    avatar = engine.prepare(source, Path(folder) / str(i), options, _still)
                except VoipAvatarError as error:
                    rows.append({"face": name, "error": str(error), "failed": ["face"]})
                    continue
                for speech in speeches:
                    for cued in (True, False) if speech.told else (False,):
                        tell(f"looking at {name} ({speech.voice}, {_driver(cued)})")
                        row = measure(engine, avatar, mesh, speech, cued=cued)
                        failed = [one.key for one in LIMITS if not one.holds(row[one.key])]
                        about = {"face": name, "voice": speech.voice, "cues": cued}
                        rows.append({**about, **row, "failed": failed})
        engine.close()

    await asyncio.to_thread(work)
    return rows


def _still(what: str, share: float) -> None:
    """No progress to be seen."""


def _driver(cued: bool) -> str:
    return "cues" if cued else "sound"


def passed(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is something measured and all of it is within `LIMITS`."""
    return bool(rows) and not any(row["failed"] for row in rows)


def report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows with what they are held against, for programs."""
    return {
        "passed": passed(rows),
        "limits": {one.key: one.words for one in LIMITS},
        "rows": list(rows),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, and under them what a face must reach to pass."""
    lines = [
        "| face | voice | driven by | lips shut at p b m | vowels shut | r | lag | jitter | seam "
        "| outside | ms | passes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(
                f"| {row['face']} | {row.get('voice', '-')} | refused: {row['error']} "
                "| | | | | | | | | no |"
            )
            continue
        verdict = "no: " + ", ".join(row["failed"]) if row["failed"] else "yes"
        lines.append(
            f"| {row['face']} | {row['voice']} | {_driver(row['cues'])} "
            f"| {row['shut']:.0f}/{row['bilabials']:.0f} ({100 * row['recall']:.1f}%) "
            f"| {row['vowels_shut']:.0f}/{row['vowels_long']:.0f} | {row['r']:.2f} "
            f"| {row['lag_frames']:+.1f} | {row['jitter']:.2f} | {row['seam']:.2f} "
            f"| {row['outside_mean']:.2f} | {row['ms']:.1f} | {verdict} |"
        )
    good = sum(not row["failed"] for row in rows)
    lines += ["", f"{good} of {len(rows)} rows pass. A row passes with:", ""]
    lines += [f"- *{one.key}*: {one.words}" for one in LIMITS]
    return "\n".join(lines)
