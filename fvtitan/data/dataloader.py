"""The order in which a job sees its data, and the loader that follows it.

The order is a pure function of (seed, position): rank, accumulation, workers and restarts do not enter it, so the whole
state of the loader is one number, the samples the job has consumed. A global batch of G samples comes from one shape
bucket. Bucket b with n_b samples is an endless chain of permutations cut into consecutive groups of G, of which epoch e
takes floor((e+1) n_b / G) - floor(e n_b / G): nothing is dropped, nothing is repeated within a pass over the bucket.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from fvtitan.components import faults
from fvtitan.components.rng import fold
from fvtitan.components.stateful import check_saved
from fvtitan.errors import UserError, shortened

logger = logging.getLogger(__name__)


class BucketedDataset(Protocol):
    """What the loader reads: a map-style dataset that knows its shape buckets and its content's fingerprint."""

    bucket_indices: Sequence[Sequence[int]]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def sample_id(self, index: int) -> str: ...


@dataclass(frozen=True)
class GlobalBatch:
    """One global batch: `indices` [G] into the dataset and `passes` [G], how often each sample was drawn before."""

    number: int
    epoch: int
    bucket: int
    indices: np.ndarray
    passes: np.ndarray


@dataclass(frozen=True)
class _Epoch:
    number: int
    first_batch: int
    buckets: np.ndarray  # [batches of the epoch], the bucket of each
    groups: np.ndarray  # [batches of the epoch], its group in that bucket's chain


