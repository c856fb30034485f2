# shellcheck shell=bash
# Sourced by the other scripts: `megamask_env EXTRAS` makes .venv once, installs pinned versions,
# and puts it on PATH.
#
#   PYTHON   the Python to build on (default python3, at least 3.10); given, it replaces an
#            environment of another version
#   VENV     where the environment goes (default .venv in the repository)
#   PIP_OPTIONS   more options for pip install, for example --extra-index-url with PyTorch's index
#            of CPU builds
#
# If $PYTHON already has a torch with CUDA (an NVIDIA container, a cluster module), that torch is
# kept and seen through --system-site-packages. Otherwise the index decides: PyPI's torch for Linux
# brings CUDA libraries of several GB, also without a GPU.

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export REPO
ASKED_PYTHON="${PYTHON:-}"
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-$REPO/.venv}"
TEST_EXTRAS="dev,docs,gguf,data,wandb" # what the checks and tests need

# PyTorch's threads would spin while the sampling kernels want the cores.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# Kernels start in the order they are called, so that Megatron's tensor parallel communication runs
# beside the weight gradients.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# torchrun waits this many seconds for workers that save a snapshot before it kills them (its own
# default is 30), and passes SIGUSR1 on as it does SIGTERM, instead of dying of it. Newer versions
# have an option for the signals, whose default replaces the first variable.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
handled="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
export TORCHELASTIC_SIGNALS_TO_HANDLE="${TORCHELASTIC_SIGNALS_TO_HANDLE:-$handled}"
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-$TORCHELASTIC_SIGNALS_TO_HANDLE}"

say() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# retry N COMMAND...: package indexes fail now and then.
retry() {
    local attempts="$1" attempt; shift
    for ((attempt = 1; attempt <= attempts; attempt++)); do
        "$@" && return 0
        ((attempt == attempts)) && break
        say "attempt $attempt of $attempts failed: $1 ...; trying again in $((attempt * 5)) s"
        sleep $((attempt * 5))
    done
    return 1
}

# threads_per_process N: the cores of this machine, divided among N processes (torchrun would give
# each process one thread).
threads_per_process() {
    local cores; cores="$(getconf _NPROCESSORS_ONLN)"
    echo $((cores / $1 > 0 ? cores / $1 : 1))
}

host_torch() {
    # A virtual environment is no host: one that is made from it does not see its packages.
    "$PYTHON" -c 'import importlib.metadata as found, sys, torch
assert torch.version.cuda and sys.prefix == sys.base_prefix
print(found.version("torch"))' 2>/dev/null
}

# write_constraints TARGET TORCH: all pins; or, with a torch of the host, that torch and the pins of
# what the host lacks.
write_constraints() {
    if [ -z "$2" ]; then cp "$REPO/constraints.txt" "$1"; return; fi
    "$PYTHON" - "$REPO/constraints.txt" "$1" "$2" <<'PY'
import importlib.metadata, re, sys
pins, target, torch_version = sys.argv[1:]
def plain(name):
    return re.sub(r"[-_.]+", "-", name or "").lower()
installed = {"torch", *(plain(one.metadata["Name"]) for one in importlib.metadata.distributions())}
def on_host(line):
    name = re.match(r"[A-Za-z0-9._-]+", line)
    return bool(name) and plain(name.group()) in installed
kept = [line for line in open(pins).read().splitlines() if not on_host(line)]
open(target, "w").write("\n".join([f"torch=={torch_version}", *kept]) + "\n")
PY
}

make_venv() {
    local options=()
    if [ -n "$1" ]; then options=(--system-site-packages); fi
    "$PYTHON" -m venv --clear "${options[@]}" "$VENV" ||
        die "$PYTHON -m venv failed. On Debian or Ubuntu install python3-venv, or name another" \
            "Python with PYTHON=..."
}

is_of_another_python() {
    [ -n "$ASKED_PYTHON" ] && [ "$("$VENV/bin/python" -VV)" != "$("$PYTHON" -VV)" ]
}

ENV_SECONDS=0
megamask_env() {
    local extras="$1" stamp pins torch_version options started=$SECONDS
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "$PYTHON is missing or older than 3.10. Name another one with PYTHON=/path/to/python3."
    pins="$(cat "$REPO/pyproject.toml" "$REPO/constraints.txt" \
        <(printf '%s\n' "$REPO" "$("$PYTHON" -VV)") | cksum | tr ' ' -)"
    stamp="$VENV/.installed-$pins-$(cksum <<<"$extras" | tr ' ' -)"
    if [ ! -e "$stamp" ] || [ ! -x "$VENV/bin/python" ]; then
        torch_version="$(host_torch || true)"
        # A venv that was interrupted, or made without ensurepip, has a python and no pip.
        if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || is_of_another_python; then
            say "making $VENV with $("$PYTHON" -V)" \
                "${torch_version:+, keeping torch $torch_version of the host}"
            make_venv "$torch_version"
        fi
        write_constraints "$VENV/constraints.txt" "$torch_version"
        read -r -a options <<<"${PIP_OPTIONS:-}"
        say "installing megamask[$extras] with pinned versions (once; a few minutes)"
        # Python compiles a module at its first import: pip would compile all, half of its time.
        retry 3 "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
            "${options[@]}" -c "$VENV/constraints.txt" -e "${REPO}[$extras]" ||
            die "pip install failed three times; its messages are above."
        # What other pins had installed is replaced now; other extras of these pins are still there.
        find "$VENV" -maxdepth 1 -name '.installed-*' ! -name ".installed-$pins-*" -delete
        touch "$stamp"
        ENV_SECONDS=$((SECONDS - started))
        say "environment ready in $ENV_SECONDS s"
    fi
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
    # Images of Python set it, and every process would compile all that it imports.
    unset PYTHONDONTWRITEBYTECODE
}
