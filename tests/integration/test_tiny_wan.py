"""The shipped pipeline as diffusers sees it, and our sampler beside WanPipeline's."""

from __future__ import annotations

import numpy as np
import torch

from fvtitan import samplers
from fvtitan.assets import tiny_wan_path
from fvtitan.components.validation import to_uint8
from fvtitan.flow_matching import euler_ladder
from fvtitan.generate import load_model
from fvtitan.models.encoders import TextEncoder, VideoVAE
from fvtitan.samplers import SamplerSpec


def test_our_sampler_gives_wanpipelines_video():
    """Same weights, prompt, noise and ladder: the same latents to 1e-4 and the same pixels to 1e-3."""
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(tiny_wan_path())
    pipeline.set_progress_bar_config(disable=True)
    steps, guidance, prompt = 5, 3.0, "a small red circle moving left slowly on a dark grey background"
    schedule = pipeline.scheduler.set_timesteps
    # Its own ladder differs by up to 0.07: give it ours, linspace(1, 1 / N, N) before the shift.
    pipeline.scheduler.set_timesteps = lambda n, device: schedule(sigmas=np.linspace(1, 1 / n, n), device=device)
    noise = torch.randn(1, 9, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": "", "max_sequence_length": 32}
    size = {"height": 64, "width": 64, "num_frames": 33, "latents": noise.transpose(1, 2)}
    latents = pipeline(prompt, **call, **size, output_type="latent").frames.transpose(1, 2)
    video = pipeline(prompt, **call, **size, output_type="np").frames[0]  # [T, H, W, 3] in [0, 1]

    model = load_model("tiny-wan").model
    encoder, vae = TextEncoder("tiny-wan"), VideoVAE("tiny-wan")
    cond, uncond = (model.conditioning(encoder.encode([text])) for text in (prompt, ""))
    spec = SamplerSpec(tuple(euler_ladder(steps, pipeline.scheduler.config.shift)), guidance)
    with torch.no_grad():
        ours = samplers.sample(model, spec, noise, cond, uncond)
    pixels = vae.decode(ours)[0]
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.permute(0, 2, 3, 1), torch.from_numpy(video) * 2 - 1, atol=1e-3, rtol=0)
    assert to_uint8(pixels).shape == (33, 64, 64, 3)
    wrong = SamplerSpec(tuple(euler_ladder(steps, 3.0)), guidance)
    with torch.no_grad():
        assert (samplers.sample(model, wrong, noise, cond, uncond) - ours).abs().max() > 1e-2  # the ladder matters
