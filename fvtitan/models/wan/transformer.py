"""The Wan 2.1 text-to-video transformer (arXiv:2503.20314), with one noise level per latent frame.

Parameters carry Wan's original names (`blocks.0.self_attn.q.weight`); `adapter.py` maps them to diffusers' and back.
No parallelism in here: `distributed/parallelize.py` shards, checkpoints and compiles this module from outside.

Precision: matrix products run in the dtype the parameters have during forward (bf16 under FSDP mixed precision); sigma,
RoPE, modulation and norms in at least float32, so a noise level of 937.5 / 1000 arrives as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fvtitan.flow_matching import NUM_TIMESTEPS
from fvtitan.models.wan.attention import apply_rope, attend, rope_table


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
    """Multi-head attention with normalised queries and keys; with RoPE it is Wan's self-attention, else its cross-attention."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x `[B, S, dim]` attends to context `[B, S', dim]`; rope rotates both (then S' = S)."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))  # [B, S, heads, head_dim]
        k = self.norm_k(self.k(context)).unflatten(-1, (self.num_heads, -1))
        v = self.v(context).unflatten(-1, (self.num_heads, -1))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return self.o(attend(q, k, v).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated by the noise level."""

    def __init__(self, cfg: WanConfig):
        super().__init__()
        self.eps = cfg.eps
        self.self_attn = Attention(cfg.dim, cfg.num_heads, cfg.eps)
        self.cross_attn = Attention(cfg.dim, cfg.num_heads, cfg.eps)
        self.norm3 = nn.LayerNorm(cfg.dim, eps=cfg.eps) if cfg.cross_attn_norm else None
        self.ffn = nn.Sequential(
            nn.Linear(cfg.dim, cfg.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(cfg.ffn_dim, cfg.dim)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, cfg.dim))

    def forward(self, x: Tensor, modulation: Tensor, text: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x `[B, S, dim]`, modulation `[B, T, 6, dim]` in at least float32, text `[B, L, dim]`."""
        rows = self.modulation.to(modulation.dtype) + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows.unbind(2)  # each [B, T, dim]
        h = modulate(x, scale, shift, self.eps)
        x = gated_residual(x, self.self_attn(h, h, rope), gate)
        x = x + self.cross_attn(self._cross_norm(x), text)
        h = modulate(x, ffn_scale, ffn_shift, self.eps)
        return gated_residual(x, self.ffn(h), ffn_gate)

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
        self.checkpoint_blocks = False  # set by parallelize.apply_ac; no wrapper, so names stay clean
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

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Velocity `[B, T, C, H, W]` of `latents [B, T, C, H, W]` at `sigma [B, T]` given `text [B, text_len, text_dim]`.

        H and W must be multiples of the patch size. The result has the dtype of the computation.
        """
        compute = self.patch_embedding.weight.dtype
        x, grid = self.patchify(latents.to(compute))
        x = self.patch_embedding(x)
        text = self.text_embedding(text.to(compute))
        embedding, modulation = self.embed_sigma(sigma, _wide(compute))
        rope = rope_table(*grid, self.cfg.head_dim, 0, x.device, _wide(compute))
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, text, rope, use_reentrant=False)
            else:
                x = block(x, modulation, text, rope)
        return self.unpatchify(self.head(x, embedding), grid)

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


def init_parameter(name: str, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """The initial value of one parameter, as a full float32 CPU tensor drawn from `rng` (Wan's initialisation).

    Linear weights Xavier-uniform, text and time embeddings normal(0.02), modulation normal(1 / sqrt(dim)), biases zero,
    norm weights one, the output projection zero (the untrained model predicts zero velocity).
    """
    if name == "head.head.weight" or name.endswith(".bias"):
        return torch.zeros(shape)
    if name.endswith("modulation"):
        return torch.randn(shape, generator=rng) / math.sqrt(shape[-1])
    if len(shape) == 1:
        return torch.ones(shape)
    if name.startswith(("text_embedding", "time_embedding")):
        return 0.02 * torch.randn(shape, generator=rng)
    bound = math.sqrt(6.0 / (shape[0] + shape[1]))
    return (2 * torch.rand(shape, generator=rng) - 1) * bound
