"""Text encoder and video VAE of a Wan pipeline, from transformers and diffusers, with Wan's conventions around them."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fvtitan.components.files import open_safetensors
from fvtitan.errors import UserError
from fvtitan.models.pipeline import pipeline_folder, pipeline_text_len

# 16 videos of 33 frames of 64 x 64 decode in less than half the time of 16 single ones; one of 81 x 480 x 832 fills a VAE.
TOGETHER_PIXELS = 2**22


def clean_prompt(text: str) -> str:
    """A prompt as WanPipeline cleans it: ftfy, HTML entities twice, white space collapsed."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def component_hash(folder: Path) -> str:
    """sha256 over the names and bytes of a component's files: its identity in a cache's manifest."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".model")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _component(name: str, *components: str) -> Path:
    folder = pipeline_folder(name, *components)
    for component in components:
        if not (folder / component).is_dir():
            raise UserError(f"{name!r} ({folder}) has no {component}/ folder: need a pipeline in diffusers layout")
    return folder


def _load(what: str, model_class: Any, folder: Path, **options: Any) -> Any:
    """A model from safetensors only, with every weight there: the libraries would invent missing or misshapen ones."""
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    _check_files(what, folder)
    try:
        model, report = model_class.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the {what} from {folder}: {str(error).splitlines()[0]}") from None
    misshapen = {key[0] for key in report["mismatched_keys"]}
    for problem, names in (("lacks", set(report["missing_keys"]) - misshapen), ("has the wrong shape for", misshapen)):
        if names:
            raise UserError(f"the {what} in {folder} {problem} {len(names)} weights, the first: {min(names)}")
    return model


def _check_files(what: str, folder: Path) -> None:
    """The headers of the weights' files, and that an index names files of the folder only."""
    where = f"cannot load the {what} from {folder}"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            open_safetensors(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{where}: {path.name} is damaged: {error}") from None
    for path in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{where}: {path.name} is damaged: {error!r}") from None
        for name in names:
            if Path(name).name != name:
                raise UserError(f"{where}: {path.name} names {name!r}, which is not in that folder")


class TextEncoder:
    """UMT5 as Wan uses it: rows are cut at their true length; whoever feeds a network zero-pads them to its text_len."""

    def __init__(self, pipeline: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
        from transformers import AutoTokenizer, UMT5EncoderModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity(logging.CRITICAL)  # what is wrong with a model we say ourselves, in one line
        folder = _component(pipeline, "tokenizer", "text_encoder")
        self.device = torch.device(device)
        self.text_len = pipeline_text_len(folder)
        # bf16 on a GPU (11 GB for UMT5-XXL), never fp16: it overflows.
        dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        try:
            # Without the False it asks on the terminal, and a folder's own code runs after a "y".
            self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot load the tokenizer from {folder / 'tokenizer'}: {str(error).splitlines()[0]}"
            ) from None
        encoder = _load("text encoder", UMT5EncoderModel, folder / "text_encoder", dtype=dtype)
        self.encoder = encoder.to(self.device).eval()
        self._check(pipeline)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[Tensor]:
        """Embeddings `[L_i, D]` of the cleaned prompts, at most text_len tokens each."""
        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        ).to(self.device)
        states = self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return [row[:length] for row, length in zip(states, tokens.attention_mask.sum(1).tolist(), strict=True)]

    def cuts(self, prompt: str) -> bool:
        """Whether the prompt has more than text_len tokens: the rest is not encoded."""
        return len(self.tokenizer(clean_prompt(prompt)).input_ids) > self.text_len

    def _check(self, pipeline: str) -> None:
        # Some transformers releases loaded UMT5 with an untied, zero embedding: every prompt then looks alike.
        if not torch.equal(self.encoder.shared.weight, self.encoder.encoder.embed_tokens.weight):
            raise UserError(f"{pipeline!r}: the text encoder's embedding is not tied to `shared`; update transformers")
        first, second = self.encode(["a red circle", "the blue sea at night"])
        size = min(len(first), len(second))
        if torch.allclose(first[:size], second[:size], atol=1e-4):
            raise UserError(f"{pipeline!r}: the text encoder gives two different prompts the same embedding")


class VideoVAE:
    """AutoencoderKLWan between pixels `[B, T, 3, H, W]` in [-1, 1] and normalised latents `[B, T', C, h, w]`."""

    def __init__(self, pipeline: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        from diffusers import AutoencoderKLWan
        from diffusers.utils import logging

        logging.set_verbosity(logging.CRITICAL)
        folder = _component(pipeline, "vae") / "vae"
        # Not in the low-memory mode: the VAE is small.
        vae = _load("VAE", AutoencoderKLWan, folder, torch_dtype=dtype, low_cpu_mem_usage=False)
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.device, self.dtype = torch.device(device), dtype
        config = self.vae.config
        # diffusers' code stores 1 / std under the name latents_std; the config holds the standard deviation itself.
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float32, device=device).view(1, 1, -1, 1, 1)
        self.std = torch.tensor(config.latents_std, dtype=torch.float32, device=device).view(1, 1, -1, 1, 1)
        self.spatial_ratio: int = config.scale_factor_spatial
        self.temporal_ratio: int = config.scale_factor_temporal

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """`(mode - latents_mean) / latents_std`, float32. T must be 4n + 1."""
        if pixels.shape[1] % self.temporal_ratio != 1:
            raise ValueError(f"{pixels.shape[1]} frames: the VAE takes {self.temporal_ratio}n + 1")
        mode = self.vae.encode(pixels.to(self.device, self.dtype).transpose(1, 2)).latent_dist.mode()
        return (mode.transpose(1, 2).float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `[B, T, 3, H, W]` in [-1, 1], float32. Small videos are decoded together, large ones one by one."""
        _, frames, _, height, width = latents.shape
        pixels = frames * self.temporal_ratio * height * width * self.spatial_ratio**2
        parts = latents.split(max(1, TOGETHER_PIXELS // pixels))
        return torch.cat([self.vae.decode(self._scaled(part)).sample.transpose(1, 2).float() for part in parts])

    @torch.no_grad()
    def decode_stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same, block by block: latents `[B, t, C, h, w]` -> pixels `[B, n, 3, H, W]` as soon as they are there, with what
        the causal convolutions remember. One stream a VAE at a time."""
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        vae = self.vae
        vae.clear_cache()
        first = True
        for block in blocks:
            pixels = []
            for latent in vae.post_quant_conv(self._scaled(block)).split(1, dim=2):
                vae._conv_idx = [0]  # diffusers' own loop over frames, which keeps its memory here
                chunk = {"first_chunk": True} if first else {}
                pixels.append(vae.decoder(latent, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **chunk))
                first = False
            frames = torch.cat(pixels, dim=2)
            if vae.config.patch_size is not None:
                frames = unpatchify(frames, patch_size=vae.config.patch_size)
            yield frames.clamp(-1, 1).transpose(1, 2).float()
        vae.clear_cache()

    def _scaled(self, latents: Tensor) -> Tensor:
        scaled = latents.to(self.device, torch.float32) * self.std + self.mean
        return scaled.transpose(1, 2).to(self.dtype)
