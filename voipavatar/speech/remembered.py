"""What was learnt of voices and is worth keeping: how loud each is."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
from pathlib import Path

logger = logging.getLogger(__name__)


class Remembered:
    """Numbers by name, in a JSON file. A damaged or unwritable file costs only the memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._guard = threading.Lock()
        self._values = self._read()

    def get(self, name: str) -> float | None:
        with self._guard:
            return self._values.get(name)

    def put(self, name: str, value: float) -> None:
        """Known from now on in this process; `save` makes it last."""
        with self._guard:
            self._values[name] = round(value, 2)

    def save(self) -> None:
        """Write the file, with what others wrote meanwhile. Off the event loop, please."""
        with self._guard:
            self._values = {**self._read(), **self._values}
            data = json.dumps(self._values, indent=1, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", dir=self._path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(data)
                os.replace(name, self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            logger.warning("voice memory not written", extra={"error": type(error).__name__})

    def _read(self) -> dict[str, float]:
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            return {str(name): float(value) for name, value in values.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
