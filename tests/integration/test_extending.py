"""docs/extending.md does what it says: its own code, taken from its text, goes into a copy of the tree and trains there.

All of it in one process: the method and the model family, each added to its registry; then train.py with the page's edits.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fvtitan.components.metrics import read_metrics
from fvtitan.errors import UserError
from fvtitan.methods import METHODS
from fvtitan.methods.passes import Pass
from fvtitan.models.base import Conditioning
from fvtitan.models.wan import weights
from tests.dmd2_oracles import Role
from tests.helpers import ROOT, make_cache, read_checkpoint, small_arguments, small_config

PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
STEADY = {"lr_scheduler__warmup_steps": 0, "lr_scheduler__decay_type": "constant"}
RESNET = {"models.student.name": "resnet", **STEADY, "training__steps": 2}
MIXED = {"models.student.name": "resnet", "models.student.flavor": "tiny", "models.student.init_from": ""}
DRIVER = """
import json, runpy, sys, traceback
runs, statuses = json.loads(sys.argv[1]), {}
for name, script, arguments in runs:
    sys.argv = [script, *arguments]
    print(f"RUN {name}", flush=True)
    print(f"RUN {name}", file=sys.stderr, flush=True)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit_:
        statuses[name] = exit_.code
    except BaseException:
        traceback.print_exc()
        statuses[name] = "raised"
