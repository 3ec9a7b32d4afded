"""Fixtures that start real things once, factories that undo themselves, and a check for leaks."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import psutil
import pytest
import pytest_asyncio

from voipavatar.config import Settings
from voipavatar.errors import ConfigError
from voipavatar.livekit_server import LiveKitServer

from . import servers
from .proxy import Proxy

GRACE = 3.0
"""Seconds that a test's last threads, tasks and children have to go by themselves."""

MakeProxy: TypeAlias = Callable[[str, int], Awaitable[Proxy]]
MakeLiveKit: TypeAlias = Callable[[], Awaitable[LiveKitServer]]


# --- servers --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def livekit(request: pytest.FixtureRequest) -> Iterator[LiveKitServer]:
    """A running livekit-server for the whole session, always our own, never LIVEKIT_URL's.

    A test that breaks it must leave it running (`await livekit.start()`); one that counts on
    nobody else using it takes `make_livekit`.
    """
    server = LiveKitServer(Settings.from_env().cache_dir, progress=_teller(request))
    try:
        asyncio.run(server.start())
    except ConfigError as error:
        servers.missing(str(error))
    forget = servers.keep(lambda: server.pid)
    yield server
    forget()
    asyncio.run(server.stop())


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.RabbitMQ]:
    """A RabbitMQ node for the whole session. A test that ends it must start it again.

    Tests take names of their own: whatever they declare stays there.
    """
    if servers.RabbitMQ.script() is None:
        servers.missing("no RabbitMQ is installed: apt-get install rabbitmq-server")
    node = servers.RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    forget = [servers.keep(lambda: node.pid), servers.keep(lambda: node.epmd_pid)]
    asyncio.run(node.start())
    yield node
    asyncio.run(node.stop())
    for one in forget:
        one()


@pytest_asyncio.fixture
async def make_livekit(livekit: LiveKitServer) -> AsyncIterator[MakeLiveKit]:
    """Makes livekit-servers that belong to this test alone."""
    async with contextlib.AsyncExitStack() as undo:

        async def make() -> LiveKitServer:
            cache = Settings.from_env().cache_dir  # `livekit` has seen to it that one is there
            return await undo.enter_async_context(LiveKitServer(cache))

        yield make


@pytest_asyncio.fixture
async def make_proxy() -> AsyncIterator[MakeProxy]:
    """Makes proxies in front of a server, which the test can cut, stall and throttle."""
    async with contextlib.AsyncExitStack() as undo:

        async def make(host: str, port: int) -> Proxy:
            return await undo.enter_async_context(Proxy(host, port))

        yield make


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The path of a Chromium that is installed here."""
    found = servers.chromium()
    if found is None:
        servers.missing("no Chromium is installed: apt-get install chromium")
    return found


@pytest.fixture
def ports() -> servers.Ports:
    """Gives free ports: `ports()` for TCP, `ports(udp=True)`."""
    return servers.Ports()


def _teller(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """Says on the terminal what is being built: the first run takes minutes."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    said = -10.0

    def tell(message: str, elapsed: float) -> None:
        nonlocal said
        if elapsed - said < 10:
            return
        said = elapsed
        with capture.global_and_fixture_disabled():
            print(f"\n{message} ({elapsed:.0f} s)", flush=True)

    return tell


def pytest_unconfigure(config: pytest.Config) -> None:
    """A thread that a failed test left behind would keep the interpreter from ending, for ever."""
    main = threading.main_thread()
    left = [one for one in threading.enumerate() if one is not main and not one.daemon]
    if not left or hasattr(config, "workerinput"):
        return
    print(f"\nleft behind: {', '.join(one.name for one in left)}", flush=True)
    session = config.pluginmanager.get_plugin("session")
    failed = session.testsfailed if isinstance(session, pytest.Session) else 1
    sys.stderr.flush()
    os._exit(1 if failed else 3)


# --- nothing is left behind -----------------------------------------------------------------------


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every asynchronous test the check for tasks, which has to run inside its loop."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
            # After the autouse fixtures, before the test's own: so it's the last to be undone
            # but for them, while the loop is still there.
            item.fixturenames.insert(item.fixturenames.index("nothing_left") + 1, "no_task_left")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail the test that leaves a thread or a child process behind."""
    threads, children = set(threading.enumerate()), _children()
    yield
    deadline = time.monotonic() + GRACE
    while True:
        left = [
            *(
                f"thread {thread.name}"
                for thread in threading.enumerate()
                if thread not in threads and not thread.daemon and thread.is_alive()
            ),
            *(f"process {name}" for pid, name in _children().items() if pid not in children),
        ]
        if not left:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"the test left behind: {', '.join(left)}", pytrace=False)
        time.sleep(0.05)


@pytest_asyncio.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fail the asynchronous test that leaves a task behind."""
    before = asyncio.all_tasks()
    yield
    deadline = time.monotonic() + GRACE
    while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
        if time.monotonic() > deadline:
            names = ", ".join(f"{task.get_name()} ({task.get_coro()})" for task in left)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            pytest.fail(f"the test left tasks behind: {names}", pytrace=False)
        await asyncio.sleep(0.02)


def _children() -> dict[int, str]:
    """Our living descendants, less the servers that are meant to stay and what is below them."""
    kept = servers.kept()
    found: dict[int, str] = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            above = {child.pid, *(parent.pid for parent in child.parents())}
            # The interpreter's own helper, which stays once it has been started.
            helper = any("resource_tracker" in part for part in child.cmdline())
            if not above & kept and not helper and child.status() != psutil.STATUS_ZOMBIE:
                found[child.pid] = f"{child.name()} ({child.pid})"
    return found
