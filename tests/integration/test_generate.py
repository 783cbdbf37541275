"""Generation: a stream is the whole video in parts, every source is sampled as it says, what is written is whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from fvtitan import generate as program
from fvtitan.assets import tiny_wan_path
from fvtitan.components.validation import to_uint8
from fvtitan.config import read_toml
from fvtitan.contract import contract_of
from fvtitan.data.video import VideoWriter, read_all_frames
from fvtitan.distributed.utils import only_job
from fvtitan.errors import UserError, cli
from fvtitan.flow_matching import few_step_ladder
from fvtitan.generate import generate, load_model, read_prompt_file
from fvtitan.models.encoders import TextEncoder, VideoVAE
from fvtitan.models.pipeline import CONTRACT_NAME, TINY_WAN
from fvtitan.models.wan import weights
from tests.helpers import make_cache, small_arguments, train
from tests.integration.exact_worker import output

PROMPT = "a small red circle moving left slowly on a dark grey background"
SMALL = ["--steps", 2, "--num-frames", 9, "--height", 32, "--width", 32]


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


@pytest.fixture(scope="module")
def export(checkpoint, tmp_path_factory):
    """The same student, its moving average, as a pipeline in diffusers layout with its contract."""
    folder = tmp_path_factory.mktemp("export") / "student"
    shutil.copytree(tiny_wan_path(), folder)
    sizes, tensors = weights.read_checkpoint(checkpoint, "student")
    weights.save_transformer(tensors, sizes, folder / "transformer")
    contract = contract_of(read_toml(checkpoint / "config.toml"), sizes.text_len)
    (folder / CONTRACT_NAME).write_text(contract.to_json())
    return folder


def run(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    try:
        cli(program.main)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def forked(
    ranks: int,
    arguments: list[object],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[], None] = lambda: None,
) -> list[int]:
    """The program on ranks of their own, as torchrun starts them; exit statuses, -9 for a killed one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    environment["TORCHELASTIC_USE_AGENT_STORE"] = True
    children = []
    for rank in range(ranks):
        if not (child := os.fork()):
            torch.set_num_threads(1)  # the parent's threads are not here
            here = {**environment, "RANK": rank, "LOCAL_RANK": rank}
            os.environ.update({key: str(value) for key, value in here.items()})
            with open(folder / f"rank{rank}.log", "w", buffering=1) as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdout, sys.stderr = log, log
                code = 70
                try:
                    before()
                    code = run(arguments, monkeypatch)
                finally:
                    log.flush()
                    os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def videos(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*.mp4"))}


def report(folder: Path) -> dict:
    return json.loads((folder / "generate.json").read_text())


# --------------------------------------------------------------------------------------------------------- streams


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
            seen = len(read_all_frames(tmp_path / "live.part.mp4")) if start else 0
        assert seen >= 9 and not (tmp_path / "live.mp4").exists()
    assert len(read_all_frames(tmp_path / "live.mp4")) == 21
    assert [path.name for path in tmp_path.iterdir()] == ["live.mp4"]


@pytest.mark.parametrize("live", [False, True])
def test_a_failed_video_leaves_nothing(tmp_path, live):
    with pytest.raises(RuntimeError, match="boom"), VideoWriter(tmp_path / "a.mp4", 16, live=live) as writer:
        writer.append(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
        raise RuntimeError("boom")
    assert not list(tmp_path.iterdir())


def test_a_stream_is_the_method_s_own_sampler_block_by_block(checkpoint, vae):
    loaded = load_model(str(checkpoint))
    encoder = TextEncoder(TINY_WAN)
    embeds, empty = (row.bfloat16() for row in encoder.encode([PROMPT, loaded.contract.unconditional_prompt]))
    loaded.model.uncond_embeds = empty
    shape, spec = (12, 16, 4, 4), loaded.contract.spec
    parts = list(generate(loaded.model, spec, vae, embeds, seed=3, shape=shape))
    assert [len(part) for part in parts] == [9, 12, 12, 12]
    with torch.no_grad():
        noise, cond = program.fixed_noise(3, [0], shape), loaded.model.conditioning([embeds])
        whole = program.samplers.sample(loaded.model, spec, noise, cond, loaded.model.unconditional(1))
    difference = (torch.cat(parts).int() - to_uint8(vae.decode(whole)[0]).int()).abs().max()
    assert difference <= 1  # a rounding of the last bit


def test_latents_that_are_not_finite_are_refused(vae):
    loaded = load_model(TINY_WAN)
    with torch.no_grad():
        loaded.model.transformer.patch_embedding.weight[0] = float("nan")
    spec = program.SamplerSpec((1.0, 0.0))
    with pytest.raises(UserError, match="seed 4: the latents are not finite"):
        next(generate(loaded.model, spec, vae, torch.zeros(2, 64).bfloat16(), seed=4, shape=(3, 16, 4, 4)))


# --------------------------------------------------------------------------------------------------------- sources


def test_the_program_streams_past_the_trained_length(checkpoint, tmp_path, monkeypatch, capsys):
    """9 frames were trained on, 45 are written."""
    arguments = ["--model", checkpoint, "--prompts", PROMPT, "--stream", "--num-frames", 45]
    assert run([*arguments, "--output", tmp_path / "long"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "streamed Euler, guidance 3, 2 steps, 45 frames of 32 x 32 at 16 fps, 1 videos" in out
    assert "the first block after" in out and "frames/s" in out and "WARNING" not in out
    (video,) = (tmp_path / "long").glob("*.mp4")
    assert len(read_all_frames(video)) == 45
    assert {path.name for path in (tmp_path / "long").iterdir()} == {video.name, "contact_sheet.png", "generate.json"}


def test_an_export_is_sampled_as_its_checkpoint(checkpoint, export, tmp_path, monkeypatch, capsys):
    """By its contract alone; and flags change what they say."""
    common = ["--prompts", PROMPT, "--stream", "--num-frames", 21, "--output"]
    assert run(["--model", checkpoint, *common, tmp_path / "checkpoint"], monkeypatch) == 0
    assert run(["--model", export, *common, tmp_path / "export"], monkeypatch) == 0
    assert videos(tmp_path / "export") == videos(tmp_path / "checkpoint")
    capsys.readouterr()

    changes = "--guidance 4 --rungs 1000,500 --solver sde --shift 2 --fps 8 --num-frames 9 --height 16 --seed 7".split()
    negative = ["--negative-prompt", "a blue square"]
    arguments = ["--model", export, "--prompts", PROMPT, *changes, *negative]
    assert run([*arguments, "--output", tmp_path / "changed"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert "guidance_scale: 4.0 instead of 3.0" in out
    assert "solver: 'sde' instead of 'ode'" in out
    assert "unconditional_prompt: 'a blue square' instead of ''" in out
    assert "WARNING: the model was trained at 9 frames of 32 x 32, not at 9 frames of 16 x 32" in out
    assert "WARNING: trained at 16 fps: played at 8" in out
    written = report(tmp_path / "changed")
    sampler = written["sampler"]
    assert sampler["sigmas"] == pytest.approx(few_step_ladder([1000, 500], 2.0))
    assert (sampler["solver"], sampler["shift"], sampler["guidance_scale"]) == ("sde", 2.0, 4.0)
    assert (sampler["fps"], sampler["height"], sampler["width"], sampler["num_frames"]) == (8, 16, 32, 9)
    assert sampler["unconditional_prompt"] == "a blue square" and sampler["causal"]["window"] == 6
    assert written["complete"] and written["videos"][0].keys() == {"file", "prompt", "seed", "seconds"}
    again = written["arguments"][:-1] + [tmp_path / "again"]
    assert run(again, monkeypatch) == 0
    assert videos(tmp_path / "again") == videos(tmp_path / "changed")
    assert run([*arguments[: -len(negative)], "--output", tmp_path / "without"], monkeypatch) == 0
    assert videos(tmp_path / "without") != videos(tmp_path / "changed")


def test_a_pipeline_gives_one_video_a_prompt_each_with_its_seed(tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"caption": PROMPT},
        {"prompt": "色调艳丽", "seed": 11},
        {"text": "../../a large blue square\n" + "moving " * 40},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    out = tmp_path / "out"
    arguments = ["--model", TINY_WAN, *SMALL]
    assert run([*arguments, "--prompt-file", prompts, "--seed", 5, "--output", out], monkeypatch) == 0
    said = capsys.readouterr().out
    assert "tiny-wan: Euler, guidance 5, 2 steps, 9 frames of 32 x 32 at 16 fps, 3 videos" in said
    assert "WARNING: only the first 32 of" in said and "3/3" in said
    written = report(out)
    assert [video["seed"] for video in written["videos"]] == [5, 11, 7] and written["complete"]
    assert [video["prompt"] for video in written["videos"]] == [next(iter(line.values())) for line in lines]
    assert list(videos(out)) == [video["file"] for video in written["videos"]]
    assert list(videos(out))[1] == "0001.mp4" and list(videos(out))[2].startswith("0002-a-large-blue-square-moving-")
    assert len(set(videos(out).values())) == 3
    assert Image.open(out / "contact_sheet.png").size[0] > 8 * 96
    # The third one by itself, in the other precision, and as it was.
    alone = ["--prompts", lines[2]["text"], "--seed", 7, "--output"]
    for dtype, same in (("float32", True), ("bfloat16", False)):
        assert run([*arguments, "--dtype", dtype, *alone, tmp_path / dtype], monkeypatch) == 0
        assert (list(videos(tmp_path / dtype).values())[0] == videos(out)[written["videos"][2]["file"]]) == same
        assert report(tmp_path / dtype)["dtype"] == dtype


def test_ranks_share_the_prompts_and_change_nothing(tmp_path, monkeypatch):
    prompts = [PROMPT, "a large blue square", "a green triangle"]
    arguments = ["--model", TINY_WAN, *SMALL, "--prompts", *prompts, "--output"]
    assert forked(1, [*arguments, tmp_path / "1"], tmp_path, monkeypatch) == [0], output(tmp_path)
    assert forked(2, [*arguments, tmp_path / "2"], tmp_path, monkeypatch) == [0, 0], output(tmp_path)
    assert videos(tmp_path / "1") == videos(tmp_path / "2") and len(videos(tmp_path / "1")) == 3
    assert "rank 1: 1/1" in (tmp_path / "rank1.log").read_text()
    assert "0001-a-large-blue-square.mp4: seed 1" in (tmp_path / "rank1.log").read_text()
    one, two = (report(tmp_path / name) for name in ("1", "2"))
    for both in (one, two):
        assert both.pop("arguments")[:-1] == list(map(str, arguments))
        assert all(video.pop("seconds") > 0 for video in both["videos"])
    assert one == two
    sheets = [(tmp_path / name / "contact_sheet.png").read_bytes() for name in ("1", "2")]
    assert sheets[0] == sheets[1]


# ------------------------------------------------------------------------------------------------ whole or absent


@pytest.mark.faults
@pytest.mark.parametrize("stream", [False, True])
def test_a_kill_leaves_whole_videos_and_overwrite_begins_again(stream, checkpoint, tmp_path, monkeypatch):
    """Fault 43, of generate: SIGKILL while the second video is written."""
    append, count = VideoWriter.append, iter(range(100))
    blocks = 3 if stream else 1

    def killed(self: VideoWriter, frames: torch.Tensor) -> None:
        append(self, frames)
        if next(count) == 2 * blocks - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "out"
    out.mkdir()
    model = ["--model", checkpoint, "--num-frames", 33, "--stream"] if stream else ["--model", TINY_WAN, *SMALL]
    arguments = [*model, "--prompts", "a", "b", "c", "--output", out]

    def before() -> None:
        VideoWriter.append = killed

    assert forked(1, arguments, tmp_path, monkeypatch, before) == [-signal.SIGKILL], output(tmp_path)
    assert list(videos(out)) == (["0000-a.mp4", "0001-b.part.mp4"] if stream else ["0000-a.mp4"])
    assert len(read_all_frames(out / "0000-a.mp4")) == (33 if stream else 9)
    assert not report(out)["complete"] and len(list(out.iterdir())) == 4  # the video, one that was begun, report, lock

    first = videos(out)["0000-a.mp4"]
    (out / "mine.mp4").write_bytes(b"not generated")
    assert run(arguments, monkeypatch) == 2
    assert run([*arguments, "--overwrite"], monkeypatch) == 0
    assert list(videos(out)) == ["0000-a.mp4", "0001-b.mp4", "0002-c.mp4", "mine.mp4"]
    assert {path.name for path in out.iterdir()} == {*videos(out), "contact_sheet.png", "generate.json"}
    assert report(out)["complete"] and (out / "mine.mp4").read_bytes() == b"not generated"
    assert videos(out)["0000-a.mp4"] == first


def test_overwrite_removes_only_what_generate_made(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "precious.mp4").write_bytes(b"precious")
    arguments = ["--model", TINY_WAN, *SMALL, "--prompts", "a", "--output", out]
    for content, message in (
        ('{"videos": [{"file": "../precious.mp4"}]}', "names files that generate does not make"),
        ('{"videos": 3}', "is damaged"),
        ("{", "is damaged"),
    ):
        (out / "generate.json").write_text(content)
        assert run([*arguments, "--overwrite"], monkeypatch) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "precious.mp4").read_bytes() == b"precious"
    assert [path.name for path in out.iterdir()] == ["generate.json"]


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stream"], "--stream: tiny-wan sees a whole video at once"),
        (["--num-frames", "32"], "--num-frames 32: must be 4n + 1; nearest: 29 or 33"),
        (["--height", "40"], "--height 40: must be a multiple of 16; nearest: 32 or 48"),
        (["--width", "0"], "--width 0: must be a multiple of 16"),
        (["--fps", "0"], "--fps 0: must be >= 1"),
        (["--steps", "0"], "--steps 0: must be >= 1"),
        (["--seed", "-1"], "--seed -1: must be >= 0"),
        (["--guidance", "nan"], "--guidance nan: must be >= 0"),
        (["--shift", "0"], "--shift 0.0: must be > 0"),
        (["--rungs", "900,500"], "--rungs 900,500: need timesteps that descend from 1000"),
        (["--guidance", "1", "--negative-prompt", "a"], "--negative-prompt has no effect with guidance 1"),
        (["--raw"], "--raw: tiny-wan is not the checkpoint of a run"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "gpu"], "--device gpu: "),
        (["--prompts", "b", " "], "prompt 1 is empty"),
        (["--prompts", "\udcff"], "prompt 0 is not Unicode text"),
        (["--model", "nowhere"], "'nowhere' is neither"),
        (["--pipeline", "nowhere"], "'nowhere' is neither"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    common = ["--model", TINY_WAN, "--prompts", "a", "--output", tmp_path / "out"]
    assert run([*common, *arguments], monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read it"),
        (b"\xff\xfe", "cannot read it"),
        (b"\n \n", "no prompts in it"),
        (b'{"caption": "a"}\n{"caption": ', "line 2: not JSON"),
        (b'["a"]', "line 1: need an object such as"),
        (b'\n{"caption": "a", "sed": 3}', "line 2: unknown key 'sed'. Did you mean 'seed'?"),
        (b'{"seed": 3}', "line 1: need one of the keys caption"),
        (b'{"caption": "a", "prompt": "b"}', "line 1: need one of the keys caption"),
        (b'{"caption": "a", "seed": true}', "line 1: seed = True: must be an integer >= 0"),
        (b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_bad_prompt_files(content, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"--prompt-file {path}.*{message}".replace("?", r"\?")):
        read_prompt_file(path)


def test_a_table_is_not_taken_for_prompts(tmp_path):
    """`preprocess --prompts` reads it; here its header would be a prompt."""
    (tmp_path / "prompts.csv").write_text("caption,seed\na red circle,3\n")
    with pytest.raises(UserError, match=r"prompts.csv: need one prompt a line, or .jsonl"):
        read_prompt_file(tmp_path / "prompts.csv")


def test_lines_are_prompts_as_they_stand(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('\ufeffa red\u2028circle\r\n\n  {"not": "json"} \n', encoding="utf-8")
    assert read_prompt_file(path) == [("a red\u2028circle", None), ('{"not": "json"}', None)]


def test_a_length_that_does_not_fit_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    arguments = ["--model", checkpoint, "--prompts", "a", "--num-frames", "97", "--output", tmp_path / "out"]
    assert run(arguments, monkeypatch) == 2
    assert "--num-frames 97: 25 latent frames do not divide into blocks of 3" in capsys.readouterr().err


def test_a_folder_that_cannot_be_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    arguments = ["--model", TINY_WAN, "--prompts", "a", "--output"]
    assert run([*arguments, tmp_path / "file/out"], monkeypatch) == 2
    assert f"{tmp_path / 'file'} is not a folder" in capsys.readouterr().err
    assert run([*arguments, tmp_path], monkeypatch) == 2
    assert "the folder is not empty; take another, or --overwrite" in capsys.readouterr().err


def test_a_folder_that_another_job_fills(tmp_path, monkeypatch, capsys):
    """Also when it is empty yet; and what the other has made by the time that this one has loaded its model is not replaced."""
    out = tmp_path / "out"
    arguments = ["--model", TINY_WAN, *SMALL, "--prompts", "a", "--output", out]
    with only_job(out, out / ".lock"):
        assert run(arguments, monkeypatch) == 2
    assert f"{out} is being made by pid" in (error := capsys.readouterr().err) and "name another --output" in error
    load = program.load_model
    monkeypatch.setattr(program, "load_model", lambda *a, **k: (out / "mine.mp4").touch() or load(*a, **k))
    assert run(arguments, monkeypatch) == 2
    assert "the folder is not empty" in capsys.readouterr().err and {p.name for p in out.iterdir()} == {"mine.mp4"}


def test_parts_of_other_models_are_refused(export, tmp_path, monkeypatch, capsys):
    arguments = ["--model", export, "--prompts", "a", "--output", tmp_path / "out"]
    other = tmp_path / "other"
    shutil.copytree(export, other)
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config.from_pretrained(other / "text_encoder")
    config.d_model = 32
    UMT5EncoderModel(config).save_pretrained(other / "text_encoder")
    assert run([*arguments, "--pipeline", other], monkeypatch) == 2
    assert "is 32 wide" in capsys.readouterr().err
    shutil.rmtree(other / "text_encoder")
    assert run(["--model", other, *arguments[2:]], monkeypatch) == 2
    assert "has no text_encoder/ folder" in (error := capsys.readouterr().err) and "--pipeline names another" in error
    (other / CONTRACT_NAME).write_text('{"text_len": 32, "sampler": {"format_version": 9}}')
    assert run(["--model", other, *arguments[2:]], monkeypatch) == 2
    assert f"{other / CONTRACT_NAME}: sampler.format_version = 9" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
