"""Compiled blocks: the same numbers, few graphs, and no silent way out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend

from fvtitan.distributed.parallelize import DYNAMO_RECOMPILE_LIMIT, apply_ac, apply_compile
from fvtitan.models.base import Conditioning
from fvtitan.models.blocks import block_starts
from fvtitan.models.wan.model import WanCausalModel
from tests.helpers import SMALL, causal_model, make_cache, random_transformer
from tests.self_forcing_oracles import prompts_batch, wan_method

MODES = ["none", "selective", "full"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Graphs of other tests, which share `Block.forward`, and the limit that was set."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def inputs(frames: int, height: int = 4) -> tuple[Tensor, Conditioning]:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(2, frames, 16, height, 4, generator=rng)
    return noise, Conditioning(torch.randn(2, SMALL.text_len, SMALL.text_dim, generator=rng))


def gradients(model: WanCausalModel, loss: Tensor) -> list[Tensor]:
    model.transformer.zero_grad()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.transformer.parameters())]


def forcing(model: WanCausalModel, frames: int) -> list[Tensor]:
    noise, cond = inputs(frames)
    return gradients(model, model.predict_velocity(noise, torch.full(noise.shape[:2], 0.5), cond).square().mean())


def rollout(model: WanCausalModel, frames: int) -> list[Tensor]:
    """A pass with gradient and a commit for each block; one backward through all of them."""
    (noise, cond), out = inputs(frames), []
    cache = model.new_cache(noise.shape)
    for start, end in block_starts(model.causal.blocks(frames)):
        x, size = noise[:, start:end], (2, end - start)
        x = x - 0.5 * model.predict_velocity_streaming(x, torch.full(size, 0.5), cond, cache, start)
        out.append(x)
        model.commit(x, cond, cache, start)
    return gradients(model, torch.cat(out, dim=1).square().mean())


@pytest.mark.parametrize("mode", MODES)
def test_blocks_share_one_graph(mode):
    model, counter = causal_model(random_transformer(dataclasses.replace(SMALL, num_layers=4)), 2), None
    names = [name for name, _ in model.transformer.named_parameters()]
    expected = forcing(model, 4)
    counter = CompileCounterWithBackend("eager")
    apply_ac(model.transformer, mode)
    apply_compile(model.transformer, counter)
    assert torch._dynamo.config.recompile_limit == DYNAMO_RECOMPILE_LIMIT
    for _ in range(2):
        for a, b in zip(forcing(model, 4), expected, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1
    assert [name for name, _ in model.transformer.named_parameters()] == names


def check_rollout(mode: str, backend: str) -> None:
    """Graphs: 2 for each length of the context, the same for all layers, and none after the first rollout. The cache goes on
    being written between a block's forward and its backward."""
    model = causal_model(random_transformer(), sink_frames=3, local_attn_frames=6)
    apply_ac(model.transformer, mode)
    expected = rollout(model, 6)
    counter = CompileCounterWithBackend(backend)
    apply_compile(model.transformer, counter)
    for _ in range(3):
        for a, b in zip(rollout(model, 6), expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
        assert counter.frame_count == 4


def test_a_compiled_rollout_has_the_gradients_of_an_eager_one():
    check_rollout("selective", "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "backend"), [("none", "aot_eager"), ("full", "aot_eager")] + [(m, "inductor") for m in MODES]
)
def test_so_it_has_in_every_mode_and_with_kernels(mode, backend):
    check_rollout(mode, backend)


def test_blocks_at_other_places_with_a_context_of_the_same_size_share_graphs():
    model = causal_model(
        random_transformer(dataclasses.replace(SMALL, num_layers=1)), 1, sink_frames=1, local_attn_frames=3
    )
    counter, graphs = CompileCounterWithBackend("eager"), []
    apply_compile(model.transformer, counter)
    noise, cond = inputs(8)
    cache = model.new_cache(noise.shape)
    for frame in range(8):
        model.commit(noise[:, frame : frame + 1], cond, cache, frame)
        graphs.append(counter.frame_count)
    # The first pass keeps the text. 1, 2, 3 frames of context in one range; then sink and window part.
    assert graphs == [1, 2, 3, 4, 5, 5, 5, 5]


def test_self_forcing_makes_its_graphs_in_the_first_steps(tmp_path):
    """Student, teacher and critic share them: what differs is gradient or not, trained or frozen, context."""
    method = wan_method(
        make_cache(tmp_path / "cache"), tmp_path, frames=6, last_step_only=True, student_update_interval=1
    )
    counter, graphs = CompileCounterWithBackend("eager"), []
    method.teacher.transformer.requires_grad_(False)
    for model in method.role_models.values():
        apply_compile(model.transformer, counter)
    for step in range(1, 5):
        for role in method.phases(step):
            method.single_train_step(prompts_batch(), step, role)[0].backward()
            graphs.append(counter.frame_count)
    # First block: text kept, text taken (so does its commit), gradient; second block: with and without gradient. Then teacher
    # and critic without gradient, and in its own phase the critic with.
    assert graphs[0] == 7 and graphs[1:] == [8] * 7


def test_one_graph_more_than_the_limit_is_an_error():
    model = causal_model(random_transformer(dataclasses.replace(SMALL, num_layers=1)), 1)
    apply_compile(model.transformer, "eager")
    torch._dynamo.config.recompile_limit = 2
    for height in (4, 6):
        noise, cond = inputs(2, height)
        model.predict_velocity(noise, torch.ones(2, 2), cond)
    noise, cond = inputs(2, 8)
    with pytest.raises(FailOnRecompileLimitHit):
        model.predict_velocity(noise, torch.ones(2, 2), cond)
