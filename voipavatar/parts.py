"""From a persona's `agent:` section to the models, the voice and the tools that it names.

Everything is found by name or import path, made with its options, and checked to be what it is
wanted for. A mistake is one ConfigError with file, line and key, whatever a plugin raises; the
values of secrets are not in it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from livekit.agents import NOT_GIVEN, inference, llm, stt, tts, utils, vad

from .config import (
    SECRET,
    AgentSection,
    Part,
    Persona,
    SessionOptions,
    Settings,
    place,
    resolve,
)
from .errors import ConfigError
from .speech import make_voice
from .speech.making import OWN, _class, _converted, _parameters
from .waiting import within

logger = logging.getLogger(__name__)

MODES = ("vad", "stt", "realtime_llm", "manual")
"""Ways of telling the end of a turn that are no object."""

PLUGIN = "livekit.plugins."


@dataclass
class Parts:
    """What an `AgentSession` is made of. Close it when the session is over."""

    llm: Any = None
    """An LLM, or a realtime model."""
    stt: stt.STT[Any] | None = None
    tts: tts.TTS[Any] | None = None
    vad: Any = NOT_GIVEN
    """A VAD; None for without; not given for LiveKit's own."""
    turn_detection: Any = NOT_GIVEN
    tools: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `AgentSession` beyond those."""
    closing: list[Any] = field(default_factory=list)

    @property
    def realtime(self) -> bool:
        return isinstance(self.llm, llm.RealtimeModel)

    async def aclose(self) -> None:
        """Close the models; one that fails to doesn't keep the others."""
        closing, self.closing = self.closing, []
        for one in reversed(closing):
            close = getattr(one, "aclose", None)
            try:
                if close is not None:
                    await within(close(), 5.0)
            except Exception as error:  # a plug-in, whatever it raises
                logger.info("a model was not closed", extra={"error": type(error).__name__})


async def build(persona: Persona, settings: Settings) -> Parts:
    """Make everything that the persona's agent consists of; a failure leaves nothing open.

    Raises ConfigError naming file, line, key and mend. Imports happen here: LiveKit's plugins
    want the first one on the main thread, which is what `rehearse` at a worker's start is for.
    """
    section = persona.agent
    if section is None:
        raise ConfigError(f"{place(persona, 'agent')}: this persona has no agent section")
    builder = _Builder(persona, section, settings)
    try:
        return builder.build()
    except BaseException:
        await builder.parts.aclose()
        raise


async def rehearse(persona: Persona, settings: Settings) -> None:
    """Make everything once and let it go again: what is wrong is told before anybody calls."""
    async with utils.http_context.open():
        await (await build(persona, settings)).aclose()


def session_options(options: SessionOptions) -> dict[str, Any]:
    """As `AgentSession` takes them; what was not given is left to it."""
    given = options.model_dump(exclude_none=True, exclude={"turn_handling"})
    for name in ("user_away_timeout", "aec_warmup_duration"):  # None is a value of these
        given[name] = getattr(options, name)
    given["session_close_transcript_timeout"] = 0.5  # when it closes nobody is there any more
    turns: dict[str, Any] = options.turn_handling.model_dump(exclude_none=True)
    turns = {name: group for name, group in turns.items() if group}
    # An avatar stops; it can't be held in mid-word and go on.
    turns.setdefault("interruption", {})["resume_false_interruption"] = False
    given["turn_handling"] = turns
    if "tts_text_transforms" in given:
        given["tts_text_transforms"] = list(given["tts_text_transforms"])
    return given


