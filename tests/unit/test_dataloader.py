"""The data order: exactly once, whatever the ranks, the workers and the stops."""

from __future__ import annotations

import json
import os
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvtitan.data.dataloader import BatchStream, GlobalBatchSampler
from fvtitan.errors import UserError


class FakeCache:
    """In-memory stand-in for the latent cache: bucket b holds latents of its own length, sample i carries its index."""

    def __init__(self, bucket_sizes: list[int], fingerprint: str = "abc"):
        self.fingerprint = fingerprint
        self.bucket_indices, self.bucket_of = [], []
        for bucket, size in enumerate(bucket_sizes):
            self.bucket_indices.append(list(range(len(self.bucket_of), len(self.bucket_of) + size)))
            self.bucket_of += [bucket] * size

    def __len__(self) -> int:
        return len(self.bucket_of)

    def __getitem__(self, index: int) -> dict:
        return {
            "sample_id": f"s{index}",
            "caption": f"caption {index}",
            "latents": torch.full((1 + self.bucket_of[index], 2, 1, 1), index, dtype=torch.bfloat16),
            "prompt_embeds": torch.full((1 + index % 3, 4), index, dtype=torch.bfloat16),
        }


bucket_sizes = st.lists(st.integers(0, 23), min_size=1, max_size=4).filter(any)


