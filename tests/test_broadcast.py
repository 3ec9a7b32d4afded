"""On air against a real RTMP server (nginx), through lines that are cut, stalled and throttled."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
from prometheus_client import generate_latest

from voipavatar.broadcast import AvSink
from voipavatar.broadcast_bench import (
    Clapper,
    Gate,
    Ingest,
    Studio,
    examine,
    faults,
    find_nginx,
    free_port,
    small_programme,
)
from voipavatar.encoder import Canvas, EncoderProcess, draw_text, programme
from voipavatar.errors import ConfigError, StageError, TransportError
from voipavatar.media import Frame, i420
from voipavatar.rtmp import Packet, RtmpConnection, StreamHeader, StreamUrl
from voipavatar.targets import Rotation, State

from . import servers

pytestmark = pytest.mark.server

KEY = "k3y-5ecret-8f1c"


@pytest.fixture(scope="module", autouse=True)
def _nginx() -> None:
    try:
        find_nginx()
    except ConfigError as error:
        servers.missing(str(error))


@pytest_asyncio.fixture
async def ingest(tmp_path: Path) -> AsyncIterator[Ingest]:
    async with Ingest(tmp_path / "ingest") as server:
        yield server


def probe(path: Path, *what: str) -> list[dict[str, Any]]:
    """ffprobe's word on a file; PyAV alone would judge PyAV."""
    program = ["ffprobe", "-v", "error", "-of", "json", *what, str(path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    return list(found[next(iter(found))])


async def test_what_arrives_is_what_platforms_ask_for(ingest: Ingest) -> None:
    """Rules 1, 2, 4: one clock, silence is data, GOP of 2 s, CBR; sound from the first second."""
    spec = programme(320, 180, 25, preset="youtube", speed="veryfast", video_bitrate=400_000)
    async with Studio(spec) as studio:
        studio.add(ingest.url(KEY), "out")
        await studio.live("out")
        await asyncio.sleep(13)
        status, lost = studio.broadcast.status()[0], studio.broadcast.lost_pictures
    assert status["state"] == "live" and abs(status["fps"] - 25) <= 2
    (path,) = ingest.recordings(KEY)
    video, audio = probe(path, "-show_streams")
    assert (video["codec_name"], video["profile"], video["pix_fmt"]) == ("h264", "High", "yuv420p")
    assert (audio["codec_name"], audio["profile"]) == ("aac", "LC")
    assert (audio["sample_rate"], audio["channels"]) == ("44100", 2)
    packets = probe(path, "-select_streams", "v", "-show_packets")
    keys = [float(one["pts_time"]) for one in packets if "K" in one["flags"]]
    assert keys[0] == 0.0 and len(keys) >= 6
    assert np.allclose(np.diff(keys), 2.0, atol=0.0401)
    assert all(one["pts"] == one["dts"] for one in packets)  # no B-frames
    found = examine(path)
    assert found.back == 0 and found.worst <= 0.040 and len(found.offsets) >= 10
    assert found.picture_gap <= 0.0401 + lost / 25 and found.sound_gap <= 0.050
    assert found.first_picture == 0.0 and found.first_sound <= 0.050
    assert found.bitrates and all(abs(one / 400_000 - 1) <= 0.10 for one in found.bitrates)


async def test_on_air_before_any_frame_and_after_the_last(ingest: Ingest) -> None:
    """Rules 2, 8: the slate goes on for ever, with sound, over one and the same connection."""
    async with Studio(small_programme()) as studio:
        studio.feeding = False
        studio.add(ingest.url(KEY), "out")
        await studio.live("out")
        studio.feeding = True
        await asyncio.sleep(4)
        studio.feeding = False
        await asyncio.sleep(12)
        studio.feeding = True
        await asyncio.sleep(3)
        assert studio.broadcast.targets["out"].reconnects == 0
        assert studio.broadcast.slate_frames > 250
        lost = studio.broadcast.lost_pictures
    (path,) = ingest.recordings(KEY)
    found = examine(path)
    assert found.picture_gap <= 0.0401 + lost / 25 and found.sound_gap <= 0.050 and found.back == 0
    assert len(found.offsets) >= 4 and found.worst <= 0.040


async def test_lines_that_are_cut_dead_or_slow_and_one_that_notices_nothing(ingest: Ingest) -> None:
    """Rules 3, 5, 6, 7 side by side, each on its own line.

    *Cut* comes back as a new session from 0 with a keyframe first. *Dead* is said to be stalled
    after 3 s and given up after 10 s. *Slow*, at half the rate it needs, loses pictures and no
    sound, and is soon live again. *Well* has no part in any of it.
    """
    spec = small_programme(video_bitrate=600_000)

    async def cut(studio: Studio, gate: Gate) -> None:
        await asyncio.sleep(2)
        await gate.cut()
        await asyncio.sleep(2.5)
        assert studio.broadcast.targets["cut"].state is State.RECONNECTING
        await gate.mend()
        assert await studio.live("cut") <= 5.0

    async def dead(studio: Studio, gate: Gate) -> None:
        gate.stall()
        began, target = time.monotonic(), studio.broadcast.targets["dead"]
        while target.state.value != "stalled":
            await asyncio.sleep(0.05)
            assert time.monotonic() - began < 8
        while target.state.value != "reconnecting":
            await asyncio.sleep(0.05)
            assert time.monotonic() - began < 15
        assert "acknowledged nothing" in target.reason
        await gate.drop()
        await gate.mend()
        assert await studio.live("dead", 30) <= 5.0

    async def slow(studio: Studio, gate: Gate) -> None:
        target, worst = studio.broadcast.targets["slow"], 0.0
        gate.throttle((600_000 + 128_000) / 8 / 2)
        for _ in range(100):
            await asyncio.sleep(0.1)
            worst = max(worst, target.latency)
        gate.throttle(None)
        await asyncio.sleep(3)
        assert target.latency < 1.0 and worst < 5.0
        assert target.dropped > 25 and target.reconnects == 0

    async with contextlib.AsyncExitStack() as stack:
        studio = await stack.enter_async_context(Studio(spec))
        gates = {}
        for name in ("cut", "dead", "slow"):
            gates[name] = await stack.enter_async_context(Gate(ingest.port))
            studio.add(ingest.url(name, gates[name].port), name)
        studio.add(ingest.url("well"), "well")
        for name in ("cut", "dead", "slow", "well"):
            await studio.live(name)
        await asyncio.gather(
            cut(studio, gates["cut"]), dead(studio, gates["dead"]), slow(studio, gates["slow"])
        )
        await asyncio.sleep(3)
        well = studio.broadcast.targets["well"]
        assert (well.reconnects, well.dropped) == (0, 0)
        states = [event["event"] for _, event in studio.events if event["id"] == "cut"]
        assert [one for one in states if one != "progress"][:4] == [
            *("connecting", "live", "reconnecting", "live")
        ]
        lost = studio.broadcast.lost_pictures
    found = {name: [examine(one) for one in ingest.recordings(name)] for name in gates}
    assert len(found["cut"]) == 2 and found["cut"][1].keyframes[0] == 0.0
    assert found["cut"][1].first_picture == 0.0
    (alone,) = found["slow"]
    assert alone.sound_gap <= 0.050
    for one in (one for several in found.values() for one in several):
        assert one.back == 0 and one.worst <= 0.040 and (one.offsets or one.seconds < 3)
    (path,) = ingest.recordings("well")
    assert examine(path).picture_gap <= 0.0401 + lost / 25


async def test_what_time_does_not_heal_ends_at_once_and_says_why(ingest: Ingest) -> None:
    """Rule 6: a refused key, a wrong host, a closed port; the healthy one goes on."""
    async with Studio(small_programme()) as studio:
        studio.add(ingest.url("good"), "good")
        studio.add(ingest.url(KEY, app="closed"), "refused")
        studio.add(f"rtmp://127.0.0.1:{free_port()}/live/{KEY}", "nobody")
        studio.add(f"rtmp://no-such-host.invalid/live/{KEY}", "nowhere")
        studio.add(f"srt://127.0.0.1:{free_port()}?streamid={KEY}", "srt")
        await studio.live("good")
        await asyncio.sleep(6)
        said = {one["id"]: one for one in studio.broadcast.status()}
    assert {id: one["state"] for id, one in said.items()} == {
        "good": "live",
        "refused": "failed",
        "nobody": "failed",
        "nowhere": "failed",
        "srt": "failed",
    }
    assert "stream key" in said["refused"]["reason"]
    assert "nothing listens" in said["nobody"]["reason"]
    assert "not known" in said["nowhere"]["reason"]
    assert "SRT" in said["srt"]["reason"]
    assert KEY not in json.dumps(said) + repr(studio.events)


async def test_a_key_in_use_is_refused_by_name(ingest: Ingest) -> None:
    async with Studio(small_programme()) as studio:
        studio.add(ingest.url(KEY), "first")
        await studio.live("first")
        studio.add(ingest.url(KEY), "second")
        await asyncio.sleep(3)
        second = studio.broadcast.targets["second"]
        assert second.state is State.FAILED and "BadName" in second.reason
        assert studio.broadcast.targets["first"].state is State.LIVE


async def test_persist_waits_for_a_server_that_is_not_there_yet(tmp_path: Path) -> None:
    server = Ingest(tmp_path / "ingest")
    async with Studio(small_programme()) as studio:
        studio.add(server.url(KEY), "out", persist=True)
        await asyncio.sleep(1.5)
        assert studio.broadcast.targets["out"].state is State.RECONNECTING
        await server.start()
        try:
            assert await studio.live("out") <= 5.0
        finally:
            await server.stop()


@pytest.mark.parametrize("how", ["killed", "stuck"])
async def test_an_encoder_that_crashes_or_hangs_is_replaced(ingest: Ingest, how: str) -> None:
    """The connection stays, sound has no hole, time goes on; within 10 s, hung or not."""
    async with Studio(small_programme()) as studio:
        studio.add(ingest.url(KEY), "out")
        await studio.live("out")
        await asyncio.sleep(2)
        encoder = studio.broadcast.encoder
        assert encoder is not None and encoder.pid is not None
        pid, began = encoder.pid, time.monotonic()
        if how == "killed":
            os.kill(pid, 9)
        else:
            encoder.freeze()
        while studio.broadcast.encoder in (encoder, None):
            await asyncio.sleep(0.02)
            assert time.monotonic() - began < 10
        assert not psutil.pid_exists(pid)
        await studio.live("out")
        await asyncio.sleep(3)
        assert studio.broadcast.targets["out"].reconnects == 0
    (path,) = ingest.recordings(KEY)
    found = examine(path)
    assert found.back == 0 and found.sound_gap <= 0.050
    assert found.worst <= 0.040 and len(found.offsets) >= 4


async def test_an_encoder_does_not_outlive_its_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, os\n"
        "from voipavatar.broadcast_bench import small_programme\n"
        "from voipavatar.encoder import EncoderProcess\n"
        "async def main():\n"
        "    one = EncoderProcess(small_programme(), print)\n"
        "    await one.open()\n"
        "    one.freeze()\n"
        "    print(one.pid, flush=True)\n"
        "    os._exit(1)\n"
        "asyncio.run(main())\n"
    )
    starter = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await asyncio.wait_for(starter.communicate(), 60)
    pid = int(said.split()[0])
    for _ in range(100):
        if not psutil.pid_exists(pid):
            return
        await asyncio.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the encoder is still there, 10 s after its parent")


async def test_rotation_overlaps_two_addresses_and_ends_the_old_one(ingest: Ingest) -> None:
    """Rule 9."""
    urls = (StreamUrl.parse(ingest.url("second")), StreamUrl.parse(ingest.url("third")))
    async with Studio(small_programme()) as studio:
        rotation = Rotation(after=2.5, overlap=1.5, urls=urls)
        studio.add(ingest.url("first"), "out", rotation=rotation)
        await asyncio.sleep(8.0)
        names = [event["event"] for _, event in studio.events]
        assert names.count("rotated") >= 2 and "reconnecting" not in names
        lost = studio.broadcast.lost_pictures
    first, second = (examine(ingest.recordings(key)[0]) for key in ("first", "second"))
    assert 3.0 <= first.seconds <= 7.5 and 3.0 <= second.seconds <= 7.5
    for found in (first, second):
        assert found.picture_gap <= 0.0401 + lost / 25 and found.keyframes[0] == 0.0


async def test_rtmps_and_its_certificate(ingest: Ingest, tmp_path: Path) -> None:
    """TLS ends in a proxy of ours; a certificate that nobody vouches for is refused."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)]
    await asyncio.to_thread(
        subprocess.run, [*make, *names], check=True, capture_output=True, timeout=60
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far = await asyncio.open_connection("127.0.0.1", ingest.port)

        async def pump(one: asyncio.StreamReader, other: asyncio.StreamWriter) -> None:
            while data := await one.read(4096):
                other.write(data)
                await other.drain()

        ways = [
            asyncio.ensure_future(pump(reader, far)),
            asyncio.ensure_future(pump(far_reader, writer)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for end in (writer, far):
            end.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    url = f"rtmps://localhost:{port}/live/{KEY}"
    trusting = ssl.create_default_context(cafile=str(cert))
    async with Studio(small_programme()) as studio:
        studio.add(url, "distrusted")
        await asyncio.sleep(2)
        target = studio.broadcast.targets["distrusted"]
        assert target.state is State.FAILED and "certificate" in target.reason
        studio.broadcast.tls = trusting
        studio.add(url, "trusted")
        await studio.live("trusted")
        await asyncio.sleep(2)
    server.close()
    await server.wait_closed()
    (path,) = ingest.recordings(KEY)
    assert examine(path).pictures > 40


async def test_time_beyond_24_bits_arrives_as_it_was_sent(ingest: Ingest) -> None:
    """Rule 1, a day and more on the wire: extended timestamps, in order, also past 2**24 ms."""
    packets: list[Packet] = []
    encoder = EncoderProcess(small_programme(), packets.append)
    header: StreamHeader = await encoder.open()
    clapper = Clapper(320, 180)
    for index in range(100):
        frame = clapper.frame(index)
        encoder.push(index, frame.image, frame.audio)
        while encoder.waiting > 6:
            await asyncio.sleep(0.002)
    await encoder.aclose()
    line = RtmpConnection(StreamUrl.parse(ingest.url(KEY)))
    await line.open()
    await line.start(header)
    packets = [one for one in packets if one.pts >= 0]
    packets.sort(key=lambda one: one.seconds)
    for start in (0, (1 << 24) - 2_000, 24 * 3_600_000):
        for packet in packets:
            await line.send(packet, start + packet.milliseconds)
    await asyncio.sleep(0.5)
    await line.aclose(polite=True)
    await asyncio.sleep(0.5)
    (path,) = ingest.recordings(KEY)
    times = [float(one["pts_time"]) for one in probe(path, "-select_streams", "v", "-show_packets")]
    assert times == sorted(times) and len(times) == 300
    assert times[100] - times[0] == pytest.approx(16_775.216, abs=0.002)
    assert times[-1] - times[0] == pytest.approx(24 * 3600 + 3.96, abs=0.002)


async def test_recordings_play_and_never_overwrite(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.flv", "a.mkv", "a.mp4", "a.ts")]
    paths[1].write_bytes(b"precious")
    async with Studio(small_programme()) as studio:
        for path in paths:
            studio.add(str(path), path.suffix)
        studio.add(str(tmp_path / "missing" / "b.mkv"), "nowhere")
        await asyncio.sleep(4)
        nowhere = studio.broadcast.targets["nowhere"]
        assert nowhere.state is State.FAILED and "not a folder" in nowhere.reason
    assert paths[1].read_bytes() == b"precious"
    paths[1] = tmp_path / "a-2.mkv"
    for path in paths:
        found = examine(path)
        assert found.pictures >= 70 and found.back == 0 and found.worst <= 0.040, path


async def test_the_sink_survives_a_main_loop_that_is_held(ingest: Ingest) -> None:
    sink = AvSink(small_programme())
    await sink.open()
    await sink.add(ingest.url(KEY))
    clapper = Clapper(320, 180)
    for index in range(75):
        sink.put(clapper.frame(index))
        await asyncio.sleep(0.04)
    time.sleep(3)  # noqa: ASYNC251 - somebody blocks the main loop
    began = time.monotonic()
    for index in range(75, 150):
        sink.put(clapper.frame(index))
        await asyncio.sleep(max(0.0, began + (index - 75) * 0.04 - time.monotonic()))
    (status,) = await sink.status()
    assert status["state"] == "live" and status["reconnects"] == 0
    await sink.aclose()
    await sink.aclose()
    with pytest.raises(StageError):
        await sink.status()
    assert not [one for one in threading.enumerate() if one.name.startswith("voipavatar")]
    await asyncio.sleep(0.3)
    (path,) = ingest.recordings(KEY)
    found = examine(path)
    assert found.sound_gap <= 0.050 and found.worst <= 0.040 and found.back == 0
    assert found.seconds >= 8.0  # the three seconds were filled


async def test_a_sink_can_be_closed_before_it_is_opened_and_refuses_odd_pictures() -> None:
    sink = AvSink(small_programme())
    assert (sink.latency, sink.clear()) == (0.0, 0.0)
    with pytest.raises(StageError, match="320x180"):
        sink.put(Frame(0, i420(100, 100), np.zeros(1920, np.int16), None))
    await sink.aclose()
    await sink.aclose()


async def test_an_encoder_that_cannot_be_opened_says_what_to_do() -> None:
    sink = AvSink(small_programme(speed="warp"))
    with pytest.raises(ConfigError, match="can't be opened"):
        await sink.open()
    await sink.aclose()
    with pytest.raises(ConfigError, match="no preset"):
        programme(320, 180, 25, preset="tiktok")
    with pytest.raises(ConfigError, match="no canvas"):
        programme(320, 180, 25, shape="4:3")
    with pytest.raises(ConfigError, match="no setting 'colour'"):
        programme(320, 180, 25, colour="red")


async def test_canvases_and_rates(tmp_path: Path) -> None:
    async def one(shape: str, fps: int, size: tuple[int, int]) -> None:
        spec = small_programme(shape=shape, height=144, fps=fps, background="#204060")
        tape = tmp_path / f"{fps}.mkv"
        async with Studio(spec) as studio:
            studio.add(str(tape), "tape")
            await asyncio.sleep(6)
            lost = studio.broadcast.lost_pictures
        (video,) = await asyncio.to_thread(probe, tape, "-select_streams", "v", "-show_streams")
        assert (video["width"], video["height"]) == size
        found = await asyncio.to_thread(examine, tape)
        assert found.picture_gap == pytest.approx(1 / fps, abs=0.002 + lost / 25)
        assert found.back == 0 and np.allclose(np.diff(found.keyframes), 2.0, atol=1.1 / fps)

    await asyncio.gather(
        one("16:9", 30, (256, 144)), one("9:16", 50, (144, 256)), one("1:1", 25, (144, 144))
    )


def test_a_canvas_places_the_avatar_on_colour_picture_and_video(tmp_path: Path) -> None:
    import cv2

    white = i420(90, 160, (255, 255, 255))
    picture = np.full((300, 200, 3), (30, 120, 200), np.uint8)
    cv2.imwrite(str(tmp_path / "back.png"), picture)
    shape: dict[str, Any] = {"preset": "low-latency", "shape": "9:16", "height": 144}
    for background, luma in (("#000000", 16), (str(tmp_path / "back.png"), 133)):
        canvas = Canvas(programme(160, 90, 25, background=background, **shape))
        out = canvas.draw(white, 0)
        assert out.shape == (384, 144)
        assert abs(int(out[5, 5]) - luma) <= 3 and out[128, 72] == 235
        low = Canvas(
            programme(160, 90, 25, background=background, placement="bottom", **shape)
        ).draw(white, 0)
        assert low[250, 72] == 235 and abs(int(low[100, 72]) - luma) <= 3
    full = Canvas(programme(160, 90, 25, placement="fill", **shape)).draw(white, 0)
    assert (full[:256] == 235).all()


def test_a_video_loops_behind_the_avatar(tmp_path: Path) -> None:
    import av

    path = tmp_path / "back.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 128, "yuv420p"
        for level in range(20):
            grey = i420(128, 64, (level * 12,) * 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="yuv420p")))
        container.mux(stream.encode(None))
    canvas = Canvas(
        programme(160, 90, 25, preset="low-latency", shape="9:16", height=64, background=str(path))
    )
    tops = [int(canvas.draw(i420(90, 160), index)[4, 4]) for index in range(60)]
    assert tops[:20] == sorted(tops[:20]) and tops[18] - tops[0] > 150
    assert np.allclose(tops[20:40], tops[:20], atol=12) and np.allclose(
        tops[40:], tops[:20], atol=12
    )


def test_captions_are_in_the_picture_in_any_alphabet() -> None:
    plain = i420(360, 640, (200, 200, 200))
    for text in ("We’ll be right back", "Größe, naïve, дом", "word " * 60):
        image = plain.copy()
        draw_text(image, text)
        changed = np.argwhere(image[:360] != plain[:360])
        assert len(changed) > 500 and changed[:, 0].min() > 180
        assert image[:360].max() >= 230 and image[:360].min() < 100


async def test_secrets_stay_secret(ingest: Ingest, caplog: pytest.LogCaptureFixture) -> None:
    """Rule 10: not in logs, process lists, metrics, events or states, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    async with Gate(ingest.port) as gate, Studio(small_programme()) as studio:
        studio.add(ingest.url(KEY, gate.port), "out")
        studio.add(ingest.url(KEY + "?auth=" + KEY, app="closed"), "refused")
        studio.add(f"srt://127.0.0.1:9?streamid={KEY}", "srt")
        await studio.live("out")
        await gate.cut()
        await asyncio.sleep(0.5)
        await gate.mend()
        await studio.live("out")
        studio.add(ingest.url(KEY), "in use")
        await asyncio.sleep(1)
        for process in psutil.process_iter(["cmdline"]):
            seen.append(" ".join(process.info["cmdline"] or []))
        encoder = studio.broadcast.encoder
        assert encoder is not None and encoder.pid is not None
        seen.append(repr(psutil.Process(encoder.pid).environ()))
        seen += [json.dumps(studio.broadcast.status()), repr(studio.events)]
        seen.append(repr(vars(studio.broadcast)) + repr(studio.broadcast.targets["out"].url))
    seen.append(generate_latest().decode())
    seen += [record.getMessage() + repr(vars(record)) for record in caplog.records]
    assert any("refused" in text for text in seen)
    assert not [text for text in seen if KEY in text]


async def test_memory_stays_flat_while_targets_come_and_go(tmp_path: Path) -> None:
    """Rule 12, shortened: reconnecting and re-adding leaves no task, thread or descriptor."""
    process = psutil.Process()
    async with Ingest(tmp_path / "ingest") as ingest, Studio(small_programme()) as studio:

        async def round_trip(number: int) -> None:
            studio.add(ingest.url(f"key{number}"), f"out{number}")
            await studio.live(f"out{number}")
            await studio.broadcast.remove(f"out{number}")

        for number in range(3):
            await round_trip(number)
        gc.collect()
        tasks, handles = len(asyncio.all_tasks()), process.num_fds()
        size = process.memory_info().rss
        for number in range(3, 13):
            await round_trip(number)
        gc.collect()
        assert len(asyncio.all_tasks()) <= tasks and process.num_fds() <= handles + 1
        assert process.memory_info().rss - size < 12_000_000
        assert studio.broadcast.targets == {}


async def test_ffmpegs_own_listener_takes_the_stream(tmp_path: Path) -> None:
    """A second server, with another idea of RTMP."""
    port, out = free_port(), tmp_path / "heard.flv"
    program = [
        "ffmpeg",
        "-v",
        "error",
        "-y",
        "-listen",
        "1",
        "-i",
        f"rtmp://127.0.0.1:{port}/live/x",
    ]
    child = await asyncio.create_subprocess_exec(
        *program, "-c", "copy", str(out), stdin=asyncio.subprocess.DEVNULL
    )
    async with Studio(small_programme()) as studio:
        studio.add(f"rtmp://127.0.0.1:{port}/live/x", "out", persist=True)
        await studio.live("out", 20)
        await asyncio.sleep(5)
    assert await asyncio.wait_for(child.wait(), 15) == 0
    found = examine(out)
    assert found.pictures > 100 and found.back == 0 and found.worst <= 0.040


@pytest.mark.slow
async def test_many_faults_in_one_run(tmp_path: Path) -> None:
    """50 of them; here none is long (`voipavatar bench broadcast` has those of 40 s)."""
    report = await faults(50, longest=0.7, folder=tmp_path)
    assert report.faults == 50 and report.slowest <= 5.0, report
    assert report.backwards == 0 and report.worst_offset <= 0.040 and report.claps >= 100, report
    assert report.refused.startswith("failed"), report


async def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    """A firewall that swallows, a port of something else: an answer in words, in time."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def chatty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
        await reader.read()
        writer.close()

    for handler, text in ((silent, "doesn't answer"), (chatty, "not an RTMP server")):
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        line = RtmpConnection(StreamUrl.parse(f"rtmp://127.0.0.1:{port}/live/{KEY}"))
        with pytest.raises(TransportError, match=text):
            await line.open(timeout=1.5)
        await line.aclose()
        server.close()
        await server.wait_closed()
