"""B2: one fine-tuning step of the whole model (forward, backward, clip, AdamW): ours against diffusers' in a bare loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks import models, roofline
from benchmarks.harness import Result, Row, Setting, absolute, compare, gate, interleave
from benchmarks.training import bare_step, training, unsharded
from fvtitan import flow_matching
from fvtitan.distributed.parallelize import apply_ac
from fvtitan.methods.base import TrainingMethod


def run(setting: Setting) -> Result:
    """Ours without FSDP2, and with it on one rank, as train.py runs it; diffusers' neither sharded nor wrapped. The same
    weights, noise and sigma, clipping and fused AdamW."""
    title = "SFT step (forward, backward, clip, AdamW)"
    if setting.is_gpu:
        return Result(title, "Wan 1.3B, bf16, compiled", _on_gpu(setting))
    latents = models.QUICK_LATENTS if setting.quick else models.CPU_LATENTS
    cfg = models.CPU_SIZES
    size = f"{cfg.num_layers} layers, d = {cfg.dim}, S = {models.num_tokens(latents)}, batch 1, float32"
    with training(latents, setting) as (method, batch):
        models.random_weights(method.student.transformer)
        alone = unsharded(method)
        twin = models.diffusers_twin(alone.student.transformer)
        theirs = _diffusers_step(twin, method, batch)
        error = max(gate(*_losses(ours, twin, batch), 1e-5, "loss") for ours in (method, alone))
        times = interleave(
            {
                "fvtitan": lambda: bare_step(alone, batch, 1),
                "fvtitan, FSDP2 on one rank": lambda: bare_step(method, batch, 1),
                "diffusers": theirs,
            },
            setting,
        )
    rows = [compare(times, "fvtitan", "diffusers", target=1.05, error=error)]
    rows.append(compare(times, "fvtitan, FSDP2 on one rank", "diffusers", error=error))
    return Result(title, size, rows)


def _losses(method: TrainingMethod, twin: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return method.single_train_step(batch, 1, "student")[0], _diffusers_loss(twin, method, batch)


def _diffusers_loss(twin: nn.Module, method: TrainingMethod, batch: dict) -> Tensor:
    """The loss of step 1 with the draws of our method, in plain code."""
    x0 = batch["latents"].to(method.device, torch.float32)
    streams = method.streams(batch, 1, "student")
    sigma = flow_matching.sample_sigma(streams.rand("sigma", 1), method.cfg.schedule)  # [B, 1]
    noise = streams.randn("noise", *x0.shape[1:])
    level = sigma[:, :, None, None, None]
    noisy = (1 - level) * x0 + level * noise
    text = method.conditioning(batch).text
    kind = method.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        prediction = twin(noisy.transpose(1, 2), 1000 * sigma[:, 0], text.to(twin.dtype)).sample.transpose(1, 2)
    return (prediction.float() - (noise - x0)).square().mean()


def _diffusers_step(twin: nn.Module, method: TrainingMethod, batch: dict):
    optimizer = torch.optim.AdamW(twin.parameters(), lr=method.cfg.optimizer.lr, fused=True)

    def step() -> None:
        _diffusers_loss(twin, method, batch).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _on_gpu(setting: Setting) -> list[Row]:
    """Every way to train 1.3B that fits: length, activation checkpointing; diffusers with full checkpointing."""
    rows = []
    for tokens, latents in models.GPU_LATENTS.items():
        modes = ["selective", "full"] if tokens > 10000 else ["none", "selective", "full"]  # none: 129 GiB
        with training(latents, setting, compile__enable=True) as (method, batch):
            forward = roofline.network(method.student.transformer.cfg, latents)
            for mode in modes:
                apply_ac(method.student.transformer, mode)
                times = interleave({"fvtitan": lambda: bare_step(method, batch, 1)}, setting, warmup=3)
                work = roofline.Work(forward, True, mode)
                rows.append(absolute(f"fvtitan, S = {tokens}, AC {mode}", times, "fvtitan", work))
            twin = models.diffusers_twin(models.unsharded(method.student.transformer))
            twin.enable_gradient_checkpointing()
            times = interleave({"diffusers": _diffusers_step(twin, method, batch)}, setting, warmup=3)
            work = roofline.Work(forward, True, "full")
            rows.append(absolute(f"diffusers, S = {tokens}, full checkpointing, eager", times, "diffusers", work))
    return rows