class _Builder:
    def __init__(self, persona: Persona, section: AgentSection, settings: Settings) -> None:
        self._persona = persona
        self._section = section
        self._settings = settings
        self.parts = Parts(options=session_options(section.session))

    def build(self) -> Parts:
        section, parts = self._section, self.parts
        if self._persona.path is not None:
            folder = str(self._persona.path.parent)  # modules beside the YAML are found
            if folder not in sys.path:
                sys.path.append(folder)
        parts.vad = self._vad()
        if section.realtime is not None:
            parts.llm = self._make(
                ("realtime",), section.realtime, "realtime.RealtimeModel", llm.RealtimeModel
            )
        else:
            parts.llm = self._model(section.llm or ())
        parts.stt = self._ear(section.stt or ())
        parts.tts = self._voice(section)
        parts.turn_detection = self._turns()
        for index, one in enumerate(section.tools):
            parts.tools += self._tools(("tools", index), one)
        return parts

    # -- each kind ---------------------------------------------------------------------------------

    def _vad(self) -> Any:
        one = self._section.vad
        if one is None:
            return NOT_GIVEN
        if one.use == "none":
            return None
        if one.use == "silero":  # comes with livekit-agents
            one = one.model_copy(update={"use": "livekit.agents.inference.VAD"})
        return self._make(("vad",), one, "VAD.load", vad.VAD)

    def _model(self, several: Sequence[Part]) -> Any:
        made = [
            self._make(("llm", index), one, "LLM", llm.LLM) for index, one in enumerate(several)
        ]
        return made[0] if len(made) == 1 else llm.FallbackAdapter(made)

    def _ear(self, several: Sequence[Part]) -> stt.STT[Any] | None:
        made: list[stt.STT[Any]] = [
            self._make(("stt", index), one, "STT", stt.STT) for index, one in enumerate(several)
        ]
        if not made:
            return None
        whole = [one for one in made if not one.capabilities.streaming]
        if not whole:
            return made[0] if len(made) == 1 else stt.FallbackAdapter(made)
        # One that only takes whole utterances needs somebody to tell where they end.
        detector = self.parts.vad
        if detector is None:
            raise self._error(
                ("vad",),
                f"the STT {whole[0].label} takes whole utterances only, which a VAD cuts: take "
                "`vad: none` out, or choose an STT that streams",
            )
        if not utils.is_given(detector):
            detector = self.parts.vad = inference.VAD(model="silero")
        if len(made) > 1:
            return stt.FallbackAdapter(made, vad=detector)
        return stt.StreamAdapter(stt=made[0], vad=detector)

    def _voice(self, section: AgentSection) -> tts.TTS[Any] | None:
        if section.tts is None:
            if section.realtime is not None:
                return None
            try:
                chain = make_voice(self._persona.voice, self._settings)
            except ConfigError as error:
                where = place(self._persona, "voice")
                raise ConfigError(f"{where}: {error}") from None
            self.parts.closing.append(chain)
            return chain
        made: list[tts.TTS[Any]] = [
            self._make(("tts", index), one, "TTS", tts.TTS) for index, one in enumerate(section.tts)
        ]
        return made[0] if len(made) == 1 else tts.FallbackAdapter(made)

    def _turns(self) -> Any:
        one = self._section.turn_detection
        if one is None:
            return NOT_GIVEN
        key = ("turn_detection",)
        if one.use in (*MODES, "none"):
            if one.use == "vad" and self.parts.vad is None:
                raise self._error(key, "turn_detection: vad goes with a VAD: take `vad: none` out")
            if one.use == "stt" and self.parts.stt is None:
                raise self._error(key, "turn_detection: stt needs an stt")
            if one.use == "realtime_llm" and not self.parts.realtime:
                raise self._error(key, "turn_detection: realtime_llm needs a realtime model")
            return None if one.use == "none" else one.use
        return self._make(key, one, "turn_detector.multilingual.MultilingualModel", None)

    def _tools(self, key: tuple[str | int, ...], one: Part) -> list[Any]:
        found = self._found(key, one.use, "")
        if isinstance(found, (llm.Tool, llm.Toolset, list, tuple)):
            if one.options:
                raise self._error((*key, "options"), f"{one.use} is there already: no options")
            made = found
        elif inspect.isfunction(found) and not one.options:
            made = llm.function_tool(found)
        else:
            made = self._called(key, one, found)
        tools = list(made) if isinstance(made, (list, tuple)) else [made]
        for index, tool in enumerate(tools):
            if _is_mcp(tool):
                toolset = sys.modules["livekit.agents.llm.mcp"].MCPToolset
                tools[index] = toolset(id=f"mcp-{key[-1]}", mcp_server=tool)
            elif not isinstance(tool, (llm.Tool, llm.Toolset)):
                raise self._error(
                    key,
                    f"{one.use} gives {_article(type(tool).__name__)}, no tool: decorate a "
                    "function with livekit.agents.function_tool, or name a Toolset",
                )
        return tools

    # -- finding and making ------------------------------------------------------------------------

    def _make(self, key: tuple[str | int, ...], one: Part, suffix: str, base: Any) -> Any:
        """The part, made, and known to be a `base`."""
        kind = str(key[0])
        if "/" in one.use:
            found = _inference(kind, one.use)
            if found is None:
                raise self._error(key, f"LiveKit Inference has no {kind}: name a plugin instead")
        elif kind == "tts" and one.use in OWN:
            found = self._guarded(key, one.use, lambda: _class(one.use))
        else:
            found = self._found(key, one.use, suffix)
        if base is not None and isinstance(found, base):
            if one.options:
                raise self._error((*key, "options"), f"{one.use} is there already: no options")
            made = found
        else:
            made = self._called(key, one, found)
            if base is not None and not isinstance(made, base):
                close = getattr(made, "aclose", None)
                if close is not None:
                    self.parts.closing.append(made)
                wanted = f"{base.__module__.split('.')[2]}.{base.__name__}"
                raise self._error(
                    key,
                    f"{one.use} gives {_article(type(made).__name__)}: a livekit.agents.{wanted} "
                    "is wanted here",
                )
            self.parts.closing.append(made)
        return made

    def _called(self, key: tuple[str | int, ...], one: Part, found: Any) -> Any:
        if not callable(found):
            raise self._error(key, f"{one.use} can't be called: name a class or a function")
        options = {
            name: self._option((*key, "options", name), value)
            for name, value in one.options.items()
        }
        known = _parameters(found)
        for name in options:
            if known is not None and name not in known:
                near = difflib.get_close_matches(name, known, 1)
                some = ", ".join(sorted(known - {"http_session", "self"}))
                raise self._error(
                    (*key, "options", name),
                    f"{one.use} has no such option"
                    + (f": did you mean {near[0]}?" if near else "")
                    + f" It takes {some}",
                )
        kind = found if inspect.isclass(found) else None
        given = _converted(kind, options) if kind is not None else options
        return self._guarded(key, one.use, lambda: found(**given), one.options)

    def _option(self, key: tuple[str | int, ...], value: Any) -> Any:
        """Filled from the environment; `{use: ..., options: ...}` in it is made as well."""
        if isinstance(value, Mapping):
            if "use" in value and set(value) <= {"use", "options"}:
                part = Part.model_validate(value)
                return self._called(key, part, self._found(key, part.use, ""))
            return {name: self._option((*key, name), item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._option((*key, index), item) for index, item in enumerate(value)]
        try:
            return resolve(value)
        except ConfigError:
            names = [
                name for name in re.findall(r"\$\{(\w+)\}", str(value)) if name not in os.environ
            ]
            raise self._error(
                key,
                f"the environment variable {' and '.join(names)} is not set: export it where the "
                "worker runs",
            ) from None

    def _found(self, key: tuple[str | int, ...], use: str, suffix: str) -> Any:
        """What a name or an import path means."""
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", use):
            raise self._error(
                key, f"{use!r} is no import path: package.module.Class, or a plugin's name"
            )
        if "." not in use:
            if not suffix:
                raise self._error(key, f"{use!r} is no import path: module.name is wanted")
            return self._imported(key, f"{PLUGIN}{use}.{suffix}")
        head = use.partition(".")[0]
        if head != "livekit" and _plugin(head):
            # openai.LLM is the plugin's, though there is a package openai as well
            with contextlib.suppress(_Absent):
                return self._walked(f"{PLUGIN}{use}")
        return self._imported(key, use)

    def _imported(self, key: tuple[str | int, ...], path: str) -> Any:
        try:
            return self._walked(path)
        except _Absent as absent:
            raise self._error(key, str(absent)) from None
        except Exception as error:  # whatever a module does when it is imported
            what = f"{path} can't be imported: {type(error).__name__}: {error}"
            raise self._error(key, what) from None

    def _walked(self, path: str) -> Any:
        """Import as much of the path as are modules, and take the rest as attributes."""
        parts = path.split(".")
        module: Any = None
        count = len(parts)
        while count > 0 and module is None:
            name = ".".join(parts[:count])
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:
                missing = error.name or name
                if not (name == missing or name.startswith(missing + ".")):
                    raise _Absent(f"{name} needs the module {missing}: install it") from None
                count -= 1
        if path.startswith(PLUGIN) and count < 3:
            package = f"livekit-plugins-{parts[2].replace('_', '-')}"
            raise _Absent(f'needs a plugin: pip install "{package}"')
        if module is None:
            raise _Absent(
                f"there is no module {parts[0]!r}: install it where the worker runs, or put it "
                "beside the persona's file"
            )
        found = module
        for index in range(count, len(parts)):
            try:
                found = getattr(found, parts[index])
            except AttributeError:
                where = ".".join(parts[:index])
                near = difflib.get_close_matches(parts[index], dir(found), 1)
                hint = f": did you mean {near[0]}?" if near else ""
                raise _Absent(f"{where} has no {parts[index]}{hint}") from None
        return found

    def _guarded(
        self,
        key: tuple[str | int, ...],
        use: str,
        make: Callable[[], Any],
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        try:
            return make()
        except ConfigError as error:
            raise self._error(key, str(error)) from None
        except Exception as error:  # a plug-in's own complaint, about a missing key mostly
            text = _discreet(str(error) or type(error).__name__, options or {})
            raise self._error(key, f"{use}: {text}") from None

    def _error(self, key: tuple[str | int, ...], what: str) -> ConfigError:
        return ConfigError(f"{place(self._persona, 'agent', *key)}: {what}")


class _Absent(Exception):
    """There is no such module, or nothing of that name in it."""


def _plugin(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"{PLUGIN}{name}") is not None
    except (ModuleNotFoundError, ValueError):
        return False


def _inference(kind: str, model: str) -> Callable[..., Any] | None:
    """What makes a model of LiveKit Inference, which is a service of LiveKit Cloud."""
    makers: dict[str, Any] = {
        "llm": inference.LLM,
        "stt": inference.STT,
        "tts": inference.TTS,
        "realtime": getattr(inference, "RealtimeModel", None),
    }
    maker = makers.get(kind)
    if maker is None:
        return None

    def make(**options: Any) -> Any:
        if options:
            return maker(model=model, **options)
        return maker.from_model_string(model)

    return make


def _is_mcp(tool: Any) -> bool:
    """Whether it is an MCP server; the package for it is an extra of livekit-agents."""
    mcp = sys.modules.get("livekit.agents.llm.mcp")
    return mcp is not None and isinstance(tool, mcp.MCPServer)


def _discreet(text: str, options: Mapping[str, Any]) -> str:
    """A plug-in's message without the values that came from the environment or look secret."""
    for secret in _secrets(options):
        text = text.replace(secret, "...")
    return text


def _secrets(value: Any, name: str = "") -> list[str]:
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _secrets(item, str(key))]
    if isinstance(value, (list, tuple)):
        return [found for item in value for found in _secrets(item, name)]
    if not isinstance(value, str):
        return []
    found = [os.environ.get(one, "") for one in re.findall(r"\$\{(\w+)\}", value)]
    if SECRET.search(name):
        found.append(value)
    return [one for one in found if len(one) > 3]


def _article(name: str) -> str:
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
