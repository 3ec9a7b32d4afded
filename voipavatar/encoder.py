"""One H.264 and AAC encode for a broadcast, in a child process that can be killed and replaced.

`Canvas` places the avatar's picture, `Encoder` turns frames into packets (synchronous, no clock),
`EncoderProcess` runs both in a child: pictures go over in shared memory, sound and packets over a
socket. A crash or a hang in a codec costs one child, never the process that holds the room.

x264 by default; `codec="nvenc"` takes the GPU's encoder where there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import mmap
import os
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import cv2
import numpy as np

from .errors import ConfigError, TransportError
from .media import FRAME_RATE, Int16, Resampler, UInt8, check_fps, i420
from .rtmp import Packet, StreamHeader
from .sinks import SampleLine, mark_colours, picture_frame, stereo_frame
from .waiting import within

logger = logging.getLogger(__name__)

GOP_SECONDS = 2
"""Distance of keyframes, exactly: what YouTube and Twitch ask for."""

SLOTS = 25
"""Pictures that may be on their way to the child; at 25 fps, a second."""

START_LIMIT = 30.0
"""Seconds in which a child must have opened its codecs (a cold disk, a busy machine)."""


# --- what is made ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Programme:
    """How a broadcast looks and what it costs. Frozen; `programme(...)` fills it from a preset."""

    source_width: int
    source_height: int
    source_fps: int
    width: int
    height: int
    fps: int
    video_bitrate: int
    """Bits a second, constant (HRD); the buffer holds `buffer` seconds of it."""
    audio_bitrate: int = 128_000
    sample_rate: int = 48_000
    codec: Literal["x264", "nvenc"] = "x264"
    speed: str = "veryfast"
    profile: str = "main"
    lookahead: int = 10
    buffer: float = 1.5
    low_latency: bool = False
    background: str = ""
    """A colour (`#rrggbb`), or the path of a picture or video; empty is black."""
    placement: Literal["fit", "fill", "bottom"] = "fit"
    captions: bool = False

    def check(self) -> Programme:
        """Itself; ConfigError naming what can't be."""
        check_fps(self.source_fps)
        if self.fps not in (20, 24, 25, 30, 40, 48, 50, 60):
            raise ConfigError(f"a broadcast of {self.fps} fps can't be made: use 25, 30, 50 or 60")
        if self.width % 2 or self.height % 2 or min(self.width, self.height) < 64:
            raise ConfigError(f"a canvas of {self.width}x{self.height} can't be: use even sizes")
        if self.sample_rate not in (44_100, 48_000):
            raise ConfigError(f"a sample rate of {self.sample_rate} Hz: use 44100 or 48000")
        if not 50_000 <= self.video_bitrate <= 100_000_000:
            raise ConfigError(f"a video bitrate of {self.video_bitrate}: use 50,000 to 100,000,000")
        if not 24_000 <= self.audio_bitrate <= 512_000:
            raise ConfigError(f"an audio bitrate of {self.audio_bitrate}: use 24,000 to 512,000")
        if self.background and not re_colour(self.background):
            if not Path(self.background).is_file():
                raise ConfigError(f"the background {self.background} is not a file or a #rrggbb")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    # YouTube: 44.1 kHz stereo, 128 kbit/s, H.264 High; keyframes at most 4 s apart, better 2.
    "youtube": {"profile": "high", "sample_rate": 44_100, "audio_bitrate": 128_000, "rate": 1.3},
    # Twitch: Main, strict CBR up to 6 Mbit/s, 48 kHz, up to 160 kbit/s.
    "twitch": {"profile": "main", "sample_rate": 48_000, "audio_bitrate": 160_000, "rate": 1.0},
    # No lookahead, small buffer: a second less behind life, a little less picture for its bits.
    "low-latency": {
        "profile": "main",
        "sample_rate": 48_000,
        "audio_bitrate": 128_000,
        "rate": 1.0,
        "low_latency": True,
        "lookahead": 0,
        "buffer": 0.7,
    },
}

