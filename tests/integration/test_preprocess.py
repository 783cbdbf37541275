"""Folder -> cache with real files, real encoders, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from fvtitan import preprocess as pp
from fvtitan.data import moving_shapes as ms
from fvtitan.data.latent_cache import LatentCache
from fvtitan.data.video import write_video
from fvtitan.errors import UserError
from tests.helpers import ROOT

SIZE = {"width": 32, "height": 32, "num_frames": 5}
ARGUMENTS = ["--model", "tiny-wan", "--width", "32", "--height", "32", "--num-frames", "5"]


def run(data: Path, output: Path, ranks: int = 1, *extra: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "fvtitan.preprocess"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        launcher.append("fvtitan.preprocess")
    command = [*launcher, "--data", str(data), "--output", str(output), *ARGUMENTS, *extra]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


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
    one, two = content(cache), content(tmp_path / "cache")
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(".safetensors"):
            a, b = load_file(cache / name), load_file(tmp_path / "cache" / name)
            assert all(torch.allclose(a[key].float(), b[key].float(), atol=2e-2) for key in a) and a.keys() == b.keys()
        else:
            assert one[name] == two[name], name


def test_a_killed_run_goes_on_where_it_stopped(videos, cache, tmp_path):
    output = tmp_path / "cache"
    command = [sys.executable, "-m", "fvtitan.preprocess", "--data", str(videos), "--output", str(output), *ARGUMENTS]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    first = output / "shard-00000.safetensors.jsonl"
    while not first.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="is not finished"):
        LatentCache(output)
    kept = first.stat().st_mtime_ns
    pp.preprocess(pp.PreprocessConfig(str(videos), "tiny-wan", str(output), **SIZE))
    assert first.stat().st_mtime_ns == kept
    assert (output / "samples.jsonl").read_bytes() == (cache / "samples.jsonl").read_bytes()
    assert LatentCache(output).fingerprint == LatentCache(cache).fingerprint
    for a, b in zip(LatentCache(output), LatentCache(cache), strict=False):
        assert torch.equal(a["latents"], b["latents"])


def test_finished_other_contract_and_overwrite(videos, cache, tmp_path, capsys):
    config = pp.PreprocessConfig(str(videos), "tiny-wan", str(cache), **SIZE)
    pp.preprocess(config)
    assert "finished before, nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"size\.fps is 16 there and 8 now"):
        pp.preprocess(pp.dataclasses.replace(config, fps=8))
    with pytest.raises(UserError, match="negative_prompt is"):
        pp.preprocess(pp.dataclasses.replace(config, negative_prompt="blurry"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(UserError, match="exists and is not a cache of ours"):
        pp.preprocess(pp.dataclasses.replace(config, output=str(tmp_path / "mine"), overwrite=True))
    assert (tmp_path / "mine/thesis.txt").exists()
    small = tmp_path / "few"
    ms.render_dataset(small, 2, num_frames=5, height=32, width=32)
    first = pp.PreprocessConfig(str(small), "tiny-wan", str(tmp_path / "c"), **SIZE)
    pp.preprocess(first)
    pp.preprocess(pp.dataclasses.replace(first, num_frames=1, overwrite=True))
    assert LatentCache(tmp_path / "c")[0]["latents"].shape[0] == 1


def bad_folder(folder: Path) -> dict[str, str]:
    """A folder with every kind of bad input; {file: reason}."""
    folder.mkdir()
    clip = ms.render_clip(ms.all_combinations()[0], num_frames=5, height=32, width=32)
    outside = folder.parent / "outside.mp4"
    write_video(outside, clip, fps=16)
    for name in ("good.mp4", "long caption.mp4", "captionless.mp4", "blank.mp4", "number.mp4", "unlisted.mp4"):
        write_video(folder / name, clip, fps=16)
    write_video(folder / "short.mp4", clip[:3], fps=16)
    (folder / "zero.mp4").touch()
    (folder / "damaged.mp4").write_bytes((folder / "good.mp4").read_bytes()[:200])
    (folder / "link.mp4").symlink_to(outside)
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
        {"file_name": "good.mp4", "caption": "again"},
        {"caption": "no file"},
    ]
    lines = [json.dumps(row).encode() for row in rows] + [b'{"file_name": "a.mp4", "caption": "\xff"}', b"{", b"[1]"]
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
        str(outside): "leaves the data folder",
        "http://localhost/x.mp4": "not a local file name",
        "gone.mp4": "no such file",
        "good.mp4": "listed twice",
        "metadata.jsonl:15": "no file",
        "metadata.jsonl:16": "not UTF-8",
        "metadata.jsonl:17": "not JSON",
        "metadata.jsonl:18": "not a JSON object",
        "unlisted.mp4": "not in metadata.jsonl",
    }


def test_every_file_is_a_sample_or_has_a_reason(tmp_path):
    reasons = bad_folder(tmp_path / "bad")
    config = pp.PreprocessConfig(
        str(tmp_path / "bad"), "tiny-wan", str(tmp_path / "cache"), **SIZE, max_bad_fraction=1.0
    )
    pp.preprocess(config)
    skipped = [json.loads(line) for line in (tmp_path / "cache/skipped.jsonl").read_text().splitlines()]
    found = {entry["file"]: entry["reason"] for entry in skipped}
    assert found.keys() == reasons.keys() and len(skipped) == len(reasons)
    for file, reason in reasons.items():
        assert reason in found[file], (file, found[file])
    data = LatentCache(tmp_path / "cache")
    assert [data[i]["sample_id"] for i in range(len(data))] == ["good.mp4", "long caption.mp4"]
    assert data[0]["caption"] == "good ü" and len(data[1]["prompt_embeds"]) == 32  # cut to text_len
    strict = pp.dataclasses.replace(config, output=str(tmp_path / "strict"), max_bad_fraction=0.5)
    with pytest.raises(UserError, match="17 of 19 files cannot be used, more than --max-bad-fraction 0.5"):
        pp.preprocess(strict)
    assert (tmp_path / "strict/skipped.jsonl").is_file()
    with pytest.raises(UserError, match="not finished"):
        LatentCache(tmp_path / "strict")


def test_pairs_and_empty_folders(tmp_path):
    clip = ms.render_clip(ms.all_combinations()[0], num_frames=5, height=32, width=32)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for name in "abc":
        write_video(pairs / f"{name}.mp4", clip, fps=16)
    (pairs / "a.txt").write_text("a caption\n")
    (pairs / "b.txt").write_bytes(b"\xff\xfe")
    pp.preprocess(pp.PreprocessConfig(str(pairs), "tiny-wan", str(tmp_path / "c"), **SIZE, max_bad_fraction=0.7))
    assert LatentCache(tmp_path / "c")[0]["caption"] == "a caption"
    skipped = (tmp_path / "c/skipped.jsonl").read_text()
    assert "b.txt is not UTF-8" in skipped and "c.txt does not exist" in skipped
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no videos in it"):
        pp.preprocess(pp.PreprocessConfig(str(tmp_path / "nothing"), "tiny-wan", str(tmp_path / "d"), **SIZE))


def test_program_errors_are_one_line(videos, tmp_path):
    for extra, message in (
        (["--num-frames", "6"], "--num-frames 6: must be 4n + 1; nearest: 5 or 9"),
        (["--width", "40"], "--width 40: must be a multiple of 16; nearest: 32 or 48"),
        (["--model", "nowhere"], "'nowhere' is neither"),
    ):
        done = run(videos, tmp_path / "c", 1, *extra)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def damaged(cache: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(cache, tmp_path / "copy")


def test_damage_is_found_and_named(cache, tmp_path):
    copy = damaged(cache, tmp_path)
    shard = copy / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"shard-00001.safetensors has \d+ bytes, the manifest says"):
        LatentCache(copy)
    shard.write_bytes(b"\xff" * 64 + whole[64:])
    with pytest.raises(UserError, match="shard-00001.safetensors is damaged"):
        LatentCache(copy)
    shard.unlink()
    with pytest.raises(UserError, match="shard-00001.safetensors is missing"):
        LatentCache(copy)
    shard.write_bytes(whole)
    manifest = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(manifest[:100])
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        LatentCache(copy)
    (copy / "manifest.json").write_text(manifest.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="format 9, this version reads 1"):
        LatentCache(copy)
    (copy / "manifest.json").write_text(manifest)
    lines = (copy / "samples.jsonl").read_text().splitlines()
    (copy / "samples.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="has 139 samples, the manifest says 140"):
        LatentCache(copy)
    with pytest.raises(UserError, match="does not exist"):
        LatentCache(tmp_path / "none")


def test_bad_values_name_the_sample(cache, tmp_path):
    copy = damaged(cache, tmp_path)
    shard = copy / "shard-00002.safetensors"
    tensors = load_file(shard)
    tensors["latents.00003"][0, 0, 0, 0] = float("nan")
    save_file(tensors, shard)
    data = LatentCache(copy)
    sample_id = data.samples[128 + 3]["sample_id"]
    with pytest.raises(UserError, match=f"latents of sample '{sample_id}' hold NaN or Inf"):
        data[128 + 3]
    data.samples[0]["shape"] = [1, 1, 1, 1]
    with pytest.raises(UserError, match=r"has shape \[2, 16, 4, 4\]"):
        data[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_read_it(cache, context):
    data = LatentCache(cache)
    expected = [data[i]["latents"] for i in range(0, 140, 10)]
    loader = DataLoader(
        data, sampler=range(0, 140, 10), batch_size=None, num_workers=2, multiprocessing_context=context
    )
    assert all(torch.equal(a, b["latents"]) for a, b in zip(expected, loader, strict=True))
