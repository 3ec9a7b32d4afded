"""A worker in a process of its own, for tests that kill it: URL QUEUE FOLDER as arguments."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from voipavatar.rabbitmq import QueueOptions

from .queues import working


async def main(url: str, queue: str, folder: Path) -> None:
    async with working(QueueOptions(url=url, queue=queue), folder):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
