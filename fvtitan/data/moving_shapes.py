"""Moving shapes: a captioned synthetic video set, and a judge that measures any video against its caption.

3 shapes x 6 colours x 2 sizes x 4 directions x 2 speeds x 2 backgrounds = 576 combinations, 48 of them held out of every
training set. The frame is a torus: shapes wrap around, so videos of any length make sense. The start position is drawn
independently of everything else. All shapes of a size have the same area.

    python -m fvtitan.data.moving_shapes render --output DIR --num-clips 100
    python -m fvtitan.data.moving_shapes judge --videos DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fvtitan.components.files import is_temporary, write_atomic
from fvtitan.components.rng import fold
from fvtitan.errors import UserError, cli, nearest_multiples

SHAPES = ("circle", "square", "triangle")
# In [-1, 1] every value lies within [-0.65, 0.49]: a VAE decoder that clamps to [-1, 1] keeps its gradient there.
COLOURS = {
    "red": (190, 45, 45),
    "green": (45, 190, 45),
    "blue": (45, 45, 190),
    "yellow": (190, 190, 45),
    "purple": (190, 45, 190),
    "cyan": (45, 190, 190),
}
SIZES = {"small": 14.0, "large": 20.0}  # radius of the circle, in pixels of a 64-pixel frame
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": 1.5, "quickly": 3.0}  # pixels per frame
BACKGROUNDS = {"dark": 85, "light": 135}
NUM_HELD_OUT = 48
CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "direction": 1 / len(DIRECTIONS),
    "size": 0.5,
    "speed": 0.5,
}

_CAPTION = re.compile(
    f"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) moving ({'|'.join(DIRECTIONS)}) "
    f"({'|'.join(SPEEDS)}) on a ({'|'.join(BACKGROUNDS)}) grey background"
)


@dataclass(frozen=True)
class Attributes:
    """Everything that a caption says."""

    size: str
    colour: str
    shape: str
    direction: str
    speed: str
    background: str

    @property
    def caption(self) -> str:
        return (
            f"a {self.size} {self.colour} {self.shape} moving {self.direction} {self.speed} "
            f"on a {self.background} grey background"
        )


def parse_caption(caption: str) -> Attributes:
    """The attributes of a caption. Raises `UserError` when it is not one of ours."""
    match = _CAPTION.fullmatch(caption.strip())
    if not match:
        raise UserError(f"not a caption of the moving shapes: {caption!r}; one is {all_combinations()[0].caption!r}")
    return Attributes(*match.groups())


def all_combinations() -> list[Attributes]:
    """All 576, in a fixed order."""
    return [Attributes(*c) for c in itertools.product(SIZES, COLOURS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS)]


def held_out_combinations() -> list[Attributes]:
    """The 48 that no training set contains: each colour 8 times, shape 16, direction 12, and the two-valued ones 24."""
    held_out = []
    for i in range(NUM_HELD_OUT):
        # 6 colours x 4 directions twice; the other attributes cycle so that each is balanced and no two agree.
        colour, direction, half = i % 6, (i // 6) % 4, i // 24
        size = (colour + direction + half) % 2
        speed = (colour // 2 + direction // 2 + half) % 2
        background = (colour + direction // 2) % 2
        shape = (colour + direction + 2 * half) % 3
        values = (SIZES, COLOURS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS)
        choice = (size, colour, shape, direction, speed, background)
        held_out.append(Attributes(*(list(names)[k] for names, k in zip(values, choice, strict=True))))
    return held_out


def training_combinations() -> list[Attributes]:
    """The other 528."""
    held_out = set(held_out_combinations())
    return [attributes for attributes in all_combinations() if attributes not in held_out]


def _coverage(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, 0 to 1; x, y are offsets from its centroid, y downwards."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - radius * math.sqrt(math.pi) / 2
    else:  # equilateral, pointing up, of the circle's area
        inradius = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
        distance = np.maximum(y, np.abs(x) * math.sqrt(3) / 2 - y / 2) - inradius
    return np.clip(0.5 - distance, 0.0, 1.0)


def _offsets(centres: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Offsets `[T, H, W]` of every pixel from centres `[T, 2]` (x, y), the short way around the torus."""
    x = np.arange(width)[None, None, :] - centres[:, 0, None, None]
    y = np.arange(height)[None, :, None] - centres[:, 1, None, None]
    x = (x + width / 2) % width - width / 2
    y = (y + height / 2) % height - height / 2
    return np.broadcast_arrays(x, y)


