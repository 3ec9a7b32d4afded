"""The operating system's own voices through the package pyttsx3 (SAPI, NSSpeech, eSpeak)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
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

_LONGEST = 60.0
"""Seconds that the system's voice may take for a sentence."""

# In a process of its own: on Linux pyttsx3 opens the same eSpeak library as `espeak` does, with
# data of its own, and that library ends the process when the two don't agree.
_CHILD = """
import json, sys
import pyttsx3
text, tempo, properties, path = json.load(sys.stdin)
engine = pyttsx3.init()
for name, value in properties.items():
    engine.setProperty(name, value)
if tempo != 1.0:
    engine.setProperty("rate", round(engine.getProperty("rate") * tempo))
engine.save_to_file(text, path)
engine.runAndWait()
"""

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
            self._say(piece.said().text, piece.style.rate, emit)

        async with aclosing(self._hold.door.stream(say)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def aclose(self) -> None:
        await self._hold.release()

    def _say(self, text: str, tempo: float, emit: Callable[[Chunk], bool]) -> None:
        with TemporaryDirectory(prefix="voipavatar-") as folder:
            path = Path(folder) / "speech.wav"
            told = json.dumps([text, tempo, self._properties, str(path)])
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(told.encode())
                until = time.monotonic() + _LONGEST
                nothing = Chunk(np.zeros(0, np.int16), FRAME_RATE)
                while child.poll() is None and time.monotonic() < until:
                    if not emit(nothing):  # nobody listens any more
                        return
                    time.sleep(0.02)
            finally:
                child.kill()
                child.wait()
            try:
                with wave.open(str(path), "rb") as file:
                    rate, channels = file.getframerate(), file.getnchannels()
                    data = file.readframes(file.getnframes())
            except (OSError, EOFError, wave.Error) as error:
                raise TransportError(
                    f"pyttsx3: the system's voice made no sound ({type(error).__name__}): try "
                    "`python -m pyttsx3`"
                ) from None
        pcm = np.frombuffer(data, np.int16).reshape(-1, channels).mean(axis=1).astype(np.int16)
        resampler = Resampler(rate, FRAME_RATE)
        emit(Chunk(np.concatenate([resampler.push(pcm), resampler.flush()]), FRAME_RATE))


_door: Door[Chunk] = Door("voipavatar-pyttsx3")
