"""LiveKit's egress: real refusals by a real server, and a life cycle by a stand-in for its API."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import hashlib
import logging
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from google.protobuf.json_format import MessageToJson
from livekit import api, rtc

from voipavatar.config import Settings
from voipavatar.egress import EgressOutputs, EgressPlan, explain, webhook
from voipavatar.errors import ConfigError, TransportError
from voipavatar.livekit_server import Launcher, LiveKitServer, obtain
from voipavatar.rtmp import StreamUrl
from voipavatar.targets import Backoff, Event, State

from . import servers

KEY = "k3y-egress-77ab"
SECRET = "a-secret-of-more-than-thirty-two-letters"
Status = api.EgressStatus
Stream = api.StreamInfo.Status


class StandIn:
    """Speaks the egress API (Twirp with protobuf) and does what a test tells it to."""

    def __init__(self) -> None:
        self.tracks_up = True
        self.error: tuple[str, str] | None = None
        self.down = False
        self.alive = True
        """False: the service was killed, and the server goes on calling its jobs active."""
        self.jobs: dict[str, api.EgressInfo] = {}
        self.requests: list[Any] = []
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/twirp/{service}/{method}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.5)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def last(self) -> api.EgressInfo:
        return list(self.jobs.values())[-1]

    def end(self, status: int, error: str = "") -> None:
        self.last.status = status  # type: ignore[assignment]
        self.last.error = error

    async def _answer(self, request: web.Request) -> web.Response:
        if self.down:
            raise web.HTTPBadGateway
        assert request.headers["Authorization"].startswith("Bearer ")
        method, body = request.match_info["method"], await request.read()
        if method == "GetParticipant":
            if not self.tracks_up:
                return self._problem("not_found", "participant does not exist")
            tracks = [
                api.TrackInfo(type=kind) for kind in (api.TrackType.AUDIO, api.TrackType.VIDEO)
            ]
            return self._proto(api.ParticipantInfo(identity="avatar", tracks=tracks))
        if method == "ListParticipants":
            there = [
                api.ParticipantInfo(identity=id, kind=api.ParticipantInfo.Kind.EGRESS)
                for id, job in self.jobs.items()
                if job.status == Status.EGRESS_ACTIVE and self.alive
            ]
            return self._proto(api.ListParticipantsResponse(participants=there))
        if self.error is not None:
            return self._problem(*self.error)
        if method in ("StartParticipantEgress", "StartRoomCompositeEgress"):
            kind: Any = (
                api.ParticipantEgressRequest
                if method == "StartParticipantEgress"
                else api.RoomCompositeEgressRequest
            )
            start = kind.FromString(body)
            self.requests.append(start)
            info = api.EgressInfo(egress_id=f"EG_{len(self.jobs)}", status=Status.EGRESS_STARTING)
            for url in start.stream_outputs[0].urls:
                info.stream_results.append(self._stream(url))
            self.jobs[info.egress_id] = info
            return self._proto(info)
        if method == "ListEgress":
            one = self.jobs.get(api.ListEgressRequest.FromString(body).egress_id)
            if one is not None and one.status == Status.EGRESS_STARTING:
                one.status = Status.EGRESS_ACTIVE
            return self._proto(api.ListEgressResponse(items=[one] if one is not None else []))
        if method == "UpdateStream":
            update = api.UpdateStreamRequest.FromString(body)
            self.requests.append(update)
            one = self.jobs[update.egress_id]
            for url in update.add_output_urls:
                one.stream_results.append(self._stream(url))
            for url in update.remove_output_urls:
                for result in one.stream_results:
                    if result.url == self._stream(url).url:
                        result.status = Stream.FINISHED
            return self._proto(one)
        assert method == "StopEgress"
        if not self.alive:
            return self._problem("unavailable", "no response from servers")
        one = self.jobs[api.StopEgressRequest.FromString(body).egress_id]
        one.status = Status.EGRESS_COMPLETE
        self.requests.append("stop")
        return self._proto(one)

    def _stream(self, url: str) -> api.StreamInfo:
        masked = url.rpartition("/")[0] + "/{k3y...7ab}"
        return api.StreamInfo(url=masked, status=Stream.ACTIVE)

    def _proto(self, message: Any) -> web.Response:
        return web.Response(body=message.SerializeToString(), content_type="application/protobuf")

    def _problem(self, code: str, said: str) -> web.Response:
        status = {"not_found": 404, "invalid_argument": 400, "unavailable": 503}.get(code, 500)
        return web.json_response({"code": code, "msg": said}, status=status)


@pytest_asyncio.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    server = StandIn()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voipavatar.egress.POLL", 0.3)


class Watched:
    """Outputs with their events kept: `async with Watched(url) as one`."""

    def __init__(self, url: str, key: str = "devkey", secret: str = SECRET, **options: Any) -> None:
        self.events: list[Event] = []
        self.outputs = EgressOutputs(
            url,
            key,
            secret,
            "room",
            "avatar",
            self.events.append,
            backoff=Backoff(chance=lambda: 0.5),
            **options,
        )

    async def __aenter__(self) -> Watched:
        await self.outputs.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.outputs.aclose()

    def add(self, id: str, host: str = "one.test") -> None:
        self.outputs.add(StreamUrl.parse(f"rtmp://{host}/live/{KEY}"), id)

    async def until(self, what: Callable[[], object], timeout: float = 20.0) -> None:
        async def wait() -> None:
            while not what():
                await asyncio.sleep(0.02)

        try:
            await asyncio.wait_for(wait(), timeout)
        except asyncio.TimeoutError:
            pytest.fail(f"it did not come to that: {self.events}")

    def state(self, id: str) -> State:
        return self.outputs.targets[id].state

    def seen(self, id: str) -> list[str]:
        return [one["event"] for one in self.events if one["id"] == id]


# --- the life cycle, with the stand-in ------------------------------------------------------------


async def test_an_egress_begins_when_the_tracks_are_up_and_ends_with_us(stand_in: StandIn) -> None:
    stand_in.tracks_up = False
    async with Watched(stand_in.url) as one:
        one.add("a")
        await asyncio.sleep(1.0)
        assert stand_in.requests == []
        stand_in.tracks_up = True
        await one.until(lambda: one.state("a") is State.LIVE)
        (start,) = stand_in.requests
        assert (start.room_name, start.identity) == ("room", "avatar")
        assert start.advanced.key_frame_interval == 2.0
        assert start.stream_outputs[0].urls == [f"rtmp://one.test/live/{KEY}"]
    assert stand_in.requests[-1] == "stop" and one.seen("a") == ["connecting", "live", "ended"]


async def test_the_room_is_composed_when_asked_for(stand_in: StandIn) -> None:
    async with Watched(stand_in.url, plan=EgressPlan(room=True, layout="speaker")) as one:
        one.add("a")
        await one.until(lambda: one.state("a") is State.LIVE)
        assert stand_in.requests[0].layout == "speaker"


async def test_addresses_come_and_go_while_it_runs(stand_in: StandIn) -> None:
    async with Watched(stand_in.url) as one:
        one.add("a")
        await one.until(lambda: one.state("a") is State.LIVE)
        one.add("b", "two.test")
        await one.until(lambda: one.state("b") is State.LIVE)
        await one.outputs.remove("a")
        assert stand_in.requests[-1].remove_output_urls == [f"rtmp://one.test/live/{KEY}"]
        assert one.outputs.starts == 1 and one.state("b") is State.LIVE
        await one.outputs.remove("b")
        await one.until(lambda: stand_in.requests[-1] == "stop")
        one.add("c")
        await one.until(lambda: one.state("c") is State.LIVE)
        assert one.outputs.starts == 2
        with pytest.raises(ConfigError, match="already"):
            one.add("c")
        with pytest.raises(ConfigError, match="record"):
            one.outputs.add(StreamUrl.parse("/tmp/a.mkv"), "d")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (Status.EGRESS_FAILED, "stream disconnected for 30s"),
        (Status.EGRESS_COMPLETE, ""),  # the avatar left: its worker was restarted
        (Status.EGRESS_ABORTED, "egress service is shutting down"),
        (Status.EGRESS_LIMIT_REACHED, ""),
    ],
)
async def test_an_egress_that_ends_is_started_again(
    stand_in: StandIn, status: int, error: str
) -> None:
    async with Watched(stand_in.url) as one:
        one.add("a")
        await one.until(lambda: one.state("a") is State.LIVE)
        stand_in.tracks_up = False
        stand_in.end(status, error)
        await one.until(lambda: one.state("a") is State.RECONNECTING)
        assert error in one.outputs.targets["a"].reason
        stand_in.tracks_up = True
        await one.until(lambda: one.state("a") is State.LIVE)
        assert len(stand_in.jobs) == 2 and one.outputs.targets["a"].reconnects == 1


async def test_one_stream_that_is_cut_is_asked_for_again(stand_in: StandIn) -> None:
    async with Watched(stand_in.url) as one:
        one.add("a")
        one.add("b", "two.test")
        await one.until(lambda: one.state("a") is one.state("b") is State.LIVE)
        result = stand_in.last.stream_results[1]
        result.status, result.error = Stream.FAILED, "connection reset"
        await one.until(lambda: one.state("b") is State.RECONNECTING)
        assert one.state("a") is State.LIVE
        stand_in.last.stream_results.remove(result)
        await one.until(lambda: one.state("b") is State.LIVE)
        assert one.outputs.starts == 1 and one.seen("a") == ["connecting", "live"]


async def test_a_server_that_is_away_and_one_that_forgot(stand_in: StandIn) -> None:
    async with Watched(stand_in.url) as one:
        one.add("a")
        await one.until(lambda: one.state("a") is State.LIVE)
        stand_in.down = True
        await asyncio.sleep(3)
        assert one.state("a") is State.LIVE  # the egress itself may be well
        stand_in.down = False
        stand_in.jobs.clear()
        await one.until(lambda: one.state("a") is State.RECONNECTING)
        assert "forgotten" in one.outputs.targets["a"].reason
        await one.until(lambda: one.state("a") is State.LIVE)


async def test_a_service_that_was_killed_is_missed_in_the_room(stand_in: StandIn) -> None:
    async with Watched(stand_in.url) as one:
        one.add("a")
        await one.until(lambda: one.state("a") is State.LIVE)
        await asyncio.sleep(1)
        stand_in.alive = False
        await one.until(lambda: one.state("a") is State.RECONNECTING)
        assert "without a word" in one.outputs.targets["a"].reason
        stand_in.alive = True
        await one.until(lambda: one.state("a") is State.LIVE)
        assert one.outputs.starts == 2


async def test_a_webhook_is_faster_than_polling(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("voipavatar.egress.POLL", 60.0)
    async with Watched(stand_in.url) as one:
        one.add("a")
        await one.until(lambda: one.outputs.egress_id)
        for info in (api.EgressInfo(egress_id="EG_other", status=Status.EGRESS_FAILED), None):
            if info is None:
                info = api.EgressInfo()
                info.CopyFrom(stand_in.last)
                info.status = Status.EGRESS_ACTIVE
            body, token = signed(api.WebhookEvent(event="egress_updated", egress_info=info))
            one.outputs.hear(webhook(body, token, "devkey", SECRET).egress_info)
        await one.until(lambda: one.state("a") is State.LIVE, 5.0)
        assert one.outputs.starts == 1


def signed(event: api.WebhookEvent, secret: str = SECRET) -> tuple[bytes, str]:
    body = MessageToJson(event).encode()
    token = api.AccessToken("devkey", secret).with_ttl(datetime.timedelta(minutes=1))
    token = token.with_sha256(base64.b64encode(hashlib.sha256(body).digest()).decode())
    return body, token.to_jwt()


def test_a_forged_webhook_is_refused() -> None:
    body, token = signed(api.WebhookEvent(event="egress_ended"))
    assert webhook(body, token, "devkey", SECRET).event == "egress_ended"
    assert webhook(body, f"Bearer {token}", "devkey", SECRET).event == "egress_ended"
    _, other = signed(api.WebhookEvent(event="egress_ended"), secret="another" * 6)
    for wrong_body, wrong_token in ((body + b" ", token), (body, other), (body, "")):
        with pytest.raises(TransportError, match="refused"):
            webhook(wrong_body, wrong_token, "devkey", SECRET)


@pytest.mark.parametrize(
    ("code", "said", "words", "tries"),
    [
        ("invalid_argument", "invalid stream url", "check the address", 1),
        ("internal", "egress not connected (redis required)", "no redis", 1),
        ("unauthenticated", "invalid token", "LIVEKIT_API_KEY", 1),
        ("unavailable", "no response from servers", "no egress service answers", 3),
    ],
)
async def test_a_first_start_that_fails_is_said_in_words(
    stand_in: StandIn, code: str, said: str, words: str, tries: int
) -> None:
    stand_in.error = (code, said)
    assert explain(code, said).retryable is (tries > 1)
    async with Watched(stand_in.url) as one:
        one.add("a")
        await one.until(lambda: one.state("a") is State.FAILED)
        assert words in one.outputs.targets["a"].reason


async def test_persist_waits_for_a_service_that_is_not_there_yet(stand_in: StandIn) -> None:
    stand_in.error = ("unavailable", "no response from servers")
    async with Watched(stand_in.url, persist=True) as one:
        one.add("a")
        await one.until(lambda: one.state("a") is State.RECONNECTING)
        await asyncio.sleep(2)
        stand_in.error = None
        await one.until(lambda: one.state("a") is State.LIVE)


async def test_keys_stay_secret(stand_in: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with Watched(stand_in.url) as one:
        one.add("a")
        await one.until(lambda: one.state("a") is State.LIVE)
        stand_in.end(Status.EGRESS_FAILED, f"could not write to rtmp://one.test/live/{KEY}")
        await one.until(lambda: one.state("a") is State.RECONNECTING)
        text = repr(one.events) + repr(one.outputs.status())
        text += "".join(repr(vars(record)) for record in caplog.records if record.name != "asyncio")
    assert KEY not in text and "one.test" in text


async def test_closing_before_opening(stand_in: StandIn) -> None:
    one = Watched(stand_in.url)
    await one.outputs.aclose()
    await one.outputs.aclose()


# --- what a real livekit-server says --------------------------------------------------------------


async def published(url: str, key: str, secret: str) -> rtc.Room:
    """An avatar in the room: two tracks under one identity."""
    grants = api.VideoGrants(room_join=True, room="room")
    token = api.AccessToken(key, secret).with_identity("avatar").with_grants(grants).to_jwt()
    room = rtc.Room()
    await room.connect(url, token)
    sound = rtc.LocalAudioTrack.create_audio_track("sound", rtc.AudioSource(48_000, 1))
    picture = rtc.LocalVideoTrack.create_video_track("picture", rtc.VideoSource(64, 64))
    await room.local_participant.publish_track(sound, rtc.TrackPublishOptions())
    await room.local_participant.publish_track(picture, rtc.TrackPublishOptions())
    return room


@pytest.mark.server
async def test_a_real_server_without_redis(livekit: LiveKitServer) -> None:
    room = await published(livekit.url, livekit.api_key, livekit.api_secret)
    try:
        async with Watched(livekit.url, livekit.api_key, livekit.api_secret) as one:
            one.add("a")
            await one.until(lambda: one.state("a") is State.FAILED, 30)
            assert "no redis" in one.outputs.targets["a"].reason
    finally:
        await room.disconnect()


@pytest.mark.server
async def test_a_real_server_refuses_a_wrong_secret(livekit: LiveKitServer) -> None:
    async with Watched(livekit.url, livekit.api_key, "wrong" * 8) as one:
        one.add("a")
        await one.until(lambda: one.state("a") is State.FAILED, 30)
        assert "LIVEKIT_API_SECRET" in one.outputs.targets["a"].reason


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.server
async def test_a_real_server_with_redis_and_no_egress_service(
    livekit: LiveKitServer, tmp_path: Path
) -> None:
    redis = shutil.which("redis-server")
    if redis is None:
        servers.missing("redis is needed (Debian, Ubuntu: apt install redis-server)")
        return
    port = free_port()
    folder = Settings.from_env().cache_dir
    launcher = await obtain(folder)
    argv = (*launcher.argv, "--redis-host", f"127.0.0.1:{port}")
    process = await asyncio.create_subprocess_exec(
        *(redis, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)),
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        await answers(port)
        async with LiveKitServer(folder, launcher=Launcher(argv, launcher.origin)) as server:
            room = await published(server.url, server.api_key, server.api_secret)
            async with Watched(server.url, server.api_key, server.api_secret, persist=True) as one:
                one.add("a")
                await one.until(lambda: one.state("a") is State.RECONNECTING, 40)
                assert "no egress service answers" in one.outputs.targets["a"].reason
            await room.disconnect()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def answers(port: int) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()
            return
        await asyncio.sleep(0.05)
    pytest.fail("a server did not start")


@pytest.mark.server
async def test_nobody_there_is_said_too() -> None:
    async with Watched(f"http://127.0.0.1:{free_port()}") as one:
        one.add("a")
        await asyncio.sleep(2)
        assert one.state("a") in (State.CONNECTING, State.RECONNECTING)
    assert one.seen("a")[-1] == "ended"
