"""Where a pretrained pipeline lies: the shipped tiny one, a local folder in diffusers layout, or a hub repository."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fvtitan.errors import UserError

TINY_WAN = "tiny-wan"
DEFAULT_TEXT_LEN = 512
CONTRACT_NAME = "fvtitan.json"
"""What the layout of diffusers has no place for: the text length, and how the network must be sampled (fvtitan.contract)."""


def pipeline_folder(name: str, *components: str) -> Path:
    """The local folder of `name`, with the given component folders in it when it comes from the hub.

    `name` is "tiny-wan", a folder, or a hub id such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", which "@<commit, tag or branch>"
    pins (HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT are honoured; weights in safetensors, JSON and vocabularies are fetched, never
    code). Raises `UserError` when there is no such thing.
    """
    if name == TINY_WAN:
        from fvtitan.assets import tiny_wan_path

        return tiny_wan_path()
    if Path(name).is_dir():
        return Path(name)
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not hub:
        raise UserError(
            f"{name!r} is neither {TINY_WAN!r}, nor a folder, nor a hub id (owner/name or owner/name@revision)"
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    suffixes = ("*.json", "*.safetensors", "*.model", "*.txt")
    patterns = ["*.json"] + [f"{component}/{suffix}" for component in components for suffix in suffixes]
    if "transformer" in components:
        patterns.append("diffusion_pytorch_model*.safetensors")  # in the original layout it has no folder
    try:
        return Path(snapshot_download(hub[1], revision=hub[2], allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{name!r} is no folder here, and not in the hub's cache {constants.HF_HUB_CACHE}; HF_HUB_OFFLINE is set, so "
                "it is not fetched: unset it, or name a folder"
            ) from None
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name!r} is no folder here, and the hub did not give it: {reason}") from None


def pipeline_text_len(folder: Path) -> int:
    """Text tokens the pipeline's network sees: `text_len` of `<folder>/fvtitan.json`, else Wan's 512."""
    path = folder / CONTRACT_NAME
    if not path.is_file():
        return DEFAULT_TEXT_LEN
    try:
        text_len = json.loads(path.read_text(encoding="utf-8"))["text_len"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    if type(text_len) is not int or text_len < 1:
        raise UserError(f"{path}: text_len = {text_len!r}: need a whole number >= 1")
    return text_len


def pipeline_shift(folder: Path) -> float:
    """The timestep shift that the pipeline's scheduler has: `shift` (flow-match Euler) or `flow_shift` (UniPC)."""
    path = folder / "scheduler" / "scheduler_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the pipeline's shift from {path}: {error}") from None
    shift = config.get("shift", config.get("flow_shift"))
    if not isinstance(shift, int | float) or shift <= 0:
        raise UserError(f"{path}: need a positive shift or flow_shift, found {shift!r}")
    return float(shift)
