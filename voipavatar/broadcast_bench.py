"""Breaking a broadcast on purpose, and measuring what arrived.

`Ingest` is a real RTMP server (nginx with its RTMP module) that records what it gets, `Gate` a TCP
proxy in front of it that can be cut, stalled and throttled, `clapper` the picture and sound whose
sync is measured, `examine` the measurement on a recording. `faults` and `cost` are what
`voipavatar bench broadcast` runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from .broadcast import Broadcast
from .encoder import Programme, programme
from .errors import ConfigError, TransportError
from .media import FRAME_RATE, Frame, UInt8, i420, slice_start
from .rtmp import StreamUrl
from .targets import Event, State
from .waiting import within

MODULE = "ngx_rtmp_module.so"
MODULE_DIRS = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")


# --- a server and the line to it ------------------------------------------------------------------


def find_nginx() -> tuple[str, str]:
    """nginx and its RTMP module; ConfigError naming the package when one is missing."""
    binary = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    module = next((f"{one}/{MODULE}" for one in MODULE_DIRS if Path(one, MODULE).exists()), None)
    if binary is None or module is None:
        raise ConfigError(
            "an RTMP server is needed: install nginx with its RTMP module "
            "(Debian, Ubuntu: apt install nginx libnginx-mod-rtmp)"
        )
    return binary, module


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Ingest:
    """nginx's RTMP module on loopback; records each publisher of `live` as FLV in `folder`.

    Nobody may publish to the application `closed`. `async with Ingest(folder) as ingest`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Ingest:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def url(self, key: str, port: int | None = None, app: str = "live") -> str:
        return f"rtmp://127.0.0.1:{port or self.port}/{app}/{key}"

    def recordings(self, key: str) -> list[Path]:
        """What was recorded of a key, oldest first, one file per connection."""
        found = [one for one in self.folder.glob(f"{key}-*.flv") if one.stat().st_size > 13]
        return sorted(found, key=lambda one: one.name)

    async def start(self) -> None:
        """Start (again), on the same port."""
        binary, module = find_nginx()
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "nginx.conf"
        user = "user root;" if os.geteuid() == 0 else ""
        config.write_text(
            f"""
            load_module {module};
            {user} daemon off; worker_processes 1; pid {self.folder}/nginx.pid;
            error_log {self.folder}/error.log warn;
            events {{ worker_connections 64; }}
            rtmp {{ server {{
              listen 127.0.0.1:{self.port} so_keepalive=on; timeout 20s; ping 5s; ping_timeout 5s;
              application live {{
                live on; record all; record_path {self.folder}; record_unique on;
              }}
              application closed {{ live on; deny publish all; }}
            }} }}
            """
        )
        self._process = await asyncio.create_subprocess_exec(
            binary,
            *("-c", str(config), "-p", str(self.folder), "-e", str(self.folder / "error.log")),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        for _ in range(200):
            if self._process.returncode is not None:
                break
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                await writer.wait_closed()
                return
            await asyncio.sleep(0.05)
        raise TransportError(f"nginx did not start: see {self.folder}/error.log")

    async def stop(self) -> None:
        """End it, connections and all. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await within(process.wait(), 10)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()


class Gate:
    """A TCP line to 127.0.0.1:`target` that can be cut, stalled and throttled.

    Its buffers are small, so that what is throttled backs up at the sender and not in here.
    """

    BUFFER = 32_768
    CHUNK = 4096

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._rate: float | None = None

    async def __aenter__(self) -> Gate:
        await self.mend()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.cut()

    async def mend(self) -> None:
        """Take connections and let everything through."""
        self._open.set()
        self._rate = None
        if self._server is None:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.BUFFER)
            sock.bind(("127.0.0.1", self.port))
            self._server = await asyncio.start_server(self._accept, sock=sock, limit=self.CHUNK)

    async def cut(self) -> None:
        """Reset what is connected and refuse what comes."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self.drop()

    async def drop(self) -> None:
        """Reset what is connected."""
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    def stall(self) -> None:
        """Keep connections and pass nothing on: a line that went dead without a word."""
        self._open.clear()

    def throttle(self, rate: float | None) -> None:
        """Bytes a second that pass upwards."""
        self._rate = rate

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        far: asyncio.StreamWriter | None = None
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._target)
            ways = [
                asyncio.ensure_future(self._pump(reader, far, True)),
                asyncio.ensure_future(self._pump(far_reader, writer, False)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._links.discard(task)
            for one in (writer, far):
                if one is not None:
                    one.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool
    ) -> None:
        due = time.monotonic()
        while data := await reader.read(self.CHUNK):
            await self._open.wait()
            if up and self._rate is not None:
                due = max(due, time.monotonic() - 0.05) + len(data) / self._rate
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            writer.write(data)
            await writer.drain()


# --- what is sent, and what arrived ---------------------------------------------------------------

CLAP_EVERY = 25
"""Frames from clap to clap."""
CLAP = 3
"""Frames that a clap lasts."""


class Clapper:
    """Frames that are white while their sound is loud, a grey that moves otherwise."""

    def __init__(self, width: int, height: int, fps: int = 25) -> None:
        self._fps = fps
        self._white = i420(height, width, (255, 255, 255))
        noise = np.random.default_rng(1).integers(16, 90, (8, height, width), np.uint8)
        self._grey: list[UInt8] = []
        for layer in noise:
            image = i420(height, width, (40, 60, 80))
            image[: height // 2] = layer[: height // 2]
            self._grey.append(image)

    def frame(self, index: int) -> Frame:
        start = slice_start(index, FRAME_RATE, self._fps)
        count = slice_start(index + 1, FRAME_RATE, self._fps) - start
        if index % CLAP_EVERY < CLAP:
            wave = 14_000 * np.sin(2 * np.pi * 1_000 * (np.arange(count) + start) / FRAME_RATE)
            return Frame(index, self._white, wave.astype(np.int16), 1)
        image = self._grey[index % len(self._grey)]
        return Frame(index, image, np.zeros(count, np.int16), None)


@dataclass
class Recording:
    """What `examine` found in a file."""

    pictures: int = 0
    seconds: float = 0.0
    offsets: list[float] = field(default_factory=list)
    """Seconds by which sound follows picture, per clap."""
    keyframes: list[float] = field(default_factory=list)
    picture_gap: float = 0.0
    sound_gap: float = 0.0
    """Longest distances between neighbours, in s."""
    back: int = 0
    """Timestamps that went backwards."""
    first_sound: float = 0.0
    first_picture: float = 0.0
    bitrates: list[float] = field(default_factory=list)
    """Bits a second of picture in each window of 10 s."""

    @property
    def worst(self) -> float:
        return max((abs(one) for one in self.offsets), default=0.0)


def examine(path: Path) -> Recording:
    """Read a recording from beginning to end and measure it."""
    found = Recording()
    video_times: list[float] = []
    lumas: list[float] = []
    sizes: list[tuple[float, int]] = []
    sounds: list[tuple[float, npt.NDArray[np.float32]]] = []
    last: dict[str, float] = {}
    with av.open(str(path)) as container:
        for packet in container.demux():
            if packet.pts is None or packet.time_base is None:
                continue
            when, kind = float(packet.pts * packet.time_base), packet.stream.type
            if when < last.get(kind, -1.0):
                found.back += 1
            last[kind] = when
            if kind == "video":
                sizes.append((when, packet.size))
                if packet.is_keyframe:
                    found.keyframes.append(when)
            try:
                for frame in packet.decode():
                    if frame.pts is None or frame.time_base is None:
                        continue
                    at = float(frame.pts * frame.time_base)
                    if isinstance(frame, av.VideoFrame):
                        video_times.append(at)
                        lumas.append(float(frame.to_ndarray(format="gray")[::4, ::4].mean()))
                    elif isinstance(frame, av.AudioFrame):
                        sounds.append((at, frame.to_ndarray()[0].astype(np.float32)))
            except av.error.InvalidDataError:
                found.back += 1
    found.pictures = len(video_times)
    if not video_times or not sounds:
        return found
    found.seconds = video_times[-1] - video_times[0]
    found.first_picture, found.first_sound = video_times[0], sounds[0][0]
    found.picture_gap = float(max(np.diff(video_times), default=0.0))
    found.sound_gap = float(max(np.diff([at for at, _ in sounds]), default=0.0))
    for start in np.arange(sizes[0][0], sizes[-1][0] - 10.0, 2.0):
        bits = sum(size for at, size in sizes if start <= at < start + 10.0) * 8
        found.bitrates.append(bits / 10.0)
    beeps = _onsets(sounds)
    for place in range(1, len(lumas)):
        if lumas[place] > 160 >= lumas[place - 1]:
            if video_times[place] - video_times[place - 1] > 0.075:
                continue  # the pictures before it were left out: its beginning isn't seen
            flash = video_times[place]
            near = min(beeps, key=lambda beep: abs(beep - flash), default=None)
            if near is not None and abs(near - flash) < 0.4:
                found.offsets.append(near - flash)
    return found


def _onsets(sounds: list[tuple[float, npt.NDArray[np.float32]]]) -> list[float]:
    """When loud sound begins, to about 2 ms."""
    step = 96
    found, quiet_since = [], float("-inf")
    loud_before = False
    for at, samples in sounds:
        for start in range(0, len(samples) - step + 1, step):
            when = at + start / FRAME_RATE
            loud = bool(np.abs(samples[start : start + step]).max() > 0.15)
            if loud and not loud_before and when - quiet_since > 0.2:
                found.append(when)
            if loud:
                quiet_since = when
            loud_before = loud
    return found


# --- what the bench runs --------------------------------------------------------------------------


def small_programme(**changes: Any) -> Programme:
    """A broadcast that costs next to nothing, for faults and for tests."""
    values: dict[str, Any] = {"preset": "low-latency", "speed": "ultrafast"}
    values |= {"video_bitrate": 400_000, **changes}
    return programme(320, 180, values.pop("source_fps", 25), **values)


class Studio:
    """A broadcast that is fed by a clapper in real time: `async with Studio(...) as studio`."""

    def __init__(self, spec: Programme) -> None:
        self.events: list[tuple[float, Event]] = []
        self.broadcast = Broadcast(spec, lambda event: self.events.append((time.time(), event)))
        self.feeding = True
        """False is an engine that died: no frames come."""
        self._clapper = Clapper(spec.source_width, spec.source_height, spec.source_fps)
        self._fps = spec.source_fps
        self._feeder: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Studio:
        await self.broadcast.start()
        self._feeder = asyncio.ensure_future(self._feed())
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._feeder is not None:
            self._feeder.cancel()
            await asyncio.gather(self._feeder, return_exceptions=True)
        await self.broadcast.aclose()

    def add(self, url: str, id: str, **options: Any) -> None:
        self.broadcast.add(StreamUrl.parse(url), id=id, **options)

    async def live(self, id: str, timeout: float = 15.0, after: float | None = None) -> float:
        """Wait until a target is live and passes bytes on; the seconds that took."""
        began = time.monotonic() if after is None else after
        target = self.broadcast.targets[id]
        sent = target.carried
        while not (target.state is State.LIVE and target.carried > sent + 4096):
            if target.state in (State.FAILED, State.ENDED):
                raise TransportError(f"the output {id} has {target.state.value}: {target.reason}")
            if time.monotonic() - began > timeout:
                raise TransportError(f"the output {id} was not live within {timeout:.0f} s")
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def _feed(self) -> None:
        began, index = time.monotonic(), 0
        while True:
            if self.feeding:
                self.broadcast.frame(self._clapper.frame(index))
            index += 1
            await asyncio.sleep(max(0.0, began + index / self._fps - time.monotonic()))


@dataclass
class FaultReport:
    """What `faults` saw. Times in seconds."""

    faults: int = 0
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    """From the line's return to bytes flowing again, per kind of fault."""
    recordings: int = 0
    claps: int = 0
    worst_offset: float = 0.0
    backwards: int = 0
    """Timestamps that went back, or data that could not be decoded."""
    worst_sound_gap: float = 0.0
    refused: str = ""
    seconds: float = 0.0

    @property
    def slowest(self) -> float:
        return max((one for times in self.recoveries.values() for one in times), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"slowest": self.slowest}


async def faults(
    count: int = 50,
    *,
    longest: float = 40.0,
    folder: Path | None = None,
    seed: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> FaultReport:
    """Break lines, server, encoder and source `count` times, and measure what came of it.

    Three targets behind a line each and one file are healthy; a fifth address is refused. Needs
    nginx with its RTMP module (ConfigError).
    """
    chance, report, began = random.Random(seed), FaultReport(), time.monotonic()
    with contextlib.ExitStack() as undo:
        if folder is None:
            folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="voipavatar-")))
        tape = folder / "tape.mkv"
        async with contextlib.AsyncExitStack() as stack:
            ingest = await stack.enter_async_context(Ingest(folder / "ingest"))
            gates = {
                name: await stack.enter_async_context(Gate(ingest.port))
                for name in ("left", "middle", "right")
            }
            studio = await stack.enter_async_context(Studio(small_programme()))
            keys = {name: f"{name}{chance.getrandbits(40)}" for name in gates}
            for name, gate in gates.items():
                studio.add(ingest.url(keys[name], gate.port), name)
            studio.add(str(tape), "tape")
            studio.add(ingest.url("refused-key", app="closed"), "refused")
            for name in (*gates, "tape"):
                await studio.live(name)
            await asyncio.sleep(4.0)  # known good from here on: a target has to last a little
            quiet = {name: asyncio.Lock() for name in gates}

            async def healed(kind: str, *names: str) -> None:
                back = time.monotonic()
                waits = [studio.live(name, 60.0, back) for name in names]
                took = max(await asyncio.gather(*waits))
                report.recoveries.setdefault(kind, []).append(round(took, 2))
                report.faults += 1
                progress(f"{report.faults}/{count} {kind}: flowing again after {took:.2f} s")
                if took > 5.0:
                    for when, event in studio.events:
                        if event.get("id") in names and when > time.time() - took - 15.0:
                            said = f"{event['event']} {event['reason']}"
                            progress(f"  {when - time.time():+.1f} s {event['id']}: {said}")
                await asyncio.sleep(chance.uniform(0.1, min(1.5, longest / 2)))

            async def line_faults(name: str, gate: Gate, number: int) -> None:
                for _ in range(number):
                    async with quiet[name]:
                        kind = chance.choice(
                            ("cut", "cut", "drop", "stall", "half-open", "throttle")
                        )
                        length = min(longest, 0.1 * 400 ** chance.random())
                        if kind == "cut":
                            await gate.cut()
                            await asyncio.sleep(length)
                        elif kind == "drop":
                            await gate.drop()
                        elif kind == "stall":
                            gate.stall()
                            await asyncio.sleep(length)
                        elif kind == "half-open":  # the other end forgets us without a word
                            gate.stall()
                            await asyncio.sleep(length)
                            await gate.drop()
                        else:
                            gate.throttle(25_000)
                            await asyncio.sleep(length)
                        await gate.mend()
                        await healed(kind, name)
                    await asyncio.sleep(0.05)

            async def other_faults(number: int) -> None:
                kinds = ["encoder killed", "source gone", "server restart", "encoder stuck"]
                for turn in range(number):
                    kind = kinds[turn % len(kinds)]
                    async with contextlib.AsyncExitStack() as all_quiet:
                        for lock in quiet.values():
                            await all_quiet.enter_async_context(lock)
                        encoder = studio.broadcast.encoder
                        if kind == "encoder killed" and encoder is not None:
                            assert encoder.pid is not None
                            os.kill(encoder.pid, 9)
                        elif kind == "encoder stuck" and encoder is not None:
                            before = studio.broadcast.encoder_restarts
                            encoder.freeze()
                            while studio.broadcast.encoder_restarts == before:
                                await asyncio.sleep(0.05)
                        elif kind == "source gone":
                            studio.feeding = False
                            await asyncio.sleep(min(longest, chance.uniform(0.5, 12.0)))
                            studio.feeding = True
                        else:
                            await ingest.stop()
                            await asyncio.sleep(min(longest, chance.uniform(0.1, 4.0)))
                            await ingest.start()
                        await healed(kind, *gates, "tape")
                    await asyncio.sleep(0.05)

            others = max(1, count // 7)
            share, rest = divmod(count - others, len(gates))
            await asyncio.gather(
                other_faults(others),
                *(
                    line_faults(name, gate, share + (place < rest))
                    for place, (name, gate) in enumerate(gates.items())
                ),
            )
            refused = studio.broadcast.targets["refused"]
            report.refused = f"{refused.state.value}: {refused.reason}"
            await asyncio.sleep(1.0)
        taken = [path for key in keys.values() for path in ingest.recordings(key)]
        for path in [tape, *taken]:
            found = await asyncio.to_thread(examine, path)
            report.recordings += 1
            report.claps += len(found.offsets)
            report.worst_offset = max(report.worst_offset, found.worst)
            report.backwards += found.back
            if found.seconds > 1.0:
                report.worst_sound_gap = max(report.worst_sound_gap, float(found.sound_gap))
    report.seconds = round(time.monotonic() - began, 1)
    return report


@dataclass
class ThrottleReport:
    """What `throttled` saw. Times in seconds."""

    worst_latency: float = 0.0
    """Oldest frame that left while the line carried half."""
    back_under_3s: float = 0.0
    """From the line's recovery until what leaves is younger than 3 s, and stays so."""
    dropped: int = 0
    sound_gap: float = 0.0
    """Longest distance between sound packets in the recording."""
    worst_offset: float = 0.0
    reconnects: int = 0


async def throttled(seconds: float = 60.0, share: float = 0.5) -> ThrottleReport:
    """Half the uplink for so long: pictures are left out, sound never, and live is soon live."""
    report, spec = ThrottleReport(), small_programme(video_bitrate=800_000)
    with tempfile.TemporaryDirectory(prefix="voipavatar-") as folder:
        async with (
            Ingest(Path(folder)) as ingest,
            Gate(ingest.port) as gate,
            Studio(spec) as studio,
        ):
            studio.add(ingest.url("slow", gate.port), "out")
            await studio.live("out")
            target = studio.broadcast.targets["out"]
            gate.throttle((spec.video_bitrate + spec.audio_bitrate) / 8 * share)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                await asyncio.sleep(0.05)
                report.worst_latency = max(report.worst_latency, target.latency)
            gate.throttle(None)
            recovered = time.monotonic()
            while (now := time.monotonic()) < recovered + 10.0:
                if target.latency > 3.0:
                    report.back_under_3s = now - recovered
                await asyncio.sleep(0.05)
            report.dropped, report.reconnects = target.dropped, target.reconnects
        found = await asyncio.to_thread(examine, ingest.recordings("slow")[0])
    report.sound_gap, report.worst_offset = found.sound_gap, found.worst
    return report


async def bench(
    minutes: float = 6.0, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """All of it, as long as asked for: cost, a throttled line, then faults until time is up.

    `memory` is the growth of this process over the faults, in MB an hour. Needs nginx with its
    RTMP module (ConfigError).
    """
    until = time.monotonic() + minutes * 60
    progress("one encode for one target and for three")
    found: dict[str, Any] = {"cost": await cost(20.0 if minutes >= 3 else 8.0)}
    progress("half the uplink")
    found["throttled"] = asdict(await throttled(60.0 if minutes >= 3 else 10.0))
    runs: list[FaultReport] = []
    size, began = 0, time.monotonic()
    while not runs or time.monotonic() + runs[-1].seconds < until:
        longest = 40.0 if minutes >= 6 else 2.0
        runs.append(await faults(50, longest=longest, seed=len(runs) + 1, progress=progress))
        if len(runs) == 1:  # from here on everything that is loaded once has been loaded
            size, began = _resident(), time.monotonic()
    if len(runs) > 1:
        hours = (time.monotonic() - began) / 3600
        found["memory"] = round((_resident() - size) / 1e6 / hours, 2)
    found["faults"] = [one.as_dict() for one in runs]
    return found


def _resident() -> int:
    """Bytes of memory that this process holds."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def cost(seconds: float = 20.0, targets: int = 3) -> dict[str, float]:
    """CPU of a 720p25 broadcast to one target and to `targets`, encoder included, in cores."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="voipavatar-") as folder:
        async with Ingest(Path(folder)) as ingest:
            for number in (1, targets):
                spec = programme(1280, 720, 25, preset="twitch")
                before, began = _cpu(), time.monotonic()
                async with Studio(spec) as studio:
                    for one in range(number):
                        studio.add(ingest.url(f"cost{number}x{one}"), f"out-{one}")
                    for one in range(number):
                        await studio.live(f"out-{one}")
                    await asyncio.sleep(seconds)
                    taken = time.monotonic() - began
                found[f"targets_{number}"] = round((_cpu() - before) / taken, 3)
    found["ratio"] = round(found[f"targets_{targets}"] / found["targets_1"], 3)
    return found


def _cpu() -> float:
    """Seconds of CPU of this process and of its ended children (the encoder, not the server)."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
