"""The README does what it says: its own commands, taken from its text, run in a copy of the tree, and leave what it promises.

By default each trains 2 steps on a handful of clips; `pytest -m slow` runs them as they stand. And what README and docs name
exists: files, modules, configuration keys, flags, environment variables; their training commands are possible.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import tomli
import tomli_w

from fvtitan.chain import STUDENTS
from fvtitan.config import JobConfig, load_config
from fvtitan.methods import METHODS
from fvtitan.methods.base import MethodConfig
from tests.helpers import ROOT
from tests.integration.exact_worker import forkserver

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
}
PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:python|torchrun|pip|pytest|tensorboard|sbatch|\./run_train\.sh)\b"

# What is in the README and not run here, and why. Nothing else may be left out; a line that is no longer there must go.
NOT_RUN = {
    "tensorboard --logdir outputs/tiny_finetune/tensorboard": "a server that runs until it is stopped",
}

# What makes a command small: for the programs that match, these words are put behind it (the last one of an option counts).
SMALL_TRAINING = (
    "--training.local_batch_size 2 --training.global_batch_size 4 --data.moving_shapes_clips 8 --checkpoint.interval 2 "
    "--validation.num_prompts 1 --validation.num_prompts_last 2 --validation.sampling_steps 2 --validation.heldout_clips 2"
)
SMALL_KD = "--method.num_trajectories 4 --method.teacher_inference_steps 4"
SMALL = {
    r"tiny_kd\w*\.toml": f"{SMALL_TRAINING} {SMALL_KD}",
    r"run_train\.sh|train\.py": SMALL_TRAINING,
    r"fvtitan\.score": "--num-videos 2 --steps 2",
    r"generate --model tiny-wan": "--steps 2",
    r"moving_shapes render": "--num-clips 4",
    r"fvtitan\.chain": "--recipes small --num-videos 1 1",
    r"fvtitan\.plan": "--no-switches --data.num_frames 5 --data.height 64 --data.width 64",
}


def write_small_recipes(folder: Path) -> None:
    """The recipes of the chain, 2 steps on 9 frames each, without what their headers expect."""
    for name in STUDENTS:
        table = tomli.loads((ROOT / f"train_configs/{name}.toml").read_text(encoding="utf-8"))
        table["training"] |= {"steps": 2, "local_batch_size": 2, "global_batch_size": 2}
        table["data"] |= {
            "moving_shapes_clips": 4,
            "num_frames": 9,
            "path": f"data/small/{Path(table['data']['path']).name}",
        }
        table["checkpoint"] |= {"interval": 2}
        table["validation"] |= {"sampling_steps": 2}
        table["validation"].pop("heldout_path", None)
        table["lr_scheduler"].pop("warmup_steps", None)
        if "teacher_path_cache" in table["method"]:
            table["method"] |= {
                "num_trajectories": 2,
                "teacher_inference_steps": 4,
                "teacher_path_cache": "data/small/paths",
            }
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.toml").write_text(tomli_w.dumps(table), encoding="utf-8")


def commands_of(text: str) -> list[str]:
    """The commands of all ```bash blocks, one an `&&`, continued lines joined; then those that the prose gives in backticks."""
    commands = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            line = line.split(" #")[0].strip()
            commands += [part.strip() for part in line.split("&&")] if line and not line.startswith("#") else []
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    commands += [code for code in re.findall(r"`([^`\n]+)`", prose) if re.match(rf"{PROGRAMS} .", code)]
    return list(dict.fromkeys(commands))


def kind_of(command: str) -> str:
    """install and test commands are looked at, not run; "not run": listed above; everything else is run."""
    if command in NOT_RUN:
        return "not run"
    if command.startswith("pip "):
        return "install"
    if command.split()[0] == "pytest":
        return "test"
    return "run"


CHAIN_LEAVES = ("results.md", "results.json", "contact_sheet.png", "contact_sheet.gif")
COMMANDS = commands_of(README)
RUN = [command for command in COMMANDS if kind_of(command) == "run"]
TRAIN = [command for command in COMMANDS if re.search(r"run_train\.sh|train\.py", command) and "--help" not in command]
# Those of docs/ are not run.
DOCS_TRAIN = [
    command
    for text in PAGES.values()
    for command in commands_of(text)
    if re.search(r"run_(train|slurm)\.sh|train\.py", command) and command not in COMMANDS and "--help" not in command
]


def test_commands_are_found():
    """Blocks, continued lines, `&&`, comments and prose; and that this README has some of each."""
    text = "a `python x.py --help`\n```bash\n# no\npip install -e . && ./run_train.sh\npython a \\\n   b  # c\n```\n`key = 1`\n"
    assert commands_of(text) == ["pip install -e .", "./run_train.sh", "python a b", "python x.py --help"]
    assert len(RUN) >= 8 and len(TRAIN) >= 5
    assert set(NOT_RUN) <= set(COMMANDS), "no longer in the README"


@pytest.mark.parametrize("command", [command for command in COMMANDS if kind_of(command) in ("install", "test")])
def test_install_and_test_commands_have_the_right_form(command):
    project = tomli.loads((ROOT / "pyproject.toml").read_text())
    if kind_of(command) == "install":
        extra = re.fullmatch(r"pip install -e (?:\.|'\.\[(\w+)\]')", command)
        assert extra and extra[1] in {None, *project["project"]["optional-dependencies"]}
    else:
        marker = re.fullmatch(r"pytest(?: -m (\w+))?", command)
        markers = {line.split(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]}
        assert marker and marker[1] in {None, *markers}


# ---------------------------------------------------------------------------- the configurations as they stand


@dataclass
class Training:
    """What a training command starts."""

    ranks: int
    arguments: list[str]

    @classmethod
    def parse(cls, command: str) -> Training:
        words = shlex.split(command)
        program = next(i for i, word in enumerate(words) if re.search(r"(run_(train|slurm)\.sh|train\.py)$", word))
        before, arguments = words[:program], words[program + 1 :]
        environment = dict(word.split("=", 1) for word in before if re.match(r"[A-Z_]+=", word))
        options = dict(re.findall(r"--(\w+)[= ](\S+)", " ".join(before)))
        ranks = int(options.get("nproc_per_node", environment.get("NGPU", 1))) * int(options.get("nnodes", 1))
        ranks *= int(environment.get("NNODES", 1))
        if words[program].endswith("run_slurm.sh"):
            headers = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (ROOT / "run_slurm.sh").read_text(), re.MULTILINE))
            ranks = int(options.get("nodes", headers["nodes"])) * int(headers["gpus-per-node"])
        if words[program].endswith(".sh"):
            default = re.search(r"CONFIG_FILE=\$\{CONFIG_FILE:-(\S+)\}", (ROOT / "run_train.sh").read_text())[1]
            arguments = ["--job.config_file", environment.get("CONFIG_FILE", default), *arguments]
        return cls(ranks, arguments)

    def config(self, monkeypatch: pytest.MonkeyPatch, *more: str) -> JobConfig:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("WORLD_SIZE", str(self.ranks))
        return load_config([*self.arguments, *more])


