"""A five-second test push: what is wrong with a stream address, in words.

`voipavatar doctor --rtmp URL` goes the way that a broadcast goes and stops at the first step that
fails: name, port, TLS, key, and whether the uplink carries the bits.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from dataclasses import dataclass

import numpy as np

from .encoder import Encoder, programme
from .errors import TransportError
from .media import FRAME_RATE, i420
from .rtmp import Packet, RtmpConnection, StreamUrl
from .waiting import within

STEP_LIMIT = 6.0
"""Seconds for each step before the push."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One step: what was tried, whether it worked, and what that means."""

    step: str
    ok: bool
    text: str


async def probe(
    url: StreamUrl,
    *,
    seconds: float = 5.0,
    bitrate: int = 2_500_000,
    tls: ssl.SSLContext | None = None,
) -> list[Finding]:
    """Go the way of a broadcast to `url`; the last finding is the one that failed, if any did.

    The push shows grey noise for `seconds` at `bitrate` bits a second, to whoever watches.
    """
    found: list[Finding] = []
    if url.kind not in ("rtmp", "rtmps"):
        return [Finding("address", False, f"{url.kind} can't be tried: give an rtmp(s):// address")]
    found.append(await _name(url))
    if found[-1].ok:
        found.append(await _port(url))
    if not found[-1].ok:
        return found
    line = RtmpConnection(url, tls)
    try:
        began = time.monotonic()
        await line.open(STEP_LIMIT)
    except TransportError as error:
        greeting = url.kind == "rtmps" and str(error).startswith("connecting")
        step = "tls" if greeting else "publish"
        found.append(Finding(step, False, str(error)))
        return found
    found.append(Finding("publish", True, f"agreed after {time.monotonic() - began:.2f} s"))
    try:
        found.append(await _push(line, url, seconds, bitrate))
    finally:
        await line.aclose(polite=True)
    return found


async def _name(url: StreamUrl) -> Finding:
    loop = asyncio.get_running_loop()
    try:
        answer = await within(loop.getaddrinfo(url.host, url.port), STEP_LIMIT)
    except OSError:
        text = f"the name {url.host} is not known: check its spelling and this machine's DNS"
        return Finding("name", False, text)
    except asyncio.TimeoutError:
        return Finding("name", False, "no DNS server answers: check this machine's network")
    return Finding("name", True, f"{url.host} has {len({one[4][0] for one in answer})} address(es)")


async def _port(url: StreamUrl) -> Finding:
    began = time.monotonic()
    try:
        _, writer = await within(asyncio.open_connection(url.host, url.port), STEP_LIMIT)
    except asyncio.TimeoutError:
        text = f"port {url.port} doesn't answer: a firewall, here or there, swallows it"
        if url.kind == "rtmp":
            text += "; rtmps:// (port 443) often passes where 1935 doesn't"
        return Finding("port", False, text)
    except ConnectionRefusedError:
        return Finding("port", False, f"nothing listens on port {url.port} of {url.host}")
    except OSError as error:
        return Finding("port", False, f"no way to {url.host}: {error.strerror or 'no network'}")
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return Finding("port", True, f"port {url.port} answers in {time.monotonic() - began:.3f} s")


async def _push(line: RtmpConnection, url: StreamUrl, seconds: float, bitrate: int) -> Finding:
    spec = programme(640, 360, 25, preset="low-latency", speed="ultrafast", video_bitrate=bitrate)
    encoder = Encoder(spec)
    noise = np.random.default_rng(0).integers(60, 190, (8, 360, 640), np.uint8)
    silence = np.zeros(FRAME_RATE // 25, np.int16)
    image = i420(360, 640, (120, 120, 120))
    begun = line.acknowledged
    last = 0.0
    origin = time.monotonic()
    try:
        await line.start(encoder.header)
        for index in range(round(seconds * 25)):
            image[:360] = noise[index % 8]
            packets: list[Packet] = await asyncio.to_thread(encoder.push, index, image, silence)
            await asyncio.sleep(max(0.0, origin + index / 25 - time.monotonic()))
            for packet in packets:
                if packet.pts >= 0:
                    await within(line.send(packet, packet.milliseconds), 4 * STEP_LIMIT)
            last = time.monotonic() - origin - index / 25
            if last > seconds:
                break
        await asyncio.sleep(0.3)
        if line.broken is not None:
            raise line.broken
    except asyncio.TimeoutError:
        return Finding("push", False, "the line took nothing for many seconds: it is dead")
    except TransportError as error:
        if line.acknowledged - begun < 100_000:
            text = f"{url} agreed and hung up: the stream key is wrong, has run out, or is in use"
            return Finding("push", False, text)
        return Finding("push", False, str(error))
    taken = time.monotonic() - origin
    rate = (line.acknowledged - begun) * 8 / taken
    if last > 0.5:
        return Finding(
            "push",
            False,
            f"the uplink carries {rate / 1e6:.1f} Mbit/s where {bitrate / 1e6:.1f} and sound are "
            f"sent: after {taken:.0f} s it is {last:.1f} s behind; choose a lower bitrate",
        )
    return Finding("push", True, f"{rate / 1e6:.1f} Mbit/s for {taken:.0f} s, nothing held up")
