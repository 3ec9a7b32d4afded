"""The numbers that `GET /metrics` shows: what the sessions of this process did and how fast.

Plain Prometheus instruments in the default registry, made once per process. Whoever does the work
counts it, in one line: `TURNS.labels("said").inc()`. Labels are few and their values are fixed,
so the number of series doesn't grow with use.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest

__all__ = [
    "CONTENT_TYPE",
    "FIRST_PICTURE",
    "FIRST_SOUND",
    "FRAMES",
    "GPU_MEMORY",
    "HEARD",
    "INTERRUPTIONS",
    "LATE_FRAMES",
    "MESSAGES",
    "RENDER",
    "REQUESTS",
    "SESSIONS",
    "SESSIONS_CLOSED",
    "SESSIONS_OPENED",
    "SESSIONS_REFUSED",
    "TICK",
    "TURNS",
    "WATCHERS",
    "exposition",
    "frame",
]

CONTENT_TYPE = CONTENT_TYPE_LATEST
"""Media type of `exposition`."""

SESSIONS = Gauge("voipavatar_sessions", "Sessions that are open now.")
SESSIONS_OPENED = Counter("voipavatar_sessions_opened", "Sessions opened since the start.")
SESSIONS_CLOSED = Counter(
    "voipavatar_sessions_closed",
    "Sessions closed since the start, by reason: asked, idle, failed or shutdown.",
    ["reason"],
)
SESSIONS_REFUSED = Counter(
    "voipavatar_sessions_refused", "Sessions refused because there was no room for another."
)
WATCHERS = Gauge("voipavatar_watchers", "Event streams and live-audio sockets open now.")

FRAMES = Counter(
    "voipavatar_frames", "Frames given to the sinks, by kind: idle or talking.", ["kind"]
)
LATE_FRAMES = Counter(
    "voipavatar_late_frames", "Frames whose picture was not ready, so that the last one was held."
)
TICK = Histogram(
    "voipavatar_tick_seconds",
    "What one tick of a stage took, from waking to the last sink.",
    buckets=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.04, 0.08, 0.16),
)
RENDER = Histogram(
    "voipavatar_render_seconds",
    "What one batch took on the engine's thread.",
    ["engine"],
    buckets=(0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512),
)

TURNS = Counter(
    "voipavatar_turns", "Turns that are over, by outcome: said, interrupted or failed.", ["outcome"]
)
HEARD = Counter("voipavatar_heard_seconds", "Seconds of speech that were really played.")
INTERRUPTIONS = Counter(
    "voipavatar_interruptions", "Turns that were cut off while they were heard."
)
FIRST_SOUND = Histogram(
    "voipavatar_first_sound_seconds",
    "From the request to speak to its first sample being played; turns that waited are left out.",
    buckets=(0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 4.0, 8.0),
)
FIRST_PICTURE = Histogram(
    "voipavatar_first_picture_seconds",
    "From the first sample that came in to the first talking frame that went out.",
    buckets=(0.04, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0, 2.0, 4.0),
)

MESSAGES = Counter(
    "voipavatar_messages",
    "Messages of queues, by what became of them: taken and retried, then one of the outcomes.",
    ["outcome"],
)
RATE = Gauge(
    "voipavatar_fps", "Frames a second given to the sinks, all sessions together; the last second."
)
OFFSET = Histogram(
    "voipavatar_av_offset_seconds",
    "By how much a picture was handed over after its sound began to be played, at the source.",
    buckets=(-0.04, -0.02, -0.01, 0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16),
)
GPU_MEMORY = Gauge(
    "voipavatar_gpu_memory_bytes",
    "Device memory in use, by whomever, by nvidia-smi's number; none without a GPU.",
    ["gpu"],
)

REQUESTS = Counter(
    "voipavatar_http_requests", "HTTP requests answered, by class of status.", ["status"]
)


_seconds: tuple[int, int, int] = (0, 0, 0)  # this second, its frames, and those of the last one


def frame(kind: str) -> None:
    """One frame was given to the sinks."""
    global _seconds
    FRAMES.labels(kind).inc()
    now, (second, count, _) = int(time.monotonic()), _seconds
    _seconds = (
        (second, count + 1, _seconds[2])
        if now == second
        else (now, 1, count if now == second + 1 else 0)
    )


def _rate() -> float:
    second, count, before = _seconds
    return float({0: before, 1: count}.get(int(time.monotonic()) - second, 0))


RATE.set_function(_rate)


class _Memory(ctypes.Structure):
    """NVML's `nvmlMemory_t`, bytes."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


@functools.cache
def _nvml() -> Any:
    """The driver's own library, or None without one. It takes no memory of a device, and sees what
    any runtime has taken: torch, ONNX Runtime, TensorRT or another process."""
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def _devices(library: Any) -> Iterator[tuple[int, int]]:
    """Number and bytes in use of each device that answers."""
    count = ctypes.c_uint()
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for number in range(count.value):
        device, memory = ctypes.c_void_p(), _Memory()
        if (
            library.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(device)) == 0
            and library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0
        ):
            yield number, memory.used


def _torch_devices() -> Iterator[tuple[int, int]]:
    """The same from torch, if it has taken up a device in this process; it isn't loaded for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            yield number, total - free


def _gpus() -> None:
    """Ask every device now; one that has gone has no number any more."""
    library = _nvml()
    used = dict(_torch_devices() if library is None else _devices(library))
    GPU_MEMORY.clear()
    for number, size in used.items():
        GPU_MEMORY.labels(str(number)).set(size)


def exposition() -> bytes:
    """Every instrument in the text format that Prometheus reads."""
    _gpus()
    return generate_latest()
