"""Files are judged by decoding them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from voipavatar.errors import ConfigError, StageError, TransportError
from voipavatar.media import FRAME_RATE, Frame, Int16, UInt8, i420, slice_start
from voipavatar.sinks import FileSink, SampleLine

WIDTH, HEIGHT = 160, 96
BLACK, WHITE = i420(HEIGHT, WIDTH), i420(HEIGHT, WIDTH, (255, 255, 255))


def tone(start: int, count: int) -> Int16:
    wave = 12_000 * np.sin(2 * np.pi * 1_000 * (np.arange(count) + start) / FRAME_RATE)
    return wave.astype(np.int16)


def clapper(index: int, fps: int, every: int = 10) -> Frame:
    """White and loud for one frame in `every`, black and silent otherwise."""
    start = slice_start(index, FRAME_RATE, fps)
    count = slice_start(index + 1, FRAME_RATE, fps) - start
    loud = index % every == every // 2
    pcm = tone(start, count) if loud else np.zeros(count, np.int16)
    return Frame(index, WHITE if loud else BLACK, pcm, 1 if loud else None)


def decoded(path: Path) -> tuple[list[Fraction], list[float], Int16]:
    """Picture times in s, their mean luma, and the sound (first channel)."""
    times, lumas = [], []
    with av.open(str(path)) as container:
        for picture in container.decode(video=0):
            assert picture.pts is not None and picture.time_base is not None
            times.append(picture.pts * picture.time_base)
            lumas.append(float(picture.to_ndarray(format="gray").mean()))
    parts = []
    with av.open(str(path)) as container:
        for sound in container.decode(audio=0):
            assert sound.pts is not None and sound.time_base is not None
            parts.append((round(sound.pts * sound.time_base * FRAME_RATE), sound.to_ndarray()[0]))
    pcm = np.zeros(parts[-1][0] + len(parts[-1][1]), np.float32)
    for position, samples in parts:
        pcm[position : position + len(samples)] = samples
    return times, lumas, (pcm * 32767).astype(np.int16)


@pytest.mark.parametrize("fps", [25, 30, 60])
async def test_a_file_holds_every_picture_on_its_grid_and_every_sample(
    tmp_path: Path, fps: int
) -> None:
    path = tmp_path / "clip.mp4"
    seen: list[int] = []
    sink = FileSink(path, WIDTH, HEIGHT, fps, lossless=True, on_progress=seen.append)
    count = 4 * fps + 3
    for index in range(count):
        await sink.room()
        sink.put(clapper(1_000 + index, fps))  # a stage counts on; a file starts at 0
    assert not path.exists()
    await sink.aclose()
    await sink.aclose()
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]
    assert (sink.frames, sink.dropped) == (count, 0) and seen[-1] == count
    times, lumas, pcm = decoded(path)
    assert times == [Fraction(index, fps) for index in range(count)]
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.codec_context.pix_fmt == "yuv420p"
        assert (audio.codec_context.name, audio.rate) == ("aac", FRAME_RATE)
        assert audio.duration is not None and audio.time_base is not None
        sound = float(audio.duration * audio.time_base)
    assert sound == pytest.approx(count / fps, abs=0.002)
    assert 0 <= len(pcm) - slice_start(count, FRAME_RATE, fps) < 1024  # AAC's last block
    first = 1_000 % 10
    for index, luma in enumerate(lumas):
        middle = pcm[slice_start(index, FRAME_RATE, fps) : slice_start(index + 1, FRAME_RATE, fps)]
        third = len(middle) // 3
        loud = np.abs(middle[third : 2 * third].astype(int)).max() > 6_000
        assert loud == (luma > 128) == ((index + first) % 10 == 5), f"frame {index} fell apart"


async def test_the_index_of_the_file_comes_first(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "clip.mp4", WIDTH, HEIGHT, 25, lossless=True)
    for index in range(30):
        await sink.room()
        sink.put(clapper(index, 25))
    await sink.aclose()
    data = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


async def test_without_a_frame_nothing_is_left(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "clip.mp4", WIDTH, HEIGHT, 25)
    assert sink.clear() == 0.0 and sink.latency == 0.0
    await sink.aclose()
    await sink.aclose()
    assert list(tmp_path.iterdir()) == []
    assert not [one for one in threading.enumerate() if one.name == "voipavatar-file"]


async def test_a_live_file_leaves_out_pictures_and_keeps_all_sound(tmp_path: Path) -> None:
    path = tmp_path / "clip.mkv"
    sink = FileSink(path, WIDTH, HEIGHT, 25, queue=5)
    for index in range(200):  # all at once: much faster than any encoder
        sink.put(clapper(index, 25))
    await sink.aclose()
    times, lumas, pcm = decoded(path)
    assert sink.dropped > 0 and len(times) == sink.frames == 200 - sink.dropped
    assert len(pcm) >= slice_start(200, FRAME_RATE, 25)
    for time, luma in zip(times, lumas, strict=True):  # what is left is still on its own grid
        assert (round(time * 25) % 10 == 5) == (luma > 128)
    for index in range(200):
        middle = pcm[1920 * index + 640 : 1920 * index + 1280].astype(int)
        assert (np.abs(middle).max() > 6_000) == (index % 10 == 5)


async def test_lossless_refuses_a_producer_that_does_not_wait(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "clip.mp4", WIDTH, HEIGHT, 25, lossless=True, queue=4)
    with pytest.raises(StageError, match="await room"):
        for index in range(500):
            sink.put(clapper(index, 25))
    await sink.aclose()


async def test_missing_frames_become_silence_not_drift(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    sink = FileSink(path, WIDTH, HEIGHT, 25, lossless=True)
    for index in [*range(25), *range(50, 75)]:
        await sink.room()
        sink.put(clapper(index, 25))
    await sink.aclose()
    times, _, pcm = decoded(path)
    assert times[24:26] == [Fraction(24, 25), Fraction(2)]
    assert np.abs(pcm[1920 * 26 : 1920 * 49].astype(int)).max() < 200
    assert np.abs(pcm[1920 * 55 + 500 : 1920 * 56 - 500].astype(int)).max() > 6_000


def test_what_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="endings"):
        FileSink(tmp_path / "clip.webm", WIDTH, HEIGHT, 25)
    with pytest.raises(ConfigError, match="can't be written"):
        FileSink(tmp_path / "nowhere" / "clip.mp4", WIDTH, HEIGHT, 25)
    with pytest.raises(ConfigError, match="even"):
        FileSink(tmp_path / "clip.mp4", 161, HEIGHT, 25)


async def test_a_picture_of_another_size_or_order_is_refused(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "clip.mp4", WIDTH, HEIGHT, 25)
    wrong: UInt8 = i420(HEIGHT, WIDTH + 2)
    with pytest.raises(StageError, match="160x96"):
        sink.put(Frame(0, wrong, np.zeros(1920, np.int16), None))
    sink.put(clapper(5, 25))
    with pytest.raises(StageError, match="came after"):
        sink.put(clapper(5, 25))
    await sink.aclose()


LIMITED_FILES = """
    import asyncio, resource, sys
    import numpy as np
    from voipavatar.errors import TransportError
    from voipavatar.media import Frame
    from voipavatar.sinks import FileSink

    async def main(lossless):
        sink = FileSink(sys.argv[1] + "/clip.mp4", 320, 192, 25, lossless=lossless, crf=1)
        noise = np.random.default_rng(0)
        for index in range(200):
            if lossless:
                await sink.room()
            else:
                await asyncio.sleep(0.002)
            picture = noise.integers(0, 255, (288, 320), np.uint8)
            sink.put(Frame(index, picture, np.zeros(1920, np.int16), None))
        await sink.aclose()

    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    for lossless in (True, False):
        try:
            asyncio.run(main(lossless))
        except TransportError as error:
            print(error)
