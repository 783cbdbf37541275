"""No method waits for the device in a step but once: for the gradient norm, before the optimizer's update."""

from __future__ import annotations

import pytest
import torch

from fvtitan.data.dataloader import BatchStream
from fvtitan.methods import METHODS
from tests.helpers import (
    causal_recipe,
    dmd2_recipe,
    kd_recipe,
    make_cache,
    self_forcing_recipe,
    small_arguments,
    train,
)
from tests.host_reads import HostReads

EVERY_STEP = {"student_update_interval": 1}
RECIPES = {
    "finetune": lambda folder: "",
    "dfsft": causal_recipe,
    "kd": kd_recipe,
    "kd_causal": lambda folder: kd_recipe(folder, name="kd_causal"),
    "dmd2": lambda folder: dmd2_recipe(folder, **EVERY_STEP),
    "dmd2, from data": lambda folder: dmd2_recipe(folder, rollout="data", **EVERY_STEP),
    "self_forcing, direct": lambda folder: self_forcing_recipe(folder, context_noise=20.0, **EVERY_STEP),
    "self_forcing, replay": lambda folder: self_forcing_recipe(folder, gradient_mode="replay", **EVERY_STEP),
}
STEPS = 3


QUICK = ("finetune", "dmd2", "self_forcing, replay")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_the_only_host_sync_of_an_optimizer_step_is_its_gradient_norm(tmp_path, monkeypatch, name):
    keys = {"job__config_file": recipe} if (recipe := RECIPES[name](tmp_path)) else {}
    arguments = small_arguments(
        make_cache(tmp_path / "cache"),
        tmp_path / "run",
        training__steps=STEPS,
        training__global_batch_size=4,  # two micro-batches
        metrics__log_freq=100,  # the first and the last step are logged
        checkpoint__enable=False,
        schedule__sigma_sampling="logit_normal",
        **keys,
    )
    if name.startswith("dfsft"):
        arguments += ["--method.teacher_forcing", "true", "--method.context_noise_max", "20.0"]
    reads = HostReads(monkeypatch)
    method, phases = METHODS[name.split(",")[0]], []
    step_of, following = method.single_train_step, BatchStream.__next__

    def single_train_step(self, batch, step, role):
        if reads.label != (step, role):
            phases.append((step, role))
        reads.label = (step, role)
        reads.on_host(batch[key] for key in ("positions", "sample_indices", "sample_passes"))
        return step_of(self, batch, step, role)

    def next_batch(self):
        with reads.paused():  # the loader's work is on the host
            return following(self)

    monkeypatch.setattr(method, "single_train_step", single_train_step)
    monkeypatch.setattr(BatchStream, "__next__", next_batch)
    with reads:
        assert train(arguments) == 0
    roles = METHODS[name.split(",")[0]].roles
    inner = [(step, role) for step, role in phases if 1 < step < STEPS]
    assert len(inner) == (STEPS - 2) * (2 if "critic" in roles else 1)
    for phase in inner:
        found = [(what, where) for label, what, where in reads.found if label == phase]
        assert len(found) == 1 and "train.py" in found[0][1], (phase, found)


def test_reads_are_seen(monkeypatch):
    """What the test above counts."""
    x, bad = torch.arange(4.0), []
    actions = [
        lambda: x.sum().item(),
        lambda: float(x[0]),
        lambda: bool(x[0] > 1),
        lambda: x.tolist(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        lambda: x.unique(),
        lambda: x.repeat_interleave(x.long()),
        lambda: x.numpy(),
    ]
    for number, action in enumerate(actions):
        with HostReads(monkeypatch) as reads:
            action()
        if not reads.found:
            bad.append(number)
    assert bad == []
    with HostReads(monkeypatch) as reads:
        torch.isfinite(x).all(), x[x.long()], x.where(x > 1, 0.0), x.cumsum(0)
    assert reads.found == []
