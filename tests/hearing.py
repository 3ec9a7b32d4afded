"""Ears that follow a script, tools and voices for agents in YAML: named there by import path."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import numpy as np
from livekit import rtc
from livekit.agents import (
    DEFAULT_API_CONNECT_OPTIONS,
    NOT_GIVEN,
    APIConnectionError,
    APIConnectOptions,
    LanguageCode,
    NotGivenOr,
    function_tool,
    llm,
    stt,
    tts,
    utils,
)

from .scripted import ScriptedLLM, ScriptedTTS

HEARD = "what was heard"


class Ear(stt.STT[Any]):
    """Takes whole utterances, and understands `text` whatever was said."""

    def __init__(self, *, text: str = HEARD, api_key: str = "", broken: bool = False) -> None:
        super().__init__(capabilities=stt.STTCapabilities(streaming=False, interim_results=False))
        self.text = text
        self.broken = broken
        self.heard: list[float] = []

    async def _recognize_impl(
        self,
        buffer: utils.AudioBuffer,
        *,
        language: NotGivenOr[str] = NOT_GIVEN,
        conn_options: APIConnectOptions,
    ) -> stt.SpeechEvent:
        if self.broken:
            raise APIConnectionError("no ear", retryable=False)
        self.heard.append(rtc.combine_audio_frames(buffer).duration)
        return _final(self.text)


class StreamingEar(stt.STT[Any]):
    """Hears loudness: an utterance is over after `pause` seconds of silence."""

    def __init__(self, *, text: str = HEARD, pause: float = 0.3) -> None:
        super().__init__(capabilities=stt.STTCapabilities(streaming=True, interim_results=True))
        self.text = text
        self.pause = pause

    async def _recognize_impl(self, buffer: Any, **more: Any) -> stt.SpeechEvent:
        raise NotImplementedError

    def stream(
        self,
        *,
        language: NotGivenOr[str] = NOT_GIVEN,
        conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS,
    ) -> stt.RecognizeStream:
        return _Listening(stt=self, conn_options=conn_options)


class _Listening(stt.RecognizeStream):
    async def _run(self) -> None:
        ear = self._stt
        assert isinstance(ear, StreamingEar)
        speaking, quiet = False, 0.0
        async for frame in self._input_ch:
            if not isinstance(frame, rtc.AudioFrame):
                continue
            level = np.abs(np.frombuffer(frame.data, np.int16).astype(np.int32)).mean()
            quiet = 0.0 if level > 500 else quiet + frame.duration
            if level > 500 and not speaking:
                speaking = True
                self._event_ch.send_nowait(stt.SpeechEvent(stt.SpeechEventType.START_OF_SPEECH))
                self._event_ch.send_nowait(_told(stt.SpeechEventType.INTERIM_TRANSCRIPT, ear.text))
            elif speaking and quiet > ear.pause:
                speaking = False
                self._event_ch.send_nowait(_final(ear.text))
                self._event_ch.send_nowait(stt.SpeechEvent(stt.SpeechEventType.END_OF_SPEECH))


def _told(kind: stt.SpeechEventType, text: str) -> stt.SpeechEvent:
    return stt.SpeechEvent(
        type=kind,
        alternatives=[stt.SpeechData(language=LanguageCode("en"), text=text, confidence=1.0)],
    )


def _final(text: str) -> stt.SpeechEvent:
    return _told(stt.SpeechEventType.FINAL_TRANSCRIPT, text)


class Script(ScriptedLLM):
    """`ScriptedLLM` as a YAML makes it; `made` holds all of them."""

    made: list[Script] = []

    def __init__(self, *, lines: list[str], api_key: str = "", broken: bool = False) -> None:
        super().__init__(*lines)
        self.api_key = api_key
        self.broken = broken
        self.made.append(self)

    def chat(self, **more: Any) -> llm.LLMStream:
        if self.broken:
            raise APIConnectionError("no head", retryable=False)
        return super().chat(**more)


class Words(ScriptedTTS):
    """A beep a word. `word`: seconds of each, of which `gap` are silent; `speed`: times real time
    at which they come (0: at once); `stall`: after so many words nothing comes for two seconds."""

    def __init__(
        self,
        *,
        word: float = 0.25,
        gap: float = 0.1,
        speed: float = 0.0,
        stall: int = 0,
        rate: int = 24_000,
    ) -> None:
        super().__init__(rate)
        self.word, self.gap, self.speed, self.stall = word, gap, speed, stall

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        return _Beeps(tts=self, input_text=text, conn_options=conn_options)


class _Beeps(tts.ChunkedStream):
    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        voice = self._tts
        assert isinstance(voice, Words)
        output_emitter.initialize(
            request_id="scripted",
            sample_rate=voice.sample_rate,
            num_channels=1,
            mime_type="audio/pcm",
            frame_size_ms=50,
        )
        times = np.arange(round((voice.word - voice.gap) * voice.sample_rate)) / voice.sample_rate
        beep = (np.sin(2 * np.pi * 700 * times) * 12_000).astype(np.int16)
        gap = np.zeros(round(voice.gap * voice.sample_rate), np.int16)
        for count, _ in enumerate(self.input_text.split(), 1):
            output_emitter.push(np.concatenate([beep, gap]).tobytes())
            if voice.speed:
                await asyncio.sleep(voice.word / voice.speed)
            if count == voice.stall:
                await asyncio.sleep(2.0)
        output_emitter.flush()


@function_tool
async def look_up(what: str) -> str:
    """Look something up.

    Args:
        what: what to look up
    """
    return f"{what} was looked up"


def plain(what: str) -> str:
    """A function as anybody writes it."""
    return what


def tools(*, prefix: str) -> list[Any]:
    """Makes tools."""

    @function_tool(name=f"{prefix}_tool")
    async def made() -> str:
        """Made by a function."""
        return prefix

    return [made]


def needs_key(*, model: str = "m") -> Any:
    """A plugin that takes its key from the environment by itself."""
    if not os.environ.get("SOME_KEY"):
        raise ValueError("api_key is missing: pass it or set SOME_KEY")
    return Script(lines=[])


def leaks(*, api_key: str) -> Any:
    """A plugin that shows its key when it complains."""
    raise ValueError(f"the key {api_key} is refused")
