"""The networks of MuseTalk, in plain torch, with the key layouts of the official checkpoints.

Four networks, written out so that shapes can be read and graphs exported without a framework
between: a frame is one pass of `UNet` at t = 0 and one of the decoder of `VAE`; `Whisper` hears;
`BiSeNet` draws the mask when an avatar is prepared. B is the batch, H the heads.

    whisper   (B, 80, 3000) log-mel            -> (B, 1500, 5, 384) hidden states, 50 rows a second
    unet      (B, 8, 32, 32), (B, 50, 384)     -> (B, 4, 32, 32), the new latent itself
    decoder   (B, 4, 32, 32)                   -> (B, 256, 256, 3) uint8, BGR; (B,) uint8, 1: sound
    encoder   (B, 3, 256, 256) in -1..1        -> (B, 4, 32, 32), the mean of the distribution
    bisenet   (B, 3, 512, 512)                 -> (B, 19, 512, 512) logits

Sources of the architectures: MuseTalk (arXiv 2410.10122; `musetalk.json`), Stable Diffusion 1.x
(arXiv 2112.10752; the shape of `UNet2DConditionModel` and `AutoencoderKL`), Whisper
(arXiv 2212.04356), BiSeNet (arXiv 1808.00897, the face-parsing weights of zllrunning).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..avatar import write_atomic, write_json
from ..errors import ConfigError
from ..models import Recipe, load_tensors, mark_random, read_config, require, weights_key

LATENT_SCALE = 0.18215
"""Stable Diffusion's scale between what the VAE encodes and what the UNet sees."""

LAYERS_HEARD = 5
"""Hidden states of whisper-tiny that make one row: the embedding and its four layers."""


@dataclass(frozen=True)
class UNetConfig:
    """`musetalk.json`. Both versions have the same."""

    in_channels: int = 8  # the masked latent, then the reference latent
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    context: int = 384  # whisper-tiny's width
    heads: int = 8  # `attention_head_dim` of the file is the number of heads
    groups: int = 32

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UNetConfig:
        """From the file's own keys; ConfigError if it is another architecture."""
        downs = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
        ups = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
        if list(data.get("down_block_types", downs)) != downs or (
            list(data.get("up_block_types", ups)) != ups
        ):
            raise ConfigError("musetalk.json describes another UNet: take the file of MuseTalk")
        heads = data.get("attention_head_dim", cls.heads)
        if not isinstance(heads, int):
            raise ConfigError("musetalk.json: attention_head_dim must be one number")
        return cls(
            in_channels=int(data.get("in_channels", cls.in_channels)),
            out_channels=int(data.get("out_channels", cls.out_channels)),
            channels=tuple(int(c) for c in data.get("block_out_channels", cls.channels)),
            layers=int(data.get("layers_per_block", cls.layers)),
            context=int(data.get("cross_attention_dim", cls.context)),
            heads=heads,
            groups=int(data.get("norm_num_groups", cls.groups)),
        )


@dataclass(frozen=True)
class VAEConfig:
    """`sd-vae/config.json` (sd-vae-ft-mse)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent: int = 4
    groups: int = 32
    scale: float = LATENT_SCALE

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VAEConfig:
        """From the file's own keys. `scaling_factor` is missing in the official one."""
        return cls(
            channels=tuple(int(c) for c in data.get("block_out_channels", cls.channels)),
            layers=int(data.get("layers_per_block", cls.layers)),
            latent=int(data.get("latent_channels", cls.latent)),
            groups=int(data.get("norm_num_groups", cls.groups)),
            scale=float(data.get("scaling_factor", cls.scale)),
        )


