"""Who has seen which message, and how it ended: what keeps anything from being said twice.

A ledger outlives the process. `SqliteLedger` is a file that all workers of one machine share;
`RedisLedger` is for workers on several. Each worker has an owner's name and gives a sign of life;
what belongs to one that gives none any more may be taken over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .errors import ConfigError, TransportError
from .waiting import within

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")

KEEP = 3_600.0
"""Seconds that an outcome is remembered."""
MOST = 10_000
"""Outcomes that are remembered."""
LEASE = 6.0
"""Seconds without a sign of life after which an owner is taken to be gone."""


@dataclass
class Entry:
    """One message."""

    id: str
    owner: str = ""
    queue: str = ""
    outcome: str | None = None
    """None while it is under way."""
    event: dict[str, Any] = field(default_factory=dict)
    """Before the end what its events have in common; then the last event whole."""
    told: bool = False
    """The last event has reached the broker."""
    acked_early: bool = False
    """The broker forgot it when it was accepted: nobody will bring it again."""
    heard: float = 0.0
    """Seconds that were played at the last sign."""
    length: float | None = None
    """Seconds of the whole, where that is known."""
    attempt: int = 1
    at: float = 0.0


class Ledger(Protocol):
    """Raises TransportError when it is out of reach; every call has a time limit."""

    async def take(self, entry: Entry) -> Entry | None:
        """Enter a message. If its id is there already, nothing is done and that one is given."""

    async def find(self, id: str) -> Entry | None: ...

    async def put(self, entry: Entry) -> None:
        """Write an entry anew."""

    async def drop(self, id: str) -> None:
        """Forget one: it was given back unspoken."""

    async def alive(self, owner: str) -> bool:
        """The owner gave a sign of life within the lease."""

    async def beat(self, owner: str, gone: bool = False) -> None:
        """A sign of life; or the last, with which the owner is gone at once."""

    async def open(self, queue: str) -> list[Entry]:
        """Entries of a queue that nobody was told the end of."""

    async def prune(self) -> None:
        """Forget what is old."""

    async def aclose(self) -> None: ...


class SqliteLedger:
    """A file, by one thread. Safe for several processes of one machine."""

    TIMEOUT = 5.0

    def __init__(self, file: Path) -> None:
        self._file = file
        self._base: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, "ledger")

    async def take(self, entry: Entry) -> Entry | None:
        def work(base: sqlite3.Connection) -> Entry | None:
            with base:
                base.execute("BEGIN IMMEDIATE")
                found = _one(base, entry.id)
                if found is None:
                    _write(base, entry)
            return found

        return await self._do(work)

    async def find(self, id: str) -> Entry | None:
        return await self._do(lambda base: _one(base, id))

    async def put(self, entry: Entry) -> None:
        def work(base: sqlite3.Connection) -> None:
            with base:
                _write(base, entry)

        await self._do(work)

    async def drop(self, id: str) -> None:
        def work(base: sqlite3.Connection) -> None:
            with base:
                base.execute("DELETE FROM messages WHERE id = ?", (id,))

        await self._do(work)

    async def alive(self, owner: str) -> bool:
        def work(base: sqlite3.Connection) -> bool:
            row = base.execute("SELECT at FROM owners WHERE owner = ?", (owner,)).fetchone()
            return row is not None and time.time() - row[0] < LEASE

        return await self._do(work)

    async def beat(self, owner: str, gone: bool = False) -> None:
        def work(base: sqlite3.Connection) -> None:
            with base:
                if gone:
                    base.execute("DELETE FROM owners WHERE owner = ?", (owner,))
                else:
                    base.execute("REPLACE INTO owners VALUES (?, ?)", (owner, time.time()))

        await self._do(work)

    async def open(self, queue: str) -> list[Entry]:
        def work(base: sqlite3.Connection) -> list[Entry]:
            rows = base.execute(
                "SELECT entry FROM messages WHERE queue = ? AND told = 0 ORDER BY at", (queue,)
            )
            return [Entry(**json.loads(row[0])) for row in rows]

        return await self._do(work)

    async def prune(self) -> None:
        def work(base: sqlite3.Connection) -> None:
            with base:
                base.execute(
                    "DELETE FROM messages WHERE at < ? AND (told = 1 OR at < ?)",
                    (time.time() - KEEP, time.time() - 24 * KEEP),
                )
                base.execute(
                    "DELETE FROM messages WHERE told = 1 AND id NOT IN "
                    "(SELECT id FROM messages ORDER BY at DESC LIMIT ?)",
                    (MOST,),
                )
                base.execute("DELETE FROM owners WHERE at < ?", (time.time() - KEEP,))

        await self._do(work)

    async def aclose(self) -> None:
        def work() -> None:
            if self._base is not None:
                self._base.close()
                self._base = None

        with contextlib.suppress(RuntimeError):  # closed before
            await asyncio.get_running_loop().run_in_executor(self._thread, work)
        self._thread.shutdown(wait=False)

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def there() -> T:
            if self._base is None:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._base = _opened(self._file, self.TIMEOUT)
            return work(self._base)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, there)
        except (sqlite3.Error, OSError) as error:
            raise TransportError(f"the record of messages ({self._file}) fails: {error}") from error


def _opened(file: Path, timeout: float) -> sqlite3.Connection:
    base = sqlite3.connect(file, timeout=timeout, isolation_level=None)
    # A log that is written ahead survives the process; it isn't forced to disk at every message.
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("PRAGMA synchronous = NORMAL")
    base.execute(
        "CREATE TABLE IF NOT EXISTS messages "
        "(id TEXT PRIMARY KEY, queue TEXT, told INTEGER, at REAL, entry TEXT) WITHOUT ROWID"
    )
    base.execute("CREATE INDEX IF NOT EXISTS by_time ON messages (at)")
    base.execute("CREATE INDEX IF NOT EXISTS untold ON messages (queue) WHERE told = 0")
    base.execute("CREATE TABLE IF NOT EXISTS owners (owner TEXT PRIMARY KEY, at REAL)")
    return base


def _one(base: sqlite3.Connection, id: str) -> Entry | None:
    row = base.execute("SELECT entry FROM messages WHERE id = ?", (id,)).fetchone()
    return Entry(**json.loads(row[0])) if row is not None else None


def _write(base: sqlite3.Connection, entry: Entry) -> None:
    base.execute(
        "REPLACE INTO messages VALUES (?, ?, ?, ?, ?)",
        (entry.id, entry.queue, int(entry.told), entry.at, json.dumps(asdict(entry))),
    )


class RedisLedger:
    """For workers on several machines: `redis://host:6379/0`. Needs the package redis."""

    TIMEOUT = 3.0

    def __init__(self, url: str, prefix: str = "voipavatar") -> None:
        try:
            from redis.asyncio import Redis
            from redis.exceptions import RedisError
        except ImportError:
            raise ConfigError(
                "remembering messages in Redis needs: pip install voipavatar[redis]"
            ) from None
        self._redis: Redis = Redis.from_url(
            url, socket_timeout=self.TIMEOUT, socket_connect_timeout=self.TIMEOUT
        )
        self._failures = (RedisError, OSError)
        self._prefix = prefix

    async def take(self, entry: Entry) -> Entry | None:
        done = await self._do(
            self._redis.set(self._key(entry.id), _packed(entry), nx=True, ex=int(24 * KEEP))
        )
        if done:
            await self._do(self._redis.sadd(self._open(entry.queue), entry.id))
            return None
        return await self.find(entry.id)

    async def find(self, id: str) -> Entry | None:
        raw = await self._do(self._redis.get(self._key(id)))
        return Entry(**json.loads(raw)) if raw else None

    async def put(self, entry: Entry) -> None:
        keep = int(KEEP if entry.told else 24 * KEEP)
        await self._do(self._redis.set(self._key(entry.id), _packed(entry), ex=keep))
        change = self._redis.srem if entry.told else self._redis.sadd
        await self._do(change(self._open(entry.queue), entry.id))

    async def drop(self, id: str) -> None:
        entry = await self.find(id)
        await self._do(self._redis.delete(self._key(id)))
        if entry is not None:
            await self._do(self._redis.srem(self._open(entry.queue), id))

    async def alive(self, owner: str) -> bool:
        return bool(await self._do(self._redis.exists(f"{self._prefix}:owner:{owner}")))

    async def beat(self, owner: str, gone: bool = False) -> None:
        key = f"{self._prefix}:owner:{owner}"
        if gone:
            await self._do(self._redis.delete(key))
        else:
            await self._do(self._redis.set(key, "1", ex=int(LEASE)))

    async def open(self, queue: str) -> list[Entry]:
        ids = await self._do(self._redis.smembers(self._open(queue)))
        found = [await self.find(id.decode()) for id in ids]
        return sorted((one for one in found if one is not None), key=lambda one: one.at)

    async def prune(self) -> None:
        """Redis forgets by itself."""

    async def aclose(self) -> None:
        with contextlib.suppress(*self._failures):
            await self._redis.aclose()

    def _key(self, id: str) -> str:
        return f"{self._prefix}:message:{id}"

    def _open(self, queue: str) -> str:
        return f"{self._prefix}:open:{queue}"

    async def _do(self, call: Any) -> Any:
        try:
            return await within(call, 2 * self.TIMEOUT)
        except (*self._failures, asyncio.TimeoutError) as error:
            raise TransportError(f"Redis, the record of messages, fails: {error}") from error


def _packed(entry: Entry) -> str:
    return json.dumps(asdict(entry))
