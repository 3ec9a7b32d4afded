"""Phrases that were said before, on disk: bounded, least recently used first out, checked on use.

A file is one phrase: a line of JSON (rate, loudness, cues, digest), then the
int16 samples. Its name is a digest of voice and text, so the folder holds no text of its own; the
sound is there to be heard by who may read the folder, which is its owner only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..media import Cue, Int16

logger = logging.getLogger(__name__)

BOUND = 200_000_000
"""Bytes: an hour and a quarter of speech at 22,050 Hz."""

_MAGIC = "voipavatar phrase 1"


@dataclass(frozen=True)
class Phrase:
    """A piece that was said: cue times count from its start."""

    pcm: Int16
    rate: int
    cues: tuple[Cue, ...]


class PhraseCache:
    """Files in `folder`, at most `bound` bytes together. Safe for several processes.

    Its methods read and write files: call them off the event loop.
    """

    def __init__(self, folder: Path, bound: int = BOUND) -> None:
        self.folder = folder
        self.bound = bound
        self._bytes: int | None = None  # known after the first look

    @staticmethod
    def key(*parts: Any) -> str:
        """Of everything that decides how it sounds."""
        told = json.dumps([_MAGIC, *parts], sort_keys=True, default=str, ensure_ascii=False)
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, key: str) -> Phrase | None:
        """The phrase, or None; a damaged file is removed."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        phrase = _decoded(data)
        if phrase is None:
            logger.warning("a damaged phrase was removed from the cache")
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return phrase

    def put(self, key: str, phrase: Phrase) -> None:
        """Keep it, and drop the oldest where there are too many. A full disk is no error."""
        data = _encoded(phrase)
        if len(data) > self.bound // 4:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                os.replace(name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            logger.warning("phrase not cached", extra={"error": type(error).__name__})
            return
        self._bytes = self._bytes + len(data) if self._bytes is not None else None
        if self._bytes is None or self._bytes > self.bound:
            self._trim()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]

    def _trim(self) -> None:
        """Look at what is there, whoever put it there; go to nine tenths of the bound."""
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        if total > self.bound:
            files.sort()
            for _, size, path in files:
                if total <= self.bound * 9 // 10:
                    break
                with contextlib.suppress(OSError):
                    path.unlink()
                    total -= size
        self._bytes = total


def _encoded(phrase: Phrase) -> bytes:
    sound = phrase.pcm.astype("<i2").tobytes()
    cues: Sequence[Any] = [[c.kind, c.text, c.start, c.end] for c in phrase.cues]
    body = json.dumps([phrase.rate, cues], ensure_ascii=False).encode() + b"\n" + sound
    return f"{_MAGIC} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def _decoded(data: bytes) -> Phrase | None:
    head, _, body = data.partition(b"\n")
    if head != f"{_MAGIC} {hashlib.sha256(body).hexdigest()}".encode():
        return None
    told, _, sound = body.partition(b"\n")
    rate, cues = json.loads(told)
    pcm = np.frombuffer(sound, "<i2").astype(np.int16)
    return Phrase(pcm, int(rate), tuple(Cue(*cue) for cue in cues))
