"""Where a broadcast goes: one `Target` per address, each with a life of its own.

A target connects, is live, stalls, comes back, or gives up; what happens to one never reaches the
others. `PacketQueue` says what is left out when its line is slow, `Backoff` when it tries again,
`RtmpLink` and `MuxLink` are the lines themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import io
import itertools
import logging
import queue
import random
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
from prometheus_client import Counter, Gauge

from .errors import StageError, TransportError
from .rtmp import (
    Packet,
    RtmpConnection,
    StreamHeader,
    StreamUrl,
    audio_tag,
    avc_configuration,
    video_tag,
)
from .waiting import within

logger = logging.getLogger(__name__)

Event = dict[str, Any]

QUEUE_LIMIT = 2.0
"""Seconds that may wait for a slow line before pictures are left out."""

SOUND_LIMIT = 60.0
"""Seconds of sound that may wait before the line is given up."""

STALL_SEEN, STALL_LIMIT = 3.0, 10.0
"""Seconds without an acknowledged byte: said so; connection given up."""

PROGRESS = 4096
"""Acknowledged bytes that count as progress."""

REFUSED_LIMIT = 120.0
"""Seconds for which a target that has been live may be refused (a server keeps a dead session for a
while and says that the name is taken)."""

SHORT_LIFE, SHORT_LIVES = 3.0, 6
"""A new target that is taken and dropped within so many seconds, so many times, has a bad key."""

STEADY = 1.0
"""Seconds live after which the next break is a new one, met with the shortest wait."""

PROOF = 0.3
"""Seconds that a connection must last before it counts as live."""

MOVED = 16_384
"""Acknowledged bytes from which a connection has carried more than greetings."""

LIVE = Gauge("voipavatar_outputs_live", "Broadcast targets that are live now.", ["kind"])
SENT = Counter("voipavatar_output_bytes", "Bytes sent to broadcast targets.", ["kind"])
DROPPED = Counter("voipavatar_output_dropped_frames", "Pictures left out for slow lines.", ["kind"])
RECONNECTS = Counter("voipavatar_output_reconnects", "Connections made again.", ["kind"])


# --- pure parts -----------------------------------------------------------------------------------


class Backoff:
    """Waits between attempts: 0.5 s doubling to 3 s while an outage is young, later up to 30 s.

    Most outages are short, and viewers should come back within seconds of the line; an ingest
    that has been away for minutes is not helped by being asked every three seconds.
    """

    FIRST, QUICK, SLOW, PATIENCE = 0.5, 3.0, 30.0, 180.0

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self._chance = chance
        self._attempt = 0

    def reset(self) -> None:
        self._attempt = 0

    def next(self, outage: float) -> float:
        """Seconds to wait, after `outage` seconds without a connection; spread by ±20 %."""
        top = self.QUICK if outage < self.PATIENCE else self.SLOW
        wait = min(top, self.FIRST * 2.0 ** min(self._attempt, 16))
        self._attempt += 1
        return wait * (0.8 + 0.4 * self._chance())


class PacketQueue:
    """Packets that wait for one line. Pictures go first when it is slow, sound never.

    When more than `limit` seconds wait, the pictures before the newest queued keyframe are left
    out; if there is none, all of them and those to come up to the next keyframe: whole tails of
    GOPs, so that a decoder never sees a picture without the ones it builds on.
    """

    def __init__(self, limit: float = QUEUE_LIMIT) -> None:
        self.dropped = 0
        """Pictures left out so far."""
        self._limit = limit
        self._items: deque[Packet | StreamHeader] = deque()
        self._need_key = True
        self._newest = 0.0

    def __len__(self) -> int:
        return len(self._items)

    @property
    def seconds(self) -> float:
        """How much waits."""
        oldest = next((one.seconds for one in self._items if isinstance(one, Packet)), None)
        return 0.0 if oldest is None else max(0.0, self._newest - oldest)

    def push(self, item: Packet | StreamHeader) -> None:
        if isinstance(item, Packet):
            if item.kind == "video":
                if self._need_key and not item.key:
                    self.dropped += 1
                    return
                self._need_key = False
            self._newest = max(self._newest, item.seconds)
        self._items.append(item)
        if self.seconds > self._limit:
            self._thin()

    def pop(self) -> Packet | StreamHeader:
        return self._items.popleft()

    def _thin(self) -> None:
        keep_from = None
        for place in range(len(self._items) - 1, -1, -1):
            one = self._items[place]
            if isinstance(one, Packet) and one.kind == "video" and one.key:
                keep_from = place
                break
        behind = None
        if keep_from is not None:
            key = self._items[keep_from]
            assert isinstance(key, Packet)
            behind = self._newest - key.seconds
        if behind is None or behind > self._limit:
            keep_from = len(self._items)  # even the newest keyframe is too old
            self._need_key = True
        kept: deque[Packet | StreamHeader] = deque()
        assert keep_from is not None
        for place, one in enumerate(self._items):
            if place < keep_from and isinstance(one, Packet) and one.kind == "video":
                self.dropped += 1
            else:
                kept.append(one)
        self._items = kept


# --- links ----------------------------------------------------------------------------------------


class Link(Protocol):
    """One connection, or one file: `open`, `begin`, `send` rising packets, `aclose`."""

    async def open(self, header: StreamHeader, first: Sequence[Packet]) -> None: ...

    def begin(self, base: int) -> None:
        """Programme milliseconds that are this session's 0."""

    async def send(self, item: Packet | StreamHeader) -> None: ...

    @property
    def acknowledged(self) -> int: ...

    async def aclose(self, *, polite: bool = False) -> None: ...


