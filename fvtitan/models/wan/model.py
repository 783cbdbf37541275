"""Wan as a role: builds, loads and shards the transformer, pads its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fvtitan.distributed.parallelize import parallelize
from fvtitan.errors import UserError
from fvtitan.models.base import Conditioning, ModelBase
from fvtitan.models.wan import weights
from fvtitan.models.wan.adapter import flavor_config
from fvtitan.models.wan.transformer import WanConfig, WanTransformer

if TYPE_CHECKING:
    from fvtitan.config import JobConfig
    from fvtitan.data.latent_cache import LatentCache


class WanModel(ModelBase):
    """Wan 2.1 text-to-video."""

    transformer: WanTransformer

    @classmethod
    def build(cls, cfg: JobConfig, role: str, mesh: DeviceMesh, device: torch.device) -> WanModel:
        """Meta -> parallelize -> storage for the local shards -> weights read (or drawn) straight into them."""
        role_cfg = cfg.models[role]
        sizes = role_sizes(role_cfg.flavor, role_cfg.init_from, role)
        with torch.device("meta"):
            transformer = WanTransformer(sizes)
        parallelize(transformer, mesh, cfg)
        transformer.to_empty(device=device)
        if role_cfg.init_from:
            weights.load_pretrained(transformer, role_cfg.init_from)
        else:
            weights.initialise(transformer, cfg.training.seed, role)
        weights.check_parameters(transformer, role, loaded=bool(role_cfg.init_from))
        return cls(transformer, trainable=role_cfg.trainable, schedule=cfg.schedule, device=device)

    def check_cache(self, cfg: JobConfig, cache: LatentCache) -> None:
        sizes, sample = self.transformer.cfg, cache[0]
        channels, width = sample["latents"].shape[1], sample["prompt_embeds"].shape[1]
        if channels != sizes.in_channels:
            raise UserError(f"{cfg.data.path}: latents have {channels} channels, the network {sizes.in_channels}")
        if width != sizes.text_dim:
            raise UserError(
                f"{cfg.data.path}: text embeddings are {width} wide, the network wants {sizes.text_dim}: "
                "preprocess with the text encoder that belongs to the model"
            )

    def conditioning(self, prompt_embeds: Sequence[Tensor]) -> Conditioning:
        sizes = self.transformer.cfg
        text = torch.zeros(len(prompt_embeds), sizes.text_len, sizes.text_dim, dtype=prompt_embeds[0].dtype)
        for row, embeds in zip(text, prompt_embeds, strict=True):
            if embeds.shape[0] > sizes.text_len:
                raise UserError(f"a prompt of {embeds.shape[0]} tokens exceeds the model's text_len {sizes.text_len}")
            row[: embeds.shape[0]] = embeds
        return Conditioning(text=text.to(self.device, non_blocking=True))

    def predict_velocity(self, noisy: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        v = self.transformer(noisy, sigma, cond.text)
        return v.to(torch.promote_types(v.dtype, torch.float32))

    def num_tokens(self, latent_shape: torch.Size) -> int:
        b, t, _, h, w = latent_shape
        return b * t * h * w // math.prod(self.transformer.cfg.patch_size)


def role_sizes(flavor: str, init_from: str, role: str) -> WanConfig:
    """The network's sizes from the flavor, the pretrained folder, or both when they agree."""
    if not init_from:
        return flavor_config(flavor, f"models.{role}.flavor")
    sizes = weights.pretrained_config(init_from)
    if flavor and flavor_config(flavor, f"models.{role}.flavor") != sizes:
        raise UserError(
            f"models.{role}: flavor = {flavor!r} is {flavor_config(flavor, 'flavor')}, but init_from = {init_from!r} "
            f"holds {sizes}: remove flavor to take the sizes of init_from"
        )
    return sizes
