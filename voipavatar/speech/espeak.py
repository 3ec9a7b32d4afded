"""eSpeak NG: the smallest voice, a hundred languages, phoneme and word times from the library.

The C library keeps all its state in globals and may be used by one thread at a time, so a process
has one (`_Library`), with one thread (`Door`) that every voice shares, a sentence at a time.
Facts of the interface: `speak_lib.h` of eSpeak NG 1.51.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import importlib.util
import math
import threading
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from livekit.agents import APIConnectOptions, tts
from livekit.agents.types import DEFAULT_API_CONNECT_OPTIONS

from ..errors import ConfigError, TransportError
from ..media import Cue, Int16
from .frames import CuedSpeech, CuedStream
from .script import Piece, Style
from .text import shared, words
from .voice import PAUSE, Chunk, Door, Hold, Missing

MISSING = (
    'the voice "espeak" needs: pip install "voipavatar[demo]", or the system\'s own library '
    "(Debian and Ubuntu: apt-get install libespeak-ng1)"
)

RATE = 22_050

# espeak_Initialize
_RETRIEVAL = 1
_PHONEME_EVENTS, _PHONEME_IPA, _DONT_EXIT = 0x0001, 0x0002, 0x8000
# espeak_Synth
_UTF8, _PHONEMES = 1, 0x100
_BY_CHARACTER = 1
# espeak_SetParameter
_SPEED, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
# espeak_EVENT
_LAST, _WORD, _PHONEME = 0, 1, 7

_CLOSURE = 0.045
"""Seconds of silence before a voiceless stop bursts, measured on the library's English."""

_HOLD = 2.0
"""Seconds of sound held back at most while a word is unfinished."""