class RtmpLink:
    """An RTMP session whose time starts at 0 with a keyframe."""

    def __init__(self, url: StreamUrl, tls: ssl.SSLContext | None = None) -> None:
        self._connection = RtmpConnection(url, tls)
        self._base = 0
        self._now = 0

    async def open(self, header: StreamHeader, first: Sequence[Packet]) -> None:
        await self._connection.open()
        await self._connection.start(header)

    def begin(self, base: int) -> None:
        """Programme milliseconds that are this session's 0."""
        self._base = base

    async def send(self, item: Packet | StreamHeader) -> None:
        if isinstance(item, StreamHeader):
            await self._connection.headers(item, self._now)
            return
        self._now = max(self._now, item.milliseconds - self._base)
        await self._connection.send(item, max(0, item.milliseconds - self._base))

    @property
    def acknowledged(self) -> int:
        return self._connection.acknowledged

    async def aclose(self, *, polite: bool = False) -> None:
        await self._connection.aclose(polite=polite)


class MuxLink:
    """A recording, or whatever the installed muxer speaks (SRT): a thread that may block.

    A thread that hangs in a write is left behind and noticed by its silence; `acknowledged` grows
    only with what was really written.
    """

    FORMATS = {".flv": "flv", ".mkv": "matroska", ".mp4": "mp4", ".ts": "mpegts"}

    def __init__(self, url: StreamUrl) -> None:
        self.path: Path | None = None
        self._url = url
        self._queue: queue.Queue[Packet | None] = queue.Queue(maxsize=256)
        self._done = 0
        self._error: TransportError | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self._base = 0

    def begin(self, base: int) -> None:
        self._base = base

    async def open(self, header: StreamHeader, first: Sequence[Packet]) -> None:
        if self._url.path is not None:
            self.path = await asyncio.to_thread(_free_name, self._url.path)
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def tell(error: TransportError | None) -> None:
            def settle() -> None:
                if not opened.done():
                    if error is None:
                        opened.set_result(None)
                    else:
                        opened.set_exception(error)

            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle)

        self._thread = threading.Thread(
            target=self._run, args=(header, list(first), tell), name="voipavatar-mux", daemon=True
        )
        self._thread.start()
        try:
            await within(opened, 15)
        except asyncio.TimeoutError:
            raise TransportError(f"{self._url} could not be opened within 15 s") from None

    async def send(self, item: Packet | StreamHeader) -> None:
        if isinstance(item, StreamHeader):
            raise TransportError(f"{self._url} starts again: the encoder's headers changed")
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                await asyncio.sleep(0.02)
            else:
                return

    @property
    def acknowledged(self) -> int:
        return self._done

    async def aclose(self, *, polite: bool = False) -> None:
        self._closing = True
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        for _ in range(500 if polite else 50):
            if not self._thread.is_alive():
                return
            await asyncio.sleep(0.02)
        logger.warning("a recording's thread hangs and is left behind")

    def _run(
        self,
        header: StreamHeader,
        first: Sequence[Packet],
        tell: Callable[[TransportError | None], None],
    ) -> None:
        try:
            form = "mpegts" if self._url.path is None else self.FORMATS[self._url.path.suffix]
            options = {}
            if form == "mp4":  # playable up to the last fragment, whatever happens
                options["movflags"] = "+frag_keyframe+empty_moov+default_base_moof"
            target = str(self.path) if self.path is not None else self._url.reveal()
            with (
                av.open(io.BytesIO(flv_bytes(header, first)), format="flv") as template,
                av.open(target, "w", format=form, container_options=options) as out,
            ):
                video = out.add_stream_from_template(template.streams.video[0])
                audio = out.add_stream_from_template(template.streams.audio[0])
                out.start_encoding()
                tell(None)
                while (item := self._queue.get()) is not None:
                    self._write(out, video if item.kind == "video" else audio, item)
                    if self._closing and self._queue.empty():
                        break
        except Exception as error:
            # The text may hold the address, so only its kind is said.
            logger.debug("a muxer ended", extra={"kind": type(error).__name__})
            self._error = self._explain(error)
            tell(self._error)

    def _write(self, out: Any, stream: Any, item: Packet) -> None:
        data = video_tag(item)[5:] if item.kind == "video" else item.data
        packet: Any = av.Packet(data)
        packet.stream = stream
        packet.time_base = Fraction(1, item.scale)
        shift = Fraction(self._base, 1000) * item.scale
        packet.pts = packet.dts = round(item.pts - shift)
        packet.is_keyframe = item.key
        packet.duration = 1 if item.kind == "video" else 1024
        out.mux(packet)
        self._done += len(item.data) + 1

    def _explain(self, error: Exception) -> TransportError:
        if isinstance(error, av.error.ProtocolNotFoundError):
            return TransportError(
                f"{self._url} can't be reached: this build of PyAV carries no SRT; "
                "use rtmp(s)://, or install PyAV built against an FFmpeg with libsrt",
                retryable=False,
            )
        if isinstance(error, OSError) and error.strerror:
            return TransportError(f"{self._url} can't be written: {error.strerror}")
        return TransportError(f"{self._url} can't be written: {type(error).__name__}")


