"""Local stand-ins of online voices: the providers' HTTP and WebSocket interfaces on loopback.

They speak with eSpeak, so what comes back is the text that was sent, with the times of its words,
and they misbehave when told to. Interfaces as the providers document them and as the clients that
LiveKit's plug-ins and edge-tts are use them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import io
import json
import ssl
import subprocess
import wave
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import av
import numpy as np
from aiohttp import WSMsgType, web

from voipavatar.media import Cue, Int16, Resampler
from voipavatar.speech.espeak import RATE, _How, library
from voipavatar.speech.voice import Chunk

PROVIDER_RATE = 24_000


def spoken(text: str, rate: int = PROVIDER_RATE) -> tuple[Int16, list[Cue]]:
    """The text said by eSpeak, and its words."""
    chunks: list[Chunk] = []

    def take(chunk: Chunk) -> bool:
        chunks.append(chunk)
        return True

    library().say(text, _How("en-us", 165, 50, 50, 100), take)
    resampler = Resampler(RATE, rate)
    parts = [resampler.push(chunk.pcm) for chunk in chunks]
    words = [cue for chunk in chunks for cue in chunk.cues if cue.kind == "word"]
    return np.concatenate([*parts, resampler.flush()]), words


def wav(pcm: Int16, rate: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", "NONE"))
        file.writeframes(pcm.tobytes())
    return out.getvalue()


def mp3(pcm: Int16, rate: int) -> bytes:
    """48 kbit/s mono, as the Edge service sends."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp3", options={"write_xing": "0", "id3v2_version": "0"}) as file:
        stream = file.add_stream("libmp3lame", rate=rate)
        stream.bit_rate = 48_000
        stream.codec_context.layout = "mono"
        stream.codec_context.format = "s16p"
        frame = av.AudioFrame.from_ndarray(pcm.reshape(1, -1), format="s16p", layout="mono")
        frame.sample_rate = rate
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)
    return out.getvalue()


@dataclass
class Behaviour:
    """What a stand-in does, and what it saw."""

    status: int = 0
    """Refuse with this HTTP status."""
    stall_after: int | None = None
    """Say nothing more after so many pieces of sound, and keep the line open."""
    drop_after: int | None = None
    """Cut the line after so many pieces of sound."""
    delay: float = 0.0
    """Seconds before the first sound."""
    texts: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0

    async def gate(self, sent: int) -> bool:
        """Whether to go on after `sent` pieces of sound."""
        if sent == 0 and self.delay:
            await asyncio.sleep(self.delay)
        if self.stall_after is not None and sent >= self.stall_after:
            await asyncio.sleep(60)
        return self.drop_after is None or sent < self.drop_after


