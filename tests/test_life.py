"""What a face does besides talking: by numbers, and on pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from voipavatar.engines.life import BROW, GESTURES, PITCH, ROLL, YAW, Body, Held, Life
from voipavatar.engines.puppet import Pose, Puppet
from voipavatar.engines.rig import HEAD, Landmarks, build, parse_landmarks
from voipavatar.errors import EngineError
from voipavatar.media import UInt8

from . import portraits
from .faces import face

FPS = 25
REST = np.zeros(8, np.float32)
STILL = np.zeros(len(HEAD), np.float32)


def body(seed: int = 3, fps: int = FPS, **more: float) -> Body:
    return Body(seed, fps, more.get("motion", 1.0), more.get("blink", 1.0), more.get("gaze", 1.0))


def run(one: Body, levels: list[float], first: int = 0) -> list[Held]:
    return [one.step(first + i, level) for i, level in enumerate(levels)]


def heads(held: list[Held]) -> npt.NDArray[np.float64]:
    return np.stack([one.head for one in held]).astype(np.float64)


def gazes(held: list[Held]) -> npt.NDArray[np.float64]:
    return np.array([one.gaze for one in held])


def spoken(seconds: float, fps: int = FPS) -> list[float]:
    """Levels of speech: syllables, four a second, some of them stressed."""
    t = np.arange(round(seconds * fps)) / fps
    stress = 0.35 + 0.65 * (np.sin(2 * np.pi * 0.8 * t) > 0.6)
    return [float(v) for v in 0.8 * stress * np.abs(np.sin(2 * np.pi * 2 * t))]


def same(one: list[Held], other: list[Held]) -> bool:
    return all(
        np.array_equal(a.head, b.head) and (a.blink, a.gaze, a.smile) == (b.blink, b.gaze, b.smile)
        for a, b in zip(one, other, strict=True)
    )


# --- by itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [20, 25, 50])
def test_eyes_jump_and_rest(fps: int) -> None:
    """A fixation is nearly still, a jump is over within 0.1 s, and most of the time the eyes are on
    the viewer."""
    life = Life(5, fps, 1.0, 1.0)
    rests = np.array([life.rest(clock) for clock in range(60 * fps)])
    glances = np.array([life.glance(clock)[:2] for clock in range(600 * fps)])
    steps = np.hypot(*np.diff(rests, axis=0).T)
    moving = steps > 0.012 * 25 / fps
    assert 0.02 < moving.mean() < 0.2 * 25 / fps + 0.06
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, moving, 0])))[::2]
    assert runs.max() <= math.ceil(0.1 * fps) + 1
    assert np.abs(rests).max() < 0.12
    away = np.hypot(*glances.T) > 0.15
    assert 0.02 < away.mean() < 0.2
    assert np.abs(glances).max() < 0.55
    assert np.diff(np.flatnonzero(np.diff(np.r_[0, away, 0])))[::2].max() < 1.6 * fps


def test_eyes_stay_on_the_viewer_while_the_head_turns() -> None:
    held = run(body(gaze=1.0), [0.0] * 500)
    yaw, x = heads(held)[:, YAW], gazes(held)[:, 0]
    near = np.abs(x) < 0.15
    assert np.corrcoef(yaw[near], x[near])[0, 1] < -0.4


def test_another_seed_lives_otherwise() -> None:
    assert not same(run(body(1), [0.0] * 50), run(body(2), [0.0] * 50))
    assert same(run(body(1), [0.0] * 50), run(body(1), [0.0] * 50))


def test_without_motion_nothing_but_blinks() -> None:
    one = body(motion=0.0)
    one.pose(0, "thinking")
    held = run(one, spoken(4) + [0.0] * 60)
    assert not heads(held).any() and not gazes(held).any()
    alone = Life(3, FPS, 0.0, 1.0)
    assert [one.blink for one in held] == [alone.blink(i) for i in range(len(held))]


# --- speech ---------------------------------------------------------------------------------------


def test_the_head_goes_with_the_stresses() -> None:
    """Louder syllables push the head down, a little after they begin."""
    levels = spoken(12)
    head = heads(run(body(), levels))[:, PITCH]
    alone = np.stack([Life(3, FPS, 1.0, 1.0).head(i) for i in range(len(levels))])[:, PITCH]
    added = head - alone - np.convolve(head - alone, np.ones(50) / 50, "same")
    sound = np.convolve(levels, np.ones(5) / 5, "same")
    lags = [float(np.corrcoef(sound[20:-20], np.roll(added, -k)[20:-20])[0, 1]) for k in range(12)]
    assert max(lags) > 0.35 and 1 <= int(np.argmax(lags)) <= 8
    assert 0.004 < np.abs(added).max() < 0.05


def test_every_phrase_has_its_own_stance() -> None:
    held = run(body(), (spoken(2) + [0.0] * 25) * 6)
    alone = np.stack([Life(3, FPS, 1.0, 1.0).head(i) for i in range(len(held))])
    yaw = (heads(held) - alone)[:, YAW]
    stances = [float(yaw[i * 75 + 35 : i * 75 + 50].mean()) for i in range(6)]
    assert np.std(stances) > 0.004
    assert np.abs(np.diff(yaw)).max() < 0.006  # radians a picture: no jerk


def test_speech_brings_the_eyes_back() -> None:
    for seed in range(30):
        life = Life(seed, FPS, 1.0, 1.0)
        asides = np.array([life.glance(i)[:2] for i in range(3000)])
        begin = next((i for i in range(30, 3000) if np.hypot(*asides[i]) > 0.3), None)
        if begin is None:
            continue
        one = body(seed)
        quiet = run(one, [0.0] * (begin + 2))
        assert np.hypot(*quiet[-1].gaze) > 0.15
        loud = run(one, [0.6] * 6, begin + 2)
        assert np.hypot(*loud[-1].gaze) < 0.6 * np.hypot(*quiet[-1].gaze)
        return
    raise AssertionError("nobody looked aside")


def test_eyes_blink_where_speech_ends() -> None:
    """More often than chance: after some of the phrases, not after all of them."""
    after = 0
    for seed in range(40):
        held = run(body(seed), [0.0] * 10 + spoken(2) + [0.0] * 20)
        after += any(one.blink == 1.0 for one in held[60:])
    by_chance = sum(
        any(Life(seed, FPS, 1.0, 1.0).blink(i) == 1.0 for i in range(60, 80)) for seed in range(40)
    )
    assert by_chance + 5 < after < 40


def test_what_speech_moved_is_forgotten() -> None:
    one, other = body(), body()
    run(one, spoken(3))
    run(other, [0.0] * 75)
    assert same(run(one, [0.0] * 130, 75)[75:], run(other, [0.0] * 130, 75)[75:])


# --- poses and gestures ---------------------------------------------------------------------------


def posed(name: str, seed: int = 3, seconds: float = 12) -> tuple[list[Held], list[Held]]:
    one, plain = body(seed), body(seed)
    one.pose(25, name)
    count = round(seconds * FPS)
    return run(one, [0.0] * count), run(plain, [0.0] * count)


def test_thinking_looks_aside_and_up() -> None:
    blinks = 0
    for seed in range(6):
        held, plain = posed("thinking", seed)
        assert same(held[:25], plain[:25])
        x, y = gazes(held)[60:].mean(0)
        assert abs(x) > 0.25 and y < -0.1
        assert math.copysign(1, x) == Life(seed, FPS, 1.0, 1.0).side
        tilt = (heads(held) - heads(plain))[60:, ROLL].mean()
        assert math.copysign(1, tilt) == math.copysign(1, x) and abs(tilt) > 0.015
        blinks += any(one.blink > 0.5 for one in held[25:45])
    assert blinks >= 3, "eyes that go far often shut on their way"


def test_a_short_wait_is_no_thought() -> None:
    """What is answered within a third of a second needs no look aside."""
    one, plain = body(), body()
    one.pose(5, "thinking")
    held = run(one, [0.0] * 12)
    one.pose(12, "")
    assert same(held + run(one, [0.0] * 40, 12), run(plain, [0.0] * 52))


def test_listening_is_looking_and_nodding() -> None:
    nods = 0
    for seed in range(6):
        held, plain = posed("listening", seed, 24)
        attentive, _ = posed("attentive", seed, 24)
        x = np.abs(gazes(held)[60:, 0])
        assert (x > 0.2).mean() <= (np.abs(gazes(plain)[60:, 0]) > 0.2).mean()
        assert np.percentile(x, 99) < 0.25
        added = (heads(held) - heads(attentive))[60:, PITCH]
        assert added.min() > -1e-6
        nods += int((np.diff((added > 0.02).astype(int)) == 1).sum())
        assert (heads(attentive) - heads(plain))[60:, BROW].mean() > 0.15
    assert 12 <= nods <= 60  # in six times 22 s


def test_nothing_jumps_between_poses() -> None:
    one = body()
    held: list[Held] = []
    for clock in range(600):
        if clock % 40 == 0:
            one.pose(clock, ("listening", "thinking", "", "attentive")[clock // 40 % 4])
        level = 0.6 if 200 < clock < 300 and clock % 5 else 0.0
        held.append(one.step(clock, level))
    steps = np.abs(np.diff(heads(held), axis=0)).max(0)
    assert steps[[YAW, PITCH, ROLL]].max() < 0.012  # radians a picture
    assert steps[BROW] < 0.12
    assert np.hypot(*gazes(held).T).max() < 1.0


def test_speech_goes_before_a_pose() -> None:
    one, plain = body(), body()
    one.pose(0, "thinking")
    run(one, [0.0] * 50)
    run(plain, [0.0] * 50)
    levels = [0.6] * 60
    held, usual = run(one, levels, 50), run(plain, levels, 50)
    assert np.allclose(heads(held)[40:], heads(usual)[40:], atol=1e-6)
    assert np.allclose(gazes(held)[40:], gazes(usual)[40:], atol=1e-6)


@pytest.mark.parametrize("what", ["listening", "thinking", "nod", "wink"])
def test_an_interruption_unmakes_what_was_not_shown(what: str) -> None:
    """What was asked for after the last picture shown begins again at the next one."""

    def ask(one: Body, clock: int) -> None:
        if what in GESTURES:
            one.gesture(clock, what, free=True)
        else:
            one.pose(clock, what)

    one, other = body(), body()
    run(one, [0.0] * 20 + spoken(0.4))
    ask(one, 30)
    run(one, [0.0] * 6, 30)
    one.rewind(26, fresh=False)
    run(other, ([0.0] * 20 + spoken(0.4))[:26])
    ask(other, 26)
    assert same(run(one, [0.0] * 40, 26), run(other, [0.0] * 40, 26))


def test_a_gesture_of_a_turn_ends_with_it() -> None:
    one, plain = body(), body()
    one.gesture(10, "nod")
    run(one, [0.0] * 20)
    one.rewind(5, fresh=False)
    run(plain, [0.0] * 5)
    assert same(run(one, [0.0] * 40, 5), run(plain, [0.0] * 40, 5))


def test_unknown_poses_are_named() -> None:
    with pytest.raises(EngineError, match="'listening'.*'thinking'"):
        body().pose(0, "asleep")


# --- eyes on pictures -----------------------------------------------------------------------------


class Face:
    """A portrait's puppet, and where its irises are in a picture."""

    def __init__(self, picture: UInt8, marks: dict[str, Any]) -> None:
        self.marks: Landmarks = parse_landmarks(marks)
        self.puppet = Puppet(build(picture, self.marks, 1.0))
        self.height = picture.shape[0]
        self.rest = self.drawn()

    def drawn(self, gaze: tuple[float, float] = (0.0, 0.0), blink: float = 0.0) -> UInt8:
        return self.puppet.draw(Pose(REST, STILL, blink, 0.0, gaze))

    def luma(self, image: UInt8) -> npt.NDArray[np.float64]:
        return image[: self.height].astype(np.float64)

    def irises(self, image: UInt8) -> list[tuple[float, float]]:
        """Middle of what is dark between the lids."""
        out = []
        for eye in (self.marks.left_eye, self.marks.right_eye):
            mask = np.zeros((self.height, image.shape[1]), np.uint8)
            lids = np.vstack([eye.upper, eye.lower[::-1]])
            cv2.fillPoly(mask, [np.rint(lids).astype(np.int32)], 255)
            mask = np.asarray(cv2.erode(mask, np.ones((3, 3), np.uint8)), np.uint8)
            luma = self.luma(image)
            inside = luma[mask > 0]
            limit = (np.percentile(inside, 5) + np.percentile(inside, 90)) / 2
            y, x = np.nonzero((mask > 0) & (luma < limit))
            out.append((float(x.mean()), float(y.mean())))
        return out


