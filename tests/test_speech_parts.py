"""Loudness, the phrase cache, markup on real voices, chains and what is made ahead."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from livekit.agents import APIConnectionError, APIConnectOptions, tts
from livekit.agents.types import DEFAULT_API_CONNECT_OPTIONS, TimedString

from voipavatar.config import Settings, VoiceChoice
from voipavatar.errors import ConfigError, InputError, TransportError
from voipavatar.media import Cue, Float32, Int16, to_float
from voipavatar.speech import Chain, Chunk, EspeakTTS, PiperTTS, make_voice, prefetch, speak
from voipavatar.speech.cache import Phrase, PhraseCache
from voipavatar.speech.chain import Extras, Link
from voipavatar.speech.espeak import mnemonics
from voipavatar.speech.loudness import CEILING, Leveller, Limiter, Meter
from voipavatar.speech.remembered import Remembered

from .standins import spoken


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(cache_dir=tmp_path_factory.mktemp("cache"))


async def said(chunks: AsyncGenerator[Chunk, None]) -> tuple[Int16, int, list[Cue]]:
    parts: list[Int16] = []
    cues: list[Cue] = []
    rate = 0
    async with aclosing(chunks) as stream:
        async for chunk in stream:
            parts.append(chunk.pcm)
            cues.extend(chunk.cues)
            assert rate in (0, chunk.rate)
            rate = chunk.rate
    return np.concatenate(parts), rate, cues


def words(cues: list[Cue]) -> list[str]:
    return [cue.text for cue in cues if cue.kind == "word"]


# --- loudness -------------------------------------------------------------------------------------


def tone(hertz: float, peak: float, seconds: float, rate: int = 48_000) -> Float32:
    """A sine, float."""
    t = np.arange(round(seconds * rate)) / rate
    return (peak * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000, 48_000])
def test_meter_reads_what_the_standard_says(rate: int) -> None:
    """BS.1770-4: a full-scale sine of 997 Hz reads -3.01 LUFS. Silence doesn't count."""
    meter = Meter(rate)
    assert meter.loudness is None
    sound = np.concatenate([tone(997, 0.1, 40, rate), np.zeros(rate * 40, np.float32)])
    for part in np.array_split(sound, 37):
        meter.push(part)
    assert meter.loudness == pytest.approx(-23.01, abs=0.15)


def test_low_notes_weigh_less() -> None:
    readings = []
    for hertz in (30, 200, 3000):
        meter = Meter(48_000)
        meter.push(tone(hertz, 0.1, 3))
        assert meter.loudness is not None
        readings.append(meter.loudness)
    assert readings[0] < readings[1] - 3 and readings[2] > readings[1] + 2.5


@pytest.mark.parametrize("cut", [1, 7, 97, 480, 5_000, 48_000])
def test_limiter_never_lets_a_peak_through(cut: int) -> None:
    random = np.random.default_rng(cut)
    sound = tone(220, 0.3, 2.0)
    for at in random.integers(0, len(sound), 40):
        sound[at] = random.choice([-1, 1]) * random.uniform(0.9, 30)
    sound[0] = 5.0
    limiter = Limiter(48_000)
    step = max(cut, 24)
    parts = [limiter.push(sound[at : at + step]) for at in range(0, len(sound), step)]
    out = np.concatenate([*parts, limiter.flush()])
    assert len(out) == len(sound)
    assert np.abs(out).max() <= CEILING * 1.0001
    quiet = np.abs(sound) < 0.01
    assert np.abs(out[quiet]).max() < 0.01
    again = Limiter(48_000)
    assert np.allclose(np.concatenate([again.push(sound), again.flush()]), out, atol=1e-6)


def test_limiter_leaves_what_is_low_enough_alone() -> None:
    limiter = Limiter(22_050)
    sound = tone(220, 0.8, 1.0, 22_050)
    assert np.array_equal(np.concatenate([limiter.push(sound), limiter.flush()]), sound)


def loudness(pcm: Int16, rate: int) -> float:
    meter = Meter(rate)
    meter.push(to_float(pcm))
    assert meter.loudness is not None
    return meter.loudness


