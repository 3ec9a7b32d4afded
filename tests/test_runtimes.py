"""Runtimes: the same network in torch, ONNX Runtime and TensorRT-RTX, and the gate before them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from voipavatar.config import Settings
from voipavatar.engines import runtimes
from voipavatar.engines.runtimes import (
    ArtefactKey,
    Artefacts,
    Golden,
    Kind,
    OnnxRuntime,
    TensorRt,
    batched,
    bucket,
    check_archs,
    differences,
    filled,
    golden_gate,
)
from voipavatar.errors import ConfigError, EngineError
from voipavatar.musetalk_build import prove

from .contract import babble
from .cuda_stand_in import Bench
from .faces import save_face
from .musetalk_parts import needs, small_recipe


class Doubler:
    """A runtime that notes the batches it was given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        self.sizes.append(len(feeds["x"]))
        return {"y": feeds["x"] * 2}

    def close(self) -> None:
        self.sizes.clear()


def test_batches_are_filled_to_known_sizes() -> None:
    assert [bucket(n) for n in (1, 2, 3, 5, 9, 16, 40)] == [1, 2, 4, 8, 16, 16, 16]
    x = np.arange(23, dtype=np.float32)[:, None]
    run = Doubler()
    out = batched(run, {"x": x}, (1, 2, 4, 8))
    assert run.sizes == [8, 8, 8]  # 8, 8 and the last seven filled up to 8
    assert np.array_equal(out["y"], 2 * x)
    assert np.array_equal(filled({"x": x[:3]}, 4)["x"], x[[0, 1, 2, 2]])


def test_the_gate_refuses_what_differs() -> None:
    x = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
    good = Golden({"x": x}, {"y": 2 * x})
    assert golden_gate(Doubler(), good, "fp32", "it")["y"] == (0.0, 0.0)
    bent = Golden({"x": x}, {"y": 2 * x + 0.05})
    with pytest.raises(EngineError, match="it is refused"):
        golden_gate(Doubler(), bent, "fp32", "it")
    broken = x.copy()
    broken[3] = np.nan
    with pytest.raises(EngineError, match="refused"):
        golden_gate(Doubler(), Golden({"x": broken}, {"y": 2 * x}), "fp16", "it")
    with pytest.raises(EngineError, match="shape"):
        differences(Doubler(), Golden({"x": x}, {"y": x[:3]}))


def test_rounding_of_pixels_is_allowed_and_grey_is_not() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(12).reshape(-1, 1)

    class Shown:
        def __init__(self, out: npt.NDArray[Any]) -> None:
            self.out = out

        def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
            return {"face": self.out}

        def close(self) -> None:
            return None

    want = Golden({}, {"face": pixels})
    rounded = pixels.copy()
    rounded[::40] ^= 1
    golden_gate(Shown(rounded), want, "fp32", "draw")
    with pytest.raises(EngineError):  # what a decoder with sums in fp16 gave
        golden_gate(Shown(np.full_like(pixels, 120)), want, "fp16", "draw")


def test_a_built_network_is_for_what_it_was_built_for(tmp_path: Path) -> None:
    key = ArtefactKey("m", "w", "fp16", "tensorrt_rtx", "1.7", arch="8.9")
    artefacts = Artefacts(tmp_path)
    with pytest.raises(ConfigError, match="not built yet: run `voipavatar build`"):
        artefacts.check(key, "voipavatar build")
    (tmp_path / "a.plan").write_bytes(b"12345")
    artefacts.install(key, {"archs": ["8.9", "12.0"], "files": {"a.plan": {"bytes": 5}}})
    again = Artefacts.load(tmp_path)
    again.check(key, "voipavatar build")
    again.check(ArtefactKey("m", "w", "fp16", "tensorrt_rtx", "1.7", arch="12.0"), "b")
    for other, word in (
        (ArtefactKey("m", "w", "fp16", "tensorrt_rtx", "1.8", arch="8.9"), "version"),
        (ArtefactKey("m", "w", "fp16", "tensorrt_rtx", "1.7", arch="7.5"), "arch"),
        (ArtefactKey("m", "w", "fp32", "tensorrt_rtx", "1.7", arch="8.9"), "precision"),
        (ArtefactKey("m", "x", "fp16", "tensorrt_rtx", "1.7", arch="8.9"), "weights"),
    ):
        with pytest.raises(ConfigError, match=word):
            again.check(other, "voipavatar build")
    (tmp_path / "a.plan").write_bytes(b"1234")
    with pytest.raises(ConfigError, match="damaged"):
        again.check(key, "voipavatar build")


