"""The causal network: streaming over the KV cache and the masked full forward are the same function, and so are their
gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fvtitan.distributed.parallelize import apply_ac
from fvtitan.errors import UserError
from fvtitan.models.base import Conditioning
from fvtitan.models.blocks import block_starts, partition
from fvtitan.models.wan import transformer as network
from fvtitan.models.wan.attention import BlockCausal, apply_rope, attend, prepare, rope_table
from fvtitan.models.wan.transformer import WanTransformer
from tests.helpers import SMALL, bidirectional_model, causal_model, random_transformer

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # what a CPU has
PRECISIONS = [(torch.float32, 2e-5), (torch.float64, 1e-12)]


def inputs(frames=9, height=6, width=10, batch=1, dtype=torch.float32, blocks=None, seed=0):
    """Latents, sigma (constant in a block, random across blocks) and text."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, 16, height, width, generator=rng, dtype=torch.float64).to(dtype)
    levels = torch.rand(batch, frames, generator=rng)
    for start, end in block_starts(blocks or partition(frames, 3)):
        levels[:, start:end] = levels[:, start : start + 1]
    text = torch.randn(batch, SMALL.text_len, SMALL.text_dim, generator=rng, dtype=torch.float64).to(dtype)
    return x, levels, text


def masked(model, x, sigma, text):
    with torch.no_grad():
        return model.predict_velocity(x, sigma, Conditioning(text))


def poisoned_cache(model, shape, **keys):
    """An empty cache full of NaN: whoever reads what was not committed gives NaN."""
    cache = model.new_cache(shape, **keys)
    for layer in cache.layers:
        for tensor in vars(layer).values():
            tensor.fill_(float("nan"))
    return cache


def streamed(model, x, sigma, text, *, recycle=False, first_frame=0, before_pass=lambda cache: None):
    """One pass a block, each of which leaves its own keys and values in the cache."""
    cache, out = poisoned_cache(model, x.shape, recycle=recycle, first_frame=first_frame), []
    with torch.no_grad():
        for start, end in block_starts(model.causal.blocks(x.shape[1])):
            before_pass(cache)
            block, at = (x[:, start:end], sigma[:, start:end], text), first_frame + start
            out.append(model.transformer(*block, cache=cache, start_frame=at, commit=True))
    return torch.cat(out, dim=1)


