"""Weights of a Wan transformer: read from safetensors into local shards, drawn at random, or written for diffusers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fvtitan.components.checkpoint import Checkpointer, read_tensor_names, read_tensors
from fvtitan.components.files import write_atomic
from fvtitan.components.lora import base_parameters, merge_adapter
from fvtitan.components.rng import generator
from fvtitan.distributed.utils import local_rows, local_tensor, reshard
from fvtitan.errors import UserError, shortened
from fvtitan.models.pipeline import pipeline_folder, pipeline_text_len
from fvtitan.models.wan.adapter import (
    check_complete,
    config_from_diffusers,
    config_to_diffusers,
    diffusers_names,
    diffusers_shape,
    flavor_config,
    to_diffusers_tensor,
)
from fvtitan.models.wan.transformer import WanConfig, WanTransformer, init_parameter

if TYPE_CHECKING:
    from fvtitan.config import JobConfig, RoleConfig

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def transformer_folder(init_from: str) -> Path:
    """The folder with the transformer's config and weights: `<pipeline>/transformer`, or the folder itself."""
    folder = pipeline_folder(init_from, "transformer")
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def pretrained_config(init_from: str) -> WanConfig:
    """The sizes recorded in a diffusers folder or hub repository."""
    path = transformer_folder(init_from) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"init_from = {init_from!r}: cannot read {path}: {error}") from None
    return config_from_diffusers(config, pipeline_text_len(pipeline_folder(init_from, "transformer")), str(path))


