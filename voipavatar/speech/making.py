"""From a persona's `voice:` to a voice; and which voices this machine has."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from livekit.agents import tts

from ..errors import ConfigError
from .espeak import EspeakTTS

_SECRET = re.compile(r"\$\{(\w+)\}")


class Choice(Protocol):
    """What `config.VoiceChoice` is."""

    @property
    def use(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]: ...


class Place(Protocol):
    """What is needed of `config.Settings`."""

    @property
    def cache_dir(self) -> Path: ...


def make_voice(choices: Sequence[Choice], settings: Place) -> tts.TTS[Any]:
    """The voice of a persona. Raises ConfigError naming what is missing."""
    if not choices:
        raise ConfigError("voice: name at least one, `voice: espeak`, say")
    errors = []
    for choice in choices:
        try:
            return _make(choice, settings)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError("; ".join(errors))


def _make(choice: Choice, settings: Place) -> tts.TTS[Any]:
    options = {name: _filled(value) for name, value in choice.options.items()}
    try:
        if choice.use == "piper":
            from .piper import PiperTTS

            options.setdefault("cache_dir", settings.cache_dir)
            return PiperTTS(**options)
        if choice.use == "espeak":
            return EspeakTTS(**options)
        if choice.use == "edge":
            from .edge import EdgeTTS

            return EdgeTTS(**options)
        if choice.use == "pyttsx3":
            from .system import Pyttsx3TTS

            return Pyttsx3TTS(**options)
    except TypeError as error:
        raise ConfigError(f"voice {choice.use}: {error}") from None
    raise ConfigError(f"voice: there is no {choice.use!r}")


def _filled(value: Any) -> Any:
    """`${NAME}` from the environment."""
    if isinstance(value, str):

        def variable(match: re.Match[str]) -> str:
            name = match.group(1)
            if not os.environ.get(name):
                raise ConfigError(f"voice: the environment has no {name}: export it")
            return os.environ[name]

        return _SECRET.sub(variable, value)
    if isinstance(value, Mapping):
        return {key: _filled(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one) for one in value]
    return value


@dataclass(frozen=True)
class Available:
    """A voice for `doctor` and the page's choice."""

    name: str
    title: str
    online: bool
    ready: bool
    why: str = ""


def voices(settings: Place) -> list[Available]:
    """The voices known by name, and why one can't be used here."""
    found = []
    for name, title, online in (
        ("piper", "Piper, natural, offline", False),
        ("espeak", "eSpeak NG, small, offline", False),
        ("edge", "Microsoft Edge, natural, online", True),
        ("pyttsx3", "the system's own voice", False),
    ):
        why = ""
        try:
            _check(name)
        except ConfigError as error:
            why = str(error)
        found.append(Available(name, title, online, not why, why))
    return found


def _check(name: str) -> None:
    if name == "piper":
        from . import piper

        if importlib.util.find_spec("piper") is None:
            raise ConfigError(piper.MISSING)
        piper.locate()
    elif name == "espeak":
        from .espeak import library

        library()
    elif name == "edge":
        from . import edge

        if importlib.util.find_spec("edge_tts") is None:
            raise ConfigError(edge.MISSING)
    elif name == "pyttsx3":
        from . import system

        if importlib.util.find_spec("pyttsx3") is None:
            raise ConfigError(system.MISSING)