class EspeakTTS(tts.TTS[Any]):
    """An eSpeak NG voice.

    voice: name as `espeak-ng --voices` lists it ("en-us", "de", "fr", "en+f3" for a variant).
    speed: words a minute, 80 to 450.
    pitch, range: 0 to 99; volume: 0 to 200.
    pause: seconds of silence between sentences, beyond the library's own.

    Raises ConfigError when the library is missing or doesn't know the voice.
    """

    def __init__(
        self,
        *,
        voice: str = "en-us",
        speed: int = 165,
        pitch: int = 50,
        range: int = 50,
        volume: int = 100,
        pause: float = 0.1,
    ) -> None:
        for name, value, low, high in (
            ("speed", speed, 80, 450),
            ("pitch", pitch, 0, 99),
            ("range", range, 0, 99),
            ("volume", volume, 0, 200),
            ("pause", pause, 0, 5),
        ):
            if not low <= value <= high:
                raise ConfigError(f"espeak: {name} is {value}; it can be {low} to {high}")
        library().check(voice)
        super().__init__(
            capabilities=tts.TTSCapabilities(streaming=True, aligned_transcript=True),
            sample_rate=RATE,
            num_channels=1,
        )
        self._how = _How(voice, int(speed), int(pitch), int(range), int(volume))
        self.pause = pause
        # Measured over 23 s of en-us; its languages are formants of the same machine.
        self.loudness = -20.7 if volume == 100 else None
        self._hold = Hold(_door)

    @property
    def model(self) -> str:
        return self._how.voice

    @property
    def provider(self) -> str:
        return "espeak-ng"

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        return CuedStream(voice=self, text=text, conn_options=conn_options)

    def stream(
        self, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.SynthesizeStream:
        return CuedSpeech(voice=self, conn_options=conn_options)

    def ipa(self, transcription: str) -> str | None:
        """See `Cued`: in double brackets, in the library's own letters, for English."""
        return mnemonics(transcription) if self._how.voice.startswith("en") else None

    async def stream_piece(self, piece: Piece) -> AsyncGenerator[Chunk, None]:
        """See `Cued`. A chunk is one word or more; a cue comes with the chunk it starts in."""
        how = self._how.styled(piece.style)
        plain = replace(piece, text=piece.text.replace("[[", "[\u2009"))
        text = plain.said(self.ipa).text

        def say(emit: Callable[[Chunk], bool]) -> None:
            library().say(text, how, emit)

        async with aclosing(self._hold.door.stream(say)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def aclose(self) -> None:
        await self._hold.release()


@dataclass(frozen=True)
class _How:
    voice: str
    speed: int
    pitch: int
    range: int
    volume: int

    def styled(self, style: Style) -> _How:
        """Pitch 50 is the voice's own, and 50 steps are an octave."""
        speed = round(min(max(self.speed * style.rate, 80), 450))
        pitch = round(min(max(self.pitch + 50 * math.log2(style.pitch), 0), 99))
        return replace(self, speed=speed, pitch=pitch)


# IPA to the phoneme names of eSpeak's English voices (its ph_english and ph_consonants sources).
_MNEMONICS = {
    "tʃ": "tS", "dʒ": "dZ", "aɪ": "aI", "eɪ": "eI", "ɔɪ": "OI", "aʊ": "aU", "oʊ": "oU",
    "əʊ": "oU", "iː": "i:", "uː": "u:", "ɑː": "A:", "ɔː": "O:", "ɜː": "3:", "ɚ": "3", "ɝ": "3:",
    "ɪə": "i@", "eə": "e@", "ʊə": "U@", "ɑːɹ": "A@", "ɔːɹ": "o@",
    "æ": "a", "ɑ": "A:", "a": "a", "ʌ": "V", "ɛ": "E", "e": "E", "ə": "@", "ɐ": "a#", "ɪ": "I",
    "i": "i", "ɒ": "0", "ɔ": "O:", "o": "oU", "ʊ": "U", "u": "u:", "ɜ": "3:", "ᵻ": "I2",
    "p": "p", "b": "b", "t": "t", "d": "d", "k": "k", "ɡ": "g", "g": "g", "f": "f", "v": "v",
    "θ": "T", "ð": "D", "s": "s", "z": "z", "ʃ": "S", "ʒ": "Z", "h": "h", "m": "m", "n": "n",
    "ŋ": "N", "l": "l", "ɫ": "l", "ɹ": "r", "r": "r", "j": "j", "w": "w", "ʔ": "?", "ɾ": "t2",
    "x": "x", "ˈ": "'", "ˌ": ",",
}  # fmt: skip


def mnemonics(transcription: str) -> str | None:
    """IPA as eSpeak's English voices read it, in double brackets; None when a symbol is unknown."""
    said = []
    for word in transcription.replace("\u0361", "").split():
        at, letters = 0, ""
        while at < len(word):
            for size in (3, 2, 1):
                known = _MNEMONICS.get(word[at : at + size])
                if known is not None:
                    letters += known
                    at += size
                    break
            else:
                if word[at] not in "ːˑ":
                    return None
                at += 1
        said.append(f"[[{letters}]]")
    return " ".join(said)


class _Id(ctypes.Union):
    _fields_ = [
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    ]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


class _Voice(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_void_p),
        ("identifier", ctypes.c_char_p),
        # and more that is not looked at: the library gives pointers to these
    ]


def _until_null(pointers: Any) -> Iterator[Any]:
    index = 0
    while pointers[index]:
        yield pointers[index]
        index += 1


def _languages(at: int) -> Iterator[tuple[int, bytes]]:
    """(priority, language): a byte and a string each, until a byte that is zero."""
    while priority := ctypes.c_ubyte.from_address(at).value:
        language = ctypes.string_at(at + 1)
        yield priority, language
        at += 2 + len(language)


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Library:
    """The loaded C library. Its methods hold one lock: it is global state."""

    def __init__(self) -> None:
        path, data = _find()
        self.source = path
        self._guard = threading.Lock()
        try:
            self._c = ctypes.CDLL(path)
        except OSError as error:
            raise Missing(f"{MISSING} ({error})") from None
        self._c.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        rate = self._c.espeak_Initialize(
            _RETRIEVAL,
            50,  # ms in a callback
            data.encode() if data is not None else None,
            _PHONEME_EVENTS | _PHONEME_IPA | _DONT_EXIT,
        )
        if rate != RATE:
            raise Missing(f"espeak: the library's data can't be used (it answers {rate})")
        self._take: Callable[[Any, int, Any], int] | None = None
        self._callback = _Callback(self._called)  # held: the library keeps a bare pointer
        self._c.espeak_SetSynthCallback(self._callback)
        self._c.espeak_ListVoices.restype = ctypes.POINTER(ctypes.POINTER(_Voice))
        self._names: dict[str, bytes] = {}  # as it is asked for: as the library calls it

    def check(self, voice: str) -> None:
        """Raises ConfigError when the library has no such voice."""
        with self._guard:
            if voice not in self._names:
                self._names[voice] = self._named(voice)

    def _named(self, voice: str) -> bytes:
        """A voice's name is its own, its file's, or one of its languages, which `SetVoiceByName`
        doesn't know: en-gb is the file `en`."""
        name = voice.encode()
        if self._c.espeak_SetVoiceByName(name) == 0:
            return name
        language, plus, variant = name.lower().replace(b"_", b"-").partition(b"+")
        found: list[tuple[int, bytes]] = []
        for one in _until_null(self._c.espeak_ListVoices(None)):
            for priority, spoken in _languages(one.contents.languages):
                if spoken == language:
                    found.append((priority, one.contents.identifier))
        for _, identifier in sorted(found):
            if self._c.espeak_SetVoiceByName(identifier + plus + variant) == 0:
                return bytes(identifier + plus + variant)
        raise ConfigError(
            f"espeak: there is no voice {voice!r}: take a language such as en-us, en-gb, de, fr, "
            "es, it, pt-br"
        )

    def say(self, text: str, how: _How, emit: Callable[[Chunk], bool]) -> None:
        """Say one sentence. Times in its cues count from its start."""
        with self._guard:
            name = self._names.get(how.voice) or how.voice.encode()
            if self._c.espeak_SetVoiceByName(name) != 0:
                raise TransportError(f"espeak: the voice {how.voice!r} is gone", retryable=False)
            for parameter, value in (
                (_SPEED, how.speed),
                (_VOLUME, how.volume),
                (_PITCH, how.pitch),
                (_RANGE, how.range),
            ):
                self._c.espeak_SetParameter(parameter, value, 0)
            # Again each time: another user of the library in this process may have put its own.
            self._c.espeak_SetSynthCallback(self._callback)
            tally = _Tally(text, emit)
            self._take = tally.take
            try:
                data = text.encode()
                status = self._c.espeak_Synth(
                    data, len(data) + 1, 0, _BY_CHARACTER, 0, _UTF8 | _PHONEMES, None, None
                )
                self._c.espeak_Synchronize()
            finally:
                self._take = None
            if tally.failure is not None:
                raise tally.failure
            if status != 0:
                raise TransportError(f"espeak: the library failed with status {status}")
            tally.finish()

    def _called(self, wav: Any, count: int, events: Any) -> int:
        # The C side gets 1 for "stop" when nobody listens any more.
        return self._take(wav, count, events) if self._take is not None else 1


class _Tally:
    """Turns callbacks into chunks: sound is held back until the word it belongs to is complete."""

    def __init__(self, text: str, emit: Callable[[Chunk], bool]) -> None:
        spans = words(text)
        self._places = [start for start, _ in spans]
        self._words = [text[start:end] for start, end in spans]
        self._emit = emit
        self._held: list[Int16] = []
        self._made = 0  # samples heard from the library
        self._sent = 0  # samples passed on
        self._cues: list[Cue] = []
        self._phoneme: tuple[str, int] | None = None  # text, first sample
        self._word: int | None = None  # first sample of the word that sounds
        self._last = -1  # its index
        self._next: int | None = None  # index of the word that is about to start
        self._sounding = 0  # end of the last phoneme that was no pause
        self.failure: BaseException | None = None

    def take(self, wav: Any, count: int, events: Any) -> int:
        try:
            return self._take(wav, count, events)
        except BaseException as error:  # must not cross the C frames
            self.failure = error
            return 1

    def _take(self, wav: Any, count: int, events: Any) -> int:
        cut: int | None = None
        for index in range(4096):
            event = events[index]
            if event.type == _LAST:
                break
            if event.type == _PHONEME:
                symbol = bytes(event.id.string).split(b"\0")[0].decode("utf-8", "ignore")
                symbol = symbol.strip("ˈˌ") or PAUSE
                start = self._begins(symbol, event.sample)
                self._close_phoneme(start)
                self._phoneme = (symbol, start)
                if self._next is not None and symbol != PAUSE:
                    self._close_word(start, self._next)
                    self._word, self._last, self._next = start, self._next, None
                    cut = start
            elif event.type == _WORD:
                # "42" is two words for the library and one in the text. A word starts with its
                # first phoneme: the event itself comes a little before.
                at = bisect_right(self._places, event.text_position - 1) - 1
                if at > (self._next if self._next is not None else self._last):
                    self._next = at
        if bool(wav) and count > 0:
            self._held.append(np.ctypeslib.as_array(wav, (count,)).astype(np.int16, copy=True))
            self._made += count
        if cut is None and self._made - self._sent > _HOLD * RATE:
            cut = self._made
        if cut is not None and not self._pass(min(cut, self._made)):
            return 1
        return 0

    def finish(self) -> None:
        self._close_phoneme(self._made)
        self._close_word(self._made, len(self._words))
        self._pass(self._made)

    def _begins(self, symbol: str, sample: int) -> int:
        """The library tells of p, t and k when they burst; the lips close before that."""
        if symbol[0] not in "ptk" or self._phoneme is None or self._phoneme[0] == PAUSE:
            return sample
        before = self._phoneme[1]
        return max(sample - round(_CLOSURE * RATE), (before + sample) // 2)

    def _close_phoneme(self, at: int) -> None:
        if self._phoneme is None:
            if at > 0 and not self._cues:
                self._cues.append(Cue("phoneme", PAUSE, 0.0, at / RATE))
            return
        text, start = self._phoneme
        self._phoneme = (text, at)
        if at > start:
            self._cues.append(Cue("phoneme", text, start / RATE, at / RATE))
            if text != PAUSE:
                self._sounding = at

    def _close_word(self, at: int, following: int) -> None:
        """The word that sounds ends at `at`, and so do those that it swallowed ("of the")."""
        if self._word is None:
            return
        start, end = self._word, min(at, max(self._sounding, self._word))
        if end > start:
            texts = self._words[self._last : following]
            times = shared(texts, start / RATE, end / RATE)
            for text, (low, high) in zip(texts, times, strict=True):
                self._cues.append(Cue("word", text, low, high))
        self._word = None

    def _pass(self, upto: int) -> bool:
        if upto <= self._sent:
            return True
        sound = np.concatenate(self._held)
        count = upto - self._sent
        self._held = [sound[count:]]
        self._sent = upto
        cues, self._cues = tuple(self._cues), []
        return self._emit(Chunk(sound[:count], RATE, cues))


def _find() -> tuple[str, str | None]:
    """Path of the library and of its data (None: the library knows)."""
    if importlib.util.find_spec("espeakng_loader") is not None:
        package: Any = importlib.import_module("espeakng_loader")
        path, data = Path(package.get_library_path()), package.get_data_path()
        if path.is_file():
            return str(path), str(data)
    found = ctypes.util.find_library("espeak-ng")
    if found is None:
        raise Missing(MISSING)
    return found, None


_loading = threading.Lock()
_loaded: _Library | None = None
_door: Door[Chunk] = Door("voipavatar-espeak")


def library() -> _Library:
    """The process's one library, loaded at the first call. Raises ConfigError when it's missing."""
    global _loaded
    with _loading:
        if _loaded is None:
            _loaded = _Library()
        return _loaded