def header_command(recipe: Path) -> str:
    """The command that a recipe's first comment line gives."""
    comment = "\n".join(
        line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")
    )
    return re.search(rf"{PROGRAMS}.*", re.sub(r"\\\n", "", comment))[0]


@pytest.mark.parametrize("command", TRAIN + DOCS_TRAIN)
def test_training_commands_are_possible_as_they_stand(command, monkeypatch):
    """Keys, values, and batch sizes for the number of processes, without the changes that make it small."""
    Training.parse(command).config(monkeypatch)


@pytest.mark.parametrize("recipe", sorted((ROOT / "train_configs").glob("*.toml")), ids=lambda path: path.name)
def test_recipe_headers_are_possible_as_they_stand(recipe, monkeypatch):
    training = Training.parse(header_command(recipe))
    assert Path(training.arguments[training.arguments.index("--job.config_file") + 1]).name == recipe.name
    training.config(monkeypatch)


# ------------------------------------------------------------------------------------------------ what they name

SECTIONS = {field.name for field in dataclasses.fields(JobConfig)}
KEY = rf"(?<![\w./])(?:--)?((?:{'|'.join(sorted(SECTIONS))})(?:\.(?:\w+|<\w+>|\*))+)(?![\w(/])"
FILE_SUFFIXES = (".py", ".json", ".jsonl", ".toml", ".md", ".png", ".mp4", ".safetensors", ".distcp")
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for pattern in ("fvtitan/**/*.py", "benchmarks/**/*.py", "train.py", "run_*.sh")
    for path in sorted(ROOT.glob(pattern))
)
# Flags and variables of other programs, which these pages may name.
OTHERS_FLAGS = {"--nodes", "--nproc_per_node", "--shutdown-timeout", "--logdir", "--help", "--index-url"}
OTHERS_VARIABLES = "NCCL_|GLOO_|TORCH_|TORCHELASTIC_|TORCHINDUCTOR_|TRITON_|HF_|WANDB_|CUDA_|SLURM_"


