"""One role of a run: a network, how it is conditioned, and the schedule it shares with everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fvtitan import flow_matching
from fvtitan.flow_matching import ScheduleConfig

if TYPE_CHECKING:
    from fvtitan.config import JobConfig
    from fvtitan.data.latent_cache import LatentCache


@dataclass(frozen=True)
class Conditioning:
    """What a network is conditioned on."""

    text: Tensor
    """`[B, text_len, text_dim]`, zero-padded."""


class ModelBase(ABC):
    """A role's network behind the interface that methods use. `transformer` is the module that is trained and sharded."""

    def __init__(self, transformer: nn.Module, *, trainable: bool, schedule: ScheduleConfig, device: torch.device):
        self.transformer = transformer.requires_grad_(trainable)
        self.trainable = trainable
        self.schedule = schedule
        self.device = device
        self.uncond_embeds: Tensor | None = None

    def init_preprocessors(self, cfg: JobConfig, cache: LatentCache) -> None:
        """Take the unconditional prompt's embedding from the cache and check that the cache fits the network."""
        negative = cfg.data.uncond_prompt == "negative"
        self.uncond_embeds = cache.negative_prompt_embeds if negative else cache.empty_prompt_embeds
        self.check_cache(cfg, cache)

    @abstractmethod
    def check_cache(self, cfg: JobConfig, cache: LatentCache) -> None:
        """Raise `UserError` when the cache's channels or text width are not the network's."""

    @abstractmethod
    def conditioning(self, prompt_embeds: Sequence[Tensor]) -> Conditioning:
        """Conditioning of a batch from its prompts' embeddings, each `[L_i, D]` at its true length."""

    def unconditional(self, batch_size: int) -> Conditioning:
        """Conditioning on the unconditional prompt."""
        assert self.uncond_embeds is not None, "init_preprocessors first"
        return self.conditioning([self.uncond_embeds] * batch_size)

    @abstractmethod
    def predict_velocity(self, noisy: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity `[B, T, C, H, W]`, at least float32, of `noisy` at `sigma [B, T]`."""

    @abstractmethod
    def num_tokens(self, latent_shape: torch.Size) -> int:
        """Tokens the network makes of latents `[B, T, C, H, W]`."""

    def predict_x0(self, noisy: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Clean latents implied by the velocity."""
        return flow_matching.velocity_to_x0(noisy, self.predict_velocity(noisy, sigma, cond), sigma)

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """`(1 - sigma) x0 + sigma eps`."""
        return flow_matching.add_noise(x0, noise, sigma)
