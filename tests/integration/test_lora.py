"""LoRA and shared bases in train.py: stops, ranks, checkpoints, and what starts from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fvtitan.components.metrics import read_metrics
from fvtitan.components.rng import generator
from fvtitan.config import load_config
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import local_tensor
from fvtitan.errors import UserError
from fvtitan.generate import load_model
from fvtitan.methods.dmd2 import DMD2Method
from fvtitan.models import build_roles
from fvtitan.models.base import Conditioning
from fvtitan.models.wan import weights
from fvtitan.models.wan.transformer import WanConfig
from tests.helpers import (
    dmd2_recipe,
    kd_recipe,
    make_cache,
    random_transformer,
    read_checkpoint,
    self_forcing_recipe,
    small_arguments,
    stopping,
    train,
)
from tests.integration.dmd2_worker import watch
from tests.integration.exact_worker import launch, output, records

SIZES = WanConfig(num_layers=2, num_heads=2, head_dim=16, ffn_dim=48, text_dim=64, text_len=32, freq_dim=32)
RANK = 3  # which two ranks do not divide
LORA = {"rank": RANK, "alpha": 6.0}
SHARED = {"init_from": "", "share_base_with": "teacher", "lora": LORA}


def save_network(folder: Path, seed: int) -> str:
    weights.save_transformer(random_transformer(SIZES, seed=seed).state_dict(), SIZES, folder / "transformer")
    (folder / "fvtitan.json").write_text(json.dumps({"text_len": SIZES.text_len}))
    return str(folder)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    return SimpleNamespace(cache=make_cache(folder / "cache", 10), teacher=save_network(folder / "teacher", 1))


def arguments_of(setting, folder: Path, *, sharing: bool = True, recipe=dmd2_recipe, **overrides: Any) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    role = SHARED if sharing else {"init_from": setting.teacher, "lora": LORA}
    models = {"student": role, "critic": role, "teacher": {"init_from": setting.teacher}}
    keys = {
        "job__config_file": recipe(folder, models),
        "training__steps": 8,
        "training__global_batch_size": 4,
        "optimizer__lr": 1e-2,
        "lr_scheduler__decay_type": "constant",
        "checkpoint__interval": 4,
        "checkpoint__keep_latest_k": 0,
        "ema__start_step": 0,
        **overrides,
    }
    return small_arguments(setting.cache, folder / "run", **keys)


def values_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock and the machine decide."""
    rows = read_metrics(folder / "run/metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def checkpoint(folder: Path, step: int = 8) -> Path:
    return folder / f"run/checkpoint/step-{step}"


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory):
    """8 steps of DMD2 on one base: the student is trained in steps 1 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(arguments_of(setting, folder)) == 0
    return folder


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_holds_adapters_and_the_identity_of_the_base(setting, whole):
    tensors = read_checkpoint(checkpoint(whole))
    layers = {
        f"blocks.{i}.{layer}"
        for i in range(SIZES.num_layers)
        for layer in (*(f"{a}_attn.{m}" for a in ("self", "cross") for m in "qkvo"), "ffn.0", "ffn.2")
    }
    expected = {f"{layer}.lora_{matrix}" for layer in layers for matrix in "AB"}
    for prefix in ("roles.student.transformer", "roles.critic.transformer", "ema.student"):
        assert {n.removeprefix(f"{prefix}.") for n in tensors if n.startswith(f"{prefix}.")} == expected
    for layer in layers:  # all have moved, and the student's average behind it
        student, critic, average = (
            tensors[f"{state}.{layer}.lora_B"]
            for state in ("roles.student.transformer", "roles.critic.transformer", "ema.student")
        )
        assert critic.any() and student.any() and 0 < (average - student).norm() < student.norm()
    state = json.loads((checkpoint(whole) / "state.json").read_text())["states"]
    identities = {name: value["sha256"] for name, value in state.items() if name.startswith("identity.")}
    assert identities.keys() == {f"identity.{role}" for role in ("student", "critic", "teacher")}
    assert len(set(identities.values())) == 1
    size = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if name.startswith("roles."))
    base = sum(p.numel() * 4 for p in random_transformer(SIZES).parameters())
    widths = 8 * 2 * SIZES.dim + 2 * (SIZES.dim + SIZES.ffn_dim)  # in and out of a block's layers
    assert size == 2 * 4 * RANK * widths * SIZES.num_layers and size < base / 2


@pytest.mark.faults
@pytest.mark.parametrize("stop", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_bit_for_bit(setting, whole, tmp_path, stop):
    """Fault 2: DMD2."""
    with stopping(DMD2Method, stop):
        train(arguments_of(setting, tmp_path))
    assert train(arguments_of(setting, tmp_path)) == 0
    assert_same(tmp_path, whole)


def assert_same(folder: Path, expected: Path) -> None:
    ours, theirs = (read_checkpoint(checkpoint(f)) for f in (folder, expected))
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []
    states = [json.loads((checkpoint(f) / "state.json").read_text()) for f in (folder, expected)]
    assert states[0] == states[1] and values_of(folder) == values_of(expected)


def test_sharing_is_a_matter_of_memory(setting, whole, tmp_path):
    """Bit for bit the run whose roles have networks of their own, and a run may begin so and go on otherwise."""
    assert train(arguments_of(setting, tmp_path, sharing=False)) == 0
    assert_same(tmp_path, whole)
    shutil.rmtree(checkpoint(tmp_path))
    assert train(arguments_of(setting, tmp_path)) == 0
    assert_same(tmp_path, whole)


def test_gradients_of_micro_batches_wait_for_their_own_role(setting, whole, tmp_path):
    """Reduced once a step, while the same network answers for the other roles in between: the same training."""
    keys = {"training__steps": 6, "parallelism__defer_grad_sync": True, "activation_checkpoint__mode": "full"}
    assert train(arguments_of(setting, tmp_path, **keys)) == 0
    for row, expected in zip(values_of(tmp_path), values_of(whole), strict=False):
        assert row == pytest.approx(expected, rel=1e-5)
    assert len(values_of(tmp_path)) == 6


def test_another_base_is_refused(setting, whole, tmp_path, capsys):
    shutil.copytree(whole / "run", tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path))
    other = SimpleNamespace(cache=setting.cache, teacher=save_network(tmp_path / "other", 2))
    capsys.readouterr()
    assert train(arguments_of(other, tmp_path)) == 2
    assert "the checkpoint was trained with the weights" in capsys.readouterr().err
    changed = [*arguments_of(setting, tmp_path), "--models.student.lora.alpha", "3.0"]
    assert train(changed) == 2
    assert "models.student.lora.alpha = 6.0 (now 3.0)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- ranks


@pytest.fixture(scope="module")
def splits(setting, tmp_path_factory):
    """6 steps of 4 samples: on one rank, sharded over two, and with a whole copy on each of two."""
    base, made = tmp_path_factory.mktemp("splits"), {}
    replicated = {"parallelism__data_parallel_replicate_degree": 2}
    for name, ranks, keys in (("one", 1, {}), ("sharded", 2, {}), ("replicated", 2, replicated)):
        keys = {"training__steps": 6, "checkpoint__interval": 6, **keys}
        arguments, seen = arguments_of(setting, base / name, **keys), base / name / "records"
        watcher = watch if name != "replicated" else watch_copies
        options = {"gradients": (1, 6)} if name != "replicated" else {}
        status = launch(ranks, arguments, seen, watcher=watcher, **options)
        assert status == [0] * ranks, output(seen)
        made[name] = base / name
    return SimpleNamespace(**made)


def watch_copies(folder: Path) -> None:
    """Make this process record, before each optimizer step, all of this rank's adapters, and which have gradients."""
    from fvtitan.distributed import utils

    method: dict[str, DMD2Method] = {}
    targets, clip = DMD2Method.get_grad_clip_targets, utils.clip_grad_norm
    calls: list[str] = []

    def get_grad_clip_targets(self: DMD2Method, role: str):
        method["it"], method["role"] = self, role
        return targets(self, role)

    def clip_grad_norm(parameters, max_norm: float):
        norm = clip(parameters, max_norm)
        rank = torch.distributed.get_rank()
        network = method["it"].teacher.transformer
        record = {
            "role": method["role"],
            "with_gradient": [n for n, p in network.named_parameters() if p.grad is not None],
            "values": {n: local_tensor(p.detach()).clone() for n, p in network.named_parameters() if ".lora_" in n},
        }
        calls.append(method["role"])
        torch.save(record, folder / f"copy.{len(calls):02d}.rank{rank}.pt")
        return norm

    DMD2Method.get_grad_clip_targets, utils.clip_grad_norm = get_grad_clip_targets, clip_grad_norm


