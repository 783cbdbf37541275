"""Which bucket a video goes to, and what is taken of it."""

from __future__ import annotations

import numpy as np
import pytest

from fvtitan.data.clips import Bucket, parse_buckets, plan_clip
from fvtitan.data.video import VideoError, VideoInfo
from fvtitan.errors import UserError


def info(width: int, height: int, frames: int, fps: float = 16) -> VideoInfo:
    times = (np.arange(frames) / fps).tolist()
    return VideoInfo(width, height, rotation=0, pixel_aspect=1.0, container="avi", start=0.0, times=times)


def plan(video: VideoInfo, buckets: str, spans: int = 1):
    return plan_clip(video, parse_buckets(buckets), fps=16, spans=spans)


@pytest.mark.parametrize(
    ("video", "buckets", "chosen"),
    [
        (info(1920, 1080, 100), "832x480x81,480x832x81", "832x480x81"),
        (info(1080, 1920, 100), "832x480x81,480x832x81", "480x832x81"),
        (info(1000, 1000, 100), "832x480x81,480x832x81,512x512x17", "512x512x17"),  # the picture before the frames
        (info(1920, 1080, 80), "832x480x81,832x480x33,480x832x33", "832x480x33"),  # too short for the first
        (info(1920, 1080, 100), "832x480x33,832x480x81", "832x480x81"),  # the same picture: more frames
        (info(1000, 1000, 50), "256x256x33,512x512x33,1024x1024x33", "512x512x33"),  # most pixels without enlarging
        (info(200, 200, 50), "256x256x33,512x512x33", "256x256x33"),  # enlarged as little as can be
    ],
)
def test_a_clip_goes_where_least_is_lost(video, buckets, chosen):
    assert str(plan(video, buckets).bucket) == chosen
    assert str(plan(video, ",".join(buckets.split(",")[::-1])).bucket) == chosen  # in any order


def test_more_spans_change_what_is_lost():
    video, buckets = info(640, 480, 70), "640x480x49,640x480x33"
    assert [str(plan(video, buckets, spans).bucket) for spans in (1, 2)] == ["640x480x49", "640x480x33"]
    assert plan(video, buckets, 2).starts == (0, 33) and plan(video, buckets, 9).starts == (0, 33)
    assert plan(info(640, 480, 33), "640x480x33", 9).starts == (0,)


def test_what_cropping_cuts_off():
    wide = plan(info(1280, 720, 90), "480x480x81")
    assert wide.scale == pytest.approx(480 / 720) and wide.crop_share == pytest.approx(1 - 720 / 1280)
    tall = plan(info(720, 1280, 90), "480x480x81")
    assert tall.crop_share == pytest.approx(wide.crop_share)
    assert plan(info(320, 240, 90), "640x480x81").crop_share == 0.0


def test_frames_on_screen():
    assert plan(info(64, 64, 20, fps=8), "64x64x33").frames.tolist() == [k // 2 for k in range(40)]
    assert plan(info(64, 64, 80, fps=32), "64x64x33").frames.tolist() == list(range(0, 80, 2))
    assert info(64, 64, 1).frames_at(16).tolist() == [0]  # a picture is a video of one frame
    with pytest.raises(VideoError, match="too short: 32 frames at 16 fps, 33 are needed"):
        plan(info(64, 64, 32), "64x64x81,64x64x33")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("832x480", "'832x480' is not WIDTHxHEIGHTxFRAMES, such as 832x480x81"),
        ("832*480*81", "is not WIDTHxHEIGHTxFRAMES"),
        ("832x480x81,", "'' is not"),
        ("830x480x81", "--buckets 830x480x81: width 830: must be a multiple of 16; nearest: 816 or 832"),
        ("832x470x81", "height 470: must be a multiple of 16; nearest: 464 or 480"),
        ("832x480x80", "frames 80: must be 4n [+] 1; nearest: 77 or 81"),
        ("832x480x81, 0832x480x81", "832x480x81 is there twice"),
    ],
)
def test_what_is_no_bucket(text, message):
    with pytest.raises(UserError, match=message):
        parse_buckets(text)


def test_buckets_are_sorted():
    assert parse_buckets("64x32x9, 32x64x9") == (Bucket(32, 64, 9), Bucket(64, 32, 9))
