"""The agent's one audio output: every segment ends once, whatever becomes of what is behind it."""

from __future__ import annotations

import asyncio
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
from livekit import api, rtc
from livekit.agents.voice.io import AudioOutput, AudioOutputCapabilities, PlaybackFinishedEvent
from livekit.rtc.participant import PublishTrackError

from voipavatar import mouthpiece as module
from voipavatar.livekit_server import LiveKitServer
from voipavatar.mouthpiece import Mouthpiece, Segment, VoiceOnly, Wire
from voipavatar.plugin import AvatarSession, VoipAvatarException
from voipavatar.session import Played

from .conftest import MakeLiveKit
from .scripted import Joined, Plain, agent_session, frames, said, tone
from .test_agentstream import AVATAR
from .test_agentstream import avatar as listening
from .test_plugin import CLAPPER, keys, local, new_room, until, viewer
from .test_worker import talking, unique, working


class Above(AudioOutput):
    """What LiveKit puts on top: it counts a segment before it hands its sound on."""

    def __init__(self, below: AudioOutput) -> None:
        super().__init__(
            label="above", capabilities=AudioOutputCapabilities(pause=False), next_in_chain=below
        )
        self.ends: list[PlaybackFinishedEvent] = []
        self.on("playback_finished", self.ends.append)

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        await super().capture_frame(frame)
        assert self.next_in_chain is not None
        await self.next_in_chain.capture_frame(frame)

    def flush(self) -> None:
        super().flush()
        assert self.next_in_chain is not None
        self.next_in_chain.flush()

    def clear_buffer(self) -> None:
        assert self.next_in_chain is not None
        self.next_in_chain.clear_buffer()


class Route:
    """Takes everything and tells nothing by itself."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.cleared = 0

    async def push(self, segment: Segment, frame: rtc.AudioFrame) -> None:
        if segment not in self.segments:
            self.segments.append(segment)

    def flush(self, segment: Segment) -> None: ...

    def clear(self) -> None:
        self.cleared += 1

    async def aclose(self) -> None: ...


class Turn:
    """What `Session.open_turn` gives, of a session that says nothing."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.started: asyncio.Future[float | None] = loop.create_future()
        self.finished: asyncio.Future[Any] = loop.create_future()
        self.heard = 0.0
        self.backlog = 0.0

    def push(self, pcm: Any, rate: int) -> None: ...

    def end(self) -> None: ...

    def cancel(self) -> None: ...


def frame(seconds: float = 0.02) -> rtc.AudioFrame:
    samples = round(seconds * 24_000)
    return rtc.AudioFrame(bytes(2 * samples), 24_000, 1, samples)


# --- interrupted at odd moments -------------------------------------------------------------------


async def test_interrupted_while_the_avatar_is_on_its_way() -> None:
    """Whoever counted the segment hears of its end, and the next one's is not mistaken for it."""
    output = Mouthpiece(patience=30.0)
    above = Above(output)
    for _ in range(2):
        pushing = asyncio.create_task(above.capture_frame(frame()))
        await asyncio.sleep(0.02)
        pushing.cancel()
        await asyncio.wait([pushing])
        above.flush()
        above.clear_buffer()
        end = await asyncio.wait_for(above.wait_for_playout(), 1)
        assert end.interrupted and end.playback_position == 0.0
    route = Route()
    output.use(route)
    await above.capture_frame(frame(0.5))
    above.flush()
    playout = asyncio.create_task(above.wait_for_playout())
    await asyncio.sleep(0.02)
    assert not playout.done() and len(route.segments) == 1
    route.segments[0].finished(0.5, interrupted=False)
    end = await asyncio.wait_for(playout, 1)
    assert not end.interrupted and end.playback_position == 0.5
    assert len(above.ends) == 3 and not output.pending


async def test_silence_for_what_is_over_and_for_what_nobody_has_yet() -> None:
    """A segment that is over stays in line behind one that isn't, and belongs to nobody."""
    output = Mouthpiece(patience=30.0)
    above = Above(output)
    route = Route()
    output.use(route)
    for _ in range(2):
        await above.capture_frame(frame())
        above.flush()
    first, second = route.segments
    second.finished(0.0, interrupted=True)
    assert len(above.ends) == 0, "in order"
    above.clear_buffer()
    assert route.cleared == 1 and first.cleared
    first.finished(0.01, interrupted=True)
    assert [end.playback_position for end in above.ends] == [0.01, 0.0]


