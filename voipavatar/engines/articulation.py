"""From speech to mouth parameters: what every drawn mouth is driven by.

16 kHz sound goes in, one row of eight numbers a video frame comes out. On the way:

1. 40 log-mel bands every 10 ms, relative to a decaying peak and to the voice's own mean spectrum,
   both followed causally, so that neither loudness nor the channel matters;
2. a small network over time (weights in `articulation.npz`, trained by
   `tools/train_articulation.py`) that says which of fifteen mouth classes is being spoken: it hears
   235 ms around the moment, 78 of them after it, for it is the opening of a closure that tells
   lips from tongue;
3. dominance blending (Cohen and Massaro, "Modeling coarticulation in synthetic visual speech",
   1993): every class asks for some parameters firmly and for others hardly at all, and what is
   hardly asked for stays where it was;
4. a loudness gate, a rule for silence and a critically damped filter for each parameter;
5. one row a frame: means, but for lips and teeth that close, whose maximum counts, so that a
   closure of 50 ms is never lost between two pictures.

Everything runs in steps of 10 ms on one row at a time: the numbers are the same, to the last bit,
however the sound was cut. numpy only. `docs/articulation.md` holds what was measured, and how.
"""

from __future__ import annotations

import bisect
import functools
import math
import zipfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, EngineError, InputError
from ..media import ENGINE_RATE, Cue, Float32, check_fps, frames_for, slice_start

Float64 = npt.NDArray[np.float64]

PARAMETERS = ("jaw", "width", "round", "press", "tuck", "teeth", "tongue", "level")
"""The columns of a row, each 0 to 1: jaw opening, corners apart, lips rounded, lips pressed
together, lower lip under the upper teeth, teeth shown, tongue raised, loudness of the speech."""

CLASSES = ("sil", "PP", "FF", "TH", "DD", "kk", "CH", "SS", "RR", "aa", "E", "I", "O", "U", "ax")
"""Mouth classes: the usual visemes without `nn`, which looks like `DD`, and a neutral vowel."""

WEIGHTS = Path(__file__).with_name("articulation.npz")
"""The weights that come with the package."""

HOP = 160
"""Samples of a step: 10 ms."""

BANDS = 40

LAYERS = ((-2, -1, 0, 1, 2), (-4, -2, 0, 2), (-8, -4, 0, 3), (0,), (0,))
"""For each layer of the network the steps of the layer before that it sees, relative to its own."""

FUTURE = sum(places[-1] for places in LAYERS)
"""Steps after the one judged that the network hears."""

PAST = -sum(places[0] for places in LAYERS)

_WINDOW = 400
_FFT = 512
_BEFORE = _WINDOW // 2 - HOP // 2  # a step's window is centred on the step
_AFTER = _BEFORE + HOP  # samples needed from the step's start
_LEAD = 3  # steps that targets are ahead of the sound: the filters below take about as long
_AHEAD = FUTURE + _LEAD

LOOKAHEAD = 1920
"""Samples after a frame's end that its row waits for: 120 ms."""

assert _AHEAD * HOP + _AFTER <= LOOKAHEAD + 1

# --- which sound is which class -------------------------------------------------------------------

_SYMBOLS = {
    "sil": "_ | ‖",
    "PP": "p b m ɓ ʙ ʘ β ɸ",
    "FF": "f v ɱ ʋ ⱱ",
    "TH": "θ ð T D",
    "DD": "t d n l r ɾ ɖ ʈ ɳ ɭ ɫ ɬ ɮ ɲ ʎ ɗ ɺ ɽ L",
    "kk": "k g ɡ ŋ x ɣ q χ ɢ ɴ ħ ʕ ʀ ʁ c ɟ ɠ ʄ ʛ ɰ N X Q",
    "CH": "ʃ ʒ ʂ ʐ ɕ ʑ ɧ tʃ dʒ ʧ ʤ tʂ dʐ tɕ dʑ S Z tS dZ",
    "SS": "s z ts dz ʦ ʣ ç ʝ C",
    "RR": "ɹ ɻ ɚ ɝ",
    "aa": "a ɑ æ ʌ ɶ A V &",
    "E": "e ɛ ε E",
    "I": "i ɪ j ɨ ɯ ʲ I",
    "O": "o ɔ ɒ ø œ O 0 W Y",
    "U": "u ʊ w ʉ y ʏ ɥ ʍ U",
    "ax": "ə ɐ ɜ ɘ ɞ ɵ ɤ ᵻ @ 3",
}

