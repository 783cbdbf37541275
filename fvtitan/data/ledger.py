"""The ledger: what `python -m fvtitan.preprocess` will do with every file, told before anything is encoded.

One row a file: size, exact frames, which of them are taken at the target rate, bucket, what cropping cuts off, spans, or the
reason why it is not used. Of a video only the first picture is decoded; damage further on is found when the cache is made.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from fvtitan.components.files import write_atomic
from fvtitan.components.progress import Progress
from fvtitan.components.visualise import Thumbnail, thumbnail_sheet
from fvtitan.data.clips import ClipPlan, plan_clip
from fvtitan.data.listing import Record, data_root, list_records, with_videos
from fvtitan.data.video import TIME_TOLERANCE, Isolated, VideoError, VideoInfo, probe_video, read_first_frame
from fvtitan.distributed.utils import on_rank_zero, rank_and_world
from fvtitan.errors import UserError
from fvtitan.preprocess import NO_VIDEOS, PreprocessConfig

SHEET_CLIPS = 48
NAME_WIDTH = 48  # characters of a file's name in the printed table; the files have all of it


@dataclass(frozen=True)
class Row:
    """A file. What is not known of it is None; times are seconds, frame numbers count from 0."""

    file: str
    status: str
    """used, unused, or ignored: nobody asked for it."""
    reason: str = ""
    """Why it is not used."""
    width: int | None = None
    height: int | None = None
    """Pixels as shown: rotated, with square pixels."""
    rotation: int | None = None
    """Degrees counter-clockwise that its metadata asks for."""
    num_frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    """Its mean frame rate."""
    variable_rate: bool | None = None
    target_fps: int | None = None
    target_frames: int | None = None
    """How many frames it has at the target rate."""
    bucket: str = ""
    scale: float | None = None
    """From its size to that before cropping; above 1 it is enlarged."""
    crop_share: float | None = None
    """How much of the picture is cut off."""
    spans: tuple[tuple[float, float], ...] = ()
    """Beginning and end of what is used."""
    frames: tuple[tuple[int, ...], ...] = ()
    """The source's frames that each span takes."""
    used_seconds: float = 0.0

    @property
    def lost_seconds(self) -> float:
        return max(0.0, (self.seconds or 0.0) - self.used_seconds)


@dataclass(frozen=True)
class Totals:
    """Of one bucket; `batches` of an epoch, which need not be whole: the rest goes on in the next epoch."""

    bucket: str
    clips: int
    samples: int
    frames: int
    hours: float
    batches: float


def make_row(root: Path, record: Record, cfg: PreprocessConfig, probe: Isolated, *, has_video: bool) -> Row:
    """The row of a record. `has_video`: its file is looked into, by `probe`."""
    file = record.file.encode("utf-8", "backslashreplace").decode()
    row = Row(file, "unused" if record.problem else "used", record.problem)
    if not has_video:
        return row
    try:
        info = probe(root / record.file)
        row = dataclasses.replace(row, **_facts(info, cfg.fps))
        if record.problem:
            return row
        return dataclasses.replace(
            row, **_uses(info, plan_clip(info, cfg.sizes, fps=cfg.fps, spans=cfg.spans), cfg.fps)
        )
    except VideoError as error:
        return dataclasses.replace(row, status="unused", reason=record.problem or str(error))


def _facts(info: VideoInfo, fps: int) -> dict[str, object]:
    steps = [b - a for a, b in zip(info.times, info.times[1:], strict=False)]
    return {
        "width": info.width,
        "height": info.height,
        "rotation": info.rotation,
        "num_frames": info.num_frames,
        "seconds": round(info.seconds, 6),
        "fps": round(info.fps, 3),
        "variable_rate": bool(steps) and max(steps) - min(steps) > 2 * TIME_TOLERANCE,
        "target_fps": fps,
        "target_frames": len(info.frames_at(fps)),
    }


def _uses(info: VideoInfo, plan: ClipPlan, fps: int) -> dict[str, object]:
    count = plan.bucket.num_frames
    spans = tuple((start / fps, min((start + count) / fps, info.seconds)) for start in plan.starts)
    return {
        "bucket": str(plan.bucket),
        "scale": round(plan.scale, 4),
        "crop_share": round(plan.crop_share, 4),
        "spans": tuple((round(begin, 6), round(end, 6)) for begin, end in spans),
        "frames": tuple(tuple(plan.frames[start : start + count].tolist()) for start in plan.starts),
        "used_seconds": round(sum(end - begin for begin, end in spans), 6),
    }


