"""fvtitan: fine-tune and distil video diffusion transformers into few-step and streaming generators."""

__version__ = "0.1.0"