@contextlib.asynccontextmanager
async def served(
    routes: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]],
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[int]:
    """An HTTP server on a free port of loopback."""
    app = web.Application()
    for path, handler in routes.items():
        app.router.add_route("*", path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.2, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def certificate(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for `name`: its file, and a server's context."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        + ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
        + ["-keyout", str(key), "-out", str(cert)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, context


# --- Edge -----------------------------------------------------------------------------------------

EDGE_HOST = "speech.platform.bing.com"
_TICKS = 10_000_000


@contextlib.asynccontextmanager
async def edge(behaviour: Behaviour, tls: ssl.SSLContext) -> AsyncIterator[int]:
    """The read-aloud service: text frames with headers, binary frames with a header length."""

    async def speak(request: web.Request) -> web.StreamResponse:
        behaviour.connections += 1
        if behaviour.status:
            return web.Response(status=behaviour.status)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        behaviour.keys.append(request.query["Sec-MS-GEC"])
        config: dict[str, Any] = {}
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                break
            head, _, body = message.data.partition("\r\n\r\n")
            if "Path:speech.config" in head:
                config = json.loads(body)
                continue
            ssml = ElementTree.fromstring(body)
            text = "".join(ssml.itertext())
            behaviour.texts.append(text)
            prosody = ssml.find(".//{*}prosody")
            behaviour.requests.append({**(dict(prosody.attrib) if prosody is not None else {})})
            options = config["context"]["synthesis"]["audio"]["metadataoptions"]
            assert options["wordBoundaryEnabled"] == "true"
            await socket.send_str("X-RequestId:1\r\nPath:turn.start\r\n\r\n{}")
            pcm, words = spoken(text)
            sound = mp3(pcm, PROVIDER_RATE)
            size = 48_000 // 8 // 4  # a quarter of a second
            sent = 0
            for at in range(0, len(sound), size):
                if not await behaviour.gate(sent):
                    request.transport.close()  # type: ignore[union-attr]
                    return socket
                seconds = at * 8 / 48_000
                while words and words[0].start < seconds + 0.25:
                    word = words.pop(0)
                    data = {
                        "Offset": round(word.start * _TICKS),
                        "Duration": round((word.end - word.start) * _TICKS),
                        "text": {"Text": word.text.strip(".,!?"), "BoundaryType": "WordBoundary"},
                    }
                    meta = {"Metadata": [{"Type": "WordBoundary", "Data": data}]}
                    await socket.send_str(f"Path:audio.metadata\r\n\r\n{json.dumps(meta)}")
                header = b"X-RequestId:1\r\nContent-Type:audio/mpeg\r\nPath:audio\r\n"
                data_ = len(header).to_bytes(2, "big") + header + sound[at : at + size]
                await socket.send_bytes(data_)
                sent += 1
            await socket.send_str("X-RequestId:1\r\nPath:turn.end\r\n\r\n{}")
        return socket

    path = "/consumer/speech/synthesize/readaloud/edge/v1"
    async with served({path: speak}, tls) as port:
        yield port


# --- OpenAI and what speaks its interface ---------------------------------------------------------


@contextlib.asynccontextmanager
async def openai(behaviour: Behaviour, form: str = "wav") -> AsyncIterator[str]:
    """`POST /v1/audio/speech`; gives the base URL. `form`: wav, mp3, pcm or sse."""

    async def speak(request: web.Request) -> web.StreamResponse:
        behaviour.connections += 1
        behaviour.keys.append(request.headers.get("Authorization", ""))
        if behaviour.status:
            return web.json_response(
                {"error": {"message": "no", "type": "x", "code": "x"}}, status=behaviour.status
            )
        told = await request.json()
        behaviour.requests.append(told)
        behaviour.texts.append(told["input"])
        pcm, _ = spoken(told["input"])
        kinds = {"wav": "audio/wav", "mp3": "audio/mpeg", "pcm": "audio/pcm"}
        sound = {"wav": wav, "mp3": mp3}.get(form, lambda pcm, _: pcm.tobytes())(pcm, PROVIDER_RATE)
        response = web.StreamResponse()
        response.content_type = kinds.get(form, "text/event-stream")
        await response.prepare(request)
        for sent, at in enumerate(range(0, len(sound), 12_000)):
            if not await behaviour.gate(sent):
                request.transport.close()  # type: ignore[union-attr]
                break
            part = sound[at : at + 12_000]
            if form == "sse":
                event = {"type": "speech.audio.delta", "audio": base64.b64encode(part).decode()}
                part = f"data: {json.dumps(event)}\n\n".encode()
            await response.write(part)
        if form == "sse":
            await response.write(b'data: {"type": "speech.audio.done"}\n\ndata: [DONE]\n\n')
        return response

    async with served({"/v1/audio/speech": speak}) as port:
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.asynccontextmanager
async def chat(behaviour: Behaviour, *answers: str) -> AsyncIterator[str]:
    """`POST /v1/chat/completions` as a stream of events; gives the base URL. Answers in turn."""
    left = list(answers)

    async def complete(request: web.Request) -> web.StreamResponse:
        behaviour.connections += 1
        behaviour.keys.append(request.headers.get("Authorization", ""))
        if behaviour.status:
            return web.json_response(
                {"error": {"message": "no", "type": "x", "code": "x"}}, status=behaviour.status
            )
        told = await request.json()
        behaviour.requests.append(told)
        behaviour.texts.append(str(told["messages"][-1]["content"]))
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": f"{word} "} for word in (left.pop(0) if left else "yes").split()]
        for index, delta in enumerate([*deltas, {}]):
            event = {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "created": 0,
                "model": told["model"],
                "choices": [
                    {
                        "index": 0,
                        "delta": delta,
                        "finish_reason": "stop" if index == len(deltas) else None,
                    }
                ],
            }
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async with served({"/v1/chat/completions": complete}) as port:
        yield f"http://127.0.0.1:{port}/v1"


# --- Azure ----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def azure(behaviour: Behaviour) -> AsyncIterator[str]:
    """`POST /tts/cognitiveservices/v1` with SSML; gives the endpoint."""

    async def speak(request: web.Request) -> web.StreamResponse:
        behaviour.connections += 1
        behaviour.keys.append(request.headers.get("Ocp-Apim-Subscription-Key", ""))
        if behaviour.status:
            return web.Response(status=behaviour.status)
        body = await request.text()
        try:
            ssml = ElementTree.fromstring(body)
        except ElementTree.ParseError:
            return web.Response(status=400)
        text = "".join(ssml.itertext())
        behaviour.texts.append(text)
        behaviour.requests.append(
            {"ssml": body, "format": request.headers["X-Microsoft-OutputFormat"]}
        )
        pcm, _ = spoken(text)
        response = web.StreamResponse()
        await response.prepare(request)
        for sent, at in enumerate(range(0, len(pcm), 6_000)):
            if not await behaviour.gate(sent):
                request.transport.close()  # type: ignore[union-attr]
                break
            await response.write(pcm[at : at + 6_000].tobytes())
        return response

    async with served({"/cognitiveservices/v1": speak}) as port:
        yield f"http://127.0.0.1:{port}/cognitiveservices/v1"


# --- ElevenLabs -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def elevenlabs(behaviour: Behaviour) -> AsyncIterator[str]:
    """`WS /v1/text-to-speech/{voice}/multi-stream-input`; gives the base URL."""

    async def speak(request: web.Request) -> web.StreamResponse:
        behaviour.connections += 1
        behaviour.keys.append(request.headers.get("xi-api-key", ""))
        if behaviour.status:
            return web.Response(status=behaviour.status)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        behaviour.requests.append({"voice": request.match_info["voice"], **request.query})
        offsets: dict[str, float] = {}
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                break
            told = json.loads(message.data)
            context = told.get("context_id")
            text = told.get("text", "").strip()
            if text:
                behaviour.texts.append(text)
                pcm, words = spoken(text)
                origin = offsets.get(context, 0.0)
                offsets[context] = origin + len(pcm) / PROVIDER_RATE
                chars, starts, lengths = _by_character(text, words)
                step = PROVIDER_RATE // 4
                for sent, at in enumerate(range(0, len(pcm), step)):
                    if not await behaviour.gate(sent):
                        request.transport.close()  # type: ignore[union-attr]
                        return socket
                    low, high = at / PROVIDER_RATE, (at + step) / PROVIDER_RATE
                    inside = [i for i, start in enumerate(starts) if low <= start < high]
                    alignment = {
                        "chars": [chars[i] for i in inside],
                        "charStartTimesMs": [round(1000 * (origin + starts[i])) for i in inside],
                        "charDurationsMs": [round(1000 * lengths[i]) for i in inside],
                    }
                    sound = base64.b64encode(pcm[at : at + step].tobytes()).decode()
                    await socket.send_json(
                        {
                            "audio": sound,
                            "contextId": context,
                            "alignment": alignment,
                            "normalizedAlignment": alignment,
                        }
                    )
            if told.get("close_context"):
                await socket.send_json({"isFinal": True, "contextId": context})
            if told.get("close_socket"):
                break
        return socket

    path = "/v1/text-to-speech/{voice}/multi-stream-input"
    async with served({path: speak}) as port:
        yield f"http://127.0.0.1:{port}/v1"


def _by_character(text: str, words: list[Cue]) -> tuple[list[str], list[float], list[float]]:
    """Each character's start and length; a space follows its word."""
    chars, starts, lengths = [], [], []
    for word in words:
        step = (word.end - word.start) / (len(word.text) + 1)
        for index, char in enumerate(word.text + " "):
            chars.append(char)
            starts.append(word.start + index * step)
            lengths.append(step)
    return chars, starts, lengths


# --- Cartesia -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def cartesia(behaviour: Behaviour) -> AsyncIterator[str]:
    """`WS /tts/websocket`; gives the base URL."""

    async def speak(request: web.Request) -> web.StreamResponse:
        behaviour.connections += 1
        behaviour.keys.append(request.headers.get("X-API-Key", ""))
        if behaviour.status:
            return web.Response(status=behaviour.status)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        offset = 0.0
        async for message in socket:
            if message.type is not WSMsgType.TEXT:
                break
            told = json.loads(message.data)
            context = told["context_id"]
            text = told["transcript"].strip()
            behaviour.requests.append(told)
            if text:
                behaviour.texts.append(text)
                rate = told["output_format"]["sample_rate"]
                pcm, words = spoken(text, rate)
                step = rate // 4
                for sent, at in enumerate(range(0, len(pcm), step)):
                    if not await behaviour.gate(sent):
                        request.transport.close()  # type: ignore[union-attr]
                        return socket
                    now = [w for w in words if at / rate <= w.start < (at + step) / rate]
                    if now:
                        times = {
                            "words": [w.text for w in now],
                            "start": [offset + w.start for w in now],
                            "end": [offset + w.end for w in now],
                        }
                        await socket.send_json(
                            {"type": "timestamps", "context_id": context, "word_timestamps": times}
                        )
                    sound = base64.b64encode(pcm[at : at + step].tobytes()).decode()
                    await socket.send_json({"type": "chunk", "context_id": context, "data": sound})
                offset += len(pcm) / rate
            if not told["continue"]:
                offset = 0.0
                await socket.send_json({"type": "done", "context_id": context, "done": True})
        return socket

    async with served({"/tts/websocket": speak}) as port:
        yield f"http://127.0.0.1:{port}"


# --- Google ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def google(behaviour: Behaviour) -> AsyncIterator[str]:
    """`google.cloud.texttospeech.v1.TextToSpeech/StreamingSynthesize` over gRPC; host and port."""
    grpc: Any = importlib.import_module("grpc")
    api: Any = importlib.import_module("google.cloud.texttospeech_v1")

    async def speak(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        behaviour.connections += 1
        if behaviour.status:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no")
        async for request in requests:
            if not request.input.text:
                behaviour.requests.append({"voice": request.streaming_config.voice.name})
                continue
            behaviour.texts.append(request.input.text)
            pcm, _ = spoken(request.input.text)
            for sent, at in enumerate(range(0, len(pcm), 6_000)):
                if not await behaviour.gate(sent):
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                part = pcm[at : at + 6_000].tobytes()
                yield api.StreamingSynthesizeResponse(audio_content=part)

    handler = grpc.method_handlers_generic_handler(
        "google.cloud.texttospeech.v1.TextToSpeech",
        {
            "StreamingSynthesize": grpc.stream_stream_rpc_method_handler(
                speak,
                request_deserializer=api.StreamingSynthesizeRequest.deserialize,
                response_serializer=api.StreamingSynthesizeResponse.serialize,
            )
        },
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0.2)