@dataclass(frozen=True)
class WhisperConfig:
    """`whisper/config.json`, the encoder's part."""

    width: int = 384
    layers: int = 4
    heads: int = 6
    hidden: int = 1536
    mels: int = 80
    positions: int = 1500  # rows of 20 ms: the 30 s that whisper hears at once

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WhisperConfig:
        """From the file's own keys."""
        return cls(
            width=int(data.get("d_model", cls.width)),
            layers=int(data.get("encoder_layers", cls.layers)),
            heads=int(data.get("encoder_attention_heads", cls.heads)),
            hidden=int(data.get("encoder_ffn_dim", cls.hidden)),
            mels=int(data.get("num_mel_bins", cls.mels)),
            positions=int(data.get("max_source_positions", cls.positions)),
        )


# --- pieces ---------------------------------------------------------------------------------------


class Norm(nn.GroupNorm):
    """Group normalisation whose sums are always taken in fp32.

    At 256 x 256 a group has 262,144 members whose squares pass fp16's 65,504. torch sums in fp32
    by itself; a compiler that was handed fp16 may not, and then draws flat grey. `safe` spells the
    casts out so that they are in an exported graph.
    """

    safe = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.safe or x.dtype == torch.float32:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        y = F.group_norm(
            x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps
        )
        return y.to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with diffusers' names. Without `context` it looks at itself."""

    safe = False

    def __init__(
        self, width: int, heads: int, context: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        context = width if context is None else context
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context, width, bias=bias)
        self.to_v = nn.Linear(context, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, width / H)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = attend(q, k, v, self.safe)
        out: Tensor = self.to_out[0](y.transpose(1, 2).flatten(2))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, safe: bool) -> Tensor:
    """softmax(q k' / sqrt(d)) v; `safe` writes it out with the softmax in fp32, for graphs."""
    if not safe:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.float().softmax(-1).to(q.dtype) @ v


