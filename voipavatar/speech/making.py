"""From a persona's `voice:` to a voice; and which voices this machine has."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from livekit.agents import tts

from ..errors import ConfigError
from .cache import BOUND, PhraseCache
from .chain import Chain, Extras, Link
from .loudness import TARGET
from .remembered import Remembered
from .script import Lexicon
from .voice import Missing

logger = logging.getLogger(__name__)

OWN = ("piper", "espeak", "edge", "pyttsx3")

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)


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


def make_voice(choices: Sequence[Choice], settings: Place) -> Chain:
    """The voice of a persona: the first choice, and the others for when it fails.

    `use` is piper, espeak, edge, pyttsx3, a LiveKit plugin ("openai", "elevenlabs"), or the import
    path of a `livekit.agents.tts.TTS`. `options` are its keyword arguments, `${NAME}` is taken from
    the environment; besides, for every voice:

    lexicon: {word: respelling or /IPA/}
    loudness: LUFS, -18 by default; null leaves the sound as it comes
    cache: whether phrases are kept on disk (by default of online voices only), or {bytes: N}
    patience: seconds to the first sound before the next voice goes on

    A voice that can't be made here is left out, with a warning, while another one can. Raises
    ConfigError when none can, and for a mistake in the options. Safe off the event loop.
    """
    if not choices:
        raise ConfigError("voice: name at least one, `voice: espeak`, say")
    remembered = Remembered(settings.cache_dir / "voices" / "loudness.json")
    links: list[Link] = []
    missing: list[str] = []
    sessions: list[_Session] = []
    for choice in choices:
        options = dict(choice.options)
        lexicon = _lexicon(choice.use, options.pop("lexicon", None))
        target = _number(choice.use, "loudness", options.pop("loudness", TARGET), -40.0, -8.0)
        patience = _number(choice.use, "patience", options.pop("patience", None), 0.1, 60.0)
        identity = PhraseCache.key(choice.use, _public(options))[:32]
        kept = options.pop("cache", choice.use not in ("piper", "espeak", "pyttsx3"))
        try:
            made = _make(choice.use, options, settings, sessions)
        except Missing as error:
            missing.append(str(error))
            logger.warning("voice left out", extra={"voice": choice.use, "why": str(error)})
            continue
        cache = _cache(choice.use, kept, settings)
        ssml = _reads_ssml(made, options)
        extras = Extras(identity, lexicon, target, cache, remembered, patience, ssml)
        links.append(Link(made, extras))
    if not links:
        raise ConfigError("; ".join(missing))
    chain = Chain(links)
    chain.closing.extend(sessions)
    chain.stand_by()
    return chain


def bring(choices: Sequence[Choice], settings: Place) -> None:
    """What voices keep on disk before they first speak, made or checked now. Blocks.

    That is Piper's network; the others have nothing, or a plug-in that sees to it. Raises
    ConfigError for a voice that can't be had here.
    """
    for choice in choices:
        if choice.use == "piper":
            from . import piper

            files = {
                name: _filled(choice.use, choice.options[name])
                for name in ("model", "config")
                if name in choice.options
            }
            piper.bring(**files, cache_dir=settings.cache_dir)


def _make(
    use: str, options: dict[str, Any], settings: Place, sessions: list[_Session]
) -> tts.TTS[Any]:
    kind = _class(use)
    if not (inspect.isclass(kind) and issubclass(kind, tts.TTS)):
        raise ConfigError(f"voice {use}: that is no class of livekit.agents.tts.TTS")
    given = {name: _filled(use, value) for name, value in options.items()}
    taken = _parameters(kind)
    if use == "piper":
        given.setdefault("cache_dir", settings.cache_dir)
    for name in options:
        if taken is not None and name not in taken:
            some = ", ".join(sorted(taken - {"http_session", "cache_dir"}))
            raise ConfigError(f"voice {use}: there is no option {name!r}; it takes {some}")
    if taken is not None and "http_session" in taken and "http_session" not in given:
        session = _Session()
        sessions.append(session)
        given["http_session"] = session
    try:
        made: tts.TTS[Any] = kind(**_converted(kind, given))
    except ConfigError:
        raise
    except Exception as error:  # a plug-in's own complaint, about a missing key mostly
        raise Missing(f"voice {use}: {error}") from None
    return made


def _class(use: str) -> Any:
    """The class that `use` names. Raises Missing naming what to install."""
    if use == "piper":
        from .piper import PiperTTS

        return PiperTTS
    if use == "espeak":
        from .espeak import EspeakTTS

        return EspeakTTS
    if use == "edge":
        from .edge import EdgeTTS

        return EdgeTTS
    if use == "pyttsx3":
        from .system import Pyttsx3TTS

        return Pyttsx3TTS
    path = use if "." in use else f"livekit.plugins.{use}.TTS"
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", path):
        raise ConfigError(
            f"voice: {use!r} is no voice: take {', '.join(OWN)}, a LiveKit plugin such as openai, "
            "or the import path of its class"
        )
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if path.startswith("livekit.plugins."):
            package = f"livekit-plugins-{module.split('.')[2].replace('_', '-')}"
            raise Missing(
                f'voice {use}: needs a plugin: pip install "{package}" (there is no module '
                f"{error.name}); own voices are {', '.join(OWN)}"
            ) from None
        raise Missing(f"voice {use}: there is no module {error.name}") from None
    except AttributeError:
        raise ConfigError(f"voice {use}: {module} has no {name}") from None
    except Exception as error:
        raise Missing(f"voice {use}: {module} can't be imported: {error}") from None


def _reads_ssml(voice: tts.TTS[Any], options: Mapping[str, Any]) -> bool:
    """Whether a plug-in puts the text into SSML as it is, so that it has to be escaped."""
    module = type(voice).__module__
    return module.startswith("livekit.plugins.azure") or (
        module.startswith("livekit.plugins.google")
        and options.get("enable_ssml") is True
        and options.get("use_streaming") is False
    )


def _converted(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Mappings to the dataclasses that a plug-in wants, ElevenLabs' voice_settings, say."""
    try:
        hints = typing.get_type_hints(kind.__init__)
    except Exception:  # names that only a type checker knows
        return given
    made = dict(given)
    for name, value in given.items():
        if not isinstance(value, Mapping):
            continue
        wanted = hints.get(name)
        for one in (wanted, *typing.get_args(wanted)):
            if isinstance(one, type) and is_dataclass(one):
                made[name] = one(**value)
    return made


