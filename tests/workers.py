"""Workers in this process, and what tells one, or a command, which server is ours."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from voipavatar.config import Settings
from voipavatar.livekit_server import LiveKitServer
from voipavatar.worker import Worker

ROOT = Path(__file__).parent.parent


def settings_of(livekit: LiveKitServer, *personas: Path) -> Settings:
    return dataclasses.replace(
        Settings.from_env({}),
        persona_dirs=personas,
        livekit_url=livekit.url,
        livekit_api_key=livekit.api_key,
        livekit_api_secret=livekit.api_secret,
    )


def environment(livekit: LiveKitServer, **more: str) -> dict[str, str]:
    """For a command of ours in a process of its own."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LIVEKIT_URL": livekit.url,
        "LIVEKIT_API_KEY": livekit.api_key,
        "LIVEKIT_API_SECRET": livekit.api_secret,
        **more,
    }


@asynccontextmanager
async def registered(
    settings: Settings, **options: Any
) -> AsyncIterator[tuple[Worker, asyncio.Task[None]]]:
    """A worker that LiveKit knows of, and the task to cancel when it shall drain before the end."""
    there = asyncio.Event()
    worker = Worker(settings, ready=lambda url: there.set(), **options)
    task = asyncio.create_task(worker.run(), name="a-worker")
    waiting = asyncio.ensure_future(there.wait())
    try:
        await asyncio.wait([waiting, task], timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        assert there.is_set(), "the worker did not register"
        yield worker, task
    finally:
        waiting.cancel()
        task.cancel()
        await asyncio.wait([task], timeout=30)
        assert task.done()
