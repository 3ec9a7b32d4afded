"""The networks against their public implementations, on generated weights in the real formats."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voipavatar.errors import ConfigError
from voipavatar.models import load_recipe, load_tensors

from .contract import babble
from .musetalk_parts import needs, small_recipe

NARROW = {
    "block_out_channels": [32, 64, 64, 64],
    "norm_num_groups": 8,
    "cross_attention_dim": 48,
    "attention_head_dim": 4,
}


def unet_config(full: bool = False) -> dict[str, Any]:
    from voipavatar.engines.musetalk_nets import OFFICIAL

    return {**OFFICIAL["unet"], **({} if full else NARROW)}


def vae_config(full: bool = False) -> dict[str, Any]:
    from voipavatar.engines.musetalk_nets import OFFICIAL

    small = {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8}
    return {**OFFICIAL["vae"], **({} if full else small)}


def gap(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


def test_the_whole_unet_has_the_official_keys() -> None:
    needs("torch")
    import torch

    from voipavatar.engines import musetalk_nets as nets

    with torch.device("meta"):
        unet, vae, whisper, parser = nets.UNet(), nets.VAE(), nets.Whisper(), nets.BiSeNet()
    state = unet.state_dict()
    assert len(state) == 686
    assert sum(one.numel() for one in state.values()) == 849_947_844
    assert tuple(
        state["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape
    ) == (
        320,
        384,
    )
    assert sum(one.numel() for one in vae.parameters()) == 83_653_863
    assert sum(one.numel() for one in whisper.parameters()) == 8_208_384
    assert sum(one.numel() for one in parser.parameters()) == 13_300_416


def test_unet_is_diffusers() -> None:
    needs("torch", "diffusers")
    import torch
    from diffusers import UNet2DConditionModel

    from voipavatar.engines import musetalk_nets as nets

    config = unet_config()
    torch.manual_seed(1)
    reference = UNet2DConditionModel.from_config(config).eval()
    ours = nets.UNet(nets.UNetConfig.from_json(config)).eval()
    ours.load_state_dict(reference.state_dict())
    latents, sound = torch.randn(2, 8, 32, 32), torch.randn(2, 50, 48)
    with torch.inference_mode():
        want = reference(latents, torch.tensor([0]), encoder_hidden_states=sound).sample
        assert gap(ours(latents, sound), want) < 1e-5
        ours.fold()  # the embedding of t = 0 into the biases
        assert gap(ours(latents, sound), want) < 1e-5
        nets.make_safe(ours)
        assert gap(ours(latents, sound), want) < 1e-5
    assert not [key for key in ours.state_dict() if "time" in key]


def test_imagine_adds_the_published_positions() -> None:
    needs("torch")
    import torch

    from voipavatar.engines.musetalk_nets import positions

    table = positions(50, 384)
    for p, k in ((0, 0), (7, 3), (49, 191)):
        angle = torch.tensor(float(p)) * torch.exp(torch.tensor(2.0 * k) * -(np.log(10000.0) / 384))
        assert float(table[0, p, 2 * k]) == pytest.approx(float(torch.sin(angle)), abs=1e-6)
        assert float(table[0, p, 2 * k + 1]) == pytest.approx(float(torch.cos(angle)), abs=1e-6)


def test_vae_is_diffusers() -> None:
    needs("torch", "diffusers")
    import torch
    from diffusers import AutoencoderKL

    from voipavatar.engines import musetalk_nets as nets

    config = vae_config()
    torch.manual_seed(2)
    reference = AutoencoderKL.from_config(config).eval()
    assert reference.config.scaling_factor == nets.LATENT_SCALE
    ours = nets.VAE(nets.VAEConfig.from_json(config)).eval()
    ours.load_state_dict(nets.vae_keys(reference.state_dict()))
    picture, latent = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randn(2, 4, 32, 32)
    with torch.inference_mode():
        want = reference.encode(picture).latent_dist
        mean, logvar = ours.encode(picture)
        assert gap(mean, want.mode()) < 1e-5 and gap(logvar, want.logvar) < 1e-5
        decoded = reference.decode(latent / nets.LATENT_SCALE).sample
        assert gap(ours.decode(latent / nets.LATENT_SCALE), decoded) < 1e-4  # of latents up to 20
        look = nets.Look(ours)
        assert gap(look(picture), want.mode() * nets.LATENT_SCALE) < 1e-5
        # pixels as MuseTalk makes them: clamp, NHWC, times 255, rounded, BGR
        pixels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
        pixels = (pixels * 255).round().astype("uint8")[..., ::-1]
        drawn, sound = (one.numpy() for one in nets.Draw(ours)(latent))
    apart = np.abs(drawn.astype(int) - pixels)
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3
    assert sound.tolist() == [1, 1]
    with torch.no_grad():
        for bad in (float("nan"), float("inf")):
            sick = latent.clone()
            sick[1, 0, 5, 5] = bad  # one number of one picture
            assert nets.Draw(ours)(sick)[1].tolist() == [1, 0]


def test_whisper_is_transformers() -> None:
    needs("torch", "transformers")
    import torch
    from transformers import WhisperConfig, WhisperModel

    from voipavatar.engines import musetalk_nets as nets

    torch.manual_seed(3)
    reference = WhisperModel(
        WhisperConfig(
            d_model=384,
            encoder_layers=4,
            encoder_attention_heads=6,
            encoder_ffn_dim=1536,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
        )
    ).eval()
    ours = nets.Whisper().eval()
    ours.load_state_dict(nets.whisper_keys(reference.state_dict()))
    mel = torch.randn(1, 80, 3000)
    with torch.inference_mode():
        states = reference.encoder(mel, output_hidden_states=True).hidden_states
        want = torch.stack(states, 2)
        assert gap(ours(mel), want) < 2e-5
        rows = torch.tensor([[0, 1, 700, 1499]])
        assert gap(nets.Hear(ours)(mel, rows), want[:, [0, 1, 700, 1499]]) < 2e-5


def test_openai_names_are_read() -> None:
    needs("torch")
    import torch

    from voipavatar.engines import musetalk_nets as nets

    net = nets.Whisper(nets.WhisperConfig(width=32, heads=2, hidden=64, positions=50))
    names = {
        "self_attn.q_proj": "attn.query",
        "self_attn.k_proj": "attn.key",
        "self_attn.v_proj": "attn.value",
        "self_attn.out_proj": "attn.out",
        "self_attn_layer_norm": "attn_ln",
        "fc1": "mlp.0",
        "fc2": "mlp.2",
        "final_layer_norm": "mlp_ln",
    }
    state = {"decoder.token_embedding.weight": torch.zeros(3, 3)}
    for key, value in net.state_dict().items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        key = key.replace("layers.", "blocks.").replace(
            "embed_positions.weight", "positional_embedding"
        )
        key = key.replace("layer_norm.", "ln_post.") if key.startswith("layer_norm") else key
        state[f"encoder.{key}"] = value
    back = nets.whisper_keys(state)
    assert set(back) == set(net.state_dict())
    assert all(torch.equal(back[k], v) for k, v in net.state_dict().items())


def test_hearing_a_file_is_transformers(tmp_path: Path) -> None:
    """Offline: log-mel, stretches of 30 s, zeros at both ends, windows at three rates."""
    needs("torch", "transformers")
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    from voipavatar.engines import musetalk_nets as nets
    from voipavatar.engines.musetalk import Ear, Hearing

    torch.manual_seed(4)
    reference = WhisperModel(
        WhisperConfig(
            d_model=32,
            encoder_layers=4,
            encoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
        )
    ).eval()
    ours = nets.Whisper(nets.WhisperConfig(width=32, heads=2, hidden=64)).eval()
    ours.load_state_dict(nets.whisper_keys(reference.state_dict()))
    hear = nets.Hear(ours)
    extract = WhisperFeatureExtractor()
    for seconds, fps in ((8.0, 25), (30.02, 25), (61.0, 25), (4.013, 24), (4.013, 30)):
        pcm = babble(seconds, seed=int(seconds))
        mels = [
            extract(pcm[i : i + 480_000], sampling_rate=16_000, return_tensors="pt").input_features
            for i in range(0, len(pcm), 480_000)
        ]
        with torch.inference_mode():
            states = [
                torch.stack(reference.encoder(mel, output_hidden_states=True).hidden_states, 2)
                for mel in mels
            ]
        rows = torch.cat(states, 1)[0, : int(len(pcm) / 16_000 * 50)].numpy()
        pad = int(np.ceil(50 / fps))
        empty = np.zeros((1, *rows.shape[1:]), np.float32)
        rows = np.concatenate([empty.repeat(2 * pad, 0), rows, empty.repeat(6 * pad, 0)])
        frames = int(len(pcm) / 16_000 * fps)
        want = np.stack([rows[int(i * 50 / fps) :][:10] for i in range(frames)])

        ear = Ear(Hearing(fps=fps, step=25, offline=True))
        found = [spans for spans, _ in ear.push(pcm) + ear.flush()]
        assert len(found) >= frames
        done: dict[Any, Any] = {}
        got = np.zeros_like(want)
        for i, spans in enumerate(found[:frames]):
            for span in spans:
                if span.hop not in done:
                    mel = torch.from_numpy(span.hop.mel())[None]
                    number = span.hop.segment.start // 480_000
                    assert gap(mel, mels[number]) < 2e-5
                    with torch.inference_mode():
                        heard = hear(mel, torch.from_numpy(span.hop.rows)[None])
                    done[span.hop] = heard[0].numpy()
                got[i, span.place : span.place + span.count] = done[span.hop][
                    span.first : span.first + span.count
                ]
        assert np.abs(got - want).max() < 1e-4, (seconds, fps)
        # the pattern of zero tokens at the ends is part of it
        assert np.array_equal((got == 0).all((2, 3)), (want == 0).all((2, 3)))


def test_generated_files_are_read_as_the_real_ones(tmp_path: Path) -> None:
    """Names, key layouts and file formats: zip, the VAE's old names, whisper's prefix."""
    needs("torch")
    from voipavatar.engines import musetalk_nets as nets

    recipe = load_recipe(small_recipe(tmp_path))
    nets.generate(recipe, tmp_path / "models", seed=5)
    files = nets.Files(recipe, tmp_path / "models")
    assert zipfile.is_zipfile(tmp_path / "models/tiny/unet.pth")
    raw = load_tensors(tmp_path / "models/tiny/vae.bin")
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in raw
    assert "decoder.mid_block.attentions.0.to_q.weight" not in raw
    assert "model.encoder.conv1.weight" in load_tensors(tmp_path / "models/tiny/whisper.bin")
    for net in (files.unet(), files.vae(), files.whisper()):
        assert not any(one.is_meta for one in net.parameters())
    with pytest.raises(ConfigError, match="already"):
        nets.generate(recipe, tmp_path / "models")


def test_a_swapped_file_is_named_with_its_symptom(tmp_path: Path) -> None:
    needs("torch")
    from voipavatar.engines import musetalk_nets as nets

    recipe = load_recipe(small_recipe(tmp_path))
    files = nets.Files(recipe, tmp_path / "models")
    with pytest.raises(ConfigError, match=r"tiny/unet\.pth.*models pull"):
        files.unet()
    nets.generate(recipe, tmp_path / "models")
    vae = tmp_path / "models/tiny/vae.bin"
    vae.write_bytes((tmp_path / "models/tiny/unet.pth").read_bytes())
    with pytest.raises(ConfigError, match=r"tiny/vae\.bin is not the vae"):
        files.vae()
    vae.write_bytes(vae.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"vae\.bin can't be read"):
        files.vae()
    official = load_recipe("musetalk-v15")
    symptom = official.file("sd-vae/diffusion_pytorch_model.bin").symptom
    assert "black" in symptom


def test_bisenet_is_the_published_one() -> None:
    """Weights and a picture by formula; the answers are those that the public network (which is
    in no package) gave to them: MuseTalk's copy of zllrunning's at 0a89dec, torch 2.15, fp32."""
    needs("torch")
    import zlib

    import torch

    from voipavatar.engines import musetalk_nets as nets

    net = nets.BiSeNet().eval()
    state = {}
    for key, value in net.state_dict().items():
        if not value.is_floating_point():  # how many batches were seen
            continue
        n = torch.arange(value.numel(), dtype=torch.float64)
        wave = torch.sin(n * 0.7548776662 + zlib.crc32(key.encode()) % 1000)
        if value.ndim == 4:
            wave = wave * (2.0 / value[0].numel()) ** 0.5
        else:
            wave = 1 + 0.3 * wave if key.endswith(("running_var", "weight")) else 0.1 * wave
        state[key] = wave.reshape(value.shape).float()
    net.load_state_dict(state, strict=False)
    n = torch.arange(3 * 96 * 96, dtype=torch.float64)
    with torch.inference_mode():
        out = net(2 * torch.sin(n * 0.5698402910).reshape(1, 3, 96, 96).float())[0]
    within = [
        *(-0.52395, 0.19025, 0.53944, -0.14632, -0.55136, 0.10141, 0.55962, -0.05583, -0.56417),
        *(0.00988, 0.56497, 0.03613, -0.56203, -0.08191, 0.55536, 0.12714, -0.545, -0.17153),
        0.53103,
    ]
    corner = [-0.61991, 0.37377, 0.65035, -0.3208, -0.67648, 0.26571]
    assert out.shape == (19, 96, 96)
    assert gap(out[:, 40, 57], torch.tensor(within)) < 2e-5
    assert gap(out[:6, 95, 0], torch.tensor(corner)) < 2e-5


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('it ran')",))


@dataclass
class Place:
    """Stands for a tensor by its number."""

    number: int


def tar_checkpoint(path: Path, state: dict[str, Any], hostile: bool = False) -> None:
    """torch 0.1's format, written by its description: a tar of four members."""

    def named(kind: str, key: int, extra: Any) -> bytes:
        # (key, extra, <class torch.kind>), by hand: the class goes by its name
        return (
            b"\x80\x02("
            + pickle.dumps(key, 2)[2:-1]
            + pickle.dumps(extra, 2)[2:-1]
            + f"ctorch\n{kind}\nt.".encode()
        )

    storages, tensors = io.BytesIO(), io.BytesIO()
    storages.write(pickle.dumps(len(state), 2))
    tensors.write(pickle.dumps(len(state), 2))
    for number, value in enumerate(state.values()):
        array = np.ascontiguousarray(value.numpy(), np.float32)
        storages.write(named("FloatStorage", 100 + number, "cpu"))
        storages.write(struct.pack("<q", array.size) + array.tobytes())
        tensors.write(named("FloatTensor", number, 100 + number))
        tensors.write(struct.pack("<ii", value.ndim, 0))
        tensors.write(struct.pack(f"<{value.ndim}q", *value.shape))
        tensors.write(struct.pack(f"<{value.ndim}q", *value.contiguous().stride()))
        tensors.write(struct.pack("<q", 0))
    storages.write(pickle.dumps([], 2))  # no views

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return str(value.number) if isinstance(value, Place) else None

    body = io.BytesIO()
    table: Any = OrderedDict((key, Place(n)) for n, key in enumerate(state))
    if hostile:
        table["bomb"] = Bomb()
    Pickler(body, protocol=2).dump(table)
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            ("sys_info", pickle.dumps({"little_endian": True}, 2)),
            ("storages", storages.getvalue()),
            ("tensors", tensors.getvalue()),
            ("pickle", body.getvalue()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_every_flavour_of_checkpoint_is_read(tmp_path: Path) -> None:
    needs("torch", "safetensors")
    import torch
    from safetensors.torch import save_file

    state = {"a.weight": torch.randn(3, 4), "b": torch.randn(5), "c": torch.tensor(2.0)}
    torch.save(state, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    save_file(state, tmp_path / "new.safetensors")
    tar_checkpoint(tmp_path / "oldest.pth", state)
    for name in ("zip.pth", "old.pth", "wrapped.pth", "new.safetensors", "oldest.pth"):
        read = load_tensors(tmp_path / name)
        assert set(read) == set(state), name
        assert all(torch.equal(read[k].float(), v) for k, v in state.items()), name


def test_nothing_in_a_checkpoint_runs(tmp_path: Path) -> None:
    needs("torch")
    import torch

    torch.save({"a": Bomb()}, tmp_path / "zip.pth")
    torch.save({"a": Bomb()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(), 2))
    tar_checkpoint(tmp_path / "oldest.pth", {"a": torch.randn(2)}, hostile=True)
    (tmp_path / "text.pth").write_text("weights")
    torch.save(["a list"], tmp_path / "list.pth")
    for name in ("zip.pth", "old.pth", "plain.pth", "oldest.pth", "text.pth", "list.pth"):
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            load_tensors(tmp_path / name)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["musetalk-v15", "musetalk-v10"])
def test_true_size_from_official_files_is_diffusers(name: str, tmp_path: Path) -> None:
    """850 million parameters, written and read as the official file, against diffusers."""
    needs("torch", "diffusers", "transformers")
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import WhisperConfig, WhisperModel

    from voipavatar.engines import musetalk_nets as nets
    from voipavatar.engines.musetalk_nets import OFFICIAL

    recipe = load_recipe(name)
    nets.generate(recipe, tmp_path, seed=6)
    files = nets.Files(recipe, tmp_path)

    def equal(stage: str, one: Any, other: Any, most: float = 1e-4) -> None:
        apart = gap(one, other)
        print(f"{name} {stage}: {apart:.2g} apart at most, range {float(other.abs().max()):.3g}")
        assert apart < most

    with torch.device("meta"):
        reference = UNet2DConditionModel.from_config(unet_config(full=True))
    state = torch.load(files.path("unet"), mmap=True, weights_only=True)
    reference.load_state_dict(state, assign=True)
    latents, sound = torch.randn(1, 8, 32, 32), torch.randn(1, 50, 384)
    with torch.inference_mode():
        want = reference.eval()(latents, torch.tensor([0]), encoder_hidden_states=sound).sample
        del reference, state
        equal("UNet", files.unet()(latents, sound), want)
    # diffusers reads the old names from a folder, as it is published
    reference = AutoencoderKL.from_pretrained(tmp_path / "sd-vae", use_safetensors=False).eval()
    picture, latent = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randn(1, 4, 32, 32)
    vae = files.vae()
    with torch.inference_mode():
        equal("VAE encoder", vae.encode(picture)[0], reference.encode(picture).latent_dist.mode())
        equal("VAE decoder", vae.decode(latent), reference.decode(latent).sample)
    whisper = WhisperModel(WhisperConfig(**OFFICIAL["whisper"], decoder_layers=1)).eval()
    heard = nets.whisper_keys(load_tensors(files.path("whisper")))
    whisper.encoder.load_state_dict(heard)
    mel = torch.randn(1, 80, 3000).clamp(-1, 1.5)
    with torch.inference_mode():
        states = whisper.encoder(mel, output_hidden_states=True).hidden_states
        equal("whisper", files.whisper()(mel), torch.stack(states, 2))
    parser = files.parser()
    with torch.inference_mode():
        assert parser(torch.randn(1, 3, 512, 512)).shape == (1, 19, 512, 512)
