"""What is shipped with the package."""

from pathlib import Path


def tiny_wan_path() -> Path:
    """The tiny Wan pipeline in diffusers layout: `model_index.json`, tokenizer, text encoder, VAE, transformer, scheduler."""
    return Path(__file__).parent / "tiny_wan"
