"""Wan 2.1 1.3B in its real layout, onto two FSDP2 ranks: what a rank needs of memory to load its half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fvtitan.models.wan.adapter import config_to_diffusers
from fvtitan.models.wan.files import WEIGHTS_NAME, TensorSpec, write_safetensors
from fvtitan.models.wan.transformer import FLAVORS
from tests.helpers import ROOT

WORKER = Path(__file__).with_name("weight_memory_worker.py")
SHARD = 10**9


def write_folder(folder: Path) -> None:
    """diffusers' own names and shapes, in bfloat16 shards of 1 GB with an index, drawn tensor by tensor."""
    from diffusers import WanTransformer3DModel

    config = {key: value for key, value in config_to_diffusers(FLAVORS["1.3B"]).items() if key != "_class_name"}
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in WanTransformer3DModel(**config).state_dict().items()}
    shards: list[list[TensorSpec]] = [[]]
    for name, shape in shapes.items():
        spec = TensorSpec(name, shape, torch.bfloat16)
        if sum(each.bytes for each in shards[-1]) + spec.bytes > SHARD:
            shards.append([])
        shards[-1].append(spec)
    rng = torch.Generator().manual_seed(0)

    def drawn(specs: list[TensorSpec]) -> Iterator[Tensor]:
        for spec in specs:
            yield torch.empty(spec.shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02, generator=rng)

    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, specs, drawn(specs), {"format": "pt"})
        index |= dict.fromkeys([spec.name for spec in specs], name)
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config_to_diffusers(FLAVORS["1.3B"])))


@pytest.mark.slow
def test_a_rank_needs_its_shards_and_one_tensor(tmp_path):
    """Peak anonymous memory of a rank, the interpreter's own included, <= 1.2 x (its float32 shards + one full tensor)."""
    write_folder(tmp_path / "wan/transformer")
    (tmp_path / "recipe.toml").write_text('[models.student]\ninit_from = "tiny-wan"\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "wan"), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        record = json.loads((tmp_path / f"rank{rank}.json").read_text())
        print(rank, record)
        assert not record["wrong"]
        assert record["shards"] == pytest.approx(4 * 1_418_996_800 / 2, rel=0.01)
        assert record["peak"] <= 1.2 * (record["shards"] + record["largest"]), record
