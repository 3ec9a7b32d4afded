"""A LiveKit agent's speech as it comes over the wire: the receiving end of the avatar protocol.

The agent opens one byte stream a segment (topic `lk.audio_stream`, int16 PCM, faster than real
time), asks to be silent by RPC (`lk.clear_buffer`), and waits to be told what was played
(`lk.playback_started`, `lk.playback_finished`). What it counts on, and what is kept here:

- exactly one `playback_finished` for every segment, in order, with the seconds really heard, also
  for one without sound, one cleared before its first sample, one whose end got lost on the way;
- a clear is answered at once and always, even when it overtakes the segment it is meant for;
- an agent that comes back, under its own or another identity, is listened to again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from livekit import rtc

from .errors import InputError, VoipAvatarError
from .media import Int16
from .waiting import within

logger = logging.getLogger(__name__)

AUDIO_TOPIC = "lk.audio_stream"
CLEAR_BUFFER = "lk.clear_buffer"
PLAYBACK_STARTED = "lk.playback_started"
PLAYBACK_FINISHED = "lk.playback_finished"
PERSONA = "voipavatar.persona"
"""Beyond the protocol: become another persona on air; the payload is its name."""
LEAVE = "voipavatar.leave"
"""Beyond the protocol: leave the room by yourself; "ok" once it is about to. A message on the topic
of that name asks for the same, where it comes from the server: of an agent that is gone already."""
GESTURE = "voipavatar.gesture"
"""Beyond the protocol: make a gesture; the payload is its name."""
SEGMENT = "voipavatar.segment"
"""Beyond the protocol: an attribute of a stream: a name that comes back, as `segment`, in what is
told of it. LiveKit's own agents ask for none, and would not bear one."""
POSE = "voipavatar.pose"
"""Beyond the protocol: an attribute of the agent: the pose that it wants while it is silent."""
AGENT_STATE = "lk.agent.state"
"""LiveKit's own attribute, which stands in where the agent sets no pose."""
_POSES = {"listening": "attentive", "thinking": "thinking"}
ALIVE = "voipavatar.alive"
"""Beyond the protocol: answers "ok" for as long as the avatar's loop runs."""
DISPATCH = "voipavatar.dispatch"
"""Beyond the protocol: a topic on which workers tell who asked for an avatar what became of it, as
JSON: `request` as in the dispatch, `state` (taken, refused or failed) and `reason`."""
ON_BEHALF = "lk.publish_on_behalf"
NOISE = ("lk.transcription", "lk.agent.events", "lk.agent.session", "lk.chat")
"""Topics of streams that are sent to everybody; an avatar takes note of none of them."""

IDLE = 10.0
"""Seconds without a chunk, all of it played, after which a segment's end counts as lost."""
TRIES = 3
RETRY = 0.1
NOTICES = 256
"""Reports that may wait for an agent; the oldest go first."""
ANSWERED = 12.0
"""Seconds after which a report counts as lost; of its own accord the call gives up before."""
PATIENCE = 10.0
"""Seconds that a report waits for a connection that is away."""


class Played(Protocol):
    """How a turn ended."""

    @property
    def heard(self) -> float: ...
    @property
    def interrupted(self) -> bool: ...


class Turn(Protocol):
    """One utterance being spoken: what `Session.open_turn` gives."""

    @property
    def started(self) -> asyncio.Future[float | None]: ...
    @property
    def finished(self) -> asyncio.Future[Any]:
        """Resolves to a `Played`."""

    @property
    def heard(self) -> float:
        """Seconds of it that have left by now, at most."""

    @property
    def backlog(self) -> float:
        """Seconds that were pushed and not shown yet."""

    def push(self, pcm: Int16, rate: int) -> None: ...
    def end(self) -> None: ...
    def cancel(self) -> None: ...


