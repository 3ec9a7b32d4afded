"""A speech-to-speech model that follows a script: LiveKit's own interface, and nothing online."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from livekit import rtc
from livekit.agents import NOT_GIVEN, llm

from .scripted import tone

RATE = 24_000
FASTER = 2.0
"""Times real time at which it speaks, as such models do."""


class Speaking(llm.RealtimeModel):
    """Answers every turn with a tone of `seconds`, and hears when it is told to."""

    made: ClassVar[list[Speaking]] = []

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__(
            capabilities=llm.RealtimeCapabilities(
                message_truncation=True,
                turn_detection=True,
                user_transcription=False,
                auto_tool_reply_generation=False,
                audio_output=True,
                manual_function_calls=False,
                mutable_chat_context=True,
                mutable_instructions=True,
                mutable_tools=True,
            )
        )
        self.seconds = seconds
        self.sessions: list[Conversing] = []
        self.made.append(self)

    def session(self, *, turn_detection_disabled: bool = False) -> Conversing:
        self.sessions.append(Conversing(self))
        return self.sessions[-1]

    async def aclose(self) -> None: ...


class Conversing(llm.RealtimeSession[Any]):
    def __init__(self, model: Speaking) -> None:
        super().__init__(model)
        self.replies = 0
        self.heard = 0.0
        """Seconds of sound that came from the user."""
        self.saw = 0, 0
        """Size of the user's last picture."""
        self.truncated: list[int] = []
        """Milliseconds at which messages were cut."""
        self.loop = asyncio.get_running_loop()
        """Where it lives: a worker holds each conversation in a thread of its own."""
        self._model = model
        self._chat = llm.ChatContext.empty()
        self._tools = llm.ToolContext.empty()
        self._stopped = asyncio.Event()

    # -- what the user does ------------------------------------------------------------------------

    def user_begins(self) -> None:
        """The model's own ear has heard a voice."""
        self.emit("input_speech_started", llm.InputSpeechStartedEvent())

    # -- the interface -----------------------------------------------------------------------------

    @property
    def chat_ctx(self) -> llm.ChatContext:
        return self._chat

    @property
    def tools(self) -> llm.ToolContext:
        return self._tools

    async def update_instructions(self, instructions: str) -> None: ...

    async def update_chat_ctx(self, chat_ctx: llm.ChatContext) -> None:
        self._chat = chat_ctx

    async def update_tools(self, tools: Any) -> None:
        self._tools = llm.ToolContext(tools)

    def update_options(self, *, tool_choice: Any = NOT_GIVEN) -> None: ...

    def push_audio(self, frame: rtc.AudioFrame) -> None:
        self.heard += frame.duration

    def push_video(self, frame: rtc.VideoFrame) -> None:
        self.saw = frame.width, frame.height

    def generate_reply(
        self, *, instructions: Any = NOT_GIVEN, tool_choice: Any = NOT_GIVEN, tools: Any = NOT_GIVEN
    ) -> asyncio.Future[llm.GenerationCreatedEvent]:
        self.replies += 1
        self._stopped = stopped = asyncio.Event()
        made = asyncio.get_running_loop().create_future()
        made.set_result(
            llm.GenerationCreatedEvent(
                message_stream=self._messages(stopped),
                function_stream=_nothing(),
                user_initiated=True,
                response_id=uuid.uuid4().hex,
            )
        )
        return made

    async def _messages(self, stopped: asyncio.Event) -> AsyncIterator[llm.MessageGeneration]:
        modalities = asyncio.get_running_loop().create_future()
        modalities.set_result(["text", "audio"])
        yield llm.MessageGeneration(
            message_id=uuid.uuid4().hex,
            text_stream=_words(self._model.seconds),
            audio_stream=_sound(self._model.seconds, stopped),
            modalities=modalities,
        )

    def commit_audio(self) -> None: ...

    def clear_audio(self) -> None: ...

    def interrupt(self) -> None:
        self._stopped.set()

    def truncate(
        self, *, message_id: str, modalities: Any, audio_end_ms: int,
        audio_transcript: Any = NOT_GIVEN,
    ) -> None:  # fmt: skip
        self.truncated.append(audio_end_ms)

    async def aclose(self) -> None:
        self._stopped.set()


async def _nothing() -> AsyncIterator[llm.FunctionCall]:
    return
    yield


async def _words(seconds: float) -> AsyncIterator[str]:
    for _ in range(max(1, round(seconds / 0.25))):
        yield "word "


async def _sound(seconds: float, stopped: asyncio.Event) -> AsyncIterator[rtc.AudioFrame]:
    pcm = tone(seconds, RATE)
    step = RATE // 50
    for begin in range(0, len(pcm), step):
        if stopped.is_set():
            return
        piece = pcm[begin : begin + step]
        yield rtc.AudioFrame(piece.tobytes(), RATE, 1, len(piece))
        await asyncio.sleep(0.02 / FASTER)
