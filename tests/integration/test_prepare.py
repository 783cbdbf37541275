"""What prepare_data makes and accepts for methods that read latents and for those that read prompts alone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from fvtitan.config import JobConfig
from fvtitan.data import moving_shapes as ms
from fvtitan.data.latent_cache import LatentCache
from fvtitan.data.prepare import prepare_data
from fvtitan.errors import UserError
from fvtitan.methods import METHODS
from fvtitan.methods.finetune import FineTuneMethod
from fvtitan.preprocess import PreprocessConfig, preprocess
from tests.helpers import causal_recipe, make_cache, small_config

NUM_CLIPS = 600  # more than the 528 combinations of the train split


class PromptsOnly(FineTuneMethod):
    """A method that reads no latents."""

    @classmethod
    def needs_latents(cls, cfg: JobConfig) -> bool:
        return False


@pytest.fixture
def prompts_only(monkeypatch):
    monkeypatch.setitem(METHODS, "finetune", PromptsOnly)


@pytest.fixture(scope="module")
def prompt_cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("a prompt\nanother one\n")
    preprocess(PreprocessConfig("", "tiny-wan", str(folder / "cache"), prompts=str(folder / "prompts.txt")))
    return folder / "cache"


def test_latents_are_needed(prompt_cache, tmp_path):
    videos = make_cache(tmp_path / "cache")
    prepare_data(small_config(videos, tmp_path / "run"))
    with pytest.raises(UserError, match=r"data\.height = 64, but the cache .* was made with height = 32"):
        prepare_data(small_config(videos, tmp_path / "run", data__height=64))
    with pytest.raises(
        UserError,
        match=r'data\.path = .* without latents, and method\.name = "finetune" as configured needs the latents of videos: '
        r"give another data\.path; `python -m fvtitan\.preprocess --data DIR",
    ):
        prepare_data(small_config(prompt_cache, tmp_path / "run"))
    heldout = {"validation__enable": True, "validation__heldout_path": prompt_cache}
    with pytest.raises(UserError, match=r"validation\.heldout_path = .* without latents, and validation/loss needs"):
        prepare_data(small_config(videos, tmp_path / "run", **heldout))


def test_every_bucket_has_whole_blocks(tmp_path):
    videos = make_cache(tmp_path / "cache", num_portrait=4, num_long=4)
    for blocks, problem in (
        (1, ""),
        (3, "data.path = .*cache' has clips of 17 frames; models.student: 5 latent frames"),
    ):
        recipe = causal_recipe(tmp_path, frames_per_block=blocks)
        with pytest.raises(UserError, match=problem) if problem else contextlib.nullcontext():
            prepare_data(small_config(videos, tmp_path / "run", job__config_file=recipe))


def test_prompts_are_enough(prompts_only, prompt_cache, tmp_path):
    videos = make_cache(tmp_path / "cache")
    prepare_data(small_config(prompt_cache, tmp_path / "run"))
    prepare_data(small_config(videos, tmp_path / "run", data__height=64))  # of its clips nothing is read
    heldout = {"validation__enable": True, "validation__heldout_path": prompt_cache}
    with pytest.raises(UserError, match=r"validation\.heldout_path = .* without latents, and validation/loss needs"):
        prepare_data(small_config(videos, tmp_path / "run", **heldout))
    with pytest.raises(UserError, match="does not exist"):
        prepare_data(small_config(tmp_path / "nowhere", tmp_path / "run"))
    (videos / "samples.jsonl").unlink()
    with pytest.raises(UserError, match="samples.jsonl is damaged"):
        prepare_data(small_config(videos, tmp_path / "run"))


def test_moving_shapes_without_videos(prompts_only, tmp_path, capsys):
    cache = tmp_path / "deep/cache"
    cfg = small_config(cache, tmp_path / "run", data__moving_shapes_clips=NUM_CLIPS)
    prepare_data(cfg)
    data = LatentCache(cache)
    captions = [sample["caption"] for sample in data.samples]
    assert not data.has_latents and len(captions) == 528 == len(set(captions))
    assert sorted(captions) == sorted(a.caption for a in ms.training_combinations())
    assert sorted(path.name for path in cache.parent.iterdir()) == ["cache", "cache_prompts.txt"]
    capsys.readouterr()
    prepare_data(cfg)
    assert capsys.readouterr().out == ""
    (cache / "manifest.json").unlink()  # a run that was killed goes on ...
    prepare_data(cfg)
    (cache / "manifest.json").unlink()  # ... but not as another one
    with pytest.raises(UserError, match="cache_prompts.txt exists and holds other prompts than this run's: remove it"):
        prepare_data(small_config(cache, tmp_path / "run", data__moving_shapes_clips=5))


def test_a_few_moving_shapes_have_the_captions_of_their_clips(prompts_only, tmp_path):
    cfg = small_config(tmp_path / "cache", tmp_path / "run", data__moving_shapes_clips=5, training__seed=3)
    prepare_data(cfg)
    ms.render_dataset(tmp_path / "clips", 5, num_frames=1, height=16, width=16, seed=3)
    lines = (tmp_path / "clips/metadata.jsonl").read_text().splitlines()
    expected = [json.loads(line)["caption"] for line in lines]
    assert [sample["caption"] for sample in LatentCache(tmp_path / "cache").samples] == expected


def test_heldout_clips_are_rendered_for_either(prompts_only, tmp_path):
    cfg = small_config(
        tmp_path / "cache",
        tmp_path / "run",
        data__moving_shapes_clips=3,
        validation__enable=True,
        validation__heldout_path=tmp_path / "heldout",
        validation__heldout_clips=2,
    )
    prepare_data(cfg)
    heldout = LatentCache(tmp_path / "heldout")
    assert heldout.has_latents and len(heldout) == 2 and not LatentCache(tmp_path / "cache").has_latents
    assert heldout[0]["caption"] in {a.caption for a in ms.held_out_combinations()}
