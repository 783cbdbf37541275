"""Train tiny-wan's VAE on moving shapes: an AutoencoderKLWan of 0.7 M parameters, /8 in space and /4 in time.

Two stages: short clips, where a step is cheap, then clips as long as those that are used. The pixels of moving shapes stay
well inside [-1, 1], because AutoencoderKLWan.decode clamps and a clamped pixel has no gradient.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fvtitan.components.rng import fold
from fvtitan.data.moving_shapes import render_clip, training_combinations

VAE_CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 2],
    "is_residual": True,  # shortcuts around every change of resolution: learns 5 times faster at this size
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
}


@dataclass(frozen=True)
class Stage:
    steps: int
    batch_size: int
    num_frames: int
    lr: float
    guide_weight: tuple[float, float]  # at the stage's start and end


STAGES = (
    Stage(1100, 4, 9, 3e-3, (3.0, 0.3)),
    Stage(320, 2, 33, 1.5e-3, (0.3, 0.3)),
    Stage(900, 4, 9, 2e-3, (0.03, 0.03)),  # the guide has done its work: the channels are free for edges
    Stage(280, 2, 33, 1e-3, (0.03, 0.03)),
)
GUIDE_CHANNELS = 12  # colours of 4 frames
FOREGROUND_WEIGHT = 3.0  # a small shape is a twelfth of the frame
EMA_DECAY = 0.99


def training_clips(seed: int, step: int, batch_size: int, num_frames: int) -> Tensor:
    """Pixels `[B, 3, T, H, W]` in [-1, 1] of random training combinations."""
    combinations = training_combinations()
    rng = np.random.RandomState(fold(seed, "vae_clips", num_frames, step))
    chosen = rng.choice(len(combinations), batch_size)
    clips = [
        render_clip(combinations[i], num_frames=num_frames, seed=fold(seed, step, j)) for j, i in enumerate(chosen)
    ]
    return to_pixels(torch.stack(clips))


def to_pixels(clips: Tensor) -> Tensor:
    """uint8 `[B, T, H, W, 3]` -> `[B, 3, T, H, W]` in [-1, 1], as the VAE takes them."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_vae(seed: int = 0, stages: tuple[Stage, ...] = STAGES, vae=None):
    """A trained AutoencoderKLWan whose config carries the latents' mean and standard deviation; `vae` continues one."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(fold(seed, "vae_init"))
    vae = vae or AutoencoderKLWan(**VAE_CONFIG)
    average = {name: p.detach().clone() for name, p in vae.named_parameters()}
    start = time.time()
    for number, stage in enumerate(stages, 1):
        optimizer = torch.optim.AdamW(vae.parameters(), lr=stage.lr, betas=(0.9, 0.99), weight_decay=1e-4)
        for step in range(stage.steps):
            warm = min(1.0, (step + 1) / 100)
            optimizer.param_groups[0]["lr"] = stage.lr * warm * (0.51 + 0.49 * math.cos(math.pi * step / stage.steps))
            pixels = training_clips(seed, step, stage.batch_size, stage.num_frames)
            guide_weight = float(np.interp(step / stage.steps, (0, 1), stage.guide_weight))
            latents = vae.encode(pixels).latent_dist.mode()
            error = vae.decode(latents).sample - pixels
            guide = (latents[:, :GUIDE_CHANNELS] - local_colours(pixels)).square().mean()
            loss = reconstruction_loss(error, pixels) + guide_weight * guide
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for name, p in vae.named_parameters():
                average[name].lerp_(p.detach(), 1 - EMA_DECAY)
            if step % 50 == 0 or step == stage.steps - 1:
                psnr = 10 * math.log10(4 / float(error.detach().square().mean()))
                print(
                    f"stage {number} step {step}/{stage.steps}  loss {float(loss.detach()):.4f}  psnr {psnr:.1f} dB  "
                    f"guide {float(guide.detach()):.4f}  {(time.time() - start) / 60:.1f} min",
                    flush=True,
                )
    with torch.no_grad():
        for name, p in vae.named_parameters():
            p.copy_(average[name])
    rotate_to_principal_axes(vae, seed)
    mean, std = latent_statistics(vae, seed)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae.eval()


def reconstruction_loss(error: Tensor, pixels: Tensor) -> Tensor:
    """Squared error and some L1, the shape's pixels weighted up. Both `[B, 3, T, H, W]`."""
    background = pixels.flatten(2).median(2).values[:, :, None, None, None]
    shape = ((pixels - background).abs().amax(1, keepdim=True) > 0.1).float()
    return ((1 + (FOREGROUND_WEIGHT - 1) * shape) * (10 * error.square() + 0.5 * error.abs())).mean()


def local_colours(pixels: Tensor) -> Tensor:
    """Twice the mean colour of every 8 x 8 cell in each of the 4 frames of a latent frame: `[B, 12, T', H / 8, W / 8]`.

    The first latent channels are drawn to it. Without that, an autoencoder of this size spends most of its training on a
    plateau where it paints only the background; and a diffusion model finds smooth latents easier.
    """
    means = torch.nn.functional.avg_pool3d(pixels, (1, 8, 8))
    means = torch.cat([means[:, :, :1]] * 3 + [means], dim=2)  # the first latent frame holds one frame
    return 2 * means.unflatten(2, (-1, 4)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2)


@torch.no_grad()
def sample_latents(vae, seed: int, num_batches: int = 24) -> Tensor:
    """Modes `[B, C, T', h, w]` of training clips."""
    return torch.cat([vae.encode(training_clips(seed, -1 - i, 4, 33)).latent_dist.mode() for i in range(num_batches)])


@torch.no_grad()
def rotate_to_principal_axes(vae, seed: int) -> None:
    """Turn the latent channels to their principal axes, inside the two 1x1x1 convolutions around the latents.

    The colours of 4 neighbouring frames are nearly equal: what moves, and where the edges are, has a tenth of their
    amplitude or less, and would drown in a diffusion model's noise long before the colours do. On the principal axes the
    per-channel normalisation gives every one of them its own unit scale. What the VAE decodes does not change.
    """
    channels = sample_latents(vae, seed).movedim(1, -1).flatten(0, -2)
    axes = torch.linalg.eigh(torch.cov(channels.T.double()))[1].float()  # columns
    size = axes.shape[0]
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:size] = torch.einsum("ij,ik...->jk...", axes, encode.weight[:size])
    encode.bias[:size] = axes.T @ encode.bias[:size]
    decode.weight.copy_(torch.einsum("oi...,ij->oj...", decode.weight, axes))


@torch.no_grad()
def latent_statistics(vae, seed: int) -> tuple[Tensor, Tensor]:
    """Mean of each latent channel, and the scale it is divided by: halfway (geometrically) between the channel's own
    standard deviation and one scale for all, so that the normalised latents have unit mean square.

    A compromise between making the faintest edges as loud as the colours (each by its own deviation) and leaving edges to
    the last sampling steps (one scale for all). Its effect was not isolated.
    """
    latents = sample_latents(vae, seed)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    return mean, (std * std.mean()).sqrt()