LONG = (
    "The birch canoe slid on the smooth planks. Glue the sheet to the dark blue background. "
    "It's easy to tell the depth of a well. Rice is often served in round bowls."
)


async def test_voices_are_equally_loud(settings: Settings) -> None:
    for use, options in (
        ("espeak", {}),
        ("espeak", {"volume": 30}),
        ("piper", {}),
    ):
        voice = make_voice([VoiceChoice(use=use, options=options)], settings)
        pcm, rate, _ = await said(speak(voice, LONG))
        await voice.aclose()
        print(f"{use} {options}: {loudness(pcm, rate):.1f} LUFS, peak {np.abs(pcm).max()}")
        assert loudness(pcm, rate) == pytest.approx(-18.0, abs=1.5)
        assert np.abs(pcm.astype(np.int32)).max() <= round(CEILING * 32768)


async def test_a_target_of_ones_own(settings: Settings) -> None:
    levels = []
    for target in (-23, None):
        choice = VoiceChoice(use="espeak", options={"loudness": target})
        voice = make_voice([choice], settings)
        pcm, rate, _ = await said(speak(voice, LONG))
        await voice.aclose()
        levels.append(loudness(pcm, rate))
    assert levels[0] == pytest.approx(-23, abs=1)
    assert levels[1] == pytest.approx(-20.7, abs=1)  # as it comes
    with pytest.raises(ConfigError, match="-40 to -8"):
        make_voice([VoiceChoice(use="espeak", options={"loudness": 3})], settings)


