"""Exports: diffusers in a fresh process gives our videos, every format loads again, and a folder is whole or absent."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli
import torch
from safetensors.torch import load_file
from torch import Tensor

from fvtitan import export as program
from fvtitan import samplers
from fvtitan.assets import tiny_wan_path
from fvtitan.components.checkpoint import Checkpointer
from fvtitan.components.lora import LoRAConfig
from fvtitan.components.model_card import EXAMPLE_PROMPT, base_arguments
from fvtitan.config import RoleConfig, read_toml
from fvtitan.contract import read_contract
from fvtitan.methods import METHODS
from fvtitan.models import MODELS
from fvtitan.models.encoders import TextEncoder, VideoVAE
from fvtitan.models.pipeline import pipeline_shift
from fvtitan.models.wan import weights
from fvtitan.models.wan.adapter import diffusers_names
from fvtitan.models.wan.files import WEIGHTS_NAME, open_weights
from tests.helpers import (
    GEOMETRY,
    ROOT,
    dmd2_recipe,
    make_cache,
    run_program,
    self_forcing_recipe,
    small_arguments,
    train,
)

STUDENT = '[models.student]\ninit_from = "tiny-wan"\n'
SAMPLING = "[schedule]\nshift = 5.0\n[validation]\nsampling_steps = 3\nguidance_scale = 3.0\n"
# Every card's lines, in a process that knows nothing of us; the noise is the global generator's, from a known place.
CARDS = """
import os, re, sys
import numpy as np
for folder in sys.argv[1:]:
    os.chdir(folder)
    code = re.search("```python\\n(.*?)```", open("README.md").read(), re.S)[1]
    assert code.count("video = pipe(") == 1
    names = {}
    exec(code.replace("video = pipe(", "torch.manual_seed(0)\\nvideo = pipe("), names)
    np.save("video.npy", names["video"])
assert not [name for name in sys.modules if name.startswith("fvtitan")]
"""


class Plain:
    """A state of tensors, or of what is JSON."""

    def __init__(self, state: dict):
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None: ...


def write_checkpoint(folder: Path, recipe: Path, raw: dict[str, Tensor], averaged: dict[str, Tensor], **states) -> Path:
    """A run's checkpoint of a tiny student, as train.py leaves it, without the training."""
    cfg = read_toml(recipe)
    for key, value in GEOMETRY.items():
        setattr(cfg.data, key, value)
    cfg.schedule.shift = 5.0
    roles = {"student": raw} | ({"critic": states.pop("critic")} if "critic" in states else {})
    sizes = dict.fromkeys(roles, open_weights("tiny-wan").sizes)
    files = {"config.toml": cfg.to_toml(), "versions.json": "{}"}
    files["roles.json"] = json.dumps({role: vars(size) for role, size in sizes.items()})
    states |= {f"roles.{role}.transformer": tensors for role, tensors in roles.items()}
    states = {**states, "ema.student": {"num_updates": 3, **averaged}}
    checkpointer = Checkpointer(folder / "checkpoint")
    checkpointer.save(7, {name: Plain(state) for name, state in states.items()}, extra_files=files)
    checkpointer.close()
    return folder / "checkpoint/step-7"


