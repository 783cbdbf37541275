"""What must be on disk before training starts: the caches exist and fit, or are made from moving shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from fvtitan.data.latent_cache import LatentCache, check_cache_geometry
from fvtitan.data.moving_shapes import render_dataset
from fvtitan.errors import UserError
from fvtitan.preprocess import PreprocessConfig, preprocess

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


def prepare_data(cfg: JobConfig) -> None:
    """Render and encode moving shapes where `data.moving_shapes_clips` asks for it and no cache exists; check the caches.

    All ranks take part. Raises `UserError` when a cache is missing, damaged or of another size than [data] says.
    """
    wanted = [(cfg.data.path, cfg.data.moving_shapes_clips, "train")]
    if cfg.validation.enable and cfg.validation.heldout_path:
        wanted.append((cfg.validation.heldout_path, cfg.validation.heldout_clips, "held_out"))
    for path, num_clips, split in wanted:
        if cfg.data.moving_shapes_clips and not (Path(path) / "manifest.json").is_file():
            _make_moving_shapes(cfg, Path(path), num_clips, split)
        size = {"num_frames": cfg.data.num_frames, "height": cfg.data.height, "width": cfg.data.width}
        check_cache_geometry(LatentCache(path), **size, fps=cfg.data.fps)


def _make_moving_shapes(cfg: JobConfig, cache: Path, num_clips: int, split: str) -> None:
    """Videos in `<cache>_videos`, the cache in `<cache>`."""
    data = cfg.data
    videos = cache.with_name(f"{cache.name}_videos")
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        print(f"rendering {num_clips} clips of moving shapes ({split}) into {videos}", flush=True)
        try:
            render_dataset(
                videos,
                num_clips,
                num_frames=data.num_frames,
                height=data.height,
                width=data.width,
                fps=data.fps,
                seed=cfg.training.seed,
                split=split,
            )
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])
    preprocess(
        PreprocessConfig(
            data=str(videos),
            model=data.pipeline,
            output=str(cache),
            width=data.width,
            height=data.height,
            num_frames=data.num_frames,
            fps=data.fps,
        )
    )
