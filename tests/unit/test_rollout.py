"""Streaming rollouts: what the samplers compute, and what they cost in memory, host synchronisations and graphs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fvtitan import flow_matching as fm
from fvtitan.distributed.parallelize import apply_compile
from fvtitan.models.base import Conditioning
from fvtitan.models.blocks import block_starts
from fvtitan.samplers import SamplerSpec, num_forwards, sample, stream
from tests.helpers import SMALL, causal_model, random_transformer


def inputs(frames=9, batch=1, size=(4, 4), dtype=torch.float32):
    """Noise, and two conditionings."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, frames, 16, *size, generator=rng, dtype=torch.float64).to(dtype)
    text = torch.randn(2, batch, SMALL.text_len, SMALL.text_dim, generator=rng, dtype=torch.float64).to(dtype)
    return noise, Conditioning(text[0]), Conditioning(text[1])


def fresh_noise(noise):
    """Fresh noise for each rung, and the list of rungs that were asked for."""
    asked = []

    def fresh(rung):
        asked.append(rung)
        return torch.randn(noise.shape, generator=torch.Generator().manual_seed(rung), dtype=noise.dtype)

    return fresh, asked


def sampled(model, spec, noise, cond, uncond=None, fresh=None):
    with torch.no_grad():
        return sample(model, spec, noise, cond, uncond, fresh)


def reference(model, spec, noise, cond, uncond, fresh):
    """Block by block without a cache: every step is a masked forward of the whole video so far, earlier blocks at their
    context noise."""
    video = noise.new_zeros(noise.shape[0], 0, *noise.shape[2:])
    context = video
    for start, end in block_starts(model.causal.blocks(noise.shape[1])):
        x = noise[:, start:end]
        for rung, (sigma, after) in enumerate(zip(spec.sigmas[:-1], spec.sigmas[1:], strict=True), 1):
            levels = torch.full(noise.shape[:2], sigma)[:, :end]
            levels[:, :start] = spec.context_noise
            velocities = [model.predict_velocity(torch.cat([context, x], 1), levels, c) for c in (cond, uncond)]
            v_cond, v_uncond = (v[:, start:] for v in velocities)
            v = v_uncond + spec.guidance_scale * (v_cond - v_uncond)
            x0, eps = x - sigma * v, x + (1 - sigma) * v
            if spec.solver == "sde":
                eps = fresh(rung)[:, start:end]
            x = (1 - after) * x0 + after * eps
        video = torch.cat([video, x], 1)
        noised = x
        if spec.context_noise:
            last = fresh(len(spec.sigmas) - 1)[:, start:end]
            noised = (1 - spec.context_noise) * x + spec.context_noise * last
        context = torch.cat([context, noised], 1)
    return video


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    ("steps", "solver", "context_noise"), [(8, "ode", 0.0), (4, "sde", 0.0), (4, "sde", 0.02), (4, "ode", 0.02)]
)
@pytest.mark.parametrize("keys", [{}, {"local_attn_frames": 4, "sink_frames": 1}, {"independent_first_frame": True}])
def test_streaming_samples_equal_a_plain_loop(keys, steps, solver, context_noise, guidance):
    model = causal_model(random_transformer(dtype=torch.float64), **keys)
    noise, cond, uncond = inputs(10 if "independent_first_frame" in keys else 9, batch=2, dtype=torch.float64)
    spec = SamplerSpec(
        tuple(fm.euler_ladder(steps, 5.0)), guidance, solver, streaming=True, context_noise=context_noise
    )
    fresh, _ = fresh_noise(noise)
    video = sampled(model, spec, noise, cond, uncond, fresh)
    with torch.no_grad():
        expected = reference(model, spec, noise, cond, uncond, fresh)
    assert expected.std() > 0.3
    assert (video - expected).abs().max() <= 1e-10
    other = "ode" if solver == "sde" else "sde"
    changed = SamplerSpec(spec.sigmas, guidance, other, streaming=True, context_noise=context_noise)
    assert (sampled(model, changed, noise, cond, uncond, fresh) - expected).abs().max() > 1e-2


