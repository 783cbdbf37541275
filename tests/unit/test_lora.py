"""LoRA adapters, roles that share one base, frozen roles on the CPU, and the optimizer's implementations."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fvtitan.components.ema import EMA, EMAConfig
from fvtitan.components.lora import (
    LoRAConfig,
    LoRALinear,
    adapter_parameters,
    add_adapter,
    base_parameters,
    initialise_adapter,
    merge_adapter,
)
from fvtitan.components.optimizer import OptimizerConfig, build_optimizer
from fvtitan.components.rng import generator
from fvtitan.config import JobConfig, load_config
from fvtitan.data.dataloader import BatchStream
from fvtitan.distributed.mesh import Mesh
from fvtitan.distributed.utils import local_tensor
from fvtitan.errors import UserError
from fvtitan.methods import METHODS
from fvtitan.models import build_roles
from fvtitan.models.base import Conditioning, ModelBase
from fvtitan.models.wan.transformer import WanConfig
from fvtitan.models.wan.weights import save_transformer
from tests.helpers import (
    SMALL,
    causal_model,
    dmd2_recipe,
    kd_recipe,
    make_cache,
    random_transformer,
    self_forcing_recipe,
    small_arguments,
    small_config,
)

SIZES = WanConfig(num_layers=2, num_heads=2, head_dim=16, ffn_dim=48, text_dim=64, text_len=32, freq_dim=32)
LORA = {"rank": 4, "alpha": 8.0}
SHARED = {"init_from": "", "share_base_with": "teacher", "lora": LORA}
OWN = {"lora": LORA}


def built(cfg: JobConfig, needed: list[str] | None = None) -> dict[str, ModelBase]:
    return build_roles(cfg, Mesh(cfg, "cpu"), torch.device("cpu"), needed)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with the weights of all roles."""
    folder = tmp_path_factory.mktemp("teacher")
    save_transformer(random_transformer(SIZES).state_dict(), SIZES, folder / "transformer")
    (folder / "fvtitan.json").write_text(json.dumps({"text_len": SIZES.text_len}))
    return str(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@torch.no_grad()
def stir(parameters, seed: int = 0) -> None:
    """Values for every parameter, so that an adapter does something."""
    for name, parameter in parameters.items():
        full = 0.1 * torch.randn(parameter.shape, generator=generator("cpu", seed, name))
        local_tensor(parameter).copy_(full)


def inputs(sizes=SMALL, dtype=torch.float32, frames: int = 3):
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(2, frames, sizes.in_channels, 4, 4, generator=rng)
    sigma = torch.rand(2, frames, generator=rng)
    text = torch.randn(2, sizes.text_len, sizes.text_dim, generator=rng)
    return latents.to(dtype), sigma.to(dtype), text.to(dtype)


# --------------------------------------------------------------------------------------------------------- the layer


def test_the_layer_is_the_papers():
    """W x + b + (alpha / rank) B A x, and gradients for A and B alone."""
    layer = nn.Linear(6, 5).requires_grad_(False)
    plain = copy.deepcopy(layer)
    adapted = LoRALinear(layer)
    adapted.add("student", LoRAConfig(rank=2, alpha=6.0))
    stir(adapter_parameters(nn.Sequential(adapted), "student"))
    a, b, x = adapted.lora_A["student"], adapted.lora_B["student"], torch.randn(3, 4, 6)
    expected = x @ (plain.weight + 3.0 * b @ a).T + plain.bias
    torch.testing.assert_close(adapted(x, "student"), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(adapted(x), plain(x)) and torch.equal(adapted(x, "critic"), plain(x))
    assert dict(adapted.named_parameters()).keys() == {"weight", "bias", "lora_A.student", "lora_B.student"}
    adapted(x, "student").sum().backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == {
        "lora_A.student",
        "lora_B.student",
    }


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (LoRAConfig().targets, 10),
        (("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"), 10),
        (("q", "to_v"), 4),
        (("ffn.net.2",), 1),
    ],
)
def test_targets_by_either_name(targets, layers):
    transformer = random_transformer()
    names = set(transformer.state_dict())
    add_adapter(transformer, "student", LoRAConfig(rank=2, targets=targets))
    assert len(adapter_parameters(transformer, "student")) == 2 * layers * SMALL.num_layers
    assert set(base_parameters(transformer)) == names  # loading, saving and export see the names that they know
    if layers == 1:
        assert set(adapter_parameters(transformer, "student")) == {
            f"blocks.{i}.ffn.2.lora_{m}" for i in range(SMALL.num_layers) for m in "AB"
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_off_is_the_base_and_merged_is_unmerged(dtype):
    """Bit for bit the base without an adapter, and with one that has not been trained; another's adapter changes nothing."""
    base = random_transformer(dtype=dtype)
    transformer, args = copy.deepcopy(base), inputs(dtype=dtype)
    cfg = LoRAConfig(rank=4, alpha=8.0)
    for adapter in ("student", "critic"):
        add_adapter(transformer, adapter, cfg)
        initialise_adapter(transformer, adapter, 0)
    transformer.to(dtype)
    plain = base(*args)
    assert torch.equal(transformer(*args), plain) and torch.equal(transformer(*args, adapter="student"), plain)
    stir(adapter_parameters(transformer, "critic"))
    stir(adapter_parameters(transformer, "student"), seed=1)
    assert torch.equal(transformer(*args), plain)
    unmerged = transformer(*args, adapter="student")
    assert (unmerged - plain).abs().mean() > 0.01 * plain.abs().mean()
    merged = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    merge_adapter(merged, adapter_parameters(transformer, "student"), cfg.scale)
    base.load_state_dict(merged)
    error = (base(*args) - unmerged).norm() / unmerged.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 1e-14)


