"""Wan as a role: builds, loads and shards the transformer, pads its text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fvtitan.components.lora import add_adapter, initialise_adapter
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.parallelize import parallelize
from fvtitan.distributed.sequence_parallel import check_heads
from fvtitan.distributed.utils import gathered
from fvtitan.errors import UserError
from fvtitan.flops import Flops
from fvtitan.flow_matching import ScheduleConfig
from fvtitan.models.base import CausalModelBase, Conditioning, ModelBase
from fvtitan.models.kv_cache import KVCache
from fvtitan.models.wan import weights
from fvtitan.models.wan.adapter import flavor_config
from fvtitan.models.wan.attention import BlockCausal, chosen_kernel
from fvtitan.models.wan.flops import forward_flops
from fvtitan.models.wan.transformer import WanConfig, WanTransformer

if TYPE_CHECKING:
    from fvtitan.config import JobConfig, RoleConfig
    from fvtitan.methods.passes import Pass


def build_transformer(
    cfg: JobConfig, role: str, mesh: Mesh, device: torch.device, sizes: WanConfig | None = None
) -> WanTransformer:
    """Meta, with all adapters that lie on it -> parallelize -> storage for the local shards -> weights read (or drawn) straight
    into them. With `sizes`, other than the role's own, it stays on meta."""
    role_cfg, storage = cfg.models[role], getattr(torch, cfg.role_dtypes(role)[0])
    with torch.device("meta"):
        transformer = WanTransformer(sizes or weights.role_sizes(role_cfg, role)).to(storage)
    if adapters := cfg.adapters_on(role):
        transformer.requires_grad_(False)
    for adapter in adapters:
        add_adapter(transformer, adapter, cfg.models[adapter].lora)
    parallelize(transformer, mesh, cfg, role)
    if sizes:
        return transformer
    transformer.to_empty(device="cpu" if role_cfg.cpu_offload else device)
    if role_cfg.init_from:
        weights.load_weights(transformer, role_cfg, cfg, f"models.{role}.init_from")
    else:
        weights.initialise(transformer, cfg.training.seed, role)
    weights.check_parameters(transformer, role, loaded=bool(role_cfg.init_from))
    for adapter in adapters:
        initialise_adapter(transformer, adapter, cfg.training.seed)
    return transformer


