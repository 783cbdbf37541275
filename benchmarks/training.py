"""Small real inputs for whole training steps: a latent cache in the real format, a configuration, a method with its data."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import models
from benchmarks.harness import Setting
from fvtitan.config import JobConfig, load_config
from fvtitan.data.dataloader import BatchStream
from fvtitan.data.latent_cache import FORMAT_VERSION, fingerprint, stack_text, text_key
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import clip_grad_norm, close_distributed, init_distributed
from fvtitan.methods import METHODS
from fvtitan.methods.base import TrainingMethod
from fvtitan.methods.finetune import FineTuneMethod
from fvtitan.models import build_roles
from fvtitan.models.wan import weights
from fvtitan.models.wan.model import WanModel
from fvtitan.models.wan.transformer import FLAVORS

FLAVOR = "benchmark"
FLAVORS[FLAVOR] = models.CPU_SIZES


def write_cache(folder: Path, latents: tuple[int, ...], text_dim: int, num_samples: int = 16) -> Path:
    """A cache of random latents `[T, C, H, W]` and prompt embeddings, as `fvtitan.preprocess` would have written it."""
    folder.mkdir(parents=True)
    rng, shard = torch.Generator().manual_seed(0), "shard-00000.safetensors"
    tensors, samples = {}, []
    for i in range(num_samples):
        name, caption = f"latents.{i:05d}", f"caption {i}"
        tensors[name] = torch.randn(latents, generator=rng).bfloat16()
        tensors[text_key(caption)] = torch.randn(12 + i, text_dim, generator=rng).bfloat16()
        sample = {"sample_id": f"{i}.mp4", "caption": caption, "shard": shard, "key": name, "shape": list(latents)}
        samples.append({**sample, "source_sha256": str(i)})
    save_file(tensors, folder / shard)
    save_file(stack_text([torch.randn(n, text_dim, generator=rng) for n in (1, 4)]), folder / "prompts.safetensors")
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    contract = {"encoders": {"text_len": models.CPU_SIZES.text_len}, "size": clip_size(latents)}
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint(contract, samples),
        "num_samples": num_samples,
        "contract": contract,
        "shards": {shard: (folder / shard).stat().st_size},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def clip_size(latents: tuple[int, ...]) -> dict[str, int]:
    """[data]'s keys for latents `[T, C, H, W]`."""
    frames, _, height, width = latents
    return {"num_frames": 4 * (frames - 1) + 1, "height": 8 * height, "width": 8 * width, "fps": 16}


FINE_TUNING = """
[models.student]
flavor = "{flavor}"
[method]
name = "finetune"
"""


def arguments(
    folder: Path, latents: tuple[int, ...], setting: Setting, recipe: str = FINE_TUNING, **keys: Any
) -> list[str]:
    """train.py's command line for a recipe on random latents, its cache in `folder`; keys `section__key`. In the recipe,
    `{flavor}` is the network's, `{weights}` a folder of random ones."""
    flavor = "1.3B" if setting.is_gpu else FLAVOR
    if not (folder / "cache").exists():
        write_cache(folder / "cache", latents, FLAVORS[flavor].text_dim)
    path = folder / "recipe.toml"
    if "{weights}" in recipe and not (folder / "weights").exists():
        cfg = FLAVORS[flavor]
        random = models.transformer(cfg, setting)
        weights.save_transformer(
            {n: p.detach() for n, p in random.named_parameters()}, cfg, folder / "weights/transformer"
        )
        (folder / "weights/fvtitan.json").write_text(json.dumps({"text_len": cfg.text_len}))
    path.write_text(recipe.format(flavor=flavor, weights=folder / "weights"))
    settings = {
        "job__config_file": path,
        "job__dump_folder": folder / "run",
        "data__path": folder / "cache",
        "training__mixed_precision_param": "bfloat16" if setting.is_gpu else "float32",
        "checkpoint__enable": False,
        "validation__enable": False,
        "metrics__enable_tensorboard": False,
        **{f"data__{key}": value for key, value in clip_size(latents).items()},
        **keys,
    }
    return [word for key, value in settings.items() for word in (f"--{key.replace('__', '.')}", str(value))]


@contextlib.contextmanager
def process_group(cfg: JobConfig) -> Iterator[torch.device]:
    device = init_distributed(cfg.comm)
    try:
        yield device
    finally:
        close_distributed()


def build_method(
    cfg: JobConfig, device: torch.device, method_class: type[TrainingMethod] | None = None
) -> TrainingMethod:
    """The method with sharded roles, as train.py builds it; `method_class` takes the place of the configured one."""
    roles = build_roles(cfg, Mesh(cfg, device.type), device)
    method = (method_class or METHODS[cfg.method.name])(cfg=cfg, role_models=roles)
    method.on_train_start()
    return method


@contextlib.contextmanager
def training(
    latents: tuple[int, ...], setting: Setting, recipe: str = FINE_TUNING, **keys: Any
) -> Iterator[tuple[TrainingMethod, dict[str, Any]]]:
    """(method, one batch) of a run; the arguments of `arguments`."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(arguments(Path(folder), latents, setting, recipe, **keys))
        with process_group(cfg) as device:
            method = build_method(cfg, device)
            batches = BatchStream(
                method.data, global_batch_size=1, local_batch_size=1, seed=0, pin_memory=setting.is_gpu
            )
            yield method, next(batches)


def bare_step(method: TrainingMethod, batch: dict[str, Any], step: int, role: str = "student") -> Tensor:
    """One update in five lines: what any training loop must do."""
    loss, _ = method.single_train_step(batch, step, role)
    loss.backward()
    clip_grad_norm(method.get_grad_clip_targets(role), 1.0)
    method.optimizers[role].step()
    method.optimizers[role].zero_grad()
    return loss


def unsharded(sharded: TrainingMethod) -> TrainingMethod:
    """The same method around a copy of the network that is not sharded."""
    student = sharded.student
    copy = models.unsharded(student.transformer)
    common = {"dtype": student.dtype, "trainable": True, "schedule": student.schedule, "device": student.device}
    role = WanModel(copy, sharded.cfg.models["student"], **common)
    method = FineTuneMethod(cfg=sharded.cfg, role_models={"student": role})
    method.on_train_start()
    return method
