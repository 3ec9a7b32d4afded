"""Who may ask, and how much they may send: one ASGI layer around all routes.

- With a token, every request but the page's own files needs it, compared in constant time. By
  `Authorization: Bearer`, or by `?token=` for WebSockets and event streams, which can't always set
  a header.
- Without one we listen on loopback only. There the Host must be a name of this machine, or any web
  page could reach us by DNS rebinding, and a request that another site's page makes is refused.
- A body is counted while it is read; what is too large is refused without being kept.

Each refusal is a status and one sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Iterable
from urllib.parse import parse_qs, urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import metrics
from ..waiting import within

logger = logging.getLogger(__name__)

PUBLIC = ("/", "/health", "/docs", "/openapi.json", "/favicon.svg", "/livekit/webhook")
"""Paths that need no token: the page, and nothing that says or shows anything of a session.
The webhook carries LiveKit's own signature instead."""
PUBLIC_FOLDERS = ("/web/", "/vendor/")

_LINGER = 2.0
_DENIAL = "websocket.http.response"


def is_loopback(host: str) -> bool:
    """Whether listening on `host` is open to this machine only."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(authority: str) -> str:
    """`host` of `host:port`, lower case, without brackets; '' if it can't be one."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """See the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str,
        max_json: int,
        max_audio: int,
        origins: Iterable[str] = (),
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._max_json = max_json
        self._max_audio = max_audio
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if scope["type"] == "websocket":
            if refusal is not None:
                await _deny(scope, receive, send, *refusal)
            else:
                await self._app(scope, receive, send)
            return
        body = _Body(receive, _limit(headers, self._max_json, self._max_audio))
        answer = _Answer(scope, send, body, headers)
        if refusal is None and body.too_large(headers.get("content-length")):
            refusal = (413, body.sentence())
        if refusal is not None:
            await _answer(answer.send, *refusal)
        else:
            await self._app(scope, body.receive, answer.send)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        if self._token:
            return None if self._allowed(scope, headers) else (401, _ASK)
        host = headers.get("host", "")
        if not is_loopback(host_name(host)):
            return 403, (
                "this server answers to names of its own machine only; to reach it by another "
                "name, start it with a token (VOIPAVATAR_TOKEN)"
            )
        return self._foreign(scope, headers, host)

    def _allowed(self, scope: Scope, headers: Headers) -> bool:
        path = scope["path"]
        if scope["type"] == "http" and (
            path in PUBLIC or path.startswith(PUBLIC_FOLDERS) or scope["method"] == "OPTIONS"
        ):
            return True
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            given = ""
        if not given and (scope["type"] == "websocket" or path.endswith("/events")):
            query = parse_qs(scope["query_string"].decode("latin-1"))
            given = query.get("token", [""])[0]
        return hmac.compare_digest(given.strip().encode(), self._token)

    def _foreign(self, scope: Scope, headers: Headers, host: str) -> tuple[int, str] | None:
        """A browser names the site that asks; only our own page may, where no token protects."""
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return None
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None  # changes nothing, and without CORS headers the site can't read the answer
        if urlsplit(origin).netloc.lower() == host.lower():
            return None
        return 403, "a page of another site can't use this server unless it is started with a token"


_ASK = "a bearer token is needed: send the header `Authorization: Bearer TOKEN`"


class _Body:
    """The request's body, counted."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._read = 0
        self.done = False

    def too_large(self, announced: str | None) -> bool:
        return announced is not None and announced.isdigit() and int(announced) > self._limit

    def sentence(self) -> str:
        return f"the body is larger than {self._limit:,} bytes: send less at once"

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self.done = not message.get("more_body", False)
            if self._read > self._limit:
                raise HTTPException(413, self.sentence())
        return message

    async def drop(self) -> None:
        """Read on for a moment and forget it: a peer that is still sending would otherwise see
        its connection reset before our answer."""
        end = time.monotonic() + _LINGER
        while not self.done and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                message = await within(self._receive(), left)
                self.done = message["type"] != "http.request" or not message.get("more_body", False)


class _Answer:
    """The way out: headers that every answer has, the count, and the pause after a 413."""

    def __init__(self, scope: Scope, send: Send, body: _Body, headers: Headers) -> None:
        self._scope = scope
        self._send = send
        self._body = body
        self._linger = False
        self._waits = headers.get("expect", "").lower() == "100-continue"
        self._began = time.monotonic()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start(message)
        elif self._linger and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            if not self._waits:
                await self._body.drop()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def _start(self, message: Message) -> None:
        headers = MutableHeaders(scope=message)
        headers.setdefault("cache-control", "no-store")
        headers.setdefault("content-security-policy", "default-src 'none'; frame-ancestors 'none'")
        headers["x-content-type-options"] = "nosniff"
        headers["referrer-policy"] = "no-referrer"
        headers["cross-origin-resource-policy"] = "same-origin"
        status = message["status"]
        if status == 413:
            headers["connection"] = "close"
            self._linger = True
        metrics.REQUESTS.labels(f"{status // 100}xx").inc()
        # The route and not the address: an address may hold a token.
        logger.debug(
            "answered",
            extra={
                "method": self._scope["method"],
                "path": self._scope["path"],
                "status": status,
                "ms": round((time.monotonic() - self._began) * 1000, 1),
            },
        )


def _limit(headers: Headers, json_limit: int, audio_limit: int) -> int:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    heavy = kind.startswith(("audio/", "video/")) or kind in (
        "multipart/form-data",
        "application/octet-stream",
    )
    return audio_limit if heavy else json_limit


def _problem(status: int, sentence: str) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    body = json.dumps({"error": sentence}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return body, headers


async def _answer(send: Send, status: int, sentence: str, kind: str = "http") -> None:
    body, headers = _problem(status, sentence)
    await send({"type": f"{kind}.response.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.response.body", "body": body})


async def _deny(scope: Scope, receive: Receive, send: Send, status: int, sentence: str) -> None:
    """Refuse a WebSocket before it opens: with the sentence where the server can carry one."""
    await receive()
    if _DENIAL in scope.get("extensions", {}):
        await _answer(send, status, sentence, "websocket.http")
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": sentence[:120]})
