"""Small real inputs for the tests: latent caches written in the real format, configurations, and train.py in-process."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from fvtitan.components.rng import generator
from fvtitan.config import JobConfig, RoleConfig, load_config
from fvtitan.data.latent_cache import FORMAT_VERSION, fingerprint, shard_bytes, stack_text, text_key
from fvtitan.errors import cli
from fvtitan.flow_matching import ScheduleConfig
from fvtitan.models.wan.model import WanCausalModel, WanModel
from fvtitan.models.wan.transformer import WanConfig, WanTransformer, init_parameter
from fvtitan.models.wan.weights import save_transformer

ROOT = Path(__file__).parents[1]
GEOMETRY = {"num_frames": 9, "height": 32, "width": 32, "fps": 16}


def make_cache(
    folder: Path,
    num_samples: int = 12,
    *,
    text_dim: int = 64,
    seed: int = 0,
    num_portrait: int = 0,
    num_long: int = 0,
) -> Path:
    """A latent cache of random latents [3, 16, 4, 4] and embeddings, as preprocess would have written it.

    The first `num_portrait` samples are [3, 16, 6, 4], the last `num_long` ones [5, 16, 4, 4]: buckets of their own.
    """
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(seed)
    tensors, samples, name = {}, [], "shard-00000.safetensors"
    for i in range(num_samples):
        caption, shape = f"caption {i}", [5 if i >= num_samples - num_long else 3, 16, 6 if i < num_portrait else 4, 4]
        tensors[f"latents.{i:05d}"] = torch.randn(shape, generator=rng).bfloat16()
        tensors[text_key(caption)] = torch.randn(3 + i % 5, text_dim, generator=rng).bfloat16()
        samples.append(
            {
                "sample_id": f"{i}.mp4",
                "caption": caption,
                "shard": name,
                "key": f"latents.{i:05d}",
                "shape": shape,
                "source_sha256": f"{i}-{seed}",
            }
        )
    (folder / name).write_bytes(shard_bytes(name, tensors))
    prompts = stack_text([torch.randn(length, text_dim, generator=rng) for length in (1, 4)])
    (folder / "prompts.safetensors").write_bytes(shard_bytes("prompts.safetensors", prompts))
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(lines)
    shapes = {tuple(sample["shape"]) for sample in samples}
    buckets = [f"{8 * width}x{8 * height}x{4 * frames - 3}" for frames, _, height, width in sorted(shapes)]
    size = {"buckets": buckets, "fps": 16} if len(buckets) > 1 else GEOMETRY
    contract = {"encoders": {"text_len": 32}, "size": size}
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(contract, samples),
        "num_samples": num_samples,
        "samples_sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "contract": contract,
        "shards": {name: (folder / name).stat().st_size},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


SMALL = WanConfig(num_layers=2, num_heads=4, head_dim=32, ffn_dim=192, text_dim=48, text_len=20, freq_dim=64)


def random_transformer(sizes: WanConfig = SMALL, dtype: torch.dtype = torch.float32, seed: int = 0) -> WanTransformer:
    """A transformer as training initialises it, but with biases, and an output projection that is not zero: its outputs
    are of order one and depend on everything."""
    transformer = WanTransformer(sizes)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            value = init_parameter(name, parameter.shape, sizes, functools.partial(generator, "cpu", seed))
            if value.ndim == 1 or name == "head.head.weight":
                value = value + 0.1 * torch.randn(value.shape, generator=generator("cpu", seed, "extra", name))
            parameter.copy_(value)
    return transformer.to(dtype)


def causal_model(transformer: WanTransformer, frames_per_block: int = 3, **keys: object) -> WanCausalModel:
    """The causal role around a transformer; `keys` of `RoleConfig`."""
    role = RoleConfig(name="wan_causal", flavor="tiny", frames_per_block=frames_per_block, **keys)
    role.check("student")
    return WanCausalModel(transformer, role, **common(transformer))


def bidirectional_model(transformer: WanTransformer) -> WanModel:
    """The bidirectional role around the same transformer."""
    return WanModel(transformer, RoleConfig(flavor="tiny"), **common(transformer))


def common(transformer: WanTransformer) -> dict[str, object]:
    dtype = transformer.patch_embedding.weight.dtype
    return {"dtype": dtype, "trainable": True, "schedule": ScheduleConfig(shift=5.0), "device": torch.device("cpu")}


def small_arguments(cache: Path, dump_folder: Path, **overrides: object) -> list[str]:
    """Command line of a small fine-tuning run on `make_cache`'s cache; keys `section__key`."""
    settings: dict[str, object] = {
        "job__dump_folder": dump_folder,
        "data__path": cache,
        "training__steps": 6,
        "training__local_batch_size": 2,
        "training__mixed_precision_param": "float32",
        "optimizer__lr": 1e-3,
        "lr_scheduler__warmup_steps": 2,
        "lr_scheduler__decay_type": "cosine",
        "ema__enable": True,
        "ema__decay": 0.8,
        "ema__start_step": 2,
        "checkpoint__interval": 3,
        "validation__enable": False,
        "metrics__log_freq": 1,
        "metrics__enable_tensorboard": False,
        **{f"data__{key}": value for key, value in GEOMETRY.items()},
        **overrides,
    }
    return [word for key, value in settings.items() for word in (f"--{key.replace('__', '.')}", str(value))]