def totals(rows: Sequence[Row], cfg: PreprocessConfig, batch_size: int) -> list[Totals]:
    """By bucket, also those that no clip goes to."""
    sums = []
    for bucket in cfg.sizes:
        used = [row for row in rows if row.bucket == str(bucket)]
        samples = sum(len(row.spans) for row in used)
        frames, hours = samples * bucket.num_frames, sum(row.used_seconds for row in used) / 3600
        sums.append(Totals(str(bucket), len(used), samples, frames, hours, samples / batch_size))
    return sums


def loss_shares(rows: Sequence[Row]) -> tuple[float, float]:
    """The unused share of the clips that were asked for, and of their seconds as far as these are known."""
    asked = [row for row in rows if row.status != "ignored"]
    seconds = sum(row.seconds or 0.0 for row in asked)
    unused = sum(row.status == "unused" for row in asked)
    return unused / max(1, len(asked)), sum(row.lost_seconds for row in asked) / seconds if seconds else 0.0


def check_data(cfg: PreprocessConfig, *, batch_size: int, max_loss_share: float, contact_sheet: bool) -> None:
    """Print the ledger, and write it into `cfg.output` (a folder; "": nowhere). All ranks take part.

    Raises `UserError` when more than `max_loss_share` of the clips, or of their seconds, would not be used.
    """
    cfg.check()
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: must be >= 1")
    if not 0 <= max_loss_share <= 1:
        raise UserError(f"--max-loss-share {max_loss_share}: must be in [0, 1]")
    output = Path(cfg.output) if cfg.output else None
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: not a folder; the ledger's files go into one")
    root = data_root(Path(cfg.data))
    rank, world = rank_and_world()

    def plan() -> tuple[list[Record], list[Record], list[bool]]:
        records, ignored = list_records(Path(cfg.data), output, cfg.keys)
        if not records:
            raise UserError(f"--data {cfg.data}: {NO_VIDEOS}")
        return records, ignored, with_videos(root, records)

    records, ignored, has_video = on_rank_zero(plan)
    mine = range(rank, len(records), world)
    progress = Progress("check", len(mine), "files" + (" of this rank" if world > 1 else ""), quiet=rank != 0)
    rows = []
    with Isolated(probe_video, cfg.limits) as probe:
        for number in mine:
            rows.append(make_row(root, records[number], cfg, probe, has_video=has_video[number]))
            progress.add(1)
    parts = [rows]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, rows)
    if rank == 0:
        rows = [parts[number % world][number // world] for number in range(len(records))]
        rows += [
            Row(record.file.encode("utf-8", "backslashreplace").decode(), "ignored", record.problem)
            for record in ignored
        ]

    def report() -> None:
        print(table(rows), totals_table(totals(rows, cfg, batch_size), batch_size), sep="\n\n", flush=True)
        if output is not None:
            try:
                output.mkdir(parents=True, exist_ok=True)
                write_ledger(output, rows)
                if contact_sheet:
                    write_sheets(output, root, rows, cfg)
            except OSError as error:
                raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
        _judge(rows, cfg, max_loss_share)

    on_rank_zero(report)


def _judge(rows: Sequence[Row], cfg: PreprocessConfig, max_loss_share: float) -> None:
    clips, seconds = loss_shares(rows)
    asked = [row for row in rows if row.status != "ignored"]
    unused = [row for row in asked if row.status == "unused"]
    lost, total = sum(row.lost_seconds for row in asked), sum(row.seconds or 0.0 for row in asked)
    summary = (
        f"unused: {len(unused)} of {len(asked)} clips ({clips:.1%}) and {lost:.1f} of {total:.1f} s ({seconds:.1%}); "
        f"{len(rows) - len(asked)} other files ignored"
    )
    print(f"\n{summary}", flush=True)
    if len(unused) == len(asked):
        raise UserError(f"--data {cfg.data}: no clip can be used; the first: {unused[0].file}: {unused[0].reason}")
    if max(clips, seconds) > max_loss_share:
        what = "clips" if clips > max_loss_share else "seconds"
        way = "the reasons are above" if what == "clips" else "more --spans or other --buckets use more of each clip"
        raise UserError(
            f"--data {cfg.data}: {max(clips, seconds) if what == 'seconds' else clips:.1%} of the {what} are not used, more "
            f"than --max-loss-share {max_loss_share:g}: {way}"
        )


def write_ledger(output: Path, rows: Sequence[Row]) -> None:
    """ledger.jsonl with everything, ledger.csv with a cell a field for spreadsheets."""
    lines = [dataclasses.asdict(row) | {"lost_seconds": round(row.lost_seconds, 6)} for row in rows]
    write_atomic(output / "ledger.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line, row in zip(lines, rows, strict=True):
        spans = " ".join(f"{begin:g}-{end:g}" for begin, end in row.spans)
        writer.writerow(line | {"spans": spans, "frames": _frames(row)})
    write_atomic(output / "ledger.csv", text.getvalue())


def _frames(row: Row) -> str:
    """The first and the last source frame of each span."""
    return " ".join(f"{span[0]}-{span[-1]}" for span in row.frames)


def table(rows: Sequence[Row]) -> str:
    """The rows for people, a line each."""
    header = [
        "file",
        "size",
        "frames",
        "seconds",
        "fps",
        "source frames",
        "bucket",
        "crop",
        "scale",
        "unused s",
        "reason",
    ]
    return _aligned([header, *map(_cells, rows)], right=range(2, 5))


def _cells(row: Row) -> list[str]:
    name = "".join(c if c.isprintable() else "?" for c in row.file)
    name = name if len(name) <= NAME_WIDTH else f"...{name[3 - NAME_WIDTH :]}"
    facts = ["", "", "", ""]
    if row.num_frames is not None:
        turned = f" turned {row.rotation}" if row.rotation else ""
        rate = f"{row.fps:g}{'~' if row.variable_rate else ''} -> {row.target_fps}"
        facts = [f"{row.width}x{row.height}{turned}", str(row.num_frames), f"{row.seconds:.2f}", rate]
    uses = ["", "", "", ""]
    if row.bucket:
        frames = (
            _frames(row) if len(row.frames) <= 3 else f"{row.frames[0][0]}-{row.frames[-1][-1]} in {len(row.frames)}"
        )
        uses = [frames, row.bucket, f"{row.crop_share:.1%}", f"{row.scale:.3g}"]
    lost = "" if row.seconds is None else f"{row.lost_seconds:.2f}"
    return [name, *facts, *uses, lost, f"{row.status}: {row.reason}" if row.reason else ""]


def totals_table(sums: Sequence[Totals], batch_size: int) -> str:
    """By bucket, for people."""
    header = ["bucket", "clips", "samples", "frames", "hours", f"batches of {batch_size} an epoch"]
    cells = [[t.bucket, str(t.clips), str(t.samples), str(t.frames), f"{t.hours:.4f}", f"{t.batches:g}"] for t in sums]
    return _aligned([header, *cells], right=range(1, 6))


def _aligned(lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_sheets(output: Path, root: Path, rows: Sequence[Row], cfg: PreprocessConfig) -> None:
    """contact_sheet-<n>.png: the first picture of every video that was looked into, what cropping cuts off darkened."""
    seen = [row for row in rows if row.num_frames is not None]
    parts = [seen[start : start + SHEET_CLIPS] for start in range(0, len(seen), SHEET_CLIPS)]
    with Isolated(read_first_frame, cfg.limits) as read:
        for number, part in enumerate(parts):
            thumbnail_sheet(list(_thumbnails(root, part, read)), output / f"contact_sheet-{number}.png")
    number = len(parts)
    while (older := output / f"contact_sheet-{number}.png").is_file():  # of a ledger of more files
        older.unlink()
        number += 1


def _thumbnails(root: Path, rows: Sequence[Row], read: Isolated) -> Iterator[Thumbnail]:
    for row in rows:
        try:
            picture: Tensor = read(root / row.file)
        except VideoError as error:
            raise UserError(f"--contact-sheet: {root / row.file}: {error}") from None
        kept = None
        if row.bucket:
            width, height, _ = map(int, row.bucket.split("x"))
            kept = (width / (row.width * row.scale), height / (row.height * row.scale))
        label = f"{row.bucket}, {row.crop_share:.1%} cut, {len(row.spans)} x" if row.bucket else row.reason
        yield Thumbnail(f"{row.file}\n{label}", picture, (row.width, row.height), kept)
