"""Waiting with a limit: results, limits, and cancellations that are never lost."""

from __future__ import annotations

import asyncio

import pytest

from voipavatar.waiting import undisturbed, within


async def test_a_result_a_failure_and_the_limit() -> None:
    async def works() -> int:
        await asyncio.sleep(0)
        return 7

    async def fails() -> int:
        raise ValueError("as it is")

    assert await within(works(), 1.0) == 7
    assert await within(works(), None) == 7
    with pytest.raises(ValueError, match="as it is"):
        await within(fails(), 1.0)

    ended = asyncio.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(asyncio.TimeoutError):
        await within(slow(), 0.01)
    assert ended.is_set()


async def test_what_comes_at_the_last_moment_counts() -> None:
    async def stubborn() -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return 7
        raise AssertionError("it was not cancelled")

    assert await within(stubborn(), 0.01) == 7


async def test_a_cancellation_in_the_moment_of_the_result_is_not_lost() -> None:
    """`asyncio.wait_for` before Python 3.12 goes on here."""
    result = asyncio.get_running_loop().create_future()
    went_on = False

    async def waits() -> None:
        nonlocal went_on
        await within(result, 60.0)
        went_on = True

    task = asyncio.create_task(waits())
    await asyncio.sleep(0)
    result.set_result(None)
    task.cancel()
    await asyncio.wait([task], timeout=5.0)
    assert task.cancelled() and not went_on


async def test_cancelling_ends_the_work_too() -> None:
    ended = asyncio.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.set()

    task = asyncio.create_task(within(slow(), 60.0))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task], timeout=5.0)
    assert task.cancelled() and ended.is_set()


async def test_what_must_not_be_given_up_goes_on_to_its_end() -> None:
    """And the cancellation comes then, however often it was asked for."""
    done: list[str] = []

    async def work(seconds: float) -> str:
        await asyncio.sleep(seconds)
        done.append("it")
        return "it"

    assert await undisturbed(work(0.01), 1.0) == "it"
    waiting = asyncio.create_task(undisturbed(work(0.1), 1.0))
    for _ in range(3):
        await asyncio.sleep(0.01)
        waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled() and done == ["it", "it"]
    with pytest.raises(asyncio.TimeoutError):
        await undisturbed(work(1.0), 0.02)
    late = asyncio.create_task(undisturbed(work(1.0), 0.05))
    await asyncio.sleep(0.01)
    late.cancel()
    await asyncio.wait([late])
    assert late.cancelled() and len(done) == 2, "it has a limit all the same"
