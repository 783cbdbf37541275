"""A role of a run as files that load elsewhere: in diffusers, in ComfyUI, and here again. On a CPU, without a GPU or the data.

    python -m fvtitan.export --checkpoint outputs/tiny_dmd2/checkpoint/step-1000 --ema --output exports/tiny_dmd2

    diffusers   a pipeline: transformer/, scheduler/ with the run's shift, and the other parts copied from the base
    original    one file with Wan's own names, for ComfyUI and Wan's code
    lora        the adapter alone, in the dialect that diffusers and ComfyUI both load

Each has fvtitan.json, which says how the model must be sampled, and a README.md with the lines that do it. What was written is
loaded again by diffusers and compared with the checkpoint before the folder gets its name; a killed export leaves nothing under
it. An adapter is exported as such, or with --merge as a whole network.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fvtitan
from fvtitan.components import faults
from fvtitan.components.checkpoint_folder import DiskFull, read_tensor_names
from fvtitan.components.files import fsync_path
from fvtitan.components.model_card import model_card
from fvtitan.config import read_toml
from fvtitan.contract import SamplerContract, contract_of
from fvtitan.errors import UserError, cli, is_disk_full, listed
from fvtitan.models.pipeline import CONTRACT_NAME, TINY_WAN, pipeline_folder
from fvtitan.models.wan.adapter import (
    config_to_diffusers,
    config_to_original,
    diffusers_names,
    diffusers_shape,
    to_diffusers_name,
)
from fvtitan.models.wan.files import WEIGHTS_NAME, TensorSpec, parameter_shapes, write_safetensors
from fvtitan.models.wan.weights import Adapter, RoleWeights, is_checkpoint, open_role

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LORA_NAME = "pytorch_lora_weights.safetensors"
BATCH_BYTES = 2**30
COPIED = ("text_encoder", "tokenizer", "vae")


@dataclass(frozen=True)
class Export:
    """What is exported, how and where to."""

    weights: RoleWeights
    role: str
    step: int
    contract: SamplerContract | None
    """None: another role than the student."""
    format: str
    dialect: str
    dtype: str
    max_shard_size: int
    base: Path | None
    """diffusers: the folder with the other parts of the pipeline."""
    base_name: str

    def provenance(self) -> dict[str, Any]:
        """Where it comes from, for fvtitan.json."""
        weights = "ema" if self.weights.state.startswith("ema.") else "raw"
        where = {"fvtitan": fvtitan.__version__, "step": self.step, "role": self.role, "weights": weights}
        return where | {"format": self.format, "dtype": self.dtype}

    def specs(self) -> list[tuple[str, TensorSpec]]:
        """`(our name, what is written)` of every tensor of the network, in the network's order. What diffusers keeps in
        float32 is written in float32, whatever the dtype."""
        from diffusers import WanTransformer3DModel

        sizes, shapes = self.weights.sizes, parameter_shapes(self.weights.sizes)
        theirs, wide = diffusers_names(shapes), set(WanTransformer3DModel._keep_in_fp32_modules)
        specs = []
        for name, shape in shapes.items():
            dtype = torch.float32 if wide & set(theirs[name].split(".")) else DTYPES[self.dtype]
            written = theirs[name] if self.format == "diffusers" else name
            specs.append((name, TensorSpec(written, diffusers_shape(name, shape, sizes), dtype)))
        return specs

    def tensors(self, specs: Sequence[tuple[str, TensorSpec]]) -> Iterator[Tensor]:
        """The tensors as they are written, read in batches. Raises `UserError` for one that is not finite."""
        for batch in _batches(specs):
            whole = self.weights.full([name for name, _ in batch])
            for name, spec in batch:
                tensor = whole.pop(name)
                if not tensor.isfinite().all():
                    raise UserError(f"{self.weights.folder}: {name} of {self.role} is not finite: nothing is exported")
                yield tensor.reshape(spec.shape).to(spec.dtype)


def _batches(specs: Sequence[tuple[str, TensorSpec]]) -> Iterator[list[tuple[str, TensorSpec]]]:
    batch: list[tuple[str, TensorSpec]] = []
    for item in specs:
        if batch and sum(spec.bytes for _, spec in [*batch, item]) > BATCH_BYTES:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def split(specs: Sequence[tuple[str, TensorSpec]], limit: int) -> list[list[tuple[str, TensorSpec]]]:
    """The tensors of each file: in order, at most `limit` bytes a file, though never less than one tensor."""
    shards: list[list[tuple[str, TensorSpec]]] = [[]]
    size = 0
    for item in specs:
        if shards[-1] and size + item[1].bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item[1].bytes
    return [sorted(shard, key=lambda item: -item[1].dtype.itemsize) for shard in shards]


def write_transformer(export: Export, folder: Path) -> None:
    """The network as diffusers has it (`<folder>` is `transformer/`), or under the original names in one file."""
    folder.mkdir(exist_ok=True)
    shards = split(export.specs(), export.max_shard_size)
    stem, weight_map = WEIGHTS_NAME.removesuffix(".safetensors"), {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS_NAME if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = [spec for _, spec in shard]
        write_safetensors(folder / name, specs, export.tensors(shard), {"format": "pt"})
        weight_map |= {spec.name: name for spec in specs}
    if len(shards) > 1:
        total = sum(spec.bytes for shard in shards for _, spec in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / f"{WEIGHTS_NAME}.index.json", index)
    to_config = config_to_diffusers if export.format == "diffusers" else config_to_original
    _write_json(folder / "config.json", to_config(export.weights.sizes))


def write_pipeline(export: Export, folder: Path) -> None:
    """model_index.json, transformer/, scheduler/, and the base's other parts byte for byte."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    for part in COPIED:
        shutil.copytree(export.base / part, folder / part, copy_function=shutil.copyfile)
    write_transformer(export, folder / "transformer")
    index = json.loads((export.base / "model_index.json").read_text(encoding="utf-8"))
    index = {key: value for key, value in index.items() if key != "_name_or_path"}
    index |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {"transformer": ["diffusers", "WanTransformer3DModel"]}
    contract, shift = export.contract, read_toml(export.weights.folder / "config.toml").schedule.shift
    sde = contract is not None and contract.solver == "sde"
    FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=sde).save_pretrained(folder / "scheduler")
    if contract is not None and contract.guidance_scale == 1 and not contract.streaming:
        index["dmd2_config"] = dmd2_config(contract)
    _write_json(folder / "model_index.json", index)


