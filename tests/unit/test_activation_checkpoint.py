"""Activation checkpointing: what is kept, what is computed again, and that no number changes."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from fvtitan.components.memory import LiveBytes
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.parallelize import apply_ac, apply_fsdp, keep_attentions
from fvtitan.models.wan import transformer as network
from fvtitan.models.wan.attention import FLEX_OPTIONS, BlockCausal
from fvtitan.models.wan.transformer import WanTransformer
from tests.helpers import SMALL, make_cache, random_transformer, small_config

MODES = ["none", "selective", "full"]
SIZES = dataclasses.replace(SMALL, text_len=40)  # more keys than a head has channels, as in Wan
BATCH, FRAMES, SIDE = 2, 4, 12
TOKENS = FRAMES * (SIDE // 2) ** 2
PLANS = {"bidirectional": None, "block-causal": BlockCausal((1, 3))}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, FRAMES, 16, SIDE, SIDE, generator=rng)
    return (
        latents,
        torch.rand(BATCH, FRAMES, generator=rng),
        torch.randn(BATCH, SIZES.text_len, SIZES.text_dim, generator=rng),
    )


def gradients(transformer: WanTransformer, loss: Tensor) -> dict[str, Tensor]:
    transformer.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in transformer.named_parameters()}


# ------------------------------------------------------------------------------------------------------- the policy


def keeps(op, *args: Tensor) -> bool:
    return keep_attentions(None, op, *args) is CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize(
    "name",
    [
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    ],
)
def test_the_output_of_every_attention_kernel_is_kept(name):
    assert keeps(getattr(torch.ops.aten, name).default)


def test_flex_attention_and_all_to_alls_are_kept_and_products_are_not():
    from torch._higher_order_ops import flex_attention

    assert keeps(flex_attention) and keeps(torch.ops._c10d_functional.all_to_all_single.default)
    for op in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.gelu, torch.ops.aten._softmax):
        assert not keeps(op.default)
    assert not keeps(torch.ops._c10d_functional.all_gather_into_tensor.default)


@torch.library.custom_op("fvtitan_tests::probe", mutates_args=())
def probe(x: Tensor) -> Tensor:
    """A copy; counts how often it is made."""
    probe.runs += 1
    return x.clone()


probe.register_fake(torch.empty_like)
probe.register_autograd(lambda ctx, gradient: gradient)


@pytest.mark.slow
def test_attention_that_is_compiled_alone_is_kept(monkeypatch):
    """As FlexAttention is in an eager block on a GPU; here one that has a backward on a CPU. `full` runs it again, `selective`
    does not."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (probe(q), k, v))
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)

    compiled = torch.compile(attention, options=FLEX_OPTIONS)
    monkeypatch.setattr(network, "attend", lambda q, k, v, plan=None: compiled(q, k, v))
    transformer, found, runs = random_transformer(SIZES), {}, {}
    for mode in MODES:
        apply_ac(transformer, mode)
        probe.runs = 0
        found[mode] = gradients(transformer, transformer(*inputs()).square().mean())
        runs[mode] = probe.runs
    assert runs["selective"] == runs["none"] and runs["full"] == runs["none"] + 2 * SIZES.num_layers
    for name, gradient in found["none"].items():
        assert all((found[mode][name] - gradient).norm() <= 1e-5 * gradient.norm() for mode in MODES)


def test_of_attention_without_a_kernel_the_output_is_kept_and_the_scores_are_not():
    query, key, scores = torch.empty(2, 60, 32), torch.empty(2, 32, 50), torch.empty(2, 60, 50)
    assert not keeps(torch.ops.aten.bmm.default, query, key)
    assert keeps(torch.ops.aten.bmm.default, scores, key.mT)


