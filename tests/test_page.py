"""The page in a real Chromium, in front of a studio without engine: what it shows and does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import httpx
import numpy as np
import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from voipavatar.config import Settings
from voipavatar.errors import TransportError
from voipavatar.server import fetch_vendor, serve

from .fakes import FakeStudio
from .servers import Ports, missing

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TOKEN = "a-token-that-nobody-guesses"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-ui-for-media-stream "
    "--use-fake-device-for-media-stream"
).split()
PATIENCE = 20_000
"""Milliseconds that a state has to come: the machine may be busy."""


class Server:
    """`serve` on one port, which can be stopped and started again."""

    def __init__(self, settings: Settings, studio: FakeStudio) -> None:
        self.settings = settings
        self.studio = studio
        self.url = ""
        self._task: asyncio.Future[Any] | None = None

    async def start(self) -> None:
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._task = asyncio.ensure_future(
            serve(
                self.settings,
                livekit_url="ws://127.0.0.1:9",  # nobody there: the room is another test's
                api_key="key",
                api_secret="a-secret-long-enough-for-hs256-keys",
                on_ready=ready.set_result,
                studio=self.studio,
                signals=False,
            )
        )
        await asyncio.wait([ready, self._task], timeout=20, return_when=asyncio.FIRST_COMPLETED)
        self.url = ready.result()

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None


@pytest_asyncio.fixture
async def server(tmp_path: Path, ports: Ports) -> AsyncIterator[Server]:
    """Two personas, and sessions that say three words a second."""
    cv2.imwrite(str(tmp_path / "face.png"), np.full((72, 128, 3), (90, 140, 200), np.uint8))
    voices = "[piper, {use: edge, options: {voice: en-GB-RyanNeural}}]"
    (tmp_path / "default.yaml").write_text(
        f"title: Clara\ndescription: Calm\nportrait: face.png\nvoice: {voices}\n"
    )
    (tmp_path / "bruno.yaml").write_text("title: Bruno\ngreeting: Good evening.\n")
    cache = Settings.from_env().cache_dir
    try:
        await asyncio.to_thread(fetch_vendor, "livekit-client.js", cache)
    except TransportError as error:
        missing(str(error))
    settings = Settings(cache_dir=cache, port=ports(), persona_dirs=(tmp_path,), max_sessions=2)
    one = Server(settings, FakeStudio(word=0.33))
    await one.start()
    yield one
    await one.stop()


@pytest_asyncio.fixture
async def browser(chromium: Path) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        found = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        await found.close()


Visit: TypeAlias = Callable[..., Awaitable[Page]]


@pytest_asyncio.fixture
async def visit(server: Server, browser: Browser) -> AsyncIterator[Visit]:
    """Opens the page; at the end no script may have failed and no policy been broken."""
    wrong: list[str] = []

    async def go(path: str = "", *, width: int = 1280, height: int = 800, **options: Any) -> Page:
        context = await browser.new_context(viewport={"width": width, "height": height}, **options)
        page = await context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda message: (
                wrong.append(message.text) if "Content Security Policy" in message.text else None
            ),
        )
        await page.goto(server.url + path)
        return page

    yield go
    assert wrong == []


async def talkative(page: Page) -> None:
    """Wait until the page has a session and lets one say something."""
    await expect(page.get_by_test_id("say")).to_be_enabled(timeout=PATIENCE)


def entries(page: Page) -> Any:
    return page.get_by_test_id("history").locator("li")


async def test_say_captions_and_stop_with_the_keyboard(visit: Visit, server: Server) -> None:
    page = await visit()
    await talkative(page)
    await page.get_by_test_id("text").focus()
    await page.keyboard.type("one two three four five")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("six seven")
    await page.keyboard.press("Enter")
    await expect(page.get_by_test_id("text")).to_have_value("")
    await page.keyboard.type("this one waits")
    await page.keyboard.press("Enter")
    first, second = entries(page).nth(0), entries(page).nth(1)
    await expect(first).to_have_attribute("data-status", "speaking")
    await expect(second).to_have_attribute("data-status", "queued")
    captions = page.get_by_test_id("captions")
    await expect(captions).to_have_text(re.compile(r"^one two three"), timeout=PATIENCE)
    await expect(captions).not_to_contain_text("five six")
    await expect(page.get_by_test_id("latency")).to_have_text(re.compile(r"^\d+ ms$"))
    await page.keyboard.press("Escape")
    await expect(first).to_have_attribute("data-status", "interrupted")
    await expect(second).to_have_attribute("data-status", "interrupted")
    await expect(second).to_contain_text("not said")
    await expect(captions).to_be_empty()
    await expect(page.get_by_test_id("stop")).to_be_disabled()
    [session] = server.studio.opened
    assert [text for text, *_ in session.said] == [
        "one two three four five\nsix seven",
        "this one waits",
    ]
    assert session.said[0][2] is not None and session.said[0][2][0].use == "piper"


async def test_a_line_is_said_to_its_end(visit: Visit) -> None:
    page = await visit()
    await talkative(page)
    await page.get_by_test_id("text").fill("short one")
    await page.get_by_test_id("say").click()
    await expect(entries(page).first).to_have_attribute("data-status", "said", timeout=PATIENCE)
    await expect(page.get_by_test_id("captions")).to_be_empty(timeout=PATIENCE)


async def test_replace_and_voice(visit: Visit, server: Server) -> None:
    page = await visit()
    await talkative(page)
    await page.get_by_test_id("text").fill("one two three four five six seven eight")
    await page.keyboard.press("Enter")
    await expect(entries(page).first).to_have_attribute("data-status", "speaking")
    await page.get_by_test_id("mode").select_option("replace")
    await page.get_by_test_id("voice").select_option(label="Edge (online): en-GB-RyanNeural")
    await page.get_by_test_id("text").fill("instead")
    await page.get_by_test_id("say").click()
    await expect(entries(page).nth(0)).to_have_attribute("data-status", "interrupted")
    await expect(entries(page).nth(1)).to_have_attribute("data-status", "said", timeout=PATIENCE)
    _, mode, voice = server.studio.opened[0].said[1]
    assert mode == "replace" and voice is not None and voice[0].use == "edge"


async def test_what_others_say_is_shown(visit: Visit, server: Server) -> None:
    page = await visit()
    await talkative(page)
    async with httpx.AsyncClient(base_url=server.url) as client:
        path = f"/sessions/{server.studio.opened[0].id}/say"
        await client.post(path, json={"text": "from elsewhere"})
    await expect(entries(page).first).to_contain_text("from elsewhere")
    await expect(entries(page).first).to_have_attribute("data-status", "said", timeout=PATIENCE)


async def test_a_refused_line_says_why(visit: Visit) -> None:
    page = await visit()
    await talkative(page)
    await page.get_by_test_id("text").fill("unspeakable")
    await page.keyboard.press("Enter")
    await expect(entries(page).first).to_have_attribute("data-status", "failed")
    await expect(page.get_by_test_id("problem")).to_contain_text("no sound for this text")
    await page.get_by_test_id("text").fill("   ")
    await page.keyboard.press("Enter")
    await expect(entries(page)).to_have_count(1)


async def test_persona(visit: Visit, server: Server) -> None:
    page = await visit()
    await talkative(page)
    await expect(page.locator("#poster")).to_be_visible()
    size = "(image) => image.decode().then(() => image.naturalWidth)"
    assert await page.locator("#poster").evaluate(size) == 128
    await expect(page.get_by_role("heading", level=1)).to_have_text("ClaraCalm")
    await page.get_by_test_id("persona").select_option(label="Bruno")
    await expect(page.get_by_role("heading", level=1)).to_have_text("Bruno")
    await expect(page.locator("#poster")).to_be_hidden()
    await until(lambda: [one.persona.name for one in server.studio.sessions.values()] == ["bruno"])
    await talkative(page)
    assert server.studio.opened[0].closed is not None


async def test_reload_keeps_the_session(visit: Visit, server: Server) -> None:
    page = await visit()
    await talkative(page)
    await page.reload()
    await talkative(page)
    await until(lambda: server.studio.opened[0].subscribers == 1)
    assert len(server.studio.opened) == 1


async def test_the_server_goes_and_comes_back(visit: Visit, server: Server) -> None:
    page = await visit()
    await talkative(page)
    await server.stop()
    state = page.get_by_test_id("state")
    await expect(state).to_have_attribute("data-state", "gone", timeout=PATIENCE)
    await expect(page.get_by_test_id("notice")).to_contain_text("out of reach")
    await expect(page.get_by_test_id("say")).to_be_disabled()
    await page.get_by_test_id("text").fill("kept while it was away")
    await page.keyboard.press("Enter")
    await expect(page.get_by_test_id("text")).to_have_value("kept while it was away")
    await server.start()
    await talkative(page)
    await expect(state).not_to_have_attribute("data-state", "gone")
    await page.get_by_test_id("text").press("Enter")
    await expect(entries(page).first).to_have_attribute("data-status", "said", timeout=PATIENCE)
    assert len(server.studio.opened) == 2


async def test_a_session_that_ends_is_followed_by_another(visit: Visit, server: Server) -> None:
    page = await visit()
    await talkative(page)
    await server.studio.opened[0].aclose()
    await until(lambda: len(server.studio.opened) == 2)
    await talkative(page)


async def test_token(visit: Visit, server: Server) -> None:
    await server.stop()
    server.settings = dataclasses.replace(server.settings, token=TOKEN)
    await server.start()
    page = await visit()
    await expect(page.get_by_test_id("state")).to_have_attribute(
        "data-state", "locked", timeout=PATIENCE
    )
    await page.get_by_label("Token").fill("wrong")
    await page.keyboard.press("Enter")
    await expect(page.get_by_label("Token")).to_have_value("")
    await page.get_by_label("Token").fill(TOKEN)
    await page.keyboard.press("Enter")
    await talkative(page)
    other = await visit(f"?token={TOKEN}")
    await talkative(other)
    assert TOKEN not in other.url


async def test_all_places_taken(visit: Visit, server: Server) -> None:
    for _ in range(2):
        await talkative(await visit())
    page = await visit()
    await expect(page.get_by_test_id("state")).to_have_attribute(
        "data-state", "full", timeout=PATIENCE
    )
    await expect(page.get_by_test_id("notice")).to_contain_text("All 2 sessions are taken")
    await server.studio.opened[0].aclose()
    await page.get_by_test_id("retry").click()
    # the first page takes the place, or this one: whoever asks first; one of them has to wait
    await until(lambda: len(server.studio.opened) == 3)


async def test_microphone(visit: Visit, server: Server) -> None:
    page = await visit(permissions=["microphone"])
    await talkative(page)
    button = page.get_by_test_id("mic")
    await button.click()
    await expect(button).to_have_attribute("aria-pressed", "true", timeout=PATIENCE)
    session = server.studio.opened[0]
    await until(lambda: bool(session.turns) and session.turns[0].length > 0.5)
    await button.click(force=True)  # it pulses while it listens: never "stable" to Playwright
    await expect(button).to_have_attribute("aria-pressed", "false")
    await until(session.turns[0].finished.done)
    await expect(page.get_by_test_id("captions")).to_be_empty()
    heard = np.concatenate(session.turns[0].pushed)
    assert session.turns[0].rate >= 44_100 and np.abs(heard.astype(np.int32)).max() > 500


@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (844, 390), (1280, 800)])
async def test_it_fits(visit: Visit, width: int, height: int) -> None:
    """Nothing sticks out, and what one needs is on the screen."""
    page = await visit(width=width, height=height)
    await talkative(page)
    for text in ("a line", "x" * 300):
        await page.get_by_test_id("text").fill(text)
        await page.keyboard.press("Enter")
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("avatar-video", "text", "say", "stop", "state", "persona", "voice"):
        box = await page.get_by_test_id(name).bounding_box()
        assert box is not None and box["width"] >= 36 and box["height"] >= 20, (name, box)
        assert box["x"] >= 0 and box["x"] + box["width"] <= width + 1, (name, box)
        assert box["y"] >= 0 and box["y"] + box["height"] <= height + 1, (name, box)
    picture = await page.get_by_test_id("avatar-video").bounding_box()
    assert picture is not None and picture["height"] >= height * 0.22


async def test_everything_has_a_name_and_can_be_reached(visit: Visit) -> None:
    page = await visit()
    await talkative(page)
    nameless = await page.evaluate(
        """() => [...document.querySelectorAll("button, select, textarea, input")]
            .filter((one) => one.checkVisibility() && !one.labels?.length
                && !one.textContent.trim() && !one.getAttribute("aria-label"))
            .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    await page.get_by_test_id("text").fill("something")
    reached = set()
    for _ in range(14):
        await page.keyboard.press("Tab")
        reached.add(await page.evaluate("document.activeElement.id"))
    assert {"persona", "voice", "text", "mic", "mode", "say"} <= reached
    live = "(id) => document.querySelector(`[data-testid=${id}]`).getAttribute('aria-live')"
    assert await page.evaluate(live, "state") == await page.evaluate(live, "captions") == "polite"


async def test_no_library(visit: Visit, server: Server, tmp_path: Path) -> None:
    """Without LiveKit's client the page says what is missing, and still talks to the session."""
    await server.stop()
    blocked = tmp_path / "a-file"
    blocked.write_text("where a folder should be")
    server.settings = dataclasses.replace(server.settings, cache_dir=blocked)
    await server.start()
    page = await visit()
    await expect(page.get_by_test_id("notice")).to_contain_text("No picture", timeout=60_000)
    await talkative(page)


async def test_docs(visit: Visit) -> None:
    page = await visit("docs")
    await expect(page.locator("#docs")).to_contain_text("/sessions/{id}/say", timeout=60_000)


async def until(done: Callable[[], bool], limit: float = 20.0) -> None:
    end = asyncio.get_running_loop().time() + limit
    while not done():
        assert asyncio.get_running_loop().time() < end, "it didn't happen"
        await asyncio.sleep(0.02)
