"""The sampler contract: every recipe's sampler survives the way through JSON, and what no sampler can do is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fvtitan.config import read_toml
from fvtitan.contract import SamplerContract, contract_of, read_contract
from fvtitan.errors import UserError
from fvtitan.flow_matching import shift_sigma
from fvtitan.methods import METHODS
from fvtitan.models.pipeline import CONTRACT_NAME, pipeline_text_len
from fvtitan.preprocess import WAN_NEGATIVE_PROMPT
from tests.helpers import ROOT

RECIPES = sorted((ROOT / "train_configs").glob("*.toml"))


def written(contract: SamplerContract, folder: Path) -> Path:
    (folder / CONTRACT_NAME).write_text(contract.to_json(), encoding="utf-8")
    return folder


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_s_sampler_survives(recipe, tmp_path):
    cfg = read_toml(recipe)
    contract = contract_of(cfg, 512)
    folder = written(contract, tmp_path)
    assert read_contract(folder) == contract
    assert contract.spec == METHODS[cfg.method.name].sampler(cfg)
    assert pipeline_text_len(folder) == 512
    for raw, sigma in zip(contract.raw_timesteps, contract.sigmas, strict=False):
        assert shift_sigma(raw / 1000, cfg.schedule.shift) == pytest.approx(sigma, abs=1e-9)
    assert (contract.causal is not None) == (cfg.models["student"].name == "wan_causal")


def test_dmd2_in_both_times(tmp_path):
    cfg = read_toml(ROOT / "train_configs/tiny_dmd2.toml")
    sampler = json.loads(written(contract_of(cfg, 32), tmp_path).joinpath(CONTRACT_NAME).read_text())["sampler"]
    assert sampler["raw_timesteps"] == [1000, 750, 500, 250]
    assert sampler["timesteps"] == pytest.approx([1000, 937.5, 833.333, 625], abs=1e-3)
    assert sampler["sigmas"][-1] == 0 and sampler["solver"] == "sde" and sampler["guidance_scale"] == 1


def test_the_negative_prompt_is_that_of_the_cache(tmp_path, capsys):
    cfg = read_toml(ROOT / "train_configs/tiny_finetune.toml")
    assert contract_of(cfg, 32).unconditional_prompt == ""
    cfg.data.uncond_prompt, cfg.data.path = "negative", str(tmp_path)
    assert contract_of(cfg, 32).unconditional_prompt == WAN_NEGATIVE_PROMPT
    assert f"the run's cache {tmp_path} is not here" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text(json.dumps({"contract": {"negative_prompt": "blurry, grün"}}))
    contract = contract_of(cfg, 32)
    assert contract.unconditional_prompt == "blurry, grün" and not capsys.readouterr().err
    assert read_contract(written(contract, tmp_path)) == contract


def test_a_pipeline_of_others_has_none(tmp_path):
    assert read_contract(tmp_path) is None
    (tmp_path / CONTRACT_NAME).write_text('{"text_len": 32}')
    assert read_contract(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"format_version = 2: this fvtitan reads 1"),
        ({"solver": "unipc"}, r"sampler.solver = 'unipc' is not allowed"),
        ({"solvr": "ode"}, r"unknown key sampler.solvr. Did you mean 'solver'"),
        ({"shift": None}, r"sampler lacks shift"),
        ({"shift": 0.0}, r"sampler.shift = 0.0: must be > 0"),
        ({"shift": 3.0}, r"sampler.raw_timesteps = .* contradicts sigmas and shift"),
        ({"timesteps": [1000, 750, 500, 250]}, r"sampler.timesteps = .* contradicts"),
        ({"sigmas": [1.0, 0.5, 0.7, 0.0]}, r"need a ladder in \[0, 1\] that descends to 0"),
        ({"sigmas": [1.0, 0.5]}, r"need a ladder"),
        ({"sigmas": "1, 0"}, r"sampler.sigmas = '1, 0' has the wrong type"),
        ({"num_frames": 34}, r"sampler.num_frames = 34: must be 4n \+ 1; nearest: 33 or 37"),
        ({"height": 100}, r"sampler.height = 100: must be a multiple of 16; nearest: 96 or 112"),
        ({"num_frames": 33.5}, r"sampler.num_frames = 33.5 has the wrong type"),
        ({"guidance_scale": float("nan")}, r"sampler.guidance_scale = nan: must be >= 0"),
        ({"causal": None, "streaming": True}, r"sampler.causal is missing"),
        ({"causal": {}}, r"sampler.causal lacks frames_per_block"),
        ({"causal": {"frames_per_block": 4}}, r"9 latent frames do not divide into blocks of 4"),
        ({"causal": {"frames_per_block": 0}}, r"frames_per_block = 0: must be >= 1"),
    ],
)
def test_what_no_sampler_can_do_is_refused(changes: dict[str, Any], message: str, tmp_path):
    contract = contract_of(read_toml(ROOT / "train_configs/tiny_self_forcing.toml"), 32)
    table = json.loads(contract.to_json())
    table["sampler"] |= changes
    table["sampler"] = {key: value for key, value in table["sampler"].items() if value is not None}
    (tmp_path / CONTRACT_NAME).write_text(json.dumps(table))
    with pytest.raises(UserError, match=message):
        read_contract(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", '{"text_len": 32, "sampler": 3}', "[" * 100_000])
def test_a_damaged_file_is_one_error(text, tmp_path):
    (tmp_path / CONTRACT_NAME).write_text(text)
    with pytest.raises(UserError, match=CONTRACT_NAME):
        read_contract(tmp_path)
