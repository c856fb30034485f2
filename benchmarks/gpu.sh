#!/usr/bin/env bash
# What a GPU must answer, the most valuable first, within a budget of seconds. It uses no network;
# weights are random and made on the device. benchmarks/gpu/README.md is the playbook.
#
#   OUT        folder of the results (default benchmarks/results/<date>-gpu)
#   PARTS      names of the parts (default all; python -m benchmarks.gpu.lease --help lists them)
#   BUDGET     seconds of all parts (default 540); a part that no longer fits is left out
#   WHEELS     folder of .whl files that this Python lacks; installed for this run only
#   CACHE      folder of compiled kernels, made by benchmarks/gpu/pack.sh
#   HF, GGUF   a Hugging Face folder or a GGUF file: adds the part real-model. STEPS, RECIPE
#   CURVE      the losses of the same run on a CPU, to set the GPU's beside them
#   PYTHON     the Python to use, with its torch (default python3)
#   DEVICE     cpu runs the same parts at toy size, to test this script (default cuda)
set -uo pipefail

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
DEVICE="${DEVICE:-cuda}"
sees_cuda='import sys, torch; sys.exit(not torch.cuda.is_available())'
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c "$sees_cuda" 2>/dev/null; then
    echo "gpu.sh: $PYTHON has no torch that sees a CUDA device. Run this on a machine with a GPU," \
        "or try it out with DEVICE=cpu." >&2
    exit 3
fi
kind="$([ "$DEVICE" = cuda ] && echo gpu || echo toy)"
OUT="$(realpath -m "${OUT:-$repo/benchmarks/results/$(date +%F)-$kind}")"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for name in WHEELS CACHE HF GGUF RECIPE CURVE; do
    if [ -n "${!name:-}" ]; then printf -v "$name" '%s' "$(realpath "${!name}")"; fi
done
cd "$repo" || exit 2

if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --no-cache-dir --target "$work/site" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ -n "${CACHE:-}" ]; then
    mkdir -p "$work/triton-cache"
    cp -r "$CACHE/." "$work/triton-cache/"
    "$PYTHON" benchmarks/gpu/move_cache.py "$work/triton-cache" || exit 2
    export TRITON_CACHE_DIR="$work/triton-cache"
fi
# One process, one machine: collectives go over the loopback device, whatever the host's name is.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-lo}" GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export PYTHONUNBUFFERED=1 PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"

options=(--device "$DEVICE" --out "$OUT" --seconds "${BUDGET:-540}")
[ -z "${HF:-}${GGUF:-}" ] || options+=(--model "${GGUF:-$HF}")
[ -z "${RECIPE:-}" ] || options+=(--recipe "$RECIPE")
[ -z "${CURVE:-}" ] || options+=(--curve "$CURVE")
[ -z "${STEPS:-}" ] || options+=(--steps "$STEPS")
if [ -n "${PARTS:-}" ]; then
    read -r -a parts <<<"$PARTS"
    options+=(--parts "${parts[@]}")
fi
"$PYTHON" -m benchmarks.gpu.lease "${options[@]}" &
lease=$!
# The running part ends with the lease, and the results so far are written.
trap 'kill -TERM "$lease" 2>/dev/null; wait "$lease"; rm -rf "$work"; exit 143' TERM INT HUP
wait "$lease"
