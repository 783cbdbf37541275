"""Wan weights and configs <-> diffusers' WanTransformer3DModel, complete in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Size, Tensor

from fvtitan.errors import UserError, did_you_mean
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
            return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else "none"

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
        return WanConfig(
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
    except KeyError as error:
        raise UserError(f"{where}: the key {error} is missing") from None


def flavor_config(flavor: str, key: str) -> WanConfig:
    """The sizes of a named flavor; `key` is the config key that names it, for the error."""
    if flavor not in FLAVORS:
        raise UserError(f"{key} = {flavor!r} is not a Wan flavor.{did_you_mean(flavor, FLAVORS)}")
    return FLAVORS[flavor]
