"""What is to be said, cut up: plain text or SSML to pieces, breaks and marks. Pure functions.

SSML is a small, safe part of W3C SSML 1.1: `speak p s break emphasis prosody say-as phoneme sub
mark`. Other elements are passed over and their text is said. There are no entities beyond XML's
five, no document types, nothing is fetched. Voices get plain text; what they can't do is dropped,
but breaks, marks, volume and respellings work with every voice.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from ..errors import ConfigError, InputError
from ..media import Cue
from .text import LIMIT, clean, cuts, scrub, shared, speakable, words

Format: TypeAlias = Literal["auto", "plain", "ssml"]

LONGEST_BREAK = 10.0
"""Seconds."""

GUESS = 1 / 14
"""Seconds a character takes, roughly, with any voice."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something about the characters [start, end) of a piece's text.

    "said": say `value` instead; "ipa": they sound like `value`; "mark": a gesture named `value`.
    """

    start: int
    end: int
    kind: Literal["said", "ipa", "mark"]
    value: str


@dataclass(frozen=True, slots=True)
class Style:
    """How it is said: factors of tempo and pitch, and decibels."""

    rate: float = 1.0
    pitch: float = 1.0
    volume: float = 0.0

    def bent(self, rate: float = 1.0, pitch: float = 1.0, volume: float = 0.0) -> Style:
        """This style and another on top, within what still sounds like speech."""
        return Style(
            min(max(self.rate * rate, 0.4), 2.5),
            min(max(self.pitch * pitch, 0.6), 1.6),
            min(max(self.volume + volume, -60.0), 12.0),
        )


PLAIN = Style()


@dataclass(frozen=True, slots=True)
class Piece:
    """What is synthesised in one go: a sentence, or a part of one."""

    text: str
    notes: tuple[Note, ...] = ()
    style: Style = PLAIN
    ends: bool = True
    """Whether a sentence ends with it, so that a pause may follow."""

    def said(self, ipa: Callable[[str], str | None] | None = None) -> Said:
        """The text as a voice gets it. `ipa` writes a transcription so that the voice knows it."""
        parts: list[str] = []
        bends: list[tuple[int, int, int, int]] = []
        length = 0
        for start, end, note in self._parts():
            text = self.text[start:end]
            if note is not None:
                value = ipa(note.value) if note.kind == "ipa" and ipa is not None else None
                text = note.value if note.kind == "said" else value if value is not None else text
            bends.append((length, length + len(text), start, end))
            parts.append(text)
            length += len(text)
        return Said("".join(parts), tuple(bends), self)

    def markup(self) -> str:
        """The text for a voice that reads SSML inside `<voice>`: escaped, with what it can do."""
        parts = []
        for start, end, note in self._parts():
            text = escape(self.text[start:end])
            if note is not None and note.kind == "ipa":
                text = f'<phoneme alphabet="ipa" ph={quoteattr(note.value)}>{text}</phoneme>'
            elif note is not None:
                text = escape(note.value)
            parts.append(text)
        text, style = "".join(parts), self.style
        if style.rate != 1.0 or style.pitch != 1.0:
            rate, pitch = 100 * style.rate - 100, 100 * style.pitch - 100
            text = f'<prosody rate="{rate:+.0f}%" pitch="{pitch:+.0f}%">{text}</prosody>'
        return text

    def _parts(self) -> Iterator[tuple[int, int, Note | None]]:
        """The text from beginning to end: what is said as written, and what is not."""
        at = 0
        for note in self.notes:
            if note.kind != "mark" and note.start >= at:
                yield at, note.start, None
                yield note.start, note.end, note
                at = note.end
        yield at, len(self.text), None

    def after(self, position: int) -> Piece:
        """What is left from `position` of the text on."""
        notes = tuple(
            replace(note, start=note.start - position, end=note.end - position)
            for note in self.notes
            if note.start >= position
        )
        return replace(self, text=self.text[position:], notes=notes)


@dataclass(frozen=True, slots=True)
class Said:
    """A piece's text as it is said, and how to come back to what is written."""

    text: str
    bends: tuple[tuple[int, int, int, int], ...]
    """(start, end) in what is said, (start, end) in what is written."""
    piece: Piece

    def written(self, position: int) -> int:
        """The place in the piece's text that a place in the said text stands for."""
        index = max(0, bisect_right([bend[0] for bend in self.bends], position) - 1)
        low, high, start, end = self.bends[index]
        if high - low == end - start:
            return min(start + position - low, max(end - 1, 0))
        return start + (position - low) * (end - start) // max(1, high - low)


