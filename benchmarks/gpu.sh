#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: parity with the CPU, sampling, step, memory, a short learning run.
# Tables go to $OUT/summary.md, figures to $OUT/*.json. Nothing is downloaded; weights are random and made on the device.
#
#   OUT       results (default benchmarks/results/<date>-gpu)
#   WHEELS    folder of .whl files that this Python lacks; installed for this run only, without the index
#   HF, GGUF  a Hugging Face folder or a GGUF file: adds a short learning run on a real model. STEPS (default 100), RECIPE
#   PYTHON    the Python to use, with its torch (default python3)
#   DEVICE    cpu runs the same parts at toy size, to test this script (default cuda)
set -uo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
DEVICE="${DEVICE:-cuda}"
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu.sh: $PYTHON has no torch that sees a CUDA device. Run this on a machine with a GPU, or try it out with DEVICE=cpu." >&2
    exit 3
fi
OUT="${OUT:-$REPO/benchmarks/results/$(date +%F)-$([ "$DEVICE" = cuda ] && echo gpu || echo toy)}"
mkdir -p "$OUT" || exit 2
OUT="$(cd "$OUT" && pwd)"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
for name in WHEELS HF GGUF RECIPE; do
    if [ -n "${!name:-}" ]; then printf -v "$name" '%s' "$(realpath "${!name}")"; fi
done
cd "$REPO" || exit 2

if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$WORK/site" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
fi

if [ "$DEVICE" = cuda ]; then
    parity=()
    sampling=(--shapes llama2-7b --rounds 7 --copy-mib 2048)
    step=(--model llama2-7b --layers 4 --micro 1 --seq 4096 --rounds 7 --eager)
    once=(--model llama2-7b --layers 4 --micro 1 --seq 4096 --accumulate 4 --rounds 5 --no-memory)
    memory=(--model llama2-7b --layers 4 --micro 1 --seq 1024)
    plan=(--model llama2-7b --layers 4 --micro 1 --seq 4096)
    whole=(--model llama2-7b --micro 1 --seq 4096 --accumulate 2 --rounds 3 --no-memory)
else
    parity=(--threads 1)
    sampling=(--threads 1 --shapes toy --rounds 2 --copy-mib 4 --only qkv)
    step=(--threads 1 --model toy --micro 1 --seq 64 --rounds 2 --eager)
    once=(--threads 1 --model toy --micro 1 --seq 64 --accumulate 2 --rounds 1 --no-memory)
    memory=(--threads 1 --model toy --micro 1 --seq 64)
    plan=(--threads 1 --model toy --micro 1 --seq 64)
    whole=(--threads 1 --model toy --micro 1 --seq 64 --rounds 1 --no-memory)
fi

SUMMARY="$OUT/summary.md"
failed=()

# part NAME COMMAND...: its output goes to the terminal and into the summary; a failure does not stop the others.
part() {
    local name="$1" code=0 started=$SECONDS; shift
    printf '\n## %s\n' "$name" | tee -a "$SUMMARY"
    timeout --kill-after=10 "${PART_SECONDS:-180}" "$@" 2>"$WORK/errors" | tee -a "$SUMMARY"
    code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        failed+=("$name")
        { printf '\nFAILED with exit code %s:\n\n```\n' "$code"; tail -n 25 "$WORK/errors"; printf '```\n'; } | tee -a "$SUMMARY"
    fi
    printf '\n(%s s)\n' "$((SECONDS - started))" | tee -a "$SUMMARY"
}

benchmark() { local name="$1" module="$2"; shift 2; part "$name" "$PYTHON" -m "benchmarks.$module" --device "$DEVICE" --json "$OUT/$name.json" "$@"; }

# Verbs one after the other in one process: verbs "convert prune" SETTING...
verbs() {
    "$PYTHON" -c '
import sys
from megamask.__main__ import main
sys.exit(next((code for verb in sys.argv[1].split() if (code := main([verb, *sys.argv[2:]]))), 0))
' "$@" >&2
}

# A whole run, learning under torchrun; a real model, the text that comes with Python.
learning_run() {
    set -e
    local settings first="convert tokenize prune"
    settings=(--config "${RECIPE:-configs/recipes/quickstart.yaml}" "run_dir=$WORK/run" "device=$DEVICE" "learn.steps=${STEPS:-100}")
    settings+=("learn.monitor.sinks=[]" "prune.methods=[sparsegpt]")
    if [ -n "${GGUF:-}" ]; then
        settings+=("model.gguf=$GGUF")
        first="gguf $first"
    else
        settings+=("model.hf=$HF")
    fi
    verbs "$first" "${settings[@]}"
    "$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 1 -m megamask learn "${settings[@]}" >&2
    verbs evaluate "${settings[@]}"
    cp "$WORK/run/results.json" "$OUT/learn-results.json"
    cp "$WORK/run/learn/metrics.jsonl" "$OUT/learn-metrics.jsonl"
    "$PYTHON" - "$OUT" <<'PY'
import json, statistics, sys
from pathlib import Path
from benchmarks.common import table
out = Path(sys.argv[1])
perplexity = json.loads((out / "learn-results.json").read_text())["perplexity"]
domains = list(next(iter(perplexity.values())))
table("held-out perplexity", ["method", *domains], [[method, *(row[domain] for domain in domains)] for method, row in perplexity.items()])
records = [json.loads(line) for line in (out / "learn-metrics.jsonl").read_text().splitlines()]
speeds = [record["tokens_per_second"] for record in records if record["kind"] == "train"]
print(f"\n{len(speeds)} learning steps, median {statistics.median(speeds):,.0f} tokens/s")
PY
}

{
    printf '# Measured on %s, %s\n\n' "$(date +%F)" "$DEVICE"
    if [ "$DEVICE" = cuda ]; then
        nvidia-smi --query-gpu=name,memory.total,driver_version,utilization.gpu --format=csv || true
    else
        echo "Toy sizes on the CPU: these figures show that the script works and nothing else."
    fi
} | tee "$SUMMARY"

benchmark parity parity "${parity[@]}"
benchmark sampling sampling "${sampling[@]}"
benchmark step step "${step[@]}"
benchmark step-one-draw step "${once[@]}" learn.sampling.draws=step
benchmark step-whole-model step "${whole[@]}" learn.memory=leanest learn.sampling.draws=step
benchmark plan plan "${plan[@]}"
for state in default lean leanest; do
    benchmark "memory-$state" memory "${memory[@]}" "learn.memory=$state"
done
if [ -n "${HF:-}${GGUF:-}" ]; then
    export -f learning_run verbs
    export PYTHON DEVICE WORK OUT HF GGUF RECIPE STEPS
    part "learning run" bash -c learning_run
else
    printf '\n## learning run\n\nNot run: name a model with HF=FOLDER or GGUF=FILE.\n' | tee -a "$SUMMARY"
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nFailed: %s. ' "${failed[*]}"
fi
echo "Results: $SUMMARY ($SECONDS s)"
exit $((${#failed[@]} > 0))
