"""What a stranger does: start the demo, open the page, type a line, watch, interrupt, leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from playwright.async_api import Page, async_playwright

from .servers import CHROMIUM_FLAGS, Ports

pytestmark = [pytest.mark.server, pytest.mark.browser, pytest.mark.slow]

ARTIFACTS = Path(__file__).resolve().parent.parent / "artifacts"

WATCH = """async (seconds) => {
  const video = document.querySelector('[data-testid=avatar-video]');
  const sounds = [...document.querySelectorAll('audio, video')].map(e => e.srcObject)
    .filter(s => s && s.getAudioTracks().length);
  const context = new AudioContext();
  await context.resume();
  const meter = context.createAnalyser();
  meter.fftSize = 1024;
  context.createMediaStreamSource(sounds[0]).connect(meter);
  const wave = new Float32Array(meter.fftSize);
  const [w, h] = [64, 48];
  const canvas = new OffscreenCanvas(w, h);
  const brush = canvas.getContext('2d', {willReadFrequently: true});
  const seen = [];
  const end = performance.now() + seconds * 1000;
  await new Promise(done => {
    const look = (now, info) => {
      const [vw, vh] = [video.videoWidth, video.videoHeight];
      // The lower half of the face of a centred portrait.
      brush.drawImage(video, vw * .43, vh * .5, vw * .14, vh * .2, 0, 0, w, h);
      const pixels = brush.getImageData(0, 0, w, h).data;
      const grey = [];
      for (let i = 0; i < pixels.length; i += 4)
        grey.push((pixels[i] + pixels[i + 1] + pixels[i + 2]) / 3);
      meter.getFloatTimeDomainData(wave);
      let power = 0;
      for (const v of wave) power += v * v;
      seen.push({now, frames: info.presentedFrames, grey, level: Math.sqrt(power / wave.length)});
      performance.now() < end ? video.requestVideoFrameCallback(look) : done();
    };
    video.requestVideoFrameCallback(look);
  });
  await context.close();
  return seen;
}"""


@pytest_asyncio.fixture
async def demo(livekit: Any, ports: Ports) -> AsyncIterator[str]:
    """The address of a demo that runs; it is ended by Ctrl-C, and must be gone by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "voipavatar", "demo", "--no-browser", "--port", str(ports()),
        env=os.environ | {"LIVEKIT_URL": livekit.url, "LIVEKIT_API_KEY": livekit.api_key,
                          "LIVEKIT_API_SECRET": livekit.api_secret},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    said: list[str] = []

    async def until_ready() -> str:
        assert process.stdout is not None
        async for line in process.stdout:
            said.append(line.decode())
            found = re.search(r"http://127\.0\.0\.1:\d+/", said[-1])
            if found:
                return found.group()
        raise AssertionError("the demo ended: " + "".join(said))

    async def drain() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            said.append(line.decode())

    try:
        address = await asyncio.wait_for(until_ready(), 120)
        reader = asyncio.create_task(drain())
        yield address
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.wait(), 20)
        await reader
        assert process.returncode in (0, 130), "".join(said)
        assert "Traceback" not in "".join(said)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest_asyncio.fixture
async def page(demo: str, chromium: Path) -> AsyncIterator[Page]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=str(chromium),
            args=[*CHROMIUM_FLAGS, "--autoplay-policy=no-user-gesture-required"],
        )
        page = await browser.new_page(viewport={"width": 1280, "height": 800})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        await page.goto(demo)
        yield page
        await browser.close()
        assert not problems


async def state(page: Page) -> str:
    return (await page.inner_text("[data-testid=state]")).strip().lower()


async def until(page: Page, *wanted: str, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while await state(page) not in wanted:
        assert time.monotonic() < end, f"the page says {await state(page)!r}, not {wanted}"
        await asyncio.sleep(0.05)


async def test_a_line_typed_into_the_page_is_spoken_by_the_face(page: Page) -> None:
    await until(page, "ready")
    width = "document.querySelector('[data-testid=avatar-video]').videoWidth"
    while not await page.evaluate(width):
        await asyncio.sleep(0.1)
    await asyncio.sleep(2.0)
    await page.fill(
        "[data-testid=text]",
        "Hello. I am a face for your voice agent, and I run on a plain processor.",
    )
    watching = asyncio.create_task(page.evaluate(WATCH, 12.0))
    await asyncio.sleep(2.0)
    await page.press("[data-testid=text]", "Enter")
    await until(page, "speaking", "talking")
    await asyncio.sleep(1.0)
    ARTIFACTS.mkdir(exist_ok=True)
    await page.screenshot(path=ARTIFACTS / "page.png")
    assert (await page.inner_text("[data-testid=captions]")).strip()
    seen = await watching

    times = np.array([one["now"] for one in seen]) / 1000
    frames = seen[-1]["frames"] - seen[0]["frames"]
    rate = frames / (times[-1] - times[0])
    print(f"{rate:.1f} frames a second, {len(seen)} looked at")
    assert 22 <= rate <= 26

    level = np.array([one["level"] for one in seen])
    grey = np.array([one["grey"] for one in seen])
    # Openness, not mere motion: the head moves a little at rest too.
    dark = np.sort(grey, axis=1)[:, : grey.shape[1] // 12].mean(axis=1)
    # The meter and the picture have clocks of their own: what is near an edge counts for neither.
    sound = level > 0.02
    loud = np.convolve(sound, np.ones(5), "same") > 0
    silent = np.convolve(sound, np.ones(31), "same") == 0
    assert loud.sum() > 40, "the page made no sound"
    assert silent.sum() > 40
    motion = np.abs(np.diff(dark))
    talking, still = motion[loud[1:]].mean(), motion[silent[1:]].mean()
    print(f"the mouth moves {talking:.2f} while loud, {still:.2f} while silent")
    assert talking > 3 * still
    assert dark[loud].std() > 3 * dark[silent].std()


async def test_stop_stops_it(page: Page) -> None:
    await until(page, "ready")
    await page.fill("[data-testid=text]", "One, two, three, four, five, six, seven, eight. " * 4)
    await page.click("[data-testid=say]")
    await until(page, "speaking", "talking")
    await asyncio.sleep(1.0)
    await page.click("[data-testid=stop]")
    await until(page, "ready", seconds=3.0)
    seen = await page.evaluate(WATCH, 2.0)
    level = np.array([one["level"] for one in seen])
    assert level[len(level) // 4 :].max() < 0.01, "it is still heard"
