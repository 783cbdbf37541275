#!/usr/bin/env bash
# Trains on several nodes under Slurm: run_train.sh on each. Everything after the script's name goes to train.py. Submit it from
# the repository; the folder and job.dump_folder must be on a file system that all nodes see (docs/multi_node.md):
#   CONFIG_FILE=train_configs/wan2.1_t2v_1.3b_dmd2.toml sbatch --nodes=2 run_slurm.sh --training.steps 2000
# Five minutes before its time limit the job saves, stops and is queued again, and goes on where it stopped.
#   NGPU         processes on a node; default: the GPUs that Slurm gives on it
#   CONFIG_FILE  recipe; default: train_configs/tiny_finetune.toml
#   RDZV_PORT    free port on the first node; default: 20000 + the last four digits of the job's number
#SBATCH --job-name=fvtitan
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "error: submit this with sbatch; on one machine, or without Slurm, use run_train.sh" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR"  # Slurm runs a copy of this script
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NNODES=$SLURM_JOB_NUM_NODES
export NGPU=${NGPU:-${SLURM_GPUS_ON_NODE:-1}}
export CONFIG_FILE=${CONFIG_FILE:-train_configs/tiny_finetune.toml}
export RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export RDZV_ENDPOINT=${hosts[0]}:${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# What is wrong in the configuration is said here, before any node starts.
config=$(WORLD_SIZE=$((NNODES * NGPU)) python -m fvtitan.config "$CONFIG_FILE" "$@")
dump=$(sed -n 's/^dump_folder = "\(.*\)"$/\1/p' <<<"$config")

# The file asks the ranks to stop, also while they are being started: it names this job. A signal would reach torchrun, which
# gives them 30 seconds, and so may cut a long save.
requeue=false
trap 'requeue=true; mkdir -p "$dump"; echo "$RDZV_ID" >"$dump/stop"; echo "SIGUSR1: asked to stop, by $dump/stop"' USR1
trap 'mkdir -p "$dump"; echo "$RDZV_ID" >"$dump/stop"; echo "SIGTERM: asked to stop, by $dump/stop"' TERM

echo "$NNODES nodes (${hosts[*]}) of $NGPU processes meet at $RDZV_ENDPOINT; the run is $dump"
srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} ./run_train.sh "$@" &
job=$!
while kill -0 "$job" 2>/dev/null; do wait "$job" || true; done  # a trap interrupts wait
status=0
wait "$job" || status=$?
if ((status == 0)); then
  exit 0
fi
state=$(sed -n 's/^  "state": "\(.*\)",$/\1/p' "$dump/status.json" 2>/dev/null || true)
if $requeue && [[ $state == stopped ]] && compgen -G "$dump/checkpoint/step-*" >/dev/null; then
  echo "stopped and saved; job $SLURM_JOB_ID is queued again"
  scontrol requeue "$SLURM_JOB_ID"
  exit 75
fi
exit "$status"
