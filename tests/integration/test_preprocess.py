"""Folder -> cache with real files, real encoders, real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fvtitan import preprocess as pp
from fvtitan.data import moving_shapes as ms
from fvtitan.data.latent_cache import LatentCache
from fvtitan.data.video import write_video
from fvtitan.errors import UserError
from tests.helpers import ROOT

SIZE = {"width": 32, "height": 32, "num_frames": 5}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ARGUMENTS = ["--model", "tiny-wan", "--width", "32", "--height", "32", "--num-frames", "5"]


def launch(data: Path, output: Path, ranks: int = 1, *extra: str) -> list[str]:
    launcher = [sys.executable, "-m", "fvtitan.preprocess"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        launcher.append("fvtitan.preprocess")
    return [*launcher, "--data", str(data), "--output", str(output), *ARGUMENTS, *extra]


def run(data: Path, output: Path, ranks: int = 1, *extra: str) -> subprocess.CompletedProcess:
    command = launch(data, output, ranks, *extra)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos") / "clips"
    ms.render_dataset(folder, 140, num_frames=5, height=32, width=32)  # three shards
    return folder


@pytest.fixture(scope="module")
def cache(videos, tmp_path_factory):
    output = tmp_path_factory.mktemp("cache") / "cache"
    pp.preprocess(pp.PreprocessConfig(str(videos), "tiny-wan", str(output), **SIZE))
    return output


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_cache_holds_what_it_should(videos, cache):
    from fvtitan.models.encoders import TextEncoder, VideoVAE

    data = LatentCache(cache)
    assert len(data) == 140 and data.bucket_indices == [list(range(140))]
    sample = data[77]
    line = json.loads((videos / "metadata.jsonl").read_text().splitlines()[77])
    assert (sample["sample_id"], sample["caption"]) == (line["file_name"], line["caption"])
    encoder, vae = TextEncoder("tiny-wan"), VideoVAE("tiny-wan")
    expected = encoder.encode([line["caption"], "", pp.WAN_NEGATIVE_PROMPT])
    torch.testing.assert_close(sample["prompt_embeds"], expected[0].bfloat16(), atol=2e-2, rtol=0)
    assert torch.equal(data.empty_prompt_embeds, expected[1].bfloat16()) and len(data.empty_prompt_embeds) == 1
    assert torch.equal(data.negative_prompt_embeds, expected[2].bfloat16())
    frames = pp.read_video(videos / line["file_name"], fps=16, **SIZE)
    latents = vae.encode(frames.permute(0, 3, 1, 2)[None].float() / 127.5 - 1)[0]
    assert sample["latents"].shape == (2, 16, 4, 4)
    torch.testing.assert_close(sample["latents"].float(), latents, atol=3e-2, rtol=1e-2)
    manifest = data.manifest
    assert manifest["num_samples"] == 140 and manifest["buckets"] == {"2x16x4x4": 140}


def test_two_ranks_make_the_same_cache(videos, cache, tmp_path):
    done = run(videos, tmp_path / "cache", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path / "cache") == content(cache)


def start(data: Path, output: Path, ranks: int = 1) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(launch(data, output, ranks), cwd=ROOT, env=ENVIRONMENT, **quiet)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and to its ranks, which live in sessions of their own."""
    process.send_signal(signal.SIGSTOP)  # no new child from here on
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            stats.append((int(path.parent.name), path.read_text().rpartition(")")[2].split()))
    ranks = [pid for pid, fields in stats if int(fields[1]) == process.pid]
    for pid in [process.pid, *ranks]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_a_killed_run_goes_on_where_it_stopped(videos, cache, tmp_path):
    output = tmp_path / "cache"
    process = start(videos, output)
    first = output / "shard-00000.safetensors.jsonl"
    while not first.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    kill(process)
    with pytest.raises(UserError, match="is not finished"):
        LatentCache(output)
    (output / ".shard-00001.safetensors.1.tmp").write_bytes(b"half a shard")
    kept = first.stat().st_mtime_ns
    config = pp.PreprocessConfig(str(videos), "tiny-wan", str(output), **SIZE)
    pp.preprocess(config)
    assert first.stat().st_mtime_ns == kept
    assert content(output) == content(cache)  # nothing else lies there either


