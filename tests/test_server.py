"""The HTTP interface: in process where that shows it all, on a real port for wires and limits."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import signal
import socket
import time
import wave
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import httpx
import numpy as np
import pytest
import pytest_asyncio
from fastapi import FastAPI
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from voipavatar import metrics
from voipavatar.config import Persona, Settings
from voipavatar.errors import ConfigError, EngineError, TransportError
from voipavatar.server import LiveKitAccess, create_app, desk, fetch_vendor, live, serve, vendor
from voipavatar.server.guard import Guard, is_loopback
from voipavatar.server.run import check_exposure, listen

from .fakes import FakeSession, FakeStudio

HOME = "http://127.0.0.1:8080"
TOKEN = "a-token-that-nobody-guesses"
SECRET = "a-secret-long-enough-for-hs256-keys"
LIVEKIT = LiveKitAccess("ws://127.0.0.1:7880", "key", SECRET)


# --- a server -------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(cache_dir=tmp_path / "cache", max_sessions=3, max_text=1_000, port=0)


@pytest.fixture
def personas(tmp_path: Path) -> list[Persona]:
    picture = tmp_path / "portrait.png"
    cv2.imwrite(str(picture), np.full((40, 40, 3), 120, np.uint8))
    voices = ["piper", "espeak", {"use": "espeak", "options": {"voice": "de"}}]
    clara = {"name": "default", "title": "Clara", "portrait": picture, "greeting": "Hi."}
    return [
        Persona.model_validate({**clara, "voice": voices}),
        Persona.model_validate({"name": "bare", "voice": "my.module.Voice"}),
    ]


@pytest.fixture
def studio() -> FakeStudio:
    return FakeStudio()


@contextlib.asynccontextmanager
async def within(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`, in this process."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=HOME) as client:
            yield client


@pytest_asyncio.fixture
async def client(
    studio: FakeStudio, settings: Settings, personas: list[Persona]
) -> AsyncIterator[httpx.AsyncClient]:
    async with within(create_app(studio, settings, LIVEKIT, personas=lambda: personas)) as one:
        yield one


Served: TypeAlias = Callable[..., Awaitable[httpx.AsyncClient]]


@pytest_asyncio.fixture
async def served(studio: FakeStudio, settings: Settings, tmp_path: Path) -> AsyncIterator[Served]:
    """Starts `serve` on a free port; a client of it."""
    (tmp_path / "personas").mkdir()
    (tmp_path / "personas" / "default.yaml").write_text("title: Clara\n")
    settings = dataclasses.replace(settings, persona_dirs=(tmp_path / "personas",))
    async with contextlib.AsyncExitStack() as undo:

        async def start(**changes: Any) -> httpx.AsyncClient:
            ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            task: asyncio.Future[Any] = asyncio.ensure_future(
                serve(
                    dataclasses.replace(settings, **changes),
                    livekit_url=LIVEKIT.url,
                    api_key=LIVEKIT.api_key,
                    api_secret=LIVEKIT.api_secret,
                    on_ready=ready.set_result,
                    studio=studio,
                    signals=False,
                )
            )

            async def end() -> None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

            undo.push_async_callback(end)
            both: list[asyncio.Future[Any]] = [ready, task]
            await asyncio.wait(both, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            assert ready.done(), task
            return await undo.enter_async_context(httpx.AsyncClient(base_url=ready.result()))

        yield start


async def opened(client: httpx.AsyncClient, **wish: Any) -> str:
    answer = await client.post("/sessions", json=wish)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def problem(answer: httpx.Response, status: int) -> str:
    """The sentence of a refusal, which has nothing else in it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    assert "Traceback" not in body["error"] and 'File "' not in body["error"]
    return str(body["error"])


