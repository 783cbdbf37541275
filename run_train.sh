#!/usr/bin/env bash
# Trains with torchrun. Everything after the script's name goes to train.py.
#   NGPU           processes on this machine; default: the number of GPUs, or 1 without one
#   CONFIG_FILE    recipe; default: train_configs/tiny_finetune.toml
#   LOG_RANK       ranks of this machine whose output is shown, e.g. 0,1; default: 0
#   NNODES         machines, each of which runs this script with the same settings; default: 1
#   RDZV_ENDPOINT  with NNODES > 1: host:port on one of them, where they meet
#   RDZV_ID        with NNODES > 1: a name that no other job at that port has; default: fvtitan
set -euo pipefail
cd "$(dirname "$0")"
CONFIG_FILE=${CONFIG_FILE:-train_configs/tiny_finetune.toml}
LOG_RANK=${LOG_RANK:-0}
NNODES=${NNODES:-1}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
NGPU=${NGPU:-$((gpus > 0 ? gpus : 1))}
# One thread a process: the tiny recipes' matrices are too small to share (on 2 cores, a step with 2 threads took 2.7 times
# as long), and on GPUs the CPU only launches. torchrun by itself sets this only when there are several processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
meet=(--standalone)
if ((NNODES > 1)); then
  if [[ -z ${RDZV_ENDPOINT:-} ]]; then
    echo "error: NNODES=$NNODES needs RDZV_ENDPOINT=host:port, the same on every machine" >&2
    exit 2
  fi
  meet=(--nnodes="$NNODES" --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="${RDZV_ID:-fvtitan}")
fi
exec torchrun "${meet[@]}" --nproc_per_node="$NGPU" --local-ranks-filter "$LOG_RANK" --role rank --tee 3 \
  train.py --job.config_file "$CONFIG_FILE" "$@"