def code_of(text: str) -> list[str]:
    """What stands in backticks, and the lines of bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)


def key_exists(key: str) -> bool:
    """A configuration key, of any role and any method; `*` and `<...>` stand for one that may be anything."""
    kinds: list[Any] = [JobConfig]
    for part in key.split("."):
        found = []
        for kind in kinds:
            if get_origin(kind) is dict:
                found.append(get_args(kind)[1])
                continue
            if not dataclasses.is_dataclass(kind):
                continue
            hints = get_type_hints(kind)
            found += [hint for name, hint in hints.items() if part in (name, "*") or part.startswith("<")]
        kinds = [
            each
            for kind in found
            for each in ([m.Config for m in METHODS.values()] if kind is MethodConfig else [kind])
        ]
    return bool(kinds)


def problems_of(text: str) -> list[str]:
    """Names in a page of files, modules, keys, flags and environment variables that do not exist."""
    problems = []
    for code in code_of(text):
        words = code.split()
        for key in re.findall(KEY, code):
            if not key.endswith(FILE_SUFFIXES) and not key_exists(key):
                problems.append(f"key {key}")
        source = SOURCES
        for module in re.findall(r"python -m ((?:fvtitan|benchmarks)[\w.]*)", code):
            found = importlib.util.find_spec(module)
            if found is None:
                problems.append(f"module {module}")
            elif module.startswith("fvtitan.") and found.origin:
                source = Path(found.origin).read_text(encoding="utf-8")  # its own flags
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*(?![\w.-])", code):
            spellings = {flag, "--" + flag[2:].replace("_", "-"), "--" + flag[2:].replace("-", "_")}
            if not spellings & OTHERS_FLAGS and not any(re.search(rf"{each}(?![\w-])", source) for each in spellings):
                problems.append(f"flag {flag}")
        for path in re.findall(r"(?<![\w/.])(?:train_configs|tests|fvtitan|benchmarks|docs)/[\w./]+\w", code):
            if not (ROOT / path).exists():
                problems.append(f"file {path}")
        variables = [word.split("=")[0] for word in words if re.match(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+(=|$)", word)]
        for name in variables:
            if not re.match(OTHERS_VARIABLES, name) and not re.search(rf"\b{name}\b", SOURCES):
                problems.append(f"variable {name}")
    return problems


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    assert problems_of(PAGES[page]) == []


def test_a_name_that_does_not_exist_is_found():
    good = (
        "`data.num_frames = 5`, `models.<role>.lora.rank`, `method.gradient_mode`, `metrics.jsonl`, `method.*`, `--rungs`\n"
        "```bash\npython -m fvtitan.generate --num-frames 5\nNGPU=2 ./run_train.sh --training.steps 3\n```\n"
    )
    assert problems_of(good) == []
    wrong = {
        "`data.num_frame`": "key data.num_frame",
        "`--training.step 3`": "key training.step",
        "`models.student.lora.ranks`": "key models.student.lora.ranks",
        "`method.shape`": "key method.shape",
        "`--num-frame 3`": "flag --num-frame",
        "`python -m fvtitan.generate --memory 80`": "flag --memory",  # plan's
        "`python -m fvtitan.generat`": "module fvtitan.generat",
        "`train_configs/none.toml`": "file train_configs/none.toml",
        "`FVTITAN_FAULT=kill`": "variable FVTITAN_FAULT",
    }
    for text, problem in wrong.items():
        assert problems_of(good + text) == [problem]


# --------------------------------------------------------------------------------------------- running them


def copied_tree(folder: Path) -> Path:
    """What a user has after cloning: all files that git knows or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def start(command: str, tree: Path, timeout: float) -> str:
    """Its output; fails with its end when the exit status is not 0."""
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": search, "HF_HUB_OFFLINE": "1"}  # offline after the installation
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{command}\n{text[-3000:]}"
    return text


