"""The page and the HTTP interface: `create_app` for your own server, `serve` for ours."""

from __future__ import annotations

from .access import LiveKitAccess
from .app import create_app
from .run import serve
from .vendor import ensure as fetch_vendor

__all__ = ["LiveKitAccess", "create_app", "fetch_vendor", "serve"]
