"""MuseTalk for a machine: networks exported, compiled and proved; speed measured.

`build` leaves ONNX files or TensorRT plans that run without torch. Every file is proved on golden
inputs before it is installed: the ONNX file by ONNX Runtime, always; the plan on the GPU, at once
where there is one and otherwise when it is first loaded. `bench` says how fast a machine is.
"""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .avatar import Loop, file_digest, write_atomic
from .config import Settings
from .engines import Avatar
from .engines.musetalk import (
    BUILT_ROWS,
    Ear,
    Hearing,
    MuseTalk,
    Networks,
    Options,
    built_folder,
    models_folder,
    read_options,
)
from .engines.runtimes import (
    BATCHES,
    ArtefactKey,
    Artefacts,
    Golden,
    Kind,
    OnnxRuntime,
    Precision,
    Profile,
    TensorRt,
    TorchRuntime,
    build_plan,
    check_archs,
    device_arch,
    export_onnx,
    golden_gate,
    missing,
    tensorrt_module,
    timed,
    torch_dtype,
)
from .errors import ConfigError
from .media import ENGINE_RATE, Float32
from .models import Recipe, is_random, require
from .version import __version__

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]


# --- building -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One network of the engine: how it is made, and what it is shown."""

    name: str
    make: Callable[[Any], torch.nn.Module]
    feeds: dict[str, npt.NDArray[Any]]
    always_fp32: bool = False
    plan: bool = True
    """Compiled for a GPU; otherwise ONNX Runtime runs it when an avatar is prepared."""