# ----------------------------------------------------------------------------------- equal, and no names changed


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=["flash", "math"])
def test_gradients_are_bit_equal_and_dropout_is_drawn_once(kernel, plan):
    """Also with draws from the global generator in the block: its state is that of the first forward when it runs again."""
    transformer, found = random_transformer(SIZES), {}
    names = [name for name, _ in transformer.named_parameters()]
    for block in transformer.blocks:
        block.ffn.register_forward_hook(lambda module, args, out: torch.nn.functional.dropout(out, 0.5))
    for mode in MODES:
        apply_ac(transformer, mode)
        assert [name for name, _ in transformer.named_parameters()] == names
        torch.manual_seed(0)
        with sdpa_kernel(kernel):
            found[mode] = gradients(transformer, transformer(*inputs(), plan=plan).square().mean())
            torch.rand(7)  # what is drawn between forward and backward does not matter
    for mode in ("selective", "full"):
        for name, gradient in found["none"].items():
            assert gradient.norm() > 0 and torch.equal(found[mode][name], gradient), (mode, name)


# ------------------------------------------------------------------------------------------------------- memory


def kept_bytes(mode: str, num_layers: int) -> int:
    """What is alive after a forward with gradient and was not before."""
    transformer, arguments = random_transformer(dataclasses.replace(SIZES, num_layers=num_layers)), inputs()
    apply_ac(transformer, mode)
    transformer(*arguments)  # what is kept forever (RoPE tables) is made
    gc.collect()
    with LiveBytes() as live:
        views = [parameter.detach() for parameter in transformer.parameters()]
        before = live.now
        out = transformer(*arguments)
        gc.collect()
        kept = live.now - before
    del out, views
    return kept


def test_full_keeps_one_tensor_a_block_and_selective_three_and_the_log_sum_exps():
    tensor = BATCH * TOKENS * SIZES.dim * 4
    log_sum_exp = BATCH * TOKENS * SIZES.num_heads * 4  # of each attention
    slope = {mode: (kept_bytes(mode, 4) - kept_bytes(mode, 2)) / 2 for mode in MODES}
    assert slope["full"] == pytest.approx(tensor, rel=1e-3)
    assert slope["selective"] == pytest.approx(3 * tensor + 2 * log_sum_exp, rel=1e-3)
    assert slope["none"] > 20 * tensor


# -------------------------------------------------------------------------------------------------------- FLOPs


def test_full_computes_the_forward_again_and_selective_all_of_it_but_attention():
    """By FlopCounterMode with the math kernel, the only one it sees on a CPU, whose products are `bmm`."""
    forward, attention, backward = 0, 0, {}
    transformer = random_transformer(SIZES)
    for mode in MODES:
        apply_ac(transformer, mode)
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                loss = transformer(*inputs()).square().mean()
            with FlopCounterMode(display=False) as backward_counter:
                loss.backward()
        backward[mode] = backward_counter.get_total_flops()
        blocks = [counter.get_flop_counts()[f"WanTransformer.blocks.{i}"] for i in range(SIZES.num_layers)]
        forward = sum(sum(block.values()) for block in blocks)
        attention = sum(block[torch.ops.aten.bmm] for block in blocks)
    keys = TOKENS + SIZES.text_len
    assert attention == SIZES.num_layers * 4 * BATCH * TOKENS * keys * SIZES.dim
    scores = attention // 2  # the math kernel needs its probabilities again; a fused one has the log-sum-exps
    assert backward["full"] - backward["none"] == forward
    assert backward["selective"] - backward["none"] == forward - attention + scores


# --------------------------------------------------------------------------------------------------- collectives


class AllGathers(TorchDispatchMode):
    """Counts FSDP2's."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.c10d._allgather_base_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_gathered_for_what_is_computed_again(tmp_path, mode):
    """On a fake group of two: blocks and root once in forward and once in backward."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        cfg = small_config(make_cache(tmp_path / "cache"), tmp_path)
        transformer = random_transformer(SIZES)
        apply_ac(transformer, mode)
        apply_fsdp(transformer, Mesh(cfg, "cpu").parameters("student"), cfg, "student")
        with AllGathers() as forward:
            loss = transformer(*inputs()).square().mean()
        with AllGathers() as backward:
            loss.backward()
    finally:
        dist.destroy_process_group()
    assert (forward.count, backward.count) == (SIZES.num_layers + 1, SIZES.num_layers + 1)
