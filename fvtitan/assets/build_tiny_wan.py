"""Build tiny-wan: a complete Wan pipeline in diffusers layout, of the real classes, a few megabytes in all.

    python -m fvtitan.assets.build_tiny_wan --output DIR [--vae FOLDER] [--transformer FOLDER]

The VAE is trained here on moving shapes (about half an hour on 2 cores) unless a trained one is given; the text encoder has
fixed random weights; the transformer is random unless one trained by `train_configs/tiny_pretrain.toml` is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import shutil
import string
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvtitan.components.files import write_atomic
from fvtitan.components.metrics import read_metrics
from fvtitan.components.rng import fold, generator
from fvtitan.config import read_toml
from fvtitan.data.moving_shapes import all_combinations
from fvtitan.errors import UserError, cli
from fvtitan.models.wan.adapter import config_to_diffusers, diffusers_names, to_diffusers_tensor
from fvtitan.models.wan.transformer import FLAVORS, WanTransformer, init_parameter
from fvtitan.models.wan.weights import is_checkpoint, read_checkpoint, read_pipeline
from fvtitan.score import score_sources

TINY = FLAVORS["tiny"]
SHIFT = 5.0  # of tiny_pretrain.toml, and of every recipe that starts from tiny-wan


def build_tokenizer():
    """A T5 tokenizer (Unigram): one piece a word of the captions; other words fall apart into characters."""
    from transformers import T5Tokenizer

    words = sorted({word for attributes in all_combinations() for word in attributes.caption.split()})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -8.0)]
    vocab += [(f"▁{word}", -2.0) for word in words]
    vocab += [(character, -10.0) for character in string.printable.strip()]
    return T5Tokenizer(vocab=vocab, extra_ids=0)


def build_text_encoder(vocab_size: int, seed: int = 0):
    """A UMT5 encoder with fixed random weights. The residual branches are scaled down, so that a token's own embedding
    dominates its output and words stay distinguishable at their places."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(fold(seed, "text_encoder"))
    config = UMT5Config(
        vocab_size=vocab_size, d_model=TINY.text_dim, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    encoder = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        encoder.shared.weight.normal_()
        for name, parameter in encoder.named_parameters():
            if name.endswith(("SelfAttention.o.weight", "wo.weight")):
                parameter.normal_(std=0.2 / math.sqrt(parameter.shape[1]))
    return encoder


def transformer_tensors(source: str) -> dict[str, Tensor]:
    """Full tensors of a transformer of the tiny flavor, under our names: random, of a run's checkpoint (its moving average
    where there is one), or of a folder in diffusers layout."""
    if not source:
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in WanTransformer(TINY).named_parameters()}
        streams = functools.partial(generator, "cpu", 0, "transformer")
        return {name: init_parameter(name, shape, TINY, streams) for name, shape in shapes.items()}
    sizes, tensors = read_checkpoint(source, "student") if is_checkpoint(source) else read_pipeline(source)
    sizes = dataclasses.replace(sizes, text_len=TINY.text_len)  # a bare transformer folder does not say it
    if sizes != TINY:
        raise UserError(f"--transformer {source} holds {sizes}, not the tiny flavor {TINY}")
    return tensors


def build_pipeline(vae, tensors: dict[str, Tensor], output: Path) -> None:
    """Write the whole folder in diffusers layout."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    tokenizer = build_tokenizer()
    transformer = WanTransformer3DModel.from_config(config_to_diffusers(TINY))
    names = diffusers_names(tensors)
    transformer.load_state_dict({names[n]: to_diffusers_tensor(n, tensor, TINY) for n, tensor in tensors.items()})
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    pipeline.save_pretrained(output)
    for part in ("vae", "transformer"):  # where it was read from is nobody's business
        config = json.loads((output / part / "config.json").read_text())
        config.pop("_name_or_path", None)
        write_atomic(output / part / "config.json", json.dumps(config, indent=2) + "\n")
    write_atomic(output / "fvtitan.json", json.dumps({"text_len": TINY.text_len}) + "\n")


def provenance(vae_folder: str, transformer: str, seed: int, folder: Path) -> dict[str, Any]:
    """Where the two trained parts come from, how long they took, and how good they are."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    earlier = Path(vae_folder).parent / "provenance.json"
    kept = json.loads(earlier.read_text())["vae"] if vae_folder and earlier.is_file() else "given"
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "vae": kept if vae_folder else f"fvtitan.assets.train_tiny_vae.train_vae(seed={seed})",
        "scores": {},
    }
    if transformer and (Path(transformer) / "config.toml").is_file():
        run, step = Path(transformer).parents[1], int(Path(transformer).name.removeprefix("step-"))
        record["transformer"] = {
            "recipe": read_toml(Path(transformer) / "config.toml").job.config_file,
            "step": step,
            "minutes": round(training_minutes(run / "metrics.jsonl", step), 1),
        }
    # 4 videos of each held-out caption.
    for row, _ in score_sources(
        [str(folder)], pipeline=str(folder), steps=(50, 16, 4), lengths=(33,), num_videos=192, guidance=(3.0,)
    ):
        name = f"{row.steps} Euler steps, guidance 3" if row.steps else row.model
        record["scores"][name] = {key: round(value, 3) for key, value in row.scores.items()}
    return record


def training_minutes(metrics: Path, last_step: int) -> float:
    """Time in the training steps up to `last_step`, from the rates that were logged; validation and checkpoints not counted."""
    records = [r for r in read_metrics(metrics) if "perf/step_seconds" in r and r["step"] <= last_step]
    previous = [0, *(record["step"] for record in records)]
    steps = [record["step"] - before for record, before in zip(records, previous, strict=False)]
    return sum(n * record["perf/step_seconds"] for n, record in zip(steps, records, strict=True)) / 60


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fvtitan.assets.build_tiny_wan", description="Build tiny-wan.")
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_argument("--vae", default="", help="folder of a trained VAE; default: train one")
    parser.add_argument(
        "--transformer", default="", help="a run's .../checkpoint/step-<N>, or a diffusers folder; default: random"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or use another folder")
    from diffusers import AutoencoderKLWan

    from fvtitan.assets.train_tiny_vae import train_vae

    start = time.time()
    tensors = transformer_tensors(args.transformer)
    if args.vae:
        vae = AutoencoderKLWan.from_pretrained(args.vae, low_cpu_mem_usage=False)
    else:
        vae = train_vae(args.seed)
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    build_pipeline(vae, tensors, temporary)
    record = provenance(args.vae, args.transformer, args.seed, temporary)
    write_atomic(temporary / "provenance.json", json.dumps(record, indent=2) + "\n")
    temporary.rename(output)
    print(f"{json.dumps(record, indent=2)}\n{output}: {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    cli(main)