ONE_LAYER = WanConfig(num_layers=1, num_heads=2, head_dim=32, ffn_dim=64, text_dim=64, text_len=32, freq_dim=64)


def one_layer(folder: Path) -> dict[str, object]:
    """Keys of `small_arguments` for a student of one layer, whose weights are written into `folder` unless they are there.
    Its checkpoint has 1.8 MB and a quarter of the tensors of tiny's, whose saving takes most of a small run's time."""
    start = folder / "one-layer"
    if not start.exists():
        save_transformer(random_transformer(ONE_LAYER).state_dict(), ONE_LAYER, start / "transformer")
        (start / "fvtitan.json").write_text(json.dumps({"text_len": ONE_LAYER.text_len}))
    return {"models.student.flavor": "", "models.student.init_from": start}


def causal_recipe(folder: Path, frames_per_block: int = 1) -> Path:
    """A TOML file, written into `folder`, of a tiny causal student trained by diffusion forcing."""
    path = folder / "causal.toml"
    path.write_text(
        f'[models.student]\nflavor = "tiny"\nname = "wan_causal"\nframes_per_block = {frames_per_block}\n'
        '[method]\nname = "dfsft"\n'
    )
    return path


def dmd2_recipe(folder: Path, models: dict[str, dict[str, object]] | None = None, **method: object) -> Path:
    """A TOML file, written into `folder`, of tiny roles under DMD2; `models` adds keys to roles, `method` to [method]."""
    roles: dict[str, dict[str, object]] = {
        "student": {"init_from": "tiny-wan"},
        "teacher": {"init_from": "tiny-wan", "trainable": False},
        "critic": {"init_from": "tiny-wan"},
    }
    for role, keys in (models or {}).items():
        roles[role] = {**roles[role], **keys}
    path = folder / "dmd2.toml"
    path.write_text(tomli_w.dumps({"models": roles, "method": {"name": "dmd2", **method}}))
    return path


def self_forcing_recipe(folder: Path, models: dict[str, dict[str, object]] | None = None, **method: object) -> Path:
    """A TOML file, written into `folder`, of tiny roles under self_forcing, with blocks of one frame; `models` adds keys to
    roles, `method` to [method]."""
    models = dict(models or {})
    models["student"] = {"name": "wan_causal", "frames_per_block": 1, **models.get("student", {})}
    return dmd2_recipe(folder, models, **{"name": "self_forcing", **method})


def kd_recipe(folder: Path, models: dict[str, dict[str, object] | None] | None = None, **method: object) -> Path:
    """A TOML file, written into `folder`, of tiny roles under kd, or kd_causal with blocks of one frame. `models` adds keys
    to roles, or removes a role that is None; `method` adds to [method]."""
    method = {
        "name": "kd",
        "teacher_path_cache": str(folder / "trajectories"),
        "num_trajectories": 12,
        "teacher_inference_steps": 4,
        "student_sample_steps": 2,
        **method,
    }
    blocks = {"name": "wan_causal", "frames_per_block": 1}
    roles: dict[str, dict[str, object]] = {
        "student": {"init_from": "tiny-wan", **(blocks if method["name"] == "kd_causal" else {})},
        "teacher": {
            "init_from": "tiny-wan",
            "trainable": False,
            **(blocks if method.get("teacher_forcing") else {}),
        },
    }
    for role, keys in (models or {}).items():
        roles[role] = {**roles.get(role, {}), **(keys or {})}
        if keys is None:
            del roles[role]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{method['name']}.toml"
    path.write_text(tomli_w.dumps({"models": roles, "method": method}))
    return path


def small_config(cache: Path, dump_folder: Path, **overrides: object) -> JobConfig:
    return load_config(small_arguments(cache, dump_folder, **overrides))


def train(arguments: list[str]) -> int:
    """Run train.py in this process; returns its exit status."""
    argv = sys.argv
    sys.argv = ["train.py", *arguments]
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as exit_:
        return int(exit_.code or 0)
    finally:
        sys.argv = argv
    raise AssertionError("train.py did not exit")


def run_program(main: Callable[[], int | None], *arguments: object) -> int:
    """`main` of a program, as its command line runs it, in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
        cli(main)
    return int(ended.value.code or 0)


@contextlib.contextmanager
def stopping(method: type, step: int) -> Iterator[None]:
    """Inside, a training in this process ends at the start of the first phase of `step`, as by Ctrl-C that nobody hears."""
    step_of = method.single_train_step

    def stops(self, batch: dict[str, Any], current: int, role: str):
        if current == step:
            raise KeyboardInterrupt
        return step_of(self, batch, current, role)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(method, "single_train_step", stops)
        yield


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, full, by name; non-tensor state under its file's name as JSON text."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, torch.Tensor] = {}
    _load_state_dict(state, FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    flat: dict[str, torch.Tensor] = {}

    def flatten(prefix: str, tree) -> None:
        for key, value in tree.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            flatten(name, value) if isinstance(value, dict) else flat.__setitem__(name, value)

    flatten("", state)
    return flat
