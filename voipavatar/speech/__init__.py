"""Voices: text in, sound with cues out.

`make_voice` turns a persona's `voice:` into a LiveKit `tts.TTS`; `speak` says a text with any
such voice, as a stream of `Chunk`s whose cues tell when each phoneme and word sounds.
Names resolve lazily: importing this module loads neither LiveKit nor a voice.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chain import Chain
    from .edge import EdgeTTS
    from .espeak import EspeakTTS
    from .making import Available, bring, make_voice, voices
    from .piper import PiperTTS
    from .speaking import Prepared, prefetch, speak
    from .system import Pyttsx3TTS
    from .voice import Chunk, Cued

_WHERE = {
    "Available": "making",
    "Chain": "chain",
    "Chunk": "voice",
    "Cued": "voice",
    "EdgeTTS": "edge",
    "EspeakTTS": "espeak",
    "PiperTTS": "piper",
    "Pyttsx3TTS": "system",
    "bring": "making",
    "Prepared": "speaking",
    "make_voice": "making",
    "prefetch": "speaking",
    "speak": "speaking",
    "voices": "making",
}

__all__ = [
    "Available",
    "Chain",
    "Chunk",
    "Cued",
    "EdgeTTS",
    "EspeakTTS",
    "PiperTTS",
    "Prepared",
    "Pyttsx3TTS",
    "bring",
    "make_voice",
    "prefetch",
    "speak",
    "voices",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