def shaken(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {name: t + 0.02 * t.std() * torch.randn(t.shape, generator=rng) for name, t in tensors.items()}


def adapter_of(folder: Path, alpha: float) -> Path:
    """A run's checkpoint of an adapter of rank 4 whose B is not zero."""
    rng = torch.Generator().manual_seed(3)
    _, tiny = weights.read_pipeline("tiny-wan")
    tensors = {}
    for name, weight in tiny.items():
        if name.startswith("blocks.") and LoRAConfig(rank=4).adapts(name.removesuffix(".weight")):
            layer = name.removesuffix(".weight")
            if weight.ndim == 2:
                tensors[f"{layer}.lora_A"] = 0.1 * torch.randn(4, weight.shape[1], generator=rng)
                tensors[f"{layer}.lora_B"] = 0.1 * torch.randn(weight.shape[0], 4, generator=rng)
    folder.mkdir(exist_ok=True)
    recipe = folder / "lora.toml"
    recipe.write_text(f"{STUDENT}[models.student.lora]\nrank = 4\nalpha = {alpha}\n{SAMPLING}")
    identity = {"sha256": weights.weights_hash(RoleConfig(init_from="tiny-wan"))}
    averaged = {name: 0.5 * tensor for name, tensor in tensors.items()}
    return write_checkpoint(folder, recipe, tensors, averaged, **{"identity.student": identity})


def export(*arguments: object) -> int:
    """The program in this process; its exit status."""
    return run_program(program.main, *arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints: train.py's own; and of an adapter, a few-step and a causal student."""
    folder = tmp_path_factory.mktemp("runs")
    cache = make_cache(folder / "cache")
    (folder / "finetune.toml").write_text(STUDENT + SAMPLING)
    keys = {"training__steps": 2, "ema__start_step": 0, "optimizer__lr": 0.003, "checkpoint__interval": 2}
    arguments = small_arguments(cache, folder / "finetune", **keys)
    assert train(["--job.config_file", str(folder / "finetune.toml"), *arguments]) == 0
    _, tiny = weights.read_pipeline("tiny-wan")
    raw, averaged = shaken(tiny, 1), shaken(tiny, 2)
    return SimpleNamespace(
        folder=folder,
        finetune=folder / "finetune/checkpoint/step-2",
        lora=adapter_of(folder / "lora", 6.0),
        few_step=write_checkpoint(folder / "dmd2", dmd2_recipe(folder), raw, averaged),
        causal=write_checkpoint(folder / "causal", self_forcing_recipe(folder), raw, averaged),
    )


@pytest.fixture(scope="module")
def exports(runs):
    """One of every kind, and the video that its card's lines make."""
    folder = runs.folder / "exports"
    kinds = {
        "raw": ("--checkpoint", runs.finetune),
        "ema": ("--checkpoint", runs.finetune, "--ema"),
        "few_step": ("--checkpoint", runs.few_step, "--ema"),
        "narrow": ("--checkpoint", runs.few_step, "--dtype", "bfloat16", "--max-shard-size", "500KB"),
        "lora": ("--checkpoint", runs.lora, "--format", "lora"),
        "merged": ("--checkpoint", runs.lora, "--merge"),
    }
    for kind, arguments in kinds.items():
        assert export(*arguments, "--output", folder / kind) == 0
    copies = [shutil.copytree(folder / kind, runs.folder / "run" / kind) for kind in kinds]
    path = os.pathsep.join(entry for entry in sys.path if entry and Path(entry) != ROOT)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CARDS, *copies], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    videos = {copy.name: torch.from_numpy(np.load(copy / "video.npy")) for copy in copies}
    return SimpleNamespace(folder=folder, videos=videos)


@functools.cache
def encoders() -> tuple[TextEncoder, VideoVAE]:
    return TextEncoder("tiny-wan"), VideoVAE("tiny-wan")


@functools.cache
def our_video(checkpoint: Path, *, raw: bool) -> Tensor:
    """`[T, H, W, 3]` in [0, 1], by our network and sampler, from the noise that diffusers draws."""
    cfg = read_toml(checkpoint / "config.toml")
    sizes, tensors = weights.read_checkpoint(checkpoint, "student", raw=raw)
    model = MODELS["wan"].from_tensors(sizes, tensors, cfg.schedule, cfg.models["student"])
    spec, (encoder, vae) = METHODS[cfg.method.name].sampler(cfg), encoders()
    cond, uncond = (model.conditioning(encoder.encode([text])) for text in (EXAMPLE_PROMPT, ""))
    torch.manual_seed(0)
    frames, height, width = cfg.data.latent_size()
    noise = [torch.randn(1, 16, frames, height, width).transpose(1, 2) for _ in spec.sigmas]
    with torch.no_grad():
        latents = samplers.sample(model, spec, noise[0], cond, uncond, noise.__getitem__)
    return (vae.decode(latents)[0].permute(0, 2, 3, 1) + 1) / 2


@pytest.mark.parametrize(
    ("kind", "source", "raw"),
    [
        ("raw", "finetune", True),
        ("ema", "finetune", False),
        ("few_step", "few_step", False),  # re-noised: diffusers' stochastic_sampling
        ("lora", "lora", True),
        ("merged", "lora", True),
    ],
)
def test_wanpipeline_gives_our_video(exports, runs, kind, source, raw):
    ours, theirs = our_video(getattr(runs, source), raw=raw), exports.videos[kind]
    assert theirs.shape == (9, 32, 32, 3)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    other = our_video(getattr(runs, source), raw=not raw)
    assert (other - theirs).abs().max() > 5e-3  # which weights they are matters


def test_a_bfloat16_export_in_shards(exports, runs):
    folder = exports.folder / "narrow"
    index = json.loads((folder / f"transformer/{WEIGHTS_NAME}.index.json").read_text())
    shards = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(shards) == len(set(index["weight_map"].values())) >= 4
    stored = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert all(len(shard.read_bytes()) < 600_000 for shard in shards)
    files, (_, expected) = open_weights(str(folder)), weights.read_checkpoint(runs.few_step, "student", raw=True)
    wide = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    for name, theirs in diffusers_names(expected).items():
        dtype = torch.float32 if set(theirs.split(".")) & set(wide) else torch.bfloat16
        assert stored[theirs].dtype == dtype, theirs
        assert torch.equal(files.read(name), expected[name].to(dtype)), name
    difference = (exports.videos["narrow"] - our_video(runs.few_step, raw=True)).abs().mean()
    assert difference < 0.02  # as near as bfloat16 is


def test_the_folder_is_the_base_with_another_transformer(exports, runs):
    folder, base = exports.folder / "few_step", tiny_wan_path()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    parts = ("text_encoder", "tokenizer", "vae")
    copied = {path.relative_to(base).as_posix() for part in parts for path in (base / part).rglob("*")}
    own = {"README.md", "fvtitan.json", "model_index.json", "scheduler/scheduler_config.json"}
    assert names == copied | own | {"transformer/config.json", f"transformer/{WEIGHTS_NAME}"}
    assert all((folder / name).read_bytes() == (base / name).read_bytes() for name in copied)
    assert pipeline_shift(folder) == 5.0
    index, theirs = (json.loads((path / "model_index.json").read_text()) for path in (folder, base))
    assert index.pop("dmd2_config") == {
        "num_inference_steps": 4,
        "denoising_timesteps": pytest.approx([1000, 937.5, 833.333, 625], abs=1e-3),
        "solver": "sde",
        "guidance_scale": 1.0,
    }
    assert index == theirs
    contract = read_contract(folder)
    assert (
        contract.spec == METHODS["dmd2"].sampler(read_toml(runs.few_step / "config.toml")) and contract.text_len == 32
    )
    assert json.loads((folder / "fvtitan.json").read_text())["export"]["weights"] == "ema"


def test_a_few_step_student_is_the_same_after_its_reload(exports, runs):
    """The sde sampler, as its contract says: bit for bit."""
    _, before = weights.read_checkpoint(runs.few_step, "student")
    sizes, after = weights.read_pipeline(str(exports.folder / "few_step"))
    assert all(torch.equal(after[name], before[name]) for name in before)
    cfg, contract = read_toml(runs.few_step / "config.toml"), read_contract(exports.folder / "few_step")
    rng = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 3, 16, 4, 4, generator=rng) for _ in contract.sigmas]
    videos = []
    for tensors, spec in ((before, METHODS["dmd2"].sampler(cfg)), (after, contract.spec)):
        model = MODELS["wan"].from_tensors(sizes, tensors, cfg.schedule, RoleConfig())
        cond = model.conditioning([torch.ones(3, sizes.text_dim)])
        with torch.no_grad():
            videos.append(samplers.sample(model, spec, noise[0], cond, None, noise.__getitem__))
    assert torch.equal(*videos)