def test_streaming_goes_through_the_adapter():
    """Every pass of a causal model: masked, with clean context, streaming, and what it leaves in the cache."""
    transformer = random_transformer()
    add_adapter(transformer, "student", LoRAConfig(rank=4))
    stir(adapter_parameters(transformer, "student"))
    merged = random_transformer()
    weights = dict(merged.named_parameters())
    with torch.no_grad():
        merge_adapter(weights, adapter_parameters(transformer, "student"), 1.0)
    ours, theirs = causal_model(transformer, 1), causal_model(merged, 1)
    ours.adapter = "student"
    (x, sigma, text), outs = inputs(), []
    for model in (ours, theirs):
        cond, zeros = Conditioning(text), torch.zeros(2, 3)
        with torch.no_grad():
            seen = [model.predict_velocity(x, sigma, cond)]
            seen += [model.predict_velocity_with_context(x, sigma, x, zeros, cond)]
            kv = model.new_cache(x.shape)
            model.commit(x[:, :1], cond, kv, 0)
            seen += [kv.layers[1].key[:, :4].clone(), kv.layers[1].text_value.clone()]
            seen += [model.predict_velocity_streaming(x[:, 1:2], sigma[:, 1:2], cond, kv, 1)]
        outs.append(seen)
    for found, expected in zip(*outs, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_an_adapter_starts_the_same_wherever_it_lies():
    """Drawn from (seed, role, layer): alone or beside others, on any rank; other roles start elsewhere."""
    alone, beside = random_transformer(), random_transformer()
    for transformer, adapters in ((alone, ["student"]), (beside, ["critic", "student"])):
        for adapter in adapters:
            add_adapter(transformer, adapter, LoRAConfig(rank=4))
            initialise_adapter(transformer, adapter, 3)
    ours, theirs = adapter_parameters(alone, "student"), adapter_parameters(beside, "student")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    critic = adapter_parameters(beside, "critic")
    for name, parameter in ours.items():
        if name.endswith("lora_B"):
            assert not parameter.any()
        else:
            bound = parameter.shape[1] ** -0.5
            assert 0.95 * bound < parameter.abs().max() <= bound and not torch.equal(parameter, critic[name])
    assert (
        len({parameter.flatten()[0].item() for name, parameter in ours.items() if name.endswith("A")}) == len(ours) // 2
    )


# ----------------------------------------------------------------------------------------------- roles that share


def shared_method(cache: Path, folder: Path, teacher: str, recipe=dmd2_recipe, **keys):
    models = {"student": SHARED, "critic": SHARED, "teacher": {"init_from": teacher}}
    cfg = small_config(cache, folder, job__config_file=recipe(folder, models), **keys)
    method = METHODS[cfg.method.name](cfg=cfg, role_models=built(cfg))
    method.on_train_start()
    for seed, role in enumerate(("student", "critic")):
        stir(method.role_models[role].trained_parameters(), seed)
    return method


def real_batch(method):
    return next(BatchStream(method.data, global_batch_size=2, local_batch_size=2, seed=0))


def gradients(model: ModelBase) -> dict[str, torch.Tensor]:
    return {n: p.grad.full_tensor().clone() for n, p in model.trained_parameters().items() if p.grad is not None}


@pytest.mark.parametrize(("recipe", "precision"), [(dmd2_recipe, "bfloat16"), (self_forcing_recipe, "float32")])
def test_one_network_for_three_roles(cache, teacher, tmp_path, single_process_group, recipe, precision):
    """One base in memory; gradients for the trained role's adapter alone; the teacher is what it would be alone."""
    method = shared_method(cache, tmp_path, teacher, recipe, training__mixed_precision_param=precision)
    student, frozen, critic = (method.role_models[role] for role in ("student", "teacher", "critic"))
    assert student.transformer is frozen.transformer is critic.transformer
    assert student.identity == critic.identity == frozen.identity != ""
    own, base = student.trained_parameters(), base_parameters(frozen.transformer)
    stored = sum(p.numel() * p.element_size() for p in frozen.transformer.parameters())
    width = 4 if precision == "float32" else 2
    assert {p.dtype for p in base.values()} == {getattr(torch, precision)}
    assert {p.dtype for p in own.values()} == {torch.float32}
    adapters = sum(p.numel() for p in own.values())
    assert stored == sum(p.numel() for p in base.values()) * width + 2 * 4 * adapters
    assert frozen.trained_parameters() == {} and own.keys() == critic.trained_parameters().keys()
    assert all(a is not b for a, b in zip(own.values(), critic.trained_parameters().values(), strict=True))

    for role, other in (("student", critic), ("critic", student)):
        loss, _ = method.single_train_step(real_batch(method), 1, role)
        loss.backward()
        model = method.role_models[role]
        found = gradients(model)
        assert found.keys() == own.keys() and all(g.norm() > 0 and g.dtype == torch.float32 for g in found.values())
        assert all(p.grad is None for p in [*base.values(), *other.trained_parameters().values()])
        method.optimizers[role].zero_grad()

    alone = built(method.cfg, ["teacher"])["teacher"]  # with adapters as they start
    plain = copy.deepcopy(method.cfg)
    for role in ("student", "critic"):
        del plain.models[role]
    bare = built(plain)["teacher"]
    assert not any(isinstance(module, LoRALinear) for module in bare.transformer.modules())
    x, sigma, text = inputs(bare.transformer.cfg)
    with torch.no_grad():
        velocities = [m.predict_velocity(x, sigma, Conditioning(text)) for m in (frozen, alone, bare)]
        assert torch.equal(velocities[0], velocities[2]) and torch.equal(velocities[1], velocities[2])
        assert not torch.equal(student.predict_velocity(x, sigma, Conditioning(text)), velocities[0])


@pytest.mark.parametrize(("recipe", "reshard"), [(dmd2_recipe, True), (self_forcing_recipe, False)])
def test_recomputation_uses_the_adapter_of_its_forward(cache, teacher, tmp_path, single_process_group, recipe, reshard):
    """A student's step asks critic and teacher between its forward and its backward: with full checkpointing, whose
    recomputation comes after them, the gradients are those without."""
    found = {}
    for mode in ("none", "full"):
        keys = {"activation_checkpoint__mode": mode, "parallelism__fsdp_reshard_after_forward": reshard}
        method = shared_method(cache, tmp_path, teacher, recipe, **keys)
        for role in ("student", "critic"):
            loss, _ = method.single_train_step(real_batch(method), 1, role)
            loss.backward()
            found[mode, role] = gradients(method.role_models[role])
    for role in ("student", "critic"):
        ours, expected = found["full", role], found["none", role]
        assert ours.keys() == expected.keys() and len(ours) == 40
        assert all(torch.equal(ours[name], gradient) for name, gradient in expected.items())


def test_the_order_in_the_recipe_does_not_matter(cache, teacher, tmp_path, single_process_group):
    models = {"student": SHARED, "critic": SHARED, "teacher": {"init_from": teacher}}
    cfg = small_config(cache, tmp_path, job__config_file=dmd2_recipe(tmp_path, models))
    assert list(cfg.models) == ["student", "teacher", "critic"]
    first = built(cfg)
    assert list(first) == ["student", "teacher", "critic"]
    cfg.models = {role: cfg.models[role] for role in ("critic", "teacher", "student")}
    second = built(cfg)
    for role in ("student", "critic"):
        ours, theirs = (roles[role].trained_parameters() for roles in (first, second))
        assert all(torch.equal(theirs[name].full_tensor(), p.full_tensor()) for name, p in ours.items())


def test_a_base_that_is_not_needed_itself_is_built(cache, teacher, tmp_path, single_process_group):
    """Knowledge distillation builds no teacher when its trajectories are there."""
    models = {"student": SHARED, "teacher": {"init_from": teacher}}
    cfg = small_config(cache, tmp_path / "run", job__config_file=kd_recipe(tmp_path, models))
    roles = built(cfg, ["student"])
    assert list(roles) == ["student"] and roles["student"].identity and roles["student"].trained_parameters()


def test_the_average_is_of_the_adapter(cache, teacher, tmp_path, single_process_group):
    """Its size, and swapped in for the student alone."""
    method = shared_method(cache, tmp_path, teacher)
    student, frozen, critic = (method.role_models[role] for role in ("student", "teacher", "critic"))
    ema = EMA(student, EMAConfig(enable=True, decay=0.5))
    assert ema.shadow.keys() == student.trained_parameters().keys()
    x, sigma, text = inputs(student.transformer.cfg)

    def velocities():
        with torch.no_grad():
            return [model.predict_velocity(x, sigma, Conditioning(text)) for model in (student, frozen, critic)]

    start = velocities()
    stir(student.trained_parameters(), seed=7)
    moved = velocities()
    with ema.swapped():
        averaged = velocities()
    assert torch.equal(averaged[0], start[0]) and not torch.equal(moved[0], start[0])
    for seen in (moved, averaged, velocities()):
        assert torch.equal(seen[1], start[1]) and torch.equal(seen[2], start[2])
    ema.update(1)
    name = next(iter(ema.shadow))
    expected = 0.5 * (start_value(name) + student.trained_parameters()[name].full_tensor())
    torch.testing.assert_close(ema.shadow[name].full_tensor(), expected.detach())


def start_value(name: str) -> torch.Tensor:
    """What `stir` gave the student's parameter in `shared_method`, of rank 4."""
    assert name == "blocks.0.self_attn.q.lora_A"
    return 0.1 * torch.randn(4, SIZES.dim, generator=generator("cpu", 0, name))


# ------------------------------------------------------------------------------------------------------ CPU offload


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_on_the_cpu_gives_the_same_numbers(
    cache, teacher, tmp_path, single_process_group, monkeypatch, precision
):
    policies = []
    shard = functools.partial(fully_shard)
    monkeypatch.setattr(
        "fvtitan.distributed.parallelize.fully_shard",
        lambda module, **keys: policies.append(type(keys["offload_policy"]).__name__) or shard(module, **keys),
    )
    losses, kinds = {}, {}
    for offload in (False, True):
        models = {role: {"init_from": teacher} for role in ("student", "teacher", "critic")}
        models["teacher"]["cpu_offload"] = offload
        recipe = dmd2_recipe(tmp_path, models)
        cfg = small_config(cache, tmp_path, job__config_file=recipe, training__mixed_precision_param=precision)
        policies.clear()
        roles = built(cfg)
        kinds[offload] = set(policies)
        assert {local_tensor(p).device.type for p in roles["teacher"].transformer.parameters()} == {"cpu"}
        method = METHODS["dmd2"](cfg=cfg, role_models=roles)
        method.on_train_start()
        loss, _ = method.student_step(real_batch(method), 1)
        loss.backward()
        losses[offload] = (loss.detach(), gradients(roles["student"]))
    assert kinds == {False: {"OffloadPolicy"}, True: {"OffloadPolicy", "CPUOffloadPolicy"}}
    assert torch.equal(losses[True][0], losses[False][0])
    assert all(torch.equal(losses[True][1][name], gradient) for name, gradient in losses[False][1].items())


# ------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"student": {"lora": {"rank": -1}}}, r"models\.student\.lora\.rank = -1: must be >= 1, or 0"),
        ({"student": {"lora": {"rank": 4, "alpha": 0.0}}}, r"models\.student\.lora\.alpha = 0\.0: must be > 0"),
        (
            {"student": {"lora": {"alpha": 4.0}}},
            r"models\.student\.lora: alpha and targets have no effect with rank = 0",
        ),
        ({"student": {"lora": {"targets": ["q"]}}}, "alpha and targets have no effect"),
        ({"student": {"lora": {"rank": 4, "targets": []}}}, r"lora\.targets is empty"),
        (
            {"student": {"lora": {"rank": 4, "targets": ["q", "to_qq"]}}},
            r"models\.student\.lora\.targets: 'to_qq' is not a layer\. Did you mean 'to_q'",
        ),
        ({"teacher": {"lora": LORA}}, r"models\.teacher\.lora\.rank = 4 has no effect with trainable = false"),
        (
            {"student": {"init_from": "", "flavor": "tiny", "lora": LORA}},
            r"models\.student\.lora\.rank = 4: an adapter needs weights to lie on",
        ),
        ({"student": {"dtype": "bfloat16"}}, r"models\.student\.dtype = 'bfloat16': the weights of a trained role"),
        ({"student": {**SHARED, "lora": {}}}, r"share_base_with = 'teacher': only an adapter can share"),
        ({"student": {**SHARED, "share_base_with": "techer"}}, r"there is no such role\. Did you mean 'teacher'"),
        ({"student": {**SHARED, "share_base_with": "critic"}}, r"share_base_with = 'critic': is trained"),
        (
            {"student": {**SHARED, "share_base_with": "student"}},
            r"share_base_with = 'student': has no network of its own",
        ),
        (
            {"critic": SHARED, "student": {**SHARED, "share_base_with": "critic"}},
            r"share_base_with = 'critic': has no network of its own",
        ),
        ({"student": {**SHARED, "init_from": "tiny-wan"}}, r"models\.student\.init_from = 'tiny-wan' has no effect"),
        (
            {"student": {**SHARED, "flavor": "tiny"}},
            r"models\.student\.flavor = 'tiny' has no effect: the network is that",
        ),
        ({"student": {**SHARED, "dtype": "float32"}}, r"models\.student\.dtype = 'float32' has no effect"),
        ({"student": {**SHARED, "init_weights": "raw"}}, r"models\.student\.init_weights = 'raw' has no effect"),
        ({"student": {**SHARED, "cpu_offload": True}}, r"models\.student\.cpu_offload = True has no effect"),
        (
            {"student": SHARED, "teacher": {"init_from": "", "flavor": "tiny"}},
            r"an adapter needs weights to lie on; give models\.teacher\.init_from",
        ),
        (
            {"student": SHARED, "teacher": {"cpu_offload": True}},
            r"models\.teacher\.cpu_offload = true: 'student' trains an adapter on it",
        ),
        ({"student": {"cpu_offload": True}}, r"models\.student\.cpu_offload = true: only the weights of frozen roles"),
        ({"student": {**OWN, "cpu_offload": True}}, r"models\.student\.cpu_offload = true: only the weights of frozen"),
        (
            {"teacher": {"cpu_offload": True, "parallelism": {"fsdp_reshard_after_forward": False}}},
            r"models\.teacher\.cpu_offload = true has no effect with fsdp_reshard_after_forward = false",
        ),
    ],
)
def test_contradictions_are_errors_at_the_start(cache, tmp_path, models, message):
    with pytest.raises(UserError, match=message):
        load_config(small_arguments(cache, tmp_path, job__config_file=dmd2_recipe(tmp_path, models)))


