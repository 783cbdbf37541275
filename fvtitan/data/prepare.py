"""What must be on disk before training starts: the caches exist and fit, or are made from moving shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fvtitan.components.files import write_atomic
from fvtitan.data.latent_cache import LatentCache, check_cache_geometry
from fvtitan.data.moving_shapes import clip_attributes, render_dataset, training_combinations
from fvtitan.distributed.utils import on_rank_zero, only_job, rank_and_world
from fvtitan.errors import UserError
from fvtitan.methods import METHODS
from fvtitan.preprocess import PreprocessConfig, preprocess

if TYPE_CHECKING:
    from fvtitan.config import JobConfig


def prepare_data(cfg: JobConfig) -> None:
    """Make caches of moving shapes where `data.moving_shapes_clips` asks for it and no cache exists; check the caches.

    Clips are rendered for what reads latents; a method that needs none gets their captions. All ranks take part. Raises
    `UserError` when a cache is missing, damaged, of another size than [data] says, or lacks the latents that are read.
    """
    if METHODS[cfg.method.name].needs_latents(cfg):
        _prepare_videos(cfg, "data.path", cfg.data.path, cfg.data.moving_shapes_clips, "train")
    else:
        _prepare_prompts(cfg)
    if cfg.validation.enable and cfg.validation.heldout_path:
        validation = cfg.validation
        _prepare_videos(cfg, "validation.heldout_path", validation.heldout_path, validation.heldout_clips, "held_out")


def _prepare_videos(cfg: JobConfig, option: str, path: str, num_clips: int, split: str) -> None:
    if _to_be_made(cfg, path):
        _render(cfg, Path(path), num_clips, split)
    cache = LatentCache(path)
    if not cache.has_latents:
        reader = f'method.name = "{cfg.method.name}" as configured' if option == "data.path" else "validation/loss"
        raise UserError(
            f"{option} = {path!r} is a cache of prompts without latents, and {reader} needs the latents of videos: give "
            f"another {option}; `python -m fvtitan.preprocess --data DIR --model PIPELINE --output CACHE` makes one"
        )
    size = {"num_frames": cfg.data.num_frames, "height": cfg.data.height, "width": cfg.data.width}
    check_cache_geometry(cache, **size, fps=cfg.data.fps)
    for role, model in cfg.models.items():
        for frames in sorted({shape[0] for shape in cache.bucket_shapes}) if model.is_causal else ():
            try:
                model.causal().blocks(frames)
            except UserError as error:
                raise UserError(
                    f"{option} = {path!r} has clips of {4 * frames - 3} frames; models.{role}: {error}"
                ) from None


def _prepare_prompts(cfg: JobConfig) -> None:
    """Only prompts are read: either kind of cache will do, of clips of any size."""
    if _to_be_made(cfg, cfg.data.path):
        cache = Path(cfg.data.path)
        prompts = cache.with_name(f"{cache.name}_prompts.txt")
        with only_job(prompts):
            on_rank_zero(lambda: _write_captions(prompts, cfg.data.moving_shapes_clips, cfg.training.seed))
            preprocess(PreprocessConfig(data="", prompts=str(prompts), model=cfg.data.pipeline, output=str(cache)))
    LatentCache(cfg.data.path)


def _to_be_made(cfg: JobConfig, path: str) -> bool:
    """As rank 0 sees it: another job may be making the cache, and file servers show it to some later."""
    return on_rank_zero(lambda: cfg.data.moving_shapes_clips > 0 and not (Path(path) / "manifest.json").is_file())


def _write_captions(path: Path, num_clips: int, seed: int) -> None:
    """The distinct captions of the `num_clips` training clips that `render_dataset` would render, in its order."""
    combinations = training_combinations()
    count = min(num_clips, len(combinations))  # then they repeat
    content = "".join(f"{clip_attributes(i, combinations, seed).caption}\n" for i in range(count)).encode()
    if path.is_file() and path.read_bytes() == content:
        return
    if path.exists():
        raise UserError(f"{path} exists and holds other prompts than this run's: remove it, or use another data.path")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"writing {count} captions of moving shapes into {path}", flush=True)
    write_atomic(path, content)


def _render(cfg: JobConfig, cache: Path, num_clips: int, split: str) -> None:
    """Videos in `<cache>_videos`, the cache in `<cache>`."""
    data = cfg.data
    videos = cache.with_name(f"{cache.name}_videos")
    size = {"num_frames": data.num_frames, "height": data.height, "width": data.width, "fps": data.fps}
    if rank_and_world()[0] == 0:
        print(f"rendering {num_clips} clips of moving shapes ({split}) into {videos}", flush=True)
    with only_job(videos):
        on_rank_zero(lambda: render_dataset(videos, num_clips, **size, seed=cfg.training.seed, split=split))
        preprocess(PreprocessConfig(data=str(videos), model=data.pipeline, output=str(cache), **size))