@dataclass(frozen=True, slots=True)
class Break:
    """Silence."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A gesture between pieces."""

    name: str


Item: TypeAlias = Piece | Break | Mark


class Lexicon:
    """How words are said that a voice gets wrong: a respelling, or IPA between slashes.

    `{"SQL": "sequel", "Nguyen": "/wɪn/"}`. A key written in lower case matches any case; whole
    words only; the longest key wins.
    """

    def __init__(self, words: Mapping[str, str] | None = None) -> None:
        self._values: dict[str, str] = {}
        for word, value in (words or {}).items():
            if not isinstance(word, str) or not isinstance(value, str) or not word.strip():
                raise ConfigError(f"lexicon: {word!r}: {value!r} is not a word and how it is said")
            self._values[word.strip()] = value.strip()
        self._pattern: re.Pattern[str] | None = None
        if self._values:
            keys = sorted(self._values, key=len, reverse=True)
            alternatives = "|".join(
                f"(?i:{re.escape(key)})" if key == key.lower() else re.escape(key) for key in keys
            )
            self._pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")

    def __bool__(self) -> bool:
        return self._pattern is not None

    def applied(self, piece: Piece) -> Piece:
        """The piece with what is said otherwise; what it says of itself goes first."""
        taken = [(note.start, note.end) for note in piece.notes if note.kind != "mark"]
        added = [
            note
            for note in self._notes(piece.text)
            if not any(start < note.end and note.start < end for start, end in taken)
        ]
        if not added:
            return piece
        notes = sorted((*piece.notes, *added), key=lambda note: (note.start, note.end))
        return replace(piece, notes=tuple(notes))

    def _notes(self, text: str) -> Iterator[Note]:
        """What is said otherwise in `text`, in order."""
        if self._pattern is None:
            return
        for match in self._pattern.finditer(text):
            word = match.group()
            value = self._values.get(word) or self._values[word.lower()]
            if len(value) > 2 and value[0] == value[-1] == "/":
                yield Note(match.start(), match.end(), "ipa", value[1:-1])
            else:
                yield Note(match.start(), match.end(), "said", value)


def script(text: str, *, limit: int = LIMIT, format: Format = "auto") -> list[Item]:
    """What a voice does, in order, for a text; nothing for a text with no sound and no mark.

    "auto" takes what begins with `<speak` for SSML. Raises InputError for too long a text and for
    SSML that can't be read, with line and column.
    """
    markup = format == "ssml" or (
        format == "auto"
        and isinstance(text, str)
        and re.match(r"\s*(<\?xml[^>]*>\s*)?<speak\b", text)
    )
    runs = _parse(text, limit) if markup else [_Run(clean(text, limit))]
    items: list[Item] = []
    for run in runs:
        if isinstance(run, _Run):
            items += _pieces(run)
        elif isinstance(run, Break) and items and isinstance(items[-1], Break):
            longer = min(items[-1].seconds + run.seconds, LONGEST_BREAK)
            items[-1] = Break(longer)
        else:
            items.append(run)
    if not any(isinstance(item, Piece | Mark) for item in items):
        return []
    return items


@dataclass(slots=True)
class _Run:
    """Text in one style."""

    text: str
    notes: list[Note] = field(default_factory=list)
    style: Style = PLAIN
    follows: bool = False
    """Whether more of the same sentence comes after it."""


def _pieces(run: _Run) -> Iterator[Piece | Mark]:
    text, notes = run.text, run.notes
    spans = cuts(text, protected=[(n.start, n.end) for n in notes if n.kind != "mark"])
    last = len(spans) - 1
    done = 0
    for index, (start, end, ends) in enumerate(spans):
        # Marks in the white space before the piece belong to its beginning.
        inside = tuple(
            replace(note, start=max(note.start, start) - start, end=max(note.end, start) - start)
            for note in notes
            if done <= note.start < end or (index == last and note.start >= end)
        )
        done = end
        if speakable(text[start:end]) or any(note.kind != "mark" for note in inside):
            yield Piece(
                text[start:end], inside, run.style, ends and not (run.follows and index == last)
            )
        else:
            yield from (Mark(note.value) for note in inside)
    if not spans:
        yield from (Mark(note.value) for note in notes if note.kind == "mark")


# --- SSML ---------------------------------------------------------------------------------------

