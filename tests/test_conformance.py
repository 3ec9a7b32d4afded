"""The conformance suite on our own avatar and on LiveKit's runner, in one run."""

from __future__ import annotations

import pytest

from voipavatar.config import Settings
from voipavatar.conformance import run
from voipavatar.errors import ConfigError
from voipavatar.livekit_server import LiveKitServer


@pytest.mark.server
@pytest.mark.slow
async def test_ours_keeps_the_contract(livekit: LiveKitServer) -> None:
    found = await run(Settings.from_env({}), interruptions=8, seconds=6, server=livekit)
    print(found)
    assert found["ends_missing"] == found["ends_missing_after_clear"] == 0
    assert found["ends_doubled"] == found["fallbacks"] == 0
    assert found["position_error"] <= 40
    assert abs(found["sync_at_source"]) <= 80  # generous: others use this machine
    assert "was heard" in found["lost_end"]


@pytest.mark.server
@pytest.mark.slow
async def test_the_runner_can_be_compared(livekit: LiveKitServer) -> None:
    found = await run(Settings.from_env({}), "livekit", interruptions=4, seconds=4, server=livekit)
    print(found)
    assert found["interruptions"] == 4 and found["clear_to_told"] is not None
    with pytest.raises(ConfigError, match="--room"):
        await run(Settings.from_env({}), "somebody", server=livekit)
