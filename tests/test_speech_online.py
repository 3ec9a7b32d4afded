"""Online voices against local stand-ins of their providers, and what happens when they fail."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from voipavatar.config import Persona, Settings, VoiceChoice
from voipavatar.errors import TransportError
from voipavatar.media import Cue, Int16
from voipavatar.speech import Chain, Chunk, EspeakTTS, make_voice, speak
from voipavatar.speech.chain import Link

from . import standins
from .standins import Behaviour

DOCS = Path(__file__).parent.parent / "docs"
TEXT = "Hello there, my friends. This is the second sentence, and it is a little longer. The end."
WORDS = TEXT.split()


class Heard:
    """What came out of a voice, and when."""

    def __init__(self) -> None:
        self.pcm: Int16 = np.zeros(0, np.int16)
        self.rate = 0
        self.cues: list[Cue] = []
        self.gap = 0.0
        """The longest silence of a listener who plays the sound as it comes."""
        self.first = 0.0

    @property
    def words(self) -> list[str]:
        return [cue.text for cue in self.cues if cue.kind == "word"]

    @property
    def seconds(self) -> float:
        return len(self.pcm) / self.rate


async def hear(chunks: AsyncGenerator[Chunk, None]) -> Heard:
    heard = Heard()
    begun = time.perf_counter()
    parts: list[Int16] = []
    until = 0.0
    async with aclosing(chunks) as stream:
        async for chunk in stream:
            now = time.perf_counter() - begun
            if len(chunk.pcm):
                if not parts:
                    heard.first, until = now, now
                heard.gap = max(heard.gap, now - until)
                until = max(until, now) + chunk.seconds
            parts.append(chunk.pcm)
            heard.cues += chunk.cues
            assert heard.rate in (0, chunk.rate)
            heard.rate = chunk.rate
    heard.pcm = np.concatenate(parts)
    return heard


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path)


@contextlib.asynccontextmanager
async def made(settings: Settings, *choices: VoiceChoice) -> AsyncIterator[Chain]:
    before = asyncio.all_tasks()
    voice = make_voice(choices, settings)
    try:
        yield voice
    finally:
        await voice.aclose()
        await asyncio.sleep(0.05)
    assert not {one for one in asyncio.all_tasks() - before if not _served(one)}


def _served(task: asyncio.Task[Any]) -> bool:
    """Whether it belongs to a stand-in, which ends after its client."""
    return "RequestHandler" in repr(task.get_coro())


# --- providers ------------------------------------------------------------------------------------


def documented() -> dict[str, list[VoiceChoice]]:
    """The voices of docs/voices.md, by what they use: every YAML there is one that works."""
    found: dict[str, list[VoiceChoice]] = {}
    for block in re.findall(r"```yaml\n(.*?)```", (DOCS / "voices.md").read_text(), re.S):
        for part in re.split(r"\n\n(?=voice:)", block):  # one block may show two ways
            data = yaml.safe_load(part)
            if "voice" in data:
                for one in Persona.model_validate({"name": "doc", **data}).voice:
                    found.setdefault(one.use, []).append(one)
    return found


def provider(name: str, url: str, **options: Any) -> VoiceChoice:
    """As documented, at the stand-in's address."""
    [*_, choice] = [one for one in documented()[name] if "base_url" not in one.options]
    own = dict(choice.options)
    own.pop("speech_region", None)  # where Azure's address is made of
    address = "speech_endpoint" if name == "azure" else "base_url"
    return VoiceChoice(use=name, options={**own, address: url, "cache": False, **options})


async def test_every_yaml_of_the_documents_makes_a_voice(settings: Settings) -> None:
    """Online ones too: their options are theirs, and are refused where they aren't."""
    found = documented()
    assert {
        "piper",
        "espeak",
        "edge",
        "elevenlabs",
        "cartesia",
        "google",
        "azure",
        "openai",
    } <= set(found)
    for name, choices in found.items():
        for choice in choices:
            if name == "google" or "model" in choice.options and name == "piper":
                continue  # wants a key's file; wants a voice's file
            async with made(settings, choice):
                pass


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ELEVEN", "CARTESIA", "OPENAI"):
        monkeypatch.setenv(f"{name}_API_KEY", "a-secret-key")
    monkeypatch.setenv("AZURE_SPEECH_KEY", "a-secret-key")