@settings(max_examples=60, deadline=None)
@given(sizes=bucket_sizes, size=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_every_pass_over_a_bucket_holds_each_sample_once(sizes, size, seed):
    sampler = GlobalBatchSampler(FakeCache(sizes).bucket_indices, size, seed)
    chains = {bucket: [] for bucket in range(len(sizes))}
    for number in range(60):
        batch = sampler.batch(number)
        assert batch.number == number and len(batch.indices) == size
        chains[batch.bucket] += list(zip(batch.passes.tolist(), batch.indices.tolist(), strict=True))
    for bucket, chain in chains.items():
        n = sizes[bucket]
        assert [k for k, _ in chain] == [i // n for i in range(len(chain))]
        for start in range(0, len(chain), n or 1):  # whole passes are permutations, the last one is the start of one
            samples = [index for _, index in chain[start : start + n]]
            assert len(set(samples)) == len(samples)
            assert set(samples) <= set(FakeCache(sizes).bucket_indices[bucket])


@settings(max_examples=60, deadline=None)
@given(sizes=bucket_sizes, size=st.integers(1, 40), epochs=st.integers(1, 12))
def test_epochs_take_the_stated_share_of_each_bucket(sizes, size, epochs):
    sampler = GlobalBatchSampler(FakeCache(sizes).bucket_indices, size, 0)
    batches = [sampler.batch(k) for k in range(sampler.batches_before(epochs))]
    for epoch in range(epochs):
        taken = Counter(batch.bucket for batch in batches if batch.epoch == epoch)
        for bucket, n in enumerate(sizes):
            assert taken[bucket] == (epoch + 1) * n // size - epoch * n // size


def test_an_epoch_that_divides_is_exactly_one_permutation_of_everything():
    sampler = GlobalBatchSampler(FakeCache([8, 12, 4]).bucket_indices, 4, seed=1)
    orders = []
    for epoch in range(3):
        order = [int(i) for k in range(6) for i in sampler.batch(6 * epoch + k).indices]
        assert sorted(order) == list(range(24))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    buckets = [[sampler.batch(6 * epoch + k).bucket for k in range(6)] for epoch in range(3)]
    assert len({tuple(row) for row in buckets}) > 1  # buckets are interleaved anew in each epoch


def test_the_order_is_pinned():
    """A change here breaks every resume from an older checkpoint."""
    sampler = GlobalBatchSampler(FakeCache([5, 3]).bucket_indices, 4, seed=0)
    assert [sampler.batch(k).indices.tolist() for k in range(4)] == [
        [4, 2, 0, 3],
        [6, 5, 7, 7],
        [1, 3, 2, 4],
        [5, 6, 6, 7],
    ]


@settings(max_examples=30, deadline=None)
@given(sizes=bucket_sizes, size=st.integers(1, 9), numbers=st.lists(st.integers(0, 300), min_size=1, max_size=8))
def test_random_access_equals_walking(sizes, size, numbers):
    walked = GlobalBatchSampler(FakeCache(sizes).bucket_indices, size, 5)
    order = [walked.batch(k).indices.tolist() for k in range(max(numbers) + 1)]
    jumping = GlobalBatchSampler(FakeCache(sizes).bucket_indices, size, 5)
    assert [jumping.batch(k).indices.tolist() for k in numbers] == [order[k] for k in numbers]


def test_one_sample_and_a_large_global_batch():
    sampler = GlobalBatchSampler([[0]], 64, seed=0)  # 63 of 64 epochs have no batch
    assert [sampler.batch(k).epoch for k in range(3)] == [63, 127, 191]
    assert sampler.batch(2).indices.tolist() == [0] * 64
    assert sampler.batch(2).passes.tolist() == list(range(128, 192))


def test_far_positions_are_quick():
    sampler = GlobalBatchSampler([list(range(50_000)), list(range(50_000, 70_001))], 64, seed=0)
    sampler.batch(0)
    start = time.perf_counter()
    for number in (10**6, 10**9, 10**12):
        sampler.batch(number)
    assert time.perf_counter() - start < 1.0
    start = time.perf_counter()
    for number in range(10**9, 10**9 + 500):
        sampler.batch(number)
    assert time.perf_counter() - start < 1.0


def run(cache, plan, size, *, seed=3):
    """Train through `plan` = [(ranks, local, workers, global batches)], a stop between all; samples by position."""
    seen, state = [], None
    for world, local, workers, batches in plan:
        streams = [
            BatchStream(
                cache,
                global_batch_size=size,
                local_batch_size=local,
                seed=seed,
                dp_rank=rank,
                dp_world=world,
                num_workers=workers,
            )
            for rank in range(world)
        ]
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
        for _ in range(batches):
            at = {}
            for stream in streams:
                for _ in range(stream.accumulation):
                    batch = next(stream)
                    assert batch["latents"].shape[0] == local and len(batch["captions"]) == local
                    for j in range(local):
                        index = int(batch["sample_indices"][j])
                        assert batch["sample_ids"][j] == f"s{index}" and batch["captions"][j] == f"caption {index}"
                        assert (batch["latents"][j] == torch.tensor(index, dtype=torch.bfloat16)).all()
                        assert batch["prompt_embeds"][j].shape == (1 + index % 3, 4)
                        at[int(batch["positions"][j])] = (index, batch["epoch"], int(batch["sample_passes"][j]))
            assert sorted(at) == list(range(size))
            seen += [at[position] for position in range(size)]
        states = [json.loads(json.dumps(stream.state_dict())) for stream in streams]
        assert all(other == states[0] for other in states)
        state = states[0]
        for stream in streams:
            stream.close()
    assert state["samples_consumed"] == len(seen)
    return seen


# Splits of a global batch of 12 over 1 to 4 ranks.
splits = st.sampled_from([(w, lo) for w in range(1, 5) for lo in range(1, 13) if 12 % (w * lo) == 0])
stages = st.lists(st.tuples(splits, st.integers(0, 4)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(sizes=bucket_sizes, stages=stages)
def test_any_stops_and_world_sizes_give_the_same_order(sizes, stages):
    cache = FakeCache(sizes)
    plan = [(world, local, 0, batches) for (world, local), batches in stages]
    total = sum(batches for *_, batches in plan)
    assert run(cache, plan, 12) == run(cache, [(1, 12, 0, total)], 12)


@settings(max_examples=5, deadline=None)
@given(
    sizes=bucket_sizes,
    stages=st.lists(st.tuples(splits, st.integers(0, 2), st.integers(1, 3)), min_size=2, max_size=3),
)
@pytest.mark.faults
def test_any_stops_world_sizes_and_workers_consume_each_sample_once(sizes, stages):
    """Fault 21."""
    cache = FakeCache(sizes)
    plan = [(world, local, workers, batches) for (world, local), workers, batches in stages]
    seen = run(cache, plan, 12)
    assert seen == run(cache, [(1, 12, 0, sum(batches for *_, batches in plan))], 12)
    for bucket, members in enumerate(cache.bucket_indices):
        taken = [(sample_pass, index) for index, _, sample_pass in seen if cache.bucket_of[index] == bucket]
        assert len(set(taken)) == len(taken)  # no sample twice in a pass
        last = taken[-1][0] if taken else 0
        assert {(k, index) for k in range(last) for index in members} <= set(taken)  # nor left out of one


@pytest.mark.parametrize(
    "plan",
    [
        [(1, 4, 2, 3), (2, 2, 0, 2), (1, 3, 1, 3)],
        [(2, 3, 1, 2), (1, 12, 0, 2), (2, 6, 2, 2)],
    ],
)
def test_stops_with_worker_processes(plan):
    cache = FakeCache([7, 10, 1])
    assert run(cache, plan, 12) == run(cache, [(1, 12, 0, sum(stage[3] for stage in plan))], 12)


class Pids(FakeCache):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"pids": torch.tensor([os.getpid(), os.getpgid(0)])}


def test_workers_have_their_own_process_group_and_end():
    stream = BatchStream(Pids([6]), global_batch_size=2, local_batch_size=2, seed=0, num_workers=1)
    pid, group = next(stream)["pids"][0].tolist()
    assert pid != os.getpid() and pid == group != os.getpgid(0)
    start = time.perf_counter()
    stream.close()
    assert time.perf_counter() - start < 3
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        stream = BatchStream(FakeCache([6]), global_batch_size=2, local_batch_size=1, seed=0, num_workers=workers)
        next(stream)
        stream.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_prefetched_samples_do_not_count():
    stream = BatchStream(FakeCache([40]), global_batch_size=2, local_batch_size=1, seed=0, num_workers=2)
    assert stream.state_dict()["samples_consumed"] == 0
    next(stream)
    with pytest.raises(AssertionError, match="middle of a global batch"):
        stream.state_dict()
    next(stream)
    assert stream.state_dict()["samples_consumed"] == 2
    stream.close()
    assert stream.state_dict()["samples_consumed"] == 2


def test_prompt_only_sets_and_other_tensors():
    class Prompts(FakeCache):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            del sample["latents"]
            return sample | {"trajectory": torch.zeros(5, 2)}

    batch = next(BatchStream(Prompts([3]), global_batch_size=2, local_batch_size=2, seed=0))
    assert "latents" not in batch and batch["trajectory"].shape == (2, 5, 2)


@pytest.mark.faults
def test_clear_errors():
    """Fault 31."""
    with pytest.raises(UserError, match="no samples"):
        BatchStream(FakeCache([0, 0]), global_batch_size=2, local_batch_size=1, seed=0)
    with pytest.raises(UserError, match=r"global_batch_size = 10 .* \(4\) x data-parallel ranks \(2\)"):
        BatchStream(FakeCache([5]), global_batch_size=10, local_batch_size=4, dp_world=2, seed=0)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "change"),
    [("data.path", {}), ("training.seed", {"seed": 1}), ("training.global_batch_size", {"global_batch_size": 4})],
)
@pytest.mark.faults
def test_a_state_of_other_data_is_refused(key, change):
    """Faults 19 and 33."""
    common = {"global_batch_size": 2, "local_batch_size": 1, "seed": 0}
    first = BatchStream(FakeCache([5]), **common)
    for _ in range(6):
        next(first)
    state = first.state_dict()
    cache = FakeCache([5], fingerprint="xyz" if key == "data.path" else "abc")
    here = {"data.path": ("abc", "xyz"), "training.seed": (0, 1), "training.global_batch_size": (2, 4)}[key]
    with pytest.raises(UserError, match=rf"{key}: .*{here[0]}, this run has {here[1]}.*allow_changed"):
        BatchStream(cache, **common | change).load_state_dict(state)
    allowed = BatchStream(cache, **common | change, allow_changed=[key])
    allowed.load_state_dict(state)
    assert allowed.samples_consumed == (4 if key == "training.global_batch_size" else 6)
    next(allowed)


def test_loading_repositions_a_running_stream():
    stream = BatchStream(FakeCache([9, 4]), global_batch_size=2, local_batch_size=2, seed=0, num_workers=1)
    ids = [next(stream)["sample_ids"] for _ in range(3)]
    state = stream.state_dict()
    after = [next(stream)["sample_ids"] for _ in range(3)]
    stream.load_state_dict(state)
    assert [next(stream)["sample_ids"] for _ in range(3)] == after
    stream.load_state_dict(state | {"samples_consumed": 0})
    assert [next(stream)["sample_ids"] for _ in range(3)] == ids
    stream.close()
