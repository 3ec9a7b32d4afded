"""LiveKit's egress service as a way to broadcast: started, followed, and started again.

The service restreams the avatar's participant (no browser needed) or the whole room. By itself it
gives up after 30 s without a line, and ends when the avatar leaves; `EgressOutputs` listens (its
webhooks, and polling for those that get lost) and starts it again. States and events are those of
`targets`, so that whoever watches needn't know which way a broadcast goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from livekit import api

from .errors import ConfigError, TransportError
from .rtmp import StreamUrl
from .targets import MOVES, Backoff, Event, State
from .waiting import within

logger = logging.getLogger(__name__)

POLL = 2.0
"""Seconds between questions to the server; webhooks only make it faster."""
REQUEST_LIMIT = 15.0
"""Seconds for one request; starting waits for the service to take the job."""
MISSED = 3
"""Looks at the room in a row without the egress in it, after which it counts as dead."""
TRACKS_LIMIT = 30.0
"""Seconds for which we say nothing while the avatar's tracks aren't up."""
HEALTHY = 10.0
"""Seconds of life after which a failure is news and not a repetition."""
TRIES = 3
"""First starts that may fail before a broadcast that never ran is given up."""

ENDED = {
    api.EgressStatus.EGRESS_COMPLETE,
    api.EgressStatus.EGRESS_FAILED,
    api.EgressStatus.EGRESS_ABORTED,
    api.EgressStatus.EGRESS_LIMIT_REACHED,
}


@dataclass(frozen=True, slots=True)
class EgressPlan:
    """What the service is asked for. `room=True` is the whole room, composed in a browser."""

    room: bool = False
    layout: str = ""
    """Layout of the room composite: "", "grid", "speaker", or a template's own."""
    width: int = 1280
    height: int = 720
    fps: int = 30
    video_bitrate: int = 3_000_000
    audio_bitrate: int = 128_000
    sample_rate: int = 44_100

    def options(self) -> api.EncodingOptions:
        return api.EncodingOptions(
            width=self.width,
            height=self.height,
            framerate=self.fps,
            video_codec=api.VideoCodec.H264_MAIN,
            video_bitrate=self.video_bitrate // 1000,
            audio_codec=api.AudioCodec.AAC,
            audio_bitrate=self.audio_bitrate // 1000,
            audio_frequency=self.sample_rate,
            key_frame_interval=2.0,  # the service's own 4 s is more than YouTube and Twitch like
        )


class EgressTarget:
    """One address that the service sends to, as its watchers see it."""

    def __init__(self, id: str, url: StreamUrl, tell: Callable[[EgressTarget, str], None]) -> None:
        self.id, self.url = id, url
        self.state = State.CONNECTING
        self.reason = ""
        self.reconnects = 0
        self.wanted = True
        self.running = False
        """The service has been told about it."""
        self._tell = tell
        self._live_since: float | None = None
        self._was_live = False

    def become(self, state: State, reason: str = "") -> None:
        reason = self.url.scrub(reason)
        if state is self.state:
            self.reason = reason
            return
        if state not in MOVES[self.state]:
            return
        if state is State.LIVE:
            self.reconnects += self._was_live
            self._was_live, self._live_since = True, time.monotonic()
        elif state is not State.STALLED:
            self._live_since = None
        self.state, self.reason = state, reason
        self._tell(self, state.value)

    def status(self) -> Event:
        """Like `targets.Target.status`; the service doesn't tell bitrate and frames."""
        up = time.monotonic() - self._live_since if self._live_since is not None else 0.0
        return {
            "id": self.id,
            "via": "egress",
            "protocol": self.url.kind,
            "url": str(self.url),
            "state": self.state.value,
            "reason": self.reason,
            "uptime": round(up, 1),
            "bitrate": None,
            "fps": None,
            "dropped": None,
            "reconnects": self.reconnects,
            "latency": None,
        }


