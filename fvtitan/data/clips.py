"""Which frames of a video become samples, and of which size: decided from its packets, before it is decoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fvtitan.data.video import VideoError, VideoInfo
from fvtitan.errors import UserError, nearest_multiples


@dataclass(frozen=True, order=True)
class Bucket:
    """A size that clips are brought to: pixels, and frames at the cache's rate. Written `832x480x81`."""

    width: int
    height: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.num_frames}"

    def check(self, names: tuple[str, str, str]) -> None:
        """Raise `UserError` for a size that Wan's VAE cannot take; `names` are those of width, height and frames in it."""
        for name, value in zip(names, (self.width, self.height), strict=False):
            if value < 16 or value % 16:
                raise UserError(f"{name} {value}: must be a multiple of 16; nearest: {nearest_multiples(value, 16)}")
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            near = nearest_multiples(self.num_frames, 4, 1)
            raise UserError(f"{names[2]} {self.num_frames}: must be 4n + 1; nearest: {near}")


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """`"832x480x81,480x832x81"` (width x height x frames) -> buckets, sorted. Raises `UserError`."""
    buckets = []
    for word in text.split(","):
        if not re.fullmatch(r"\d{1,6}x\d{1,6}x\d{1,6}", word.strip()):
            raise UserError(f"--buckets: {word.strip()!r} is not WIDTHxHEIGHTxFRAMES, such as 832x480x81")
        buckets.append(Bucket(*map(int, word.split("x"))))
        buckets[-1].check(tuple(f"--buckets {word.strip()}: {name}" for name in ("width", "height", "frames")))
        if buckets[-1] in buckets[:-1]:
            raise UserError(f"--buckets: {buckets[-1]} is there twice")
    return tuple(sorted(buckets))


@dataclass(frozen=True)
class ClipPlan:
    """What becomes of a video: `bucket.num_frames` frames from each of `starts`, which count frames at the target rate.

    `frames` [N] is the source's frame on screen at each of these, for the whole video; `scale` is the factor from the size
    shown to that before cropping, `crop_share` the share of the picture that cropping cuts off.
    """

    bucket: Bucket
    starts: tuple[int, ...]
    frames: np.ndarray
    scale: float
    crop_share: float


def plan_clip(info: VideoInfo, buckets: Sequence[Bucket], *, fps: int, spans: int) -> ClipPlan:
    """The bucket that loses least of a video, and the up to `spans` spans of it, one after another from its beginning.

    Less of the picture cut off comes first, then more frames used, then no enlargement, then more pixels. Raises `VideoError`
    when the video is too short for all of them.
    """
    frames = info.frames_at(fps)
    plans = [_plan(info, bucket, frames, spans) for bucket in buckets if bucket.num_frames <= len(frames)]
    if not plans:
        needed = min(bucket.num_frames for bucket in buckets)
        raise VideoError(f"too short: {len(frames)} frames at {fps} fps, {needed} are needed")
    return min(plans, key=_loss)


def _plan(info: VideoInfo, bucket: Bucket, frames: np.ndarray, spans: int) -> ClipPlan:
    scale = max(bucket.width / info.width, bucket.height / info.height)
    kept = bucket.width * bucket.height / (info.width * info.height * scale**2)
    count = min(spans, len(frames) // bucket.num_frames)
    starts = tuple(range(0, count * bucket.num_frames, bucket.num_frames))
    return ClipPlan(bucket, starts, frames, scale, max(0.0, 1 - kept))


def _loss(plan: ClipPlan) -> tuple[float, int, bool, int]:
    pixels = plan.bucket.width * plan.bucket.height
    enlarged = plan.scale > 1
    used = len(plan.starts) * plan.bucket.num_frames
    return round(plan.crop_share, 6), -used, enlarged, pixels if enlarged else -pixels
