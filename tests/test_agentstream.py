"""The playback contract over the wire, with LiveKit's own sender at the other end."""

from __future__ import annotations

import asyncio
import random
import time
import types
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from livekit import rtc
from livekit.agents.voice.avatar import DataStreamAudioOutput

from voipavatar.agentstream import (
    AGENT_STATE,
    AUDIO_TOPIC,
    CLEAR_BUFFER,
    GESTURE,
    PLAYBACK_FINISHED,
    PLAYBACK_STARTED,
    POSE,
    AgentStream,
    Pcm,
)
from voipavatar.config import Persona, Settings
from voipavatar.errors import InputError
from voipavatar.livekit_server import LiveKitServer
from voipavatar.mouthpiece import Segment, Wire, unanswer
from voipavatar.room import RoomOptions
from voipavatar.session import Session, Studio

from .scripted import Joined, frames, tone

CLAPPER = Persona(name="clapper", engine="clapper", width=320, height=180)
AVATAR = "face"


def test_bytes_become_samples_however_they_are_cut() -> None:
    rng = np.random.default_rng(3)
    stereo = rng.integers(-32768, 32767, 2 * 4_801).astype(np.int16)
    want = (stereo.reshape(-1, 2).astype(int).sum(axis=1) // 2).astype(np.int16)
    data = stereo.tobytes()
    pcm, got, at = Pcm(2), [], 0
    while at < len(data):
        step = int(rng.integers(1, 999))
        got.append(pcm.push(data[at : at + step]))
        at += step
    assert np.array_equal(np.concatenate(got), want)


@asynccontextmanager
async def avatar(
    livekit: LiveKitServer, room: str, agent: str = "agent", **more: Any
) -> AsyncIterator[tuple[Session, AgentStream]]:
    """An avatar that listens to an agent."""
    stream = AgentStream(agent=agent, **more)
    options = RoomOptions(
        livekit.url,
        room,
        livekit.api_key,
        livekit.api_secret,
        identity=AVATAR,
        guests=(stream,),
    )
    async with Studio(Settings.from_env({})) as studio:
        session = await studio.open(CLAPPER, room=options)
        stream.open_turn = session.open_turn
        try:
            yield session, stream
        finally:
            await stream.aclose()


@dataclass
class Ledger:
    """What an agent was told, and when."""

    started: list[float] = field(default_factory=list)
    finished: list[tuple[float, bool]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def listen(self, output: DataStreamAudioOutput) -> Ledger:
        output.on("playback_started", lambda event: self.started.append(time.monotonic()))
        output.on("playback_finished", self._finished)
        return self

    def _finished(self, event: Any) -> None:
        self.finished.append((event.playback_position, event.interrupted))
        self.times.append(time.monotonic())

    async def until(self, count: int, limit: float = 10.0) -> None:
        end = time.monotonic() + limit
        while len(self.finished) < count:
            assert time.monotonic() < end, f"{len(self.finished)} of {count} ends were told"
            await asyncio.sleep(0.01)


def sender(room: rtc.Room) -> DataStreamAudioOutput:
    return DataStreamAudioOutput(
        room,
        destination_identity=AVATAR,
        wait_remote_track=rtc.TrackKind.KIND_VIDEO,
        wait_playback_start=True,
    )


async def push(output: DataStreamAudioOutput, seconds: float, rate: int = 24_000) -> None:
    async for frame in frames(tone(seconds, rate), rate):
        await output.capture_frame(frame)


def new_room(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:6]}"


@pytest.mark.server
async def test_segments_end_once_and_in_order(livekit: LiveKitServer) -> None:
    name = new_room("order")
    async with avatar(livekit, name) as (_, stream), Joined(livekit, name) as room:
        output = sender(room)
        told = Ledger().listen(output)
        for seconds in (0.4, 0.0, 0.2, 0.61):
            if seconds:
                await push(output, seconds)
            else:  # a stream without a sample
                await output.capture_frame(rtc.AudioFrame(b"", 24_000, 1, 0))
            output.flush()
        await told.until(4)
        assert [interrupted for _, interrupted in told.finished] == [False] * 4
        heard = [round(position, 3) for position, _ in told.finished]
        assert heard == [0.4, 0.0, 0.2, 0.61]
        assert len(told.started) == 3, "what has no sound is not heard"
        await asyncio.sleep(0.3)
        assert len(told.finished) == 4 and stream.agent == "agent"


@pytest.mark.server
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (48_000, 1), (16_000, 2)])
async def test_any_rate_and_channel_count(livekit: LiveKitServer, rate: int, channels: int) -> None:
    name = new_room("rates")
    async with avatar(livekit, name), Joined(livekit, name) as room:
        output = sender(room)
        told = Ledger().listen(output)
        pcm = np.repeat(tone(0.5, rate), channels)
        async for frame in frames(pcm, rate, channels):
            await output.capture_frame(frame)
        output.flush()
        await told.until(1)
        assert told.finished[0][0] == pytest.approx(0.5, abs=0.002)