def test_adapters_are_the_same_on_all_ranks(splits):
    """Their gradients are reduced: copies that each rank steps by itself stay equal; and only the trained role's has one."""
    paths = sorted((splits.replicated / "records").glob("copy.*.rank0.pt"))
    assert len(paths) == 8  # the student twice, the critic six times
    seen = [[torch.load(path.with_name(path.name.replace("rank0", f"rank{r}"))) for r in (0, 1)] for path in paths]
    for ours, theirs in seen:
        assert ours["values"].keys() == theirs["values"].keys() and len(ours["values"]) == 80
        assert all(torch.equal(ours["values"][name], tensor) for name, tensor in theirs["values"].items())
        assert len(ours["with_gradient"]) == 40 and all(n.endswith(f".{ours['role']}") for n in ours["with_gradient"])
    name = "blocks.0.ffn.0.lora_B.critic"
    assert not torch.equal(seen[0][0]["values"][name], seen[-1][0]["values"][name])


@pytest.mark.parametrize("split", ["sharded", "replicated"])
def test_two_ranks_train_what_one_trains(splits, split):
    folder = getattr(splits, split)
    if split == "sharded":
        for role in ("student", "critic"):
            (expected,) = records(splits.one / "records", f"gradients.step-1.{role}")
            for rank in records(folder / "records", f"gradients.step-1.{role}"):
                assert rank["gradients"].keys() == expected["gradients"].keys() and len(expected["gradients"]) == 40
                for name, gradient in expected["gradients"].items():  # of A none yet: B is zero
                    assert (gradient.norm() > 0) == name.endswith("lora_B")
                    error = (rank["gradients"][name] - gradient).norm()
                    assert error <= 1e-5 * gradient.norm(), (role, name)
    for row, expected in zip(values_of(folder), values_of(splits.one), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    tensors, expected = (read_checkpoint(checkpoint(f, 6)) for f in (folder, splits.one))
    for name, tensor in expected.items():
        if name.startswith(("roles.", "ema.")):
            assert (tensors[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


# ------------------------------------------------------------------------------------------ what reads a checkpoint


def velocity(model, seed: int = 0) -> torch.Tensor:
    rng = generator("cpu", seed)
    noisy, sigma = torch.randn(1, 3, 16, 4, 4, generator=rng), torch.rand(1, 3, generator=rng)
    text = torch.randn(1, SIZES.text_len, SIZES.text_dim, generator=rng)
    with torch.no_grad():
        return model.predict_velocity(noisy, sigma, Conditioning(text))


def student_of(arguments: list[str]):
    cfg = load_config(arguments)
    return cfg, build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu"))["student"]


@pytest.mark.parametrize("raw", [True, False])
def test_merged_is_what_was_trained(setting, whole, tmp_path, single_process_group, raw):
    """What generation and scoring load: the base plus the student's adapter, or its average; and it samples."""
    _, student = student_of(arguments_of(setting, tmp_path))
    state = "roles.student.transformer" if raw else "ema.student"
    tensors = read_checkpoint(checkpoint(whole))
    with torch.no_grad():
        for name, parameter in student.trained_parameters().items():
            local_tensor(parameter).copy_(tensors[f"{state}.{name}"])
    loaded = load_model(str(checkpoint(whole)), raw=raw)
    found, expected = velocity(loaded.model), velocity(student)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    student.adapter = None
    assert (velocity(student) - expected).norm() > 1e-3 * expected.norm()


def starting_from(source: Path, cache: Path, folder: Path, **keys: Any) -> list[str]:
    start = {"models.student.init_from": source, "models.student.init_weights": "raw", "models.student.flavor": ""}
    return small_arguments(cache, folder / "run", **start, schedule__shift=3.0, **keys)


def test_another_run_starts_from_the_merged_weights(setting, whole, tmp_path, single_process_group):
    _, student = student_of(starting_from(checkpoint(whole), setting.cache, tmp_path))
    _, merged = weights.read_checkpoint(checkpoint(whole), "student", raw=True)
    for name, parameter in student.trained_parameters().items():
        torch.testing.assert_close(parameter.full_tensor().detach(), merged[name], atol=1e-6, rtol=1e-6)


def test_an_adapter_on_an_adapter(setting, whole, tmp_path):
    """A second run's base is the first one's merged weights; both are found again."""
    keys = {"models.student.lora.rank": 2, "optimizer__lr": 1e-2}
    assert train(starting_from(checkpoint(whole), setting.cache, tmp_path, **keys)) == 0
    tensors = read_checkpoint(checkpoint(tmp_path, 6))
    _, merged = weights.read_checkpoint(checkpoint(whole), "student", raw=True)
    _, twice = weights.read_checkpoint(checkpoint(tmp_path, 6), "student", raw=True)
    layer, prefix = "blocks.1.ffn.2.weight", "roles.student.transformer.blocks.1.ffn.2"
    expected = merged[layer] + tensors[f"{prefix}.lora_B"] @ tensors[f"{prefix}.lora_A"]
    torch.testing.assert_close(twice[layer], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(twice["head.head.weight"], merged["head.head.weight"])
    assert not torch.equal(twice[layer], merged[layer])


def test_a_base_that_is_gone_or_another_is_said(setting, tmp_path):
    teacher = SimpleNamespace(cache=setting.cache, teacher=str(shutil.copytree(setting.teacher, tmp_path / "teacher")))
    assert train(arguments_of(teacher, tmp_path, training__steps=1)) == 0
    save_network(tmp_path / "teacher", 5)
    with pytest.raises(UserError, match=r"'student' is an adapter on models\.teacher\.init_from = .*have changed"):
        weights.read_checkpoint(checkpoint(tmp_path, 1), "student")
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(UserError, match=r"an adapter on models\.teacher\.init_from = .*cannot be read"):
        weights.read_checkpoint(checkpoint(tmp_path, 1), "student")


@pytest.mark.slow
def test_distillation_of_the_teachers_trajectories_on_its_network(setting, tmp_path):
    """The teacher goes when they are made, its network stays under the student; a second run does not ask for the teacher."""
    recipe = kd_recipe(tmp_path, {"student": SHARED, "teacher": {"init_from": setting.teacher}})
    keys = {"job__config_file": recipe, "training__steps": 2, "checkpoint__interval": 2, "optimizer__lr": 1e-2}
    for name in ("first", "second"):
        assert train(small_arguments(setting.cache, tmp_path / name, **keys)) == 0
    first, second = (read_checkpoint(tmp_path / name / "checkpoint/step-2") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert first["roles.student.transformer.blocks.0.self_attn.q.lora_B"].any()


def test_self_forcing_on_the_teachers_network(setting, tmp_path):
    """A causal student as an adapter on a bidirectional teacher: trains, and streams when it is loaded."""
    keys = {"training__steps": 2, "checkpoint__interval": 2, "method__gradient_mode": "replay"}
    assert train(arguments_of(setting, tmp_path, recipe=self_forcing_recipe, **keys)) == 0
    tensors = read_checkpoint(checkpoint(tmp_path, 2))
    for role in ("student", "critic"):
        moved = [n for n in tensors if n.startswith(f"roles.{role}.") and n.endswith("lora_B") and tensors[n].any()]
        assert len(moved) == 20
    loaded = load_model(str(checkpoint(tmp_path, 2)))
    assert loaded.contract.streaming and loaded.model.trained_frames == 3 and velocity(loaded.model).isfinite().all()