class GlobalBatchSampler:
    """Random access to the endless sequence of global batches: `batch(k)` costs one epoch table, kept between calls.

    Raises `UserError` when there is no sample.
    """

    def __init__(self, bucket_indices: Sequence[Sequence[int]], global_batch_size: int, seed: int) -> None:
        if global_batch_size < 1:
            raise UserError(f"training.global_batch_size = {global_batch_size} must be at least 1")
        self.buckets = [np.asarray(indices, dtype=np.int64) for indices in bucket_indices]
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_samples = sum(len(bucket) for bucket in self.buckets)
        if self.num_samples == 0:
            raise UserError("data.path: the dataset has no samples; preprocess at least one video")
        self._epoch: _Epoch | None = None
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}  # bucket -> (pass, permutation) used last

    def batches_before(self, epoch: int) -> int:
        """Number of global batches in the epochs 0 .. epoch - 1."""
        return sum(epoch * len(bucket) // self.global_batch_size for bucket in self.buckets)

    def epoch_of(self, number: int) -> int:
        """The epoch that global batch `number` belongs to (epochs may be empty when samples are fewer than G)."""
        low, high = 0, 1
        while self.batches_before(high) <= number:
            low, high = high, high * 2
        while high - low > 1:  # batches_before(low) <= number < batches_before(high)
            middle = (low + high) // 2
            low, high = (middle, high) if self.batches_before(middle) <= number else (low, middle)
        return low

    def batch(self, number: int) -> GlobalBatch:
        """Global batch `number`, counted from the start of training."""
        epoch = self._table(number)
        row = number - epoch.first_batch
        bucket = int(epoch.buckets[row])
        passes, offsets = np.divmod(
            epoch.groups[row] * self.global_batch_size + np.arange(self.global_batch_size), len(self.buckets[bucket])
        )
        indices = np.empty_like(offsets)
        for k in np.unique(passes):
            chosen = passes == k
            indices[chosen] = self._permutation(bucket, int(k))[offsets[chosen]]
        return GlobalBatch(number, epoch.number, bucket, self.buckets[bucket][indices], passes)

    def _table(self, number: int) -> _Epoch:
        cached = self._epoch
        if cached and cached.first_batch <= number < cached.first_batch + len(cached.buckets):
            return cached
        epoch, size = self.epoch_of(number), self.global_batch_size
        starts = np.array([epoch * len(bucket) // size for bucket in self.buckets], dtype=np.int64)
        ends = np.array([(epoch + 1) * len(bucket) // size for bucket in self.buckets], dtype=np.int64)
        buckets = np.repeat(np.arange(len(self.buckets)), ends - starts)
        groups = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
        order = _shuffled(len(buckets), fold(self.seed, "batch_order", epoch))
        buckets = buckets[order]
        # The groups of one bucket stay ascending: its chain is walked forwards, which is what keeps passes whole.
        by_bucket = np.argsort(buckets, kind="stable")
        ascending = np.empty_like(groups)
        ascending[by_bucket] = groups
        self._epoch = _Epoch(epoch, self.batches_before(epoch), buckets, ascending)
        return self._epoch

    def _permutation(self, bucket: int, k: int) -> np.ndarray:
        cached = self._permutations.get(bucket)
        if cached is None or cached[0] != k:
            seed = fold(self.seed, "order", bucket, k)
            cached = self._permutations[bucket] = (k, _shuffled(len(self.buckets[bucket]), seed))
        return cached[1]


def _shuffled(n: int, seed: int) -> np.ndarray:
    # RandomState's stream is frozen by NumPy's compatibility policy; torch.randperm promises nothing across versions.
    return np.random.RandomState(seed).permutation(n)


@dataclass(frozen=True)
class _Draw:
    index: int
    position: int  # in the global batch, 0 .. G - 1
    epoch: int
    sample_pass: int


class _RankBatches:
    """The batch sampler of one data-parallel rank: an endless iterator of micro-batches from `first_batch` on.

    Layout of a global batch: [accumulation][data rank][local], so position = (micro * dp_world + rank) * local + j.
    """

    def __init__(self, sampler: GlobalBatchSampler, first_batch: int, local: int, dp_rank: int, dp_world: int) -> None:
        self.sampler, self.first_batch = sampler, first_batch
        self.local, self.dp_rank, self.dp_world = local, dp_rank, dp_world

    def __iter__(self) -> Iterator[list[_Draw]]:
        stride = self.local * self.dp_world
        for number in count(self.first_batch):
            batch = self.sampler.batch(number)
            for start in range(self.dp_rank * self.local, self.sampler.global_batch_size, stride):
                yield [
                    _Draw(int(batch.indices[p]), p, batch.epoch, int(batch.passes[p]))
                    for p in range(start, start + self.local)
                ]


@dataclass(frozen=True)
class _Failure:
    """Travels instead of a sample: torch would put a worker's stack trace where the error's one line is."""

    kind: type[Exception]
    message: str


class _Drawn(torch.utils.data.Dataset):
    """Reads a draw: the sample, and with it where it stands in the global batch. `reading` is shared with the workers: the
    sample that each is reading, or -1."""

    def __init__(self, dataset: BucketedDataset, num_workers: int) -> None:
        self.dataset = dataset
        self.reading = multiprocessing.RawArray("q", [-1] * max(1, num_workers))

    def __getitem__(self, draw: _Draw) -> tuple[_Draw, dict[str, Any] | _Failure]:
        worker = torch.utils.data.get_worker_info()
        slot = worker.id if worker else 0
        self.reading[slot] = draw.index
        try:
            faults.reach("loader", draw.index)
            sample = self.dataset[draw.index]
        except UserError as error:
            sample = _Failure(UserError, str(error))
        except Exception as error:
            name = self.dataset.sample_id(draw.index)
            cause = f"{type(error).__name__}: {error}"
            sample = _Failure(RuntimeError, f"sample {name!r} cannot be read: {cause}\n{traceback.format_exc()}")
        self.reading[slot] = -1
        return draw, sample


def collate(drawn: Sequence[tuple[_Draw, dict[str, Any] | _Failure]]) -> dict[str, Any] | _Failure:
    """A micro-batch of b samples: tensors are stacked, texts and prompt embeddings (ragged) become lists.

    Keys: `latents` [b, T, C, H, W] (absent in prompt-only sets), `prompt_embeds` list of [L_i, D], `captions`,
    `sample_ids`, `positions` int64 [b] in the global batch, `epoch`, `sample_indices` int64 [b] in the dataset,
    `sample_passes` int64 [b] (how often the sample was drawn before). Any other tensor is stacked under its own name.
    """
    draws = [draw for draw, _ in drawn]
    samples = [sample for _, sample in drawn]
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
    batch: dict[str, Any] = {
        "positions": torch.tensor([draw.position for draw in draws]),
        "epoch": draws[0].epoch,
        "sample_indices": torch.tensor([draw.index for draw in draws]),
        "sample_passes": torch.tensor([draw.sample_pass for draw in draws]),
    }
    plural = {"caption": "captions", "sample_id": "sample_ids"}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        stack = isinstance(values[0], Tensor) and key != "prompt_embeds"
        batch[plural.get(key, key)] = torch.stack(values) if stack else values
    return batch


def _own_process_group(_worker: int) -> None:
    # A SIGTERM to the job's process group must not kill the workers in the middle of the step that saves.
    os.setpgid(0, 0)


class BatchStream:
    """Endless iterator of this rank's micro-batches; every `accumulation` of them make one global batch.

    Its state is what training has taken, never what workers have prefetched, and only exists between global batches.
    `allow_changed` names the config keys (`data.path`, `training.seed`, `training.global_batch_size`) that may differ
    from those of the state that is loaded.

    Raises `UserError` for an empty dataset or a global batch that ranks and local batch do not divide. A sample that cannot be
    read, a worker that dies, and one that takes longer than `timeout_seconds` for a batch are errors that name the
    sample, when its batch is due.
    """

    def __init__(
        self,
        dataset: BucketedDataset,
        *,
        global_batch_size: int,
        local_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_world: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout_seconds: float = 900,
        allow_changed: Collection[str] = (),
    ) -> None:
        if local_batch_size < 1 or global_batch_size % (local_batch_size * dp_world):
            raise UserError(
                f"training.global_batch_size = {global_batch_size} must be a multiple of training.local_batch_size "
                f"({local_batch_size}) x data-parallel ranks ({dp_world})"
            )
        self.dataset = dataset
        self.sampler = GlobalBatchSampler(dataset.bucket_indices, global_batch_size, seed)
        self.accumulation = global_batch_size // (local_batch_size * dp_world)
        self.local_batch_size, self.dp_rank, self.dp_world = local_batch_size, dp_rank, dp_world
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.timeout_seconds = timeout_seconds
        self.allow_changed = frozenset(allow_changed)
        self._first_batch = 0  # global batch that the running iterator began with
        self._taken = 0  # micro-batches taken from it
        self._iterator: Iterator[dict[str, Any]] | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._iterator is None:  # lazily: a state loaded first must not start workers twice
            self._iterator = self._start()
        batch = self._wait()
        if isinstance(batch, _Failure):
            raise batch.kind(batch.message)
        self._taken += 1
        return batch

    def _wait(self) -> dict[str, Any] | _Failure:
        end = time.monotonic() + self.timeout_seconds
        while True:
            try:
                return next(self._iterator)
            except RuntimeError as error:
                workers = getattr(self._iterator, "_workers", [])
                dead = {number: w.exitcode for number, w in enumerate(workers) if not w.is_alive()}
                if dead:
                    raise RuntimeError(
                        f"a worker of the loader died (exit status {next(iter(dead.values()))}) while it read "
                        f"{self._being_read(dead)}"
                    ) from None
                if not str(error).startswith("DataLoader timed out"):
                    raise
            if time.monotonic() > end:
                raise RuntimeError(
                    f"a worker of the loader took more than {self.timeout_seconds:g} s (half of comm.timeout_seconds) to read "
                    f"{self._being_read(range(self.num_workers))}"
                )

    def _being_read(self, workers: Iterable[int]) -> str:
        indices = [index for number in workers if (index := self._drawn.reading[number]) >= 0]
        return ", ".join(f"sample {self.dataset.sample_id(index)!r}" for index in indices) or "no sample"

    def _start(self) -> Iterator[dict[str, Any]]:
        self._drawn = _Drawn(self.dataset, self.num_workers)
        before = signal.getsignal(signal.SIGCHLD)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata 0.11 on torch 2.13
            loader = StatefulDataLoader(
                self._drawn,
                batch_sampler=_RankBatches(
                    self.sampler, self._first_batch, self.local_batch_size, self.dp_rank, self.dp_world
                ),
                collate_fn=collate,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                timeout=1 if self.num_workers else 0,  # how often `_wait` looks after them
                worker_init_fn=_own_process_group,
                # The base seed of its workers is drawn from here, so that a restart leaves torch's generator alone.
                generator=torch.Generator().manual_seed(fold(self.sampler.seed, "workers")),
                snapshot_every_n_steps=None,  # its own snapshots are not used: they do not survive another worker count
            )
            iterator = iter(loader)
        # torch's handler raises wherever training is when a worker dies. We are told when the batch is due, and by name.
        if signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)
        return iterator

    @property
    def samples_consumed(self) -> int:
        """Samples the whole job has taken; only defined between two global batches."""
        batches, rest = divmod(self._taken, self.accumulation)
        assert rest == 0, f"in the middle of a global batch: {rest} of {self.accumulation} micro-batches taken"
        return (self._first_batch + batches) * self.sampler.global_batch_size

    @property
    def epoch(self) -> int:
        """Epoch of the next global batch."""
        return self.sampler.epoch_of(self.samples_consumed // self.sampler.global_batch_size)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: `samples_consumed`, and what gives that number its meaning."""
        return {
            "samples_consumed": self.samples_consumed,
            "fingerprint": self.dataset.fingerprint,
            "global_batch_size": self.sampler.global_batch_size,
            "seed": self.sampler.seed,
        }

    def load_template(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """No tensors to read. Raises `UserError` when data, seed or global batch are not the saved ones."""
        check_saved(self.state_dict(), state, "dataloader")
        self._changes(state)
        if state["samples_consumed"] < 0 or state["samples_consumed"] % max(state["global_batch_size"], 1):
            raise UserError(f"dataloader.samples_consumed = {state['samples_consumed']}: not a number of whole batches")
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after `samples_consumed`. Raises as `load_template`.

        With a changed global batch (allowed by name) the position is rounded down to a multiple of the new one.
        """
        for change in self._changes(state):
            logger.warning("%s (allowed)", change)
        self.close()
        self._first_batch = state["samples_consumed"] // self.sampler.global_batch_size

    def _changes(self, state: Mapping[str, Any]) -> list[str]:
        """What is not as in the saved state, and may be so."""
        changes = []
        here = {
            "data.path": ("fingerprint", self.dataset.fingerprint),
            "training.seed": ("seed", self.sampler.seed),
            "training.global_batch_size": ("global_batch_size", self.sampler.global_batch_size),
        }
        for key, (name, value) in here.items():
            if state[name] == value:
                continue
            saved = shortened(state[name], 5000)  # a fingerprint names a contract
            difference = f"{key}: the checkpoint was made with {name} {saved}, this run has {value}"
            if key not in self.allow_changed:
                raise UserError(
                    f"{difference}; use the same, or add '{key}' to checkpoint.allow_changed (the data order will "
                    "then not continue where it stopped)"
                )
            changes.append(difference)
        return changes

    def close(self) -> None:
        """Stop the workers; the next batch starts fresh ones at the same position."""
        if self._iterator is not None:
            self._first_batch += self._taken // self.accumulation
            self._taken = 0
            self._iterator = None  # its finaliser ends the workers
