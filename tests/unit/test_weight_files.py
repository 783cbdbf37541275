"""Weights in: every dialect gives the same network, and what is damaged, foreign or half there is one error before anything
is allocated."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fvtitan.assets import tiny_wan_path
from fvtitan.config import RoleConfig
from fvtitan.contract import contract_of
from fvtitan.errors import UserError
from fvtitan.models.pipeline import CONTRACT_NAME, pipeline_folder
from fvtitan.models.wan import weights
from fvtitan.models.wan.adapter import config_to_original
from fvtitan.models.wan.files import (
    WEIGHTS_NAME,
    TensorSpec,
    open_weights,
    parameter_shapes,
    write_safetensors,
)
from fvtitan.models.wan.transformer import FLAVORS, WanTransformer
from tests.helpers import SMALL, random_transformer, small_config

TINY = FLAVORS["tiny"]


@functools.cache
def original(seed: int = 0, sizes=TINY) -> dict[str, Tensor]:
    """A random network under the original names, with the convolution that they have."""
    tensors = {name: p.detach() for name, p in random_transformer(sizes, seed=seed).named_parameters()}
    patch = tensors["patch_embedding.weight"]
    return tensors | {"patch_embedding.weight": patch.reshape(patch.shape[0], sizes.in_channels, *sizes.patch_size)}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def wrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As FSDP1 names them."""
    return {
        f"model._fsdp_wrapped_module.{name.replace('.self_attn.', '._fsdp_wrapped_module.self_attn.')}": tensor
        for name, tensor in tensors.items()
    }


def diffusers_file(folder: Path) -> Path:
    return Path(shutil.copy(tiny_wan_path() / "transformer" / WEIGHTS_NAME, folder / "model.safetensors"))


def check_loaded(source: Path | str, expected: dict[str, Tensor], sizes=TINY, **options) -> None:
    files = open_weights(str(source), **options)
    assert files.sizes == sizes
    transformer = WanTransformer(sizes)
    weights.load_files(transformer, files)
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter.detach(), expected[name].reshape(parameter.shape).float()), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_a_file_of_original_names(prefix, tmp_path):
    tensors = original()
    save_file(prefixed(tensors, prefix), tmp_path / "wan.safetensors")
    check_loaded(tmp_path / "wan.safetensors", tensors)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_of_the_original_layout(shards, tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in original(sizes=SMALL).items()}
    (tmp_path / "config.json").write_text(json.dumps(config_to_original(SMALL)))
    names, index = sorted(tensors), {}
    for shard in range(shards):
        file = WEIGHTS_NAME if shards == 1 else f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, tmp_path / file)
        index |= dict.fromkeys(names[shard::shards], file)
    if shards > 1:
        (tmp_path / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"weight_map": index}))
    check_loaded(tmp_path, tensors, SMALL)


def test_a_file_of_diffusers_names(tmp_path):
    """Alone, its sizes are a flavor's; where it lies, config.json and fvtitan.json say them."""
    _, expected = weights.read_pipeline("tiny-wan")
    check_loaded(diffusers_file(tmp_path), expected)
    check_loaded(tiny_wan_path() / "transformer" / WEIGHTS_NAME, expected)
    check_loaded(tiny_wan_path() / "transformer", expected)


@pytest.mark.parametrize("names", [lambda t: prefixed(t, "model."), wrapped, lambda t: t])
def test_self_forcing_and_causvid_files(names: Callable, tmp_path):
    raw, averaged = original(0), original(1)
    torch.save({"generator": names(raw), "generator_ema": names(averaged), "step": 3}, tmp_path / "model.pt")
    check_loaded(tmp_path / "model.pt", averaged)
    check_loaded(tmp_path / "model.pt", averaged, weights="ema")
    check_loaded(tmp_path / "model.pt", raw, weights="raw")
    hashes = {
        weights.weights_hash(RoleConfig(init_from=str(tmp_path / "model.pt"), init_weights=which))
        for which in ("auto", "ema", "raw")
    }
    assert len(hashes) == 2  # which of the two is part of the identity
    torch.save({"generator": names(raw)}, tmp_path / "ode_init.pt")
    check_loaded(tmp_path / "ode_init.pt", raw)
    torch.save(names(raw), tmp_path / "flat.pt")
    check_loaded(tmp_path / "flat.pt", raw)
    with pytest.raises(UserError, match="holds generator; need generator_ema"):
        open_weights(str(tmp_path / "ode_init.pt"), "ema")
    with pytest.raises(UserError, match="one network, not generator and generator_ema: remove init_weights = 'raw'"):
        open_weights(str(tmp_path / "flat.pt"), "raw")