def test_a_shard_that_is_no_longer_whole_is_made_again(videos, cache, tmp_path):
    output = shutil.copytree(cache, tmp_path / "cache")
    (output / "manifest.json").unlink()
    shard = output / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    (output / "shard-00002.safetensors").unlink()
    kept = (output / "shard-00000.safetensors").stat().st_mtime_ns
    pp.preprocess(pp.PreprocessConfig(str(videos), "tiny-wan", str(output), **SIZE))
    assert content(output) == content(cache) and (output / "shard-00000.safetensors").stat().st_mtime_ns == kept


def test_killed_before_and_between_the_first_files(videos, cache, tmp_path):
    for name in ("contract", "overwrite"):
        output = tmp_path / name
        config = pp.PreprocessConfig(str(videos), "tiny-wan", str(output), **SIZE)
        if name == "contract":  # killed while the very first file was being written
            output.mkdir()
            (output / ".contract.json.77.tmp").write_text("{")
            pp.preprocess(config)
        else:  # killed in the middle of --overwrite's removal
            shutil.copytree(cache, output)
            (output / "manifest.json").unlink()
            (output / "shard-00001.safetensors").unlink()
            pp.preprocess(dataclasses.replace(config, overwrite=True))
        assert content(output) == content(cache)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment(videos, cache, tmp_path, ranks):
    output = tmp_path / "cache"
    delays = random.Random(ranks)
    for _ in range(12):
        process = start(videos, output, ranks)
        time.sleep(delays.uniform(1.5, 9))
        finished = process.poll() == 0
        if not finished:
            kill(process)
        if (output / "manifest.json").is_file():
            break
        with pytest.raises(UserError):
            LatentCache(output)
    done = run(videos, output, ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(output) == content(cache)


def test_a_source_of_the_same_size_is_noticed(tmp_path):
    data, output = tmp_path / "data", tmp_path / "cache"
    ms.render_dataset(data, 3, num_frames=5, height=32, width=32)
    config = pp.PreprocessConfig(str(data), "tiny-wan", str(output), **SIZE)
    pp.preprocess(config)
    shutil.move(data, tmp_path / "moved")  # the same content elsewhere is the same data
    pp.preprocess(dataclasses.replace(config, data=str(tmp_path / "moved")))
    video = next((tmp_path / "moved").rglob("*.mp4"))
    video.write_bytes(video.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="data: other videos or captions than those in --data now"):
        pp.preprocess(dataclasses.replace(config, data=str(tmp_path / "moved")))
    (output / "contract.json").write_text("{")
    with pytest.raises(UserError, match="contract.json is damaged .* --overwrite"):
        pp.preprocess(dataclasses.replace(config, data=str(tmp_path / "moved")))


def test_finished_other_contract_and_overwrite(videos, cache, tmp_path, capsys):
    config = pp.PreprocessConfig(str(videos), "tiny-wan", str(cache), **SIZE)
    pp.preprocess(config)
    assert "finished before, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"size\.fps is 16 there and 8 now"):
        pp.preprocess(dataclasses.replace(config, fps=8))
    with pytest.raises(UserError, match="negative_prompt is"):
        pp.preprocess(dataclasses.replace(config, negative_prompt="blurry"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is not a cache of ours"):
        pp.preprocess(dataclasses.replace(config, output=str(tmp_path / "mine"), overwrite=True))
    assert (tmp_path / "mine/thesis.txt").exists()
    small = tmp_path / "few"
    ms.render_dataset(small, 2, num_frames=5, height=32, width=32)
    first = pp.PreprocessConfig(str(small), "tiny-wan", str(tmp_path / "c"), **SIZE)
    pp.preprocess(first)
    pp.preprocess(dataclasses.replace(first, num_frames=1, overwrite=True))
    assert LatentCache(tmp_path / "c")[0]["latents"].shape[0] == 1


def bad_folder(folder: Path) -> dict[str, str]:
    """A folder with every kind of bad input; {file: reason}."""
    folder.mkdir()
    clip = ms.render_clip(ms.all_combinations()[0], num_frames=5, height=32, width=32)
    outside = folder.parent / "outside.mp4"
    write_video(outside, clip, fps=16)
    for name in ("good.mp4", "long caption.mp4", "captionless.mp4", "blank.mp4", "number.mp4", "unlisted.mp4"):
        write_video(folder / name, clip, fps=16)
    for name in ("unlisted2.mp4", "unlisted3.mp4"):
        write_video(folder / name, clip, fps=16)
    write_video(folder / "short.mp4", clip[:3], fps=16)
    (folder / "zero.mp4").touch()
    (folder / "damaged.mp4").write_bytes((folder / "good.mp4").read_bytes()[:200])
    (folder / "link.mp4").symlink_to(outside)
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "more").symlink_to(folder.parent)
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.mp4").touch()
    rows = [
        {"file_name": "good.mp4", "caption": "good ü"},
        {"video": "long caption.mp4", "text": "word " * 2000},
        {"file_name": "captionless.mp4"},
        {"file_name": "blank.mp4", "caption": "  "},
        {"file_name": "number.mp4", "caption": 3},
        {"file_name": "short.mp4", "caption": "x"},
        {"file_name": "zero.mp4", "caption": "x"},
        {"file_name": "damaged.mp4", "caption": "x"},
        {"file_name": "link.mp4", "caption": "x"},
        {"file_name": "../outside.mp4", "caption": "x"},
        {"file_name": str(outside), "caption": "x"},
        {"file_name": "http://localhost/x.mp4", "caption": "x"},
        {"file_name": "gone.mp4", "caption": "x"},
        {"file_name": "loop.mp4", "caption": "x"},
        {"file_name": "n" * 5000, "caption": "x"},
        {"file_name": "nul\0.mp4", "caption": "x"},
        {"file_name": "half\ud800.mp4", "caption": "x"},
        {"file_name": "unlisted2.mp4", "caption": "half \ud800"},
        {"file_name": "good.mp4", "caption": "again"},
        {"file_name": ".//good.mp4", "caption": "again"},
        {"file_name": str(folder / "unlisted3.mp4"), "caption": "inside, but absolute"},
        {"caption": "no file"},
    ]
    lines = [json.dumps(row).encode() for row in rows] + [
        b'{"file_name": "a.mp4", "caption": "\xff"}',
        b"{",
        b"[1]",
        b"[" * 100_000,
    ]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return {
        "captionless.mp4": "no caption",
        "blank.mp4": "the caption is empty",
        "number.mp4": "no caption",
        "short.mp4": "too short: 3 frames at 16 fps, 5 are needed",
        "zero.mp4": "0 bytes",
        "damaged.mp4": "damaged",
        "link.mp4": "leaves the data folder",
        "../outside.mp4": "leaves the data folder",
        str(outside): "an absolute path",
        str(folder / "unlisted3.mp4"): "an absolute path",
        "loop.mp4": "no such file",
        "n" * 5000: "no such file",
        "nul\0.mp4": "not a local file name",
        "half\\ud800.mp4": "the file name is not UTF-8",
        "unlisted2.mp4": "not Unicode text",
        "http://localhost/x.mp4": "not a local file name",
        "gone.mp4": "no such file",
        "good.mp4": "listed twice",
        "metadata.jsonl:22": "no file",
        "metadata.jsonl:23": "not UTF-8",
        "metadata.jsonl:24": "not JSON",
        "metadata.jsonl:25": "not a JSON object",
        "metadata.jsonl:26": "not JSON",
        "unlisted.mp4": "not in metadata.jsonl",
        "notes.txt": "not in metadata.jsonl",
        "more": "a link to a folder",
    }


def test_every_file_is_a_sample_or_has_a_reason(tmp_path):
    reasons = bad_folder(tmp_path / "bad")
    config = pp.PreprocessConfig(
        str(tmp_path / "bad"), "tiny-wan", str(tmp_path / "cache"), **SIZE, max_bad_fraction=1.0
    )
    pp.preprocess(config)
    skipped = [json.loads(line) for line in (tmp_path / "cache/skipped.jsonl").read_text().splitlines()]
    found = {entry["file"]: entry["reason"] for entry in skipped}
    assert found.keys() == reasons.keys() and len(skipped) == len(reasons) + 1  # good.mp4 is listed three times
    for file, reason in reasons.items():
        assert reason in found[file], (file, found[file])
    data = LatentCache(tmp_path / "cache")
    assert [data[i]["sample_id"] for i in range(len(data))] == ["good.mp4", "long caption.mp4"]
    assert data[0]["caption"] == "good ü" and len(data[1]["prompt_embeds"]) == 32  # cut to text_len
    strict = dataclasses.replace(config, output=str(tmp_path / "strict"), max_bad_fraction=0.5)
    with pytest.raises(
        UserError,
        match="24 of 26 files cannot be used, more than --max-bad-fraction 0.5: see .*skipped.jsonl; the first",
    ):
        pp.preprocess(strict)
    assert (tmp_path / "strict/skipped.jsonl").is_file()
    with pytest.raises(UserError, match="not finished"):
        LatentCache(tmp_path / "strict")


def test_pairs_and_empty_folders(tmp_path):
    clip = ms.render_clip(ms.all_combinations()[0], num_frames=5, height=32, width=32)
    pairs = tmp_path / "pairs"
    (pairs / "deep").mkdir(parents=True)
    for name in ("a", "b", "c", "deep/d", "e", "f"):
        write_video(pairs / f"{name}.mp4", clip, fps=16)
    (pairs / "a.txt").write_text("a caption\n")
    (pairs / "b.txt").write_bytes(b"\xff\xfe")
    (pairs / "deep/d.txt").write_text("\ufeffline\u2028separated", encoding="utf-8")
    (pairs / "e.txt").write_text(" \n")
    (tmp_path / "secret.txt").write_text("secret")
    (pairs / "f.txt").symlink_to(tmp_path / "secret.txt")
    (pairs / "lost.txt").write_text("no video here")
    (pairs / "cover.jpg").touch()
    output = pairs / "cache"  # inside of the folder it is made from
    config = pp.PreprocessConfig(str(pairs), "tiny-wan", str(output), **SIZE, max_bad_fraction=5 / 7)
    pp.preprocess(config)
    data = LatentCache(output)
    assert [data[i]["caption"] for i in range(len(data))] == ["a caption", "line\u2028separated"]
    skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert {entry["file"]: entry["reason"] for entry in skipped} == {
        "b.mp4": "the caption b.txt is not UTF-8",
        "c.mp4": "no caption: c.txt does not exist",
        "e.mp4": "the caption is empty",
        "f.mp4": "the caption f.txt leaves the data folder",
        "lost.txt": "a caption without a video",
        "cover.jpg": "not a video (one of .mp4, .mov, .mkv, .webm, .avi, .m4v)",
    }
    assert (data.manifest["num_samples"], data.manifest["num_skipped"], data.manifest["num_ignored"]) == (2, 5, 1)
    pp.preprocess(config)  # its own files are no news
    with pytest.raises(UserError, match="5 of 7 files cannot be used, more than --max-bad-fraction 0.7"):
        pp.preprocess(dataclasses.replace(config, output=str(tmp_path / "d"), max_bad_fraction=0.7))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no videos in it"):
        pp.preprocess(pp.PreprocessConfig(str(tmp_path / "nothing"), "tiny-wan", str(tmp_path / "e"), **SIZE))


def test_program_errors_are_one_line(videos, tmp_path):
    for extra, message in (
        (["--num-frames", "6"], "--num-frames 6: must be 4n + 1; nearest: 5 or 9"),
        (["--width", "40"], "--width 40: must be a multiple of 16; nearest: 32 or 48"),
        (["--model", "nowhere"], "'nowhere' is neither"),
    ):
        done = run(videos, tmp_path / "c", 1, *extra)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_help_names_every_option():
    command = [sys.executable, "-m", "fvtitan.preprocess", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {f.name for f in dataclasses.fields(pp.PreprocessConfig)} - {"limits"}
    names |= {f.name for f in dataclasses.fields(pp.VideoLimits)}
    assert all(f"--{name.replace('_', '-')}" in text for name in names)
