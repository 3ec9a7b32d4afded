"""The playback contract of LiveKit avatars, tried out: `voipavatar conformance`.

An agent's side, LiveKit's own sender, speaks to an avatar in a real room, and a viewer hears and
sees what comes of it. The avatar is ours, LiveKit's `AvatarRunner` with a trivial generator, or any
other that is in a room already and flashes white while it is loud.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import psutil
from livekit import api, rtc
from livekit.agents.voice.avatar import (
    AudioSegmentEnd,
    AvatarOptions,
    AvatarRunner,
    DataStreamAudioOutput,
    DataStreamAudioReceiver,
    VideoGenerator,
)

from .agentstream import AUDIO_TOPIC, AgentStream
from .config import Persona, Settings
from .errors import ConfigError, TransportError
from .livekit_server import LiveKitServer
from .media import FRAME_RATE, Int16, i420
from .room import RoomOptions, connect
from .session import Studio
from .viewer import Viewer
from .waiting import within

RATE = 24_000
AVATAR = "avatar-under-test"
AGENT = "conformance-agent"
HOSTED = ("voipavatar", "livekit")
"""Avatars that are started here."""
WIDTH, HEIGHT, FPS = 640, 360, 25
PATIENCE = 20.0
"""Seconds for an avatar to come, and to take a piece of sound."""
FALLBACK = 1.9
"""Seconds from which an end was not told but assumed by LiveKit's sender (which does so at 2)."""

STALL_AT, RECOVERY = 4.0, 8.0
"""Seconds of speech before the avatar's loop is held, and after."""
IN_SYNC = 0.04
"""Seconds from its usual offset within which an avatar counts as in sync."""

ROWS = {
    "clear_to_silence_as_heard": "interruption to silence as heard by a viewer, median",
    "clear_to_silence_p95": "the same, 95th percentile",
    "clear_to_told": "interruption to `playback_finished`, median",
    "clear_to_told_p95": "the same, 95th percentile",
    "interruptions": "interruptions tried",
    "ends_missing_after_clear": "of them without a `playback_finished` within 4 s",
    "ends_doubled": "with more than one",
    "fallbacks": "ended by the sender's own time-out of 2 s",
    "clears_unheard": "still spoken a second later",
    "position_error_interrupted": "position told less sound heard, median",
    "position_error_interrupted_p95": "the same, 95th percentile",
    "first_segment_lost": "the first segment, once the avatar is seen, lost",
    "ends_missing": "whole segments without an end",
    "position_error": "position of whole segments, worst",
    "started_before_heard": "`playback_started` until it is heard",
    "sync_seen": "picture after sound as seen, median",
    "sync_at_source": "the same, less the viewer's own buffers",
    "sync_drift": "change between the halves of the run",
    "stall_recovery": "back in sync after the avatar's loop was held for a second",
    "stall_lasting": "offset left by that",
    "cpu_idle": "processor, idle, with encoder (% of a core)",
    "cpu_talking": "processor, talking, with encoder (% of a core)",
    "gap_p99": "gap between pictures, 99th percentile",
    "lost_end": "a stream whose end is lost",
    "picture": "picture",
}
"""What is measured, in milliseconds unless it says otherwise."""

Tell = Callable[[str], None]


def _quiet(what: str) -> None:
    """Progress that nobody watches."""


@dataclass
class _Ledger:
    """What the agent was told."""

    started: list[float] = field(default_factory=list)
    finished: list[tuple[float, float, bool]] = field(default_factory=list)

    def listen(self, output: DataStreamAudioOutput) -> None:
        output.on("playback_started", lambda _: self.started.append(time.monotonic()))
        output.on(
            "playback_finished",
            lambda event: self.finished.append(
                (time.monotonic(), event.playback_position, event.interrupted)
            ),
        )

    async def until(self, count: int, limit: float = 6.0) -> bool:
        end = time.monotonic() + limit
        while len(self.finished) < count:
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.002)
        return True


async def compare(
    settings: Settings,
    avatars: Sequence[str] = ("voipavatar", "livekit"),
    *,
    room: str = "",
    interruptions: int = 30,
    seconds: float = 20.0,
    server: LiveKitServer | None = None,
    tell: Tell = _quiet,
) -> list[dict[str, Any]]:
    """Try several avatars, one after the other at the same server; as `run`."""
    async with contextlib.AsyncExitStack() as undo:
        access = server
        if access is None:
            access = LiveKitServer.from_settings(settings, host="127.0.0.1")
            await undo.enter_async_context(access)
        found = []
        for name in avatars:
            found.append(
                await run(
                    settings,
                    name,
                    room=room if name not in HOSTED else "",
                    interruptions=interruptions,
                    seconds=seconds,
                    server=access,
                    tell=partial(_named, tell, name),
                )
            )
        return found


