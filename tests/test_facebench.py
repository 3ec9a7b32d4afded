"""The sheet of how well faces speak: its arithmetic on made-up mouths, its command on a face."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from voipavatar import facebench
from voipavatar.cli import cli
from voipavatar.config import Settings
from voipavatar.errors import VoipAvatarError
from voipavatar.facebench import ARPABET, LIMITS, Speech, best_lag, passed, report, table
from voipavatar.media import ENGINE_RATE, Cue

FPS = 25


def speech(*phonemes: tuple[str, float, float]) -> Speech:
    cues = tuple(Cue("phoneme", *one) for one in phonemes)
    end = max(cue.end for cue in cues)
    return Speech("nobody", np.zeros(round(end * ENGINE_RATE), np.float32), cues, told=True)


def mouth(seconds: float, *shut: tuple[float, float]) -> npt.NDArray[np.float64]:
    """A mouth that is open but for these stretches, a value a picture."""
    time = (np.arange(round(seconds * FPS)) + 0.5) / FPS
    out = np.full(len(time), 0.6)
    for low, high in shut:
        out[(time >= low) & (time < high)] = 0.0
    return out


def test_a_closure_counts_within_its_sound_and_a_picture_around_it() -> None:
    said = speech(("ɑ", 0.0, 0.4), ("b", 0.4, 0.48), ("ɑ", 0.48, 1.0))
    assert facebench._closures(mouth(1.0, (0.40, 0.44)), said, FPS) == (1, 1)
    assert facebench._closures(mouth(1.0, (0.36, 0.40)), said, FPS) == (1, 1)
    assert facebench._closures(mouth(1.0, (0.60, 0.80)), said, FPS) == (0, 1)
    assert facebench._closures(mouth(1.0), said, FPS) == (0, 1)


def test_what_is_one_closure_is_counted_once_and_what_none_can_see_not_at_all() -> None:
    said = speech(("m", 0.2, 0.28), ("p", 0.28, 0.36), ("ɑ", 0.36, 0.8), ("b", 0.8, 0.81))
    assert facebench._closures(mouth(1.0, (0.2, 0.36)), said, FPS) == (1, 1)


def test_a_shut_vowel_is_counted_and_a_short_one_is_not_judged() -> None:
    said = speech(
        ("ɑ", 0.0, 0.4), ("t", 0.4, 0.5), ("ɛ", 0.5, 0.7), ("i", 0.7, 0.9), ("ɑ", 0.9, 0.95)
    )
    assert facebench._vowels(mouth(1.0), said, FPS) == (0, 2)
    assert facebench._vowels(mouth(1.0, (0.5, 0.7)), said, FPS) == (1, 2)
    # shut at its beginning only: what comes before it asked for that
    assert facebench._vowels(mouth(1.0, (0.4, 0.56)), said, FPS) == (0, 2)


@pytest.mark.parametrize("late", [-3, 0, 2])
def test_the_lag_is_found(late: int) -> None:
    rng = np.random.default_rng(1)
    loud = np.convolve(rng.random(400), np.hanning(9), "same")
    lag, r = best_lag(np.roll(loud, late), loud)
    assert lag == pytest.approx(late, abs=0.1)
    assert r > 0.95


def good_row(**other: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "face": "x", "voice": "v", "cues": True, "shut": 99, "bilabials": 100, "recall": 0.99,
        "vowels_shut": 0, "vowels_long": 50, "vowels": 0.0, "r": 0.7, "lag_frames": 0.2,
        "jitter": 1.0, "jitter_rest": 0.001, "seam": 0.3, "outside_mean": 0.0, "ms": 5.0,
    }  # fmt: skip
    row.update(other)
    row["failed"] = [one.key for one in LIMITS if not one.holds(row[one.key])]
    return row


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("recall", 0.94),
        ("vowels", 0.06),
        ("r", 0.49),
        ("lag_frames", -1.2),
        ("jitter", 1.1),
        ("seam", 1.3),
        ("outside_mean", 0.2),
        ("ms", 9.0),
    ],
)
def test_one_number_beyond_its_limit_fails_the_sheet(key: str, value: float) -> None:
    rows = [good_row(), good_row(**{key: value})]
    assert passed(rows[:1]) and not passed(rows)
    assert rows[1]["failed"] == [key]
    assert f"no: {key}" in table(rows)
    assert report(rows)["passed"] is False


def test_nothing_measured_is_no_pass() -> None:
    assert not passed([])
    assert not passed([{"face": "x", "error": "no face", "failed": ["face"]}])


def test_the_english_phones_all_have_a_mouth() -> None:
    from voipavatar.engines.articulation import shape

    assert all(shape(ipa) or name in ("hh", "hv") for name, ipa in ARPABET.items())


async def test_a_voice_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(VoipAvatarError, match="apt-get install flite"):
        await facebench.spoken(Settings.from_env(), "flite")


@pytest.mark.parametrize(("recall", "status"), [(0.99, 0), (0.9, 1)])
def test_the_command_ends_with_the_verdict(
    recall: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def face(settings: Settings, **options: Any) -> list[dict[str, Any]]:
        return [good_row(recall=recall)]

    monkeypatch.setattr(facebench, "face", face)
    command = ["bench", "face", "--json"]
    assert cli.main(args=command, prog_name="voipavatar", standalone_mode=False) == status
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is (status == 0)
    assert set(found["limits"]) == {one.key for one in LIMITS}


@pytest.mark.slow
def test_the_command_measures_a_face_with_cues_and_by_sound() -> None:
    command = ["bench", "face", "--short", "--json", "--persona", "default", "--voice", "espeak"]
    done = subprocess.run(
        [sys.executable, "-m", "voipavatar", *command], capture_output=True, text=True, timeout=300
    )
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["passed"] else 1)
    rows = {row["cues"]: row for row in found["rows"]}
    assert set(rows) == {True, False}
    for cued, row in rows.items():
        assert row["bilabials"] >= 20
        assert row["recall"] >= (0.95 if cued else 0.85)
        assert row["vowels"] <= 0.15
        assert abs(row["lag_frames"]) <= 1.0
        assert row["jitter"] <= 1.0 and row["seam"] < 1.0 and row["outside_mean"] < 0.05