def test_a_causal_student_has_the_same_network_and_says_its_blocks(runs, tmp_path):
    assert export("--checkpoint", runs.causal, "--output", tmp_path / "causal") == 0
    sizes, tensors = weights.read_pipeline(str(tmp_path / "causal"))
    contract = read_contract(tmp_path / "causal")
    assert contract.streaming and contract.causal.frames_per_block == 1
    assert "dmd2_config" not in json.loads((tmp_path / "causal/model_index.json").read_text())
    card = (tmp_path / "causal/README.md").read_text()
    assert "python -m fvtitan.generate --model ." in card and "```python" not in card
    cfg, noise = read_toml(runs.causal / "config.toml"), torch.randn(1, 3, 16, 4, 4)
    _, before = weights.read_checkpoint(runs.causal, "student", raw=True)
    videos = []
    for state, spec, causal in (
        (before, METHODS["self_forcing"].sampler(cfg), cfg.models["student"].causal()),
        (tensors, contract.spec, contract.causal),
    ):
        role = RoleConfig(name="wan_causal", frames_per_block=causal.frames_per_block)
        model = MODELS["wan_causal"].from_tensors(sizes, state, cfg.schedule, role)
        cond = model.conditioning([torch.ones(3, sizes.text_dim)])
        with torch.no_grad():
            videos.append(samplers.sample(model, spec, noise, cond, None, lambda rung: noise))
    assert torch.equal(*videos)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_original_names_in_one_file(runs, tmp_path, dtype):
    """For ComfyUI and Wan's own code; and for init_from, as a folder and as a file."""
    arguments = ("--checkpoint", runs.finetune, "--ema", "--format", "original", "--dtype", dtype)
    assert export(*arguments, "--output", tmp_path / "original") == 0
    assert sorted(path.name for path in (tmp_path / "original").iterdir()) == [
        "README.md",
        "config.json",
        WEIGHTS_NAME,
        "fvtitan.json",
    ]
    stored = load_file(tmp_path / "original" / WEIGHTS_NAME)
    sizes, expected = weights.read_checkpoint(runs.finetune, "student")
    assert stored.keys() == expected.keys() and stored["patch_embedding.weight"].shape == (128, 16, 1, 2, 2)
    for source in (tmp_path / "original", tmp_path / "original" / WEIGHTS_NAME):
        files = open_weights(str(source))
        assert files.sizes == sizes
        assert all(torch.equal(files.read(name), expected[name].to(files.read(name).dtype)) for name in expected)
    assert read_contract(tmp_path / "original").guidance_scale == 3.0