@pytest.mark.parametrize("name", ["openai", "azure", "elevenlabs", "cartesia"])
async def test_provider(name: str, settings: Settings) -> None:
    pytest.importorskip(f"livekit.plugins.{name}")
    behaviour = Behaviour()
    async with getattr(standins, name)(behaviour) as url:
        async with made(settings, provider(name, url)) as voice:
            heard = await hear(speak(voice, TEXT))
    assert all("a-secret-key" in one for one in behaviour.keys)
    assert " ".join(" ".join(behaviour.texts).split()) == TEXT
    expected = sum(len(standins.spoken(text)[0]) for text in behaviour.texts) / 24_000
    assert heard.seconds == pytest.approx(expected, abs=0.15)
    if name in ("elevenlabs", "cartesia"):
        assert heard.words == WORDS
        starts = [cue.start for cue in heard.cues]
        assert starts == sorted(starts) and heard.cues[-1].end <= heard.seconds + 0.3
        # The third sentence's words are where its sound is.
        level = np.abs(heard.pcm[round(heard.cues[-1].start * heard.rate) :]).mean()
        assert level > 300
    if name == "elevenlabs":
        assert behaviour.requests[0]["voice"] == "bIHbv24MWmeRgasZH58o"
        assert behaviour.connections == 1  # one line for all sentences


@pytest.mark.parametrize("form", ["wav", "mp3", "pcm", "sse"])
async def test_servers_that_speak_openai(form: str, settings: Settings) -> None:
    pytest.importorskip("livekit.plugins.openai")
    behaviour = Behaviour()
    async with standins.openai(behaviour, form) as url:
        [local] = [one for one in documented()["openai"] if "base_url" in one.options]
        asked = "pcm" if form in ("sse", "pcm") else form
        more = {"base_url": url, "response_format": asked, "cache": False}
        choice = VoiceChoice(use="openai", options={**local.options, **more})
        async with made(settings, choice) as voice:
            heard = await hear(speak(voice, "Hello there, my friends."))
    assert heard.rate == 24_000
    expected = len(standins.spoken("Hello there, my friends.")[0]) / 24_000
    assert heard.seconds == pytest.approx(expected, abs=0.15)


async def test_azure_gets_sound_ssml(settings: Settings) -> None:
    """The plug-in puts text into SSML as it is: what isn't escaped would be markup, or an error."""
    pytest.importorskip("livekit.plugins.azure")
    behaviour = Behaviour()
    async with standins.azure(behaviour) as url:
        async with made(settings, provider("azure", url)) as voice:
            await hear(speak(voice, "Is 3 < 5 & 7 > 5? </voice> <break time='9s'/>"))
            await hear(
                speak(
                    voice,
                    '<speak><prosody rate="120%">A <phoneme ph="wɪn">Nguyen</phoneme>'
                    "</prosody></speak>",
                )
            )
    assert "3 < 5 & 7 > 5?" in behaviour.texts[0]
    assert "<break" not in behaviour.requests[1]["ssml"]
    assert 'rate="+20%"' in behaviour.requests[-1]["ssml"]
    assert 'ph="wɪn"' in behaviour.requests[-1]["ssml"]


