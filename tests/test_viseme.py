"""The viseme engine: what must be seen of it, measured on its pictures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from voipavatar.engines import Avatar, Job, Picture
from voipavatar.engines.articulation import JAW, PARAMETERS, Articulator
from voipavatar.engines.life import Life
from voipavatar.engines.puppet import Pose, Puppet, mouth_weights
from voipavatar.engines.rig import HEAD, MOUTH, Landmarks, build, parse_landmarks
from voipavatar.engines.viseme import (
    VisemeEngine,
    VisemeSession,
    bench,
    fit,
    read_portrait,
    region,
)
from voipavatar.errors import AvatarError, ConfigError, EngineError
from voipavatar.media import ENGINE_RATE, Cue, Float32, ManualClock, UInt8
from voipavatar.stage import Stage

from . import portraits
from .contract import babble, quiet, turn
from .faces import face, save_face
from .players import FakeSink, Owner

WIDTH, HEIGHT = 1280, 720


def mouth(**values: float) -> Float32:
    return np.array([values.get(name, 0.0) for name in PARAMETERS], np.float32)


def pose(**values: float) -> Pose:
    """Of any mouth and head parameters, and `blink`."""
    turned = np.array([values.get(name, 0.0) for name in HEAD], np.float32)
    return Pose(mouth(**values), turned, values.get("blink", 0.0))


SHAPES: dict[str, dict[str, float]] = {
    "rest": {},
    "PP": {"press": 1, "level": 0.3},
    "FF": {"tuck": 1, "jaw": 0.08},
    "TH": {"tongue": 1, "jaw": 0.18},
    "DD": {"jaw": 0.2, "tongue": 0.6, "teeth": 0.6},
    "kk": {"jaw": 0.22},
    "CH": {"jaw": 0.18, "round": 0.6, "teeth": 0.8},
    "SS": {"jaw": 0.08, "width": 0.35, "teeth": 1},
    "RR": {"jaw": 0.22, "round": 0.5},
    "aa": {"jaw": 1},
    "E": {"jaw": 0.55, "width": 0.5},
    "I": {"jaw": 0.25, "width": 0.8},
    "O": {"jaw": 0.6, "round": 0.7},
    "U": {"jaw": 0.25, "round": 1},
}


class Portrait:
    """A drawn face, its rig and a way to measure its mouth on pictures."""

    def __init__(self, **options: Any) -> None:
        picture, marks = face(WIDTH, HEIGHT, **options)
        self.picture, self.marks = picture, parse_landmarks(marks)
        self.puppet = Puppet(build(picture, self.marks, 1.0))
        self.rest = self.puppet.draw(pose())

    def opening(self, image: UInt8) -> float:
        """How far the lips are apart, in pixels, seen in the picture: along the middle of the
        mouth, what is neither lip nor skin, that is not red enough."""
        bgr = cv2.cvtColor(image, cv2.COLOR_YUV2BGR_I420)
        middle = self.marks.inner_lips[5]
        x, y = round(float(middle[0])), round(float(middle[1]))
        reach = round(0.35 * self.marks.unit)
        strip = bgr[y - reach // 3 : y + reach, x - 2 : x + 3].astype(float).mean(1)
        red = strip[:, 2] - strip[:, :2].mean(1)
        return float((red < 35).sum())

    def luma(self, image: UInt8) -> npt.NDArray[np.float64]:
        return image[:HEIGHT].astype(np.float64)


@pytest.fixture(scope="module")
def portrait() -> Portrait:
    return Portrait()


@pytest.fixture(scope="module")
def engine() -> Iterator[VisemeEngine]:
    made = VisemeEngine()
    yield made
    made.close()


@pytest.fixture(scope="module")
def avatar(engine: VisemeEngine, tmp_path_factory: pytest.TempPathFactory) -> Avatar:
    folder = tmp_path_factory.mktemp("avatar")
    marks = save_face(folder / "face.png")
    return engine.prepare(folder / "face.png", folder / "a", {"landmarks": marks}, quiet)


# --- the mouth ------------------------------------------------------------------------------------


def test_rest_is_the_portrait(portrait: Portrait) -> None:
    """Nothing said, nothing moved: the picture is the portrait, to the last bit."""
    assert np.array_equal(portrait.rest, portrait.puppet.rig.image)
    shown = cv2.cvtColor(portrait.rest, cv2.COLOR_YUV2BGR_I420).astype(int)
    apart = np.abs(shown - portrait.picture)
    assert apart.mean() < 1.5  # what 4:2:0 takes away


def test_lips_close(portrait: Portrait) -> None:
    """Pressed lips are shut whatever else is asked of the mouth at that moment."""
    for name, shape in SHAPES.items():
        closed = pose(**(shape | {"press": 1.0}))
        assert portrait.puppet.gap(closed) < 0.25, name
        assert portrait.opening(portrait.puppet.draw(closed)) <= 1, name
    open_ = portrait.puppet.draw(pose(jaw=1))
    assert portrait.opening(open_) > 0.12 * portrait.marks.unit


def test_opening_follows_the_jaw(portrait: Portrait) -> None:
    jaws = np.linspace(0, 1, 11)
    gaps = [portrait.puppet.gap(pose(jaw=float(jaw))) for jaw in jaws]
    assert (np.diff(gaps) > 0).all()
    seen = [portrait.opening(portrait.puppet.draw(pose(jaw=float(jaw)))) for jaw in jaws]
    assert np.corrcoef(jaws, seen)[0, 1] > 0.97
    # The picture shows the opening that the geometry says, once there is room for the inside.
    assert abs(seen[-1] - gaps[-1]) < 0.15 * gaps[-1] + 2


def test_the_chin_goes_with_the_jaw(portrait: Portrait) -> None:
    chin = portrait.marks.jaw[len(portrait.marks.jaw) // 2]
    x, y = round(float(chin[0])), round(float(chin[1]))

    def edge(image: UInt8) -> int:
        column = portrait.luma(image)[y - 30 : y + 40, x - 2 : x + 3].mean(1)
        return int(np.argmin(np.diff(column)))  # from the light chin to the darker throat

    moved = edge(portrait.puppet.draw(pose(jaw=1))) - edge(portrait.rest)
    assert 0.06 * portrait.marks.unit < moved < 0.18 * portrait.marks.unit


def test_shapes_differ(portrait: Portrait) -> None:
    """No two mouth shapes look alike, and every one is far from noise."""
    pictures = {name: portrait.puppet.draw(pose(**shape)) for name, shape in SHAPES.items()}
    names = list(pictures)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            apart = np.abs(portrait.luma(pictures[one]) - portrait.luma(pictures[other]))
            assert apart.max() > 12, (one, other)


def test_the_mouth_moves_nothing_else(portrait: Portrait) -> None:
    x, y, width, height = (int(v) for v in portrait.puppet.rig.mouth_box)
    for name, shape in SHAPES.items():
        changed = portrait.luma(portrait.puppet.draw(pose(**shape))) != portrait.luma(portrait.rest)
        changed[y : y + height, x : x + width] = False
        assert not changed.any(), name


def test_no_step_at_the_edge_of_what_moves(portrait: Portrait) -> None:
    """The mouth's box can't be seen: changes fade out before its edge."""
    x, y, width, height = (int(v) for v in portrait.puppet.rig.mouth_box)
    change = np.abs(
        portrait.luma(portrait.puppet.draw(pose(jaw=1, width=1))) - portrait.luma(portrait.rest)
    )
    box = change[y : y + height, x : x + width]
    rim = np.concatenate(
        [box[:3].ravel(), box[-3:].ravel(), box[:, :3].ravel(), box[:, -3:].ravel()]
    )
    assert rim.max() <= 10
    assert box.max() > 60


def test_the_seam_is_continuous(portrait: Portrait) -> None:
    """Beyond the corners of the mouth the two layers meet without a step."""
    corner = portrait.marks.inner_lips[10]
    start = round(float(corner[0]) + 0.10 * portrait.marks.unit)
    y = round(float(corner[1]))
    patch = np.s_[y - 25 : y + 25, start : start + 12]
    before = np.abs(np.diff(portrait.luma(portrait.rest)[patch], axis=0)).max()
    for name, shape in SHAPES.items():
        after = np.abs(np.diff(portrait.luma(portrait.puppet.draw(pose(**shape)))[patch], axis=0))
        assert after.max() <= before + 4, name


def test_parted_lips_can_be_closed() -> None:
    portrait = Portrait(gap=0.05)
    assert np.array_equal(portrait.rest, portrait.puppet.rig.image)
    assert portrait.puppet.gap(pose()) > 5
    assert portrait.puppet.gap(pose(press=1)) < 0.5
    assert portrait.opening(portrait.puppet.draw(pose(press=1))) <= 2


@pytest.mark.parametrize("unit", [45.0, 90.0, 240.0])
def test_any_size_of_face(unit: float) -> None:
    portrait = Portrait(unit=unit, centre=(560.0, 330.0))
    for shape in SHAPES.values():
        image = portrait.puppet.draw(pose(blink=0.5, yaw=0.03, roll=0.01, **shape))
        assert image.shape == (HEIGHT * 3 // 2, WIDTH)


def test_weights_are_safe() -> None:
    for values in ({}, {"press": 5.0}, {"jaw": -1.0}, dict.fromkeys(PARAMETERS, 1.0)):
        weights = mouth_weights(mouth(**values))
        assert weights.shape == (len(MOUTH),) and np.isfinite(weights).all()


# --- eyes and head --------------------------------------------------------------------------------


def test_a_blink_hides_the_eye(portrait: Portrait) -> None:
    """Shut, the eye's white and iris are gone; the lids' skin is there instead."""
    for eye in (portrait.marks.left_eye, portrait.marks.right_eye):
        x, y = round(float(eye.iris[0])), round(float(eye.iris[1]))
        patch = np.s_[y - 3 : y + 4, x - 12 : x + 13]
        skin = portrait.luma(portrait.rest)[
            y + round(0.13 * portrait.marks.unit), x - 12 : x + 13
        ].mean()
        shut = portrait.luma(portrait.puppet.draw(pose(blink=1.0)))[patch]
        assert portrait.luma(portrait.rest)[patch].std() > 30
        assert shut.std() < 14
        assert abs(shut.mean() - skin) < 30


def test_a_blink_leaves_no_trace(portrait: Portrait) -> None:
    portrait.puppet.draw(pose(blink=1.0))
    assert np.array_equal(portrait.puppet.draw(pose()), portrait.rest)
    again = portrait.puppet.draw(pose(jaw=0.5, blink=0.5))
    assert np.array_equal(again, portrait.puppet.draw(pose(jaw=0.5, blink=0.5)))


def test_the_head_stays_in_its_region(portrait: Portrait) -> None:
    x, y, width, height = (int(v) for v in portrait.puppet.rig.region)
    assert width * height < 0.5 * WIDTH * HEIGHT
    for head in (
        {"yaw": 0.06, "pitch": -0.03, "roll": 0.02, "sway": 0.03, "lift": 0.02, "brow": 1.0},
        {"yaw": -0.06, "pitch": 0.03, "roll": -0.02, "sway": -0.03, "lift": -0.02},
    ):
        image = portrait.puppet.draw(pose(blink=0.4, jaw=0.8, **head))
        changed = portrait.luma(image) != portrait.luma(portrait.rest)
        assert changed.any()
        changed[y : y + height, x : x + width] = False
        assert not changed.any()
        colours = image[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
        still = portrait.rest[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2)
        tinted = (colours != still).any(0)
        tinted[y // 2 : (y + height) // 2, x // 2 : (x + width) // 2] = False
        assert not tinted.any()


def test_the_mouth_turns_with_the_head(portrait: Portrait) -> None:
    """An open mouth is where the head has carried it."""

    def dark(image: UInt8) -> float:
        bgr = cv2.cvtColor(image, cv2.COLOR_YUV2BGR_I420).astype(int)
        x, y, width, height = (int(v) for v in portrait.puppet.rig.mouth_box)
        box = bgr[y : y + height // 2, x + width // 5 : x + width * 4 // 5]
        return float(np.nonzero(box.max(-1) < 70)[1].mean())

    straight = dark(portrait.puppet.draw(pose(jaw=1)))
    swayed = dark(portrait.puppet.draw(pose(sway=0.05, jaw=1)))
    assert abs(swayed - straight - 0.05 * portrait.marks.unit) < 1.0


def test_life_is_a_function_of_the_clock() -> None:
    one, two = Life(7, 25, 1.0, 1.0), Life(7, 25, 1.0, 1.0)
    for clock in (0, 3, 1000, 999, 90_000):
        assert np.array_equal(one.head(clock), two.head(clock))
        assert one.blink(clock) == two.blink(clock)
    other = Life(8, 25, 1.0, 1.0)
    assert not np.array_equal(one.head(500), other.head(500))


@pytest.mark.parametrize("fps", [20, 25, 50])
def test_life_is_lively_and_smooth(fps: int) -> None:
    life = Life(3, fps, 1.0, 1.0)
    seconds = 300
    heads = np.stack([life.head(clock) for clock in range(seconds * fps)])
    step = np.abs(np.diff(heads, axis=0)).max(0) * fps
    assert (step[:3] < 0.2).all()  # radians a second
    assert (heads[:, 0].max() - heads[:, 0].min()) > 0.03
    assert np.abs(heads[:, :2]).max() < 0.08
    shut = np.array([life.blink(clock) for clock in range(seconds * fps)])
    blinks = int(((shut[1:] == 1.0) & (shut[:-1] < 1.0)).sum())
    assert 50 <= blinks <= 110
    assert (shut == 0).mean() > 0.85
    gaps = np.diff(np.flatnonzero((shut[1:] > 0) & (shut[:-1] == 0))) / fps
    assert gaps.std() > 0.8  # no metronome


def test_no_blink_and_no_motion_when_not_wanted() -> None:
    life = Life(3, 25, 0.0, 0.0)
    assert not any(life.blink(clock) for clock in range(2000))
    assert not life.head(77).any()


# --- speech ---------------------------------------------------------------------------------------


def test_bilabials_close_the_lips(engine: VisemeEngine, avatar: Avatar, portrait: Portrait) -> None:
    """With phonemes known: every p, b and m has a picture with shut lips within its span."""
    pcm = babble(3.0)
    phonemes = [("p", 0.4), ("b", 1.0), ("m", 1.6), ("p", 2.2)]
    session = engine.open(_calm(engine, avatar))
    session.cue([Cue("phoneme", "a", 0.0, 3.0)][:0] + _words(phonemes))
    jobs = turn(session, iter([pcm]))
    fps = session.spec.fps
    for _, start in phonemes:
        frames = range(int(start * fps) - 1, int((start + 0.1) * fps) + 2)
        gaps = [session.puppet.gap(jobs[k].data) for k in frames]
        best = frames[int(np.argmin(gaps))]
        assert min(gaps) < 1.0, (start, gaps)
        assert portrait.opening(engine.render([jobs[best]])[0]) <= 1
    assert max(session.puppet.gap(job.data) for job in jobs) > 6


def test_opening_goes_with_the_phonemes(
    engine: VisemeEngine, avatar: Avatar, portrait: Portrait
) -> None:
    """Seen in the pictures, the opening correlates with what the phonemes ask of the jaw."""
    plan = "p a t i m o s a f u b e k a m i d a p o".split()
    each = 0.16
    classes = dict(zip("patimosfubekd", "PP aa DD I PP O SS FF U PP E kk DD".split(), strict=True))
    cues = [Cue("phoneme", one, i * each, (i + 1) * each) for i, one in enumerate(plan)]
    t = np.arange(round(len(plan) * each * ENGINE_RATE)) / ENGINE_RATE
    buzz = sum(np.sin(2 * np.pi * 120 * h * t) / h for h in range(1, 20))
    pcm = np.asarray(0.1 * buzz, np.float32)
    session = engine.open(_calm(engine, avatar))
    session.cue(cues)
    jobs = turn(session, iter([pcm]))
    seen = np.array([portrait.opening(image) for image in engine.render(jobs)])
    wanted = np.array(
        [
            JAW[classes[plan[min(len(plan) - 1, int((k + 0.5) / 25 / each))]]]
            for k in range(len(jobs))
        ]
    )
    lags = [
        np.corrcoef(seen[2 + lag : -2], wanted[2 : len(wanted) - 2 - lag])[0, 1] for lag in range(3)
    ]
    assert max(lags) >= 0.7, lags


def test_speech_without_cues_moves_the_mouth(engine: VisemeEngine, avatar: Avatar) -> None:
    session = engine.open(avatar)
    jobs = turn(session, iter([babble(2.0)]))
    gaps = np.array([session.puppet.gap(job.data) for job in jobs])
    assert gaps.max() > 4 and gaps.std() > 1


def test_speaking_up_moves_head_and_brows(engine: VisemeEngine, avatar: Avatar) -> None:
    session = engine.open(avatar)
    jobs = turn(session, iter([babble(2.0)]))
    life = Life(1, 25, 1.0, 1.0)
    added = np.stack([job.data.head - life.head(job.clock) for job in jobs])
    assert np.abs(added[:, HEAD.index("pitch")]).max() > 1e-3
    assert added[:, HEAD.index("brow")].max() > 0.02
    assert np.abs(np.diff(added, axis=0)).max() < 0.06


def test_speech_takes_over_gently_and_lets_go(engine: VisemeEngine, avatar: Avatar) -> None:
    """From one picture to the next no point of the mouth jumps further than speech itself makes
    it, also where a turn is paused, resumed, cut and followed by another."""
    session = engine.open(avatar)
    pcm = babble(2.0)
    jobs = session.push(pcm[:16000]) + session.idle(4) + session.push(pcm[16000:])
    jobs += session.flush() + session.idle(3) + turn(session, iter([pcm[:9000]]))
    session.reset(clock=len(jobs))
    jobs += session.idle(6)
    rings = np.stack([session.puppet._ring(mouth_weights(job.data.mouth)) for job in jobs])
    steps = np.abs(np.diff(rings, axis=0)).max((1, 2))
    spoken = np.array([a.speech and b.speech for a, b in zip(jobs, jobs[1:], strict=False)])
    assert steps[~spoken].max() <= max(steps[spoken].max(), 0.08 * 158)


@pytest.mark.parametrize("name", ["marcus", "clara"])
async def test_a_cut_shuts_the_mouth_in_two_pictures(
    engine: VisemeEngine, name: str, tmp_path: Path
) -> None:
    """Cut by the stage where a real face's mouth is open widest: the second picture shows it as
    idling does, and no step on the way there is larger than those of speech."""
    raw = portraits.landmarks(name)
    _, marks = fit(portraits.persona(name), parse_landmarks(raw), 640, 360)
    options = {"landmarks": raw, "width": 640, "height": 360, "motion": 0, "blink": 0}
    source = portraits.PERSONAS / name / "portrait.png"
    avatar = engine.prepare(source, tmp_path / "a", options, quiet)
    left, top = np.rint(marks.outer_lips.min(0) - 0.2 * marks.unit).astype(int)
    right, bottom = np.rint(marks.outer_lips.max(0) + 0.2 * marks.unit).astype(int)

    def lips(image: UInt8) -> npt.NDArray[np.int16]:
        return image[top:bottom, left:right].astype(np.int16)

    def submit(jobs: Sequence[Job], due: Sequence[float]) -> list[Picture]:
        pictures = [Picture(job) for job in jobs]
        for picture in pictures:
            picture.settle(engine.render([picture.job])[0])
        return pictures

    async def shown(ticks: int, cut: int | None = None) -> list[npt.NDArray[np.int16]]:
        """The lips, tick by tick of a turn that is cut after `cut` ticks."""
        clock = ManualClock()
        sink = FakeSink(clock)
        stage = Stage(engine.open(avatar), submit, clock, [sink])
        number = stage.begin(Owner())
        stage.push(number, (babble(2.0) * 32767).astype(np.int16), ENGINE_RATE)
        for tick in range(ticks):
            if tick == cut:
                assert stage.interrupt() == 1
            stage.tick()
            await clock.sleep_until(clock.now() + 1 / stage.fps)
        return [lips(frame.image) for frame in sink.frames]

    rest = lips(engine.render(engine.open(avatar).idle(1))[0])
    spoken = await shown(40)
    opened = np.array([np.abs(one - rest).mean() for one in spoken])
    largest = np.abs(np.diff(spoken, axis=0)).mean((1, 2)).max()
    assert opened.max() > 3
    for widest in map(int, np.argsort(opened)[-6:]):
        before, first, *after = (await shown(widest + 6, widest + 1))[widest:]
        assert np.array_equal(before, spoken[widest])
        assert all(np.abs(one - rest).max() <= 1 for one in after), widest
        steps = [np.abs(first - before).mean(), np.abs(after[0] - first).mean()]
        assert 0.1 * opened[widest] < steps[0] and max(steps) <= 1.1 * largest, widest


# --- preparing ------------------------------------------------------------------------------------


def test_the_manifest_says_what_is_there(engine: VisemeEngine, avatar: Avatar) -> None:
    manifest = json.loads((avatar.path / "manifest.json").read_text())
    assert manifest["engine"] == "viseme"
    x, y, width, height = region(avatar)
    assert 0 <= x < x + width <= WIDTH and 0 <= y < y + height <= HEIGHT
    assert not any(value % 4 for value in (x, y, width, height))
    assert sorted(path.name for path in avatar.path.iterdir()) == ["manifest.json", "rig.npz"]


def test_what_only_a_session_uses_needs_no_new_rig(engine: VisemeEngine, tmp_path: Path) -> None:
    marks = save_face(tmp_path / "face.png", width=640, height=360)
    options = {"landmarks": marks, "width": 640, "height": 360}
    engine.prepare(tmp_path / "face.png", tmp_path / "a", options, quiet)
    before = (tmp_path / "a" / "rig.npz").stat().st_mtime_ns
    avatar = engine.prepare(
        tmp_path / "face.png", tmp_path / "a", options | {"seed": 9, "mouth": 1.3}, quiet
    )
    assert (tmp_path / "a" / "rig.npz").stat().st_mtime_ns == before
    assert avatar.options["seed"] == 9


def test_progress_rises_to_one(engine: VisemeEngine, tmp_path: Path) -> None:
    marks = save_face(tmp_path / "face.png", width=640, height=360)
    told: list[float] = []
    engine.prepare(
        tmp_path / "face.png",
        tmp_path / "a",
        {"landmarks": marks, "width": 640, "height": 360},
        lambda what, share: told.append(share),
    )
    assert told == sorted(told) and told[-1] == 1.0 and len(told) > 3


def test_two_threads_prepare_one_avatar(engine: VisemeEngine, tmp_path: Path) -> None:
    marks = save_face(tmp_path / "face.png", width=640, height=360)
    options = {"landmarks": marks, "width": 640, "height": 360}
    failed: list[BaseException] = []

    def work() -> None:
        try:
            engine.prepare(tmp_path / "face.png", tmp_path / "a", options, quiet)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed
    avatar = engine.prepare(tmp_path / "face.png", tmp_path / "a", options, quiet)
    assert len(engine.render(engine.open(avatar).idle(2))) == 2
    assert len(list(avatar.path.iterdir())) == 2


def test_a_rig_that_was_swapped_is_refused(engine: VisemeEngine, tmp_path: Path) -> None:
    marks = save_face(tmp_path / "face.png", width=640, height=360)
    options = {"landmarks": marks, "width": 640, "height": 360}
    avatar = engine.prepare(tmp_path / "face.png", tmp_path / "a", options, quiet)
    with (avatar.path / "rig.npz").open("wb") as file:
        np.savez(file, image=np.zeros((4, 4), np.uint8))
    with pytest.raises(AvatarError, match="damaged"):
        engine.open(avatar)
    (avatar.path / "manifest.json").unlink()
    with pytest.raises(AvatarError, match="prepare"):
        engine.open(avatar)


def test_sessions_share_what_is_large(engine: VisemeEngine, avatar: Avatar) -> None:
    assert engine.open(avatar).puppet is engine.open(avatar).puppet


def test_a_closed_engine_says_so(avatar: Avatar) -> None:
    engine = VisemeEngine()
    job = engine.open(avatar).idle(1)
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.open(avatar)
    with pytest.raises(EngineError, match="closed"):
        engine.render(job)


def test_a_negative_clock_is_refused(engine: VisemeEngine, avatar: Avatar) -> None:
    with pytest.raises(EngineError):
        engine.open(avatar).reset(clock=-1)


def test_rewinding_further_than_is_kept(engine: VisemeEngine, avatar: Avatar) -> None:
    """Beyond its memory a session starts from rest, and nothing breaks."""
    session = engine.open(avatar)
    session.push(babble(10.0))
    session.reset(clock=2)
    jobs = session.idle(3)
    assert [job.clock for job in jobs] == [2, 3, 4]
    assert not jobs[0].data.mouth.any()


# --- portraits ------------------------------------------------------------------------------------


def _encoded(picture: npt.NDArray[Any], kind: str = ".png") -> bytes:
    done, data = cv2.imencode(kind, picture)
    assert done
    return data.tobytes()


def test_a_transparent_portrait_stands_before_its_background() -> None:
    picture = np.zeros((20, 30, 4), np.uint8)
    picture[:, :15] = (10, 20, 200, 255)
    read = read_portrait(_encoded(picture), (1, 2, 3))
    assert read.shape == (20, 30, 3)
    assert tuple(read[5, 5]) == (10, 20, 200) and tuple(read[5, 25]) == (3, 2, 1)


def test_sixteen_bits_and_grey_are_read() -> None:
    deep = np.full((8, 8, 3), 40_000, np.uint16)
    assert abs(int(read_portrait(_encoded(deep), (0, 0, 0))[0, 0, 0]) - 155) <= 1
    deep4 = np.dstack([deep, np.full((8, 8), 65_535, np.uint16)])
    assert abs(int(read_portrait(_encoded(deep4), (0, 0, 0))[0, 0, 0]) - 155) <= 1
    assert read_portrait(_encoded(np.full((8, 8), 90, np.uint8)), (0, 0, 0)).shape == (8, 8, 3)


def test_exif_turns_the_portrait() -> None:
    """A JPEG whose EXIF says "rotate 90" comes out upright."""
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :20] = 255
    jpeg = _encoded(picture, ".jpg")
    tiff = b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
    exif = b"Exif\x00\x00" + tiff + b"\x00\x00\x00\x00"
    app1 = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    read = read_portrait(jpeg[:2] + app1 + jpeg[2:], (0, 0, 0))
    assert read.shape == (60, 40, 3)
    assert read[5, 20].mean() > 200 and read[50, 20].mean() < 50


@pytest.mark.parametrize(
    ("size", "target"),
    [((900, 1200), (1280, 720)), ((2000, 1100), (640, 360)), ((500, 500), (720, 1280))],
)
def test_the_face_is_kept_when_cropped(size: tuple[int, int], target: tuple[int, int]) -> None:
    width, height = size
    picture, raw = face(width, height, unit=height * 0.16, centre=(width * 0.42, height * 0.4))
    marks: Landmarks = parse_landmarks(raw)
    cropped, moved = fit(picture, marks, *target)
    assert cropped.shape == (target[1], target[0], 3)
    left, top, right, bottom = moved.box
    assert left > 0 and right < target[0] and bottom < target[1] and top > 0.1 * moved.unit
    # The landmarks moved with the picture: the iris is still dark, the white beside it bright.
    grey = cropped.mean(-1)
    for eye in (moved.left_eye, moved.right_eye):
        x, y = int(round(eye.iris[0])), int(round(eye.iris[1]))
        assert grey[y, x] < 60


def test_landmarks_upside_down_are_refused() -> None:
    _, marks = face(640, 360)
    for key in ("outer_lips", "jaw"):
        with pytest.raises(ConfigError, match=key):
            parse_landmarks(marks | {key: marks[key][::-1] if key == "jaw" else _mirrored(marks)})


def _mirrored(marks: dict[str, Any]) -> list[list[float]]:
    return [[640 - x, y] for x, y in marks["outer_lips"]]


def _calm(engine: VisemeEngine, avatar: Avatar) -> Avatar:
    """The same avatar with its head still and its eyes open."""
    return Avatar(
        avatar.path, avatar.width, avatar.height, avatar.options | {"motion": 0, "blink": 0}
    )


def _words(phonemes: list[tuple[str, float]]) -> list[Cue]:
    """Open vowels with these consonants of 100 ms in them."""
    cues, at = [], 0.0
    for text, start in phonemes:
        cues += [
            Cue("phoneme", "a", at, start),
            Cue("phoneme", text, start, start + 0.1),
        ]
        at = start + 0.1
    return [*cues, Cue("phoneme", "a", at, 3.0)]


# --- speed ----------------------------------------------------------------------------------------


def test_drawing_is_quick(engine: VisemeEngine, avatar: Avatar) -> None:
    """Generous, for a machine that is busy; `voipavatar bench engine` gives the real figure."""
    found = bench(engine, avatar, 1.5)
    assert found["frames"] > 10
    assert found["cpu_ms_median"] < 40
    assert found["sessions_per_core"] > 0.9


def test_articulators_are_one_a_session(engine: VisemeEngine, avatar: Avatar) -> None:
    one, two = engine.open(avatar), engine.open(avatar)
    assert isinstance(one, VisemeSession) and isinstance(one._articulator, Articulator)
    one.push(babble(1.0))
    fresh: list[Job] = turn(engine.open(avatar), iter([babble(0.4)]))
    late = turn(two, iter([babble(0.4)]))
    assert np.array_equal(
        np.stack([job.data.mouth for job in late]), np.stack([job.data.mouth for job in fresh])
    )
    began = time.perf_counter()
    two.reset()
    assert time.perf_counter() - began < 0.5


# --- gestures -------------------------------------------------------------------------------------


def _poses(avatar: Avatar, cues: list[Cue], cut: int) -> list[Pose]:
    session = VisemeEngine().open(avatar)
    sound = babble(2.0)
    session.cue(cues)
    jobs = []
    for start in range(0, len(sound), cut):
        jobs += session.push(sound[start : start + cut])
    jobs += session.flush()
    jobs += session.idle(50)
    return [job.data for job in jobs]


def test_gestures_move_what_they_should_and_only_then(avatar: Avatar) -> None:
    plain = _poses(avatar, [], 1600)
    names = {"nod": "pitch", "shake": "yaw", "tilt": "roll", "brows": "brow"}
    for name, what in names.items():
        poses = _poses(avatar, [Cue("gesture", name, 0.4, 0.4)], 1600)
        moved = np.array([np.abs(a.head - b.head) for a, b in zip(poses, plain, strict=True)])
        assert moved[:10].max() == 0 and moved[70:].max() < 1e-6, name
        assert moved[:, HEAD.index(what)].max() > 0.02, name
        others = [i for i, other in enumerate(HEAD) if other != what]
        assert moved[:, others].max() < 1e-6, name


def test_a_wink_is_one_eye_and_a_smile_spares_closed_lips(avatar: Avatar) -> None:
    plain = _poses(avatar, [], 1600)
    wink = _poses(avatar, [Cue("gesture", "wink", 0.2, 0.2)], 1600)
    assert max(pose.wink for pose in wink) == 1.0
    assert [pose.blink for pose in wink] == [pose.blink for pose in plain]
    smile = _poses(avatar, [Cue("gesture", "smile", 0.2, 0.2)], 1600)
    wider = [float(a.mouth[1] - b.mouth[1]) for a, b in zip(smile, plain, strict=True)]
    assert max(wider) > 0.3
    assert all(a.mouth[3] == b.mouth[3] for a, b in zip(smile, plain, strict=True)), "press stays"
    assert all(a.mouth[0] == b.mouth[0] for a, b in zip(smile, plain, strict=True)), "jaw stays"


def test_gestures_don_t_depend_on_how_the_sound_is_cut(avatar: Avatar) -> None:
    cues = [Cue("gesture", "nod", 0.4, 0.4), Cue("gesture", "smile", 9.0, 9.0)]
    for one, other in zip(_poses(avatar, cues, 1600), _poses(avatar, cues, 371), strict=True):
        assert np.array_equal(one.head, other.head) and np.array_equal(one.mouth, other.mouth)


def test_an_unknown_gesture_changes_nothing(avatar: Avatar) -> None:
    plain = _poses(avatar, [], 1600)
    for one, other in zip(_poses(avatar, [Cue("gesture", "x", 0, 0)], 1600), plain, strict=True):
        assert np.array_equal(one.head, other.head)


def test_an_interruption_drops_gestures_to_come(avatar: Avatar) -> None:
    session = VisemeEngine().open(avatar)
    session.cue([Cue("gesture", "nod", 0.5, 0.5)])
    session.push(babble(0.4))
    session.reset(4)
    still = VisemeEngine().open(avatar)
    still.idle(4)
    for one, other in zip(session.idle(40), still.idle(40), strict=True):
        assert np.allclose(one.data.head, other.data.head, atol=0.03)
        assert one.data.wink == 0
