"""The conformance suite on our own avatar and on LiveKit's runner, in one run."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import uuid

import pytest

from voipavatar import conformance
from voipavatar.config import Settings
from voipavatar.conformance import ROWS, compare, markdown, run, runner
from voipavatar.errors import ConfigError, TransportError
from voipavatar.livekit_server import LiveKitServer

from .workers import environment


@pytest.mark.server
@pytest.mark.slow
async def test_ours_keeps_the_contract_and_the_runner_stands_beside_it(
    livekit: LiveKitServer,
) -> None:
    both = await compare(Settings.from_env({}), interruptions=6, seconds=5, server=livekit)
    table = markdown(both)
    print(table)
    ours, theirs = both
    assert ours["ends_missing"] == ours["ends_missing_after_clear"] == 0
    assert ours["ends_doubled"] == ours["fallbacks"] == ours["clears_unheard"] == 0
    # What is promised; usual is less than half of it, since others use this machine.
    assert ours["clear_to_silence_p95"] <= 150
    assert ours["position_error"] <= 40 and ours["position_error_interrupted_p95"] <= 40
    assert 0 <= ours["started_before_heard"] <= 80
    assert abs(ours["sync_at_source"]) <= 40
    assert isinstance(ours["stall_recovery"], (int, float)), ours["stall_recovery"]
    assert 0 <= ours["stall_recovery"] <= 2000 and abs(ours["stall_lasting"]) <= 40
    assert "was heard" in ours["lost_end"]
    for one in both:  # measured each in a process of its own
        assert 0 < one["cpu_idle"] < 150 and 0 < one["cpu_talking"] < 150
        assert not set(one) - set(ROWS) - {"avatar"}
    assert theirs["interruptions"] == 6 and theirs["clear_to_told"] is not None
    head, _, *rows = table.splitlines()
    assert head.endswith("| voipavatar | livekit |") and len(rows) >= 20
    with pytest.raises(ConfigError, match="--room"):
        await run(Settings.from_env({}), "somebody", server=livekit)


@pytest.mark.server
async def test_nobody_there_is_an_error(
    livekit: LiveKitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance, "PATIENCE", 1.0)
    with pytest.raises(TransportError, match="'somebody' took no sound"):
        await run(Settings.from_env({}), "somebody", room="an-empty-room", server=livekit)


@pytest.mark.server
@pytest.mark.slow
async def test_somebody_elses_avatar_is_tried_where_it_is(livekit: LiveKitServer) -> None:
    """In a room of its own choice, as whoever it is: the command has not started it."""
    room = f"theirs-{uuid.uuid4().hex[:6]}"
    async with runner(livekit, room, "somebody"):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "voipavatar", "conformance", "--avatar", "somebody",
            "--room", room, "--interruptions", "3", "--seconds", "3", "--json",
            env=environment(livekit), stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            out, told = await asyncio.wait_for(child.communicate(), 120)
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
    assert child.returncode == 0, told.decode()
    [found] = json.loads(out)
    print(found)
    assert found["avatar"] == "somebody" and found["interruptions"] == 3
    assert found["ends_missing"] == found["clears_unheard"] == 0
    assert found["position_error"] <= 40 and found["clear_to_silence_as_heard"] > 0
    assert isinstance(found["sync_at_source"], float) and "was heard" in found["lost_end"]
    # Its process is not ours to measure, or to hold up.
    assert not {"cpu_idle", "cpu_talking", "stall_recovery", "stall_lasting"} & set(found)


@pytest.mark.server
async def test_one_signal_ends_it(livekit: LiveKitServer) -> None:
    """And the process that hosts the avatar with it: the fixtures see to that."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "voipavatar", "conformance", "--avatar", "voipavatar",
        env=environment(livekit), stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert child.stderr is not None
    try:
        line = b""
        while b"voipavatar: " not in line:
            line = await asyncio.wait_for(child.stderr.readline(), 60)
            assert line, "it ended by itself"
        await asyncio.sleep(3.0)  # into the midst of it
        child.send_signal(signal.SIGTERM)
        await asyncio.wait_for(child.communicate(), 15)
        assert child.returncode == 130
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