def tiny(folder: Path, **options: Any) -> tuple[Any, Any, Settings]:
    from voipavatar.engines.musetalk import read_options

    chosen, recipe = read_options({"recipe": "musetalk-tiny", **options})
    return chosen, recipe, Settings(cache_dir=folder)


def quiet(what: str, share: float) -> None:
    """No progress to be seen."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artefacts]:
    """The reduced model, exported for ONNX Runtime."""
    needs("torch", "onnx", "onnxruntime")
    from voipavatar.musetalk_build import build

    folder = tmp_path_factory.mktemp("built")
    chosen, recipe, settings = tiny(folder, runtime="onnxruntime")
    return folder, build(chosen, recipe, settings, quiet)


def test_onnx_is_torch_in_any_batch(built: tuple[Path, Artefacts]) -> None:
    import torch

    from voipavatar.engines.runtimes import TorchRuntime
    from voipavatar.musetalk_build import parts

    folder, artefacts = built
    _, recipe, _ = tiny(folder)
    for part in parts(recipe, folder / "models"):
        run, reference = OnnxRuntime(artefacts.folder / f"{part.name}.onnx"), None
        reference = TorchRuntime(part.make(torch.float32))
        for n in (1, 3, 16) if part.name != "look" else (1, 3):
            feeds = {
                k: np.concatenate(
                    [v[:1] * (1 if v.dtype == np.int64 else 1 - i / 40) for i in range(n)]
                ).astype(v.dtype)
                for k, v in part.feeds.items()
            }
            got, want = run(feeds), reference(feeds)
            for name, right in want.items():
                gap = np.abs(got[name].astype(np.float64) - right.astype(np.float64))
                if right.dtype == np.uint8:
                    assert gap.max() <= 1 and (gap > 0).mean() < 1e-3, (part.name, n)
                else:
                    assert gap.max() < 1e-4, (part.name, n)
        run.close()


def test_the_engine_draws_the_same_without_torch(built: tuple[Path, Artefacts]) -> None:
    from voipavatar.engines.musetalk import MuseTalk

    folder, _ = built
    marks = save_face(folder / "face.png", width=320, height=240)
    options = {"recipe": "musetalk-tiny", "width": 320, "height": 240, "landmarks": marks}
    engine = MuseTalk(Settings(cache_dir=folder), device="cpu")
    drawn = []
    for runtime in ("torch", "onnxruntime"):
        avatar = engine.prepare(
            folder / "face.png", folder / "avatar", options | {"runtime": runtime}, quiet
        )
        session = engine.open(avatar)
        drawn.append(engine.render(session.push(babble(0.5)) + session.flush()))
    engine.close()
    for one, other in zip(*drawn, strict=True):
        gap = np.abs(one.astype(int) - other.astype(int))
        assert gap.max() <= 2 and (gap > 0).mean() < 0.01


def test_a_build_belongs_to_the_weights_that_are_there(
    built: tuple[Path, Artefacts], tmp_path: Path
) -> None:
    """Other weights in the models folder: the built networks are of another model."""
    from voipavatar.engines.musetalk import built_networks
    from voipavatar.engines.musetalk_nets import generate

    folder, _ = built
    _, recipe, settings = tiny(folder)
    ready = built_networks(recipe, settings, "onnxruntime", "cpu", "fp32", folder / "models")
    assert ready.random and ready.built
    ready.close()
    built_networks(recipe, settings, "onnxruntime", "cpu", "fp32", tmp_path).close()  # none there
    generate(recipe, tmp_path / "other", seed=8)
    with pytest.raises(ConfigError, match="built for weights .*voipavatar build"):
        built_networks(recipe, settings, "onnxruntime", "cpu", "fp32", tmp_path / "other")


def test_corrupted_weights_are_not_installed(built: tuple[Path, Artefacts]) -> None:
    """A bit here and there in one network, and the build stops; what was installed stays."""
    import torch

    from voipavatar.musetalk_build import build

    folder, artefacts = built
    before = {one.name: one.stat().st_mtime_ns for one in artefacts.folder.iterdir()}
    chosen, recipe, settings = tiny(folder, runtime="onnxruntime")

    def damage(name: str, module: torch.nn.Module) -> None:
        if name == "hear":  # the first of them: what comes after is not even exported
            with torch.no_grad():
                next(iter(module.parameters())).view(-1)[0] += 3.0

    with pytest.raises(EngineError, match=r"hear\.onnx is refused"):
        build(chosen, recipe, settings, quiet, weights=damage)
    assert {one.name: one.stat().st_mtime_ns for one in artefacts.folder.iterdir()} == before
    assert not artefacts.folder.with_name(artefacts.folder.name + ".new").exists()


def test_half_precision_passes_the_gate(tmp_path: Path) -> None:
    needs("torch", "onnx", "onnxruntime")
    from voipavatar.musetalk_build import build

    chosen, recipe, settings = tiny(tmp_path, runtime="onnxruntime", precision="fp16")
    artefacts = build(chosen, recipe, settings, quiet)
    assert set(artefacts.data["gates"]) == {"hear", "imagine", "draw", "look"}
    assert 0 < artefacts.data["gates"]["imagine"]["latent"][0] < 0.05


@pytest.mark.slow
def test_plans_are_built_without_a_gpu(tmp_path: Path) -> None:
    """TensorRT-RTX, two architectures, fp16 with fp32 norms: the networks' whole depth at a
    fraction of their width."""
    needs("torch", "onnx", "onnxruntime", "tensorrt_rtx_bindings")
    import yaml

    from voipavatar.engines.musetalk import built_networks
    from voipavatar.musetalk_build import build

    data = yaml.safe_load(small_recipe(tmp_path, "deep").read_text())
    data["configs"]["tiny/unet.json"].update(
        block_out_channels=[32, 64, 64, 64], layers_per_block=2, norm_num_groups=8
    )
    data["configs"]["tiny/vae.json"].update(block_out_channels=[8, 16, 16, 16], layers_per_block=2)
    (tmp_path / "deep.yaml").write_text(yaml.safe_dump(data))
    chosen, recipe, settings = tiny(
        tmp_path, recipe=str(tmp_path / "deep.yaml"), runtime="tensorrt_rtx"
    )
    artefacts = build(chosen, recipe, settings, quiet, archs=("8.9", "12.0"))
    for name in ("hear", "imagine", "draw"):
        assert artefacts.data["plans"][name]["bytes"] > 1000
        assert artefacts.data["plans"][name]["archs"] == ["8.9", "12.0"]
        assert (artefacts.folder / f"{name}.golden.npz").is_file()
    assert (artefacts.folder / "look.onnx").is_file()  # prepares avatars without torch
    assert "proofs" not in artefacts.data  # a plan is proved where it runs, before it is seen
    with pytest.raises((ConfigError, EngineError), match="arch|pycuda|voipavatar build"):
        built_networks(recipe, settings, "tensorrt_rtx", "cuda:0", "fp16")


# --- TensorRT on a device, against a stand-in for its driver --------------------------------------


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Bench, Kind, Path]:
    (tmp_path / "net.plan").write_bytes(b"plan")
    return Bench(monkeypatch, request.param), request.param, tmp_path / "net.plan"


def test_a_plan_gives_its_own_answers_in_any_order_of_batches(
    device: tuple[Bench, Kind, Path],
) -> None:
    bench, kind, plan = device
    run = TensorRt(plan, kind)
    assert (run.inputs, run.outputs) == (("x",), ("y", "rows"))
    kept: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = []
    for n in (1, 3, 3, 3, 3, 3, 16, 2, 2, 2, 2):
        x = np.random.default_rng(n + len(kept)).random((n, 4), np.float32)
        out = run({"x": x})
        assert np.array_equal(out["y"], 2 * x + 1) and out["rows"].tolist() == [n] * n
        kept.append((x, out["y"]))
    for x, y in kept:  # nobody else's answer has come into it since
        assert np.array_equal(y, 2 * x + 1)
    if kind == "tensorrt":  # the third of a kind is recorded, and replayed until another comes
        assert bench.graphs.launched == 3 + 2 and bench.graphs.graphs == 1
    else:
        assert bench.trt.strategy == "whole" and bench.graphs.launched == 0
    run.close()
    run.close()
    driver = bench.driver
    assert not driver.memory and not driver.contexts and driver.retained == 0
    assert bench.graphs.graphs == 0


def test_what_was_compiled_for_a_card_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Bench(monkeypatch, "tensorrt_rtx")
    (tmp_path / "net.plan").write_bytes(b"plan")
    TensorRt(tmp_path / "net.plan", "tensorrt_rtx").close()
    assert bench.trt.compiled == []
    TensorRt(tmp_path / "net.plan", "tensorrt_rtx").close()
    assert bench.trt.compiled == [b"compiled"]


def test_a_device_that_cant_record_still_computes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(monkeypatch, "tensorrt")
    bench.graphs.refuse = True
    (tmp_path / "net.plan").write_bytes(b"plan")
    run = TensorRt(tmp_path / "net.plan", "tensorrt")
    x = np.ones((2, 4), np.float32)
    for _ in range(5):
        assert np.array_equal(run({"x": x})["y"], 2 * x + 1)
    assert caplog.text.count("no CUDA graph") == 1 and bench.graphs.launched == 0
    run.close()


def test_a_plan_that_fails_frees_what_it_took(device: tuple[Bench, Kind, Path]) -> None:
    bench, kind, plan = device
    plan.write_bytes(b"of another card")
    with pytest.raises(EngineError, match=r"compute 9\.0.*voipavatar build"):
        TensorRt(plan, kind)
    assert not bench.driver.memory and not bench.driver.contexts and bench.driver.retained == 0
    plan.write_bytes(b"plan")
    run = TensorRt(plan, kind)
    with pytest.raises(EngineError, match="a batch of 17"):
        run({"x": np.zeros((17, 4), np.float32)})
    bench.trt.fail = True
    with pytest.raises(EngineError, match="failed to run"):
        run({"x": np.zeros((1, 4), np.float32)})
    bench.trt.fail = False
    x = np.ones((3, 4), np.float32)
    assert np.array_equal(run({"x": x})["y"], 2 * x + 1)
    assert not bench.driver.contexts  # each call left as it came
    run.close()


def test_a_corrupted_plan_is_refused_on_its_device_before_it_draws(
    device: tuple[Bench, Kind, Path],
) -> None:
    """The golden gate on a plan as it runs, and its proof as it is remembered."""
    bench, kind, plan = device
    x = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    rows = np.full(2, 2, np.uint8)
    np.savez(plan.with_name("net.golden.npz"), in_x=x, out_y=2 * x + 1, out_rows=rows)
    artefacts = Artefacts(plan.parent)
    prove(artefacts, "net", kind, "fp16", "8.9")
    assert artefacts.is_proved("net", "8.9") and not artefacts.is_proved("net", "9.0")
    np.savez(plan.with_name("net.golden.npz"), in_x=x, out_y=3 * x + 1, out_rows=rows)
    with pytest.raises(EngineError, match=r"net\.plan is refused"):
        prove(artefacts, "net", kind, "fp16", "9.0")
    assert not artefacts.is_proved("net", "9.0") and bench.driver.retained == 0


def test_what_cant_be_built_here_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("tensorrt_rtx_bindings")
    monkeypatch.setattr(runtimes, "device_arch", lambda device="": "none")
    assert check_archs("onnxruntime", ()) == ("any",)
    assert check_archs("tensorrt_rtx", ("8.9", "12.0", "8.9")) == ("8.9", "12.0")
    with pytest.raises(ConfigError, match=r"no architecture 9\.9: it has 7\.5, .*12\.0"):
        check_archs("tensorrt_rtx", ("8.9", "9.9"))
    with pytest.raises(ConfigError, match="say which with --arch"):
        check_archs("tensorrt_rtx", ())
    with pytest.raises(ConfigError, match="leave --arch out"):
        check_archs("onnxruntime", ("8.9",))


def test_onnxruntime_never_takes_the_cpu_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, built: tuple[Path, Artefacts]
) -> None:
    """Its build has CUDA, but the machine's libraries don't fit: it goes on, very slowly."""
    import onnxruntime

    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    path = built[1].folder / "imagine.onnx"
    real = onnxruntime.InferenceSession

    def without(path: str, options: Any, providers: list[Any]) -> Any:
        assert providers[0] == ("CUDAExecutionProvider", {"device_id": 1})
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without)
    with pytest.raises(ConfigError, match="can't use CUDA here"):
        OnnxRuntime(path, "cuda:1")


def test_what_is_not_built_says_what_builds_it(tmp_path: Path) -> None:
    needs("onnxruntime")
    from voipavatar.engines.musetalk import built_networks

    _, recipe, settings = tiny(tmp_path)
    with pytest.raises(
        ConfigError, match="voipavatar build --engine musetalk --recipe musetalk-tiny"
    ):
        built_networks(recipe, settings, "onnxruntime", "cpu", "fp32")