def parts(recipe: Recipe, folder: Path) -> Iterator[Part]:
    """The networks a recipe consists of, with golden inputs (batch 2)."""
    from .engines import musetalk_nets as nets

    files = nets.Files(recipe, folder)
    hearing = files.hearing()
    rng = np.random.default_rng(7)

    def noise(*shape: int) -> Float32:
        return rng.standard_normal(shape).astype(np.float32)

    mel = np.clip(noise(2, hearing.mels, 2 * hearing.positions) * 0.4, -1.0, 1.5)
    first = np.arange(BUILT_ROWS, dtype=np.int64)
    rows = np.stack([first, first + hearing.positions // 2])
    tokens = 10 * (hearing.layers + 1)
    y, x = np.mgrid[0:256, 0:256].astype(np.float32) / 128 - 1
    picture = np.stack([np.stack([x, y, x * y]), np.stack([y, -x, -y])]).astype(np.float32)
    yield Part("hear", lambda dtype: nets.Hear(files.whisper(dtype)), {"mel": mel, "rows": rows})
    yield Part(
        "imagine",
        lambda dtype: nets.Imagine(files.unet(dtype)),
        {"latents": noise(2, 8, 32, 32) * 0.9, "heard": noise(2, tokens, hearing.width)},
    )
    yield Part(
        "draw", lambda dtype: nets.Draw(files.vae(dtype)), {"latent": noise(2, 4, 32, 32) * 0.9}
    )
    yield Part("look", lambda dtype: nets.Look(files.vae(dtype)), {"picture": picture}, True, False)
    if files.has("parser"):
        yield Part(
            "parse",
            lambda dtype: nets.Parse(files.parser(dtype)),
            {"picture": noise(1, 3, 512, 512)},
            True,
            False,
        )


def golden(part: Part) -> Golden:
    """What torch makes of a part's inputs in fp32."""
    import torch

    run = TorchRuntime(part.make(torch.float32))
    try:
        return Golden(part.feeds, run(part.feeds))
    finally:
        run.close()


def build(
    options: Options,
    recipe: Recipe,
    settings: Settings,
    progress: Progress,
    archs: Sequence[str] = (),
    weights: Callable[[str, torch.nn.Module], None] | None = None,
) -> Artefacts:
    """Export, compile, prove, install; what is installed already and fits is left alone.

    `options` names recipe, runtime, precision, models folder. `weights` is called with every
    module before its export (a place for changes that must then pass the gate). EngineError if an
    output is not what torch gives: nothing is installed then, and what was there stays.
    """
    import_torch()
    import torch

    from .engines import musetalk_nets as nets

    kind: Kind = options.runtime
    if kind == "torch":
        raise ConfigError("the torch runtime needs no building: take onnxruntime or tensorrt")
    precision: Precision = options.precision or ("fp32" if kind == "onnxruntime" else "fp16")
    if precision == "bf16":
        raise ConfigError("bf16 is for the torch runtime: build with --precision fp16 or fp32")
    models = models_folder(options, settings)
    if recipe.generated is not None and not nets.Files(recipe, models).has("unet"):
        nets.generate(recipe, models, recipe.generated)
    files = nets.Files(recipe, models)
    # what is missing, or can't be built here, is said before anything is done
    built_for = check_archs(kind, archs)
    for name in ("unet", "vae", "whisper"):
        files.path(name)
    target = built_folder(recipe.name, kind, precision, settings)
    stage = target.with_name(target.name + ".new")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    gates: dict[str, Any] = {}
    plans: dict[str, Any] = {}
    here = device_arch() if kind != "onnxruntime" else "any"
    todo = list(parts(recipe, models))
    try:
        for i, part in enumerate(todo):
            share = i / len(todo)
            progress(f"{part.name}: golden outputs", share)
            want = golden(part)
            at: Precision = "fp32" if part.always_fp32 else precision
            dtype = torch_dtype(at)
            progress(f"{part.name}: exporting", share + 0.1 / len(todo))
            module = part.make(dtype)
            nets.make_safe(module)
            if weights is not None:
                weights(part.name, module)
            path = stage / f"{part.name}.onnx"
            # tracing computes once: in half precision a CPU takes minutes for it
            place = "cuda" if torch.cuda.is_available() else "cpu"
            names = tuple(getattr(module, "inputs"))  # noqa: B009
            examples = [torch.from_numpy(part.feeds[name]).to(place) for name in names]
            export_onnx(module.to(place), examples, path)
            del module, examples
            progress(f"{part.name}: proving", share + 0.4 / len(todo))
            checked = OnnxRuntime(path)
            gates[part.name] = golden_gate(checked, want, at, f"{part.name}.onnx")
            checked.close()
            if kind == "onnxruntime" or not part.plan:
                continue
            arrays: dict[str, Any] = {f"in_{k}": v for k, v in want.feeds.items()}
            arrays |= {f"out_{k}": v for k, v in want.wants.items()}
            np.savez(stage / f"{part.name}.golden.npz", **arrays)
            progress(f"{part.name}: compiling", share + 0.6 / len(todo))
            shapes = {k: v.shape[1:] for k, v in part.feeds.items()}
            plans[part.name] = build_plan(
                path, stage / f"{part.name}.plan", kind, Profile(shapes), archs
            )
            path.unlink()
            path.with_suffix(".data").unlink(missing_ok=True)
        hearing = files.hearing()
        version = (
            _version("onnxruntime")
            if kind == "onnxruntime"
            else str(tensorrt_module(kind).__version__)
        )
        key = ArtefactKey(
            recipe.name,
            files.key("unet", "vae", "whisper"),
            precision,
            kind,
            version,
            arch=built_for[0],
        )
        artefacts = Artefacts(stage)
        artefacts.install(
            key,
            {
                "archs": list(built_for),
                "whisper": asdict(hearing),
                "gates": {k: {n: list(g) for n, g in v.items()} for k, v in gates.items()},
                "plans": plans,
                "random": is_random(recipe.networks["vae"].weights, models),
                "made_by": __version__,
                "files": {
                    one.name: {"bytes": one.stat().st_size, "sha256": file_digest(one)}
                    for one in sorted(stage.iterdir())
                    if one.name != "manifest.json"
                },
            },
        )
        if kind != "onnxruntime" and here in built_for:
            for name in plans:
                prove(artefacts, name, kind, precision, here)
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        stage.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    progress("done", 1.0)
    return Artefacts.load(target)


def prove(artefacts: Artefacts, name: str, kind: Kind, precision: Precision, arch: str) -> None:
    """Run a plan on its golden inputs, here and now; EngineError if it differs."""
    with np.load(artefacts.folder / f"{name}.golden.npz", allow_pickle=False) as data:
        feeds = {k[3:]: data[k] for k in data.files if k.startswith("in_")}
        wants = {k[4:]: data[k] for k in data.files if k.startswith("out_")}
    run = TensorRt(artefacts.folder / f"{name}.plan", kind)
    try:
        gate = golden_gate(run, Golden(feeds, wants), precision, f"{name}.plan")
    finally:
        run.close()
    artefacts.proved(name, gate, arch)


def import_torch() -> None:
    """ConfigError without torch."""
    try:
        import torch  # noqa: F401
    except ImportError:
        raise missing("torch", "musetalk") from None


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


# --- measuring ------------------------------------------------------------------------------------


def flops(networks: Networks) -> dict[str, float]:
    """Floating point operations (a multiply-add is two) a frame, counted on the torch modules."""
    from torch.utils.flop_counter import FlopCounterMode

    out = {}
    for name, run in (("imagine", networks.imagine), ("draw", networks.draw)):
        if not isinstance(run, TorchRuntime):
            return {}
        feeds = _one(networks, name)
        graphs, run._capture = run._capture, False
        with FlopCounterMode(display=False) as counter:
            run(feeds)
        run._capture = graphs
        out[name] = float(counter.get_total_flops())
    return out


def _one(networks: Networks, name: str, batch: int = 1) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(1)

    def noise(*shape: int) -> Float32:
        return rng.standard_normal((batch, *shape)).astype(np.float32)

    if name == "hear":
        rows = np.repeat(np.arange(BUILT_ROWS, dtype=np.int64)[None], batch, 0)
        return {"mel": noise(networks.mels, 2 * networks.positions), "rows": rows}
    if name == "imagine":
        tokens = 10 * networks.layers
        return {"latents": noise(8, 32, 32), "heard": noise(tokens, networks.width)}
    return {"latent": noise(4, 32, 32)}


def matmul_rate(device: str, precision: Precision, seconds: float = 1.0) -> float:
    """Floating point operations a second that torch's matmul reaches here."""
    import torch

    n = 8192 if device != "cpu" else 1024
    a = torch.randn(n, n, device=device, dtype=torch_dtype(precision))
    b = torch.randn(n, n, device=device, dtype=torch_dtype(precision))

    def run() -> None:
        a @ b
        if device != "cpu":
            torch.cuda.synchronize(device)

    return 2 * n**3 / (timed(run, seconds) / 1000)


def bench(
    engine: MuseTalk,
    avatar: Avatar,
    batches: Sequence[int] = BATCHES,
    sessions: Sequence[int] = (1, 2, 4, 8, 16),
    seconds: float = 2.0,
    command: str = "",
    progress: Progress = lambda _what, _share: None,
) -> dict[str, Any]:
    """How fast this machine draws: by stage, by batch, by sessions, with what it was measured."""
    options, recipe = read_options(avatar.options)
    networks = engine.networks(options, recipe)
    device = options.device or ("cpu" if engine.info.device == "cpu" else "cuda:0")
    precision: Precision = options.precision or ("fp32" if device == "cpu" else "fp16")
    batches = [n for n in batches if n <= networks.sizes[-1]] or [1]
    loop = Loop(avatar.path)
    report: dict[str, Any] = {
        "command": command,
        "recipe": recipe.name,
        "runtime": options.runtime,
        "precision": precision,
        "device": _device_name(device),
        "picture": f"{avatar.width}x{avatar.height}",
        "versions": {
            "voipavatar": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "onnxruntime", "numpy")},
            **(
                {options.runtime: str(tensorrt_module(options.runtime).__version__)}
                if options.runtime.startswith("tensorrt")
                else {}
            ),
        },
    }
    stages: dict[str, dict[str, float]] = {}
    for n in batches:
        progress(f"stages, batch {n}", 0.5 * batches.index(n) / len(batches))
        stages[str(n)] = {
            name: round(timed(partial(run, _one(networks, name, n)), seconds / 4), 3)
            for name, run in (
                ("hear", networks.hear),
                ("imagine", networks.imagine),
                ("draw", networks.draw),
            )
        }
    report["stage_ms"] = stages
    report["fps_by_batch"] = {
        n: round(int(n) * 1000 / (one["imagine"] + one["draw"]), 2) for n, one in stages.items()
    }
    patch = next((p for i in range(loop.frames) if (p := loop.patch(i)) is not None), None)
    if patch is not None:
        from .avatar import paste

        face = np.zeros((256, 256, 3), np.uint8)
        picture = loop.picture(0)
        report["paste_ms"] = round(timed(lambda: paste(picture, patch, face), 0.3), 3)
    report["sessions"] = {}
    for n in sessions:
        progress(f"{n} sessions", 0.5 + 0.4 * list(sessions).index(n) / len(sessions))
        report["sessions"][str(n)] = _sessions(engine, avatar, n, seconds)
    in_time = [n for n in sessions if report["sessions"][str(n)]["real_time"] >= 1]
    report["keeps_up_with"] = max(in_time, default=0)
    counted = flops(networks)
    if counted:
        each = sum(counted.values())
        rate = matmul_rate(device, precision)
        best = max(report["fps_by_batch"].values())
        report["gflop_a_frame"] = round(each / 1e9, 1)
        report["matmul_tflops"] = round(rate / 1e12, 3)
        report["share_of_matmul"] = round(best * each / rate, 3)
    report["memory_mb"] = _memory(device, networks.built)
    progress("parity", 0.95)
    report["streaming_against_offline"] = streaming_error(networks, options)
    models = models_folder(options, engine.settings)
    report["against_fp32"] = against_fp32(recipe, networks, models)
    return report


