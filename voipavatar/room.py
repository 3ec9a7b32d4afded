"""A LiveKit room as a sink: the avatar's picture and sound as two tracks of one participant.

Sync is made here and nowhere else. A frame's sound goes into the native queue, which plays it at
its own even pace; the picture is handed over at the instant when that queue reaches the frame's
first sample. The queue is kept short (`CUSHION`), never runs while nobody feeds it, and carries
silence while the avatar is silent, so that a viewer's jitter buffer has no reason to grow.
"""

from __future__ import annotations

import asyncio
import atexit
import datetime
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from livekit import api, rtc
from livekit.rtc.participant import PublishTrackError

from . import metrics
from .config import Video
from .errors import ConfigError, TransportError
from .media import FRAME_RATE, Frame, Int16, UInt8
from .waiting import undisturbed, within

logger = logging.getLogger(__name__)

CUSHION = 0.03
"""Seconds of sound kept in the native queue: what a late tick may cost without being heard."""
LONGEST = 0.5
"""Seconds of sound that may wait before the oldest is dropped."""
CODEC, BITRATE = "vp8", 2_500_000
"""What a picture is coded with, and in how many bits a second at most, unless told otherwise."""
FIRST_RETRY, LAST_RETRY = 0.25, 5.0

FINAL = {
    rtc.DisconnectReason.DUPLICATE_IDENTITY: "another participant took its identity",
    rtc.DisconnectReason.PARTICIPANT_REMOVED: "it was removed from the room",
    rtc.DisconnectReason.ROOM_DELETED: "the room was deleted",
    rtc.DisconnectReason.USER_REJECTED: "it was refused",
}
"""Reasons for which coming back would be wrong."""


class Guest(Protocol):
    """Something that comes along into the room: it listens there while the sink publishes.

    Called on the sink's loop, again for every new connection; must return at once.
    """

    @property
    def subscribes(self) -> bool:
        """Whether it has to hear somebody's tracks; the token allows that only then."""

    def entering(self, room: rtc.Room) -> None:
        """About to connect: the time to register what answers streams."""

    def entered(self, room: rtc.Room) -> None:
        """Connected, nothing published yet: the time to register RPC methods."""

    def left(self) -> None:
        """The connection is gone."""


@dataclass(frozen=True)
class RoomOptions:
    """Which room, as whom, and how the picture is coded."""

    url: str
    room: str
    api_key: str = field(default="", repr=False)
    api_secret: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    """A ready token; made from key and secret when empty."""
    identity: str = "voipavatar"
    name: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    video: Video = Video()
    """How the picture is coded; what isn't given here is the persona's."""
    timeout: float = 10.0
    """Seconds to join in."""
    ttl: float = 600.0
    """Seconds that a token made here is good for: to join with. Joining again makes a new one, and
    who is in the room gets newer ones from the server."""
    guests: tuple[Guest, ...] = field(default=(), repr=False, compare=False)

    def make_token(self) -> str:
        """A token for this room alone: publish, and nothing to hear or see."""
        if self.token:
            return self.token
        if not (self.api_key and self.api_secret):
            raise ConfigError(
                "joining a room takes a token, or LIVEKIT_API_KEY and LIVEKIT_API_SECRET"
            )
        grants = api.VideoGrants(
            room_join=True,
            room=self.room,
            can_subscribe=any(guest.subscribes for guest in self.guests),
            can_publish=True,
            can_publish_data=True,
            can_publish_sources=["camera", "microphone"],
        )
        return (
            api.AccessToken(self.api_key, self.api_secret)
            .with_kind("agent")
            .with_identity(self.identity)
            .with_name(self.name or self.identity)
            .with_grants(grants)
            .with_attributes(dict(self.attributes))
            .with_ttl(datetime.timedelta(seconds=self.ttl))
            .to_jwt()
        )


