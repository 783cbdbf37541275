"""The synthetic set and its judge."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
import torch

from fvtitan.data import moving_shapes as ms
from fvtitan.data.video import read_all_frames, write_video
from fvtitan.errors import UserError
from tests.helpers import run_program


def test_captions_say_everything():
    combinations = ms.all_combinations()
    assert len({attributes.caption for attributes in combinations}) == 576
    assert all(ms.parse_caption(attributes.caption) == attributes for attributes in combinations)
    with pytest.raises(UserError, match="not a caption"):
        ms.parse_caption("a small red dog")


def test_the_held_out_set_is_balanced_and_disjoint():
    held_out, training = ms.held_out_combinations(), ms.training_combinations()
    assert len(set(held_out)) == 48 and len(set(training)) == 528 and not set(held_out) & set(training)
    for name, count in (
        ("colour", 8),
        ("shape", 16),
        ("direction", 12),
        ("size", 24),
        ("speed", 24),
        ("background", 24),
    ):
        assert set(Counter(getattr(attributes, name) for attributes in held_out).values()) == {count}, name


def test_rendering_is_deterministic_and_seeded():
    attributes = ms.all_combinations()[17]
    assert torch.equal(ms.render_clip(attributes, seed=4), ms.render_clip(attributes, seed=4))
    assert not torch.equal(ms.render_clip(attributes, seed=4), ms.render_clip(attributes, seed=5))


def test_the_frame_is_a_torus():
    """64 frames at 3 pixels a frame lead back to the start; area never changes on the way."""
    attributes = ms.Attributes("small", "red", "square", "left", "quickly", "dark")
    clip = ms.render_clip(attributes, num_frames=65, seed=1).numpy().astype(int)
    assert np.abs(clip[0] - clip[64]).max() <= 1
    area = (clip[..., 0] - 85).sum((1, 2))
    assert area.std() / area.mean() < 0.01


def test_the_start_does_not_tell_the_direction():
    for direction in ms.DIRECTIONS:
        centres = []
        for seed in range(60):
            clip = ms.render_clip(
                ms.Attributes("small", "red", "circle", direction, "slowly", "dark"), num_frames=1, seed=seed
            )
            mask = clip[0, :, :, 0].float() - 85
            centres.append([float(ms._circular_mean(mask.sum(axis)[None].numpy())[0]) for axis in (0, 1)])
        x, y = np.array(centres).T
        for position in (x, y):  # uniform on the ring: no preferred angle
            assert abs(np.exp(2j * np.pi * position / 64).mean()) < 0.35


def balanced(step: int) -> list[ms.Attributes]:
    """Every step-th combination. The step must be coprime to 576: a multiple of 12, say, sees slow clips on dark only."""
    chosen = ms.all_combinations()[::step]
    for field in ms.dataclasses.fields(ms.Attributes):
        counts = Counter(getattr(attributes, field.name) for attributes in chosen)
        assert max(counts.values()) - min(counts.values()) <= 2, (field.name, counts)
    return chosen


@pytest.mark.parametrize(("num_frames", "step"), [pytest.param(33, 1, marks=pytest.mark.slow), (33, 11), (97, 23)])
def test_the_judge_is_right_on_rendered_clips(num_frames, step):
    combinations = balanced(step)
    judged = [ms.judge_video(ms.render_clip(a, num_frames=num_frames, seed=9), a.caption) for a in combinations]
    scores = ms.summarise(judged)
    assert all(scores[name] >= 0.99 for name in ms.CHANCE), scores
    assert scores["area_constancy"] > 0.99 and scores["speed_constancy"] > 0.99 and scores["speed_drift"] < 0.01


@pytest.mark.parametrize("step", [pytest.param(5, marks=pytest.mark.slow), 13])
def test_the_judge_is_right_after_mp4(tmp_path, step):
    judged = []
    for i, attributes in enumerate(balanced(step)):
        write_video(tmp_path / f"{i}.mp4", ms.render_clip(attributes, seed=i), fps=16)
        judged.append(ms.judge_video(read_all_frames(tmp_path / f"{i}.mp4"), attributes.caption))
    scores = ms.summarise(judged)
    assert all(scores[name] == 1.0 for name in ms.CHANCE), scores


def test_the_judge_says_no():
    attributes = ms.Attributes("large", "blue", "circle", "up", "quickly", "light")
    clip = ms.render_clip(attributes, seed=2)
    right = ms.judge_video(clip, attributes.caption)
    assert right.colour_correct and right.shape_correct and right.direction_correct
    for name, other in (
        ("colour", "red"),
        ("shape", "square"),
        ("direction", "down"),
        ("size", "small"),
        ("speed", "slowly"),
    ):
        wrong = ms.judge_video(clip, ms.dataclasses.replace(attributes, **{name: other}).caption)
        assert not getattr(wrong, f"{name}_correct"), name
    assert ms.judge_video(clip[:1].expand(33, -1, -1, -1), attributes.caption).direction == ms.NOTHING  # static
    flat = torch.full((33, 64, 64, 3), 100, dtype=torch.uint8)
    assert ms.judge_video(flat, attributes.caption).colour == ms.NOTHING
    backwards = ms.judge_video(clip.flip(0), attributes.caption)
    assert not backwards.direction_correct


@pytest.mark.parametrize("num_frames", [5, 33])
@pytest.mark.parametrize("seed", range(6))
def test_noise_is_wrong_in_everything(num_frames, seed):
    """Not at chance: what has no place in the frame has no colour, shape or direction either."""
    rng = torch.Generator().manual_seed(seed)
    caption = ms.all_combinations()[100].caption
    strong = torch.randint(0, 256, (num_frames, 64, 64, 3), generator=rng, dtype=torch.uint8)
    grain = (100 + 20 * torch.randn(num_frames, 64, 64, 3, generator=rng)).clamp(0, 255).to(torch.uint8)
    for video in (strong, grain):
        judged = ms.judge_video(video, caption)
        assert judged.colour == judged.shape == judged.direction == ms.NOTHING
        assert not any(getattr(judged, f"{name}_correct") for name in ms.CHANCE)


def test_a_shape_that_flashes_up_is_nothing():
    attributes = ms.all_combinations()[100]
    clip = ms.render_clip(attributes, seed=1)
    flash = torch.full_like(clip, ms.BACKGROUNDS[attributes.background])
    flash[3:9] = clip[3:9]
    assert ms.judge_video(flash, attributes.caption).colour == ms.NOTHING


def test_a_shape_under_grain_is_still_seen():
    attributes = ms.Attributes("small", "cyan", "triangle", "up", "slowly", "dark")
    clip = ms.render_clip(attributes, seed=5).float()
    noisy = (clip + 12 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    judged = ms.judge_video(noisy.to(torch.uint8), attributes.caption)
    assert judged.colour_correct and judged.direction_correct and judged.size_correct


def test_the_judge_measures_drift():
    attributes = ms.Attributes("small", "green", "circle", "right", "slowly", "dark")
    whole = ms.render_clip(attributes, num_frames=66, seed=3)
    faster = torch.cat([whole[:33], whole[33::2]])  # the speed doubles half way
    assert ms.judge_video(faster, attributes.caption).speed_drift > 0.4
    large = ms.render_clip(ms.dataclasses.replace(attributes, size="large"), num_frames=33, seed=3)
    grows = ms.judge_video(torch.cat([whole[:33], large]), attributes.caption)
    assert grows.area_drift > 0.5 and grows.area_constancy < 0.7


def test_the_same_clip_is_the_same_file(tmp_path):
    """Clips whose bytes varied, in a percent of the writes, with x264's macroblock tree: too rarely to be seen each time."""
    for i in (2, 4):
        clip = ms.render_clip(ms.all_combinations()[97 * i], seed=i)
        files = set()
        for _ in range(40):
            write_video(tmp_path / "a.mp4", clip, fps=16)
            files.add((tmp_path / "a.mp4").read_bytes())
        assert len(files) == 1
        assert b" mbtree=0" in files.pop()  # x264 writes its settings into the stream