class Resnet(nn.Module):
    """norm, silu, conv, twice. `embed` is the width of the time embedding; 0 in the VAE."""

    def __init__(self, inp: int, out: int, groups: int, eps: float, embed: int = 0) -> None:
        super().__init__()
        self.norm1 = Norm(groups, inp, eps)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(embed, out) if embed else None
        self.norm2 = Norm(groups, out, eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inp, out, 1) if inp != out else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        out: Tensor = y + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class GEGLU(nn.Module):
    """Twice the width in; one half gates the other."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # the empty middle is diffusers' dropout: it keeps the numbers of the keys
        self.net = nn.ModuleList(
            [GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads, context)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class Transformer(nn.Module):
    """Attention over the pixels of a feature map, and from them to the sound."""

    def __init__(self, width: int, heads: int, context: int, groups: int) -> None:
        super().__init__()
        self.norm = Norm(groups, width, 1e-6)  # not the 1e-5 of the rest
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, context)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        y = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, h w, width)
        y = self.transformer_blocks[0](y, context)
        y = y.transpose(1, 2).unflatten(2, (h, w))
        out: Tensor = x + self.proj_out(y)
        return out


class Sampler(nn.Module):
    """Half the size, or twice. `uneven` is the VAE's: one row and column of zeros at the end."""

    def __init__(self, width: int, up: bool, uneven: bool = False) -> None:
        super().__init__()
        self.up = up
        self.uneven = uneven
        self.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=0 if uneven else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.uneven:
            x = F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Block(nn.Module):
    """One level of an encoder or decoder: resnets, attention perhaps, a change of size perhaps."""

    def __init__(
        self,
        resnets: Sequence[Resnet],
        attentions: Sequence[Transformer] = (),
        down: Sampler | None = None,
        up: Sampler | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.attends = bool(attentions)
        self.downsamplers = nn.ModuleList([down]) if down is not None else None
        self.upsamplers = nn.ModuleList([up]) if up is not None else None

    def at(self, i: int, x: Tensor, time: Tensor | None, context: Tensor | None) -> Tensor:
        """Through resnet `i`, and the attention that follows it."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if self.attends else x


# --- the UNet -------------------------------------------------------------------------------------


class Middle(nn.Module):
    """The UNet's lowest level."""

    def __init__(self, width: int, c: UNetConfig, embed: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Transformer(width, c.heads, c.context, c.groups)])
        self.resnets = nn.ModuleList([Resnet(width, width, c.groups, 1e-5, embed) for _ in "01"])

    def forward(self, x: Tensor, time: Tensor | None, context: Tensor) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, time), context)
        out: Tensor = self.resnets[1](x, time)
        return out


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, embed)
        self.linear_2 = nn.Linear(embed, embed)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class UNet(nn.Module):
    """Stable Diffusion's UNet with eight channels in and whisper's width as context, at t = 0.

    MuseTalk asks it once a frame and takes the answer as the latent: there is no noise and no
    schedule. The embedding of t = 0 still counts; `fold` makes it part of the biases.
    """

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or UNetConfig()
        ch = c.channels
        embed = 4 * ch[0]
        last = len(ch) - 1

        def attention(width: int) -> Transformer:
            return Transformer(width, c.heads, c.context, c.groups)

        self.conv_in = nn.Conv2d(c.in_channels, ch[0], 3, padding=1)
        self.time_embedding: TimeEmbedding | None = TimeEmbedding(ch[0], embed)
        self.down_blocks = nn.ModuleList()
        skips = [ch[0]]  # widths of what the way down leaves for the way up
        inp = ch[0]
        for i, out in enumerate(ch):
            widths = [inp] + [out] * (c.layers - 1)
            self.down_blocks.append(
                Block(
                    [Resnet(w, out, c.groups, 1e-5, embed) for w in widths],
                    [attention(out) for _ in widths] if i < last else (),
                    down=Sampler(out, up=False) if i < last else None,
                )
            )
            skips += [out] * (c.layers + (i < last))
            inp = out
        self.mid_block = Middle(ch[-1], c, embed)
        self.up_blocks = nn.ModuleList()
        for i, out in enumerate(reversed(ch)):
            resnets = []
            for _ in range(c.layers + 1):
                resnets.append(Resnet(inp + skips.pop(), out, c.groups, 1e-5, embed))
                inp = out
            self.up_blocks.append(
                Block(
                    resnets,
                    [attention(out) for _ in resnets] if i > 0 else (),
                    up=Sampler(out, up=True) if i < last else None,
                )
            )
        self.conv_norm_out = Norm(c.groups, ch[0], 1e-5)
        self.conv_out = nn.Conv2d(ch[0], c.out_channels, 3, padding=1)

    def time(self) -> Tensor | None:
        """(1, 4 * channels[0]): the embedding of t = 0, cosines (all 1) before sines (all 0)."""
        if self.time_embedding is None:
            return None
        half = self.config.channels[0] // 2
        weight = self.time_embedding.linear_1.weight
        flat = torch.cat([weight.new_ones(1, half), weight.new_zeros(1, half)], 1)
        out: Tensor = self.time_embedding(flat)
        return out

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """(B, 8, 32, 32) latents and (B, 50, 384) sound -> (B, 4, 32, 32)."""
        time = self.time()
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.at(i, x, time, context)
                skips.append(x)
            if block.downsamplers is not None:
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.at(i, torch.cat([x, skips.pop()], 1), time, context)
            if block.upsamplers is not None:
                x = block.upsamplers[0](x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out

    @torch.no_grad()
    def fold(self) -> UNet:
        """Make the embedding of t = 0 a part of each first convolution's bias. Exact; once."""
        time = self.time()
        if time is not None:
            for module in self.modules():
                if isinstance(module, Resnet) and module.time_emb_proj is not None:
                    assert module.conv1.bias is not None
                    module.conv1.bias += module.time_emb_proj(F.silu(time))[0]
                    module.time_emb_proj = None
            self.time_embedding = None
        return self


# --- the VAE --------------------------------------------------------------------------------------


class PixelAttention(nn.Module):
    """Attention of every pixel to every other: the VAE's, with one head."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = Norm(groups, width, 1e-6)
        inner = Attention(width, 1, bias=True)
        self.to_q, self.to_k, self.to_v = inner.to_q, inner.to_k, inner.to_v
        self.to_out = inner.to_out
        self.safe = False

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, h w, width)
        q, k, v = (one(y).unsqueeze(1) for one in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](attend(q, k, v, self.safe).squeeze(1))
        return x + y.transpose(1, 2).unflatten(2, (h, w))


class PixelMiddle(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(width, groups)])
        self.resnets = nn.ModuleList([Resnet(width, width, groups, 1e-6) for _ in "01"])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


class Encoder(nn.Module):
    """(B, 3, 256, 256) -> (B, 8, 32, 32): mean and log variance, before `quant_conv`."""

    def __init__(self, c: VAEConfig) -> None:
        super().__init__()
        ch = c.channels
        self.conv_in = nn.Conv2d(3, ch[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        inp = ch[0]
        for i, out in enumerate(ch):
            widths = [inp] + [out] * (c.layers - 1)
            down = Sampler(out, up=False, uneven=True) if i < len(ch) - 1 else None
            self.down_blocks.append(
                Block([Resnet(w, out, c.groups, 1e-6) for w in widths], (), down)
            )
            inp = out
        self.mid_block = PixelMiddle(ch[-1], c.groups)
        self.conv_norm_out = Norm(c.groups, ch[-1], 1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 2 * c.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            if block.downsamplers is not None:
                x = block.downsamplers[0](x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class Decoder(nn.Module):
    """(B, 4, 32, 32), after `post_quant_conv`, -> (B, 3, 256, 256) in about -1..1."""

    def __init__(self, c: VAEConfig) -> None:
        super().__init__()
        ch = c.channels[::-1]
        self.conv_in = nn.Conv2d(c.latent, ch[0], 3, padding=1)
        self.mid_block = PixelMiddle(ch[0], c.groups)
        self.up_blocks = nn.ModuleList()
        inp = ch[0]
        for i, out in enumerate(ch):
            widths = [inp] + [out] * c.layers
            up = Sampler(out, up=True) if i < len(ch) - 1 else None
            self.up_blocks.append(
                Block([Resnet(w, out, c.groups, 1e-6) for w in widths], (), None, up)
            )
            inp = out
        self.conv_norm_out = Norm(c.groups, ch[-1], 1e-6)
        self.conv_out = nn.Conv2d(ch[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            if block.upsamplers is not None:
                x = block.upsamplers[0](x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class VAE(nn.Module):
    """Stable Diffusion's autoencoder: pictures to latents and back."""

    def __init__(self, config: VAEConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or VAEConfig()
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent, 2 * c.latent, 1)
        self.post_quant_conv = nn.Conv2d(c.latent, c.latent, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 256, 256) in -1..1 -> mean and log variance, (B, 4, 32, 32) each, unscaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """(B, 4, 32, 32), unscaled -> (B, 3, 256, 256), RGB in about -1..1."""
        out: Tensor = self.decoder(self.post_quant_conv(z))
        return out


# --- whisper --------------------------------------------------------------------------------------


class WhisperAttention(nn.Module):
    safe = False

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, width / H)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        out: Tensor = self.out_proj(attend(q, k, v, self.safe).transpose(1, 2).flatten(2))
        return out


