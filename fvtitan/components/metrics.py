"""What a run tells: console lines, `metrics.jsonl`, TensorBoard, and W&B when asked for. Rank 0 writes.

`metrics.jsonl` holds one JSON object a step: `step` and flat `group/name` keys. JSON has no NaN: non-finite values are
the strings "nan", "inf" and "-inf" there, and `read_metrics` gives floats back.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fvtitan.components.files import write_atomic
from fvtitan.components.spikes import WINDOW, SpikeWatch
from fvtitan.components.visualise import gif_bytes
from fvtitan.distributed.utils import max_over_ranks
from fvtitan.errors import UserError
from fvtitan.flops import PhaseFlops, device_rates, peak_tflops

logger = logging.getLogger(__name__)

_CONSOLE_GROUPS = ("loss", "grad_norm", "lr")
_WORST = ("perf/peak_memory_gib", "perf/data_wait")


class ThroughputMeter:
    """Rates since the last reading. `waiting()` marks time spent on data, `excluded()` work that is not training.
    `peak`: TFLOP/s of one of the job's devices; 0: by its name."""

    def __init__(self, device: torch.device | str = "cpu", num_devices: int = 1, peak: float = 0.0) -> None:
        self.device, self.num_devices = torch.device(device), num_devices
        self.peak_tflops = peak or peak_tflops(self.device)
        self._seconds_per_step: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._clips = self._tokens = self._steps = 0
        self._flops = PhaseFlops()
        self._waited = self._excluded = 0.0

    def count(self, *, clips: int, tokens: int = 0) -> None:
        """One optimizer step trained on `clips` clips and `tokens` latent tokens, of the whole job."""
        self._clips += clips
        self._tokens += tokens
        self._steps += 1

    def count_flops(self, flops: PhaseFlops) -> None:
        """One phase of a step did these FLOPs, in the whole job."""
        self._flops += flops

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Time inside (validation, checkpoints) belongs to no rate."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._excluded += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """The `perf/...` values since the last call; starts the next interval."""
        elapsed = max(time.perf_counter() - self._start - self._excluded, 1e-9)
        values = {"perf/peak_memory_gib": peak_memory_bytes(self.device) / 2**30}
        if self._steps:
            step = elapsed / self._steps
            values |= {
                "perf/clips_per_second": self._clips / elapsed,
                "perf/tokens_per_second": self._tokens / elapsed,
                "perf/data_wait": min(self._waited / elapsed, 1.0),
                "perf/step_seconds": step,
            }
            if self._flops.model:
                values |= device_rates(self._flops, elapsed, self.num_devices, self.peak_tflops)
            # Smoothed, and re-based on the first reading after the slow start-up interval.
            first = self._seconds_per_step is None or step < self._seconds_per_step / 2
            self._seconds_per_step = step if first else 0.8 * self._seconds_per_step + 0.2 * step
        self._restart()
        return values

    def eta_seconds(self, steps_left: int) -> float | None:
        """Time the remaining steps will take, None before the first reading."""
        return None if self._seconds_per_step is None else self._seconds_per_step * steps_left


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the allocator on a GPU, of the process' resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class MetricLogger:
    """Writes the values of a run into `folder` (the dump folder), on rank 0; memory and data wait are those of the worst rank.

    `resume_step` is the step of the checkpoint that training continues from (0 = from the start): later records, which
    a killed run may have left, are taken out of `metrics.jsonl` and TensorBoard, so that no step appears twice.
    Values are floats or 0-d tensors; tensors are read only when a step is written, all with one host sync.
    Raises `UserError` when W&B is enabled and not usable.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int = 0,
        log_freq: int = 1,
        total_steps: int,
        resume_step: int = 0,
        enable_tensorboard: bool = True,
        enable_wandb: bool = False,
        device: torch.device | str = "cpu",
        num_devices: int = 1,
        peak_tflops: float = 0.0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if log_freq < 1:
            raise UserError(f"metrics.log_freq = {log_freq} must be at least 1")
        self.folder, self.rank = Path(folder), rank
        self.log_freq, self.total_steps = log_freq, total_steps
        self.first_step = resume_step + 1
        self.meter = ThroughputMeter(device, num_devices, peak_tflops)
        self._file = self._writer = self._wandb = None
        self._last: tuple[dict[str, Any], int] | None = None  # the newest record and where its line begins
        self._spikes = SpikeWatch()
        if enable_wandb:
            _check_wandb()
        if rank != 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        truncate_metrics(path, resume_step)
        self._file = open(path, "ab")
        for record in read_metrics(path)[-2 * WINDOW :]:  # so it needs no place in checkpoints
            self._spikes.read(record)
        if path.stat().st_size:
            last = path.read_bytes().splitlines(keepends=True)[-1]
            self._last = (json.loads(last), path.stat().st_size - len(last))
        if enable_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.first_step)
        if enable_wandb:
            self._wandb = _start_wandb(self.folder, config)

    def due(self, step: int) -> bool:
        """True on the steps that are logged: the first one of this run, every `log_freq`-th, the last one."""
        return step in (self.first_step, self.total_steps) or step % self.log_freq == 0

    def log_step(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Log one training step with throughput and a console line; nothing at all happens unless the step is `due`. All ranks
        call it.

        values: keys `group/role` such as `loss/student`, `grad_norm/critic`, `lr/student`.
        """
        if not self.due(step):
            return
        performance = self.meter.read()
        if dist.is_initialized():
            own = {name: performance[name] for name in _WORST if name in performance}
            performance |= max_over_ranks(own, self.meter.device)
        if self.rank == 0:
            numbers = _numbers(values)
            self._write(step, numbers | performance)
            print(self._line(step, numbers, performance), flush=True)
            for warning in self._spikes.read(numbers):
                print(f"WARNING, step {step}: {warning}", flush=True)

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Log other values of a step (validation, judge) whatever `log_freq` is; they join the step's record."""
        if self.rank == 0:
            numbers = _numbers(values)
            self._write(step, numbers)
            shown = "  ".join(f"{name} {_short(value)}" for name, value in numbers.items())
            print(f"step {step}/{self.total_steps}  {shown}", flush=True)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """A text (prompts, the configuration) in TensorBoard."""
        if self._writer:
            self._writer.add_text(tag, text, step)

    def add_video(self, tag: str, frames: Tensor, step: int, *, fps: float) -> None:
        """An animated sample in TensorBoard's Images tab. frames: uint8 `[T, H, W, 3]`."""
        if self._writer is None:
            return
        # SummaryWriter.add_video needs a module that moviepy 2 no longer has, and logs nothing.
        from tensorboard.compat.proto.summary_pb2 import Summary

        _, height, width, _ = frames.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif_bytes(frames, fps))
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._writer._get_file_writer().add_summary(summary, step)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """`close`. W&B shows a run that an exception ends as failed."""
        self.close(exit_code=0 if error is None else 1)

    def close(self, exit_code: int = 0) -> None:
        """Flush and close everything; a closed logger may be closed again."""
        if self._file:
            self._file.close()
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish(exit_code=exit_code)
        self._file = self._writer = self._wandb = None

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        assert self._file is not None, "the metric logger is closed"
        record, start = {"step": step}, self._file.seek(0, os.SEEK_END)
        if self._last and self._last[0]["step"] == step:  # values of the same step share its line
            record, start = self._last
            self._file.truncate(start)
        elif self._last and step < self._last[0]["step"]:
            raise ValueError(f"step {step} is logged after step {self._last[0]['step']}")
        record = record | {name: jsonable(value) for name, value in numbers.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._last = (record, start)
        if self._writer:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        if self._wandb:
            self._wandb.log({"step": step} | numbers)

    def _line(self, step: int, numbers: Mapping[str, float], performance: Mapping[str, float]) -> str:
        """`step 120/600  loss 0.2345  grad_norm 1.2  lr 1.0e-03  clips/s 35  ...`; several roles are named."""
        parts = [f"step {step}/{self.total_steps}"]
        for group in _CONSOLE_GROUPS:
            names = [name for name in numbers if name.split("/")[0] == group]
            for name in names:
                value = f"{numbers[name]:.1e}" if group == "lr" else _short(numbers[name])
                parts.append(f"{group if len(names) == 1 else name} {value}")
        if "perf/step_seconds" in performance:
            parts.append(f"clips/s {_rate(performance['perf/clips_per_second'])}")
            if performance["perf/tokens_per_second"]:
                parts.append(f"tokens/s {_rate(performance['perf/tokens_per_second'])}")
            if "perf/tflops_per_device" in performance:
                parts.append(f"TFLOP/s {performance['perf/tflops_per_device']:.3g}")
            if "perf/mfu" in performance:
                parts.append(f"mfu {100 * performance['perf/mfu']:.1f}%")
            parts.append(f"data {100 * performance['perf/data_wait']:.1f}%")
        parts.append(f"mem {performance['perf/peak_memory_gib']:.2f}GiB")
        eta = self.meter.eta_seconds(self.total_steps - step)
        if eta is not None:
            parts.append(f"eta {duration(eta)}")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """`45s`, `3m12s`, `2h05m`, `3d04h`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, non-finite values as floats. A half-written last line is left out."""
    records = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline after it: its writer was killed
                break
            raise UserError(f"{path}: line {number} is not valid JSON") from None
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise UserError(f"{path}: line {number} is not a record: an object with a number `step`")
        records.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in record.items()})
    return records


