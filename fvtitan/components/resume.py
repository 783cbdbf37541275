"""What may differ between a checkpoint's configuration and that of the run that goes on from it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvtitan.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fvtitan.config import JobConfig

# How a run is executed and watched, not what it learns; and what is checked by its content instead (data, seed and batch by the
# loader, a teacher by its hash; initial weights have been used up).
RUNTIME = re.compile(
    r"(job|parallelism|activation_checkpoint|compile|checkpoint|validation|metrics|comm)\..*"
    r"|training\.(steps|local_batch_size|global_batch_size|seed|deterministic|gc_freq|nonfinite|max_nonfinite_skips)"
    r"|data\.(path|pipeline|num_workers|moving_shapes_clips)"
    r"|models\.\w+\.(flavor|init_from|init_role|init_weights|attention_backend|share_base_with|cpu_offload|parallelism\..*)"
    r"|optimizer\.implementation"
    r"|method\.(teacher_path_cache|batched_guidance|gradient_mode)"
)


def changed_keys(saved: JobConfig, current: JobConfig) -> dict[str, tuple[Any, Any]]:
    """`{key: (saved, current)}` of the keys that decide what is learned and differ."""
    before, now = flattened(dataclasses.asdict(saved)), flattened(dataclasses.asdict(current))
    optional = saved.models.keys() ^ current.models.keys()  # a teacher whose trajectories are all made
    return {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not RUNTIME.fullmatch(key)
        and not (key.startswith("models.") and key.split(".")[1] in optional)
    }


def check_changes(source: Path, current: JobConfig, allowed: Collection[str]) -> list[str]:
    """Lines about the changes that `allowed` permits. Raises `UserError` that lists the others, with both values, and for an
    allowed key that is none."""
    from fvtitan.config import read_toml

    known = flattened(dataclasses.asdict(current))
    for key in allowed:
        if key not in known:
            raise UserError(f"checkpoint.allow_changed: {key!r} is not a key of this run.{did_you_mean(key, known)}")
    changes = changed_keys(read_toml(source / "config.toml"), current)
    refused = [f"{key} = {old!r} (now {new!r})" for key, (old, new) in changes.items() if key not in allowed]
    if refused:
        raise UserError(
            f"{source} was made with {', '.join(refused)}: set it back, add it to checkpoint.allow_changed, or start in "
            "another job.dump_folder"
        )
    return [
        f"changed since the checkpoint, as allowed: {key}, {old!r} -> {new!r}" for key, (old, new) in changes.items()
    ]


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, value in tree.items() for k, v in flattened(value, f"{prefix}.{key}" if prefix else key).items()
    }