PHONEMES: dict[str, str] = {
    symbol: name for name, symbols in _SYMBOLS.items() for symbol in symbols.split(" ")
}
"""Phoneme to class: IPA letters, and espeak's own mnemonics where they differ from IPA."""

TRANSPARENT = frozenset("hɦʔ?")
"""Sounds that have no mouth of their own: the lips are already at the next one's."""

_DIPHTHONG = 0.6  # share of the first vowel of two


def shape(phoneme: str) -> tuple[tuple[str, float], ...]:
    """A phoneme's classes with the share of its time that each takes; the shares add up to 1.

    Stress, length, tone and other marks are passed over. Diphthongs and affricates give two
    classes. Empty for `TRANSPARENT` sounds and for marks alone, ("sil", 1.0) for a pause.
    """
    found: list[str] = []
    text = phoneme.strip()
    if text in ("", "sil", "pau", "SIL"):
        return (("sil", 1.0),)
    i = 0
    while i < len(text):
        pair = PHONEMES.get(text[i : i + 2])
        name = pair or PHONEMES.get(text[i])
        if name is not None and (not found or found[-1] != name):
            found.append(name)
        i += 2 if pair else 1
    if len(found) > 1 and found[-1] == "I" and text.endswith("ʲ"):
        found.pop()  # a palatalised consonant, not a glide
    if not found:
        return ()
    if len(found) == 1:
        return ((found[0], 1.0),)
    rest = (1.0 - _DIPHTHONG) / (len(found) - 1)
    return ((found[0], _DIPHTHONG), *((name, rest) for name in found[1:]))


_CLOSING = frozenset("pbmпбмπμպբմփ")
_DOUBTFUL = frozenset("vwnвуνβ0123456789&%@+")
_SPELLED = ((0x41, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x58F), (0x1E00, 0x1EFF))


def closes(word: str) -> bool | None:
    """Whether a word's spelling asks for shut lips; None where it doesn't tell.

    In the alphabets of Europe p, b and m are nearly always written as such, whatever the language,
    and hardly ever said where they aren't written. A v may be one (Spanish), an n may become one
    ("in Paris"), a figure can be anything; and other scripts are not known.
    """
    letters = [c for c in word.casefold().replace("ph", "f") if not c.isspace()]
    if any(c in _CLOSING for c in letters):
        return True
    known = all(
        not c.isalpha() or any(low <= ord(c) <= high for low, high in _SPELLED) for c in letters
    )
    doubt = any(c in _DOUBTFUL for c in letters)
    return False if known and not doubt and any(c.isalpha() for c in letters) else None


# --- what a class wants of the mouth --------------------------------------------------------------

_VOWELS = frozenset(("aa", "E", "I", "O", "U", "ax"))

# target, and how firmly it is asked for where that isn't the default of `_tables`
_WANTS: dict[str, dict[str, tuple[float, float]]] = {
    "sil": {"jaw": (0.0, 0.5), "width": (0.0, 0.3), "round": (0.0, 0.3)},
    "PP": {"jaw": (0.0, 1.0), "press": (1.0, 1.0), "width": (0.0, 0.15)},
    "FF": {"jaw": (0.08, 0.8), "tuck": (1.0, 1.0), "width": (0.15, 0.2), "teeth": (0.4, 0.5)},
    "TH": {"jaw": (0.18, 0.5), "tongue": (1.0, 0.8), "teeth": (0.5, 0.5)},
    "DD": {"jaw": (0.2, 0.2), "tongue": (0.6, 0.5), "teeth": (0.6, 0.5)},
    "kk": {"jaw": (0.22, 0.12)},
    "CH": {"jaw": (0.18, 0.6), "round": (0.6, 0.8), "teeth": (0.8, 0.8)},
    "SS": {"jaw": (0.08, 0.6), "width": (0.35, 0.3), "teeth": (1.0, 0.9)},
    "RR": {"jaw": (0.22, 0.3), "round": (0.5, 0.5), "tongue": (0.3, 0.4)},
    "aa": {"jaw": (1.0, 0.9), "width": (0.15, 0.4)},
    "E": {"jaw": (0.55, 0.6), "width": (0.5, 0.5), "teeth": (0.3, 0.3)},
    "I": {"jaw": (0.25, 0.5), "width": (0.8, 0.8), "teeth": (0.5, 0.4)},
    "O": {"jaw": (0.6, 0.6), "round": (0.7, 0.9)},
    "U": {"jaw": (0.25, 0.5), "round": (1.0, 1.0)},
    "ax": {"jaw": (0.38, 0.3), "width": (0.15, 0.2)},
}