def _sessions(engine: MuseTalk, avatar: Avatar, n: int, seconds: float) -> dict[str, float]:
    """`n` rooms that talk at once, as the service draws them: what all of them have heard in one
    step is due together, and goes through in the engine's own batches.

    A picture's time is that from when its sound was there until its batch is done: the wait for
    the batches before it is in it. `sound_to_picture` adds what must be heard before.
    """
    rooms = [engine.open(avatar) for _ in range(n)]
    rng = np.random.default_rng(3)
    queues = []
    for room in rooms:
        pcm = (0.1 * rng.standard_normal(ENGINE_RATE * 4)).astype(np.float32)
        queues.append((room.push(pcm) + room.flush())[room.spec.ease :])
    spec = rooms[0].spec
    step = min(spec.step, len(queues[0]))
    rounds = [
        [job for queue in queues for job in queue[at : at + step]]
        for at in range(0, len(queues[0]) - step + 1, step)
    ]
    size = engine.info.batch
    engine.render(rounds[0][:size])
    batches: list[float] = []
    pictures: list[float] = []
    done = turns = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or turns < 2:
        jobs = rounds[turns % len(rounds)]
        began = time.perf_counter()
        for at in range(0, len(jobs), size):
            start = time.perf_counter()
            drawn = len(engine.render(jobs[at : at + size]))
            now = time.perf_counter()
            batches.append(now - start)
            pictures += [now - began] * drawn
            done += drawn
        turns += 1

    def ms(values: list[float], q: int) -> float:
        return round(float(np.percentile(values, q)) * 1000, 1)

    fps = done / sum(batches)
    before = spec.lookahead / ENGINE_RATE + (spec.step - 1) / spec.fps
    return {
        "fps": round(fps, 2),
        "fps_a_session": round(fps / n, 2),
        "real_time": round(fps / n / spec.fps, 2),
        **{f"batch_ms_p{q}": ms(batches, q) for q in (50, 95, 99)},
        **{f"picture_ms_p{q}": ms(pictures, q) for q in (50, 95, 99)},
        "sound_to_picture_ms_p95": round(1000 * before + ms(pictures, 95), 1),
    }


