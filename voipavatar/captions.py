"""Captions that keep to the voice: a word is shown when it is said, and never well ahead of it.

LiveKit's own pacing reckons from the moment at which the sound began, by an average speed: a voice
that is slower, or one that waits for more sound in mid-sentence, is left behind by its captions.
Here a word comes out when the playhead of its very segment has reached it. Where a word is in the
sound, the voice tells (aligned transcripts), or it is reckoned from the sound itself: syllables
are spread over the time in which something is heard.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import math
import re
from collections import deque
from typing import Any

import numpy as np
from livekit import rtc
from livekit.agents import AgentSession, tokenize
from livekit.agents.types import TimedString
from livekit.agents.utils import is_given
from livekit.agents.voice.io import TextOutput

from .mouthpiece import Mouthpiece, Segment

logger = logging.getLogger(__name__)

BIN = 0.01
"""Seconds of sound that are judged together."""
FLOOR = 0.008
"""RMS, of full scale, below which nothing counts as speech."""
RATE = 3.0
"""Syllables in a second of sounding speech, until the voice's own rate is known: a slow one, since
captions may be late at first but not early."""
SNAP = 0.04
"""Seconds of sound by which a word that was reckoned may begin sooner than it does: one that would
begin right before a pause begins after it."""
LATE = 0.06
"""Seconds by which a word is shown after its sound has left: what the way to a viewer takes more
for sound than for text."""
TICK = 0.02

_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"\s*(?:[{_CJK}][^\w\s]*|[^\s{_CJK}]+)")


def syllables(word: str) -> float:
    """About how long a word is; punctuation has no length."""
    text = word.strip()
    digits = sum(char.isdigit() for char in text)
    letters = "".join(char for char in text if char.isalpha())
    return digits + (len(tokenize.basic.hyphenate_word(letters)) if letters else 0)


class Timing:
    """One segment's words, and when each is said. Pure: neither clock nor task.

    `rate` is what is known of the voice, in syllables a second of sounding speech; None while
    nothing is.
    """

    def __init__(self, rate: float | None = None) -> None:
        self.text = ""
        self.text_done = False
        self.sound_done = False
        self.seconds = 0.0
        """Sound that came."""
        self._rate = rate
        self._units = 0.0  # syllables of the words that are whole
        self._cut = 0  # characters of the text that are in `_words`
        self._words: deque[tuple[str, float]] = deque()  # with the syllables before each
        self._anchors: list[tuple[float, float]] = []  # syllables, seconds: told by the voice
        self._sounding: list[float] = [0.0]  # seconds that sounded, up to the end of each bin
        self._rest = np.zeros(0, np.float32)
        self._peak = 0.0

    # -- what comes in -----------------------------------------------------------------------------

    def push_text(self, text: str, start: float | None = None, end: float | None = None) -> None:
        """More text. `start` and `end` are seconds from the segment's first sample, if told."""
        if start is not None:
            self._take(whole=True)
            self._anchor(start)
        self.text += text
        self._take(whole=end is not None)
        if end is not None:
            self._anchor(end)

    def end_text(self) -> None:
        self.text_done = True
        self._take(whole=True)

    def push_sound(self, pcm: Any, rate: int) -> None:
        """More sound: int16 mono at `rate` Hz."""
        self.seconds += len(pcm) / rate
        size = max(1, round(rate * BIN))
        samples = np.concatenate([self._rest, pcm.astype(np.float32) / 32768])
        whole = len(samples) - len(samples) % size
        self._rest = samples[whole:]
        levels = np.sqrt((samples[:whole].reshape(-1, size) ** 2).mean(axis=1))
        for level in levels.tolist():
            self._peak = max(self._peak * 0.9995, level)
            loud = level > max(FLOOR, 0.08 * self._peak)
            self._sounding.append(self._sounding[-1] + (BIN if loud else 0.0))

    def end_sound(self) -> None:
        self.sound_done = True

    def _take(self, *, whole: bool) -> None:
        """Cut the text into words; the last one may go on unless it is `whole`."""
        while match := _WORD.match(self.text, self._cut):
            if match.end() == len(self.text) and not whole:
                return
            self._words.append((match.group(), self._units))
            self._units += syllables(match.group())
            self._cut = match.end()

    def _anchor(self, seconds: float) -> None:
        while self._anchors and self._anchors[-1][1] > seconds:
            self._anchors.pop()  # a voice that corrects itself
        self._anchors.append((self._units, seconds))

    # -- what comes out ----------------------------------------------------------------------------

    @property
    def rate(self) -> float | None:
        """Syllables a second of sounding speech in this segment, when it is whole."""
        sounding = self._sounding[-1]
        if not (self.text_done and self.sound_done and self._units >= 3 and sounding > 0.3):
            return None
        return self._units / sounding

    def due(self, position: float) -> list[tuple[str, float]]:
        """The words that begin up to `position` seconds, each with when it does."""
        out = []
        while self._words and (when := self.when(self._words[0][1])) <= position:
            out.append((self._words.popleft()[0], when))
        return out

    def rest(self) -> list[tuple[str, float]]:
        """All that is left, as far as its words are whole."""
        out = [(word, self.seconds) for word, _ in self._words]
        self._words.clear()
        return out

    def when(self, units: float) -> float:
        """Seconds at which the word after so many syllables begins; inf while that is unknown."""
        first = self._first()
        low = (0.0, first)
        high: tuple[float, float] | None = None
        for anchor in self._anchors:
            if anchor[0] <= units + 1e-9:
                low = anchor
            else:
                high = anchor
                break
        if units - low[0] < 1e-9:
            return low[1]
        begin = self._sounded(low[1])
        if high is None and self.text_done and self.sound_done:
            high = (self._units, self.seconds)
        if high is not None:
            share = (units - low[0]) / max(1e-9, high[0] - low[0])
            end = self._sounded(high[1])
            if end - begin < 0.05:  # nothing sounds there: spread it evenly
                return low[1] + share * (high[1] - low[1])
            return min(high[1], self._at(begin + share * (end - begin) + SNAP, low[1]))
        rate = self._rate or RATE
        sounded = self._sounding[-1] - begin
        if self.text_done and sounded > 0:
            # What has come is not more than all of it.
            rate = min(rate, (self._units - low[0]) / sounded)
        return self._at(begin + (units - low[0]) / max(rate, 0.1) + SNAP, low[1])

    def _first(self) -> float:
        """Where the sound begins to sound."""
        return self._at(0.0, 0.0)

    def _sounded(self, seconds: float) -> float:
        index = min(len(self._sounding) - 1, max(0, round(seconds / BIN)))
        return self._sounding[index]

    def _at(self, sounding: float, least: float) -> float:
        """When it goes on to sound after so many seconds that did; inf when that is to come."""
        index = bisect.bisect_right(self._sounding, sounding + 1e-6)
        if index == len(self._sounding):
            return math.inf
        return max(least, (index - 1) * BIN)


