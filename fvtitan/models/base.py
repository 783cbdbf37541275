"""One role of a run: a network, how it is conditioned, and the schedule it shares with everything else."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fvtitan import flow_matching
from fvtitan.components.lora import adapter_parameters
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import reshard
from fvtitan.errors import UserError
from fvtitan.flow_matching import ScheduleConfig
from fvtitan.models.blocks import CausalConfig
from fvtitan.models.kv_cache import KVCache

if TYPE_CHECKING:
    from fvtitan.config import JobConfig, RoleConfig
    from fvtitan.data.latent_cache import LatentCache
    from fvtitan.flops import Flops
    from fvtitan.methods.passes import Pass


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
    adapter, trained; roles with adapters may share it. It has `.blocks`, and its sizes as `.cfg`: a dataclass with at least
    `num_layers`, `in_channels`, `text_dim` and `text_len`."""

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

    # ------------------------------------------------- what a family of the registry has, before its network exists

    @classmethod
    def role_sizes(cls, role_cfg: RoleConfig, role: str) -> Any:
        """The network's sizes that [models.<role>] asks for. Raises `UserError` when there are none."""
        raise NotImplementedError

    @classmethod
    def check(cls, cfg: JobConfig, role: str) -> None:
        """Raise `UserError` for what of a run's configuration this family cannot do, before any work."""
        degree, rank, name = cfg.parallelism.context_parallel_degree, cfg.models[role].lora.rank, cfg.models[role].name
        if rank:
            raise UserError(f"models.{role}.lora.rank = {rank}: not with models.{role}.name = {name!r}; remove it")
        if degree > 1:
            raise UserError(
                f"parallelism.context_parallel_degree = {degree}: not with models.{role}.name = {name!r}; use 1"
            )

    @classmethod
    def build(
        cls,
        cfg: JobConfig,
        role: str,
        mesh: Mesh,
        device: torch.device,
        base: ModelBase | None = None,
        sizes: Any | None = None,
    ) -> ModelBase:
        """The role on a network of its own, or as an adapter on that of `base`; with `sizes` on meta, for a plan."""
        raise NotImplementedError

    @classmethod
    def forward_flops(cls, p: Pass, sizes: Any, role_cfg: RoleConfig, height: int, width: int) -> Flops:
        """All forwards of a pass for one video of `p.num_frames` x height x width latents, on a network of these sizes."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------------------------

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
        return dataclasses.asdict(self.transformer.cfg)

    def attention_kernel(self, cfg: JobConfig) -> str:
        """What computes self-attention in this process, for a micro-batch of `cfg`, in words; empty: not known."""
        return ""

    def init_preprocessors(self, cfg: JobConfig, cache: LatentCache) -> None:
        """Take the unconditional prompt's embedding from the cache and check that the cache fits the network."""
        negative = cfg.data.uncond_prompt == "negative"
        self.uncond_embeds = cache.negative_prompt_embeds if negative else cache.empty_prompt_embeds
        self.check_cache(cfg, cache)

    def check_cache(self, cfg: JobConfig, cache: LatentCache) -> None:
        """Raise `UserError` when the cache's channels or text width are not the network's."""
        sizes, sample = self.transformer.cfg, cache[0]
        width = sample["prompt_embeds"].shape[1]
        if cache.has_latents and (channels := sample["latents"].shape[1]) != sizes.in_channels:
            raise UserError(f"{cfg.data.path}: latents have {channels} channels, the network {sizes.in_channels}")
        if width != sizes.text_dim:
            raise UserError(
                f"{cfg.data.path}: text embeddings are {width} wide, the network wants {sizes.text_dim}: "
                "preprocess with the text encoder that belongs to the model"
            )

    def conditioning(self, prompt_embeds: Sequence[Tensor]) -> Conditioning:
        """Conditioning of a batch from its prompts' embeddings, each `[L_i, D]` at its true length, zero-padded."""
        sizes = self.transformer.cfg
        text = torch.zeros(
            (len(prompt_embeds), sizes.text_len, sizes.text_dim),
            dtype=prompt_embeds[0].dtype,
            pin_memory=self.device.type == "cuda",  # else the copy below would wait for the device
        )
        for row, embeds in zip(text, prompt_embeds, strict=True):
            if embeds.shape[0] > sizes.text_len:
                raise UserError(f"a prompt of {embeds.shape[0]} tokens exceeds the model's text_len {sizes.text_len}")
            row[: embeds.shape[0]] = embeds
        return Conditioning(text=text.to(self.device, non_blocking=True))

    def unconditional(self, batch_size: int) -> Conditioning:
        """Conditioning on the unconditional prompt."""
        assert self.uncond_embeds is not None, "init_preprocessors first"
        return self.conditioning([self.uncond_embeds] * batch_size)

    def cache_bytes(self) -> int:
        """Bytes of the KV cache that is kept between rollouts."""
        return 0

    def release_cache(self) -> None:  # noqa: B027 (most have none)
        """Let go of it: what samples now and then must not hold it while others train."""

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Inside, a sharded network is gathered once and stays so, for several forwards in a row."""
        return contextlib.nullcontext()

    @abstractmethod
    def predict_velocity(self, noisy: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """Velocity `[B, T, C, H, W]`, at least float32, of `noisy` at `sigma [B, T]`."""

    @classmethod
    @abstractmethod
    def num_tokens(cls, sizes: Any, latent_shape: Sequence[int]) -> int:
        """Tokens that a network of these sizes makes of latents `[B, T, C, H, W]`."""

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