def flv_bytes(header: StreamHeader, packets: Sequence[Packet]) -> bytes:
    """A small FLV file ("Video File Format Specification" 10.1, E.2 and E.3)."""
    out = [b"FLV\x01\x05\0\0\0\x09\0\0\0\0"]

    def tag(kind: int, when: int, body: bytes) -> None:
        head = bytes((kind,)) + len(body).to_bytes(3, "big")
        time = (when & 0xFFFFFF).to_bytes(3, "big") + bytes((when >> 24 & 0xFF,))
        out.append(head + time + b"\0\0\0" + body + struct.pack(">I", 11 + len(body)))

    tag(9, 0, b"\x17\0\0\0\0" + avc_configuration(header.avc))
    tag(8, 0, b"\xaf\0" + header.aac)
    base = packets[0].milliseconds if packets else 0
    for one in packets:
        when = max(0, one.milliseconds - base)
        tag(9, when, video_tag(one)) if one.kind == "video" else tag(8, when, audio_tag(one))
    return b"".join(out)


def _free_name(path: Path) -> Path:
    """`path`, or `name-2`, `name-3`: a recording never overwrites another."""
    if not path.parent.is_dir():
        raise TransportError(f"{path.parent} is not a folder: make it first", retryable=False)
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    for name in itertools.chain((path,), names):
        if not name.exists():
            return name
    raise AssertionError("unreachable")


# --- targets --------------------------------------------------------------------------------------


class State(enum.Enum):
    CONNECTING = "connecting"
    LIVE = "live"
    STALLED = "stalled"
    RECONNECTING = "reconnecting"
    FAILED = "failed"
    ENDED = "ended"


