"""Wan weights and configs <-> diffusers' WanTransformer3DModel, complete in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import Size, Tensor

from fvtitan.errors import UserError, did_you_mean, listed
from fvtitan.models.wan.transformer import FLAVORS, WanConfig

# (ours, diffusers). norm2 <-> norm3 are swapped between the two; ours has no parameters in norm1 and norm2.
_NAMES = (
    (r"self_attn\.(q|k|v)\.", r"attn1.to_\1."),
    (r"self_attn\.o\.", "attn1.to_out.0."),
    (r"self_attn\.norm_", "attn1.norm_"),
    (r"cross_attn\.(q|k|v)\.", r"attn2.to_\1."),
    (r"cross_attn\.o\.", "attn2.to_out.0."),
    (r"cross_attn\.norm_", "attn2.norm_"),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
)


def to_diffusers_name(name: str) -> str:
    """diffusers' name of one of our parameters."""
    for pattern, replacement in _NAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def diffusers_names(names: Iterable[str]) -> dict[str, str]:
    """`{our name: diffusers' name}` for all of a model's parameters; one to one."""
    mapping = {name: to_diffusers_name(name) for name in names}
    assert len(set(mapping.values())) == len(mapping)
    return mapping


def check_complete(ours: dict[str, str], available: Iterable[str], where: str) -> None:
    """Raise a `UserError` unless the file's names are exactly those that the model needs."""
    available = set(available)
    missing, left_over = sorted(set(ours.values()) - available), sorted(available - set(ours.values()))
    if missing or left_over:

        def show(names: list[str]) -> str:
            return f"{len(names)} ({listed(names)})" if names else "none"

        raise UserError(f"{where} does not fit the model: missing {show(missing)}; left over {show(left_over)}")


def to_diffusers_tensor(name: str, tensor: Tensor, cfg: WanConfig) -> Tensor:
    """Our tensor in diffusers' shape: only the patch embedding differs (Conv3d)."""
    if name == "patch_embedding.weight":
        return tensor.reshape(tensor.shape[0], cfg.in_channels, *cfg.patch_size)
    return tensor


def diffusers_shape(name: str, shape: Size, cfg: WanConfig) -> tuple[int, ...]:
    """diffusers' shape of our parameter `name`."""
    if name == "patch_embedding.weight":
        return (shape[0], cfg.in_channels, *cfg.patch_size)
    return tuple(shape)


def config_to_diffusers(cfg: WanConfig) -> dict[str, Any]:
    """The `transformer/config.json` of diffusers' WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": list(cfg.patch_size),
        "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "text_dim": cfg.text_dim,
        "freq_dim": cfg.freq_dim,
        "ffn_dim": cfg.ffn_dim,
        "num_layers": cfg.num_layers,
        "cross_attn_norm": cfg.cross_attn_norm,
        "qk_norm": "rms_norm_across_heads",
        "eps": cfg.eps,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def config_from_diffusers(config: dict[str, Any], text_len: int, where: str) -> WanConfig:
    """Our config from a diffusers `config.json`. Raises for what this network cannot do (image-to-video, other norms)."""
    if config.get("_class_name") != "WanTransformer3DModel":
        raise UserError(f"{where}: _class_name is {config.get('_class_name')!r}, need 'WanTransformer3DModel'")
    for key, allowed in (
        ("qk_norm", "rms_norm_across_heads"),
        ("image_dim", None),
        ("added_kv_proj_dim", None),
        ("pos_embed_seq_len", None),
    ):
        if config.get(key, allowed) != allowed:
            raise UserError(f"{where}: {key} = {config[key]!r} is not supported (text-to-video has {allowed!r})")
    try:
        sizes = WanConfig(
            num_layers=config["num_layers"],
            num_heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            ffn_dim=config["ffn_dim"],
            text_dim=config["text_dim"],
            text_len=text_len,
            freq_dim=config["freq_dim"],
            in_channels=config["in_channels"],
            out_channels=config["out_channels"] or config["in_channels"],
            patch_size=tuple(config["patch_size"]),
            cross_attn_norm=config["cross_attn_norm"],
            eps=config["eps"],
        )
    except (KeyError, TypeError) as error:
        raise _bad_config(where, error) from None
    _check_sizes(sizes, where)
    return sizes


def config_to_original(cfg: WanConfig) -> dict[str, Any]:
    """The `config.json` of the original WanModel."""
    return {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "patch_size": list(cfg.patch_size),
        "text_len": cfg.text_len,
        "in_dim": cfg.in_channels,
        "dim": cfg.dim,
        "ffn_dim": cfg.ffn_dim,
        "freq_dim": cfg.freq_dim,
        "text_dim": cfg.text_dim,
        "out_dim": cfg.out_channels,
        "num_heads": cfg.num_heads,
        "num_layers": cfg.num_layers,
        "window_size": [-1, -1],
        "qk_norm": True,
        "cross_attn_norm": cfg.cross_attn_norm,
        "eps": cfg.eps,
    }


def config_from_original(config: dict[str, Any], where: str) -> WanConfig:
    """Our config from that of the original WanModel, whose defaults may be left out. Raises for what this network cannot do."""
    for key, allowed in (("model_type", "t2v"), ("window_size", [-1, -1]), ("qk_norm", True)):
        if config.get(key, allowed) != allowed:
            raise UserError(f"{where}: {key} = {config[key]!r} is not supported (text-to-video has {allowed!r})")
    try:
        heads = config["num_heads"]
        head_dim, rest = divmod(config["dim"], heads)
        if rest:
            raise UserError(f"{where}: dim = {config['dim']} does not divide into num_heads = {heads}")
        sizes = WanConfig(
            num_layers=config["num_layers"],
            num_heads=heads,
            head_dim=head_dim,
            ffn_dim=config["ffn_dim"],
            text_dim=config.get("text_dim", 4096),
            text_len=config.get("text_len", 512),
            freq_dim=config.get("freq_dim", 256),
            in_channels=config.get("in_dim", 16),
            out_channels=config.get("out_dim", 16),
            patch_size=tuple(config.get("patch_size", (1, 2, 2))),
            cross_attn_norm=config.get("cross_attn_norm", True),
            eps=config.get("eps", 1e-6),
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise _bad_config(where, error) from None
    _check_sizes(sizes, where)
    return sizes


def _bad_config(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: the key {error} is missing" if isinstance(error, KeyError) else f"{where}: {error}")


def _check_sizes(sizes: WanConfig, where: str) -> None:
    """What is no network at all, from a damaged file."""
    patch, numbers = sizes.patch_size, [f.name for f in fields(sizes) if f.type == "int"]
    for name in numbers:
        value, most = getattr(sizes, name), 1000 if name == "num_layers" else 2**20
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(f"{where}: {name} = {value!r}: need a whole number from 1 to {most}")
    if len(patch) != 3 or not all(type(size) is int and size >= 1 for size in patch):
        raise UserError(f"{where}: patch_size = {list(patch)}: need three whole numbers, (frames, height, width)")
    if type(sizes.cross_attn_norm) is not bool or type(sizes.eps) is not float or not sizes.eps > 0:
        raise UserError(
            f"{where}: cross_attn_norm = {sizes.cross_attn_norm!r}, eps = {sizes.eps!r}: need true or false, and a number > 0"
        )


def flavor_config(flavor: str, key: str) -> WanConfig:
    """The sizes of a named flavor; `key` is the config key that names it, for the error."""
    if flavor not in FLAVORS:
        raise UserError(f"{key} = {flavor!r} is not a Wan flavor.{did_you_mean(flavor, FLAVORS)}")
    return FLAVORS[flavor]
