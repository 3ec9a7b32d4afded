"""A real session that is interrupted again and again, at any moment, in both modes.

VOIPAVATAR_INTERRUPTIONS says how often; the full length is 200.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest
from livekit.agents import AgentSession

from voipavatar import mouthpiece
from voipavatar.livekit_server import LiveKitServer
from voipavatar.media import FRAME_RATE
from voipavatar.mouthpiece import CLEAR_TIMEOUT, Direct, Segment, Wire
from voipavatar.plugin import AvatarSession

from .scripted import WORD, said
from .test_plugin import local, new_room, viewer
from .test_worker import talking, unique, working

pytestmark = [pytest.mark.server, pytest.mark.slow]

TIMES = int(os.environ.get("VOIPAVATAR_INTERRUPTIONS", "0"))
"""How often; 0: the short length of each mode."""
MEASURED = 5
"""One in so many is heard by itself at the viewer, so that its length can be told."""
LINE = "one two three four five six seven eight"


@asynccontextmanager
async def speaking(
    livekit: LiveKitServer, mode: str, name: str
) -> AsyncIterator[tuple[AgentSession[Any], AvatarSession]]:
    async with AsyncExitStack() as stack:
        if mode == "local":
            session, avatar, _ = await stack.enter_async_context(local(livekit, name))
        else:
            worker = unique("worker")
            await stack.enter_async_context(working(livekit, worker))
            session, avatar, _ = await stack.enter_async_context(talking(livekit, name, worker))
        await avatar.wait_for_join(timeout=20)
        yield session, avatar


def moment(rng: random.Random) -> float:
    """Seconds into a line: before its sound was made, on its way, at its first words."""
    return rng.choice((0.0, rng.uniform(0.0, 0.05), rng.uniform(0.0, 0.4)))


@pytest.mark.parametrize(("mode", "times"), [("local", TIMES or 20), ("dispatch", TIMES or 40)])
async def test_interruptions_in_a_row(
    livekit: LiveKitServer,
    mode: str,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each segment ends once, at once, where it was heard to end, and the session speaks on."""
    rng = random.Random(11)
    name = new_room("barge")
    segments: list[Segment] = []

    class Noted(Segment):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            segments.append(self)

    monkeypatch.setattr(mouthpiece, "Segment", Noted)
    ends: list[Any] = []
    waits: list[float] = []
    errors: list[float] = []
    async with speaking(livekit, mode, name) as (session, avatar), viewer(livekit, name) as seen:
        await seen.wait()
        output = avatar._mouthpiece
        assert output is not None
        output.on("playback_finished", ends.append)
        for i in range(times):
            measured = i % MEASURED == MEASURED - 1
            if measured:
                await asyncio.sleep(0.35)
            begin = time.monotonic()
            if rng.random() < 0.5:
                handle = session.say(LINE)
            else:
                session.llm.lines.append(LINE)  # type: ignore[union-attr]
                handle = session.generate_reply(user_input="go on")
            await asyncio.sleep(rng.uniform(0.4, 0.9) if measured else moment(rng))
            asked = time.monotonic()
            await asyncio.wait_for(session.interrupt(force=True), 10)
            await asyncio.wait_for(handle.wait_for_playout(), 10)
            waits.append(time.monotonic() - asked)
            assert handle.interrupted
            if not measured:
                continue
            await asyncio.sleep(0.4)  # for the last of it to be heard
            spans = seen.loud_spans(gap=0.15)
            starts = seen.when([first for first, _ in spans])
            heard = [one for one, start in zip(spans, starts, strict=True) if start > begin]
            if heard and ends[-1].playback_position > 0.1:
                # Without the pauses that a stalled machine puts in between.
                length = sum(last - first for first, last in heard) / FRAME_RATE
                errors.append(abs(length - ends[-1].playback_position))
        interrupted = len(ends)
        since = time.monotonic()
        handle = await said(session, LINE)
        await asyncio.sleep(0.5)
        spans = seen.loud_spans(gap=0.15)
        starts = seen.when([first for first, _ in spans])
        whole = [one for one, start in zip(spans, starts, strict=True) if start > since]
        route: Any = output.route
        assert not output.pending

    print(
        f"{mode}: {times} interruptions, {interrupted} segments; told over after "
        f"{np.median(waits) * 1000:.0f} ms, {np.max(waits) * 1000:.0f} at most; position off by "
        f"{np.median(errors) * 1000:.0f} ms, {np.percentile(errors, 95) * 1000:.0f} at p95, "
        f"{np.max(errors) * 1000:.0f} at most, of {len(errors)}"
    )
    assert len(ends) == len(segments) == interrupted + 1
    assert "more times than" not in caplog.text, "an end was told twice"
    for end, segment in zip(ends[:-1], segments, strict=False):
        # A clear may come when the little that was made of a line is over already.
        whole_anyway = end.playback_position == pytest.approx(segment.length, abs=0.03)
        if not end.interrupted:
            print(f"over before its clear: {end.playback_position:.3f} of {segment.length:.3f} s")
        assert end.interrupted or whole_anyway
    assert not handle.interrupted and not ends[-1].interrupted
    total = sum(end - begin for begin, end in whole) / FRAME_RATE
    assert total == pytest.approx(WORD * len(LINE.split()), abs=0.1)
    assert interrupted >= times // 2, "most interruptions came before there was a sound"

    # The time-out is taken nowhere, neither ours nor the 2 s of who waits for an avatar.
    assert isinstance(route, Direct if mode == "local" else Wire) and avatar.lost == 0
    assert getattr(route, "fallbacks", 0) == 0
    assert max(waits) < min(CLEAR_TIMEOUT, 2.0)

    # As heard behind a jitter buffer, which stretches and shortens by itself.
    assert len(errors) >= times // MEASURED * 0.7
    assert np.median(errors) <= 0.04 and np.percentile(errors, 90) <= 0.08
