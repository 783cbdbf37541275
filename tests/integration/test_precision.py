"""What reaches the network under bf16 FSDP2, and that writes reach gathered parameters."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from fvtitan.components.ema import EMA, EMAConfig
from fvtitan.distributed.mesh import Mesh
from fvtitan.models import build_roles
from fvtitan.models.base import Conditioning
from fvtitan.models.wan import transformer as network
from tests.helpers import causal_recipe, make_cache, small_config


@pytest.fixture
def student(tmp_path, single_process_group, request):
    precision = getattr(request, "param", "bfloat16")
    cfg = small_config(make_cache(tmp_path / "cache"), tmp_path, training__mixed_precision_param=precision)
    model = build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu"))["student"]
    with torch.no_grad():  # the untrained output projection is zero
        weight = model.transformer.head.head.weight
        weight.to_local().normal_(generator=torch.Generator().manual_seed(0))
    return model


def inputs():
    rng = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 3, 16, 4, 4, generator=rng),
        torch.full((2, 3), 0.9375),
        Conditioning(torch.randn(2, 32, 64, generator=rng)),
    )


def test_sigma_and_rope_arrive_in_float32(student, monkeypatch):
    seen = {}
    embed = network.timestep_embedding
    monkeypatch.setattr(network, "timestep_embedding", lambda t, dim: seen.setdefault("t", t) is None or embed(t, dim))

    def spy(module, arguments):
        seen["x"], seen["modulation"], _, seen["rope"], *_ = arguments
        seen["weight"] = module.ffn[0].weight

    student.transformer.blocks[1].register_forward_pre_hook(spy)
    velocity = student.predict_velocity(*inputs())
    assert seen["t"].dtype == torch.float32 and seen["t"].eq(937.5).all()  # bf16 would make it 936
    assert seen["modulation"].dtype == torch.float32
    assert all(table.dtype == torch.float32 for table in seen["rope"])
    assert seen["x"].dtype == torch.bfloat16  # the matrix products do run in bf16
    assert velocity.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in student.transformer.parameters())  # master weights


def test_a_step_and_an_ema_swap_reach_a_gathered_student(student):
    """After a forward without gradient FSDP2 keeps the root gathered; writes must still change the output."""
    with torch.no_grad():
        before = student.predict_velocity(*inputs())
    ema = EMA(student, EMAConfig(enable=True, decay=0.5))
    optimizer = torch.optim.AdamW(student.transformer.parameters(), lr=1e-2)
    student.predict_velocity(*inputs()).square().mean().backward()
    with torch.no_grad():
        student.predict_velocity(*inputs())  # gathers the root again, as a rollout before the step would
    from fvtitan.distributed.utils import reshard

    reshard(student.transformer)
    optimizer.step()
    with torch.no_grad():
        after = student.predict_velocity(*inputs())
        assert (after - before).abs().max() > 1e-3
        with ema.swapped():
            averaged = student.predict_velocity(*inputs())
        assert torch.equal(averaged, before)  # the average still is the first model
        assert torch.equal(student.predict_velocity(*inputs()), after)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.1)])
def test_a_sharded_causal_student_streams(tmp_path, single_process_group, monkeypatch, precision, tolerance):
    """Under FSDP2 too a stream is the masked forward, its cache has the dtype of the computation, and gradients flow."""
    keys = {"training__mixed_precision_param": precision, "job__config_file": causal_recipe(tmp_path)}
    cfg = small_config(make_cache(tmp_path / "cache"), tmp_path, **keys)
    model = build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu"))["student"]
    with torch.no_grad():
        model.transformer.head.head.weight.to_local().normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    x, sigma, cond = inputs()
    times = []
    embed = network.timestep_embedding
    monkeypatch.setattr(network, "timestep_embedding", lambda t, dim: times.append(t) or embed(t, dim))
    zeros = torch.zeros(2, 2)
    with torch.no_grad():
        masked = model.predict_velocity(x, torch.cat([zeros, sigma[:, 2:]], 1), cond)
    cache = model.new_cache(x.shape)
    for frame in (0, 1):
        model.commit(x[:, frame : frame + 1], cond, cache, frame)
    assert {tensor.dtype for layer in cache.layers for tensor in vars(layer).values()} == {getattr(torch, precision)}
    out = model.predict_velocity_streaming(x[:, 2:], sigma[:, 2:], cond, cache, 2)
    assert out.dtype == torch.float32 and times[-1].eq(937.5).all() and times[-2].eq(0).all()
    assert masked.abs().max() > 1 and (out - masked[:, 2:]).abs().max() <= tolerance
    out.square().mean().backward()
    assert all(parameter.grad.to_local().norm() > 0 for parameter in model.transformer.parameters())


@pytest.mark.parametrize("student", ["float32"], indirect=True)
def test_ema_arithmetic(student):
    """e_n = d^n start + (1 - d) sum d^(n-j) theta_j; up to start_step the average is a copy."""
    ema = EMA(student, EMAConfig(enable=True, decay=0.9, start_step=2))
    name, parameter = next(iter(student.transformer.named_parameters()))
    expected = None
    for step in range(1, 8):
        with torch.no_grad():
            parameter.to_local().add_(step)
        ema.update(step)
        value = parameter.full_tensor().detach().clone()
        expected = value if step <= 2 else 0.9 * expected + 0.1 * value
    assert ema.num_updates == 5
    assert isinstance(ema.shadow[name], DTensor)
    torch.testing.assert_close(ema.shadow[name].full_tensor(), expected, atol=1e-6, rtol=1e-6)