def _cartoon() -> Face:
    return Face(*face(960, 540))


def _persona() -> Face:
    return Face(portraits.persona("clara"), portraits.landmarks("clara"))


def _grainy() -> Face:
    return Face(portraits.old_photo(), portraits.landmarks("clara"))


@pytest.fixture(scope="module", params=[_cartoon, _persona, _grainy])
def seen(request: pytest.FixtureRequest) -> Face:
    make: Callable[[], Face] = request.param
    return make()


def test_both_eyes_go_where_they_are_told(seen: Face) -> None:
    still = seen.irises(seen.rest)
    radii = seen.puppet.rig.irises[:, 2]
    for dx in (-0.45, 0.45):
        moved = seen.irises(seen.drawn((dx, 0.0)))
        for (x, y), (was_x, was_y), radius in zip(moved, still, radii, strict=True):
            assert (x - was_x) / radius == pytest.approx(dx, abs=0.22)
            assert abs(y - was_y) < 0.25 * radius
    raised = seen.irises(seen.drawn((0.0, -0.35)))
    for (_, y), (_, was) in zip(raised, still, strict=True):
        assert y < was


def test_looking_moves_nothing_but_eyeballs(seen: Face) -> None:
    changed = np.abs(seen.luma(seen.drawn((0.5, -0.3))) - seen.luma(seen.rest)) > 3
    ball = np.zeros(changed.shape, np.uint8)
    for eye in (seen.marks.left_eye, seen.marks.right_eye):
        lids = np.vstack([eye.upper, eye.lower[::-1]])
        cv2.fillPoly(ball, [np.rint(lids).astype(np.int32)], 255)
    wide = max(3, round(0.03 * seen.marks.unit)) | 1
    around = cv2.dilate(ball, np.ones((wide, wide), np.uint8)) > 0
    assert changed.any()
    assert not (changed & ~around).any()