_STRENGTHS = {
    "none": 0.0,
    "x-weak": 0.1,
    "weak": 0.2,
    "medium": 0.4,
    "strong": 0.7,
    "x-strong": 1.2,
}
_RATES = {"x-slow": 0.5, "slow": 0.75, "medium": 1.0, "default": 1.0, "fast": 1.25, "x-fast": 1.6}
_PITCHES = {"x-low": 0.75, "low": 0.87, "medium": 1.0, "default": 1.0, "high": 1.15, "x-high": 1.3}
_VOLUMES = {
    "silent": -60.0,
    "x-soft": -12.0,
    "soft": -6.0,
    "medium": 0.0,
    "default": 0.0,
    "loud": 4.0,
    "x-loud": 6.0,
}
_EMPHASIS = {
    "strong": Style(0.88, 1.06, 3.0),
    "moderate": Style(0.94, 1.03, 1.5),
    "none": PLAIN,
    "reduced": Style(1.06, 0.98, -2.0),
}
_NUMBER = r"([+-]?)(\d+(?:\.\d+)?|\.\d+)"
_DEPTH = 40


class _Reader:
    """Expat's calls to a list of runs, breaks and marks."""

    def __init__(self) -> None:
        self.out: list[_Run | Break | Mark] = []
        self._styles = [PLAIN]
        self._open: list[tuple[str, dict[str, str], int]] = []  # element, attributes, text before
        self._parser = expat.ParserCreate(namespace_separator=" ")
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.EntityDeclHandler = self._refuse
        self._parser.UnparsedEntityDeclHandler = self._refuse
        self._parser.ExternalEntityRefHandler = self._refuse

    def read(self, text: str) -> list[_Run | Break | Mark]:
        try:
            self._parser.Parse(text.encode("utf-8", "replace"), True)
        except expat.ExpatError as error:
            raise InputError(
                f"the SSML can't be read at line {error.lineno}, column {error.offset + 1}: "
                f"{expat.ErrorString(error.code)}"
            ) from None
        return [
            one for one in self.out if not isinstance(one, _Run) or one.text.strip() or one.notes
        ]

    def _wrong(self, what: str) -> InputError:
        line, column = self._parser.CurrentLineNumber, self._parser.CurrentColumnNumber + 1
        return InputError(f"the SSML can't be read at line {line}, column {column}: {what}")

    def _refuse(self, *_: object) -> int:
        raise self._wrong("document types and entities are not allowed")

    @property
    def _run(self) -> _Run:
        """The run that text goes to."""
        if (
            not self.out
            or not isinstance(self.out[-1], _Run)
            or (self.out[-1].style != self._styles[-1])
        ):
            if self.out and isinstance(self.out[-1], _Run):
                self.out[-1].follows = True
            self.out.append(_Run("", style=self._styles[-1]))
        run = self.out[-1]
        assert isinstance(run, _Run)
        return run

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(" ")[2]
        if not self._open and name != "speak":
            raise self._wrong(f"the outermost element is <{name}>, not <speak>")
        if len(self._open) >= _DEPTH:
            raise self._wrong(f"elements are nested deeper than {_DEPTH}")
        style = self._styles[-1]
        if name == "prosody":
            style = style.bent(
                self._factor(attributes, "rate", _RATES),
                self._factor(attributes, "pitch", _PITCHES),
                self._volume(attributes.get("volume")),
            )
        elif name == "emphasis":
            added = _EMPHASIS.get(attributes.get("level", "moderate"))
            if added is None:
                raise self._wrong("emphasis takes level strong, moderate, none or reduced")
            style = style.bent(added.rate, added.pitch, added.volume)
        elif name == "break":
            self._break(attributes)
        elif name == "mark":
            mark = attributes.get("name", "").strip()
            if not re.fullmatch(r"[\w.:-]{1,64}", mark):
                raise self._wrong("mark needs a name of letters, digits and _ . : -")
            run = self._run
            run.notes.append(Note(len(run.text), len(run.text), "mark", mark))
        elif name in ("p", "s"):
            self._run.text += "\n"
        self._styles.append(style)
        run_length = len(self._run.text) if name in ("sub", "phoneme", "say-as") else 0
        self._open.append((name, attributes, run_length))

    def _end(self, _: str) -> None:
        name, attributes, before = self._open.pop()
        self._styles.pop()
        if name in ("p", "s"):
            self._run.text += "\n"
        elif name in ("sub", "phoneme", "say-as"):
            run = self._run
            inner = run.text[before:]
            start = before + len(inner) - len(inner.lstrip())
            end = before + len(inner.rstrip())
            if end <= start:
                return
            if name == "sub":
                alias = clean(attributes.get("alias", ""))
                if not alias:
                    raise self._wrong("sub needs an alias")
                run.notes.append(Note(start, end, "said", alias))
            elif name == "phoneme":
                if attributes.get("alphabet", "ipa") != "ipa":
                    return  # the text is said as it is written
                ipa = re.sub(r"[^\w\sˈˌːˑ̩̯̃͡-]|[._\d]", "", clean(attributes.get("ph", "")))
                if not ipa.strip():
                    raise self._wrong("phoneme needs ph with IPA in it")
                run.notes.append(Note(start, end, "ipa", ipa.strip()))
            else:
                said = _said_as(run.text[start:end], attributes)
                if said is not None:
                    run.notes.append(Note(start, end, "said", said))

    def _text(self, text: str) -> None:
        # White space in XML is layout; `p` and `s` end sentences.
        text = re.sub(r"\s+", " ", scrub(text))
        run = self._run
        run.text += text.lstrip(" ") if run.text.endswith((" ", "\n")) else text

    def _break(self, attributes: dict[str, str]) -> None:
        seconds = _STRENGTHS["medium"]
        if "time" in attributes:
            match = re.fullmatch(r"\s*\+?(\d+(?:\.\d+)?|\.\d+)\s*(ms|s)\s*", attributes["time"])
            if match is None:
                raise self._wrong("break takes time as 500ms or 1.5s")
            seconds = float(match.group(1)) / (1000 if match.group(2) == "ms" else 1)
        elif "strength" in attributes:
            if attributes["strength"] not in _STRENGTHS:
                raise self._wrong("break takes strength " + ", ".join(_STRENGTHS))
            seconds = _STRENGTHS[attributes["strength"]]
        if seconds > 0:
            if self.out and isinstance(self.out[-1], _Run):
                self.out[-1].follows = True
            self.out.append(Break(min(seconds, LONGEST_BREAK)))

    def _factor(self, attributes: dict[str, str], name: str, known: Mapping[str, float]) -> float:
        value = attributes.get(name, "medium").strip()
        if value in known:
            return known[value]
        match = re.fullmatch(_NUMBER + r"\s*(%|st|Hz)?", value)
        if match is None:
            raise self._wrong(f"prosody takes {name} as 90%, +10% or {', '.join(known)}")
        sign, number, unit = match.group(1), float(match.group(2)), match.group(3)
        signed = -number if sign == "-" else number
        if unit == "st":
            return float(2 ** (signed / 12))
        if unit == "Hz":  # of a voice in the middle between men's and women's
            return max(0.1, 1 + signed / 160) if sign else number / 160
        if unit == "%":
            return max(0.1, 1 + signed / 100) if sign else number / 100
        return max(0.1, 1 + signed) if sign else number

    def _volume(self, value: str | None) -> float:
        if value is None:
            return 0.0
        value = value.strip()
        if value in _VOLUMES:
            return _VOLUMES[value]
        match = re.fullmatch(_NUMBER + r"\s*dB", value)
        if match is None:
            raise self._wrong(f"prosody takes volume as +3dB or {', '.join(_VOLUMES)}")
        return float(match.group(1) + match.group(2))