class _Line:
    """One segment on its way to the room: its timing, and what was shown of it."""

    def __init__(self, rate: float | None) -> None:
        self.timing = Timing(rate)
        self.segment: Segment | None = None
        self.shown = ""
        self.over = False
        self.dropped = False
        self.changed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Captions(TextOutput):
    """The agent's transcript on its way to the room, paced by what the mouthpiece plays."""

    def __init__(self, next_in_chain: TextOutput, mouthpiece: Mouthpiece) -> None:
        super().__init__(label="voipavatar captions", next_in_chain=next_in_chain)
        self._sink = next_in_chain
        self._lines: deque[_Line] = deque()
        self._by_segment: dict[Segment, _Line] = {}
        self._rate: float | None = None
        self._last: asyncio.Task[None] | None = None
        self._aside = False  # the text under way has no voice
        self._mouthpiece = mouthpiece
        mouthpiece.watcher = self

    def follow(self, mouthpiece: Mouthpiece) -> None:
        """Keep to another mouthpiece's voice from now on."""
        if mouthpiece is not self._mouthpiece:
            self._mouthpiece.watcher = None
            self._mouthpiece = mouthpiece
            mouthpiece.watcher = self

    # -- text --------------------------------------------------------------------------------------

    async def capture_text(self, text: str) -> None:
        line = next((one for one in self._lines if not one.timing.text_done), None)
        if self._aside or (line is None and self._mouthpiece.detached):
            self._aside = True  # nothing to keep to
            await self._sink.capture_text(text)
            return
        if line is None:
            line = self._new()
        start = end = None
        if isinstance(text, TimedString):
            start = text.start_time if is_given(text.start_time) else None
            end = text.end_time if is_given(text.end_time) else None
        line.timing.push_text(str(text), start, end)
        line.changed.set()

    def flush(self) -> None:
        if self._aside:
            self._aside = False
            self._sink.flush()
            return
        line = next((one for one in self._lines if not one.timing.text_done), None)
        if line is not None and (line.timing.text or line.segment is None or line.over):
            line.timing.end_text()
            line.changed.set()
            self._tidy()

    # -- what the mouthpiece tells -----------------------------------------------------------------

    def opened(self, segment: Segment) -> None:
        """A segment's first sound is here."""
        line = next((one for one in self._lines if one.segment is None and not one.dropped), None)
        if line is None:
            line = self._new()
        line.segment = segment
        self._by_segment[segment] = line
        line.task = asyncio.create_task(self._show(line, self._last), name="captions")
        self._last = line.task

    def sounded(self, segment: Segment, frame: rtc.AudioFrame) -> None:
        line = self._by_segment.get(segment)
        if line is not None:
            pcm = np.frombuffer(frame.data, np.int16)
            if frame.num_channels > 1:
                pcm = pcm.reshape(-1, frame.num_channels)[:, 0]
            line.timing.push_sound(pcm, frame.sample_rate)

    def flushed(self, segment: Segment | None) -> None:
        """A segment is complete; None: there was no sound for what was written."""
        if segment is not None:
            if segment in self._by_segment:
                self._by_segment[segment].timing.end_sound()
            return
        line = next((one for one in self._lines if one.segment is None and not one.dropped), None)
        if line is not None:
            line.dropped = True
            self._tidy()

    def finished(self, segment: Segment) -> str | None:
        """A segment is over; what was shown of it, which is all of it unless it was cut short."""
        line = self._by_segment.pop(segment, None)
        if line is None:
            return None
        line.over = True
        line.changed.set()
        if not line.timing.text:
            line.timing.end_text()  # a sound without words
        if segment.interrupted:
            line.dropped = True
        else:
            self._rate = line.timing.rate or self._rate
        self._tidy()
        return line.shown if segment.interrupted else line.timing.text

    # -- the way out -------------------------------------------------------------------------------

    def _new(self) -> _Line:
        line = _Line(self._rate)
        self._lines.append(line)
        return line

    def _tidy(self) -> None:
        """Forget the lines that are over and written."""
        self._lines = deque(
            one
            for one in self._lines
            if not (one.timing.text_done and (one.over or (one.dropped and one.segment is None)))
        )

    async def _show(self, line: _Line, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        segment = line.segment
        assert segment is not None
        began = False
        try:
            while not (line.over and line.dropped):
                words = line.timing.rest() if line.over else line.timing.due(segment.at() - LATE)
                for word, when in words:
                    began = True
                    line.shown += word
                    await self._sink.capture_text(TimedString(word, start_time=when))
                if line.over and line.timing.text_done:
                    break
                if line.over:
                    line.changed.clear()
                    await line.changed.wait()
                else:
                    await asyncio.sleep(TICK)
        finally:
            if began:
                self._sink.flush()


def attach(session: AgentSession[Any], mouthpiece: Mouthpiece) -> bool:
    """Put captions in the place of LiveKit's own pacing; False where there is none of it.

    A session that was told not to pace its transcript is left as it is.
    """
    output = session.output
    text = output.transcription
    if isinstance(text, Captions):
        text.follow(mouthpiece)
        return True
    if text is None or text.label != _PACING or text.next_in_chain is None:
        return False
    audio = output.audio
    output.transcription = Captions(text.next_in_chain, mouthpiece)
    if audio is not None and audio.label == _PACING and audio.next_in_chain is not None:
        output.audio = audio.next_in_chain
    return True


_PACING = "TranscriptSynchronizer"
