"""What is measured, and what of it is left out."""

from __future__ import annotations

import pytest

from voipavatar import bench
from voipavatar.config import Settings
from voipavatar.livekit_server import LiveKitServer


def test_beeps_are_left_out_around_stalls_of_the_machine_only() -> None:
    """And they are counted."""
    measured = bench._Measured(
        seen=[(at / 2, 0.05) for at in range(40)],
        buffers=[(at / 2, 0.03) for at in range(40)],
    )
    assert measured.left_out == 0 and len(measured.source()) == 40
    assert {round(value, 9) for _, value in measured.source()} == {0.02}
    measured.stalls = [10.0]
    times = [at for at, _ in measured.source()]
    assert not [at for at in times if 9.0 < at < 13.0] and {9.0, 13.0} <= set(times)
    assert measured.left_out == 7 and len(times) == 33
    measured.held["loop"] = 17.0  # was asked for: its beeps count
    assert measured.left_out == 7
    measured.buffers = measured.buffers[:34]  # up to 16.5 s
    assert len(measured.source()) == 28 and measured.left_out == 7


@pytest.mark.server
@pytest.mark.slow
async def test_a_session_in_a_room_costs_little(livekit: LiveKitServer) -> None:
    """Of the event loop's thread, at 720p and 25 pictures a second. Processor time, so that other
    work on the machine is not in it."""
    found = await bench.stage(Settings.from_env({}), seconds=16, room=True, server=livekit)
    print(found)
    assert found["size"] == "1280x720 at 25" and found["into"] == "a room"
    # Measured: 4 and 7, on a machine of our own; others may be slower.
    assert 0 < found["loop_idle_percent"] <= 8
    assert 0 < found["loop_talking_percent"] <= 12
    assert found["drawing_talking_percent"] > 1 and found["native_talking_percent"] > 1