class EgressOutputs:
    """Keeps one egress of a room alive, for any number of addresses that come and go.

    `await open()`, `add`, `remove`, `await aclose()`. `on_event` is called on the same loop.
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        api_secret: str,
        room: str,
        identity: str,
        on_event: Callable[[Event], None],
        *,
        plan: EgressPlan | None = None,
        backoff: Backoff | None = None,
        persist: bool = False,
    ) -> None:
        self.targets: dict[str, EgressTarget] = {}
        self.egress_id = ""
        self.starts = 0
        """How often the service was started."""
        self._access = (url, api_key, api_secret)
        self._room, self._identity = room, identity
        self._on_event = on_event
        self._plan, self._persist = plan or EgressPlan(), persist
        self._backoff = backoff or Backoff()
        self._server: api.LiveKitAPI | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._news: asyncio.Queue[api.EgressInfo] = asyncio.Queue(maxsize=64)
        self._closing = False
        self._ever_live = False
        self._failures = 0

    # --- what others call -------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin; nothing is asked of the server until there is an address. Idempotent."""
        if self._task is None:
            timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT)
            url, key, secret = self._access
            url = re.sub(r"^ws", "http", url)
            # The library's own retries would only make its answers late.
            self._server = api.LiveKitAPI(url, key, secret, timeout=timeout, failover=False)
            self._task = asyncio.create_task(self._run(), name=f"egress-{self._room}")

    def add(self, url: StreamUrl, id: str) -> EgressTarget:
        """Send to `url` too. ConfigError for a file, or for an id that is taken."""
        if url.kind == "file":
            raise ConfigError("LiveKit's egress streams; record a file with a direct output")
        if id in self.targets:
            raise ConfigError(f"there is an output {id!r} already: choose another name")
        target = EgressTarget(id, url, self._tell)
        self.targets[id] = target
        self._tell(target, target.state.value)
        self._wake.set()
        return target

    async def remove(self, id: str) -> None:
        """Stop sending to one address; unknown ids are ignored."""
        target = self.targets.get(id)
        if target is None:
            return
        target.wanted = False
        self._wake.set()
        for _ in range(int(REQUEST_LIMIT / 0.05)):
            if not target.running or self._task is None or self._task.done():
                break
            await asyncio.sleep(0.05)
        target.become(State.ENDED, target.reason)
        self.targets.pop(id, None)

    def status(self) -> list[Event]:
        return [one.status() for one in self.targets.values()]

    def hear(self, info: api.EgressInfo) -> None:
        """News from a webhook (verified by `webhook`); others' news is ignored."""
        if info.egress_id == self.egress_id and not self._news.full():
            self._news.put_nowait(info)
            self._wake.set()

    async def aclose(self) -> None:
        """Stop the egress and let go. Idempotent, also before `open`."""
        self._closing = True
        self._wake.set()
        task, self._task = self._task, None
        if task is not None:
            done, _ = await asyncio.wait({task}, timeout=2 * REQUEST_LIMIT)
            if not done:
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        server, self._server = self._server, None
        if server is not None:
            await server.aclose()
        for target in list(self.targets.values()):
            target.become(State.ENDED, target.reason)
        self.targets.clear()

    # --- its life ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._closing:
            if not self._wanted():
                await self._nap(None)
                continue
            began = time.monotonic()
            try:
                await self._wait_for_tracks()
                if self._closing or not self._wanted():
                    continue
                info = await self._start()
                began = time.monotonic()
                info = await self._follow(info)
                if self._closing or not self._wanted():
                    continue
                reason, final = self._why(info), False
            except TransportError as error:
                reason, final = str(error), not error.retryable
            self._ended(reason, final, time.monotonic() - began)
            if self._wanted():
                await self._nap(self._backoff.next(0.0))

    def _ended(self, reason: str, final: bool, lived: float) -> None:
        """Tell what came of a run that ended though it should not."""
        if lived > HEALTHY and self._ever_live:
            self._failures = 0
            self._backoff.reset()
        self._failures += 1
        # "At the first attempt" is when the user is watching: say it, instead of trying for ever.
        final = final or (not self._ever_live and not self._persist and self._failures >= TRIES)
        for target in self._wanted():
            target.running = False
            if final and not self._ever_live:
                target.become(State.FAILED, reason)
                target.wanted = False
            else:
                target.become(State.RECONNECTING, reason)

    async def _start(self) -> api.EgressInfo:
        """Ask for an egress to all wanted addresses. TransportError in words."""
        assert self._server is not None
        wanted = self._wanted()
        output = api.StreamOutput(
            protocol=api.StreamProtocol.SRT
            if all(one.url.kind == "srt" for one in wanted)
            else api.StreamProtocol.RTMP,
            urls=[one.url.reveal() for one in wanted],
        )
        plan = self._plan
        async with self._asking(wanted):
            # Without redis a server takes 20 s to say "no response"; to this it says why, at once.
            await self._server.egress.list_egress(api.ListEgressRequest(active=True))
            if plan.room:
                info = await self._server.egress.start_room_composite_egress(
                    api.RoomCompositeEgressRequest(
                        room_name=self._room,
                        layout=plan.layout,
                        advanced=plan.options(),
                        stream_outputs=[output],
                    )
                )
            else:
                info = await self._server.egress.start_participant_egress(
                    api.ParticipantEgressRequest(
                        room_name=self._room,
                        identity=self._identity,
                        advanced=plan.options(),
                        stream_outputs=[output],
                    )
                )
        self.egress_id = info.egress_id
        self.starts += 1
        for target in wanted:
            target.running = True
        return info

    async def _follow(self, info: api.EgressInfo) -> api.EgressInfo:
        """Watch a running egress, and tell it of changes, until it has ended."""
        assert self._server is not None
        silent_since = time.monotonic()
        seen = False
        missed = 0
        while info.status not in ENDED:
            self._see(info)
            if self._closing or not self._wanted():
                return await self._stop(info)
            await self._change()
            await self._nap(POLL)
            if not self._news.empty():
                while not self._news.empty():
                    info = self._news.get_nowait()
                continue
            try:
                async with self._asking(()):
                    found = await self._server.egress.list_egress(
                        api.ListEgressRequest(egress_id=info.egress_id)
                    )
                    present = await self._server.room.list_participants(
                        api.ListParticipantsRequest(room=self._room)
                    )
            except TransportError as error:
                if not error.retryable or time.monotonic() - silent_since > 60:
                    raise
                logger.info("egress could not be asked", extra={"lk.pii.reason": str(error)})
                continue
            silent_since = time.monotonic()
            if not found.items:
                raise TransportError("the server has forgotten the egress: it was restarted")
            info = found.items[0]
            # A service that was killed stays "active" for ever; but it is in the room under the
            # egress' own name, and the server notices within 20 s that it has gone.
            there = any(one.identity == info.egress_id for one in present.participants)
            seen, missed = seen or there, 0 if there else missed + 1
            if seen and missed >= MISSED and info.status == api.EgressStatus.EGRESS_ACTIVE:
                await self._stop(info)
                raise TransportError("the egress service has gone without a word")
        self._see(info)
        return info

    async def _change(self) -> None:
        """Add and remove addresses while it runs."""
        assert self._server is not None
        added = [one for one in self._wanted() if not one.running]
        removed = [one for one in self.targets.values() if not one.wanted and one.running]
        for target in added + removed:
            request = api.UpdateStreamRequest(egress_id=self.egress_id)
            urls = request.add_output_urls if target.wanted else request.remove_output_urls
            urls.append(target.url.reveal())
            try:
                async with self._asking((target,)):
                    await self._server.egress.update_stream(request)
                target.running = target.wanted
            except TransportError as error:
                if target.wanted:
                    final = not error.retryable
                    target.become(State.FAILED if final else State.RECONNECTING, str(error))
                    target.wanted = not final
                else:
                    target.running = False

    async def _stop(self, info: api.EgressInfo) -> api.EgressInfo:
        assert self._server is not None
        with contextlib.suppress(TransportError):  # it may have ended by itself
            async with self._asking(()):
                info = await self._server.egress.stop_egress(
                    api.StopEgressRequest(egress_id=info.egress_id)
                )
        self.egress_id = ""
        for target in self.targets.values():
            target.running = False
        return info

    def _see(self, info: api.EgressInfo) -> None:
        """Take over what the service says about each address.

        It masks keys in its answers, so results and addresses meet by their order per server.
        """
        left = list(info.stream_results)
        for target in [one for one in self.targets.values() if one.running and one.wanted]:
            place = _place(target.url)
            result = next((one for one in left if _same(one.url, place)), None)
            if result is None:
                continue
            left.remove(result)
            if result.status == api.StreamInfo.Status.ACTIVE:
                if info.status == api.EgressStatus.EGRESS_ACTIVE:
                    self._ever_live = True
                    target.become(State.LIVE)
            elif result.status == api.StreamInfo.Status.FAILED:
                # The others go on; this one is asked for again at the next round.
                target.become(State.RECONNECTING, result.error or "the stream was cut")
                target.running = False

    async def _wait_for_tracks(self) -> None:
        """Until the avatar publishes picture and sound: an egress that starts before sees less."""
        assert self._server is not None
        since = time.monotonic()
        while not self._closing and self._wanted():
            tracks, reason = set(), "the avatar is not in the room (yet)"
            try:
                async with self._asking(()):
                    found = await self._server.room.get_participant(
                        api.RoomParticipantIdentity(room=self._room, identity=self._identity)
                    )
                tracks = {track.type for track in found.tracks}
            except TransportError as error:
                if not error.retryable and "not there" not in str(error):
                    raise
                reason = str(error)
            if {api.TrackType.AUDIO, api.TrackType.VIDEO} <= tracks:
                return
            if time.monotonic() - since > TRACKS_LIMIT:
                for target in self._wanted():
                    target.become(State.RECONNECTING, reason)
            await self._nap(1.0)

    def _why(self, info: api.EgressInfo) -> str:
        name = api.EgressStatus.Name(info.status).removeprefix("EGRESS_").lower().replace("_", " ")
        errors = [info.error, *(one.error for one in info.stream_results), info.details]
        said = next((one for one in errors if one), "")
        return f"the egress ended ({name})" + (f": {said[:200]}" if said else "")

    def _wanted(self) -> list[EgressTarget]:
        return [one for one in self.targets.values() if one.wanted]

    def _tell(self, target: EgressTarget, event: str) -> None:
        level = logging.ERROR if event == "failed" else logging.INFO
        logger.log(
            level,
            "an output changed its state",
            extra={"output": target.id, "url": str(target.url), "event": event},
        )
        self._on_event({"type": "output", "event": event, **target.status(), "at": time.time()})

    async def _nap(self, seconds: float | None) -> None:
        """Sleep until something changes, or for so long."""
        with contextlib.suppress(asyncio.TimeoutError):
            await within(self._wake.wait(), seconds)
        self._wake.clear()

    @contextlib.asynccontextmanager
    async def _asking(self, targets: Sequence[EgressTarget]) -> Any:
        """Requests inside raise TransportError in words, without keys."""
        try:
            yield
        except api.TwirpError as error:
            said = error.message
            for target in targets:
                said = target.url.scrub(said)
            code = "unauthenticated" if error.status in (401, 403) else error.code
            raise explain(code, said) from None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
            raise TransportError("the LiveKit server doesn't answer") from None