@pytest.mark.server
@pytest.mark.slow
async def test_barge_in_before_the_avatar_has_come(livekit: LiveKitServer) -> None:
    """With everything that LiveKit puts on top: nothing hangs then, nor later on."""
    name, room_name = unique("early"), unique("room")
    async with talking(livekit, room_name, name) as (session, avatar, _):
        for _ in range(3):
            handle = session.say("one two three")
            await asyncio.sleep(0.4)
            session.interrupt(force=True)
            begin = time.monotonic()
            await asyncio.wait_for(handle.wait_for_playout(), 10)
            assert time.monotonic() - begin < 2.0, "LiveKit itself gave up waiting, after five"
        async with working(livekit, name, drain=1.0):
            await avatar.wait_for_join(timeout=30)
            for _ in range(2):
                begin = time.monotonic()
                handle = await said(session, "one two", limit=6)
                assert not handle.interrupted and time.monotonic() - begin >= 0.4


# --- what was heard -------------------------------------------------------------------------------


async def test_a_voice_that_waited_was_not_heard_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of sound, three of none, and the avatar is lost half a second later."""
    now = [100.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr(module, "time", clock)
    segment = Segment(lambda: None, lambda segment: None)
    for _ in range(25):
        segment.keep(frame())
    segment.started()
    now[0] += 3.5
    for _ in range(50):
        segment.keep(frame())
    now[0] += module.RESUMES + 0.5
    assert module._heard(segment, None) == pytest.approx(1.0, abs=0.03)
    assert module._heard(segment, now[0] - 0.2) == pytest.approx(0.8, abs=0.03)
    segment.flushed = True
    over = now[0] + 0.5
    now[0] += 60.0
    assert module._heard(segment, None) == pytest.approx(1.5), "no more than there was"
    # Lost before its end, and that was noticed long after it.
    assert module._heard(segment, over - 0.3) == pytest.approx(1.2, abs=0.03)
    # Another route goes on with it: what was played before is not counted again.
    segment.resume_at(1.0)
    assert module._heard(segment, None) == 0.0
    segment.started()
    now[0] += 0.2
    assert module._heard(segment, None) == pytest.approx(0.2, abs=0.01)


def test_a_segment_keeps_its_latest_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 1.0)
    segment = Segment(lambda: None, lambda segment: None)
    for _ in range(150):
        segment.keep(frame())
    assert segment.length == pytest.approx(3.0)
    kept = sum(one.duration for one in segment.frames)
    assert kept == pytest.approx(1.0, abs=0.03)
    rest = segment.rest(2.5)
    assert sum(one.duration for one in rest) == pytest.approx(0.5, abs=0.001)


async def test_an_avatar_that_is_ending_leaves_its_sentence_to_the_next() -> None:
    """But what was to be silent is over with it."""
    turns: list[Turn] = []
    ending = False

    def open_turn() -> Turn:
        turns.append(Turn())
        return turns[-1]

    output = Mouthpiece(patience=1.0)
    above = Above(output)
    output.use(module.Direct(open_turn, lambda: ending))
    await above.capture_frame(frame(1.0))
    turns[0].started.set_result(time.monotonic())
    await asyncio.sleep(0.05)
    ending = True
    turns[0].finished.set_result(Played(0.04, True))
    await above.capture_frame(frame(0.5))  # neither refused nor lost
    above.flush()
    await asyncio.sleep(0.01)
    [segment] = output.pending
    assert not above.ends and len(turns) == 1

    class Voice(Route):
        def __init__(self) -> None:
            super().__init__()
            self.seconds = 0.0
            self.flushed = 0

        def put(self, segment: Segment, frame: rtc.AudioFrame | None) -> None:
            self.seconds += frame.duration if frame is not None else 0.0

        def flush(self, segment: Segment) -> None:
            self.flushed += 1

    voice: Any = Voice()
    output.take_over(voice)
    assert voice.seconds == pytest.approx(1.46, abs=0.005) and voice.flushed == 1
    segment.finished(1.46, interrupted=False)
    assert above.ends[0].playback_position == pytest.approx(1.5, abs=0.005)


@pytest.mark.server
@pytest.mark.slow
async def test_a_local_avatar_that_is_thrown_out_is_spoken_for(livekit: LiveKitServer) -> None:
    """In mid-sentence: the agent says the rest itself."""
    name = new_room("thrown")
    async with local(livekit, name) as (session, avatar, room):
        await avatar.wait_for_join(timeout=10)
        ends: list[Any] = []
        assert avatar._mouthpiece is not None
        avatar._mouthpiece.on("playback_finished", ends.append)
        async with viewer(livekit, name, publisher="agent") as seen:
            handle = session.say(" ".join(["word"] * 12))  # three seconds
            await asyncio.sleep(1.3)
            async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk:
                await lk.room.remove_participant(
                    api.RoomParticipantIdentity(room=name, identity="voipavatar")
                )
            await asyncio.wait_for(handle.wait_for_playout(), 15)
            assert not handle.interrupted and not ends[0].interrupted and not avatar.joined
            assert ends[0].playback_position == pytest.approx(3.0, abs=0.1)
            await asyncio.sleep(0.5)
            loud = sum(last - first for first, last in seen.loud_spans()) / 48_000
            assert 1.0 <= loud <= 2.6, "the rest, and no more than that"
            assert len(room.local_participant.track_publications) == 1


# --- ends that are told late, or not at all -------------------------------------------------------


@pytest.mark.server
async def test_an_end_that_came_too_late_is_not_taken_for_the_next_ones(
    livekit: LiveKitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The avatar says something else first, for longer than the agent waits."""
    monkeypatch.setattr(module, "UNHEARD", 0.5)
    name = new_room("late")
    async with Joined(livekit, name) as room, listening(livekit, name) as (session, _):
        wire = Wire(room, AVATAR)
        output = Mouthpiece(patience=5.0)
        ends: list[PlaybackFinishedEvent] = []
        output.on("playback_finished", ends.append)
        output.use(wire)
        try:
            before = session.open_turn()
            before.push(tone(2.5, 48_000), 48_000)
            before.end()
            async for one in frames(tone(0.5), 24_000):
                await output.capture_frame(one)
            output.flush()
            await until(lambda: len(ends) == 1)
            assert wire.fallbacks == 1 and not before.finished.done()
            monkeypatch.setattr(module, "UNHEARD", 20.0)
            async for one in frames(tone(1.0), 24_000):
                await output.capture_frame(one)
            output.flush()
            await asyncio.wait_for(before.finished, 10)
            begin = time.monotonic()
            await until(lambda: len(ends) == 2)
            assert time.monotonic() - begin >= 1.3, "told when the one before it was over"
            assert ends[1].playback_position == pytest.approx(1.0) and not ends[1].interrupted
            assert wire.fallbacks == 1 and not wire._segments and not wire._names
        finally:
            await wire.aclose()
            module.unanswer(room)


