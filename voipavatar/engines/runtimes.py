"""What runs a network: torch, ONNX Runtime, TensorRT, TensorRT-RTX. Each is one callable.

    run({"latent": (B, 4, 32, 32) float32}) -> {"face": (B, 256, 256, 3) uint8}

numpy goes in and numpy comes out, copied, never a live buffer; engines don't know which runtime
they have. A runtime is made, used and freed on one thread.

Plans are built from ONNX files that are exported here, and installed only with proof: the very
ONNX file a plan is made of is run against torch on golden inputs before the build, and the plan
itself before it is used for the first time on a device. What can't be proved is not installed.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ..avatar import file_digest, read_json, void, write_atomic, write_json
from ..errors import ConfigError, EngineError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
Precision = Literal["fp32", "fp16", "bf16"]
Kind = Literal["torch", "onnxruntime", "tensorrt", "tensorrt_rtx"]
KINDS: tuple[Kind, ...] = ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx")

BATCHES = (1, 2, 4, 8, 16)
"""Sizes that batches are filled up to where a new size costs something."""


GRAPHS = 2
"""Version of the exported networks' inputs and outputs."""


class Runtime(Protocol):
    """A network, ready to run."""

    def __call__(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Inputs by name, the batch first; outputs by name, each its own memory."""

    def close(self) -> None:
        """Free it. Idempotent."""


def bucket(n: int, sizes: Sequence[int] = BATCHES) -> int:
    """The least of `sizes` that holds `n`; the largest if none does."""
    return next((size for size in sizes if size >= n), sizes[-1])


def filled(feeds: Arrays, size: int) -> dict[str, npt.NDArray[Any]]:
    """Every array's batch brought to `size`, by its last member again."""
    return {
        name: array
        if len(array) == size
        else np.concatenate([array, np.repeat(array[-1:], size - len(array), 0)])
        for name, array in feeds.items()
    }


def batched(run: Runtime, feeds: Arrays, sizes: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """`run` over any number, in batches of the given sizes; the last one filled up."""
    total = len(next(iter(feeds.values())))
    parts: list[dict[str, npt.NDArray[Any]]] = []
    start = 0
    while start < total:
        n = min(total - start, sizes[-1])
        part = run(filled({k: v[start : start + n] for k, v in feeds.items()}, bucket(n, sizes)))
        parts.append({k: v[:n] for k, v in part.items()})
        start += n
    if len(parts) == 1:
        return parts[0]
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def missing(package: str, extra: str) -> ConfigError:
    """What to say when a runtime's package isn't there."""
    return ConfigError(f"{package} is not installed: pip install voipavatar[{extra}]")


# --- torch ----------------------------------------------------------------------------------------


def torch_dtype(precision: Precision) -> torch.dtype:
    """The type of weights and activations."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


class TorchRuntime:
    """A module on a device. On CUDA every batch size is captured once as a graph and replayed."""

    def __init__(
        self, module: torch.nn.Module, device: str = "cpu", precision: Precision = "fp32"
    ) -> None:
        """`module` names its `inputs` and `outputs`. It is moved, not copied."""
        import torch

        self.device = torch.device(device)
        self.module = module.eval().requires_grad_(False).to(self.device, torch_dtype(precision))
        if self.device.type == "cuda":
            self.module = self.module.to(memory_format=torch.channels_last)
        self.inputs: tuple[str, ...] = tuple(getattr(module, "inputs"))  # noqa: B009
        self.outputs: tuple[str, ...] = tuple(getattr(module, "outputs"))  # noqa: B009
        self._graphs: dict[tuple[Any, ...], Any] = {}
        self._pool: Any = None  # one for all graphs: what they give is copied before the next runs
        self._capture = self.device.type == "cuda"

    def __call__(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        import torch

        # what is mapped from disk can't be written, and torch wants to be able to
        host = [torch.from_numpy(np.require(feeds[name], None, ["C", "W"])) for name in self.inputs]
        with torch.inference_mode():
            if self._capture:
                out = self._replay(host)
            else:
                out = self.module(*(one.to(self.device) for one in host))
            many = out if isinstance(out, tuple) else (out,)
            # .clone(): on a CPU the numpy array would share the tensor's memory
            done = [one.clone() if one.device.type == "cpu" else one.cpu() for one in many]
        return {name: one.numpy() for name, one in zip(self.outputs, done, strict=True)}

    def _replay(self, host: list[torch.Tensor]) -> Any:
        import torch

        key = tuple((tuple(one.shape), one.dtype) for one in host)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(host)
            except RuntimeError as error:
                # a device that can't record still computes
                log.warning("no CUDA graph", extra={"error": str(error).split("\n")[0]})
                self._capture = False
                torch.cuda.synchronize(self.device)
                return self.module(*(one.to(self.device) for one in host))
        graph, inputs, outputs = self._graphs[key]
        for there, here in zip(inputs, host, strict=True):
            there.copy_(here, non_blocking=True)
        graph.replay()
        return outputs

    def _record(self, host: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor], Any]:
        import torch

        inputs = [one.to(self.device) for one in host]
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # cudnn chooses its algorithms outside of the recording
                self.module(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self.module(*inputs)
        self._pool = graph.pool()
        return graph, inputs, outputs

    def close(self) -> None:
        self._graphs.clear()
        self.module.to("meta")


# --- ONNX Runtime ---------------------------------------------------------------------------------


class OnnxRuntime:
    """An ONNX file on ONNX Runtime: CPU, or CUDA where its build has it."""

    def __init__(self, path: Path, device: str = "cpu", threads: int = 0) -> None:
        """`threads` 0 leaves the number to ONNX Runtime. ConfigError for a file it can't take."""
        try:
            import onnxruntime as ort
        except ImportError:
            raise missing("onnxruntime", "musetalk") from None
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise ConfigError(
                    "this onnxruntime has no CUDA: pip install onnxruntime-gpu in its place, "
                    "or take --device cpu"
                )
            if hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # cuBLAS and cuDNN as torch's wheels bring them
            index = int(device.partition(":")[2] or 0)
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": index}))
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its errors share no class but Exception
            raise ConfigError(
                f"{path.name} can't be loaded by onnxruntime: {str(error).splitlines()[0]}"
            ) from None
        if device.startswith("cuda") and "CUDAExecutionProvider" not in (
            self._session.get_providers()
        ):
            # it goes on with the CPU by itself, a hundred times slower
            raise ConfigError(
                "onnxruntime can't use CUDA here, its libraries don't fit: install the cuDNN and "
                "CUDA that its version names, or take --device cpu"
            )
        self.inputs = tuple(one.name for one in self._session.get_inputs())
        self.outputs = tuple(one.name for one in self._session.get_outputs())

    def __call__(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        # one input may have another name in a file that was exported elsewhere
        named = feeds
        if len(self.inputs) == 1 and self.inputs[0] not in feeds:
            named = {self.inputs[0]: next(iter(feeds.values()))}
        out = self._session.run(None, {name: named[name] for name in self.inputs})
        return dict(zip(self.outputs, out, strict=True))

    def close(self) -> None:
        self._session = None


# --- TensorRT -------------------------------------------------------------------------------------


def tensorrt_module(kind: Kind) -> Any:
    """The Python API: `tensorrt`, or its twin for RTX cards."""
    names = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
    for name in names[kind]:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    if kind == "tensorrt":
        raise ConfigError(
            "tensorrt is not installed: install NVIDIA's wheel for your CUDA, then "
            "pip install voipavatar[tensorrt]"
        )
    raise ConfigError(
        "tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13-libs "
        "tensorrt-rtx-cu13-bindings nvidia-cuda-runtime"
    )


def _logger(trt: Any, said: list[str] | None = None) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                if said is not None:
                    said.append(message)
                log.error("TensorRT", extra={"said": message})
            else:
                log.debug("TensorRT", extra={"said": message})

    return Logger()


class TensorRt:
    """A plan on a GPU, through pycuda: one stream, pinned host memory, addresses set once.

    What a batch does (copies in, the plan, copies out) is recorded as a CUDA graph when the same
    shapes come a third time in a row, and replayed until others come: a few hundred small kernels
    are then one launch. TensorRT-RTX records by itself, and keeps what it compiled for this card
    in a file beside the plan.
    """

    RECORD_AT = 3

    def __init__(self, plan: Path, kind: Kind, device: str = "cuda:0") -> None:
        """EngineError for a plan this device or version can't take; it says what rebuilds it."""
        trt = tensorrt_module(kind)
        try:
            import pycuda.driver as cuda
        except ImportError:
            raise missing("pycuda", "tensorrt") from None
        self._cuda = cuda
        cuda.init()
        index = int(device.partition(":")[2] or 0)
        self._engine: Any = None
        self._context: Any = None
        self._stream: Any = None
        self._own: dict[str, tuple[Any, Any]] = {}
        self._compiled: Any = None  # TensorRT-RTX's cache
        self._compiled_at = plan.with_suffix(".cache")
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._same = 0  # runs in a row with these shapes
        self._graph: Any = None
        self._recorder = Recorder.find() if kind == "tensorrt" else None
        # the primary context: what torch uses too, if it is there
        self._device = cuda.Device(index).retain_primary_context()
        self._device.push()
        try:
            self._open(trt, plan, kind)
        except BaseException:
            self._free()
            self._device.detach()
            raise
        else:
            self._device.pop()

    def _open(self, trt: Any, plan: Path, kind: Kind) -> None:
        cuda = self._cuda
        said: list[str] = []
        self._logger = _logger(trt, said)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise EngineError(
                f"{plan.name} was built for another device or version "
                f"({said[0] if said else 'no reason given'}): run `voipavatar build`"
            )
        if kind == "tensorrt_rtx":
            self._context = self._engine.create_execution_context(self._rtx(trt))
        else:
            self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(
                f"{plan.name} finds no room on this device "
                f"({said[0] if said else 'no reason given'}): stop what else runs on it"
            )
        self._stream = cuda.Stream()
        self.inputs: tuple[str, ...] = ()
        self.outputs: tuple[str, ...] = ()
        largest = {}
        for i in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(i)
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self.inputs += (name,)
                largest[name] = tuple(self._engine.get_tensor_profile_shape(name, 0)[2])
            else:
                self.outputs += (name,)
        for name, shape in largest.items():
            self._context.set_input_shape(name, shape)
        for name in (*self.inputs, *self.outputs):
            shape = tuple(self._context.get_tensor_shape(name))
            kind_ = trt.nptype(self._engine.get_tensor_dtype(name))
            host = cuda.pagelocked_empty(int(np.prod(shape)), kind_)
            there = cuda.mem_alloc(max(host.nbytes, 1))
            self._own[name] = (host, there)
            self._context.set_tensor_address(name, int(there))

    def _rtx(self, trt: Any) -> Any:
        """Graphs as TensorRT-RTX records them, and what it compiled here the last time."""
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._compiled = config.create_runtime_cache()
        try:
            self._compiled.deserialize(self._compiled_at.read_bytes())
        except FileNotFoundError:
            pass
        config.set_runtime_cache(self._compiled)
        return config

    def __call__(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        self._device.push()
        try:
            for name in self.inputs:
                array, host = feeds[name], self._own[name][0]
                if array.size > host.size:
                    raise EngineError(
                        f"a batch of {len(array)} is more than the plan was built for"
                    )
                np.copyto(host[: array.size], array.reshape(-1), casting="same_kind")
            shapes = tuple(tuple(feeds[name].shape) for name in self.inputs)
            if shapes != self._shapes:
                self._forget()
                self._shapes, self._same = shapes, 0
                for name, shape in zip(self.inputs, shapes, strict=True):
                    self._context.set_input_shape(name, shape)
            self._same += 1
            if self._graph is None and self._recorder and self._same == self.RECORD_AT:
                self._graph = self._recorder.record(self._stream.handle, self._work)
            if self._graph is not None:
                self._graph.launch()
            else:
                self._work()
            self._stream.synchronize()
            return {name: self._part(name).copy() for name in self.outputs}
        finally:
            self._device.pop()

    def _part(self, name: str) -> npt.NDArray[Any]:
        """An output in pinned memory, as it is for the shapes of this batch."""
        shape = tuple(self._context.get_tensor_shape(name))
        part: npt.NDArray[Any] = self._own[name][0][: int(np.prod(shape))].reshape(shape)
        return part

    def _work(self) -> None:
        """One batch onto the stream. Nothing here waits, so it can be recorded."""
        for name, shape in zip(self.inputs, self._shapes, strict=True):
            host, there = self._own[name]
            self._cuda.memcpy_htod_async(there, host[: int(np.prod(shape))], self._stream)
        if not self._context.execute_async_v3(self._stream.handle):
            raise EngineError("TensorRT failed to run a plan: see the log above")
        for name in self.outputs:
            part = self._part(name)
            self._cuda.memcpy_dtoh_async(part, self._own[name][1], self._stream)

    def _forget(self) -> None:
        if self._graph is not None:
            self._graph.free()
            self._graph = None

    def _free(self) -> None:
        """Everything but the context, which is current."""
        self._forget()
        for _, there in self._own.values():
            there.free()
        self._own.clear()
        self._context = self._engine = self._runtime = self._stream = self._compiled = None

    def close(self) -> None:
        if self._engine is None:
            return
        self._device.push()
        try:
            if self._compiled is not None:
                data = bytes(memoryview(self._compiled.serialize()))
                try:
                    write_atomic(self._compiled_at, lambda beside: void(beside.write_bytes(data)))
                except OSError as error:  # the next start compiles again, that is all
                    log.warning("what was compiled can't be kept", extra={"error": str(error)})
        finally:
            self._free()
            self._device.detach()  # and with it, it is no longer current


class Recorder:
    """CUDA graphs of a stream's work, through NVIDIA's own bindings: pycuda has none."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._refused = False

    def __bool__(self) -> bool:
        return not self._refused

    @classmethod
    def find(cls) -> Recorder | None:
        """None without the package, which torch for CUDA brings."""
        try:
            from cuda.bindings import driver
        except ImportError:
            return None
        return cls(driver)

    def check(self, answer: tuple[Any, ...]) -> Any:
        """What a call of the driver gives, or EngineError with its code."""
        if answer[0] != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"a CUDA graph failed: {answer[0]}")
        return answer[1] if len(answer) > 1 else None

    def record(self, stream: int, work: Callable[[], None]) -> Graph | None:
        """What `work` puts onto the stream, not run yet. None where it can't be recorded: the work
        is then run as it is, for good."""
        driver = self._driver
        handle = driver.CUstream(stream)
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            self.check(driver.cuStreamBeginCapture(handle, mode))
            try:
                work()
            finally:
                graph = self.check(driver.cuStreamEndCapture(handle))
            try:
                ready = self.check(driver.cuGraphInstantiate(graph, 0))
            finally:
                self.check(driver.cuGraphDestroy(graph))
        except Exception as error:  # pycuda's and TensorRT's errors share no class but Exception
            log.warning("no CUDA graph", extra={"error": str(error)})
            self._refused = True
            return None
        return Graph(self, handle, ready)


class Graph:
    """Recorded work."""

    def __init__(self, recorder: Recorder, stream: Any, ready: Any) -> None:
        self._recorder, self._stream, self._ready = recorder, stream, ready

    def launch(self) -> None:
        driver = self._recorder._driver
        self._recorder.check(driver.cuGraphLaunch(self._ready, self._stream))

    def free(self) -> None:
        driver = self._recorder._driver
        self._recorder.check(driver.cuGraphExecDestroy(self._ready))


# --- export and build -----------------------------------------------------------------------------


def export_onnx(module: torch.nn.Module, examples: Sequence[Any], path: Path) -> None:
    """A module that names its `inputs` and `outputs` as ONNX (opset 17), its batch dynamic.

    Weights lie beside it in one `.data` file: 3.4 GB are more than one protobuf holds.
    """
    import torch

    try:
        import onnx
    except ImportError:
        raise missing("onnx", "musetalk") from None
    names: tuple[str, ...] = tuple(getattr(module, "inputs"))  # noqa: B009
    outputs: tuple[str, ...] = tuple(getattr(module, "outputs"))  # noqa: B009
    path.parent.mkdir(parents=True, exist_ok=True)
    rough = path.parent / f".{path.stem}"
    rough.mkdir(exist_ok=True)
    try:
        with warnings.catch_warnings(), torch.inference_mode(), _quick_halves(module):
            # the exporter that is about to be replaced takes a third of the time and memory
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                tuple(examples),
                str(rough / "graph.onnx"),
                input_names=list(names),
                output_names=list(outputs),
                dynamic_axes={name: {0: "batch"} for name in (*names, *outputs)},
                opset_version=17,
                dynamo=False,
            )
        model = onnx.load(str(rough / "graph.onnx"))
        data = path.with_suffix(".data")
        data.unlink(missing_ok=True)
        onnx.save_model(
            model,
            str(path),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=data.name,
            size_threshold=1024,
        )
    finally:
        for one in rough.iterdir():
            one.unlink()
        rough.rmdir()


@contextlib.contextmanager
def _quick_halves(module: torch.nn.Module) -> Iterator[None]:
    """Convolutions of a half-precision module computed in fp32 while it is traced on a CPU.

    Tracing runs the network once, and a CPU has no arithmetic for fp16: it takes fifty times as
    long. What is recorded is the same convolution.
    """
    import torch

    class Widened(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any) -> Any:
            wide = (x.float(), weight.float(), bias.float())
            return torch.nn.functional.conv2d(*wide, stride, padding).to(x.dtype)

        @staticmethod
        def symbolic(g: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any) -> Any:
            size = weight.type().sizes()[2:]
            return g.op(
                "Conv",
                *(x, weight, bias),
                kernel_shape_i=size,
                strides_i=list(stride),
                pads_i=[*padding, *padding],
                dilations_i=[1, 1],
                group_i=1,
            )

    def widened(one: Any) -> Callable[[Any, Any, Any], Any]:
        return lambda x, weight, bias: Widened.apply(x, weight, bias, one.stride, one.padding)

    slow = [
        one
        for one in module.modules()
        if isinstance(one, torch.nn.Conv2d)
        and one.weight.dtype == torch.float16
        and one.weight.device.type == "cpu"
        and one.bias is not None
    ]
    try:
        for one in slow:
            setattr(one, "_conv_forward", widened(one))  # noqa: B010
        yield
    finally:
        for one in slow:
            if "_conv_forward" in vars(one):
                delattr(one, "_conv_forward")


@dataclass(frozen=True)
class Profile:
    """Shapes of one input but for the batch, and the batches a plan is made for."""

    shapes: Mapping[str, tuple[int, ...]]
    least: int = 1
    best: int = 8
    most: int = 16


def build_plan(
    onnx_path: Path,
    plan: Path,
    kind: Kind,
    profile: Profile,
    archs: Sequence[str] = (),
    workspace: int = 4 << 30,
) -> dict[str, Any]:
    """An ONNX file as a plan. Types are those of the graph (fp32 around norms and softmaxes stays
    fp32 whatever the rest is).

    `archs` ("8.9", "12.0") are for TensorRT-RTX, which builds without a GPU; empty means the one
    that is there. EngineError with what the builder said.
    """
    trt = tensorrt_module(kind)
    said: list[str] = []
    logger = _logger(trt, said)
    started = time.monotonic()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        reasons = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise EngineError(f"{onnx_path.name} can't be parsed: {reasons or '; '.join(said)}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    shapes = builder.create_optimization_profile()
    for name, shape in profile.shapes.items():
        shapes.set_shape(name, *((n, *shape) for n in (profile.least, profile.best, profile.most)))
    config.add_optimization_profile(shapes)
    if archs:
        config.num_compute_capabilities = len(archs)
        for i, arch in enumerate(archs):
            config.set_compute_capability(_architecture(trt, arch), i)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise EngineError(f"{onnx_path.name} can't be built: {'; '.join(said[:3]) or 'no reason'}")
    plan.parent.mkdir(parents=True, exist_ok=True)

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            file.write(memoryview(data))

    write_atomic(plan, write)
    return {
        "bytes": plan.stat().st_size,
        "sha256": file_digest(plan),
        "seconds": round(time.monotonic() - started, 1),
        "version": str(trt.__version__),
        "archs": list(archs) or [device_arch()],
    }


def _architecture(trt: Any, arch: str) -> Any:
    """TensorRT-RTX's name for a compute capability; ConfigError lists those it has."""
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in vars(trt.ComputeCapability).items()
        if name.startswith("SM") and name[2:].isdigit()
    }
    if arch not in known:
        there = sorted(known, key=float)
        raise ConfigError(f"tensorrt_rtx has no architecture {arch}: it has {', '.join(there)}")
    return known[arch]


def check_archs(kind: Kind, archs: Sequence[str]) -> tuple[str, ...]:
    """The architectures that plans will be built for: those named, or the one that is there.

    ConfigError, before anything is done, for what this runtime can't build here.
    """
    if kind == "onnxruntime":
        if archs:
            raise ConfigError("onnxruntime's files are for every device: leave --arch out")
        return ("any",)
    trt = tensorrt_module(kind)
    if archs and kind != "tensorrt_rtx":
        raise ConfigError("tensorrt builds for the GPU that is there: leave --arch out")
    for arch in archs:
        _architecture(trt, arch)
    here = device_arch()
    if not archs and here == "none":
        hint = ": say which with --arch 8.9 (RTX 40), 12.0 (RTX 50)" if kind != "tensorrt" else ""
        raise ConfigError(f"there is no GPU here to build for{hint}")
    return tuple(dict.fromkeys(archs)) or (here,)


def device_arch(device: str = "cuda:0") -> str:
    """The compute capability of a GPU, as "8.9"; "none" without one."""
    try:
        import pycuda.driver as cuda

        cuda.init()
        major, minor = cuda.Device(int(device.partition(":")[2] or 0)).compute_capability()
        return f"{major}.{minor}"
    except Exception:  # no package, no driver, no device: each has its own class
        pass
    try:
        import torch

        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(device)
            return f"{major}.{minor}"
    except (ImportError, RuntimeError, AssertionError):
        pass
    return "none"


# --- the golden gate ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Golden:
    """Inputs, and what torch makes of them in fp32."""

    feeds: dict[str, npt.NDArray[Any]]
    wants: dict[str, npt.NDArray[Any]]


TOLERANCE: Mapping[Precision, tuple[float, float]] = {
    # largest and mean difference, as parts of the output's own range
    "fp32": (1e-3, 1e-4),
    "fp16": (0.05, 2 / 255),
    "bf16": (0.15, 5 / 255),
}


def differences(run: Runtime, golden: Golden) -> dict[str, tuple[float, float]]:
    """For each output: the largest and the mean difference, as parts of its range."""
    got = run(golden.feeds)
    out = {}
    for name, want in golden.wants.items():
        have, right = got[name].astype(np.float64), want.astype(np.float64)
        if have.shape != right.shape:
            raise EngineError(f"{name} has the shape {have.shape} instead of {right.shape}")
        span = 255.0 if want.dtype == np.uint8 else max(float(np.ptp(right)), 1e-6)
        gap = np.abs(have - right) / span
        worst = float(np.max(gap)) if np.isfinite(have).all() else float("inf")
        out[name] = (worst, float(np.mean(gap)) if np.isfinite(worst) else float("inf"))
    return out


def golden_gate(
    run: Runtime, golden: Golden, precision: Precision, what: str
) -> dict[str, tuple[float, float]]:
    """The differences, if they are within tolerance; EngineError if not: such a network must not
    be shown to anybody."""
    found = differences(run, golden)
    most, mean = TOLERANCE[precision]
    for name, (worst, average) in found.items():
        picture = golden.wants[name].dtype == np.uint8
        # one step of 255 is rounding, in any precision
        if worst > max(most, 1.01 / 255 if picture else 0) or average > mean:
            raise EngineError(
                f"{what} is refused: {name} differs from torch by {worst:.2g} at most and "
                f"{average:.2g} in the mean (allowed: {most:.2g}, {mean:.2g}). Its weights are "
                f"damaged, or {precision} is not enough for it: build it with --precision fp32"
            )
    return found


# --- artefacts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ArtefactKey:
    """What a built network is good for. Another of anything is another artefact."""

    model: str
    weights: str
    precision: str
    runtime: str
    version: str
    batches: tuple[int, ...] = BATCHES
    graphs: int = GRAPHS
    arch: str = "any"
    """The compute capability it runs on; "any" for ONNX."""


@dataclass
class Artefacts:
    """A folder of built networks and its manifest."""

    folder: Path
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Artefacts:
        return cls(folder, read_json(folder / "manifest.json"))

    def check(self, key: ArtefactKey, command: str) -> None:
        """ConfigError that says what doesn't fit, and the command that rebuilds it."""
        have = self.data.get("key")
        if not isinstance(have, dict):
            raise ConfigError(f"{self.folder.name} is not built yet: run `{command}`")
        for name, value in asdict(key).items():
            value = list(value) if isinstance(value, tuple) else value
            fits = (
                value in self.data.get("archs", []) if name == "arch" else value == have.get(name)
            )
            if not fits and not (name == "arch" and value == "any"):
                raise ConfigError(
                    f"{self.folder.name} was built for {name} {have.get(name)}, this is {value}: "
                    f"run `{command}`"
                )
        for name, said in self.data.get("files", {}).items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != said.get("bytes"):
                raise ConfigError(f"{self.folder.name}/{name} is damaged: run `{command}`")

    def install(self, key: ArtefactKey, data: Mapping[str, Any]) -> None:
        """Write the manifest, last."""
        self.data = {**data, "key": asdict(key)}
        write_json(self.folder / "manifest.json", self.data)

    def proved(self, name: str, gate: Mapping[str, tuple[float, float]], arch: str) -> None:
        """Remember that a plan passed its gate on this device."""
        proofs = dict(self.data.get("proofs", {}))
        proofs[f"{name} on {arch}"] = {k: list(v) for k, v in gate.items()}
        self.data["proofs"] = proofs
        write_json(self.folder / "manifest.json", self.data)

    def is_proved(self, name: str, arch: str) -> bool:
        return f"{name} on {arch}" in self.data.get("proofs", {})


def timed(run: Callable[[], object], seconds: float = 1.0, least: int = 3) -> float:
    """Milliseconds a call, the median of as many as fit into `seconds`."""
    run()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < least or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return float(np.median(took)) * 1000


def threads() -> int:
    """CPU threads a runtime may use: what the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
