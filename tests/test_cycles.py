"""Avatars that come and go: nothing of them may stay, however many there were.

`VOIPAVATAR_CYCLES=500` makes it the full length; a line every tenth of it tells how it goes.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from livekit import api
from livekit.rtc import _ffi_client as ffi

from voipavatar.livekit_server import LiveKitServer
from voipavatar.plugin import AvatarSession

from .scripted import Joined, Plain, agent_session, said
from .test_worker import keys, process, small, unique

CYCLES = int(os.environ.get("VOIPAVATAR_CYCLES", "12"))
WARM = 5 if CYCLES < 100 else 100
"""Cycles before the first look. What the native library frees comes back to it in other pieces: its
share of the memory grows for about a hundred cycles and stays then."""
GROWTH = 3e6 * CYCLES if CYCLES < 100 else 25e6
"""Bytes that the resident size may grow by: after those hundred, 25 MB in all."""
KEPT = 0.25e6 * CYCLES if CYCLES < 100 else 10e6
"""Bytes that may be taken and not given back; a connection that is kept has 0.5 MB."""
LATER = 60
"""Files by which two looks may differ: the native library closes a connection's sockets seconds
later. One that is kept has a dozen."""

pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(120 + 20 * CYCLES),
]


@pytest.fixture(autouse=True)
def records_hold_no_frames() -> Iterator[None]:
    """pytest keeps log records, and one with a traceback what its frames hold: a whole room."""
    make = logging.getLogRecordFactory()

    def told(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        if record.exc_info:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        return record

    logging.setLogRecordFactory(told)
    yield
    logging.setLogRecordFactory(make)


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    resident: int
    taken: int
    """Bytes that were taken from the C library and not given back; 0 where it doesn't tell.

    It sees what the resident size hides for long: memory that is free, but in pieces.
    """
    files: int
    threads: int
    tasks: int
    handles: int
    """Objects of the rtc library's native side."""
    subscriptions: int
    """Queues that get every event of the native side."""

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        process = psutil.Process()
        return cls(
            process.memory_info().rss,
            _taken(),
            process.num_fds(),
            threading.active_count(),
            len(asyncio.all_tasks()),
            sum(not one.disposed for one in list(ffi._live_handles)),
            len(ffi.FfiClient.instance.queue._subscribers),
        )

    def __str__(self) -> str:
        return (
            f"{self.resident / 1e6:6.1f} MB, {self.taken / 1e6:.1f} of them taken, "
            f"{self.files} files, {self.threads} threads, "
            f"{self.tasks} tasks, {self.handles} handles, {self.subscriptions} subscriptions"
        )


class _Allocator(ctypes.Structure):
    """What glibc's `mallinfo2` returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        ).split()
    ]


def _taken() -> int:
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = _Allocator
    told = ask()
    return int(told.uordblks) + int(told.hblkhd)


@dataclass(frozen=True)
class Elsewhere:
    """What another process holds, as far as the system tells."""

    resident: int
    files: int
    threads: int

    @classmethod
    def now(cls, process: psutil.Process) -> Elsewhere:
        return cls(process.memory_info().rss, process.num_fds(), process.num_threads())

    def __str__(self) -> str:
        return f"{self.resident / 1e6:.1f} MB, {self.files} files, {self.threads} threads"


async def cycles(
    once: Callable[[], Awaitable[None]], livekit: LiveKitServer, child: psutil.Process | None = None
) -> None:
    """Do it over and over, and see that nothing has grown since the first few times, neither here
    nor in the process that is named."""
    for _ in range(WARM):
        await once()
    first = await settled(None)
    there = Elsewhere.now(child) if child is not None else None
    print(f"\n{WARM:4d}: {first}; the worker: {there}", flush=True)
    begin = time.monotonic()
    for count in range(1, CYCLES + 1):
        await once()
        if count % max(1, CYCLES // 10) == 0:
            each = (time.monotonic() - begin) / count
            worker = f"; the worker: {Elsewhere.now(child)}" if child is not None else ""
            print(f"{WARM + count:4d}: {Held.now()}, {each:.2f} s each{worker}", flush=True)
    last = await settled(first)
    print(f"{WARM + CYCLES:4d}: {last}")
    if child is not None and there is not None:
        end = time.monotonic() + 20  # its native threads end some seconds after their rooms
        while (at_last := Elsewhere.now(child)).threads > there.threads + 2:
            if time.monotonic() > end:
                break
            await asyncio.sleep(0.5)
        print(f"{WARM + CYCLES:4d}: the worker: {at_last}")
        assert at_last.threads <= there.threads + 2
        assert at_last.files <= there.files + LATER
        assert at_last.resident - there.resident <= GROWTH
    assert last.handles <= first.handles and last.subscriptions <= first.subscriptions
    assert last.tasks <= first.tasks
    assert last.threads <= first.threads + 1
    assert last.files <= first.files + LATER
    assert last.taken - first.taken <= KEPT
    assert last.resident - first.resident <= GROWTH
    async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk:
        # Rooms are the server's, and stay for a while; nobody is in them.
        for room in (await lk.room.list_rooms(api.ListRoomsRequest())).rooms:
            inside = await lk.room.list_participants(api.ListParticipantsRequest(room=room.name))
            assert not inside.participants, "somebody stayed behind"


async def settled(wanted: Held | None) -> Held:
    """After the last goodbyes have been said."""
    end = time.monotonic() + (2 if wanted is None else 20)
    while True:
        await asyncio.sleep(0.5)
        held = Held.now()
        if time.monotonic() > end or (
            wanted is not None
            and held.handles <= wanted.handles
            and held.tasks <= wanted.tasks
            and held.threads <= wanted.threads
            and held.files <= wanted.files + LATER
        ):
            return held


async def conversation(livekit: LiveKitServer, **options: Any) -> None:
    """An agent comes, says a word through its avatar, and both go."""
    async with Joined(livekit, unique("cycle")) as room:
        session = agent_session()
        avatar = AvatarSession(**options)
        try:
            await avatar.start(session, room, **keys(livekit))
            await session.start(Plain(), room=room, record=False)
            await avatar.wait_for_join(timeout=20)
            handle = await said(session, "one")
            assert not handle.interrupted and avatar.joined
            held = Held.now()
            assert held.handles and held.subscriptions, "looked at the wrong things"
        finally:
            await session.aclose()
            await avatar.aclose()
        assert not room.local_participant._rpc_handlers, "they keep the room in memory"


async def test_avatars_of_a_worker_leave_nothing(livekit: LiveKitServer, tmp_path: Path) -> None:
    """Neither in the worker's process nor in the agent's."""
    name = unique("cycles")
    async with process(livekit, name, small(tmp_path), tmp_path) as child:
        worker = psutil.Process(child.pid)

        async def once() -> None:
            await conversation(livekit, persona="small", agent_name=name)

        await cycles(once, livekit, worker)


async def test_avatars_in_the_agents_process_leave_nothing(
    livekit: LiveKitServer, tmp_path: Path
) -> None:
    small(tmp_path)
    persona = str(tmp_path / "small.yaml")

    async def once() -> None:
        await conversation(livekit, persona=persona, mode="local")

    await cycles(once, livekit)