def against_fp32(recipe: Recipe, networks: Networks, models: Path) -> dict[str, Any]:
    """Two faces by this runtime and by torch in fp32 on the processor, from the same sound and
    latents: the mean and the largest difference, in steps of 255. Empty without torch or weights.
    """
    try:
        made = {
            part.name: part for part in parts(recipe, models) if part.name in ("imagine", "draw")
        }
        feeds = made["imagine"].feeds
        latent = golden(made["imagine"]).wants["latent"]
        want = golden(replace(made["draw"], feeds={"latent": latent})).wants["face"]
    except (ImportError, ConfigError) as error:
        log.info("no comparison with torch", extra={"error": str(error)})
        return {}
    got, sound = networks.faces(feeds["latents"], feeds["heard"])
    gap = np.abs(got.astype(np.float64) - want)
    return {
        "mean": round(float(gap.mean()), 4),
        "max": float(gap.max()),
        "sound": bool(sound.all()),
    }


def streaming_error(networks: Networks, options: Options, seconds: float = 4.0) -> dict[str, float]:
    """How far what is heard in a stream lies from what is heard offline.

    As a part of the standard deviation of the offline features, edges left out: 0 is equal.
    """
    rng = np.random.default_rng(11)
    n = int(min(seconds, networks.positions / 50 * 0.8) * ENGINE_RATE)
    swell = np.abs(np.sin(np.arange(n) * (2 * np.pi * 3 / ENGINE_RATE)))
    pcm = (0.1 * rng.standard_normal(n) * swell).astype(np.float32)
    heard = []
    for offline in (True, False):
        shape = Hearing(
            25, options.step, options.right_ms * 16, offline, networks.positions, networks.mels
        )
        ear = Ear(shape)
        found = [spans for spans, _ in ear.push(pcm) + ear.flush()]
        windows = np.zeros((len(found), 10, networks.layers, networks.width), np.float32)
        done: dict[Any, Float32] = {}
        for window, spans in zip(windows, found, strict=True):
            for span in spans:
                if span.hop not in done:
                    done[span.hop] = networks.rows([span.hop])[0]
                part = done[span.hop][span.first : span.first + span.count]
                window[span.place : span.place + span.count] = part
        heard.append(windows[4:-4])
    gap = np.abs(heard[0] - heard[1]) / max(1e-9, float(heard[0].std()))
    return {"mean": round(float(gap.mean()), 4), "max": round(float(gap.max()), 4)}