print("RUN statuses")
print(json.dumps(statuses))
"""


def files_of(page: str) -> dict[str, str]:
    """The ```python and ```toml blocks by the path in their first line, a comment."""
    blocks = re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return dict(blocks)


def diffs_of(page: str) -> list[tuple[str, str]]:
    """The ```diff blocks: the path in their first line, and the rest."""
    return re.findall(r"^```diff\n--- (\S+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def patched(text: str, diff: str) -> str:
    """`text` after a diff whose hunks are separated by `@@`. Fails unless what a hunk replaces is there exactly once."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " -+" for line in lines)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        found = ("\n" + text).count("\n" + before)
        assert found == 1, f"{found} times in the file, must be once:\n{before}"
        text = ("\n" + text).replace("\n" + before, "\n" + after)[1:]
    return text


def extended_tree(folder: Path) -> Path:
    """A copy of the program with all of the page in it; train.py is as it was, train_edited.py has its edits."""
    for name in ("fvtitan", "train_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", folder)
    shutil.copy(ROOT / "train.py", folder / "train_edited.py")
    for name, text in files_of(PAGE).items():
        assert not (folder / name).exists()
        (folder / name).write_text(text)
    for name, diff in diffs_of(PAGE):
        path = folder / ("train_edited.py" if name == "train.py" else name)
        path.write_text(patched(path.read_text(), diff))
    edited = folder / "train_edited.py"
    below = "< 0.02"  # no loss of the first steps is: here every one is low enough
    assert edited.read_text().count(below) == 1
    edited.write_text(edited.read_text().replace(below, "< 1e9"))
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache", num_samples=6)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return extended_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def done(tree, cache):
    """`{run: (status, output, errors)}` of all runs, one after another in one process."""
    recipe = {"job__config_file": "train_configs/tiny_consistency.toml", **STEADY, "optimizer__lr": 1e-4}
    recipe |= {"method.teacher_inference_steps": 8, "validation__sampling_steps": 2, "validation__num_prompts": 1}
    jobs = [
        ("stopped", {**recipe, "training__steps": 2}, "consistency"),
        ("resumed", {**recipe, "training__steps": 3, "validation__enable": True}, "consistency"),
        ("whole", {**recipe, "training__steps": 3, "checkpoint__enable": False}, "whole"),
        ("mixed", {**recipe, **MIXED, "training__steps": 1, "validation__enable": True}, "mixed"),
        ("wrong", {**recipe, "method.student_sample_steps": 3}, "wrong"),
        ("resnet", {**RESNET, "activation_checkpoint__mode": "full"}, "resnet"),
        ("plain", {**RESNET, "training__steps": 1, "checkpoint__enable": False}, "plain"),
        ("edited", {**RESNET, "training__steps": 9}, "edited"),
        ("sequence", {**RESNET, "models.student.lora.rank": 4, "models.student.init_from": "x"}, "sequence"),
    ]
    runs = [
        (name, "train_edited.py" if name == "edited" else "train.py", small_arguments(cache, tree / folder, **keys))
        for name, keys, folder in jobs
    ]
    plan = ["train_configs/tiny_finetune.toml", "--no-switches", "--world-size", "2"]
    runs.append(("plan", "fvtitan/plan.py", [*plan, *small_arguments(cache, tree / "plan", **RESNET)]))
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, json.dumps(runs)]
    end = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
    assert end.returncode == 0, end.stderr[-3000:]
    out, err = (
        dict(re.findall(r"^RUN (\w+)\n(.*?)(?=^RUN|\Z)", text, re.M | re.S)) for text in (end.stdout, end.stderr)
    )
    return {name: (status, out[name], err[name]) for name, status in json.loads(out["statuses"]).items()}


def values_of(folder: Path) -> list[dict[str, float]]:
    """What the clock does not decide."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows if "loss/student" in row]


# ---------------------------------------------------------------------------------------------------- a method


def test_the_method_trains_resumes_and_validates(done, tree):
    for name in ("stopped", "resumed", "whole"):
        assert done[name][0] == 0, done[name]
    assert "resumed from" in done["resumed"][1] and "resumed from" not in done["stopped"][1]
    values = values_of(tree / "consistency")
    assert [row["step"] for row in values] == [1, 2, 3] and values == values_of(tree / "whole")
    assert all(row["grad_norm/student"] > 0 and row["consistency/error"] > 0 for row in values)
    assert all(row["perf/tflops_per_device"] > 0 for row in read_metrics(tree / "whole/metrics.jsonl"))
    videos = {path.parent.name for path in (tree / "consistency/validation/step-3").rglob("*.mp4")}
    assert videos == {"student", "ema", "teacher"}


def test_the_method_checks_its_keys(done):
    status, _, error = done["wrong"]
    assert status == 2 and "method.student_sample_steps = 3: must divide teacher_inference_steps = 8" in error


@pytest.fixture
def consistency(tmp_path, monkeypatch):
    """The method's class, from the page, registered in this process."""
    cls = module_of("fvtitan/methods/consistency.py", tmp_path).ConsistencyMethod
    monkeypatch.setitem(METHODS, "consistency", cls)
    (tmp_path / "recipe.toml").write_text(files_of(PAGE)["train_configs/tiny_consistency.toml"])
    return cls


def module_of(name: str, folder: Path):
    """A file of the page as a module."""
    path = folder / Path(name).name
    path.write_text(files_of(PAGE)[name])
    spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_loss_of_a_student_that_is_off_by_a_constant(consistency, cache, tmp_path):
    """The teacher's guided velocity is a constant c: its steps are exact. A student's of c + d disagrees with itself by
    (sigma - below) d, and the derivative by d is sigma, not the difference: the target is no function of the student."""
    keys = {"job__config_file": tmp_path / "recipe.toml", "schedule__shift": 1.0, "data__caption_dropout": 0.0}
    keys |= {"method.teacher_inference_steps": 4, "method.teacher_guidance_scale": 2.0}
    cfg, off = small_config(cache, tmp_path, **keys), nn.Linear(1, 1)
    nn.init.constant_(off.bias, 0.3)
    teacher = Role(channels=16, velocity=lambda x, level, cond: 0.2 + 0.3 * cond.text.reshape(-1, 1, 1, 1, 1) + 0 * x)
    teacher.conditioning = lambda prompts: Conditioning(torch.ones(len(prompts), 1))
    teacher.unconditional = lambda size: Conditioning(torch.zeros(size, 1))
    student = Role(channels=16, velocity=lambda x, level, cond: 0.8 + off.bias + 0 * x, module=off)
    student.schedule = cfg.schedule
    method = consistency(cfg=cfg, role_models={"student": student, "teacher": teacher})
    method.on_train_start()
    batch = {
        "latents": method.data[0]["latents"][None],
        "prompt_embeds": [method.data[0]["prompt_embeds"]],
        "positions": torch.arange(1),
        "sample_indices": torch.arange(1),
        "sample_passes": torch.zeros(1, dtype=torch.int64),
    }
    drawn = set()
    for step in range(1, 17):
        loss, metrics = method.single_train_step(batch, step, "student")
        assert metrics["consistency/error"].item() == pytest.approx(0.25 * 0.3, rel=1e-4)
        assert loss.item() == pytest.approx((0.075**2 + 0.00054**2) ** 0.5 - 0.00054, rel=1e-4)
        off.zero_grad()
        loss.backward()
        sigma = student.calls[-1]["sigma"][0, 0].item()
        assert off.bias.grad.item() == pytest.approx(sigma, rel=1e-3)
        drawn.add(sigma)
    assert drawn == {1.0, 0.75, 0.5, 0.25}


# ---------------------------------------------------------------------------------------------------- a family


def test_the_family_trains(done, tree):
    for name in ("resnet", "plain"):
        assert done[name][0] == 0, done[name]
    assert "student: resnet, 0.9" in done["resnet"][1] and "attention:" not in done["resnet"][1]
    rows = values_of(tree / "resnet")
    assert [row["step"] for row in rows] == [1, 2] and all(row["grad_norm/student"] > 0 for row in rows)
    assert rows[0] == {**values_of(tree / "plain")[0], "step": 1}  # checkpointing changes nothing
    saved = read_checkpoint(tree / "resnet/checkpoint/step-2")
    assert saved["roles.student.transformer.head.weight"].abs().max() > 0  # began at zero


def test_the_family_is_planned(done):
    status, out, error = done["plan"]
    assert status == 0, error
    assert "each 3 x 4 x 4 latents = 48 tokens\n" in out, out  # Wan would make 12 of them


def test_the_family_beside_wan(done, tree):
    """A student under a Wan teacher, by the method of the page; both are sampled."""
    assert done["mixed"][0] == 0, done["mixed"]
    assert "student: resnet, " in done["mixed"][1] and "teacher: wan, " in done["mixed"][1]
    assert {path.parent.name for path in (tree / "mixed/validation/step-1").rglob("*.mp4")} >= {"student", "teacher"}


def test_what_reads_wan_alone_says_so(done, tree):
    with pytest.raises(UserError, match="num_layers, dim, .*: not a Wan network"):
        weights.checkpoint_sizes(
            tree / "resnet/checkpoint/step-2", "student"
        )  # generate, score, export, a Wan's init_from


@pytest.mark.slow
def test_the_family_is_the_same_on_two_ranks(done, tree, cache):
    """Sharded: the losses of one process with the same global batch, and the weights."""
    keys = {**RESNET, "training__local_batch_size": 1, "training__global_batch_size": 2}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    arguments = small_arguments(cache, tree / "ranks", **keys)
    end = subprocess.run([*command, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=900)
    assert end.returncode == 0, end.stderr[-3000:]
    for row, expected in zip(values_of(tree / "ranks"), values_of(tree / "resnet"), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    one = read_checkpoint(tree / "resnet/checkpoint/step-2")
    for name, tensor in read_checkpoint(tree / "ranks/checkpoint/step-2").items():
        if name.startswith("roles."):
            assert (tensor - one[name]).norm() <= 1e-4 * one[name].norm() + 1e-6, name


def test_what_the_family_cannot_do_is_refused(done):
    status, _, error = done["sequence"]
    assert status == 2 and "models.student.lora.rank = 4: not with models.student.name = 'resnet'" in error


def test_flops_of_the_family_are_those_that_torch_counts(tmp_path):
    module = module_of("fvtitan/models/resnet.py", tmp_path)
    sizes = module.FLAVORS["tiny"]
    with torch.device("meta"):
        network = module.ResNet(sizes)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, 16, 4, 6), torch.empty(1, 3), torch.empty(1, sizes.text_len, sizes.text_dim))
    p = Pass("student", 3)
    assert module.ResNetModel.forward_flops(p, sizes, None, 4, 6).total == counter.get_total_flops()


# ------------------------------------------------------------------------------------------------------ the loop


def test_the_edits_of_train_py(done, tree):
    """The ramp divides the first gradient by 100, the clipping is logged, and the run ends after a step, saved."""
    assert done["edited"][0] == 0, done["edited"]
    (row,), (plain,) = values_of(tree / "edited"), values_of(tree / "plain")
    assert row["grad_norm/student"] == pytest.approx(plain["grad_norm/student"] / 100, rel=1e-5)
    assert row["loss/student"] == plain["loss/student"]
    assert row["clipped/student"] == float(row["grad_norm/student"] > 1) and "clipped/student" not in plain
    assert (tree / "edited/checkpoint/step-1").is_dir() and "finished 1 steps" in done["edited"][1]


def test_an_edit_whose_lines_are_gone_is_noticed():
    train = (ROOT / "train.py").read_text()
    for name, diff in diffs_of(PAGE):
        if name == "train.py":
            gone = next(line[1:] for line in diff.splitlines() if line[0] in " -" and line.strip())
            with pytest.raises(AssertionError, match="0 times in the file"):
                patched(train.replace(gone, gone.rstrip() + "  # changed"), diff)


def test_all_blocks_of_the_page_are_used():
    blocks = re.findall(r"^```(\w*)$", PAGE, re.MULTILINE)
    assert len([kind for kind in blocks if kind]) == len(files_of(PAGE)) + len(diffs_of(PAGE)) == 8
    assert all(tomli.loads(text) for name, text in files_of(PAGE).items() if name.endswith(".toml"))
