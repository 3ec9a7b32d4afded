"""A real browser in a room with an agent and its avatar: one face is seen and one voice heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import pytest_asyncio
from aiohttp import web
from livekit import rtc
from playwright.async_api import Page, async_playwright

from voipavatar.config import Settings, load_persona
from voipavatar.errors import TransportError
from voipavatar.livekit_server import LiveKitServer
from voipavatar.plugin import AvatarSession
from voipavatar.server import fetch_vendor

from .scripted import WORD, Joined, Plain, agent_session, said, token
from .servers import CHROMIUM_FLAGS, missing
from .test_plugin import keys, new_room

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow]

ARTIFACTS = Path(__file__).resolve().parent.parent / "artifacts"

Seen: TypeAlias = dict[str, Any]

# As frontends do it: a tile for every participant with a picture, every voice made audible.
PAGE = """<!doctype html><meta charset="utf-8"><title>a room</title>
<style>body {background: #222; color: #eee; font: 16px sans-serif}
figure {display: inline-block; margin: 8px} video {width: 600px; background: #000}</style>
<div id="tiles"></div>
<script src="/livekit-client.js"></script>
<script>
const { Room, RoomEvent } = LivekitClient;
const room = new Room({ adaptiveStream: false });
const seen = { voices: [], levels: [], gone: [] };
const meters = new Map();
let context;
room.on(RoomEvent.TrackSubscribed, (track, publication, who) => {
  const element = track.attach();
  if (track.kind === "video") {
    const tile = document.createElement("figure");
    const name = document.createElement("figcaption");
    name.textContent = who.identity;
    tile.append(element, name);
    document.getElementById("tiles").append(tile);
    return;
  }
  document.body.append(element);
  seen.voices.push(who.identity);
  const meter = context.createAnalyser();
  meter.fftSize = 1024;
  context.createMediaStreamSource(new MediaStream([track.mediaStreamTrack])).connect(meter);
  meters.set(track.sid, { who: who.identity, meter });
});
room.on(RoomEvent.TrackUnsubscribed, (track, publication, who) => {
  for (const element of track.detach()) (element.closest("figure") ?? element).remove();
  meters.delete(track.sid);
  if (track.kind === "audio") seen.gone.push(who.identity);
});
async function join(url, token) {
  context = new AudioContext();
  await context.resume();
  await room.connect(url, token);
  const wave = new Float32Array(1024);
  setInterval(() => {
    const now = {};
    for (const { who, meter } of meters.values()) {
      meter.getFloatTimeDomainData(wave);
      let power = 0;
      for (const v of wave) power += v * v;
      now[who] = Math.max(now[who] ?? 0, Math.sqrt(power / wave.length));
    }
    seen.levels.push({ at: performance.now() / 1000, now });
  }, 20);
}
function shown() {
  const people = [...room.remoteParticipants.values()].map(who => ({
    identity: who.identity, agent: who.isAgent, attributes: who.attributes,
    tracks: [...who.trackPublications.values()].map(one => one.kind),
  }));
  const videos = [...document.querySelectorAll("video")].map(one => ({
    width: one.videoWidth, frames: one.getVideoPlaybackQuality().totalVideoFrames,
    who: one.closest("figure").textContent,
  }));
  return { ...seen, people, videos, audible: room.canPlaybackAudio };
}
</script>
"""


@pytest_asyncio.fixture
async def page(chromium: Path) -> AsyncIterator[Page]:
    """A page that is in no room yet; no script of it may fail."""
    cache = Settings.from_env().cache_dir
    try:
        library = await asyncio.to_thread(fetch_vendor, "livekit-client.js", cache)
    except TransportError as error:
        missing(str(error))

    async def index(request: web.Request) -> web.StreamResponse:
        return web.Response(text=PAGE, content_type="text/html")

    async def script(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(library)

    app = web.Application()
    app.add_routes([web.get("/", index), web.get("/livekit-client.js", script)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=chromium,
                args=[*CHROMIUM_FLAGS, "--autoplay-policy=no-user-gesture-required"],
            )
            found = await browser.new_page(viewport={"width": 680, "height": 460})
            wrong: list[str] = []
            found.on("pageerror", lambda error: wrong.append(str(error)))
            host, port = runner.addresses[0][:2]
            await found.goto(f"http://{host}:{port}/")
            yield found
            await browser.close()
            assert wrong == []
    finally:
        await runner.cleanup()


async def joined(page: Page, livekit: LiveKitServer, room: str) -> None:
    await page.evaluate("([url, token]) => join(url, token)",
                        [livekit.url, token(livekit, room, "person")])  # fmt: skip


async def shown(page: Page) -> Seen:
    found: Seen = await page.evaluate("shown()")
    return found


async def until_face(page: Page) -> None:
    """Until pictures of an avatar have been on the page for a while."""
    ready = "() => shown().videos.some(one => one.width && one.frames > 20)"
    await page.wait_for_function(ready, timeout=20_000)


def spoken(seen: Seen, since: float) -> dict[str, float]:
    """Seconds for which each participant was audible after `since`, in the page's clock."""
    found: dict[str, float] = {}
    levels = [one for one in seen["levels"] if one["at"] > since]
    for one, after in zip(levels, levels[1:], strict=False):
        for who, level in one["now"].items():
            if level > 0.05:
                found[who] = found.get(who, 0.0) + after["at"] - one["at"]
    return found


@pytest.mark.parametrize("first", ["avatar", "session"])
async def test_a_browser_shows_one_avatar_and_hears_one_voice(
    livekit: LiveKitServer, page: Page, first: str
) -> None:
    """Whichever is started first. The agent that had spoken for itself is silent afterwards."""
    name = new_room("browser")
    persona = load_persona("default").model_copy(update={"width": 640, "height": 360})
    line = "one two three four five six seven eight"
    async with Joined(livekit, name) as room:
        session = agent_session()
        avatar = AvatarSession(persona=persona, mode="local")
        try:
            await joined(page, livekit, name)
            if first == "session":
                await session.start(Plain(), room=room, record=False)
                await said(session, "one two three four")
                await asyncio.sleep(0.3)
                alone = await shown(page)
                assert alone["videos"] == [] and set(spoken(alone, 0.0)) == {"agent"}
            await avatar.start(session, room, **keys(livekit))
            if first == "avatar":
                await session.start(Plain(), room=room, record=False)
            await avatar.wait_for_join(timeout=20)
            await until_face(page)
            begin = (await shown(page))["levels"][-1]["at"]
            speaking = asyncio.create_task(said(session, line))
            await asyncio.sleep(1.0)
            ARTIFACTS.mkdir(exist_ok=True)
            await page.screenshot(path=ARTIFACTS / f"one-avatar-{first}.png")
            assert not (await speaking).interrupted
            await asyncio.sleep(0.5)
            seen = await shown(page)
            own = [one.kind for one in room.local_participant.track_publications.values()]
            assert rtc.TrackKind.KIND_AUDIO not in own
        finally:
            await session.aclose()
            await avatar.aclose()

    # One picture, of the avatar, which is there for the agent.
    assert [one["who"] for one in seen["videos"]] == ["voipavatar"]
    assert seen["videos"][0]["width"] == 640
    people = {one["identity"]: one for one in seen["people"]}
    assert set(people) == {"agent", "voipavatar"}
    assert people["voipavatar"]["attributes"]["lk.publish_on_behalf"] == "agent"
    assert people["voipavatar"]["agent"] and sorted(people["voipavatar"]["tracks"]) == [
        "audio",
        "video",
    ]

    # One voice: no other is offered, and the line is heard once, from the avatar.
    assert people["agent"]["tracks"] == []
    before = ["agent"] if first == "session" else []
    assert seen["voices"] == [*before, "voipavatar"] and seen["gone"] == before
    assert seen["audible"]
    heard = spoken(seen, begin)
    print(f"heard, in seconds: {heard}")
    assert set(heard) == {"voipavatar"}
    assert heard["voipavatar"] == pytest.approx(WORD * len(line.split()), abs=0.4)
