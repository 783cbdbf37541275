"""The plan of a job against the job: memory against torch's MemTracker, collectives against FSDP2's arithmetic, exit
statuses."""

from __future__ import annotations

import dataclasses
import gc
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker

from fvtitan import plan
from fvtitan.config import JobConfig, load_config
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import clip_grad_norm
from fvtitan.errors import UserError, cli
from fvtitan.methods import METHODS
from fvtitan.models import build_roles
from fvtitan.models.wan import transformer
from fvtitan.models.wan.transformer import WanConfig
from tests.helpers import ROOT, dmd2_recipe, make_cache, small_config

# Deeper than what is run; activations outweigh the rest, as they do at scale.
MID = WanConfig(num_layers=7, num_heads=4, head_dim=32, ffn_dim=256, text_dim=64, text_len=32)
RATES = plan.Rates(989e12, 300e9, 50e9)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("plan") / "cache", 8)


@pytest.fixture
def flavors(monkeypatch):
    monkeypatch.setitem(transformer.FLAVORS, "mid", MID)


def configured(cache: Path, folder: Path, method: str, flavor: str, mode: str) -> JobConfig:
    """Two videos of 9 latent frames of 128 x 128 pixels, 576 tokens each."""
    roles = ("student", "teacher", "critic") if method == "dmd2" else ("student",)
    keys = {
        "data__num_frames": 33,
        "data__height": 128,
        "data__width": 128,
        "training__local_batch_size": 2,
        "training__global_batch_size": 2,
        "activation_checkpoint__mode": mode,
        "ema__enable": False,
        **{f"models.{role}.flavor": flavor for role in roles},
    }
    folder.mkdir(exist_ok=True)
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
    batch = plan._Samples(cfg, plan.role_sizes(cfg)["student"]).batch(cfg)

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


QUICK = ["finetune mid selective"]
CASES = [(m, f, ac) for m in ("finetune", "dmd2") for f in ("tiny", "mid") for ac in ("none", "selective", "full")]


@pytest.mark.parametrize(
    ("method", "flavor", "mode"),
    [pytest.param(*case, marks=[] if " ".join(case) in QUICK else [pytest.mark.slow]) for case in CASES],
)
def test_memory_is_what_a_real_step_takes(cache, tmp_path, flavors, method, flavor, mode):
    cfg = configured(cache, tmp_path, method, flavor, mode)
    with plan.fake_job(1):
        planned = plan.make_plan(cfg, 1, RATES).peak
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        peak = tracked_peak(cfg)
    finally:
        dist.destroy_process_group()
    assert planned == pytest.approx(peak, rel=0.03)


@pytest.mark.slow
def test_checkpointing_saves_memory(cache, tmp_path, flavors):
    peaks = []
    for mode in ("none", "selective", "full"):
        cfg = configured(cache, tmp_path / mode, "finetune", "mid", mode)
        with plan.fake_job(1):
            peaks.append(plan.make_plan(cfg, 1, RATES).peak)
    assert peaks[0] > 1.5 * peaks[1] and peaks[1] > 1.01 * peaks[2]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["finetune", "dmd2"])
def test_what_is_continued_is_what_is_run(cache, tmp_path, flavors, monkeypatch, method):
    """Seven blocks from three and four, and all seven: memory, calls and bytes; with two kinds of depth."""
    cfg = configured(cache, tmp_path, method, "mid", "full")
    if method == "dmd2":
        cfg.models["critic"].flavor = "tiny"
    cfg.training.global_batch_size = 4
    plans = []
    for depth in (plan.COUNTED_DEPTH, 7):
        monkeypatch.setattr(plan, "COUNTED_DEPTH", depth)
        with plan.fake_job(2):
            plans.append(plan.make_plan(cfg, 2, RATES))
    continued, whole = plans
    assert continued.peak == pytest.approx(whole.peak, rel=1e-2)
    for role, phase in whole.phases.items():
        assert continued.phases[role].calls == pytest.approx(phase.calls)
        assert continued.phases[role].traffic == pytest.approx(phase.traffic)
        assert dataclasses.astuple(continued.roles[role]) == pytest.approx(dataclasses.astuple(whole.roles[role]))


@pytest.mark.slow
def test_a_shared_network_counts_for_the_role_that_has_it():
    """Student and critic are listed around the teacher, and hold their adapters alone."""
    cfg = load_config(["--job.config_file", str(ROOT / "train_configs/tiny_dmd2_lora.toml")], world_size=1)
    with plan.fake_job(1):
        roles = plan.make_plan(cfg, 1, RATES).roles
    adapter = roles["student"].gradients
    assert roles["student"].parameters == roles["critic"].parameters == adapter > 0
    assert roles["teacher"].parameters > 4 * adapter and roles["teacher"].gradients == 0
    assert roles["student"].optimizer == 2 * adapter and roles["student"].average == adapter


