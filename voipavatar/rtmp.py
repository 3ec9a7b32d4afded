"""Publishing over RTMP and RTMPS: addresses with secrets, and one connection to one server.

The protocol is Adobe's "Real-Time Messaging Protocol" 1.0 (handshake 5.2, chunks 5.3, commands 7)
with tags as in "Video File Format Specification" 10.1 (E.4: AVC and AAC). It is spoken here, on
asyncio, instead of by a muxer's blocking calls, because going on for days depends on three things
that those hide: what the server answered, how many bytes it has acknowledged, and a write that can
be given up at any moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from .errors import ConfigError, TransportError
from .waiting import within

CHUNK_SIZE = 4096
"""Bytes of a message between two chunk headers, as we send it; every known server takes this."""

WRITE_BUFFER = 32_768
"""Bytes that may wait in this process and, unsent, in the kernel: more would only add latency."""

SHORTCUTS = {
    "youtube": "rtmps://a.rtmps.youtube.com:443/live2/",
    "twitch": "rtmps://ingest.global-contribute.live-video.net:443/app/",
}
"""`youtube://KEY` and `twitch://KEY`: the ingest addresses that the platforms publish."""

MASK = "****"


# --- addresses ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StreamUrl:
    """Where a broadcast goes. Its text never shows the key; `reveal()` is for the wire alone.

    `rtmp://host[:port]/app/key`, `rtmps://...`, `srt://host:port?streamid=...`, a path or
    `file:PATH` of a recording (.flv, .mkv, .mp4, .ts), `youtube://KEY`, `twitch://KEY`.
    """

    kind: Literal["rtmp", "rtmps", "srt", "file"]
    host: str
    port: int
    app: str = ""
    key: str = field(default="", repr=False)
    path: Path | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)
    raw: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> StreamUrl:
        """Read an address. ConfigError (which doesn't repeat the address) when it can't be used."""
        text = text.strip()
        match = re.match(r"^([a-z0-9]+)://", text, re.IGNORECASE)
        scheme = match.group(1).lower() if match else "file"
        if scheme in SHORTCUTS:
            text = SHORTCUTS[scheme] + text[len(scheme) + 3 :]
            scheme = "rtmps"
        if scheme == "file":
            return cls._file(text)
        try:
            parts = urlsplit(text)
            port, host = parts.port, parts.hostname
        except ValueError as error:
            raise ConfigError(f"the {scheme} address can't be read: {error}") from None
        if scheme not in ("rtmp", "rtmps", "srt"):
            raise ConfigError(
                f"an address of kind {scheme}:// can't be streamed to: "
                "use rtmp://, rtmps://, srt:// or the path of a file"
            )
        if not host:
            raise ConfigError(f"the {scheme} address names no host: {scheme}://HOST/...")
        secrets = [one for one in (parts.username, parts.password) if one]
        if scheme == "srt":
            if port is None:
                raise ConfigError("the srt address names no port: srt://HOST:PORT?streamid=...")
            secrets += [value for _, value in parse_qsl(parts.query) if len(value) >= 6]
            return cls("srt", host, port, secrets=_longest(secrets), raw=text)
        app, _, key = parts.path.strip("/").rpartition("/")
        if not app or not key:
            raise ConfigError(
                f"the {scheme} address is not complete: {scheme}://{host}/APP/STREAM-KEY"
            )
        secrets += [key, unquote(key)]
        secrets += [value for _, value in parse_qsl(parts.query) if len(value) >= 6]
        if parts.query:
            key += "?" + parts.query
            secrets.append(key)
        kind: Literal["rtmp", "rtmps"] = "rtmps" if scheme == "rtmps" else "rtmp"
        default = 443 if kind == "rtmps" else 1935
        return cls(kind, host, port or default, app, key, None, _longest(secrets), text)

    @classmethod
    def _file(cls, text: str) -> StreamUrl:
        text = re.sub(r"^file:(//)?", "", text)
        path = Path(text).expanduser()
        if not text or path.suffix.lower() not in (".flv", ".mkv", ".mp4", ".ts"):
            raise ConfigError(
                "a recording is named by a path that ends in .flv, .mkv, .mp4 or .ts, "
                "a stream by rtmp://, rtmps:// or srt://"
            )
        return cls("file", "", 0, path=path, raw=text)

    def __str__(self) -> str:
        if self.kind == "file":
            return str(self.path)
        tail = f"/{self.app}/{MASK}" if self.app else f"?{MASK}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}://{host}:{self.port}{tail}"

    def reveal(self) -> str:
        """The address with its secrets."""
        return self.raw

    def scrub(self, text: str) -> str:
        """`text` (a server's answer, say) without this address's secrets."""
        for secret in self.secrets:
            if len(secret) < 6:  # "one" is not a secret part of "gone"
                text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, text)
            else:
                text = text.replace(secret, MASK)
        return text


def _longest(secrets: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({one for one in secrets if one}, key=len, reverse=True))


# --- what is sent ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Packet:
    """One encoded picture (H.264, Annex B) or block of sound (AAC, raw)."""

    kind: Literal["video", "audio"]
    pts: int
    """In ticks of 1/scale s, counted from the programme's first frame."""
    scale: int
    data: bytes
    key: bool = False
    sent: float = 0.0
    """Monotonic time at which the frame it was made of was given to the encoder."""

    @property
    def seconds(self) -> float:
        return self.pts / self.scale

    @property
    def milliseconds(self) -> int:
        return (self.pts * 1000 + self.scale // 2) // self.scale


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """What a decoder must know before the first packet."""

    width: int
    height: int
    fps: int
    video_bitrate: int
    audio_bitrate: int
    sample_rate: int
    avc: bytes
    """SPS and PPS in Annex B, as the encoder gives them."""
    aac: bytes
    """AudioSpecificConfig."""

    def metadata(self) -> dict[str, Any]:
        return {
            "width": float(self.width),
            "height": float(self.height),
            "framerate": float(self.fps),
            "videocodecid": 7.0,
            "videodatarate": self.video_bitrate / 1000,
            "audiocodecid": 10.0,
            "audiodatarate": self.audio_bitrate / 1000,
            "audiosamplerate": float(self.sample_rate),
            "audiosamplesize": 16.0,
            "stereo": True,
            "encoder": "voipavatar",
        }


def nal_units(annex_b: bytes) -> list[bytes]:
    """The NAL units of an Annex B stream. None of them ends in a zero byte (H.264, 7.4.1)."""
    return [unit.rstrip(b"\0") for unit in annex_b.split(b"\0\0\1")[1:]]


def avc_configuration(annex_b: bytes) -> bytes:
    """AVCDecoderConfigurationRecord (ISO/IEC 14496-15, 5.3.3.1) of SPS and PPS."""
    units = nal_units(annex_b)
    sps = [unit for unit in units if unit[0] & 31 == 7]
    pps = [unit for unit in units if unit[0] & 31 == 8]
    if not sps or not pps:
        raise TransportError("the encoder gave no H.264 headers; choose another encoder")
    record = bytes((1, *sps[0][1:4], 0xFF, 0xE0 | len(sps)))
    record += b"".join(struct.pack(">H", len(unit)) + unit for unit in sps)
    record += bytes((len(pps),))
    record += b"".join(struct.pack(">H", len(unit)) + unit for unit in pps)
    if sps[0][1] not in (66, 77, 88):  # High and above say their chroma format: 4:2:0, 8 bit
        record += b"\xfd\xf8\xf8\x00"
    return record


def video_tag(packet: Packet) -> bytes:
    """The body of an FLV video tag with one picture."""
    units = (unit for unit in nal_units(packet.data) if unit)
    body = b"".join(struct.pack(">I", len(unit)) + unit for unit in units)
    return (b"\x17\x01\0\0\0" if packet.key else b"\x27\x01\0\0\0") + body


def audio_tag(packet: Packet) -> bytes:
    """The body of an FLV audio tag with one AAC block."""
    return b"\xaf\x01" + packet.data


# --- AMF0 -----------------------------------------------------------------------------------------


def amf_encode(*values: Any) -> bytes:
    """Python values as AMF0: numbers, booleans, strings, None, dicts (objects)."""
    return b"".join(_amf_one(value) for value in values)


def _amf_one(value: Any) -> bytes:
    if value is None:
        return b"\x05"
    if isinstance(value, bool):
        return b"\x01" + bytes((value,))
    if isinstance(value, (int, float)):
        return b"\x00" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"\x02" + _amf_text(value)
    if isinstance(value, Mapping):
        body = b"".join(_amf_text(str(key)) + _amf_one(item) for key, item in value.items())
        return b"\x03" + body + b"\0\0\x09"
    raise TypeError(f"AMF0 has no {type(value).__name__}")


def _amf_text(text: str) -> bytes:
    data = text.encode()
    if len(data) > 0xFFFF:
        raise ConfigError("a name in a stream address is longer than RTMP allows")
    return struct.pack(">H", len(data)) + data


def amf_decode(data: bytes) -> list[Any]:
    """The values of an AMF0 body. Raises TransportError on what isn't AMF0."""
    values, at = [], 0
    try:
        while at < len(data):
            value, at = _amf_read(data, at, 0)
            values.append(value)
    except (struct.error, IndexError, UnicodeDecodeError):
        raise TransportError("the server's answer is not RTMP") from None
    return values


def _amf_read(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    if depth > 16:
        raise TransportError("the server's answer is not RTMP")
    mark, at = data[at], at + 1
    if mark == 0:
        return struct.unpack_from(">d", data, at)[0], at + 8
    if mark == 1:
        return bool(data[at]), at + 1
    if mark in (2, 12):
        return _amf_read_text(data, at, ">H" if mark == 2 else ">I")
    if mark in (3, 8):
        at += 4 if mark == 8 else 0
        found: dict[str, Any] = {}
        while True:
            name, at = _amf_read_text(data, at, ">H")
            if not name and data[at] == 9:
                return found, at + 1
            found[name], at = _amf_read(data, at, depth + 1)
    if mark == 10:
        (count,) = struct.unpack_from(">I", data, at)
        at += 4
        items = []
        for _ in range(count):
            item, at = _amf_read(data, at, depth + 1)
            items.append(item)
        return items, at
    if mark == 11:
        return struct.unpack_from(">d", data, at)[0], at + 10
    if mark in (5, 6):
        return None, at
    raise TransportError("the server's answer is not RTMP")


def _amf_read_text(data: bytes, at: int, form: str) -> tuple[str, int]:
    (size,) = struct.unpack_from(form, data, at)
    at += struct.calcsize(form)
    if at + size > len(data):
        raise IndexError
    return data[at : at + size].decode(), at + size


# --- chunks ---------------------------------------------------------------------------------------


def chunked(
    channel: int, kind: int, timestamp: int, stream: int, body: bytes, size: int = CHUNK_SIZE
) -> bytes:
    """One message as chunks: a full header, then headers of kind 3.

    Timestamps are milliseconds modulo 2**32; from 0xFFFFFF on they go into the extended field,
    which each following chunk repeats.
    """
    timestamp &= 0xFFFFFFFF
    extended = struct.pack(">I", timestamp) if timestamp >= 0xFFFFFF else b""
    head = min(timestamp, 0xFFFFFF).to_bytes(3, "big") + len(body).to_bytes(3, "big")
    parts = [bytes((channel,)), head, bytes((kind,)), struct.pack("<I", stream), extended]
    follow = bytes((0xC0 | channel,)) + extended
    parts.append(body[:size])
    for start in range(size, len(body), size):
        parts += (follow, body[start : start + size])
    return b"".join(parts)


@dataclass(slots=True)
class _Channel:
    kind: int = 0
    length: int = 0
    extended: bool = False
    body: bytearray = field(default_factory=bytearray)


class ChunkReader:
    """Messages out of the bytes that a server sends: `feed(data)` gives (kind, body) pairs."""

    LIMIT = 1 << 20

    def __init__(self) -> None:
        self.chunk_size = 128
        self._data = bytearray()
        self._channels: dict[int, _Channel] = {}

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        self._data += data
        messages = []
        while (message := self._chunk()) is not None:
            if message[0]:
                messages.append(message)
        return messages

    def _chunk(self) -> tuple[int, bytes] | None:
        """Take one chunk; (0, b"") when its message isn't whole yet, None when data is short."""
        data = self._data
        if not data:
            return None
        form, number, at = data[0] >> 6, data[0] & 63, 1
        if number < 2:
            if len(data) < 2 + number:
                return None
            number = 64 + (data[1] if number == 0 else data[1] + 256 * data[2])
            at = 2 if number < 320 and data[0] & 63 == 0 else 3
        size = (11, 7, 3, 0)[form]
        if len(data) < at + size:
            return None
        channel = self._channels.get(number) or _Channel()
        kind, length, extended = channel.kind, channel.length, channel.extended
        if form < 3:
            extended = data[at : at + 3] == b"\xff\xff\xff"
        if form < 2:
            length, kind = int.from_bytes(data[at + 3 : at + 6], "big"), data[at + 6]
        at += size + (4 if extended else 0)
        if length > self.LIMIT:
            raise TransportError("the server's answer is not RTMP")
        take = min(self.chunk_size, length - len(channel.body))
        if len(data) < at + take:
            return None
        self._channels[number] = channel
        channel.kind, channel.length, channel.extended = kind, length, extended
        channel.body += data[at : at + take]
        del data[: at + take]
        if len(channel.body) < length:
            return 0, b""
        body, channel.body = bytes(channel.body), bytearray()
        if kind == 1 and len(body) >= 4:
            self.chunk_size = max(1, int.from_bytes(body[:4], "big") & 0x7FFFFFFF)
        return kind, body


# --- a connection ---------------------------------------------------------------------------------


class RtmpConnection:
    """One publishing session: `open`, `start`, then `send` each packet, `aclose`.

    Every method raises TransportError; `retryable` is False when the server said no, or when the
    address can't be right. `acknowledged` counts bytes that the other end's TCP has taken.
    """

    def __init__(self, url: StreamUrl, tls: ssl.SSLContext | None = None) -> None:
        self.url = url
        self.sent = 0
        self._tls = tls
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._chunks = ChunkReader()
        self._messages: list[tuple[int, bytes]] = []
        self._stream = 0
        self._received = 0
        self._told = 0
        self._window = 2_500_000
        self._listener: asyncio.Task[None] | None = None
        self._broken: TransportError | None = None

    async def open(self, timeout: float = 8.0) -> None:
        """Connect, shake hands, ask to publish; returns when the server has agreed."""
        step, tls = "connecting to", self.url.kind == "rtmps"
        try:
            async with _limit(timeout):
                await self._connect()
                step = "the handshake with"
                await self._handshake()
                step = "the request to publish at"
                await self._publish()
        except asyncio.TimeoutError:
            await self.aclose()
            hint = " (to TLS: is it an rtmp:// address?)" if step.startswith("conn") and tls else ""
            raise TransportError(
                f"{step} {self.url} took over {timeout:.0f} s: the server doesn't answer{hint}, "
                "or a firewall swallows the connection"
            ) from None
        except (OSError, asyncio.IncompleteReadError, EOFError) as error:
            await self.aclose()
            raise self._explain(step, error) from None
        except BaseException:
            await self.aclose()
            raise
        self._listener = asyncio.ensure_future(self._listen())

    async def start(self, header: StreamHeader) -> None:
        """Metadata and the decoders' headers: before the first packet, and after a change."""
        script = amf_encode("@setDataFrame", "onMetaData", header.metadata())
        await self._write(
            chunked(4, 18, 0, self._stream, script)
            + chunked(6, 9, 0, self._stream, b"\x17\0\0\0\0" + avc_configuration(header.avc))
            + chunked(4, 8, 0, self._stream, b"\xaf\0" + header.aac)
        )

    async def headers(self, header: StreamHeader, timestamp: int) -> None:
        """The decoders' headers again, in the middle of a stream: a new encoder took over."""
        await self._write(
            chunked(6, 9, timestamp, self._stream, b"\x17\0\0\0\0" + avc_configuration(header.avc))
            + chunked(4, 8, timestamp, self._stream, b"\xaf\0" + header.aac)
        )

    async def send(self, packet: Packet, timestamp: int) -> None:
        """One packet; returns when it is with the kernel, or near it."""
        if packet.kind == "video":
            await self._write(chunked(6, 9, timestamp, self._stream, video_tag(packet)))
        else:
            await self._write(chunked(4, 8, timestamp, self._stream, audio_tag(packet)))

    @property
    def acknowledged(self) -> int:
        """Bytes that have arrived, as far as this system can tell."""
        if self._writer is None:
            return 0
        sock = self._writer.get_extra_info("socket")
        if sock is not None and sys.platform == "linux":
            with contextlib.suppress(OSError, struct.error):
                # struct tcp_info of Linux >= 4.1: tcpi_bytes_acked is the u64 at 120
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
                return int(struct.unpack_from("=Q", info, 120)[0])
        return self.sent - self._writer.transport.get_write_buffer_size()

    @property
    def broken(self) -> TransportError | None:
        """What ended the session from the other side, if anything did."""
        return self._broken

    async def aclose(self, *, polite: bool = False) -> None:
        """Let go at once; `polite` says good-bye first. Idempotent."""
        writer, self._writer = self._writer, None
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
        if writer is None:
            return
        if polite and self._broken is None:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                writer.write(
                    self._command("FCUnpublish", 6, None, self.url.key)
                    + self._command("deleteStream", 7, None, float(self._stream))
                )
                await within(writer.drain(), 2)
                writer.close()
                await within(writer.wait_closed(), 2)
                return
        writer.transport.abort()

    # --- inside -----------------------------------------------------------------------------------

    async def _connect(self) -> None:
        tls = None
        if self.url.kind == "rtmps":
            tls = self._tls or await asyncio.to_thread(ssl.create_default_context)
        self._reader, self._writer = await asyncio.open_connection(
            self.url.host, self.url.port, ssl=tls, server_hostname=self.url.host if tls else None
        )
        self._writer.transport.set_write_buffer_limits(high=WRITE_BUFFER)
        sock = self._writer.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if sys.platform == "linux":  # TCP_NOTSENT_LOWAT: don't queue in the kernel (latency)
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, 25, WRITE_BUFFER)

    async def _handshake(self) -> None:
        assert self._reader is not None and self._writer is not None
        self._writer.write(b"\x03" + bytes(8) + os.urandom(1528))
        await self._writer.drain()
        answer = await self._reader.readexactly(1 + 1536)
        if answer[0] != 3:
            raise TransportError(
                f"{self.url} is not an RTMP server: check host and port", retryable=False
            )
        self._writer.write(answer[1:])
        await self._writer.drain()
        await self._reader.readexactly(1536)

    def _command(self, name: str, number: int, *values: Any, stream: int = 0) -> bytes:
        return chunked(3, 20, 0, stream, amf_encode(name, float(number), *values))

    async def _publish(self) -> None:
        assert self._writer is not None
        host = f"[{self.url.host}]" if ":" in self.url.host else self.url.host
        # After the chunk size nothing may be cut at the old one, so it goes first.
        self._writer.write(
            chunked(2, 1, 0, 0, struct.pack(">I", CHUNK_SIZE))
            + self._command(
                "connect",
                1,
                {
                    "app": self.url.app,
                    "type": "nonprivate",
                    "flashVer": "FMLE/3.0 (compatible; voipavatar)",
                    "tcUrl": f"{self.url.kind}://{host}:{self.url.port}/{self.url.app}",
                },
            )
        )
        await self._writer.drain()
        await self._result(1)
        self._writer.write(
            self._command("releaseStream", 2, None, self.url.key)
            + self._command("FCPublish", 3, None, self.url.key)
            + self._command("createStream", 4, None)
        )
        await self._writer.drain()
        answer = await self._result(4)
        self._stream = int(answer[3]) if len(answer) > 3 and answer[3] is not None else 1
        self._writer.write(
            self._command("publish", 5, None, self.url.key, "live", stream=self._stream)
        )
        await self._writer.drain()
        while True:
            try:
                command = await self._next_command()
            except (OSError, asyncio.IncompleteReadError, EOFError):
                raise TransportError(
                    f"{self.url} closed the connection instead of agreeing to publish: "
                    "the stream key is wrong, has run out, or is in use",
                    retryable=False,
                ) from None
            if command[0] == "onStatus":
                self._check(command)
                if "Publish.Start" in str(_info(command).get("code", "")):
                    return
            elif command[0] == "_error" and command[1] == 5:
                self._check(command)

    async def _result(self, number: int) -> list[Any]:
        while True:
            command = await self._next_command()
            if command[0] in ("_result", "_error") and command[1] == number:
                if command[0] == "_error":
                    self._check(command)
                return command
            if command[0] == "onStatus":
                self._check(command)

    def _check(self, command: list[Any]) -> None:
        """Raise what the server complains about."""
        info = _info(command)
        if command[0] == "_error" or str(info.get("level", "")) == "error":
            said = self.url.scrub(
                " ".join(str(info.get(part, "")) for part in ("code", "description")).strip()
            )
            raise TransportError(
                f"{self.url} refused to publish"
                + (f" ({said[:200]})" if said else "")
                + ": check the application name and the stream key",
                retryable=False,
            )

    async def _next_command(self) -> list[Any]:
        while True:
            while self._messages:
                kind, body = self._messages.pop(0)
                command = self._handle(kind, body)
                if command is not None:
                    return command
            await self._fill()

    async def _fill(self) -> None:
        assert self._reader is not None
        data = await self._reader.read(65_536)
        if not data:
            raise EOFError("closed")
        self._received += len(data)
        if self._received - self._told >= self._window // 2 and self._writer is not None:
            self._told = self._received
            self._writer.write(chunked(2, 3, 0, 0, struct.pack(">I", self._told & 0xFFFFFFFF)))
        self._messages += self._chunks.feed(data)

    def _handle(self, kind: int, body: bytes) -> list[Any] | None:
        """Answer control messages; give commands back."""
        assert self._writer is not None
        if kind == 4 and body[:2] == b"\0\x06":  # ping: the same time back
            self._writer.write(chunked(2, 4, 0, 0, b"\0\x07" + body[2:6]))
        elif kind == 5 and len(body) >= 4:
            self._window = max(1, int.from_bytes(body[:4], "big"))
        elif kind == 6 and len(body) >= 4:
            self._writer.write(chunked(2, 5, 0, 0, body[:4]))
        elif kind in (17, 20):
            command = amf_decode(body[1:] if kind == 17 else body)
            if len(command) >= 2 and isinstance(command[0], str):
                return command
        return None

    async def _listen(self) -> None:
        """Hear what the server says while we send; its good-bye is kept in `broken`."""
        try:
            while True:
                command = await self._next_command()
                if command[0] == "onStatus":
                    self._check(command)
        except TransportError as error:
            # A complaint in mid-stream (a moderator, a second publisher): worth another try.
            self._broken = TransportError(str(error))
        except (OSError, EOFError, asyncio.IncompleteReadError) as error:
            self._broken = self._explain("the connection to", error)
        if self._writer is not None:
            self._writer.transport.abort()  # wakes a writer that waits in drain

    async def _write(self, data: bytes) -> None:
        if self._broken is not None:
            raise self._broken
        if self._writer is None:
            raise TransportError(f"the connection to {self.url} is closed")
        try:
            self._writer.write(data)
            self.sent += len(data)
            await self._writer.drain()
        except OSError as error:
            raise self._broken or self._explain("the connection to", error) from None

    def _explain(self, step: str, error: BaseException) -> TransportError:
        where = f"{step} {self.url}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return TransportError(
                f"{where} failed: its certificate is not valid ({error.verify_message}); "
                "check the host name and this machine's clock",
                retryable=False,
            )
        greeting = self.url.kind == "rtmps" and step.startswith("connecting")
        hung_up = isinstance(error, ConnectionError) and not isinstance(
            error, ConnectionRefusedError
        )
        if isinstance(error, ssl.SSLError) or greeting and hung_up:
            return TransportError(f"{where} failed: no TLS there; is it an rtmp:// address?")
        if isinstance(error, socket.gaierror):
            return TransportError(
                f"{where} failed: the name {self.url.host} is not known; "
                "check its spelling and this machine's DNS"
            )
        if isinstance(error, ConnectionRefusedError):
            return TransportError(
                f"{where} failed: nothing listens on port {self.url.port} of {self.url.host}"
            )
        if isinstance(error, (ConnectionError, EOFError, asyncio.IncompleteReadError)):
            return TransportError(f"{where} ended: the other side closed it")
        number = error.errno if isinstance(error, OSError) else None
        return TransportError(f"{where} failed: {os.strerror(number) if number else 'no network'}")


def _info(command: list[Any]) -> dict[str, Any]:
    for value in command[2:]:
        if isinstance(value, dict) and ("code" in value or "level" in value):
            return value
    return {}


@contextlib.asynccontextmanager
async def _limit(seconds: float) -> Any:
    """asyncio.timeout of Python 3.11, for 3.10 too: TimeoutError when the body takes longer."""
    task = asyncio.current_task()
    assert task is not None
    late = False

    def expire() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if late:
            if sys.version_info >= (3, 11):
                task.uncancel()
            raise asyncio.TimeoutError from None
        raise
    finally:
        timer.cancel()
