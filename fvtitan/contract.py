"""The sampler contract: how a model must be sampled, as JSON that travels with its weights.

    <export>/fvtitan.json    {"text_len": 512, "sampler": {"format_version": 1, "solver": "sde", "sigmas": [...], ...}}

A pipeline without it (every one that is not ours) is sampled by Euler steps. `python -m fvtitan.export` writes it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fvtitan.errors import UserError, nearest_multiples
from fvtitan.flow_matching import NUM_TIMESTEPS
from fvtitan.models.blocks import CausalConfig
from fvtitan.models.pipeline import CONTRACT_NAME
from fvtitan.samplers import SamplerSpec
from fvtitan.strict import parse_dataclass

if TYPE_CHECKING:
    from fvtitan.config import JobConfig

FORMAT_VERSION = 1
DERIVED = ("timesteps", "raw_timesteps")  # written for readers other than us; sigmas and shift say the same


@dataclass(frozen=True)
class SamplerContract:
    """Everything that a sampler needs to know of a model, beside its weights, text encoder and VAE."""

    method: str
    """What trained it: finetune, dfsft, kd, kd_causal, dmd2, self_forcing."""
    solver: Literal["ode", "sde"]
    """ode: Euler steps; sde: each step predicts x0 and re-noises with fresh noise."""
    sigmas: tuple[float, ...]
    """The ladder after the shift, from 1 down to 0."""
    shift: float
    """The run's timestep shift, which is in `sigmas` already."""
    guidance_scale: float
    """`u + g (c - u)`; 1: no unconditional pass."""
    unconditional_prompt: str
    """The text of the unconditional pass, also called the negative prompt."""
    streaming: bool
    """Block by block over a KV cache (a causal student)."""
    context_noise: float
    """Streaming: sigma to which a finished block is noised when it enters the cache."""
    text_len: int
    """Text tokens the network sees, zero-padded: diffusers' max_sequence_length."""
    num_frames: int
    """Video frames, 4n + 1, it was trained at."""
    height: int
    """Pixels it was trained at."""
    width: int
    """Pixels it was trained at."""
    fps: int
    """Frame rate of the clips it was trained on."""
    causal: CausalConfig | None = None
    """How a causal student sees time; None: every frame sees all frames."""

    @property
    def spec(self) -> SamplerSpec:
        """The same for `fvtitan.samplers`."""
        return SamplerSpec(self.sigmas, self.guidance_scale, self.solver, self.streaming, self.context_noise)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the network is told at each step: 1000 sigma."""
        return tuple(NUM_TIMESTEPS * sigma for sigma in self.sigmas[:-1])

    @property
    def raw_timesteps(self) -> tuple[float, ...]:
        """The timesteps before the shift, as recipes write them."""
        s = self.shift
        return tuple(round(NUM_TIMESTEPS * sigma / (s - (s - 1) * sigma), 6) for sigma in self.sigmas[:-1])

    def check(self) -> None:
        """Raise `UserError` for what no sampler can do."""
        sigmas = self.sigmas
        descending = all(a > b for a, b in zip(sigmas[:-1], sigmas[1:], strict=True))
        if len(sigmas) < 2 or not descending or not 0 < sigmas[0] <= 1 or sigmas[-1] != 0:
            raise UserError(f"sampler.sigmas = {list(sigmas)}: need a ladder in [0, 1] that descends to 0")
        for name in ("shift", "text_len", "num_frames", "height", "width", "fps"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"sampler.{name} = {value}: must be > 0")
        if self.num_frames % 4 != 1:
            nearest = nearest_multiples(self.num_frames, 4, 1)
            raise UserError(f"sampler.num_frames = {self.num_frames}: must be 4n + 1; nearest: {nearest}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value % 16:
                nearest = nearest_multiples(value, 16)
                raise UserError(f"sampler.{name} = {value}: must be a multiple of 16; nearest: {nearest}")
        if not 0 <= self.guidance_scale < math.inf:
            raise UserError(f"sampler.guidance_scale = {self.guidance_scale}: must be >= 0")
        if not 0 <= self.context_noise <= 1:
            raise UserError(f"sampler.context_noise = {self.context_noise}: must be in [0, 1]")
        if self.streaming and self.causal is None:
            raise UserError("sampler.streaming = true: only a causal model can be streamed; sampler.causal is missing")
        if self.causal is not None:
            if self.causal.frames_per_block < 1:
                raise UserError(f"sampler.causal.frames_per_block = {self.causal.frames_per_block}: must be >= 1")
            self.causal.blocks((self.num_frames - 1) // 4 + 1)

    def to_json(self) -> str:
        """The text of the file."""
        sampler = dataclasses.asdict(self)
        text_len = sampler.pop("text_len")
        if self.causal is None:
            del sampler["causal"]
        ladders = {name: [*getattr(self, name)] for name in ("sigmas", *DERIVED)}
        table = {"text_len": text_len, "sampler": {"format_version": FORMAT_VERSION, **sampler, **ladders}}
        return json.dumps(table, indent=2, ensure_ascii=False) + "\n"


def contract_of(cfg: JobConfig, text_len: int) -> SamplerContract:
    """How the student of a run must be sampled: as its validation does it."""
    from fvtitan.methods import METHODS

    spec, data, student = METHODS[cfg.method.name].sampler(cfg), cfg.data, cfg.models["student"]
    contract = SamplerContract(
        method=cfg.method.name,
        solver=spec.solver,
        sigmas=spec.sigmas,
        shift=cfg.schedule.shift,
        guidance_scale=spec.guidance_scale,
        unconditional_prompt=_negative_prompt(Path(data.path), spec) if data.uncond_prompt == "negative" else "",
        streaming=spec.streaming,
        context_noise=spec.context_noise,
        text_len=text_len,
        num_frames=data.num_frames,
        height=data.height,
        width=data.width,
        fps=data.fps,
        causal=student.causal() if student.is_causal else None,
    )
    contract.check()
    return contract


def _negative_prompt(cache: Path, spec: SamplerSpec) -> str:
    """The negative prompt of the run's cache; Wan's own, and a warning if it is used, when the cache is not here."""
    from fvtitan.preprocess import WAN_NEGATIVE_PROMPT

    try:
        text = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))["contract"]["negative_prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        if spec.guidance_scale != 1:
            print(
                f"WARNING: the run's cache {cache} is not here: its negative prompt is taken to be Wan's own, the default of "
                "fvtitan.preprocess",
                file=sys.stderr,
            )
        return WAN_NEGATIVE_PROMPT
    return text if isinstance(text, str) else WAN_NEGATIVE_PROMPT


def read_contract(folder: str | Path) -> SamplerContract | None:
    """The contract of an export folder; None: it has none, as a pipeline that is not ours.

    Raises `UserError` for a damaged file, another format version, unknown or missing keys, values that no sampler can use, and
    ladders that contradict each other.
    """
    path = Path(folder) / CONTRACT_NAME
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        text_len, sampler = table["text_len"], table.get("sampler")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None
    if sampler is None:
        return None
    try:
        return _parse(sampler, text_len)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parse(sampler: Any, text_len: Any) -> SamplerContract:
    if not isinstance(sampler, dict):
        raise UserError(f"sampler = {sampler!r}: need an object")
    if (version := sampler.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"sampler.format_version = {version!r}: this fvtitan reads {FORMAT_VERSION}")
    needed = {f.name for f in dataclasses.fields(SamplerContract)} - {"causal", "text_len"} | set(DERIVED)
    if missing := sorted(needed - set(sampler)):
        raise UserError(f"sampler lacks {', '.join(missing)}")
    if isinstance(sampler.get("causal"), dict) and "frames_per_block" not in sampler["causal"]:
        raise UserError("sampler.causal lacks frames_per_block")
    table = {key: value for key, value in sampler.items() if key not in ("format_version", *DERIVED)}
    contract = parse_dataclass(SamplerContract, {**table, "text_len": text_len}, "sampler")
    contract.check()
    for name in DERIVED:
        if not _near(sampler[name], getattr(contract, name)):
            raise UserError(
                f"sampler.{name} = {sampler[name]!r} contradicts sigmas and shift, which give "
                f"{[round(timestep, 3) for timestep in getattr(contract, name)]}"
            )
    return contract


def _near(written: Any, derived: tuple[float, ...]) -> bool:
    if not isinstance(written, list) or len(written) != len(derived):
        return False
    return all(type(w) in (int, float) and abs(w - d) < 1e-3 for w, d in zip(written, derived, strict=True))
