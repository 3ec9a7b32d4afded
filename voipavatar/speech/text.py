"""Text on its way to a voice: made safe, found speechless, cut into sentences. Pure functions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ..errors import InputError

LIMIT = 20_000
"""Characters in one text, unless a setting says otherwise: about twenty minutes of speech."""

LONGEST = 280
"""Characters in one piece. Longer sentences are cut at a clause, else between words."""

# Pictographs, dingbats, flags, keycaps, skin tones, tags. Voices read their names aloud, or choke.
_EMOJI = re.compile(
    "(?:[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\U000e0000-\U000e007f]+\u200d*)+"
)
_VARIANTS = re.compile("[\ufe00-\ufe0f\u20e3]")  # of a character before: "5" as a key cap
_SPACES = re.compile(r"[^\S\n]+")
_LINES = re.compile(r" ?\n[ \n]*")
_ALONE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff"  # Japanese, Chinese, Thai, Lao
_WORD = re.compile(f"[{_ALONE}][^\\s\\w]*|[^\\s{_ALONE}]+")
_JOINERS = "\u200c\u200d"  # shape letters in Persian and the Indic scripts
_SPOKEN_SIGNS = "%&@+=#°§±×÷"

# A full stop after one of these doesn't end a sentence.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr gen col sgt capt lt rev hon gov sen rep vs etc e.g i.e approx "
    "dept est inc ltd co corp no fig vol p pp ch sec art al cf ca bzw z.b d.h u.a usw hr fr nr "
    "str m mme mlle jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
_END = re.compile(r"""[.!?…。！？।؟۔]+["'”’»)\]]*(?=\s|$)|[。！？।]+["'”’」』）]*|\n""")
_CLAUSE = re.compile(r"""[,;:，；：、—–]["'”’»)\]]*(?=\s)|[，；：、]|\s[—–-](?=\s)""")


def clean(text: str, limit: int = LIMIT) -> str:
    """The text without what no voice can say: control and format characters, emoji, odd spaces.

    Single newlines are kept as sentence ends. Raises InputError for what isn't text and for more
    than `limit` characters.
    """
    if not isinstance(text, str):
        raise InputError(f"the text to say is {type(text).__name__}, not a string")
    if len(text) > limit:
        raise InputError(
            f"the text has {len(text):,} characters, and {limit:,} is the most that is said in "
            "one go: send it in parts, or raise VOIPAVATAR_MAX_TEXT"
        )
    for line in ("\r\n", "\r", "\u2028", "\u2029"):
        text = text.replace(line, "\n")
    return _LINES.sub("\n", _SPACES.sub(" ", scrub(text))).strip()


def scrub(text: str) -> str:
    """The text without control and format characters, emoji, unassigned and private ones."""
    kept = []
    text = _VARIANTS.sub("", unicodedata.normalize("NFC", text))
    for char in _EMOJI.sub(" ", text):
        kind = unicodedata.category(char)
        if char == "\n" or char in _JOINERS:
            kept.append(char)
        elif char == "\t" or kind == "Zs":
            kept.append(" ")
        elif kind not in ("Cc", "Cf", "Cs", "Co", "Cn"):
            kept.append(char)
    return "".join(kept)


def speakable(text: str) -> bool:
    """Whether a voice would make a sound of it: a letter, a number, a currency or spoken sign."""
    for char in text:
        kind = unicodedata.category(char)
        if kind[0] in "LN" or kind == "Sc" or char in _SPOKEN_SIGNS:
            return True
    return False


def words(text: str) -> list[tuple[int, int]]:
    """Where the words of a text are: [start, end) of each, punctuation included as it is written.

    Scripts without spaces are taken character by character; what has no sound is left out.
    """
    spans = (match.span() for match in _WORD.finditer(text))
    return [(start, end) for start, end in spans if speakable(text[start:end])]


def shared(texts: Sequence[str], start: float, end: float) -> list[tuple[float, float]]:
    """[start, end) in parts by the length of the texts: for words that are known only together."""
    edges = [0]
    for text in texts:
        edges.append(edges[-1] + max(1, len(text)))
    step = (end - start) / max(1, edges[-1])
    return [
        (start + low * step, start + high * step)
        for low, high in zip(edges, edges[1:], strict=False)
    ]


def split(text: str, longest: int = LONGEST) -> list[str]:
    """The pieces of a cleaned text that have a sound. See `cuts`."""
    found = (text[start:end] for start, end, _ in cuts(text, longest))
    return [piece for piece in found if speakable(piece)]


def cuts(
    text: str, longest: int = LONGEST, protected: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int, bool]]:
    """Where to cut a cleaned text into pieces that are synthesised one after another.

    A piece is a sentence; long ones are cut at clauses, then between words, then anywhere, but
    never inside a `protected` span. Each piece is [start, end) and whether a sentence ends there.
    Only white space is between pieces.
    """
    sentences: list[tuple[int, int]] = []
    start = 0
    for match in _END.finditer(text):
        if match.start() < start or not _ends(text, start, match):
            continue
        if any(low < match.end() <= high and match.end() < high for low, high in protected):
            continue
        sentences.append((start, match.end()))
        start = match.end()
    sentences.append((start, len(text)))
    pieces: list[tuple[int, int, bool]] = []
    for low, high in sentences:
        while True:
            while low < high and text[low].isspace():
                low += 1
            while low < high and text[high - 1].isspace():
                high -= 1
            if high - low <= longest:
                break
            at = low + _cut(text[low:high], longest)
            for span in protected:
                if span[0] < at < span[1]:
                    at = span[0] if span[0] > low else span[1]
            if at >= high:
                break
            end = at
            while end > low and text[end - 1].isspace():
                end -= 1
            pieces.append((low, end, False))
            low = at
        if low < high:
            pieces.append((low, high, True))
    return pieces


def _ends(text: str, start: int, match: re.Match[str]) -> bool:
    """Whether the stop that was found ends the sentence that began at `start`."""
    tail = text[match.end() : match.end() + 8].lstrip(" ")
    if match.group().rstrip("'\"”’»)]") in ("...", "…") and tail[:1].islower():
        return False
    if match.group() != ".":
        return True
    head = text[start : match.start()].split()
    word = head[-1].lstrip("([\"'“‘«").lower() if head else ""
    if word in _ABBREVIATIONS:
        return False
    # An initial, as in "J. Smith", or "U.S." in the middle of a sentence.
    if re.fullmatch(r"(?:[^\W\d_]\.)*[^\W\d_]", word):
        return word == "i" or not tail or tail[0] == "\n"
    return not tail[:1].islower()


def _cut(piece: str, longest: int) -> int:
    """Where to cut: the last clause end in the second half, else the last space, else the limit."""
    clauses = [m.end() for m in _CLAUSE.finditer(piece, 0, longest)]
    if clauses and clauses[-1] >= longest // 3:
        return clauses[-1]
    space = piece.rfind(" ", longest // 3, longest)
    return space if space > 0 else longest
