#!/usr/bin/env bash
# Everything that must be green: lint, format, spelling, types, all tests, documents.
# Arguments go to pytest: ./launch/test.sh -m 'not slow' -k masks
#   TEST_TIMEOUT   seconds for the whole pytest run (default 3600)
#   TEST_WORKERS   files tested side by side (default: one more than cores, at most 4)
#   NIGHTLY=1      also what repeats a rule at more sizes, and whole studies and benchmarks
#   COVERAGE=1     report the lines that no test ran (slower)
# What it costs on two cores: see "Three tiers" in CONTRIBUTING.md.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$REPO"
megamask_env "$TEST_EXTRAS"

export WANDB_MODE=offline WANDB_SILENT=true HF_HUB_DISABLE_TELEMETRY=1
export TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg

# mypy works on one core. The other one does the short checks, and imports once what the tests
# import: in a new environment that compiles the modules, which every worker would do for itself.
failed=0
step() { say "$*"; "$@" || failed=1; }
types="$(mktemp)"
mypy >"$types" 2>&1 &
types_pid=$!
step ruff check .
step ruff format --check .
step codespell
step mkdocs build --strict --quiet --site-dir "$VENV/site"
python -W ignore -m pytest --collect-only -qq >/dev/null 2>&1 || true # the run below says why
say mypy
wait "$types_pid" || failed=1
cat "$types" && rm "$types"
if [ "$failed" -ne 0 ]; then
    say "lint, types or documents failed (above); the tests run all the same"
fi

# timeout moves its child to the background of the terminal; --foreground keeps Ctrl-C working.
guard=(timeout --kill-after=30)
if [ -t 0 ]; then guard+=(--foreground); fi
# A worker takes a whole file, so that what a file shares is made once. tests/conftest.py puts files
# with slow tests first, so that short files fill the end. Tests wait for processes, disks and
# clocks, so there is a worker more than cores. Two more would bring the longest tests, a minute,
# nearer to their limits, two minutes and more, and hold more memory.
cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
workers="${TEST_WORKERS:-$((cores < 4 ? cores + 1 : 4))}"
options=()
if [ "$workers" -gt 1 ]; then options=(-n "$workers" --dist loadfile --no-loadscope-reorder); fi
if [ "${COVERAGE:-0}" = 1 ]; then
    options+=(--cov=megamask --cov-report=term-missing:skip-covered)
fi
say pytest "${options[@]}" "$@"
"${guard[@]}" "${TEST_TIMEOUT:-3600}" python -m pytest "${options[@]}" "$@" </dev/null || {
    code=$?
    [ "$code" -ne 124 ] || say "the tests did not end in time"
    exit "$code"
}
exit "$failed"
