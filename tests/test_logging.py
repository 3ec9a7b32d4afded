"""What a log may hold: fixed messages, and what people say or are called under `lk.pii.` alone.

livekit-agents has the same rule for itself, and its collector takes out what bears that mark.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
PERSONAL = "lk.pii."

KEYS = {
    "asset", "capacity", "characters", "code", "count", "engine", "event", "kind", "late", "made",
    "method", "ms", "origin", "output", "part", "path", "persona", "pictures", "pid", "port",
    "queue", "recipe", "seconds", "session", "share_of_time", "sink", "status", "total", "type",
    "url", "voice", "way",
}  # fmt: skip
"""What a record may tell besides: numbers, settings, and names that the program has given."""

TEXTS = {"advice", "error", "reason", "said", "why"}
"""Keys of texts. One that is made at run time is harmless only where somebody has looked."""

LOOKED_AT = {
    "files, devices, and libraries that work on pictures and sound": {
        "TensorRT",
        "a file could not be written",
        "a film ends early or can't be decoded",
        "about this clip",
        "about this source",
        "no CUDA graph",
        "no comparison with torch",
        "sound could not be followed",
        "sound was not taken",
        "the encoder can't be started",
        "the encoder is replaced",
        "the matte is made without its network",
        "what was compiled can't be kept",
    },
    "settings and personas, by file and key": {
        "a persona can't be used",
        "a persona can't be used any more",
        "a persona was left out",
        "a persona's agent can't be used",
        "a voice can't be had here",
        "voice left out",
    },
    "servers, voices and outputs that are out of reach, addresses without their keys": {
        "a message is left to come again",
        "a persona's outputs can't be begun",
        "an output changed its state",
        "livekit-server: way not open",
        "no other worker has the room",
        "the avatar can't be opened",
        "the record of messages fails",
        "voice failed, the next goes on",
        "voice failed, trying again",
    },
    "why an avatar is not there, in sentences of our own": {
        "a conversation failed",
        "a room could not be taken after all",
        "a room was passed on",
        "a turn was cut short",
        "an avatar failed",
        "it can't be opened again",
        "no avatar could be had: voice only",
        "the avatar is opened again",
        "there is no avatar: the agent speaks voice-only",
        "there is still no avatar",
    },
}
"""What such texts are about, and the messages that come with one."""

PEOPLE = {
    "caller_identity", "identity", "instructions", "metadata", "participant", "payload", "room",
    "sender", "text", "texts", "token", "transcript", "user_input", "words",
}  # fmt: skip
"""Names of variables and attributes that hold what somebody says, or is called, or a key."""


@dataclass(frozen=True)
class Call:
    """One call of a logger."""

    place: str
    node: ast.Call
    dicts: dict[str, ast.Dict]
    """Those in the same module, by the name of the variable that holds one."""

    @property
    def message(self) -> str | None:
        """The message, if it is a fixed one and nothing is put into it."""
        assert isinstance(self.node.func, ast.Attribute)
        count = 2 if self.node.func.attr == "log" else 1
        if len(self.node.args) != count or not isinstance(self.node.args[-1], ast.Constant):
            return None
        text = self.node.args[-1].value
        return text if isinstance(text, str) else None

    def extra(self) -> Iterator[tuple[str, ast.expr]]:
        """Keys and values of what comes with it; "?" is a key that can't be read here."""
        for keyword in self.node.keywords:
            if keyword.arg == "extra":
                yield from self._pairs(keyword.value)

    def _pairs(self, given: ast.expr) -> Iterator[tuple[str, ast.expr]]:
        if isinstance(given, ast.Name):
            given = self.dicts.get(given.id, given)
        if not isinstance(given, ast.Dict):
            yield "?", given
            return
        for key, value in zip(given.keys, given.values, strict=True):
            if key is None:  # **another
                yield from self._pairs(value)
            elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value, value
            else:
                yield "?", value

    def tells(self) -> bool:
        """Whether a text that is made at run time comes with it, where it would be read."""
        return any(
            _made(value) if key in TEXTS else _calls(value, "str")
            for key, value in self.extra()
            if not key.startswith(PERSONAL)
        )

    def wrong(self, looked_at: set[str]) -> Iterator[str]:
        """What breaks the rule."""
        if self.message is None:
            yield "its message is not one fixed string"
        if odd := {one.arg for one in self.node.keywords} - {"extra", "exc_info"}:
            yield f"it takes {sorted(map(str, odd))}"
        for key, value in self.extra():
            if key.startswith(PERSONAL):
                continue
            if key not in KEYS | TEXTS:
                yield f"the key {key!r} is unknown"
            if told := _names(value) & PEOPLE:
                yield f"{key!r} holds {sorted(told)}, which is somebody's"
        if self.tells() and self.message not in looked_at:
            yield "it comes with a text that nobody has looked at"


