"""Generation: a stream is the whole video in parts, and its file plays while it grows."""

from __future__ import annotations

import sys

import pytest
import torch

from fvtitan import generate as program
from fvtitan.components.validation import to_uint8
from fvtitan.data.video import VideoWriter, read_all_frames
from fvtitan.errors import cli
from fvtitan.generate import generate, load_model, unconditional_prompt
from fvtitan.models.encoders import TextEncoder, VideoVAE
from fvtitan.models.pipeline import TINY_WAN
from tests.helpers import make_cache, small_arguments, train

PROMPT = "a small red circle moving left slowly on a dark grey background"


@pytest.fixture(scope="module")
def vae():
    return VideoVAE(TINY_WAN)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A causal student that started from the shipped weights, with a window, after one step."""
    folder = tmp_path_factory.mktemp("generate")
    recipe = folder / "recipe.toml"
    recipe.write_text(
        '[models.student]\nname = "wan_causal"\ninit_from = "tiny-wan"\nframes_per_block = 3\nlocal_attn_frames = 6\n'
        '[method]\nname = "dfsft"\n[schedule]\nshift = 5.0\n[validation]\nsampling_steps = 2\nguidance_scale = 3.0\n'
    )
    arguments = small_arguments(make_cache(folder / "cache"), folder / "run", training__steps=1, ema__start_step=0)
    assert train(["--job.config_file", str(recipe), *arguments]) == 0
    return folder / "run/checkpoint/step-1"


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    try:
        cli(program.main)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.parametrize("blocks", [(9,), (3, 3, 3), (1, 2, 6), (1,) * 9])
def test_decoding_in_parts_is_decoding_the_whole(vae, blocks):
    latents = torch.randn(2, 9, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    parts = list(vae.decode_stream(latents.split(blocks, dim=1)))
    assert [part.shape[1] for part in parts] == [4 * b - (3 if not i else 0) for i, b in enumerate(blocks)]
    assert torch.allclose(torch.cat(parts, dim=1), vae.decode(latents), atol=1e-5)
    again = torch.cat(list(vae.decode_stream(latents.split(3, dim=1))), dim=1)  # nothing of an earlier stream is left
    assert torch.allclose(again, torch.cat(parts, dim=1), atol=1e-5)


def test_a_live_video_plays_while_it_grows(tmp_path):
    frames = torch.randint(0, 256, (21, 64, 64, 3), dtype=torch.uint8)
    with VideoWriter(tmp_path / "live.mp4", 16, live=True) as writer:
        for start, end in ((0, 9), (9, 21)):
            writer.append(frames[start:end])
            # The muxer ends a fragment when the next begins, so the last part may still be in the making.
            seen = len(read_all_frames(tmp_path / "live.mp4")) if start else 0
        assert seen >= 9
    assert len(read_all_frames(tmp_path / "live.mp4")) == 21


def test_a_failed_video_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), VideoWriter(tmp_path / "a.mp4", 16) as writer:
        writer.append(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
        raise RuntimeError("boom")
    assert not list(tmp_path.iterdir())


def test_a_stream_is_the_method_s_own_sampler_block_by_block(checkpoint, vae):
    loaded = load_model(str(checkpoint))
    encoder = TextEncoder(TINY_WAN)
    embeds, empty = (row.bfloat16() for row in encoder.encode([PROMPT, unconditional_prompt(loaded.data)]))
    loaded.model.uncond_embeds = empty
    keys = {"seed": 3, "number": 1, "shape": (12, 16, 4, 4)}
    parts = list(generate(loaded.model, loaded.spec, vae, embeds, **keys))
    assert [len(part) for part in parts] == [9, 12, 12, 12]
    with torch.no_grad():
        whole = program.samplers.sample(
            loaded.model,
            loaded.spec,
            program.fixed_noise(3, [1], keys["shape"]),
            loaded.model.conditioning([embeds]),
            loaded.model.unconditional(1),
        )
    difference = (torch.cat(parts).int() - to_uint8(vae.decode(whole)[0]).int()).abs().max()
    assert difference <= 1  # a rounding of the last bit


def test_the_program_streams_past_the_trained_length(checkpoint, tmp_path, monkeypatch, capsys):
    """9 frames were trained on, 45 are written."""
    arguments = ["--model", checkpoint, "--prompts", PROMPT, "--stream", "--height", 32, "--width", 32]
    assert run([*arguments, "--num-frames", 45, "--output", tmp_path / "long"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert (
        "streamed Euler, guidance 3, 45 frames of 32 x 32" in out and "first block after" in out and "frames/s" in out
    )
    (video,) = (tmp_path / "long").glob("*.mp4")
    assert len(read_all_frames(video)) == 45 and (tmp_path / "long/contact_sheet.png").is_file()


def test_the_program_samples_a_pipeline(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na large blue square moving up\n")
    arguments = ["--model", TINY_WAN, "--prompt-file", tmp_path / "prompts.txt", "--steps", 1, "--num-frames", 9]
    assert run([*arguments, "--output", tmp_path / "out"], monkeypatch) == 0
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 2
    assert "Euler, guidance 5, 9 frames of 64 x 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", TINY_WAN, "--prompts", "a", "--stream"], "--stream: tiny-wan sees a whole video at once"),
        (["--model", TINY_WAN, "--prompts", "a", "--num-frames", "32"], "num_frames = 32: must be 4n + 1"),
        (["--model", "nowhere", "--prompts", "a"], "'nowhere' is neither"),
        (["--model", TINY_WAN, "--prompt-file", "nowhere.txt"], "cannot read it"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    assert run([*arguments, "--output", tmp_path / "out"], monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "out").exists()


def test_a_length_that_does_not_fit_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--model", checkpoint, "--prompts", "a", "--num-frames", "97", "--output", tmp_path / "out"]
    assert run(arguments, monkeypatch) == 2
    assert "25 latent frames do not divide into blocks of 3" in capsys.readouterr().err
