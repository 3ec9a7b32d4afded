"""Text and SSML to pieces, and a voice's words back to the text. No voice is needed."""

from __future__ import annotations

import time

import pytest

from voipavatar.errors import ConfigError, InputError
from voipavatar.media import Cue
from voipavatar.speech.script import (
    Break,
    Gestures,
    Lexicon,
    Mark,
    Note,
    Piece,
    Placer,
    Style,
    script,
)
from voipavatar.speech.text import clean, cuts, shared, split, words


def ssml(body: str) -> list[Piece | Break | Mark]:
    return script(f"<speak>{body}</speak>")


def texts(items: list[Piece | Break | Mark]) -> list[str]:
    return [item.text for item in items if isinstance(item, Piece)]


# --- plain text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Smith of the U.S. army, e.g. J. Doe, has 3.5 km.", None),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("Wait... what? No!!! Yes.", ["Wait... what?", "No!!!", "Yes."]),
        ("First line\nsecond line", ["First line", "second line"]),
        ("これは文です。次の文です！", ["これは文です。", "次の文です！"]),
        ("यह है। वह था।", ["यह है।", "वह था।"]),
        ("See www.example.com/a.b now. Ok.", ["See www.example.com/a.b now.", "Ok."]),
        ("It was me. I. did. it.", ["It was me.", "I.", "did. it."]),
        ("... ?! —", []),
    ],
)
def test_sentences(text: str, pieces: list[str] | None) -> None:
    assert split(clean(text)) == ([text] if pieces is None else pieces)


def test_cutting_loses_no_word() -> None:
    text = clean(("Some words, and more; " * 40 + "x" * 700 + ". ") * 3 + "漢字" * 400)
    found = cuts(text)
    assert all(end - start <= 280 for start, end, _ in found)
    assert "".join(text[start:end] for start, end, _ in found).replace(" ", "") == text.replace(
        " ", ""
    )
    assert sum(ends for _, _, ends in found) == 4


def test_cleaning() -> None:
    assert clean(" a\x00b\x1b[31m\tc\r\n\r\n d\u202e\ufeff\ud800 ") == "ab[31m c\nd"
    assert clean("Hi 👋🏽 there 👨‍👩‍👧 5️⃣!") == "Hi there 5!"
    assert clean("می‌روم") == "می‌روم"  # the joiner shapes the word
    assert clean("e\u0301") == "é"
    with pytest.raises(InputError, match="11 characters, and 10"):
        clean("x" * 11, 10)
    with pytest.raises(InputError, match="NoneType"):
        clean(None)  # type: ignore[arg-type]


def test_cleaning_and_cutting_stay_quick() -> None:
    """Nothing in the patterns takes quadratic time."""
    begun = time.perf_counter()
    for text in ("a" * 20_000, "." * 20_000, ". " * 10_000, "a." * 10_000, "\n " * 10_000):
        script(text)
        script(f"<speak>{text}</speak>")
    assert time.perf_counter() - begun < 10


def test_words_of_scripts_without_spaces() -> None:
    text = "今日は、ok です。 — “Hi!”"
    assert [text[a:b] for a, b in words(text)] == list("今日") + [
        "は、",
        "ok",
        "で",
        "す。",
        "“Hi!”",
    ]


def test_shared_time() -> None:
    assert shared(["aa", "bb"], 1.0, 2.0) == [(1.0, 1.5), (1.5, 2.0)]
    assert shared([], 1.0, 2.0) == []


# --- SSML -----------------------------------------------------------------------------------------


def test_plain_text_is_not_taken_for_ssml() -> None:
    assert texts(script("a < b & c <speak>")) == ["a < b & c <speak>"]
    assert texts(script("<speak>not read</speak>", format="plain")) == ["<speak>not read</speak>"]


def test_breaks_and_paragraphs() -> None:
    items = ssml('One <break time="250ms"/> two.<p>Three</p><s>four</s><break strength="strong"/>')
    assert texts(items) == ["One", "two.", "Three", "four"]
    assert items[1] == Break(0.25)
    assert items[-1] == Break(0.7)
    assert isinstance(items[0], Piece) and not items[0].ends
    assert isinstance(items[2], Piece) and items[2].ends
    assert ssml('a<break time="99s"/><break time="3s"/>b')[1] == Break(10.0)