# How firmly lips are kept apart, where it isn't 0.2. A p, b or m without shut lips is seen at once,
# a vowel with shut ones too, but not lips that meet at a t, an n or in a pause: what may be either
# of those and a closure is shown as one.
_OPEN = {**dict.fromkeys(_VOWELS, 0.9), "sil": 0.3, "FF": 0.5}


def _tables() -> tuple[Float64, Float64]:
    """Targets V and dominances A, (classes, 7)."""
    names = PARAMETERS[:7]
    targets = np.zeros((len(CLASSES), len(names)))
    firmness = np.zeros_like(targets)
    for i, name in enumerate(CLASSES):
        for j, parameter in enumerate(names):
            # A consonant leaves the vowels' lip shape alone; closures end with their sound.
            loose = parameter in ("width", "round") and name not in _VOWELS
            usual = _OPEN.get(name, 0.2) if parameter == "press" else 0.1 if loose else 0.5
            targets[i, j], firmness[i, j] = _WANTS[name].get(parameter, (0.0, usual))
    return targets, firmness


_TARGETS, _FIRMNESS = _tables()
_ASKED = np.ascontiguousarray((_TARGETS * _FIRMNESS).T)  # (7, classes)
_WEIGHT = np.ascontiguousarray(_FIRMNESS.T)

JAW: dict[str, float] = {name: float(_TARGETS[i, 0]) for i, name in enumerate(CLASSES)}
"""Jaw opening that each class asks for: what a drawn mouth's opening can be held against."""

_SIL = CLASSES.index("sil")
_CLOSED = CLASSES.index("PP")
# How much the last target counts against a new one, by parameter.
_HOLD = np.array([0.35, 0.35, 0.35, 0.12, 0.08, 0.25, 0.25])
_RISE = 2 * math.pi * np.array([8.0, 9.0, 9.0, 14.0, 14.0, 10.0, 10.0])  # rad/s, by parameter
_FALL = 2 * math.pi * np.array([9.0, 9.0, 9.0, 16.0, 14.0, 10.0, 10.0])
_STEP = HOP / ENGINE_RATE
_QUIET = 12  # steps of silence after which the mouth goes to rest
_SNAP = 2e-3  # below this a resting parameter is 0
_CUE_WEIGHT = 0.8
_CUE_FADE = 0.04  # s
_WORD_EDGE = 0.06  # s by which a word's times may be wrong
_UNSPELLED = 0.06  # what is left of a closure's likelihood where the word has none
_LIKELY = (0.08, 0.35)  # what a closure must be asked for, to begin and to be whole
_TOLD = (0.25, 0.7)  # the same where a cue says it: not longer than it is said
_KEPT = 1  # steps that a closure is kept up for when it isn't heard any more
_CLOSURE = 0.06  # s that lips and teeth take to be seen closing, however short the sound

# --- features -------------------------------------------------------------------------------------

_FLOOR = 1e-3  # of a band's mean in speech: what lies 30 dB below it doesn't count
_HUSH = 1e-4  # of the peak: the same for loudness
_EMPHASIS = 0.97  # speech falls with frequency; the bands are taken from its first difference
_PEAK_START = 0.25  # the loudness of soft speech
_PEAK_LEAST = 4e-3
_SILENT = 5e-4  # what is softer is silence, whatever the peak: noise at -55 dBFS
_VOICED = 0.018  # of the peak: -17 dB
_DECAY_VOICED = math.exp(-0.008)
_DECAY_QUIET = math.exp(-0.001)
_MEAN_PRIOR = 300.0  # steps that the training's mean spectrum counts for
_MEAN_SPAN = 300.0  # steps that the voice's own mean is taken over