"""


def test_a_file_that_cannot_grow_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    program = [sys.executable, "-c", textwrap.dedent(LIMITED_FILES), str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 and all("can't be finished" in line for line in lines), done.stdout
    assert list(tmp_path.iterdir()) == []


async def test_a_full_disk_says_so(tmp_path: Path) -> None:
    part = tmp_path / "clip.mp4.part"
    part.symlink_to("/dev/full")
    sink = FileSink(tmp_path / "clip.mp4", WIDTH, HEIGHT, 25, lossless=True)
    with pytest.raises(TransportError, match="disk is full"):
        for index in range(500):
            await sink.room()
            sink.put(clapper(index, 25))
        await sink.aclose()
    await sink.aclose()
    assert list(tmp_path.iterdir()) == []


async def test_room_wakes_when_the_sink_is_closed(tmp_path: Path) -> None:
    sink = FileSink(tmp_path / "clip.mp4", WIDTH, HEIGHT, 25, lossless=True, queue=1)
    sink.put(clapper(0, 25))
    waiting = [asyncio.ensure_future(sink.room()) for _ in range(3)]
    await asyncio.sleep(0)
    await sink.aclose()
    await asyncio.wait_for(asyncio.gather(*waiting), 10)


def test_sample_line_keeps_every_sample_at_its_place() -> None:
    line = SampleLine()
    line.write(0, np.arange(5, dtype=np.int16))
    line.write(3, np.arange(3, 9, dtype=np.int16))  # an overlap is left out
    line.write(12, np.array([12], np.int16))  # a gap is silence
    assert [block.tolist() for block in line.blocks(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 0, 0, 0],
    ]
    assert line.rest().tolist() == [12] and line.rest().tolist() == []
