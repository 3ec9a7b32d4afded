"""What is left out, when it is tried again, what a frame becomes: without network or clock."""

from __future__ import annotations

import random

import numpy as np
import pytest

from voipavatar.broadcast import Slate, Timeline
from voipavatar.broadcast_bench import Clapper
from voipavatar.encoder import outputs_of
from voipavatar.media import Frame, i420
from voipavatar.rtmp import Packet
from voipavatar.targets import Backoff, PacketQueue


def picture(number: int, gop: int = 50) -> Packet:
    return Packet("video", number, 25, b"v", key=number % gop == 0)


def sound(number: int) -> Packet:
    return Packet("audio", number * 1024, 48_000, b"a", key=True)


def test_backoff_grows_from_half_a_second_and_stays_quick_while_an_outage_is_young() -> None:
    backoff = Backoff(chance=lambda: 0.5)
    assert [backoff.next(0) for _ in range(6)] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
    assert [round(backoff.next(500)) for _ in range(3)] == [30, 30, 30]
    backoff.reset()
    assert backoff.next(0) == 0.5
    spread = [Backoff(random.Random(seed).random).next(0) for seed in range(200)]
    assert min(spread) >= 0.4 and max(spread) <= 0.6 and max(spread) - min(spread) > 0.15


def test_a_queue_begins_with_a_keyframe() -> None:
    queue = PacketQueue()
    for number in range(40, 60):
        queue.push(picture(number))
    first = queue.pop()
    assert isinstance(first, Packet) and first.key and first.pts == 50
    assert queue.dropped == 10


def test_a_slow_line_loses_pictures_and_never_sound_and_never_breaks_a_gop() -> None:
    """One packet goes out for every three that come in, for two minutes."""
    queue, out, worst, chance = PacketQueue(limit=2.0), [], 0.0, random.Random(3)
    sounds = 0
    for number in range(25 * 120):
        queue.push(picture(number))
        while sounds * 1024 / 48_000 < (number + 1) / 25:
            queue.push(sound(sounds))
            sounds += 1
        for _ in range(2 if chance.random() < 0.72 else 1):
            if queue:
                out.append(queue.pop())
        worst = max(worst, queue.seconds)
    while queue:
        out.append(queue.pop())
    heard = [one.pts for one in out if isinstance(one, Packet) and one.kind == "audio"]
    assert heard == [number * 1024 for number in range(sounds)]
    seen = [one for one in out if isinstance(one, Packet) and one.kind == "video"]
    assert queue.dropped == 25 * 120 - len(seen) > 0
    for before, after in zip(seen, seen[1:], strict=False):
        assert after.pts == before.pts + 1 or after.key, "a picture without those it builds on"


def test_a_timeline_gives_each_frame_once_when_all_is_well() -> None:
    line = Timeline(25)
    line.start(100.0)
    chance = random.Random(1)
    given = [
        list(line.take(100.0 + index / 25 + chance.uniform(0, 0.015), index % 3 == 0))
        for index in range(2_000)
    ]
    assert given == [[index] for index in range(2_000)]
    assert not line.fill(100.0 + 2_000 / 25)


def test_a_timeline_fills_what_stays_out_and_settles_it_in_idle() -> None:
    line = Timeline(25)
    line.start(0.0)
    for index in range(25):
        line.take(index / 25, True)
    made = [number for tick in range(25, 100) for number in line.fill(tick / 25)]
    assert made and made == list(range(25, 25 + len(made)))
    assert line.lead(99 / 25) == -round(0.25 * 25)
    # the stage comes back and gives all at once what it owes: speech in full, idle not
    speech = sum(len(line.take(4.0, True)) for _ in range(50))
    assert speech == 50 and line.lead(4.0) > 40
    idle = sum(len(line.take(4.0, False)) for _ in range(50))
    assert idle == 0
    for index in range(200):
        line.take(4.0 + index / 25, False)
    assert abs(line.lead(4.0 + 199 / 25)) <= Timeline.EVEN + 1


@pytest.mark.parametrize(("skew", "hours"), [(-1e-3, 2), (1e-3, 24)])
def test_a_day_at_1000_ppm_stays_on_the_clock_and_speech_stays_whole(
    skew: float, hours: int
) -> None:
    """Frames from a stage whose clock is off; every other minute is speech."""
    line, fps, day = Timeline(25), 25, hours * 3600
    line.start(0.0)
    spoken = shown = filled = 0
    for index in range(int(day * fps * (1 + skew))):
        now = index / fps / (1 + skew)
        filled += len(line.fill(now))
        speaking = index // (fps * 60) % 2 == 0
        numbers = line.take(now, speaking)
        spoken += speaking
        shown += len(numbers) if speaking else 0
        assert abs(line.lead(now)) <= 6
    assert shown == spoken and filled == 0
    # sound and picture of frame n both stand at n / fps: what the programme says after a day
    assert abs(line.next / fps - day) < 0.25


@pytest.mark.parametrize(("source", "fps"), [(25, 25), (25, 30), (25, 50), (25, 60), (30, 25)])
def test_every_canvas_picture_is_filled_once_and_on_time(source: int, fps: int) -> None:
    numbers = [(n, i) for i in range(10 * source) for n in outputs_of(i, source, fps)]
    assert [n for n, _ in numbers] == list(range(10 * fps))
    for number, index in numbers:
        late = number / fps - index / source
        assert -1e-9 <= late < 1 / source


def test_the_slate_goes_from_the_last_frame_to_idle_to_a_still_that_says_so() -> None:
    slate = Slate(320, 180, 25)
    assert slate.picture(0.1, 0)[0] == "still"  # nothing has ever come
    clapper = Clapper(320, 180)
    for index in range(60):
        slate.see(Frame(index, clapper.frame(index % 8 + 4).image, np.zeros(1920, np.int16), None))
    last = clapper.frame(59 % 8 + 4).image
    what, image = slate.picture(0.5, 70)
    assert what == "last" and image is last
    pictures = [slate.picture(2.0, number) for number in range(100, 200)]
    assert {what for what, _ in pictures} == {"idle"}
    jumps = [
        float(np.abs(a.astype(int) - b).mean())
        for (_, a), (_, b) in zip(pictures, pictures[1:], strict=False)
    ]
    assert max(jumps) > 1.0  # it moves
    assert all(image.shape == (270, 320) for _, image in pictures)
    what, still = slate.picture(11.0, 300)
    assert what == "still" and still is slate.picture(600.0, 9_000)[1]
    assert still[60:120].max() > 200  # there is text on it


def test_speech_never_becomes_the_idle_loop() -> None:
    slate = Slate(320, 180, 25)
    white = i420(180, 320, (255, 255, 255))
    for index in range(100):
        turn = 1 if index % 20 < 15 else None
        slate.see(Frame(index, white, np.zeros(1920, np.int16), turn))
    assert slate.picture(5.0, 200)[0] == "last"
