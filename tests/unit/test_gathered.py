"""Several forwards and backwards in a row gather a sharded network once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from fvtitan import plan
from fvtitan.config import JobConfig
from fvtitan.distributed.mesh import Mesh
from fvtitan.models import build_roles
from fvtitan.models.base import Conditioning, ModelBase
from tests.helpers import make_cache, self_forcing_recipe, small_config


def configured(folder: Path, reshard: bool, mode: str) -> JobConfig:
    cache = folder / "cache" if (folder / "cache").exists() else make_cache(folder / "cache")
    keys = {"job__config_file": self_forcing_recipe(folder, gradient_mode=mode)}
    keys["parallelism__fsdp_reshard_after_forward"] = reshard
    return small_config(cache, folder, **keys)


def velocity(model: ModelBase) -> torch.Tensor:
    sizes, rng = model.transformer.cfg, torch.Generator().manual_seed(0)
    text = torch.randn(1, sizes.text_len, sizes.text_dim, generator=rng)
    x = torch.randn(1, 3, 16, 4, 4, generator=rng)
    return model.predict_velocity(x, torch.full((1, 3), 0.5), Conditioning(text))


@pytest.mark.parametrize("reshard", [True, False])
def test_parameters_are_sharded_again_afterwards(tmp_path, single_process_group, reshard):
    """So what is written then is seen; and a forward frees what it gathered as it is configured to."""
    cfg = configured(tmp_path, reshard, "direct")
    student = build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu"))["student"]
    weight = student.transformer.blocks[0].ffn[0]
    with student.gathered():
        for _ in range(2):
            before = velocity(student)
            before.square().mean().backward()
            assert not isinstance(weight.weight, DTensor)
    assert isinstance(weight.weight, DTensor)
    with torch.no_grad():
        for parameter in student.trained_parameters().values():
            parameter.add_(0.1)
    assert not torch.equal(velocity(student), before)
    assert isinstance(weight.weight, DTensor) == reshard


@pytest.mark.slow
def test_a_replay_gathers_once_for_all_its_blocks(tmp_path):
    """However the student is built. All-gathers of 2 ranks in its phase, 5 a network: rollout, replay, critic, teacher; the
    latter twice when it does not keep what it gathers for the second branch."""
    calls = {}
    for reshard in (True, False):
        cfg = configured(tmp_path, reshard, "replay")
        with plan.fake_job(2):
            phases = plan.make_plan(cfg, 2, plan.Rates(989e12, 300e9, 50e9)).phases
        calls[reshard] = round(phases["student"].calls["all-gather"])
    assert calls == {True: 5 * 5, False: 4 * 5}
