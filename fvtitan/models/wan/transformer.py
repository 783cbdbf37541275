"""The Wan 2.1 text-to-video transformer (arXiv:2503.20314), with one noise level per latent frame.

Parameters carry Wan's original names (`blocks.0.self_attn.q.weight`); `adapter.py` maps them to diffusers' and back.
`distributed/parallelize.py` shards, checkpoints and compiles this module from outside; what is in here of parallelism is where
the ranks that share a sequence part and meet.

Precision: matrix products run in the dtype the parameters have during forward (bf16 under FSDP mixed precision); sigma,
RoPE, modulation and norms in at least float32, so a noise level of 937.5 / 1000 arrives as such.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvtitan.components.lora import linear
from fvtitan.distributed.sequence_parallel import SequenceShard
from fvtitan.flow_matching import NUM_TIMESTEPS
from fvtitan.models.kv_cache import KVCache, LayerPass, append, recall, store
from fvtitan.models.wan.attention import (
    AttentionMask,
    BlockCausal,
    apply_rope,
    attend,
    prepare,
    rope_frequencies,
    rope_split,
    rope_table,
)


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer. `text_len` is how many text tokens it sees: rows are zero-padded to it, unmasked."""

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6

    @property
    def dim(self) -> int:
        return self.num_heads * self.head_dim


FLAVORS: dict[str, WanConfig] = {
    "tiny": WanConfig(num_layers=4, num_heads=4, head_dim=32, ffn_dim=512, text_dim=64, text_len=32),
    "1.3B": WanConfig(num_layers=30, num_heads=12, head_dim=128, ffn_dim=8960),
    "14B": WanConfig(num_layers=40, num_heads=40, head_dim=128, ffn_dim=13824),
}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in x's dtype, whatever the parameters are stored in during forward."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def timestep_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoids `[..., dim]`, cosines first (arXiv:1706.03762 sec. 3.5); angles in float64 as Wan computes them."""
    half = dim // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64, device=timestep.device))
    angle = timestep.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, then `x (1 + scale) + shift` with one row per frame.

    x `[B, T * tokens_per_frame, dim]`; scale, shift `[B, T, dim]` in at least float32. Returns x's dtype.
    """
    wide = F.layer_norm(x.to(scale.dtype), x.shape[-1:], eps=eps).unflatten(1, (scale.shape[1], -1))
    return (wide * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2).to(x.dtype)


def gated_residual(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """`x + gate * update`, one gate row per frame, added in at least float32. gate `[B, T, dim]`."""
    wide = update.to(gate.dtype).unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]
    return (x.to(gate.dtype) + wide.flatten(1, 2)).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over all heads together (Wan's qk norm), in at least float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x.dtype)
        return F.rms_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Projections of multi-head attention with normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def query(self, x: Tensor, adapter: str | None) -> Tensor:
        """`[B, S, dim]` -> `[B, S, heads, head_dim]`."""
        return self.norm_q(linear(self.q, x, adapter)).unflatten(-1, (self.num_heads, -1))

    def key_value(self, x: Tensor, adapter: str | None) -> tuple[Tensor, Tensor]:
        """`[B, S, dim]` -> keys and values `[B, S, heads, head_dim]`."""
        k, v = self.norm_k(linear(self.k, x, adapter)), linear(self.v, x, adapter)
        return k.unflatten(-1, (self.num_heads, -1)), v.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    """Attention among the video's tokens, with RoPE: full, block-causal by a plan, or streaming over a cache."""

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask,
        stream: LayerPass | None,
        shard: SequenceShard | None,
        adapter: str | None,
    ) -> Tensor:
        q, (k, v) = apply_rope(self.query(x, adapter), rope), self.key_value(x, adapter)
        k = apply_rope(k, rope)
        if shard is not None:  # from here on all tokens, of this rank's heads
            q, k, v = shard.to_heads(q), shard.to_heads(k), shard.to_heads(v)
        if stream is not None and stream.in_place:
            k, v = append(stream.keys[0], k), append(stream.values[0], v)
        elif stream is not None:
            fresh_k, fresh_v = k, v
            if stream.keys:  # copies: nothing of the graph points into the cache
                sink, *rest = stream.keys
                if stream.sink_rope is not None:
                    sink = apply_rope(sink, stream.sink_rope)
                k = recall([sink, *rest], k)
                v = recall(stream.values, v)
            if stream.write_keys:
                store(stream.write_keys, fresh_k)
                store(stream.write_values, fresh_v)
        out = attend(q, k, v, mask)
        if shard is not None:
            out = shard.to_tokens(out)
        return linear(self.o, out.flatten(2), adapter)


