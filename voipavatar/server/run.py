"""`voipavatar serve`: the application on a port, in the running loop, until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from ..config import Settings
from ..errors import ConfigError
from .access import LiveKitAccess
from .app import create_app
from .contract import Studio
from .guard import is_loopback
from .live import MAX_MESSAGE

logger = logging.getLogger(__name__)

GRACE = 5
"""Seconds that answers under way get when the server stops."""


async def serve(
    settings: Settings,
    *,
    livekit_url: str,
    api_key: str,
    api_secret: str,
    host: str | None = None,
    port: int | None = None,
    on_ready: Callable[[str], None] | None = None,
    public_url: str = "",
    studio: Studio | None = None,
    signals: bool = True,
) -> None:
    """Serve the page and the interface until cancelled, SIGINT or SIGTERM.

    `host` and `port` are those of the settings unless given; port 0 takes a free one. `on_ready`
    is called with the page's address once it answers. Sessions are closed before this returns;
    a second signal doesn't wait for them. A studio that is passed in stays open. With `signals`
    False the caller has its own handlers and cancels.

    Raises ConfigError when the port is taken, or when others could reach it without a token.
    """
    settings = dataclasses.replace(
        settings,
        host=settings.host if host is None else host,
        port=settings.port if port is None else port,
    )
    check_exposure(settings)
    livekit = LiveKitAccess(livekit_url, api_key, api_secret, public_url)
    with listen(settings.host, settings.port) as sock:
        async with contextlib.AsyncExitStack() as stack:
            if studio is None:
                from ..session import Studio as OwnStudio  # the engines come with it

                own = OwnStudio(settings)
                await stack.enter_async_context(own)
                studio = own
            await _run(create_app(studio, settings, livekit), sock, on_ready, signals)


def check_exposure(settings: Settings) -> None:
    """Raises ConfigError when anybody on the network could use the server."""
    if not settings.token and not is_loopback(settings.host):
        raise ConfigError(
            f"listening on {settings.host} opens the avatar to the network, which needs a token: "
            "set VOIPAVATAR_TOKEN to a long random text, or listen on 127.0.0.1"
        )


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket. Raises ConfigError that says what to do when it can't be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"the host {host!r} can't be listened on: {error.strerror}") from None
    with socket.socket(family, kind, proto) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(256)
        except OSError as error:
            what = {
                errno.EADDRINUSE: "taken: stop what listens there, or choose another with --port",
                errno.EACCES: "not for this user: choose one from 1024 with --port",
                errno.EADDRNOTAVAIL: f"out of reach: {host} is not an address of this machine",
            }.get(error.errno or 0, f"not usable: {error.strerror}")
            raise ConfigError(f"port {port} is {what}") from None
        sock.setblocking(False)
        yield sock


class _Server(uvicorn.Server):
    """uvicorn that says when it answers, ends event streams first, and leaves signals alone."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], app: FastAPI) -> None:
        super().__init__(config)
        self._ready = ready
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.desk.closing.set()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _run(
    app: FastAPI,
    sock: socket.socket,
    on_ready: Callable[[str], None] | None,
    signals: bool,
) -> None:
    address = sock.getsockname()

    def ready() -> None:
        host = "127.0.0.1" if address[0] in ("0.0.0.0", "::") else address[0]  # noqa: S104
        host = f"[{host}]" if ":" in host else host
        url = f"http://{host}:{address[1]}/"
        logger.info("listening", extra={"url": url})
        if on_ready is not None:
            on_ready(url)

    config = uvicorn.Config(
        app,
        access_log=False,  # an address may hold a token; the guard logs without it
        log_config=None,
        server_header=False,
        ws_max_size=MAX_MESSAGE,
        ws_max_queue=8,
        ws_per_message_deflate=False,  # sound gains nothing by it
        ws_ping_interval=20,
        timeout_graceful_shutdown=GRACE,
        lifespan="on",
    )
    server = _Server(config, ready, app)
    task = asyncio.get_running_loop().create_task(server.serve(sockets=[sock]), name="http")
    try:
        with _signals(server) if signals else contextlib.nullcontext():
            await asyncio.shield(task)
    except asyncio.CancelledError:
        server.should_exit = True
        await asyncio.wait({task})
        raise
    finally:
        server.should_exit = True
        await asyncio.wait({task})


@contextlib.contextmanager
def _signals(server: uvicorn.Server) -> Iterator[None]:
    """The first signal ends politely, the second at once."""
    loop = asyncio.get_running_loop()
    caught: list[signal.Signals] = []

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C cancels the loop
                loop.add_signal_handler(one, stop)
                caught.append(one)
    try:
        yield
    finally:
        for one in caught:
            loop.remove_signal_handler(one)
