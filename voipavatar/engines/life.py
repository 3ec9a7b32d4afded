"""What a face does besides talking: it breathes, blinks, looks about, nods along, listens, thinks.

`Life` is what it does by itself, a pure function of a seed and the picture clock. `Body` adds what
depends on what happened: speech (its loudness is the prosody that moves head, brows and eyes), the
pose it was told to take, gestures. Its state is kept by clock, so that an interruption can go back
to what was really shown; and whatever speech or a pose has moved is back exactly where it would
have been, a few seconds later.

Eyes move as eyes do: in jumps of two pictures, with rests between them, and against the head's own
turning, so that they stay on the viewer. Directions are as seen in the picture: x right, y down.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import EngineError
from ..media import POSES, Float32
from .rig import HEAD, smoothstep

KEPT = 128
"""Pictures whose state is kept."""

YAW, PITCH, ROLL, SWAY, LIFT, BROW = range(len(HEAD))
_MASK = (1 << 64) - 1


@functools.lru_cache(maxsize=2048)
def chance(seed: int, *parts: int) -> float:
    """0 to 1, the same on every machine (the finaliser of SplitMix64)."""
    value = seed & _MASK
    for part in parts:
        value = (value + 0x9E3779B97F4A7C15 * (part + 1)) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value / 2**64


def _ease(x: float) -> float:
    """As `smoothstep`, of one number."""
    x = min(1.0, max(0.0, x))
    return x * x * (3.0 - 2.0 * x)


# --- by itself ------------------------------------------------------------------------------------

_WAVES = 4
_SLOT = 4.0
_AMPLITUDE = {  # of each head motion, and the slowest and fastest of its waves in Hz
    "yaw": (0.032, 0.05, 0.33),
    "pitch": (0.018, 0.06, 0.30),
    "roll": (0.0085, 0.05, 0.26),
    "sway": (0.014, 0.04, 0.19),
    "lift": (0.005, 0.05, 0.20),
    "brow": (0.10, 0.03, 0.15),
}
_BREATH = (0.0055, 0.24)  # face units, Hz
_FIXED = 0.85
"""Seconds between small jumps of the eyes, on average."""
_GLANCE = 4.6
"""Seconds in which there may be a look aside, and how likely one is."""
_ASIDE = 0.40
_JUMP = 0.07
"""Seconds that a jump of the eyes takes."""
_BACKCHANNEL = 3.1
"""Seconds in which a listener may nod."""
_PONDER = 1.25
"""Seconds that eyes rest at one place in thought, on average."""


class Life:
    """What a face does by itself, at any moment of the picture clock."""

    def __init__(self, seed: int, fps: int, motion: float, blink: float, gaze: float = 1.0) -> None:
        self._seed = seed
        self._fps = fps
        self._motion = motion
        self._gaze = gaze
        self._slot = _SLOT / blink if blink > 0 else 0.0
        waves = []
        for row, (size, slow, fast) in enumerate(_AMPLITUDE.values()):
            for i in range(_WAVES):
                spread = (i + chance(seed, 1, row, i)) / _WAVES
                rate = slow * (fast / slow) ** spread
                # Slow waves are the large ones.
                waves.append((size / (1 + 0.9 * i), rate, chance(seed, 2, row, i)))
        table = np.asarray(waves, np.float64).reshape(len(_AMPLITUDE), _WAVES, 3)
        self._size, self._rate, self._phase = table[..., 0], table[..., 1], table[..., 2]
        self.side = 1.0 if chance(seed, 5) < 0.5 else -1.0
        """To which side it looks in thought, and tilts its head."""

    def head(self, clock: int) -> Float32:
        """As `rig.HEAD`."""
        if self._motion == 0:
            return np.zeros(len(HEAD), np.float32)
        moment = clock / self._fps
        turns = self._rate * moment + self._phase
        out = (self._size * np.sin(2 * np.pi * turns)).sum(-1)
        size, rate = _BREATH
        out[LIFT] -= size * math.sin(2 * math.pi * rate * moment)
        out[BROW] = max(0.0, out[BROW] - 0.04)
        return np.asarray(out, np.float32)

    def blink(self, clock: int) -> float:
        """0 open, 1 shut. About one blink in each slot of time, sometimes two."""
        if self._slot <= 0:
            return 0.0
        moment = clock / self._fps
        slot = int(moment // self._slot)
        shut = 0.0
        for one in (slot - 1, slot):
            if one < 0:
                continue
            # On a whole picture, so that every blink has one that is quite shut.
            start = (one + 0.12 + 0.80 * chance(self._seed, 3, one)) * self._slot
            begin = round(start * self._fps)
            shut = max(shut, lid((clock - begin) / self._fps))
            if chance(self._seed, 4, one) < 0.14:
                again = begin + round(0.42 * self._fps)
                shut = max(shut, 0.9 * lid((clock - again) / self._fps))
        return shut

    def rest(self, clock: int) -> tuple[float, float]:
        """Where on the viewer's face the eyes rest, in radii of the iris: small jumps, and between
        them a drift that is hardly seen."""
        if self._gaze == 0:
            return 0.0, 0.0
        moment = clock / self._fps
        x, y = self._jumping(6, moment, _FIXED)
        drift = 0.008 * math.sin(2 * math.pi * (0.31 * moment + self._phase[0, 0]))
        return self._gaze * (0.16 * (x - 0.5) + drift), self._gaze * (0.10 * (y - 0.5) + drift)

    def glance(self, clock: int) -> tuple[float, float, float]:
        """A look aside: x, y in radii of the iris, and how far the head goes along, -1 to 1."""
        if self._gaze == 0:
            return 0.0, 0.0, 0.0
        moment = clock / self._fps
        slot = int(moment // _GLANCE)
        x = y = head = 0.0
        for one in (slot - 1, slot):
            if one < 0 or chance(self._seed, 7, one) > _ASIDE:
                continue
            begin = (one + 0.15 + 0.5 * chance(self._seed, 8, one)) * _GLANCE
            end = begin + 0.5 + 0.8 * chance(self._seed, 9, one)
            share = _ease((moment - begin) / _JUMP) * _ease((end - moment) / _JUMP)
            slow = _ease((moment - begin) / 0.5) * _ease((end + 0.5 - moment) / 0.5)
            side = 2 * chance(self._seed, 10, one) - 1
            side = math.copysign(0.26 + 0.22 * abs(side), side)
            x += share * side
            y += share * (0.26 * chance(self._seed, 11, one) - 0.14)
            head += slow * side
        return self._gaze * x, self._gaze * y, head

    def pondered(self, clock: int) -> tuple[float, float]:
        """Where the eyes are in thought: aside and up, and from time to time somewhere else."""
        x, y = self._jumping(12, clock / self._fps, _PONDER)
        return self._gaze * self.side * (0.36 + 0.22 * x), self._gaze * (-0.34 + 0.18 * y)

    def backchannel(self, clock: int) -> float:
        """A listener's small nods: 0 to 1, down once or twice."""
        moment = clock / self._fps
        slot = int(moment // _BACKCHANNEL)
        out = 0.0
        for one in (slot - 1, slot):
            kind = chance(self._seed, 13, one)
            if one < 0 or kind > 0.62:
                continue
            begin = (one + 0.1 + 0.6 * chance(self._seed, 14, one)) * _BACKCHANNEL
            t = (moment - begin) / 0.56
            if 0 < t < 1:
                out += math.sin(math.pi * t) ** 2
            elif kind < 0.26 and 1 <= t < 1.8:
                out += 0.5 * math.sin(math.pi * (t - 1) / 0.8) ** 2
        return out

    def _jumping(self, kind: int, moment: float, every: float) -> tuple[float, float]:
        """Two numbers 0 to 1 that stay, and jump at uneven times about `every` seconds apart."""
        slot = int(moment // every)
        begin = (slot + 0.75 * chance(self._seed, kind, slot)) * every
        if moment < begin:
            slot -= 1
            begin = (slot + 0.75 * chance(self._seed, kind, slot)) * every
        share = _ease((moment - begin) / _JUMP)
        now, was = (
            (chance(self._seed, kind, one, 1), chance(self._seed, kind, one, 2))
            for one in (slot, slot - 1)
        )
        return was[0] + (now[0] - was[0]) * share, was[1] + (now[1] - was[1]) * share


DOWN, HOLD, UP = 0.12, 0.04, 0.18


def lid(moment: float) -> float:
    """A lid's course, seconds from its start: down quickly, shut for a moment, up more slowly."""
    if moment <= 0 or moment >= DOWN + HOLD + UP:
        return 0.0
    if moment < DOWN:
        t = moment / DOWN
        return t * t * (3 - 2 * t)
    if moment <= DOWN + HOLD:
        return 1.0
    t = (moment - DOWN - HOLD) / UP
    return float((1 - t) ** 1.6)


# --- gestures and poses ---------------------------------------------------------------------------

GESTURES: dict[str, float] = {
    "nod": 0.96,
    "shake": 1.2,
    "smile": 2.4,
    "wink": 0.44,
    "brows": 1.0,
    "tilt": 1.8,
    "blink": 0.34,
}
"""What a cue of kind "gesture" can ask for, and how long it takes in seconds."""

_NOD, _SHAKE, _TILT = 0.075, 0.065, 0.045  # radians
_SMILE = 0.75


@dataclass
class _Gestured:
    """What gestures add to a pose."""

    head: Float32
    width: float = 0.0
    blink: float = 0.0
    wink: float = 0.0


def gestured(running: list[tuple[int, str]], clock: int, fps: int, motion: float) -> _Gestured:
    """The sum of the gestures (clock at which they began, name), at a moment."""
    out = _Gestured(np.zeros(len(HEAD), np.float32))
    for begin, name in running:
        moment, length = (clock - begin) / fps, GESTURES[name]
        if not 0 <= moment < length:
            continue
        t = moment / length
        swell = math.sin(math.pi * t) ** 2
        # In within a quarter, out within the last third.
        hold = float(smoothstep(t / 0.25) * smoothstep((1 - t) / 0.35))
        if name == "nod":
            # Down twice, the second time less.
            share = 1.0 if t < 0.5 else 0.6
            out.head[PITCH] += motion * _NOD * share * math.sin(2 * math.pi * t) ** 2
        elif name == "shake":
            out.head[YAW] += motion * _SHAKE * math.sin(4 * math.pi * t) * swell
        elif name == "tilt":
            out.head[ROLL] += motion * _TILT * hold
        elif name == "brows":
            out.head[BROW] += 0.8 * hold
        elif name == "smile":
            out.width += _SMILE * hold
            out.head[BROW] += 0.2 * hold
        elif name == "wink":
            out.wink = max(out.wink, lid(moment * (DOWN + HOLD + UP) / length))
        else:
            out.blink = max(out.blink, lid(moment))
    return out


# --- with what happens ----------------------------------------------------------------------------

_LOUD = 0.07
"""Level above which somebody speaks."""
_PAUSE = 0.30
"""Seconds of quiet that end a phrase."""
_RAMPS: dict[str, tuple[float, float, float]] = {
    # seconds before it begins, that it takes in, and that it takes out
    "talk": (0.0, 0.12, 0.5),
    "stance": (0.0, 0.6, 0.9),
    "hark": (0.08, 0.12, 0.12),
    "attend": (0.08, 0.7, 0.6),
    "agree": (0.4, 0.5, 0.5),
    "muse": (0.36, 0.08, 0.06),
    "ponder": (0.30, 0.7, 0.55),
}
"""Each a way from 0 to 1 and back: talk, listening and thinking, of the eyes and of the head."""
_SLOW, _QUICK = 0.45, 0.09
"""Seconds over which loudness is smoothed: the mood of a sentence, and its stresses."""
_BEAT = 2 * math.pi * 1.7


@dataclass(slots=True)
class _State:
    """All that a moment leaves to the next."""

    calm: float = 0.0
    """Slow loudness."""
    quick: float = 0.0
    beat: float = 0.0
    swing: float = 0.0
    """The head's nod with the stresses, and its speed."""
    quiet: int = 1 << 20
    """Pictures since speech was last loud."""
    spoken: int = 0
    """Pictures since it began to be."""
    ramps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_RAMPS, 0))
    """Pictures along their way; below 0 while they wait."""
    turned: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Yaw, pitch and roll that the phrase before began with, that this one has, since when."""
    turns: tuple[float, float, float] = (0.0, 0.0, 0.0)
    since: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """How everything but the mouth is held in one picture."""

    head: Float32
    blink: float = 0.0
    wink: float = 0.0
    gaze: tuple[float, float] = (0.0, 0.0)
    smile: float = 0.0
    """To be added to the mouth's width."""