def _mel_filters() -> Float32:
    """Triangles from 60 to 7600 Hz on the mel scale of O'Shaughnessy, (BANDS + 1, FFT / 2 + 1).

    The last row is loudness: the mean power from 100 to 4000 Hz, without emphasis.
    """
    low, high = (2595.0 * math.log10(1.0 + f / 700.0) for f in (60.0, 7600.0))
    edges = 700.0 * (10.0 ** (np.linspace(low, high, BANDS + 2) / 2595.0) - 1.0)
    bins = np.arange(_FFT // 2 + 1) * (ENGINE_RATE / _FFT)
    up = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0.0, np.minimum(up, down))
    filters *= 1.0 + _EMPHASIS**2 - 2.0 * _EMPHASIS * np.cos(2.0 * math.pi * bins / ENGINE_RATE)
    loud = (bins >= 100.0) & (bins <= 4000.0)
    filters = np.vstack((filters, loud / loud.sum()))
    return np.ascontiguousarray(filters, np.float32)


_MEL = _mel_filters()
_HANN = np.hanning(_WINDOW + 1)[:_WINDOW].astype(np.float32)


def mel_power(windows: Float32) -> Float32:
    """Mel band powers and loudness, (n, BANDS + 1), of windows of 400 samples, (n, 400)."""
    spectrum = np.fft.rfft(windows * _HANN, _FFT)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    return np.asarray(power @ _MEL.T, np.float32)


class Normaliser:
    """Mel powers of one turn, step after step, to features that don't depend on gain or channel."""

    def __init__(self, mean: Float32, scale: Float32) -> None:
        """`mean` and `scale`: the training's voiced log spectrum below its peak, (BANDS,) each."""
        self._whiten = np.exp(-mean).astype(np.float32)
        self._inverse = (1.0 / scale).astype(np.float32)
        self._peak = _PEAK_START
        self._offset = np.zeros(BANDS, np.float32)
        self._voiced = 0.0
        self.loudness = math.log(_HUSH)
        """Log power of the last step below the peak; `log(_HUSH)` in silence."""

    def step(self, power: Float32, out: Float32) -> None:
        """One step of `mel_power` to its features, both (BANDS + 1,), written to `out`."""
        total = float(power[BANDS])
        voiced = total > _VOICED * self._peak
        self._peak = max(
            total, self._peak * (_DECAY_VOICED if voiced else _DECAY_QUIET), _PEAK_LEAST
        )
        relative = power[:BANDS] * self._whiten
        relative *= np.float32(1.0 / self._peak)
        relative += np.float32(_FLOOR)
        np.log(relative, out=relative)
        if voiced:
            self._voiced = min(self._voiced + 1.0, _MEAN_SPAN)
            self._offset += np.float32(1.0 / (self._voiced + _MEAN_PRIOR)) * (
                relative - self._offset
            )
        np.multiply(relative - self._offset, self._inverse, out=out[:BANDS])
        loudness = math.log(total / self._peak + _HUSH)
        out[BANDS] = (loudness + 3.0) / 3.0
        self.loudness = loudness if total > _SILENT else math.log(_HUSH)


# --- the network ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weights:
    """What `tools/train_articulation.py` learns."""

    mean: Float32
    """Mean log spectrum of voiced steps below the peak, (BANDS,)."""
    scale: Float32
    """Its standard deviation, (BANDS,)."""
    layers: tuple[tuple[Float32, Float32], ...]
    """Matrix (outputs, places * inputs) and bias (outputs,) of each layer."""


@functools.lru_cache(maxsize=4)
def load_weights(path: Path | None = None) -> Weights:
    """Weights from an `.npz`, the package's own by default. EngineError if they can't be used."""
    path = path or WEIGHTS
    again = "install voipavatar again, or make it with tools/train_articulation.py"
    try:
        # Opened here: numpy leaves a file open that turns out to be damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            arrays = {name: np.ascontiguousarray(data[name], np.float32) for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EngineError(f"{path.name} can't be read ({error}): {again}") from error
    inputs = BANDS + 1
    layers = []
    try:
        mean, scale = arrays["mean"], arrays["scale"]
        for i, places in enumerate(LAYERS):
            matrix, bias = arrays[f"w{i}"], arrays[f"b{i}"]
            if matrix.shape != (len(bias), inputs * len(places)):
                raise EngineError(f"{path.name} was made for another version: {again}")
            layers.append((matrix, bias))
            inputs = len(bias)
    except KeyError as error:
        raise EngineError(f"{path.name} lacks {error}: {again}") from error
    if inputs != len(CLASSES) or mean.shape != (BANDS,) or scale.shape != (BANDS,):
        raise EngineError(f"{path.name} was made for another version: {again}")
    return Weights(mean, scale, tuple(layers))