def _device_name(device: str) -> str:
    if device != "cpu":
        try:
            import torch

            return str(torch.cuda.get_device_name(device))
        except (ImportError, RuntimeError):
            return device
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "cpu"


def _memory(device: str, built: bool) -> float | None:
    """Megabytes: what torch has taken of the GPU; of other runtimes, what is taken there in all,
    by whomever; without a GPU the process's peak."""
    if device != "cpu":
        try:
            import torch

            if not built:
                return float(torch.cuda.max_memory_reserved(device) // 1_000_000)
            free, total = torch.cuda.mem_get_info(device)
            return float((total - free) // 1_000_000)
        except (ImportError, RuntimeError):
            return None  # not known
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def table(report: dict[str, Any]) -> str:
    """A report as the README's table (Markdown)."""
    lines = [
        f"`{report['command'] or 'voipavatar bench engine --engine musetalk'}` on "
        f"{report['device']}: {report['recipe']}, {report['runtime']} {report['precision']}, "
        f"{report['picture']}; "
        + ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v != "none"),
        "",
        "| batch | hear ms | UNet ms | decode ms | frames/s |",
        "|---|---|---|---|---|",
    ]
    for n, one in report["stage_ms"].items():
        lines.append(
            f"| {n} | {one['hear']} | {one['imagine']} | {one['draw']} | "
            f"{report['fps_by_batch'][n]} |"
        )
    lines += [
        "",
        "| sessions | frames/s | a session | × real time | batch ms p50 / p95 / p99 | "
        "picture ms p50 / p95 / p99 | sound to picture ms p95 |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, one in report["sessions"].items():
        lines.append(
            f"| {n} | {one['fps']} | {one['fps_a_session']} | {one['real_time']} | "
            f"{one['batch_ms_p50']} / {one['batch_ms_p95']} / {one['batch_ms_p99']} | "
            f"{one['picture_ms_p50']} / {one['picture_ms_p95']} / {one['picture_ms_p99']} | "
            f"{one['sound_to_picture_ms_p95']} |"
        )
    most = report["keeps_up_with"]
    lines += [
        "",
        f"It keeps up with {most} at once, of what was tried."
        if most
        else "It does not keep up with one session: pictures will be late.",
    ]
    if "share_of_matmul" in report:
        lines.append(
            f"{report['gflop_a_frame']} GFLOP a frame; {report['share_of_matmul']:.0%} of the "
            f"{report['matmul_tflops']} TFLOP/s that a matmul reaches here."
        )
    error = report["streaming_against_offline"]
    taken = "not known" if report["memory_mb"] is None else f"{report['memory_mb']:.0f} MB"
    lines.append(
        f"Blending {report.get('paste_ms', 0)} ms a picture; memory {taken}; "
        f"features streaming against offline: mean {error['mean']}, max {error['max']} (in "
        "standard deviations)."
    )
    parity = report["against_fp32"]
    if parity:
        lines.append(
            f"Faces against fp32 torch: mean {parity['mean']}, max {parity['max']:.0f} of 255"
            + ("." if parity["sound"] else "; NOT SOUND: the decoder's numbers run over.")
        )
    return "\n".join(lines)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """The table into a file, atomically."""
    write_atomic(path, lambda beside: (beside.write_text(table(report), "utf-8"), None)[1])


def check_weights(recipe: Recipe, folder: Path) -> None:
    """Load every network once, without running it: ConfigError names the file that is wrong."""
    import_torch()
    from .engines import musetalk_nets as nets

    files = nets.Files(recipe, folder)
    for name, load in (
        ("whisper", files.whisper),
        ("vae", files.vae),
        ("unet", files.unet),
        ("parser", files.parser),
    ):
        if name in recipe.networks:
            net = recipe.networks[name]
            if recipe.file(net.weights).optional and not files.has(name):
                continue
            require(recipe, folder, net.weights)
            load()
