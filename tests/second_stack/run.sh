#!/usr/bin/env bash
# Tests on the second stack: Python 3.12 or newer, and the pins of constraints-newest.txt (the
# newest Megatron-Core). Says in its last line why they were skipped; that is no failure, unless
# SECOND_SKIP=fail says that they have to run.
#
# An environment that is missing is made: some minutes and 5.4 GB (6.8 GB at the peak), since the
# package index has builds of torch with CUDA alone for Python 3.12.
#
#   SECOND_STACK    chosen (default: the tests that tests/second_stack/chosen.txt names), all (every
#                   test of the package, by night), off
#   SECOND_PYTHON   the Python to build on (default: 3.12 or 3.13, on PATH or of pyenv)
#   SECOND_HOME     where its environments lie (default ~/.cache/megamask), outside the clone. Their
#                   names are checksums of Python and pins, so that the next clone finds its own.
#   SECOND_TIMEOUT  seconds for the whole pytest run (default 900; 7200 for all)
#   SECOND_SKIP     fail: tests that had to be skipped are a failure (default pass); off is none
#   TEST_WORKERS    files tested side by side (default 2)
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/launch/env.sh"
cd "$REPO"
home="${SECOND_HOME:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/megamask}"
kind="${SECOND_STACK:-chosen}"
# Free on the disk before one is made: 6.8 GB were in use at the peak, 5.3 GB of packages and the
# 1.5 GB that pip had downloaded for them, which lie in the environment's own folder until its end.
room_gb=8

skip() {
    say "the tests on the second stack were skipped: $*"
    if [ "${SECOND_SKIP:-pass}" = fail ] && [ "$kind" != off ]; then exit 1; fi
    exit 0
}

find_python() {
    local candidate
    for candidate in ${SECOND_PYTHON:-python3.12 python3.13 \
        "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.1[23]*/bin/python3}; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
        then echo "$candidate"; return; fi
    done
    return 1
}

# What is installed: what the package and the extras of its tests ask for, without the package,
# which the tests find in the folder that they are started in.
requirements() {
    "$python" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print("\n".join(project["dependencies"] + extras["gguf"] + extras["data"] + extras["dev"]))'
}

make_stack() {
    say "making $stack with $("$python" -V) (once; minutes, some GB)"
    rm -rf "$stack"
    "$python" -m venv "$stack" &&
        requirements >"$stack/requirements.txt" &&
        mkdir "$stack/tmp" &&
        TMPDIR="$stack/tmp" retry 2 "$stack/bin/python" -m pip install --quiet \
            --disable-pip-version-check --no-compile --no-cache-dir --timeout 60 --retries 2 \
            -c constraints-newest.txt -r "$stack/requirements.txt" &&
        rm -rf "$stack/tmp" &&
        touch "$stack/.installed"
}

limit=900
case "$kind" in
chosen) mapfile -t tests < <(grep -v '^#' tests/second_stack/chosen.txt) ;;
all) tests=(tests/unit tests/parallel tests/parity tests/e2e) limit=7200 ;;
off) skip "SECOND_STACK=off" ;;
*) die "SECOND_STACK=$kind: chosen, all or off" ;;
esac
python="$(find_python)" || skip "no Python 3.12 or newer (name one with SECOND_PYTHON=...)"
key="$(cat constraints-newest.txt <(requirements; "$python" -VV) | cksum | tr ' ' -)"
stack="$home/stack-$key"
{ mkdir -p "$home" && [ -w "$home" ]; } 2>/dev/null ||
    skip "$home cannot be written (name another folder with SECOND_HOME=...)"
exec 9>"$home/lock"
flock 9 || skip "$home cannot be locked" # two runs make one environment
if [ ! -e "$stack/.installed" ]; then
    free_gb="$(df -Pk "$home" | awk 'NR == 2 { print int($4 / 1048576) }')"
    [ "$free_gb" -ge "$room_gb" ] ||
        skip "$home has $free_gb GB free, an environment needs $room_gb"
    make_stack || { rm -rf "$stack"; skip "its environment could not be made (see above)"; }
fi
touch "$stack/.installed"
# An environment that no run has used for two weeks has old pins.
find "$home" -maxdepth 2 -path '*/stack-*/.installed' -mtime +14 -printf '%h\0' | xargs -0r rm -rf
exec 9>&-

export PATH="$stack/bin:$PATH" PYTHONPATH="$REPO" VIRTUAL_ENV="$stack"
export WANDB_MODE=offline HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
unset PYTHONDONTWRITEBYTECODE
core="$(python -c 'from importlib.metadata import version; print(version("megatron-core"))')"
say "second stack: $("$python" -V), megatron-core $core"
exec timeout --kill-after=30 "${SECOND_TIMEOUT:-$limit}" "$stack/bin/python" -m pytest \
    -p no:cacheprovider -n "${TEST_WORKERS:-2}" --dist loadfile "${tests[@]}" "$@" </dev/null
