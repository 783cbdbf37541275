"""The scoring program: pipelines and checkpoints as they are, one row a way of sampling."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fvtitan import score
from fvtitan.assets import tiny_wan_path
from fvtitan.assets.build_tiny_wan import training_minutes, transformer_tensors
from fvtitan.components.checkpoint_folder import DamagedCheckpoint, read_tensors
from fvtitan.errors import UserError
from fvtitan.generate import load_model, parse_rungs
from fvtitan.models.encoders import VideoVAE
from fvtitan.models.pipeline import TINY_WAN, pipeline_shift
from fvtitan.models.wan import weights
from fvtitan.models.wan.model import WanCausalModel
from fvtitan.samplers import SamplerSpec, num_forwards
from fvtitan.score import comparison, paired_difference, score_sources, table
from tests.helpers import make_cache, read_checkpoint, run_program, small_arguments, train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """tiny-wan made causal, after two steps, with a moving average that is not the student."""
    folder = tmp_path_factory.mktemp("score")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        '[models.student]\nname = "wan_causal"\ninit_from = "tiny-wan"\nframes_per_block = 3\nlocal_attn_frames = 6\n'
        '[method]\nname = "dfsft"\n[validation]\nsampling_steps = 2\nguidance_scale = 3.0\n'
    )
    arguments = small_arguments(make_cache(folder / "cache"), folder / "run", training__steps=2, ema__start_step=0)
    assert train(["--job.config_file", str(recipe), *arguments]) == 0
    return folder / "run/checkpoint/step-2"


def test_a_checkpoint_is_read_whole_without_a_run(checkpoint):
    stored = read_checkpoint(checkpoint)
    for raw, prefix in ((True, "roles.student.transformer."), (False, "ema.student.")):
        sizes, tensors = weights.read_checkpoint(checkpoint, "student", raw=raw)
        assert sizes.text_len == 32 and len(tensors) > 60
        for name, tensor in tensors.items():
            assert torch.equal(tensor, stored[prefix + name]), name
    assert not torch.equal(
        stored["ema.student.blocks.0.ffn.0.weight"], stored["roles.student.transformer.blocks.0.ffn.0.weight"]
    )
    assert read_tensors(checkpoint, "roles.critic") == {}
    with pytest.raises(UserError, match="holds no role 'critic'"):
        weights.read_checkpoint(checkpoint, "critic")
    with pytest.raises(UserError, match="no checkpoint"):
        read_tensors(checkpoint.with_name("step-9"), "roles")
    for name, tensor in transformer_tensors(str(checkpoint)).items():  # what is built is the average
        assert torch.equal(tensor, stored[f"ema.student.{name}"])


def test_no_init_from_is_no_checkpoint_wherever_one_stands(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    assert weights.is_checkpoint(checkpoint) and not weights.is_checkpoint("")


def test_a_changed_byte_is_seen(checkpoint, tmp_path):
    import shutil

    copy = tmp_path / "step-2"
    shutil.copytree(checkpoint, copy)
    shard = next(copy.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=shard.name):
        read_tensors(copy, "roles")


def test_a_checkpoint_is_sampled_as_its_method_says(checkpoint):
    loaded = load_model(str(checkpoint))
    model, spec = loaded.model, loaded.contract.spec
    assert isinstance(model, WanCausalModel) and model.causal.window == 6 and loaded.contract.unconditional_prompt == ""
    assert spec.streaming and len(spec.sigmas) == 3 and spec.guidance_scale == 3.0
    assert num_forwards(spec, num_blocks=3) == 2 * (3 * 2 + 2)  # two steps a block, and two blocks committed
    assert num_forwards(SamplerSpec((1.0, 0.5, 0.0))) == 2


def test_a_pipeline_is_sampled_on_its_own_shift(tmp_path):
    assert load_model("tiny-wan").model.schedule.shift == 5.0
    for config, shift in (({"shift": 2.0}, 2.0), ({"flow_shift": 3}, 3.0)):
        (tmp_path / "scheduler").mkdir(exist_ok=True)
        (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(config))
        assert pipeline_shift(tmp_path) == shift
    (tmp_path / "scheduler/scheduler_config.json").write_text("{}")
    with pytest.raises(UserError, match="need a positive shift or flow_shift, found None"):
        pipeline_shift(tmp_path)
    with pytest.raises(UserError, match="cannot read the pipeline's shift"):
        pipeline_shift(tmp_path / "nowhere")


def test_latents_that_are_not_finite_are_refused(monkeypatch):
    model, vae = load_model(TINY_WAN).model, VideoVAE(TINY_WAN)
    monkeypatch.setattr(score, "sample_latents", lambda *a, shape, **k: torch.full((1, *shape), torch.nan))
    spec = SamplerSpec((1.0, 0.0))
    with pytest.raises(UserError, match="tiny: the latents are not finite"):
        score.score("tiny", model, spec, vae, ["a red circle"], [torch.zeros(1, 64)], num_frames=5, num_videos=1)


def test_rows_and_table(checkpoint):
    sources = ["tiny-wan", str(checkpoint)]
    scored = list(score_sources(sources, steps=(2, 1), lengths=(9, 21), num_videos=2, guidance=(3.0,)))
    rows = [row for row, _ in scored]
    assert [(row.model, row.steps, row.num_frames, row.forwards) for row in rows] == [
        ("tiny-wan", 2, 9, 4),
        ("tiny-wan", 1, 9, 2),
        (str(checkpoint), 2, 9, 4),
        ("VAE round trip", 0, 9, 0),
        ("tiny-wan", 2, 21, 4),
        ("tiny-wan", 1, 21, 2),
        (str(checkpoint), 2, 21, 10),
        ("VAE round trip", 0, 21, 0),
    ]
    assert rows[3].scores["colour"] == rows[3].scores["direction"] == 1.0  # rendered clips
    videos = scored[4][1]
    assert len(videos) == 2 and videos[0][1].shape == (21, 64, 64, 3) and videos[0][1].dtype == torch.uint8
    before = load_model(sources[1], untrained=True)
    assert isinstance(before.model, WanCausalModel) and before.contract == load_model(sources[1]).contract
    for name, tensor in weights.read_pipeline("tiny-wan")[1].items():
        assert torch.equal(before.model.transformer.get_parameter(name), tensor), name
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows) + 1 and len({line.count("|") for line in lines}) == 1
    keys = {"steps": (2,), "lengths": (9, 21), "num_videos": (2, 1), "guidance": (3.0,), "ceiling": False}
    again = [row for row, _ in score_sources(sources, untrained=True, **keys)]
    assert again[0].scores == rows[0].scores and again[1].scores == rows[2].scores  # noise is fixed
    names = [(row.model, row.untrained, row.num_frames, len(row.judged)) for row in again]
    models = [("tiny-wan", False), (sources[1], False), (f"{sources[1]}, untrained", True)]
    assert names == [(*model, *size) for size in ((9, 2), (21, 1)) for model in models]


def test_a_student_that_began_at_random_has_no_untrained_self(tmp_path):
    (tmp_path / "config.toml").write_text('[models.student]\nflavor = "tiny"\n')
    with pytest.raises(
        UserError, match="models.student.init_from is empty: the student was random before its training"
    ):
        weights.read_untrained(tmp_path, "student")


def test_a_length_that_does_not_fit_is_refused_before_sampling(checkpoint):
    with pytest.raises(UserError, match="25 latent frames do not divide into blocks of 3; nearest: 24"):
        next(score_sources(["tiny-wan", str(checkpoint)], steps=(1,), lengths=(9, 97), num_videos=1, guidance=(3.0,)))


def test_the_program(tmp_path, capsys):
    small = ["--steps", 1, "--num-frames", 9, "--num-videos", 1, "--output", tmp_path]
    assert run_program(score.main, *small) == 0
    said = capsys.readouterr().out
    assert "| tiny-wan | Euler, guidance 3 | 1 | 9 | 2 |" in said and "| VAE round trip |" in said
    assert [row["model"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["tiny-wan", "VAE round trip"]
    assert (tmp_path / "01-1-steps-9-frames.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-frames", "32"], "--num-frames 32: must be 4n + 1"),
        (["--steps", "0"], "--steps 0: must be >= 1"),
        (["--num-videos", "4", "2"], "--num-videos 4 2: need one number, or one for each of the 1 lengths"),
        (["--models", "nowhere"], "'nowhere' is neither"),
        (["--guidance", "3", "nan"], "--guidance nan: must be >= 0"),
        (["--raw"], "--raw: none of --models is the checkpoint of a run"),
        (["--untrained"], "--untrained: none of --models is the checkpoint of a run"),
        (["--thirds", "--num-frames", "1"], "--thirds: --num-frames 1 has no thirds"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert run_program(score.main, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_training_minutes_come_from_the_rates(tmp_path):
    records = [
        {"step": 1, "perf/step_seconds": 60.0},
        {"step": 5, "perf/step_seconds": 30.0},
        {"step": 6, "x": 1},
        {"step": 7, "perf/step_seconds": 9.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert training_minutes(path, 6) == pytest.approx(1 + 4 * 0.5)


def test_the_shipped_transformer_is_a_tiny_one():
    assert transformer_tensors(str(tiny_wan_path())).keys() == transformer_tensors("").keys()


def test_few_step_ladders_thirds_and_differences(checkpoint):
    """Pipelines are sampled on the ladders too; a checkpoint is compared with what has as many steps and with the most, on the
    same videos; the ends of a video are judged by themselves."""
    keys = {"steps": (3, 2), "lengths": (21,), "num_videos": 2, "guidance": (3.0, 1.0), "thirds": True}
    rows = [row for row, _ in score_sources(["tiny-wan", str(checkpoint)], rungs=[(1000.0, 500.0)], **keys)]
    assert [(row.sampler, row.steps, row.forwards) for row in rows[:5]] == [
        ("Euler, guidance 3", 3, 6),
        ("Euler, guidance 3", 2, 4),
        ("Euler", 3, 3),
        ("Euler", 2, 2),
        ("re-noised at 1000, 833", 2, 2),
    ]
    assert rows[5].sampler == "streamed Euler, guidance 3" and rows[5].own and not rows[0].own
    assert all(len(third) == 2 for row in rows[:6] for third in row.thirds)
    lines = table(rows).splitlines()
    assert sum(", last third |" in line for line in lines) == 6 and len(lines) == 2 + 6 * 3 + 1 + 1
    compared = comparison(rows).splitlines()[2:]
    assert [line.split(" | ")[1] for line in compared] == [
        "tiny-wan, 3 x Euler, guidance 3",
        "tiny-wan, 2 x Euler, guidance 3",
        "tiny-wan, 3 x Euler",
        "tiny-wan, 2 x Euler",
        "tiny-wan, 2 x re-noised at 1000, 833",
    ]
    assert comparison(rows[:5]) == ""


def test_paired_differences_have_bootstrap_intervals():
    rng = np.random.RandomState(0)
    first, noise = rng.rand(400), 0.1 * rng.randn(400)
    mean, low, high = paired_difference(first + 0.02 + noise, first)
    error = 1.645 * noise.std() / 20
    assert mean == pytest.approx(0.02 + noise.mean()) and low < mean < high
    assert (mean - low, high - mean) == pytest.approx((error, error), rel=0.1)
    assert paired_difference(first, first) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("text", ["500,250", "1000,1000", "1000,x", "1000,0", "250,1000"])
def test_ladders_that_are_none(text):
    with pytest.raises(UserError, match=f"--rungs {text}: need timesteps that descend from 1000"):
        parse_rungs(text)
