"""The latent cache as training reads it: what it gives, and every kind of damage named before or at the read."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from fvtitan.data.latent_cache import LatentCache, check_cache_geometry, fingerprint, read_jsonl, text_key
from fvtitan.errors import UserError
from tests.helpers import GEOMETRY, make_cache

SHARD = "shard-00000.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("cache") / "cache")


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def edit_manifest(cache: Path, **changes: object) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | changes))


def rewrite(cache: Path, samples: list[dict] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Change samples or tensors and make sizes and fingerprint fit again, so that only the inner contradiction is left."""
    if tensors is not None:
        save_file(tensors, cache / SHARD)
    samples = samples or read_jsonl(cache / "samples.jsonl")
    (cache / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    contract = json.loads((cache / "manifest.json").read_text())["contract"]
    size = {SHARD: (cache / SHARD).stat().st_size}
    written = hashlib.sha256((cache / "samples.jsonl").read_bytes()).hexdigest()
    edit_manifest(cache, fingerprint=fingerprint(contract, samples), samples_sha256=written)
    edit_manifest(cache, num_samples=len(samples), shards=size)


@pytest.fixture
def prompts(copy) -> Path:
    """The captions of `copy` as a prompt-only cache."""
    samples = read_jsonl(copy / "samples.jsonl")
    texts = {key: value for key, value in load_file(copy / SHARD).items() if key.startswith("text.")}
    for sample in samples:
        key = text_key(sample["caption"])
        sample |= {"key": key, "shape": list(texts[key].shape)}
    edit_manifest(copy, contract={"encoders": {"text_len": 32}, "size": None})
    rewrite(copy, samples, texts)
    return copy


def test_samples_and_prompts_come_back(whole):
    data, tensors = LatentCache(whole), load_file(whole / SHARD)
    assert len(data) == 12 and data.fingerprint == data.manifest["fingerprint"]
    sample = data[7]
    assert sample.keys() == {"sample_id", "caption", "latents", "prompt_embeds"}
    assert (sample["sample_id"], sample["caption"]) == ("7.mp4", "caption 7")
    assert torch.equal(sample["latents"], tensors["latents.00007"]) and sample["latents"].dtype == torch.bfloat16
    assert torch.equal(sample["prompt_embeds"], tensors[text_key("caption 7")])
    assert sample["prompt_embeds"].shape == (5, 64)  # 3 + 7 % 5 tokens: the true length
    assert data.empty_prompt_embeds.shape == (1, 64) and data.negative_prompt_embeds.shape == (4, 64)


def test_a_cache_of_prompts_has_no_latents(whole, prompts):
    data, with_latents = LatentCache(prompts), LatentCache(whole)
    assert with_latents.has_latents and not data.has_latents
    expected = {key: value for key, value in with_latents[7].items() if key != "latents"}
    sample = data[7]
    assert torch.equal(sample.pop("prompt_embeds"), expected.pop("prompt_embeds")) and sample == expected
    assert data.bucket_shapes == [()] and data.bucket_indices == [list(range(12))]  # however long the prompts are
    assert data.fingerprint != with_latents.fingerprint


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {text_key("caption 4"): torch.zeros(6, 64).bfloat16()},
            r"sample '4.mp4' is BF16 \[6, 64\], samples.jsonl says",
        ),
        ({text_key("caption 4"): torch.zeros(7, 64)}, r"sample '4.mp4' is F32 \[7, 64\]"),
        ({text_key("caption 4"): None}, f"lacks '{text_key('caption 4')}'"),
        (
            {text_key("caption 4"): torch.full((7, 64), torch.nan).bfloat16()},
            "prompt_embeds of sample '4.mp4' hold NaN",
        ),
    ],
)
def test_damaged_prompts_are_named(prompts, change, message):
    """Fault 29."""
    tensors = {key: value for key, value in (load_file(prompts / SHARD) | change).items() if value is not None}
    rewrite(prompts, tensors=tensors)
    with pytest.raises(UserError, match=message):
        LatentCache(prompts)[4]


