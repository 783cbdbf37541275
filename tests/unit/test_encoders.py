"""Text encoder and VAE of the shipped pipeline against diffusers' own calls."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fvtitan.assets import tiny_wan_path
from fvtitan.errors import UserError
from fvtitan.models.encoders import TextEncoder, VideoVAE, clean_prompt, component_hash


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(tiny_wan_path())


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder("tiny-wan")


PROMPTS = ["a small red circle moving left", "", "Bl&amp;ue   zebra\n\u00e2\u20ac\u2122s caf\u00e9 " + "word " * 60]


def test_text_rows_are_wanpipelines(pipeline, encoder):
    expected, _ = pipeline.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=encoder.text_len, device=torch.device("cpu")
    )
    rows = encoder.encode(PROMPTS)
    assert [len(row) for row in rows][1:] == [1, 32]
    assert [encoder.cuts(prompt) for prompt in PROMPTS] == [False, False, True]
    exact = "a " * (encoder.text_len - 1)  # and the end
    assert not encoder.cuts(exact) and encoder.cuts(exact + "a")
    for row, padded in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, padded[: len(row)], atol=1e-5, rtol=1e-5)
        assert padded[len(row) :].eq(0).all()


def test_cleaning_is_wanpipelines():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for prompt in PROMPTS:
        assert clean_prompt(prompt) == prompt_clean(prompt)


def test_unknown_words_are_not_lost(encoder):
    tokenizer = encoder.tokenizer
    assert tokenizer.decode(tokenizer("a purple zebra").input_ids, skip_special_tokens=True) == "a purple zebra"
    zebra, okapi = encoder.encode(["a zebra", "a okapi"])
    assert zebra.shape != okapi.shape or not torch.allclose(zebra, okapi, atol=1e-2)
    known = tokenizer("a small red circle moving left slowly on a dark grey background").input_ids
    assert len(known) == 13  # one token a word, and the end


def test_words_stay_distinguishable(encoder):
    red, blue = encoder.encode(["a small red circle moving left", "a small blue circle moving left"])
    change = (red - blue).norm(dim=-1)
    assert int(change.argmax()) == 2 and float(change[2]) > 5 * float(change[[0, 1, 3, 4, 5]].max())


def test_vae_is_diffusers_with_wans_normalisation(pipeline):
    vae, reference = VideoVAE("tiny-wan"), pipeline.vae
    pixels = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    latents = vae.encode(pixels)
    assert latents.shape == (2, 2, 16, 4, 4)
    mean, std = (torch.tensor(getattr(reference.config, name)) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        mode = reference.encode(pixels.transpose(1, 2)).latent_dist.mode()
        decoded = reference.decode(mode).sample
    torch.testing.assert_close(latents, ((mode.permute(0, 2, 3, 4, 1) - mean) / std).permute(0, 1, 4, 2, 3))
    torch.testing.assert_close(vae.decode(latents), decoded.transpose(1, 2), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="6 frames: the VAE takes 4n"):
        vae.encode(torch.zeros(1, 6, 3, 32, 32))


def test_broken_pipelines_are_refused(tmp_path):
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_wan_path() / part, tmp_path / part)
    with pytest.raises(UserError, match="has no vae/ folder"):
        VideoVAE(str(tmp_path))
    with pytest.raises(UserError, match="neither"):
        TextEncoder("no-such-thing")
    path = tmp_path / "text_encoder/model.safetensors"
    weights = load_file(path)
    save_file({name: t.zero_() if "shared" in name else t for name, t in weights.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="two different prompts the same embedding"):
        TextEncoder(str(tmp_path))
    shutil.rmtree(tmp_path / "tokenizer")
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UserError, match=f"cannot load the tokenizer from {tmp_path}/tokenizer"):
        TextEncoder(str(tmp_path))


def test_an_embedding_that_is_not_shared_is_refused(tmp_path):
    pipeline = shutil.copytree(tiny_wan_path(), tmp_path / "pipeline")
    path = pipeline / "text_encoder/model.safetensors"
    weights = load_file(path)
    save_file({**weights, "encoder.embed_tokens.weight": torch.rand_like(weights["shared.weight"])}, path)
    with pytest.raises(UserError, match="not tied to `shared`"):
        TextEncoder(str(pipeline))


@pytest.mark.parametrize(
    ("part", "file", "load"),
    [
        ("text_encoder", "model", TextEncoder),
        ("vae", "diffusion_pytorch_model", VideoVAE),
    ],
)
def test_weights_must_all_be_there_and_safe(tmp_path, part, file, load):
    pipeline = shutil.copytree(tiny_wan_path(), tmp_path / "pipeline")
    path = pipeline / part / f"{file}.safetensors"
    whole, weights = path.read_bytes(), load_file(path)
    name = sorted(weights)[len(weights) // 2]
    save_file({n: t for n, t in weights.items() if n != name}, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part} lacks 1 weights, the first: {name}"):
        load(str(pipeline))
    save_file({**weights, name: torch.cat([weights[name]] * 2)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{part} has the wrong shape for 1 weights, the first: {name}"):
        load(str(pipeline))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"cannot load the .* from {pipeline / part}"):
        load(str(pipeline))
    path.unlink()
    for pickled in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        torch.save(weights, pipeline / part / pickled)
    with pytest.raises(UserError, match="no file named .*safetensors"):
        load(str(pipeline))


def test_component_hash_is_its_content(tmp_path):
    copy = shutil.copytree(tiny_wan_path() / "vae", tmp_path / "vae")
    reference = component_hash(tiny_wan_path() / "vae")
    (copy / "README.md").write_text("not part of the model")
    assert component_hash(copy) == reference
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"z_dim": 16', '"z_dim": 8'))
    assert component_hash(copy) != reference
