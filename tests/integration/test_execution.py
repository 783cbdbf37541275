"""How a step is executed changes no number: activation checkpointing and compilation, for every method, under FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fvtitan.data.dataloader import BatchStream
from fvtitan.distributed.mesh import Mesh
from fvtitan.methods import METHODS
from fvtitan.models import build_roles
from tests.helpers import causal_recipe, dmd2_recipe, make_cache, self_forcing_recipe, small_config

RECIPES = {
    "finetune": lambda folder: "",
    "dfsft": lambda folder: causal_recipe(folder, 3),
    "dfsft, teacher forcing": causal_recipe,
    "dmd2": dmd2_recipe,
    "self_forcing, direct": self_forcing_recipe,
    "self_forcing, replay": lambda folder: self_forcing_recipe(folder, gradient_mode="replay"),
}
TEACHER_FORCING = {"method__teacher_forcing": True}


def run(folder: Path, name: str, **keys: Any) -> dict[str, Tensor]:
    """Losses and whole gradients of the first step's phases."""
    torch._dynamo.reset()
    cache = folder / "cache" if (folder / "cache").exists() else make_cache(folder / "cache")
    keys |= {"job__config_file": RECIPES[name](folder), "models.student.init_from": "tiny-wan"}
    keys |= TEACHER_FORCING if "teacher forcing" in name else {}
    cfg = small_config(cache, folder, **{key: value for key, value in keys.items() if value != ""})
    method = METHODS[cfg.method.name](cfg=cfg, role_models=build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu")))
    method.on_train_start()
    batches = BatchStream(method.data, global_batch_size=2, local_batch_size=2, seed=0)
    found: dict[str, Tensor] = {}
    for role in method.phases(1):
        loss, _ = method.single_train_step(next(batches), 1, role)
        loss.backward()
        found[f"{role} loss"] = loss.detach()
        for parameter, value in method.role_modules[role].named_parameters():
            found[f"{role} {parameter}"] = value.grad.full_tensor()
    return found


QUICK = ("finetune", "dmd2", "self_forcing, direct")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_checkpointing_changes_no_bit(tmp_path, single_process_group, name):
    expected = run(tmp_path, name)
    assert sum(value.norm() > 0 for value in expected.values()) > 0.9 * len(expected)
    for mode in ("selective", "full"):
        found = run(tmp_path, name, activation_checkpoint__mode=mode)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], mode


def check_compiled(folder: Path, name: str, mode: str) -> None:
    keys = {"compile__enable": True, "compile__backend": "aot_eager", "activation_checkpoint__mode": mode}
    expected, found = run(folder, name), run(folder, name, **keys)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0 and found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-5 * value.norm() + 1e-9, (key, value.norm())


@pytest.mark.parametrize("name", ["finetune", pytest.param("dmd2", marks=pytest.mark.slow)])
def test_compilation_changes_no_number(tmp_path, single_process_group, name):
    check_compiled(tmp_path, name, "selective")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("name", RECIPES)
def test_compilation_changes_no_number_of_any_method(tmp_path, single_process_group, name, mode):
    check_compiled(tmp_path, name, mode)