def test_buckets_hold_each_sample_once(copy):
    tensors, samples = load_file(copy / SHARD), read_jsonl(copy / "samples.jsonl")
    for i in (1, 4, 5):
        tensors[f"latents.{i:05d}"] = torch.zeros(1, 16, 4, 4, dtype=torch.bfloat16)
        samples[i]["shape"] = [1, 16, 4, 4]
    rewrite(copy, samples, tensors)
    data = LatentCache(copy)
    assert data.bucket_shapes == [(1, 16, 4, 4), (3, 16, 4, 4)]
    assert data.bucket_indices == [[1, 4, 5], [0, 2, 3, 6, 7, 8, 9, 10, 11]]


def test_fingerprint_follows_content_only(copy):
    contract, samples = LatentCache(copy).manifest["contract"], read_jsonl(copy / "samples.jsonl")
    same = [s | {"shard": "elsewhere", "key": "k"} for s in samples]
    reference = fingerprint(contract, samples)
    assert fingerprint(contract, same) == reference
    assert fingerprint(contract | {"encoders": {"text_len": 64}}, samples) != reference
    assert fingerprint(contract, samples[::-1]) != reference
    assert fingerprint(contract, [samples[0] | {"source_sha256": "x"}, *samples[1:]]) != reference


def test_fingerprints_of_existing_caches_stay():
    sample = {"sample_id": "0.mp4", "caption": "caption ü", "source_sha256": "ab"}
    made = fingerprint({"encoders": {"text_len": 32}, "size": GEOMETRY}, [sample])
    assert made == "797365d7f88c8844c4cff82651b77fc4ee468239de9d379fa50f090a29fcab49"


def test_only_a_newline_ends_a_line(copy):
    caption = "left\u2028right \x85 \x1c end"
    tensors, samples = load_file(copy / SHARD), read_jsonl(copy / "samples.jsonl")
    tensors[text_key(caption)] = tensors.pop(text_key(samples[0]["caption"]))
    samples[0]["caption"] = caption
    rewrite(copy, samples, tensors)
    lines = "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples)
    (copy / "samples.jsonl").write_text(lines, encoding="utf-8")
    edit_manifest(copy, samples_sha256=hashlib.sha256(lines.encode()).hexdigest())
    assert LatentCache(copy)[0]["caption"] == caption


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_read_it(whole, context):
    data = LatentCache(whole)
    expected = [data[i]["latents"] for i in range(len(data))]  # opens the shard here, before the workers
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context)
    assert all(torch.equal(a, b["latents"]) for a, b in zip(expected, loader, strict=True))


def truncate(cache: Path) -> None:
    (cache / SHARD).write_bytes((cache / SHARD).read_bytes()[:-10])


def break_header(cache: Path) -> None:
    (cache / SHARD).write_bytes(b"\xff" * 64 + (cache / SHARD).read_bytes()[64:])


def drop_last_sample(cache: Path) -> None:
    lines = (cache / "samples.jsonl").read_text().splitlines(keepends=True)
    (cache / "samples.jsonl").write_text("".join(lines[:-1]))


def other_caption(cache: Path) -> None:
    text = (cache / "samples.jsonl").read_text()
    (cache / "samples.jsonl").write_text(text.replace("caption 3", "something else"))


def half_a_manifest(cache: Path) -> None:
    (cache / "manifest.json").write_text((cache / "manifest.json").read_text()[:50])


def lose_tensor(cache: Path) -> None:
    tensors = load_file(cache / SHARD)
    del tensors["latents.00004"]
    rewrite(cache, tensors=tensors)


def other_shape(cache: Path) -> None:
    rewrite(cache, tensors=load_file(cache / SHARD) | {"latents.00004": torch.zeros(2, 16, 4, 4).bfloat16()})


def other_dtype(cache: Path) -> None:
    rewrite(cache, tensors=load_file(cache / SHARD) | {"latents.00004": torch.zeros(3, 16, 4, 4)})


def lose_field(cache: Path) -> None:
    samples = read_jsonl(cache / "samples.jsonl")
    del samples[2]["source_sha256"]
    (cache / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))


def shard_outside(cache: Path) -> None:
    (cache.parent / "outside.safetensors").write_bytes((cache / SHARD).read_bytes())
    samples = [s | {"shard": "../outside.safetensors"} for s in read_jsonl(cache / "samples.jsonl")]
    rewrite(cache, samples)
    edit_manifest(cache, shards={"../outside.safetensors": (cache / SHARD).stat().st_size})