SHAPES = {"16:9": (16, 9), "9:16": (9, 16), "1:1": (1, 1)}


def programme(
    source_width: int,
    source_height: int,
    source_fps: int,
    *,
    preset: str = "youtube",
    shape: str | None = None,
    height: int = 720,
    fps: int | None = None,
    **changes: Any,
) -> Programme:
    """A programme from a preset (youtube, twitch, low-latency).

    `shape` is 16:9, 9:16 or 1:1 with `height` as the *short* side (720 gives 1280x720, 720x1280,
    720x720); None keeps the source's own size. `fps` None keeps the source's. Any field of
    `Programme` can be given too. Raises ConfigError.
    """
    if preset not in PRESETS:
        raise ConfigError(f"there is no preset {preset!r}: use {', '.join(PRESETS)}")
    values = dict(PRESETS[preset])
    rate = values.pop("rate")
    if shape is None:
        width, tall = source_width, source_height
    elif shape in SHAPES:
        across, down = SHAPES[shape]
        short = height
        width = short * across // min(across, down)
        tall = short * down // min(across, down)
        width, tall = width - width % 2, tall - tall % 2
    else:
        raise ConfigError(f"there is no canvas {shape!r}: use {', '.join(SHAPES)}")
    out = fps or source_fps
    # 3 Mbit/s for 1280x720 at 30 fps, less than in proportion above it, at most 6 (Twitch).
    bits = 3_000_000 * rate * (width * tall * out / (1280 * 720 * 30)) ** 0.75
    values["video_bitrate"] = int(min(6_000_000 * rate, max(200_000, bits)) // 10_000 * 10_000)
    values |= {name: value for name, value in changes.items() if value is not None}
    known = set(Programme.__dataclass_fields__)
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"a broadcast has no setting {unknown[0]!r}")
    return Programme(source_width, source_height, source_fps, width, tall, out, **values).check()


def re_colour(text: str) -> tuple[int, int, int] | None:
    """(r, g, b) of `#rrggbb`; None when it isn't one."""
    digits = text[1:] if text.startswith("#") and len(text) == 7 else ""
    try:
        return (int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)) if digits else None
    except ValueError:
        return None