class _Layer:
    """One layer over time: a row in, the row that the places around an earlier one give out."""

    def __init__(self, matrix: Float32, bias: Float32, places: Sequence[int], last: bool) -> None:
        self._matrix, self._bias, self._last = matrix, bias, last
        self._size = matrix.shape[1] // len(places)
        self._at = [place - places[0] for place in places]
        self._rows: deque[Float32] = deque(maxlen=self._at[-1] + 1)
        # The same buffer for every step: the product sees the same shape and alignment, so its
        # result doesn't depend on how the sound came.
        self._stack = np.zeros(matrix.shape[1], np.float32)

    def step(self, row: Float32) -> Float32 | None:
        self._rows.append(row)
        if len(self._rows) <= self._at[-1]:
            return None
        size = self._size
        for i, at in enumerate(self._at):
            self._stack[i * size : (i + 1) * size] = self._rows[at]
        out = np.dot(self._matrix, self._stack)
        out += self._bias
        if not self._last:
            np.maximum(out, 0.0, out=out)
        return np.asarray(out, np.float32)


class _Listener:
    """Sound to class posteriors, one step at a time."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._window = np.zeros((1, _WINDOW), np.float32)
        self.reset()

    def reset(self) -> None:
        weights = self._weights
        self._layers = [
            _Layer(matrix, bias, places, i == len(LAYERS) - 1)
            for i, ((matrix, bias), places) in enumerate(zip(weights.layers, LAYERS, strict=True))
        ]
        silence = mel_power(np.zeros((1, _WINDOW), np.float32))[0]
        quiet = np.zeros(BANDS + 1, np.float32)
        Normaliser(weights.mean, weights.scale).step(silence, quiet)
        for _ in range(PAST):
            self._listen(quiet)
        self._normaliser = Normaliser(weights.mean, weights.scale)
        self._loudness: deque[float] = deque(maxlen=FUTURE + 1)

    def _listen(self, row: Float32) -> Float32 | None:
        found: Float32 | None = row
        for layer in self._layers:
            if found is not None:
                found = layer.step(found)
        return found

    def step(self, window: Float32) -> tuple[Float32, float] | None:
        """A step's 400 samples in; posteriors and loudness of the step `FUTURE` before it."""
        self._window[0] = window
        features = np.empty(BANDS + 1, np.float32)
        self._normaliser.step(mel_power(self._window)[0], features)
        self._loudness.append(self._normaliser.loudness)
        value = self._listen(features)
        if value is None:
            return None
        result = np.exp(value - value.max())
        result /= result.sum()
        return result, self._loudness[0]


