"""The weights of a role: read from files or a run's checkpoint into local shards, or drawn at random."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.checkpoint_folder import read_tensor_names, read_tensors, verify_files
from fvtitan.components.files import file_sha256, write_atomic
from fvtitan.components.lora import LoRAConfig, base_parameters, merge_adapter
from fvtitan.components.rng import generator
from fvtitan.components.stateful import ModelState
from fvtitan.distributed.utils import local_rows, local_tensor, on_every_rank, rank_and_world, reshard
from fvtitan.errors import UserError, listed, shortened
from fvtitan.models.wan.adapter import config_to_diffusers, diffusers_names, flavor_config, to_diffusers_tensor
from fvtitan.models.wan.files import WEIGHTS_NAME, WeightFiles, holds_average, open_weights
from fvtitan.models.wan.transformer import WanConfig, WanTransformer, init_parameter

if TYPE_CHECKING:
    from fvtitan.config import JobConfig, RoleConfig


@torch.no_grad()
def load_files(transformer: WanTransformer, files: WeightFiles) -> None:
    """Read files into the (sharded) parameters, those of adapters aside; every rank reads only the rows that it holds."""
    reshard(transformer)
    for name, parameter in base_parameters(transformer).items():
        rows, shard = local_rows(parameter), local_tensor(parameter)
        if rows.stop > rows.start:
            shard.copy_(files.read(name, rows).reshape(shard.shape))


def weights_hash(model: RoleConfig) -> str:
    """The identity of what a role is loaded from: sha256 of the weight files and their config, or of a checkpoint's manifest
    (which holds the hashes of its files) and which of its weights. The ranks share the reading."""
    if is_checkpoint(model.init_from):
        manifest = (Path(model.init_from) / "manifest.json").read_bytes()
        return hashlib.sha256(manifest + checkpoint_state_name(model).encode()).hexdigest()
    files = open_weights(model.init_from, model.init_weights)
    paths = [*([files.config] if files.config else []), *files.paths]
    rank, world = rank_and_world()
    hashes = on_every_rank(lambda: {path.name: file_sha256(path) for path in paths[rank::world]})
    everyone = sorted(item for part in hashes for item in part.items())
    return hashlib.sha256((json.dumps(everyone) + files.state).encode()).hexdigest()


def read_pipeline(init_from: str) -> tuple[WanConfig, dict[str, Tensor]]:
    """Sizes and full tensors, under our names, of a folder, hub repository or file."""
    files = open_weights(init_from)
    return files.sizes, files.full(files.names)


@dataclass(frozen=True)
class RoleWeights:
    """A role in a run's checkpoint, whose tensors are read as they are needed. An adapter is merged with its base."""

    folder: Path
    sizes: WanConfig
    state: str
    """ema.<role> or roles.<role>.transformer."""
    names: tuple[str, ...]
    """All parameters of the network."""
    adapter: Adapter | None = None
    """What the role trains on its base; None: the checkpoint holds all its weights."""

    def full(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Full tensors; of an adapter on its base in float32."""
        if self.adapter is None:
            return read_tensors(self.folder, self.state, names, verify=False)
        base = self.adapter.base.full(names)  # which may be a mapped file: it must not change
        whole = {name: tensor.to(torch.float32, copy=True) for name, tensor in base.items()}
        layers = {name.removesuffix(".weight") for name in names}
        low = {name: t for name, t in self.adapter.tensors.items() if name.rpartition(".")[0] in layers}
        merge_adapter(whole, low, self.adapter.scale)
        return whole


@dataclass(frozen=True)
class Adapter:
    """A role that is an adapter: its tensors `<layer>.lora_A`, `<layer>.lora_B`, its configuration, and what it lies on."""

    tensors: Mapping[str, Tensor]
    lora: LoRAConfig
    base: WeightFiles | RoleWeights
    base_from: str
    """init_from of the base."""

    @property
    def scale(self) -> float:
        return self.lora.scale


def open_role(folder: str | Path, role: str, *, raw: bool) -> RoleWeights:
    """A role of `.../checkpoint/step-<N>`: its moving average where there is one, or with `raw` its own weights.

    Every byte of the checkpoint is verified; all ranks call it, and share the reading. Raises `UserError`, `DamagedCheckpoint`.
    """
    folder = Path(folder)
    sizes, own = checkpoint_sizes(folder, role), f"roles.{role}.transformer"
    verify_files(folder)
    averaged = not raw and bool(read_tensor_names(folder, f"ema.{role}"))
    state = f"ema.{role}" if averaged else own
    base = adapter_base(folder, role)
    if base is None:
        return RoleWeights(folder, sizes, state, tuple(read_tensor_names(folder, state)))
    under = open_source(base.model)
    adapter = Adapter(read_tensors(folder, state, verify=False), base.lora, under, base.model.init_from)
    return RoleWeights(folder, sizes, state, under.names, adapter)


def open_source(model: RoleConfig) -> WeightFiles | RoleWeights:
    """What `model.init_from` names: files, or a role of a checkpoint."""
    if not is_checkpoint(model.init_from):
        return open_weights(model.init_from, model.init_weights)
    return open_role(model.init_from, model.init_role, raw=checkpoint_state_name(model).startswith("roles."))


def read_checkpoint(folder: str | Path, role: str, *, raw: bool = False) -> tuple[WanConfig, dict[str, Tensor]]:
    """Sizes and full tensors of a role in a run's checkpoint `.../checkpoint/step-<N>`: its moving average where there is
    one, unless `raw`. Of a role that is an adapter, merged with its base, in float32."""
    weights = open_role(folder, role, raw=raw)
    return weights.sizes, weights.full(weights.names)


def read_untrained(folder: str | Path, role: str) -> dict[str, Tensor]:
    """Full tensors of what a role in a run's checkpoint was before its training: of its `init_from`, or of the network under
    its adapter. Raises `UserError` when it began at random, or when that is no longer there."""
    from fvtitan.config import read_toml

    models = read_toml(Path(folder) / "config.toml").models
    model = models[models[role].share_base_with or role]
    if not model.init_from:
        raise UserError(f"{folder}: models.{role}.init_from is empty: the {role} was random before its training")
    source = open_source(model)
    return source.full(source.names)


def is_checkpoint(init_from: str | Path) -> bool:
    """Whether `init_from` is a run's checkpoint `.../checkpoint/step-<N>`, not a pipeline."""
    folder = Path(init_from)
    return bool(str(init_from)) and all((folder / name).is_file() for name in ("manifest.json", "roles.json"))


def checkpoint_sizes(folder: str | Path, role: str) -> WanConfig:
    """The sizes of a role in a run's checkpoint. Raises `UserError` naming the roles that it holds."""
    path = Path(folder) / "roles.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if role not in saved:
            raise UserError(f"{folder}: the checkpoint holds no role {role!r}; it holds {', '.join(saved)}")
        if "patch_size" not in saved[role]:
            raise UserError(
                f"{path}: {role!r} has the sizes {shortened(listed(saved[role]))}: not a Wan network, and only those are read"
            )
        return WanConfig(**saved[role] | {"patch_size": tuple(saved[role]["patch_size"])})
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no checkpoint here (no roles.json)") from None
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {shortened(repr(error))}") from None


@dataclass(frozen=True)
class AdapterBase:
    """What lies under an adapter: the role of its run whose weights these are, and the adapter's own configuration."""

    model: RoleConfig
    lora: LoRAConfig


def adapter_base(folder: str | Path, role: str) -> AdapterBase | None:
    """The base of a role in a run's checkpoint; None: the checkpoint holds all its weights. All ranks call it.

    Raises `UserError` when the base is not where that run's configuration says, or is not what the adapter was trained on.
    """
    from fvtitan.config import read_toml

    folder = Path(folder)
    if not any(name.endswith(".lora_A") for name in read_tensor_names(folder, f"roles.{role}.transformer")):
        return None
    models = read_toml(folder / "config.toml").models
    name = models[role].share_base_with or role
    model = models[name]
    what = f"{folder}: {role!r} is an adapter on models.{name}.init_from = {model.init_from!r}"
    try:
        identity = weights_hash(model)
    except UserError as error:
        raise UserError(f"{what}, which is needed and cannot be read (from here): {error}") from None
    saved = json.loads((folder / "state.json").read_bytes())["states"][f"identity.{role}"]["sha256"]
    if identity != saved:
        raise UserError(f"{what}, whose weights have changed: trained on {saved[:12]}..., found {identity[:12]}...")
    return AdapterBase(model, models[role].lora)


def checkpoint_state_name(model: RoleConfig) -> str:
    """Which state of the checkpoint `init_from` a role is loaded from: `ema.student` or `roles.student.transformer`.

    Raises `UserError` when a moving average is asked for that is not there.
    """
    averaged = bool(read_tensor_names(model.init_from, f"ema.{model.init_role}"))
    if model.init_weights == "ema" and not averaged:
        raise UserError(f"init_from = {model.init_from!r} has no moving average of {model.init_role!r}")
    raw = model.init_weights == "raw" or not averaged
    return f"roles.{model.init_role}.transformer" if raw else f"ema.{model.init_role}"


def load_weights(transformer: WanTransformer, model: RoleConfig, cfg: JobConfig, key: str) -> None:
    """Read what `model.init_from` names into the (sharded) parameters, those of adapters aside; `key` is its config key, for
    errors."""
    from fvtitan.contract import read_contract

    if is_checkpoint(model.init_from):
        load_checkpoint(transformer, model, cfg, key)
        return
    files = open_weights(model.init_from, model.init_weights)
    contract = read_contract(files.folder)
    if contract is not None:
        _check_shift(contract.shift, model, cfg, key)
    load_files(transformer, files)


def _check_shift(theirs: float, model: RoleConfig, cfg: JobConfig, key: str) -> None:
    if theirs != cfg.schedule.shift:
        raise UserError(
            f"{key} = {model.init_from!r} was trained with schedule.shift = {theirs:g}, this run has "
            f"{cfg.schedule.shift:g}: use the same"
        )


def load_checkpoint(transformer: nn.Module, model: RoleConfig, cfg: JobConfig, key: str) -> None:
    """Read a role of another run's checkpoint into the (sharded) parameters, as `model` says; an adapter is merged into its
    base.

    Raises `UserError` when that run had another shift: what it learned at a timestep is not what this run asks for.
    """
    from fvtitan.config import read_toml

    _check_shift(read_toml(Path(model.init_from) / "config.toml").schedule.shift, model, cfg, key)
    name, base = checkpoint_state_name(model), adapter_base(model.init_from, model.init_role)
    if base is not None:
        load_weights(transformer, base.model, cfg, f"{key} = {model.init_from!r}: the base under its adapter")
        merge_adapter(base_parameters(transformer), read_tensors(model.init_from, name), base.lora.scale)
        return
    states = {name: ModelState(transformer, base_parameters(transformer))}
    checkpointer = Checkpointer(Path(cfg.job.dump_folder) / "checkpoint", timeout=cfg.comm.timeout)
    try:
        checkpointer.load(model.init_from, states, allow_unexpected=("",), allow_cast=True)
    finally:
        checkpointer.close()


def role_sizes(model: RoleConfig, role: str) -> WanConfig:
    """The network's sizes from the flavor, the pretrained folder or checkpoint, or both when they agree."""
    flavor, init_from = model.flavor, model.init_from
    for key in ("init_role", "init_weights"):
        several = is_checkpoint(init_from) or (key == "init_weights" and holds_average(init_from))
        if getattr(model, key) != getattr(type(model), key) and not several:
            raise UserError(
                f"models.{role}.{key} = {getattr(model, key)!r} has no effect: init_from = {init_from!r} is not the checkpoint "
                "of a run (.../checkpoint/step-<N>)"
            )
    if not init_from:
        return flavor_config(flavor, f"models.{role}.flavor")
    if is_checkpoint(init_from):
        sizes = checkpoint_sizes(init_from, model.init_role)
    else:
        sizes = open_weights(init_from, model.init_weights).sizes  # checked whole, before anything is allocated
    if flavor and flavor_config(flavor, f"models.{role}.flavor") != sizes:
        raise UserError(
            f"models.{role}: flavor = {flavor!r} is {flavor_config(flavor, 'flavor')}, but init_from = {init_from!r} "
            f"holds {sizes}: remove flavor to take the sizes of init_from"
        )
    return sizes


@torch.no_grad()
def initialise(transformer: nn.Module, seed: int, role: str, init: Callable[..., Tensor] = init_parameter) -> None:
    """Draw every parameter as a full tensor from its own stream and keep the local rows: the same model on any number
    of ranks (draws on shards would give every rank the same values, and another model than one rank's). `init`: a family's
    `init_parameter`."""
    reshard(transformer)
    for name, parameter in transformer.named_parameters():
        full = init(name, parameter.shape, transformer.cfg, lambda stream: generator("cpu", seed, "init", role, stream))
        local_tensor(parameter).copy_(full[local_rows(parameter)])


def check_parameters(module: nn.Module, role: str, *, loaded: bool) -> None:
    """No parameter, those of adapters aside, may hold NaN or Inf, and no loaded matrix may be all zero, on any rank."""
    parameters = base_parameters(module)
    # Smallest and largest value pass NaN and Inf on, in one reading; isfinite() would copy the shard several times over.
    shards = [local_tensor(parameter.detach()) for parameter in parameters.values()]
    ends = [torch.stack(shard.aminmax() if shard.numel() else (shard.new_zeros(()),) * 2).float() for shard in shards]
    flags = torch.stack([torch.stack([~end.isfinite().all(), end.any()]) for end in ends]).float()
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    bad = []
    for (name, parameter), (not_finite, nonzero) in zip(parameters.items(), flags.tolist(), strict=True):
        if not_finite or (loaded and parameter.ndim >= 2 and not nonzero):
            bad.append(f"{name} ({'not finite' if not_finite else 'all zero'})")
    if bad:
        raise UserError(f"models.{role}: damaged weights: {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}")


def save_transformer(tensors: dict[str, Tensor], cfg: WanConfig, folder: Path) -> None:
    """Write full tensors under our names as a diffusers transformer folder: config.json and one safetensors file."""
    from safetensors.torch import save

    names = diffusers_names(tensors)
    state = {names[name]: to_diffusers_tensor(name, t, cfg).contiguous().cpu() for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS_NAME, save(state, metadata={"format": "pt"}))
    write_atomic(folder / "config.json", json.dumps(config_to_diffusers(cfg), indent=2).encode() + b"\n")
