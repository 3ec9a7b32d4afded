"""`voipavatar say`: send a text to an avatar, by queue or by HTTP, and follow what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

from .config import Settings
from .errors import ConfigError, TransportError
from .media import Mode
from .messages import OUTCOMES, read_event
from .waiting import within

EXIT = {"finished": 0, "failed": 1, "interrupted": 3, "expired": 4, "duplicate": 5}
"""Exit codes by outcome."""
NO_ANSWER = 6

Tell = Callable[[dict[str, Any]], None]


async def by_queue(
    settings: Settings,
    url: str,
    text: str,
    *,
    queue: str,
    mode: Mode = "append",
    session: str | None = None,
    persona: str | None = None,
    id: str | None = None,
    timeout: float = 300.0,
    tell: Tell,
) -> str | None:
    """Send over AMQP; its outcome, or None when there was none in time.

    Raises TransportError when the broker is out of reach or refuses it.
    """
    import aio_pika

    where = f"{queue}.control" if mode != "append" else queue
    body: dict[str, Any] = {
        "type": "text", "data": text, "mode": mode, "message_id": id or uuid.uuid4().hex,
    }  # fmt: skip
    if session:
        body["session"] = session
    if persona:
        body["persona"] = persona
    try:
        connection = await aio_pika.connect(url, timeout=10)
    except Exception as error:  # of three libraries, and none of ours
        raise TransportError(f"the broker can't be reached: {type(error).__name__}") from None
    async with connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        replies = await channel.declare_queue(exclusive=True, auto_delete=True)
        async with replies.iterator() as events:
            message = aio_pika.Message(
                json.dumps(body).encode(),
                content_type="application/json",
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                reply_to=replies.name,
            )
            try:
                await within(channel.default_exchange.publish(message, where, mandatory=True), 10)
            except aio_pika.exceptions.DeliveryError as error:
                full = type(error).__name__ != "PublishError"
                why = "the queue is full: try again" if full else f"there is no queue {where!r}"
                raise TransportError(f"the broker refused it: {why}") from None
            except asyncio.TimeoutError:
                raise TransportError("the broker doesn't answer") from None
            return await _followed(_read(events), timeout, tell)


async def _read(events: Any) -> AsyncGenerator[dict[str, Any], None]:
    async for message in events:
        await message.ack()
        yield read_event(message.body).model_dump(exclude_none=True, by_alias=True)


async def _followed(
    events: AsyncGenerator[dict[str, Any], None], timeout: float, tell: Tell
) -> str | None:
    deadline = time.monotonic() + timeout
    async with contextlib.aclosing(events):
        while (left := deadline - time.monotonic()) > 0:
            try:
                event = await within(anext(events), left)
            except (asyncio.TimeoutError, StopAsyncIteration):
                return None
            tell(event)
            if event["type"] in OUTCOMES:
                return str(event["type"])
    return None


async def by_http(
    settings: Settings,
    url: str,
    text: str,
    *,
    mode: Mode = "append",
    session: str | None = None,
    timeout: float = 300.0,
    tell: Tell,
) -> str | None:
    """Send over HTTP, to the session of that id or to the only one there is.

    Raises ConfigError when it isn't clear who is meant, TransportError when the server refuses.
    """
    import aiohttp

    headers = {"authorization": f"Bearer {settings.token}"} if settings.token else {}
    limit = aiohttp.ClientTimeout(total=timeout, connect=10)
    base = url.rstrip("/")
    try:
        async with aiohttp.ClientSession(headers=headers, timeout=limit) as client:
            if session is None:
                session = await _the_session(client, base)
            async with client.get(f"{base}/sessions/{session}/events") as stream:
                await _check(stream)
                async with client.post(
                    f"{base}/sessions/{session}/say", json={"text": text, "mode": mode}
                ) as answer:
                    utterance = (await _check(answer))["utterance"]
                tell({"type": "accepted", "utterance": utterance})
                return await _followed(_sse(stream, utterance), timeout, tell)
    except asyncio.TimeoutError:
        return None
    except aiohttp.ClientError as error:
        raise TransportError(f"{base} can't be reached: {error}") from None


async def _the_session(client: Any, base: str) -> str:
    async with client.get(f"{base}/sessions") as answer:
        found = [one["id"] for one in await _check(answer)]
    if len(found) != 1:
        there = f"there are: {', '.join(found)}" if found else "none is open"
        raise ConfigError(f"--session says which one is to speak; {there}")
    return str(found[0])


async def _check(answer: Any) -> Any:
    if answer.status >= 400:
        try:
            why = (await answer.json())["error"]
        except (ValueError, KeyError, TypeError):
            why = f"status {answer.status}"
        raise TransportError(f"the server refuses: {why}", retryable=answer.status >= 500)
    if answer.content_type == "text/event-stream":
        return None
    return await answer.json()


async def _sse(stream: Any, utterance: str) -> AsyncGenerator[dict[str, Any], None]:
    async for line in stream.content:
        if not line.startswith(b"data:"):
            continue
        event = json.loads(line[5:])
        if event.get("utterance") != utterance:
            continue
        if event["type"] == "finished":
            spoken = round(event["heard"] * 1000)
            kind = "interrupted" if event["interrupted"] else "finished"
            if event.get("error") and not spoken:
                kind = "failed"
            event = {**event, "type": kind, "spoken_ms": spoken}
        yield event


def line(event: dict[str, Any]) -> str:
    """An event for people, in one line."""
    kind = event["type"]
    if kind == "queued" and event.get("position"):
        return f"queued: {event['position']} before it"
    if "spoken_ms" in event:
        spoken = f"{kind}: {event['spoken_ms'] / 1000:.1f} s spoken"
        return f"{spoken}; {event['error']}" if event.get("error") else spoken
    return str(kind)