def _parse(text: str, limit: int) -> list[_Run | Break | Mark]:
    if not isinstance(text, str):
        raise InputError(f"the text to say is {type(text).__name__}, not a string")
    if len(text) > 4 * limit:
        raise InputError(
            f"the SSML has {len(text):,} characters, and {4 * limit:,} is the most that is taken: "
            "send it in parts, or raise VOIPAVATAR_MAX_TEXT"
        )
    runs = _Reader().read(text.strip())
    clean("".join(run.text for run in runs if isinstance(run, _Run)), limit)  # for its length
    return runs


_SIGNS = {
    "@": "at",
    "#": "number sign",
    "&": "and",
    "+": "plus",
    "-": "dash",
    "_": "underscore",
    ".": "dot",
    "/": "slash",
    "*": "star",
    "%": "percent",
    ":": "colon",
    "=": "equals",
}


def _said_as(text: str, attributes: Mapping[str, str]) -> str | None:
    """What `say-as` makes of a text; None: say it as it is written."""
    kind = attributes.get("interpret-as", "")
    if kind in ("characters", "spell-out", "verbatim"):
        return ", ".join(_SIGNS.get(char, char.upper()) for char in text if not char.isspace())
    if kind in ("digits", "telephone"):
        groups = re.findall(r"\+?\d+", text)
        if groups:
            said = (" ".join(_SIGNS.get(char, char) for char in group) for group in groups)
            return ", ".join(said)
    if kind == "ordinal" and (match := re.fullmatch(r"\s*(\d+)\s*", text)):
        number = int(match.group(1))
        teen = 10 <= number % 100 <= 20
        return f"{number}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
    return None