def _calls(value: ast.expr, function: str) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) == function


def _made(value: ast.expr) -> bool:
    """Whether it is a text that is made at run time, not a class's name or a number."""
    name = isinstance(value, ast.Attribute) and value.attr == "__name__"
    return not (name or isinstance(value, ast.Constant) or _calls(value, "int"))


def _names(value: ast.expr) -> set[str]:
    """Variables and attributes whose value it gives away: not those it only counts."""
    if _calls(value, "len"):
        return set()
    found = {one.id for one in ast.walk(value) if isinstance(one, ast.Name)}
    found |= {one.attr for one in ast.walk(value) if isinstance(one, ast.Attribute)}
    return {one.lstrip("_") for one in found}


def calls(source: str, place: str) -> Iterator[Call]:
    """Every call of a logger in a module."""
    tree = ast.parse(source)
    loggers = {"logger", "log", "logging"}  # and whatever else one is called
    dicts: dict[str, ast.Dict] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if "getLogger" in ast.unparse(node.value):
                loggers.add(node.targets[0].id)
            if isinstance(node.value, ast.Dict):
                dicts[node.targets[0].id] = node.value
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id in loggers
            and node.func.attr in LEVELS
        ):
            yield Call(f"{place}:{node.lineno}", node, dicts)


def ours() -> Iterator[Call]:
    for folder in ("voipavatar", "livekit"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield from calls(file.read_text(), str(file.relative_to(ROOT)))


def test_every_log_call_keeps_the_rule() -> None:
    looked_at = set().union(*LOOKED_AT.values())
    found = list(ours())
    assert len(found) > 100, "they are not found"
    wrong = [f"{call.place}: {what}" for call in found for what in call.wrong(looked_at)]
    assert not wrong, "\n".join(wrong)
    stale = looked_at - {call.message for call in found if call.tells()}
    assert not stale, "no text comes with these any more"
    unused = (KEYS | TEXTS) - {key for call in found for key, _ in call.extra()}
    assert not unused, "nobody uses these keys any more"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('logger.info(f"{name} came")', "fixed"),
        ('logger.info("%s came", name)', "fixed"),
        ('logger.log(level, name)', "fixed"),
        ('logging.info("came", stacklevel=2)', "stacklevel"),
        ('logger.info("came", extra={"who": name})', "'who' is unknown"),
        ('logger.info("came", extra={"lk_pii.who": name})', "unknown"),
        ('logger.info("came", extra={key: name})', "'?'"),
        ('logger.info("came", extra=everything())', "'?'"),
        ('about = {"who": name}\nlogger.info("came", extra={**about, "count": 1})', "'who'"),
        ('logger.info("came", extra={"session": call.caller_identity})', "caller_identity"),
        ('logger.info("came", extra={"part": self._text[:20]})', "text"),
        ('logger.info("came", extra={"error": str(error)})', "looked at"),
        ('logger.info("came", extra={"reason": reason})', "looked at"),
        ('logger.info("came", extra={"url": str(url)})', "looked at"),
        ('other = logging.getLogger("x")\nother.info(name)', "fixed"),
    ],
)  # fmt: skip
def test_what_breaks_the_rule_is_found(line: str, why: str) -> None:
    [call] = calls(line, "here")
    told = list(call.wrong({"gone"}))
    assert len(told) == 1 and why in told[0]


@pytest.mark.parametrize(
    "line",
    [
        'logger.info("came")',
        'logger.log(level, "came", extra={"lk.pii.who": name, "characters": len(text)})',
        'logger.info("came", extra={"error": type(error).__name__, "lk.pii.error": str(error)})',
        'logger.error("gone", extra={"error": str(error)})',
        'about = {"count": 1}\nlogger.error("came", exc_info=error, extra=about)',
    ],
)
def test_what_keeps_it_is_not(line: str) -> None:
    [call] = calls(line, "here")
    assert not list(call.wrong({"gone"}))
