"""Voices, on real synthesis."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from livekit.agents import tts

from voipavatar.config import Settings, VoiceChoice, list_personas
from voipavatar.errors import ConfigError, InputError
from voipavatar.media import Cue, Int16
from voipavatar.speech import Chunk, make_voice, speak, voices

LONG = (
    "The quick brown fox jumps over the lazy dog, while the patient moderators of the conference "
    "were waiting for 42 answers. Dr. Smith never came! Why not? We live at 3.5 km from the "
    "border, and nobody has ever complained about it. So that was that."
)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["espeak", "piper"])
async def voice(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[tts.TTS[Any]]:
    made = make_voice([VoiceChoice(use=request.param)], settings)
    yield made
    await made.aclose()
    assert not _threads()


def _threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("voipavatar")]


async def _said(chunks: AsyncGenerator[Chunk, None]) -> tuple[Int16, int, list[Cue]]:
    parts: list[Int16] = []
    cues: list[Cue] = []
    rates = set()
    async with aclosing(chunks) as stream:
        async for chunk in stream:
            assert chunk.pcm.dtype == np.int16 and chunk.pcm.ndim == 1
            parts.append(chunk.pcm)
            cues.extend(chunk.cues)
            rates.add(chunk.rate)
    if not parts:
        return np.zeros(0, np.int16), 0, cues
    assert len(rates) == 1
    return np.concatenate(parts), rates.pop(), cues


async def test_cues_cover_the_sound(voice: tts.TTS[Any]) -> None:
    pcm, rate, cues = await _said(speak(voice, LONG))
    seconds = len(pcm) / rate
    assert rate == voice.sample_rate
    assert 8 < seconds < 25

    phonemes = [cue for cue in cues if cue.kind == "phoneme"]
    assert sum(cue.end - cue.start for cue in phonemes) == pytest.approx(seconds, abs=1e-6)
    for one, other in zip(phonemes, phonemes[1:], strict=False):
        assert other.start == pytest.approx(one.end, abs=1e-6)

    words = [cue for cue in cues if cue.kind == "word"]
    assert [cue.text for cue in words] == LONG.split()
    for one, other in zip(words, words[1:], strict=False):
        assert one.start < one.end <= other.start + 1e-6
    assert words[0].start >= 0 and words[-1].end <= seconds


async def test_cues_come_no_later_than_their_sound(voice: tts.TTS[Any]) -> None:
    heard = 0.0
    async with aclosing(speak(voice, LONG)) as chunks:
        async for chunk in chunks:
            assert all(cue.start >= heard - 1e-6 for cue in chunk.cues)
            heard += chunk.seconds


async def test_sound_is_where_the_phonemes_are(voice: tts.TTS[Any]) -> None:
    """Pauses are quiet, vowels are not, nothing clips."""
    pcm, rate, cues = await _said(speak(voice, LONG))
    sound = pcm.astype(np.float64) / 32768

    def level(wanted: set[str], margin: float) -> float:
        parts = [
            sound[round((cue.start + margin) * rate) : round((cue.end - margin) * rate)]
            for cue in cues
            if cue.kind == "phoneme" and cue.text[0] in wanted and cue.end - cue.start > 3 * margin
        ]
        return float(np.sqrt(np.mean(np.concatenate(parts) ** 2)))

    loud, quiet = level(set("aɑɛɪoæʌɔ"), 0.02), level({"_"}, 0.04)
    print(f"{voice.provider}: vowels {loud:.4f}, pauses {quiet:.5f}")
    assert loud > 8 * quiet
    assert np.abs(pcm.astype(np.int32)).max() < 32700


async def test_cues_have_no_lag(voice: tts.TTS[Any]) -> None:
    """Vowels are loud and closures quiet when their cues say so, not some frames later."""
    pcm, rate, cues = await _said(speak(voice, LONG * 2))
    hop = rate // 200
    count = len(pcm) // hop
    power = (pcm[: count * hop].astype(np.float64).reshape(count, hop) ** 2).mean(axis=1)
    level = np.log(np.sqrt(np.convolve(power, np.ones(3) / 3, "same")) + 3)
    for sign, wanted in ((1, set("aɑæʌɔəɚɛɜɪioʊueɐᵻ")), (-1, set("ptkbdɡ_"))):
        there = np.zeros(count)
        for cue in cues:
            if cue.kind == "phoneme" and cue.text[0] in wanted:
                there[int(cue.start * rate / hop) : int(cue.end * rate / hop)] = sign
        fit = {lag: np.corrcoef(np.roll(there, lag), level)[0, 1] for lag in range(-20, 21)}
        best = max(fit, key=lambda lag: fit[lag])
        print(f"{voice.provider}: r {fit[0]:.2f}, best {fit[best]:.2f} at {best * 5} ms")
        assert abs(best) <= 3 and fit[0] > 0.4


async def test_sound_comes_as_it_is_made(voice: tts.TTS[Any]) -> None:
    await _said(speak(voice, "Warm."))
    begun = time.perf_counter()
    first = 0.0
    async with aclosing(speak(voice, LONG * 3, ahead=1000)) as chunks:
        async for _ in chunks:
            first = first or time.perf_counter() - begun
    whole = time.perf_counter() - begun
    print(f"{voice.provider}: first sound {first * 1e3:.0f} ms, all of it {whole * 1e3:.0f} ms")
    assert first < whole / 2


@pytest.mark.parametrize("after", [0, 1, 3])
async def test_closing_early_leaves_nothing(voice: tts.TTS[Any], after: int) -> None:
    before = asyncio.all_tasks()
    async with aclosing(speak(voice, LONG * 20)) as chunks:
        if after:
            count = 0
            async for _ in chunks:
                count += 1
                if count == after:
                    break
    assert asyncio.all_tasks() == before
    # The thread is free for the next sentence at once.
    begun = time.perf_counter()
    pcm, _, _ = await _said(speak(voice, "Next."))
    assert len(pcm) and time.perf_counter() - begun < 5


async def test_cancelled_consumer_leaves_nothing(voice: tts.TTS[Any]) -> None:
    before = asyncio.all_tasks()
    for delay in (0.0, 0.001, 0.01, 0.05, 0.2):
        task = asyncio.create_task(_said(speak(voice, LONG * 20, ahead=0.5)))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before


async def test_two_utterances_at_once(voice: tts.TTS[Any]) -> None:
    one, other = await asyncio.gather(
        _said(speak(voice, LONG)), _said(speak(voice, "Something else altogether. " * 3))
    )
    assert [cue.text for cue in one[2] if cue.kind == "word"] == LONG.split()
    assert [
        c.text for c in other[2] if c.kind == "word"
    ] == "Something else altogether.".split() * 3


async def test_through_livekit(voice: tts.TTS[Any]) -> None:
    """As an AgentSession would use it: PCM, timed words, cues in the userdata."""
    text = "Hello there. My name is Joe."
    samples, words, cues = 0, [], []
    async with voice.synthesize(text) as stream:
        async for event in stream:
            samples += event.frame.samples_per_channel
            words += event.frame.userdata["lk.timed_transcripts"]
            cues += event.frame.userdata["voipavatar.cues"]
    assert "".join(words).split() == text.split()
    assert [cue.text for cue in cues if cue.kind == "word"] == text.split()
    last = max(cue.end for cue in cues)
    assert last == pytest.approx(samples / voice.sample_rate, abs=0.02)


@pytest.mark.parametrize("text", ["", "   ", "...", "\n\n", "?!", "😀🎉👍🏽", "\x00\x07", "— –"])
async def test_nothing_to_say(voice: tts.TTS[Any], text: str) -> None:
    pcm, _, cues = await _said(speak(voice, text))
    assert len(pcm) == 0 and not cues


async def test_too_much_text(voice: tts.TTS[Any]) -> None:
    with pytest.raises(InputError, match="10,000,000 characters.*20,000"):
        await _said(speak(voice, "a" * 10_000_000))


async def test_unclosed_brackets_and_markup_are_only_text(voice: tts.TTS[Any]) -> None:
    pcm, _, _ = await _said(speak(voice, "Say [[aaa and <b> & \\pau=9\\ \x1b[31m now."))
    assert len(pcm) > voice.sample_rate


def test_unknown_voice(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="no-such"):
        make_voice([VoiceChoice(use="no-such")], settings)
    with pytest.raises(ConfigError, match="no voice 'xx-nowhere'"):
        make_voice([VoiceChoice(use="espeak", options={"voice": "xx-nowhere"})], settings)
    with pytest.raises(ConfigError, match=r"there is no .*missing\.onnx"):
        make_voice([VoiceChoice(use="piper", options={"model": "missing.onnx"})], settings)


@pytest.mark.parametrize("name", ["en-gb", "en-GB", "en_gb", "en-gb+f3", "en+f3", "fr-fr", "es-mx"])
async def test_espeak_is_asked_by_language(name: str, settings: Settings) -> None:
    """A file of another name may speak it."""
    voice = make_voice([VoiceChoice(use="espeak", options={"voice": name})], settings)
    pcm, rate, _ = await _said(speak(voice, "Bonjour, hello."))
    assert len(pcm) > rate / 2
    await voice.aclose()


async def test_every_stand_in_of_the_built_in_personas_is_there(settings: Settings) -> None:
    """They stand in when the online ones are down: nobody would notice before that."""
    offline = [
        (persona.name, choice)
        for persona in list_personas()
        for choice in persona.voice
        if choice.use == "espeak"
    ]
    assert {name for name, _ in offline} >= {"default", "clara", "amara", "nora"}
    for _, choice in offline:
        await make_voice([choice], settings).aclose()


def test_what_is_there(settings: Settings) -> None:
    known = {one.name: one for one in voices(settings)}
    assert known["piper"].ready and known["espeak"].ready
    for one in known.values():
        assert one.ready or "pip install" in one.why


async def test_damaged_cache_is_made_again(tmp_path: Path) -> None:
    from voipavatar.speech import piper

    cache = Settings(cache_dir=tmp_path)
    path, _ = piper.locate()
    folder = piper._cut_cached(path, cache.cache_dir)
    decoder = folder / "decoder.onnx"
    decoder.write_bytes(decoder.read_bytes()[:1000])
    assert piper._cut_cached(path, cache.cache_dir) == folder
    assert decoder.stat().st_size > 1_000_000
    assert [one.name for one in folder.parent.iterdir()] == [folder.name]
