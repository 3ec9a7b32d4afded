"""The numbers of `GET /metrics` that no session counts."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from voipavatar import metrics

NAME = "voipavatar_gpu_memory_bytes"


class Driver:
    """Answers as NVML does: 0 and the answer where the argument points, or an error's number."""

    def __init__(self, *used: int | None, starts: int = 0) -> None:
        self._used = used  # None: a device that has fallen off the bus
        self._starts = starts

    def nvmlInit_v2(self) -> int:
        return self._starts

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self._used)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number: int, device: Any) -> int:
        device._obj.value = 100 + number
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:
        used = self._used[device.value - 100]
        if used is None:
            return 15  # NVML_ERROR_GPU_IS_LOST
        memory._obj.total, memory._obj.used = 80_000_000_000, used
        return 0


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    metrics._nvml.cache_clear()
    yield
    metrics._nvml.cache_clear()
    metrics.GPU_MEMORY.clear()


def shown() -> dict[str, float]:
    """Each device's memory, by its label, as /metrics shows it."""
    lines = [line for line in metrics.exposition().decode().splitlines() if line.startswith(NAME)]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def driver(monkeypatch: pytest.MonkeyPatch, answers: Any) -> list[str]:
    """Put a driver in the place of this machine's; the libraries that were looked for."""
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        if answers is None:
            raise OSError(f"{name}: cannot open shared object file")
        return answers

    monkeypatch.setattr(ctypes, "CDLL", load)
    return asked


def test_memory_of_every_gpu_whatever_runs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, Driver(3_000_000_000, None, 70_000_000_000))
    assert shown() == {"0": 3e9, "2": 7e10}
    metrics._nvml.cache_clear()
    driver(monkeypatch, Driver(4_000_000_000))
    assert shown() == {"0": 4e9}, "a device that is gone has a number still"


@pytest.mark.parametrize("answers", [None, Driver(1, starts=9), SimpleNamespace()])
def test_without_a_driver_there_is_no_number(monkeypatch: pytest.MonkeyPatch, answers: Any) -> None:
    asked = driver(monkeypatch, answers)
    assert shown() == {} and shown() == {}
    assert len(asked) == 1, "it was looked for at every scrape"


def test_torch_tells_where_the_driver_has_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, None)
    cuda = SimpleNamespace(
        is_initialized=lambda: True, device_count=lambda: 1, mem_get_info=lambda number: (30, 100)
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert shown() == {"0": 70.0}