def outputs_of(index: int, source_fps: int, fps: int) -> range:
    """The output pictures that source frame `index` fills: those that start while it is shown."""
    return range(-(-index * fps // source_fps), -(-(index + 1) * fps // source_fps))


# --- pictures -------------------------------------------------------------------------------------


def planes(image: UInt8) -> tuple[UInt8, UInt8, UInt8]:
    """Y, U and V of an I420 picture as views, (h, w) and twice (h/2, w/2)."""
    height, width = image.shape[0] * 2 // 3, image.shape[1]
    chroma = image[height:].reshape(2, height // 2, width // 2)
    return image[:height], chroma[0], chroma[1]


def resized(image: UInt8, width: int, height: int) -> UInt8:
    """An I420 picture at another (even) size."""
    if image.shape == (height * 3 // 2, width):
        return image
    out = np.empty((height * 3 // 2, width), np.uint8)
    shrinks = width < image.shape[1]
    for source, target in zip(planes(image), planes(out), strict=True):
        size = (target.shape[1], target.shape[0])
        way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        target[...] = cv2.resize(np.ascontiguousarray(source), size, interpolation=way)
    return out


def covering(image: UInt8, width: int, height: int) -> UInt8:
    """An I420 picture that fills width x height, cut at the sides or at top and bottom."""
    tall, wide = image.shape[0] * 2 // 3, image.shape[1]
    scale = max(width / wide, height / tall)
    scaled = resized(image, _even(wide * scale, width), _even(tall * scale, height))
    out = np.empty((height * 3 // 2, width), np.uint8)
    top = (scaled.shape[0] * 2 // 3 - height) // 4 * 2
    left = (scaled.shape[1] - width) // 4 * 2
    for part, target, half in zip(planes(scaled), planes(out), (1, 2, 2), strict=True):
        y, x = top // half, left // half
        target[...] = part[y : y + target.shape[0], x : x + target.shape[1]]
    return out


def _even(size: float, least: int) -> int:
    return max(least, int(np.ceil(size / 2)) * 2)


def read_picture(path: str, width: int, height: int) -> UInt8 | None:
    """The picture in a file, filling width x height; None when the file isn't a picture."""
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        return None
    even = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]
    return covering(np.asarray(cv2.cvtColor(even, cv2.COLOR_BGR2YUV_I420), np.uint8), width, height)


def draw_text(image: UInt8, text: str, *, bottom: float = 0.94, size: float = 0.034) -> None:
    """Write `text` into the luma of an I420 picture, in a dark box, centred, at most two lines."""
    luma, _, _ = planes(image)
    height, width = luma.shape
    points = max(10, int(size * (width * height) ** 0.5))
    lines = _wrapped(text, max(8, int(1.7 * width / points)))[-2:]
    step = int(points * 1.45)
    top = max(0, int(height * bottom) - step * len(lines))
    for number, line in enumerate(lines):
        strip = np.zeros((step, width), np.uint8)
        end = _put_text(strip, line, points)
        left = max(0, (width - end) // 2)
        y, pad = top + number * step, points // 2
        box = luma[y : y + step, max(0, left - pad) : min(width, left + end + pad)]
        box[...] = (box.astype(np.uint16) * 90 >> 8).astype(np.uint8)
        ink = strip[: box.shape[0], :end]
        area = luma[y : y + ink.shape[0], left : left + ink.shape[1]]
        np.maximum(area, (ink.astype(np.uint16) * 235 // 255).astype(np.uint8), out=area)


def _wrapped(text: str, columns: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()[:columns]
    return lines


def _put_text(strip: UInt8, text: str, points: int) -> int:
    """White on black from the left edge; the width in pixels."""
    base = int(strip.shape[0] * 0.74)
    if hasattr(cv2, "FontFace"):  # OpenCV 5: a real font, with the world's letters
        face = cv2.FontFace("sans")
        end = cv2.putText(strip, text, (0, base), (255,), face, points, 500)
        position = end[0] if isinstance(end[0], tuple) else end
        return int(min(strip.shape[1], max(1, int(position[0]))))
    plain = text.encode("ascii", "replace").decode()
    scale = points / 30
    (wide, _), _ = cv2.getTextSize(plain, cv2.FONT_HERSHEY_SIMPLEX, scale, 2)
    cv2.putText(strip, plain, (0, base), cv2.FONT_HERSHEY_SIMPLEX, scale, (255,), 2, cv2.LINE_AA)
    return int(min(strip.shape[1], max(1, wide)))


class Canvas:
    """Places the avatar's picture on a background; the canvas' own picture at its own rate."""

    def __init__(self, spec: Programme) -> None:
        self._spec = spec
        self._caption = ""
        self._video: _BackgroundVideo | None = None
        self._plain = (spec.source_width, spec.source_height) == (spec.width, spec.height)
        colour = re_colour(spec.background) or (0, 0, 0)
        self._back = i420(spec.height, spec.width, colour)
        if spec.background and not re_colour(spec.background) and not self._plain:
            picture = read_picture(spec.background, spec.width, spec.height)
            if picture is not None:
                self._back = picture
            else:
                self._video = _BackgroundVideo(spec)
        scale = min(spec.width / spec.source_width, spec.height / spec.source_height)
        if spec.placement == "fill":
            scale = max(spec.width / spec.source_width, spec.height / spec.source_height)
        self._width = int(spec.source_width * scale) // 2 * 2
        self._height = int(spec.source_height * scale) // 2 * 2

    def caption(self, text: str) -> None:
        """What is written below from now on; empty is nothing."""
        self._caption = text

    def draw(self, image: UInt8, index: int) -> UInt8:
        """The canvas' picture number `index` with the avatar's `image` on it."""
        spec = self._spec
        if self._plain:
            out = image.copy() if self._caption else image
        elif spec.placement == "fill":
            out = covering(image, spec.width, spec.height)
        else:
            back = self._video.at(index) if self._video is not None else self._back
            out = back.copy()
            scaled = resized(image, self._width, self._height)
            left = (spec.width - self._width) // 4 * 2
            top = spec.height - self._height
            if spec.placement == "fit":
                top = top // 4 * 2
            for part, target, half in zip(planes(scaled), planes(out), (1, 2, 2), strict=True):
                y, x = top // half, left // half
                target[y : y + part.shape[0], x : x + part.shape[1]] = part
        if self._caption and spec.captions:
            draw_text(out, self._caption)
        return out


class _BackgroundVideo:
    """A video that loops behind the avatar, each picture at its time."""

    def __init__(self, spec: Programme) -> None:
        self._spec = spec
        self._pictures = self._endless()
        self._when, self._now = next(self._pictures)

    def at(self, index: int) -> UInt8:
        """The picture at canvas picture `index`; called with rising numbers."""
        while self._when < index / self._spec.fps:
            self._when, self._now = next(self._pictures)
        return self._now

    def _endless(self) -> Iterator[tuple[float, UInt8]]:
        spec, start = self._spec, 0.0
        while True:
            end = start
            try:
                with av.open(spec.background) as container:
                    stream = container.streams.video[0]
                    step = float(1 / (stream.average_rate or 25))
                    for frame in container.decode(stream):
                        image = frame.to_ndarray(format="yuv420p")
                        height, width = image.shape[0] * 2 // 3, image.shape[1]
                        if height % 2 or width % 2:
                            frame = frame.reformat(width=width // 2 * 2, height=height // 2 * 2)
                            image = frame.to_ndarray(format="yuv420p")
                        when = float((frame.pts or 0) * (frame.time_base or 0))
                        end = start + when + step
                        yield start + when, covering(image, spec.width, spec.height)
            except (av.error.FFmpegError, IndexError):
                raise ConfigError(
                    f"the background {spec.background} is neither a picture nor a video"
                ) from None
            if end == start:
                raise ConfigError(f"the background {spec.background} holds no pictures")
            start = end


# --- encoding -------------------------------------------------------------------------------------


class Encoder:
    """Frames in, packets out; at once, on the caller's thread.

    `push(index, image, pcm)`: source frame `index` (counting on from `first`, gaps allowed), its
    I420 picture (None repeats nothing: the picture is left out) and its int16 mono samples at
    48 kHz. Video pts count canvas pictures, audio pts count samples, both from frame 0 of the
    programme, so a second encoder that starts at `first` goes on where the first one stopped.
    """

    def __init__(self, spec: Programme, first: int = 0) -> None:
        self.spec = spec
        self._canvas = Canvas(spec)
        self._video = _open_video(spec)
        self._audio = av.CodecContext.create("aac", "w")
        assert isinstance(self._audio, av.AudioCodecContext)
        self._audio.sample_rate = spec.sample_rate
        self._audio.layout, self._audio.format = "stereo", "fltp"
        self._audio.bit_rate = spec.audio_bitrate
        self._audio.flags |= av.codec.context.Flags.global_header
        self._audio.open()
        self._block = self._audio.frame_size or 1024
        # Sound is counted from the sample at which this encoder begins.
        self._origin = -(-first * spec.sample_rate // spec.source_fps)
        self._start = FRAME_RATE * first // spec.source_fps
        self._line = SampleLine()
        self._resampler = Resampler(FRAME_RATE, spec.sample_rate)
        self._ready = SampleLine()
        self._coded = 0
        self._next_key: int | None = None
        self._stamps: deque[tuple[int, float]] = deque(maxlen=4 * spec.fps + 64)

    @property
    def header(self) -> StreamHeader:
        spec = self.spec
        return StreamHeader(
            spec.width,
            spec.height,
            spec.fps,
            spec.video_bitrate,
            spec.audio_bitrate,
            spec.sample_rate,
            bytes(self._video.extradata or b""),
            bytes(self._audio.extradata or b""),
        )

    def caption(self, text: str) -> None:
        self._canvas.caption(text)

    def push(self, index: int, image: UInt8 | None, pcm: Int16, sent: float = 0.0) -> list[Packet]:
        packets = []
        if image is not None:
            for number in outputs_of(index, self.spec.source_fps, self.spec.fps):
                packets += self._picture(self._canvas.draw(image, number), number, sent)
        self._line.write(FRAME_RATE * index // self.spec.source_fps - self._start, pcm)
        samples = self._resampler.push(self._line.rest())
        self._ready.write(self._ready.written, samples)
        for block in self._ready.blocks(self._block):
            packets += self._sound(block, sent)
        return packets

    def flush(self) -> list[Packet]:
        """What the codecs still hold."""
        self._ready.write(self._ready.written, self._resampler.flush())
        rest = self._ready.rest()
        packets = self._sound(rest, 0.0) if len(rest) else []
        packets += [self._audio_packet(one, 0.0) for one in self._audio.encode(None)]
        packets += [self._video_packet(one) for one in self._video.encode(None)]
        return packets

    def _picture(self, image: UInt8, number: int, sent: float) -> list[Packet]:
        frame = picture_frame(image, number, self.spec.fps)
        gop = GOP_SECONDS * self.spec.fps
        if self._next_key is None or number >= self._next_key:
            # Keyframes stand on multiples of 2 s, also after a gap or in a second encoder.
            frame.pict_type = av.video.frame.PictureType.I
            self._next_key = (number // gop + 1) * gop
        self._stamps.append((number, sent))
        return [self._video_packet(packet) for packet in self._video.encode(frame)]

    def _video_packet(self, packet: av.Packet[Any]) -> Packet:
        pts = int(packet.pts or 0)
        while len(self._stamps) > 1 and self._stamps[0][0] < pts:
            self._stamps.popleft()
        sent = self._stamps[0][1] if self._stamps else 0.0
        return Packet("video", pts, self.spec.fps, bytes(packet), packet.is_keyframe, sent)

    def _sound(self, pcm: Int16, sent: float) -> list[Packet]:
        frame = stereo_frame(pcm, self._coded)
        frame.sample_rate = self.spec.sample_rate
        frame.time_base = Fraction(1, self.spec.sample_rate)
        self._coded += len(pcm)
        return [self._audio_packet(one, sent) for one in self._audio.encode(frame)]

    def _audio_packet(self, packet: av.Packet[Any], sent: float) -> Packet:
        pts = int(packet.pts or 0) + self._origin
        return Packet("audio", pts, self.spec.sample_rate, bytes(packet), True, sent)


def _open_video(spec: Programme) -> av.VideoCodecContext:
    kilobits = spec.video_bitrate // 1000
    gop = GOP_SECONDS * spec.fps
    if spec.codec == "nvenc":
        name = "h264_nvenc"
        options = {
            "preset": "p4",
            "tune": "ull" if spec.low_latency else "ll",
            "profile": spec.profile,
            "rc": "cbr",
            "cbr_padding": "1",
            "forced-idr": "1",
            "no-scenecut": "1",
            "strict_gop": "1",
            "bf": "0",
            "zerolatency": "1" if spec.low_latency else "0",
            "bufsize": str(int(spec.video_bitrate * spec.buffer)),
            "maxrate": str(spec.video_bitrate),
        }
    else:
        name = "libx264"
        options = {
            "preset": spec.speed,
            "profile": spec.profile,
            "forced-idr": "1",
            "x264-params": (
                f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes=0:nal-hrd=cbr:"
                f"bitrate={kilobits}:vbv-maxrate={kilobits}:"
                f"vbv-bufsize={int(kilobits * spec.buffer)}:rc-lookahead={spec.lookahead}:"
                f"sync-lookahead=0:sliced-threads={int(spec.low_latency)}"
            ),
        }
        if spec.low_latency:
            options["tune"] = "zerolatency"
    try:
        codec = av.CodecContext.create(name, "w")
        assert isinstance(codec, av.VideoCodecContext)
        codec.width, codec.height, codec.pix_fmt = spec.width, spec.height, "yuv420p"
        codec.time_base, codec.framerate = Fraction(1, spec.fps), Fraction(spec.fps)
        codec.bit_rate, codec.gop_size, codec.max_b_frames = spec.video_bitrate, gop, 0
        codec.flags |= av.codec.context.Flags.global_header
        mark_colours(codec)
        codec.options = options
        codec.open()
    except (av.error.FFmpegError, ValueError) as error:
        hint = "use codec x264" if spec.codec == "nvenc" else "choose another size or bitrate"
        raise ConfigError(f"the {spec.codec} encoder can't be opened ({error}): {hint}") from None
    return codec


# --- the child ------------------------------------------------------------------------------------

# Messages both ways: one byte of kind, four of length, the body.
_HEAD = struct.Struct("<cI")
_FRAME = struct.Struct("<qid")  # index, slot (-1: no picture), time it was sent; then the samples
_PACKET = struct.Struct("<cqi?d")  # kind, pts, scale, key, sent; then the data


def _message(kind: bytes, body: bytes) -> bytes:
    return _HEAD.pack(kind, len(body)) + body


def child_main(channel: int, memory: int) -> int:
    """The child's whole life: read frames from the socket until it ends, answer with packets."""
    threading.Thread(target=_outlive_nobody, args=(os.getppid(),), daemon=True).start()
    with socket.socket(fileno=channel) as sock, sock.makefile("rb") as stream:
        setup = json.loads(_expect(stream, b"S"))
        spec = Programme(**setup["programme"])
        first, slots = int(setup["first"]), int(setup["slots"])
        try:
            encoder = Encoder(spec, first)
        except ConfigError as error:
            sock.sendall(_message(b"E", str(error).encode()))
            return 1
        with mmap.mmap(memory, slots * picture_bytes(spec), access=mmap.ACCESS_READ) as shared:
            pictures = np.frombuffer(shared, np.uint8).reshape(
                slots, spec.source_height * 3 // 2, spec.source_width
            )
            header = encoder.header
            fields = asdict(header) | {"avc": header.avc.hex(), "aac": header.aac.hex()}
            sock.sendall(_message(b"H", json.dumps(fields).encode()))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                _serve(encoder, pictures, stream, sock)
            del pictures
    return 0


def _outlive_nobody(parent: int) -> None:
    """End with the parent, even while a codec hangs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _serve(encoder: Encoder, pictures: UInt8, stream: Any, sock: socket.socket) -> None:
    while len(head := stream.read(_HEAD.size)) == _HEAD.size:
        kind, size = _HEAD.unpack(head)
        body = stream.read(size)
        if kind == b"C":
            encoder.caption(body.decode())
            continue
        if kind == b"Z":  # for tests and drills: a codec that doesn't come back
            threading.Event().wait()
        packets = []
        if kind == b"F":
            index, slot, sent = _FRAME.unpack_from(body)
            image = pictures[slot] if slot >= 0 else None
            pcm = np.frombuffer(body, np.int16, offset=_FRAME.size)
            packets = encoder.push(index, image, pcm, sent)
            out = [_message(b"D", struct.pack("<i", slot))]
        else:
            packets = encoder.flush()
            out = []
        for one in packets:
            front = _PACKET.pack(one.kind[:1].encode(), one.pts, one.scale, one.key, one.sent)
            out.append(_message(b"P", front + one.data))
        sock.sendall(b"".join(out))
        if kind == b"Q":
            return


def _expect(stream: Any, wanted: bytes) -> bytes:
    kind, size = _HEAD.unpack(stream.read(_HEAD.size))
    if kind != wanted:
        raise ValueError("unexpected message")
    return bytes(stream.read(size))


def picture_bytes(spec: Programme) -> int:
    return spec.source_width * spec.source_height * 3 // 2


class EncoderProcess:
    """An `Encoder` in a child of its own, driven from one event loop.

    `await open()`; `push(...)` never waits and says False when the picture had to be left out
    (the child is behind); packets come through `on_packet`. `ended` is set when the child is gone
    for whatever reason, and `reason` says which. `kill()` is how a stuck one is dealt with.
    """

    def __init__(
        self, spec: Programme, on_packet: Callable[[Packet], None], first: int = 0
    ) -> None:
        self.spec = spec
        self.header: StreamHeader | None = None
        self.reason = ""
        self.ended = asyncio.Event()
        self.waiting = 0
        """Frames that the child has not dealt with yet."""
        self.heard = time.monotonic()
        """When the child last answered."""
        self._on_packet, self._first = on_packet, first
        self._free = list(range(SLOTS))
        self._child: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._hearing: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[StreamHeader] | None = None
        self._memory: mmap.mmap | None = None
        self._pictures: UInt8 | None = None
        self._errors: deque[str] = deque(maxlen=20)

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child is not None else None

    async def open(self) -> StreamHeader:
        """Start the child; its header when its codecs are open. ConfigError, TransportError."""
        loop = asyncio.get_running_loop()
        size = SLOTS * picture_bytes(self.spec)
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as undo:
            undo.callback(theirs.close)
            handle = _shared_memory(size)
            undo.callback(os.close, handle)
            self._memory = mmap.mmap(handle, size)
            self._pictures = np.frombuffer(self._memory, np.uint8).reshape(
                SLOTS, self.spec.source_height * 3 // 2, self.spec.source_width
            )
            ours.setblocking(False)
            reader, self._writer = await asyncio.open_connection(sock=ours)
            # The command line names two numbers and nothing else: no address, no key.
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "voipavatar.encoder",
                str(theirs.fileno()),
                str(handle),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(theirs.fileno(), handle),
                start_new_session=True,  # Ctrl-C is for us; the child ends when we say so
                env={**os.environ, "PYTHONPATH": os.pathsep.join(one for one in sys.path if one)},
            )
        self._opened = loop.create_future()
        self._hearing = asyncio.ensure_future(self._hear_errors())
        self._reading = asyncio.ensure_future(self._read(reader))
        setup = {"programme": asdict(self.spec), "first": self._first, "slots": SLOTS}
        self._writer.write(_message(b"S", json.dumps(setup).encode()))
        try:
            self.header = await within(self._opened, START_LIMIT)
        except asyncio.TimeoutError:
            await self.kill("it did not start")
            raise TransportError(
                f"the encoder did not start within {START_LIMIT:.0f} s: is the machine overloaded?"
            ) from None
        except BaseException:
            await self.kill("it did not start")
            raise
        self.heard = time.monotonic()
        return self.header

    def push(self, index: int, image: UInt8 | None, pcm: Int16) -> bool:
        """Hand over a frame. False when its picture was left out."""
        if self._writer is None or self.ended.is_set():
            return False
        slot = -1
        if image is not None and self._free:
            slot = self._free.pop()
            assert self._pictures is not None
            self._pictures[slot] = image
        if self.waiting == 0:
            self.heard = time.monotonic()  # it was idle: its silence starts to count now
        self.waiting += 1
        body = _FRAME.pack(index, slot, time.monotonic()) + np.ascontiguousarray(pcm).tobytes()
        self._writer.write(_message(b"F", body))
        return slot >= 0 or image is None

    def caption(self, text: str) -> None:
        if self._writer is not None and not self.ended.is_set():
            self._writer.write(_message(b"C", text.encode()))

    def freeze(self) -> None:
        """A drill: the child stops working and doesn't say so."""
        if self._writer is not None:
            self._writer.write(_message(b"Z", b""))

    async def aclose(self, timeout: float = 5.0) -> None:
        """Flush what the codecs hold, then end the child. Idempotent."""
        if self._writer is not None and not self.ended.is_set():
            self._writer.write(_message(b"Q", b""))
            with contextlib.suppress(asyncio.TimeoutError):
                await within(self.ended.wait(), timeout)
        await self.kill("closed")

    async def kill(self, reason: str) -> None:
        """End the child now. Idempotent."""
        self.reason = self.reason or reason
        if self._child is not None:
            if self._child.returncode is None:
                # Not `self._child.kill()`: it polls, and takes the exit from asyncio's hands.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._child.pid, signal.SIGKILL)
            await self._child.wait()
        for task in (self._reading, self._hearing):
            if task is not None:
                task.cancel()
        held: list[Awaitable[None]] = [t for t in (self._reading, self._hearing) if t is not None]
        await asyncio.gather(*held, return_exceptions=True)
        self._reading = self._hearing = None
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
        self._pictures = None
        if self._memory is not None:
            with contextlib.suppress(BufferError):
                self._memory.close()
            self._memory = None
        self.ended.set()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                kind, size = _HEAD.unpack(await reader.readexactly(_HEAD.size))
                body = await reader.readexactly(size)
                self._take(kind, body)
        except (asyncio.IncompleteReadError, OSError):
            self.reason = self.reason or "it ended" + (
                f": {self._errors[-1]}" if self._errors else ""
            )
        except Exception as error:  # a mistake of ours; the encoder is replaced
            logger.exception("a packet could not be taken")
            self.reason = self.reason or type(error).__name__
        finally:
            if self._opened is not None and not self._opened.done():
                self._opened.set_exception(TransportError(f"the encoder failed: {self.reason}"))
                self._opened.exception()  # whoever waits gets it; nobody has to
            self.ended.set()

    def _take(self, kind: bytes, body: bytes) -> None:
        self.heard = time.monotonic()
        if kind == b"P":
            mark, pts, scale, key, sent = _PACKET.unpack_from(body)
            name: Literal["video", "audio"] = "video" if mark == b"v" else "audio"
            self._on_packet(Packet(name, pts, scale, body[_PACKET.size :], key, sent))
        elif kind == b"D":
            (slot,) = struct.unpack("<i", body)
            self.waiting -= 1
            if slot >= 0:
                self._free.append(slot)
        elif self._opened is not None and not self._opened.done():
            if kind == b"H":
                fields = json.loads(body)
                fields |= {name: bytes.fromhex(fields[name]) for name in ("avc", "aac")}
                self._opened.set_result(StreamHeader(**fields))
            else:
                self._opened.set_exception(ConfigError(body.decode()))

    async def _hear_errors(self) -> None:
        """Read stderr all the time: a full pipe would stop the child."""
        assert self._child is not None and self._child.stderr is not None
        while data := await self._child.stderr.read(4096):
            self._errors += [line for line in data.decode("utf-8", "replace").splitlines() if line]


def _shared_memory(size: int) -> int:
    """A descriptor of memory without a name: it is gone with its last user."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("voipavatar-pictures")
    else:
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    os.ftruncate(handle, size)
    return handle


def nvenc_works() -> bool:
    """Whether this machine's GPU encodes H.264 for us."""
    try:
        probe = programme(256, 144, 25, preset="low-latency", codec="nvenc")
        _open_video(replace(probe, video_bitrate=500_000))
    except ConfigError:
        return False
    return True


if __name__ == "__main__":
    av.logging.set_level(av.logging.ERROR)
    sys.exit(child_main(int(sys.argv[1]), int(sys.argv[2])))