def weight_files(folder: Path) -> dict[str, Path]:
    """`{tensor name: file}` of a diffusers folder, single or sharded. Raises `UserError` naming what is missing."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{index}: damaged index: {error!r}") from None
        files = {name: folder / file for name, file in weight_map.items()}
        for path in set(files.values()):
            if path.parent != folder or not path.is_file():
                raise UserError(f"{index} names {path.name}, which is not in {folder}")
        return files
    single = folder / WEIGHTS_NAME
    if not single.is_file():
        raise UserError(f"no weights in {folder}: expected {WEIGHTS_NAME} or {index.name}")
    return dict.fromkeys(_open(single).keys(), single)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged safetensors file: {error}") from None


@torch.no_grad()
def load_pretrained(transformer: WanTransformer, init_from: str) -> None:
    """Read a diffusers transformer into the (sharded) parameters, those of adapters aside; every rank reads only the rows that
    it holds."""
    folder = transformer_folder(init_from)
    files = weight_files(folder)
    parameters = base_parameters(transformer)
    names = diffusers_names(parameters)
    check_complete(names, files, str(folder))
    reshard(transformer)
    handles = {path: _open(path) for path in set(files.values())}
    for name, parameter in parameters.items():
        source = names[name]
        try:
            stored = handles[files[source]].get_slice(source)
        except SafetensorError as error:
            raise UserError(f"{files[source]}: {error}") from None
        expected = diffusers_shape(name, parameter.shape, transformer.cfg)
        if tuple(stored.get_shape()) != expected:
            raise UserError(
                f"{files[source]}: {source} has shape {stored.get_shape()}, the model needs {list(expected)}"
            )
        rows, shard = local_rows(parameter), local_tensor(parameter)
        if rows.stop > rows.start:
            shard.copy_(stored[rows].reshape(shard.shape))


def weights_hash(model: RoleConfig) -> str:
    """The identity of what a role is loaded from: sha256 of a diffusers transformer's weight files and config, or of a
    checkpoint's manifest (which holds the hashes of its files) and which of its weights. The ranks share the reading."""
    if is_checkpoint(model.init_from):
        manifest = (Path(model.init_from) / "manifest.json").read_bytes()
        return hashlib.sha256(manifest + checkpoint_state_name(model).encode()).hexdigest()
    folder = transformer_folder(model.init_from)
    paths = [folder / "config.json", *sorted(set(weight_files(folder).values()))]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = {}
    for path in paths[rank::world]:
        with path.open("rb") as file:
            mine[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    hashes = [mine] * world
    if world > 1:
        dist.all_gather_object(hashes, mine)
    everyone = sorted(item for part in hashes for item in part.items())
    return hashlib.sha256(json.dumps(everyone).encode()).hexdigest()


def read_pipeline(init_from: str) -> tuple[WanConfig, dict[str, Tensor]]:
    """Sizes and full tensors, under our names, of a diffusers folder or hub repository."""
    sizes = pretrained_config(init_from)
    folder = transformer_folder(init_from)
    files = weight_files(folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in WanTransformer(sizes).named_parameters()}
    names = diffusers_names(shapes)
    check_complete(names, files, str(folder))
    handles = {path: _open(path) for path in set(files.values())}
    tensors = {ours: handles[files[theirs]].get_tensor(theirs) for ours, theirs in names.items()}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != diffusers_shape(name, shapes[name], sizes):
            raise UserError(f"{folder}: {names[name]} has shape {list(tensor.shape)}, not what config.json says")
    return sizes, {name: tensor.reshape(shapes[name]) for name, tensor in tensors.items()}


def read_checkpoint(folder: str | Path, role: str, *, raw: bool = False) -> tuple[WanConfig, dict[str, Tensor]]:
    """Sizes and full tensors of a role in a run's checkpoint `.../checkpoint/step-<N>`: its moving average where there is
    one, unless `raw`. Of a role that is an adapter, merged with its base, in float32."""
    sizes, base = checkpoint_sizes(folder, role), adapter_base(folder, role)
    tensors = {} if raw else read_tensors(folder, f"ema.{role}")
    tensors = tensors or read_tensors(folder, f"roles.{role}.transformer")
    if base is None:
        return sizes, tensors
    if is_checkpoint(base.model.init_from):
        raw = checkpoint_state_name(base.model).startswith("roles.")
        _, whole = read_checkpoint(base.model.init_from, base.model.init_role, raw=raw)
    else:
        _, whole = read_pipeline(base.model.init_from)
    whole = {name: tensor.float() for name, tensor in whole.items()}
    merge_adapter(whole, tensors, base.scale)
    return sizes, whole


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
        return WanConfig(**saved[role] | {"patch_size": tuple(saved[role]["patch_size"])})
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no checkpoint here (no roles.json)") from None
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {shortened(repr(error))}") from None


@dataclass(frozen=True)
class AdapterBase:
    """What lies under an adapter: the role of its run whose weights these are, and the adapter's scale."""

    model: RoleConfig
    scale: float


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
    return AdapterBase(model, models[role].lora.scale)


class _InPlace:
    """Parameters as a checkpoint reads them: straight into the shards."""

    def __init__(self, module: nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        reshard(self.module)
        return {name: parameter.detach() for name, parameter in base_parameters(self.module).items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """They have been read."""


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
    if is_checkpoint(model.init_from):
        load_checkpoint(transformer, model, cfg, key)
    else:
        load_pretrained(transformer, model.init_from)


def load_checkpoint(transformer: WanTransformer, model: RoleConfig, cfg: JobConfig, key: str) -> None:
    """Read a role of another run's checkpoint into the (sharded) parameters, as `model` says; an adapter is merged into its
    base.

    Raises `UserError` when that run had another shift: what it learned at a timestep is not what this run asks for.
    """
    from fvtitan.config import read_toml

    theirs = read_toml(Path(model.init_from) / "config.toml").schedule.shift
    if theirs != cfg.schedule.shift:
        raise UserError(
            f"{key} = {model.init_from!r} was trained with schedule.shift = {theirs:g}, this run has "
            f"{cfg.schedule.shift:g}: use the same"
        )
    name, base = checkpoint_state_name(model), adapter_base(model.init_from, model.init_role)
    if base is not None:
        load_weights(transformer, base.model, cfg, f"{key} = {model.init_from!r}: the base under its adapter")
        merge_adapter(base_parameters(transformer), read_tensors(model.init_from, name), base.scale)
        return
    checkpointer = Checkpointer(Path(cfg.job.dump_folder) / "checkpoint", timeout=cfg.comm.timeout)
    try:
        checkpointer.load(model.init_from, {name: _InPlace(transformer)}, allow_unexpected=("",), allow_cast=True)
    finally:
        checkpointer.close()


def role_sizes(model: RoleConfig, role: str) -> WanConfig:
    """The network's sizes from the flavor, the pretrained folder or checkpoint, or both when they agree."""
    flavor, init_from = model.flavor, model.init_from
    for key in ("init_role", "init_weights"):
        if getattr(model, key) != getattr(type(model), key) and not is_checkpoint(init_from):
            raise UserError(
                f"models.{role}.{key} = {getattr(model, key)!r} has no effect: init_from = {init_from!r} is not the checkpoint "
                "of a run (.../checkpoint/step-<N>)"
            )
    if not init_from:
        return flavor_config(flavor, f"models.{role}.flavor")
    sizes = checkpoint_sizes(init_from, model.init_role) if is_checkpoint(init_from) else pretrained_config(init_from)
    if flavor and flavor_config(flavor, f"models.{role}.flavor") != sizes:
        raise UserError(
            f"models.{role}: flavor = {flavor!r} is {flavor_config(flavor, 'flavor')}, but init_from = {init_from!r} "
            f"holds {sizes}: remove flavor to take the sizes of init_from"
        )
    return sizes


@torch.no_grad()
def initialise(transformer: WanTransformer, seed: int, role: str) -> None:
    """Draw every parameter as a full tensor from its own stream and keep the local rows: the same model on any number
    of ranks (draws on shards would give every rank the same values, and another model than one rank's)."""
    reshard(transformer)
    for name, parameter in transformer.named_parameters():
        full = init_parameter(
            name, parameter.shape, transformer.cfg, lambda stream: generator("cpu", seed, "init", role, stream)
        )
        local_tensor(parameter).copy_(full[local_rows(parameter)])


def check_parameters(module: nn.Module, role: str, *, loaded: bool) -> None:
    """No parameter, those of adapters aside, may hold NaN or Inf, and no loaded matrix may be all zero, on any rank."""
    parameters = base_parameters(module)
    shards = [local_tensor(parameter.detach()) for parameter in parameters.values()]
    flags = torch.stack([torch.stack([~shard.isfinite().all(), shard.any()]) for shard in shards]).float()
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