class WanModel(ModelBase):
    """Wan 2.1 text-to-video: full attention among all frames."""

    transformer: WanTransformer

    def __init__(self, transformer: WanTransformer, role_cfg: RoleConfig, *, dtype: torch.dtype, **common):
        super().__init__(transformer, **common)
        self.dtype = dtype  # of the computation; the KV cache has it too
        self.latent_channels = transformer.cfg.in_channels
        self.reshard_after_forward = False  # not sharded

    @classmethod
    def role_sizes(cls, role_cfg: RoleConfig, role: str) -> WanConfig:
        return weights.role_sizes(role_cfg, role)

    @classmethod
    def check(cls, cfg: JobConfig, role: str) -> None:
        if flavor := cfg.models[role].flavor:
            sizes = flavor_config(flavor, f"models.{role}.flavor")
            check_heads(role, sizes.num_heads, cfg.parallelism.context_parallel_degree)

    @classmethod
    def forward_flops(cls, p: Pass, sizes: WanConfig, role_cfg: RoleConfig, height: int, width: int) -> Flops:
        causal, lora = role_cfg.causal() if role_cfg.is_causal else None, role_cfg.lora if role_cfg.lora.rank else None
        return forward_flops(p, sizes, causal, height, width, lora)

    @classmethod
    def build(
        cls,
        cfg: JobConfig,
        role: str,
        mesh: Mesh,
        device: torch.device,
        base: WanModel | None = None,
        sizes: WanConfig | None = None,
    ) -> WanModel:
        role_cfg, dtype = cfg.models[role], getattr(torch, cfg.role_dtypes(role)[1])
        transformer = base.transformer if base else build_transformer(cfg, role, mesh, device, sizes)
        model = cls(
            transformer,
            role_cfg,
            trainable=role_cfg.trainable,
            schedule=cfg.schedule,
            device=device,
            dtype=dtype,
            adapter=role if role_cfg.lora.rank else None,
        )
        if base:
            model.reshard_after_forward, model.identity = base.reshard_after_forward, base.identity
            return model
        model.reshard_after_forward = cfg.role_parallelism(role).fsdp_reshard_after_forward
        if not role_cfg.trainable:
            transformer.eval()
        if role_cfg.init_from and not sizes and (not role_cfg.trainable or role_cfg.lora.rank):
            model.identity = weights.weights_hash(role_cfg)
        return model

    @classmethod
    def from_tensors(
        cls,
        sizes: WanConfig,
        tensors: dict[str, Tensor],
        schedule: ScheduleConfig,
        role_cfg: RoleConfig,
        device: torch.device | str = "cpu",
    ) -> WanModel:
        """A frozen, unsharded model from full tensors under our names."""
        with torch.device("meta"):
            transformer = WanTransformer(sizes)
        transformer.load_state_dict(tensors, assign=True)
        dtype, device = transformer.patch_embedding.weight.dtype, torch.device(device)
        transformer.to(device)
        return cls(transformer, role_cfg, trainable=False, schedule=schedule, device=device, dtype=dtype)

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        return gathered(self.transformer, self.reshard_after_forward)

    def attention_kernel(self, cfg: JobConfig) -> str:
        sizes, batch, (t, h, w) = self.transformer.cfg, cfg.training.local_batch_size, cfg.data.latent_size()
        tokens = self.num_tokens(sizes, (1, t, self.latent_channels, h, w))
        heads = sizes.num_heads // cfg.parallelism.context_parallel_degree
        return chosen_kernel((batch, tokens, heads, sizes.head_dim), self.dtype, self.device)

    def predict_velocity(self, noisy: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return _wide(self.transformer(noisy, sigma, cond.text, adapter=self.adapter))

    @classmethod
    def num_tokens(cls, sizes: WanConfig, latent_shape: Sequence[int]) -> int:
        b, t, _, h, w = latent_shape
        return b * t * h * w // math.prod(sizes.patch_size)


class WanCausalModel(WanModel, CausalModelBase):
    """The same network, weights and names, seeing time in blocks."""

    def __init__(self, transformer: WanTransformer, role_cfg: RoleConfig, **common):
        super().__init__(transformer, role_cfg, **common)
        self.causal = role_cfg.causal()
        self.backend = role_cfg.attention_backend
        self._cache: tuple[tuple, KVCache] | None = None
        self.trained_frames = 0
        """Latent frames of the videos it was trained on; 0: unknown. Longer streams see their sink nearer."""

    @classmethod
    def build(
        cls, cfg: JobConfig, role: str, mesh: Mesh, device: torch.device, *network: WanModel | WanConfig | None
    ) -> WanModel:
        role_cfg = cfg.models[role]
        if role_cfg.attention_backend == "flex" and role_cfg.trainable and device.type == "cpu":
            raise UserError(
                f'models.{role}.attention_backend = "flex": FlexAttention has no backward on a CPU; use "sdpa"'
            )
        model = super().build(cfg, role, mesh, device, *network)
        model.trained_frames = cfg.data.latent_size()[0]
        return model

    def attention_kernel(self, cfg: JobConfig) -> str:
        kernel = super().attention_kernel(cfg)
        return f"flex over whole videos, {kernel} in streams" if self.backend == "flex" else kernel

    def _plan(self, num_frames: int, clean_context: bool = False) -> BlockCausal:
        causal = self.causal
        return BlockCausal(causal.blocks(num_frames), causal.window, causal.sink, clean_context, self.backend)

    def predict_velocity(self, noisy: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        plan = self._plan(noisy.shape[1])
        return _wide(self.transformer(noisy, sigma, cond.text, plan=plan, adapter=self.adapter))

    def predict_velocity_with_context(
        self, noisy: Tensor, sigma: Tensor, clean: Tensor, clean_sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        plan, context = self._plan(noisy.shape[1], clean_context=True), (clean, clean_sigma)
        return _wide(self.transformer(noisy, sigma, cond.text, plan=plan, context=context, adapter=self.adapter))

    def new_cache(self, latent_shape: Sequence[int], *, recycle: bool = False, first_frame: int = 0) -> KVCache:
        sizes, (batch, frames, _, height, width) = self.transformer.cfg, latent_shape
        key = (batch, height, width, recycle, first_frame)
        if self._cache is None or self._cache[0] != key or not self._cache[1].holds(frames):
            self._cache = None  # the old one goes before the new one comes
            cache = KVCache(
                self.causal,
                num_layers=sizes.num_layers,
                batch_size=batch,
                num_frames=frames,
                tokens_per_frame=height * width // math.prod(sizes.patch_size),
                text_len=sizes.text_len,
                num_heads=sizes.num_heads,
                num_shards=shard.size if (shard := self.transformer.sequence_shard) else 1,
                head_dim=sizes.head_dim,
                device=self.device,
                dtype=self.dtype,
                recycle=recycle,
                first_frame=first_frame,
                trained_frames=self.trained_frames,
            )
            self._cache = (key, cache)
        cache = self._cache[1]
        cache.reset()
        return cache

    def cache_bytes(self) -> int:
        layers = self._cache[1].layers if self._cache else []
        return sum(tensor.nbytes for layer in layers for tensor in vars(layer).values())

    def release_cache(self) -> None:
        self._cache = None

    def predict_velocity_streaming(
        self, noisy_block: Tensor, sigma: Tensor, cond: Conditioning, cache: KVCache, start_frame: int
    ) -> Tensor:
        where = {"cache": cache, "start_frame": start_frame, "adapter": self.adapter}
        return _wide(self.transformer(noisy_block, sigma, cond.text, **where))

    @torch.no_grad()
    def commit(
        self, block: Tensor, cond: Conditioning, cache: KVCache, start_frame: int, context_noise: float = 0.0
    ) -> None:
        sigma = torch.full(block.shape[:2], context_noise, device=block.device)
        where = {"cache": cache, "start_frame": start_frame, "adapter": self.adapter}
        self.transformer(block.detach(), sigma, cond.text, **where, commit=True)


def _wide(v: Tensor) -> Tensor:
    return v.to(torch.promote_types(v.dtype, torch.float32))