def explain(code: str, said: str) -> TransportError:
    """An error of LiveKit's API as a sentence that says what to do."""
    text = said.lower()
    if "redis" in text:
        return TransportError(
            "this LiveKit server has no redis, which egress needs: set `redis:` in its config, "
            "the same for server and egress, or broadcast directly (via: direct)",
            retryable=False,
        )
    if code == "unavailable" or "no response from servers" in text:
        return TransportError(
            "no egress service answers: is one running, with the same redis and keys as the "
            "LiveKit server, and with CPU to spare?"
        )
    if code in ("unauthenticated", "permission_denied"):
        return TransportError(
            "the LiveKit server refuses: check LIVEKIT_API_KEY and LIVEKIT_API_SECRET",
            retryable=False,
        )
    if code == "invalid_argument":
        return TransportError(
            f"egress can't use what it was asked for ({said[:200]}): check the address",
            retryable=False,
        )
    if code == "not_found":
        return TransportError("the room or the avatar is not there", retryable=False)
    if code == "resource_exhausted":
        return TransportError("the egress service has no room for another broadcast just now")
    return TransportError(f"egress failed ({code}): {said[:200]}")


def webhook(body: bytes, authorization: str, api_key: str, api_secret: str) -> api.WebhookEvent:
    """A webhook of the LiveKit server, after its signature was checked. TransportError if not."""
    receiver = api.WebhookReceiver(api.TokenVerifier(api_key, api_secret))
    token = authorization.removeprefix("Bearer ").strip()
    try:
        return receiver.receive(body.decode(), token)
    except Exception as error:  # the library raises bare exceptions for a wrong hash or token
        raise TransportError(
            f"a webhook was refused: {type(error).__name__}", retryable=False
        ) from None


def _place(url: StreamUrl) -> str:
    """What of an address the service doesn't mask: its kind, host and application."""
    if url.kind == "srt":
        return f"srt://{url.host}"
    return f"{url.kind}://{url.host}"


def _same(result: str, place: str) -> bool:
    return result.lower().startswith(place.lower())
