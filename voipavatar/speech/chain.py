"""Several voices as one: the next takes over where one fails, at one loudness, with a cache.

A `Chain` says a script piece by piece. A piece is said by the first voice that isn't in its
back-off time; if that fails or stalls, the next goes on, with the same piece when nothing of it was
heard, else with the rest of it by the word times, else with the next sentence. Within an
utterance it never goes back, so that the speaker doesn't change twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from livekit.agents import APIConnectOptions, APIError, APIStatusError, tts
from livekit.agents.types import DEFAULT_API_CONNECT_OPTIONS, USERDATA_TIMED_TRANSCRIPT

from ..errors import InputError, TransportError
from ..media import Cue, Int16, Resampler
from .cache import Phrase, PhraseCache
from .loudness import Leveller
from .remembered import Remembered
from .script import GUESS, Break, Gestures, Item, Lexicon, Mark, Piece, Placer
from .text import speakable
from .voice import CUES, PAUSE, Chunk, Cued, Door, shifted, within

logger = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds that an online voice may take for its first sound, and for more, when it is alone."""

FIRST, STALL = 1.8, 1.5
"""The same when another voice is there to take over."""

BACK_OFF = (5.0, 15.0, 60.0, 300.0)
"""Seconds that a voice is left alone after its first, second, ... failure in a row."""

_RETRIES = (0.2, 1.0)
"""Seconds before each further try of the last voice, at a piece of which nothing was heard."""

_CALIBRATION = "One, two, three, four, five. The quick brown fox jumps over the lazy dog."


@runtime_checkable
class Styled(Protocol):
    """A LiveKit voice that knows tempo and pitch."""

    def synthesize_styled(
        self, text: str, rate: float, pitch: float, *, conn_options: APIConnectOptions
    ) -> tts.ChunkedStream: ...


@dataclass(frozen=True)
class Extras:
    """What a link does beyond its voice."""

    identity: str = ""
    """Digest of voice and options; names what is remembered of it."""
    lexicon: Lexicon | None = None
    target: float | None = None
    """Loudness in LUFS; None leaves the sound as it comes."""
    cache: PhraseCache | None = None
    remembered: Remembered | None = None
    patience: float | None = None
    """Seconds to the first sound."""
    ssml: bool = False
    """Whether the voice reads its text as SSML."""


class Link:
    """A voice in a chain, and how it has behaved."""

    def __init__(self, voice: tts.TTS[Any], extras: Extras | None = None) -> None:
        self.voice = voice
        self.extras = extras or Extras()
        self._failures = 0
        self._until = 0.0

    @property
    def offline(self) -> bool:
        return isinstance(self.voice, Cued)

    @property
    def pause(self) -> float:
        """Seconds of silence that this voice wants between sentences."""
        return float(getattr(self.voice, "pause", 0.0))

    def resting(self) -> bool:
        return time.monotonic() < self._until

    def worked(self) -> None:
        self._failures, self._until = 0, 0.0

    def failed(self, error: TransportError) -> None:
        step = BACK_OFF[min(self._failures, len(BACK_OFF) - 1)] if error.retryable else BACK_OFF[-1]
        self._failures += 1
        self._until = time.monotonic() + step

    def patience(self, alone: bool) -> tuple[float, float]:
        """Seconds to the first sound, and between sounds."""
        first, stall = (TIMEOUT, TIMEOUT) if alone else (FIRST, STALL)
        return self.extras.patience or first, stall


class Interrupted(Exception):
    """A voice failed in a piece. `rest` is what is left to say; None: go on with the next."""

    def __init__(self, error: TransportError, rest: Piece | None, heard: float) -> None:
        super().__init__(str(error))
        self.error = error
        self.rest = rest
        self.heard = heard