def test_init_weights_is_for_what_has_several(tmp_path):
    torch.save({"generator": original(0), "generator_ema": original(1)}, tmp_path / "model.pt")
    assert weights.role_sizes(RoleConfig(init_from=str(tmp_path / "model.pt"), init_weights="raw"), "student") == TINY
    with pytest.raises(UserError, match=r"models.student.init_weights = 'raw' has no effect"):
        weights.role_sizes(RoleConfig(init_from="tiny-wan", init_weights="raw"), "student")
    with pytest.raises(UserError, match=r"models.student.init_role = 'critic' has no effect"):
        weights.role_sizes(RoleConfig(init_from=str(tmp_path / "model.pt"), init_role="critic"), "student")


def changed(**changes: Tensor | None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        tensors = {**original(), **{name.replace("__", "."): value for name, value in changes.items()}}
        save_file({n: t.clone() for n, t in tensors.items() if t is not None}, folder / "wan.safetensors")
        return folder / "wan.safetensors"

    return make


def saved(content: object, **options: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content() if callable(content) else content, folder / "model.pt", **options)
        return folder / "model.pt"

    return make


MARKER = Path(tempfile.gettempdir()) / f"fvtitan-{os.getpid()}-unpickled"


class Code:
    """Whoever unpickles it has run it."""

    def __reduce__(self):
        return (Path.touch, (MARKER,))


def cut(folder: Path) -> Path:
    path = changed()(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def cut_pt(folder: Path) -> Path:
    path = saved(original)(folder)
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def with_config(**changes: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file(original(), folder / WEIGHTS_NAME)
        config = config_to_original(TINY) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return make


def with_index(**weight_map: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with_config()(folder)
        (folder / WEIGHTS_NAME).rename(folder / "a.safetensors")
        names = {**dict.fromkeys(original(), "a.safetensors"), **weight_map}
        (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"weight_map": names}))
        return folder

    return make


def text(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (with_config()(folder) / name).write_text(content)
        return folder

    return make


def described(content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        shutil.copytree(tiny_wan_path() / "transformer", folder / "transformer")
        (folder / CONTRACT_NAME).write_text(content)
        return folder

    return make


def legacy_pickle(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(pickle.dumps({"generator": Code()}))
    return folder / "model.pt"


BAD = {
    "missing and extra": (
        changed(head__head__bias=None, extra=torch.zeros(1)),
        r"does not fit the model: missing 1 \(head.head.bias\); left over 1 \(extra\)",
    ),
    "many missing": (
        changed(**{f"extra{i}": torch.zeros(1) for i in range(30)}),
        r"left over 30 \(extra0, .* and 10 more\)",
    ),
    "shape": (changed(head__head__bias=torch.zeros(3)), r"head.head.bias has shape \[3\], the model needs \[64\]"),
    "fp8": (
        changed(head__head__bias=torch.zeros(64, dtype=torch.float8_e4m3fn)),
        r"head.head.bias has dtype F8_E4M3, need one of F64, F32, F16, BF16",
    ),
    "integers": (changed(head__head__bias=torch.zeros(64, dtype=torch.int32)), r"head.head.bias has dtype I32"),
    "cut": (cut, "damaged safetensors file"),
    "image to video": (changed(**{"blocks.0.cross_attn.k_img.weight": torch.zeros(1)}), "an image-to-video network"),
    "lora": (changed(**{"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1)}), "a LoRA file, not a network"),
    "foreign": (lambda f: Path(shutil.copy(tiny_wan_path() / "vae" / WEIGHTS_NAME, f)), "not a Wan transformer"),
    "no flavor": (changed(blocks__0__ffn__0__weight=torch.zeros(100, 128)), "the sizes of no flavor"),
    "pt cut": (cut_pt, r"model.pt: refused, or damaged"),
    "pt with code": (saved({"generator": Code()}), r"model.pt: refused, or damaged"),
    "pt of code alone": (legacy_pickle, "damaged safetensors file"),
    "old pt": (saved(original, _use_new_zipfile_serialization=False), "damaged safetensors file"),
    "pt of something else": (saved({"epoch": 3}), r"holds epoch; need generator_ema or generator"),
    "pt of a tensor": (saved(torch.zeros(3)), "holds a Tensor, not a dictionary"),
    "pt with a number": (saved(lambda: {**original(), "step": 3}), "'step' is not a tensor"),
    "pt twice": (saved(lambda: {**original(), "model.head.head.bias": torch.zeros(64)}), "left over 1"),
    "config of a list": (text("config.json", "[]"), "it holds no object"),
    "config cut": (text("config.json", "{"), "cannot read"),
    "config of another class": (with_config(_class_name="FluxTransformer2DModel"), "_class_name is 'Flux"),
    "config without layers": (with_config(num_layers=None), "the key 'num_layers' is missing"),
    "config of words": (with_config(num_layers="many"), "num_layers = 'many': need a whole number"),
    "config too large": (with_config(num_layers=10**9), "num_layers = 1000000000: need a whole number from 1 to 1000"),
    "config of i2v": (with_config(model_type="i2v"), "model_type = 'i2v' is not supported"),
    "config with odd heads": (with_config(num_heads=3), "dim = 128 does not divide into num_heads = 3"),
    "config of another size": (with_config(ffn_dim=256), "tensors do not fit: blocks.0.ffn.0.weight has shape"),
    "index to elsewhere": (with_index(extra="../b.safetensors"), "names b.safetensors, which is not in"),
    "index of a lost file": (with_index(extra="b.safetensors"), "names b.safetensors, which is not in"),
    "index of a lost tensor": (with_index(extra="a.safetensors"), "'extra' is not in it: the files of"),
    "index of numbers": (with_index(extra=3), "damaged index"),
    "index cut": (text(f"{WEIGHTS_NAME}.index.json", "{"), "damaged index"),
    "text length": (described('{"text_len": 0}'), "text_len = 0: need a whole number >= 1"),
    "described in no JSON": (described("{"), "fvtitan.json is damaged"),
    "no weights": (
        lambda f: with_config()(f).joinpath(WEIGHTS_NAME).rename(f / "x.safetensors").parent,
        "to read x.saf",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_one_error_before_anything_is_allocated(case, tmp_path):
    make, message = BAD[case]
    source = str(make(tmp_path))
    with pytest.raises(UserError, match=message):
        weights.role_sizes(RoleConfig(init_from=source), "student")
    assert not MARKER.exists()


def test_a_wrong_shape_writes_nothing(tmp_path):
    """The last tensor does not fit: no parameter has changed."""
    transformer = random_transformer(TINY, seed=2)
    before = {name: p.detach().clone() for name, p in transformer.named_parameters()}
    with pytest.raises(UserError, match="head.modulation has shape"):
        weights.load_files(transformer, open_weights(str(changed(head__modulation=torch.zeros(2))(tmp_path))))
    assert all(torch.equal(p.detach(), before[name]) for name, p in transformer.named_parameters())


def test_an_export_under_another_shift_is_refused(tmp_path, single_process_group):
    """What a student learned at a timestep is not what a run of another shift asks for; as for checkpoints."""
    pipeline = shutil.copytree(tiny_wan_path(), tmp_path / "export")
    cfg = small_config(tmp_path / "cache", tmp_path / "run", **{"schedule__shift": 5.0})
    (pipeline / CONTRACT_NAME).write_text(contract_of(cfg, 32).to_json())
    cfg.models["student"].init_from = str(pipeline)
    load = (WanTransformer(TINY), cfg.models["student"], cfg, "models.student.init_from")
    weights.load_weights(*load)
    cfg.schedule.shift = 3.0
    with pytest.raises(UserError, match=r"models.student.init_from = .* schedule.shift = 5, this run has 3"):
        weights.load_weights(*load)


def hub_cache(folder: Path, name: str) -> None:
    """A repository as huggingface_hub keeps it."""
    repository = folder / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_wan_path(), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)


def test_a_hub_id_offline(tmp_path, monkeypatch):
    """What is in the cache is used; what is not names the variable that keeps it from being fetched."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub_cache(tmp_path, "someone/tiny-wan")
    assert open_weights("someone/tiny-wan").sizes == TINY
    assert pipeline_folder("someone/tiny-wan", "vae").is_relative_to(tmp_path)
    with pytest.raises(UserError, match=r"'someone/else' .* HF_HUB_OFFLINE is set"):
        open_weights("someone/else")


def test_what_is_written_is_what_safetensors_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "c": torch.randn(1, 2, 2), "b": torch.randn(7).bfloat16()}
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_safetensors(tmp_path / "x.safetensors", specs, tensors.values(), {"format": "pt", "é": "ü"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], t) for name, t in tensors.items())
    with pytest.raises(ValueError):
        write_safetensors(tmp_path / "y.safetensors", specs, list(tensors.values())[:2], {})


def test_shapes_are_the_networks_own():
    assert parameter_shapes(TINY).keys() == dict(WanTransformer(TINY).named_parameters()).keys()