@pytest.mark.parametrize("name", ["openai", "azure", "elevenlabs", "cartesia"])
@pytest.mark.parametrize(
    "trouble", [Behaviour(status=401), Behaviour(status=503), Behaviour(stall_after=2),
                Behaviour(drop_after=2)], ids=["401", "503", "stall", "drop"]
)  # fmt: skip
async def test_the_offline_voice_goes_on(
    name: str, trouble: Behaviour, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(f"livekit.plugins.{name}")
    async with getattr(standins, name)(trouble) as url:
        choices = (provider(name, url), VoiceChoice(use="espeak"))
        async with made(settings, *choices) as voice:
            heard = await hear(speak(voice, TEXT))
            again = trouble.connections
            await hear(speak(voice, "Once more."))
    print(f"{name}: first sound {heard.first:.2f} s, longest gap {heard.gap:.2f} s")
    assert trouble.connections == again  # left alone for a while
    assert heard.gap < 2.0 and heard.first < 3.0
    assert heard.words[-2:] == ["The", "end."]
    assert heard.seconds > 4
    assert "Hello" not in caplog.text and "secret" not in caplog.text
    told = [vars(one) for one in caplog.records if one.name.startswith("voipavatar")]
    assert told and "Hello" not in str(told) and "secret" not in str(told)


@pytest.mark.parametrize("trouble", [Behaviour(), Behaviour(status=503), Behaviour(drop_after=2)])
async def test_google(trouble: Behaviour) -> None:
    """Its plug-in has no option for the address, so the channel is given to it."""
    plugin = pytest.importorskip("livekit.plugins.google")
    grpc = pytest.importorskip("grpc")
    api = pytest.importorskip("google.cloud.texttospeech_v1")
    auth = pytest.importorskip("google.auth.credentials")
    transports = pytest.importorskip(
        "google.cloud.texttospeech_v1.services.text_to_speech.transports"
    )
    voice = plugin.TTS(voice_name="en-US-Chirp3-HD-Charon", credentials=auth.AnonymousCredentials())
    async with standins.google(trouble) as address:
        channel = grpc.aio.insecure_channel(address)
        transport = transports.TextToSpeechGrpcAsyncIOTransport(channel=channel)
        voice._client = api.TextToSpeechAsyncClient(transport=transport)
        chain = Chain([Link(voice), Link(EspeakTTS())])
        heard = await hear(speak(chain, TEXT))
        await chain.aclose()
        await channel.close()
    if trouble.status or trouble.drop_after:
        assert heard.words[-2:] == ["The", "end."]
    else:
        assert " ".join(trouble.texts) == TEXT
        assert trouble.requests[0]["voice"] == "en-US-Chirp3-HD-Charon"
        assert heard.rate == 24_000 and heard.seconds > 4


async def test_alone_it_tries_again_and_then_says_so(settings: Settings) -> None:
    pytest.importorskip("livekit.plugins.openai")
    behaviour = Behaviour(status=503)
    async with standins.openai(behaviour) as url:
        async with made(settings, provider("openai", url)) as voice:
            with pytest.raises(TransportError, match="503") as caught:
                await hear(speak(voice, TEXT))
            assert caught.value.retryable and behaviour.connections == 3
            behaviour.status = 401
            with pytest.raises(TransportError, match="401: check its key"):
                await hear(speak(voice, TEXT))
            assert behaviour.connections == 4
            behaviour.status = 0
            assert (await hear(speak(voice, TEXT))).seconds > 3
    assert "Hello" not in str(caught.value)


async def test_phrases_are_asked_for_once(settings: Settings) -> None:
    pytest.importorskip("livekit.plugins.cartesia")
    behaviour = Behaviour()
    async with standins.cartesia(behaviour) as url:
        choice = provider("cartesia", url, cache=True)
        async with made(settings, choice) as voice:
            one = await hear(speak(voice, TEXT))
        async with made(settings, choice) as voice:
            asked = len(behaviour.texts)
            other = await hear(speak(voice, TEXT))
            assert len(behaviour.texts) == asked
            assert other.words == one.words == WORDS
            assert len(other.pcm) == len(one.pcm)
            await hear(speak(voice, "Something new."))
            assert len(behaviour.texts) == asked + 1


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Piper's network, cut once for all tests here."""
    return tmp_path_factory.mktemp("networks")


# --- edge -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ssl.SSLContext]:
    """A certificate in the service's name that edge-tts believes."""
    communicate = pytest.importorskip("edge_tts.communicate")
    cert, context = standins.certificate(tmp_path_factory.mktemp("tls"), standins.EDGE_HOST)
    trusted = communicate._SSL_CTX
    communicate._SSL_CTX = ssl.create_default_context(cafile=str(cert))
    yield context
    communicate._SSL_CTX = trusted


def edge(port: int, **options: Any) -> VoiceChoice:
    return VoiceChoice(
        use="edge", options={"endpoint": f"127.0.0.1:{port}", "cache": False, **options}
    )


async def test_edge(settings: Settings, tls: ssl.SSLContext) -> None:
    behaviour = Behaviour()
    async with standins.edge(behaviour, tls) as port, made(settings, edge(port)) as voice:
        heard = await hear(speak(voice, TEXT))
    assert behaviour.texts == [
        "Hello there, my friends.",
        "This is the second sentence, and it is a little longer.",
        "The end.",
    ]
    assert heard.rate == 24_000
    assert heard.words == WORDS
    assert len(behaviour.keys[0]) >= 64
    expected = sum(len(standins.spoken(text)[0]) for text in behaviour.texts) / 24_000
    assert heard.seconds == pytest.approx(expected, abs=0.4)


async def test_edge_with_markup(settings: Settings, tls: ssl.SSLContext) -> None:
    behaviour = Behaviour()
    async with standins.edge(behaviour, tls) as port:
        async with made(settings, edge(port, rate="+10%", lexicon={"SQL": "sequel"})) as voice:
            heard = await hear(
                speak(
                    voice,
                    '<speak>Learn SQL <break time="1s"/><prosody rate="150%" pitch="high">'
                    "a &lt; b</prosody></speak>",
                )
            )
    assert behaviour.texts == ["Learn sequel", "a < b"]
    assert behaviour.requests[0]["rate"] == "+10%"
    assert behaviour.requests[1]["rate"] == "+65%" and behaviour.requests[1]["pitch"] == "+24Hz"
    assert heard.words[:2] == ["Learn", "SQL"]


TROUBLES = {
    "refused": Behaviour(status=403),
    "down": Behaviour(status=503),
    "mute": Behaviour(stall_after=0),
    "stalls": Behaviour(stall_after=3),
    "cut": Behaviour(drop_after=3),
}


@pytest.mark.parametrize("offline", ["espeak", "piper"])
@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
async def test_edge_fails_and_the_offline_voice_goes_on(
    trouble: Behaviour,
    offline: str,
    settings: Settings,
    networks: Path,
    tls: ssl.SSLContext,
) -> None:
    options = {"cache_dir": str(networks)} if offline == "piper" else {}
    async with standins.edge(trouble, tls) as port:
        choices = (edge(port), VoiceChoice(use=offline, options=options))
        async with made(settings, *choices) as voice:
            # It is loaded while the first voice still works; on a busy machine that takes a while.
            await hear(speak(voice.links[1].voice, "Ready."))
            heard = await hear(speak(voice, TEXT))
    print(f"{offline}: first sound {heard.first:.2f} s, longest gap {heard.gap:.2f} s")
    assert heard.words[-2:] == ["The", "end."]
    # Nothing is left out: a word that was cut is said again.
    assert [word for word in heard.words if word in WORDS] == heard.words
    assert set(heard.words) == set(WORDS)
    assert heard.first < 3 and heard.gap < (2 if offline == "espeak" else 3)


async def test_edge_out_of_reach(settings: Settings, tls: ssl.SSLContext) -> None:
    async with made(settings, edge(9), VoiceChoice(use="espeak")) as voice:
        heard = await hear(speak(voice, TEXT))
        assert heard.first < 2 and heard.words == WORDS
    async with made(settings, edge(9)) as voice:
        with pytest.raises(TransportError, match="APIConnectionError"):
            await hear(speak(voice, TEXT))


async def test_closing_in_the_middle_hangs_up(settings: Settings, tls: ssl.SSLContext) -> None:
    behaviour = Behaviour(stall_after=2)
    async with standins.edge(behaviour, tls) as port, made(settings, edge(port)) as voice:
        before = asyncio.all_tasks()
        async with aclosing(speak(voice, TEXT)) as chunks:
            async for _ in chunks:
                break
        assert not {one for one in asyncio.all_tasks() - before if not _served(one)}
        # The stand-in's task is cancelled when its client hangs up.
        for _ in range(50):
            await asyncio.sleep(0.05)
            if asyncio.all_tasks() <= before:
                break
        assert asyncio.all_tasks() <= before