def dmd2_config(contract: SamplerContract) -> dict[str, Any]:
    """The block of model_index.json that vllm-omni reads of few-step students; timesteps after the shift."""
    timesteps = [int(t) if t == int(t) else t for t in contract.timesteps]
    steps = {"num_inference_steps": len(timesteps), "denoising_timesteps": timesteps}
    return steps | {"solver": contract.solver, "guidance_scale": contract.guidance_scale}


def lora_tensors(adapter: Adapter, dialect: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`(tensors by name, header)` of an adapter's file.

    comfy: original names, alpha / rank multiplied into B, which every loader reads alike. diffusers: its names, B as trained,
    and alpha in the header: a loader that does not read that has the wrong scale.
    """
    tensors, layers = {}, sorted({name.rpartition(".")[0] for name in adapter.tensors})
    metadata = {"format": "pt", "rank": str(adapter.lora.rank), "alpha": str(adapter.lora.rank * adapter.scale)}
    for layer in layers:
        low, high = adapter.tensors[f"{layer}.lora_A"], adapter.tensors[f"{layer}.lora_B"]
        name = f"diffusion_model.{layer}"
        if dialect == "diffusers":
            name = f"transformer.{to_diffusers_name(f'{layer}.weight').removesuffix('.weight')}"
        else:
            high = adapter.scale * high
        tensors |= {f"{name}.lora_A.weight": low.to(dtype), f"{name}.lora_B.weight": high.to(dtype)}
    if dialect == "diffusers":
        targets = [n.removeprefix("transformer.").removesuffix(".lora_A.weight") for n in tensors if ".lora_A." in n]
        config = {"r": adapter.lora.rank, "lora_alpha": adapter.lora.rank * adapter.scale, "target_modules": targets}
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    return tensors, metadata


def write_lora(export: Export, folder: Path) -> None:
    """The adapter's file."""
    tensors, metadata = lora_tensors(export.weights.adapter, export.dialect, DTYPES[export.dtype])
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(f"{export.weights.folder}: {bad[0]} of {export.role} is not finite: nothing is exported")
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_safetensors(folder / LORA_NAME, specs, tensors.values(), metadata)


def verify(export: Export, folder: Path) -> None:
    """Load what was written with diffusers, and compare every tensor with the checkpoint's. Raises `RuntimeError`."""
    from diffusers import WanTransformer3DModel
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # that some layers are float32 it says even when they are meant to be
    if export.format == "lora":
        _verify_lora(export, folder)
        return

    specs = export.specs()
    if export.format == "diffusers":
        model, report = WanTransformer3DModel.from_pretrained(
            folder / "transformer", torch_dtype=DTYPES[export.dtype], output_loading_info=True
        )
        wrong = [f"{name} ({kind})" for kind, names in report.items() for name in names]
    else:
        with tempfile.TemporaryDirectory() as config:  # without it, diffusers would ask the hub
            _write_json(Path(config) / "config.json", config_to_diffusers(export.weights.sizes))
            file = str(folder / WEIGHTS_NAME)
            model = WanTransformer3DModel.from_single_file(file, config=config, torch_dtype=torch.float32)
        wrong = []
    loaded = dict(model.named_parameters())
    theirs = diffusers_names(name for name, _ in specs)
    for (name, _), tensor in zip(specs, export.tensors(specs), strict=True):
        there = loaded.pop(theirs[name]).detach()
        if not torch.equal(there, tensor.to(there.dtype) if export.format == "original" else tensor):
            wrong.append(name)
    if wrong := [*wrong, *loaded]:
        raise RuntimeError(f"diffusers does not load what was exported: {listed(wrong)}")


def _verify_lora(export: Export, folder: Path) -> None:
    from diffusers import WanPipeline

    loaded, metadata = WanPipeline.lora_state_dict(folder / LORA_NAME, return_lora_metadata=True)
    expected, _ = lora_tensors(export.weights.adapter, "diffusers", DTYPES[export.dtype])
    if export.dialect == "comfy":
        baked = lora_tensors(export.weights.adapter, "comfy", DTYPES[export.dtype])[0].values()
        expected = dict(zip(expected, baked, strict=True))
    wrong = sorted(loaded.keys() ^ expected.keys())
    wrong += [name for name in loaded.keys() & expected.keys() if not torch.equal(loaded[name], expected[name])]
    scale = metadata["transformer.lora_alpha"] / metadata["transformer.r"] if export.dialect == "diffusers" else None
    if wrong or scale not in (None, export.weights.adapter.scale):
        raise RuntimeError(f"diffusers does not load what was exported (scale {scale}): {listed(wrong)}")


def write(export: Export, folder: Path) -> None:
    """Everything that belongs to the export, into an empty folder."""
    if export.format == "diffusers":
        write_pipeline(export, folder)
    elif export.format == "original":
        write_transformer(export, folder)
    else:
        write_lora(export, folder)
    contract, provenance = export.contract, export.provenance()
    described = json.loads(contract.to_json()) if contract else {"text_len": export.weights.sizes.text_len}
    _write_json(folder / CONTRACT_NAME, described | {"export": provenance})
    card = model_card(folder_title(export), provenance, contract, base=export.base_name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def folder_title(export: Export) -> str:
    """`dmd2 student, step 1000`."""
    method = f"{export.contract.method} " if export.contract else ""
    return f"{method}{export.role}, step {export.step}"


def export_to(export: Export, output: Path, *, overwrite: bool) -> None:
    """Write, check, sync and name the folder. Whatever happens before the end, `output` is as it was.

    Raises `UserError` when it is there and may not be replaced, and `DiskFull` when the disk has no room.
    """
    output = Path(os.path.abspath(output))  # "." has no name
    output.parent.mkdir(parents=True, exist_ok=True)
    old = output.parent / f".{output.name}.export.old"
    with _temporary_folder(output) as temporary:
        if old.exists() and not output.exists():
            old.rename(output)  # killed between the two renames below
        _check_output(output, overwrite)
        _check_space(export, output)
        try:
            write(export, temporary)
            verify(export, temporary)
            _sync(temporary)
            faults.reach("export.before_rename")
            shutil.rmtree(old, ignore_errors=True)
            if output.exists():
                output.rename(old)
                faults.reach("export.between_renames")
            temporary.rename(output)
            fsync_path(output.parent)
        except OSError as error:
            kind = DiskFull if is_disk_full(error) else UserError
            raise kind(f"cannot write {output}: {error}; nothing is left of it") from None
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _temporary_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, locked, gone afterwards; what a killed export left there is removed."""
    folder = output.parent / f".{output.name}.export.tmp"
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)

    def is_ours() -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), folder.stat())
        except FileNotFoundError:
            return False

    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {output}: another export is writing it") from None
        except OSError as error:
            print(
                f"WARNING: {folder} cannot be locked ({error.strerror}): see that one export writes {output}",
                flush=True,
            )
        if not is_ours():
            raise UserError(f"--output {output}: another export is writing it")
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield folder
        finally:
            if is_ours():  # renamed, it is not; the name may be the next export's by now
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"--output {output} exists: remove it, use another folder, or pass --overwrite")
    try:
        ours = "export" in json.loads((output / CONTRACT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(
            f"--output {output}: not written by an export, so --overwrite does not replace it: remove it yourself"
        )


def _check_space(export: Export, output: Path) -> None:
    if export.format == "lora":
        needed = sum(tensor.nbytes for tensor in export.weights.adapter.tensors.values())
    else:
        needed = sum(spec.bytes for _, spec in export.specs())
    if export.base is not None:
        needed += sum(
            path.stat().st_size for part in COPIED for path in (export.base / part).rglob("*") if path.is_file()
        )
    if (free := shutil.disk_usage(output.parent).free) < needed:
        raise DiskFull(f"no space for --output {output}: {needed} bytes needed, {free} free")


def _sync(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync_path(Path(root) / name)
        fsync_path(root)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def plan_export(args: argparse.Namespace) -> Export:
    """Everything that can be known before anything is written, checked. Raises `UserError`."""
    folder = Path(args.checkpoint)
    if not is_checkpoint(folder):
        raise UserError(f"--checkpoint {folder}: not a checkpoint of a run (.../checkpoint/step-<N>)")
    if not re.fullmatch(r"step-\d+", folder.resolve().name):
        raise UserError(f"--checkpoint {folder}: a checkpoint is called step-<N>; this one may be half-written")
    weights = open_role(folder, args.role, raw=not args.ema)
    if args.ema and not weights.state.startswith("ema."):
        raise UserError(f"--ema: {folder} has no moving average of {args.role!r}; leave it out for the raw weights")
    _check_format(args, weights)
    cfg = read_toml(folder / "config.toml")
    base_name, base = args.base or cfg.data.pipeline, None
    if args.format == "diffusers":
        base = _checked_base(base_name, weights)
    elif args.format == "lora":
        base_name = weights.adapter.base_from
    if base_name == TINY_WAN:
        base_name = str(pipeline_folder(TINY_WAN))
    contract = contract_of(cfg, weights.sizes.text_len) if args.role == "student" else None
    shard = sys.maxsize if args.format == "original" else _bytes(args.max_shard_size or "10GB")
    step = int(folder.resolve().name.removeprefix("step-"))
    what = (args.role, step, contract, args.format, args.dialect or "comfy", args.dtype, shard, base, base_name)
    return Export(weights, *what)


def _check_format(args: argparse.Namespace, weights: RoleWeights) -> None:
    is_adapter, lora = weights.adapter is not None, args.format == "lora"
    if lora and not is_adapter:
        raise UserError(f"--format lora: {args.role!r} is a whole network, not an adapter; use diffusers or original")
    if lora and args.merge:
        raise UserError("--merge makes a whole network of adapter and base; it does not go with --format lora")
    if is_adapter and not lora and not args.merge:
        raise UserError(
            f"{args.role!r} is an adapter on {weights.adapter.base_from!r}: --format lora exports it as such, --merge the "
            f"whole network as {args.format}"
        )
    if args.merge and not is_adapter:
        raise UserError(f"--merge has no effect: {args.role!r} is a whole network, not an adapter")
    for option, value, format in (
        ("--dialect", args.dialect, "lora"),
        ("--base", args.base, "diffusers"),
        ("--max-shard-size", args.max_shard_size, "diffusers"),
    ):
        if value and args.format != format:
            raise UserError(f"{option} {value} has no effect with --format {args.format}: only with {format}")


def _checked_base(name: str, weights: RoleWeights) -> Path:
    """The folder of the base pipeline, whose parts fit the network."""
    folder = pipeline_folder(name, *COPIED)
    where = f"--base {name} ({folder})"
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        text_dim = json.loads((folder / "text_encoder/config.json").read_text(encoding="utf-8"))["d_model"]
        channels = json.loads((folder / "vae/config.json").read_text(encoding="utf-8"))["z_dim"]
        kind, second = index["_class_name"], index.get("transformer_2") or [None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a pipeline in diffusers layout: {error!r}") from None
    if kind != "WanPipeline" or second[0] is not None:
        two = " of two networks (Wan 2.2)" if kind == "WanPipeline" else ""
        raise UserError(f"{where}: a {kind}{two}: need the WanPipeline of one network, text to video")
    for part in COPIED:
        if not (folder / part).is_dir():
            raise UserError(f"{where}: there is no {part}/ in it")
    for what, theirs, ours in (
        ("text embeddings are", text_dim, weights.sizes.text_dim),
        ("latents are", channels, weights.sizes.in_channels),
    ):
        if theirs != ours:
            raise UserError(
                f"{where}: its {what} {theirs} wide, the network wants {ours}: name the pipeline it belongs to"
            )
    return folder


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)B?", text)
    if not match or int(match[1]) == 0:
        raise UserError(f"--max-shard-size {text}: need a size such as 10GB, 500MB or 200KB")
    return int(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fvtitan.export",
        description="A role of a run for diffusers, ComfyUI and fvtitan.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="a run's .../checkpoint/step-<N>")
    parser.add_argument("--output", required=True, help="folder to write; whole or absent")
    parser.add_argument("--role", default="student", help="which network of the run (student)")
    parser.add_argument("--ema", action="store_true", help="its moving average (default: its own, raw weights)")
    parser.add_argument("--format", choices=("diffusers", "original", "lora"), default="diffusers", help="(diffusers)")
    parser.add_argument("--merge", action="store_true", help="an adapter and its base as one network")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of the weights (float32: as trained)"
    )
    parser.add_argument(
        "--base", default="", help="diffusers: pipeline with the other parts (default: the run's data.pipeline)"
    )
    parser.add_argument("--max-shard-size", default="", help="diffusers: of one weight file (10GB)")
    parser.add_argument(
        "--dialect", choices=("comfy", "diffusers"), help="lora: comfy (default) loads in both; diffusers only there"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args()
    faults.arm(os.environ)
    start, output = time.perf_counter(), Path(os.path.abspath(args.output))
    export = plan_export(args)
    export_to(export, output, overwrite=args.overwrite)

    import diffusers

    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    which = "moving average" if args.ema else "raw weights"
    print(
        f"{args.output}: {args.format}, {args.role} of {args.checkpoint} ({which}), {args.dtype}, {size / 1e6:.1f} MB, checked "
        f"with diffusers {diffusers.__version__}, {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    if not args.ema and read_tensor_names(args.checkpoint, f"ema.{args.role}"):
        print(f"the checkpoint has a moving average of {args.role} too: --ema exports that")


if __name__ == "__main__":
    cli(main)