def _named(tell: Tell, name: str, what: str) -> None:
    tell(f"{name}: {what}")


async def run(
    settings: Settings,
    avatar: str = "voipavatar",
    *,
    room: str = "",
    interruptions: int = 30,
    seconds: float = 20.0,
    server: LiveKitServer | None = None,
    tell: Tell = _quiet,
) -> dict[str, Any]:
    """Try one avatar: "voipavatar", "livekit", or the identity of one that is in `room`.

    The first two run in a process of their own, at 640x360 and 25 pictures a second, so that their
    processor time can be told. Gives numbers by the names in `ROWS`.
    """
    async with contextlib.AsyncExitStack() as undo:
        access = server
        if access is None:
            access = LiveKitServer.from_settings(settings, host="127.0.0.1")
            await undo.enter_async_context(access)
        name = room or f"conformance-{uuid.uuid4().hex[:8]}"
        identity = AVATAR
        host: Host | None = None
        if avatar in HOSTED:
            host = await undo.enter_async_context(Host(avatar, access, name))
        elif room:
            identity = avatar
        else:
            raise ConfigError(
                f"there is no avatar {avatar!r}: voipavatar, livekit, or an identity with --room"
            )
        agent = await undo.enter_async_context(_joined(access, name, AGENT))
        viewer = Viewer(access.url, name, access.api_key, access.api_secret, publisher=identity)
        await undo.enter_async_context(viewer)
        trial = _Trial(avatar, agent, identity, viewer, host, tell)
        return await trial.run(interruptions, seconds)