class CrossAttention(Attention):
    """Attention of the video's tokens to the text."""

    def forward(self, x: Tensor, text: Tensor, stream: LayerPass | None, adapter: str | None) -> Tensor:
        if stream is not None and stream.text == "reuse":
            k, v = stream.text_key, stream.text_value
        else:
            k, v = self.key_value(text, adapter)
            if stream is not None and stream.text == "fill":
                stream.text_key.copy_(k)
                stream.text_value.copy_(v)
        return linear(self.o, attend(self.query(x, adapter), k, v).flatten(2), adapter)


class FeedForward(nn.Sequential):
    """`[B, S, dim]` -> `[B, S, dim]`."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, adapter: str | None) -> Tensor:
        up, act, down = self
        return linear(down, act(linear(up, x, adapter)), adapter)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated by the noise level."""

    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.eps = cfg.eps
        self.self_attn = SelfAttention(cfg.dim, cfg.num_heads, cfg.eps)
        self.cross_attn = CrossAttention(cfg.dim, cfg.num_heads, cfg.eps)
        self.norm3 = nn.LayerNorm(cfg.dim, eps=cfg.eps) if cfg.cross_attn_norm else None
        self.ffn = FeedForward(cfg.dim, cfg.ffn_dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, cfg.dim))
        self.checkpoint: Callable[..., Tensor] | None = None  # set by parallelize.apply_ac: runs `_forward`

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask = None,
        stream: LayerPass | None = None,
        shard: SequenceShard | None = None,
        adapter: str | None = None,
    ) -> Tensor:
        """x `[B, S, dim]`, modulation `[B, T, 6, dim]` in at least float32, text `[B, L, dim]`. With `shard`, x and rope are
        this rank's tokens."""
        # In here and not around the module: inside of what is compiled, and FSDP2's hooks do not run again in backward.
        if self.checkpoint is not None and torch.is_grad_enabled():
            return self.checkpoint(self._forward, x, modulation, text, rope, mask, stream, shard, adapter)
        return self._forward(x, modulation, text, rope, mask, stream, shard, adapter)

    def _forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: AttentionMask,
        stream: LayerPass | None,
        shard: SequenceShard | None,
        adapter: str | None,
    ) -> Tensor:
        rows = self.modulation.to(modulation.dtype) + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows.unbind(2)  # each [B, T, dim]
        h = modulate(x, scale, shift, self.eps)
        x = gated_residual(x, self.self_attn(h, rope, mask, stream, shard, adapter), gate)
        x = x + self.cross_attn(self._cross_norm(x), text, stream, adapter)
        h = modulate(x, ffn_scale, ffn_shift, self.eps)
        return gated_residual(x, self.ffn(h, adapter), ffn_gate)

    def _cross_norm(self, x: Tensor) -> Tensor:
        if self.norm3 is None:
            return x
        wide, norm = _wide(x.dtype), self.norm3
        h = F.layer_norm(x.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps)
        return h.to(x.dtype)


