"""The operating system's own voices through the package pyttsx3 (SAPI, NSSpeech, eSpeak)."""

from __future__ import annotations

import importlib
import importlib.util
import wave
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from livekit.agents import APIConnectOptions, tts
from livekit.agents.types import DEFAULT_API_CONNECT_OPTIONS

from ..errors import TransportError
from ..media import FRAME_RATE, Resampler
from .frames import CuedStream
from .script import Piece
from .voice import Chunk, Door, Hold, Missing

MISSING = 'the voice "pyttsx3" needs: pip install pyttsx3'


def installed() -> None:
    """Raises Missing when the package isn't there."""
    if importlib.util.find_spec("pyttsx3") is None:
        raise Missing(MISSING)


class Pyttsx3TTS(tts.TTS[Any]):
    """A voice of the operating system. Whole sentences, no cues.

    voice: id as pyttsx3 lists it; rate: words a minute; volume: 0 to 1.
    """

    def __init__(
        self, *, voice: str | None = None, rate: int | None = None, volume: float | None = None
    ) -> None:
        installed()
        super().__init__(
            capabilities=tts.TTSCapabilities(streaming=False),
            sample_rate=FRAME_RATE,  # engines differ; all are brought to one
            num_channels=1,
        )
        self._properties = {
            name: value
            for name, value in (("voice", voice), ("rate", rate), ("volume", volume))
            if value is not None
        }
        self.pause = 0.1
        self.loudness = None
        self._hold = Hold(_door)

    @property
    def provider(self) -> str:
        return "pyttsx3"

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        return CuedStream(voice=self, text=text, conn_options=conn_options)

    def ipa(self, transcription: str) -> str | None:
        """See `Cued`: the systems' voices differ, so none is asked to read IPA."""
        return None

    async def stream_piece(self, piece: Piece) -> AsyncGenerator[Chunk, None]:
        """See `Cued`. All of it at once, without cues."""

        def say(emit: Callable[[Chunk], bool]) -> None:
            emit(self._say(piece.said().text, piece.style.rate))

        async with aclosing(self._hold.door.stream(say)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def aclose(self) -> None:
        await self._hold.release()

    def _say(self, text: str, tempo: float) -> Chunk:
        pyttsx3: Any = importlib.import_module("pyttsx3")
        engine = pyttsx3.init()
        for name, value in self._properties.items():
            engine.setProperty(name, value)
        if tempo != 1.0:
            engine.setProperty("rate", round(engine.getProperty("rate") * tempo))
        with TemporaryDirectory(prefix="voipavatar-") as folder:
            path = Path(folder) / "speech.wav"
            engine.save_to_file(text, str(path))
            engine.runAndWait()
            try:
                with wave.open(str(path), "rb") as file:
                    rate, channels = file.getframerate(), file.getnchannels()
                    data = file.readframes(file.getnframes())
            except (OSError, EOFError, wave.Error) as error:
                raise TransportError(
                    f"pyttsx3: the system's voice made no sound ({type(error).__name__})"
                ) from None
        pcm = np.frombuffer(data, np.int16).reshape(-1, channels).mean(axis=1).astype(np.int16)
        resampler = Resampler(rate, FRAME_RATE)
        return Chunk(np.concatenate([resampler.push(pcm), resampler.flush()]), FRAME_RATE)


_door: Door[Chunk] = Door("voipavatar-pyttsx3")
