"""Our voices as LiveKit's agents use them: PCM frames, word times, cues in the frames' userdata."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from livekit.agents import APIConnectionError, APIConnectOptions, APIError, tts, utils
from livekit.agents.types import TimedString

from ..errors import TransportError, VoipAvatarError
from ..media import Cue
from .speaking import utter
from .text import LIMIT, cuts
from .voice import CUES, Chunk


class _Cues:
    """Cues that wait for the frames they start in: LiveKit cuts the sound as it likes."""

    def __init__(self) -> None:
        self._cues: list[Cue] = []
        self._samples = 0

    def push(self, emitter: tts.AudioEmitter, chunk: Chunk) -> None:
        self._cues = sorted((*self._cues, *chunk.cues), key=lambda cue: cue.start)
        for cue in chunk.cues:
            if cue.kind == "word":
                word = TimedString(cue.text + " ", start_time=cue.start, end_time=cue.end)
                emitter.push_timed_transcript(word)
        emitter.push(chunk.pcm.tobytes())

    def pull(self, event: tts.SynthesizedAudio) -> tts.SynthesizedAudio:
        self._samples += event.frame.samples_per_channel
        end = self._samples / event.frame.sample_rate
        count = sum(cue.start < end or event.is_final for cue in self._cues)
        event.frame.userdata[CUES] = tuple(self._cues[:count])
        del self._cues[:count]
        return event


class CuedStream(tts.ChunkedStream):
    """One of our voices, saying one text."""

    def __init__(self, *, voice: tts.TTS[Any], text: str, conn_options: APIConnectOptions) -> None:
        super().__init__(tts=voice, input_text=text, conn_options=conn_options)
        self._cues = _Cues()

    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        self._cues = _Cues()
        output_emitter.initialize(
            request_id=utils.shortuuid(),
            sample_rate=self._tts.sample_rate,
            num_channels=1,
            mime_type="audio/pcm",
            frame_size_ms=100,
        )
        if not await _say(self._tts, self._input_text, output_emitter, self._cues, 0.0):
            # LiveKit takes no sound for a failure, but "..." has none.
            output_emitter.push(bytes(2 * (self._tts.sample_rate // 50)))
        output_emitter.flush()

    async def __anext__(self) -> tts.SynthesizedAudio:
        return self._cues.pull(await super().__anext__())


class CuedSpeech(tts.SynthesizeStream):
    """One of our voices, saying sentences while the rest of the text is still being written."""

    def __init__(self, *, voice: tts.TTS[Any], conn_options: APIConnectOptions) -> None:
        super().__init__(tts=voice, conn_options=conn_options)
        self._cues = _Cues()

    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        output_emitter.initialize(
            request_id=utils.shortuuid(),
            sample_rate=self._tts.sample_rate,
            num_channels=1,
            mime_type="audio/pcm",
            frame_size_ms=100,
            stream=True,
        )
        output_emitter.start_segment(segment_id=utils.shortuuid())
        pending, said = "", 0.0
        async for token in self._input_ch:
            if isinstance(token, str):
                pending += token
                if len(pending) > LIMIT:
                    raise APIError("the text is too long to be said in one go", retryable=False)
                if pending.lstrip().startswith("<"):
                    continue  # SSML is read as a whole
                # A sentence is complete when another one has begun.
                pieces = cuts(pending)
                if len(pieces) < 2:
                    continue
                at = pieces[-1][0]
                ready, pending = pending[:at], pending[at:]
            else:
                ready, pending = pending, ""
            if ready.strip():
                self._mark_started()
                said += await _say(self._tts, ready, output_emitter, self._cues, said)
        if pending.strip():
            said += await _say(self._tts, pending, output_emitter, self._cues, said)
        if not said:
            output_emitter.push(bytes(2 * (self._tts.sample_rate // 50)))
        output_emitter.end_segment()

    async def __anext__(self) -> tts.SynthesizedAudio:
        return self._cues.pull(await super().__anext__())


async def _say(
    voice: tts.TTS[Any], text: str, emitter: tts.AudioEmitter, cues: _Cues, origin: float
) -> float:
    """Seconds of sound that went to the emitter."""
    seconds = 0.0
    try:
        async with aclosing(utter(voice, text, origin=origin)) as chunks:
            async for chunk in chunks:
                seconds += chunk.seconds
                cues.push(emitter, chunk)
    except TransportError as error:
        raise APIConnectionError(str(error), retryable=error.retryable) from error
    except VoipAvatarError as error:
        raise APIError(str(error), retryable=False) from error
    return seconds