# -------------------------------------------------------------------------------------------------------- collectives


def calls(cfg: JobConfig, world_size: int) -> dict[str, dict[str, float]]:
    with plan.fake_job(world_size):
        phases = plan.make_plan(cfg, world_size, RATES).phases
    return {
        role: {name: round(n) for name, n in phase.calls.items() if name != "all-reduce"}
        for role, phase in phases.items()
    }


@pytest.mark.parametrize(
    ("mode", "exchanges"), [("none", 8), ("selective", 8), ("full", 12)], ids=["none", "selective", "full"]
)
def test_collectives_of_fine_tuning(cache, tmp_path, mode, exchanges):
    """L + 1 all-gathers forward, L + 1 all-gathers and L + 1 reduce-scatters backward, whatever is recomputed. Ranks that
    share a sequence exchange 4 times a block forward and 4 times backward, and put the output together once; what selective
    checkpointing keeps is not exchanged again."""
    cfg = configured(cache, tmp_path, "finetune", "tiny", mode)
    cfg.training.local_batch_size = 1
    assert calls(cfg, 2) == {"student": {"all-gather": 10, "reduce-scatter": 5}}
    cfg.training.local_batch_size = 2
    cfg.parallelism.context_parallel_degree = 2
    assert calls(cfg, 2) == {"student": {"all-gather": 11, "reduce-scatter": 5, "all-to-all": 4 * exchanges}}


@pytest.mark.slow
def test_collectives_of_dmd2(cache, tmp_path):
    """One rung: the student's phase gathers the student twice, critic and teacher (two branches) once a forward; the critic's
    the student once. Nobody's gradients are reduced but those of the phase."""
    cfg = configured(cache, tmp_path, "dmd2", "tiny", "none")
    cfg.training.local_batch_size = 1
    student, critic = 5 + 5 + 5 + 2 * 5, 5 + 5 + 5
    assert calls(cfg, 2) == {
        "student": {"all-gather": student, "reduce-scatter": 5},
        "critic": {"all-gather": critic, "reduce-scatter": 5},
    }


@pytest.mark.slow
def test_deferred_reduction_holds_whole_gradients(cache, tmp_path):
    cfg = configured(cache, tmp_path, "finetune", "tiny", "none")
    cfg.training.local_batch_size, cfg.training.global_batch_size = 1, 8
    assert calls(cfg, 2)["student"] == {"all-gather": 40, "reduce-scatter": 20}  # four micro-batches
    with plan.fake_job(2):
        reduced = plan.make_plan(cfg, 2, RATES).peak
        cfg.parallelism.defer_grad_sync = True
        deferred = plan.make_plan(cfg, 2, RATES).peak
    assert deferred > reduced
    assert calls(cfg, 2)["student"] == {"all-gather": 40, "reduce-scatter": 5}


# --------------------------------------------------------------------------------------------------------- the program


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli(plan.main)
    output = capsys.readouterr()
    return int(exit_.value.code or 0), output.out, output.err


SMALL_CLIPS = ("--data.height", 32, "--data.width", 32, "--training.local_batch_size", 4)
RECIPES = sorted((ROOT / "train_configs").glob("tiny_*.toml"))


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            path,
            id=path.stem,
            marks=[] if path.stem == "tiny_dmd2" else [pytest.mark.slow],
        )
        for path in RECIPES
    ],
)
def test_every_method_can_be_planned(monkeypatch, capsys, recipe):
    """On two GPUs. A recipe that goes on from another's result gets the shipped weights' sizes."""
    keys = ["--models.student.init_from", "tiny-wan"] if 'init_from = "outputs' in recipe.read_text() else []
    status, out, err = run(monkeypatch, capsys, recipe, "--world-size", 2, "--no-switches", *SMALL_CLIPS, *keys)
    assert status == 0 and not err, err
    assert "it fits" in out and "tokens/s a GPU" in out
    assert ("critic phase" in out) == ("[models.critic]" in recipe.read_text())


def test_exit_status_and_switches(monkeypatch, capsys):
    recipe = ROOT / "train_configs/tiny_finetune.toml"
    status, out, _ = run(
        monkeypatch, capsys, recipe, "--world-size", 2, "--memory", 0.05, "--training.local_batch_size", 4
    )
    assert status == 1 and "it does NOT fit" in out
    switch = "activation_checkpoint.mode = full"
    assert re.search(rf"{switch} +-0", out) and f"buys the most: {switch}" in out
    assert "parallelism.context_parallel_degree = 2" in out and "parallelism.context_parallel_degree = 4" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--world-size", 3), "training.global_batch_size = 8: must be a multiple of"),
        (("--world-size", 0), "--world-size 0: must be > 0"),
        (("--parallelism.context_parallel_degree", 8, "--world-size", 8), "must divide the 4 heads of models.student"),
        (("--trainig.steps", 3), "trainig"),
    ],
)
def test_what_is_wrong_with_a_recipe(monkeypatch, capsys, arguments, message):
    status, out, err = run(monkeypatch, capsys, ROOT / "train_configs/tiny_finetune.toml", *arguments)
    assert status == 2 and message in err and len(err.splitlines()) == 1, err


