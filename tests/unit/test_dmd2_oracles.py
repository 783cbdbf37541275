"""DMD2 against closed forms and invariants, and that the same checks fail when the method is broken.

The numbers in headings are those of the list of oracles; the checks are in tests/dmd2_oracles.py.
"""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fvtitan import flow_matching as fm
from fvtitan.components.ema import EMA, EMAConfig
from fvtitan.methods import dmd2
from fvtitan.methods.dmd2 import DMD2Method
from fvtitan.models.wan import weights
from fvtitan.models.wan.transformer import WanConfig
from tests import dmd2_oracles as oracles
from tests import helpers
from tests.helpers import ROOT, dmd2_recipe, make_cache, random_transformer, small_arguments

RING_UPDATES = 150  # of the oracle's 2000: enough from a network that was pretrained on exact velocities


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> SimpleNamespace:
    """Where the toys live: a cache for its prompts, a folder, and weights of a small Wan for each role."""
    folder = tmp_path_factory.mktemp("dmd2")
    sizes = WanConfig(num_layers=1, num_heads=2, head_dim=16, ffn_dim=48, text_dim=64, text_len=32, freq_dim=32)
    models: dict[str, dict[str, object]] = {}
    for seed, role in enumerate(DMD2Method.roles):
        start = folder / role
        weights.save_transformer(random_transformer(sizes, seed=seed).state_dict(), sizes, start / "transformer")
        (start / "fvtitan.json").write_text(json.dumps({"text_len": sizes.text_len}))
        models[role] = {"init_from": str(start)}
    return SimpleNamespace(cache=make_cache(folder / "cache"), folder=folder / "runs", models=models)


@pytest.fixture(scope="module")
def pretrained(toys):
    return oracles.pretrained_ring()


def ring(toys, pretrained, seed: int = 0, updates: int = RING_UPDATES, **keys: Any) -> dict[str, float]:
    method = oracles.ring_method(toys.cache, toys.folder, seed=seed, updates=updates, pretrained=pretrained, **keys)
    return oracles.train_on_ring(method, updates, decay=0.95 if updates == RING_UPDATES else 0.98)


def check_ring(toys, pretrained, **keys: Any) -> None:
    found = ring(toys, pretrained, **keys)
    assert found["in_mode"] >= 0.93 and found["min_share"] >= 0.08 and found["sw1"] <= 0.10, found


def check_training(toys, name: str, *, steps: int = 20) -> None:
    """train.py itself: order, what moves, the moving average."""
    folder = toys.folder / name.replace(" ", "-")
    folder.mkdir(parents=True)
    keys = {"training__steps": steps, "ema__start_step": 1, "ema__decay": 0.8, "checkpoint__enable": False}
    recipe = {"job__config_file": dmd2_recipe(folder, toys.models), "training__seed": 3}
    with pytest.MonkeyPatch.context() as patch:
        record = oracles.recorded(small_arguments(toys.cache, folder / "run", **recipe, **keys), patch)
    oracles.check_update_schedule(record, steps)
    oracles.check_average(record, 0.8)


# ----------------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_the_gradient_is_that_of_the_divergence(toys, sigma):
    """To 5 standard errors of 4e6 draws."""
    oracles.check_gradient(toys.cache, toys.folder, sigma)


def test_the_loss_has_the_gradient_as_its_derivative():
    oracles.check_loss_identity()


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_small_gradients_survive_bfloat16_videos(scale):
    oracles.check_small_gradients_survive(scale)


def test_the_normaliser_is_a_samples_own():
    oracles.check_normaliser_is_per_sample()


def test_the_normaliser_has_a_floor():
    """A video that equals the teacher's: a finite gradient."""
    x = torch.ones(1, 1, 1, 1, 1)
    gradient = dmd2.distribution_matching_gradient(x, x, x + 1e-3)
    assert float(gradient.flatten()[0]) == pytest.approx(1e3, rel=1e-3)
    assert not dmd2.distribution_matching_gradient(x, x, x).any()


