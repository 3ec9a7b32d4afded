"""The engine contract as tests: a suite that every engine must pass.

An engine's test module makes a `Kit` in a fixture named `kit` and names the suite:

    class TestViseme(EngineContract):
        @pytest.fixture(scope="class")
        @classmethod
        def kit(cls, tmp_path_factory): ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voipavatar.engines import Avatar, Engine, EngineSession, Expressive, Job
from voipavatar.errors import AvatarError, ConfigError, EngineError, VoipAvatarError
from voipavatar.media import ENGINE_RATE, POSES, Float32, UInt8, frames_for


def babble(seconds: float, seed: int = 0) -> Float32:
    """Something like speech: a buzz with formants whose loudness and pitch move, with pauses."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * ENGINE_RATE)) / ENGINE_RATE
    pitch = 2 * np.pi * np.cumsum(120 + 20 * np.sin(2 * np.pi * 0.7 * t)) / ENGINE_RATE
    voice = sum(np.sin(pitch * h) / h for h in range(1, 24))
    swell = np.clip(np.sin(2 * np.pi * 3.5 * t), 0, 1) ** 0.7
    hiss = 0.2 * rng.standard_normal(len(t)) * np.clip(-np.sin(2 * np.pi * 3.5 * t), 0, 1) ** 4
    return np.asarray(0.12 * (voice * swell + hiss), np.float32)


def quiet(what: str, share: float) -> None:
    """No progress to be seen."""


@dataclass
class Kit:
    """One engine, and what the suite needs to know of it."""

    make: Callable[[], Engine]
    source: Path
    """A good portrait."""
    options: dict[str, Any]
    """Options that go with it."""
    folder: Path
    """Room for prepared avatars."""
    bad_sources: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)
    """Sources and options that must be refused with AvatarError, by name."""
    bad_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options that must be refused with ConfigError, by the key that the message must name."""
    tolerance: int = 0
    """How far pixels may differ where they should be the same; 0 on a CPU."""
    mouth: bool = True
    """The engine draws a mouth that closes after speech."""
    still: dict[str, Any] = field(default_factory=dict)
    """Options with which speech moves nothing but the mouth."""
    settle: int = 0
    """Pictures after speech, beyond the mouth's, until the rest of the face has forgotten it."""
    open_seconds: float = 1.0
    posed: bool = True
    """Poses are seen in its pictures, if it has any."""

    def __post_init__(self) -> None:
        self.engine = self.make()
        self.avatar = self.prepare("avatar")
        self.calm = self.prepare("calm", **self.still)
        self.engine.open(self.avatar)  # warm

    def prepare(self, name: str, **options: Any) -> Avatar:
        return self.engine.prepare(self.source, self.folder / name, self.options | options, quiet)

    @cached_property
    def uncut(self) -> tuple[Float32, list[Job], list[UInt8]]:
        """A turn pushed in one piece: its sound, its jobs, its pictures."""
        pcm = babble(1.3)
        jobs = turn(self.open(), iter([pcm]))
        return pcm, jobs, self.draw(jobs)

    def open(self) -> EngineSession:
        return self.engine.open(self.avatar)

    def open_still(self) -> EngineSession:
        return self.engine.open(self.calm)

    def draw(self, jobs: Sequence[Job]) -> list[UInt8]:
        images: list[UInt8] = []
        batch = max(1, self.engine.info.batch)
        for start in range(0, len(jobs), batch):
            images += self.engine.render(jobs[start : start + batch])
        return images

    def same(self, one: Sequence[UInt8], other: Sequence[UInt8]) -> None:
        assert len(one) == len(other)
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            apart = int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())
            assert apart <= self.tolerance, f"picture {index} differs by {apart}"


def cuts(pcm: Float32, size: int | None, seed: int = 3) -> Iterator[Float32]:
    """`pcm` in pieces of `size` samples, or in odd random ones (some of them empty)."""
    rng = np.random.default_rng(seed)
    at = 0
    while at < len(pcm):
        step = size if size is not None else int(rng.integers(0, 2400))
        yield pcm[at : at + step]
        at += step


def turn(session: EngineSession, pieces: Iterator[Float32]) -> list[Job]:
    jobs = [job for piece in pieces for job in session.push(piece)]
    return jobs + session.flush()