def test_the_sde_solver_renoises_with_fresh_noise():
    """The input of every forward is the last x0 under that rung's fresh noise: their mix in the path's proportions."""
    model, (noise, cond, _) = causal_model(random_transformer()), inputs()
    fresh, asked = fresh_noise(noise)
    calls = []
    exact = model.predict_velocity_streaming

    def spy(x, sigma, cond, cache, start):
        v = exact(x, sigma, cond, cache, start)
        calls.append((start, float(sigma[0, 0]), x, fm.velocity_to_x0(x, v, sigma)))
        return v

    model.predict_velocity_streaming = spy
    spec = SamplerSpec((1.0, 0.9, 0.6, 0.3, 0.0), solver="sde", streaming=True)
    video = sampled(model, spec, noise, cond, fresh=fresh)
    assert asked == [1, 2, 3] * 3  # never for the end of the ladder
    assert len(calls) == 12
    for i, (start, sigma, x, _) in enumerate(calls):
        rung = i % 4
        assert sigma == pytest.approx(spec.sigmas[rung])
        eps = (noise if rung == 0 else fresh(rung))[:, start : start + 3]
        x0 = torch.zeros_like(x) if rung == 0 else calls[i - 1][3]
        torch.testing.assert_close((x - (1 - sigma) * x0) / sigma, eps, atol=1e-4, rtol=0)
    torch.testing.assert_close(video, torch.cat([call[3] for call in calls[3::4]], 1))
    with pytest.raises(AssertionError, match="fresh noise"):
        sampled(model, spec, noise, cond)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_forwards_are_counted_as_announced(guidance):
    model, (noise, cond, uncond) = causal_model(random_transformer()), inputs(batch=2)
    spec = SamplerSpec(tuple(fm.euler_ladder(4, 5.0)), guidance, streaming=True)
    rows = []
    model.transformer.register_forward_pre_hook(lambda module, arguments: rows.append(arguments[0].shape[0]))
    sampled(model, spec, noise, cond, uncond)
    assert sum(rows) == 2 * num_forwards(spec, 3)  # for a batch of 2
    assert num_forwards(SamplerSpec(spec.sigmas, streaming=True), 7) == 7 * 5 - 1


def test_a_stream_gives_blocks_as_they_are_ready():
    model, (noise, cond, _) = causal_model(random_transformer()), inputs()
    spec = SamplerSpec((1.0, 0.5, 0.0), streaming=True)
    calls = []
    model.transformer.register_forward_hook(lambda *call: calls.append(1))
    with torch.no_grad():
        blocks, counts = [], []
        for block in stream(model, spec, noise, cond, None):
            blocks.append(block)
            counts.append(len(calls))
    assert counts == [2, 5, 8]  # the first after two forwards; a commit lies between any two
    assert [block.shape[1] for block in blocks] == [3, 3, 3]


# ------------------------------------------------------------------------------------------------------------ costs


class Record(TorchDispatchMode):
    """Every operator that runs inside."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


SYNCHRONISING = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default"}


@pytest.mark.parametrize("solver", ["ode", "sde"])
@pytest.mark.parametrize("keys", [{}, {"local_attn_frames": 4, "sink_frames": 1}])
def test_a_rollout_never_waits_for_the_device(solver, keys):
    model, (noise, cond, uncond) = causal_model(random_transformer(), **keys), inputs(12)
    spec = SamplerSpec(tuple(fm.euler_ladder(3, 5.0)), 2.0, solver, streaming=True)
    fresh, _ = fresh_noise(noise)
    with Record() as record:
        sampled(model, spec, noise, cond, uncond, fresh)
    assert len(record.names) > 1000 and not SYNCHRONISING & set(record.names)
    with Record() as record:  # a rollout with gradient: the last forward of a block
        cache = model.new_cache(noise.shape)
        for start in (0, 3, 6, 9):
            out = model.predict_velocity_streaming(noise[:, start : start + 3], torch.ones(1, 3), cond, cache, start)
            model.commit(out, cond, cache, start)
    assert out.requires_grad and not SYNCHRONISING & set(record.names)
    with Record() as record:
        float(noise.sum())
    assert SYNCHRONISING & set(record.names)  # the detector works


def test_the_cache_is_allocated_once_for_a_shape():
    model, (noise, cond, uncond) = causal_model(random_transformer(), local_attn_frames=4), inputs(12, batch=2)
    spec = SamplerSpec((1.0, 0.5, 0.0), streaming=True)

    def addresses(cache):
        return [tensor.data_ptr() for layer in cache.layers for tensor in vars(layer).values()]

    first = model.new_cache(noise.shape)
    pointers = addresses(first)
    assert len(set(pointers)) == 4 * SMALL.num_layers and first.num_slots == 12
    for _ in range(3):
        model.commit(noise[:, :3], cond, first, 0)
        again = model.new_cache(noise.shape)
        assert addresses(again) == pointers and again.end == 0 and again.text_embedding is None

    def caches_made(run):
        """Tensors of the shape of a layer's keys that come to life in `run`."""
        made = []

        class Allocations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if func is torch.ops.aten.empty.memory_format and out.ndim == 4:
                    made.append(tuple(out.shape))
                return out

        with Allocations():
            run()
        return made

    def rollout():
        sampled(model, spec, noise, cond)

    slots, text = 4 * 4, SMALL.text_len
    shapes = [(slots, 2, 4, 32)] * 2 + [(2, text, 4, 32)] * 2
    assert caches_made(rollout) == shapes * SMALL.num_layers  # the recycled one holds a window
    assert caches_made(rollout) == [] and caches_made(rollout) == []
    assert (
        len(caches_made(lambda: sampled(model, SamplerSpec(spec.sigmas, 2.0, streaming=True), noise, cond, uncond)))
        == 8
    )
    assert model.new_cache((1, *noise.shape[1:])) is not model.new_cache(noise.shape)
    assert model.cache_bytes() > 0
    model.release_cache()
    assert model.cache_bytes() == 0