@pytest.mark.server
async def test_an_agent_whose_speech_is_refused_is_told(
    livekit: LiveKitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another agent is being heard out: the second one's segment is over at once, unheard."""
    monkeypatch.setattr("voipavatar.agentstream.PATIENCE", 0.5)
    name = new_room("second")
    async with (
        Joined(livekit, name) as first,
        Joined(livekit, name, "second") as second,
        listening(livekit, name),
    ):
        wires = [Wire(first, AVATAR), Wire(second, AVATAR)]
        ends: list[tuple[int, PlaybackFinishedEvent]] = []
        outputs = [Mouthpiece(patience=5.0) for _ in wires]
        for number, (output, wire) in enumerate(zip(outputs, wires, strict=True)):
            output.use(wire)
            output.on("playback_finished", lambda end, number=number: ends.append((number, end)))
        try:
            async for one in frames(tone(3.0), 24_000):
                await outputs[0].capture_frame(one)
            outputs[0].flush()
            await asyncio.sleep(0.2)
            await outputs[1].capture_frame(frame())
            outputs[1].flush()
            await until(lambda: bool(ends))
            assert ends[0][0] == 1 and ends[0][1].interrupted
            await until(lambda: len(ends) == 2)
            assert ends[1][1].playback_position == pytest.approx(3.0)
        finally:
            for room, wire in zip((first, second), wires, strict=True):
                await wire.aclose()
                module.unanswer(room)


# --- no avatar ------------------------------------------------------------------------------------


@pytest.mark.server
async def test_a_track_that_could_not_be_published_is_tried_again(
    livekit: LiveKitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Joined(livekit, new_room("mute")) as room:
        usual: Callable[..., Any] = room.local_participant.publish_track
        tried = 0

        async def once_not(*args: Any) -> Any:
            nonlocal tried
            tried += 1
            if tried == 1:
                raise PublishTrackError("not now")
            return await usual(*args)

        monkeypatch.setattr(room.local_participant, "publish_track", once_not)
        output = Mouthpiece(patience=5.0)
        ends: list[PlaybackFinishedEvent] = []
        output.on("playback_finished", ends.append)
        voice = VoiceOnly(room)
        output.use(voice)
        try:
            for number in (1, 2):
                async for one in frames(tone(0.4), 24_000):
                    await output.capture_frame(one)
                output.flush()
                while len(ends) < number:
                    await asyncio.sleep(0.02)
                assert tried == number and (voice._shown is None) == (number == 1)
            assert voice._shown is not None
            assert voice._shown.sid in room.local_participant.track_publications
        finally:
            await voice.aclose()


@pytest.mark.server
async def test_a_track_that_comes_late_is_the_only_one(
    livekit: LiveKitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Publishing waits for a connection that is away, and can't be called off."""
    monkeypatch.setattr(module, "PUBLISHED", 0.2)
    async with Joined(livekit, new_room("late")) as room:
        usual: Callable[..., Any] = room.local_participant.publish_track
        back = asyncio.Event()
        tried = 0

        async def later(*args: Any) -> Any:
            nonlocal tried
            tried += 1
            work = asyncio.ensure_future(_after(back, usual, *args))
            return await asyncio.shield(work)

        monkeypatch.setattr(room.local_participant, "publish_track", later)
        output = Mouthpiece(patience=5.0)
        ends: list[PlaybackFinishedEvent] = []
        output.on("playback_finished", ends.append)
        voice = VoiceOnly(room)
        output.use(voice)

        async def say(number: int) -> None:
            async for one in frames(tone(0.4), 24_000):
                await output.capture_frame(one)
            output.flush()
            await until(lambda: len(ends) == number)

        shown = room.local_participant.track_publications
        try:
            await say(1)
            await say(2)
            assert tried == 1 and not shown
            back.set()
            await until(lambda: voice._shown is not None)
            await say(3)
            assert tried == 1 and list(shown.values()) == [voice._shown]
            await voice.hush()
            assert not shown
            back.clear()
            await say(4)
            await voice.hush()  # the avatar is back before the track has come
            back.set()
            await until(lambda: not voice._leaving)
            assert tried == 2 and not shown, "a second voice, silent for ever"
        finally:
            back.set()
            await voice.aclose()


@pytest.mark.server
@pytest.mark.slow
async def test_a_voice_of_its_own_goes_after_the_server_was_started_anew(
    make_livekit: MakeLiveKit,
) -> None:
    """The connection comes back by itself, and has published the track under another id."""
    livekit = await make_livekit()
    place = new_room("anew")
    async with Joined(livekit, place) as room:
        back = asyncio.Event()
        room.on("reconnected", back.set)
        output = Mouthpiece(patience=5.0)
        voice = VoiceOnly(room)
        output.use(voice)
        try:
            async for one in frames(tone(0.4), 24_000):
                await output.capture_frame(one)
            output.flush()
            await until(lambda: voice._shown is not None and not output.pending)
            await livekit.restart(down=0.5)
            await asyncio.wait_for(back.wait(), 15)
            await asyncio.sleep(1.0)
            await voice.hush()
            async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk:
                who = api.RoomParticipantIdentity(room=place, identity="agent")
                assert not (await lk.room.get_participant(who)).tracks
        finally:
            await voice.aclose()


async def _after(event: asyncio.Event, work: Callable[..., Any], *args: Any) -> Any:
    await event.wait()
    return await work(*args)


@pytest.mark.server
async def test_closed_while_it_starts_leaves_nobody(livekit: LiveKitServer) -> None:
    ended = 0
    for pause in (0.0, 0.02, 0.05, 0.1):
        name = new_room("shut")
        async with Joined(livekit, name) as room:
            session = agent_session()
            avatar = AvatarSession(persona=CLAPPER, mode="local")
            starting = asyncio.create_task(avatar.start(session, room, **keys(livekit)))
            await asyncio.sleep(pause)
            await avatar.aclose()
            try:
                await asyncio.wait_for(starting, 10)
            except VoipAvatarException as error:
                assert "closed while it started" in str(error)
                assert session.output.audio is None
                ended += 1
            await session.start(Plain(), room=room, record=False)
            await asyncio.sleep(0.3)
            assert not room.remote_participants
            await session.aclose()
    assert ended >= 2
