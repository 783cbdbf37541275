"""Files of Wan weights in the dialects that people have, read tensor by tensor under our names; and written.

    <pipeline>, <transformer>/     diffusers: config.json, diffusion_pytorch_model*.safetensors, an index when sharded
    <folder>/                      the original: the same files, original names
    <file>.safetensors             either dialect, as ComfyUI has them
    <file>.pt                      Self-Forcing, CausVid: {"generator": {...}, "generator_ema": {...}}

Which it is, the content says. Names, shapes and dtypes are all checked when a source is opened; data is read from mapped files,
so that no more than what is asked for is ever in memory.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from fvtitan.components import faults
from fvtitan.components.files import open_safetensors
from fvtitan.errors import UserError, listed
from fvtitan.models.pipeline import CONTRACT_NAME, pipeline_folder, pipeline_text_len
from fvtitan.models.wan.adapter import (
    check_complete,
    config_from_diffusers,
    config_from_original,
    diffusers_names,
    diffusers_shape,
)
from fvtitan.models.wan.transformer import FLAVORS, WanConfig, WanTransformer

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Around a network's names, by FSDP1, activation checkpointing and torch.compile; and before them, by who saved it.
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
_IMAGE = ("img_emb.", "image_embedder.", "k_img.", "add_k_proj.")


class _Stored(Protocol):
    """One tensor of a file: a slice of safetensors, or a mapped tensor."""

    shape: tuple[int, ...]
    dtype: str

    def __getitem__(self, rows: slice) -> Tensor: ...


class _Slice:
    def __init__(self, file: Any, name: str):
        self._slice = file.get_slice(name)
        self.shape, self.dtype = tuple(self._slice.get_shape()), self._slice.get_dtype()

    def __getitem__(self, rows: slice) -> Tensor:
        return self._slice[rows]


class _Mapped:
    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        names = {dtype: name for name, dtype in DTYPES.items()}
        self.shape, self.dtype = tuple(tensor.shape), names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))

    def __getitem__(self, rows: slice) -> Tensor:
        return self._tensor[rows]


@dataclass(frozen=True)
class WeightFiles:
    """The weights of one network in files, opened and checked."""

    where: str
    sizes: WanConfig
    paths: tuple[Path, ...]
    """The files that hold the tensors."""
    config: Path | None
    """The config.json that the sizes are from."""
    state: str
    """Of a .pt with several networks, which: generator, generator_ema; else ""."""
    tensors: Mapping[str, _Stored]
    """By our names."""

    @property
    def folder(self) -> Path:
        """Where fvtitan.json is, if anywhere: the pipeline's folder, or the files' own."""
        return _described(self.paths[0].parent)

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters of the network."""
        return tuple(self.tensors)

    def full(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Whole tensors."""
        return {name: self.read(name) for name in names}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows (dimension 0) of one of our parameters, in the file's dtype and our shape; a view of the mapped file."""
        tensor = self.tensors[name][rows]
        return tensor.reshape(tensor.shape[0], -1) if name == "patch_embedding.weight" else tensor


def open_weights(init_from: str, weights: Literal["auto", "ema", "raw"] = "auto") -> WeightFiles:
    """Open a folder, hub id or file (see above); of a .pt with a moving average, that or the raw weights.

    Raises `UserError` when it is not there, damaged, of no known dialect, or when names, shapes or dtypes are not exactly those
    of the network that its sizes say.
    """
    path, state = Path(init_from), ""
    if is_file := path.is_file():
        if _is_zip(path):
            found, state = _torch_tensors(path, weights)
        else:
            file = _open(path)
            found = {name: _Slice(file, name) for name in file.keys()}  # noqa: SIM118
        files, config, where = {path}, path.with_name("config.json"), str(path)
    else:
        folder = transformer_folder(init_from)
        by_name = weight_files(folder)
        found, files = _in_files(by_name, folder), set(by_name.values())
        config, where = folder / "config.json", str(folder)
    dialect, found = _recognised(found, where)
    if is_file and not config.is_file():
        sizes, config = _flavor(dialect, found, where), None
    else:
        sizes = read_config(config, init_from)
    shapes = parameter_shapes(sizes)
    names = diffusers_names(shapes) if dialect == "diffusers" else {name: name for name in shapes}
    check_complete(names, found, where)
    problems = []
    for ours, name in names.items():
        stored, expected = found[name], diffusers_shape(ours, shapes[ours], sizes)
        if stored.shape != expected:
            problems.append(f"{name} has shape {list(stored.shape)}, the model needs {list(expected)}")
        elif stored.dtype not in DTYPES:
            problems.append(f"{name} has dtype {stored.dtype}, need one of {', '.join(DTYPES)}")
    if problems:
        raise UserError(f"{where}: {len(problems)} tensors do not fit: {listed(problems, '; ')}")
    tensors = {ours: found[name] for ours, name in names.items()}
    return WeightFiles(where, sizes, tuple(sorted(files)), config, state, tensors)


def read_config(path: Path, init_from: str) -> WanConfig:
    """The sizes in a transformer's config.json, diffusers' or the original one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"init_from = {init_from!r}: cannot read {path}: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"init_from = {init_from!r}: cannot read {path}: it holds no object")
    if str(config.get("_class_name")).endswith("WanModel"):
        return config_from_original(config, str(path))
    return config_from_diffusers(config, pipeline_text_len(_described(path.parent)), str(path))


def _described(folder: Path) -> Path:
    return next((path for path in (folder, folder.parent) if (path / CONTRACT_NAME).is_file()), folder)


def holds_average(init_from: str) -> bool:
    """Whether `init_from` may hold a moving average beside the network: a file of `torch.save`."""
    return Path(init_from).is_file() and _is_zip(Path(init_from))


def transformer_folder(init_from: str) -> Path:
    """The folder with the transformer's config and weights: `<pipeline>/transformer`, or the folder itself."""
    folder = pipeline_folder(init_from, "transformer")
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def weight_files(folder: Path) -> dict[str, Path]:
    """`{tensor name: file}` of a folder, single or sharded. Raises `UserError` naming what is missing."""
    index = folder / f"{WEIGHTS_NAME}.index.json"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {name: folder / file for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: damaged index: {error!r}") from None
        for path in set(files.values()):
            if path.parent != folder or not path.is_file():
                raise UserError(f"{index} names {path.name}, which is not in {folder}")
        return files
    single = folder / WEIGHTS_NAME
    if not single.is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".pt"))
        hint = f"; to read {others[0]}, name the file itself" if others else ""
        raise UserError(f"no weights in {folder}: expected {WEIGHTS_NAME} or {index.name}{hint}")
    return dict.fromkeys(_open(single).keys(), single)


