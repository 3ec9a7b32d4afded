"""What the tests need from the machine: real servers, a browser, free ports.

A thing that can't be had skips the test with one sentence, and fails it where `CI=true` says that
everything must be there.
"""

from __future__ import annotations

import os
import shutil
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
