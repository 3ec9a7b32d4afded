"""Loudness: measured as ITU-R BS.1770-4 does, brought to a target while it streams, never clipped.

Differences from the standard, both without weight for speech: the K-weighting is applied to each
block's spectrum instead of to the samples, and peaks are sample peaks, held 1.5 dB below full
scale to leave room for those between samples.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from ..media import Float32, Int16, to_float

TARGET = -18.0
"""LUFS. Loud enough for a phone, quiet enough that speech keeps its peaks."""

CEILING = 10 ** (-1.5 / 20)

MOST_GAIN = 24.0
"""Decibels, up or down."""

_BLOCK, _STEP = 0.4, 0.1  # seconds: gating blocks and how far apart they begin
_ABSOLUTE, _RELATIVE = -70.0, -10.0  # gates, LUFS and LU
_ENOUGH = 600  # blocks: a minute of speech says how loud a voice is


class Meter:
    """Gated loudness of a stream of mono sound, so far."""

    def __init__(self, rate: int) -> None:
        self._block = round(_BLOCK * rate)
        self._step = round(_STEP * rate)
        self._weights = _k_weights(rate, self._block)
        self._rest: Float32 = np.zeros(0, np.float32)
        self._powers: list[float] = []

    def push(self, sound: Float32) -> None:
        if len(self._powers) >= _ENOUGH:
            return
        self._rest = np.concatenate([self._rest, sound])
        while len(self._rest) >= self._block:
            spectrum = np.abs(np.fft.rfft(self._rest[: self._block])) ** 2
            # Parseval: the mean square of the weighted block.
            power = float(spectrum @ self._weights) * 2 / self._block**2
            if _lufs(power) > _ABSOLUTE:
                self._powers.append(power)
            self._rest = self._rest[self._step :]

    @property
    def seconds(self) -> float:
        """Of sound that was loud enough to count."""
        return len(self._powers) * _STEP

    @property
    def loudness(self) -> float | None:
        """LUFS; None before there was sound."""
        if not self._powers:
            return None
        powers = np.array(self._powers)
        gate = _lufs(float(powers.mean())) + _RELATIVE
        return _lufs(float(powers[powers > 10 ** ((gate + 0.691) / 10)].mean()))


def _lufs(power: float) -> float:
    return -0.691 + 10 * math.log10(power) if power > 1e-12 else -120.0


@lru_cache(8)
def _k_weights(rate: int, block: int) -> Float32:
    """|H(f)|² of the K-weighting at the block's spectral lines (BS.1770-4, annex 1, as analogue
    prototypes: a shelf of +4 dB above 1.5 kHz and a high pass at 38 Hz)."""
    f = np.fft.rfftfreq(block, 1 / rate)
    s = 1j * f
    f0, gain, q = 1681.974, 10 ** (3.99984 / 20), 0.7071752
    band = gain**0.4996667741545416
    shelf = (gain * s**2 + band * f0 / q * s + f0**2) / (s**2 + f0 / q * s + f0**2)
    f1, q1 = 38.13547, 0.5003270
    high = s**2 / (s**2 + f1 / q1 * s + f1**2)
    weights: Float32 = (np.abs(shelf * high) ** 2).astype(np.float32)
    return weights


class Limiter:
    """Keeps samples below the ceiling without distortion: gain goes down 5 ms before a peak.

    As many samples come out as go in, `flush` included; the last 5 ms are held back meanwhile.
    """

    def __init__(self, rate: int, ceiling: float = CEILING) -> None:
        self._ceiling = ceiling
        self._size = max(1, rate // 1000)  # a block of about 1 ms
        self._ahead = 5  # blocks
        self._release = math.exp(-self._size / (0.08 * rate))
        self._held: Float32 = np.zeros(0, np.float32)
        self._gain: float | None = None  # at the beginning of what is held

    def push(self, sound: Float32) -> Float32:
        """Any length; float, any amplitude."""
        self._held = np.concatenate([self._held, sound])
        return self._out(len(self._held) // self._size - self._ahead)

    def flush(self) -> Float32:
        """What was held back; the limiter is as new afterwards."""
        length = len(self._held)
        blocks = -(-length // self._size)
        padding = np.zeros((blocks + self._ahead) * self._size - length, np.float32)
        self._held = np.concatenate([self._held, padding])
        out = self._out(blocks)[:length]
        self._held, self._gain = np.zeros(0, np.float32), None
        return out

    def _out(self, blocks: int) -> Float32:
        if blocks <= 0:
            return np.zeros(0, np.float32)
        size, ahead = self._size, self._ahead
        seen = self._held[: (blocks + ahead) * size].reshape(-1, size)
        peaks = np.abs(seen).max(axis=1)
        if self._gain in (None, 1.0) and peaks.max() <= self._ceiling:
            out: Float32 = self._held[: blocks * size].copy()
            self._gain = 1.0
            self._held = self._held[blocks * size :]
            return out
        needs = np.minimum(1.0, self._ceiling / np.maximum(peaks, 1e-9))
        # The gain at the edge between two blocks suits both, and those that follow soon; it comes
        # back slowly. Between edges it is a straight line, so it suits every sample.
        edges = [self._gain if self._gain is not None else float(needs[:ahead].min())]
        for index in range(1, blocks + 1):
            low = float(needs[index - 1 : index + ahead].min())
            back = 1 - (1 - edges[-1]) * self._release
            edges.append(min(low, back if back < 0.9999 else 1.0))
        slope = np.linspace(0.0, 1.0, size, endpoint=False, dtype=np.float32)
        start = np.array(edges[:-1], np.float32)[:, None]
        stop = np.array(edges[1:], np.float32)[:, None]
        out = (seen[:blocks] * (start + (stop - start) * slope)).reshape(-1).astype(np.float32)
        self._gain = edges[-1]
        self._held = self._held[blocks * size :]
        return out


class Leveller:
    """Brings one voice to the target, a stream of chunks at a time.

    `known` is the voice's loudness if it was measured before. Without it, the gain follows what
    is heard, slowly; `measured` says what to remember.
    """

    def __init__(self, rate: int, target: float = TARGET, known: float | None = None) -> None:
        self.target = target
        self.known = known
        self._rate = rate
        self._meter = Meter(rate)
        self._limiter = Limiter(rate)
        self._gain: float | None = None  # decibels, where the last chunk ended
        self._peak = 0.0

    @property
    def measured(self) -> float | None:
        """LUFS, once there were three seconds of speech to tell it from."""
        return self._meter.loudness if self._meter.seconds >= 3.0 else None

    def push(self, pcm: Int16, extra: float = 0.0) -> Int16:
        """`extra` decibels come on top, for emphasis. Gives what can be given now."""
        sound = to_float(pcm)
        if self.known is None:
            self._meter.push(sound)
        wanted = self._wanted(sound) + extra
        before = wanted if self._gain is None else self._gain
        # 6 dB a second when the loudness is still being learnt, at once when it is known.
        step = 6.0 * len(sound) / self._rate if self.known is None else 60.0
        after = min(max(wanted, before - step), before + step)
        ramp = np.power(10, np.linspace(before, after, len(sound)) / 20).astype(np.float32)
        self._gain = after
        return _int16(self._limiter.push(sound * ramp))

    def flush(self) -> Int16:
        return _int16(self._limiter.flush())

    def _wanted(self, sound: Float32) -> float:
        loudness = self.known if self.known is not None else self._meter.loudness
        if loudness is None:
            # Less than a block: the level of what there is, speech being about as loud as its RMS.
            power = float(np.mean(sound**2)) if len(sound) else 0.0
            loudness = max(_lufs(power), -32.0) if power > 1e-8 else self.target
        return min(max(self.target - loudness, -MOST_GAIN), MOST_GAIN)


def _int16(sound: Float32) -> Int16:
    pcm: Int16 = np.clip(np.rint(sound * 32768.0), -32768, 32767).astype(np.int16)
    return pcm