class _Trial:
    """One avatar, tried by an agent and watched by a viewer."""

    def __init__(
        self,
        avatar: str,
        agent: rtc.Room,
        identity: str,
        viewer: Viewer,
        host: Host | None,
        tell: Tell,
    ) -> None:
        self.found: dict[str, Any] = {"avatar": avatar}
        self.agent = agent
        self.identity = identity
        self.viewer = viewer
        self.host = host
        self.tell = tell
        self.told = _Ledger()
        self.output = DataStreamAudioOutput(
            agent, destination_identity=identity, sample_rate=RATE, wait_playback_start=True
        )
        self.told.listen(self.output)

    async def run(self, interruptions: int, seconds: float) -> dict[str, Any]:
        self.tell("segments")
        await self.push(_tone(0.4))
        self.output.flush()
        self.found["first_segment_lost"] = int(not await self.told.until(1))
        if self.found["first_segment_lost"]:
            # Its end would be assumed in the middle of what comes next, and counted there.
            self.output.on_playback_finished(playback_position=0.0, interrupted=True)
        try:
            await self.viewer.wait(15.0)
        except TransportError:
            self.found["picture"] = "none was seen"
            return self.found
        await asyncio.sleep(1.0)
        await self.segments()
        self.tell("idle")
        await self.costs("cpu_idle", asyncio.sleep(min(5.0, seconds)))
        self.tell("interruptions")
        await self.interrupt(interruptions)
        self.tell("sync")
        await self.costs("cpu_talking", self.sync(seconds))
        if self.host is not None:
            self.tell("a stall of a second")
            await self.stall(self.host)
        self.tell("an end that is lost")
        self.found["lost_end"] = await _lost_end(
            self.agent, self.identity, self.output, self.viewer, self.push
        )
        gaps = self.viewer.gaps()[25:] or [0.0]
        self.found["gap_p99"] = round(float(np.percentile(gaps, 99)) * 1000, 1)
        return self.found

    async def push(self, pcm: Int16) -> None:
        for begin in range(0, len(pcm), RATE // 50):
            piece = pcm[begin : begin + RATE // 50]
            frame = rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece))
            try:
                await within(self.output.capture_frame(frame), PATIENCE)
            except asyncio.TimeoutError:
                raise TransportError(
                    f"{self.identity!r} took no sound within {PATIENCE:.0f} s: is it in the room, "
                    "with a picture?"
                ) from None

    async def costs(self, name: str, work: Awaitable[None]) -> None:
        """Do `work`, and tell what the avatar's process took meanwhile, in percent of a core."""
        begin = time.monotonic()
        before = self.host.cpu() if self.host is not None else 0.0
        await work
        if self.host is not None:
            share = (self.host.cpu() - before) / (time.monotonic() - begin)
            self.found[name] = round(100 * share, 1)

    async def segments(self) -> None:
        lengths = (0.5, 1.0, 0.3)
        wanted = len(self.told.finished)
        for length in lengths:
            await self.push(_tone(length))
            self.output.flush()
            wanted += 1
            await self.told.until(wanted)
            await asyncio.sleep(0.3)
        ends = self.told.finished[-len(lengths) :]
        self.found["ends_missing"] = wanted - len(self.told.finished)
        if len(ends) == len(lengths):
            errors = [abs(end[1] - length) for end, length in zip(ends, lengths, strict=True)]
            self.found["position_error"] = round(max(errors) * 1000, 1)
        spans = self.viewer.loud_spans(gap=0.15)[-len(lengths) :]
        heard = self.viewer.when([begin for begin, _ in spans])
        pairs = list(zip(self.told.started[-len(lengths) :], heard, strict=False))
        if pairs:
            self.found["started_before_heard"] = _ms([b - a for a, b in pairs])

    async def interrupt(self, count: int) -> None:
        """Segments cut off as `AgentSession` does it: the end of the stream, then the clear."""
        rng = random.Random(3)
        told, viewer = self.told, self.viewer
        waits: list[float] = []
        tails: list[float] = []
        errors: list[float] = []
        missing = doubled = unheard = 0
        for _ in range(count):
            before, since = len(told.finished), time.monotonic()
            await self.push(_tone(2.0))
            await asyncio.sleep(rng.choice((0.0, 0.01, 0.3, 0.5, 0.7)))
            asked = time.monotonic()
            self.output.flush()
            self.output.clear_buffer()
            if not await told.until(before + 1, 4.0):
                missing += 1
                continue
            waits.append(told.finished[before][0] - asked)
            await asyncio.sleep(0.45)
            doubled += len(told.finished) > before + 1
            position = told.finished[before][1]
            spans = [
                span
                for span in viewer.loud_spans(gap=0.15)
                if viewer.when([span[0]])[0] > since and span[1] - span[0] > 0.01 * FRAME_RATE
            ]
            if not spans:
                continue
            begin, end = spans[0][0], spans[-1][1]
            last = viewer.when([end])[0]
            if last > asked + 1.0:  # it was told to be over, and is still being said
                unheard += 1
                await asyncio.sleep(2.0)
            elif position > 0.1:
                tails.append(last - asked)
                errors.append(abs((end - begin) / FRAME_RATE - position))
        self.found |= {
            "interruptions": count,
            "ends_missing_after_clear": missing,
            "ends_doubled": doubled,
            "fallbacks": sum(wait > FALLBACK for wait in waits),
            "clears_unheard": unheard,
            "clear_to_told": _ms(waits),
            "clear_to_told_p95": _ms(waits, 95),
            "clear_to_silence_as_heard": _ms(tails),
            "clear_to_silence_p95": _ms(tails, 95),
            "position_error_interrupted": _ms(errors),
            "position_error_interrupted_p95": _ms(errors, 95),
        }

    async def sync(self, seconds: float) -> None:
        before, since = len(self.told.finished), time.monotonic()
        await self.viewer.buffering()
        await self.push(_beeps(seconds))
        self.output.flush()
        await self.told.until(before + 1, seconds + 10)
        added = await self.viewer.buffering()
        offsets = [value for when, value in self.viewer.offsets() if when > since]
        if not offsets:
            self.found["sync_seen"] = "no flash was seen"
            return
        half = len(offsets) // 2
        drift = float(np.median(offsets[half:]) - np.median(offsets[:half])) if half else 0.0
        self.found |= {
            "sync_seen": _ms(offsets),
            "sync_at_source": round((float(np.median(offsets)) - (added or 0.0)) * 1000, 1),
            "sync_drift": round(drift * 1000, 1),
        }

    async def stall(self, host: Host) -> None:
        """The avatar's event loop is held for a second in mid-speech; when sync is back as it
        was, and what is left of it."""
        before, since = len(self.told.finished), time.monotonic()
        await self.push(_beeps(STALL_AT + 1.0 + RECOVERY))
        self.output.flush()
        await asyncio.sleep(STALL_AT)
        released = await host.stall()
        await self.told.until(before + 1, RECOVERY + 6.0)
        await asyncio.sleep(0.5)
        offsets = [(when, value) for when, value in self.viewer.offsets() if when > since + 1.0]
        steady = [value for when, value in offsets if when < released - 1.2]
        after = [(when - released, value) for when, value in offsets if when > released]
        if not steady or len(after) < 4:
            self.found["stall_recovery"] = "not seen"
            return
        usual = float(np.median(steady))
        off = [when for when, value in after if abs(value - usual) > IN_SYNC]
        last = after[-1][0]
        if off and off[-1] > last - 1.5:
            self.found["stall_recovery"] = f"not within {last:.0f} s"
        else:
            self.found["stall_recovery"] = round(1000 * (off[-1] if off else 0.0))
        rest = float(np.median([value for _, value in after[-4:]])) - usual
        self.found["stall_lasting"] = round(1000 * rest, 1)