class RoomSink:
    """Publishes frames to a room, and comes back when the server does.

    `on_state` hears "connected", "reconnecting", "disconnected" (and tries again) and "ended"
    (and doesn't; `ended` holds why).
    """

    def __init__(
        self,
        options: RoomOptions,
        width: int,
        height: int,
        fps: int,
        on_state: Callable[[str], None] | None = None,
    ) -> None:
        self.options = options
        self.ended: str | None = None
        self.underruns = 0
        """Times the sound ran dry since the last frame came too late."""
        self.dropped = 0
        """Pictures that were not shown, since a newer one was there."""
        self.room: rtc.Room | None = None
        self._size = (width, height)
        self._fps = fps
        self._on_state = on_state
        self._audio: rtc.AudioSource | None = None
        self._video: rtc.VideoSource | None = None
        self._queue: deque[Frame] = deque()
        self._filled = asyncio.Event()
        self._empty_at = 0.0  # when the native queue will have played everything
        self._shows: deque[asyncio.TimerHandle] = deque()
        self._tasks: list[asyncio.Task[None]] = []
        self._lost = asyncio.Event()
        self._reason = rtc.DisconnectReason.UNKNOWN_REASON
        self._closing = False
        self._latest: UInt8 | None = None

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Join and publish. TransportError says what to check; only this first try is loud."""
        if self._tasks or self._closing:
            raise TransportError("the room sink was started already", retryable=False)
        try:
            await self._join()
        except BaseException:
            self._closing = True
            await self._leave()
            raise
        self._tasks = [
            asyncio.create_task(self._pump(), name="room-pump"),
            asyncio.create_task(self._keep(), name="room-keep"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._ceased)

    def _ceased(self, task: asyncio.Task[None]) -> None:
        """Nothing is shown any more, and that must not look like a face that listens."""
        if task.cancelled() or task.exception() is None:
            return
        logger.error("the way to the room has failed", exc_info=task.exception())
        self.ended = f"an error of its own: {type(task.exception()).__name__}"
        self._lost.set()
        self._tell("ended")

    async def aclose(self) -> None:
        """Leave the room. Idempotent, also before `start`."""
        self._closing = True
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._leave()

    @property
    def connected(self) -> bool:
        return self._audio is not None and not self._lost.is_set()

    # -- the sink ----------------------------------------------------------------------------------

    @property
    def latency(self) -> float:
        """Seconds until the frame that was put last begins to be played, at the source."""
        if not self.connected:
            return 0.0
        native = max(0.0, self._empty_at - time.monotonic())
        return native + max(0, len(self._queue) - 1) / self._fps

    def put(self, frame: Frame) -> None:
        self._latest = frame.image
        if not self.connected:
            return
        self._queue.append(frame)
        while len(self._queue) > LONGEST * self._fps:
            self._queue.popleft()
            self.dropped += 1
        self._filled.set()

    def clear(self) -> float:
        waiting = sum(len(frame.audio) for frame in self._queue) / FRAME_RATE
        native = max(0.0, self._empty_at - time.monotonic())
        self._queue.clear()
        while self._shows:
            self._shows.popleft().cancel()
        if self._audio is not None:
            self._audio.clear_queue()
        self._empty_at = 0.0
        return waiting + native

    # -- sound and picture together ----------------------------------------------------------------

    async def _pump(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            self._filled.clear()
            while self._queue and self._audio is not None:
                frame = self._queue.popleft()
                pcm, wait = self._steer(frame)
                while self._shows and self._shows[0].when() <= loop.time():
                    self._shows.popleft()
                due = loop.time() + wait
                self._shows.append(loop.call_at(due, self._show_at, due, frame.image))
                await self._play(pcm)

    def _steer(self, frame: Frame) -> tuple[Int16, float]:
        """What goes into the native queue for a frame, and seconds until its sound is played.

        Silence is added where the queue has run dry, and taken away, in idle frames only, where
        it has grown; the picture's time follows the queue, so sync never pays for either.
        """
        now = time.monotonic()
        pcm = frame.audio
        begins = self._empty_at
        if begins - now <= 0.002:
            # After a cut the pictures that waited are gone: the first of the closing mouth comes in
            # their place at once, or the old one would stand for up to 0.11 s. It has no sound.
            cut = begins == 0 and frame.turn is None
            if begins > 0:
                self.underruns += 1
            begins = now if cut else now + CUSHION
            pcm = np.concatenate([np.zeros(int(CUSHION * FRAME_RATE), np.int16), pcm])
        elif frame.turn is None and begins - now > 2 * CUSHION:
            spare = min(begins - now - CUSHION, 0.01)
            pcm = pcm[int(spare * FRAME_RATE) :]
        self._empty_at = max(now, self._empty_at) + len(pcm) / FRAME_RATE
        return pcm, begins - now

    async def _play(self, pcm: Int16) -> None:
        if self._audio is None:
            return
        frame = rtc.AudioFrame(pcm.tobytes(), FRAME_RATE, 1, len(pcm))
        try:
            await self._audio.capture_frame(frame)
        except Exception as error:  # rtc raises bare exceptions; a lost room says so elsewhere
            if not self._lost.is_set():
                logger.warning("sound was not taken", extra={"error": str(error)})

    def _show_at(self, due: float, image: UInt8) -> None:
        metrics.OFFSET.observe(asyncio.get_running_loop().time() - due)
        self._show(image)

    def _show(self, image: UInt8) -> None:
        source = self._video
        if source is None:
            return
        flat = image.reshape(-1)
        if not flat.flags.writeable:  # rtc takes the address of writeable memory only
            flat = flat.copy()
        width, height = self._size
        source.capture_frame(rtc.VideoFrame(width, height, rtc.VideoBufferType.I420, flat.data))

    # -- the connection ----------------------------------------------------------------------------

    async def _join(self) -> None:
        options = self.options
        room = rtc.Room()
        self._lost.clear()

        def lost(reason: rtc.DisconnectReason.ValueType) -> None:
            self._reason = reason
            self._lost.set()

        room.on("disconnected", lost)
        room.on("reconnecting", lambda: self._tell("reconnecting"))
        room.on("reconnected", lambda: self._tell("connected"))
        self.room = room
        for guest in options.guests:
            guest.entering(room)
        try:
            await connect(
                room,
                options.url,
                options.make_token(),
                rtc.RoomOptions(auto_subscribe=False, connect_timeout=options.timeout),
            )
            for guest in options.guests:
                guest.entered(room)
            # Left in the middle of publishing, the native library ends the process one time in ten.
            await undisturbed(self._publish(room), options.timeout)
        except (rtc.ConnectError, PublishTrackError, asyncio.TimeoutError) as error:
            raise TransportError(
                f"can't join the LiveKit room at {options.url}: {_reason(error)}. "
                "Is the server running, and are LIVEKIT_URL, LIVEKIT_API_KEY and "
                "LIVEKIT_API_SECRET the server's?"
            ) from None
        self._tell("connected")

    async def _publish(self, room: rtc.Room) -> None:
        width, height = self._size
        self._audio = rtc.AudioSource(FRAME_RATE, 1, queue_size_ms=200)
        self._video = rtc.VideoSource(width, height)
        self._empty_at = 0.0
        if self._latest is not None:
            self._show(self._latest)
        audio = rtc.LocalAudioTrack.create_audio_track("avatar_audio", self._audio)
        video = rtc.LocalVideoTrack.create_video_track("avatar_video", self._video)
        sound = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE, dtx=False)
        coded = self.options.video
        picture = rtc.TrackPublishOptions(
            source=rtc.TrackSource.SOURCE_CAMERA,
            simulcast=bool(coded.simulcast),
            video_codec=getattr(rtc.VideoCodec, (coded.codec or CODEC).upper()),
            video_encoding=rtc.VideoEncoding(
                max_bitrate=coded.bitrate or BITRATE, max_framerate=self._fps
            ),
        )
        # One after the other: side by side, one time in five the picture's codec is not kept to and
        # VP8 is sent. Sound first: whoever sees the avatar can hear it.
        await room.local_participant.publish_track(audio, sound)
        await room.local_participant.publish_track(video, picture)

    async def _keep(self) -> None:
        """Come back whenever the connection is lost for good, until closed or told not to."""
        while True:
            await self._lost.wait()
            await self._leave()
            final = FINAL.get(self._reason)
            if final is not None:
                self.ended = final
                logger.info("left the room for good", extra={"reason": int(self._reason)})
                self._tell("ended")
                return
            self._tell("disconnected")
            pause = FIRST_RETRY
            while True:
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(LAST_RETRY, pause * 2)
                try:
                    await self._join()
                    break
                except TransportError as error:
                    await self._leave()
                    self._lost.set()
                    logger.info("room is still away", extra={"error": type(error).__name__})

    async def _leave(self) -> None:
        room, self.room = self.room, None
        while self._shows:
            self._shows.popleft().cancel()
        self._queue.clear()
        audio, self._audio = self._audio, None
        video, self._video = self._video, None
        if room is not None:
            for guest in self.options.guests:
                guest.left()
            await leave(room)
        if audio is not None:
            await audio.aclose()
        if video is not None:
            await video.aclose()

    def _tell(self, state: str) -> None:
        if self._on_state is not None and not self._closing:
            self._on_state(state)


async def connect(room: rtc.Room, url: str, token: str, options: rtc.RoomOptions) -> None:
    """`room.connect` that can be cancelled.

    The native library ends the process when a connect is given up between its answer and the
    client's "ready" for it, so the connect is let go on to its own end and then undone.
    """
    _connected.set()
    try:
        # It has a limit of its own, which comes first.
        await undisturbed(
            room.connect(url, token, options), (options.connect_timeout or 10.0) + 5.0
        )
    except asyncio.CancelledError:
        if room.isconnected():
            await leave(room)
        raise


async def leave(room: rtc.Room) -> None:
    """Disconnect, within some seconds: the native library doesn't always answer."""
    try:
        await within(room.disconnect(), 5.0)
    except asyncio.TimeoutError:
        logger.warning("the room was not left in time")
        listening = getattr(room, "_task", None)  # would wait for the answer for ever
        if listening is not None:
            listening.cancel()


_connected = threading.Event()


@atexit.register
def _let_through() -> None:
    """Runs after rtc has put its native side down, which registers later.

    A native thread that is just calling Python must get through before the interpreter is gone, or
    it aborts the process. It was seen once in a dozen ends.
    """
    if _connected.is_set():
        time.sleep(0.1)


def _reason(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, asyncio.TimeoutError) else str(error)