def test_prosody_nests_and_stays_in_bounds() -> None:
    items = ssml(
        'a <prosody rate="120%" pitch="+12st" volume="-6dB">b <prosody rate="x-fast">c</prosody>'
        '</prosody> <prosody rate="x-slow"><prosody rate="-50%">d</prosody></prosody> '
        '<emphasis level="strong">e</emphasis>'
    )
    styles = [item.style for item in items if isinstance(item, Piece)]
    assert styles[0] == Style()
    assert styles[1] == Style(1.2, 1.6, -6.0)  # an octave is too much
    assert styles[2].rate == pytest.approx(1.92)
    assert styles[3].rate == 0.4
    assert styles[4].volume > 0 and styles[4].rate < 1
    # One sentence in several styles has no pause inside.
    assert [item.ends for item in items if isinstance(item, Piece)] == [False] * 4 + [True]


def test_substitutions() -> None:
    piece = ssml(
        'The <sub alias="World Wide Web Consortium">W3C</sub> says '
        '<phoneme alphabet="ipa" ph="təˈmɑːtəʊ">tomato</phoneme>, '
        '<say-as interpret-as="characters">ab1</say-as>, '
        '<say-as interpret-as="telephone">+49 30 12</say-as>, '
        '<say-as interpret-as="ordinal">23</say-as> <say-as interpret-as="date">1/2</say-as>.'
    )[0]
    assert isinstance(piece, Piece)
    assert piece.text == "The W3C says tomato, ab1, +49 30 12, 23 1/2."
    assert (
        piece.said().text
        == "The World Wide Web Consortium says tomato, A, B, 1, plus 4 9, 3 0, 1 2, 23rd 1/2."
    )
    assert "[təˈmɑːtəʊ]" in piece.said(lambda ipa: f"[{ipa}]").text


def test_marks_are_where_they_were() -> None:
    items = ssml('<mark name="wave"/>Hello <mark name="nod"/>there. Next.<mark name="end"/>')
    assert texts(items) == ["Hello there.", "Next."]
    one, other = items[0], items[1]
    assert isinstance(one, Piece) and isinstance(other, Piece)
    assert [(note.start, note.value) for note in one.notes] == [(0, "wave"), (6, "nod")]
    assert [(note.start, note.value) for note in other.notes] == [(5, "end")]
    assert ssml('<mark name="wave"/>') == [Mark("wave")]
    assert ssml('<break time="1s"/>') == []


def test_unknown_elements_are_passed_over() -> None:
    items = script(
        '<?xml version="1.0"?><speak version="1.1" xmlns="http://www.w3.org/2001/10/synthesis" '
        'xmlns:x="urn:x" xml:lang="en"><x:express as="happy">Hi &amp; <audio src="http://x/y">bye'
        "</audio></x:express></speak>"
    )
    assert texts(items) == ["Hi & bye"]