async def _lost_end(
    agent: rtc.Room,
    identity: str,
    output: DataStreamAudioOutput,
    viewer: Viewer,
    push: Callable[[Int16], Awaitable[None]],
) -> str:
    """A stream that is never closed must not keep the next segment from being spoken."""
    writer = await agent.local_participant.stream_bytes(
        name="AUDIO_lost",
        topic=AUDIO_TOPIC,
        destination_identities=[identity],
        attributes={"sample_rate": str(RATE), "num_channels": "1"},
    )
    await writer.write(_tone(0.3).tobytes())
    await asyncio.sleep(0.2)
    begin = time.monotonic()
    await push(_tone(0.4))
    output.flush()
    while time.monotonic() - begin < 14.0:
        await asyncio.sleep(0.1)
        spans = viewer.loud_spans()
        starts = viewer.when([first for first, _ in spans])
        since = [span for span, when in zip(spans, starts, strict=True) if when > begin - 0.2]
        # Both tones, of 0.3 and 0.4 s: what was cut off and what came after it.
        if sum(last - first for first, last in since) > 0.65 * FRAME_RATE:
            return f"the next segment was heard after {time.monotonic() - begin:.1f} s"
    return "the next segment was not heard"


def _ms(values: list[float], percentile: float = 50) -> float | None:
    return round(float(np.percentile(values, percentile)) * 1000, 1) if values else None


def _tone(seconds: float) -> Int16:
    times = np.arange(round(seconds * RATE)) / RATE
    return (np.sin(2 * np.pi * 800 * times) * 14_000).astype(np.int16)


def _beeps(seconds: float) -> Int16:
    times = np.arange(round(seconds * RATE)) / RATE
    loud = (times + 0.48) % 0.64 < 0.16
    return (np.sin(2 * np.pi * 1000 * times) * loud * 16_000).astype(np.int16)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The columns side by side."""
    lines = [
        "| milliseconds, where nothing else is said | "
        + " | ".join(str(one["avatar"]) for one in found)
        + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for key, label in ROWS.items():
        if any(key in one for one in found):
            cells = ("" if one.get(key) is None else str(one[key]) for one in found)
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- the avatars ----------------------------------------------------------------------------------


class Host:
    """An avatar in a process of its own, which can be measured and held up."""

    START = 60.0
    """Seconds in which it must be there."""

    def __init__(self, avatar: str, access: LiveKitServer, room: str) -> None:
        self._avatar = avatar
        self._access = access
        self._room = room
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._said: deque[str] = deque(maxlen=20)

    async def __aenter__(self) -> Host:
        access = self._access
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "voipavatar.conformance", self._avatar, self._room,
            env=os.environ | {"LIVEKIT_URL": access.url, "LIVEKIT_API_KEY": access.api_key,
                              "LIVEKIT_API_SECRET": access.api_secret},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read(), name="conformance-host")
        try:
            await self._answer(self.START)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        process = self._process
        assert process is not None and process.stdin is not None
        process.stdin.close()  # it takes that for the end
        try:
            await within(process.wait(), 15.0)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()
        if self._reader is not None:
            await self._reader

    async def _read(self) -> None:
        assert self._process is not None and self._process.stderr is not None
        async for line in self._process.stderr:
            self._said.append(line.decode(errors="replace"))

    async def _answer(self, limit: float) -> None:
        assert self._process is not None and self._process.stdout is not None
        line = await within(self._process.stdout.readline(), limit)
        if not line:
            raise TransportError(f"the avatar {self._avatar!r} ended: " + "".join(self._said))

    def cpu(self) -> float:
        """Seconds of processor time that it took until now, its native threads included."""
        assert self._process is not None
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    async def stall(self) -> float:
        """Hold its event loop for a second; the monotonic time at which it went on."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(b"stall\n")
        await self._answer(10.0)
        return time.monotonic()


