#!/usr/bin/env bash
# Everything that must be green: lint, format, types, all tests. Arguments go to pytest: ./launch/test.sh -m 'not slow' -k masks
#   TEST_TIMEOUT   seconds for the whole pytest run (default 3600)
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
say pytest "$@"
"${guard[@]}" "${TEST_TIMEOUT:-3600}" python -m pytest "$@" </dev/null || { code=$?; [ "$code" -ne 124 ] || say "the tests did not end in time"; exit "$code"; }
exit "$failed"
