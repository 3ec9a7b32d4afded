"""Frames into a file: H.264 and AAC in an MP4 that plays anywhere.

Encoding happens on a thread of its own behind a bounded queue. Offline, nothing may be lost: the
producer awaits `room()` before each `put`. Live, nothing may wait: when the encoder falls behind,
pictures are left out first and sound never is.

Time comes from `Frame.index` and from counted samples, so sound and picture can't drift apart.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from .errors import ConfigError, StageError, TransportError, VoipAvatarError
from .media import FRAME_RATE, Frame, Int16, UInt8, check_fps, slice_start
from .waiting import within

logger = logging.getLogger(__name__)

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
"""File endings that can be written, and the container each stands for."""

SOUND_LIMIT = 60.0
"""Seconds of sound that may wait for a live file before it is given up as stuck."""


CLOSE_LIMIT = 300.0
"""Seconds in which the rest of a file must be written (the index moves to the front)."""


class SampleLine:
    """The sound of a track, in the order and at the place where frames put it.

    `write(position, pcm)` takes the samples that start at `position`; a gap before them is filled
    with silence, an overlap is left out, so that sample n of the track is always sample n of the
    programme. `blocks(size)` gives what is there in blocks of `size`; `rest()` gives the remainder.
    """

    def __init__(self) -> None:
        self._parts: deque[Int16] = deque()
        self._waiting = 0
        self.written = 0
        """Samples taken so far: where the next one belongs."""

    def write(self, position: int, pcm: Int16) -> None:
        if position > self.written:
            self._append(np.zeros(position - self.written, np.int16))
        elif position < self.written:
            pcm = pcm[self.written - position :]
        self._append(pcm)

    def blocks(self, size: int) -> Iterator[Int16]:
        while self._waiting >= size:
            yield self._take(size)

    def rest(self) -> Int16:
        return self._take(self._waiting)

    def _append(self, pcm: Int16) -> None:
        if len(pcm):
            self._parts.append(pcm)
            self._waiting += len(pcm)
            self.written += len(pcm)

    def _take(self, count: int) -> Int16:
        taken: list[Int16] = []
        self._waiting -= count
        while count > 0:
            part = self._parts.popleft()
            if len(part) > count:
                self._parts.appendleft(part[count:])
                part = part[:count]
            taken.append(part)
            count -= len(part)
        return np.concatenate(taken) if taken else np.zeros(0, np.int16)


def stereo_frame(pcm: Int16, position: int) -> av.AudioFrame:
    """Mono int16 at `FRAME_RATE` as the stereo float frame that AAC takes, pts in samples."""
    planes = np.empty((2, len(pcm)), np.float32)
    np.multiply(pcm, np.float32(1 / 32768), out=planes[0])
    planes[1] = planes[0]
    frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="stereo")
    frame.sample_rate = FRAME_RATE
    frame.time_base = Fraction(1, FRAME_RATE)
    frame.pts = position
    return frame


def picture_frame(image: UInt8, index: int, fps: int) -> av.VideoFrame:
    """An I420 picture as the frame that H.264 takes, pts in frames."""
    frame = av.VideoFrame.from_ndarray(image, format="yuv420p")
    frame.time_base = Fraction(1, fps)
    frame.pts = index
    return frame


def mark_colours(codec: av.VideoCodecContext) -> None:
    """Say in the stream what `Frame.image` holds: BT.601, limited range."""
    codec.colorspace = Colorspace.SMPTE170M
    codec.color_range = ColorRange.MPEG
    codec.color_primaries = ColorPrimaries.SMPTE170M
    codec.color_trc = ColorTrc.SMPTE170M


class FileSink:
    """Frames to a file: H.264 (yuv420p, High) and AAC stereo 48 kHz, index at the front.

    The file appears under its name when it is complete (`aclose`), until then it is `NAME.part`.
    When no frame ever came, or something failed, no file is left.

    With `lossless=True` (offline) the producer writes `await sink.room()` before each `put` and
    nothing is dropped. Without (live) `put` never waits: over `queue` frames behind, pictures are
    left out (`dropped` counts them) and the sound stays whole.

    `on_progress(frames)` is called, on the loop, while frames are written; for a progress bar.

    Errors: a path that can't be written is a ConfigError at once. What fails later (disk full, an
    encoder that gives up) is a TransportError, raised by `room()` and by the first `aclose()`, and
    readable as `error`; a live `put` after it does nothing, so that a stage outlives its file.
    """

    def __init__(
        self,
        path: Path | str,
        width: int,
        height: int,
        fps: int,
        *,
        lossless: bool = False,
        crf: int = 20,
        preset: str = "veryfast",
        audio_bitrate: int = 160_000,
        queue: int = 50,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.width, self.height, self.fps = width, height, check_fps(fps)
        self.frames = 0
        """Pictures written so far."""
        self.dropped = 0
        """Pictures left out because encoding fell behind (live only)."""
        self.error: VoipAvatarError | None = None
        if width % 2 or height % 2 or min(width, height) < 16:
            raise ConfigError(f"a picture of {width}x{height} can't be encoded: use even sizes")
        if self.path.suffix.lower() not in FORMATS:
            raise ConfigError(f"{self.path.name}: use one of the endings {', '.join(FORMATS)}")
        if self.path.is_dir() or not os.access(self.path.parent, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{self.path} can't be written: name a file in a folder you may write"
            )
        self._part = self.path.with_name(self.path.name + ".part")
        self._lossless, self._limit = lossless, queue
        self._crf, self._preset, self._audio_bitrate = crf, preset, audio_bitrate
        self._on_progress = on_progress
        self._queue: deque[tuple[int, UInt8 | None, Int16]] = deque()
        self._pictures = 0  # queued entries that still hold their picture
        self._changed = threading.Condition()
        self._first: int | None = None
        self._last = -1
        self._closing = False
        self._closed = False
        self._reported = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._room = asyncio.Event()
        self._done = asyncio.Event()

    @property
    def latency(self) -> float:
        """0: what is put is in the file."""
        return 0.0

    def put(self, frame: Frame) -> None:
        """Take a frame; its picture and sound must not be changed afterwards."""
        if frame.image.shape != (self.height * 3 // 2, self.width):
            raise StageError(
                f"a picture of shape {frame.image.shape} doesn't fit a file of "
                f"{self.width}x{self.height}: open the sink with the size of the stage"
            )
        if self._closing or self.error is not None:
            return
        if self._thread is None:
            self._begin(frame.index)
        if frame.index <= self._last:
            raise StageError(f"frame {frame.index} came after frame {self._last}")
        assert self._first is not None
        self._last = frame.index
        with self._changed:
            if self._lossless and len(self._queue) >= 2 * self._limit:
                raise StageError("the file's queue is full: await room() before each put")
            index = frame.index - self._first
            if not self._lossless and self._pictures >= self._limit:
                self.dropped += 1
                if len(self._queue) > SOUND_LIMIT * self.fps:
                    self.error = self._stuck(SOUND_LIMIT)
                    self._queue.clear()
                    return
                self._queue.append((index, None, frame.audio))
            else:
                self._queue.append((index, frame.image, frame.audio))
                self._pictures += 1
            self._changed.notify()

    def clear(self) -> float:
        """0: what was put belongs to the file."""
        return 0.0

    async def room(self) -> None:
        """Wait until `put` has room for a frame. Raises what made writing impossible."""
        while self.error is None and not self._closing:
            with self._changed:
                if len(self._queue) < self._limit:
                    return
                self._room.clear()
            await self._room.wait()
        if self.error is not None:
            self._reported = True
            raise self.error

    drain = room

    async def aclose(self) -> None:
        """Finish the file and give it its name. Idempotent; without a frame, nothing is left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None and not self._closed:
            try:
                await within(self._done.wait(), CLOSE_LIMIT)
            except asyncio.TimeoutError:
                self.error = self._stuck(CLOSE_LIMIT)
        self._closed = True
        self._room.set()
        if self.error is not None and not self._reported:
            self._reported = True
            raise self.error

    # --- the thread -------------------------------------------------------------------------------

    def _begin(self, first: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._first = first
        self._thread = threading.Thread(target=self._run, name="voipavatar-file", daemon=True)
        self._thread.start()

    def _next(self) -> tuple[int, UInt8 | None, Int16] | None:
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if not self._queue:
                return None
            entry = self._queue.popleft()
            if entry[1] is not None:
                self._pictures -= 1
            if len(self._queue) < self._limit:
                self._tell(self._room.set)
            return entry

    def _tell(self, call: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.debug("a file's loop ended before the file")

    def _run(self) -> None:
        try:
            self._write()
            if self.error is None:
                os.replace(self._part, self.path)
        except Exception as error:
            logger.debug("writing a file ended", exc_info=True)
            self.error = self._explain(error)
        finally:
            with self._changed:
                self._queue.clear()
            if self.error is not None:
                logger.error("a file could not be written", extra={"reason": str(self.error)})
                self._part.unlink(missing_ok=True)
            self._tell(self._room.set)
            self._tell(self._done.set)

    def _write(self) -> None:
        options = {"movflags": "+faststart"} if self.path.suffix.lower() != ".mkv" else {}
        form = FORMATS[self.path.suffix.lower()]
        with av.open(str(self._part), "w", format=form, container_options=options) as container:
            video = container.add_stream(
                "libx264",
                rate=self.fps,
                options={"crf": str(self._crf), "preset": self._preset, "profile": "high"},
            )
            video.width, video.height, video.pix_fmt = self.width, self.height, "yuv420p"
            video.codec_context.time_base = Fraction(1, self.fps)
            video.codec_context.gop_size = 2 * self.fps
            mark_colours(video.codec_context)
            audio = container.add_stream("aac", rate=FRAME_RATE, layout="stereo")
            audio.bit_rate = self._audio_bitrate
            audio.codec_context.open()
            block = audio.codec_context.frame_size or 1024
            line, sent = SampleLine(), 0
            while (entry := self._next()) is not None:
                index, image, pcm = entry
                if image is not None:
                    container.mux(video.encode(picture_frame(image, index, self.fps)))
                    self.frames += 1
                    if self._on_progress is not None:
                        self._tell(_Progress(self._on_progress, self.frames))
                line.write(slice_start(index, FRAME_RATE, self.fps), pcm)
                for samples in line.blocks(block):
                    container.mux(audio.encode(stereo_frame(samples, sent)))
                    sent += len(samples)
            last = line.rest()
            if len(last):
                container.mux(audio.encode(stereo_frame(last, sent)))
            container.mux(audio.encode(None))
            container.mux(video.encode(None))

    def _stuck(self, seconds: float) -> TransportError:
        return TransportError(
            f"{self.path.name} is stuck: nothing could be written for {seconds:.0f} s; "
            "is the disk answering?"
        )

    def _explain(self, error: Exception) -> TransportError:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            return TransportError(
                f"{self.path} can't be finished: the disk is full; make room or name another disk"
            )
        if number == errno.EFBIG:
            return TransportError(
                f"{self.path} can't be finished: the file would be larger than this system allows"
            )
        reason = os.strerror(number) if isinstance(number, int) and 0 < number < 200 else str(error)
        return TransportError(
            f"{self.path} can't be finished: {reason}; check the disk and try again"
        )


class _Progress:
    """A progress call on its way to the loop."""

    def __init__(self, call: Callable[[int], None], frames: int) -> None:
        self._call, self._frames = call, frames

    def __call__(self) -> None:
        self._call(self._frames)
