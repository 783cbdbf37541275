from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fvtitan.components.visualise import (
    Thumbnail,
    contact_sheet,
    gif_bytes,
    shown_times,
    thumbnail,
    thumbnail_sheet,
    video_name,
)


def moving_square(frames: int = 33, size: int = 64) -> torch.Tensor:
    video = torch.full((frames, size, size, 3), 90, dtype=torch.uint8)
    for t in range(frames):
        video[t, 20:32, t : t + 12] = torch.tensor([220, 30, 30], dtype=torch.uint8)
    return video


def test_the_gif_plays_the_frames_at_their_rate():
    video = moving_square(9)
    image = Image.open(io.BytesIO(gif_bytes(video, fps=10)))
    assert image.format == "GIF" and image.n_frames == 9 and image.info["loop"] == 0
    for t in range(9):
        image.seek(t)
        assert image.info["duration"] == 100
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - video[t].numpy()).max() <= 8


def test_the_sheet_has_a_row_a_prompt_and_time_to_the_right(tmp_path):
    video, path = moving_square(), tmp_path / "new folder" / "sheet.png"
    size = contact_sheet([("a small red square moving right", video), ("still", video[:1])], path, columns=4)
    sheet = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert sheet.shape[:2] == size[::-1]
    red = (sheet[..., 0] > 180) & (sheet[..., 1] < 80)
    lefts = []
    for column in range(4):  # 64 pixels are shown at 2x with a gap of 2, after a margin of 6
        cell = red[: size[1] // 2, 6 + column * 130 : 6 + column * 130 + 128]
        lefts.append(np.argwhere(cell)[:, 1].min() / 2)
    assert np.allclose(lefts, [0, 11, 21, 32], atol=1)
    assert red[size[1] // 2 :, :136].any() and not red[size[1] // 2 :, 136:].any()  # one frame: one cell
    assert (sheet[6:24, :].sum(-1) < 200).sum() > 100  # the label is there, in black
    assert not [p for p in path.parent.iterdir() if p != path]


def test_a_long_label_is_wrapped_and_sizes_may_differ(tmp_path):
    label = "a very long caption " * 30
    width, height = contact_sheet([(label, moving_square(5)), ("b", moving_square(5, 160))], tmp_path / "s.png", 2)
    plain = contact_sheet([("a", moving_square(5)), ("b", moving_square(5, 160))], tmp_path / "p.png", 2)
    assert width == plain[0] and height > plain[1] + 100


def test_wrong_frames_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\].*float32"):
        gif_bytes(torch.zeros(3, 4, 4, 3), 16)
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], tmp_path / "x.png")


def test_frames_picked_before_make_the_same_sheet(tmp_path):
    video = moving_square(33, 400)
    times = shown_times(33)
    assert times.tolist() == [0, 5, 9, 14, 18, 23, 27, 32]
    picked = np.stack([thumbnail(video[time].numpy()) for time in times])
    assert picked.shape == (8, 320, 320, 3)
    sizes = [contact_sheet([("a", video)], tmp_path / "whole.png")]
    sizes.append(contact_sheet([("a", picked)], tmp_path / "picked.png", times=times.tolist()))
    assert sizes[0] == sizes[1] and sizes[0][0] < 9 * 330  # large frames are reduced
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "picked.png").read_bytes()


def test_a_thumbnail_keeps_the_picture():
    frame = np.zeros((480, 832, 3), dtype=np.uint8)
    frame[:240] = 200
    small = thumbnail(frame)
    assert small.shape == (185, 320, 3) and (small[:91] == 200).all() and (small[94:] == 0).all()
    assert thumbnail(frame[:64, :64]).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A small RED circle", "0007-a-small-red-circle.mp4"),
        ("../../etc/passwd\0", "0007-etc-passwd.mp4"),
        ("色调艳丽", "0007.mp4"),
        ("--", "0007.mp4"),
        ("x" * 300, f"0007-{'x' * 60}.mp4"),
    ],
)
def test_a_name_takes_nothing_but_letters_and_digits_of_the_prompt(prompt, name):
    assert video_name(7, prompt) == name


def test_thumbnails_darken_what_is_cut_off(tmp_path):
    picture = torch.full((40, 80, 3), 200, dtype=torch.uint8)
    things = [
        Thumbnail("wide.mp4\nhalf of it", picture, (80, 40), (0.5, 1.0)),
        Thumbnail("tall.mp4", picture, (40, 80), (1.0, 0.25)),  # pixels that are not square
        Thumbnail("unused.mp4\n" + 40 * "a long reason ", picture, (80, 40), None),
        *[Thumbnail("more", picture, (80, 80), (1.0, 1.0))] * 4,
    ]
    thumbnail_sheet(things, tmp_path / "sheet.png")
    image = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    left, top = 6, 6
    wide = image[top : top + 108, left : left + 216, 0]
    assert (wide[:, :52] == 50).all() and (wide[:, 56:160] == 200).all() and (wide[:, 164:] == 50).all()
    tall = image[top : top + 216, left + 222 : left + 222 + 108, 0]
    assert (tall[:78] == 50).all() and (tall[84:132] == 200).all() and (tall[138:] == 50).all()
    assert (image[top : top + 108, left + 444 : left + 660, 0] == 50).all()
    second_row = image[top + 216 + 36 + 6 :]
    assert (second_row[:216, left : left + 216, 0] == 200).all() and image.shape[1] == 6 * 222 + 6
