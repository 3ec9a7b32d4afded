"""Waiting with a limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def undisturbed(work: Awaitable[T], seconds: float) -> T:
    """What `work` results in, or asyncio.TimeoutError after `seconds`, with `work` cancelled.

    When whoever waits is cancelled it goes on to its own end all the same, within those seconds,
    and the cancellation comes then: for calls that a native library can't bear to see given up.
    """
    task = asyncio.ensure_future(work)
    end = time.monotonic() + seconds
    cancelled = False
    while not task.done() and (left := end - time.monotonic()) > 0:
        try:
            await asyncio.wait([task], timeout=left)
        except asyncio.CancelledError:
            cancelled = True
    if not cancelled:
        return await within(task, 0.0)
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # nobody else will ask for it
    raise asyncio.CancelledError


async def within(work: Awaitable[T], seconds: float | None) -> T:
    """What `work` results in, or asyncio.TimeoutError after `seconds`, with `work` cancelled.

    As `asyncio.wait_for` is from Python 3.12 on. Before, it loses a cancellation that comes in the
    same moment as the result (python/cpython#86296): the task goes on, and whoever waits for its
    end waits for ever.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait([task])
        if task.cancelled():
            raise asyncio.TimeoutError
        return task.result()  # it came at the last moment, or failed
    except asyncio.CancelledError:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # nobody else will ask for it
        raise
