#!/usr/bin/env bash
# Everything that must be green: lint, format, types, all tests. Arguments go to pytest: ./launch/test.sh -m 'not slow' -k masks
#   TEST_TIMEOUT   seconds for the whole pytest run (default 3600)
#   TEST_WORKERS   files tested side by side (default: the number of cores, at most 4)
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$REPO"
megamask_env dev,gguf,data,wandb

export WANDB_MODE=offline WANDB_SILENT=true HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg

failed=0
step() { say "$*"; "$@" || failed=1; }
step ruff check .
step ruff format --check .
step mypy
if [ "$failed" -ne 0 ]; then
    say "lint or types failed (above); the tests run all the same"
fi

# timeout moves its child to the background of the terminal; --foreground keeps Ctrl-C working where there is one.
guard=(timeout --kill-after=30)
if [ -t 0 ]; then guard+=(--foreground); fi
# A worker takes a whole file, so that what a file shares is made once; long files come first, in the order of their folders.
cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
workers="${TEST_WORKERS:-$((cores < 4 ? cores : 4))}"
side_by_side=()
if [ "$workers" -gt 1 ]; then side_by_side=(-n "$workers" --dist loadfile --no-loadscope-reorder); fi
say pytest "${side_by_side[@]}" "$@"
"${guard[@]}" "${TEST_TIMEOUT:-3600}" python -m pytest "${side_by_side[@]}" "$@" </dev/null || { code=$?; [ "$code" -ne 124 ] || say "the tests did not end in time"; exit "$code"; }
exit "$failed"