BOMB = '<!DOCTYPE speak [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]><speak>&b;</speak>'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<speak>a", "line 1, column 9"),
        ("<speak>\n<p>a</speak>", "line 2, column"),
        ("<speak>a</speak>b", "junk after document"),
        ("<speak>&nbsp;</speak>", "undefined entity"),
        (BOMB, "outermost|document types"),
        ('<!DOCTYPE speak SYSTEM "file:///etc/passwd"><speak>a</speak>', "document types"),
        ('<speak><break time="soon"/></speak>', "500ms"),
        ('<speak><prosody rate="very">a</prosody></speak>', "rate as 90%"),
        ('<speak><prosody volume="11">a</prosody></speak>', r"\+3dB"),
        ("<speak><mark/></speak>", "mark needs a name"),
        ("<speak><sub>a</sub></speak>", "sub needs an alias"),
        ('<speak><phoneme ph="123">a</phoneme></speak>', "phoneme needs ph"),
        ("<speak>" + "<p>" * 100 + "</p>" * 100 + "</speak>", "nested deeper"),
        ("<speak>" + "a" * 30_000 + "</speak>", "30,000 characters"),
        ("<speak>" + "<p/>" * 30_000 + "</speak>", "80,000"),
    ],
)
def test_bad_ssml_says_where_and_why(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        script(text, format="ssml")


def test_control_characters_and_emoji_in_ssml() -> None:
    assert texts(ssml("a\u202eb 😀 c")) == ["ab c"]
    assert ssml("😀 …") == []


# --- lexicon --------------------------------------------------------------------------------------


def test_lexicon() -> None:
    lexicon = Lexicon({"sql": "sequel", "Nguyen": "/wɪn/", "New York": "Noo York", "C++": "see"})
    piece = lexicon.applied(Piece("SQL by Nguyen in New York, nguyen mysql C++."))
    assert piece.said().text == "sequel by Nguyen in Noo York, nguyen mysql see."
    assert piece.said(lambda ipa: f"[[{ipa}]]").text.startswith("sequel by [[wɪn]] in")
    # What the text itself says goes first.
    own = Piece("SQL", (Note(0, 3, "said", "my own"),))
    assert lexicon.applied(own).said().text == "my own"
    with pytest.raises(ConfigError, match="lexicon"):
        Lexicon({"a": 1})  # type: ignore[dict-item]


# --- words back to the text -----------------------------------------------------------------------


def placed(piece: Piece, cues: list[Cue]) -> list[tuple[str, float, float]]:
    placer = Placer(piece.said())
    done = [one for cue in cues for one in placer.place(cue)] + placer.finish()
    return [(cue.text, round(cue.start, 3), round(cue.end, 3)) for cue in done]


def cue(text: str, start: float, end: float) -> Cue:
    return Cue("word", text, start, end)


def test_words_get_their_punctuation_back() -> None:
    cues = [cue("hello", 0, 1), cue("there", 1, 2), cue("you", 3, 4)]
    assert placed(Piece("Hello, there — you!"), cues) == [
        ("Hello,", 0, 1),
        ("there", 1, 2),
        ("you!", 3, 4),
    ]


def test_a_respelt_word_is_shown_as_written() -> None:
    piece = Lexicon({"W3C": "double you three see"}).applied(Piece("The W3C says."))
    cues = [cue(w, i, i + 1) for i, w in enumerate("The double you three see says".split())]
    assert placed(piece, cues) == [("The", 0, 1), ("W3C", 1, 5), ("says.", 5, 6)]


def test_words_that_the_voice_leaves_out_share_time() -> None:
    assert placed(Piece("ab cd ef gh"), [cue("ab", 0, 1), cue("ef", 2, 4)]) == [
        ("ab", 0, 1),
        ("cd", 2, 3),
        ("ef", 3, 4),
        ("gh", 4, 4),
    ]


def test_words_said_in_parts() -> None:
    cues = [cue("forty", 0, 1), cue("two", 1, 2), cue("answers", 2, 3)]
    found = placed(Piece("42 answers"), cues)
    assert [text for text, _, _ in found] == ["42", "answers"]


def test_repeated_words_stay_in_order() -> None:
    cues = [cue("no", i, i + 1) for i in range(4)]
    assert placed(Piece("No no no no."), cues) == [
        ("No", 0, 1),
        ("no", 1, 2),
        ("no", 2, 3),
        ("no.", 3, 4),
    ]


def test_where_to_go_on() -> None:
    placer = Placer(Piece("one two three").said())
    assert placer.rest(0.5) is None
    placer.place(cue("one", 0, 1))
    assert placer.rest(0.5) == 0  # cut in the word: once more
    assert placer.rest(1.0) == 4
    placer.place(cue("two", 1, 2))
    placer.place(cue("three", 2, 3))
    assert placer.rest(3.0) == 13


def test_gestures_come_with_their_words() -> None:
    piece = Piece("one two", (Note(4, 4, "mark", "nod"), Note(7, 7, "mark", "end")))
    gestures = Gestures(piece, timed=True)
    assert gestures.due([cue("one", 0, 1)]) == []
    both = [cue("one", 0, 1), cue("two", 1, 2)]
    assert gestures.due(both) == [Cue("gesture", "nod", 1, 1)]
    assert gestures.rest(both, 2.5) == [Cue("gesture", "end", 2, 2)]
    assert gestures.rest(both, 2.5) == []
    untimed = Gestures(piece, timed=False).due([])
    assert [one.text for one in untimed] == ["nod", "end"]
    assert 0 < untimed[0].start < untimed[1].start
