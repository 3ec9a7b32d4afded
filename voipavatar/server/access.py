"""How a browser gets into a room: the address it can reach and a ticket of its own."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from datetime import timedelta
from urllib.parse import urlsplit, urlunsplit

from ..errors import ConfigError
from .guard import is_loopback

TICKET_SECONDS = 600
"""How long a ticket opens the door. Who is inside is not affected: LiveKit renews its own."""

_WS = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


@dataclass(frozen=True)
class LiveKitAccess:
    """Where LiveKit is and the key to it. The secret doesn't appear in `repr`."""

    url: str
    api_key: str
    api_secret: str = field(repr=False)
    public_url: str = ""
    """What browsers are told instead of `url`, where the two differ (a proxy, another network)."""

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in _WS:
            raise ConfigError(
                f"the LiveKit address {self.url!r} can't be used: it looks like "
                "ws://127.0.0.1:7880 or wss://NAME.livekit.cloud (LIVEKIT_URL)"
            )
        if not self.api_key or not self.api_secret:
            raise ConfigError("LiveKit needs a key: set LIVEKIT_API_KEY and LIVEKIT_API_SECRET")

    def browser_url(self, asked_at: str) -> str:
        """The address for a browser that asked this page at host `asked_at`.

        A LiveKit of this machine is reached by the name under which the page was: the loopback
        address would be the browser's own machine.
        """
        if self.public_url:
            return self.public_url
        parts = urlsplit(self.url)
        scheme, host, port = _WS[parts.scheme], parts.hostname or "", parts.port
        if asked_at and (is_loopback(host) or host in ("0.0.0.0", "::")):  # noqa: S104
            host = asked_at
        if ":" in host:
            host = f"[{host}]"
        netloc = host if port is None else f"{host}:{port}"
        return urlunsplit((scheme, netloc, parts.path.rstrip("/"), "", ""))

    def origins(self, asked_at: str) -> list[str]:
        """What the page must be allowed to connect to, for its Content-Security-Policy."""
        parts = urlsplit(self.browser_url(asked_at))
        hosts = [parts.netloc]
        if parts.netloc.endswith(".livekit.cloud"):
            hosts.append("*.livekit.cloud")  # it sends clients on to the nearest region
        secure = parts.scheme == "wss"
        schemes = ("wss", "https") if secure else ("ws", "http")
        return [f"{scheme}://{host}" for host in hosts for scheme in schemes]

    def ticket(self, room: str) -> tuple[str, str, int]:
        """(identity, token, Unix time of its end): may watch and send data, may not publish."""
        from livekit import api  # heavy: only where a ticket is written

        identity = f"viewer-{secrets.token_hex(4)}"
        token = (
            api.AccessToken(self.api_key, self.api_secret)
            .with_identity(identity)
            .with_name("Viewer")
            .with_ttl(timedelta(seconds=TICKET_SECONDS))
            .with_grants(
                api.VideoGrants(
                    room_join=True,
                    room=room,
                    can_subscribe=True,
                    can_publish=False,
                    can_publish_data=True,
                )
            )
            .to_jwt()
        )
        return identity, token, int(time.time()) + TICKET_SECONDS