class WhisperLayer(nn.Module):
    def __init__(self, c: WhisperConfig) -> None:
        super().__init__()
        self.self_attn = WhisperAttention(c.width, c.heads)
        self.self_attn_layer_norm = nn.LayerNorm(c.width)
        self.fc1 = nn.Linear(c.width, c.hidden)
        self.fc2 = nn.Linear(c.hidden, c.width)
        self.final_layer_norm = nn.LayerNorm(c.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return out


class Whisper(nn.Module):
    """Whisper's encoder, with all its hidden states.

    `legacy` leaves the last state as it is before the final norm, as OpenAI's own package hands
    it out and MuseTalk's first front-end (before March 2025) took it.
    """

    def __init__(self, config: WhisperConfig | None = None, legacy: bool = False) -> None:
        super().__init__()
        c = self.config = config or WhisperConfig()
        self.legacy = legacy
        self.conv1 = nn.Conv1d(c.mels, c.width, 3, padding=1)
        self.conv2 = nn.Conv1d(c.width, c.width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(c.positions, c.width)
        self.layers = nn.ModuleList([WhisperLayer(c) for _ in range(c.layers)])
        self.layer_norm = nn.LayerNorm(c.width)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, mels, 2 * positions) -> (B, positions, layers + 1, width)."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).transpose(1, 2)
        x = x + self.embed_positions.weight
        states = [x]
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        if not self.legacy:
            states[-1] = self.layer_norm(x)
        return torch.stack(states, 2)


# --- BiSeNet --------------------------------------------------------------------------------------


class ConvBNReLU(nn.Module):
    def __init__(self, inp: int, out: int, size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inp, out, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """ResNet-18's."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Sequential | None = None
        if inp != out or stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    """Feature maps at 1/8, 1/16 and 1/32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        at8 = self.layer2(self.layer1(x))
        at16 = self.layer3(at8)
        return at8, at16, self.layer4(at16)


class Refine(nn.Module):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.conv = ConvBNReLU(inp, out)
        self.conv_atten = nn.Conv2d(out, out, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out: Tensor = x * self.bn_atten(self.conv_atten(x.mean((2, 3), keepdim=True))).sigmoid()
        return out


class ContextPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet18()
        self.arm16 = Refine(256, 128)
        self.arm32 = Refine(512, 128)
        self.conv_head32 = ConvBNReLU(128, 128)
        self.conv_head16 = ConvBNReLU(128, 128)
        self.conv_avg = ConvBNReLU(512, 128, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at8, at16, at32 = self.resnet(x)
        y = self.arm32(at32) + self.conv_avg(at32.mean((2, 3), keepdim=True))
        y = self.conv_head32(F.interpolate(y, at16.shape[-2:], mode="nearest"))
        y = self.arm16(at16) + y
        return at8, self.conv_head16(F.interpolate(y, at8.shape[-2:], mode="nearest"))


class Fusion(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.convblk = ConvBNReLU(width, width, 1)
        self.conv1 = nn.Conv2d(width, width // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(width // 4, width, 1, bias=False)

    def forward(self, at8: Tensor, context: Tensor) -> Tensor:
        x = self.convblk(torch.cat([at8, context], 1))
        gate = self.conv2(F.relu(self.conv1(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x * gate + x


class Output(nn.Module):
    def __init__(self, inp: int, mid: int, classes: int) -> None:
        super().__init__()
        self.conv = ConvBNReLU(inp, mid)
        self.conv_out = nn.Conv2d(mid, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.conv(x))
        return out


class BiSeNet(nn.Module):
    """Face parsing. The two heads that only training used are in the file, and so here."""

    def __init__(self, classes: int = 19) -> None:
        super().__init__()
        self.cp = ContextPath()
        self.ffm = Fusion(256)
        self.conv_out = Output(256, 256, classes)
        self.conv_out16 = Output(128, 64, classes)
        self.conv_out32 = Output(128, 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), normalised as ImageNet -> (B, 19, H, W) logits."""
        y = self.conv_out(self.ffm(*self.cp(x)))
        return F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=True)


# --- as they are run ------------------------------------------------------------------------------


def positions(tokens: int, width: int) -> Tensor:
    """(1, tokens, width), fp32: sin and cos by turns, the table MuseTalk adds to the sound."""
    where = torch.arange(tokens, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    table = torch.zeros(1, tokens, width)
    table[0, :, 0::2] = torch.sin(where * rate)
    table[0, :, 1::2] = torch.cos(where * rate)
    return table


def sinusoids(rows: int, width: int) -> Tensor:
    """(rows, width): whisper's own positions, sines in one half and cosines in the other."""
    rate = torch.exp(-math.log(10000.0) / (width // 2 - 1) * torch.arange(width // 2))
    angle = torch.arange(rows).unsqueeze(1) * rate
    return torch.cat([angle.sin(), angle.cos()], 1)


class Hear(nn.Module):
    """`Whisper`, and of its rows only those that are asked for."""

    inputs = ("mel", "rows")
    outputs = ("heard",)

    def __init__(self, whisper: Whisper) -> None:
        super().__init__()
        self.whisper = whisper

    def forward(self, mel: Tensor, rows: Tensor) -> Tensor:
        """(B, 80, 3000) fp32, (B, R) int64 -> (B, R, 5, 384) fp32."""
        states = self.whisper(mel.to(self.whisper.conv1.weight.dtype))
        # one flat gather over the batch: every graph runtime has it
        start = torch.arange(mel.shape[0], device=rows.device).unsqueeze(1) * states.shape[1]
        flat = states.flatten(0, 1)[(rows + start).flatten()]
        return flat.unflatten(0, rows.shape).float()


class Imagine(nn.Module):
    """`UNet` with everything folded in: the embedding of t = 0, the position table."""

    inputs = ("latents", "heard")
    outputs = ("latent",)
    table: Tensor

    def __init__(self, unet: UNet, tokens: int = 50) -> None:
        super().__init__()
        self.unet = unet.fold()
        self.register_buffer("table", positions(tokens, unet.config.context), persistent=False)

    def forward(self, latents: Tensor, heard: Tensor) -> Tensor:
        """(B, 8, 32, 32) fp32, (B, 50, 384) fp32 -> (B, 4, 32, 32) fp32."""
        dtype = self.unet.conv_in.weight.dtype
        # the table is rounded before it is added, as the published fp16 path does
        context = heard.to(dtype) + self.table.to(dtype)
        out: Tensor = self.unet(latents.to(dtype), context).float()
        return out


class Draw(nn.Module):
    """The VAE's decoder, from a scaled latent to pixels.

    The latent's scale is folded into `post_quant_conv`, the order of the channels into `conv_out`.
    The last step is fp32 in every precision: half of 1/255 is at the limit of fp16.
    """

    inputs = ("latent",)
    outputs = ("face", "sound")

    @torch.no_grad()
    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.post_quant_conv.weight /= vae.config.scale
        last = self.decoder.conv_out
        assert last.bias is not None
        last.weight.copy_(last.weight.flip(0))
        last.bias.copy_(last.bias.flip(0))

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 4, 32, 32) fp32 -> (B, 256, 256, 3) uint8, BGR; (B,) uint8, 0 where the numbers ran
        over in half precision: such a face is black or in patches, and can't be told by its pixels.
        """
        x = self.decoder(self.post_quant_conv(latent.to(self.post_quant_conv.weight.dtype))).float()
        # the mean is no number if one of them isn't; good ones lie within about -1..1
        sound = (x.mean((1, 2, 3)).abs() < 100).to(torch.uint8)
        x = (x / 2 + 0.5).clamp(0, 1) * 255
        return x.round().permute(0, 2, 3, 1).to(torch.uint8), sound


class Look(nn.Module):
    """The VAE's encoder, to a scaled latent: the mean, which is what MuseTalk was trained on."""

    inputs = ("picture",)
    outputs = ("latent",)

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv
        self.scale = vae.config.scale

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 3, 256, 256) fp32, RGB in -1..1 -> (B, 4, 32, 32) fp32."""
        x = self.encoder(picture.to(self.quant_conv.weight.dtype))
        return self.quant_conv(x).float().chunk(2, 1)[0] * self.scale


class Parse(nn.Module):
    """`BiSeNet` under the names of a runtime."""

    inputs = ("picture",)
    outputs = ("classes",)

    def __init__(self, net: BiSeNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 3, 512, 512) fp32 -> (B, 19, 512, 512) fp32."""
        out: Tensor = self.net(picture).float()
        return out


def make_safe(module: nn.Module, safe: bool = True) -> nn.Module:
    """Write norms and softmaxes in fp32 from now on, for a graph that others will compile."""
    for one in module.modules():
        if isinstance(one, (Norm, Attention, PixelAttention, WhisperAttention)):
            one.safe = safe
    return module


# --- key layouts ----------------------------------------------------------------------------------


def vae_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VAE's keys as they are named today.

    sd-vae-ft-mse was saved with `query/key/value/proj_attn`; some copies keep those as 1 x 1
    convolutions.
    """
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    out = {}
    for key, value in state.items():
        parts = key.split(".")
        if "attentions" in parts:
            parts = [names.get(part, part) for part in parts]
            if value.ndim == 4:
                value = value[:, :, 0, 0]
        out[".".join(parts)] = value
    return out


def whisper_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's keys out of a whole whisper: transformers' names, or OpenAI's."""
    names = {
        "attn.query": "self_attn.q_proj",
        "attn.key": "self_attn.k_proj",
        "attn.value": "self_attn.v_proj",
        "attn.out": "self_attn.out_proj",
        "attn_ln": "self_attn_layer_norm",
        "mlp.0": "fc1",
        "mlp.2": "fc2",
        "mlp_ln": "final_layer_norm",
    }
    out = {}
    for key, value in state.items():
        key = key.removeprefix("model.")
        if not key.startswith("encoder."):
            continue
        key = key.removeprefix("encoder.")
        if key == "positional_embedding":
            key = "embed_positions.weight"
        elif key.startswith("ln_post."):
            key = key.replace("ln_post", "layer_norm")
        elif key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            stem, leaf = rest.rsplit(".", 1)
            key = f"layers.{number}.{names.get(stem, stem)}.{leaf}"
        out[key] = value
    return out or dict(state)


# --- files ----------------------------------------------------------------------------------------


def _fill(net: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype, what: str) -> nn.Module:
    """Weights into a net that was made on the `meta` device; `what` starts the complaint."""
    wanted = net.state_dict()
    # counters of batch norms are younger than some files
    lacking = sorted(k for k in wanted.keys() - state.keys() if not k.endswith("_tracked"))
    extra = sorted(state.keys() - wanted.keys())
    wrong = [
        f"{k} has the shape {tuple(state[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted.keys() & state.keys()
        if state[k].shape != wanted[k].shape
    ]
    if lacking or extra or wrong:
        first = (
            wrong[0]
            if wrong
            else f"{lacking[0]} is missing"
            if lacking
            else f"{extra[0]} is not of it"
        )
        raise ConfigError(
            f"{what}: {first} ({len(lacking)} missing, {len(extra)} unknown, {len(wrong)} of "
            "another shape)"
        )
    kept = {
        key: state[key].to(dtype if state[key].is_floating_point() else state[key].dtype)
        if key in state
        else torch.zeros(value.shape, dtype=value.dtype)
        for key, value in wanted.items()
    }
    net.load_state_dict(kept, assign=True)
    return net.eval().requires_grad_(False)


class Files:
    """A recipe's networks, from a models folder. Each is read when it is asked for."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder

    def key(self, *names: str) -> str:
        """A name for the content of these networks' weights; empty if one isn't there."""
        return weights_key(self.recipe, self.folder, *(names or sorted(self.recipe.networks))) or ""

    def has(self, name: str) -> bool:
        path = self._weights(name)
        return path is not None and path.is_file()

    def _weights(self, name: str) -> Path | None:
        net = self.recipe.networks.get(name)
        return None if net is None else self.folder / net.weights

    def path(self, name: str) -> Path:
        """Where a network's weights are; ConfigError if they aren't."""
        net = self.recipe.networks.get(name)
        if net is None:
            raise ConfigError(f"{self.recipe.name} has no network {name!r}")
        require(self.recipe, self.folder, net.weights, *([net.config] if net.config else []))
        return self.folder / net.weights

    def _config(self, name: str) -> dict[str, Any]:
        self.path(name)
        config = self.recipe.networks[name].config
        return read_config(self.folder / config) if config else {}

    def _complaint(self, name: str) -> str:
        path = self.recipe.networks[name].weights
        symptom = self.recipe.file(path).symptom
        return f"{path} is not the {name} of {self.recipe.name}" + (
            f" (with it you would see {symptom})" if symptom else ""
        )

    def unet(self, dtype: torch.dtype = torch.float32) -> UNet:
        config = UNetConfig.from_json(self._config("unet"))
        with torch.device("meta"):
            net = UNet(config)
        _fill(net, load_tensors(self.path("unet")), dtype, self._complaint("unet"))
        return net

    def vae(self, dtype: torch.dtype = torch.float32) -> VAE:
        config = VAEConfig.from_json(self._config("vae"))
        with torch.device("meta"):
            net = VAE(config)
        state = vae_keys(load_tensors(self.path("vae")))
        _fill(net, state, dtype, self._complaint("vae"))
        return net

    def hearing(self) -> WhisperConfig:
        """What whisper is like, without its weights."""
        return WhisperConfig.from_json(self._config("whisper"))

    def whisper(self, dtype: torch.dtype = torch.float32, legacy: bool = False) -> Whisper:
        with torch.device("meta"):
            net = Whisper(self.hearing(), legacy)
        state = whisper_keys(load_tensors(self.path("whisper")))
        _fill(net, state, dtype, self._complaint("whisper"))
        return net

    def parser(self, dtype: torch.dtype = torch.float32) -> BiSeNet:
        with torch.device("meta"):
            net = BiSeNet()
        _fill(net, load_tensors(self.path("parser")), dtype, self._complaint("parser"))
        return net


OFFICIAL: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0.dev0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 384,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 8,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.4.2",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "whisper": {
        "d_model": 384,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "encoder_layers": 4,
        "max_source_positions": 1500,
        "num_mel_bins": 80,
    },
}
"""The official configurations, as facts: what generated weights are made for."""


def generate(recipe: Recipe, folder: Path, seed: int = 0) -> None:
    """Random weights for a recipe, in the names, key layouts and file formats of the real ones.

    For tests, and to measure a machine's speed before any weights are there. Never overwrites.
    """
    made: dict[str, nn.Module] = {}
    taken = [net.weights for net in recipe.networks.values() if (folder / net.weights).exists()]
    if taken:
        raise ConfigError(
            f"{folder / taken[0]} is there already: random weights need another folder"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, net in recipe.networks.items():
            data = recipe.configs.get(net.config or "", OFFICIAL.get(name, {}))
            if net.config:
                (folder / net.config).parent.mkdir(parents=True, exist_ok=True)
                write_json(folder / net.config, data)
            if name == "unet":
                made[name] = UNet(UNetConfig.from_json(data))
            elif name == "vae":
                made[name] = VAE(VAEConfig.from_json(data))
            elif name == "whisper":
                made[name] = whisper = Whisper(WhisperConfig.from_json(data))
                whisper.embed_positions.weight.data = sinusoids(
                    *whisper.embed_positions.weight.shape
                )
            elif name == "parser":
                made[name] = BiSeNet()
            else:
                continue  # landmarks are an ONNX file of others
            state = dict(made.pop(name).state_dict())
            if name == "vae":  # as sd-vae-ft-mse names its attention
                old = {"to_q": "query", "to_k": "key", "to_v": "value"}
                state = {
                    ".".join(old.get(part, part) for part in key.split(".")).replace(
                        "to_out.0", "proj_attn"
                    ): value
                    for key, value in state.items()
                }
            if name == "whisper":
                state = {f"model.encoder.{key}": value for key, value in state.items()}
            _save(folder / net.weights, state, new=name != "parser")
            mark_random(folder, net.weights)


def _save(path: Path, state: dict[str, Tensor], new: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda beside: torch.save(state, beside, _use_new_zipfile_serialization=new))
