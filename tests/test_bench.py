"""What is measured, and what of it is left out."""

from __future__ import annotations

from voipavatar import bench


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
