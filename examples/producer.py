"""Send one text to an avatar's queue, and print what comes of it: python producer.py "Hello." """

import asyncio
import json
import os
import sys

import aio_pika


async def main(text: str) -> None:
    url = os.environ.get("VOIPAVATAR_AMQP_URL", "amqp://guest:guest@localhost/")
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        replies = await channel.declare_queue(exclusive=True)
        body = json.dumps({"type": "text", "data": text}).encode()
        message = aio_pika.Message(body, reply_to=replies.name, delivery_mode=2)
        queue = os.environ.get("RABBITMQ_QUEUE", "talking_face_input")
        await channel.default_exchange.publish(message, queue)
        async with replies.iterator() as events:
            async for event in events:
                print(event.body.decode())
                await event.ack()
                if event.type in ("finished", "interrupted", "expired", "failed", "duplicate"):
                    return


asyncio.run(main(sys.argv[1]))
