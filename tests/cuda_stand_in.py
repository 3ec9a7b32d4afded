"""A GPU's driver and TensorRT's Python API as far as `TensorRt` talks to them, in this process.

It holds what is easy to get wrong without a device: device memory can't be read by the host, work
on a stream happens when the stream is waited for and not before, a context must be current, what
is recorded does not run, a plan runs at the addresses it was given. What a real driver does beyond
that is not shown by it.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest


class Wrong(AssertionError):
    """The driver was used in a way that a real one answers with an error or with garbage."""


class Driver:
    """`pycuda.driver`."""

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}
        self.contexts: list[Context] = []
        self.retained = 0
        self.streams: list[Stream] = []
        self.pinned: list[npt.NDArray[Any]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.next = itertools.count(0x1000, 0x1000)
        self.ready = False

    def init(self) -> None:
        self.ready = True

    def Device(self, index: int) -> Any:
        assert self.ready
        return types.SimpleNamespace(
            retain_primary_context=lambda: Context(self),
            compute_capability=lambda: (8, 9),
            index=index,
        )

    def current(self) -> None:
        if not self.contexts:
            raise Wrong("no context is current")

    def Stream(self) -> Stream:
        self.current()
        self.streams.append(Stream(self))
        return self.streams[-1]

    def pagelocked_empty(self, shape: int, dtype: Any) -> npt.NDArray[Any]:
        self.current()
        self.pinned.append(np.full(shape, 99, dtype))
        return self.pinned[-1]

    def mem_alloc(self, size: int) -> Allocation:
        self.current()
        place = next(self.next)
        self.memory[place] = bytearray(b"\x55" * size)
        return Allocation(self, place)

    def _pinned(self, array: npt.NDArray[Any]) -> None:
        if not any(np.shares_memory(array, one) for one in self.pinned):
            raise Wrong("an asynchronous copy with memory that is not pinned")

    def memcpy_htod_async(self, there: Any, here: npt.NDArray[Any], stream: Any) -> None:
        self.current()
        self._pinned(here)

        def copy() -> None:  # it reads the host's memory when it runs, not when it is asked for
            data = here.tobytes()
            self.memory[int(there)][: len(data)] = data

        stream.put(copy)

    def memcpy_dtoh_async(self, here: npt.NDArray[Any], there: Any, stream: Any) -> None:
        self.current()
        self._pinned(here)

        def copy() -> None:
            data = bytes(self.memory[int(there)][: here.nbytes])
            here[...] = np.frombuffer(data, here.dtype).reshape(here.shape)

        stream.put(copy)


class Context:
    """A device's primary context."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        driver.retained += 1

    def push(self) -> None:
        self.driver.contexts.append(self)

    def pop(self) -> None:
        assert self.driver.contexts.pop() is self

    def detach(self) -> None:
        self.driver.retained -= 1
        if self in self.driver.contexts:
            self.driver.contexts.remove(self)


class Allocation:
    def __init__(self, driver: Driver, place: int) -> None:
        self.driver, self.place = driver, place

    def __int__(self) -> int:
        return self.place

    def free(self) -> None:
        self.driver.current()
        del self.driver.memory[self.place]


class Stream:
    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.handle = next(driver.next)
        self.waiting: list[Callable[[], None]] = []

    def put(self, work: Callable[[], None]) -> None:
        recording = self.driver.recording
        (self.waiting if recording is None else recording).append(work)

    def synchronize(self) -> None:
        if self.driver.recording is not None:
            raise Wrong("waiting while recording")
        waiting, self.waiting = self.waiting, []
        for work in waiting:
            work()


class Bindings:
    """`cuda.bindings.driver`: graphs."""

    class CUresult:
        CUDA_SUCCESS = 0

    class CUstreamCaptureMode:
        CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1

    CUstream = staticmethod(int)

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.refuse = False
        self.graphs = 0
        self.launched = 0

    def _stream(self, handle: int) -> Stream:
        return next(one for one in self.driver.streams if one.handle == handle)

    def cuStreamBeginCapture(self, handle: int, mode: int) -> tuple[int]:
        if self._stream(handle).waiting:
            raise Wrong("recording begins while work waits")
        self.driver.recording = []
        return (0,)

    def cuStreamEndCapture(self, handle: int) -> tuple[int, Any]:
        recorded, self.driver.recording = self.driver.recording, None
        return (901, None) if self.refuse else (0, recorded)

    def cuGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[int, Any]:
        self.graphs += 1
        return 0, list(graph)

    def cuGraphDestroy(self, graph: Any) -> tuple[int]:
        return (0,)

    def cuGraphLaunch(self, ready: list[Callable[[], None]], handle: int) -> tuple[int]:
        self.launched += 1
        for work in ready:
            self._stream(handle).put(work)
        return (0,)

    def cuGraphExecDestroy(self, ready: Any) -> tuple[int]:
        self.graphs -= 1
        return (0,)