def render_clip(
    attributes: Attributes, *, num_frames: int = 33, height: int = 64, width: int = 64, seed: int = 0
) -> Tensor:
    """One clip, uint8 `[T, H, W, 3]`; the seed draws the start position. Sizes and speeds scale with the frame."""
    rng = np.random.RandomState(fold(seed, "moving_shapes", attributes.caption))
    start = rng.uniform(0, 1, size=2) * (width, height)
    scale = min(height, width) / 64
    velocity = np.array(DIRECTIONS[attributes.direction]) * SPEEDS[attributes.speed] * scale
    centres = start + velocity * np.arange(num_frames)[:, None]
    alpha = _coverage(attributes.shape, SIZES[attributes.size] * scale, *_offsets(centres, height, width))[..., None]
    background = np.full(3, BACKGROUNDS[attributes.background])
    frames = background + alpha * (np.array(COLOURS[attributes.colour]) - background)
    return torch.from_numpy(np.round(frames).astype(np.uint8))


def clip_attributes(number: int, combinations: Sequence[Attributes], seed: int) -> Attributes:
    """What clip `number` of a set shows: combinations in turn, each time in another shuffled order."""
    turn, place = divmod(number, len(combinations))
    order = np.random.RandomState(fold(seed, "combinations", turn)).permutation(len(combinations))
    return combinations[order[place]]


