"""The partition of frames into blocks, and which earlier frames a block sees."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvtitan.errors import UserError
from fvtitan.models.blocks import block_starts, earlier_frames, partition

blocks_of = st.tuples(st.integers(1, 40), st.integers(1, 6), st.booleans())


def fits(frames: int, size: int, first: bool) -> bool:
    """Whether `frames` is the sum of some number of blocks: by counting up, not by division."""
    total = 1 if first else size
    while total < frames:
        total += size
    return total == frames


@given(blocks_of)
def test_blocks_tile_the_video_or_the_error_names_the_nearest_lengths(case):
    frames, size, first = case
    if fits(frames, size, first):
        blocks = partition(frames, size, first)
        spans = block_starts(blocks)
        assert [frame for start, end in spans for frame in range(start, end)] == list(range(frames))
        assert blocks[0] == (1 if first else size) and set(blocks[1:]) <= {size}
        assert tuple(end - start for start, end in spans) == blocks
        return
    with pytest.raises(UserError) as caught:
        partition(frames, size, first)
    named = [(int(n), int(video)) for n, video in re.findall(r"(\d+) \((\d+) video frames\)", str(caught.value))]
    below = [n for n in range(1, frames) if fits(n, size, first)][-1:]
    above = next(n for n in range(frames, frames + size + 1) if fits(n, size, first))
    assert [n for n, _ in named] == [*below, above]
    assert all((video - 1) // 4 + 1 == n and video % 4 == 1 for n, video in named)
    assert str(frames) in str(caught.value) and ("independent first frame" in str(caught.value)) == first


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [((9, 3), (3, 3, 3)), ((7, 3, True), (1, 3, 3)), ((1, 3, True), (1,)), ((4, 1), (1, 1, 1, 1)), ((5, 5), (5,))],
)
def test_partitions(arguments, blocks):
    assert partition(*arguments) == blocks


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ((10, 3), "nearest: 9 (33 video frames) or 12 (45 video frames)"),
        ((9, 3, True), "nearest: 7 (25 video frames) or 10 (37 video frames)"),
        ((2, 3), "nearest: 3 (9 video frames)"),
        ((0, 3), "nearest: 3 (9 video frames)"),
        ((0, 3, True), "nearest: 1 (1 video frames) or 4 (13 video frames)"),
    ],
)
def test_errors_name_the_nearest_lengths(arguments, nearest):
    with pytest.raises(UserError) as caught:
        partition(*arguments)
    assert str(caught.value).endswith(nearest)


@given(st.integers(0, 30), st.integers(1, 6), st.one_of(st.just(-1), st.integers(1, 20)), st.integers(0, 8))
def test_earlier_frames_are_the_window_and_the_sink(start, size, window, sink):
    """Frame by frame: seen when it is one of the `window` last ones up to the block's end, or one of the first `sink`."""
    end = start + size
    runs = earlier_frames(start, end, window, sink)
    seen = [frame for low, high in runs for frame in range(low, high)]
    assert seen == [frame for frame in range(start) if window < 0 or end - frame <= window or frame < sink]
    assert all(low < high for low, high in runs)
    assert all(a[1] < b[0] for a, b in zip(runs[:-1], runs[1:], strict=True))  # runs that touch are one
