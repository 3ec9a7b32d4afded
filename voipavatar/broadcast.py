"""On air: one encode, many targets, for days.

`AvSink` takes the stage's frames and never lets the broadcast stop: when frames stay out it shows
the last one, then the idle loop, then a still that says so, always with sound on the grid. One
`Programme` is encoded once, in a child process (`encoder`), and every `Target` (`targets`) sends
it on by itself. Nothing that happens there reaches the stage.

All of it runs on one thread with an event loop of its own, so that a busy main loop doesn't take a
broadcast off the air.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import cv2
import numpy as np
from prometheus_client import Counter

from .encoder import EncoderProcess, Programme, draw_text, planes
from .errors import ConfigError, StageError, TransportError
from .media import FRAME_RATE, Frame, Int16, UInt8, i420, slice_start
from .rtmp import Packet, StreamHeader, StreamUrl
from .targets import Backoff, Event, Rotation, State, Target
from .waiting import within

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENCODER_LIMIT = 4.0
"""Seconds that the encoder may owe an answer before it is killed and replaced."""

LAST_FRAME, IDLE_LOOP = 1.0, 10.0
"""Seconds without frames after which the idle loop, and then the still, takes over."""

HOLD = 1.0
"""Seconds for which sound waits for its pictures, at most."""

ENCODERS = Counter("voipavatar_encoder_restarts", "Broadcast encoders replaced.", ["why"])
SLATE = Counter("voipavatar_slate_frames", "Frames made up because none came.", ["what"])


# --- pure parts -----------------------------------------------------------------------------------


class Timeline:
    """Keeps the programme on real time, whatever the stage does.

    Each frame that comes is the next of the programme. When frames stay out for `slack` seconds,
    `fill` says how many must be made up; frames that come late after that, or a stage whose clock
    runs a little fast or slow, are settled in idle: `take` shows an idle frame twice when the
    programme is behind, and not at all when it is ahead. Speech is always shown once.
    """

    EVEN = 2
    """Frames of lead or lag that don't matter."""

    LEAD = 5.0
    """Seconds that speech may run ahead before it too is left out: nothing real does."""

    def __init__(self, fps: int, slack: float = 0.25) -> None:
        self.fps = fps
        self.next = 0
        """Number of the programme's next frame."""
        self._slack = round(slack * fps)
        self._origin: float | None = None

    def start(self, now: float) -> None:
        """The programme begins now."""
        if self._origin is None:
            self._origin = now

    def lead(self, now: float) -> int:
        """Frames by which the programme is ahead of the clock."""
        if self._origin is None:
            return 0
        return self.next - int((now - self._origin) * self.fps + 1e-6)

    def take(self, now: float, speaking: bool) -> range:
        """The programme's frames that a frame from the stage becomes: mostly one."""
        self.start(now)
        lead, count = self.lead(now), 1
        if lead > (self.LEAD * self.fps if speaking else self.EVEN):
            count = 0
        elif not speaking and lead < -self.EVEN:
            count = 2
        return self._give(count)

    def fill(self, now: float) -> range:
        """The programme's frames that have to be made up by now."""
        if self._origin is None:
            return range(0)
        return self._give(max(0, -self.lead(now) - self._slack))

    def _give(self, count: int) -> range:
        self.next += count
        return range(self.next - count, self.next)