def test_a_half_rendered_set_is_finished_and_a_foreign_one_refused(tmp_path):
    ms.render_dataset(tmp_path / "whole", 6, num_frames=5)
    ms.render_dataset(tmp_path / "half", 6, num_frames=5)
    (tmp_path / "half/000003.mp4").unlink()
    (tmp_path / "half/metadata.jsonl").unlink()
    ms.render_dataset(tmp_path / "half", 6, num_frames=5)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "half" / path.name).read_bytes(), path.name
    with pytest.raises(UserError, match="holds another rendering"):
        ms.render_dataset(tmp_path / "half", 7, num_frames=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        ms.render_dataset(tmp_path / "mine", 7)
    for path in (tmp_path / "mine/thesis.txt", tmp_path / "mine/thesis.txt/below"):
        with pytest.raises(UserError, match=rf"{path} cannot be made \((File exists|Not a directory)\): name another"):
            ms.render_dataset(path, 7)


@pytest.mark.faults
def test_a_rendering_that_was_killed_at_its_first_file_goes_on(tmp_path):
    """Fault 43."""
    (tmp_path / ".render.json.7.tmp").write_text("{")
    ms.render_dataset(tmp_path, 1, num_frames=5, height=32, width=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.mp4", "metadata.jsonl", "render.json"]


def test_programs(tmp_path, capsys):
    assert run_program(ms.main, "render", "--output", tmp_path / "v", "--num-clips", 3) == 0
    assert run_program(ms.main, "judge", "--videos", tmp_path / "v") == 0
    assert "colour             1.000   0.167" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert run_program(ms.main, "judge", "--videos", tmp_path / "empty") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_program_errors_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.mp4").write_text("this is not a video")
    (tmp_path / "damaged/a.txt").write_text(ms.all_combinations()[0].caption)
    (tmp_path / "json").mkdir()
    (tmp_path / "json/metadata.jsonl").write_text('{"file_name": "a.mp4"}\n')
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/metadata.jsonl").write_text('{"file_name": "../damaged/a.mp4", "caption": "x"}\n')
    (tmp_path / "link").mkdir()
    (tmp_path / "link/a.mp4").symlink_to(tmp_path / "damaged/a.mp4")
    (tmp_path / "link/a.txt").write_text("x")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin/a.txt").write_bytes(b"\xe9")
    for arguments, message in (
        (["judge", "--videos", str(tmp_path / "outside")], "the video '../damaged/a.mp4' leaves the folder"),
        (["judge", "--videos", str(tmp_path / "link")], "the video 'a.mp4' leaves the folder"),
        (["judge", "--videos", str(tmp_path / "latin")], "a.txt: cannot read the caption: 'utf-8' codec can't decode"),
        (["judge", "--videos", str(tmp_path / "damaged")], "a.mp4: damaged or not a video"),
        (["judge", "--videos", str(tmp_path / "json")], "need file_name and caption"),
        (["render", "--output", str(tmp_path / "o"), "--num-clips", "2", "--height", "33"], "--height 33: .* 32 or 34"),
        (["render", "--output", str(tmp_path / "o"), "--num-clips", "0"], "--num-clips 0: must be >= 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["moving_shapes", *arguments])
        with pytest.raises(UserError, match=message) as caught:
            ms.main()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()