# LoRA: one adapter, every way into diffusers.


@pytest.mark.parametrize(("alpha", "tolerance"), [pytest.param(8.0, 0.0, marks=pytest.mark.slow), (6.0, 1e-6)])
def test_every_lora_dialect_is_the_trained_adapter(tmp_path, alpha, tolerance):
    """alpha / rank = 2 multiplies exactly: no difference at all between the adapter as it was trained and either file."""
    from diffusers import WanPipeline

    checkpoint = adapter_of(tmp_path, alpha)
    rng = torch.Generator().manual_seed(4)
    call = (torch.randn(1, 16, 3, 4, 4, generator=rng), torch.tensor([500.0]), torch.randn(1, 32, 64, generator=rng))

    def output(folder: Path | None, base: Path) -> Tensor:
        pipeline = WanPipeline.from_pretrained(base, text_encoder=None, tokenizer=None, vae=None)
        if folder is not None:
            pipeline.load_lora_weights(folder, weight_name=program.LORA_NAME)
        with torch.no_grad():
            return pipeline.transformer(*call).sample

    outputs = {}
    for dialect in ("comfy", "diffusers"):
        arguments = ("--checkpoint", checkpoint, "--format", "lora", "--dialect", dialect)
        assert export(*arguments, "--output", tmp_path / dialect) == 0
        outputs[dialect] = output(tmp_path / dialect, tiny_wan_path())
    assert export("--checkpoint", checkpoint, "--merge", "--output", tmp_path / "merged") == 0
    merged, base = output(None, tmp_path / "merged"), output(None, tiny_wan_path())
    size = merged.abs().max()
    assert (merged - base).abs().max() > 0.1 * size  # the adapter matters
    assert (outputs["comfy"] - outputs["diffusers"]).abs().max() <= tolerance * size
    for dialect, there in outputs.items():  # rounded in another order than one matrix
        assert (there - merged).abs().max() <= 1e-6 * size, dialect
    names = load_file(tmp_path / "comfy" / program.LORA_NAME)
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in names and not any("alpha" in name for name in names)


# Whole or absent


