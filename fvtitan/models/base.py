"""One role of a run: a network, how it is conditioned, and the schedule it shares with everything else."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fvtitan import flow_matching
from fvtitan.components.lora import adapter_parameters
from fvtitan.distributed.utils import reshard
from fvtitan.flow_matching import ScheduleConfig
from fvtitan.models.blocks import CausalConfig
from fvtitan.models.kv_cache import KVCache

if TYPE_CHECKING:
    from fvtitan.config import JobConfig
    from fvtitan.data.latent_cache import LatentCache


@dataclass(frozen=True)
class Conditioning:
    """What a network is conditioned on."""

    text: Tensor
    """`[B, text_len, text_dim]`, zero-padded."""

    def and_then(self, other: Conditioning) -> Conditioning:
        """Both, one behind the other in the batch: guidance in one pass."""
        return Conditioning(text=torch.cat([self.text, other.text]))


class ModelBase(ABC):
    """A role's network behind the interface that methods use. `transformer` is the module that is sharded and, but for an
    adapter, trained; roles with adapters may share it."""

    latent_channels: int
    """Channels of the latents."""

    def __init__(
        self,
        transformer: nn.Module,
        *,
        trainable: bool,
        schedule: ScheduleConfig,
        device: torch.device,
        adapter: str | None = None,
    ):
        self.transformer = transformer
        self.trainable = trainable
        self.adapter = adapter
        """The LoRA that is trained instead of the transformer."""
        if adapter is None:
            transformer.requires_grad_(trainable)
        else:
            for parameter in self.trained_parameters().values():
                parameter.requires_grad_()
        self.schedule = schedule
        self.device = device
        self.uncond_embeds: Tensor | None = None
        self.identity = ""
        """Hash of the weights that a frozen role, or the base under an adapter, was loaded from."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What this role trains, by name; an adapter's names do not tell whose it is. Sharded, and not gathered when this
        returns: writes to them would be lost."""
        reshard(self.transformer)
        if not self.trainable:
            return {}
        if self.adapter is not None:
            return adapter_parameters(self.transformer, self.adapter)
        return {name: parameter for name, parameter in self.transformer.named_parameters() if parameter.requires_grad}

    @property
    def sizes(self) -> dict[str, Any]:
        """What rebuilds the network, as JSON."""
        return {}

    def attention_kernel(self, cfg: JobConfig) -> str:
        """What computes self-attention in this process, for a micro-batch of `cfg`, in words; empty: not known."""
        return ""

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

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a sharded network is gathered once and stays so, for several forwards in a row."""
        return contextlib.nullcontext()

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


class CausalModelBase(ModelBase):
    """A model that sees time in blocks: block-causal over a whole video, or streaming, block by block, over a KV cache."""

    causal: CausalConfig
    trained_frames: int

    @abstractmethod
    def predict_velocity_with_context(
        self, noisy: Tensor, sigma: Tensor, clean: Tensor, clean_sigma: Tensor, cond: Conditioning
    ) -> Tensor:
        """Teacher forcing: velocity of `noisy`, each block of which sees itself and the clean blocks before it."""

    @abstractmethod
    def new_cache(self, latent_shape: Sequence[int], *, recycle: bool = False, first_frame: int = 0) -> KVCache:
        """An empty cache for a rollout of `[B, T, C, H, W]`. There is one a model: it is emptied and returned again as long as
        the size is the same and T fits, so a new rollout ends the one before. `recycle` (inference) holds no more than a
        window."""

    @abstractmethod
    def predict_velocity_streaming(
        self, noisy_block: Tensor, sigma: Tensor, cond: Conditioning, cache: KVCache, start_frame: int
    ) -> Tensor:
        """Velocity `[B, t, C, H, W]` of the block that begins at `start_frame`, given the committed frames. Commits
        nothing; with gradient, none flows into the cache."""

    @abstractmethod
    def commit(
        self, block: Tensor, cond: Conditioning, cache: KVCache, start_frame: int, context_noise: float = 0.0
    ) -> None:
        """Write the keys and values of a finished block, noised to sigma = `context_noise` by the caller, into the cache;
        without gradient."""
