"""B7: the loader: cached latents with 0, 1, 2 workers, against decoding the mp4 files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Result, Setting, compare, gate, interleave
from fvtitan.data.dataloader import BatchStream
from fvtitan.data.latent_cache import LatentCache
from fvtitan.data.moving_shapes import render_dataset
from fvtitan.data.video import read_video
from fvtitan.preprocess import PreprocessConfig, preprocess

SIZE = {"num_frames": 33, "height": 64, "width": 64, "fps": 16}


class Videos:
    """The mp4 files of a latent cache, decoded when they are read."""

    def __init__(self, cache: LatentCache, folder: Path) -> None:
        self.samples, self.folder = cache.samples, folder
        self.bucket_indices, self.fingerprint = cache.bucket_indices, cache.fingerprint

    def __len__(self) -> int:
        return len(self.samples)

    def sample_id(self, index: int) -> str:
        return self.samples[index]["sample_id"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        return {"sample_id": sample["sample_id"], "video": read_video(self.folder / sample["sample_id"], **SIZE)}


def run(setting: Setting) -> Result:
    """Wall time of 16 batches of 4, over and over the same files: the page cache is warm. A decoded video would still have to
    be encoded."""
    clips, batches = (4, 2) if setting.quick else (32, 16)
    with tempfile.TemporaryDirectory() as folder:
        videos, path = Path(folder) / "videos", Path(folder) / "cache"
        render_dataset(videos, clips, **SIZE)
        preprocess(PreprocessConfig(data=str(videos), model="tiny-wan", output=str(path), **SIZE))
        cache = LatentCache(path)
        size = {"global_batch_size": 4, "local_batch_size": 4, "seed": 0}
        streams = {f"latents, {n} workers": BatchStream(cache, **size, num_workers=n) for n in (0, 1, 2)}
        streams |= {f"mp4, {n} workers": BatchStream(Videos(cache, videos), **size, num_workers=n) for n in (0, 2)}
        try:
            first = {name: next(stream) for name, stream in streams.items()}  # starts the workers
            error = max(
                gate(batch["latents"].float(), first["latents, 0 workers"]["latents"].float(), 0.0, name)
                for name, batch in first.items()
                if name.startswith("latents")
            )
            assert all(batch["sample_ids"] == first["mp4, 0 workers"]["sample_ids"] for batch in first.values())

            def take(stream: BatchStream, count: int) -> None:
                for _ in range(count):
                    next(stream)

            # What workers fetched while the others had their turn does not count.
            prefetched = {name: lambda s=s: take(s, 2 * s.num_workers) for name, s in streams.items()}
            steps = {name: lambda s=s: take(s, batches) for name, s in streams.items()}
            times = interleave(steps, setting, wall=True, before=prefetched)
        finally:
            for stream in streams.values():
                stream.close()
    rows = [
        compare(times, name, "latents, 0 workers", error=error if name.startswith("latents") else None)
        for name in times
        if name != "latents, 0 workers"
    ]
    notes = []
    if setting.is_gpu:
        rates = {name: batches * 4 / torch.tensor(seconds).median().item() for name, seconds in times.items()}
        notes = [", ".join(f"{name}: {rate:.0f} samples/s" for name, rate in rates.items())]
    return Result("loader", f"{clips} clips of 33 x 64 x 64, batches of 4", rows, notes)