MOVES = {
    State.CONNECTING: {State.LIVE, State.RECONNECTING, State.FAILED, State.ENDED},
    State.LIVE: {State.STALLED, State.RECONNECTING, State.FAILED, State.ENDED},
    State.STALLED: {State.LIVE, State.RECONNECTING, State.FAILED, State.ENDED},
    State.RECONNECTING: {State.LIVE, State.FAILED, State.ENDED},
    State.FAILED: {State.ENDED},
    State.ENDED: set(),
}


@dataclass(frozen=True, slots=True)
class Rotation:
    """A new broadcast before the platform ends the old one (YouTube keeps archives up to 12 h).

    After `after` seconds live, the next of `urls` (round and round) is opened, both are fed for
    `overlap` seconds, then the old one is closed. With a single address there is no overlap: no
    server takes the same key twice.
    """

    after: float = 11.5 * 3600
    overlap: float = 10.0
    urls: tuple[StreamUrl, ...] = ()


class _Line:
    """A link with its queue and the task that feeds it."""

    def __init__(self, link: Link, target: Target) -> None:
        self.link = link
        self.queue = PacketQueue()
        self.bytes = 0
        self.task: asyncio.Task[None] | None = None
        self.since = time.monotonic()
        self._target = target
        self._wake = asyncio.Event()
        self._busy_since: float | None = None

    def push(self, item: Packet | StreamHeader) -> None:
        before = self.queue.dropped
        self.queue.push(item)
        if self.queue.dropped > before:
            DROPPED.labels(self._target.url.kind).inc(self.queue.dropped - before)
            self._target.dropped += self.queue.dropped - before
        self._wake.set()

    async def run(self) -> None:
        """Send and watch until something ends it: raises TransportError."""
        sender = asyncio.ensure_future(self._send())
        watcher = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            for task in (sender, watcher):
                if task.done():
                    task.result()
        finally:
            for task in (sender, watcher):
                task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)

    async def _send(self) -> None:
        while True:
            while not self.queue:
                self._busy_since = None
                self._wake.clear()
                await self._wake.wait()
            if self._busy_since is None:
                self._busy_since = time.monotonic()
            item = self.queue.pop()
            await self.link.send(item)
            if isinstance(item, Packet):
                self.bytes += len(item.data)
                self._target.count(item)

    async def _watch(self) -> None:
        seen, when = self.link.acknowledged, time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            now, done = time.monotonic(), self.link.acknowledged
            idle = self._busy_since is None and not self.queue
            if idle or done - seen >= PROGRESS:
                seen, when = done, now
                self._target.flowing(True, self)
            elif now - when > STALL_LIMIT or self.queue.seconds > SOUND_LIMIT:
                raise TransportError(
                    f"{self._target.url} has acknowledged nothing for {now - when:.0f} s: "
                    "the line is dead"
                )
            elif now - when > STALL_SEEN:
                self._target.flowing(False, self)

    async def close(self, *, polite: bool) -> None:
        """End the line; `polite` gives what is queued a second to get out."""
        if self.task is not None:
            until = time.monotonic() + 1.0
            while polite and self.queue and not self.task.done() and time.monotonic() < until:
                await asyncio.sleep(0.02)
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        await self.link.aclose(polite=polite)


class Feed(Protocol):
    """What a target needs of the broadcast that it belongs to."""

    tls: ssl.SSLContext | None

    async def ready(self) -> StreamHeader:
        """The header, once there is a keyframe to begin with."""

    def recent(self) -> list[Packet]:
        """Everything since the newest keyframe, that first. Not before `ready`."""

    def tell(self, target: Target, event: str) -> None:
        """Pass a target's news on."""