def posteriors(pcm: Float32, weights: Path | None = None) -> Float32:
    """Class posteriors of a whole sound at 16 kHz: (ceil(samples / HOP), len(CLASSES)).

    Row i belongs to samples [HOP * i, HOP * (i + 1)).
    """
    listener = _Listener(load_weights(weights))
    steps = -(-len(pcm) // HOP)
    last = FUTURE
    padded = np.zeros((steps + last) * HOP + _WINDOW, np.float32)
    padded[_BEFORE : _BEFORE + len(pcm)] = pcm
    rows = [listener.step(padded[i * HOP : i * HOP + _WINDOW]) for i in range(steps + last)]
    found = [row[0] for row in rows if row is not None]
    return np.stack(found) if found else np.zeros((0, len(CLASSES)), np.float32)


# --- the mouth ------------------------------------------------------------------------------------


def _smooth(value: float, low: float, high: float) -> float:
    x = min(1.0, max(0.0, (value - low) / (high - low)))
    return x * x * (3.0 - 2.0 * x)


class _Mouth:
    """Posteriors to parameters, one step at a time."""

    def __init__(self) -> None:
        self._aim = np.zeros(7)
        self._place = np.zeros(7)
        self._speed = np.zeros(7)
        self._silent = _QUIET
        self._gate = 0.0
        self._kept = 0

    def step(self, probability: Float64, loudness: float, told: bool) -> Float64:
        """Where the seven parameters are after this step, given what they should move to.

        `told`: a cue says that something is spoken, be it as soft as a closure before its burst.
        """
        silent = probability[_SIL] > 0.5 or (loudness < -7.5 and not told)
        self._silent = self._silent + 1 if silent else 0
        gate = _smooth(loudness, -5.0, -0.6)
        self._gate += (0.6 if gate > self._gate else 0.25) * (gate - self._gate)
        weight = _WEIGHT @ probability
        asked = (_ASKED @ probability) / (weight + 1e-6)
        self._aim += (weight / (weight + _HOLD)) * (asked - self._aim)
        if self._silent > _QUIET:
            self._aim[:] = 0.0
        target = self._aim.copy()
        target[0] *= 0.35 + 0.65 * self._gate
        # Closures are all or nothing: what is likelier than not is done in full.
        target[3] = _smooth(target[3], *(_TOLD if told else _LIKELY))
        target[4] = _smooth(target[4], 0.2, 0.65)
        if target[3] > 0.9:
            self._kept = _KEPT
        elif self._kept > 0:
            self._kept -= 1
            target[3] = 0.9
        away = self._place - target
        omega = np.where(away < 0, _RISE, _FALL)
        fade = np.exp(-omega * _STEP)
        pull = (self._speed + omega * away) * _STEP
        self._place = target + (away + pull) * fade
        self._speed = (self._speed - omega * pull) * fade
        if self._silent > _QUIET:
            still = (np.abs(self._place) < _SNAP) & (np.abs(self._speed) < _SNAP / _STEP)
            self._place[still] = 0.0
            self._speed[still] = 0.0
        return self._place


def _row(steps: Sequence[Float64], levels: Sequence[float]) -> Float32:
    """The row of a frame from the steps that begin in it."""
    places = np.clip(np.stack(steps), 0.0, 1.0)
    row = np.empty(len(PARAMETERS), np.float32)
    row[:7] = places.mean(axis=0)
    row[3:5] = places[:, 3:5].max(axis=0)
    press, tuck = float(row[3]), float(row[4])
    row[0] *= (1.0 - _smooth(press, 0.3, 0.8)) * (1.0 - 0.7 * tuck)
    row[1:3] *= 1.0 - 0.5 * press
    row[5:7] *= 1.0 - press
    row[7] = sum(levels) / len(levels)
    return row


class Articulator:
    """Speech in as it comes, one row of `PARAMETERS` a video frame out. One for each session.

    Row k of a turn belongs to samples [slice_start(k), slice_start(k + 1)) at 16 kHz and is out no
    later than the push that delivers sample slice_start(k + 1) + `lookahead`. A turn of S samples
    gives frames_for(S) rows, exactly the same ones however it was cut into pushes.
    """

    def __init__(self, fps: int = 25, weights: Path | None = None) -> None:
        """ConfigError for a rate outside 20 to 60, EngineError for weights that can't be read."""
        if not 20 <= check_fps(fps) <= 60:
            raise ConfigError(
                f"fps {fps} can't be used: take one of 20, 24, 25, 30, 40, 48, 50, 60"
            )
        self.fps = fps
        self.lookahead = LOOKAHEAD
        self._listener = _Listener(load_weights(weights))
        self.reset()

    def reset(self) -> None:
        """Forget the turn, its cues included; the next push opens a new one."""
        self._listener.reset()
        self._mouth = _Mouth()
        self._pending = np.zeros(_BEFORE, np.float32)  # sound that a later window needs
        self._samples = 0
        self._heard = 0  # steps listened to
        self._moved = 0  # steps that the mouth has made
        self._rows = 0
        self._ahead: deque[tuple[Float32, float]] = deque()  # posteriors not yet used up
        self._levels: deque[float] = deque([0.0] * _LEAD)
        self._frame: list[tuple[Float64, float]] = []
        self._cues: list[tuple[float, float, int]] = []  # start, end, class; by start
        self._words: list[tuple[float, float, float]] = []  # start, end, odds of a closure

    def cue(self, cues: Sequence[Cue]) -> None:
        """Phonemes and words of this turn, from its voice.

        Phonemes outweigh what is heard, but for loudness. Words whose spelling has no closure keep
        the lips from one (see `closes`). Before or after their sound, as long as it is
        before the row is made. Gestures are passed over.
        """
        for cue in cues:
            if not cue.end > cue.start:
                continue
            if cue.kind == "word":
                odds = _UNSPELLED if closes(cue.text) is False else 1.0
                bisect.insort(self._words, (cue.start - _WORD_EDGE, cue.end + _WORD_EDGE, odds))
            if cue.kind != "phoneme":
                continue
            start = cue.start
            for name, share in shape(cue.text):
                end = start + share * (cue.end - cue.start)
                more = max(0.0, _CLOSURE - (end - start)) / 2 if name in ("PP", "FF") else 0.0
                bisect.insort(self._cues, (start - more, end + more, CLASSES.index(name)))
                start = end

    def push(self, pcm: Float32) -> Float32:
        """Sound in, float32 mono 16 kHz, any length; rows out that can now be known, (n, 8)."""
        pcm = np.asarray(pcm, np.float32)
        if pcm.ndim != 1 or not np.isfinite(pcm).all():
            raise InputError("sound must be one row of finite float32 samples at 16 kHz, mono")
        self._samples += len(pcm)
        return self._advance(pcm, last=False)

    def flush(self) -> Float32:
        """The turn is over: its remaining rows, (m, 8). The next push opens a new turn."""
        rows = frames_for(self._samples, ENGINE_RATE, self.fps)
        missing = slice_start(rows, ENGINE_RATE, self.fps) + LOOKAHEAD + HOP - self._samples
        rest = self._advance(np.zeros(missing, np.float32), last=True)
        self.reset()
        return rest

    def _advance(self, pcm: Float32, last: bool) -> Float32:
        buffer = np.concatenate((self._pending, pcm))
        rows: list[Float32] = []
        at = 0
        limit = frames_for(self._samples, ENGINE_RATE, self.fps) if last else None
        while len(buffer) - at >= _WINDOW and self._rows != limit:
            heard = self._listener.step(buffer[at : at + _WINDOW])
            at += HOP
            if heard is not None:
                self._move(heard, rows)
        self._pending = buffer[at:].copy()
        return np.stack(rows) if rows else np.zeros((0, len(PARAMETERS)), np.float32)

    def _move(self, heard: tuple[Float32, float], rows: list[Float32]) -> None:
        """The posteriors of step `_heard`, which the mouth of step `_heard - _LEAD` moves to."""
        probability, loudness = heard
        mixed, told = self._with_cues(probability, (self._heard + 0.5) * _STEP)
        self._heard += 1
        self._levels.append(_smooth(loudness, -5.0, -0.3) * float(1.0 - mixed[_SIL]))
        place = self._mouth.step(mixed, loudness, told)
        if self._heard <= _LEAD:
            return
        self._frame.append((place.copy(), self._levels[-1 - _LEAD]))
        self._levels.popleft()
        self._moved += 1
        if self._moved * HOP >= slice_start(self._rows + 1, ENGINE_RATE, self.fps):
            rows.append(_row([p for p, _ in self._frame], [level for _, level in self._frame]))
            self._frame.clear()
            self._rows += 1

    def _with_cues(self, probability: Float32, time: float) -> tuple[Float64, bool]:
        """Posteriors as the cues change them, and whether a cue says that something is spoken."""
        mixed = probability.astype(np.float64)
        if self._words:
            self._words = [word for word in self._words if word[1] >= time]
            # Where two words meet, the one that may close is believed.
            odds = max((word[2] for word in self._words if word[0] <= time), default=1.0)
            ruled_out = (1.0 - odds) * float(mixed[_CLOSED])
            if ruled_out < 0.999:
                mixed[_CLOSED] -= ruled_out
                mixed /= 1.0 - ruled_out
        half = _CUE_FADE / 2
        while self._cues and self._cues[0][1] + half < time:
            self._cues.pop(0)
        told = np.zeros(len(CLASSES))
        for start, end, index in self._cues:
            if start - half > time:
                break
            inside = min(time - start, end - time) / _CUE_FADE + 0.5
            told[index] += min(1.0, max(0.0, inside))
        total = float(told.sum())
        if total > 0.0:
            share = _CUE_WEIGHT * min(1.0, total)
            # Who tells the phonemes, tells the closures: none is heard besides.
            heard = float(mixed[_CLOSED]) * min(1.0, total)
            mixed[_CLOSED] -= heard
            mixed += (heard / total) * told
            mixed = (1.0 - share) * mixed + (share / total) * told
        return mixed, total - float(told[_SIL]) > 0.5
