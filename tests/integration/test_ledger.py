"""What `--check` says is what preprocess then does, on real files; buckets and spans; `--verify`."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fvtitan import preprocess as pp
from fvtitan.data import ledger, video
from fvtitan.data.latent_cache import LatentCache, read_jsonl
from fvtitan.data.ledger import check_data
from fvtitan.data.verify import verify_cache
from fvtitan.data.video import read_video, write_video
from fvtitan.errors import UserError
from tests.helpers import ROOT, run_program
from tests.unit.test_video import ramp, write_stream

BUCKETS = "32x32x5,48x32x9,32x48x5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Clips of several sizes, rates and orientations, and several that cannot be used."""
    root = tmp_path_factory.mktemp("ledger") / "videos"
    root.mkdir()
    write_stream(root / "wide.mp4", "libx264", ramp(40, 64, 96), fps=30)
    write_stream(root / "phone.mp4", "libx264", ramp(24, 64, 96), fps=24, turn=90)
    write_stream(root / "tv.mkv", "libx264", ramp(24, 32, 32), fps=16, aspect=3)
    write_video(root / "square.mp4", ramp(21, 32, 32), fps=16)
    write_video(root / "short.mp4", ramp(4, 64, 96), fps=16)
    write_video(root / "odd.mp4", ramp(6, 64, 96), fps=16)
    write_video(root / "silent.mp4", ramp(16, 32, 32), fps=16)
    (root / "zero.mp4").touch()
    (root / "cut.mp4").write_bytes((root / "wide.mp4").read_bytes()[:300])
    rows = [
        {"file_name": name, "caption": f"a caption of {name}"} for name in sorted(p.name for p in root.glob("*.m*"))
    ]
    rows = [row for row in rows if row["file_name"] != "silent.mp4"]
    rows += [{"file_name": "silent.mp4"}, {"file_name": "wide.mp4", "caption": "again"}, {"caption": "no file"}]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "notes.txt").write_text("nobody asked for this")
    return root


CASES = {
    "one size": {"width": 32, "height": 32, "num_frames": 9},
    "buckets": {"buckets": BUCKETS},
    "spans": {"buckets": BUCKETS, "spans": 3},
}


@pytest.fixture(scope="module", params=list(CASES))
def made(request, folder, tmp_path_factory):
    """(configuration, ledger, cache) of one way to cut the same files."""
    output = tmp_path_factory.mktemp("cache") / "cache"
    cfg = pp.PreprocessConfig(str(folder), "tiny-wan", str(output), max_bad_fraction=1.0, **CASES[request.param])
    check_data(cfg, batch_size=2, max_loss_share=1.0, contact_sheet=False)  # a cache may be made where its ledger lies
    pp.preprocess(cfg)
    return cfg, read_jsonl(output / "ledger.jsonl"), LatentCache(output)


