"""Build tiny-wan: a complete Wan pipeline in diffusers layout, of the real classes, a few megabytes in all.

    python -m fvtitan.assets.build_tiny_wan --output DIR [--vae FOLDER] [--transformer FOLDER]

The VAE is trained here on moving shapes (about half an hour on 2 cores) unless a trained one is given; the text encoder has
fixed random weights; the transformer is random unless one trained by `train_configs/tiny_pretrain.toml` is given.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import string
import time
from pathlib import Path

import torch

from fvtitan.components.files import write_atomic
from fvtitan.components.rng import fold
from fvtitan.data.moving_shapes import all_combinations
from fvtitan.errors import UserError, cli
from fvtitan.models.wan.adapter import config_to_diffusers
from fvtitan.models.wan.transformer import FLAVORS

TINY = FLAVORS["tiny"]
SHIFT = 3.0


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


def build_pipeline(vae, transformer_folder: str, output: Path) -> None:
    """Write the whole folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    tokenizer = build_tokenizer()
    if transformer_folder:
        transformer = WanTransformer3DModel.from_pretrained(transformer_folder)
    else:
        torch.manual_seed(fold(0, "transformer"))
        transformer = WanTransformer3DModel(
            **{key: value for key, value in config_to_diffusers(TINY).items() if key != "_class_name"}
        )
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer)),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    )
    pipeline.save_pretrained(output)
    write_atomic(output / "fvtitan.json", json.dumps({"text_len": TINY.text_len}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fvtitan.assets.build_tiny_wan", description="Build tiny-wan.")
    parser.add_argument("--output", required=True, help="folder to write; must not exist")
    parser.add_argument("--vae", default="", help="folder of a trained VAE; default: train one")
    parser.add_argument("--transformer", default="", help="transformer folder in diffusers layout; default: random")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or use another folder")
    from diffusers import AutoencoderKLWan

    from fvtitan.assets.train_tiny_vae import round_trip_scores, train_vae

    start = time.time()
    vae = AutoencoderKLWan.from_pretrained(args.vae) if args.vae else train_vae(args.seed)
    temporary = output.with_name(f"{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    build_pipeline(vae, args.transformer, temporary)
    temporary.rename(output)
    for num_frames, every in ((33, 6), (97, 24)):
        scores = round_trip_scores(vae, num_frames, every=every)
        print(f"VAE round trip, {num_frames} frames: {json.dumps({k: round(v, 3) for k, v in scores.items()})}")
    print(f"{output}: {(time.time() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    cli(main)