class Target:
    """One place that the broadcast goes to, with its own life: connect, live, come back, give up.

    With `persist` the first failure isn't final when it is the network's; a refusal always is.
    """

    WINDOW = 5.0

    def __init__(
        self,
        id: str,
        url: StreamUrl,
        feed: Feed,
        *,
        persist: bool = False,
        rotation: Rotation | None = None,
    ) -> None:
        self.id, self.url = id, url
        self.state = State.CONNECTING
        self.reason = ""
        self.dropped = 0
        self.reconnects = 0
        self.latency = 0.0
        """Seconds between a frame's arrival here and its last byte's departure."""
        self.carried = 0
        """Bytes of pictures and sound that have left."""
        self._feed, self._persist, self._rotation = feed, persist, rotation
        self._backoff = Backoff()
        self._lines: list[_Line] = []
        self._sent: deque[tuple[float, int, bool]] = deque()
        self._live_since: float | None = None
        self._ever_live = False
        self._ever_moved = False
        self._short_lives = 0
        self._address = url
        self._next_url = 0
        self._retiring: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    # --- what others see --------------------------------------------------------------------------

    def status(self) -> Event:
        """State and numbers, ready for JSON, without secrets."""
        now = time.monotonic()
        self._forget(now)
        up = now - self._live_since if self._live_since is not None else 0.0
        span = max(1.0, min(self.WINDOW, up))
        return {
            "id": self.id,
            "via": "direct",
            "protocol": self.url.kind,
            "url": str(self.url),
            "state": self.state.value,
            "reason": self.reason,
            "uptime": round(up, 1),
            "bitrate": round(sum(size for _, size, _ in self._sent) * 8 / span),
            "fps": round(sum(picture for _, _, picture in self._sent) / span, 1),
            "dropped": self.dropped,
            "reconnects": self.reconnects,
            "latency": round(self.latency, 3),
        }

    def count(self, packet: Packet) -> None:
        """A packet has left."""
        now = time.monotonic()
        self.carried += len(packet.data)
        self._sent.append((now, len(packet.data), packet.kind == "video"))
        self._forget(now)
        if packet.sent:
            self.latency = now - packet.sent
        SENT.labels(self.url.kind).inc(len(packet.data))

    def flowing(self, well: bool, line: _Line) -> None:
        """The watchdog's word on a line."""
        if not self._lines or line is not self._lines[-1]:
            return
        if well and self.state is State.STALLED:
            self._become(State.LIVE, "")
        elif not well and self.state is State.LIVE:
            self._become(State.STALLED, f"{self.url} takes nothing at the moment")

    def push(self, item: Packet | StreamHeader) -> None:
        for line in self._lines:
            line.push(item)

    def stop(self) -> None:
        self._stop.set()

    # --- its life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until `stop`, or until it has failed for good."""
        try:
            await self._run()
        except TransportError as error:
            self._become(State.FAILED, str(error))
        except Exception as error:  # a mistake of ours ends this target and no other
            logger.exception("an output failed")
            self._become(State.FAILED, f"an internal error ({type(error).__name__}); see the log")
        finally:
            if self._retiring is not None:
                self._retiring.cancel()
                await asyncio.gather(self._retiring, return_exceptions=True)
            while self._lines:
                await self._lines.pop().close(polite=self._stop.is_set())
        if self._stop.is_set():
            self._become(State.ENDED, self.reason)

    async def _run(self) -> None:
        outage = time.monotonic()
        while not self._stop.is_set():
            line, began = None, time.monotonic()
            try:
                line = await self._connect()
                began = time.monotonic()
                await self._prove(line)
                self._become(State.LIVE, "")
                await self._hold(line)
                self._rotate(line)
                continue
            except TransportError as error:
                moved = line is not None and line.link.acknowledged > MOVED
                if line is not None:
                    self._lines.remove(line)
                    await line.close(polite=False)
                if moved:
                    outage = time.monotonic()
                taken = time.monotonic() - began if line is not None else None
                wait = self._judge(error, moved, taken, time.monotonic() - outage)
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self._stop.wait(), wait)

    def _judge(
        self, error: TransportError, moved: bool, lived: float | None, outage: float
    ) -> float:
        """Seconds after which to try again; raises what will not heal.

        `lived`: seconds that the connection lasted after the server had agreed, None when it
        never did; `outage`: seconds since something was last carried.
        """
        first = not self._ever_moved
        self._ever_moved = self._ever_moved or moved
        if moved and lived is not None and lived >= STEADY:
            self._backoff.reset()
        if moved and lived is not None and lived >= SHORT_LIFE:
            self._ever_live, self._short_lives = True, 0
        elif lived is not None and not self._ever_live:
            self._short_lives += 1
        if not error.retryable and (not self._ever_live or outage > REFUSED_LIMIT):
            raise error
        if first and not moved and lived is not None and not self._persist:
            raise TransportError(
                f"{self.url} agreed to take the stream and hung up before it had any: "
                "the stream key is wrong, has run out, or is in use",
                retryable=False,
            )
        if first and not moved and not self._persist and error.retryable:
            raise TransportError(f"{error} (at the first attempt, so it is not tried again)")
        if self._short_lives >= SHORT_LIVES:
            raise TransportError(
                f"{self.url} takes the connection and drops it within seconds, "
                f"{self._short_lives} times: check the stream key",
                retryable=False,
            )
        self._become(State.RECONNECTING, str(error))
        return self._backoff.next(outage)

    async def _connect(self) -> _Line:
        """A line that is open and being fed, beginning with the newest keyframe."""
        url = self._address
        link: Link
        if url.kind in ("rtmp", "rtmps"):
            link = RtmpLink(url, self._feed.tls)
        else:
            link = MuxLink(url)
        opening = asyncio.ensure_future(self._open(link))
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                raise TransportError(f"{url} was taken away while connecting")
            opening.result()
        except BaseException:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
            await link.aclose()
            raise
        finally:
            stopping.cancel()
        if self._ever_moved and self.state is State.RECONNECTING:
            self.reconnects += 1
            RECONNECTS.labels(self.url.kind).inc()
        line = _Line(link, self)
        recent = self._feed.recent()
        link.begin(recent[0].milliseconds)
        for packet in recent:
            line.push(packet)
        self._lines.append(line)
        line.task = asyncio.ensure_future(line.run())
        return line

    async def _open(self, link: Link) -> None:
        header = await self._feed.ready()
        await link.open(header, self._feed.recent())

    async def _prove(self, line: _Line) -> None:
        """Until the other end has taken pictures: many servers agree first and refuse then."""
        assert line.task is not None
        since = time.monotonic()
        while line.link.acknowledged < MOVED or time.monotonic() - since < PROOF:
            if self._stop.is_set():
                return
            await asyncio.wait({line.task}, timeout=0.05)
            if line.task.done():
                line.task.result()

    async def _hold(self, line: _Line) -> None:
        """Until the line breaks (raises TransportError), `stop`, or the time to rotate."""
        assert line.task is not None
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            done, _ = await asyncio.wait(
                {line.task, stopping},
                timeout=self._rotation.after if self._rotation is not None else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if line.task in done:
                line.task.result()
        finally:
            stopping.cancel()

    def _rotate(self, line: _Line) -> None:
        """`line` has been live long enough: it ends after the overlap, another takes over."""
        if self._stop.is_set():
            return
        assert self._rotation is not None
        overlap = self._rotation.overlap
        if self._rotation.urls:
            self._address = self._rotation.urls[self._next_url % len(self._rotation.urls)]
            self._next_url += 1
        else:
            overlap = 0.0
        self._feed.tell(self, "rotated")
        self._retiring = asyncio.ensure_future(self._retire(line, overlap))

    async def _retire(self, line: _Line, overlap: float) -> None:
        await asyncio.sleep(overlap)
        if line in self._lines:
            self._lines.remove(line)
        await line.close(polite=True)

    def _become(self, state: State, reason: str) -> None:
        if state is self.state:
            self.reason = reason
            return
        if state is not self.state and state not in MOVES[self.state]:
            if self.state in (State.FAILED, State.ENDED):
                return
            raise StageError(f"a target can't go from {self.state.value} to {state.value}")
        was_live = self.state in (State.LIVE, State.STALLED)
        is_live = state in (State.LIVE, State.STALLED)
        if is_live and not was_live:
            self._live_since = time.monotonic()
            LIVE.labels(self.url.kind).inc()
        elif was_live and not is_live:
            LIVE.labels(self.url.kind).dec()
        self.state, self.reason = state, reason
        self._feed.tell(self, state.value)
        if not is_live:
            self._live_since = None

    def _forget(self, now: float) -> None:
        while self._sent and now - self._sent[0][0] > self.WINDOW:
            self._sent.popleft()