class Pcm:
    """Bytes off a wire, cut anywhere, as int16 mono."""

    def __init__(self, channels: int) -> None:
        if not 1 <= channels <= 8:
            raise InputError(f"sound with {channels} channels can't be used: send 1 or 2")
        self._channels = channels
        self._rest = b""

    def push(self, data: bytes) -> Int16:
        """The samples that are whole now; several channels are averaged."""
        data = self._rest + data
        whole = len(data) - len(data) % (2 * self._channels)
        self._rest = data[whole:]
        samples = np.frombuffer(data[:whole], np.int16)
        if self._channels == 1:
            return samples
        summed = samples.reshape(-1, self._channels).astype(np.int32).sum(axis=1)
        mean: Int16 = (summed // self._channels).astype(np.int16)
        return mean


@dataclass(eq=False)
class _Segment:
    """One byte stream and the turn it became."""

    sender: str
    reader: rtc.ByteStreamReader
    turn: Turn
    superseded: asyncio.Event
    """No more of it will come, or it isn't wanted."""
    name: str = ""
    """What the agent calls it in reports; empty for one that doesn't ask for that."""
    cleared: bool = False
    result: tuple[float, bool] | None = None
    """Seconds heard, interrupted: once it is over."""


@dataclass(eq=False)
class _Notice:
    """One report to an agent; `done` when it was answered or given up."""

    to: str
    method: str
    payload: str
    made: float
    done: asyncio.Event


class AgentStream:
    """Listens in the avatar's own room, as a guest of its sink, and speaks through `open_turn`.

    `agent` is the identity to listen to; without it the first agent that sends is taken. Another
    agent that sends to this avatar takes its place once the present one is not speaking: so an
    agent that was started anew is heard although its predecessor is still listed. People, and
    other avatars, never are. `on_agent` hears of every such change.
    """

    subscribes = True
    """Not to hear anybody: whoever may not subscribe isn't told either who is in the room."""

    def __init__(
        self,
        open_turn: Callable[[], Turn] | None = None,
        agent: str = "",
        on_agent: Callable[[str], None] | None = None,
        on_persona: Callable[[str], Awaitable[None]] | None = None,
        on_leave: Callable[[], Awaitable[None]] | None = None,
        on_pose: Callable[[str], None] | None = None,
        on_gesture: Callable[[str], None] | None = None,
        idle: float = IDLE,
    ) -> None:
        self.agent = agent
        self.open_turn = open_turn
        self.segments = 0
        """Segments that were opened."""
        self.lost_ends = 0
        """Segments whose end had to be assumed."""
        self.dropped = 0
        """Segments cut short since too much waited, or refused."""
        self._on_agent = on_agent
        self._on_persona = on_persona
        self._on_leave = on_leave
        self._on_pose = on_pose
        self._on_gesture = on_gesture
        self._pose = ""
        self._idle = idle
        self._room: rtc.Room | None = None
        self._gone: set[str] = set()  # who was here and left
        self._live: deque[_Segment] = deque()
        self._unanswered: dict[str, _Notice] = {}
        """Reports that stood in for a segment which had not come yet, by agent."""
        self._pending: dict[str, int] = {}  # reports of ends that were not answered, by agent
        self._notices: dict[str, deque[_Notice]] = {}  # by agent: one may be slow, or dead
        self._reporters: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: asyncio.Task[None] | None = None
        self._closed = False
        self._mute = False  # nothing is told any more

    # -- the guest ---------------------------------------------------------------------------------

    def entering(self, room: rtc.Room) -> None:
        room.register_byte_stream_handler(AUDIO_TOPIC, self._opened)
        room.on("participant_disconnected", self._left)
        room.on("participant_connected", self._came)
        room.on("participant_attributes_changed", self._changed)
        room.on("data_received", self._sent_away)
        self._gone.clear()
        disregard(room)

    def entered(self, room: rtc.Room) -> None:
        self._room = room
        room.local_participant.register_rpc_method(CLEAR_BUFFER, self._clear)
        room.local_participant.register_rpc_method(ALIVE, lambda call: "ok")
        if self._on_persona is not None:
            room.local_participant.register_rpc_method(PERSONA, self._persona)
        if self._on_leave is not None:
            room.local_participant.register_rpc_method(LEAVE, self._leave)
        if self._on_gesture is not None:
            room.local_participant.register_rpc_method(GESTURE, self._gesture)
        self._posed()

    def left(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            # The native library's room and its methods hold each other: what is not taken back
            # keeps the whole connection in memory, half a megabyte each.
            for method in (CLEAR_BUFFER, ALIVE, PERSONA, LEAVE, GESTURE):
                room.local_participant.unregister_rpc_method(method)

    async def aclose(self) -> None:
        """Stop listening: what is being said ends here, and that is still reported. Idempotent."""
        self._closed = True
        for segment in list(self._live):
            segment.superseded.set()
            segment.turn.cancel()
        await asyncio.sleep(0)  # the turns' callbacks file their reports
        deadline = time.monotonic() + 1.0
        while self._notices and self._room is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self._mute = True
        tasks = [*self._tasks, *self._reporters.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- who is listened to ------------------------------------------------------------------------

    def _accepts(self, identity: str) -> bool | None:
        """Whether `identity` is the agent, or becomes it now; None while nobody knows it yet."""
        if self.open_turn is None:
            return None  # the stage is not up yet
        if identity == self.agent:
            return True
        if (agent := self._is_agent(identity)) is not True:
            return agent
        if any(one.sender == self.agent for one in self._live) and self.agent not in self._gone:
            return None  # one at a time: the present one is heard out
        again = bool(self.agent)
        self.agent = identity
        if again:
            logger.info("another agent took over")
        if self._on_agent is not None:
            self._on_agent(identity)
        self._posed()
        return True

    def _is_agent(self, identity: str) -> bool | None:
        """Whether it is one, and no avatar; None while nobody knows it."""
        room = self._room
        someone = room.remote_participants.get(identity) if room is not None else None
        if someone is None:
            return None
        return (
            someone.kind == rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
            and ON_BEHALF not in someone.attributes
        )

    async def _introduced(self, identity: str) -> bool:
        """Whether `identity` is the agent, once the server has said who it is."""
        end = time.monotonic() + PATIENCE
        while (accepted := self._accepts(identity)) is None and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return bool(accepted)

    # -- speech in ---------------------------------------------------------------------------------

    def _opened(self, reader: rtc.ByteStreamReader, identity: str) -> None:
        accepted = self._accepts(identity)
        if accepted is None and not self._closed:
            self._spawn(self._opened_early(reader, identity))
            return
        self._admit(reader, identity, accepted is True)

    async def _opened_early(self, reader: rtc.ByteStreamReader, identity: str) -> None:
        """A stream may come before the server tells who sent it."""
        self._admit(reader, identity, await self._introduced(identity))

    def _admit(self, reader: rtc.ByteStreamReader, identity: str, accepted: bool) -> None:
        name = (reader.info.attributes or {}).get(SEGMENT, "")
        if self._closed or self.open_turn is None or not accepted:
            logger.warning("a sound stream was refused: its sender is not the agent")
            reader.close()
            if not self._closed and self._is_agent(identity):  # and must not wait for its end
                self._finished(identity, 0.0, interrupted=True, name=name)
            return
        answered = self._unanswered.pop(identity, None)
        if answered is not None and not answered.done.is_set():
            # A clear overtook this very stream, and was answered for it.
            reader.close()
            return
        for other in self._live:
            if other.sender == identity:
                other.superseded.set()  # one at a time: the end of the one before got lost
        try:
            turn = self.open_turn()
        except Exception as error:  # the session is closing: the agent must not wait for it
            logger.info("a segment was refused", extra={"error": type(error).__name__})
            self.dropped += 1
            reader.close()
            self._finished(identity, 0.0, interrupted=True, name=name)
            return
        self.segments += 1
        segment = _Segment(identity, reader, turn, asyncio.Event(), name)
        self._live.append(segment)
        turn.started.add_done_callback(lambda future: self._on_started(segment, future))
        turn.finished.add_done_callback(lambda future: self._on_finished(segment, future))
        self._spawn(self._read(segment))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="agent-stream")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, segment: _Segment) -> None:
        turn = segment.turn
        try:
            attributes = segment.reader.info.attributes or {}
            rate = int(attributes.get("sample_rate", "0"))
            pcm = Pcm(int(attributes.get("num_channels", "1")))
            async for data in self._chunks(segment):
                turn.push(pcm.push(data), rate)
        except (InputError, ValueError) as error:
            self.dropped += 1
            logger.warning(
                "a segment was cut short",
                extra={"error": type(error).__name__, "lk.pii.error": str(error)},
            )
        except rtc.StreamError:
            self.lost_ends += 1
            logger.info("a segment's stream broke off")
        finally:
            segment.reader.close()
            turn.end()

    async def _chunks(self, segment: _Segment) -> AsyncGenerator[bytes, None]:
        """The stream's chunks, until its end, or until that has to be assumed."""
        over = asyncio.ensure_future(segment.superseded.wait())
        chunk: asyncio.Future[bytes] | None = None
        quiet, behind = time.monotonic(), 0.0
        try:
            while not segment.cleared:
                if chunk is None:
                    chunk = asyncio.ensure_future(segment.reader.__anext__())
                # A chunk that is there already is wanted, whoever else is waiting.
                patience = 0.05 if over.done() else min(1.0, self._idle)
                waiting: set[asyncio.Future[Any]] = {chunk} if over.done() else {chunk, over}
                await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                behind, before = segment.turn.backlog, behind
                if chunk.done():
                    try:
                        data = chunk.result()
                    except StopAsyncIteration:
                        return
                    chunk, quiet = None, time.monotonic()
                    if not segment.cleared:
                        yield data
                elif over.done() and time.monotonic() - quiet > 0.05:
                    break
                elif behind < before:  # it is being said: that takes its time
                    quiet = time.monotonic()
                elif time.monotonic() - quiet > self._idle:
                    break
            if not segment.cleared and not segment.turn.finished.done():
                self.lost_ends += 1
                logger.info("a segment's end was lost")
        finally:
            rest = [one for one in (chunk, over) if one is not None]
            for one in rest:
                one.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    async def _persona(self, call: rtc.RpcInvocationData) -> str:
        """The agent wants another face."""
        if call.caller_identity != self.agent and not await self._introduced(call.caller_identity):
            raise rtc.RpcError(1403, "only the agent may change the persona")
        assert self._on_persona is not None
        try:
            await self._on_persona(call.payload)
        except VoipAvatarError as error:
            raise rtc.RpcError(1422, str(error)[:250]) from None
        return "ok"

    async def _leave(self, call: rtc.RpcInvocationData) -> str:
        """The agent has no more use for this avatar."""
        if call.caller_identity != self.agent and not await self._introduced(call.caller_identity):
            raise rtc.RpcError(1403, "only the agent may send the avatar away")
        self._go()
        return "ok"

    def _sent_away(self, packet: rtc.DataPacket) -> None:
        # Only a server's own key can send without being a participant.
        if packet.topic == LEAVE and packet.participant is None and not self._closed:
            self._go()

    def _go(self) -> None:
        if self._leaving is None or self._leaving.done():
            self._leaving = asyncio.create_task(self._left_by_itself(), name="agent-leave")

    async def _left_by_itself(self) -> None:
        await asyncio.sleep(0.05)  # for the answer to get away
        if self._on_leave is not None:
            await self._on_leave()

    async def _gesture(self, call: rtc.RpcInvocationData) -> str:
        """The agent wants a nod, say."""
        if call.caller_identity != self.agent and not await self._introduced(call.caller_identity):
            raise rtc.RpcError(1403, "only the agent may ask for gestures")
        assert self._on_gesture is not None
        try:
            self._on_gesture(call.payload)
        except VoipAvatarError as error:
            raise rtc.RpcError(1422, str(error)[:250]) from None
        return "ok"

    def _changed(self, changed: dict[str, str], participant: rtc.Participant) -> None:
        if participant.identity == self.agent:
            self._posed()

    def _posed(self) -> None:
        """Hold the face as the agent's attributes say."""
        room = self._room
        agent = room.remote_participants.get(self.agent) if room is not None else None
        if agent is None or self._on_pose is None or self.open_turn is None:
            return
        said = agent.attributes
        pose = said.get(POSE, _POSES.get(said.get(AGENT_STATE, ""), ""))
        if pose == self._pose:
            return
        self._pose = pose
        try:
            self._on_pose(pose)
        except VoipAvatarError as error:  # a newer agent may know poses that this avatar doesn't
            logger.info("a pose was not taken", extra={"lk.pii.error": str(error)})

    async def _clear(self, call: rtc.RpcInvocationData) -> str:
        """Silence, now. Everything of this agent that is not over gets its report."""
        identity = call.caller_identity
        if identity != self.agent and not await self._introduced(identity):
            logger.warning("a clear was refused: its sender is not the agent")
            return "reject"
        mine = [segment for segment in self._live if segment.sender == identity]
        for segment in reversed(mine):  # what waits first, so that none of it starts
            segment.cleared = True
            segment.superseded.set()
            segment.turn.cancel()
        if not mine and not self._pending.get(identity):
            # The clear is ahead of its segment, which perhaps never comes.
            self._unanswered[identity] = self._finished(identity, 0.0, interrupted=True)
        return "ok"

    # -- reports back ------------------------------------------------------------------------------

    def _on_started(self, segment: _Segment, future: asyncio.Future[float | None]) -> None:
        if not future.cancelled() and future.result() is not None:
            payload = json.dumps({"segment": segment.name}) if segment.name else ""
            self._file(segment.sender, PLAYBACK_STARTED, payload)

    def _on_finished(self, segment: _Segment, future: asyncio.Future[Played]) -> None:
        segment.superseded.set()
        played = None if future.cancelled() else future.result()
        segment.result = (played.heard, played.interrupted) if played is not None else (0.0, True)
        while self._live and (result := self._live[0].result) is not None:
            first = self._live.popleft()  # in the order they came
            self._finished(first.sender, *result, name=first.name)

    def _finished(self, to: str, heard: float, interrupted: bool, name: str = "") -> _Notice:
        self._pending[to] = self._pending.get(to, 0) + 1
        payload = {
            "playback_position": heard,
            "interrupted": interrupted,
            "synchronized_transcript": None,
            **({"segment": name} if name else {}),
        }
        return self._file(to, PLAYBACK_FINISHED, json.dumps(payload))

    def _file(self, to: str, method: str, payload: str) -> _Notice:
        notice = _Notice(to, method, payload, time.monotonic(), asyncio.Event())
        if self._mute:
            notice.done.set()
            return notice
        waiting = self._notices.setdefault(to, deque())
        waiting.append(notice)
        if len(waiting) > NOTICES:
            self._done(waiting.popleft())
        if to not in self._reporters:
            self._reporters[to] = asyncio.create_task(self._report(to), name="agent-report")
        return notice

    def _done(self, notice: _Notice) -> None:
        notice.done.set()
        if notice.method == PLAYBACK_FINISHED:
            self._pending[notice.to] -= 1
            if not self._pending[notice.to]:
                del self._pending[notice.to]
        if self._unanswered.get(notice.to) is notice:
            del self._unanswered[notice.to]

    async def _report(self, to: str) -> None:
        """Send an agent's reports, one after the other, until there are no more."""
        waiting = self._notices[to]
        try:
            while waiting:
                notice = waiting[0]
                try:
                    await self._send(notice)
                finally:
                    if waiting and waiting[0] is notice:
                        waiting.popleft()
                        self._done(notice)
        finally:
            del self._notices[to], self._reporters[to]

    async def _send(self, notice: _Notice) -> None:
        end = notice.made + PATIENCE
        for attempt in range(TRIES):
            if attempt:
                await asyncio.sleep(RETRY * attempt)
            room = self._room
            while room is None or (attempt and notice.to not in room.remote_participants):
                if time.monotonic() > end or notice.to in self._gone:
                    return  # who would hear it is gone
                await asyncio.sleep(0.02)
                room = self._room
            if notice.to in self._gone:
                return
            try:
                call = room.local_participant.perform_rpc(
                    destination_identity=notice.to,
                    method=notice.method,
                    payload=notice.payload,
                    response_timeout=3.0,
                )
                await within(call, ANSWERED)
                return
            except asyncio.TimeoutError:
                logger.info("a report was not answered")
            except rtc.RpcError as error:
                if error.code == rtc.RpcError.ErrorCode.RESPONSE_TIMEOUT:
                    return  # it was acknowledged: it is there, and must not be told twice
                if error.code == rtc.RpcError.ErrorCode.UNSUPPORTED_METHOD and (
                    notice.method == PLAYBACK_STARTED
                ):
                    return  # an agent need not ask for it
                logger.info("a report was not taken", extra={"code": int(error.code)})
        logger.warning("a report could not be delivered", extra={"method": notice.method})

    def _left(self, participant: rtc.RemoteParticipant) -> None:
        self._gone.add(participant.identity)
        for segment in self._live:
            if segment.sender == participant.identity:
                segment.superseded.set()  # nothing more comes; what was sent is said

    def _came(self, participant: rtc.RemoteParticipant) -> None:
        self._gone.discard(participant.identity)
        self._posed()


def disregard(room: rtc.Room) -> None:
    """What is not for an avatar must be let go of all the same."""

    def ignore(reader: Any, identity: str) -> None:
        reader.close()

    for topic in NOISE:
        room.register_text_stream_handler(topic, ignore)
        room.register_byte_stream_handler(topic, ignore)


class Mute:
    """A guest that neither hears nor answers: of an avatar whose agent is in the same process."""

    subscribes = False

    def entering(self, room: rtc.Room) -> None:
        disregard(room)

    def entered(self, room: rtc.Room) -> None: ...

    def left(self) -> None: ...
