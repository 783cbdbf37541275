"""Pictures of videos: animated GIFs for TensorBoard, contact sheets (one row a prompt, time to the right), first frames."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fvtitan.components.files import write_atomic

_MARGIN = 6
_TEXT = 14  # font size in pixels
_LINE = 18
_SMALLEST_CELL = 96  # tiny frames are enlarged to about this many pixels, by a whole factor
_LARGEST_CELL = 320  # pixels of the longer side that larger frames are reduced to
_SHEET_COLUMNS = 8
_THUMBNAIL, _COLUMNS = 216, 6  # pixels of a thumbnail's longer side; thumbnails in a row


def _frames_array(frames: Tensor | np.ndarray) -> np.ndarray:
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or array.shape[0] == 0:
        raise ValueError(f"frames must be uint8 [T, H, W, 3] with T >= 1, got {array.dtype} {list(array.shape)}")
    return array


def gif_bytes(frames: Tensor | np.ndarray, fps: float, colors: int = 0) -> bytes:
    """An endlessly looping GIF of uint8 `[T, H, W, 3]`. GIF counts in 10 ms, so 16 fps plays at 16.7. With `colors`, so many
    for the whole video instead of 256 a frame: a fraction of the size."""
    array = _frames_array(frames)
    images = [Image.fromarray(frame) for frame in array]
    if colors:
        palette = Image.fromarray(np.concatenate(array[:: max(1, len(array) // 4)])).quantize(colors)
        images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    else:
        images = [image.quantize(256) for image in images]
    out = io.BytesIO()
    duration = max(20, round(1000 / fps))  # viewers slow down anything below 20 ms
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)
    return out.getvalue()


def video_name(number: int, prompt: str) -> str:
    """`0003-a-red-circle.mp4`: unique by its number, and nothing in it but letters, digits and dashes of the prompt."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
    return f"{number:04d}{'-' if slug else ''}{slug}.mp4"


def shown_times(num_frames: int, columns: int = _SHEET_COLUMNS) -> np.ndarray:
    """The frames of a video that a contact sheet shows."""
    return np.unique(np.linspace(0, num_frames - 1, columns).round().astype(int))


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """A frame, uint8 `[H, W, 3]`, as small as a contact sheet shows it."""
    factor = _LARGEST_CELL / max(frame.shape[:2])
    if factor >= 1:
        return frame
    size = (max(1, round(frame.shape[1] * factor)), max(1, round(frame.shape[0] * factor)))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))


def contact_sheet(
    rows: Sequence[tuple[str, Tensor | np.ndarray]],
    path: str | Path,
    columns: int = _SHEET_COLUMNS,
    times: Sequence[int] | None = None,
) -> tuple[int, int]:
    """Write a PNG with one row a video: its label above, `columns` frames spread evenly over its time.

    rows: (label, uint8 `[T, H, W, 3]`); sizes and lengths may differ between rows. With `times`, the rows hold only what is
    shown, and these are the frames' numbers. Returns (width, height) in pixels.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one row")
    font = ImageFont.load_default(_TEXT)
    strips = [(label, _strip(_frames_array(frames), columns, times, font)) for label, frames in rows]
    width = max(strip.width for _, strip in strips) + 2 * _MARGIN
    characters = max(8, int((width - 2 * _MARGIN) / font.getlength("abcdefghij ") * 11))
    texts = [textwrap.wrap(label, characters) or [""] for label, _ in strips]
    heights = [_LINE * len(text) + strip.height + 2 * _MARGIN for text, (_, strip) in zip(texts, strips, strict=True)]
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN), "white")
    draw, top = ImageDraw.Draw(sheet), _MARGIN
    for text, (_, strip), height in zip(texts, strips, heights, strict=True):
        for number, line in enumerate(text):
            draw.text((_MARGIN, top + number * _LINE), line, fill="black", font=font)
        sheet.paste(strip, (_MARGIN, top + _LINE * len(text)))
        top += height
    out = io.BytesIO()
    sheet.save(out, "PNG")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, out.getvalue())
    return sheet.size


def _strip(frames: np.ndarray, columns: int, times: Sequence[int] | None, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The chosen frames side by side, the frame's number in the corner of each."""
    if times is None:
        times = shown_times(len(frames), columns)
        frames = frames[times]
    cells = [thumbnail(frame) for frame in frames]
    height, width = cells[0].shape[:2]
    scale = max(1, round(_SMALLEST_CELL / min(height, width)))
    cell = (width * scale, height * scale)
    strip = Image.new("RGB", (columns * (cell[0] + 2) - 2, cell[1] + _LINE), "white")
    draw = ImageDraw.Draw(strip)
    for column, (time, image) in enumerate(zip(times, cells, strict=True)):
        left = column * (cell[0] + 2)
        strip.paste(Image.fromarray(image).resize(cell, Image.Resampling.NEAREST), (left, 0))
        draw.text((left + 2, cell[1] + 1), str(time), fill="gray", font=font)
    return strip