@pytest.mark.server
async def test_a_clear_is_answered_in_every_state(livekit: LiveKitServer) -> None:
    name = new_room("clear")
    async with avatar(livekit, name) as (session, _), Joined(livekit, name) as room:
        output = sender(room)
        told = Ledger().listen(output)
        await push(output, 0.1)
        output.flush()
        await told.until(1)
        rng = random.Random(5)
        waits = []
        for i in range(12):
            await push(output, 3.0)
            if i % 2:
                output.flush()
            await asyncio.sleep(rng.choice((0.0, 0.0, 0.01, 0.05, 0.3)))
            begin = time.monotonic()
            output.clear_buffer()
            output.clear_buffer()
            if not i % 2:
                output.flush()
            await told.until(i + 2)
            waits.append(told.times[-1] - begin)
            assert told.finished[-1][1]
        print(f"clear to report: median {np.median(waits) * 1000:.0f} ms, worst {max(waits):.3f} s")
        assert max(waits) < 1.5, "the two-second fall-back was taken"
        # Two waiting at once, cleared together, and the one on air has the position.
        await push(output, 2.0)
        output.flush()
        await push(output, 1.0)
        output.flush()
        await asyncio.sleep(0.6)
        output.clear_buffer()
        await told.until(15)
        assert told.finished[-2][0] > 0.2 and told.finished[-1] == (0.0, True)
        assert session.stage.backlog == 0


@pytest.mark.server
async def test_a_lost_end_is_assumed(livekit: LiveKitServer) -> None:
    name = new_room("lost")
    async with avatar(livekit, name, idle=0.5) as (_, stream), Joined(livekit, name) as room:
        reports: list[tuple[str, str]] = []
        _collect(room, reports)
        for _ in range(2):  # the second supersedes the first, whose end never comes
            writer = await _open(room)
            await writer.write(tone(0.3).tobytes())
            await asyncio.sleep(0.05)
        end = time.monotonic() + 8
        while _count(reports) < 2 and time.monotonic() < end:
            await asyncio.sleep(0.05)
        assert _count(reports) == 2 and stream.lost_ends == 2
        assert all('"interrupted": false' in payload for method, payload in reports if payload)


@pytest.mark.server
async def test_a_clear_ahead_of_its_segment(livekit: LiveKitServer) -> None:
    """RPC and streams have no order between them: a clear may come before what it is meant for."""
    name = new_room("ahead")
    async with avatar(livekit, name) as (session, _), Joined(livekit, name) as room:
        reports: list[tuple[str, str]] = []
        _collect(room, reports, delay=0.5)  # the answer is still on its way when the stream comes
        await asyncio.sleep(0.3)
        answer = await room.local_participant.perform_rpc(
            destination_identity=AVATAR, method=CLEAR_BUFFER, payload=""
        )
        assert answer == "ok"
        writer = await _open(room)
        await writer.write(tone(0.5).tobytes())
        await writer.aclose()
        await asyncio.sleep(1.0)
        assert _count(reports) == 1 and session.state == "idle"
        writer = await _open(room)  # and the next one is spoken
        await writer.write(tone(0.2).tobytes())
        await writer.aclose()
        await asyncio.sleep(1.5)
        assert _count(reports) == 2