def test_gradients_and_targets_keep_float64():
    x = torch.randn(2, 1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    gradient = dmd2.distribution_matching_gradient(x.detach(), x.detach() - 1, x.detach() + 1e-12)
    assert gradient.dtype == torch.float64 and dmd2.distribution_matching_loss(x, gradient).dtype == torch.float64
    half = torch.randn(2, 1, 3, 1, 1).bfloat16()
    assert dmd2.distribution_matching_gradient(half, half + 1, half - 1).dtype == torch.float32


@pytest.mark.parametrize(("guidance", "mean"), [(3.0, 4.0), (4.0, 5.5)])
def test_where_guidance_leads(toys, guidance, mean):
    """4.0 at guidance 3 in u + g (c - u); 5.5 is the authors' 3 in c + g' (c - u), here 4."""
    assert -0.5 + guidance * 1.5 == mean
    oracles.check_guidance_fixed_point(toys.cache, toys.folder, guidance)


def test_the_normaliser_does_not_move_the_fixed_point(toys):
    oracles.check_guidance_fixed_point(toys.cache, toys.folder, 3.0, normaliser=True)


def test_the_levels_at_which_scores_are_asked(toys):
    oracles.check_score_levels(toys.cache, toys.folder)


def test_the_rungs_are_exact(toys):
    oracles.check_ladder(toys.cache, toys.folder)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_a_ring_of_gaussians(toys, pretrained, seed):
    """One step: all modes in their shares."""
    check_ring(toys, pretrained, seed=seed)


def test_a_ring_of_gaussians_in_four_steps(toys, pretrained):
    """Backward simulation, where balance is not asserted."""
    found = ring(toys, pretrained, steps=oracles.AUTHORS)
    assert found["modes"] >= 6 and found["in_mode"] >= 0.93, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_ring_of_gaussians_at_full_length(toys, pretrained, seed):
    check_ring(toys, pretrained, seed=seed, updates=2000)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0])
def test_the_exact_critic_costs_the_floor(toys, tau):
    published = {0.5: 0.4941, 1.0: 1.4212, 2.0: 4.0993}
    assert oracles.critic_floor(tau) == pytest.approx(published.get(tau, 0.0502), rel=1e-3)
    oracles.check_critic_floor(toys.cache, toys.folder, tau)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_a_trained_critic_reaches_the_floor(toys, tau):
    oracles.check_critic_learns(toys.cache, toys.folder, tau)


def test_the_gradient_is_that_of_the_last_forward_alone(toys):
    oracles.check_gradient_of_the_last_forward_alone(toys.cache, toys.folder)


def test_all_ranks_leave_at_the_same_rung(toys):
    """With real processes in integration/test_dmd2.py"""
    oracles.check_exit_is_shared(toys.cache, toys.folder)


def test_rungs_are_drawn_uniformly(toys):
    oracles.check_exit_is_uniform(toys.cache, toys.folder)


def test_who_is_trained_when(toys):
    """20 iterations of train.py, 4 updates of the student, 20 of the critic, 4 of the moving average."""
    check_training(toys, "schedule")


def test_600_steps_are_120_600_and_80_updates(toys):
    """The average starts after step 200. The schedules of the learning rates are as long as their roles' updates."""
    method = oracles.walking_method(toys.cache, toys.folder, training__steps=600)
    assert method.cfg.method.student_update_interval == 5
    updates = {"student": 0, "critic": 0}
    ema = EMA(method.student, EMAConfig(enable=True, start_step=200))
    for step in range(1, 601):
        for role in method.phases(step):
            updates[role] += 1
            if role == "student":
                ema.update(step)
    assert updates == {"student": 120, "critic": 600} and ema.num_updates == 80
    assert {role: method.total_updates(role) for role in updates} == updates


# --------------------------------------------------------------------------------------------------------- mutations


def negative(gradient, *args):
    return -gradient(*args)


def batch_wide(gradient, generated, real, fake):
    return (fake - real) / (generated - real).abs().mean()


def rounded_target(loss, generated, gradient):
    target = (generated - gradient.to(generated.dtype)).detach()
    return 0.5 * (generated.float() - target.float()).square().mean()


def other_guidance(guide, conditional, unconditional, scale):
    return conditional + scale * (conditional - unconditional)


def whole_timesteps(shift_sigma, u, shift):
    sigma = shift_sigma(u, shift)
    return (1000 * sigma).round() / 1000 if isinstance(sigma, torch.Tensor) else round(1000 * sigma) / 1000


def from_the_global_generator(exit_rung, self, step, role):
    return int(torch.randint(len(self.sigmas), ()))