def comparison_sheet(
    prompts: Sequence[str], videos: Mapping[str, Sequence[Tensor | np.ndarray]], path: str | Path, fps: float
) -> None:
    """Prompts down, models across: `<path>.png` with the first, the middle and the last frame of every video, `<path>.gif`
    with all of them playing. `videos`: of each model one uint8 `[T, H, W, 3]` a prompt, all of one size and length."""
    grid = np.stack(
        [np.stack([_frames_array(frames) for frames in row]) for row in videos.values()]
    )  # [M, P, T, H, W, 3]
    still = grid[:, :, np.linspace(0, grid.shape[2] - 1, 3).round().astype(int)]
    still = still.transpose(0, 1, 3, 2, 4, 5).reshape(*grid.shape[:2], 1, grid.shape[3], -1, 3)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    out = io.BytesIO()
    _grid(prompts, list(videos), still[:, :, 0], scale=1).save(out, "PNG")
    write_atomic(path.with_suffix(".png"), out.getvalue())
    moving = [np.asarray(_grid(prompts, list(videos), grid[:, :, t], scale=2)) for t in range(grid.shape[2])]
    write_atomic(path.with_suffix(".gif"), gif_bytes(np.stack(moving), fps, colors=32))


def _grid(rows: Sequence[str], columns: Sequence[str], pictures: np.ndarray, scale: int) -> Image.Image:
    """Pictures uint8 `[columns, rows, H, W, 3]` below the names of their columns, the text of each row above it."""
    font = ImageFont.load_default(_TEXT - 3)
    height, width = (side * scale for side in pictures.shape[2:4])
    image = Image.new("RGB", (len(columns) * (width + 4) + 4, _LINE + len(rows) * (height + _LINE)), "white")
    draw = ImageDraw.Draw(image)
    for column, name in enumerate(columns):
        draw.text((4 + column * (width + 4), 2), name, fill="black", font=font)
        for row in range(len(rows)):
            picture = Image.fromarray(pictures[column, row]).resize((width, height), Image.Resampling.NEAREST)
            image.paste(picture, (4 + column * (width + 4), 2 * _LINE + row * (height + _LINE)))
    for row, text in enumerate(rows):
        draw.text((4, _LINE + 2 + row * (height + _LINE)), text, fill="gray", font=font)
    return image


@dataclass(frozen=True)
class Thumbnail:
    """A picture uint8 `[H, W, 3]` shown as `size` (width, height) says, of which `kept`, centred shares of width and height
    (None: nothing), is used."""

    label: str
    picture: Tensor
    size: tuple[int, int]
    kept: tuple[float, float] | None


def thumbnail_sheet(thumbnails: Sequence[Thumbnail], path: str | Path) -> None:
    """Write a PNG of pictures in rows, each above the lines of its label, what is not kept of it darkened."""
    font = ImageFont.load_default(_TEXT - 3)
    cell = (_THUMBNAIL + _MARGIN, _THUMBNAIL + 2 * _LINE + _MARGIN)
    columns, rows = min(_COLUMNS, len(thumbnails)), -(-len(thumbnails) // _COLUMNS)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, thumbnail in enumerate(thumbnails):
        left, top = (
            _MARGIN + index * size for index, size in zip(reversed(divmod(number, _COLUMNS)), cell, strict=True)
        )
        scale = _THUMBNAIL / max(thumbnail.size)
        width, height = (max(1, round(scale * side)) for side in thumbnail.size)
        image = Image.fromarray(thumbnail.picture.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        dark = image.point(lambda value: value // 4)
        if thumbnail.kept is not None:
            inset = [
                round(side * (1 - min(1.0, kept)) / 2)
                for side, kept in zip((width, height), thumbnail.kept, strict=True)
            ]
            box = (inset[0], inset[1], width - inset[0], height - inset[1])
            dark.paste(image.crop(box), box[:2])
        sheet.paste(dark, (left, top))
        for line, text in enumerate(thumbnail.label.split("\n")[:2]):
            draw.text((left, top + height + line * _LINE), _fitting(text, font), fill="black", font=font)
    out = io.BytesIO()
    sheet.save(out, "PNG")
    write_atomic(path, out.getvalue())


def _fitting(text: str, font: ImageFont.FreeTypeFont) -> str:
    """A text cut so that it is no wider than a thumbnail."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    while font.getlength(text) > _THUMBNAIL:
        text = text[: max(1, int(len(text) * _THUMBNAIL / font.getlength(text)) - 3)] + ".."
    return text
