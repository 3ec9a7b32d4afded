"""A face for a participant's own voice."""

from __future__ import annotations

import asyncio
import uuid

import numpy as np
import pytest
from livekit import rtc

from voipavatar.config import Persona, Settings
from voipavatar.follow import FRAME, RATE, Follow, Gate
from voipavatar.livekit_server import LiveKitServer
from voipavatar.room import RoomOptions
from voipavatar.session import Studio
from voipavatar.viewer import Viewer

from .scripted import Joined, tone

CLAPPER = Persona(name="clapper", engine="clapper", width=320, height=180)


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


@pytest.mark.server
async def test_the_avatar_says_what_a_participant_says(livekit: LiveKitServer) -> None:
    name = f"follow-{uuid.uuid4().hex[:6]}"
    follow = Follow("caller")
    options = RoomOptions(livekit.url, name, livekit.api_key, livekit.api_secret, guests=(follow,))
    async with Studio(Settings.from_env({})) as studio, Joined(livekit, name, "caller") as room:
        session = await studio.open(CLAPPER, room=options)
        follow.open_turn = session.open_turn
        source = rtc.AudioSource(RATE, 1, queue_size_ms=200)
        track = rtc.LocalAudioTrack.create_audio_track("mic", source)
        await room.local_participant.publish_track(
            track, rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
        )
        async with Viewer(livekit.url, name, livekit.api_key, livekit.api_secret) as seen:
            await seen.wait()
            silence = np.zeros(RATE, np.int16)
            script = np.concatenate([silence, tone(1.0, RATE), silence, tone(0.6, RATE), silence])
            for at in range(0, len(script), RATE // 50):
                piece = script[at : at + RATE // 50]
                await source.capture_frame(rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece)))
            await asyncio.sleep(1.0)
            lengths = [end - begin for begin, end in seen.flashes()]
        assert follow.turns == 2
        assert lengths == [pytest.approx(1.0, abs=0.2), pytest.approx(0.6, abs=0.2)]
        assert session.state == "idle"
        await follow.aclose()
        await source.aclose()