def test_an_unknown_voice_is_levelled_as_it_speaks() -> None:
    pcm, _ = spoken(LONG)
    quiet = (pcm // 8).astype(np.int16)
    leveller = Leveller(24_000)
    out = np.concatenate([*(leveller.push(p) for p in np.array_split(quiet, 60)), leveller.flush()])
    assert len(out) == len(quiet)
    assert loudness(out, 24_000) == pytest.approx(-18, abs=2.5)
    assert leveller.measured == pytest.approx(loudness(quiet, 24_000), abs=0.01)


def test_what_was_learnt_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "loudness.json"
    one, other = Remembered(path), Remembered(path)
    one.put("a", -20.123)
    one.save()
    other.put("b", -30)
    other.save()
    again = Remembered(path)
    assert (again.get("a"), again.get("b"), again.get("c")) == (-20.12, -30, None)
    path.write_text("[1")
    assert Remembered(path).get("a") is None


# --- phrases --------------------------------------------------------------------------------------


def phrase(seconds: float, value: int = 1) -> Phrase:
    pcm = np.full(round(seconds * 16_000), value, np.int16)
    return Phrase(pcm, 16_000, (Cue("word", "é", 0.0, seconds),))


def test_a_phrase_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = PhraseCache(tmp_path / "phrases")
    key = cache.key("voice", "text")
    assert cache.get(key) is None
    cache.put(key, phrase(1.0))
    back = cache.get(key)
    assert back is not None and back.rate == 16_000 and back.cues == phrase(1.0).cues
    assert np.array_equal(back.pcm, phrase(1.0).pcm)
    assert cache.key("voice", "text!") != key
    file = next((tmp_path / "phrases").glob("*/*"))
    assert file.stat().st_mode & 0o077 == 0
    assert b"text" not in str(file).encode()


@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_a_damaged_phrase_is_removed(tmp_path: Path, harm: str) -> None:
    cache = PhraseCache(tmp_path)
    key = cache.key("x")
    cache.put(key, phrase(1.0))
    file = next(tmp_path.glob("*/*"))
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(bytes({"cut": data[:-7], "flip": data, "empty": bytearray()}[harm]))
    assert cache.get(key) is None
    assert not file.exists()


def test_the_cache_is_bounded_and_drops_the_oldest(tmp_path: Path) -> None:
    one = PhraseCache(tmp_path, bound=320_000)
    keys = [one.key(i) for i in range(30)]
    for index, key in enumerate(keys):
        one.put(key, phrase(1.0, index))
        if index > 0:
            assert one.get(keys[0]) is not None  # used again and again
        for at, other in enumerate(keys[: index + 1]):
            path = one._path(other)
            if path.exists() and other != keys[0]:
                os.utime(path, (at, at))
        assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 320_000
    assert one.get(keys[-1]) is not None and one.get(keys[5]) is None
    one.put(one.key("big"), phrase(10))
    assert one.get(one.key("big")) is None


def test_a_cache_that_cannot_write_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = PhraseCache(tmp_path / "file")
    cache.put(cache.key("x"), phrase(0.1))
    assert cache.get(cache.key("x")) is None


async def test_cached_speech_is_the_same(settings: Settings) -> None:
    choice = VoiceChoice(use="piper", options={"cache": {"bytes": 10_000_000}})
    voice = make_voice([choice], settings)
    text = "<speak>Hello <mark name='nod'/>there. How are you?</speak>"
    one = await said(speak(voice, text))
    begun = time.perf_counter()
    other = await said(speak(voice, text))
    print(f"from the cache: {1e3 * (time.perf_counter() - begun):.0f} ms")
    await voice.aclose()
    assert np.array_equal(one[0], other[0])  # Piper never says the same twice by itself
    assert [c for c in one[2] if c.kind == "word"] == [c for c in other[2] if c.kind == "word"]
    assert [c.text for c in other[2] if c.kind == "gesture"] == ["nod"]


# --- markup on real voices ------------------------------------------------------------------------


@pytest.fixture(params=["espeak", "piper"])
async def voice(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Chain]:
    made = make_voice([VoiceChoice(use=request.param)], settings)
    yield made
    await made.aclose()


def pitch_of(pcm: Int16, rate: int) -> float:
    """Median fundamental in Hz, by autocorrelation of loud frames."""
    found = []
    sound = to_float(pcm)
    size = rate // 20
    for at in range(0, len(sound) - 2 * size, size):
        frame = sound[at : at + 2 * size]
        if np.sqrt(np.mean(frame**2)) < 0.05:
            continue
        full = np.correlate(frame, frame, "full")[len(frame) - 1 :]
        low, high = rate // 300, rate // 60
        lag = low + int(np.argmax(full[low:high]))
        if full[lag] > 0.6 * full[0]:
            found.append(rate / lag)
    return float(np.median(found))


async def test_tempo_pitch_and_volume(voice: Chain) -> None:
    text = "The birch canoe slid on the smooth planks and over all the meadows."

    async def as_told(attributes: str) -> tuple[float, float, float]:
        pcm, rate, cues = await said(
            speak(voice, f"<speak><prosody {attributes}>{text}</prosody></speak>")
        )
        assert words(cues) == text.split()
        phonemes = [cue for cue in cues if cue.kind == "phoneme"]
        assert phonemes[-1].end == pytest.approx(len(pcm) / rate, abs=0.02)
        return len(pcm) / rate, pitch_of(pcm, rate), loudness(pcm, rate)

    plain = await as_told('rate="100%"')
    slow = await as_told('rate="70%"')
    high = await as_told('pitch="+20%"')
    soft = await as_told('volume="-9dB"')
    print(f"{voice.provider}: {plain} slow {slow} high {high} soft {soft}")
    assert slow[0] > 1.2 * plain[0]
    assert high[1] == pytest.approx(1.2 * plain[1], rel=0.1)
    assert high[0] == pytest.approx(plain[0], rel=0.15)
    assert soft[2] == pytest.approx(plain[2] - 9, abs=1.5)


async def test_breaks_are_silent_and_as_long_as_told(voice: Chain) -> None:
    pcm, rate, cues = await said(speak(voice, '<speak>One<break time="1500ms"/>two.</speak>'))
    two = next(cue for cue in cues if cue.text == "two.")
    one = next(cue for cue in cues if cue.text == "One")
    assert 1.5 <= two.start - one.end < 2.2
    middle = round((one.end + two.start) / 2 * rate)
    assert not np.any(pcm[middle - rate // 2 : middle + rate // 2])
    pauses = [cue for cue in cues if cue.kind == "phoneme" and cue.text == "_"]
    assert any(cue.end - cue.start >= 1.49 for cue in pauses)


async def test_gestures(voice: Chain) -> None:
    text = '<speak>Hello <mark name="wave"/>there my friend. <mark name="bow"/></speak>'
    _, _, cues = await said(speak(voice, text))
    there = next(cue for cue in cues if cue.text == "there")
    friend = next(cue for cue in cues if cue.text == "friend.")
    gestures = {cue.text: cue.start for cue in cues if cue.kind == "gesture"}
    assert gestures["wave"] == there.start
    assert gestures["bow"] >= friend.start


async def test_transcriptions_are_said_and_the_word_is_shown(voice: Chain) -> None:
    text = '<speak>Say <phoneme alphabet="ipa" ph="ˈbɪː.bɔː">Qxz</phoneme> now.</speak>'
    _, _, cues = await said(speak(voice, text))
    assert words(cues) == ["Say", "Qxz", "now."]
    word = next(cue for cue in cues if cue.text == "Qxz")
    inside = "".join(
        cue.text
        for cue in cues
        if cue.kind == "phoneme" and word.start - 1e-6 <= cue.start < word.end - 1e-6
    )
    assert inside.count("b") == 2 and "ɔ" in inside, inside


async def test_lexicon_on_a_voice(settings: Settings) -> None:
    lexicon = {"sql": "sequel", "Tmux": "/ˈtiːmʌks/"}
    for use in ("espeak", "piper"):
        choice = VoiceChoice(use=use, options={"lexicon": lexicon})
        voice = make_voice([choice], settings)
        _, _, cues = await said(speak(voice, "I like SQL and Tmux."))
        await voice.aclose()
        assert words(cues) == ["I", "like", "SQL", "and", "Tmux."]
        sounds = "".join(cue.text for cue in cues if cue.kind == "phoneme")
        assert "siːkw" in sounds and "mʌks" in sounds, sounds


async def test_bad_ssml_stops_nothing(voice: Chain) -> None:
    with pytest.raises(InputError, match="line 1"):
        await said(speak(voice, "<speak>broken"))
    assert len((await said(speak(voice, "Well.")))[0])


def test_mnemonics() -> None:
    assert mnemonics("ˈhɛləʊ wɜːld") == "[['hEloU]] [[w3:ld]]"
    assert mnemonics("t͡ʃɜːt͡ʃ") == "[[tS3:tS]]"
    assert mnemonics("ǃa") is None


# --- chains ---------------------------------------------------------------------------------------


class Flaky(tts.TTS[Any]):
    """A LiveKit voice that breaks as told: `plan` holds one entry for each sentence."""

    def __init__(self, plan: list[str], timed: bool = True) -> None:
        super().__init__(
            capabilities=tts.TTSCapabilities(streaming=False, aligned_transcript=timed),
            sample_rate=24_000,
            num_channels=1,
        )
        self.plan = plan
        self.asked: list[str] = []

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        self.asked.append(text)
        return _FlakyStream(tts=self, input_text=text, conn_options=conn_options)


class _FlakyStream(tts.ChunkedStream):
    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        voice = self._tts
        assert isinstance(voice, Flaky)
        how = voice.plan.pop(0) if voice.plan else "well"
        if how == "refuse":
            raise APIConnectionError("no")
        if how == "bug":
            raise KeyError("secret text")
        output_emitter.initialize(
            request_id="1", sample_rate=24_000, num_channels=1, mime_type="audio/pcm"
        )
        pcm, found = spoken(self._input_text)
        if how == "half":
            pcm = pcm[: len(pcm) // 2]
            found = [cue for cue in found if cue.start < len(pcm) / 24_000]
        if voice.capabilities.aligned_transcript:
            for cue in found:
                output_emitter.push_timed_transcript(
                    TimedString(cue.text + " ", start_time=cue.start, end_time=cue.end)
                )
        output_emitter.push(pcm.tobytes())
        output_emitter.flush()
        if how == "half":
            await asyncio.sleep(0.2)
            raise APIConnectionError("gone")


TEXT = "First we count one, two, three, four, five. Then we stop. At last we go home."


async def chained(plan: list[str], timed: bool = True) -> tuple[list[str], float, list[str]]:
    flaky = Flaky(plan, timed)
    chain = Chain([Link(flaky), Link(EspeakTTS())])
    try:
        pcm, rate, cues = await said(speak(chain, TEXT))
    finally:
        await chain.aclose()
    last = max(cue.end for cue in cues if cue.kind == "word") if cues else 0.0
    assert last <= len(pcm) / rate + 0.05
    return words(cues), len(pcm) / rate, flaky.asked


async def test_a_voice_that_works_keeps_speaking() -> None:
    found, _, asked = await chained([])
    assert found == TEXT.split() and len(asked) == 3


@pytest.mark.parametrize("how", ["refuse", "bug"])
async def test_refused_before_a_sound(how: str, caplog: pytest.LogCaptureFixture) -> None:
    found, _, asked = await chained(["well", how])
    assert found == TEXT.split()
    assert len(asked) == 2  # and not asked again in this utterance
    assert "secret" not in caplog.text.replace("'secret text'", "")
    told = [vars(one) for one in caplog.records if one.name.startswith("voipavatar")]
    assert told and "secret" not in str(told)


async def test_the_rest_is_said_by_the_word_times() -> None:
    found, seconds, _ = await chained(["half"])
    repeated = [word for word in found if found.count(word) > TEXT.split().count(word)]
    assert set(found) == set(TEXT.split()) and len(repeated) <= 2
    whole = (await chained([]))[1]
    assert seconds == pytest.approx(whole, abs=1.5)


async def test_without_word_times_it_goes_on_with_the_next_sentence() -> None:
    found, _, _ = await chained(["half"], timed=False)
    assert found == "Then we stop. At last we go home.".split()


async def test_all_voices_fail() -> None:
    chain = Chain([Link(Flaky(["refuse"] * 9)), Link(Flaky(["refuse"] * 9))])
    with pytest.raises(TransportError, match="Flaky failed"):
        await said(speak(chain, TEXT))
    # All rest now: they are tried all the same.
    one = chain.links[0].voice
    assert isinstance(one, Flaky)
    one.plan.clear()
    pcm, _, _ = await said(speak(chain, TEXT))
    await chain.aclose()
    assert len(pcm)


async def test_a_failed_voice_rests_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voipavatar.speech.chain.BACK_OFF", (0.3,))
    flaky = Flaky(["refuse"])
    chain = Chain([Link(flaky), Link(EspeakTTS())])
    await said(speak(chain, "One."))
    await said(speak(chain, "Two."))
    assert flaky.asked == ["One."]
    await asyncio.sleep(0.35)
    await said(speak(chain, "Three."))
    await chain.aclose()
    assert flaky.asked == ["One.", "Three."]


async def test_voices_of_different_rates_come_at_one(settings: Settings) -> None:
    chain = Chain([Link(Flaky(["well", "refuse"])), Link(EspeakTTS(), Extras(target=-18.0))])
    pcm, rate, cues = await said(speak(chain, TEXT))
    await chain.aclose()
    assert rate == 24_000 and words(cues) == TEXT.split()
    gaps = [b.start - a.end for a, b in zip(cues, cues[1:], strict=False) if b.kind == "word"]
    assert max(gaps) < 1.0
    assert len(pcm) > 24_000 * 3


def test_a_voice_that_is_missing_is_left_out(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_THERE", raising=False)
    choices = [
        VoiceChoice(use="livekit.plugins.nobody.TTS"),
        VoiceChoice(use="nobody"),
        VoiceChoice(use="edge", options={"proxy": "${NOT_THERE}"}),
        VoiceChoice(use="espeak"),
    ]
    chain = make_voice(choices, settings)
    assert [link.voice.provider for link in chain.links] == ["espeak-ng"]
    asyncio.run(chain.aclose())
    install = 'pip install "livekit-plugins-nobody"'
    for index, why in enumerate([install, install, "NOT_THERE"]):
        with pytest.raises(ConfigError, match=why):
            make_voice([choices[index]], settings)


@pytest.mark.parametrize(
    ("use", "options", "why"),
    [
        ("espeak", {"sped": 3}, "no option 'sped'; it takes .*speed"),
        ("espeak", {"speed": 9000}, "80 to 450"),
        ("edge", {"rate": "fast"}, r"write it like '\+10%'"),
        ("edge", {"voice": "Emma"}, "edge-tts --list-voices"),
        ("piper", {"speaker": "x", "lexicon": 3}, "lexicon is a mapping"),
        ("json.loads", {}, "no class of livekit"),
        ("os; rm", {}, "is no voice"),
        ("espeak", {"cache": "yes"}, "cache is true, false"),
        ("espeak", {"patience": True}, "patience is True"),
    ],
)
def test_mistakes_in_options(
    settings: Settings, use: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        make_voice([VoiceChoice(use=use, options=options), VoiceChoice(use="espeak")], settings)


# --- made ahead -----------------------------------------------------------------------------------


async def test_the_next_message_is_made_while_the_present_one_is_heard(settings: Settings) -> None:
    voice = make_voice([VoiceChoice(use="piper")], settings)
    await said(speak(voice, "Warm."))
    async with aclosing(speak(voice, LONG)) as chunks:
        following = prefetch(voice, "And this is the next message.")
        async for _ in chunks:
            pass
    begun = time.perf_counter()
    first = await following.get()
    waited = time.perf_counter() - begun
    rest = [chunk async for chunk in following]
    await following.aclose()
    await voice.aclose()
    print(f"first sound of what was made ahead after {1e3 * waited:.1f} ms")
    assert first is not None and len(first.pcm) and rest and waited < 0.05


async def test_what_was_made_ahead_and_is_not_wanted() -> None:
    voice = PiperTTS()
    before = asyncio.all_tasks()
    following = prefetch(voice, LONG * 10, ahead=2.0)
    await asyncio.sleep(0.3)
    await following.aclose()
    await following.aclose()
    assert asyncio.all_tasks() == before
    with pytest.raises(InputError):
        prefetch(voice, "x" * 100, limit=10)
    nothing = prefetch(voice, "...")
    assert await nothing.get() is None
    await nothing.aclose()
    await voice.aclose()


async def test_no_more_is_made_than_was_asked_for() -> None:
    flaky = Flaky([])
    chain = Chain([Link(flaky)])
    following = prefetch(chain, "This is a sentence of its own. " * 40, ahead=5.0)
    await asyncio.sleep(1.0)
    assert 2 <= len(flaky.asked) <= 6
    await following.aclose()
    await chain.aclose()


async def test_as_an_agent_streams_its_answer(settings: Settings) -> None:
    """Sentences are said while the text is still being written."""
    voice = make_voice([VoiceChoice(use="espeak")], settings)
    stream = voice.stream()
    stream.push_text("This sentence is complete. And this ")
    event = await asyncio.wait_for(stream.__anext__(), 5)
    assert event.frame.samples_per_channel
    stream.push_text("one not yet. Now it is.")
    stream.end_input()
    found = list(event.frame.userdata["lk.timed_transcripts"])
    samples, cues = event.frame.samples_per_channel, list(event.frame.userdata["voipavatar.cues"])
    async for event in stream:
        found += event.frame.userdata["lk.timed_transcripts"]
        cues += event.frame.userdata["voipavatar.cues"]
        samples += event.frame.samples_per_channel
    await stream.aclose()
    await voice.aclose()
    text = "This sentence is complete. And this one not yet. Now it is."
    assert "".join(found).split() == text.split() == words(cues)
    starts = [word.start_time for word in found]
    assert starts == sorted(starts)
    assert max(cue.end for cue in cues) == pytest.approx(samples / 22_050, abs=0.05)


async def test_the_systems_own_voice(settings: Settings) -> None:
    pytest.importorskip("pyttsx3")
    voice = make_voice([VoiceChoice(use="pyttsx3", options={"rate": 180})], settings)
    try:
        pcm, rate, cues = await said(speak(voice, "Hello there. How are you?"))
    except TransportError as error:
        pytest.skip(f"pyttsx3 finds no voice of the system: {error}")
    finally:
        await voice.aclose()
    assert rate == 48_000 and len(pcm) > rate
    assert not words(cues)