@pytest.mark.faults
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"shard-00000.safetensors has \d+ bytes, the manifest says \d+"),
        (lambda c: (c / SHARD).unlink(), "shard-00000.safetensors is missing, the manifest says"),
        (break_header, "shard-00000.safetensors is damaged"),
        (lose_tensor, "shard-00000.safetensors lacks 'latents.00004'"),
        (other_shape, r"sample '4.mp4' is BF16 \[2, 16, 4, 4\], samples.jsonl says BF16 \[3, 16, 4, 4\]"),
        (other_dtype, r"sample '4.mp4' is F32 \[3, 16, 4, 4\]"),
        (shard_outside, "leaves the folder"),
        (half_a_manifest, "manifest.json is damaged"),
        (lambda c: edit_manifest(c, format_version=9), "format 9, this version reads 1"),
        (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json: format"),
        (lambda c: (c / "manifest.json").write_text('{"format_version": 1}'), "contract, fingerprint, num_samples"),
        (lambda c: (c / "manifest.json").unlink(), r"is not a latent cache \(no manifest.json\)"),
        (lambda c: (c / "samples.jsonl").unlink(), "samples.jsonl is damaged"),
        (lambda c: (c / "samples.jsonl").write_text(""), "has no samples"),
        (drop_last_sample, "has 11 samples, the manifest says 12"),
        (other_caption, "is not the list the manifest was written for"),
        (lose_field, "line 3 lacks 'source_sha256'"),
        (lambda c: (c / "prompts.safetensors").unlink(), "prompts.safetensors is damaged"),
        (lambda c: (c / "prompts.safetensors").write_bytes(b"x"), "prompts.safetensors is damaged"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_damage_is_named_when_it_is_opened(copy, damage, message):
    """Fault 29."""
    damage(copy)
    with pytest.raises(UserError, match=message) as raised:
        LatentCache(copy)
    if "leaves" not in message:
        assert "skipped.jsonl" in str(raised.value) or "python -m fvtitan.preprocess" in str(
            raised.value
        )  # the way out


@pytest.mark.faults
@pytest.mark.parametrize("name", ["latents.00003", text_key("caption 3")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_sample(copy, name, value):
    """Fault 29."""
    tensors = load_file(copy / SHARD)
    tensors[name].view(-1)[1] = value
    rewrite(copy, tensors=tensors)
    data = LatentCache(copy)
    data[2]
    what = "latents" if name.startswith("latents") else "prompt_embeds"
    with pytest.raises(UserError, match=f"{what} of sample '3.mp4' hold NaN or Inf"):
        data[3]


def test_other_geometry_names_the_key(whole):
    data = LatentCache(whole)
    check_cache_geometry(data, **GEOMETRY)
    with pytest.raises(UserError, match=r"data\.height = 64, but the cache .* was made with height = 32"):
        check_cache_geometry(data, **{**GEOMETRY, "height": 64})


def test_geometry_of_several_buckets(tmp_path):
    data = LatentCache(make_cache(tmp_path / "cache", num_portrait=4, num_long=4))
    assert data.bucket_shapes == [(3, 16, 4, 4), (3, 16, 6, 4), (5, 16, 4, 4)]
    for size in ({}, {"height": 48}, {"num_frames": 17}):  # any of them
        check_cache_geometry(data, **GEOMETRY | size)
    with pytest.raises(
        UserError,
        match="data.width, height and num_frames are 32x48x17, which is no bucket of the cache .*: give one of 32x32x9, "
        "32x48x9, 32x32x17, the one that validation samples",
    ):
        check_cache_geometry(data, **GEOMETRY | {"height": 48, "num_frames": 17})
    with pytest.raises(UserError, match=r"data\.fps = 8, but the cache .* was made with fps = 16"):
        check_cache_geometry(data, **GEOMETRY | {"fps": 8})


def test_reading_needs_no_encoder_library(whole):
    code = (
        f"import sys; from fvtitan.data.latent_cache import LatentCache; LatentCache({str(whole)!r})[0]\n"
        "print([m for m in ('diffusers', 'transformers', 'av', 'ftfy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
