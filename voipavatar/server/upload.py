"""A sound that came over HTTP: read it, and make sure that it is one before it is queued."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.datastructures import UploadFile

from ..errors import InputError
from ..sources import decode_audio


async def read_sound(request: Request, kind: str) -> tuple[bytes, dict[str, str]]:
    """(the file, the other fields) of a raw or multipart body. Its size is the guard's affair."""
    if kind != "multipart/form-data":
        return await request.body(), {}
    async with request.form(max_files=1, max_fields=8, max_part_size=1_000_000) as form:
        fields = {key: value for key, value in form.items() if isinstance(value, str)}
        for value in form.values():
            if isinstance(value, UploadFile):
                return await value.read(), fields
    return b"", fields


async def check_sound(data: bytes) -> None:
    """Raises InputError, with a sentence, unless `data` is a sound that can be decoded."""
    if not data:
        raise InputError("there is no sound in the request: send a WAV, MP3, Ogg, FLAC or MP4 file")
    await asyncio.to_thread(_check, data)


def _check(data: bytes) -> None:
    next(decode_audio(data), None)