class Head(nn.Module):
    """Final modulated norm and projection to patches."""

    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.eps = cfg.eps
        self.head = nn.Linear(cfg.dim, cfg.out_channels * math.prod(cfg.patch_size))
        self.modulation = nn.Parameter(torch.empty(1, 2, cfg.dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x `[B, S, dim]`, embedding of the noise level `[B, T, dim]` in at least float32."""
        shift, scale = (self.modulation.to(embedding.dtype) + embedding[:, :, None]).unbind(2)
        return self.head(modulate(x, scale, shift, self.eps))


class WanTransformer(nn.Module):
    """Velocity of noisy latents, given one sigma per latent frame and text embeddings."""

    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.cfg = cfg
        self.sequence_shard: SequenceShard | None = None  # set by parallelize.apply_sequence_parallel
        dim = cfg.dim
        # Conv3d with kernel = stride = patch is a linear map of flattened patches; adapter.py reshapes the weight.
        self.patch_embedding = nn.Linear(cfg.in_channels * math.prod(cfg.patch_size), dim)
        self.text_embedding = nn.Sequential(
            nn.Linear(cfg.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor,
        plan: BlockCausal | None = None,
        context: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        start_frame: int = 0,
        commit: bool = False,
        adapter: str | None = None,
    ) -> Tensor:
        """Velocity `[B, T, C, H, W]` of `latents [B, T, C, H, W]` at `sigma [B, T]` given `text [B, text_len, text_dim]`.

        Attention is full, or block-causal by `plan`; with `context` (clean latents and their sigma, of the same shapes) the
        plan's `clean_context` holds. With `cache` the latents are the block of a stream that begins at `start_frame`: it
        sees the committed frames, and `commit` (without gradient) leaves its own keys and values there. `adapter` names the
        LoRA to go through; None: the network as it is.

        H and W must be multiples of the patch size. The result has the dtype of the computation.
        """
        compute = self.patch_embedding.weight.dtype
        x, grid = self.patchify(latents.to(compute))
        rope = rope_table(*grid, self.cfg.head_dim, start_frame, x.device, _wide(compute))
        if context is not None:  # [clean | noisy]
            clean, clean_sigma = context
            x = torch.cat([self.patchify(clean.to(compute))[0], x], dim=1)
            sigma = torch.cat([clean_sigma, sigma], dim=1)
            rope = (torch.cat([rope[0]] * 2), torch.cat([rope[1]] * 2))
        shard = self.sequence_shard
        if shard is not None:
            shard = dataclasses.replace(shard, tokens_per_frame=grid[1] * grid[2])
            x, rope = shard.split(x), (shard.rows(rope[0]), shard.rows(rope[1]))
        x = self.patch_embedding(x)
        embedding, modulation = self.embed_sigma(sigma, _wide(compute))
        passes: list[LayerPass] | list[None] = [None] * len(self.blocks)
        if cache is not None:
            passes = cache.passes(start_frame, start_frame + grid[0], write=commit)
            if shift := passes[0].sink_shift:  # rotations add up: the keys lie there with that of their own place
                later = rope_table(1, 1, 1, self.cfg.head_dim, shift, x.device, _wide(compute))
                passes = [dataclasses.replace(each, sink_rope=later) for each in passes]
        text = self.embed_text(text.to(compute), cache)
        mask = prepare(plan, grid[1] * grid[2], x.device) if plan is not None else None
        for block, stream in zip(self.blocks, passes, strict=True):
            x = block(x, modulation, text, rope, mask, stream, shard, adapter)
        if context is not None:
            x, embedding = x.chunk(2, dim=1)[1], embedding.chunk(2, dim=1)[1]
        x = self.head(x, embedding)
        return self.unpatchify(x if shard is None else shard.gather(x), grid)

    def embed_text(self, text: Tensor, cache: KVCache | None) -> Tensor:
        """Text as the blocks see it `[B, text_len, dim]`; in a stream computed once, unless gradients flow into it."""
        if cache is None or torch.is_grad_enabled():
            return self.text_embedding(text)
        if cache.text_embedding is None:
            cache.text_embedding = self.text_embedding(text)
        return cache.text_embedding

    def embed_sigma(self, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embedding `[B, T, dim]` and block modulation `[B, T, 6, dim]` of the noise levels `[B, T]`, in `dtype`."""
        wave = timestep_embedding(NUM_TIMESTEPS * sigma, self.cfg.freq_dim).to(dtype)
        first, act, second = self.time_embedding
        embedding = _wide_linear(second, act(_wide_linear(first, wave)))
        act, projection = self.time_projection
        return embedding, _wide_linear(projection, act(embedding)).unflatten(-1, (6, -1))

    def patchify(self, latents: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """`[B, T, C, H, W]` -> tokens `[B, T' H' W', C pt ph pw]` and the grid (T', H', W')."""
        pt, ph, pw = self.cfg.patch_size
        b, t, c, h, w = latents.shape
        grid = (t // pt, h // ph, w // pw)
        if (grid[0] * pt, grid[1] * ph, grid[2] * pw) != (t, h, w):
            raise ValueError(f"latents of {t} x {h} x {w} (T x H x W) do not divide into patches of {pt} x {ph} x {pw}")
        x = latents.reshape(b, grid[0], pt, c, grid[1], ph, grid[2], pw)
        return x.permute(0, 1, 4, 6, 3, 2, 5, 7).reshape(b, math.prod(grid), c * pt * ph * pw), grid

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens `[B, T' H' W', pt ph pw C]` -> `[B, T, C, H, W]`."""
        pt, ph, pw = self.cfg.patch_size
        t, h, w = grid
        x = x.reshape(x.shape[0], t, h, w, pt, ph, pw, self.cfg.out_channels)
        return x.permute(0, 1, 4, 7, 2, 5, 3, 6).reshape(x.shape[0], t * pt, self.cfg.out_channels, h * ph, w * pw)


def init_parameter(name: str, shape: torch.Size, cfg: WanConfig, seed: Callable[[str], torch.Generator]) -> Tensor:
    """The initial value of one parameter, as a full float32 CPU tensor. `seed(stream)` is a generator for a named stream.

    Linear weights Xavier-uniform, biases zero, norm weights one, the output projection zero (the untrained model predicts
    zero velocity), modulation normal(1 / sqrt(dim)). Two things differ from the published initialisation: the gates start
    around one, so that self-attention counts from the first step, and queries and keys start with equal biases in RoPE's
    fast channels, so that heads look at near-by places first (tiny flavor, one seed each: loss 0.650 against 0.701 after
    500 steps).
    """
    if name.endswith(("self_attn.q.bias", "self_attn.k.bias")):
        return _neighbourhood_bias(cfg, seed(name.replace(".k.bias", ".q.bias")))
    if name == "head.head.weight" or name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith("modulation"):
        table = torch.randn(shape, generator=seed(name)) / math.sqrt(shape[-1])
        if shape[1] == 6:
            table[:, [2, 5]] += 1.0  # the gates of self-attention and feed-forward
        return table
    if len(shape) == 1:
        return torch.ones(shape)
    bound = math.sqrt(6.0 / (shape[0] + shape[1]))
    return (2 * torch.rand(shape, generator=seed(name)) - 1) * bound


NEIGHBOURHOOD_BIAS = 6.0  # against features of unit size: most of a fresh query is its place
FAST_FREQUENCY = 0.1  # radians per frame or token; slower channels tell no neighbours apart


def _neighbourhood_bias(cfg: WanConfig, rng: torch.Generator) -> Tensor:
    """`[dim]`: in every fast RoPE channel pair a vector of random length and phase. Rotated by their places, two equal ones
    have the inner product `length^2 cos(frequency x distance)`: largest for neighbours, and different in every head."""
    bias = torch.zeros(cfg.num_heads, cfg.head_dim // 2, 2)
    pair = 0
    for dim in rope_split(cfg.head_dim):
        for frequency in rope_frequencies(dim).tolist():
            length = NEIGHBOURHOOD_BIAS * torch.rand(cfg.num_heads, generator=rng)
            phase = 2 * math.pi * torch.rand(cfg.num_heads, generator=rng)
            if frequency >= FAST_FREQUENCY:
                bias[:, pair] = torch.stack([length * phase.cos(), length * phase.sin()], dim=1)
            pair += 1
    return bias.flatten()
