#!/usr/bin/env bash
# Learn on one or several nodes: ./launch/learn.sh RECIPE [key.sub=value ...]
# It translates the environment and nothing else; every setting is in the recipe or on the command
# line. `megamask submit launch.launcher=torchrun` keeps such a run in the run folder.
#
#   NPROC_PER_NODE   processes on this node (default: its GPUs, those that CUDA_VISIBLE_DEVICES
#                    names if it is set, or 1)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   for more than one node: NODE_RANK is 0 on the first
#   MASTER_WAIT      seconds that a node waits for node 0 (default 900)
#   RESTARTS         how often torchrun starts all processes again after one ended with an error,
#                    a mistake of the user included (default 0); they go on from the newest snapshot
#   VERB             another verb to run the same way (default learn)
# NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the network where a node has several.
#
# To stop and go on later, send SIGTERM or SIGUSR1: torchrun passes it to the processes, which save
# a snapshot first. (torchrun itself then ends with code 1, whatever its processes said; megamask's
# own code for this is 75.)
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -ge 1 ] || die "which recipe? ./launch/learn.sh RECIPE [key=value ...]"
recipe="$1"; shift
if [ -x "$VENV/bin/python" ]; then export PATH="$VENV/bin:$PATH"; fi

NNODES="${NNODES:-1}"
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then  # entries up to the first that names no GPU
    gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^ *\(-1\)\? *$/,$d' | wc -l)"
else
    gpus="$(nvidia-smi -L 2>/dev/null | wc -l || true)"
fi
NPROC_PER_NODE="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_per_process "$NPROC_PER_NODE")}"
export PYTHONFAULTHANDLER=1 PYTHONUNBUFFERED=1 NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# All restarts have one name: learn.resume=false starts over at the first start alone.
MEGAMASK_LAUNCH="torchrun.$(uname -n).$$.$(date +%s)"; export MEGAMASK_LAUNCH

answers() { timeout 3 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$1" "$2" 2>/dev/null; }

# Node 0 opens the port, and the others wait for it: what cannot work is said here, in one message,
# where torchrun would try again for a quarter of an hour.
find_master() {
    local host="$1" port="$2" rank="$3" end=$((SECONDS + ${MASTER_WAIT:-900}))
    getent ahosts "$host" >/dev/null || die "MASTER_ADDR=$host does not resolve on $(uname -n)"
    if [ "$rank" -eq 0 ]; then
        if answers "$host" "$port"; then
            die "port $port of $host is taken; choose another MASTER_PORT on every node"
        fi
        return
    fi
    if answers "$host" "$port"; then return; fi
    say "node $rank waits for $host:$port, node 0 (at most ${MASTER_WAIT:-900} s)"
    until answers "$host" "$port"; do
        [ "$SECONDS" -lt "$end" ] || die "$host:$port did not answer. Was learn.sh started there \
with NODE_RANK=0, and does the network let the port through?"
        sleep 1
    done
}

if [ "$NNODES" -eq 1 ]; then
    launch=(--standalone --local-addr 127.0.0.1)  # a host name need not resolve
else
    : "${NODE_RANK:?the number of this node, from 0}" "${MASTER_ADDR:?the host name of node 0}"
    MASTER_PORT="${MASTER_PORT:-29500}"
    find_master "$MASTER_ADDR" "$MASTER_PORT" "$NODE_RANK"
    launch=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
if [ "${RESTARTS:-0}" -gt 0 ]; then
    launch+=(--max-restarts "$RESTARTS")
    # On one node each start has a store of its own; on several, torchrun always shares its store,
    # and the ranks tell the starts apart.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# Where MEGAMASK_LOGS names a folder, each rank but the first writes its output there.
# shellcheck disable=SC2016  # expanded by each process, not here
process='
if [ "$RANK" -ne 0 ] && [ -n "${MEGAMASK_LOGS:-}" ]; then
    exec >>"$MEGAMASK_LOGS/rank-$RANK.log" 2>&1
fi
if [ -n "${MEGAMASK_CODE:-}" ]; then set -- "$MEGAMASK_CODE" "$@"; else set -- -m megamask "$@"; fi
exec "${MEGAMASK_PYTHON:-python}" "$@"'
exec "${MEGAMASK_PYTHON:-python}" -m torch.distributed.run "${launch[@]}" \
    --nproc-per-node "$NPROC_PER_NODE" --no-python \
    bash -c "$process" megamask "${VERB:-learn}" --config "$recipe" "$@"