class Chain(tts.TTS[Any]):
    """One voice made of several; see the module. Closes the voices it was given."""

    def __init__(self, links: Sequence[Link]) -> None:
        first = links[0].voice
        super().__init__(
            capabilities=tts.TTSCapabilities(
                streaming=True, aligned_transcript=first.capabilities.aligned_transcript
            ),
            sample_rate=first.sample_rate,
            num_channels=1,
        )
        self.links = tuple(links)
        self.closing: list[Any] = []
        """What to `aclose` or `close` after the voices: HTTP sessions."""
        self._disk: Door[Any] = Door("voipavatar-phrases")
        self._disk.hold()
        self._warm = False
        self._closed = False

    @property
    def model(self) -> str:
        return self.links[0].voice.model

    @property
    def provider(self) -> str:
        return self.links[0].voice.provider

    def prewarm(self) -> None:
        """Load offline voices on their threads, connect online ones that can."""
        self.stand_by()
        for link in self.links:
            if not link.offline:
                link.voice.prewarm()

    def stand_by(self) -> None:
        """Load offline voices on their threads: one may be needed in a second. Needs no loop."""
        if not self._warm:
            self._warm = True
            for link in self.links:
                if link.offline:
                    link.voice.prewarm()

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        from .frames import CuedStream

        return CuedStream(voice=self, text=text, conn_options=conn_options)

    def stream(
        self, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.SynthesizeStream:
        from .frames import CuedSpeech

        return CuedSpeech(voice=self, conn_options=conn_options)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        for link in self.links:
            try:
                await within(link.voice.aclose(), TIMEOUT)
            except Exception as error:  # a plug-in: the others are closed all the same
                logger.warning("voice not closed", extra={"error": type(error).__name__})
        for other in self.closing:
            await other.close()
        await self._disk.release()

    # --- saying -------------------------------------------------------------------------------

    async def say(self, items: Sequence[Item]) -> AsyncGenerator[Chunk, None]:
        """Say a script. Chunks at `sample_rate`, cue times from its beginning.

        Raises TransportError when the last voice failed.
        """
        rate = self.sample_rate
        done = 0
        turn = _Turn(self.links)
        self.stand_by()
        for index, item in enumerate(items):
            following = items[index + 1] if index + 1 < len(items) else None
            if isinstance(item, Mark):
                at = done / rate
                yield Chunk(np.zeros(0, np.int16), rate, (Cue("gesture", item.name, at, at),))
                continue
            if isinstance(item, Break):
                seconds = item.seconds
            else:
                origin = done / rate
                async with aclosing(self._one_rate(self._piece(item, turn))) as chunks:
                    async for chunk in chunks:
                        done += len(chunk.pcm)
                        yield replace(chunk, cues=shifted(chunk.cues, origin))
                seconds = 0.0
                if item.ends and following is not None and not isinstance(following, Break):
                    seconds = turn.link.pause
            if seconds > 0:
                start, silence = done / rate, np.zeros(round(seconds * rate), np.int16)
                done += len(silence)
                yield Chunk(silence, rate, (Cue("phoneme", PAUSE, start, done / rate),))

    async def _piece(self, piece: Piece, turn: _Turn) -> AsyncGenerator[Chunk, None]:
        """One piece, by whoever can. Times from its beginning, at the rates of the voices."""
        heard = 0.0
        retries = list(_RETRIES)
        while True:
            link = turn.link
            try:
                async with aclosing(self._link(link, piece, turn)) as chunks:
                    async for chunk in chunks:
                        yield replace(chunk, cues=shifted(chunk.cues, heard))
                link.worked()
                return
            except Interrupted as broken:
                error = broken.error
                extra = {"voice": link.voice.label, "error": str(error)}
                if not turn.last:
                    logger.warning("voice failed, the next goes on", extra=extra)
                    link.failed(error)
                    turn.next()
                elif broken.heard == 0.0 and retries and error.retryable:
                    logger.warning("voice failed, trying again", extra=extra)
                    await asyncio.sleep(retries.pop(0))
                else:
                    link.failed(error)
                    raise error from None
                heard += broken.heard
                if broken.rest is None:
                    return
                piece = broken.rest

    async def _link(self, link: Link, piece: Piece, turn: _Turn) -> AsyncGenerator[Chunk, None]:
        """One piece by one voice, at its loudness. Raises Interrupted."""
        if link not in turn.levellers:
            turn.levellers[link] = await self._leveller(link)
        leveller = turn.levellers[link]
        heard = 0.0
        rate = link.voice.sample_rate
        placer: Placer | None = None
        try:
            lexicon = link.extras.lexicon
            if lexicon:
                piece = lexicon.applied(piece)
            said = piece.said(link.voice.ipa if isinstance(link.voice, Cued) else None)
            placer = Placer(said)
            async with aclosing(self._cached(link, piece, placer, turn.last)) as chunks:
                async for chunk in chunks:
                    rate = chunk.rate
                    heard += chunk.seconds
                    if leveller is not None:
                        chunk = replace(chunk, pcm=leveller.push(chunk.pcm, piece.style.volume))
                    elif piece.style.volume:
                        chunk = replace(chunk, pcm=_amplified(chunk.pcm, piece.style.volume))
                    yield chunk
        except (TransportError, InputError) as error:
            if leveller is not None and len(rest := leveller.flush()):
                yield Chunk(_faded(rest), rate)
            wire = error if isinstance(error, TransportError) else TransportError(str(error))
            raise Interrupted(wire, _rest(piece, placer, heard), heard) from None
        if leveller is not None:
            if len(rest := leveller.flush()):
                yield Chunk(rest, rate)
            self._learn(link, leveller)

    async def _cached(
        self, link: Link, piece: Piece, placer: Placer, alone: bool
    ) -> AsyncGenerator[Chunk, None]:
        """The piece from the disk, or said and kept."""
        cache = link.extras.cache
        if cache is None:
            async with aclosing(_placed(link, piece, placer, alone)) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        spoken = replace(piece, style=replace(piece.style, volume=0.0), ends=True)
        key = cache.key(link.extras.identity, repr(spoken))
        phrase: Phrase | None = await self._disk.run(lambda: cache.get(key))
        if phrase is not None:
            cues = list(phrase.cues)
            for at in range(0, len(phrase.pcm), phrase.rate // 4):
                pcm = phrase.pcm[at : at + phrase.rate // 4]
                yield Chunk(pcm, phrase.rate, tuple(cues))
                cues.clear()
            return
        parts: list[Chunk] = []
        async with aclosing(_placed(link, piece, placer, alone)) as chunks:
            async for chunk in chunks:
                parts.append(chunk)
                yield chunk
        rates = {part.rate for part in parts if len(part.pcm)}
        if len(rates) == 1:
            pcm = np.concatenate([part.pcm for part in parts])
            kept = Phrase(pcm, rates.pop(), tuple(cue for part in parts for cue in part.cues))
            self._disk.submit(lambda: cache.put(key, kept))

    async def _leveller(self, link: Link) -> Leveller | None:
        extras = link.extras
        if extras.target is None:
            return None
        rate = link.voice.sample_rate
        known = extras.remembered.get(extras.identity) if extras.remembered is not None else None
        if known is None and isinstance(link.voice, Cued):
            known = link.voice.loudness
        leveller = Leveller(rate, extras.target, known)
        if known is None and isinstance(link.voice, Cued):
            # Costs a fraction of a second, once on a machine.
            try:
                async with aclosing(link.voice.stream_piece(Piece(_CALIBRATION))) as chunks:
                    async for chunk in chunks:
                        leveller.push(chunk.pcm)
            except TransportError:
                return Leveller(rate, extras.target)
            self._learn(link, leveller)
            leveller = Leveller(rate, extras.target, leveller.measured)
        return leveller

    def _learn(self, link: Link, leveller: Leveller) -> None:
        measured, remembered = leveller.measured, link.extras.remembered
        if leveller.known is None and measured is not None and remembered is not None:
            remembered.put(link.extras.identity, measured)
            self._disk.submit(remembered.save)

    async def _one_rate(self, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        """All chunks at the chain's rate."""
        resampler: Resampler | None = None
        async with aclosing(chunks):
            async for chunk in chunks:
                if resampler is not None and resampler.source != chunk.rate:
                    yield Chunk(resampler.flush(), self.sample_rate)
                    resampler = None
                if chunk.rate == self.sample_rate:
                    yield chunk
                    continue
                if resampler is None:
                    resampler = Resampler(chunk.rate, self.sample_rate)
                yield Chunk(resampler.push(chunk.pcm), self.sample_rate, chunk.cues)
        if resampler is not None:
            yield Chunk(resampler.flush(), self.sample_rate)


class _Turn:
    """Which voice speaks, during one utterance: healthy ones first, never back."""

    def __init__(self, links: Sequence[Link]) -> None:
        healthy = [link for link in links if not link.resting()]
        self._order = healthy or list(links)
        self.levellers: dict[Link, Leveller | None] = {}

    @property
    def link(self) -> Link:
        return self._order[0]

    @property
    def last(self) -> bool:
        return len(self._order) == 1

    def next(self) -> None:
        del self._order[0]


# --- one voice, one piece -----------------------------------------------------------------------


async def _placed(
    link: Link, piece: Piece, placer: Placer, alone: bool
) -> AsyncGenerator[Chunk, None]:
    """Said by the voice; word cues as they are written, gestures added."""
    gestures = Gestures(piece, link.voice.capabilities.aligned_transcript)
    words: list[Cue] = []
    seconds, rate = 0.0, link.voice.sample_rate
    async with aclosing(_raw(link, piece, placer.said.text, alone)) as chunks:
        async for chunk in chunks:
            cues = [cue for cue in chunk.cues if cue.kind != "word"]
            new = [one for cue in chunk.cues if cue.kind == "word" for one in placer.place(cue)]
            words += new
            seconds, rate = seconds + chunk.seconds, chunk.rate
            yield replace(chunk, cues=(*cues, *new, *gestures.due(words)))
    new = placer.finish()
    words += new
    if cues := [*new, *gestures.rest(words, seconds)]:
        yield Chunk(np.zeros(0, np.int16), rate, tuple(cues))


async def _raw(link: Link, piece: Piece, said: str, alone: bool) -> AsyncGenerator[Chunk, None]:
    voice = link.voice
    if isinstance(voice, Cued):
        async with aclosing(voice.stream_piece(piece)) as chunks:
            async for chunk in chunks:
                yield chunk
        return
    first, stall = link.patience(alone)
    options = APIConnectOptions(max_retry=0, timeout=first)
    stream: tts.SynthesizeStream | tts.ChunkedStream
    heard = 0.0
    try:
        if isinstance(voice, Styled):
            style = piece.style
            stream = voice.synthesize_styled(said, style.rate, style.pitch, conn_options=options)
        elif link.extras.ssml:
            stream = voice.synthesize(piece.markup(), conn_options=options)
        elif voice.capabilities.streaming:
            stream = voice.stream(conn_options=options)
            stream.push_text(said)
            stream.end_input()
        else:
            stream = voice.synthesize(said, conn_options=options)
        async with stream:
            while True:
                try:
                    event = await within(stream.__anext__(), stall if heard else first)
                except StopAsyncIteration:
                    break
                frame = event.frame
                pcm = np.frombuffer(frame.data, np.int16)
                if frame.num_channels > 1:
                    pcm = pcm.reshape(-1, frame.num_channels).mean(axis=1).astype(np.int16)
                chunk = Chunk(pcm.copy(), frame.sample_rate, _cues(frame.userdata))
                if len(chunk.pcm) or chunk.cues:
                    heard += chunk.seconds
                    yield chunk
    except TimeoutError:
        raise TransportError(f"the voice {voice.label} stalled") from None
    except APIStatusError as error:
        raise TransportError(
            f"the voice {voice.label} was refused with status {error.status_code}"
            + (": check its key" if error.status_code in (401, 403) else ""),
            retryable=error.retryable,
        ) from None
    except APIError as error:  # its message may hold the text
        raise TransportError(
            f"the voice {voice.label} failed ({type(error).__name__})", retryable=error.retryable
        ) from None
    except Exception as error:  # a plug-in, whatever it raises: the next voice goes on
        raise TransportError(f"the voice {voice.label} failed ({type(error).__name__})") from error
    if heard == 0.0:
        raise TransportError(f"the voice {voice.label} gave no sound")


def _cues(userdata: dict[str, Any]) -> tuple[Cue, ...]:
    """Cues of a frame: ours if it has them, else LiveKit's timed words."""
    own = userdata.get(CUES)
    if own is not None:
        return tuple(own)
    cues = []
    for word in userdata.get(USERDATA_TIMED_TRANSCRIPT) or ():
        start, end = word.start_time, word.end_time
        text = str(word).strip()
        if text and isinstance(start, (int, float)):
            last = float(end) if isinstance(end, (int, float)) else float(start)
            cues.append(Cue("word", text, float(start), max(float(start), last)))
    return tuple(cues)


def _rest(piece: Piece, placer: Placer | None, heard: float) -> Piece | None:
    """What is left of a piece of which `heard` seconds were said; None for nothing."""
    if heard == 0.0 or placer is None:
        return piece
    at = placer.rest(heard)
    if at is None:
        # No word times: once more if little of it was heard, else on with the next sentence.
        return piece if heard < GUESS * len(piece.text) / 3 else None
    rest = piece.after(at)
    return rest if speakable(rest.text) else None


def _amplified(pcm: Int16, decibels: float) -> Int16:
    loud: Int16 = np.clip(pcm * 10 ** (decibels / 20), -32768, 32767).astype(np.int16)
    return loud


def _faded(pcm: Int16) -> Int16:
    """To silence, so that a sound that was cut off doesn't click."""
    quiet: Int16 = (pcm * np.linspace(1, 0, len(pcm))).astype(np.int16)
    return quiet