@pytest.mark.faults
def test_the_ledger_is_what_preprocess_does(made):
    """Fault 28. Damaged, empty, short, upright and odd files: told before, and each with its reason afterwards."""
    cfg, lines, cache = made
    skipped = [(line["file"], line["reason"]) for line in read_jsonl(Path(cfg.output) / "skipped.jsonl")]
    assert [(row["file"], row["reason"]) for row in lines if row["status"] != "used"] == skipped
    expected = []
    for row in lines:
        for (begin, _), frames in zip(row["spans"], row["frames"], strict=True):
            width, height, num_frames = map(int, row["bucket"].split("x"))
            start = round(begin * cfg.fps)
            assert len(frames) == num_frames
            expected.append(
                (f"{row['file']}#{start}" if start else row["file"], (num_frames - 1) // 4 + 1, height, width)
            )
    assert [(s["sample_id"], s["shape"][0], 8 * s["shape"][2], 8 * s["shape"][3]) for s in cache.samples] == expected
    assert {row["status"] for row in lines} == {"used", "unused", "ignored"}
    assert cache.manifest["num_samples"] == len(expected)
    assert cache.manifest["num_skipped"] == sum(row["status"] == "unused" for row in lines)
    assert cache.manifest["num_ignored"] == sum(row["status"] == "ignored" for row in lines) == 1


def test_what_a_row_says(made, folder):
    cfg, lines, _ = made
    rows = {row["file"]: row for row in lines if "listed twice" not in row["reason"]}
    facts = ("width", "height", "rotation", "num_frames", "target_frames", "variable_rate")
    assert [rows["wide.mp4"][key] for key in facts] == [96, 64, 0, 40, 22, False]
    assert [rows["phone.mp4"][key] for key in facts] == [64, 96, 90, 24, 16, False]
    assert [rows["tv.mkv"][key] for key in facts] == [96, 32, 0, 24, 24, False]
    assert (rows["wide.mp4"]["fps"], rows["wide.mp4"]["seconds"]) == (30, pytest.approx(40 / 30, abs=1e-6))
    assert rows["zero.mp4"]["width"] is None and "0 bytes" in rows["zero.mp4"]["reason"]
    assert (
        rows["silent.mp4"]["num_frames"] == 16 and rows["silent.mp4"]["lost_seconds"] == 1.0
    )  # only its caption is missing
    again = next(row for row in lines if "listed twice" in row["reason"])
    assert again["seconds"] is None  # counted where it is used
    if cfg.buckets:
        assert rows["wide.mp4"]["bucket"] == "48x32x9" and rows["wide.mp4"]["crop_share"] == 0
        assert rows["phone.mp4"]["bucket"] == "32x48x5"
        assert rows["square.mp4"]["bucket"] == "32x32x5"
        assert rows["odd.mp4"]["bucket"] == "32x32x5" and rows["odd.mp4"]["crop_share"] == pytest.approx(
            1 / 3, abs=1e-4
        )
    else:
        assert rows["tv.mkv"]["crop_share"] == pytest.approx(2 / 3, abs=1e-4)
    assert rows["wide.mp4"]["frames"][0] == [k * 30 // 16 for k in range(9)]
    assert len(rows["square.mp4"]["spans"]) == (3 if cfg.spans == 3 else 1)


def test_spans_are_what_is_there(made, folder):
    """Each sample is the VAE's latents of its own frames."""
    from fvtitan.models.encoders import VideoVAE

    cfg, _, cache = made
    vae = VideoVAE("tiny-wan")
    for index, line in enumerate(cache.samples):
        frames, _, height, width = line["shape"]
        start = line.get("start", 0)
        size = {"num_frames": 4 * frames - 3, "height": 8 * height, "width": 8 * width}
        pixels = read_video(folder / line["sample_id"].split("#")[0], **size, fps=16, start=start)
        latents = vae.encode(pixels.permute(0, 3, 1, 2)[None].float() / 127.5 - 1)[0]
        torch.testing.assert_close(cache[index]["latents"].float(), latents, atol=3e-2, rtol=1e-2)


def test_buckets_are_a_contract(made):
    cfg, _, cache = made
    buckets = {"buckets": ["32x32x5", "32x48x5", "48x32x9"], "fps": 16}
    one = {"width": 32, "height": 32, "num_frames": 9, "fps": 16}
    expected = (buckets if cfg.buckets else one) | ({"spans": 3} if cfg.spans > 1 else {})
    assert cache.manifest["contract"]["size"] == expected
    with pytest.raises(UserError, match="was made under another contract: size.spans is (None|3) there and 2 now"):
        pp.preprocess(dataclasses.replace(cfg, spans=2))


def test_the_program_prints_it_and_fails_when_too_much_is_lost(folder, tmp_path, capsys):
    output = tmp_path / "ledger"
    words = ["--check", "--data", folder, "--buckets", BUCKETS, "--batch-size", 2]
    assert run_program(pp.main, *words, "--output", output, "--contact-sheet", "--max-loss-share", 0.8) == 0
    said = capsys.readouterr().out
    table = {line.split()[0]: line for line in reversed(said.splitlines()) if line.strip()}
    assert re.search(r"96x64 +40 +1\.33 +30 -> 16 +0-15 +48x32x9 +0\.0% +0\.5 +0\.77", table["wide.mp4"])
    assert "64x96 turned 90" in table["phone.mp4"] and "unused: too short: 4 frames at 16 fps, 5" in table["short.mp4"]
    assert re.search(r"48x32x9 +2 +2 +18 +0\.0003 +1$", said, re.MULTILINE)
    assert re.search(r"32x32x5 +2 +2 +10 +0\.0002 +1$", said, re.MULTILINE)
    assert "unused: 6 of 11 clips (54.5%)" in said and "1 other files ignored" in said
    rows = list(csv.DictReader((output / "ledger.csv").open(encoding="utf-8", newline="")))
    lines = read_jsonl(output / "ledger.jsonl")
    assert [row["file"] for row in rows] == [line["file"] for line in lines] and len(rows) == 12
    assert rows[-4]["file"] == "silent.mp4" and rows[-4]["bucket"] == ""
    assert sorted(path.name for path in output.iterdir()) == ["contact_sheet-0.png", "ledger.csv", "ledger.jsonl"]
    with Image.open(output / "contact_sheet-0.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 400
    assert run_program(pp.main, *words) == 2
    said = capsys.readouterr()
    assert "wide.mp4" in said.out  # the table comes all the same
    assert "54.5% of the clips are not used, more than --max-loss-share 0.1" in said.err and said.err.count("\n") == 1


@pytest.mark.slow
def test_two_ranks_say_and_make_the_same(folder, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    cutting = ["--data", str(folder), "--buckets", BUCKETS, "--spans", "16"]
    for name, launcher in (("one", [sys.executable, "-m"]), ("two", torchrun)):
        output = ["--output", str(tmp_path / name)]
        for words in (["--check", "--max-loss-share", "0.8"], ["--model", "tiny-wan", "--max-bad-fraction", "0.8"]):
            line = [*launcher, "fvtitan.preprocess", *cutting, *output, *words]
            done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-2000:]
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and "ledger.jsonl" in one and "shard-00002.safetensors" in one


def test_seconds_count_too(tmp_path, capsys):
    write_video(tmp_path / "a.mp4", ramp(20), fps=16)
    (tmp_path / "a.txt").write_text("a caption")
    cfg = pp.PreprocessConfig(str(tmp_path), "", "", width=32, height=32, num_frames=5)
    settings = {"batch_size": 4, "contact_sheet": False}
    with pytest.raises(
        UserError, match="75.0% of the seconds are not used, more than --max-loss-share 0.7: more --spans"
    ):
        check_data(cfg, max_loss_share=0.7, **settings)
    check_data(cfg, max_loss_share=0.75, **settings)
    assert "0 of 1 clips (0.0%) and 0.9 of 1.2 s (75.0%)" in capsys.readouterr().out
    four = pp.PreprocessConfig(str(tmp_path), "", "", width=32, height=32, num_frames=5, spans=4)
    check_data(four, max_loss_share=0, **settings)
    assert re.search(r"32x32x5 +1 +4 +20 +0\.0003 +1\n", capsys.readouterr().out)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(UserError, match="no clip can be used; the first: a.mp4: the caption is empty"):
        check_data(four, max_loss_share=1, **settings)


def test_sheets_of_many_clips(folder, tmp_path, monkeypatch):
    cfg = pp.PreprocessConfig(str(folder), "", str(tmp_path), buckets=BUCKETS)
    names = []
    for per_sheet in (2, 6):
        monkeypatch.setattr(ledger, "SHEET_CLIPS", per_sheet)
        check_data(cfg, batch_size=1, max_loss_share=1, contact_sheet=True)
        names.append(sorted(path.name for path in tmp_path.glob("*.png")))
    assert names == [[f"contact_sheet-{k}.png" for k in range(count)] for count in (4, 2)]


def test_nothing_but_first_pictures_is_decoded(folder, monkeypatch, capsys):
    cfg, said = pp.PreprocessConfig(str(folder), "", "", buckets=BUCKETS), []
    for _ in range(2):
        check_data(cfg, batch_size=1, max_loss_share=1, contact_sheet=False)
        said.append(capsys.readouterr().out)
        monkeypatch.setattr(video, "_decode", lambda *_: pytest.fail("decoded"))  # what reads more than one picture
    assert said[0] == said[1] and "48x32x9" in said[0]


@pytest.mark.faults
def test_damage_further_on_is_found_when_the_cache_is_made(tmp_path):
    """Fault 28. The one thing that the ledger cannot know; then no span of the file is used."""
    noise = torch.randint(0, 255, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    root = tmp_path / "videos"
    root.mkdir()
    write_stream(root / "a.mp4", "libx264", noise, g="5", bf="0")
    write_stream(root / "b.mp4", "libx264", noise, g="5", bf="0")
    content = bytearray((root / "a.mp4").read_bytes())
    middle = content.index(b"mdat") + (len(content) - content.index(b"mdat")) * 6 // 10
    content[middle : middle + 400] = b"\x55" * 400
    (root / "a.mp4").write_bytes(content)
    for name in "ab":
        (root / f"{name}.txt").write_text("noise")
    output = tmp_path / "cache"
    cfg = pp.PreprocessConfig(
        str(root), "tiny-wan", str(output), width=32, height=32, num_frames=5, spans=8, max_bad_fraction=0.5
    )
    check_data(cfg, batch_size=1, max_loss_share=0, contact_sheet=False)
    assert [len(row["spans"]) for row in read_jsonl(output / "ledger.jsonl")] == [8, 8]
    pp.preprocess(cfg)
    skipped = read_jsonl(output / "skipped.jsonl")
    assert [line["file"] for line in skipped] == ["a.mp4"] and "damaged" in skipped[0]["reason"]
    cache = LatentCache(output)
    assert [s["sample_id"] for s in cache.samples] == ["b.mp4", *(f"b.mp4#{k}" for k in range(5, 40, 5))]
    stored = load_file(output / "shard-00000.safetensors")
    assert sum(name.startswith("latents") for name in stored) == 8


def test_verify(folder, tmp_path, capsys):
    output = tmp_path / "cache"
    cfg = pp.PreprocessConfig(str(folder), "tiny-wan", str(output), buckets=BUCKETS, spans=3, max_bad_fraction=1.0)
    pp.preprocess(cfg)
    of_cache = pp.PreprocessConfig(str(folder), "tiny-wan", str(output))
    count = len(LatentCache(output))
    verify_cache(of_cache, 2)
    assert capsys.readouterr().out.count(": as stored") == 2
    verify_cache(of_cache, 99)
    assert f"{count} of {count} samples, and the unconditional prompts, are as stored" in capsys.readouterr().out
    for bad, message in ((0, "must be >= 1"), (-1, "must be >= 1")):
        with pytest.raises(UserError, match=message):
            verify_cache(of_cache, bad)


def rewrite(cache: Path, **changed: torch.Tensor) -> None:
    """Tensors of the only shard, changed in place of the same size."""
    name = "shard-00000.safetensors"
    tensors = load_file(cache / name)
    for key, value in changed.items():
        assert tensors[key].shape == value.shape
    save_file(tensors | changed, cache / name)
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["shards"][name] = (cache / name).stat().st_size
    (cache / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
def test_verify_finds_what_differs(folder, tmp_path):
    videos, output = tmp_path / "videos", tmp_path / "cache"
    videos.mkdir()
    for name in ("wide.mp4", "square.mp4"):
        (videos / name).write_bytes((folder / name).read_bytes())
        (videos / name).with_suffix(".txt").write_text(f"caption of {name}")
    pp.preprocess(pp.PreprocessConfig(str(videos), "tiny-wan", str(output), buckets=BUCKETS))
    cfg = pp.PreprocessConfig(str(videos), "tiny-wan", str(output))
    verify_cache(cfg, 2)
    stored = load_file(output / "shard-00000.safetensors")
    wrong = stored["latents.00001"].clone()
    wrong[0, 0, 0, 0] += 0.2 * wrong.float().std()  # one element of one sample
    rewrite(output, **{"latents.00001": wrong})
    with pytest.raises(UserError, match=r"1 of 4 differ; the first: wide.mp4: differs from what is stored by 0\.\d+"):
        verify_cache(cfg, 2)
    text = next(key for key in stored if key.startswith("text."))
    rewrite(output, **{"latents.00001": stored["latents.00001"], text: -stored[text]})
    with pytest.raises(UserError, match="caption's embedding: differs from what is stored"):
        verify_cache(cfg, 2)
    rewrite(output, **{text: stored[text]})
    prompts = load_file(output / "prompts.safetensors")
    save_file(prompts | {"empty": 2 * prompts["empty"]}, output / "prompts.safetensors")
    with pytest.raises(UserError, match="the empty prompt: differs"):
        verify_cache(cfg, 1)
    save_file(prompts, output / "prompts.safetensors")
    verify_cache(cfg, 2)
    (videos / "wide.mp4").write_bytes((folder / "wide.mp4").read_bytes() + b"\0")
    with pytest.raises(UserError, match="wide.mp4: the file has changed"):
        verify_cache(cfg, 2)
    (videos / "wide.mp4").unlink()
    with pytest.raises(UserError, match="wide.mp4: its source is not usable or not there any more"):
        verify_cache(cfg, 2)
    (videos / "wide.mp4").write_bytes((folder / "wide.mp4").read_bytes())
    (videos / "square.txt").write_text("another caption")
    with pytest.raises(
        UserError, match="square.mp4: the caption was 'caption of square.mp4' and is 'another caption' now"
    ):
        verify_cache(cfg, 2)
    with pytest.raises(UserError, match="was made with --data: give it here too"):
        verify_cache(pp.PreprocessConfig("", "tiny-wan", str(output), prompts=str(videos / "square.txt")), 2)


def test_verify_prompts(tmp_path):
    source, output = tmp_path / "prompts.txt", tmp_path / "cache"
    source.write_text("one\ntwo\n")
    cfg = pp.PreprocessConfig("", "tiny-wan", str(output), prompts=str(source))
    pp.preprocess(cfg)
    verify_cache(cfg, 2)
    source.write_text("one\n2\n")
    with pytest.raises(UserError, match="prompts.txt:2: the caption was 'two' and is '2' now"):
        verify_cache(cfg, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--check --data . --model tiny-wan --overwrite",
            "--model, --overwrite: for making a cache, and --check makes none",
        ),
        ("--check --prompts README.md", "--check: says what becomes of videos"),
        ("--check --data . --contact-sheet", "--output is needed"),
        ("--check --data . --batch-size 0", "--batch-size 0: must be >= 1"),
        ("--check --data . --max-loss-share 1.5", "--max-loss-share 1.5: must be in [0, 1]"),
        ("--check --data nowhere", "--data nowhere: no such folder or .jsonl or .csv file"),
        ("--check --data README.md", "--data README.md: not a .jsonl or .csv file"),
        ("--data . --model tiny-wan --output x --batch-size 2", "--batch-size: for --check only: leave out"),
        ("--data . --output x", "--model is needed"),
        ("--data . --model tiny-wan", "--output is needed"),
        (
            "--data . --buckets 32x32x5 --width 64 --model tiny-wan --output x",
            "--width: --buckets say the sizes: leave out",
        ),
        ("--data . --spans 65 --model tiny-wan --output x", "--spans 65: must be in 1 .. 64"),
        ("--verify 2 --data . --model tiny-wan --output x --spans 2", "--spans: --verify takes it from the cache"),
        ("--verify 2 --data . --model tiny-wan", "--output is needed"),
        ("--prompts README.md --file-key x --model tiny-wan --output x", "--file-key: for --data only"),
    ],
)
def test_options_that_would_not_be_read(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["preprocess", *words.split()])
    with pytest.raises(UserError) as raised:
        pp.main()
    assert message in str(raised.value)
