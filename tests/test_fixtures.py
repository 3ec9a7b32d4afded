"""The tests' own instruments: the proxy breaks what it says, and the leak check sees leaks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from . import servers
from .conftest import MakeProxy

ROOT = Path(__file__).parent.parent


@pytest_asyncio.fixture
async def echo() -> AsyncIterator[int]:
    """The port of a server that sends back what it gets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield int(server.sockets[0].getsockname()[1])
    server.close()


async def test_proxy_forwards_stalls_and_goes_on(echo: int, make_proxy: MakeProxy) -> None:
    proxy = await make_proxy("127.0.0.1", echo)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"one")
    assert await asyncio.wait_for(reader.readexactly(3), 5) == b"one"
    assert (proxy.accepted, proxy.open, proxy.forwarded) == (1, 1, 6)
    proxy.stall()
    writer.write(b"two")
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.2)
    proxy.resume()
    assert await asyncio.wait_for(reader.readexactly(3), 5) == b"two"
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_proxy_cuts_and_mends_on_the_same_port(echo: int, make_proxy: MakeProxy) -> None:
    proxy = await make_proxy("127.0.0.1", echo)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"x")
    await reader.readexactly(1)
    await proxy.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", proxy.port)
    port = proxy.port
    await proxy.mend()
    assert proxy.port == port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"y")
    assert await asyncio.wait_for(reader.readexactly(1), 5) == b"y"
    await proxy.drop()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)
    writer.close()


async def test_proxy_throttles(echo: int, make_proxy: MakeProxy) -> None:
    proxy = await make_proxy("127.0.0.1", echo)
    proxy.throttle(20_000)
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    since = time.monotonic()
    writer.write(bytes(10_000))
    await asyncio.wait_for(reader.readexactly(10_000), 10)
    assert time.monotonic() - since > 0.8  # half a second each way
    writer.close()


def test_ports_are_free_and_different(ports: servers.Ports) -> None:
    assert len({ports() for _ in range(20)}) == 20


LEAKS = """
import asyncio, subprocess, sys, threading, time

held = []

async def test_task() -> None:
    held.append(asyncio.ensure_future(asyncio.sleep(60)))

def test_thread() -> None:
    thread = threading.Thread(target=time.sleep, args=(5,))
    thread.start()

def test_process() -> None:
    held.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))

async def test_clean() -> None:
    await asyncio.to_thread(time.sleep, 0.01)
    held[-1].kill()
    held[-1].wait()
"""


def test_leak_check_sees_a_task_a_thread_and_a_process(tmp_path: Path) -> None:
    """Runs pytest on tests that leak, with the conftest of this suite."""
    (tmp_path / "tests").mkdir()
    for name in ("__init__.py", "conftest.py", "proxy.py", "servers.py"):
        (tmp_path / "tests" / name).symlink_to(ROOT / "tests" / name)
    (tmp_path / "tests" / "test_leaks.py").write_text(LEAKS)
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=."]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "4 passed, 3 errors" in done.stdout, done.stdout + done.stderr
    assert "left tasks behind" in done.stdout
    assert "left behind: thread Thread-" in done.stdout
    assert "left behind: process python" in done.stdout


@pytest.mark.parametrize("ci", [False, True])
def test_what_is_missing_is_skipped_or_fails(ci: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true" if ci else "")
    expected = pytest.fail.Exception if ci else pytest.skip.Exception
    with pytest.raises(expected, match="no such thing"):
        servers.missing("no such thing")
