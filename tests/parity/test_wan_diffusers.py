"""Our transformer and diffusers' are the same function, and the adapter loses nothing."""

import functools
import json

import pytest
import torch
from safetensors import safe_open

from fvtitan.components.rng import generator
from fvtitan.errors import UserError
from fvtitan.models.wan import weights
from fvtitan.models.wan.adapter import (
    check_complete,
    config_from_diffusers,
    config_to_diffusers,
    diffusers_names,
    to_diffusers_tensor,
)
from fvtitan.models.wan.attention import apply_rope, rope_table
from fvtitan.models.wan.files import WEIGHTS_NAME, open_weights
from fvtitan.models.wan.transformer import FLAVORS, WanConfig, WanTransformer, init_parameter

SMALL = WanConfig(num_layers=2, num_heads=4, head_dim=32, ffn_dim=192, text_dim=48, text_len=20, freq_dim=64)


def reference(cfg: WanConfig, seed: int = 0):
    """diffusers' model with random weights, biases and norms included."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    kwargs = {key: value for key, value in config_to_diffusers(cfg).items() if key != "_class_name"}
    model = WanTransformer3DModel(**kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.0)
    return model


def ours_from(model, cfg: WanConfig) -> WanTransformer:
    state, ours = model.state_dict(), WanTransformer(cfg)
    names = diffusers_names(name for name, _ in ours.named_parameters())
    check_complete(names, state, "reference")
    ours.load_state_dict({n: state[names[n]].reshape(p.shape) for n, p in ours.named_parameters()})
    return ours


@pytest.fixture(scope="module")
def pair():
    model = reference(SMALL)
    return model, ours_from(model, SMALL)


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width"), [(1, 9, 8, 8), (2, 5, 6, 10), (3, 1, 2, 4), (1, 7, 14, 2), (2, 3, 10, 6)]
)
@pytest.mark.parametrize("per_frame", [False, True])
def test_velocity_equals_diffusers(pair, batch, frames, height, width, per_frame):
    model, ours = pair
    torch.manual_seed(frames)
    x, text = torch.randn(batch, frames, 16, height, width), torch.randn(batch, SMALL.text_len, SMALL.text_dim)
    sigma = torch.rand(batch, frames) if per_frame else torch.rand(batch, 1).expand(-1, frames)
    tokens = height * width // 4
    timestep = (1000 * sigma).repeat_interleave(tokens, dim=1) if per_frame else 1000 * sigma[:, 0]
    with torch.no_grad():
        expected = model(x.transpose(1, 2), timestep, text).sample.transpose(1, 2)
        actual = ours(x, sigma, text)
    assert expected.abs().max() > 1
    assert (actual - expected).abs().max() <= 5e-5
    with torch.no_grad():
        wrong = ours(x, (sigma + 0.01).clamp(max=1), text)
    assert (wrong - expected).abs().max() > 1e-3  # the comparison can fail


def test_gradients_equal_diffusers(pair):
    model, ours = pair
    torch.manual_seed(1)
    x, sigma, text = torch.randn(2, 3, 16, 4, 4), torch.rand(2, 1).expand(-1, 3), torch.randn(2, 20, 48)
    weight = torch.randn(2, 3, 16, 4, 4)
    (model(x.transpose(1, 2), 1000 * sigma[:, 0], text).sample.transpose(1, 2) * weight).sum().backward()
    (ours(x, sigma, text) * weight).sum().backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    for name, theirs_name in diffusers_names(n for n, _ in ours.named_parameters()).items():
        expected = theirs[theirs_name]
        actual = to_diffusers_tensor(name, ours.get_parameter(name).grad, SMALL)
        assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


def test_adapter_round_trip_is_bit_equal_and_complete(tmp_path):
    model = reference(SMALL, seed=3)
    ours = ours_from(model, SMALL)
    weights.save_transformer({n: p.detach() for n, p in ours.named_parameters()}, SMALL, tmp_path)
    from diffusers import WanTransformer3DModel

    reloaded, info = WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reloaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    assert config_from_diffusers(json.loads((tmp_path / "config.json").read_text()), 20, "x") == SMALL


@pytest.mark.parametrize("shards", [1, 3])
def test_loads_a_diffusers_folder(tmp_path, shards, single_process_group):
    model = reference(SMALL, seed=4)
    size = sum(t.numel() * 4 for t in model.state_dict().values())
    model.save_pretrained(tmp_path / "transformer", max_shard_size=size // shards + 4096)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) >= shards
    (tmp_path / "fvtitan.json").write_text('{"text_len": 20}')
    assert open_weights(str(tmp_path)).sizes == SMALL
    ours = WanTransformer(SMALL)
    weights.load_files(ours, open_weights(str(tmp_path)))
    weights.check_parameters(ours, "student", loaded=True)
    for name, theirs in diffusers_names(n for n, _ in ours.named_parameters()).items():
        expected = model.state_dict()[theirs]
        assert torch.equal(to_diffusers_tensor(name, ours.get_parameter(name).detach(), SMALL), expected), name


def test_wrong_weights_are_refused_by_name(tmp_path, single_process_group):
    model = reference(SMALL)
    model.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    from safetensors.torch import save_file

    ours = WanTransformer(SMALL)
    save_file({n: t for n, t in state.items() if n != "proj_out.bias"} | {"extra": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"missing 1 \(proj_out.bias\); left over 1 \(extra\)"):
        weights.load_files(ours, open_weights(str(tmp_path)))
    save_file(state | {"proj_out.bias": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="proj_out.bias has shape"):
        weights.load_files(ours, open_weights(str(tmp_path)))
    save_file(state | {"proj_out.weight": torch.zeros_like(state["proj_out.weight"])}, path)
    weights.load_files(ours, open_weights(str(tmp_path)))
    with pytest.raises(UserError, match=r"head.head.weight \(all zero\)"):
        weights.check_parameters(ours, "student", loaded=True)
    for value in (float("nan"), float("inf"), -float("inf")):
        save_file(state | {"proj_out.bias": torch.full_like(state["proj_out.bias"], value)}, path)
        weights.load_files(ours, open_weights(str(tmp_path)))
        with pytest.raises(UserError, match=r"head.head.bias \(not finite\)"):
            weights.check_parameters(ours, "student", loaded=True)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged safetensors"):
        weights.load_files(ours, open_weights(str(tmp_path)))
    path.unlink()
    with pytest.raises(UserError, match="no weights in"):
        weights.load_files(ours, open_weights(str(tmp_path)))


@pytest.mark.parametrize(("flavor", "count"), [("1.3B", 1_418_996_800), ("14B", 14_288_491_584)])
def test_parameter_counts(flavor, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in WanTransformer(FLAVORS[flavor]).parameters()) == count


def test_initialisation():
    values = {}
    with torch.device("meta"):
        model = WanTransformer(FLAVORS["tiny"])
    for name, parameter in model.named_parameters():
        values[name] = init_parameter(name, parameter.shape, FLAVORS["tiny"], functools.partial(generator, "cpu", 0))
        assert values[name].shape == parameter.shape
    assert values["head.head.weight"].abs().max() == 0
    assert values["blocks.0.self_attn.norm_q.weight"].eq(1).all()
    assert values["blocks.0.norm3.weight"].eq(1).all() and values["blocks.0.norm3.bias"].eq(0).all()
    gates = values["blocks.0.modulation"][0, [2, 5]]
    assert (
        abs(float(gates.mean()) - 1) < 0.05 and abs(float(values["blocks.0.modulation"][0, [0, 1, 3, 4]].mean())) < 0.05
    )
    bias = values["blocks.2.self_attn.q.bias"]
    assert torch.equal(bias, values["blocks.2.self_attn.k.bias"]) and values["blocks.2.self_attn.v.bias"].eq(0).all()
    assert not torch.equal(bias, values["blocks.1.self_attn.q.bias"])
    for name in ("blocks.1.self_attn.q.weight", "text_embedding.2.weight"):
        assert abs(float(values[name].std()) - (2 / sum(values[name].shape)) ** 0.5) < 1e-3


def test_fresh_queries_look_at_their_neighbourhood():
    """The biases alone attend most to the own place, and less to places farther off in time and in space."""
    cfg = FLAVORS["tiny"]
    bias = init_parameter(
        "blocks.0.self_attn.q.bias", torch.Size([cfg.dim]), cfg, functools.partial(generator, "cpu", 0)
    )
    tokens = bias.view(1, 1, cfg.num_heads, cfg.head_dim).expand(1, 5 * 4 * 4, -1, -1)
    turned = apply_rope(tokens, rope_table(5, 4, 4, cfg.head_dim, 0, torch.device("cpu"), torch.float32))
    score = torch.einsum("qhd,khd->hqk", turned[0], turned[0])
    assert score.argmax(2).eq(torch.arange(80)).all()
    frame, row, column = 16, 4, 1
    assert (score[:, 0, [0]] > score[:, 0, [frame, row, column]]).all()
    assert (score[:, 0, 0] - score[:, 0, column] > 1).any() and (score[:, 0, 0] - score[:, 0, frame] > 1).any()
