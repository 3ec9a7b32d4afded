"""A TCP proxy that a test can cut, stall and throttle: failure made on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket

CHUNK = 1 << 16


class Proxy:
    """Forwards 127.0.0.1:`port` to a target, and misbehaves when told to.

    `async with Proxy("127.0.0.1", 7880) as proxy`: connect to `proxy.port`. The port stays the
    same for the life of the proxy, also while it refuses connections.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self.accepted = 0
        """Connections taken since the start."""
        self.forwarded = 0
        """Bytes passed on, both directions together."""
        self._target = (host, port)
        self._rate: float | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        await self.mend()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.cut()

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._links)

    async def cut(self) -> None:
        """Reset every connection and refuse new ones until `mend`."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self.drop()

    async def drop(self) -> None:
        """Reset every connection; new ones are welcome at once."""
        links = list(self._links)
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def mend(self) -> None:
        """Take connections (again)."""
        self.resume()
        self.throttle(None)
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = int(self._server.sockets[0].getsockname()[1])

    def stall(self) -> None:
        """Keep the connections and pass nothing on: what a dead link looks like."""
        self._flowing.clear()

    def resume(self) -> None:
        """Pass on again, first what has been waiting."""
        self._flowing.set()

    def throttle(self, rate: float | None) -> None:
        """Pass on `rate` bytes a second in each direction of each connection; None is no limit."""
        self._rate = rate

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.current_task()
        assert link is not None
        self._links.add(link)
        self.accepted += 1
        # asyncio's own callback complains about a cancelled handler, so that ends here.
        try:
            await self._forward(reader, writer)
        except (asyncio.CancelledError, OSError):
            pass
        finally:
            _reset(writer)
            self._links.discard(link)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        ways = [
            asyncio.ensure_future(self._pump(reader, far_writer)),
            asyncio.ensure_future(self._pump(far_reader, writer)),
        ]
        try:
            await asyncio.gather(*ways)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            _reset(far_writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK):
            await self._flowing.wait()
            if self._rate is not None:
                await asyncio.sleep(len(data) / self._rate)
            writer.write(data)
            await writer.drain()
            self.forwarded += len(data)
        if writer.can_write_eof():
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN: nothing unsent is delivered, and the peer gets an error."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
    writer.transport.abort()