@pytest.mark.server
async def test_an_agent_that_comes_back_as_another(livekit: LiveKitServer) -> None:
    name = new_room("again")
    heard_of: list[str] = []
    async with avatar(livekit, name, "", on_agent=heard_of.append) as (session, _):
        async with Joined(livekit, name, "first") as room:
            output = sender(room)
            told = Ledger().listen(output)
            await push(output, 0.2)
            output.flush()
            await told.until(1)
            async with Joined(livekit, name, "person", "standard") as other:
                writer = await _open(other)
                await writer.write(tone(0.3).tobytes())
                await writer.aclose()
                await asyncio.sleep(3.0)  # until the avatar has been told who that is
            assert session.stage.counters.turns == 1, "a person is never spoken for"
            await push(output, 5.0)  # and it goes in the middle of a segment
        async with Joined(livekit, name, "second") as room:
            begin = time.monotonic()
            output = sender(room)
            told = Ledger().listen(output)
            await session.interrupt()
            await push(output, 0.2)
            output.flush()
            await told.until(1, 8.0)
            print(f"heard again {time.monotonic() - begin:.2f} s after it came")
        assert heard_of == ["first", "second"]


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_two_hundred_interruptions(livekit: LiveKitServer) -> None:
    """At random moments, the first before anything was read: no two-second fall-back is taken."""
    name = new_room("hundreds")
    rng = random.Random(11)
    async with avatar(livekit, name) as (session, _), Joined(livekit, name) as room:
        output = sender(room)
        told = Ledger().listen(output)
        waits, errors = [], []
        for i in range(200):
            await push(output, 2.0)
            if rng.random() < 0.5:
                output.flush()
            await asyncio.sleep(rng.choice((0.0, 0.0, 0.002, 0.02, 0.1, 0.25)))
            begin = time.monotonic()
            output.clear_buffer()
            output.flush()
            await told.until(i + 1)
            waits.append(told.times[-1] - begin)
            position, interrupted = told.finished[-1]
            assert interrupted
            if position:
                began = told.started[-1]
                errors.append(abs(position - (begin - began)))
        print(
            f"clear to report: median {np.median(waits) * 1000:.1f} ms, p95 "
            f"{np.percentile(waits, 95) * 1000:.1f}, worst {max(waits) * 1000:.0f}; position "
            f"against started: median {np.median(errors) * 1000:.0f} ms"
        )
        assert max(waits) < 1.8, "the two-second fall-back was taken"
        assert len(told.finished) == 200
        await push(output, 0.3)
        output.flush()
        await told.until(201)
        position, interrupted = told.finished[-1]
        assert position == pytest.approx(0.3, abs=0.001) and not interrupted


async def _open(room: rtc.Room) -> rtc.ByteStreamWriter:
    return await room.local_participant.stream_bytes(
        name="AUDIO_test",
        topic=AUDIO_TOPIC,
        destination_identities=[AVATAR],
        attributes={"sample_rate": "24000", "num_channels": "1"},
    )


def _collect(room: rtc.Room, reports: list[tuple[str, str]], delay: float = 0.0) -> None:
    async def note(call: rtc.RpcInvocationData) -> str:
        reports.append((call.method, call.payload))
        await asyncio.sleep(delay)
        return "ok"

    for method in (PLAYBACK_STARTED, PLAYBACK_FINISHED):
        room.local_participant.register_rpc_method(method, note)


def _count(reports: list[tuple[str, str]]) -> int:
    return sum(method == PLAYBACK_FINISHED for method, _ in reports)