def wav(seconds: float = 0.1, rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        tone = 9_000 * np.sin(np.arange(int(seconds * rate)) * 0.2)
        file.writeframes(tone.astype("<i2").tobytes())
    return out.getvalue()


def claims(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


# --- server and personas --------------------------------------------------------------------------


async def test_health(client: httpx.AsyncClient) -> None:
    body = (await client.get("/health")).json()
    assert body["status"] == "ok" and body["sessions"] == 0 and body["max_sessions"] == 3
    assert body["token"] is False


async def test_personas(client: httpx.AsyncClient) -> None:
    first, bare = (await client.get("/personas")).json()
    assert (first["name"], first["title"], first["greeting"]) == ("default", "Clara", "Hi.")
    assert [one["name"] for one in first["voices"]] == ["piper", "espeak", "espeak#2"]
    assert [one["label"] for one in first["voices"]] == ["Piper", "eSpeak", "eSpeak: de"]
    assert (bare["title"], bare["voices"][0]["label"], bare["portrait"]) == ("bare", "Voice", None)


async def test_portrait(client: httpx.AsyncClient) -> None:
    answer = await client.get("/personas/default/portrait")
    assert answer.headers["content-type"] == "image/png" and answer.content[1:4] == b"PNG"
    assert "no portrait" in problem(await client.get("/personas/bare/portrait"), 404)
    assert "default, bare" in problem(await client.get("/personas/bob/portrait"), 404)


async def test_portrait_of_a_clip_is_its_first_picture(
    studio: FakeStudio, settings: Settings, tmp_path: Path
) -> None:
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for level in (200, 20):
        writer.write(np.full((48, 64, 3), level, np.uint8))
    writer.release()
    app = create_app(studio, settings, LIVEKIT, personas=lambda: [Persona(name="a", portrait=clip)])
    async with within(app) as client:
        answer = await client.get("/personas/a/portrait")
        picture = cv2.imdecode(np.frombuffer(answer.content, np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None and picture.shape == (48, 64, 3)
        assert abs(float(picture.mean()) - 200) < 6
        clip.write_bytes(b"not a clip")
        assert "can't be read" in problem(await client.get("/personas/a/portrait"), 404)


async def test_metrics(client: httpx.AsyncClient) -> None:
    metrics.TURNS.labels("said").inc()
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'voipavatar_turns_total{outcome="said"}' in answer.text
    before = metrics.REQUESTS.labels("4xx")._value.get()
    await client.get("/nowhere")
    assert metrics.REQUESTS.labels("4xx")._value.get() == before + 1


async def test_description(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    say = schema["paths"]["/sessions/{id}/say"]["post"]
    assert set(say["requestBody"]["content"]) >= {"application/json", "multipart/form-data"}
    for methods in schema["paths"].values():
        for one in methods.values():
            assert one["tags"] and one["description"], one
    page = await client.get("/docs")
    assert (
        "/web/docs.js" in page.text
        and "script-src 'self'" in page.headers["content-security-policy"]
    )
    assert "http" not in page.text.replace("http-equiv", "").replace("HTTP", "")


async def test_page_and_its_files(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy and "unsafe" not in policy
    assert "connect-src 'self' ws://127.0.0.1:7880 http://127.0.0.1:7880;" in policy
    for (
        test_id
    ) in "avatar-video text say stop state fps latency captions persona voice start".split():
        assert f'data-testid="{test_id}"' in page.text, test_id
    assert (
        "<script>" not in page.text and " style=" not in page.text and " onclick" not in page.text
    )
    for name in ("app.js", "api.js", "call.js", "mic.js", "mic-worklet.js", "style.css"):
        answer = await client.get(f"/web/{name}")
        assert answer.status_code == 200 and answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = await client.get(f"/web/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304
    assert (await client.get("/favicon.svg")).headers["content-type"] == "image/svg+xml"
    for path in ("/web/nothing.js", "/web/../config.py", "/web/%2e%2e/config.py"):
        assert "nothing at" in problem(await client.get(path), 404)


# --- the page's library ---------------------------------------------------------------------------


async def test_vendor_from_the_cache(
    client: httpx.AsyncClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = b"var LivekitClient = {};"
    asset = dataclasses.replace(
        vendor.ASSETS["livekit-client.js"], sha256=hashlib.sha256(code).hexdigest()
    )
    monkeypatch.setattr(vendor, "ASSETS", {"livekit-client.js": asset})
    monkeypatch.setattr(vendor, "_ways", lambda asset: {"nowhere": offline})
    sentence = problem(await client.get("/vendor/livekit-client.js"), 503)
    assert str(asset.place(settings.cache_dir)) in sentence and "nowhere: no network" in sentence
    asset.place(settings.cache_dir).parent.mkdir(parents=True)
    asset.place(settings.cache_dir).write_bytes(b"something else")
    problem(await client.get("/vendor/livekit-client.js"), 503)
    asset.place(settings.cache_dir).write_bytes(code)
    answer = await client.get("/vendor/livekit-client.js")
    assert answer.content == code and answer.headers["content-type"].startswith("text/javascript")
    assert "there is no" in problem(await client.get("/vendor/other.js"), 404)


def offline() -> bytes:
    raise OSError("no network")


def test_vendor_takes_only_what_was_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = b"the right file"
    asset = vendor.Asset("thing", "1.0", "dist/thing.js", hashlib.sha256(code).hexdigest())
    monkeypatch.setattr(vendor, "ASSETS", {"thing.js": asset})
    ways: dict[str, Callable[[], bytes]] = {"first": offline, "second": lambda: b"another"}
    monkeypatch.setattr(vendor, "_ways", lambda asset: ways)
    with pytest.raises(TransportError, match=r"second: its SHA-256 is .* not the pinned one"):
        fetch_vendor("thing.js", tmp_path)
    assert not asset.place(tmp_path).exists()
    ways["third"] = lambda: code
    assert fetch_vendor("thing.js", tmp_path).read_bytes() == code
    ways.clear()
    assert fetch_vendor("thing.js", tmp_path).read_bytes() == code  # from now on without a network


def test_vendor_ways_end_with_public_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://mirror.example/npm/")
    monkeypatch.setenv("PATH", "")
    assert list(vendor._ways(vendor.ASSETS["livekit-client.js"])) == [
        "npm mirror",
        "cdn.jsdelivr.net",
        "unpkg.com",
    ]


# --- sessions -------------------------------------------------------------------------------------


async def test_open(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    answer = await client.post("/sessions", json={"persona": "default"})
    assert answer.status_code == 201
    body = answer.json()
    [session] = studio.opened
    assert session.room is not None
    assert (body["id"], body["room"]) == (session.id, session.room.room)
    assert (body["voice"], body["persona"]["title"]) == ("piper", "Clara")
    assert body["url"] == "ws://127.0.0.1:7880"
    grants = claims(body["token"])
    assert grants["video"]["room"] == body["room"] and grants["video"]["canSubscribe"] is True
    assert grants["video"]["canPublish"] is False and grants["video"]["roomJoin"] is True
    assert grants["sub"] == body["identity"] and grants["sub"] != session.room.identity
    assert 0 < body["expires"] - time.time() <= 600 and abs(grants["exp"] - body["expires"]) < 5
    assert SECRET not in answer.text


async def test_open_needs_no_body_and_takes_a_voice(
    client: httpx.AsyncClient, studio: FakeStudio
) -> None:
    assert (await client.post("/sessions")).json()["persona"]["name"] == "default"
    answer = await client.post("/sessions", json={"voice": "espeak#2"})
    assert answer.json()["voice"] == "espeak#2"
    # the wished one first, and the others to stand in for it
    assert [one.options.get("voice") for one in studio.opened[1].voice] == ["de", None, None]
    assert [one.use for one in studio.opened[1].voice] == ["espeak", "piper", "espeak"]


@pytest.mark.parametrize(
    ("wish", "status", "sentence"),
    [
        ({"persona": "bob"}, 404, "there is no persona 'bob'; there are: default, bare"),
        ({"persona": "../../etc/passwd"}, 404, "there is no persona"),
        ({"voice": "alan"}, 404, "it has: piper, espeak, espeak#2"),
        ({"voice": "os.system"}, 404, "has no voice"),
        ({"person": "default"}, 422, "person: extra inputs are not permitted"),
        ({"persona": 3}, 422, "persona: input should be a valid string"),
        ([], 422, "input should be"),
        ({"persona": "x" * 65}, 422, "at most 64"),
    ],
)
async def test_open_refuses(
    client: httpx.AsyncClient, studio: FakeStudio, wish: object, status: int, sentence: str
) -> None:
    assert sentence in problem(await client.post("/sessions", json=wish), status)
    assert studio.opened == []


async def test_open_when_all_are_taken(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    first, *_ = [await opened(client) for _ in range(3)]
    answer = await client.post("/sessions", json={})
    assert "all 3 sessions are taken" in problem(answer, 503)
    assert int(answer.headers["retry-after"]) > 0
    assert (await client.delete(f"/sessions/{first}")).status_code == 204
    await opened(client)
    studio.capacity = 0
    await client.delete(f"/sessions/{studio.opened[1].id}")
    assert "keeps up with no more" in problem(await client.post("/sessions", json={}), 503)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TransportError("the room is out of reach"), 503),
        (TransportError("the key was refused", retryable=False), 502),
        (EngineError("the engine failed"), 500),
        (RuntimeError("a bug with a secret in it"), 500),
    ],
)
async def test_open_that_fails(
    client: httpx.AsyncClient,
    studio: FakeStudio,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
) -> None:
    async def fails(*_: object, **__: object) -> FakeSession:
        raise error

    monkeypatch.setattr(studio, "open", fails)
    sentence = problem(await client.post("/sessions", json={}), status)
    assert "secret" not in sentence
    monkeypatch.undo()
    await opened(client)


async def test_status_list_close(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    id = await opened(client, persona="bare")
    body = (await client.get(f"/sessions/{id}")).json()
    assert (body["id"], body["persona"], body["state"]) == (id, "bare", "idle")
    assert body["stage"]["counters"] == {"frames": 0} and body["room"] == f"voipavatar-{id}"
    assert [one["id"] for one in (await client.get("/sessions")).json()] == [id]
    assert (await client.delete(f"/sessions/{id}?drain=0.05")).status_code == 204
    assert studio.opened[0].closed == 0.05
    assert (await client.get("/sessions")).json() == []
    for answer in (
        await client.get(f"/sessions/{id}"),
        await client.delete(f"/sessions/{id}"),
        await client.get(f"/sessions/{id}/events"),
        await client.post(f"/sessions/{id}/ticket"),
        await client.post(f"/sessions/{id}/interrupt"),
        await client.post(f"/sessions/{id}/say", json={"text": "x"}),
    ):
        assert "POST /sessions opens one" in problem(answer, 404)
    other = await opened(client)
    assert "drain" in problem(await client.delete(f"/sessions/{other}?drain=1e9"), 422)


async def test_another_face_on_air(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    id = await opened(client)
    names = [one["name"] for one in (await client.get("/personas")).json()]
    answer = await client.post(f"/sessions/{id}/persona", json={"persona": names[-1]})
    assert answer.status_code == 204
    assert studio.sessions[id].persona.name == names[-1]
    problem(await client.post(f"/sessions/{id}/persona", json={"persona": "nobody"}), 404)


async def test_poses_and_gestures(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    id = await opened(client)
    for path, body in (
        ("pose", {"pose": "listening"}),
        ("gesture", {"gesture": "nod"}),
        ("pose", {"pose": ""}),
    ):
        answer = await client.post(f"/sessions/{id}/{path}", json=body)
        assert answer.status_code == 204
    assert studio.sessions[id].posed == ["listening", "nod", ""]
    assert "pose 'x'" in problem(await client.post(f"/sessions/{id}/pose", json={"pose": "x"}), 422)
    problem(await client.post(f"/sessions/{id}/gesture", json={"gesture": "x"}), 422)
    problem(await client.post(f"/sessions/{id}/gesture", json={"nod": 1}), 422)
    problem(await client.post("/sessions/nobody/pose", json={"pose": ""}), 404)


async def test_another_look_on_air(
    client: httpx.AsyncClient, studio: FakeStudio, personas: list[Persona]
) -> None:
    looks = {"reading": {"engine_options": {"motion": 0.2}}}
    personas[0] = Persona.model_validate(personas[0].model_dump() | {"idles": looks})
    assert (await client.get("/personas")).json()[0]["idles"] == ["default", "reading"]
    id = await opened(client)
    answer = await client.post(f"/sessions/{id}/idle", json={"idle": "reading"})
    assert answer.status_code == 204 and studio.opened[-1].idle == "reading"
    wrong = await client.post(f"/sessions/{id}/idle", json={"idle": "dancing"})
    assert "default, reading" in problem(wrong, 422)


async def test_a_participant_can_be_followed(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    answer = await client.post("/sessions", json={"follow": "caller"})
    assert answer.status_code == 201
    room = studio.opened[-1].room
    assert room is not None and len(room.guests) == 1 and room.guests[0].subscribes


async def test_ticket_is_a_new_one(client: httpx.AsyncClient) -> None:
    first = (await client.post("/sessions", json={})).json()
    again = (await client.post(f"/sessions/{first['id']}/ticket")).json()
    assert again["room"] == first["room"] and again["identity"] != first["identity"]
    assert claims(again["token"])["video"] == claims(first["token"])["video"]


async def test_sessions_opened_elsewhere_can_be_used_but_are_not_ours(
    client: httpx.AsyncClient, studio: FakeStudio, personas: list[Persona]
) -> None:
    session = await studio.open(personas[0], id="queue")
    assert (await client.get("/sessions/queue")).json()["room"] is None
    answer = await client.post("/sessions/queue/say?wait=finished", json={"text": "hi"})
    assert answer.json()["state"] == "said"
    assert "not opened over HTTP" in problem(await client.post("/sessions/queue/ticket"), 409)
    await session.aclose()


@pytest.mark.parametrize(
    ("url", "asked_at", "expected"),
    [
        ("ws://127.0.0.1:7880", "127.0.0.1", "ws://127.0.0.1:7880"),
        ("ws://127.0.0.1:7880", "localhost", "ws://localhost:7880"),
        ("http://0.0.0.0:7880/", "192.168.1.7", "ws://192.168.1.7:7880"),
        ("ws://[::1]:7880", "fe80::7", "ws://[fe80::7]:7880"),
        ("ws://127.0.0.1:7880", "", "ws://127.0.0.1:7880"),
        ("wss://me.livekit.cloud", "localhost", "wss://me.livekit.cloud"),
        ("ws://livekit:7880", "localhost", "ws://livekit:7880"),
    ],
)
def test_browser_url(url: str, asked_at: str, expected: str) -> None:
    assert LiveKitAccess(url, "k", SECRET).browser_url(asked_at) == expected


def test_access() -> None:
    cloud = LiveKitAccess("wss://me.livekit.cloud", "k", SECRET)
    assert cloud.origins("localhost") == [
        "wss://me.livekit.cloud",
        "https://me.livekit.cloud",
        "wss://*.livekit.cloud",
        "https://*.livekit.cloud",
    ]
    public = LiveKitAccess("ws://livekit:7880", "k", SECRET, public_url="wss://a.example")
    assert public.browser_url("b.example") == "wss://a.example"
    assert SECRET not in repr(cloud)
    with pytest.raises(ConfigError, match="LIVEKIT_URL"):
        LiveKitAccess("livekit:7880", "k", SECRET)
    with pytest.raises(ConfigError, match="LIVEKIT_API_KEY"):
        LiveKitAccess("ws://livekit:7880", "", "")


# --- speech ---------------------------------------------------------------------------------------


async def test_say(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    id = await opened(client)
    answer = await client.post(f"/sessions/{id}/say", json={"text": "one two three"})
    assert answer.status_code == 202
    assert answer.json() == {"utterance": "u1", "state": "queued", "heard": None, "error": None}
    answer = await client.post(
        f"/sessions/{id}/say?wait=finished",
        json={"text": "Grüße, 世界!", "mode": "replace", "voice": "espeak"},
    )
    assert answer.status_code == 200
    assert answer.json()["state"] == "said" and answer.json()["heard"] > 0
    [session] = studio.opened
    assert session.said[0] == ("one two three", "append", None)
    text, mode, voice = session.said[1]
    assert (text, mode) == ("Grüße, 世界!", "replace") and voice is not None
    assert voice[0].use == "espeak"
    assert session.turns[0].finished.result().interrupted


async def test_say_waits_for_the_start(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    studio.word = 1.0
    id = await opened(client)
    answer = await client.post(f"/sessions/{id}/say?wait=started", json={"text": "one two"})
    assert answer.json()["state"] == "speaking"


async def test_interrupt(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    studio.word = 1.0
    id = await opened(client)
    for text in ("one two three", "queued"):
        await client.post(f"/sessions/{id}/say", json={"text": text})
    waiting = asyncio.ensure_future(
        client.post(f"/sessions/{id}/say?wait=finished", json={"text": "three"})
    )
    await asyncio.sleep(0.3)
    assert (await client.get(f"/sessions/{id}")).json()["pending"] == 3
    assert (await client.post(f"/sessions/{id}/interrupt")).status_code == 204
    assert (await waiting).json()["state"] == "interrupted"
    assert (await client.get(f"/sessions/{id}")).json()["pending"] == 0
    assert (await client.post(f"/sessions/{id}/interrupt")).status_code == 204  # nothing to stop


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ('{"text": ""}', 422, "nothing to say"),
        ('{"text": " \\n "}', 422, "nothing to say"),
        ('{"text": "x", "mode": "loudly"}', 422, "mode: input should be 'append'"),
        ('{"text": "x", "voice": "alan"}', 404, "it has: piper"),
        ('{"text": "x", "rate": 2}', 422, "rate: extra inputs"),
        ('{"words": "x"}', 422, "text: field required"),
        ('{"text": 5}', 422, "text: input should be a valid string"),
        ('{"text": "unspeakable"}', 422, "no sound for this text"),
        ("{", 400, "not JSON"),
        ("", 400, "not JSON"),
        ('{"text": "\\ud800"}', 400, "not JSON"),
        ("null", 422, "input should be"),
        ("[" * 2_000, 400, "not JSON"),
        ('{"text": "' + "x" * 1_001 + '"}', 413, "1,001 characters and 1,000 are allowed"),
    ],
)
async def test_say_refuses(
    client: httpx.AsyncClient, studio: FakeStudio, body: str, status: int, sentence: str
) -> None:
    id = await opened(client)
    answer = await client.post(
        f"/sessions/{id}/say", content=body, headers={"content-type": "application/json"}
    )
    assert sentence in problem(answer, status)
    fine = await client.post(f"/sessions/{id}/say?wait=finished", json={"text": "still here"})
    assert fine.json()["state"] == "said"


async def test_say_a_sound(client: httpx.AsyncClient, studio: FakeStudio) -> None:
    id = await opened(client)
    sound = wav(0.1)
    raw = await client.post(
        f"/sessions/{id}/say?mode=interrupt&wait=finished",
        content=sound,
        headers={"content-type": "audio/wav"},
    )
    assert raw.json()["state"] == "said" and raw.json()["heard"] == pytest.approx(0.1, abs=0.05)
    form = await client.post(
        f"/sessions/{id}/say", files={"file": ("a.wav", sound)}, data={"mode": "replace"}
    )
    assert form.status_code == 202
    assert studio.opened[0].played == [sound, sound]


@pytest.mark.parametrize(
    ("content", "kind", "status", "sentence"),
    [
        (b"RIFF\x24\x00\x00\x00WAVEfmt garbage", "audio/wav", 422, "can't be decoded"),
        (wav()[:44], "audio/wav", 422, "there is not one sample"),
        (b"\x00" * 5_000, "audio/wav", 422, "can't be decoded"),
        (b"", "audio/wav", 422, "there is no sound"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "audio/mpegurl", 422, "can't be decoded"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "audio/wav", 422, "can't be decoded"),
        (b"<x/>", "text/xml", 415, "text/xml can't be said"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 422, "there is no sound"),
        (b"nonsense", "multipart/form-data", 400, "boundary"),
    ],
)
async def test_say_refuses_a_sound(
    client: httpx.AsyncClient,
    studio: FakeStudio,
    content: bytes,
    kind: str,
    status: int,
    sentence: str,
) -> None:
    id = await opened(client)
    answer = await client.post(
        f"/sessions/{id}/say", content=content, headers={"content-type": kind}
    )
    assert sentence in problem(answer, status)
    assert studio.opened[0].played == []
    fine = await client.post(f"/sessions/{id}/say?wait=finished", json={"text": "still here"})
    assert fine.json()["state"] == "said"


async def test_say_refuses_modes(client: httpx.AsyncClient) -> None:
    id = await opened(client)
    files = {"file": ("a.wav", wav())}
    answer = await client.post(f"/sessions/{id}/say", files=files, data={"mode": "louder"})
    assert "append, interrupt, replace" in problem(answer, 422)
    answer = await client.post(f"/sessions/{id}/say?mode=louder", files=files)
    assert "mode" in problem(answer, 422)
    assert "wait" in problem(await client.post(f"/sessions/{id}/say?wait=ever", json={}), 422)


async def test_a_picture_is_no_sound(client: httpx.AsyncClient, tmp_path: Path) -> None:
    clip = tmp_path / "silent.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    id = await opened(client)
    answer = await client.post(
        f"/sessions/{id}/say", content=clip.read_bytes(), headers={"content-type": "video/avi"}
    )
    assert "holds no sound" in problem(answer, 422)


async def test_too_many_waiting(
    client: httpx.AsyncClient, studio: FakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("voipavatar.server.app.MAX_PENDING", 2)
    studio.word = 1.0
    id = await opened(client)
    for _ in range(2):
        await client.post(f"/sessions/{id}/say", json={"text": "one"})
    answer = await client.post(f"/sessions/{id}/say", json={"text": "one"})
    assert "2 utterances are waiting" in problem(answer, 429)
    await client.post(f"/sessions/{id}/interrupt")
    await asyncio.sleep(0.05)
    assert (await client.post(f"/sessions/{id}/say", json={"text": "x"})).status_code == 202


async def test_nothing_there(client: httpx.AsyncClient) -> None:
    assert "nothing at /nowhere" in problem(await client.get("/nowhere"), 404)
    answer = await client.put("/sessions", json={})
    assert "PUT can't be done here" in problem(answer, 405)
    assert "POST" in answer.headers["allow"] or "GET" in answer.headers["allow"]


# --- idle -----------------------------------------------------------------------------------------


async def test_a_forgotten_session_closes(
    studio: FakeStudio, settings: Settings, personas: list[Persona]
) -> None:
    settings = dataclasses.replace(settings, idle_minutes=0.4 / 60)
    app = create_app(studio, settings, LIVEKIT, personas=lambda: personas)
    other = await studio.open(personas[0])
    async with within(app) as client:
        forgotten, asked, watched = [await opened(client) for _ in range(2)] + [""]
        studio.sessions.pop(other.id)  # makes place for a third
        watched = await opened(client)
        studio.sessions[other.id] = other
        entry = app.state.desk.find(watched)
        with entry.watched():
            end = time.monotonic() + 1.2
            while time.monotonic() < end:
                await client.get(f"/sessions/{asked}")
                await asyncio.sleep(0.1)
            left = set(studio.sessions)
            assert forgotten not in left and {asked, watched, other.id} <= left
        await asyncio.sleep(1.2)
        assert set(studio.sessions) == {other.id}
    await other.aclose()


async def test_a_talking_session_is_not_idle(
    studio: FakeStudio, settings: Settings, personas: list[Persona]
) -> None:
    settings = dataclasses.replace(settings, idle_minutes=0.2 / 60)
    studio.word = 0.8
    async with within(create_app(studio, settings, LIVEKIT, personas=lambda: personas)) as client:
        id = await opened(client)
        await client.post(f"/sessions/{id}/say", json={"text": "long"})
        await asyncio.sleep(0.7)
        assert id in studio.sessions
        await asyncio.sleep(1.2)
        assert id not in studio.sessions


async def test_the_application_closes_what_it_opened(
    studio: FakeStudio, settings: Settings, personas: list[Persona]
) -> None:
    other = await studio.open(personas[0])
    async with within(create_app(studio, settings, LIVEKIT, personas=lambda: personas)) as client:
        await opened(client)
    assert list(studio.sessions) == [other.id]
    await other.aclose()


# --- who may ask ----------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def guarded(
    studio: FakeStudio, settings: Settings, personas: list[Persona]
) -> AsyncIterator[httpx.AsyncClient]:
    settings = dataclasses.replace(settings, token=TOKEN, host="0.0.0.0")
    async with within(create_app(studio, settings, LIVEKIT, personas=lambda: personas)) as one:
        yield one


async def test_token(guarded: httpx.AsyncClient) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"authorization": "Bearer"},
        {"authorization": "Bearer \u00fc".encode("latin-1")},
    ):
        for path in ("/personas", "/sessions", "/metrics", "/nowhere", "/personas/x/portrait"):
            answer = await guarded.get(path, headers=headers)  # type: ignore[arg-type]
            assert "a bearer token is needed" in problem(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
    good = {"authorization": f"bearer {TOKEN}", "host": "avatar.example:8080"}
    assert (await guarded.get("/personas", headers=good)).status_code == 200
    assert (await guarded.post("/sessions", headers=good, json={})).status_code == 201
    assert TOKEN not in (await guarded.get("/health")).text


async def test_token_in_the_address_only_where_a_header_is_hard(guarded: httpx.AsyncClient) -> None:
    problem(await guarded.get(f"/personas?token={TOKEN}"), 401)
    problem(await guarded.post(f"/sessions?token={TOKEN}"), 401)
    assert "no session" in problem(await guarded.get(f"/sessions/x/events?token={TOKEN}"), 404)
    problem(await guarded.get("/sessions/x/events?token=wrong"), 401)


async def test_public_paths_need_no_token(guarded: httpx.AsyncClient) -> None:
    for path in ("/", "/health", "/docs", "/web/app.js", "/favicon.svg", "/openapi.json"):
        assert (await guarded.get(path)).status_code == 200, path
    problem(await guarded.post("/", json={}), 405)


async def test_rebinding(client: httpx.AsyncClient) -> None:
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "[::1", "a@b"):
        answer = await client.get("/personas", headers={"host": host})
        assert "names of its own machine" in problem(answer, 403)
    for host in ("localhost", "localhost:8080", "127.0.0.1", "[::1]:8080", "avatar.localhost"):
        assert (await client.get("/personas", headers={"host": host})).status_code == 200


async def test_other_sites(client: httpx.AsyncClient) -> None:
    answer = await client.post("/sessions", headers={"origin": "https://evil.example"})
    assert "another site" in problem(answer, 403)
    problem(await client.post("/sessions", headers={"origin": "null"}), 403)
    problem(await client.post("/sessions", headers={"origin": "http://127.0.0.1:9"}), 403)
    assert (await client.post("/sessions", headers={"origin": HOME})).status_code == 201
    answer = await client.get("/personas", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


async def test_origins_that_were_let_in(
    studio: FakeStudio, settings: Settings, personas: list[Persona]
) -> None:
    site = "https://shop.example"
    app = create_app(studio, settings, LIVEKIT, personas=lambda: personas, origins=[site])
    async with within(app) as client:
        answer = await client.post("/sessions", headers={"origin": site})
        assert answer.status_code == 201
        assert answer.headers["access-control-allow-origin"] == site
        ask = {"origin": site, "access-control-request-method": "DELETE"}
        assert (await client.options("/sessions/x", headers=ask)).status_code == 200
        other = await client.get("/personas", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_loopback() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]", "a.localhost"):
        assert is_loopback(host), host
    for host in ("0.0.0.0", "::", "192.168.0.1", "avatar.example", "", "127.0.0.1.evil"):
        assert not is_loopback(host), host


def test_exposure(settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"listening on 0\.0\.0\.0 .* VOIPAVATAR_TOKEN"):
        check_exposure(dataclasses.replace(settings, host="0.0.0.0"))
    check_exposure(dataclasses.replace(settings, host="0.0.0.0", token=TOKEN))
    check_exposure(settings)


# --- on a real port -------------------------------------------------------------------------------


async def test_serve_refuses_before_it_listens(settings: Settings, studio: FakeStudio) -> None:
    with pytest.raises(ConfigError, match="needs a token"):
        await serve(
            settings, livekit_url="ws://127.0.0.1:1", api_key="k", api_secret=SECRET, host="0.0.0.0"
        )


async def test_port_taken(settings: Settings, studio: FakeStudio) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is taken: .* --port"):
            await serve(
                settings,
                livekit_url="ws://127.0.0.1:1",
                api_key="k",
                api_secret=SECRET,
                port=port,
                studio=studio,
            )


def test_host_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match="192.0.2.1 is not an address of this machine"):
        with listen("192.0.2.1", 0):
            pass
    with pytest.raises(ConfigError, match="can't be listened on"):
        with listen("no.such.host.invalid", 0):
            pass


async def test_serve_ends_with_streams_open(served: Served, studio: FakeStudio) -> None:
    """Ending takes no longer than it must, however many listen."""
    client = await served()
    id = await opened(client)
    async with client.stream("GET", f"/sessions/{id}/events") as stream:
        events = follow(stream)
        assert (await anext(events))["type"] == "state"
        closing = asyncio.ensure_future(studio.opened[0].aclose())
        assert [event["type"] async for event in events][-1] == "closed"
        await closing


async def test_shutdown_ends_streams_and_sockets(
    studio: FakeStudio, settings: Settings, tmp_path: Path
) -> None:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    (tmp_path / "default.yaml").write_text("title: Clara\n")
    task = asyncio.ensure_future(
        serve(
            dataclasses.replace(settings, persona_dirs=(tmp_path,)),
            livekit_url=LIVEKIT.url,
            api_key="k",
            api_secret=SECRET,
            on_ready=ready.set_result,
            studio=studio,
        )
    )
    async with httpx.AsyncClient(base_url=await ready) as client:
        id = await opened(client)
        async with (
            client.stream("GET", f"/sessions/{id}/events") as stream,
            socket_of(client, id) as wire,
        ):
            events = follow(stream)
            await anext(events)
            began = time.monotonic()
            signal.raise_signal(signal.SIGTERM)
            await asyncio.wait_for(task, 10)
            assert time.monotonic() - began < 4
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    await anext(events)
            with pytest.raises(ConnectionClosed) as closed:
                await wire.recv()
            assert closed.value.rcvd is not None and closed.value.rcvd.code in (1001, 1012)
    assert studio.sessions == {}


async def follow(stream: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Events of a stream; comments are left out."""
    assert stream.headers["content-type"].startswith("text/event-stream")
    async for line in stream.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


async def test_events(served: Served, studio: FakeStudio) -> None:
    client = await served()
    id = await opened(client)
    async with client.stream("GET", f"/sessions/{id}/events") as stream:
        events = follow(stream)
        first = await anext(events)
        assert (first["type"], first["state"], first["session"]) == ("state", "idle", id)
        assert (await client.get(f"/sessions/{id}")).json()["watchers"] == 1
        await client.post(f"/sessions/{id}/say", json={"text": "grün und blau"})
        seen: list[dict[str, Any]] = []
        async for event in events:
            seen.append(event)
            if event["type"] == "state" and event["state"] == "idle":
                break
        assert [one["text"] for one in seen if one["type"] == "caption"] == ["grün", "und", "blau"]
        kinds = [one["type"] for one in seen if one["type"] in ("started", "finished")]
        assert kinds == ["started", "finished"]
    await until(lambda: studio.opened[0].subscribers == 0)
    assert (await client.get(f"/sessions/{id}")).json()["watchers"] == 0


async def test_events_beat(
    served: Served, studio: FakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "HEARTBEAT", 0.05)
    client = await served()
    id = await opened(client)
    async with client.stream("GET", f"/sessions/{id}/events") as stream:
        beats = 0
        async for line in stream.aiter_lines():
            beats += line.startswith(":")
            if beats == 3:
                break


async def until(done: Callable[[], bool], limit: float = 5.0) -> None:
    end = time.monotonic() + limit
    while not done():
        assert time.monotonic() < end, "it didn't happen"
        await asyncio.sleep(0.01)


# --- limits on a real wire ------------------------------------------------------------------------


async def test_ten_megabytes_of_text(served: Served, studio: FakeStudio) -> None:
    client = await served()
    id = await opened(client)
    began = time.monotonic()
    answer = await client.post(f"/sessions/{id}/say", json={"text": "x" * 10_000_000})
    assert "larger than 10,096 bytes" in problem(answer, 413)
    assert time.monotonic() - began < 5

    async def drip() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield b"x" * 65_536

    headers = {"content-type": "application/json"}
    answer = await client.post(f"/sessions/{id}/say", content=drip(), headers=headers)
    problem(answer, 413)
    fine = await client.post(f"/sessions/{id}/say?wait=finished", json={"text": "still here"})
    assert fine.json()["state"] == "said"


async def test_a_refused_body_is_not_waited_for(served: Served) -> None:
    """The announced length is enough: the answer comes before the body would."""
    client = await served()
    id = await opened(client)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.write(
        f"POST /sessions/{id}/say HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        "content-length: 10000000\r\n\r\n".encode()
    )
    answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
    assert b" 413 " in answer
    assert await asyncio.wait_for(reader.read(), 10) is not None  # and the connection ends
    writer.close()
    await writer.wait_closed()


async def test_sound_limit(served: Served) -> None:
    client = await served(max_audio_bytes=50_000)
    id = await opened(client)
    path = f"/sessions/{id}/say"
    kind = {"content-type": "audio/wav"}
    assert "50,000" in problem(await client.post(path, content=wav(2), headers=kind), 413)
    assert "50,000" in problem(await client.post(path, files={"file": wav(2)}), 413)
    assert (await client.post(path, content=wav(1), headers=kind)).status_code == 202


async def test_a_client_that_hangs_up_while_waiting(served: Served, studio: FakeStudio) -> None:
    studio.word = 30.0
    client = await served()
    id = await opened(client)
    with pytest.raises(httpx.ReadTimeout):
        await client.post(f"/sessions/{id}/say?wait=finished", json={"text": "long"}, timeout=0.3)
    assert (await client.get(f"/sessions/{id}")).json()["pending"] == 1  # it is still said


# --- live sound -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def socket_of(
    client: httpx.AsyncClient, id: str, query: str = "?rate=16000", **options: Any
) -> AsyncIterator[ClientConnection]:
    base = f"ws://127.0.0.1:{client.base_url.port}"
    async with connect(f"{base}/sessions/{id}/audio{query}", **options) as wire:
        yield wire


async def told(wire: ClientConnection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(await asyncio.wait_for(wire.recv(), 5))
    return message


async def test_live_sound(served: Served, studio: FakeStudio) -> None:
    client = await served()
    id = await opened(client)
    pcm = (np.arange(3_200) * 7 - 11_000).astype("<i2")
    data = pcm.tobytes()
    async with socket_of(client, id, "?rate=16000&mode=replace") as wire:
        for start in range(0, len(data), 777):  # odd pieces: a sample may be cut in two
            await wire.send(data[start : start + 777])
        assert await told(wire) == {"type": "opened", "utterance": "u1"}
        assert await told(wire) == {"type": "started", "utterance": "u1"}
        assert (await client.get(f"/sessions/{id}")).json()["watchers"] == 1
        await wire.send('{"end": true}')
        finished = await told(wire)
        assert finished["type"] == "finished" and not finished["interrupted"]
        [turn] = studio.opened[0].turns
        assert turn.rate == 16_000 and np.array_equal(np.concatenate(turn.pushed), pcm)
        await wire.send(data)
        assert await told(wire) == {"type": "opened", "utterance": "u2"}
        await wire.send('{"cancel": true}')
        messages = [await told(wire), await told(wire)]
        assert messages[-1]["type"] == "finished" and messages[-1]["interrupted"]


async def test_live_sound_survives_nonsense(served: Served, studio: FakeStudio) -> None:
    client = await served()
    id = await opened(client)
    async with socket_of(client, id) as wire:
        for nonsense in ("{", '"end"', '{"end": false}', "[" * 3_000, '{"stop": 1}', ""):
            await wire.send(nonsense)
            answer = await told(wire)
            assert answer["type"] == "error" and '{"end": true}' in answer["error"]
        await wire.send(b"")
        await wire.send(b"\x01")
        await wire.send('{"end": true}')  # of nothing: nothing
        await wire.send(b"\x00\x01" * 1_600)
        assert (await told(wire))["type"] == "opened"
    await until(lambda: all(turn.finished.done() for turn in studio.opened[0].turns))
    [turn] = studio.opened[0].turns  # who hangs up is heard to the end
    assert not turn.finished.result().interrupted
    assert sum(len(piece) for piece in turn.pushed) == 1_600


async def test_live_sound_after_an_interruption_is_a_new_turn(
    served: Served, studio: FakeStudio
) -> None:
    client = await served()
    id = await opened(client)
    piece = b"\x00\x01" * 1_600
    async with socket_of(client, id) as wire:
        await wire.send(piece)
        assert [(await told(wire))["type"] for _ in range(2)] == ["opened", "started"]
        await client.post(f"/sessions/{id}/interrupt")
        assert (await told(wire))["interrupted"]
        await wire.send(piece)
        assert await told(wire) == {"type": "opened", "utterance": "u2"}


async def test_live_sound_is_bounded(
    served: Served, studio: FakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends faster than is spoken is slowed down, and nothing is lost."""
    monkeypatch.setattr(live, "AHEAD", 0.5)
    client = await served()
    id = await opened(client)
    second = np.zeros(16_000, "<i2").tobytes()
    async with socket_of(client, id, close_timeout=0.2) as wire:
        sending = asyncio.ensure_future(send_all(wire, [second] * 3_000))
        await until(lambda: bool(studio.opened[0].turns))
        await asyncio.sleep(1.0)
        [turn] = studio.opened[0].turns
        assert sum(len(piece) for piece in turn.pushed) / 16_000 <= 8
        assert not sending.done()
        await client.post(f"/sessions/{id}/interrupt")  # overtakes all of it
        await until(turn.finished.done)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        wire.transport.abort()  # a close would wait its turn behind what can't be sent


async def send_all(wire: ClientConnection, pieces: list[bytes]) -> None:
    for piece in pieces:
        await wire.send(piece)


async def test_live_sound_too_much_at_once(served: Served, studio: FakeStudio) -> None:
    client = await served()
    id = await opened(client)
    async with socket_of(client, id) as wire:
        await wire.send(b"\x00" * (live.MAX_MESSAGE + 2))
        with pytest.raises(ConnectionClosed) as closed:
            await wire.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
    assert (await client.get(f"/sessions/{id}")).status_code == 200


async def test_live_sound_that_stalls(
    served: Served, studio: FakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "STALL", 0.3)
    monkeypatch.setattr(live, "_LOOK", 0.05)
    client = await served()
    id = await opened(client)
    async with socket_of(client, id) as wire:
        await wire.send(b"\x00\x01" * 1_600)
        messages = [await told(wire) for _ in range(4)]
        assert "no sound for" in next(one["error"] for one in messages if one["type"] == "error")
        assert any(one["type"] == "finished" for one in messages)


async def test_live_sound_of_a_session_that_closes(
    served: Served, studio: FakeStudio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_LOOK", 0.05)
    client = await served()
    id = await opened(client)
    async with socket_of(client, id) as wire:
        await client.delete(f"/sessions/{id}")
        with pytest.raises(ConnectionClosed) as closed:
            await wire.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.reason == "the session is closed"


@pytest.mark.parametrize(
    ("query", "status", "sentence"),
    [
        ("?rate=7999", 422, "8,000 to 192,000"),
        ("?rate=fast", 422, "rate must be"),
        ("?rate=-16000", 422, "rate must be"),
        ("?rate=" + "9" * 400, 422, "rate must be"),
        ("?rate=16000&mode=louder", 422, "append, interrupt, replace"),
    ],
)
async def test_live_sound_refuses(served: Served, query: str, status: int, sentence: str) -> None:
    client = await served()
    id = await opened(client)
    with pytest.raises(InvalidStatus) as refused:
        async with socket_of(client, id, query):
            pass
    assert refused.value.response.status_code == status
    assert sentence in json.loads(refused.value.response.body or b"")["error"]


async def test_live_sound_to_nobody(served: Served) -> None:
    client = await served()
    with pytest.raises(InvalidStatus) as refused:
        async with socket_of(client, "nobody"):
            pass
    assert refused.value.response.status_code == 404


async def test_live_sound_wants_the_token(served: Served) -> None:
    client = await served(token=TOKEN)
    client.headers["authorization"] = f"Bearer {TOKEN}"
    id = await opened(client)
    for query in ("", "?token=wrong"):
        with pytest.raises(InvalidStatus) as refused:
            async with socket_of(client, id, query):
                pass
        assert refused.value.response.status_code == 401
    async with socket_of(client, id, f"?token={TOKEN}") as wire:
        await wire.ping()
    header = {"authorization": f"Bearer {TOKEN}"}
    async with socket_of(client, id, additional_headers=header) as wire:
        await wire.ping()
    del client.headers["authorization"]
    async with client.stream("GET", f"/sessions/{id}/events?token={TOKEN}") as stream:
        assert (await anext(follow(stream)))["type"] == "state"


async def test_live_sound_of_other_sites(served: Served) -> None:
    client = await served()
    id = await opened(client)
    with pytest.raises(InvalidStatus) as refused:
        async with socket_of(client, id, origin="https://evil.example"):
            pass
    assert refused.value.response.status_code == 403
    upgrade = {
        "host": "evil.example",
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": base64.b64encode(bytes(16)).decode(),
    }
    answer = await client.get(f"/sessions/{id}/audio", headers=upgrade)
    assert "names of its own machine" in problem(answer, 403)


async def test_no_token_in_the_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = await served(token=TOKEN)
    await client.get(f"/sessions/x/events?token={TOKEN}")
    await client.get("/personas", headers={"authorization": f"Bearer {TOKEN}"})
    for record in caplog.records:
        if record.name.startswith(("voipavatar", "uvicorn")):
            assert TOKEN not in f"{record.getMessage()} {record.__dict__}"


def test_ids_cannot_be_guessed() -> None:
    assert len({desk.new_id() for _ in range(1_000)}) == 1_000 and len(desk.new_id()) == 16


def test_guard_is_exported_for_other_applications() -> None:
    assert callable(Guard)