def test_dtypes_under_an_adapter(cache, tmp_path):
    models = {"student": SHARED, "critic": {**OWN, "dtype": "float32"}, "teacher": {"dtype": "bfloat16"}}
    cfg = small_config(cache, tmp_path, job__config_file=dmd2_recipe(tmp_path, models))
    dtypes = {role: cfg.role_dtypes(role) for role in cfg.models}
    assert dtypes == {
        "student": ("bfloat16", "bfloat16"),
        "teacher": ("bfloat16", "bfloat16"),
        "critic": ("float32", "float32"),
    }
    assert cfg.adapters_on("teacher") == ["student"] and cfg.adapters_on("critic") == ["critic"]


# -------------------------------------------------------------------------------------------------------- optimizer


def test_the_optimizers_implementations_agree(single_process_group):
    """Fused, foreach and for-loop AdamW on sharded parameters, given the same gradients: the same steps."""
    mesh, found = init_device_mesh("cpu", (1,)), {}
    for implementation in ("fused", "foreach", "for-loop"):
        network = nn.Sequential(nn.Linear(24, 16), nn.LayerNorm(16))
        fully_shard(network, mesh=mesh)
        parameters = dict(network.named_parameters())
        stir(parameters)
        cfg = OptimizerConfig(lr=1e-2, weight_decay=0.1, implementation=implementation)
        optimizer = build_optimizer(parameters, cfg)
        assert optimizer.defaults["fused"] == (implementation == "fused")
        assert optimizer.defaults["foreach"] == (implementation == "foreach")
        for step in range(6):
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            stir({name: parameter.grad for name, parameter in parameters.items()}, seed=step + 1)
            optimizer.step()
        assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
        found[implementation] = {name: parameter.full_tensor().detach() for name, parameter in parameters.items()}
    for name, expected in found["for-loop"].items():
        start = 0.1 * torch.randn(expected.shape, generator=generator("cpu", 0, name))
        assert (expected - start).abs().max() > 1e-2
        for implementation in ("fused", "foreach"):
            assert (found[implementation][name] - expected).abs().max() <= 1e-6, (implementation, name)