def test_a_small_look_is_a_small_change(seen: Face) -> None:
    """No jump where the eyes begin to move, and back at rest nothing of it is left."""
    steps = [seen.luma(seen.drawn((v, 0.0))) for v in np.linspace(0, 0.1, 6)]
    assert np.abs(np.diff(steps, axis=0)).max() < 60
    assert np.array_equal(seen.drawn(), seen.rest)


def test_shut_eyes_hide_where_they_look(seen: Face) -> None:
    assert np.array_equal(seen.drawn((0.5, 0.0), 1.0), seen.drawn((0.0, 0.0), 1.0))


def test_made_up_parts_have_the_portraits_grain() -> None:
    """The lid of a grainy photo is as grainy as the cheek, and so is the white that was covered."""
    seen = _grainy()
    shut = seen.luma(seen.drawn(blink=1.0))
    aside = seen.luma(seen.drawn((-0.5, 0.0)))

    def grain(luma: npt.NDArray[np.float64], x: float, y: float, wide: int, high: int) -> float:
        part = luma[round(y) - high : round(y) + high, round(x) - wide : round(x) + wide]
        mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64)
        found = np.abs(cv2.filter2D(part, -1, mask))[1:-1, 1:-1]
        return float(np.median(found)) / 0.6745 / 6

    eye = seen.marks.left_eye
    x, y, radius = (float(v) for v in seen.puppet.rig.irises[0, :3])
    cheek = grain(seen.luma(seen.rest), x, eye.lower[:, 1].max() + 0.16 * seen.marks.unit, 14, 8)
    assert cheek > 3
    lid = grain(shut, x, (eye.upper[:, 1].min() + y) / 2, 14, 5)
    assert 0.6 * cheek < lid < 1.5 * cheek
    wide_open = Pose(np.array([1.0, 0, 0, 0, 0, 0, 0, 1], np.float32), STILL)
    lips = seen.marks.inner_lips.mean(0)
    hollow = grain(
        seen.luma(seen.puppet.draw(wide_open)), lips[0], lips[1] + 0.075 * seen.marks.unit, 14, 5
    )
    assert 0.3 * cheek < hollow < 1.5 * cheek
    white = grain(aside, x + 0.55 * radius, y, 5, 5)
    assert 0.5 * cheek < white < 1.7 * cheek
