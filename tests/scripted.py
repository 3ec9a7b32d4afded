"""An agent without models: a language model, a voice and an ear that follow a script.

They are LiveKit's own interfaces, so that a real `AgentSession` runs on them with nothing online.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from livekit import api, rtc
from livekit.agents import (
    DEFAULT_API_CONNECT_OPTIONS,
    NOT_GIVEN,
    Agent,
    AgentSession,
    APIConnectOptions,
    llm,
    tts,
)

from voipavatar.livekit_server import LiveKitServer
from voipavatar.room import connect

WORD = 0.25
"""Seconds a word lasts in the scripted voice."""


def token(livekit: LiveKitServer, room: str, identity: str, kind: Any = "standard") -> str:
    return (
        api.AccessToken(livekit.api_key, livekit.api_secret)
        .with_kind(kind)
        .with_identity(identity)
        .with_grants(api.VideoGrants(room_join=True, room=room, can_update_own_metadata=True))
        .to_jwt()
    )


class Joined:
    """A participant of one's own: an agent's room, or a plain one's."""

    def __init__(
        self,
        livekit: LiveKitServer,
        room: str,
        identity: str = "agent",
        kind: str = "agent",
        subscribe: bool = True,
    ) -> None:
        self.room = rtc.Room()
        self._url = livekit.url
        self._token = token(livekit, room, identity, kind)
        self._options = rtc.RoomOptions(auto_subscribe=subscribe, connect_timeout=15.0)

    async def __aenter__(self) -> rtc.Room:
        await connect(self.room, self._url, self._token, self._options)
        return self.room

    async def __aexit__(self, *exc: object) -> None:
        await self.room.disconnect()


def tone(seconds: float, rate: int = 24_000, pitch: float = 700.0) -> Any:
    times = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * pitch * times) * 12_000).astype(np.int16)


class ScriptedTTS(tts.TTS[Any]):
    """A tone of `WORD` seconds a word."""

    def __init__(self, rate: int = 24_000) -> None:
        super().__init__(
            capabilities=tts.TTSCapabilities(streaming=False), sample_rate=rate, num_channels=1
        )

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        return _Tone(tts=self, input_text=text, conn_options=conn_options)


class _Tone(tts.ChunkedStream):
    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        output_emitter.initialize(
            request_id="scripted",
            sample_rate=self._tts.sample_rate,
            num_channels=1,
            mime_type="audio/pcm",
        )
        seconds = WORD * len(self.input_text.split())
        output_emitter.push(tone(seconds, self._tts.sample_rate).tobytes())
        output_emitter.flush()


class ScriptedLLM(llm.LLM[Any]):
    """Answers every user turn with the next line of the script."""

    def __init__(self, *lines: str) -> None:
        super().__init__()
        self.lines = list(lines)
        self.asked: list[str] = []

    def chat(
        self,
        *,
        chat_ctx: llm.ChatContext,
        tools: Any = None,
        conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS,
        parallel_tool_calls: Any = NOT_GIVEN,
        tool_choice: Any = NOT_GIVEN,
        extra_kwargs: Any = NOT_GIVEN,
        **more: Any,
    ) -> llm.LLMStream:
        said = [item.text_content or "" for item in chat_ctx.items if item.type == "message"]
        self.asked.append(said[-1] if said else "")
        line = self.lines.pop(0) if self.lines else "yes"
        return _Line(self, line, chat_ctx=chat_ctx, tools=tools or [], conn_options=conn_options)


class _Line(llm.LLMStream):
    def __init__(self, model: ScriptedLLM, line: str, **more: Any) -> None:
        super().__init__(model, **more)
        self._line = line

    async def _run(self) -> None:
        for word in self._line.split(" "):
            chunk = llm.ChatChunk(
                id="scripted", delta=llm.ChoiceDelta(role="assistant", content=word + " ")
            )
            self._event_ch.send_nowait(chunk)


def agent_session(*lines: str, rate: int = 24_000) -> AgentSession[Any]:
    """A session that neither listens nor asks anybody."""
    return AgentSession(llm=ScriptedLLM(*lines), tts=ScriptedTTS(rate))


class Plain(Agent):
    def __init__(self) -> None:
        super().__init__(instructions="Follow the script.")


async def said(session: AgentSession[Any], text: str, limit: float = 15.0) -> Any:
    """`session.say` to its end, with a limit: a test must not hang where a session would."""
    handle = session.say(text)
    await asyncio.wait_for(handle.wait_for_playout(), limit)
    return handle


async def frames(pcm: Any, rate: int, channels: int = 1) -> AsyncIterator[rtc.AudioFrame]:
    """Sound as audio frames of 20 ms."""
    step = rate // 50
    for begin in range(0, len(pcm) // channels, step):
        piece = pcm[begin * channels : (begin + step) * channels]
        yield rtc.AudioFrame(piece.tobytes(), rate, channels, len(piece) // channels)
