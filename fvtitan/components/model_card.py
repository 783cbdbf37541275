"""The README.md of an export: what it is, and the lines that sample it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fvtitan.contract import SamplerContract
from fvtitan.flow_matching import NUM_TIMESTEPS, euler_ladder
from fvtitan.models.wan.weights import is_checkpoint
from fvtitan.samplers import describe, num_forwards

EXAMPLE_PROMPT = "a small red circle moving left slowly on a dark grey background"


FILES = {
    "diffusers": "A whole pipeline in diffusers layout; `transformer/` is what was trained.",
    "original": "The network alone under Wan's original names: copy `diffusion_pytorch_model.safetensors` into ComfyUI's "
    "`models/diffusion_models/`, or name this folder as `models.<role>.init_from`.",
    "lora": "A LoRA adapter for {base}: `pytorch_lora_weights.safetensors`.",
}


def model_card(title: str, export: Mapping[str, Any], contract: SamplerContract | None, *, base: str) -> str:
    """Markdown. `export`: where it comes from; `base`: the pipeline that has, or lent, the other parts."""
    average, format = "moving average" if export["weights"] == "ema" else "raw weights", export["format"]
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-video", "---", "", f"# {title}", ""]
    lines += [f"The {average} of the {export['role']} after step {export['step']}, by fvtitan {export['fvtitan']}."]
    lines += [FILES[format].format(base=base), ""]
    if contract is None:
        return "\n".join([*lines, "It was trained beside a student and is no generator itself.", ""])
    lines += ["## How it must be sampled", "", *_table(contract), ""]
    if contract.streaming:
        lines += [
            "A causal network: the same tensors and names as any Wan 2.1, but it sees time in blocks, of which diffusers' "
            "WanPipeline and ComfyUI know nothing: they would run, and the videos would be wrong.",
            "",
        ]
        if format == "diffusers":
            command = f'python -m fvtitan.generate --model . --prompts "{EXAMPLE_PROMPT}" --output videos'
            return "\n".join([*lines, "```bash", command, "```", ""])
        return "\n".join([*lines, "`python -m fvtitan.generate` samples it from an export as diffusers.", ""])
    if format == "original":
        return "\n".join(lines)
    return "\n".join([*lines, "```python", *diffusers_lines(contract, format, base, export["dtype"]), "```", ""])


def _table(contract: SamplerContract) -> list[str]:
    def shown(values: tuple[float, ...]) -> str:
        few = values if len(values) <= 8 else (*values[:4], *values[-2:])
        words = [f"{value:g}" for value in few]
        return ", ".join(words if len(values) <= 8 else [*words[:4], "...", *words[4:]])

    g, spec = contract.guidance_scale, contract.spec
    blocks = 1 if contract.causal is None else len(contract.causal.blocks((contract.num_frames - 1) // 4 + 1))
    rows = {
        "sampler": describe(spec) if contract.solver == "ode" else f"{describe(spec)}: x0, then fresh noise",
        "forwards a video": num_forwards(spec, blocks),
        "timesteps (after the shift)": shown(contract.timesteps),
        "timesteps before the shift": shown(contract.raw_timesteps),
        "shift": f"{contract.shift:g}",
        "guidance": f"{g:g} in u + g (c - u), which is {g - 1:g} in c + g' (c - u)" if g != 1 else "1: none",
        "negative prompt": (contract.unconditional_prompt or "empty") if g != 1 else "not used",
        "text tokens": contract.text_len,
        "trained at": f"{contract.num_frames} frames of {contract.height} x {contract.width}, {contract.fps} a second",
    }
    if contract.causal is not None:
        causal = contract.causal
        window = (
            "all earlier frames" if causal.window < 0 else f"the last {causal.window} latent frames, its own included"
        )
        first = ", the first of one frame" if causal.independent_first_frame else ""
        rows["blocks"] = f"{causal.frames_per_block} latent frames{first}; a block sees {window}; sink {causal.sink}"
        rows["context"] = f"a finished block enters the cache at timestep {NUM_TIMESTEPS * contract.context_noise:g}"
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]


def base_arguments(base: str) -> str:
    """Of from_pretrained, for a pipeline named as `models.<role>.init_from` names it; a run's checkpoint is none."""
    if is_checkpoint(base):
        return repr(f"{base}, exported as diffusers: its folder")
    name, at, revision = (base, "", "") if Path(base).is_dir() else base.partition("@")
    return repr(name) + (f", revision={revision!r}" if at else "")


def diffusers_lines(contract: SamplerContract, format: str, base: str, dtype: str) -> list[str]:
    """Python that samples it by WanPipeline on the same ladder, run in the export's folder."""
    steps, sde = len(contract.sigmas) - 1, contract.solver == "sde"
    raw = [timestep / NUM_TIMESTEPS for timestep in contract.raw_timesteps]
    uniform = max(abs(a - b) for a, b in zip(raw, euler_ladder(steps, 1.0), strict=False)) < 1e-9
    ladder = f"[1 - i / {steps} for i in range({steps})]" if uniform else repr(raw)
    kind = (
        'torch_dtype={"vae": torch.float32, "default": torch.bfloat16}'
        if dtype == "bfloat16"
        else "torch_dtype=torch.float32"
    )
    lines = ["import torch", "from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline", ""]
    if format == "lora":
        lines += [
            f"pipe = WanPipeline.from_pretrained({base_arguments(base)}, {kind})",
            'pipe.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")  # needs peft',
            f"pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={contract.shift!r}, stochastic_sampling={sde})",
        ]
    else:
        lines[1] = "from diffusers import WanPipeline"
        lines += [f'pipe = WanPipeline.from_pretrained(".", {kind})']
    lines += [
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "",
        "# WanPipeline's own steps are others: these are the model's, before the shift, which the scheduler has.",
        f"ladder = {ladder}",
        "set_timesteps = pipe.scheduler.set_timesteps",
        "pipe.scheduler.set_timesteps = lambda steps, device: set_timesteps(sigmas=ladder, device=device)",
        "",
        "video = pipe(",
        f'    "{EXAMPLE_PROMPT}",',
        *([f"    negative_prompt={contract.unconditional_prompt!r},"] if contract.guidance_scale != 1 else []),
        f"    guidance_scale={contract.guidance_scale!r},",
        f"    num_inference_steps={steps},",
        f"    num_frames={contract.num_frames},",
        f"    height={contract.height},",
        f"    width={contract.width},",
        f"    max_sequence_length={contract.text_len},",
        f').frames[0]  # [T, H, W, 3] in [0, 1]; diffusers.utils.export_to_video(video, "video.mp4", fps={contract.fps})',
    ]
    return lines
