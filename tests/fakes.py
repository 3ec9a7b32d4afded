"""A studio without engine, room or voice: sessions that keep time and tell events as real ones do.

For tests of what stands in front of a session. A text takes `word` seconds a word, a sound takes
as long as it is. Turns queue, interrupt and replace; every turn finishes once.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import av

from voipavatar.config import Persona, VoiceChoice
from voipavatar.errors import CapacityError, InputError, StageError
from voipavatar.media import POSES, Cue, Int16, Mode
from voipavatar.room import RoomOptions


@dataclass(frozen=True)
class Played:
    """How a turn ended."""

    heard: float
    interrupted: bool


class FakeUtterance:
    """One turn. `words` are its captions; `length` is seconds, known once it is complete."""

    def __init__(self, turn: int, words: Sequence[str], word: float) -> None:
        loop = asyncio.get_running_loop()
        self.id = f"u{turn}"
        self.turn = turn
        self.words = list(words)
        self.word = word
        self.length = len(self.words) * word
        self.pushed: list[Int16] = []
        self.cues: list[Cue] = []
        self.rate = 0
        self.began: float | None = None
        self.complete = asyncio.Event()
        self.cancelled: asyncio.Future[None] = loop.create_future()
        self.error: str | None = None
        self.started: asyncio.Future[float | None] = loop.create_future()
        self.finished: asyncio.Future[Played] = loop.create_future()

    def push(self, pcm: Int16, rate: int, cues: Sequence[Cue] = ()) -> None:
        self.pushed.append(pcm)
        self.cues.extend(cues)
        self.rate = rate
        self.length += len(pcm) / rate

    def end(self) -> None:
        self.complete.set()

    def cancel(self) -> None:
        if not self.cancelled.done():
            self.cancelled.set_result(None)
        self.complete.set()

    async def room(self, seconds: float = 15.0) -> None:
        while not self.finished.done():
            heard = time.monotonic() - self.began if self.began is not None else 0.0
            if self.length - heard <= seconds:
                return
            await asyncio.sleep(0.01)


@dataclass(eq=False)
class _Subscriber:
    queue: asyncio.Queue[dict[str, Any]] = field(default_factory=lambda: asyncio.Queue(256))


class FakeSession:
    """Says one turn after the other, in a task of its own."""

    def __init__(
        self,
        id: str,
        persona: Persona,
        room: RoomOptions | None,
        voice: list[VoiceChoice],
        word: float,
        closed: Callable[[str], None],
    ) -> None:
        self.id = id
        self.persona = persona
        self.idle = "default"
        self.room = room
        self.voice = voice
        self.state = "idle"
        self.said: list[tuple[str, Mode, list[VoiceChoice] | None]] = []
        self.played: list[bytes] = []
        self.posed: list[str] = []
        self.turns: list[FakeUtterance] = []
        self.closed: float | None = None
        self.word = word
        self._closed = closed
        self._queue: deque[FakeUtterance] = deque()
        self._now: FakeUtterance | None = None
        self._more = asyncio.Event()
        self._subscribers: set[_Subscriber] = set()
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"fake-{id}")

    async def say(
        self, text: str, *, mode: Mode = "append", voice: Sequence[VoiceChoice] | None = None
    ) -> FakeUtterance:
        self._check()
        if text == "unspeakable":
            raise InputError("the voice has no sound for this text")
        self.said.append((text, mode, None if voice is None else list(voice)))
        utterance = self._new(text.split())
        utterance.end()
        self._add(utterance, mode)
        return utterance

    async def play(self, sound: bytes, *, mode: Mode = "append") -> FakeUtterance:
        self._check()
        self.played.append(sound)
        utterance = self._new([])
        with av.open(io.BytesIO(sound)) as file:
            for frame in file.decode(audio=0):
                utterance.length += frame.samples / frame.sample_rate
        utterance.end()
        self._add(utterance, mode)
        return utterance

    def open_turn(self, mode: Mode = "append") -> FakeUtterance:
        self._check()
        utterance = self._new([])
        self._add(utterance, mode)
        return utterance

    async def interrupt(self) -> int:
        self._check()
        count = len(self._queue) + (self._now is not None)
        self._drop(queued=True)
        return count

    def pose(self, name: str) -> None:
        if name not in POSES:
            raise InputError(f"there is no pose {name!r}")
        self.posed.append(name)

    def gesture(self, name: str) -> None:
        if name != "nod":
            raise InputError(f"there is no gesture {name!r}")
        self.posed.append(name)

    async def swap_persona(self, persona: Persona | str) -> None:
        assert isinstance(persona, Persona)
        self.persona = persona

    async def choose_idle(self, name: str) -> None:
        self.persona.look(name)
        self.idle = name

    def status(self) -> dict[str, Any]:
        return {"state": self.state, "queue": len(self._queue), "counters": {"frames": 0}}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        me = _Subscriber()
        self._subscribers.add(me)
        try:
            yield {"type": "state", "session": self.id, "at": time.time(), "state": self.state}
            while True:
                event = await me.queue.get()
                yield event
                if event["type"] == "closed":
                    return
        finally:
            self._subscribers.discard(me)

    @property
    def subscribers(self) -> int:
        return len(self._subscribers)

    async def aclose(self, drain: float = 0) -> None:
        if self.closed is not None:
            return
        self.closed = drain
        deadline = time.monotonic() + drain
        while (self._now or self._queue) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._drop(queued=True)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._tell("closed")
        self._closed(self.id)

    def _check(self) -> None:
        if self.closed is not None:
            raise StageError("the session is closed")

    def _new(self, words: Sequence[str]) -> FakeUtterance:
        utterance = FakeUtterance(len(self.turns) + 1, words, self.word)
        self.turns.append(utterance)
        return utterance

    def _add(self, utterance: FakeUtterance, mode: Mode) -> None:
        if mode != "append":
            self._drop(queued=mode == "replace")
        if mode == "interrupt":
            self._queue.appendleft(utterance)
        else:
            self._queue.append(utterance)
        self._more.set()

    def _drop(self, *, queued: bool) -> None:
        if self._now is not None:
            self._now.cancel()
        while queued and self._queue:
            utterance = self._queue.popleft()
            utterance.started.set_result(None)
            self._finish(utterance, 0.0, True)

    def _tell(self, type: str, **more: Any) -> None:
        for one in self._subscribers:
            if not one.queue.full():
                one.queue.put_nowait({"type": type, "session": self.id, "at": time.time(), **more})

    def _move(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self._tell("state", state=state)

    async def _run(self) -> None:
        while True:
            while not self._queue:
                self._move("idle")
                self._more.clear()
                await self._more.wait()
            self._now = self._queue.popleft()
            try:
                await self._speak(self._now)
            finally:
                self._now = None

    async def _speak(self, turn: FakeUtterance) -> None:
        self._move("processing")
        await self._pause(turn, 0.15)
        self._move("talking")
        began = turn.began = time.monotonic()
        turn.started.set_result(time.time())
        self._tell("started", utterance=turn.id, text=" ".join(turn.words))
        for index, word in enumerate(turn.words):
            if turn.cancelled.done():
                break
            start = index * self.word
            self._tell("caption", utterance=turn.id, text=word, start=start, end=start + self.word)
            await self._pause(turn, self.word)
        while not turn.cancelled.done():
            left = turn.length - (time.monotonic() - began)
            if left <= 0 and turn.complete.is_set():
                break
            await self._pause(turn, min(0.05, max(left, 0.01)))
        heard = min(time.monotonic() - began, turn.length)
        self._move("transitioning")
        self._finish(turn, heard, turn.cancelled.done())

    async def _pause(self, turn: FakeUtterance, seconds: float) -> None:
        await asyncio.wait([turn.cancelled], timeout=seconds)

    def _finish(self, turn: FakeUtterance, heard: float, interrupted: bool) -> None:
        turn.finished.set_result(Played(heard=heard, interrupted=interrupted))
        self._tell("finished", utterance=turn.id, heard=heard, interrupted=interrupted)


class FakeStudio:
    """Opens fake sessions; as full as `capacity` says."""

    def __init__(self, word: float = 0.02, capacity: int = 100) -> None:
        self.sessions: dict[str, FakeSession] = {}
        self.opened: list[FakeSession] = []
        self.on_open: list[Any] = []
        self.queues: list[Any] = []
        self.word = word
        self.capacity = capacity

    async def open(
        self,
        persona: Persona,
        *,
        room: RoomOptions | None = None,
        voice: Sequence[VoiceChoice] | None = None,
        id: str | None = None,
    ) -> FakeSession:
        if len(self.sessions) >= self.capacity:
            raise CapacityError("the engine keeps up with no more: it has 3 % of its time left")
        session = FakeSession(
            id or f"s{len(self.opened)}",
            persona,
            room,
            list(voice or persona.voice),
            self.word,
            self._forget,
        )
        self.sessions[session.id] = session
        self.opened.append(session)
        return session

    def _forget(self, id: str) -> None:
        self.sessions.pop(id, None)

    async def aclose(self, drain: float = 0) -> None:
        for session in list(self.sessions.values()):
            await session.aclose(drain)