async def _host(avatar: str, room: str) -> None:
    """The other side of `Host`."""
    settings = Settings.from_env()
    access = LiveKitServer.from_settings(settings, host="127.0.0.1")
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    kind = _ours(settings, access, room) if avatar == "voipavatar" else runner(access, room)
    async with kind:
        print("ready", flush=True)
        while await commands.readline():
            time.sleep(1.0)  # noqa: ASYNC251 - the stall is what is measured
            print("stalled", flush=True)


@contextlib.asynccontextmanager
async def _ours(settings: Settings, access: LiveKitServer, room: str) -> AsyncIterator[None]:
    stream = AgentStream()
    options = RoomOptions(
        access.url, room, access.api_key, access.api_secret, identity=AVATAR, guests=(stream,)
    )
    persona = Persona(name="clapper", engine="clapper", width=WIDTH, height=HEIGHT, fps=FPS)
    async with Studio(settings) as studio:
        session = await studio.open(persona, room=options)
        stream.open_turn = session.open_turn
        try:
            yield
        finally:
            await stream.aclose()


@contextlib.asynccontextmanager
async def runner(access: LiveKitServer, room: str, identity: str = AVATAR) -> AsyncIterator[None]:
    """LiveKit's `AvatarRunner`, as its examples use it."""
    async with _joined(access, room, identity) as joined:
        receiver = DataStreamAudioReceiver(joined, sender_identity=AGENT)
        avatar = AvatarRunner(
            joined,
            audio_recv=receiver,
            video_gen=_Flash(),
            options=AvatarOptions(WIDTH, HEIGHT, FPS, RATE, 1),
        )
        starting = asyncio.create_task(avatar.start(), name="conformance-runner")
        try:
            yield
        finally:
            if not starting.done():
                starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await avatar.aclose()


class _Flash(VideoGenerator):
    """White while loud, dark while not; idle pictures when nothing is to be said."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[rtc.AudioFrame | AudioSegmentEnd] = asyncio.Queue()
        self._pcm = b""
        self._pictures = {
            loud: rtc.VideoFrame(
                WIDTH,
                HEIGHT,
                rtc.VideoBufferType.I420,
                i420(HEIGHT, WIDTH, (235,) * 3 if loud else (40,) * 3).tobytes(),
            )
            for loud in (False, True)
        }

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        self._queue.put_nowait(frame)

    def clear_buffer(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()
        self._pcm = b""

    async def _generate(
        self,
    ) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        size = RATE // FPS * 2
        while True:
            try:
                item = await within(self._queue.get(), 0.5 / FPS)
            except asyncio.TimeoutError:
                yield self._pictures[False]
                continue
            if isinstance(item, rtc.AudioFrame):
                self._pcm += bytes(item.data.cast("b"))
            last = isinstance(item, AudioSegmentEnd)
            while len(self._pcm) >= size or (last and self._pcm):
                piece, self._pcm = self._pcm[:size], self._pcm[size:]
                samples = np.frombuffer(piece, np.int16)
                loud = float(np.sqrt(np.mean((samples / 32768) ** 2))) > 0.02
                yield self._pictures[loud]
                yield rtc.AudioFrame(piece, RATE, 1, len(samples))
            if last:
                yield AudioSegmentEnd()

    def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        return self._generate()


@contextlib.asynccontextmanager
async def _joined(access: LiveKitServer, room: str, identity: str) -> AsyncIterator[rtc.Room]:
    token = (
        api.AccessToken(access.api_key, access.api_secret)
        .with_kind("agent")
        .with_identity(identity)
        .with_grants(api.VideoGrants(room_join=True, room=room))
        .to_jwt()
    )
    joined = rtc.Room()
    await connect(joined, access.url, token, rtc.RoomOptions(connect_timeout=15.0))
    try:
        yield joined
    finally:
        await joined.disconnect()


if __name__ == "__main__":
    asyncio.run(_host(*sys.argv[1:3]))
