#!/usr/bin/env bash
# Learn on one or several nodes: ./launch/learn.sh RECIPE [key.sub=value ...]
# It translates the environment and nothing else; every setting is in the recipe or on the command line.
#
#   NPROC_PER_NODE   processes on this node (default: its GPUs, or 1)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   for more than one node (run the same line on each)
#   VERB             another verb to run the same way (default learn)
#
# To stop and go on later, send SIGTERM or SIGUSR1: torchrun passes it to the processes, which save a
# snapshot first. (torchrun itself then ends with code 1, whatever its processes said; megamask's own
# code for this is 75.)
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -ge 1 ] || die "which recipe? For example: ./launch/learn.sh configs/recipes/maskllm-llama2-7b.yaml"
recipe="$1"; shift
if [ -x "$VENV/bin/python" ]; then export PATH="$VENV/bin:$PATH"; fi

NNODES="${NNODES:-1}"
gpus="$(nvidia-smi -L 2>/dev/null | wc -l || true)"
NPROC_PER_NODE="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_per_process "$NPROC_PER_NODE")}"

if [ "$NNODES" -eq 1 ]; then
    rendezvous=(--standalone --local-addr 127.0.0.1)  # a host name need not resolve
else
    rendezvous=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?the number of this node, from 0}"
        --master-addr "${MASTER_ADDR:?the host name of node 0}" --master-port "${MASTER_PORT:-29500}")
fi
exec torchrun "${rendezvous[@]}" --nproc-per-node "$NPROC_PER_NODE" -m megamask "${VERB:-learn}" --config "$recipe" "$@"
