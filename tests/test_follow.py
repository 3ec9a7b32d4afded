"""A face for a participant's own voice."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from livekit import api, rtc

from voipavatar.agentstream import Turn
from voipavatar.config import Settings, load_persona
from voipavatar.follow import FRAME, RATE, Follow, Gate
from voipavatar.livekit_server import LiveKitServer
from voipavatar.media import ENGINE_RATE, Int16
from voipavatar.room import RoomOptions
from voipavatar.session import Studio
from voipavatar.viewer import Viewer

from .scripted import Joined, tone
from .test_worker import unique, working


def test_the_gate_cuts_at_silence_and_keeps_every_sample_of_speech() -> None:
    rng = np.random.default_rng(1)
    pcm = (rng.standard_normal(8 * RATE) * 30).astype(np.int16)  # a quiet room
    for begin, end in ((1.0, 2.5), (2.8, 3.5), (5.0, 6.2)):  # the first pause is only a breath
        pcm[int(begin * RATE) : int(end * RATE)] += tone(end - begin, RATE) // 4
    gate, turns = Gate(), []
    step = int(FRAME * RATE)
    for at in range(0, len(pcm), step):
        for kind, sound in gate.push(pcm[at : at + step]):
            if kind == "begin":
                turns.append([sound])
            elif kind == "sound":
                turns[-1].append(sound)
    lengths = [sum(map(len, turn)) / RATE for turn in turns]
    assert lengths == [pytest.approx(2.5 + 0.6 + 0.06, abs=0.08), pytest.approx(1.86, abs=0.08)]


def test_the_gate_gets_used_to_noise() -> None:
    rng = np.random.default_rng(2)
    gate, begun = Gate(), 0
    for _ in range(500):
        noise = (rng.standard_normal(int(FRAME * RATE)) * 80).astype(np.int16)
        begun += sum(kind == "begin" for kind, _ in gate.push(noise))
    assert begun == 0


BUFFERS = 0.4
"""Seconds beyond what the engine looks ahead: two frames until the gate is sure and 0.06 s of what
came before, two pictures at 25 a second until the stage begins, 0.05 s in the sink, and two jitter
buffers, the avatar's and the listener's. They grow where the machine is busy."""
BUSY = 1.0
"""The same where other work holds it."""


@pytest.mark.server
@pytest.mark.parametrize("name", ["clapper", "default"])
async def test_the_avatar_says_what_a_participant_says(livekit: LiveKitServer, name: str) -> None:
    """Behind by what its engine looks ahead and the buffers on the way, and not more with time."""
    persona = load_persona(name).model_copy(update={"width": 320, "height": 180})
    place = f"follow-{uuid.uuid4().hex[:6]}"
    follow = Follow("caller")
    options = RoomOptions(livekit.url, place, livekit.api_key, livekit.api_secret, guests=(follow,))
    # Seconds of silence, and of a tone after it.
    script = ((1.0, 2.0), (2.5, 0.6), (2.5, 0.6))
    async with Studio(Settings.from_env()) as studio, Joined(livekit, place, "caller") as room:
        session = await studio.open(persona, room=options)
        turns: list[Turn] = []

        def open_turn() -> Turn:
            turns.append(session.open_turn())
            return turns[-1]

        follow.open_turn = open_turn
        source = await microphone(room)
        keys = (livekit.url, place, livekit.api_key, livekit.api_secret)
        async with (
            Viewer(*keys) as seen,
            Viewer(*keys, identity="other", publisher="caller") as caller,
        ):
            await seen.wait()
            pieces = [
                part
                for quiet, loud in script
                for part in (np.zeros(round(quiet * RATE), np.int16), tone(loud, RATE))
            ]
            await spoken(source, np.concatenate([*pieces, np.zeros(RATE, np.int16)]))
            # The last turn is over by silence alone: the track goes on.
            await asyncio.wait_for(turns[-1].finished, 5)
            over = time.monotonic()
            await asyncio.sleep(0.5)
            said, heard = (one.loud_spans(gap=1.2) for one in (caller, seen))
            flashes = [end - begin for begin, end in seen.flashes()]
            said_at = caller.when([edge for span in said for edge in span])
            heard_at = seen.when([edge for span in heard for edge in span])
        assert follow.turns == len(said) == len(heard) == len(script)
        delays = [after - before for before, after in zip(said_at, heard_at, strict=True)]
        ahead = session.stage.engine.spec.lookahead / ENGINE_RATE
        print(
            f"{name}: {ahead * 1000:.0f} ms looked ahead; heard after "
            + ", ".join(f"{delay * 1000:.0f}" for delay in delays)
            + f" ms; over {(over - heard_at[-1]) * 1000:.0f} ms after its last sound"
        )
        begun, ended = delays[::2], delays[1::2]
        assert min(begun) <= ahead + BUFFERS
        # Begin and end of each: neither more than that, nor growing while it is said.
        assert all(0.0 < delay <= ahead + BUSY for delay in delays)
        assert all(abs(end - begin) <= 0.5 for begin, end in zip(begun, ended, strict=True))
        if name == "clapper":
            assert flashes == [pytest.approx(loud, abs=0.2) for _, loud in script]
        # Ended by silence, which was 0.6 s long.
        assert all(not turn.finished.result().interrupted for turn in turns)
        assert over - heard_at[-1] < 0.6 + BUSY
        assert session.state == "idle"
        await follow.aclose()
        await source.aclose()


async def microphone(room: rtc.Room) -> rtc.AudioSource:
    """Published; what is captured by it is heard."""
    source = rtc.AudioSource(RATE, 1, queue_size_ms=200)
    track = rtc.LocalAudioTrack.create_audio_track("mic", source)
    # A steady tone is no noise to be left out.
    options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE, dtx=False)
    await room.local_participant.publish_track(track, options)
    return source


async def spoken(source: rtc.AudioSource, pcm: Int16) -> None:
    """As long as it takes to say it."""
    for at in range(0, len(pcm), RATE // 50):
        piece = pcm[at : at + RATE // 50]
        await source.capture_frame(rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece)))


@asynccontextmanager
async def calling(livekit: LiveKitServer, place: str) -> AsyncIterator[rtc.AudioSource]:
    """A caller's line: a participant as LiveKit's SIP bridge makes them."""
    async with Joined(livekit, place, "caller", "sip") as room:
        source = await microphone(room)
        try:
            yield source
        finally:
            await source.aclose()


@pytest.mark.server
async def test_a_worker_gives_a_caller_a_face_for_as_long_as_there_is_a_call(
    livekit: LiveKitServer,
) -> None:
    """Who hangs up and calls again finds the same avatar; when nobody does, it leaves."""
    name, place, grace = unique("calls"), unique("call"), 4.0
    quiet, words = np.zeros(RATE, np.int16), tone(1.0, RATE)
    where = (livekit.url, place, livekit.api_key, livekit.api_secret)
    async with (
        working(livekit, name, grace=grace) as worker,
        Viewer(*where) as seen,
        api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk,
    ):
        sids: list[str] = []
        async with calling(livekit, place) as source:
            await lk.agent_dispatch.create_dispatch(
                api.CreateAgentDispatchRequest(
                    agent_name=name, room=place, metadata=json.dumps({"follow": "caller"})
                )
            )
            await seen.wait(20)
            people = seen.room.remote_participants
            assert people["caller"].kind == rtc.ParticipantKind.PARTICIPANT_KIND_SIP
            sids.append(people["voipavatar"].sid)
            await spoken(source, np.concatenate([quiet, words, quiet, quiet]))
        assert [length(span) for span in seen.loud_spans(gap=0.5)] == [pytest.approx(1.0, abs=0.1)]
        await asyncio.sleep(grace / 2)
        async with calling(livekit, place) as source:
            await spoken(source, np.concatenate([quiet, words, quiet, quiet]))
            sids.append(people["voipavatar"].sid)
            # In the middle of a word.
            await spoken(source, words)
        hung_up = time.monotonic()
        lengths = [length(span) for span in seen.loud_spans(gap=0.5)]
        assert lengths[:2] == [pytest.approx(1.0, abs=0.1)] * 2 and sids[0] == sids[1]
        while worker.health()["taken"]:
            assert time.monotonic() - hung_up < grace + 5.0, "it stayed though nobody calls"
            await asyncio.sleep(0.05)
        left = time.monotonic() - hung_up
        each = ", ".join(f"{one:.2f}" for one in lengths)
        print(f"heard {each} s; it left {left:.1f} s after the call")
        assert left > grace - 0.5, "who calls again would find nobody"
        assert "voipavatar" not in people


def length(span: tuple[int, int]) -> float:
    """Seconds."""
    return (span[1] - span[0]) / RATE
