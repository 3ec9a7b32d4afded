"""What the tests need from the machine: real servers, a browser, free ports.

A thing that can't be had skips the test with one sentence, and fails it where `CI=true` says that
everything must be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from voipavatar import livekit_server

CHROMIUM_FLAGS = (
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""So that it starts anywhere, and asks nothing of the network."""
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")

_kept: list[Callable[[], int | None]] = []


def missing(what: str) -> NoReturn:
    """The test needs something that this machine doesn't have: skip, or fail where CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} (CI=true: nothing may be skipped)", pytrace=False)
    pytest.skip(what)


def chromium() -> Path | None:
    """The distribution's Chromium, or the browser that VOIPAVATAR_CHROMIUM names."""
    if named := os.environ.get("VOIPAVATAR_CHROMIUM"):
        return Path(named)
    for name in CHROMIUM_NAMES:
        if found := shutil.which(name):
            return Path(found)
    return None


def keep(pid: Callable[[], int | None]) -> Callable[[], None]:
    """Tell the leak check that the process `pid()`, with its children, outlives a test.

    For servers that a session-scoped fixture holds. Returns the call that takes it back.
    """
    _kept.append(pid)
    return lambda: _kept.remove(pid)


def kept() -> set[int]:
    """Process ids of the servers that outlive a test."""
    return {number for pid in _kept if (number := pid()) is not None}


def _listens(port: int, timeout: float) -> None:
    """Wait until something takes connections at a port of loopback."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


class Ports:
    """Free ports of one test: no two calls give the same."""

    def __init__(self) -> None:
        self._given: set[int] = set()

    def __call__(self, *, udp: bool = False) -> int:
        """A port that can be bound on loopback now."""
        while (port := livekit_server.free_port(udp=udp)) in self._given:
            pass
        self._given.add(port)
        return port


def redis() -> Path | None:
    """The program of a Redis server, if it is installed."""
    found = shutil.which("redis-server", path=f"{os.environ['PATH']}:/usr/sbin")
    return Path(found) if found else None


# --- RabbitMQ -------------------------------------------------------------------------------------

RABBITMQ_SCRIPTS = (
    # The server's own script first: the distribution's wrapper changes to another user.
    *sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server")),
    *filter(None, [Path(found) if (found := shutil.which("rabbitmq-server")) else None]),
)


class RabbitMQ:
    """A RabbitMQ node of our own: loopback only, free ports, its files in `folder`.

    With `async with`, or `start` and `stop`. `kill` ends it like a power cut; `start` after it
    finds what was durable. It answers at `url`, as guest.
    """

    TIMEOUT = 60.0
    """Seconds until it must answer; a fresh one takes five on an idle machine."""

    def __init__(self, folder: Path) -> None:
        ports = Ports()
        self.port, self._dist, self._epmd_port = ports(), ports(), ports()
        self._folder = folder
        self._node: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None

    @staticmethod
    def script() -> Path | None:
        """The program that starts a node, if it is installed."""
        return next(iter(RABBITMQ_SCRIPTS), None)

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    @property
    def pid(self) -> int | None:
        return self._node.pid if self._node is not None else None

    @property
    def epmd_pid(self) -> int | None:
        """Erlang's name server, which the node needs beside it."""
        return self._epmd.pid if self._epmd is not None else None

    async def __aenter__(self) -> RabbitMQ:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start, and wait until it answers an AMQP handshake."""
        if self._node is not None:
            return
        node = self._node = self._launched()
        deadline = time.monotonic() + self.TIMEOUT
        while not await self.answers():
            if node.poll() is not None or time.monotonic() > deadline:
                await self.stop()
                tail = (self._folder / "output.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"RabbitMQ didn't start: {tail}")
            await asyncio.sleep(0.1)

    def _launched(self) -> subprocess.Popen[bytes]:
        env = self._environment()
        script = self.script()
        assert script is not None
        with open(self._folder / "output.log", "ab") as log:
            if self._epmd is None:
                # Ours and in the foreground: one that the node starts by itself outlives it.
                self._epmd = subprocess.Popen(["epmd"], env=env, stdout=log, stderr=log)
                _listens(self._epmd_port, 10.0)
            return subprocess.Popen(
                [str(script)], env=env, stdout=log, stderr=log, start_new_session=True
            )

    async def answers(self) -> bool:
        """Whether a client is greeted: the port is open some seconds before."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            writer.write(b"AMQP\x00\x00\x09\x01")
            return await asyncio.wait_for(reader.read(1), 2.0) == b"\x01"  # a method frame
        except (OSError, asyncio.TimeoutError):
            return False
        finally:
            writer.transport.abort()

    async def kill(self) -> None:
        """End it like a power cut."""
        node, self._node = self._node, None
        if node is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            await asyncio.to_thread(node.wait, 10)

    async def stop(self) -> None:
        """End it, and the name server with it. Nothing here is worth a slow goodbye."""
        await self.kill()
        epmd, self._epmd = self._epmd, None
        if epmd is not None:
            epmd.kill()
            await asyncio.to_thread(epmd.wait, 10)

    def _environment(self) -> dict[str, str]:
        folder = self._folder
        (folder / "plugins").write_text("[].\n")
        (folder / "rabbitmq.conf").write_text(
            "disk_free_limit.absolute = 50MB\n"
            "vm_memory_high_watermark.absolute = 512MiB\n"
            "cluster_formation.peer_discovery_backend = classic_config\n"
        )
        return {
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "HOME": str(folder),  # Erlang's cookie
            "LANG": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"voipavatar{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._dist),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none"
            ),
        }