def render_dataset(
    folder: str | Path,
    num_clips: int,
    *,
    num_frames: int = 33,
    height: int = 64,
    width: int = 64,
    fps: int = 16,
    seed: int = 0,
    split: str = "train",
) -> None:
    """Render mp4 files and `metadata.jsonl` into `folder`. A finished set is kept, an unfinished one is completed.

    Combinations are taken in turn, in a shuffled order, so every attribute is balanced. Raises `UserError` when the
    folder holds another set, or cannot be made.
    """
    from fvtitan.data.video import write_video

    folder = Path(folder)
    contract = {
        "num_clips": num_clips,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "fps": fps,
        "seed": seed,
        "split": split,
    }
    record, finished = folder / "render.json", folder / "metadata.jsonl"
    if record.is_file() and json.loads(record.read_text()) != contract:
        raise UserError(
            f"{folder} holds another rendering ({record.read_text().strip()}): remove it, or use another folder"
        )
    if finished.is_file() and record.is_file():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): name another folder") from None
    temporaries = [path for path in folder.iterdir() if is_temporary(path, r"render\.json")]  # of a run that was killed
    if not record.is_file() and len(list(folder.iterdir())) > len(temporaries):
        raise UserError(f"{folder} is not empty and holds no rendering of ours: use another folder")
    for temporary in temporaries:
        temporary.unlink()
    write_atomic(record, json.dumps(contract) + "\n")
    combinations = training_combinations() if split == "train" else held_out_combinations()
    lines = []
    for i in range(num_clips):
        attributes = clip_attributes(i, combinations, seed)
        name = f"{i:06d}.mp4"
        if not (folder / name).is_file():
            clip = render_clip(attributes, num_frames=num_frames, height=height, width=width, seed=fold(seed, split, i))
            write_video(folder / name, clip, fps=fps)
        lines.append(json.dumps({"file_name": name, "caption": attributes.caption}))
    write_atomic(finished, "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Judgement:
    """What was measured in a video, and whether it is what the caption says. Constancies are 1 when perfect."""

    colour: str
    shape: str
    direction: str
    size: str
    speed: float
    """Pixels per frame, of a 64-pixel frame."""
    colour_correct: bool
    shape_correct: bool
    direction_correct: bool
    size_correct: bool
    speed_correct: bool
    area_constancy: float
    """1 - standard deviation / mean of the shape's area over the frames, at least 0."""
    speed_constancy: float
    """1 - standard deviation / mean of the speed over windows of 4 frames, at least 0."""
    area_drift: float
    """|mean area of the last third - of the first third| / mean area."""
    speed_drift: float
    """The same of the speed."""


NOTHING = "none"
MIN_CONCENTRATION = 0.05  # only what has no place at all is refused: poor samples of an early model are judged
_NOTHING_SEEN = Judgement(
    NOTHING, NOTHING, NOTHING, NOTHING, 0.0, False, False, False, False, False, 0.0, 0.0, 1.0, 1.0
)


def _wrap(difference: np.ndarray, period: float) -> np.ndarray:
    return (difference + period / 2) % period - period / 2


def _constancy(values: np.ndarray) -> float:
    mean = float(values.mean())
    return max(0.0, 1.0 - float(values.std()) / mean) if mean > 0 else 0.0


def _drift(values: np.ndarray) -> float:
    third, mean = max(1, len(values) // 3), float(values.mean())
    return abs(float(values[-third:].mean() - values[:third].mean())) / mean if mean > 0 else 1.0


def _circular_mean(weights: np.ndarray) -> np.ndarray:
    """Weighted mean position `[T]` on a ring of N places. weights `[T, N]`."""
    angle = 2 * np.pi * np.arange(weights.shape[1]) / weights.shape[1]
    mean = np.arctan2(weights @ np.sin(angle), weights @ np.cos(angle))
    return mean / (2 * np.pi) * weights.shape[1] % weights.shape[1]


def _concentration(alpha: np.ndarray) -> float:
    """How far the mass of `[T, H, W]` gathers at one place of the torus, 0 to 1, over the frames that have any: 0.5 and
    more for rendered shapes, below 0.02 for noise. The smaller of the two axes' resultant lengths."""
    alpha = alpha[alpha.any((1, 2))]
    lengths = []
    for axis in (1, 2):
        profile = alpha.sum(axis)
        waves = np.exp(2j * np.pi * np.arange(profile.shape[1]) / profile.shape[1])
        lengths.append(np.abs(profile @ waves) / profile.sum(1))
    return float(np.minimum(*lengths).mean())


def _soften(images: np.ndarray) -> np.ndarray:
    """Binomial blur of about a pixel, as decoders leave it on edges: corners are judged by their mass. `[T, H, W]`."""
    for axis in (1, 2):
        for _ in range(3):
            images = (np.roll(images, 1, axis) + 2 * images + np.roll(images, -1, axis)) / 4
    return images


def judge_video(frames: Tensor | np.ndarray, caption: str) -> Judgement:
    """Measure a video, uint8 `[T, H, W, 3]` of any length, and compare it with its caption.

    The background is the median pixel; the shape is what stands out from it. Its colour is the direction in which it
    stands out, its position the circular mean on the torus, its motion the unwrapped displacement, its form the
    nearest of three softened templates of the measured area. A video without a shape is wrong in everything.
    """
    wanted = parse_caption(caption)
    video = np.asarray(frames).astype(np.float32)
    num_frames, height, width, _ = video.shape
    scale = min(height, width) / 64
    background = np.median(video.reshape(-1, 3), axis=0)
    difference = video - background
    contrast = np.linalg.norm(difference, axis=-1)
    strong = contrast > max(30.0, 0.7 * float(np.quantile(contrast, 0.98)))
    if strong.sum() < 4 * num_frames:
        return _NOTHING_SEEN

    seen = np.median(difference[strong], axis=0)  # the shape's colour minus the background's

    def likeness(name: str) -> float:
        expected = np.array(COLOURS[name]) - background
        return float(seen @ expected / (np.linalg.norm(seen) * np.linalg.norm(expected)))

    colour = max(COLOURS, key=likeness)
    alpha = np.clip(difference @ seen / (seen @ seen), 0.0, 1.0)  # [T, H, W], share of a pixel that is the shape
    alpha[alpha < 0.25] = 0.0  # compression noise over the whole frame would pull the centroid
    area = alpha.sum((1, 2))
    if (area > 0).mean() < 0.5 or _concentration(alpha) < MIN_CONCENTRATION:
        return _NOTHING_SEEN

    centres = np.stack([_circular_mean(alpha.sum(1)), _circular_mean(alpha.sum(2))], axis=1)  # [T, 2]: x, y
    steps = np.stack([_wrap(np.diff(centres[:, 0]), width), _wrap(np.diff(centres[:, 1]), height)], axis=1)
    velocity = steps.mean(0) if num_frames > 1 else np.zeros(2)
    speed = float(np.linalg.norm(velocity)) / scale
    direction = max(DIRECTIONS, key=lambda name: float(velocity @ np.array(DIRECTIONS[name])))
    if speed < 0.25:
        direction = NOTHING
    window = min(4, max(1, num_frames - 1))
    path = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    speeds = np.linalg.norm(path[window:] - path[:-window], axis=1) / window

    radius = math.sqrt(float(area[area > 0].mean()) / math.pi)
    offsets = _offsets(centres, height, width)
    templates = {name: _soften(_coverage(name, radius, *offsets)) for name in SHAPES}
    errors = {name: float(((alpha - template) ** 2).mean()) for name, template in templates.items()}
    shape = min(errors, key=errors.__getitem__)
    size = "small" if radius < scale * math.sqrt(SIZES["small"] * SIZES["large"]) else "large"
    middle_speed = math.sqrt(SPEEDS["slowly"] * SPEEDS["quickly"])
    return Judgement(
        colour=colour,
        shape=shape,
        direction=direction,
        size=size,
        speed=speed,
        colour_correct=colour == wanted.colour,
        shape_correct=shape == wanted.shape,
        direction_correct=direction == wanted.direction,
        size_correct=size == wanted.size,
        speed_correct=direction != NOTHING and (speed < middle_speed) == (wanted.speed == "slowly"),
        area_constancy=_constancy(area),
        speed_constancy=_constancy(speeds),
        area_drift=_drift(area),
        speed_drift=_drift(speeds),
    )


MEASURES = (*CHANCE, "area_constancy", "speed_constancy", "area_drift", "speed_drift")


def summarise(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Mean accuracy of each attribute (colour, shape, direction, size, speed), and mean constancies and drifts."""
    return {name: float(np.mean(measured(judgements, name))) for name in MEASURES}


def measured(judgements: Sequence[Judgement], name: str) -> np.ndarray:
    """One of `MEASURES`, video by video: 0 or 1 for an attribute, else the value. `[N]`, float64."""
    attribute = f"{name}_correct" if name in CHANCE else name
    return np.array([getattr(judgement, attribute) for judgement in judgements], dtype=np.float64)


def _caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the caption: {error}") from None


def judge_folder(folder: str | Path) -> list[tuple[str, Judgement]]:
    """Judge every captioned mp4 of a folder: `metadata.jsonl`, or `clip.txt` beside `clip.mp4`.

    Raises `UserError` naming a line or a video that cannot be read.
    """
    from fvtitan.data.video import Isolated, VideoError, VideoLimits, read_all_frames

    folder = Path(folder)
    if (folder / "metadata.jsonl").is_file():
        try:
            records = [
                json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
            ]
            pairs = [(record["file_name"], record["caption"]) for record in records]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / 'metadata.jsonl'}: need file_name and caption in each line: {error!r}"
            ) from None
    else:
        pairs = [(p.with_suffix(".mp4").name, _caption(p)) for p in sorted(folder.glob("*.txt"))]
    if not pairs:
        raise UserError(f"{folder}: no metadata.jsonl and no clip.txt beside a clip.mp4")
    judged = []
    with Isolated(read_all_frames, VideoLimits()) as read:
        for name, caption in pairs:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{folder}: the video {name!r} leaves the folder")
            try:
                judged.append((name, judge_video(read(folder / name), caption)))
            except VideoError as error:
                raise UserError(f"{folder / name}: {error}") from None
    return judged


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fvtitan.data.moving_shapes", description="Moving shapes.")
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="render mp4 files and metadata.jsonl")
    render.add_argument("--output", required=True, help="folder to write")
    render.add_argument("--num-clips", type=int, required=True)
    render.add_argument("--num-frames", type=int, default=33)
    render.add_argument("--height", type=int, default=64)
    render.add_argument("--width", type=int, default=64)
    render.add_argument("--fps", type=int, default=16)
    render.add_argument("--seed", type=int, default=0)
    render.add_argument("--split", choices=("train", "held_out"), default="train")
    judge = commands.add_parser("judge", help="measure the videos of a folder against their captions")
    judge.add_argument("--videos", required=True, help="folder with metadata.jsonl, or clip.mp4 + clip.txt pairs")
    judge.add_argument("--json", action="store_true", help="print one JSON object a video instead of the table")
    args = parser.parse_args()
    if args.command == "render":
        for name in ("num_clips", "num_frames", "height", "width", "fps"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be >= 1")
        for name in ("height", "width"):
            value = getattr(args, name)
            if value % 2:
                raise UserError(f"--{name} {value}: H.264 needs an even size; nearest: {nearest_multiples(value, 2)}")
        keys = ("num_frames", "height", "width", "fps", "seed", "split")
        render_dataset(args.output, args.num_clips, **{key: getattr(args, key) for key in keys})
        return
    judged = judge_folder(args.videos)
    if args.json:
        for name, judgement in judged:
            print(json.dumps({"file_name": name, **dataclasses.asdict(judgement)}))
        return
    print(f"{len(judged)} videos\n{'measure':<16} {'score':>7} {'chance':>7}")
    for name, value in summarise([judgement for _, judgement in judged]).items():
        print(f"{name:<16} {value:7.3f} {f'{CHANCE[name]:.3f}' if name in CHANCE else '':>7}")


if __name__ == "__main__":
    cli(main)