class Slate:
    """What is shown when no frames come: the last one, then idle, then a still that says so."""

    STEP = 0.08
    """Seconds between the pictures of the idle loop that is kept."""
    KEPT, LEAST = 25, 6
    """Pictures that make a good loop, and those that are better than none."""

    def __init__(
        self, width: int, height: int, fps: int, *, text: str = "We will be right back"
    ) -> None:
        self._size = (width, height)
        self._fps, self._text = fps, text
        self._last: UInt8 | None = None
        self._idle: list[tuple[bytes, bytes, bytes]] = []
        self._still: UInt8 | None = None
        self._shown: tuple[int, UInt8] | None = None
        self._every = max(1, round(self.STEP * fps))
        self._seen = 0

    def see(self, frame: Frame) -> None:
        """A frame of the stage; the first idle seconds become the idle loop."""
        self._last, self._still = frame.image, None
        if frame.turn is not None:
            if len(self._idle) < self.KEPT:
                self._idle.clear()  # one unbroken stretch, or there would be a jump in it
                self._seen = 0
        elif len(self._idle) < self.KEPT:
            if self._seen % self._every == 0:
                self._idle.append(_squeezed(frame.image))
            self._seen += 1

    def picture(self, gap: float, number: int) -> tuple[str, UInt8]:
        """What to show `gap` seconds after the last frame, at programme frame `number`."""
        if self._last is not None and gap < LAST_FRAME:
            return "last", self._last
        if gap < IDLE_LOOP and len(self._idle) >= self.LEAST:
            return "idle", self._idle_picture(number)
        if self._last is not None and gap < IDLE_LOOP:
            return "last", self._last
        if self._still is None:
            self._still = self._make_still()
        return "still", self._still

    def _idle_picture(self, number: int) -> UInt8:
        there_and_back = 2 * len(self._idle) - 2
        place = number // self._every % there_and_back
        place = place if place < len(self._idle) else there_and_back - place
        if self._shown is None or self._shown[0] != place:
            self._shown = (place, _unsqueezed(self._idle[place]))
        return self._shown[1]

    def _make_still(self) -> UInt8:
        width, height = self._size
        still = i420(height, width, (18, 24, 38)) if self._last is None else self._last.copy()
        if self._last is not None:
            luma, blue, red = planes(still)
            luma[...] = cv2.GaussianBlur(luma, (0, 0), max(2.0, width / 80))
            luma[...] = (luma.astype(np.uint16) * 120 >> 8).astype(np.uint8)
            for chroma in (blue, red):
                chroma[...] = (chroma.astype(np.int16) // 2 + 64).astype(np.uint8)
        draw_text(still, self._text, bottom=0.55, size=0.045)
        return still


def _squeezed(image: UInt8) -> tuple[bytes, bytes, bytes]:
    y, u, v = (
        cv2.imencode(".jpg", np.ascontiguousarray(part), [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        for part in planes(image)
    )
    return y.tobytes(), u.tobytes(), v.tobytes()


def _unsqueezed(parts: tuple[bytes, bytes, bytes]) -> UInt8:
    y, u, v = (cv2.imdecode(np.frombuffer(part, np.uint8), cv2.IMREAD_GRAYSCALE) for part in parts)
    assert y is not None and u is not None and v is not None
    return np.concatenate([y, u.reshape(-1, y.shape[1]), v.reshape(-1, y.shape[1])])


# --- the broadcast --------------------------------------------------------------------------------


class Broadcast:
    """The programme and its targets, on one event loop: `start`, `frame`, `add`, `aclose`.

    `on_event` gets a dict per change of a target: `{"type": "output", "event": "live" |
    "reconnecting" | "stalled" | "failed" | "ended" | "rotated" | "progress", **Target.status(),
    "at": unix seconds}`, `progress` every `REPORT` seconds while live.
    """

    REPORT = 10.0

    def __init__(
        self,
        spec: Programme,
        on_event: Callable[[Event], None],
        *,
        tls: ssl.SSLContext | None = None,
        still_text: str = "We will be right back",
    ) -> None:
        self.spec = spec.check()
        self.tls = tls
        self.encoder_restarts = 0
        self.slate_frames = 0
        self.lost_pictures = 0
        """Pictures left out because the encoder fell behind."""
        self.targets: dict[str, Target] = {}
        self._on_event = on_event
        self._slate = Slate(spec.source_width, spec.source_height, spec.source_fps, text=still_text)
        self._timeline = Timeline(spec.source_fps)
        self.encoder: EncoderProcess | None = None
        """The one that works now; None while it is replaced."""
        self._header: StreamHeader | None = None
        self._recent: deque[Packet] = deque()
        self._held: deque[Packet] = deque()
        self._begun = asyncio.Event()
        self._ends = {"video": -1.0, "audio": -1.0}  # seconds up to which each track has gone out
        self._last_frame = float("-inf")
        self._caption: tuple[str, float] = ("", 0.0)
        self._tasks: list[asyncio.Task[None]] = []
        self._lives: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """On air: from now on there is a programme, whether frames come or not. ConfigError."""
        self._timeline.start(time.monotonic())
        self._last_frame = time.monotonic()
        await self._replace_encoder()
        self._tasks = [
            asyncio.create_task(_for_ever(self._tick), name="onair-tick"),
            asyncio.create_task(_for_ever(self._keep_encoder), name="onair-encoder"),
            asyncio.create_task(_for_ever(self._report), name="onair-report"),
        ]

    async def aclose(self) -> None:
        """Say good-bye to every target and end the encoder. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        encoder, self.encoder = self.encoder, None
        if encoder is not None:
            await encoder.aclose()  # its last packets go to the targets
            self._release(float("inf"))
            await asyncio.sleep(0.1)
        await asyncio.gather(*(self.remove(id) for id in list(self.targets)))

    # --- targets ----------------------------------------------------------------------------------

    def add(
        self,
        url: StreamUrl,
        *,
        id: str,
        persist: bool = False,
        rotation: Rotation | None = None,
    ) -> Target:
        """Broadcast to `url` too, from now on."""
        if id in self.targets:
            raise ConfigError(f"there is an output {id!r} already: choose another name")
        target = Target(id, url, self, persist=persist, rotation=rotation)
        self.targets[id] = target
        self._lives[id] = asyncio.create_task(target.run(), name=f"onair-{id}")
        self.tell(target, target.state.value)
        return target

    async def remove(self, id: str) -> None:
        """End one target, politely. Unknown ids are ignored."""
        target, life = self.targets.get(id), self._lives.get(id)
        if target is None or life is None:
            return
        target.stop()
        done, _ = await asyncio.wait({life}, timeout=15)
        if not done:
            life.cancel()
        (outcome,) = await asyncio.gather(life, return_exceptions=True)
        if isinstance(outcome, Exception):
            logger.error("an output ended badly", extra={"error": type(outcome).__name__})
        self.targets.pop(id, None)
        self._lives.pop(id, None)

    def status(self) -> list[Event]:
        return [target.status() for target in self.targets.values()]

    def tell(self, target: Target, event: str) -> None:
        """Pass a target's news on."""
        state = target.status()
        level = logging.ERROR if event == "failed" else logging.INFO
        if event != "progress":
            logger.log(
                level,
                "an output changed its state",
                extra={
                    "output": target.id,
                    "url": str(target.url),
                    "event": event,
                    "reason": target.reason,
                },
            )
        self._on_event({"type": "output", "event": event, **state, "at": time.time()})

    async def ready(self) -> StreamHeader:
        """The stream's header, once there is a first keyframe to begin with."""
        while True:
            await self._begun.wait()
            if self._header is not None and self._recent:
                return self._header
            self._begun.clear()

    def recent(self) -> list[Packet]:
        """Everything since the newest keyframe, that first; sound from that moment on."""
        packets = list(self._recent)
        return [packets[0]] + [one for one in packets[1:] if one.seconds >= packets[0].seconds]

    # --- frames in --------------------------------------------------------------------------------

    def frame(self, frame: Frame) -> None:
        """A frame of the stage, as soon as it is there."""
        now = time.monotonic()
        self._last_frame = now
        self._slate.see(frame)
        speaking = frame.turn is not None or bool(frame.audio.any())
        for number in self._timeline.take(now, speaking):
            self._push(number, frame.image, frame.audio)

    def caption(self, text: str, seconds: float = 4.0) -> None:
        """Words to burn into the picture from now on, for so long; empty takes them away."""
        self._caption = (text, time.monotonic() + seconds if text else 0.0)
        if self.encoder is not None:
            self.encoder.caption(text)

    def _push(self, number: int, image: UInt8, pcm: Int16) -> None:
        wanted = slice_start(number + 1, FRAME_RATE, self.spec.source_fps) - slice_start(
            number, FRAME_RATE, self.spec.source_fps
        )
        if len(pcm) != wanted:  # a frame shown twice on a grid that isn't even (24 fps)
            pcm = np.resize(pcm, wanted) if len(pcm) else np.zeros(wanted, np.int16)
        if self.encoder is not None and not self.encoder.push(number, image, pcm):
            self.lost_pictures += 1

    async def _tick(self) -> None:
        silence = np.zeros(FRAME_RATE // self.spec.source_fps + 1, np.int16)
        while True:
            await asyncio.sleep(0.5 / self.spec.source_fps)
            now = time.monotonic()
            for number in self._timeline.fill(now):
                what, image = self._slate.picture(now - self._last_frame, number)
                SLATE.labels(what).inc()
                self.slate_frames += 1
                self._push(number, image, silence[: FRAME_RATE // self.spec.source_fps])
            if self._caption[1] and now > self._caption[1]:
                self.caption("")

    # --- the encoder ------------------------------------------------------------------------------

    async def _replace_encoder(self) -> None:
        # The sound of the new one begins where the old one's ended: what is between is silence.
        heard = self._ends["audio"]
        first = self._timeline.next if heard < 0 else max(0, int(heard * self.spec.source_fps))
        first = max(first, self._timeline.next - 30 * self.spec.source_fps)
        encoder = EncoderProcess(self.spec, self._packet, first)
        header = await encoder.open()
        if self._caption[0]:
            encoder.caption(self._caption[0])
        if self._header is not None and header != self._header:
            for target in self.targets.values():
                target.push(header)
        self._header, self.encoder = header, encoder

    async def _keep_encoder(self) -> None:
        backoff = Backoff()
        failed_since: float | None = None
        while True:
            encoder = self.encoder
            if encoder is not None:
                try:
                    await within(encoder.ended.wait(), 0.25)
                    why = "crashed"
                except asyncio.TimeoutError:
                    owes = encoder.waiting > 0 and time.monotonic() - encoder.heard
                    if not owes or owes < ENCODER_LIMIT:
                        continue
                    why = "stuck"
                self.encoder = None
                await encoder.kill(why)
                self._release(float("inf"))
                logger.error("the encoder is replaced", extra={"why": why, "said": encoder.reason})
                self.encoder_restarts += 1
                ENCODERS.labels(why).inc()
                self._say("encoder", f"the encoder {why} and is replaced")
            try:
                await self._replace_encoder()
                backoff.reset()
                failed_since = None
            except (TransportError, ConfigError, OSError) as error:
                failed_since = failed_since or time.monotonic()
                logger.error("the encoder can't be started", extra={"reason": str(error)})
                await asyncio.sleep(backoff.next(time.monotonic() - failed_since))

    def _packet(self, packet: Packet) -> None:
        """A packet from the encoder. Sound waits for the pictures of its time: x264 looks ahead."""
        if packet.kind == "audio":
            self._held.append(packet)
            self._release(packet.seconds - HOLD)
        else:
            self._release(packet.seconds)
            self._pass_on(packet)

    def _release(self, until: float) -> None:
        while self._held and self._held[0].seconds <= until:
            self._pass_on(self._held.popleft())

    def _pass_on(self, packet: Packet) -> None:
        """To all targets, in rising order, from 0 on."""
        if packet.pts < 0 or packet.seconds <= self._ends[packet.kind]:
            return
        self._ends[packet.kind] = packet.seconds
        if packet.kind == "video" and packet.key:
            self._recent.clear()
        if self._recent or packet.key and packet.kind == "video":
            self._recent.append(packet)
            if len(self._recent) > 1 and packet.kind == "audio":
                self._begun.set()
        for target in self.targets.values():
            target.push(packet)

    def _say(self, event: str, reason: str) -> None:
        self._on_event({"type": "output", "event": event, "reason": reason, "at": time.time()})

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(self.REPORT)
            for target in list(self.targets.values()):
                if target.state is State.LIVE:
                    self.tell(target, "progress")


async def _for_ever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """What keeps a broadcast up must not end by a mistake of ours: it is told, and goes on."""
    while True:
        try:
            await work()
        except Exception:
            logger.exception("a part of the broadcast failed and is started again")
            await asyncio.sleep(1.0)


# --- the sink -------------------------------------------------------------------------------------


class AvSink:
    """The broadcast as a sink of a stage: `put` returns at once, everything else is on a thread.

        sink = AvSink(programme(1280, 720, 25, preset="youtube"), on_event=print)
        await sink.open()
        await sink.add("rtmps://...")

    `on_event` is called on the loop that called `open`.
    """

    BACKLOG = 50
    """Frames that may wait for the thread; it takes them in microseconds, so this is never seen."""

    def __init__(
        self,
        spec: Programme,
        *,
        on_event: Callable[[Event], None] | None = None,
        tls: ssl.SSLContext | None = None,
        still_text: str = "We will be right back",
    ) -> None:
        self.spec = spec.check()
        self._listener = on_event
        self._options: dict[str, Any] = {"tls": tls, "still_text": still_text}
        self._frames: deque[Frame] = deque(maxlen=self.BACKLOG)
        self._woken = False
        self._home: asyncio.AbstractEventLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._broadcast: Broadcast | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._ids = itertools.count(1)

    @property
    def latency(self) -> float:
        """0: what a broadcast's viewers hear, and when, isn't known here."""
        return 0.0

    def put(self, frame: Frame) -> None:
        if frame.image.shape != (self.spec.source_height * 3 // 2, self.spec.source_width):
            raise StageError(
                f"a picture of shape {frame.image.shape} doesn't fit a broadcast of "
                f"{self.spec.source_width}x{self.spec.source_height}"
            )
        self._frames.append(frame)
        if not self._woken and self._loop is not None and not self._closed:
            self._woken = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._drain)

    def clear(self) -> float:
        """0: what has been put is on the air."""
        return 0.0

    def caption(self, text: str, seconds: float = 4.0) -> None:
        """Burn words into the picture (when the programme has captions)."""
        loop, broadcast = self._loop, self._broadcast
        if loop is not None and broadcast is not None and not self._closed:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(broadcast.caption, text, seconds)

    async def open(self) -> None:
        """Go on air (to nobody yet). Raises what makes encoding impossible. Idempotent."""
        if self._thread is not None:
            return
        self._home = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._home.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(opened,), name="voipavatar-onair", daemon=True
        )
        self._thread.start()
        await opened

    async def add(
        self,
        url: StreamUrl | str,
        *,
        id: str | None = None,
        persist: bool = False,
        rotation: Rotation | None = None,
    ) -> str:
        """Broadcast to `url` from now on; the output's id. ConfigError for a bad address."""
        address = StreamUrl.parse(url) if isinstance(url, str) else url
        name = id or f"out-{next(self._ids)}"

        async def run(broadcast: Broadcast) -> None:
            broadcast.add(address, id=name, persist=persist, rotation=rotation)

        await self._call(run)
        return name

    async def remove(self, id: str) -> None:
        """End one output, politely; unknown ids are ignored."""
        await self._call(lambda broadcast: broadcast.remove(id))

    async def status(self) -> list[Event]:
        """`Target.status()` of every output."""

        async def run(broadcast: Broadcast) -> list[Event]:
            return broadcast.status()

        return await self._call(run)

    async def aclose(self) -> None:
        """End every output and the thread. Idempotent, also before `open`."""
        thread, loop = self._thread, self._loop
        if self._closed or thread is None or loop is None:
            self._closed = True
            return
        try:
            await self._call(lambda broadcast: broadcast.aclose())
        finally:
            self._closed = True
            loop.call_soon_threadsafe(loop.stop)
            await asyncio.to_thread(thread.join, 20)

    async def _call(self, what: Callable[[Broadcast], Coroutine[Any, Any, T]]) -> T:
        if self._loop is None or self._broadcast is None or self._closed:
            raise StageError("the broadcast is not open: await open() first")
        return await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(what(self._broadcast), self._loop)
        )

    # --- the thread -------------------------------------------------------------------------------

    def _run(self, opened: asyncio.Future[None]) -> None:
        home = self._home
        assert home is not None
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        failure: BaseException | None = None
        try:
            self._broadcast = loop.run_until_complete(self._begin())
            self._loop = loop
        except Exception as error:
            failure = error

        def settle() -> None:
            if not opened.done():
                opened.set_result(None) if failure is None else opened.set_exception(failure)

        home.call_soon_threadsafe(settle)
        try:
            if failure is None:
                loop.run_forever()
                loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    async def _begin(self) -> Broadcast:
        broadcast = Broadcast(self.spec, self._event, **self._options)
        await broadcast.start()
        return broadcast

    def _drain(self) -> None:
        self._woken = False
        assert self._broadcast is not None
        while self._frames:
            self._broadcast.frame(self._frames.popleft())

    def _event(self, event: Event) -> None:
        if self._listener is not None and self._home is not None:
            with contextlib.suppress(RuntimeError):
                self._home.call_soon_threadsafe(self._listener, event)