def one_to_four(phases, self, step):
    return ("student",) if "student" in phases(self, step) else ("critic",)


def critic_first(phases, self, step):
    return phases(self, step)[::-1]


def real_videos(generate, self, batch, prompts, streams, step, role):
    made = generate(self, batch, prompts, streams, step, role)
    return oracles.ring(len(made), step) if role == "critic" else made


def never(critic_step, self, batch, step):
    loss, metrics = critic_step(self, batch, step)
    return 0 * loss, metrics


def data_minus_noise(velocity, x0, noise):
    return x0 - noise


MUTATIONS = {  # what breaks: (where, name, how), the checks that must see it
    "sign of the gradient": ((dmd2, "distribution_matching_gradient", negative), ["gradient", "ring"]),
    "guidance in the other form": ((dmd2, "guide", other_guidance), ["guidance"]),
    "one normaliser for the batch": ((dmd2, "distribution_matching_gradient", batch_wide), ["normaliser"]),
    "pseudo-target in bfloat16": ((dmd2, "distribution_matching_loss", rounded_target), ["small 1e-2", "small 1e-3"]),
    "critic trained on data": ((DMD2Method, "generate", real_videos), ["ring"]),
    "critic not trained": ((DMD2Method, "critic_step", never), ["ring"]),
    "critic's target is x0 - eps": ((fm, "velocity", data_minus_noise), ["critic"]),
    "whole timesteps": ((fm, "shift_sigma", whole_timesteps), ["levels", "ladder"]),
    "each rank leaves where it likes": ((DMD2Method, "exit_rung", from_the_global_generator), ["exit"]),
    "gradient through all rungs": ((DMD2Method, "simulate", None), ["last forward"]),
    "student instead of the critic": ((DMD2Method, "phases", one_to_four), ["training"]),
    "critic before the student": ((DMD2Method, "phases", critic_first), ["training"]),
    "average moved at every phase": (("train.py", ' and role == "student"', ""), ["training"]),
    "average moved by steps": (
        ("train.py", 'ema is not None and role == "student"', 'ema is not None and role == "critic"'),
        ["training"],
    ),
    "gradients of the student left over": (
        ("train.py", "optimizer.zero_grad()", "optimizer.zero_grad() if role == 'critic' else None"),
        ["training"],
    ),
}


def apply(mutation: tuple[Any, str, Any], patch: pytest.MonkeyPatch, folder) -> None:
    where, name, how = mutation
    if where == "train.py":
        source = (ROOT / "train.py").read_text()
        assert source.count(name) == 1
        (folder / "train.py").write_text(source.replace(name, how))
        patch.setattr(helpers, "ROOT", folder)
        return
    exact = getattr(where, name)
    how = exact.__wrapped__ if how is None else functools.partial(how, exact)
    if isinstance(where, type):
        patch.setattr(where, name, lambda *args, **keys: how(*args, **keys))
    else:
        patch.setattr(where, name, how)


@pytest.mark.parametrize(
    ("mutation", "check"), [(m, check) for m, (_, checks) in MUTATIONS.items() for check in checks]
)
def test_mutations_are_seen(toys, pretrained, tmp_path, monkeypatch, mutation, check):
    """The check that holds on the method (above) fails on the broken method."""
    checks = {
        "gradient": lambda: oracles.check_gradient(toys.cache, toys.folder, 0.5, 100_000),
        "ring": lambda: check_ring(toys, pretrained),
        "guidance": lambda: oracles.check_guidance_fixed_point(toys.cache, toys.folder, 3.0),
        "normaliser": oracles.check_normaliser_is_per_sample,
        "small 1e-2": lambda: oracles.check_small_gradients_survive(1e-2),
        "small 1e-3": lambda: oracles.check_small_gradients_survive(1e-3),
        "critic": lambda: oracles.check_critic_floor(toys.cache, toys.folder, 0.5),
        "levels": lambda: oracles.check_score_levels(toys.cache, toys.folder),
        "ladder": lambda: oracles.check_ladder(toys.cache, toys.folder),
        "exit": lambda: oracles.check_exit_is_shared(toys.cache, toys.folder),
        "last forward": lambda: oracles.check_gradient_of_the_last_forward_alone(toys.cache, toys.folder),
        "training": lambda: check_training(toys, mutation, steps=11),
    }
    apply(MUTATIONS[mutation][0], monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        checks[check]()
