"""The plan of a job against the job: memory against torch's MemTracker, collectives against FSDP2's arithmetic, exit
statuses."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker

from fvtitan import plan
from fvtitan.config import JobConfig
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import clip_grad_norm
from fvtitan.methods import METHODS
from fvtitan.models import build_roles
from fvtitan.models.wan import transformer
from fvtitan.models.wan.transformer import WanConfig
from tests.helpers import dmd2_recipe, make_cache, small_config

MID = WanConfig(
    num_layers=7, num_heads=4, head_dim=64, ffn_dim=1024, text_dim=64, text_len=32
)  # deeper than what is run
RATES = plan.Rates(989e12, 300e9, 50e9)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("plan") / "cache", 8)


@pytest.fixture
def flavors(monkeypatch):
    monkeypatch.setitem(transformer.FLAVORS, "mid", MID)


def configured(cache: Path, folder: Path, method: str, flavor: str, mode: str) -> JobConfig:
    """Eight videos of 9 latent frames of 64 x 64 pixels: activations outweigh the rest, as they do at scale."""
    roles = ("student", "teacher", "critic") if method == "dmd2" else ("student",)
    keys = {
        "data__num_frames": 33,
        "data__height": 64,
        "data__width": 64,
        "training__local_batch_size": 2,
        "training__global_batch_size": 2,
        "activation_checkpoint__mode": mode,
        "ema__enable": False,
        **{f"models.{role}.flavor": flavor for role in roles},
    }
    if method == "dmd2":
        keys["job__config_file"] = dmd2_recipe(folder, dict.fromkeys(roles, {"init_from": "x"}), denoising_steps=[1000])
    cfg = small_config(cache, folder / "run", **keys)
    for role in roles:
        cfg.models[role].init_from = ""  # the weights do not matter here
    return cfg


class NoModules:
    """In place of MemTracker's statistics by module, which fail in forwards without gradient; totals do not need them."""

    is_bw = False

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def register_user_hooks(self, *hooks: object) -> None: ...

    def clear_user_hooks(self) -> None: ...


def tracked_peak(cfg: JobConfig) -> float:
    """Bytes at the worst moment of a real optimizer step, as MemTracker sees them; optimizers have made their states before."""
    models = build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu"))
    method = METHODS[cfg.method.name](cfg=cfg, role_models=models)
    method.on_train_start()
    frames, height, width = cfg.data.latent_size()
    sample = {"latents": torch.zeros(frames, 16, height, width), "prompt_embeds": torch.zeros(32, 64)}
    samples = plan._Samples(cfg, plan.role_sizes(cfg)["student"])
    batch = samples.batch(cfg)
    assert batch["latents"].shape[1:] == sample["latents"].shape

    def step() -> None:
        for role in method.phases(1):
            loss, _ = method.single_train_step(batch, 1, role)
            loss.backward()
            del loss
            clip_grad_norm(method.get_grad_clip_targets(role), 1.0)
            method.optimizers[role].step()
            method.optimizers[role].zero_grad()

    step()
    gc.collect()
    tracker = MemTracker()
    tracker._mod_tracker = NoModules()
    tracker.track_external(*(model.transformer for model in models.values()), *method.optimizers.values())
    with tracker:
        step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("flavor", ["tiny", "mid"])
@pytest.mark.parametrize("method", ["finetune", "dmd2"])
def test_memory_is_what_a_real_step_takes(cache, tmp_path, flavors, method, flavor, mode):
    cfg = configured(cache, tmp_path, method, flavor, mode)
    with plan.fake_job(1):
        planned = plan.make_plan(cfg, 1, RATES).peak
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        peak = tracked_peak(cfg)
    finally:
        dist.destroy_process_group()
    print(method, flavor, mode, planned / 2**20, peak / 2**20, planned / peak)
    assert planned == pytest.approx(peak, rel=0.1)
