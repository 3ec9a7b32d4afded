"""Outputs of a session: over HTTP, for `voipavatar stream`, and what a test push finds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from pydantic import SecretStr

from voipavatar.broadcast_bench import Gate, Ingest, examine, find_nginx, free_port
from voipavatar.config import Persona, Settings
from voipavatar.errors import ConfigError, TransportError
from voipavatar.outputs import OutputDesk, OutputWish, outputs_router, read_urls, stream
from voipavatar.probe import probe
from voipavatar.rtmp import StreamUrl
from voipavatar.server.problems import HANDLERS
from voipavatar.session import Session, Studio
from voipavatar.targets import Event

from . import servers

KEY = "k3y-outputs-91c2"
PERSONA = Persona(name="clap", engine="clapper", width=320, height=180)


@pytest.fixture(scope="module", autouse=True)
def _nginx() -> None:
    try:
        find_nginx()
    except ConfigError as error:
        servers.missing(str(error))


@pytest_asyncio.fixture
async def ingest(tmp_path: Path) -> AsyncIterator[Ingest]:
    async with Ingest(tmp_path / "ingest") as server:
        yield server


def settings(folder: Path) -> Settings:
    return Settings(
        cache_dir=folder / "cache", livekit_api_key="devkey", livekit_api_secret="s" * 40
    )


@pytest.mark.server
async def test_http_from_the_first_output_to_the_last(ingest: Ingest, tmp_path: Path) -> None:
    events: list[Event] = []
    async with Studio(settings(tmp_path)) as studio:
        session = await studio.open(PERSONA, id="one")
        desk = OutputDesk(studio)
        app = FastAPI(exception_handlers=HANDLERS)
        app.include_router(outputs_router(desk, studio.settings))

        async def watch() -> None:
            async for event in session.events():
                events.append(event)

        watching = asyncio.ensure_future(watch())
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            wish = {
                "urls": [ingest.url(KEY), ingest.url("other")],
                "preset": "low-latency",
                "shape": "1:1",
                "height": 144,
                "captions": True,
            }
            added = await client.post("/sessions/one/outputs", json=wish)
            assert added.status_code == 201, added.text
            first, second = (one["id"] for one in added.json())
            seen: list[Any] = []
            for _ in range(200):
                seen = (await client.get("/sessions/one/outputs")).json()
                if all(one["state"] == "live" for one in seen):
                    break
                await asyncio.sleep(0.1)
            assert [one["state"] for one in seen] == ["live", "live"], seen
            await asyncio.sleep(2)
            one = (await client.get(f"/sessions/one/outputs/{first}")).json()
            assert one["fps"] > 15 and one["bitrate"] > 50_000 and one["uptime"] > 1
            other_look = await client.post("/sessions/one/outputs", json={**wish, "shape": "9:16"})
            assert other_look.status_code == 409 and "another look" in other_look.text
            gone = await client.delete(f"/sessions/one/outputs/{second}")
            assert gone.status_code == 204
            again = await client.delete(f"/sessions/one/outputs/{second}")
            assert again.status_code == 404
            answers = [added.text, json.dumps(seen), other_look.text]
            for bad, words in (
                ({"urls": ["http://x/" + KEY]}, "can't be streamed"),
                ({"urls": [f"rtmp://h.test/{KEY}"]}, "not complete"),
                ({"urls": [f"/tmp/{KEY}.mkv"]}, "rtmp"),
                ({"urls": []}, "at least 1"),
                ({"urls": [ingest.url(KEY)], "colour": KEY}, "colour"),
                ({"urls": [ingest.url(KEY)], "preset": "tiktok"}, "no preset"),
                ({"urls": [ingest.url(KEY)], "background": "/etc/passwd"}, "colour"),
                ({"urls": [ingest.url(KEY)], "via": "egress"}, "in none"),
            ):
                answer = await client.post("/sessions/one/outputs", json=bad)
                assert answer.status_code in (409, 422) and words in answer.text, answer.text
                answers.append(answer.text)
            assert (await client.get("/sessions/none/outputs")).status_code == 404
            hook = await client.post("/livekit/webhook", content=b"{}")
            assert hook.status_code == 401
            await session.aclose()
            await asyncio.sleep(0.2)
            assert (await client.get("/sessions/one/outputs")).status_code == 404
        await desk.aclose()
        await asyncio.wait_for(watching, 5)
    kinds = {event["event"] for event in events if event["type"] == "output"}
    assert {"connecting", "live", "ended"} <= kinds
    assert not [text for text in [*answers, repr(events)] if KEY in text]
    (path,) = ingest.recordings(KEY)
    found = examine(path)
    assert found.pictures > 40 and found.back == 0 and found.sound_gap <= 0.05


@pytest.mark.server
async def test_a_stream_outlives_its_engine(ingest: Ingest, tmp_path: Path) -> None:
    """The engine dies, the slate is shown over the same connection, the next session goes on."""
    stop = asyncio.Event()
    sessions: list[Session] = []
    events: list[Event] = []
    wish = OutputWish(urls=[SecretStr(ingest.url(KEY))], preset="low-latency")

    async with Studio(settings(tmp_path)) as studio:

        def begin(session: Session) -> None:
            sessions.append(session)

        running = asyncio.create_task(
            stream(studio, PERSONA, wish, stop=stop, on_session=begin, on_event=events.append)
        )
        await _until(lambda: any(one["event"] == "live" for one in events))
        await asyncio.sleep(1)
        await sessions[0].aclose()  # what a stage that failed ends in
        await _until(lambda: len(sessions) == 2)
        await asyncio.sleep(2)
        stop.set()
        await asyncio.wait_for(running, 30)
    assert [one["event"] for one in events if one["event"] != "progress"] == [
        *("connecting", "live", "ended")
    ]
    (path,) = ingest.recordings(KEY)
    found = examine(path)
    assert found.back == 0 and found.sound_gap <= 0.05 and found.seconds > 3


@pytest.mark.server
async def test_a_stream_that_nobody_takes_ends_with_the_reason(tmp_path: Path) -> None:
    url = f"rtmp://127.0.0.1:{free_port()}/live/{KEY}"
    wish = OutputWish(urls=[SecretStr(url)], preset="low-latency")
    async with Studio(settings(tmp_path)) as studio:
        with pytest.raises(TransportError, match="nothing listens") as caught:
            await asyncio.wait_for(stream(studio, PERSONA, wish, stop=asyncio.Event()), 60)
    assert KEY not in str(caught.value)


async def _until(what: Any, timeout: float = 30.0) -> None:
    async def wait() -> None:
        while not what():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(wait(), timeout)


def test_addresses_needn_t_stand_in_the_process_list(tmp_path: Path) -> None:
    file = tmp_path / "targets"
    file.write_text("# mine\nrtmp://a.test/live/1\n\nrtmp://b.test/live/${SECRET}\n")
    env = {"SECRET": "two"}
    assert read_urls([f"@{file}", "rtmp://c.test/live/${SECRET}"], env) == [
        *("rtmp://a.test/live/1", "rtmp://b.test/live/two", "rtmp://c.test/live/two")
    ]
    with pytest.raises(ConfigError, match="can't be read"):
        read_urls([f"@{tmp_path}/none"], env)
    with pytest.raises(ConfigError, match="no address"):
        read_urls([], env)
    with pytest.raises(ConfigError, match="NOT_THERE"):
        read_urls(["rtmp://c.test/live/${NOT_THERE}"], env)


@pytest.mark.server
async def test_a_test_push_finds_what_is_wrong(ingest: Ingest) -> None:
    """DNS, port, silence, key, uplink; and says so when all is well."""

    async def last(url: str, **options: Any) -> tuple[str, bool, str]:
        findings = await probe(StreamUrl.parse(url), **options)
        assert all(one.ok for one in findings[:-1])
        assert KEY not in repr(findings)
        return findings[-1].step, findings[-1].ok, findings[-1].text

    step, ok, text = await last(ingest.url(KEY), seconds=2.0, bitrate=800_000)
    assert (step, ok) == ("push", True), text
    step, ok, text = await last(f"rtmp://no-such-host.invalid/live/{KEY}")
    assert (step, ok) == ("name", False) and "DNS" in text
    step, ok, text = await last(f"rtmp://127.0.0.1:{free_port()}/live/{KEY}")
    assert (step, ok) == ("port", False) and "nothing listens" in text
    step, ok, text = await last(ingest.url(KEY, app="closed"), seconds=1.0)
    assert (step, ok) == ("push", False) and "stream key" in text
    step, ok, text = await last(ingest.url(KEY).replace("rtmp:", "rtmps:"))
    assert (step, ok) == ("tls", False) and "TLS" in text
    async with Gate(ingest.port) as gate:
        gate.throttle(50_000)
        url = ingest.url("slow", gate.port)
        step, ok, text = await last(url, seconds=3.0, bitrate=1_600_000)
        assert (step, ok) == ("push", False) and "lower bitrate" in text
        gate.throttle(None)
        gate.stall()
        step, ok, text = await last(ingest.url(KEY, gate.port))
        assert (step, ok) == ("publish", False) and "doesn't answer" in text
    step, ok, _ = await last(f"srt://127.0.0.1:9?streamid={KEY}")
    assert (step, ok) == ("address", False)


@pytest.mark.server
async def test_a_personas_own_outputs_begin_with_its_session(
    ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAM_KEY", KEY)
    own = {"urls": [ingest.url("${STREAM_KEY}")], "preset": "low-latency", "height": 180}
    broken = {"urls": ["rtmp://127.0.0.1/live/x"], "shape": "round"}
    async with Studio(settings(tmp_path)) as studio:
        desk = OutputDesk(studio)
        session = await studio.open(PERSONA.model_copy(update={"outputs": (own,)}), id="own")
        outputs = desk.of("own")
        assert outputs is not None
        for _ in range(200):
            status = await outputs.status()
            if status and status[0]["state"] == "live":
                break
            await asyncio.sleep(0.05)
        assert status[0]["state"] == "live" and KEY not in json.dumps(status)
        events = session.events()
        bad = await studio.open(PERSONA.model_copy(update={"outputs": (broken,)}), id="bad")
        told: list[Event] = []
        async for event in bad.events():
            told.append(event)
            if event["type"] == "error":
                break
        assert "outputs.0.shape" in told[-1]["error"] and "live/x" not in told[-1]["error"]
        await events.aclose()
        await desk.aclose()
