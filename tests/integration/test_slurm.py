"""run_slurm.sh and run_train.sh on several nodes, with srun and scontrol of our own: all nodes are this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fvtitan.components.stops import read_status
from tests.helpers import ROOT, make_cache, small_arguments
from tests.integration.test_train import assert_same_checkpoint, training_values

PATIENCE = 240  # seconds for what takes a few; twenty when a node imports torch

SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$FAKE/scontrol"
if [[ $1 == show ]]; then printf '127.0.0.1\\nnode-2\\n'; fi
"""

# Starts the command on every node, and ends with the status of the last that failed.
SRUN = """#!/usr/bin/env bash
echo "$*" >> "$FAKE/srun"
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do
  SLURM_NODEID=$i "$@" &
  pids[i]=$!
done
echo "${pids[*]}" > "$FAKE/pids"
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""

# Instead of training: what the node is told, then a run that saves and stops when it is asked to.
TRAINING = """#!/usr/bin/env bash
printf '%s\\n' "$NNODES" "$NGPU" "$RDZV_ENDPOINT" "$RDZV_ID" "$CONFIG_FILE" "$PWD" "$*" > "$FAKE/told"
while [[ ! -e $DUMP/stop && ! -e $FAKE/ended ]]; do sleep 0.05; done
touch "$FAKE/ended"
mv "$DUMP/stop" "$FAKE/asked"
mkdir -p "$DUMP/checkpoint/step-3"
printf '{\\n  "state": "stopped",\\n  "step": 3\\n}\\n' > "$DUMP/status.json"
exit 1
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a batch script on the first of two nodes."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        write_program(bin_folder / name, text)
    return {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "FAKE": str(tmp_path),
        "DUMP": str(tmp_path / "run"),
        "SLURM_JOB_ID": "8612345",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_RESTART_COUNT": "2",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def submitted(arguments: list[str], environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen]:
    """run_slurm.sh, running as a copy, as Slurm does it."""
    copy = folder / "slurm_script"
    copy.write_text((ROOT / "run_slurm.sh").read_text())
    with open(folder / "slurm.log", "ab") as log:
        command = ["bash", str(copy), *arguments]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def said(folder: Path) -> str:
    return (folder / "slurm.log").read_text(errors="replace")


def wait_for(condition: Callable[[], Any], what: str, process: subprocess.Popen, folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < end, f"waited for {what}\n{said(folder)[-5000:]}"
        time.sleep(0.05)


def with_training(folder: Path, text: str) -> str:
    """A submission folder whose run_train.sh is this."""
    tree = folder / "tree"
    tree.mkdir()
    write_program(tree / "run_train.sh", text)
    return str(tree)


def requeued(folder: Path) -> list[str]:
    return [line for line in (folder / "scontrol").read_text().splitlines() if not line.startswith("show")]


def test_scripts_are_bash():
    for name in ("run_slurm.sh", "run_train.sh"):
        assert os.access(ROOT / name, os.X_OK)
        assert subprocess.run(["bash", "-n", ROOT / name], capture_output=True).stderr == b""
    lines = (ROOT / "run_slurm.sh").read_text().splitlines()
    headers = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert "#SBATCH --signal=B:USR1@300" in lines and max(headers) < code  # later ones are comments to Slurm


def test_before_the_time_limit_it_stops_and_is_queued_again(cluster, tmp_path):
    recipe = str(ROOT / "train_configs/tiny_finetune.toml")
    cluster |= {"SLURM_SUBMIT_DIR": with_training(tmp_path, TRAINING), "CONFIG_FILE": recipe}
    arguments = ["--job.dump_folder", cluster["DUMP"], "--training.local_batch_size", "4"]
    with submitted(arguments, cluster, tmp_path) as process:
        wait_for((tmp_path / "told").exists, "the nodes", process, tmp_path)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(PATIENCE) == 75, said(tmp_path)
    nodes, processes, endpoint, name, config, here, words = (tmp_path / "told").read_text().splitlines()
    assert (nodes, processes, endpoint, name) == ("2", "1", "127.0.0.1:22345", "8612345.2")
    assert (config, here, words) == (recipe, cluster["SLURM_SUBMIT_DIR"], " ".join(arguments))
    assert (tmp_path / "srun").read_text().split("./")[0] == "--kill-on-bad-exit=1 --cpus-per-task=4 "
    assert requeued(tmp_path) == ["requeue 8612345"]
    assert (tmp_path / "asked").read_text() == "8612345.2\n"  # also a run that begins later knows that it is meant


def test_what_fails_or_was_stopped_by_hand_is_not_queued_again(cluster, tmp_path):
    """The file `stop`, made by a person, means it."""
    cluster["SLURM_SUBMIT_DIR"] = with_training(tmp_path, TRAINING.replace("exit 1", "exit 3"))
    write_program(tmp_path / "bin/python", f"#!/usr/bin/env bash\necho 'dump_folder = \"{cluster['DUMP']}\"'\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()
    with submitted([], cluster, tmp_path) as process:
        assert process.wait(PATIENCE) == 3, said(tmp_path)
    assert requeued(tmp_path) == []


def test_a_wrong_configuration_starts_no_node(cluster, tmp_path):
    """8 clips in batches of 3 on 2 ranks."""
    with submitted(["--training.local_batch_size", "3"], cluster, tmp_path) as process:
        assert process.wait(PATIENCE) == 2
    (error,) = [line for line in said(tmp_path).splitlines() if line.startswith("error")]
    assert "training.global_batch_size = 8: must be a multiple of local_batch_size x data ranks = 3 x 2" in error
    assert not (tmp_path / "srun").exists()


def test_without_slurm_it_says_what_to_do(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run([ROOT / "run_slurm.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "submit this with sbatch" in done.stderr


def test_run_train_meets_at_the_endpoint(cluster, tmp_path):
    write_program(tmp_path / "bin/torchrun", "#!/usr/bin/env bash\necho $OMP_NUM_THREADS $@\n")
    environment = {key: value for key, value in cluster.items() if key != "OMP_NUM_THREADS"} | {"NGPU": "4"}

    def words(**more: str) -> list[str]:
        command = [ROOT / "run_train.sh", "--training.steps", "3"]
        return subprocess.run(
            command, env=environment | more, capture_output=True, text=True, check=True
        ).stdout.split()

    alone, several = words(), words(NNODES="3", RDZV_ENDPOINT="node-1:29500", RDZV_ID="9.0")
    assert alone[:2] == ["1", "--standalone"]
    meet = ["--nnodes=3", "--rdzv_backend=c10d", "--rdzv_endpoint=node-1:29500", "--rdzv_id=9.0"]
    assert several == ["1", *meet, *alone[2:]] and alone[2] == "--nproc_per_node=4"
    assert alone[-5:] == ["train.py", "--job.config_file", "train_configs/tiny_finetune.toml", "--training.steps", "3"]
    done = subprocess.run([ROOT / "run_train.sh"], env=environment | {"NNODES": "2"}, capture_output=True, text=True)
    assert done.returncode == 2 and "needs RDZV_ENDPOINT=host:port" in done.stderr


# ------------------------------------------------------------------------------------------- two nodes, real torchrun


def job(cluster: dict[str, str], tmp_path: Path, name: str, steps: int, **keys: Any) -> list[str]:
    """Sets CONFIG_FILE and RDZV_PORT in `cluster`; the arguments of a small run in the folder `name`."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[models.student]\nflavor = "tiny"\n')
    if not (tmp_path / "cache").exists():
        make_cache(tmp_path / "cache", 10)
    cluster |= {"CONFIG_FILE": str(recipe), "RDZV_PORT": str(free_port()), "DUMP": str(tmp_path / name)}
    keys = {"training__steps": steps, "training__global_batch_size": 4, "lr_scheduler__decay_type": "constant", **keys}
    return small_arguments(tmp_path / "cache", tmp_path / name, **keys)


def step_of(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.slow
def test_two_nodes_train_stop_and_go_on(cluster, tmp_path):
    """Signalled in the middle, queued again, and then the run that nothing stopped; the ranks of both nodes are one job."""
    arguments = job(cluster, tmp_path, "stopped", 10_000, checkpoint__interval=100_000)
    with submitted(arguments, cluster, tmp_path) as process:
        wait_for(lambda: step_of(tmp_path / "stopped") >= 3, "3 steps", process, tmp_path)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(PATIENCE) == 75, said(tmp_path)[-5000:]
    assert "2 x cpu" in said(tmp_path) and requeued(tmp_path) == ["requeue 8612345"]
    status = read_status(tmp_path / "stopped")
    assert (status["state"], status["reason"], status["exit_code"]) == ("stopped", "the file stop", 75)

    steps = status["step"] + 3
    for name in ("stopped", "whole"):
        arguments = job(cluster, tmp_path, name, steps, checkpoint__interval=100_000)
        with submitted(arguments, cluster, tmp_path) as process:
            assert process.wait(PATIENCE) == 0, said(tmp_path)[-5000:]
        assert read_status(tmp_path / name)["state"] == "finished"
    assert f"resumed from {tmp_path / 'stopped/checkpoint'}/step-{status['step']}" in said(tmp_path)
    assert_same_checkpoint(*(tmp_path / f"{name}/checkpoint/step-{steps}" for name in ("whole", "stopped")))
    assert training_values(tmp_path / "stopped") == training_values(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.faults
def test_a_node_that_dies_ends_the_job_and_it_goes_on(cluster, tmp_path):
    """Fault 12, of a whole node: SIGKILL to torchrun and ranks; the other ends with an error, nothing saved is lost."""
    arguments = job(cluster, tmp_path, "run", 10_000, checkpoint__interval=2)
    with submitted(arguments, cluster, tmp_path) as process:
        wait_for(lambda: step_of(tmp_path / "run") >= 3, "3 steps", process, tmp_path)
        wait_for(lambda: list((tmp_path / "run/checkpoint").glob("step-*")), "a checkpoint", process, tmp_path)
        agent = int((tmp_path / "pids").read_text().split()[1])
        for pid in map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split()):
            os.kill(pid, signal.SIGKILL)
        os.kill(agent, signal.SIGKILL)
        assert process.wait(PATIENCE) not in (0, 75), said(tmp_path)[-5000:]
    assert requeued(tmp_path) == []
    last = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "run/checkpoint").glob("step-*[0-9]"))
    arguments = job(cluster, tmp_path, "run", last + 1, checkpoint__interval=2)
    with submitted(arguments, cluster, tmp_path) as process:
        assert process.wait(PATIENCE) == 0, said(tmp_path)[-5000:]
    assert f"/step-{last}: {last} of {last + 1} steps are done" in said(tmp_path)
    assert read_status(tmp_path / "run")["state"] == "finished"