def distance(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


# ---------------------------------------------------------------------------------- streaming == masked (oracle 4.1)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_streaming_equals_the_masked_forward(dtype, tolerance, monkeypatch):
    network_ = random_transformer(dtype=dtype)
    model, x = causal_model(network_), inputs(dtype=dtype)
    full = masked(model, *x)
    assert 1 < full.abs().max() < 20
    assert distance(streamed(model, *x), full) <= tolerance
    # The comparison can fail: full attention, other blocks, and a stream whose positions start at 0 in every block.
    assert distance(masked(bidirectional_model(network_), *x), full) > 0.1
    assert distance(masked(causal_model(network_, 1), *x), full) > 0.1
    with monkeypatch.context() as patch:
        patch.setattr(network, "rope_table", lambda t, h, w, d, start, *rest: rope_table(t, h, w, d, 0, *rest))
        assert distance(streamed(model, *x), full) > 0.1


@pytest.mark.parametrize("first_frame", [5, 300])
@pytest.mark.parametrize("keys", [{}, {"local_attn_frames": 4, "sink_frames": 1}])
def test_positions_are_relative(first_frame, keys):
    """(a) The stream's first frame may have any number."""
    model, x = causal_model(random_transformer(), **keys), inputs()
    for recycle in (False, True):
        out = streamed(model, *x, first_frame=first_frame, recycle=recycle)
        assert distance(out, masked(model, *x)) <= 2e-5


WINDOWS = [(3, 0), (6, 0), (4, 0), (3, 1), (6, 3), (6, 1), (4, 2)]


@pytest.mark.parametrize("recycle", [False, True])
@pytest.mark.parametrize(("window", "sink"), WINDOWS)
@pytest.mark.parametrize(("frames", "size"), [(9, (6, 10)), (27, (2, 4))])
def test_windows_and_sinks(window, sink, recycle, frames, size):
    """(b) The window is measured from the block's end, in the mask and in the cache; with `recycle` the buffer holds only
    the sink and one window, and a stream of any length goes through it."""
    network_ = random_transformer()
    model = causal_model(network_, local_attn_frames=window, sink_frames=sink)
    x = inputs(frames, *size)
    full = masked(model, *x)
    assert distance(streamed(model, *x, recycle=recycle), full) <= 2e-5
    assert model.new_cache(x[0].shape, recycle=recycle).num_slots == (min(frames, window + sink) if recycle else frames)
    blocks = model.causal.blocks(frames)
    for other, other_sink in ((-1, 0), (window, sink + 1), (window + 1, sink)):
        changed = causal_model(network_, local_attn_frames=other, sink_frames=other_sink)
        masks = [reference_mask(blocks, *config, False) for config in ((window, sink), (other, other_sink))]
        assert (distance(masked(changed, *x), full) > 1e-3) == (not torch.equal(*masks))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("keys", [{}, {"local_attn_frames": 3}, {"local_attn_frames": 3, "sink_frames": 1}])
def test_independent_first_frame(keys, dtype, tolerance):
    """(c) Blocks of 1, 3, 3."""
    network_ = random_transformer(dtype=dtype)
    model = causal_model(network_, independent_first_frame=True, **keys)
    x = inputs(7, dtype=dtype, blocks=(1, 3, 3))
    full = masked(model, *x)
    assert distance(streamed(model, *x, recycle=True), full) <= tolerance
    assert distance(masked(causal_model(network_, 7), *x), full) > 0.1


def test_kept_text_keys_change_nothing():
    """(d) Keys and values of the text, kept from the first pass or computed in each."""
    model, (x, sigma, text) = causal_model(random_transformer()), inputs()
    kept = streamed(model, x, sigma, text)

    def forget(cache):
        cache.text_embedding = None

    assert torch.equal(streamed(model, x, sigma, text, before_pass=forget), kept)
    # They are kept indeed: spoiling them changes the result; and a new rollout has its own.
    spoil = iter(range(100))

    def overwrite(cache):
        if next(spoil):
            cache.layers[0].text_value.zero_()

    assert distance(streamed(model, x, sigma, text, before_pass=overwrite), kept) > 1e-2
    other = text.roll(1, dims=1) * 2
    assert distance(streamed(model, x, sigma, other), masked(model, x, sigma, other)) <= 2e-5
    assert distance(masked(model, x, sigma, other), kept) > 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_one_block_is_the_bidirectional_model(dtype, tolerance):
    """(e)"""
    network_, x = random_transformer(dtype=dtype), inputs(dtype=dtype)
    model = causal_model(network_, 9)
    bidirectional = masked(bidirectional_model(network_), *x)
    assert distance(masked(model, *x), bidirectional) <= tolerance
    assert distance(streamed(model, *x), bidirectional) <= tolerance


@pytest.mark.parametrize(("frames", "height", "width"), [(12, 8, 16), (12, 16, 16), (3, 2, 2), (6, 14, 2)])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_any_number_of_tokens(frames, height, width, backend):
    """(f) 384 and 768 tokens, multiples of 128, as well as 3 and 42."""
    network_ = random_transformer()
    model, x = causal_model(network_, attention_backend=backend), inputs(frames, height, width)
    assert distance(streamed(model, *x), masked(model, *x)) <= 2e-5


@pytest.mark.parametrize("frames", [8, 10])
def test_a_ragged_last_block_is_refused(frames):
    """(g)"""
    model, (x, sigma, text) = causal_model(random_transformer()), inputs(frames, blocks=(frames,))
    for call in (
        lambda: masked(model, x, sigma, text),
        lambda: model.predict_velocity_with_context(x, sigma, x, sigma, Conditioning(text)),
        lambda: streamed(model, x, sigma, text),
    ):
        with pytest.raises(UserError, match=f"{frames} latent frames do not divide into blocks of 3; nearest: "):
            call()


def test_a_batch_is_its_samples():
    """(h)"""
    model, (x, sigma, text) = causal_model(random_transformer()), inputs(batch=3)
    for run in (masked, streamed):
        whole = run(model, x, sigma, text)
        alone = torch.cat([run(model, x[i : i + 1], sigma[i : i + 1], text[i : i + 1]) for i in range(3)])
        assert distance(whole, alone) <= 2e-5
        assert distance(whole[:1], whole[1:2]) > 1


def test_the_clean_pass_overwrites_noisy_ones():
    """(i) Three noisy passes and then the clean one at the same place: the cache and the next block are, exactly, those
    after the clean pass alone."""
    model, (x, _, text) = causal_model(random_transformer()), inputs()
    rng, cond = torch.Generator().manual_seed(5), Conditioning(text)

    def run(noisy_passes):
        cache = poisoned_cache(model, x.shape)
        with torch.no_grad():
            for start, end in ((0, 3), (3, 6)):
                for level in noisy_passes:
                    noise = torch.randn(1, 3, 16, 6, 10, generator=rng)
                    sigma = torch.full((1, 3), level)
                    model.transformer(noise, sigma, text, cache=cache, start_frame=start, commit=True)
                model.commit(x[:, start:end], cond, cache, start)
            after = model.predict_velocity_streaming(x[:, 6:], torch.full((1, 3), 0.7), cond, cache, 6)
        return after, [tensor[:, : 6 * 15].clone() for layer in cache.layers for tensor in (layer.key, layer.value)]

    (once, kept), (many, kept_after_many) = run(()), run((1.0, 0.9, 0.6))
    assert torch.equal(once, many)
    assert all(torch.equal(a, b) for a, b in zip(kept, kept_after_many, strict=True))
    cache = poisoned_cache(model, x.shape)  # without the clean pass the next block does see something else
    with torch.no_grad():
        for start, end in ((0, 3), (3, 6)):
            model.transformer(
                x[:, start:end], torch.full((1, 3), 0.6), text, cache=cache, start_frame=start, commit=True
            )
        noisy = model.predict_velocity_streaming(x[:, 6:], torch.full((1, 3), 0.7), cond, cache, 6)
    assert distance(noisy, once) > 1e-2


@torch.no_grad()
def test_a_pass_that_commits_nothing_leaves_the_committed_frames(monkeypatch):
    """Only slots of its own block are written, and only those that nobody has committed; the context is read as it lies."""
    model = causal_model(random_transformer(), 1)
    torch.manual_seed(0)
    noise, text = torch.randn(2, 4, 16, 4, 4), torch.randn(2, SMALL.text_len, SMALL.text_dim)
    sigma, cond, cache = torch.full((2, 1), 0.5), Conditioning(text), model.new_cache(noise.shape)
    for frame in range(3):
        model.commit(noise[:, frame : frame + 1], cond, cache, frame)
    committed = slice(0, 3 * cache.tokens_per_frame)
    before = [layer.key[:, committed].clone() for layer in cache.layers]
    monkeypatch.setattr(network, "recall", None)  # what copies a context
    model.predict_velocity_streaming(noise[:, 3:], sigma, cond, cache, 3)
    monkeypatch.undo()
    for frame in range(3):
        model.predict_velocity_streaming(noise[:, 3:], sigma, cond, cache, frame)
    assert cache.end == 3
    assert all(torch.equal(layer.key[:, committed], key) for layer, key in zip(cache.layers, before, strict=True))


def test_a_block_that_does_not_fit_the_cache_is_refused():
    model, (x, sigma, text) = causal_model(random_transformer()), inputs()
    cache = poisoned_cache(model, x.shape)
    for start, message in ((3, "starts at frame 3, but the cache is filled from 0 to 0"), (-3, "starts at frame -3")):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model.transformer(x[:, :3], sigma[:, :3], text, cache=cache, start_frame=start)
    streamed(model, x, sigma, text)
    with torch.no_grad(), pytest.raises(ValueError, match="ends at frame 12, but the cache has room up to 9"):
        model.transformer(x[:, :3], sigma[:, :3], text, cache=cache, start_frame=9)
    with pytest.raises(AssertionError, match="without gradient"):
        model.transformer(x[:, :3], sigma[:, :3], text, cache=cache, start_frame=6, commit=True)


# ------------------------------------------------------------------------------------- teacher forcing (oracle 4.2)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("keys", [{}, {"local_attn_frames": 6}, {"local_attn_frames": 3, "sink_frames": 1}])
def test_teacher_forcing_equals_streaming_over_clean_blocks(dtype, tolerance, keys):
    model = causal_model(random_transformer(dtype=dtype), **keys)
    noisy, sigma, text = inputs(dtype=dtype)
    clean, cond = inputs(dtype=dtype, seed=1)[0], Conditioning(text)
    with torch.no_grad():
        forced = model.predict_velocity_with_context(noisy, sigma, clean, torch.zeros(1, 9), cond)
        cache, out = poisoned_cache(model, noisy.shape), []
        for start, end in ((0, 3), (3, 6), (6, 9)):
            block = noisy[:, start:end], sigma[:, start:end]
            out.append(model.predict_velocity_streaming(*block, cond, cache, start))
            model.commit(clean[:, start:end], cond, cache, start)
    assert forced.abs().max() > 1
    assert distance(torch.cat(out, 1), forced) <= tolerance
    assert (
        distance(masked(model, noisy, sigma, text)[:, 3:], forced[:, 3:]) > 1e-2
    )  # diffusion forcing is another function


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_noisy_block_never_sees_its_own_clean_copy(backend):
    """Changing clean block 1 leaves noisy blocks 0 and 1 exactly as they were, and changes those after it."""
    model = causal_model(random_transformer(), attention_backend=backend)
    (noisy, sigma, text), clean = inputs(12, 2, 4), inputs(12, 2, 4, seed=1)[0]

    def forced(clean, noisy=noisy):
        with torch.no_grad():
            return model.predict_velocity_with_context(noisy, sigma, clean, torch.zeros(1, 12), Conditioning(text))

    before, changed = forced(clean), clean.clone()
    changed[:, 3:6] += 1
    after = forced(changed)
    assert torch.equal(after[:, :6], before[:, :6])
    assert distance(after[:, 6:9], before[:, 6:9]) > 1e-2 and distance(after[:, 9:], before[:, 9:]) > 1e-2
    changed = noisy.clone()  # and no noisy block sees another noisy one
    changed[:, 3:6] += 1
    after = forced(clean, changed)
    others = [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert torch.equal(after[:, others], before[:, others]) and distance(after[:, 3:6], before[:, 3:6]) > 1e-2


# --------------------------------------------------------------------------------------- context pass (oracle 4.11)


def cached(cache, frames, tokens=15):
    return [tensor[:, : frames * tokens].clone() for layer in cache.layers for tensor in (layer.key, layer.value)]


def test_the_context_pass_is_a_forward_at_exactly_zero():
    """What `commit` writes are the keys and values that a plain forward of the clean block at sigma 0 computes."""
    model, (x, _, text) = causal_model(random_transformer()), inputs(3)
    seen = []
    for block in model.transformer.blocks:  # keys before RoPE, and values, of that plain forward
        block.self_attn.norm_k.register_forward_hook(lambda module, arguments, out: seen.append(out.clone()))
        block.self_attn.v.register_forward_hook(lambda module, arguments, out: seen.append(out.clone()))

    def plain(level):
        seen.clear()
        with torch.no_grad():
            model.transformer(x, torch.full((1, 3), level), text)
        rope = rope_table(3, 3, 5, SMALL.head_dim, 0, torch.device("cpu"), torch.float32)
        heads = [tensor.unflatten(-1, (SMALL.num_heads, -1)) for tensor in seen]
        return [apply_rope(tensor, rope) if i % 2 == 0 else tensor for i, tensor in enumerate(heads)]

    cache = poisoned_cache(model, x.shape)
    model.commit(x, Conditioning(text), cache, 0)
    assert all(torch.equal(a, b) for a, b in zip(cached(cache, 3), plain(0.0), strict=True))
    authors = plain(0.00498)  # what the authors' code wrote by accident is not that
    assert all(distance(a, b) > 1e-4 for a, b in zip(cached(cache, 3), authors, strict=True))


@pytest.mark.parametrize(("timestep", "dtype"), [(20, torch.float32), (20, torch.bfloat16), (0, torch.bfloat16)])
def test_context_noise_reaches_the_network_exactly(timestep, dtype, monkeypatch):
    model, (x, _, text) = causal_model(random_transformer(dtype=dtype)), inputs(3)
    times = []
    embed = network.timestep_embedding
    monkeypatch.setattr(network, "timestep_embedding", lambda t, dim: times.append(t) or embed(t, dim))
    model.commit(x, Conditioning(text), poisoned_cache(model, x.shape), 0, context_noise=timestep / 1000)
    assert len(times) == 1 and times[0].shape == (1, 3) and times[0].eq(timestep).all()


# -------------------------------------------------------------------------------------------- attention backends


def reference_mask(blocks, window, sink, clean_context):
    """Which frame sees which, pair by pair from the definition."""
    index = [i for i, size in enumerate(blocks) for _ in range(size)]
    frames = len(index)

    def earlier(query, key):  # key lies in a block before the query's, inside the window or the sink
        end = sum(blocks[: index[query] + 1])
        return index[key] < index[query] and (window < 0 or key >= end - window or key < sink)

    def sees(query, key):
        noisy_query, noisy_key = query >= frames, key >= frames
        query, key = query % frames, key % frames
        if noisy_query == noisy_key:
            return index[query] == index[key] or (not noisy_query and earlier(query, key))
        return noisy_query and earlier(query, key)

    length = frames * (2 if clean_context else 1)
    return torch.tensor([[sees(i, j) for j in range(length)] for i in range(length)])


PLANS = [
    BlockCausal((3, 3, 3)),
    BlockCausal((1, 3, 3, 3)),
    BlockCausal((2, 2, 2, 2, 2), window=4),
    BlockCausal((3, 3, 3, 3), window=5, sink=2),
    BlockCausal((3, 3, 3), clean_context=True),
    BlockCausal((1, 2, 2, 2), window=3, sink=1, clean_context=True),
    BlockCausal((3,), clean_context=True),
]


def attention_inputs(plan, tokens, batch=2):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(batch, plan.num_frames * tokens, 4, 32, generator=rng) for _ in range(3)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("tokens", [5, 32])
def test_attention_per_block_equals_a_dense_mask_and_flex(plan, tokens):
    """Outputs and gradients of one call a block, and outputs of FlexAttention, against one call with the dense mask."""
    mask = reference_mask(plan.blocks, plan.window, plan.sink, plan.clean_context)
    assert torch.equal(plan.frame_mask(), mask)
    dense = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    weight = torch.randn(2, plan.num_frames * tokens, 4, 32, generator=torch.Generator().manual_seed(1))

    def run(attention):
        q, k, v = (x.requires_grad_() for x in attention_inputs(plan, tokens))
        out = attention(q, k, v)
        (out * weight).sum().backward()
        return [out.detach(), q.grad, k.grad, v.grad]

    def with_mask(mask):
        def attention(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        return attention

    expected = run(with_mask(dense))
    actual = run(lambda q, k, v: attend(q, k, v, prepare(plan, tokens, torch.device("cpu"))))
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    off_by_one = dense.clone()
    off_by_one[-tokens:, tokens] = ~off_by_one[-tokens:, tokens]  # one frame sees one token more, or less
    assert (run(with_mask(off_by_one))[0] - expected[0]).norm() > 1e-3 * expected[0].norm()

    flex = BlockCausal(plan.blocks, plan.window, plan.sink, plan.clean_context, backend="flex")
    mask = prepare(flex, tokens, torch.device("cpu"))
    assert mask is prepare(flex, tokens, torch.device("cpu"))  # kept
    assert mask is not prepare(flex, tokens + 1, torch.device("cpu"))
    with torch.no_grad():
        assert distance(attend(*attention_inputs(plan, tokens), mask), expected[0]) <= 2e-5


@pytest.mark.parametrize("clean_context", [False, True])
def test_flex_equals_sdpa_in_the_network(clean_context):
    network_ = random_transformer()
    (x, sigma, text), clean = inputs(batch=2), inputs(batch=2, seed=1)[0]
    out = []
    for backend in ("sdpa", "flex"):
        model = causal_model(network_, attention_backend=backend, local_attn_frames=6, sink_frames=1)
        with torch.no_grad():
            if clean_context:
                zero = torch.zeros(2, 9)
                out.append(model.predict_velocity_with_context(x, sigma, clean, zero, Conditioning(text)))
            else:
                out.append(model.predict_velocity(x, sigma, Conditioning(text)))
    assert distance(*out) <= 2e-5


def test_block_causal_flops():
    """7 equal blocks: (1 + 2 + ... + 7) / 49 = 0.571 of the dense attention, counted in the network."""
    with torch.device("meta"):
        transformer = WanTransformer(SMALL)
        x, sigma, text = torch.empty(1, 21, 16, 6, 10), torch.empty(1, 21), torch.empty(1, 20, 48)

    def count(plan):
        """FLOPs of self-attention proper: the whole layer without its four projections."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            transformer(x, sigma, text, plan=plan)
        counts = counter.get_flop_counts()
        names = [f"WanTransformer.blocks.{i}.self_attn" for i in range(SMALL.num_layers)]
        whole = sum(sum(counts[name].values()) for name in names)
        return whole - sum(sum(counts[f"{name}.{part}"].values()) for name in names for part in "qkvo")

    dense, causal = count(None), count(BlockCausal((3,) * 7))
    tokens = 21 * 15
    assert dense == SMALL.num_layers * 2 * 2 * tokens**2 * SMALL.dim
    assert causal / dense == pytest.approx(28 / 49) and causal / dense <= 0.60
    assert count(BlockCausal((3,) * 7, window=6)) / dense == pytest.approx((1 + 6 * 2) / 49)


# -------------------------------------------------------------------------------------------------------- gradients


def parameter_gradients(model, out, weight):
    (out * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.transformer.named_parameters() if p.grad is not None}
    model.transformer.zero_grad()
    return gradients


def streaming_gradients(model, x, sigma, text, weight, *, later=False):
    """Gradients of the second block's pass with gradient, its context committed before; `later`: the rollout goes on, and
    writes into the cache, between forward and backward."""
    cond, cache = Conditioning(text), poisoned_cache(model, x.shape)
    with torch.no_grad():
        model.predict_velocity_streaming(x[:, :3], sigma[:, :3], cond, cache, 0)  # keeps the text
    model.commit(x[:, :3], cond, cache, 0)
    before = [tensor.clone() for layer in cache.layers for tensor in vars(layer).values()]
    out = model.predict_velocity_streaming(x[:, 3:6], sigma[:, 3:6], cond, cache, 3)
    if later:
        model.commit(out, cond, cache, 3)
        model.predict_velocity_streaming(x[:, 6:9], sigma[:, 6:9], cond, cache, 6)
        model.commit(x[:, 6:9], cond, cache, 6)
    gradients = parameter_gradients(model, out, weight)
    if not later:
        after = [tensor for layer in cache.layers for tensor in vars(layer).values()]
        torch.testing.assert_close(after, before, atol=0, rtol=0, equal_nan=True)
        assert cache.end == 3
        assert not any(tensor.requires_grad for tensor in after)
    return gradients


def close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    return all((actual[n] - expected[n]).norm() <= tolerance * expected[n].norm() + 1e-7 for n in expected)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("keys", [{}, {"local_attn_frames": 6, "sink_frames": 1}])
def test_gradients_stop_at_the_cache(keys, mode, later):
    """A streaming pass writes nothing, and its gradients are those of the masked forward in which keys and values of the
    earlier, clean block are constants."""
    model = causal_model(random_transformer(), **keys)
    x, sigma, text = inputs(batch=2)
    weight = torch.randn(2, 3, 16, 6, 10, generator=torch.Generator().manual_seed(3))
    apply_ac(model.transformer, mode)
    actual = streaming_gradients(model, x, sigma, text, weight, later=later)
    assert len(actual) == len(list(model.transformer.parameters()))
    for layer in range(SMALL.num_layers):  # the text's keys are computed anew under gradient, though the cache has them
        for part in ("k.weight", "v.weight", "norm_k.weight"):
            assert actual[f"blocks.{layer}.cross_attn.{part}"].norm() > 1e-3

    apply_ac(model.transformer, "none")
    clean = torch.cat([torch.zeros(2, 3), sigma[:, 3:6]], dim=1)

    def full():
        return parameter_gradients(model, model.predict_velocity(x[:, :6], clean, Conditioning(text))[:, 3:], weight)

    leaking = full()

    def detach(module, arguments, out):
        return torch.cat([out[:, : 3 * 15].detach(), out[:, 3 * 15 :]], dim=1)

    for block in model.transformer.blocks:
        block.self_attn.norm_k.register_forward_hook(detach)
        block.self_attn.v.register_forward_hook(detach)
    assert close(actual, full(), 1e-5)
    assert not close(actual, leaking, 1e-2)  # the comparison can fail: through the context flows a lot


def test_no_gradient_from_a_block_to_an_earlier_one():
    model, (x, sigma, text) = causal_model(random_transformer()), inputs()
    first, second = x[:, :3].requires_grad_(), x[:, 3:6].clone().requires_grad_()
    cond, cache = Conditioning(text), poisoned_cache(model, x.shape)
    out = model.predict_velocity_streaming(first, sigma[:, :3], cond, cache, 0)
    model.commit(out, cond, cache, 0)
    after = model.predict_velocity_streaming(second, sigma[:, 3:6], cond, cache, 3)
    to_first, to_second = torch.autograd.grad(after.sum(), (first, second), allow_unused=True)
    assert to_first is None and to_second.norm() > 0


def test_checkpointing_changes_no_gradient_of_the_masked_forward():
    """Diffusion forcing and teacher forcing under activation checkpointing."""
    model, (x, sigma, text) = causal_model(random_transformer()), inputs()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    gradients = {}
    for mode in ("none", "selective", "full"):
        apply_ac(model.transformer, mode)
        cond = Conditioning(text)
        forcing = parameter_gradients(model, model.predict_velocity(x, sigma, cond), weight)
        out = model.predict_velocity_with_context(x, sigma, x, 0 * sigma, cond)
        gradients[mode] = forcing, parameter_gradients(model, out, weight)
    for mode in ("selective", "full"):
        for a, b in zip(gradients[mode], gradients["none"], strict=True):
            assert all(torch.equal(a[name], b[name]) for name in b)
