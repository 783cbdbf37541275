"""Folder or file of prompts -> cache with real files, real encoders, real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
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
from fvtitan.assets import tiny_wan_path
from fvtitan.components.files import lock_file
from fvtitan.data import moving_shapes as ms
from fvtitan.data.dataloader import BatchStream
from fvtitan.data.latent_cache import LatentCache
from fvtitan.data.video import write_video
from fvtitan.distributed.utils import only_job
from fvtitan.errors import UserError
from tests.helpers import ROOT, run_program
from tests.integration import exact_worker

SIZE = {"width": 32, "height": 32, "num_frames": 5}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SIZE_ARGUMENTS = ["--width", "32", "--height", "32", "--num-frames", "5"]


def launch(source: Path, output: Path, ranks: int = 1, *extra: str) -> list[str]:
    """A folder of videos or a file of prompts, preprocessed."""
    launcher = [sys.executable, "-m", "fvtitan.preprocess"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        launcher.append("fvtitan.preprocess")
    return [*launcher, *arguments_of(source, output), *extra]


def arguments_of(source: Path, output: Path) -> list[str]:
    given = ["--data", str(source), *SIZE_ARGUMENTS] if source.is_dir() else ["--prompts", str(source)]
    return [*given, "--output", str(output), "--model", "tiny-wan"]


def run(source: Path, output: Path, ranks: int = 1, *extra: str) -> subprocess.CompletedProcess:
    command = launch(source, output, ranks, *extra)
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


@pytest.fixture(scope="module")
def prompts(videos):
    """The captions of `videos` in their order, then twice all there are: 21 shards."""
    lines = [json.loads(line)["caption"] for line in (videos / "metadata.jsonl").read_text().splitlines()]
    path = videos.with_name("prompts.txt")
    path.write_text("".join(f"{caption}\n" for caption in lines + 2 * [a.caption for a in ms.all_combinations()]))
    return path


@pytest.fixture(scope="module")
def prompt_cache(prompts, tmp_path_factory):
    output = tmp_path_factory.mktemp("prompts") / "cache"
    pp.preprocess(config_of(prompts, output))
    return output


@pytest.fixture(params=["videos", pytest.param("prompts", marks=pytest.mark.slow)])
def either(request):
    """(source, the cache made of it) of both kinds."""
    names = {"videos": "cache", "prompts": "prompt_cache"}
    return request.getfixturevalue(request.param), request.getfixturevalue(names[request.param])


def config_of(source: Path, output: Path, **keys: object) -> pp.PreprocessConfig:
    """What `launch` does."""
    given = {"data": str(source), **SIZE} if source.is_dir() else {"data": "", "prompts": str(source)}
    return pp.PreprocessConfig(**given, model="tiny-wan", output=str(output), **keys)


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


def test_prompts_have_the_embeddings_of_captions(prompts, prompt_cache, cache):
    data, with_videos = LatentCache(prompt_cache), LatentCache(cache)
    assert with_videos.has_latents and not data.has_latents
    assert len(data) == 1292 and data.bucket_indices == [list(range(1292))]
    for i in (0, 77, 139):
        sample, other = data[i], with_videos[i]
        assert sample.keys() == {"sample_id", "caption", "prompt_embeds"}
        assert (sample["sample_id"], sample["caption"]) == (f"prompts.txt:{i + 1}", other["caption"])
        torch.testing.assert_close(sample["prompt_embeds"], other["prompt_embeds"], atol=2e-2, rtol=0)
    assert [sample["caption"] for sample in data.samples].count(data[0]["caption"]) == 3  # samples of their own
    assert torch.equal(data.empty_prompt_embeds, with_videos.empty_prompt_embeds)
    assert torch.equal(data.negative_prompt_embeds, with_videos.negative_prompt_embeds)
    assert data.manifest["num_samples"] == 1292 and data.manifest["buckets"] == {"prompts": 1292}
    assert not any(
        name.startswith("latents") for shard in data.manifest["shards"] for name in data._files.open(shard).keys()
    )


def test_batches_of_prompts(prompt_cache):
    stream = BatchStream(LatentCache(prompt_cache), global_batch_size=323, local_batch_size=323, seed=0, num_workers=1)
    batches = [next(stream) for _ in range(4)]  # an epoch
    stream.close()
    assert "latents" not in batches[0] and all(len(embeds.shape) == 2 for embeds in batches[0]["prompt_embeds"])
    assert sorted(i for batch in batches for i in batch["sample_indices"].tolist()) == list(range(1292))


def program(folder: Path, *, words: list[str]) -> None:
    """`fvtitan.preprocess` in this process; the folder is that of its output."""
    sys.exit(run_program(pp.main, *words))


def test_two_ranks_make_the_same_cache(either, tmp_path):
    source, cache = either
    words = arguments_of(source, tmp_path / "cache")
    status = exact_worker.launch(2, [], tmp_path / "logs", watcher=program, words=words)
    assert status == [0, 0], exact_worker.output(tmp_path / "logs")
    assert content(tmp_path / "cache") == content(cache)


def start(source: Path, output: Path, ranks: int = 1) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(launch(source, output, ranks), cwd=ROOT, env=ENVIRONMENT, **quiet)


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


@pytest.mark.faults
def test_a_killed_run_goes_on_where_it_stopped(either, tmp_path):
    """Fault 43."""
    source, cache = either
    output = tmp_path / "cache"
    process = start(source, output)
    first = output / "shard-00000.safetensors.jsonl"
    while not first.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    kill(process)
    with pytest.raises(UserError, match="is not finished"):
        LatentCache(output)
    (output / ".shard-00001.safetensors.1.tmp").write_bytes(b"half a shard")
    kept = first.stat().st_mtime_ns
    pp.preprocess(config_of(source, output))
    assert first.stat().st_mtime_ns == kept
    assert content(output) == content(cache)  # nothing else lies there either


@pytest.mark.faults
def test_a_shard_that_is_no_longer_whole_is_made_again(either, tmp_path):
    """Fault 43."""
    source, cache = either
    output = shutil.copytree(cache, tmp_path / "cache")
    (output / "manifest.json").unlink()
    shard = output / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    (output / "shard-00002.safetensors").unlink()
    kept = (output / "shard-00000.safetensors").stat().st_mtime_ns
    pp.preprocess(config_of(source, output))
    assert content(output) == content(cache) and (output / "shard-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.faults
@pytest.mark.slow
def test_killed_before_and_between_the_first_files(videos, cache, tmp_path):
    """Fault 43."""
    for name in ("contract", "overwrite"):
        output = tmp_path / name
        config = pp.PreprocessConfig(str(videos), "tiny-wan", str(output), **SIZE)
        if name == "contract":  # killed while the very first file was being written
            output.mkdir()
            (output / ".contract.json.77.tmp").write_text("{")
            pp.preprocess(config)
        else:  # killed in the middle of --overwrite's removal
            shutil.copytree(cache, output)
            (output / "contract.json").write_text("{}\n")
            (output / "manifest.json").unlink()
            (output / "shard-00001.safetensors").unlink()
            pp.preprocess(dataclasses.replace(config, overwrite=True))
        assert content(output) == content(cache)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_any_moment(either, tmp_path, ranks):
    """Fault 43."""
    source, cache = either
    output = tmp_path / "cache"
    delays = random.Random(ranks)
    for _ in range(12):
        process = start(source, output, ranks)
        time.sleep(delays.uniform(1.5, 9))
        finished = process.poll() == 0
        if not finished:
            kill(process)
        if (output / "manifest.json").is_file():
            break
        with pytest.raises(UserError):
            LatentCache(output)
    done = run(source, output, ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(output) == content(cache)


@pytest.mark.faults
def test_a_source_of_the_same_size_is_noticed(tmp_path):
    """Fault 33."""
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


@pytest.mark.faults
def test_overwrite_lets_an_unfinished_cache_go_on(tmp_path):
    """Fault 43. The same command, given again after a kill, keeps the shards that are there; a finished cache it clears."""
    source, output = tmp_path / "prompts.txt", tmp_path / "cache"
    source.write_text("a prompt\n")
    config = config_of(source, output, overwrite=True)
    pp.preprocess(config)
    shard, whole = output / "shard-00000.safetensors", content(output)
    made = shard.stat().st_mtime_ns
    (output / "manifest.json").unlink()
    (output / ".manifest.json.7.tmp").write_text("{")
    (output / ".mine.tmp").write_text("x")
    pp.preprocess(config)
    assert shard.stat().st_mtime_ns == made and content(output) == whole | {".mine.tmp": b"x"}
    pp.preprocess(config)
    assert shard.stat().st_mtime_ns > made and content(output) == whole | {".mine.tmp": b"x"}
    for damaged in ("{}", "{", "[]"):  # the first as --overwrite leaves it when it is killed
        (output / "contract.json").write_text(damaged)
        with pytest.raises(UserError, match="--overwrite"):
            pp.preprocess(dataclasses.replace(config, overwrite=False))
        made = shard.stat().st_mtime_ns
        pp.preprocess(config)
        assert shard.stat().st_mtime_ns > made and content(output) == whole | {".mine.tmp": b"x"}


@pytest.mark.faults
def test_only_our_own_temporaries_are_removed(tmp_path):
    """Fault 43. A folder that is not ours stays as it is; one in which a ledger or a first contract was being written is."""
    source, output = tmp_path / "prompts.txt", tmp_path / "cache"
    source.write_text("a prompt\n")
    for name in (".important.tmp", ".d.tmp", ".shard-00000.safetensors.7.tmp"):
        output.mkdir()
        (output / name).mkdir() if name == ".d.tmp" else (output / name).write_text("x")
        (output / ".contract.json.7.tmp").write_text("{")
        with pytest.raises(UserError, match="is not a cache of ours"):
            pp.preprocess(config_of(source, output, overwrite=True))
        assert sorted(path.name for path in output.iterdir()) == sorted((name, ".contract.json.7.tmp"))
        shutil.rmtree(output)
    output.mkdir()
    for name in (".ledger.csv.7.tmp", "ledger.jsonl", ".contract.json.7.tmp"):
        (output / name).write_text("x")
    pp.preprocess(config_of(source, output))
    assert len(LatentCache(output)) == 1 and not (output / ".contract.json.7.tmp").exists()


@pytest.mark.faults
def test_a_shard_accounts_for_every_record(tmp_path):
    """Fault 43. Its list was cut at the end of a line."""
    data, output = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    for name, frames in (("a", 11), ("b", 3), ("c", 15)):
        write_video(data / f"{name}.mp4", ms.render_clip(ms.all_combinations()[0], num_frames=frames), fps=16)
        (data / f"{name}.txt").write_text(name)
    records = pp.list_records(data)[0]
    pp.preprocess(config_of(data, output, spans=3, max_bad_fraction=1))
    shard = output / "shard-00000.safetensors"
    listed = shard.with_name(f"{shard.name}.jsonl")
    lines = listed.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 + 1 + 3 and pp._is_whole(shard, records)
    for count in range(len(lines)):
        listed.write_bytes(b"".join(lines[:count]))
        assert not pp._is_whole(shard, records), count
    for damaged in (b"3\n", b'{"key": "a"}\n', b'{"key": [], "caption": 3}\n'):
        listed.write_bytes(b"".join(lines) + damaged)
        assert not pp._is_whole(shard, records), damaged
    (output / "manifest.json").unlink()
    whole, listed_before = content(output), b"".join(lines)
    listed.write_bytes(b"")
    pp.preprocess(config_of(data, output, spans=3, max_bad_fraction=1))
    assert listed.read_bytes() == listed_before and (output / "manifest.json").is_file()
    assert content(output)["samples.jsonl"] == whole["samples.jsonl"]


@pytest.mark.faults
@pytest.mark.parametrize("encoder", ["VideoVAE", "TextEncoder"])
def test_nothing_that_is_not_finite_is_written(tmp_path, monkeypatch, encoder):
    """Fault 29."""
    from fvtitan.models import encoders

    data, output = tmp_path / "data", tmp_path / "cache"
    ms.render_dataset(data, 2, num_frames=5, height=32, width=32)
    made_by, encode = getattr(encoders, encoder), getattr(encoders, encoder).encode

    def overflows(self, given):
        made = encode(self, given)
        made[-1][0] = float("inf") if encoder == "VideoVAE" or len(given) == 2 else made[-1][0]
        return made

    monkeypatch.setattr(made_by, "encode", overflows)
    named = {"VideoVAE": "VAE", "TextEncoder": "text encoder"}[encoder]
    with pytest.raises(UserError, match=rf"00000[01]\.mp4: the {named} of --model tiny-wan gives NaN or Inf"):
        pp.preprocess(config_of(data, output))
    assert not list(output.glob("shard-*"))
    if encoder == "TextEncoder":
        (data / "metadata.jsonl").write_text((data / "metadata.jsonl").read_text().splitlines()[0] + "\n")
        with pytest.raises(UserError, match="the negative prompt: the text encoder of --model tiny-wan gives NaN"):
            pp.preprocess(config_of(data, tmp_path / "one"))
        assert not (tmp_path / "one/prompts.safetensors").exists()


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


@pytest.mark.faults
def test_every_file_is_a_sample_or_has_a_reason(tmp_path, capsys):
    """Fault 28. Fault 30."""
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
    assert [sample.get("caption_cut_at") for sample in data.samples] == [None, 32]
    assert data.manifest["num_captions_cut"] == 1
    assert "2 samples, 24 files skipped (see skipped.jsonl), 1 captions cut at 32 tokens" in capsys.readouterr().out
    strict = dataclasses.replace(config, output=str(tmp_path / "strict"), max_bad_fraction=0.5)
    with pytest.raises(
        UserError,
        match="24 of 26 files cannot be used, more than --max-bad-fraction 0.5: see .*skipped.jsonl; the first",
    ):
        pp.preprocess(strict)
    assert (tmp_path / "strict/skipped.jsonl").is_file()
    with pytest.raises(UserError, match="not finished"):
        LatentCache(tmp_path / "strict")


@pytest.mark.faults
def test_pairs_and_empty_folders(tmp_path):
    """Fault 30. Fault 31."""
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


@pytest.mark.faults
def test_every_prompt_is_a_sample_or_has_a_reason(tmp_path):
    """Fault 30."""
    text = tmp_path / "prompts.txt"
    text.write_bytes(b"\xef\xbb\xbf first \r\n\n  \n\xff\xfe\nh\0i\0\nfirst\nleft\xe2\x80\xa8right")
    rows = [
        {"file_name": "gone.mp4", "caption": "a"},
        {"prompt": "b"},
        {"text": "b"},
        {"caption": " "},
        {"Caption": "c"},
    ]
    rows += [{"caption": 3}, {"caption": "half \ud800"}]
    lines = [json.dumps(row).encode() for row in rows] + [b"", b'{"caption": "\xff"}', b"{", b"[1]", b"[" * 100_000]
    objects = tmp_path / "half \udcff.JSONL"  # a name that is not UTF-8
    objects.write_bytes(b"\n".join(lines))
    no_caption = "no caption: need one of the keys caption, text, prompt, cap"
    expected = {
        text: (
            {"prompts.txt:1": "first", "prompts.txt:6": "first", "prompts.txt:7": "left\u2028right"},
            {"prompts.txt:4": "the line is not UTF-8", "prompts.txt:5": "the line holds NUL: is the file UTF-16?"},
        ),
        objects: (
            {f"half \\udcff.JSONL:{i}": caption for i, caption in enumerate("abb", 1)},
            {
                f"half \\udcff.JSONL:{i}": reason
                for i, reason in (
                    (4, "the caption is empty"),
                    (5, no_caption),
                    (6, no_caption),
                    (7, "the caption is not Unicode text"),
                    (9, "the line is not UTF-8"),
                    (10, "the line is not JSON"),
                    (11, "the line is not a JSON object"),
                    (12, "the line is not JSON"),
                )
            },
        ),
    }
    for number, (source, (samples, reasons)) in enumerate(expected.items()):
        output = tmp_path / f"cache{number}"
        pp.preprocess(config_of(source, output, max_bad_fraction=1.0))
        assert {s["sample_id"]: s["caption"] for s in LatentCache(output).samples} == samples
        skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
        assert [entry["file"] for entry in skipped] == list(reasons)
        for entry in skipped:
            assert entry["reason"].startswith(reasons[entry["file"]]), entry
    with pytest.raises(
        UserError, match=r"8 of 11 prompts cannot be used, more than --max-bad-fraction 0.7: .* first: half"
    ):
        pp.preprocess(config_of(objects, tmp_path / "strict", max_bad_fraction=0.7))


def test_other_prompts_are_another_contract(tmp_path, capsys):
    source, output = tmp_path / "prompts.txt", tmp_path / "cache"
    source.write_text("a prompt\n")
    pp.preprocess(config_of(source, output))
    pp.preprocess(config_of(source, output))
    assert "finished before, nothing to do" in capsys.readouterr().out
    source.write_text("another prompt\n")
    with pytest.raises(UserError, match="prompts: other prompts than those in --prompts now"):
        pp.preprocess(config_of(source, output))
    with pytest.raises(UserError, match="negative_prompt is"):
        pp.preprocess(config_of(source, output, negative_prompt="blurry"))
    pp.preprocess(config_of(source, output, overwrite=True))
    assert LatentCache(output)[0]["caption"] == "another prompt"
    ms.render_dataset(tmp_path / "videos", 1, num_frames=5, height=32, width=32)
    with pytest.raises(UserError, match="it was made with --prompts; use another folder, or --overwrite"):
        pp.preprocess(config_of(tmp_path / "videos", output))
    pp.preprocess(config_of(tmp_path / "videos", output, overwrite=True))
    assert LatentCache(output).has_latents
    with pytest.raises(UserError, match="it was made with --data; use another folder, or --overwrite"):
        pp.preprocess(config_of(source, output))


def test_prompts_need_no_vae(tmp_path):
    pipeline = shutil.copytree(tiny_wan_path(), tmp_path / "pipeline", ignore=shutil.ignore_patterns("vae"))
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    pp.preprocess(dataclasses.replace(config_of(tmp_path / "prompts.txt", tmp_path / "c"), model=str(pipeline)))
    assert "vae" not in LatentCache(tmp_path / "c").manifest["contract"]["encoders"]


def test_one_job_at_a_time_makes_a_cache(tmp_path):
    """A second one says who is at it; when that is done, or was killed, it goes on."""
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    cfg = config_of(tmp_path / "prompts.txt", tmp_path / "c")
    with only_job(tmp_path / "c"):
        with pytest.raises(
            UserError, match=f"c is being made by pid {os.getpid()} on host .*: when that is done, the same"
        ):
            pp.preprocess(cfg)
        assert not (tmp_path / "c").exists()
    pp.preprocess(cfg)
    assert len(LatentCache(tmp_path / "c", prompts_only=True)) == 1 and not list(tmp_path.glob(".*"))


def test_locks_of_the_current_folder_and_where_there_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "sub/.."):
        with only_job(folder), pytest.raises(UserError, match="is being made by pid"):
            with only_job(tmp_path):
                pass
    assert capsys.readouterr().out == ""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with only_job("cache"):
        pass
    said = "WARNING: cache cannot be locked (No locks available): see that one job makes it\n"
    assert capsys.readouterr().out == said and not list(tmp_path.iterdir())


def test_a_lock_that_its_holder_removes_is_taken_anew(tmp_path, monkeypatch):
    """Between the opening of the file and its locking."""
    first, _ = lock_file(tmp_path / "lock")
    flock, removed = fcntl.flock, []

    def meanwhile(descriptor, operation):
        if not removed:
            removed.append((tmp_path / "lock").unlink())
            os.close(first)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    second, _ = lock_file(tmp_path / "lock")
    with pytest.raises(BlockingIOError, match=f"pid {os.getpid()} on host"):
        lock_file(tmp_path / "lock")
    os.close(second)


def test_files_that_are_no_prompts(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    os.mkfifo(tmp_path / "pipe")
    for source, message in (
        (tmp_path / "nowhere.txt", "--prompts .*nowhere.txt: no such file; need a file with one prompt a line"),
        (tmp_path / "pipe", "--prompts .*pipe: not a regular file"),
        (tmp_path / "empty.txt", "--prompts .*empty.txt: no prompts in it"),
    ):
        with pytest.raises(UserError, match=message):
            pp.preprocess(config_of(source, tmp_path / "c"))
    for data, prompts in ((str(tmp_path), str(tmp_path / "empty.txt")), ("", "")):
        with pytest.raises(UserError, match="need exactly one of --data .* and --prompts"):
            pp.preprocess(pp.PreprocessConfig(data, "tiny-wan", str(tmp_path / "c"), prompts=prompts))
    with pytest.raises(UserError, match="--prompts .*: a folder; need a file .* \\(videos: --data\\)"):
        pp.preprocess(pp.PreprocessConfig("", "tiny-wan", str(tmp_path / "c"), prompts=str(tmp_path)))
    assert not (tmp_path / "c").exists()


def test_program_errors_are_one_line(videos, prompts, tmp_path, capsys):
    useless = ["--width", "832", "--max-frames", "7"]  # also where they repeat the default
    for source, extra, message in (
        (videos, ["--num-frames", "6"], "--num-frames 6: must be 4n + 1; nearest: 5 or 9"),
        (videos, ["--width", "40"], "--width 40: must be a multiple of 16; nearest: 32 or 48"),
        (videos, ["--model", "nowhere"], "'nowhere' is neither"),
        (videos, ["--negative-prompt", "half \udcff"], "--negative-prompt half \\udcff: not Unicode text, need UTF-8"),
        (prompts, ["--output", f"{prompts}/c"], "/c cannot be made ("),
        (prompts, useless, "--width, --max-frames: for --data only, a cache of --prompts has no clips: leave out"),
    ):
        status, error = run_program(pp.main, *arguments_of(source, tmp_path / "c"), *extra), capsys.readouterr().err
        assert status == 2 and message in error and error.count("\n") == 1, error


def test_help_names_every_option():
    command = [sys.executable, "-m", "fvtitan.preprocess", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {f.name for f in dataclasses.fields(pp.PreprocessConfig)} - {"limits"}
    names |= {f.name for f in dataclasses.fields(pp.VideoLimits)}
    assert all(f"--{name.replace('_', '-')}" in text for name in names)