def promised_files() -> tuple[str, list[str]]:
    """The folder of "Look at `...`", and the glob patterns in the first column of the table below it."""
    look = re.search(r"Look at `([\w/]+)`[^|]*\n((?:\|.*\n)+)", README)
    cells = [row.split("|")[1] for row in look[2].splitlines()[2:]]
    return look[1], [re.sub(r"<\w+>", "*", path) for cell in cells for path in re.findall(r"`([^`]+)`", cell)]


def assert_promises_kept(tree: Path) -> None:
    folder, patterns = promised_files()
    assert len(patterns) >= 5
    for pattern in patterns:
        assert list((tree / folder).rglob(pattern)), f"the README promises {pattern} in {folder}"
    assert list((tree / folder / "validation").rglob("student/*.mp4"))


def as_program(words: list[str], tree: Path, log: Path) -> None:
    """`python -m` in this process, which has imported what takes long."""
    multiprocessing.set_start_method("fork", force=True)  # of its own processes, as on Linux
    os.chdir(tree)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def run(command: str, tree: Path, timeout: float) -> str:
    """As `start`, but a program of ours is forked from a process that is ready."""
    words = shlex.split(command)
    if words[:2] != ["python", "-m"]:
        return start(command, tree, timeout)
    log = tree / "program.log"
    process = forkserver.Process(target=as_program, args=(words[2:], tree, log))
    process.start()
    process.join(timeout)
    process.kill()
    text = log.read_text(errors="replace")
    assert process.exitcode == 0, f"{command}\n{text[-3000:]}"
    return text


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = copied_tree(tmp_path_factory.mktemp("readme"))
    write_small_recipes(folder / "small")
    return folder


@pytest.fixture(scope="module")
def trained() -> dict[str, int]:
    """Steps trained so far, by dump folder: a command that finds a run of an earlier one must go on, 2 steps more."""
    return {}


def rename_last_steps(text: str, tree: Path) -> None:
    """Give the checkpoints that a text names (the last of a whole run) to what a small run has left."""
    for folder, name in re.findall(r"(outputs/[\w/-]+/checkpoint)/(step-\d+)", text):
        if not (tree / folder / name).exists():
            last = max((tree / folder).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
            (tree / folder / name).symlink_to(last.name)


@pytest.mark.parametrize("command", RUN, ids=lambda command: command[:80])
def test_small(command, tree, trained, monkeypatch):
    smaller = next((words for program, words in SMALL.items() if re.search(program, command)), "")
    if "--help" in command:
        text = run(command, tree, timeout=900)
        assert "usage:" in text and ("tiny_dmd2" not in command or "student_update_interval" in text)
        return
    if command not in TRAIN:
        rename_last_steps(command, tree)
        run(f"{command} {smaller}", tree, timeout=900)
        if "fvtitan.chain" in command:
            assert all((tree / f"outputs/chain/{name}").stat().st_size for name in CHAIN_LEAVES)
            assert "| `tiny_self_forcing` | 33 | 14 |" in (tree / "outputs/chain/results.md").read_text()
        return
    cfg = Training.parse(command).config(monkeypatch, *smaller.split())
    rename_last_steps(" ".join(model.init_from for model in cfg.models.values()), tree)
    folder = cfg.job.dump_folder
    trained[folder] = trained.get(folder, 0) + 2
    command_line = f"{command} {smaller} --training.steps {trained[folder]}"
    if command != TRAIN[0]:  # test_exact.py has every recipe validate
        command_line += " --validation.enable false"
    text = run(command_line, tree, timeout=900)
    assert f"step {trained[folder]}/{trained[folder]} " in text and f"finished {trained[folder]} steps" in text
    assert ("resumed from" in text) == (trained[folder] > 2)
    if command == TRAIN[0]:
        assert_promises_kept(tree)


@pytest.fixture(scope="module")
def full_tree(tmp_path_factory):
    return copied_tree(tmp_path_factory.mktemp("readme-in-full"))


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=lambda command: command[:80])
def test_in_full(command, full_tree):
    text = start(command, full_tree, timeout=4 * 3600)
    if command in TRAIN:
        assert "finished" in text
    if command == TRAIN[0]:
        assert_promises_kept(full_tree)