# --- words of a voice to words of the text --------------------------------------------------------


class Placer:
    """Finds a voice's words again in the text, as they come, and gives them as they are written.

    Every word of the piece gets exactly one cue in the end, in order: what the voice joined or
    left out shares the time of what it joined it to. Times count from the piece's start.
    """

    def __init__(self, said: Said) -> None:
        self.said = said
        folded = said.text.casefold()
        self._text = folded if len(folded) == len(said.text) else said.text.lower()
        written = said.piece.text
        spans = words(written)
        self._starts = [start for start, _ in spans]
        self._texts = [written[start:end] for start, end in spans]
        self._at = 0  # in the said text
        # Where in the said text each written word is complete.
        self._ends: dict[int, int] = {}
        for low, high in words(said.text):
            bare = len(re.sub(r"\W+$", "", said.text[low:high]))
            self._ends[self._index(low)] = low + bare
        self._done = 0  # words whose cues are out
        self._open: tuple[int, float, float] | None = None  # last word, start and end of the group
        self._last: Cue | None = None  # that is out

    def place(self, cue: Cue) -> list[Cue]:
        """The cues that are complete now that `cue` is known."""
        bare = re.sub(r"^\W+|\W+$", "", cue.text)
        if not bare or self._done == len(self._starts):
            return []
        position = self._text.find(bare.casefold(), self._at, self._at + len(bare) + 120)
        if position >= 0:
            self._at = position + len(bare)
            index = self._index(position)
        else:
            index = min(self._open[0] + 1 if self._open else 0, len(self._starts) - 1)
        done: list[Cue] = []
        if self._open is None:
            self._open = (max(index, self._done), cue.start, cue.end)
        elif index <= self._open[0]:
            last, start, end = self._open
            self._open = (last, start, max(end, cue.end))
        else:
            done = self._close(index)
            self._open = (index, cue.start, cue.end)
        last = self._open[0]
        if self._at >= self._ends.get(last, len(self._text)):
            done += self._close(last + 1)
        return done

    def finish(self) -> list[Cue]:
        """The rest: what follows the last word that the voice told is shared with it."""
        if self._open is None and self._last is not None and self._done < len(self._starts):
            self._open = (self._done, self._last.end, self._last.end)
        return self._close(len(self._starts)) if self._open is not None else []

    def _index(self, position: int) -> int:
        """The written word that a place in the said text belongs to."""
        return max(0, bisect_right(self._starts, self.said.written(position)) - 1)

    def rest(self, heard: float) -> int | None:
        """Where in the text to go on after `heard` seconds of it; None when no time is known."""
        if self._open is not None:
            last, _, end = self._open
            index = self._done if end > heard + 0.02 else last + 1
        elif self._last is not None:
            index = self._done - 1 if self._last.end > heard + 0.02 else self._done
        else:
            return None
        return self._starts[index] if index < len(self._starts) else len(self.said.piece.text)

    def _close(self, following: int) -> list[Cue]:
        """The open group ends before the word `following`: all that lies between belongs to it."""
        assert self._open is not None
        _, start, end = self._open
        texts = self._texts[self._done : following]
        self._done, self._open = following, None
        cues = [
            Cue("word", text, low, high)
            for text, (low, high) in zip(texts, shared(texts, start, end), strict=True)
        ]
        self._last = cues[-1]
        return cues


class Gestures:
    """Times of a piece's marks: each at the word that follows it, as soon as that is known.

    A voice without word times gets them by their place in the text, at once.
    """

    def __init__(self, piece: Piece, timed: bool) -> None:
        spans = words(piece.text)
        self._piece = piece
        self._timed = timed
        self._pending = [
            (sum(end <= note.start for _, end in spans), note)
            for note in piece.notes
            if note.kind == "mark"
        ]

    def due(self, word_cues: Sequence[Cue]) -> list[Cue]:
        """Those that are known now that these words are."""
        if not self._timed:
            return self.rest((), GUESS * len(self._piece.text))
        cues = []
        while self._pending and self._pending[0][0] < len(word_cues):
            index, note = self._pending.pop(0)
            at = word_cues[index].start
            cues.append(Cue("gesture", note.value, at, at))
        return cues

    def rest(self, word_cues: Sequence[Cue], seconds: float) -> list[Cue]:
        """The others, in a piece that took `seconds`."""
        cues = self.due(word_cues) if self._timed else []
        for _, note in self._pending:
            part = note.start / max(1, len(self._piece.text))
            at = word_cues[-1].end if word_cues else seconds * part
            cues.append(Cue("gesture", note.value, at, at))
        self._pending.clear()
        return cues