class Trt(types.ModuleType):
    """`tensorrt` (or its twin for RTX cards) with one plan: y = 2 x + 1, and how many rows."""

    MOST = 16

    def __init__(self, driver: Driver, good: bytes = b"plan") -> None:
        super().__init__("tensorrt")
        self.driver = driver
        self.good = good
        self.fail = False
        self.__version__ = "10.0"
        self.compiled: list[bytes] = []
        self.strategy: Any = None
        self.ILogger = Logger
        self.TensorIOMode = types.SimpleNamespace(INPUT=1, OUTPUT=2)
        self.CudaGraphStrategy = types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    def nptype(self, kind: Any) -> Any:
        return kind

    def Runtime(self, logger: Any) -> Any:
        def read(data: bytes) -> Plan | None:
            if data != self.good:
                logger.log(Logger.Severity.ERROR, "built for compute 9.0")
                return None
            return Plan(self)

        return types.SimpleNamespace(deserialize_cuda_engine=read)


class Logger:
    Severity = types.SimpleNamespace(ERROR=1, INTERNAL_ERROR=0, WARNING=2)


class Plan:
    num_io_tensors = 3

    def __init__(self, trt: Trt) -> None:
        self.trt = trt

    def get_tensor_name(self, i: int) -> str:
        return ("x", "y", "rows")[i]

    def get_tensor_mode(self, name: str) -> int:
        return 1 if name == "x" else 2

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return (1, 4), (8, 4), (self.trt.MOST, 4)

    def get_tensor_dtype(self, name: str) -> Any:
        return {"x": np.float32, "y": np.float32, "rows": np.uint8}[name]

    def create_runtime_config(self) -> Any:
        trt = self.trt

        class Config:
            cuda_graph_strategy: Any = None

            def create_runtime_cache(self) -> Any:
                return types.SimpleNamespace(
                    deserialize=trt.compiled.append, serialize=lambda: b"compiled"
                )

            def set_runtime_cache(self, cache: Any) -> bool:
                return True

        return Config()

    def create_execution_context(self, config: Any = None) -> Any:
        self.trt.strategy = None if config is None else config.cuda_graph_strategy
        return Execution(self.trt)


class Execution:
    def __init__(self, trt: Trt) -> None:
        self.trt = trt
        self.shape: tuple[int, ...] = ()
        self.place: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if shape[0] > self.trt.MOST or shape[1:] != (4,):
            raise Wrong(f"{shape} is outside of the profile")
        self.shape = tuple(shape)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if name != "rows" else self.shape[:1]

    def set_tensor_address(self, name: str, place: int) -> None:
        self.place[name] = place

    def execute_async_v3(self, handle: int) -> bool:
        driver, shape = self.trt.driver, self.shape
        driver.current()
        stream = next(one for one in driver.streams if one.handle == handle)

        def run() -> None:
            n = int(np.prod(shape))
            x = np.frombuffer(bytes(driver.memory[self.place["x"]]), np.float32)[:n]
            y = (2 * x + 1).astype(np.float32).tobytes()
            driver.memory[self.place["y"]][: len(y)] = y
            driver.memory[self.place["rows"]][: shape[0]] = bytes([shape[0]] * shape[0])

        if not self.trt.fail:
            stream.put(run)
        return not self.trt.fail


class Bench:
    """All of it, put where `import` finds it."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: str) -> None:
        self.driver = Driver()
        self.trt = Trt(self.driver)
        self.graphs = Bindings(self.driver)
        pycuda = types.ModuleType("pycuda")
        setattr(pycuda, "driver", self.driver)  # noqa: B010
        bindings = types.ModuleType("cuda.bindings")
        setattr(bindings, "driver", self.graphs)  # noqa: B010
        for name, module in (
            ("pycuda", pycuda),
            ("pycuda.driver", self.driver),
            ("cuda.bindings", bindings),
            ("cuda.bindings.driver", self.graphs),
            (kind, self.trt),
        ):
            patch.setitem(sys.modules, name, module)
