"""The playback contract of LiveKit avatars, tried out: `voipavatar conformance`.

An agent's side, LiveKit's own sender, speaks to an avatar in a real room, and a viewer hears and
sees what comes of it. The avatar is ours, LiveKit's `AvatarRunner` with a trivial generator, or any
other that is in a room already and flashes white while it is loud.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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

RATE = 24_000
AVATAR = "avatar-under-test"
WIDTH, HEIGHT, FPS = 640, 360, 25
FALLBACK = 1.9
"""Seconds from which an end was not told but assumed by LiveKit's sender (which does so at 2)."""

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

    Gives names and numbers, times in milliseconds; `ends_*` counts are what the contract is about.
    """
    async with contextlib.AsyncExitStack() as undo:
        access = server
        if access is None:
            access = LiveKitServer.from_settings(settings, host="127.0.0.1")
            await undo.enter_async_context(access)
        name = room or f"conformance-{uuid.uuid4().hex[:8]}"
        identity = AVATAR
        if avatar == "voipavatar":
            await undo.enter_async_context(_ours(settings, access, name))
        elif avatar == "livekit":
            await undo.enter_async_context(_runner(access, name))
        elif room:
            identity = avatar
        else:
            raise ConfigError(
                f"there is no avatar {avatar!r}: voipavatar, livekit, or an identity with --room"
            )
        agent = await undo.enter_async_context(_joined(access, name, "conformance-agent"))
        viewer = Viewer(access.url, name, access.api_key, access.api_secret, publisher=identity)
        await undo.enter_async_context(viewer)
        return await _try(avatar, agent, identity, viewer, interruptions, seconds, tell)


async def _try(
    avatar: str,
    agent: rtc.Room,
    identity: str,
    viewer: Viewer,
    interruptions: int,
    seconds: float,
    tell: Tell,
) -> dict[str, Any]:
    found: dict[str, Any] = {"avatar": avatar}
    output = DataStreamAudioOutput(
        agent, destination_identity=identity, sample_rate=RATE, wait_playback_start=True
    )
    told = _Ledger()
    told.listen(output)

    async def push(pcm: Int16) -> None:
        for begin in range(0, len(pcm), RATE // 50):
            piece = pcm[begin : begin + RATE // 50]
            frame = rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece))
            await asyncio.wait_for(output.capture_frame(frame), 20.0)

    tell("segments")
    await push(_tone(0.4))
    output.flush()
    await told.until(1)
    try:
        await viewer.wait(15.0)
    except TransportError:
        found["picture"] = "none was seen"
        return found
    await asyncio.sleep(1.0)
    lengths = (0.5, 1.0, 0.3)
    wanted = 1
    for length in lengths:
        await push(_tone(length))
        output.flush()
        wanted += 1
        await told.until(wanted)
        await asyncio.sleep(0.3)
    ends = told.finished[-len(lengths) :]
    found["ends_missing"] = wanted - len(told.finished)
    if len(ends) == len(lengths):
        errors = [abs(end[1] - length) for end, length in zip(ends, lengths, strict=True)]
        found["position_error"] = round(max(errors) * 1000, 1)
    heard = [viewer.when([a])[0] for a, _ in viewer.loud_spans(gap=0.15)][-len(lengths) :]
    pairs = list(zip(told.started[-len(lengths) :], heard, strict=False))
    if pairs:
        found["started_before_heard"] = _ms([b - a for a, b in pairs])
    tell("interruptions")
    found |= await _interrupt(output, told, viewer, push, interruptions)
    tell("sync")
    found |= await _sync(output, told, viewer, push, seconds)
    tell("an end that is lost")
    found["lost_end"] = await _lost_end(agent, identity, output, viewer, push)
    found["gap_p99"] = round(float(np.percentile(viewer.gaps()[25:] or [0.0], 99)) * 1000, 1)
    return found


async def _interrupt(
    output: DataStreamAudioOutput,
    told: _Ledger,
    viewer: Viewer,
    push: Callable[[Int16], Awaitable[None]],
    count: int,
) -> dict[str, Any]:
    rng = random.Random(3)
    waits, tails, missing, doubled = [], [], 0, 0
    for _ in range(count):
        before = len(told.finished)
        await push(_tone(2.0))
        await asyncio.sleep(rng.choice((0.0, 0.01, 0.3, 0.5, 0.7)))
        asked = time.monotonic()
        output.clear_buffer()
        output.flush()
        if not await told.until(before + 1, 4.0):
            missing += 1
            continue
        waits.append(told.finished[before][0] - asked)
        await asyncio.sleep(0.45)
        doubled += len(told.finished) > before + 1
        spans = viewer.loud_spans()
        if spans and told.finished[before][1] > 0.1:
            tails.append(viewer.when([spans[-1][1]])[0] - asked)
    return {
        "interruptions": count,
        "ends_missing_after_clear": missing,
        "ends_doubled": doubled,
        "fallbacks": sum(wait > FALLBACK for wait in waits),
        "clear_to_told": _ms(waits),
        "clear_to_told_p95": round(float(np.percentile(waits or [0.0], 95)) * 1000, 1),
        "clear_to_silence_as_heard": _ms(tails),
        "clear_to_silence_p95": round(float(np.percentile(tails or [0.0], 95)) * 1000, 1),
    }


async def _sync(
    output: DataStreamAudioOutput,
    told: _Ledger,
    viewer: Viewer,
    push: Callable[[Int16], Awaitable[None]],
    seconds: float,
) -> dict[str, Any]:
    before, since = len(told.finished), time.monotonic()
    await viewer.buffering()
    await push(_beeps(seconds))
    output.flush()
    await told.until(before + 1, seconds + 10)
    added = await viewer.buffering()
    offsets = [value for when, value in viewer.offsets() if when > since]
    if not offsets:
        return {"sync": "no flash was seen"}
    half = len(offsets) // 2
    drift = float(np.median(offsets[half:]) - np.median(offsets[:half])) if half else 0.0
    return {
        "sync_seen": _ms(offsets),
        "sync_at_source": round((float(np.median(offsets)) - (added or 0.0)) * 1000, 1),
        "sync_drift": round(drift * 1000, 1),
    }


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


def _ms(values: list[float]) -> float | None:
    return round(float(np.median(values)) * 1000, 1) if values else None


def _tone(seconds: float) -> Int16:
    times = np.arange(round(seconds * RATE)) / RATE
    return (np.sin(2 * np.pi * 800 * times) * 14_000).astype(np.int16)


def _beeps(seconds: float) -> Int16:
    times = np.arange(round(seconds * RATE)) / RATE
    loud = (times + 0.48) % 0.64 < 0.16
    return (np.sin(2 * np.pi * 1000 * times) * loud * 16_000).astype(np.int16)


# --- the avatars ----------------------------------------------------------------------------------


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
async def _runner(access: LiveKitServer, room: str) -> AsyncIterator[None]:
    """LiveKit's `AvatarRunner`, as its examples use it."""
    async with _joined(access, room, AVATAR) as joined:
        receiver = DataStreamAudioReceiver(joined, sender_identity="conformance-agent")
        runner = AvatarRunner(
            joined,
            audio_recv=receiver,
            video_gen=_Flash(),
            options=AvatarOptions(WIDTH, HEIGHT, FPS, RATE, 1),
        )
        starting = asyncio.create_task(runner.start(), name="conformance-runner")
        try:
            yield
        finally:
            if not starting.done():
                starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await runner.aclose()


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
                item = await asyncio.wait_for(self._queue.get(), 0.5 / FPS)
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
