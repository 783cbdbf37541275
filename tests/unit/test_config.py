"""TOML and command line: strict, typed, with the nearest fix in every error."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import tomli

from fvtitan import config
from fvtitan.config import JobConfig, RoleConfig, load_config, main, read_toml
from fvtitan.errors import UserError, nearest_multiples
from fvtitan.methods import METHODS
from fvtitan.reference import reference
from tests.helpers import run_program

RECIPES = sorted(Path(__file__).parents[2].glob("train_configs/*.toml"))
MINIMAL = '[models.student]\nflavor = "tiny"\n'


def write(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


def load(tmp_path, text=MINIMAL, *overrides):
    return load_config(["--job.config_file", write(tmp_path, text), *overrides])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_every_recipe_parses_and_round_trips(recipe, tmp_path):
    cfg = read_toml(recipe)
    cfg.check()
    again = read_toml(write(tmp_path, cfg.to_toml()))
    assert again == cfg


def test_precedence_and_both_spellings(tmp_path):
    text = MINIMAL + "[training]\nsteps = 7\nseed = 3\n"
    cfg = load(tmp_path, text, "--training.steps=9", "--ema.enable", "true", "--optimizer.betas", "0.5", "0.75")
    assert (cfg.training.steps, cfg.training.seed, cfg.ema.enable, cfg.optimizer.betas) == (9, 3, True, (0.5, 0.75))
    assert load(tmp_path, text, "--compile.enable=false", "--ema.enable=True").ema.enable is True
    words = load(tmp_path, text, "--job.description", "true", "--job.dump_folder=false").job
    assert (words.description, words.dump_folder) == ("true", "false")


def test_zero_is_a_value(tmp_path):
    cfg = load(tmp_path, MINIMAL + "[optimizer]\nlr = 1\nweight_decay = 0\n[models.student.optimizer]\nlr = 0\n")
    assert cfg.role_optimizer("student").lr == 0.0 and isinstance(cfg.optimizer.lr, float)
    assert cfg.role_optimizer("student").weight_decay == 0.0


def test_method_keys_are_typed(tmp_path):
    text = MINIMAL + '[method]\nname = "finetune"\nloss_weighting = "bell"\n'
    assert load(tmp_path, text).method.loss_weighting == "bell"
    assert load(tmp_path, text, "--method.loss_weighting", "none").method.loss_weighting == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nstep = 3\n", r"unknown key training\.step\. Did you mean 'steps'"),
        ("[trainin]\nsteps = 3\n", r"unknown key \[trainin\]\. Did you mean 'training'"),
        ('[training]\nsteps = "3"\n', r"training\.steps = '3' has the wrong type str: need int"),
        ("[training]\nsteps = true\n", r"training\.steps = True has the wrong type bool"),
        ("[training]\nsteps = 2.0\n", "wrong type float"),
        ("[ema]\nenable = 1\n", "wrong type int: need bool"),
        ("training = 3\n", r"need a table \[training\]"),
        ('[training]\nmixed_precision_param = "bf16"\n', r"Did you mean 'bfloat16'"),
        ("[optimizer]\nbetas = [0.9]\n", "need 2 values, got 1"),
        ("[optimizer]\nbetas = [0.9, 1.0]\n", r"optimizer\.betas"),
        ('[method]\nname = "finetun"\n', r"Did you mean 'finetune'"),
        ('[method]\nname = "finetune"\nloss_weight = "bell"\n', r"unknown key method\.loss_weight.*'loss_weighting'"),
        ('[models.studnt]\nflavor = "tiny"\n', r"\[models\.studnt\] is not a role"),
        ("[data]\nnum_frames = 32\n", "must be 4n \\+ 1; nearest: 29 or 33"),
        ("[data]\nwidth = 100\n", "multiple of 16; nearest: 96 or 112"),
        ("[data]\nheight = 0\n", "multiple of 16"),
        ("[training]\nsteps = 0\n", r"training\.steps = 0"),
        ('[activation_checkpoint]\nmode = "selectve"\n', "Did you mean 'selective'"),
        ('[compile]\nenable = true\nbackend = "inducter"\n', "Did you mean 'inductor'"),
        ('[compile]\nbackend = "eager"\n', r"compile\.backend = 'eager' has no effect with compile\.enable = false"),
        ("[checkpoint]\nkeep_latest_k = 1\n", "keep_latest_k = 1"),
        ("[checkpoint]\nenable = false\nrequire_resume = true\n", "have no effect"),
        ('[validation]\njudge = true\nprompts = "p.txt"\n', "judge = true needs"),
        (
            "[training]\nlocal_batch_size = 4\nglobal_batch_size = 6\n",
            "multiple of local_batch_size x data ranks = 4 x 1; nearest: 4 or 8",
        ),
        ("[training]\nmax_nonfinite_skips = 3\n", r"max_nonfinite_skips = 3 has no effect .* use \"skip\""),
        ('[training]\nnonfinite = "skip"\nmax_nonfinite_skips = 0\n', "max_nonfinite_skips = 0: must be >= 1"),
        ("[parallelism]\ndata_parallel_replicate_degree = 2\n", "is 2, but there are 1 processes"),
        ("a = = 3\n", "not a TOML file"),
    ],
)
def test_errors_name_key_value_and_fix(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text if "models." in text else text + MINIMAL if not text.startswith("a =") else text)


CAUSAL = '[models.student]\nflavor = "tiny"\nname = "wan_causal"\nframes_per_block = 3\n'
DFSFT = '[method]\nname = "dfsft"\n'
GEOMETRY = "[data]\nnum_frames = 33\n"  # 9 latent frames


def test_the_nearest_fix_is_allowed_itself():
    expected = {
        (32, 4, 1): "29 or 33",
        (40, 16): "32 or 48",
        (0, 4, 1): "1",
        (1, 2): "2",
        (-50, 16): "16",
        (-9, 4, 1): "1",
    }
    assert {numbers: nearest_multiples(*numbers) for numbers in expected} == expected


def test_causal_keys_are_read(tmp_path):
    text = CAUSAL + "local_attn_frames = 6\nsink_frames = 1\n" + DFSFT + "num_frames_per_block = 3\n" + GEOMETRY
    causal = load(tmp_path, text).models["student"].causal()
    assert (causal.frames_per_block, causal.window, causal.sink) == (3, 6, 1)
    assert causal.blocks(9) == (3, 3, 3)
    first = ["--models.student.independent_first_frame", "true", "--data.num_frames", "25"]
    assert load(tmp_path, text, *first).models["student"].causal().blocks(7) == (1, 3, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (  # shapes that do not fit
            CAUSAL + DFSFT + "[data]\nnum_frames = 37\n",
            r"data\.num_frames = 37, models\.student: 10 latent frames do not divide into blocks of 3; "
            r"nearest: 9 \(33 video frames\) or 12 \(45 video frames\)",
        ),
        (
            CAUSAL + "independent_first_frame = true\n" + DFSFT + GEOMETRY,
            r"9 latent frames do not divide into blocks of 3 after an independent first frame; nearest: 7 \(25 .*10 \(37",
        ),
        (CAUSAL + DFSFT + "[data]\nnum_frames = 5\n", r"nearest: 3 \(9 video frames\)"),
        # a causal recipe with a bidirectional model, and the reverse
        (MINIMAL + DFSFT + GEOMETRY, r"models\.student\.name = 'wan': method 'dfsft' trains a 'wan_causal' student"),
        (CAUSAL + GEOMETRY, r"models\.student\.name = 'wan_causal': method 'finetune' trains a 'wan' student"),
        # windows
        (
            CAUSAL + "local_attn_frames = 2\n" + DFSFT + GEOMETRY,
            r"models\.student\.local_attn_frames = 2: must be >= frames_per_block \(3\), or -1",
        ),
        (CAUSAL + "local_attn_frames = 0\n" + DFSFT + GEOMETRY, r"local_attn_frames = 0: must be >= frames_per_block"),
        (
            CAUSAL + "sink_frames = 1\n" + DFSFT + GEOMETRY,
            r"sink_frames = 1: must be >= 0, and needs local_attn_frames",
        ),
        (CAUSAL + "local_attn_frames = 3\nsink_frames = -1\n" + DFSFT + GEOMETRY, r"sink_frames = -1: must be >= 0"),
        (MINIMAL + 'name = "wan_causal"\n' + DFSFT + GEOMETRY, r"frames_per_block = 0: wan_causal needs >= 1"),
        # causal keys that a bidirectional model would ignore
        (
            MINIMAL + "frames_per_block = 3\n",
            r"models\.student\.frames_per_block = 3 has no effect with name = \"wan\"",
        ),
        (MINIMAL + "independent_first_frame = true\n", "independent_first_frame = True has no effect"),
        (MINIMAL + "local_attn_frames = 6\n", "local_attn_frames = 6 has no effect"),
        (MINIMAL + "sink_frames = 1\n", "sink_frames = 1 has no effect"),
        (MINIMAL + 'attention_backend = "flex"\n', "attention_backend = 'flex' has no effect"),
        # the method's keys
        (
            CAUSAL + DFSFT + "num_frames_per_block = 1\n" + GEOMETRY,
            r"method\.num_frames_per_block = 1, but models\.student\.frames_per_block = 3",
        ),
        (
            CAUSAL + DFSFT + "context_noise_max = 20\n" + GEOMETRY,
            "context_noise_max has no effect without .*teacher_forcing",
        ),
        (
            CAUSAL + DFSFT + "teacher_forcing = true\ncontext_noise_max = 1000\n" + GEOMETRY,
            r"context_noise_max = 1000\.0: a timestep, in \[0, 1000\)",
        ),
        (CAUSAL + "trainable = false\n" + DFSFT + GEOMETRY, "trainable = false: dfsft would have nothing to train"),
        (CAUSAL + '[method]\nname = "dfsft"\nteacher_forcng = true\n', r"Did you mean 'teacher_forcing'"),
    ],
)
def test_causal_recipes_that_contradict_themselves(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


def test_a_role_needs_sizes(tmp_path):
    with pytest.raises(UserError, match="models.student: give flavor"):
        load(tmp_path, "[models.student]\n")
    with pytest.raises(UserError, match="needs the role 'student'"):
        load(tmp_path, "")


@pytest.mark.parametrize(
    "arguments", [["--training.stepz", "3"], ["--training.steps", "x"], ["--ema.enable", "maybe"], ["stray"]]
)
def test_command_line_errors(tmp_path, arguments):
    with pytest.raises(UserError, match="command line"):
        load(tmp_path, MINIMAL, *arguments)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, MINIMAL)
    with pytest.raises(UserError, match="no such file.*Did you mean.*recipe.toml"):
        load_config(["--job.config_file", str(tmp_path / "recipes.toml")])


def test_program_prints_the_result_and_fails_in_one_line(tmp_path, capsys):
    recipe = write(tmp_path, MINIMAL)
    assert run_program(config.main, recipe, "--training.steps", 5) == 0
    assert tomli.loads(capsys.readouterr().out)["training"]["steps"] == 5
    assert run_program(config.main, recipe, "--training.steps", 0) == 2
    assert capsys.readouterr().err == "error: training.steps = 0: must be >= 1\n"


def fields_of(cls, prefix=""):
    """(dotted name, documentation of the default instance) of every option below a dataclass."""
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            yield from fields_of(kind, f"{prefix}{field.name}.")
        elif typing.get_origin(kind) is not dict:
            yield f"{prefix}{field.name}"


def test_options_are_few_and_each_is_read_somewhere():
    names = [*fields_of(JobConfig), *fields_of(RoleConfig, "models.student.")]
    assert len(names) <= 110
    sources = [*Path(__file__).parents[2].glob("fvtitan/**/*.py"), Path(__file__).parents[2] / "train.py"]
    code = "\n".join(path.read_text() for path in sources)
    for name in names:
        key = name.rsplit(".", 1)[-1]
        assert re.search(rf"\.{key}\b", code), f"nothing reads {name}"


def rows_of(page):
    """{section or method: {key: (allowed, default, meaning)}} of the reference's tables."""
    rows = {}
    for part in re.split(r"^###? ", page, flags=re.MULTILINE)[1:]:
        heading = re.match(r"`\[?([^`\]]+)\]?`\n", part)[1]
        rows[heading] = {
            key: rest for key, *rest in re.findall(r"^\| `(\w+)` \| (.+) \| (.+?) \| (.+) \|$", part, re.MULTILINE)
        }
    return rows


