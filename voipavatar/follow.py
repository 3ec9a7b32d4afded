"""A face for a voice without an agent: the avatar says what a participant's audio track says.

The track is cut into turns by its loudness, so that the avatar idles while the other is silent.
Nothing is held back but what the engine has to look ahead.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import numpy as np
from livekit import rtc

from .agentstream import Turn
from .errors import InputError
from .media import Int16

logger = logging.getLogger(__name__)

RATE = 48_000
FRAME = 0.02
"""Seconds of sound that are judged together."""

Cut: TypeAlias = tuple[Literal["begin", "sound", "end"], Int16]


class Gate:
    """Tells speech from silence by loudness above the room's own noise. Pure; frames of `FRAME`.

    Speech begins with two loud frames in a row, and `before` seconds ahead of them belong to it;
    it ends after `after` seconds of quiet.
    """

    FLOOR = 0.003
    """RMS, of full scale, below which nothing counts as speech."""
    ABOVE = 3.0
    """Times the noise that speech is at least (about 10 dB)."""

    def __init__(self, before: float = 0.1, after: float = 0.6) -> None:
        self.speaking = False
        self._noise = self.FLOOR / self.ABOVE
        self._before: deque[Int16] = deque(maxlen=max(1, round(before / FRAME)))
        self._after = round(after / FRAME)
        self._loud = 0
        self._quiet = 0

    def push(self, pcm: Int16) -> Iterator[Cut]:
        """One frame, int16 mono; what becomes of it."""
        level = float(np.sqrt(np.mean((pcm.astype(np.float32) / 32768) ** 2))) if len(pcm) else 0.0
        loud = level > max(self.FLOOR, self.ABOVE * self._noise)
        if not loud:
            self._noise += 0.05 * (min(level, 0.05) - self._noise)
        self._loud = self._loud + 1 if loud else 0
        self._quiet = 0 if loud else self._quiet + 1
        if self.speaking:
            yield "sound", pcm
            if self._quiet >= self._after:
                self.speaking = False
                yield "end", pcm[:0]
            return
        self._before.append(pcm)
        if self._loud >= 2:
            self.speaking = True
            yield "begin", np.concatenate(list(self._before))
            self._before.clear()


class Follow:
    """Listens to `identity` in the avatar's room, as a guest of its sink."""

    subscribes = True

    def __init__(self, identity: str, open_turn: Callable[[], Turn] | None = None) -> None:
        self.identity = identity
        self.open_turn = open_turn
        self.turns = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._room: rtc.Room | None = None

    def entering(self, room: rtc.Room) -> None:
        room.on("track_published", self._published)
        room.on("track_subscribed", self._subscribed)

    def entered(self, room: rtc.Room) -> None:
        self._room = room
        someone = room.remote_participants.get(self.identity)
        for publication in someone.track_publications.values() if someone is not None else ():
            self._want(publication)

    def left(self) -> None:
        self._room = None
        for task in self._tasks:
            task.cancel()

    async def aclose(self) -> None:
        """Stop listening; what was begun is ended. Idempotent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _published(
        self, publication: rtc.RemoteTrackPublication, participant: rtc.RemoteParticipant
    ) -> None:
        if participant.identity == self.identity:
            self._want(publication)

    def _want(self, publication: rtc.RemoteTrackPublication) -> None:
        if publication.kind == rtc.TrackKind.KIND_AUDIO:
            publication.set_subscribed(True)

    def _subscribed(
        self,
        track: rtc.Track,
        publication: rtc.RemoteTrackPublication,
        participant: rtc.RemoteParticipant,
    ) -> None:
        if participant.identity != self.identity or track.kind != rtc.TrackKind.KIND_AUDIO:
            return
        task = asyncio.get_running_loop().create_task(self._listen(track), name="follow-listen")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, track: rtc.Track) -> None:
        stream = rtc.AudioStream.from_track(
            track=track,
            sample_rate=RATE,
            num_channels=1,
            frame_size_ms=round(FRAME * 1000),
            capacity=100,
        )
        gate = Gate()
        turn: Turn | None = None
        try:
            async for event in stream:
                pcm = np.frombuffer(event.frame.data, np.int16).copy()
                for kind, sound in gate.push(pcm):
                    if kind == "begin" and self.open_turn is not None:
                        turn = self.open_turn()
                        self.turns += 1
                    if turn is None:
                        continue
                    if kind == "end":
                        turn.end()
                        turn = None
                    else:
                        turn.push(sound, RATE)
        except InputError as error:
            logger.warning("sound could not be followed", extra={"error": str(error)})
        finally:
            if turn is not None:
                turn.end()
            await stream.aclose()