def test_the_best_switch():
    """The least memory when the plan does not fit; else the least time among those that fit."""

    def planned(peak: float, seconds: float) -> plan.Plan:
        times = {"compute": seconds, "sharding": 0.0, "sequence": 0.0}
        return plan.Plan({}, {"student": plan.Phase(peak=peak)}, {}, 1, 1, 1, times)

    others = {"a": planned(5, 3), "b": planned(7, 1), "c": planned(12, 0.5)}
    assert plan.best_switch(planned(11, 2), others, room=10) == "a"
    assert plan.best_switch(planned(9, 2), others, room=10) == "b"
    assert plan.best_switch(planned(9, 0.9), others, room=10) is None


# ------------------------------------------------------------------------------------------- headers of large recipes

LARGE = sorted((ROOT / "train_configs").glob("wan2.1_*.toml"))
MEMORIES = (80, 141)
"""GB of the GPUs that the headers plan for."""
LINE = re.compile(r"# +(\d+) GPUs?(?:, (--\S+ \S+))?: +([\d.]+) GiB, +([\d.]+) s; 80 GB: (.+); 141 GB: (.+)")


def header_lines(recipe: Path) -> dict[int, tuple[str, str, str, str, str]]:
    """What a header says of so many GPUs: the key that the job needs there, GiB of each, seconds a step at best, and how that
    goes into either memory: `fits`, `no`, or `with --key value`, the one switch that makes it fit."""
    found = filter(None, map(LINE.fullmatch, recipe.read_text().splitlines()))
    return {int(line[1]): line.groups(default="")[1:] for line in found}


def loaded(recipe: Path, gpus: int, key: str = "", *, training: bool = True) -> JobConfig:
    return load_config(["--job.config_file", str(recipe), *key.split()], world_size=gpus, training=training)


def planned_for(recipe: Path, gpus: int, key: str) -> tuple[plan.Plan, list[str]]:
    """The plan, and how it goes into either memory."""
    cfg, verdicts = loaded(recipe, gpus, key), []
    others: dict[str, plan.Plan] = {}
    with plan.fake_job(gpus):
        planned = plan.make_plan(cfg, gpus, RATES)
        for room in ((1 - plan.RESERVE) * memory * plan.GIB for memory in MEMORIES):
            if room < planned.peak < 2 * room and not others:  # no single switch halves a plan, and they take long
                others = plan.plan_switches(cfg, gpus, RATES)
            best = plan.best_switch(planned, others, room)
            helps = best is not None and others[best].peak <= room
            switch = f"with --{best.replace(' = ', ' ')}" if helps else "no"
            verdicts.append("fits" if planned.peak <= room else switch)
    return planned, verdicts


@pytest.mark.parametrize("recipe", LARGE, ids=[path.stem for path in LARGE])
def test_headers_of_large_recipes_say_where_they_fit(recipe):
    """1, 8 and 64 GPUs, and those that the header asks for, which are enough; a key where the recipe's batch does not divide,
    and only there."""
    lines, text = header_lines(recipe), recipe.read_text()
    gpus, memory = map(int, re.search(r"^# Hardware: (\d+) GPUs of (\d+) GB", text, re.MULTILINE).groups())
    assert list(lines) == sorted({1, 8, 64, gpus})
    assert lines[gpus][3 + MEMORIES.index(memory)] == "fits" and not lines[gpus][0]
    cfg = loaded(recipe, 1, training=False)
    for count, (key, gib, _, *verdicts) in lines.items():
        try:
            cfg.check_world(count)
            assert not key
        except UserError:
            loaded(recipe, count, key)
        assert [verdict == "fits" for verdict in verdicts] == [
            float(gib) <= (1 - plan.RESERVE) * memory for memory in MEMORIES
        ]


CHEAP = ("wan2.1_t2v_1.3b_finetune", 64)


@pytest.mark.parametrize(
    ("recipe", "gpus"),
    [
        pytest.param(
            path, gpus, id=f"{path.stem}-{gpus}", marks=[] if (path.stem, gpus) == CHEAP else [pytest.mark.slow]
        )
        for path in LARGE
        for gpus in header_lines(path)
    ],
)
def test_plans_of_large_recipes_are_those_of_their_headers(recipe, gpus):
    key, gib, seconds, *verdicts = header_lines(recipe)[gpus]
    planned, found = planned_for(recipe, gpus, key)
    assert planned.peak / plan.GIB == pytest.approx(float(gib), rel=0.01, abs=0.6)
    assert planned.step_seconds == pytest.approx(float(seconds), rel=0.02)
    assert found == verdicts
