"""Edge: Microsoft's online voices through the package edge-tts. No key, no promise of service."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from contextlib import aclosing
from typing import Any

from livekit.agents import (
    APIConnectionError,
    APIConnectOptions,
    APIError,
    APIStatusError,
    APITimeoutError,
    tts,
    utils,
)
from livekit.agents.types import DEFAULT_API_CONNECT_OPTIONS, TimedString

from ..errors import ConfigError
from .voice import Missing

MISSING = 'the voice "edge" needs: pip install "voipavatar[demo]"'

_TICKS = 10_000_000  # the service counts in units of 100 ns
_PERCENT = re.compile(r"[+-]\d{1,3}%")
_HERTZ = re.compile(r"[+-]\d{1,3}Hz")


def installed() -> None:
    """Raises Missing when the package isn't there."""
    if importlib.util.find_spec("edge_tts") is None:
        raise Missing(MISSING)


class EdgeTTS(tts.TTS[Any]):
    """A voice of Microsoft Edge's read-aloud service.

    voice: as `edge-tts --list-voices` prints it, "en-US-EmmaMultilingualNeural", say.
    rate, volume: "+10%", "-20%"; pitch: "+5Hz".
    proxy: URL of an HTTP proxy.
    endpoint: "host:port" to connect to instead of the service's own address; TLS and the check of
      the service's name stay, so this is for a tunnel or a stand-in that holds a certificate.

    Raises ConfigError for a missing package or an option that the service would refuse.
    """

    def __init__(
        self,
        *,
        voice: str = "en-US-EmmaMultilingualNeural",
        rate: str = "+0%",
        volume: str = "+0%",
        pitch: str = "+0Hz",
        proxy: str | None = None,
        endpoint: str | None = None,
    ) -> None:
        installed()
        for name, value, form, like in (
            ("rate", rate, _PERCENT, "+10%"),
            ("volume", volume, _PERCENT, "-20%"),
            ("pitch", pitch, _HERTZ, "+5Hz"),
        ):
            if not form.fullmatch(value):
                raise ConfigError(f"edge: {name} is {value!r}; write it like {like!r}")
        if not re.fullmatch(r"[A-Za-z]{2,3}-[\w-]+Neural", voice):
            raise ConfigError(
                f"edge: {voice!r} is not the name of a voice: `edge-tts --list-voices` has them, "
                "for example en-GB-SoniaNeural"
            )
        self._address: tuple[str, int] | None = None
        if endpoint is not None:
            host, _, port = endpoint.rpartition(":")
            if not host or not port.isdigit():
                raise ConfigError(f"edge: endpoint is {endpoint!r}; write it like 127.0.0.1:8443")
            self._address = (host.strip("[]"), int(port))
        super().__init__(
            capabilities=tts.TTSCapabilities(streaming=False, aligned_transcript=True),
            sample_rate=24_000,
            num_channels=1,
        )
        self._voice = voice
        self._prosody = {"rate": rate, "volume": volume, "pitch": pitch}
        self._proxy = proxy

    @property
    def model(self) -> str:
        return self._voice

    @property
    def provider(self) -> str:
        return "edge-tts"

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        return _Stream(self, text, self._prosody, conn_options)

    def synthesize_styled(
        self, text: str, rate: float, pitch: float, *, conn_options: APIConnectOptions
    ) -> tts.ChunkedStream:
        """See `chain.Styled`: on top of the voice's own tempo and pitch."""
        own = self._prosody
        percent = (1 + int(own["rate"][:-1]) / 100) * rate * 100 - 100
        hertz = int(own["pitch"][:-2]) + 160 * (pitch - 1)  # of a voice in the middle
        prosody = {**own, "rate": f"{percent:+.0f}%", "pitch": f"{hertz:+.0f}Hz"}
        return _Stream(self, text, prosody, conn_options)


class _Stream(tts.ChunkedStream):
    def __init__(
        self,
        voice: EdgeTTS,
        text: str,
        prosody: dict[str, str],
        conn_options: APIConnectOptions,
    ) -> None:
        super().__init__(tts=voice, input_text=text, conn_options=conn_options)
        self._voice = voice
        self._prosody = prosody

    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        import aiohttp
        import edge_tts
        from edge_tts import exceptions

        voice = self._voice
        timeout = max(1, round(self._conn_options.timeout))
        output_emitter.initialize(
            request_id=utils.shortuuid(),
            sample_rate=voice.sample_rate,
            num_channels=1,
            mime_type="audio/mp3",
            frame_size_ms=100,
        )
        request = edge_tts.Communicate(
            self._input_text,
            voice._voice,
            **self._prosody,
            boundary="WordBoundary",
            connector=_connector(voice._address),
            proxy=voice._proxy,
            connect_timeout=timeout,
            receive_timeout=timeout,
        )
        try:
            async with aclosing(request.stream()) as messages:
                async for message in messages:
                    if message["type"] == "audio":
                        output_emitter.push(message["data"])
                    elif message["type"] == "WordBoundary":
                        start = message["offset"] / _TICKS
                        output_emitter.push_timed_transcript(
                            TimedString(
                                message["text"] + " ",
                                start_time=start,
                                end_time=start + message["duration"] / _TICKS,
                            )
                        )
        except exceptions.NoAudioReceived:
            raise APIError("edge: the service gave no sound: is the voice's name right?") from None
        except (asyncio.TimeoutError, aiohttp.ServerTimeoutError) as error:
            raise APITimeoutError("edge: the service doesn't answer") from error
        except aiohttp.ClientResponseError as error:
            raise APIStatusError(
                f"edge: the service refused with HTTP {error.status}",
                status_code=error.status,
                retryable=error.status in (429, 500, 502, 503, 504),
            ) from error
        except (aiohttp.ClientError, exceptions.WebSocketError, OSError) as error:
            raise APIConnectionError(
                f"edge: the service is out of reach ({type(error).__name__})"
            ) from error
        except (exceptions.EdgeTTSException, json.JSONDecodeError, KeyError, ValueError) as error:
            raise APIError(
                f"edge: the service's answer isn't understood ({type(error).__name__}): "
                "pip install -U edge-tts"
            ) from error
        output_emitter.flush()


def _connector(address: tuple[str, int] | None) -> Any:
    if address is None:
        return None
    import socket

    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult

    host, port = address

    class Fixed(AbstractResolver):
        async def resolve(
            self, name: str, _: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            return [
                ResolveResult(
                    hostname=name,
                    host=host,
                    port=port,
                    family=socket.AF_INET6 if ":" in host else socket.AF_INET,
                    proto=socket.IPPROTO_TCP,
                    flags=socket.AI_NUMERICHOST,
                )
            ]

        async def close(self) -> None:
            return None

    return aiohttp.TCPConnector(resolver=Fixed(), use_dns_cache=False)