def _parameters(kind: Any) -> set[str] | None:
    """Names of keyword arguments; None when any will do."""
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    return {one.name for one in parameters}


class _Session:
    """An aiohttp session that is made when it is first used, on the loop that uses it.

    LiveKit's plugins take one at construction, which happens off the loop, or else borrow the
    agent worker's, which isn't there.
    """

    def __init__(self) -> None:
        self._made: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._made is None or self._made.closed:
            import aiohttp

            self._made = aiohttp.ClientSession(trust_env=True)
        return getattr(self._made, name)

    async def close(self) -> None:
        made, self._made = self._made, None
        if made is not None:
            await made.close()


def _filled(use: str, value: Any) -> Any:
    """`${NAME}` from the environment."""
    if isinstance(value, str):

        def variable(match: re.Match[str]) -> str:
            name = match.group(1)
            if not os.environ.get(name):
                raise Missing(f"voice {use}: the environment has no {name}: export it")
            return os.environ[name]

        return _VARIABLE.sub(variable, value)
    if isinstance(value, Mapping):
        return {key: _filled(use, one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(use, one) for one in value]
    return value


def _public(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that may decide how it sounds."""
    return {name: value for name, value in options.items() if not _SECRET.search(name)}


def _lexicon(use: str, words: Any) -> Lexicon | None:
    if words is None:
        return None
    if not isinstance(words, Mapping):
        raise ConfigError(f"voice {use}: lexicon is a mapping of words to how they are said")
    return Lexicon(words)


def _number(use: str, name: str, value: Any, low: float, high: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"voice {use}: {name} is {value!r}; it can be {low:g} to {high:g}")
    return float(value)


def _cache(use: str, wish: Any, settings: Place) -> PhraseCache | None:
    folder = settings.cache_dir / "voices" / "phrases"
    if wish is True:
        return PhraseCache(folder)
    if wish is False or wish is None:
        return None
    if isinstance(wish, Mapping) and set(wish) == {"bytes"}:
        bound = _number(use, "cache: bytes", wish["bytes"], 0, 1e13)
        return PhraseCache(folder, int(bound if bound is not None else BOUND))
    raise ConfigError(f"voice {use}: cache is true, false or {{bytes: N}}")


@dataclass(frozen=True)
class Available:
    """A voice for `doctor` and the page's choice."""

    name: str
    title: str
    online: bool
    ready: bool
    why: str = ""
    """Why it isn't ready, and what to do."""


_PLUGINS = {
    "openai": "OpenAI and servers that speak its interface",
    "elevenlabs": "ElevenLabs",
    "cartesia": "Cartesia",
    "azure": "Microsoft Azure Speech",
    "google": "Google Cloud Text-to-Speech",
}


def voices(settings: Place) -> list[Available]:
    """The voices known by name, and why one can't be used here. Tries none of the online ones;
    plugins are listed when they are installed."""
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
    for name, title in _PLUGINS.items():
        try:
            there = importlib.util.find_spec(f"livekit.plugins.{name}") is not None
        except ModuleNotFoundError:
            there = False
        if there:
            found.append(Available(name, f"{title}, online, needs a key", True, True))
    return found


def _check(name: str) -> None:
    """Raises Missing when one of our own voices can't be had."""
    if name == "piper":
        from . import piper

        piper.installed()
        piper.locate()
    elif name == "espeak":
        from .espeak import library

        library()
    elif name == "edge":
        from . import edge

        edge.installed()
    elif name == "pyttsx3":
        from . import system

        system.installed()
