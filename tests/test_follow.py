"""A face for a participant's own voice."""

from __future__ import annotations

import asyncio
import time
import uuid

import numpy as np
import pytest
from livekit import rtc

from voipavatar.agentstream import Turn
from voipavatar.config import Settings, load_persona
from voipavatar.follow import FRAME, RATE, Follow, Gate
from voipavatar.livekit_server import LiveKitServer
from voipavatar.media import ENGINE_RATE
from voipavatar.room import RoomOptions
from voipavatar.session import Studio
from voipavatar.viewer import Viewer

from .scripted import Joined, tone


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


BUFFERS = 0.5
"""Seconds, generous: two frames until the gate is sure and 0.06 s of what came before, two pictures
at 25 a second until the stage begins, four drawn ahead, 0.05 s in the sink, and the listener's own
jitter buffer."""


@pytest.mark.server
@pytest.mark.parametrize("name", ["clapper", "default"])
async def test_the_avatar_says_what_a_participant_says(livekit: LiveKitServer, name: str) -> None:
    """Behind by what its engine looks ahead and the buffers on the way, and not more with time."""
    persona = load_persona(name).model_copy(update={"width": 320, "height": 180})
    place = f"follow-{uuid.uuid4().hex[:6]}"
    follow = Follow("caller")
    options = RoomOptions(livekit.url, place, livekit.api_key, livekit.api_secret, guests=(follow,))
    script = ((1.0, 3.0), (1.5, 0.6))  # seconds of silence, and of a tone after it
    async with Studio(Settings.from_env()) as studio, Joined(livekit, place, "caller") as room:
        session = await studio.open(persona, room=options)
        turns: list[Turn] = []

        def open_turn() -> Turn:
            turns.append(session.open_turn())
            return turns[-1]

        follow.open_turn = open_turn
        source = rtc.AudioSource(RATE, 1, queue_size_ms=200)
        track = rtc.LocalAudioTrack.create_audio_track("mic", source)
        await room.local_participant.publish_track(
            track, rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
        )
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
            pcm = np.concatenate([*pieces, np.zeros(RATE, np.int16)])
            for at in range(0, len(pcm), RATE // 50):
                piece = pcm[at : at + RATE // 50]
                await source.capture_frame(rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece)))
            # The last turn is over by silence alone: the track goes on.
            await asyncio.wait_for(turns[-1].finished, 5)
            over = time.monotonic()
            await asyncio.sleep(0.5)
            said, heard = (one.loud_spans(gap=0.3) for one in (caller, seen))
            flashes = [end - begin for begin, end in seen.flashes()]
            said_at = caller.when([edge for span in said for edge in span])
            heard_at = seen.when([edge for span in heard for edge in span])
        assert follow.turns == len(said) == len(heard) == 2
        delays = [after - before for before, after in zip(said_at, heard_at, strict=True)]
        ahead = session.stage.engine.spec.lookahead / ENGINE_RATE
        print(
            f"{name}: {ahead * 1000:.0f} ms looked ahead; heard after "
            + ", ".join(f"{delay * 1000:.0f}" for delay in delays)
            + f" ms; over {(over - heard_at[-1]) * 1000:.0f} ms after its last sound"
        )
        # Begin and end of both: neither more than that, nor growing while it is said.
        assert all(0.0 < delay <= ahead + BUFFERS for delay in delays)
        assert max(abs(delays[1] - delays[0]), abs(delays[3] - delays[2])) <= 0.15
        if name == "clapper":
            assert flashes == [pytest.approx(loud, abs=0.2) for _, loud in script]
        # Ended by silence, which was 0.6 s long.
        assert all(not turn.finished.result().interrupted for turn in turns)
        assert 0.3 < over - heard_at[-1] < 0.6 + BUFFERS
        assert session.state == "idle"
        await follow.aclose()
        await source.aclose()