def _open(path: Path) -> Any:
    try:
        return open_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged safetensors file: {error}") from None


def _in_files(by_name: Mapping[str, Path], folder: Path) -> dict[str, _Stored]:
    """The tensors of a folder. Raises `UserError` when the index and the files do not name the same ones."""
    found: dict[str, _Stored] = {}
    for path in sorted(set(by_name.values())):
        file, there = _open(path), {name for name, where in by_name.items() if where == path}
        if differing := sorted(there ^ set(file.keys())):
            what = "not in it" if differing[0] in there else "not in the index"
            raise UserError(f"{path}: {differing[0]!r} is {what}: the files of {folder} do not belong together")
        found |= {name: _Slice(file, name) for name in there}
    return found


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _torch_tensors(path: Path, weights: Literal["auto", "ema", "raw"]) -> tuple[dict[str, _Stored], str]:
    """The network in a file of `torch.save`, mapped and unpickled without running code, and its key in the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: refused, or damaged: not plain tensors saved by torch.save: {reason}") from None
    state = ""
    if isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        wanted = {"auto": ("generator_ema", "generator"), "ema": ("generator_ema",), "raw": ("generator",)}[weights]
        there = [key for key in wanted if isinstance(content.get(key), dict)]
        if not there:
            raise UserError(f"{path}: holds {listed(map(str, content))}; need {' or '.join(wanted)}")
        state, content = there[0], content[there[0]]
    elif weights != "auto":
        raise UserError(
            f"{path}: holds one network, not generator and generator_ema: remove init_weights = {weights!r}"
        )
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    odd = [name for name, value in content.items() if not isinstance(value, Tensor) or value.layout != torch.strided]
    if odd:
        raise UserError(f"{path}: {odd[0]!r} is not a tensor")
    return {str(name): _Mapped(tensor) for name, tensor in content.items()}, state


def _recognised(found: Mapping[str, _Stored], where: str) -> tuple[str, dict[str, _Stored]]:
    """The dialect, "diffusers" or "original", and the tensors under its names alone, without what savers put before them."""
    plain = {name: _WRAPPERS.sub("", name) for name in found}
    prefix = next((p for p in _PREFIXES if any(n.startswith(f"{p}patch_embedding.") for n in plain.values())), "")
    short = {name.removeprefix(prefix): found[whole] for whole, name in plain.items()}
    if len(short) < len(plain):
        raise UserError(f"{where}: some tensors are there twice, under names with and without {prefix!r}")
    if any("lora_" in name for name in short):
        raise UserError(f"{where}: a LoRA file, not a network; init_from needs the network that it lies on")
    if any(part in name for name in short for part in _IMAGE):
        raise UserError(f"{where}: an image-to-video network; this one is text-to-video")
    if any(name.startswith("condition_embedder.") for name in short):
        return "diffusers", short
    if any(name.startswith("time_projection.") for name in short):
        return "original", short
    raise UserError(f"{where}: not a Wan transformer by diffusers' or the original names; it holds {listed(found)}")


def _flavor(dialect: str, found: Mapping[str, _Stored], where: str) -> WanConfig:
    """The flavor with these tensors, of a file alone."""
    name = "ffn.net.0.proj.weight" if dialect == "diffusers" else "ffn.0.weight"
    layers = sum(bool(re.fullmatch(rf"blocks\.\d+\.{re.escape(name)}", key)) for key in found)
    first = found.get(f"blocks.0.{name}")
    for sizes in FLAVORS.values():
        if first is not None and (layers, *first.shape) == (sizes.num_layers, sizes.ffn_dim, sizes.dim):
            return sizes
    shape = "none" if first is None else list(first.shape)
    raise UserError(
        f"{where}: {layers} layers with a feed-forward {shape} are the sizes of no flavor ({', '.join(FLAVORS)}), and there is "
        "no config.json beside the file that says them"
    )


def parameter_shapes(sizes: WanConfig) -> dict[str, torch.Size]:
    """Of all parameters of a network, in its order."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in WanTransformer(sizes).named_parameters()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    """Under which it is written."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors one after another, as they come, so that the file is never in memory as a whole; and sync it.

    `tensors` are those of `specs`, in their order: wider dtypes first, or they would not be aligned (8 bytes of the header's
    length, the header, the data; https://github.com/huggingface/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    names, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    for spec in specs:
        start, end = end, end + spec.bytes
        header[spec.name] = {"dtype": names[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for number, (spec, tensor) in enumerate(zip(specs, tensors, strict=True)):
            faults.reach("export.weights", number)
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), spec.name
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