async def test_the_agents_state_poses_the_face(livekit: LiveKitServer) -> None:
    """LiveKit's own attribute, and in its place the one that tells of the user's turn too."""
    room = f"pose-{uuid.uuid4().hex[:6]}"
    told: list[str] = []

    def gesture(name: str) -> None:
        if name != "nod":
            raise InputError("there is no such gesture")
        told.append(name)

    async with avatar(livekit, room, on_pose=told.append, on_gesture=gesture) as _:
        async with Joined(livekit, room) as agent, Joined(livekit, room, "guest") as guest:

            async def ask(name: str, by: rtc.Room = agent) -> str:
                return await by.local_participant.perform_rpc(
                    destination_identity=AVATAR, method=GESTURE, payload=name
                )

            async def until(count: int) -> None:
                for _ in range(250):
                    if len(told) >= count:
                        return
                    await asyncio.sleep(0.02)
                raise AssertionError(told)

            me = agent.local_participant
            for count, attributes in enumerate(
                (
                    {AGENT_STATE: "thinking"},
                    {AGENT_STATE: "speaking"},
                    {AGENT_STATE: "listening"},
                    {POSE: "listening"},
                    {POSE: "thinking", AGENT_STATE: "speaking"},
                ),
                1,
            ):
                await me.set_attributes(attributes)
                await until(count)
            assert told == ["thinking", "", "attentive", "listening", "thinking"]
            assert await ask("nod") == "ok" and told[-1] == "nod"
            with pytest.raises(rtc.RpcError, match="no such gesture"):
                await ask("jump")
            await guest.local_participant.set_attributes({POSE: "listening"})
            await asyncio.sleep(0.3)
            assert told[-1] == "nod", "whoever else is there is no agent"


@pytest.mark.server
async def test_what_it_answers_is_taken_back_when_it_leaves(livekit: LiveKitServer) -> None:
    """The native library keeps a whole connection for a method that is not."""

    async def persona(name: str) -> None: ...

    async def leave() -> None: ...

    stream = AgentStream(on_persona=persona, on_leave=leave, on_gesture=lambda name: None)
    async with Joined(livekit, f"left-{uuid.uuid4().hex[:6]}", AVATAR) as room:
        methods = room.local_participant._rpc_handlers
        stream.entering(room)
        stream.entered(room)
        assert len(methods) == 5
        stream.left()
        assert not methods
    await stream.aclose()


@pytest.mark.server
async def test_the_last_wire_gives_the_reports_back(livekit: LiveKitServer) -> None:
    """To whoever had them before."""
    async with Joined(livekit, f"wires-{uuid.uuid4().hex[:6]}") as room:
        methods = room.local_participant._rpc_handlers
        for before in (False, True):
            if before:
                _collect(room, [])
            were = dict(methods)
            wires = [Wire(room, "one"), Wire(room, "two")]
            mine = dict(methods)
            await wires[0].aclose()
            unanswer(room)
            assert methods == mine != were, "the other avatar still reports"
            await wires[1].aclose()
            unanswer(room)
            assert methods == were


async def test_what_was_cut_before_it_got_out_was_not_said_whole() -> None:
    """The avatar is sent an empty stream then, and tells that it has said all of it."""
    opening = asyncio.Event()

    class Participant:
        def register_rpc_method(self, *_: Any) -> None: ...

        async def stream_bytes(self, **_: Any) -> Any:
            await opening.wait()
            return types.SimpleNamespace(aclose=asyncio.Event().wait)

    room: Any = types.SimpleNamespace(local_participant=Participant())
    wire = Wire(room, "avatar")
    segment = Segment(lambda: None, lambda segment: None)
    frame = rtc.AudioFrame(bytes(1920), 24_000, 1, 960)
    pushing = asyncio.create_task(wire.push(segment, frame))
    await asyncio.sleep(0.01)
    pushing.cancel()
    await asyncio.wait([pushing])
    wire.flush(segment)
    opening.set()
    await asyncio.sleep(0.01)
    wire._told_finished(0.0, interrupted=False)
    assert segment.over and segment.heard == 0.0 and segment.interrupted
    await wire.aclose()