def forked(*arguments: object, faults: str = "", largest_file: int = 0) -> int:
    """The program in a process of its own; its exit status, or minus the signal that ended it."""

    def body() -> None:
        os.environ |= {"FVTITAN_TEST": "1", "FVTITAN_FAULTS": faults}
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        sys.exit(export(*arguments))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.faults
@pytest.mark.parametrize(
    "point", ["export.weights step=20", pytest.param("export.before_rename", marks=pytest.mark.slow)]
)
def test_a_killed_export_leaves_nothing_under_its_name(runs, tmp_path, point):
    """Fault 43. SIGKILL in the middle: no folder; the same command then writes it, and the rest is gone."""
    arguments = ("--checkpoint", runs.finetune, "--output", tmp_path / "out")
    assert forked(*arguments, faults=f"kill {point}") == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".out.export.tmp"]
    assert export(*arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.faults
@pytest.mark.parametrize(
    "point", [pytest.param("export.before_rename", marks=pytest.mark.slow), "export.between_renames"]
)
def test_a_killed_replacement_leaves_the_old_one(runs, tmp_path, point):
    """Fault 43. Killed while it replaces an export: the old one is there, or comes back, whole."""
    arguments = ("--checkpoint", runs.finetune, "--output", tmp_path / "out", "--format", "original")
    assert export(*arguments) == 0
    before = content(tmp_path / "out")
    assert forked(*arguments, "--ema", "--overwrite", faults=f"kill {point}") == -signal.SIGKILL
    assert export(*arguments, "--ema") == 2  # it is there, and may not be replaced
    assert content(tmp_path / "out") == before
    assert export(*arguments, "--ema", "--overwrite") == 0
    assert content(tmp_path / "out") != before and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.faults
def test_a_full_disk_is_one_error(runs, tmp_path, capfd):
    """Fault 43. The weights' file cannot be written to its end."""
    status = forked("--checkpoint", runs.finetune, "--output", tmp_path / "out", largest_file=3_000_000)
    assert status == 74 and not list(tmp_path.iterdir())
    assert f"error: cannot write {tmp_path}/out: [Errno 27]" in capfd.readouterr().err


def test_what_diffusers_reads_is_compared(runs, tmp_path, monkeypatch):
    """One bit of one tensor is wrong on the disk: no folder."""
    write = program.write_transformer

    def damaged(export, folder):
        write(export, folder)
        path = folder / WEIGHTS_NAME
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))

    monkeypatch.setattr(program, "write_transformer", damaged)
    with pytest.raises(RuntimeError, match="diffusers does not load what was exported: head.head.bias"):
        export("--checkpoint", runs.finetune, "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_base_of_an_adapter_as_diffusers_takes_it(runs):
    named = {"a/b": "'a/b'", "a/b@v1": "'a/b', revision='v1'", str(tiny_wan_path()): repr(str(tiny_wan_path()))}
    assert {name: base_arguments(name) for name in named} == named
    assert "exported as diffusers" in base_arguments(str(runs.finetune))


def test_exports_need_nothing_that_only_tests_install(runs, tmp_path):
    """As after `pip install -e .`: the packages of the test extra are hidden."""
    extra = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    hidden = dict.fromkeys(re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in extra)
    assert "peft" in hidden
    commands = [
        ["--checkpoint", str(runs.finetune), "--ema", "--output", str(tmp_path / "whole")],
        ["--checkpoint", str(runs.lora), "--format", "lora", "--output", str(tmp_path / "lora")],
    ]
    code = f"import sys\nsys.modules.update({hidden})\nfrom fvtitan import export\n"
    code += f"for arguments in {commands}:\n    sys.argv[1:] = arguments\n    export.main()\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "lora"}


def test_two_exports_of_one_folder(runs, tmp_path, capsys):
    with program._temporary_folder(tmp_path / "out"):
        assert export("--checkpoint", runs.finetune, "--output", tmp_path / "out") == 2
    assert "another export is writing it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    first = contextlib.ExitStack()
    first.enter_context(program._temporary_folder(tmp_path / "out")).rename(tmp_path / "out")
    with program._temporary_folder(tmp_path / "out") as folder:  # the next one, before the first has ended
        first.close()
        assert folder.is_dir()


def test_the_current_folder_is_an_output_too(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert export("--checkpoint", runs.finetune, "--output", ".") == 2
    assert f"--output {tmp_path}/out exists: remove it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def damaged_checkpoint(runs, folder: Path) -> Path:
    copy = shutil.copytree(runs.finetune, folder / "step-2")
    path = next(copy.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    return copy


BAD = {
    "no checkpoint": (lambda r, f: ["--checkpoint", f], "not a checkpoint of a run"),
    "half a checkpoint": (lambda r, f: ["--checkpoint", shutil.copytree(r.finetune, f / "step-2.tmp")], "half-written"),
    "a damaged one": (lambda r, f: ["--checkpoint", damaged_checkpoint(r, f)], "damaged checkpoint"),
    "another role": (lambda r, f: ["--checkpoint", r.finetune, "--role", "critic"], "holds no role 'critic'"),
    "an adapter as a network": (lambda r, f: ["--checkpoint", r.lora], "--merge the whole network as diffusers"),
    "merging nothing": (lambda r, f: ["--checkpoint", r.finetune, "--merge"], "--merge has no effect"),
    "no adapter": (lambda r, f: ["--checkpoint", r.finetune, "--format", "lora"], "a whole network, not an adapter"),
    "merged adapter": (lambda r, f: ["--checkpoint", r.lora, "--format", "lora", "--merge"], "does not go with"),
    "dialect": (lambda r, f: ["--checkpoint", r.finetune, "--dialect", "comfy"], "--dialect comfy has no effect"),
    "base": (
        lambda r, f: ["--checkpoint", r.finetune, "--format", "original", "--base", "tiny-wan"],
        "--base tiny-wan has no effect with --format original",
    ),
    "shard size": (lambda r, f: ["--checkpoint", r.finetune, "--max-shard-size", "10 apples"], "need a size such as"),
    "no base": (lambda r, f: ["--checkpoint", r.finetune, "--base", f / "nowhere"], "is neither"),
    "not a base": (lambda r, f: ["--checkpoint", r.finetune, "--base", f], "not a pipeline in diffusers layout"),
    "another base": (lambda r, f: ["--checkpoint", r.finetune, "--base", wide_base(f)], "text embeddings are 96 wide"),
    "two networks": (lambda r, f: ["--checkpoint", r.finetune, "--base", wan22_base(f)], "of two networks (Wan 2.2)"),
    "there already": (lambda r, f: ["--checkpoint", r.finetune, "--output", f], "exists: remove it, use another"),
    "not ours": (lambda r, f: ["--checkpoint", r.finetune, "--output", f, "--overwrite"], "not written by an export"),
}


def wide_base(folder: Path) -> Path:
    return changed_base(folder, "text_encoder/config.json", d_model=96)


def wan22_base(folder: Path) -> Path:
    return changed_base(folder, "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])


def changed_base(folder: Path, name: str, **changes: object) -> Path:
    base = Path(shutil.copytree(tiny_wan_path(), folder / "base"))
    (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | changes))
    return base


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_one_line(runs, tmp_path, capsys, case):
    make, message = BAD[case]
    (tmp_path / "in").mkdir()
    arguments = make(runs, tmp_path / "in")
    output = [] if "--output" in arguments else ["--output", tmp_path / "out/put"]
    before = content(tmp_path)
    assert export(*arguments, *output) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0], error
    assert content(tmp_path) == before and not (tmp_path / "out/put").exists()


def test_a_full_disk_is_seen_before_anything_is_written(runs, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=8_000_000))
    assert export("--checkpoint", runs.finetune, "--output", tmp_path / "out") == 74
    needed = re.search(
        rf"no space for --output {tmp_path}/out: (\d+) bytes needed, 8000000 free", capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert export("--checkpoint", runs.finetune, "--output", tmp_path / "out") == 0
    written = sum(len(data) for name, data in content(tmp_path / "out").items() if not name.endswith((".md", "x.json")))
    assert abs(written - int(needed[1])) < 30_000  # headers and configs


def test_another_role_is_no_generator(runs, tmp_path):
    """A critic: its network, and no contract."""
    recipe = dmd2_recipe(runs.folder)
    _, tensors = weights.read_pipeline("tiny-wan")
    checkpoint = write_checkpoint(tmp_path / "run", recipe, tensors, tensors, critic=shaken(tensors, 5))
    arguments = ("--checkpoint", checkpoint, "--role", "critic", "--output", tmp_path / "critic")
    assert export(*arguments, "--ema") == 2  # only the student has an average
    assert export(*arguments) == 0
    _, written = weights.read_pipeline(str(tmp_path / "critic"))
    assert all(torch.equal(written[name], tensor) for name, tensor in shaken(tensors, 5).items())
    assert read_contract(tmp_path / "critic") is None
    assert "no generator" in (tmp_path / "critic/README.md").read_text()


def test_nothing_that_is_not_finite_is_exported(runs, tmp_path, capsys):
    _, tensors = weights.read_pipeline("tiny-wan")
    tensors["blocks.1.ffn.0.weight"] = tensors["blocks.1.ffn.0.weight"].clone()
    tensors["blocks.1.ffn.0.weight"][3, 3] = float("nan")
    checkpoint = write_checkpoint(tmp_path / "run", dmd2_recipe(runs.folder), tensors, tensors)
    assert export("--checkpoint", checkpoint, "--output", tmp_path / "out") == 2
    assert "blocks.1.ffn.0.weight of student is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