def test_the_reference_is_what_the_program_prints(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["config", "--reference"])
    main()
    page = Path(__file__).parents[2] / "docs/config.md"
    command = "python -m fvtitan.config --reference > docs/config.md"
    assert page.read_text() == capsys.readouterr().out, f"the dataclasses have changed: run `{command}`"


def test_the_reference_has_every_key_and_its_meaning():
    rows = rows_of(reference(JobConfig))
    named = {f"{section}.{key}" for section, keys in rows.items() for key in keys}
    below = {*fields_of(JobConfig), *fields_of(RoleConfig, "models.<role>.")}
    inherited = {"kd_causal": "kd", "self_forcing": "dmd2"}
    own = {
        f"{name}.{field.name}"
        for name, method in METHODS.items()
        for field in dataclasses.fields(method.Config)
        if field.name != "name" and field.name not in rows.get(inherited.get(name), ())
    }
    assert named == below | own
    assert [name for name in named if not rows[name.rpartition(".")[0]][name.rpartition(".")[2]][2].strip()] == []
    assert rows["method"]["name"][:2] == [
        ", ".join(f'`"{name}"`' for name in METHODS),
        f'`"{JobConfig().method.name}"`',
    ]
    assert rows["optimizer"]["betas"][:2] == ["[float, float]", "`[0.9, 0.999]`"]
    assert rows["dfsft"]["teacher_forcing"][2].endswith(r"the sequence is [clean \| noisy].")