class Body:
    """Life, and what speech, poses and gestures make of it. One a session."""

    def __init__(self, seed: int, fps: int, motion: float, blink: float, gaze: float) -> None:
        self._seed = seed
        self._fps = fps
        self._motion = motion
        self._share = min(1.0, motion)
        self._gaze = gaze * self._share
        self.life = Life(seed, fps, motion, blink, self._gaze)
        self._blinking = blink > 0
        self._state = _State()
        self._kept: OrderedDict[int, _State] = OrderedDict()
        # What was asked for: when (by the clock), what, and whether it is free of any turn.
        self._gestures: list[tuple[int, str, bool]] = []
        self._poses: list[tuple[int, str]] = []
        self._blinks: list[int] = []

    # -- what is asked for -------------------------------------------------------------------------

    def gesture(self, clock: int, name: str, *, free: bool = False) -> None:
        """From picture `clock` on. One that is `free` outlives an interruption."""
        self._gestures.append((clock, name, free))

    def pose(self, clock: int, name: str) -> None:
        """From picture `clock` on, until another is asked for. EngineError if there is none such"""
        if name not in POSES:
            known = ", ".join(repr(one) for one in POSES)
            raise EngineError(f"there is no pose {name!r}; there are: {known}")
        self._poses = [*(one for one in self._poses if one[0] < clock), (clock, name)]

    def rewind(self, clock: int, *, fresh: bool) -> None:
        """The next picture is `clock`; what was made from there on was never shown. `fresh` when
        nothing that was made before it is known to be on."""
        known = self._kept.get(clock - 1)
        while self._kept and next(reversed(self._kept)) >= clock:
            self._kept.popitem()
        if known is not None:
            self._state = known
        elif fresh:
            self._state = _State()
        self._gestures = [
            (min(one[0], clock), *one[1:]) for one in self._gestures if one[2] or one[0] < clock
        ]
        self._poses = [(min(begin, clock), name) for begin, name in self._poses]
        self._blinks = [begin for begin in self._blinks if begin < clock]

    # -- one picture -------------------------------------------------------------------------------

    def step(self, clock: int, level: float) -> Held:
        """The next picture, with speech of this level (0 to 1)."""
        state = self._moved(clock, level)
        self._state = state
        self._kept[clock] = state
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        life = self.life
        head = life.head(clock)
        blink, wink, smile = life.blink(clock), 0.0, 0.0
        for begin in self._blinks:
            blink = max(blink, lid((clock - begin) / self._fps))
        gaze = (0.0, 0.0)
        if self._motion > 0:
            gaze = self._living(state, clock, head)
        if self._gestures:
            fps = self._fps
            self._gestures = [
                one
                for one in self._gestures
                if clock < one[0] + (GESTURES[one[1]] + KEPT / fps) * fps
            ]
            extra = gestured([one[:2] for one in self._gestures], clock, fps, self._share)
            head = head + extra.head
            blink, wink, smile = max(blink, extra.blink), extra.wink, extra.width
        return Held(head, blink, wink, gaze, smile)

    def _living(self, state: _State, clock: int, head: Float32) -> tuple[float, float]:
        """Adds to `head` what speech and poses do; where the eyes look."""
        life, motion = self.life, self._share
        way = {name: self._way(state, name) for name in _RAMPS}
        silent = 1.0 - way["stance"]
        attend, ponder = way["attend"] * silent, way["ponder"] * silent
        agree = way["agree"] * silent
        eyes_free = 1.0 - way["talk"]
        hark, muse = way["hark"] * eyes_free, way["muse"] * eyes_free

        # Who speaks up, lifts chin and brows a little, and nods with the stresses.
        loud = state.calm
        head[PITCH] += 0.022 * math.sin(4.6 * loud) * loud + motion * state.beat
        head[BROW] += 0.5 * loud * loud + 4.0 * motion * max(0.0, state.beat)
        if way["stance"] > 0:
            turned = self._turned(state, clock)
            for i, part in enumerate((YAW, PITCH, ROLL)):
                head[part] += motion * way["stance"] * turned[i]
        if attend > 0:
            nod = agree * life.backchannel(clock) if agree > 0 else 0.0
            head[PITCH] += motion * attend * (0.006 + 0.030 * nod)
            head[ROLL] += motion * attend * 0.014 * life.side
            head[LIFT] += motion * attend * 0.006
            head[BROW] += attend * (0.26 + 0.1 * nod)
        x, y = life.rest(clock)
        aside_x, aside_y, along = life.glance(clock)
        apart = 1.0 - max(0.7 * way["talk"], 0.85 * hark, muse)
        head[YAW] += motion * 0.022 * along * (1 - max(way["stance"], way["attend"], way["ponder"]))
        # The eyes stay on the viewer while the head turns.
        x -= self._gaze * 2.0 * float(head[YAW])
        y -= self._gaze * 2.0 * float(head[PITCH])
        x, y = x + apart * aside_x, y + apart * aside_y
        if ponder > 0:
            head[YAW] += motion * ponder * 0.026 * life.side
            head[PITCH] -= motion * ponder * 0.014
            head[ROLL] += motion * ponder * 0.026 * life.side
            head[BROW] += ponder * 0.22
        if muse > 0:
            far_x, far_y = life.pondered(clock)
            x, y = x + muse * far_x, y + muse * far_y
        return x, y

    def _moved(self, clock: int, level: float) -> _State:
        """The state of this picture, from the one before."""
        was, fps = self._state, self._fps
        quiet = 0 if level > _LOUD else was.quiet + 1
        new = replace(was, ramps=dict(was.ramps), quiet=quiet)
        calm = was.calm + (level - was.calm) * (1 - math.exp(-1 / (_SLOW * fps)))
        new.calm = calm if calm > 4e-3 else 0.0
        quick = was.quick + (level - was.quick) * (1 - math.exp(-1 / (_QUICK * fps)))
        new.quick = quick if quick > 4e-3 else 0.0
        # A spring that is pushed down by what is louder than the sentence.
        stress = max(0.0, new.quick - 1.15 * new.calm) * min(1.0, 4 * new.calm)
        offset = was.beat - 0.060 * stress
        decay = math.exp(-_BEAT / fps)
        speed = (was.swing + _BEAT * offset) / fps
        new.beat = 0.060 * stress + (offset + speed) * decay
        new.swing = (was.swing - _BEAT * speed) * decay
        if stress == 0 and abs(new.beat) < 2e-5 and abs(new.swing) < 2e-4:
            new.beat = new.swing = 0.0
        talking = quiet < _PAUSE * fps
        new.spoken = was.spoken + 1 if talking else 0
        self._phrase(was, new, clock, talking)
        pose = next((name for begin, name in reversed(self._poses) if begin <= clock), "")
        while len(self._poses) > 1 and self._poses[1][0] < clock - KEPT:
            self._poses.pop(0)
        wanted = {
            "talk": talking,
            "stance": talking,
            "hark": pose in ("attentive", "listening"),
            "attend": pose in ("attentive", "listening"),
            "agree": pose == "listening",
            "muse": pose == "thinking" and not talking,
            "ponder": pose == "thinking" and not talking,
        }
        for name, on in wanted.items():
            before = was.ramps[name]
            new.ramps[name] = self._ramped(name, before, on)
            if name == "muse" and before <= 0 < new.ramps[name]:
                self._blink(clock, 0.8)  # eyes that go far, often shut on their way
        return new

    def _ramped(self, name: str, at: int, on: bool) -> int:
        """One picture on. Below 0 it waits; both ways are whole steps, so that ends are exact."""
        wait, into, out = (round(part * self._fps) for part in _RAMPS[name])
        into, out = max(1, into), max(1, out)
        if not on:
            return max(0, at - into)
        if at == 0 and wait:
            return -wait
        return at + 1 if at < -1 else min(into * out, max(0, at) + out)

    def _way(self, state: _State, name: str) -> float:
        _, into, out = (round(part * self._fps) for part in _RAMPS[name])
        return _ease(state.ramps[name] / (max(1, into) * max(1, out)))

    def _phrase(self, was: _State, new: _State, clock: int, talking: bool) -> None:
        """Where a phrase begins, the head takes another stance; where one ends, eyes may blink."""
        fps = self._fps
        if talking and was.quiet >= _PAUSE * fps:
            now = self._turned(was, clock) if was.ramps["stance"] else (0.0, 0.0, 0.0)
            new.turned, new.since = now, clock
            yaw, pitch, roll = (2 * chance(self._seed, 15, clock, i) - 1 for i in range(3))
            new.turns = (0.024 * yaw, 0.007 * pitch, 0.012 * roll)
        elif not talking and new.ramps["stance"] <= 0:
            new.turned = new.turns = (0.0, 0.0, 0.0)
            new.since = 0
        if was.spoken > 0.7 * fps and not talking:
            self._blink(clock, 0.8)

    def _turned(self, state: _State, clock: int) -> tuple[float, float, float]:
        share = _ease((clock - state.since) / (0.8 * self._fps))
        one, other = state.turned, state.turns
        return (
            one[0] + (other[0] - one[0]) * share,
            one[1] + (other[1] - one[1]) * share,
            one[2] + (other[2] - one[2]) * share,
        )

    def _blink(self, clock: int, likely: float) -> None:
        """A blink that something calls for, unless one is near."""
        if not self._blinking or self._motion == 0 or chance(self._seed, 16, clock) > likely:
            return
        near = range(clock - round(0.6 * self._fps), clock + round(0.7 * self._fps))
        if any(self.life.blink(one) for one in near if one >= 0):
            return
        self._blinks = [one for one in self._blinks if clock - one < KEPT + self._fps]
        if all(clock - one > self._fps for one in self._blinks):
            self._blinks.append(clock)