def truncate_metrics(path: str | Path, last_step: int) -> None:
    """Keep the records up to `last_step`, byte for byte, by an atomic rewrite; damaged lines are dropped."""
    path = Path(path)
    if not path.exists():
        return
    content = path.read_bytes()
    kept, damaged = [], 0
    for line in content.splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged:
        logger.warning("%s: dropped %d damaged line(s), as a killed run leaves them", path, damaged)
    if (rewritten := b"".join(kept)) != content:
        write_atomic(path, rewritten)


def _numbers(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """All values as floats; the tensors of one device travel to the host together."""
    tensors: dict[torch.device, list[str]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors.setdefault(value.device, []).append(name)
    read: dict[str, float] = {}
    for names in tensors.values():
        stacked = torch.stack([values[name].detach().reshape(()).double() for name in names])
        read |= dict(zip(names, stacked.tolist(), strict=True))
    return {name: read[name] if name in read else float(value) for name, value in values.items()}


def jsonable(value: float) -> float | str:
    """JSON has no number for NaN and infinities: their names."""
    return value if math.isfinite(value) else str(float(value))


def _short(value: float) -> str:
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}"


def _check_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            "metrics.enable_wandb = true, but wandb is not installed: `pip install wandb` or set it to false"
        )
    if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise UserError("metrics.enable_wandb = true needs WANDB_API_KEY in the environment, or WANDB_MODE=offline")


def _start_wandb(folder: Path, config: Mapping[str, Any] | None) -> Any:
    import wandb

    id_file = folder / "wandb_run_id"  # a resumed run goes on in the same W&B run
    if not id_file.exists():
        write_atomic(id_file, wandb.util.generate_id())
    run = wandb.init(
        project="fvtitan",
        name=folder.name,
        dir=str(folder),
        id=id_file.read_text(),
        resume="allow",
        config=dict(config or {}),
    )
    run.define_metric("*", step_metric="step")  # its own step counter cannot go back after a resume, ours can
    return run