class EngineContract:
    """What `voipavatar.engines` promises, seen on a real engine."""

    @pytest.mark.parametrize("seconds", [0.0, 1 / ENGINE_RATE, 0.03, 0.04, 0.5, 1.2345])
    def test_a_turn_fills_its_frames(self, kit: Kit, seconds: float) -> None:
        session = kit.open()
        pcm = babble(seconds) if seconds else np.zeros(0, np.float32)
        for _ in range(2):  # a session lives for many turns
            jobs = turn(session, iter([pcm]))
            assert len(jobs) == frames_for(len(pcm), ENGINE_RATE, session.spec.fps)
            assert all(job.speech and job.session is session for job in jobs)

    @pytest.mark.parametrize("size", [160, 641, 5000, None])
    def test_cutting_changes_nothing(self, kit: Kit, size: int | None) -> None:
        pcm, whole, pictures = kit.uncut
        parts = turn(kit.open(), cuts(pcm, size))
        assert [job.clock for job in parts] == [job.clock for job in whole]
        kit.same(kit.draw(parts), pictures)

    @pytest.mark.parametrize("size", [80, 640, 1111])
    def test_no_job_is_late(self, kit: Kit, size: int) -> None:
        session = kit.open()
        spec = session.spec
        pushed = made = 0
        for piece in cuts(babble(1.5), size):
            made += len(session.push(piece))
            pushed += len(piece)
            # Frames whose last needed sample is there: the step's last frame decides.
            due = 0
            while spec.first(due + spec.step) + spec.lookahead <= pushed:
                due += spec.step
            assert made >= due, f"{made} of {due} frames after {pushed} samples"
        assert made + len(session.flush()) == frames_for(pushed, ENGINE_RATE, spec.fps)

    def test_pictures_are_well_formed_and_their_own(self, kit: Kit) -> None:
        session = kit.open()
        jobs = turn(session, iter([babble(0.3)])) + session.idle(4)
        images = kit.draw(jobs)
        spec = session.spec
        for image in images:
            assert image.shape == (spec.height * 3 // 2, spec.width)
            assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
        kept = [image.copy() for image in images]
        images[0][:] = 7
        for image, before in zip(images[1:], kept[1:], strict=True):
            assert not np.shares_memory(image, images[0])
            assert np.array_equal(image, before)
        kit.same(kit.draw(jobs), kept)  # drawing keeps no state

    def test_a_batch_of_two_sessions_is_each_alone(self, kit: Kit) -> None:
        """Against an engine that never saw them together: one may keep what it got wrong."""

        def said(one: EngineSession, two: EngineSession) -> tuple[list[Job], list[Job]]:
            first = turn(one, iter([babble(0.6, 1)])) + one.idle(5)
            second = two.idle(3) + turn(two, iter([babble(0.5, 2)]))
            count = min(len(first), len(second))
            return first[:count], second[:count]

        first, second = said(kit.open(), kit.open())
        pairs = zip(first, second, strict=True)
        images = kit.engine.render([job for pair in pairs for job in pair])
        other = kit.make()
        try:
            first, second = said(other.open(kit.avatar), other.open(kit.avatar))
            for mixed, jobs in ((images[1::2], second), (images[0::2], first)):
                kit.same(mixed, [image for job in jobs for image in other.render([job])])
        finally:
            other.close()

    def test_one_clock_for_idle_and_speech(self, kit: Kit) -> None:
        session = kit.open()
        jobs = session.idle(3)
        jobs += session.push(babble(0.7))
        jobs += session.idle(2)
        jobs += session.push(babble(0.2))
        jobs += session.flush() + session.idle(2) + turn(session, iter([babble(0.1)]))
        assert [job.clock for job in jobs] == list(range(len(jobs)))
        spoken = [job.speech for job in jobs]
        assert spoken.count(True) == frames_for(
            len(babble(0.7)) + len(babble(0.2)), ENGINE_RATE, session.spec.fps
        ) + frames_for(len(babble(0.1)), ENGINE_RATE, session.spec.fps)
        session.reset()
        assert session.idle(1)[0].clock == len(jobs)

    def test_idle_asks_for_nothing_when_none_are_wanted(self, kit: Kit) -> None:
        assert kit.open().idle(0) == []

    def test_no_sound_of_a_turn_survives_a_reset(self, kit: Kit) -> None:
        session, fresh = kit.open(), kit.open()
        session.push(babble(0.9, 4))
        session.reset(clock=0)
        assert session.flush() == []
        session.reset(clock=0)
        settle = session.spec.ease + kit.settle
        session.idle(settle)
        fresh.idle(settle)
        after = turn(session, iter([babble(0.6, 5)]))
        kit.same(kit.draw(after), kit.draw(turn(fresh, iter([babble(0.6, 5)]))))

    def test_a_reset_rewinds_the_clock_and_the_life(self, kit: Kit) -> None:
        session, other = kit.open(), kit.open()
        session.push(babble(2.0))
        session.reset(clock=6, ease=3)
        jobs = session.idle(20 + kit.settle)
        assert [job.clock for job in jobs] == list(range(6, 26 + kit.settle))
        other.idle(6)
        straight = other.idle(20 + kit.settle)
        kit.same(kit.draw(jobs[kit.settle + 2 :]), kit.draw(straight[kit.settle + 2 :]))

    def test_the_mouth_closes_from_how_it_was(self, kit: Kit) -> None:
        if not kit.mouth:
            pytest.skip("this engine has no mouth")
        session, idle = kit.open_still(), kit.open_still()
        spoken = session.push(babble(2.0))
        rest = idle.idle(len(spoken) + 40)
        pictures, still = kit.draw(spoken), kit.draw(rest)
        moved = [_apart(a, b) for a, b in zip(pictures, still, strict=False)]
        loudest = int(np.argmax(moved[2:-2])) + 2
        assert moved[loudest] > 0.02  # the babble does open the mouth
        session.reset(clock=loudest + 1, ease=4)
        after = kit.draw(session.idle(6))
        steps = [_apart(a, b) for a, b in zip(after, still[loudest + 1 :], strict=False)]
        assert all(
            b <= a * 1.02 + 1e-3 for a, b in zip([moved[loudest], *steps], steps, strict=False)
        )
        assert steps[0] > 0.05 * moved[loudest], "the mouth snapped shut"
        assert steps[3:] == [0.0] * 3 or max(steps[3:]) <= kit.tolerance

    def test_after_a_turn_the_mouth_closes_within_its_time(self, kit: Kit) -> None:
        session, idle = kit.open_still(), kit.open_still()
        spoken = turn(session, iter([babble(1.1)]))
        count = session.spec.ease + 5
        after = session.idle(count)
        idle.idle(len(spoken))
        straight = idle.idle(count)
        first = session.spec.ease - 1
        kit.same(kit.draw(after[first:]), kit.draw(straight[first:]))

    def test_a_pause_in_a_turn_keeps_its_sound(self, kit: Kit) -> None:
        session = kit.open_still()
        pcm = babble(1.0)
        half = 7000
        jobs = session.push(pcm[:half])
        pause = session.idle(session.spec.ease + 6)
        assert not any(job.speech for job in pause)
        jobs += session.push(pcm[half:]) + session.flush()
        assert len(jobs) == frames_for(len(pcm), ENGINE_RATE, session.spec.fps)
        still = kit.open_still()
        still.idle(pause[-1].clock)
        kit.same(kit.draw(pause[-1:]), kit.draw(still.idle(1)))

    def test_silence_is_rest(self, kit: Kit) -> None:
        session, idle = kit.open(), kit.open()
        jobs = turn(session, iter([np.zeros(ENGINE_RATE, np.float32)]))
        kit.same(kit.draw(jobs), kit.draw(idle.idle(len(jobs))))

    def test_a_pose_comes_and_goes_and_outlives_an_interruption(self, kit: Kit) -> None:
        session, other, plain = kit.open(), kit.open(), kit.open()
        assert isinstance(session, Expressive) == ("poses" in kit.engine.info.can)
        if not (isinstance(session, Expressive) and isinstance(other, Expressive)):
            pytest.skip("this engine has no poses")
        with pytest.raises(EngineError, match="upside down"):
            session.pose("upside down")
        with pytest.raises(EngineError, match="somersault"):
            session.gesture("somersault")
        for pose in (one for one in POSES if one):
            jobs = [session.idle(2), other.idle(2)]
            session.pose(pose)
            other.pose(pose)
            jobs[0] += session.idle(30)
            jobs[1] += [job for _ in range(10) for job in other.idle(3)]
            usual = plain.idle(32)
            kit.same(kit.draw(jobs[0][::4]), kit.draw(jobs[1][::4]))
            held, free = kit.draw(jobs[0][-2:] + usual[-2:])[::2]
            assert np.array_equal(held, free) != kit.posed, f"{pose} can't be seen"
            back = jobs[0][-1].clock - 4
            session.reset(clock=back)
            kit.same(kit.draw(session.idle(5)), kit.draw(jobs[0][-5:]))
            for one in (session, other):
                one.pose("")
            after = session.idle(kit.settle + 3)
            other.idle(kit.settle + 3)
            kit.same(kit.draw(after[-3:]), kit.draw(plain.idle(kit.settle + 3)[-3:]))

    def test_preparing_twice_is_no_work(self, kit: Kit) -> None:
        kit.prepare("twice")
        before = _files(kit.folder / "twice")
        began = time.perf_counter()
        avatar = kit.prepare("twice")
        assert time.perf_counter() - began < 2.0
        assert _files(kit.folder / "twice") == before
        assert avatar.path == kit.folder / "twice"

    def test_a_damaged_cache_is_built_again(self, kit: Kit) -> None:
        avatar = kit.prepare("damaged")
        pictures = kit.draw(kit.engine.open(avatar).idle(3))
        files = (
            [path for path in avatar.path.rglob("*") if path.is_file()]
            if (avatar.path.is_dir())
            else []
        )
        for path in files:
            for harm in (
                lambda data: data[: len(data) // 2],
                lambda _: b"",
                lambda d: d[:-9] + b"*" * 9,
            ):
                path.write_bytes(harm(path.read_bytes()))
                again = kit.prepare("damaged")
                kit.same(kit.draw(kit.engine.open(again).idle(3)), pictures)

    def test_other_options_are_another_avatar(self, kit: Kit) -> None:
        kit.prepare("changing")
        avatar = kit.prepare("changing", width=320, height=240)
        spec = kit.engine.open(avatar).spec
        assert (spec.width, spec.height) == (320, 240)
        assert kit.engine.render(kit.engine.open(avatar).idle(1))[0].shape == (360, 320)

    @pytest.mark.parametrize("fps", [20, 24, 25, 30, 50])
    def test_any_rate_that_pairs_with_sound(self, kit: Kit, fps: int) -> None:
        session = kit.engine.open(kit.prepare("rate", fps=fps))
        assert session.spec.fps == fps
        pcm = babble(0.777)
        assert len(turn(session, cuts(pcm, 333))) == frames_for(len(pcm), ENGINE_RATE, fps)

    def test_bad_sources_are_refused_with_a_sentence(self, kit: Kit) -> None:
        for name, (path, options) in kit.bad_sources.items():
            with pytest.raises(AvatarError) as caught:
                kit.engine.prepare(path, kit.folder / f"bad-{name}", options, quiet)
            assert len(str(caught.value)) > 30, name
            assert not (kit.folder / f"bad-{name}" / "manifest.json").exists()

    def test_bad_options_are_refused_by_name(self, kit: Kit) -> None:
        options: dict[str, dict[str, Any]] = {
            "fps": {"fps": 29},
            "width": {"width": 641},
            "height": {"height": 0},
            "colour_of_socks": {"colour_of_socks": "red"},
        }
        for key, wrong in (options | kit.bad_options).items():
            with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
                kit.engine.prepare(kit.source, kit.folder / "wrong", kit.options | wrong, quiet)

    def test_opening_is_quick(self, kit: Kit) -> None:
        began = time.perf_counter()
        kit.open()
        assert time.perf_counter() - began < kit.open_seconds * 3  # generous: the machine is shared

    def test_closing_twice_is_closing_once(self, kit: Kit) -> None:
        engine = kit.make()
        engine.close()
        engine.close()
        with pytest.raises(VoipAvatarError):
            engine.open(kit.avatar)


def _apart(one: UInt8, other: UInt8) -> float:
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and the time it was written."""
    if not folder.is_dir():
        return {}
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
