"""A viewer that measures: joins a room as a participant would, and writes down what it sees.

Times are on this machine's monotonic clock. A picture's is WebRTC's own render time, which doesn't
depend on when Python runs. Sound carries no time: its samples are counted, and the count is fitted
to arrivals by a running median, so that a late wake-up of the loop is no error of the sound.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from livekit import api, rtc

from .engines.clapper import read_clapper
from .errors import TransportError
from .media import FRAME_RATE, Int16, UInt8
from .room import connect
from .waiting import within

KEPT = 120.0
"""Seconds of sound that a viewer keeps."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One picture as it was rendered."""

    time: float
    flash: bool
    clock: int
    luma: float
    """Mean of the picture's middle."""
    chroma: tuple[float, float]
    """Means of U and V there; both are 128 in grey, and 0 in the green of a picture that is not
    there."""


def planes(flat: UInt8, height: int, width: int) -> tuple[UInt8, UInt8, UInt8]:
    """Y, U and V of an I420 picture that lies in memory without gaps; odd sizes round up."""
    size, rows, columns = height * width, (height + 1) // 2, (width + 1) // 2
    u, v = flat[size : size + 2 * rows * columns].reshape(2, rows, columns)
    return flat[:size].reshape(height, width), u, v


def middle(plane: UInt8) -> float:
    """Mean of the middle half of a plane."""
    height, width = plane.shape
    return float(plane[height // 4 : height * 3 // 4 : 8, width // 4 : width * 3 // 4 : 8].mean())


class Viewer:
    """Joins as `identity`, subscribes to everything of `publisher`, and records.

    `on_picture(luma, time)` sees every picture's luma plane, (height, width).
    """

    def __init__(
        self,
        url: str,
        room: str,
        api_key: str,
        api_secret: str,
        *,
        identity: str = "viewer",
        publisher: str = "voipavatar",
        on_picture: Callable[[UInt8, float], None] | None = None,
    ) -> None:
        self.pictures: list[Seen] = []
        self.room = rtc.Room()
        self.joined = 0.0
        self._url = url
        self._publisher = publisher
        self._on_picture = on_picture
        self._token = (
            api.AccessToken(api_key, api_secret)
            .with_identity(identity)
            .with_grants(api.VideoGrants(room_join=True, room=room, can_publish=False))
            .with_ttl(datetime.timedelta(hours=3))
            .to_jwt()
        )
        self._sound: deque[Int16] = deque()
        self._sound_begin = 0  # sample number of the first kept
        self._sound_end = 0
        self._offsets: deque[tuple[int, float]] = deque()  # sample number, arrival - number / rate
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._tracks: dict[str, rtc.Track] = {}
        self._buffers: dict[str, tuple[float, int]] = {}

    async def __aenter__(self) -> Viewer:
        self.room.on("track_subscribed", self._subscribed)
        try:
            options = rtc.RoomOptions(auto_subscribe=True, connect_timeout=15.0)
            await connect(self.room, self._url, self._token, options)
        except (rtc.ConnectError, asyncio.TimeoutError) as error:
            raise TransportError(f"the viewer can't join {self._url}: {error}") from None
        self.joined = time.monotonic()
        return self

    async def __aexit__(self, *exc: object) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.room.disconnect()

    async def wait(self, timeout: float = 10.0) -> None:
        """Until picture and sound have arrived. TransportError when they don't."""
        end = time.monotonic() + timeout
        while not (self.pictures and self._sound_end):
            if time.monotonic() > end:
                raise TransportError(
                    f"no {'picture' if not self.pictures else 'sound'} came within {timeout:.0f} s"
                )
            await asyncio.sleep(0.01)

    def _subscribed(
        self,
        track: rtc.Track,
        publication: rtc.RemoteTrackPublication,
        participant: rtc.RemoteParticipant,
    ) -> None:
        if participant.identity != self._publisher:
            return
        self._tracks["sound" if track.kind == rtc.TrackKind.KIND_AUDIO else "picture"] = track
        read = self._listen if track.kind == rtc.TrackKind.KIND_AUDIO else self._watch
        name = f"viewer-{track.sid}"
        task = asyncio.get_running_loop().create_task(read(track), name=name)
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def _watch(self, track: rtc.Track) -> None:
        stream = rtc.VideoStream(track, format=rtc.VideoBufferType.I420, capacity=50)
        try:
            async for event in stream:
                frame = event.frame
                if frame.width < 64:
                    continue  # what comes when a track ends is no picture of ours
                flat = np.frombuffer(frame.data, np.uint8)
                luma, *chroma = planes(flat, frame.height, frame.width)
                when = event.timestamp_us / 1e6
                flash, clock = read_clapper(luma)
                u, v = (middle(plane) for plane in chroma)
                self.pictures.append(Seen(when, flash, clock, middle(luma), (u, v)))
                if self._on_picture is not None:
                    self._on_picture(luma, when)
        finally:
            await stream.aclose()

    async def _listen(self, track: rtc.Track) -> None:
        stream = rtc.AudioStream.from_track(
            track=track, sample_rate=FRAME_RATE, num_channels=1, capacity=500
        )
        try:
            async for event in stream:
                pcm = np.frombuffer(event.frame.data, np.int16).copy()
                now = time.monotonic()
                self._sound.append(pcm)
                self._sound_end += len(pcm)
                self._offsets.append((self._sound_end, now - self._sound_end / FRAME_RATE))
                while self._sound_end - self._sound_begin > KEPT * FRAME_RATE:
                    self._sound_begin += len(self._sound.popleft())
                while self._offsets[0][0] < self._sound_begin:
                    self._offsets.popleft()
        finally:
            await stream.aclose()

    # -- what was heard ----------------------------------------------------------------------------

    def heard(self) -> tuple[Int16, int]:
        """The kept sound, and the number of its first sample."""
        parts = list(self._sound)
        return (np.concatenate(parts) if parts else np.zeros(0, np.int16)), self._sound_begin

    def when(self, samples: list[int]) -> list[float]:
        """Monotonic time at which each sample (by number) was played."""
        numbers = np.array([number for number, _ in self._offsets])
        offsets = np.array([offset for _, offset in self._offsets])
        times = []
        for sample in samples:
            near = np.abs(numbers - sample) < 1.5 * FRAME_RATE
            chosen = offsets[near] if near.any() else offsets
            times.append(float(np.median(chosen)) + sample / FRAME_RATE)
        return times

    def loud_spans(self, threshold: float = 0.05, gap: float = 0.02) -> list[tuple[int, int]]:
        """Sample numbers [begin, end) of stretches louder than `threshold`, `gap` seconds apart."""
        pcm, begin = self.heard()
        loud = np.flatnonzero(np.abs(pcm.astype(np.int32)) > threshold * 32767)
        if not len(loud):
            return []
        cuts = np.flatnonzero(np.diff(loud) > gap * FRAME_RATE)
        starts = np.concatenate([[0], cuts + 1])
        ends = np.concatenate([cuts, [len(loud) - 1]])
        return [
            (int(loud[a]) + begin, int(loud[b]) + begin + 1)
            for a, b in zip(starts, ends, strict=True)
        ]

    def flashes(self) -> list[tuple[float, float]]:
        """Render times [begin, end) of the flashes that are over."""
        spans: list[tuple[float, float]] = []
        begin: float | None = None
        for seen in list(self.pictures):
            if seen.flash and begin is None:
                begin = seen.time
            elif not seen.flash and begin is not None:
                spans.append((begin, seen.time))
                begin = None
        return spans

    def offsets(self) -> list[tuple[float, float]]:
        """(time, picture minus sound in seconds) of every beep that has its flash.

        Positive: the picture is late. Pairs are those nearest to each other within 0.3 s.
        """
        beeps = self.when([begin for begin, _ in self.loud_spans()])
        flashes = np.array([begin for begin, _ in self.flashes()])
        pairs = []
        for beep in beeps:
            if len(flashes):
                nearest = float(flashes[np.argmin(np.abs(flashes - beep))])
                if abs(nearest - beep) < 0.3:
                    pairs.append((beep, nearest - beep))
        return pairs

    async def buffers(self) -> dict[str, float]:
        """Seconds by which this viewer's own jitter buffers delayed the "picture" and the "sound"
        since the last call; what WebRTC has nothing to tell of is not in it."""
        delays: dict[str, float] = {}
        for kind, track in self._tracks.items():
            for stat in await within(track.get_stats(), 5.0):
                if stat.WhichOneof("stats") != "inbound_rtp":
                    continue
                inbound = stat.inbound_rtp.inbound
                now = (inbound.jitter_buffer_delay, inbound.jitter_buffer_emitted_count)
                then = self._buffers.get(kind, (0.0, 0))
                self._buffers[kind] = now
                if now[1] > then[1]:
                    delays[kind] = (now[0] - then[0]) / (now[1] - then[1])
        return delays

    async def buffering(self) -> float | None:
        """Seconds by which the picture was delayed more than the sound by these since the last
        call; None where that isn't known. What is seen less this is what was sent."""
        delays = await self.buffers()
        return delays["picture"] - delays["sound"] if len(delays) == 2 else None

    def gaps(self) -> list[float]:
        """Seconds between successive pictures."""
        return [float(gap) for gap in np.diff([seen.time for seen in self.pictures])]