@pytest.mark.slow
def test_compiled_blocks_equal_eager_ones_and_make_no_new_graphs():
    """Blocks compiled in place, with a window and a sink: a streamed sample and a diffusion-forcing step."""
    model = causal_model(random_transformer(), local_attn_frames=4, sink_frames=1)
    spec = SamplerSpec((1.0, 0.5, 0.0), streaming=True)

    def gradients(loss):
        model.transformer.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.transformer.parameters()]

    def streamed(noise, cond):
        return [sampled(model, spec, noise, cond)]

    def forcing(noise, cond):
        return gradients(model.predict_velocity(noise, torch.full(noise.shape[:2], 0.5), cond).square().mean())

    noise, cond, uncond = inputs()
    arguments = [(noise, cond), (noise.flip(1), uncond), (noise.flip(2), cond)]
    # AOT autograd is slow on the long graph of the masked forward, and what it adds is writes into the cache.
    for run, backend in ((streamed, "aot_eager"), (forcing, "eager")):
        counter, graphs = CompileCounterWithBackend(backend), []
        expected = [run(*pair) for pair in arguments]
        assert (expected[0][0] - expected[1][0]).abs().max() > 1e-3
        with torch._dynamo.config.patch(recompile_limit=None):  # apply_compile sets it
            apply_compile(model.transformer, counter)
            for pair, values in zip(arguments, expected, strict=True):
                for a, b in zip(run(*pair), values, strict=True):
                    assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7
                graphs.append(counter.frame_count)
        assert graphs[0] > 0 and graphs[2] == graphs[1], (run, graphs)
        for block in model.transformer.blocks:
            block._compiled_call_impl = None  # eager again
        torch._dynamo.reset()


@pytest.mark.parametrize("recycle", [False, True])
def test_past_the_trained_length_the_sink_is_seen_directly_before_the_window(recycle):
    """The last of 5 blocks, window 6, sink 3, trained on 9 frames: as if the sink's block had been committed at frames 6 - 8,
    in a stream that begins there, with the same block at 9 - 11 behind it. Up to 9 frames nothing changes."""
    model = causal_model(random_transformer(dtype=torch.float64), local_attn_frames=6, sink_frames=3)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 15, 16, 4, 4, generator=rng, dtype=torch.float64)
    cond = Conditioning(torch.randn(2, SMALL.text_len, SMALL.text_dim, generator=rng, dtype=torch.float64))
    sigma = torch.full((2, 3), 0.5, dtype=torch.float64)

    def stream(trained_frames):
        model.trained_frames, model._cache = trained_frames, None
        cache, out = model.new_cache(x.shape, recycle=recycle), []
        with torch.no_grad():
            for start in range(0, 15, 3):
                block = x[:, start : start + 3]
                out.append(model.predict_velocity_streaming(block, sigma, cond, cache, start))
                if start < 12:
                    model.commit(block, cond, cache, start)
        return out, cache

    absolute, _ = stream(0)
    out, cache = stream(9)
    for block in range(3):
        assert torch.equal(out[block], absolute[block])
    assert not torch.allclose(out[3], absolute[3], atol=1e-6) and not torch.allclose(out[4], absolute[4], atol=1e-6)

    reference = causal_model(model.transformer)  # no window: it sees all of the stream that begins at frame 6
    near = reference.new_cache((2, 9, 16, 4, 4), first_frame=6)
    with torch.no_grad():
        reference.commit(x[:, :3], cond, near, 6)
        tokens, slot = cache.tokens_per_frame, cache._slots(9, 12)[0]
        for ours, theirs in zip(near.layers, cache.layers, strict=True):
            for name in ("key", "value"):
                kept = getattr(theirs, name)[:, slot[0] * tokens : slot[1] * tokens]
                getattr(ours, name)[:, 3 * tokens : 6 * tokens] = kept
        near.end = 12
        expected = reference.predict_velocity_streaming(x[:, 12:], sigma, cond, near, 12)
    assert torch.allclose(out[4], expected, atol=1e-12)
