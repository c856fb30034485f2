#!/usr/bin/env bash
# Make the folders that a machine with a GPU and without a network needs. Run it on a machine
# without a GPU, after the last change of a kernel.
#
#   pack.sh DIR [MODEL.gguf]
#
#   DIR/wheels/         the packages of wheels.txt, for Python 3.12
#   DIR/triton-cache/   compiled kernels, where PYTHON has the Triton of the GPU machine
#   DIR/model-*         MODEL.gguf in parts of PART_MIB (default 40); cat puts them together
#
#   PYTHON      a Python 3.12 with the torch and triton of the GPU machine, and with what the call
#               sites of the kernels import: the packages of wheels.txt (megatron-core, pydantic)
#               and numpy, psutil, safetensors, transformers (default python3.12)
#   CAPABILITY  of the card: 90 for H100 and H200 (default), 80 for A100, 100 for B200
#   PIP         the pip that downloads (default: python3 -m pip)
#
# The Python of the GPU machine must bring pytest, pytest-timeout and pytest-xdist: the part
# `kernels` runs tests, and these packages do not travel.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
repo="$(cd "$here/../.." && pwd)"
out="${1:?usage: pack.sh DIR [MODEL.gguf]}"
model="${2:-}"
[ -z "$model" ] || [ -f "$model" ] || { echo "pack.sh: $model is no file" >&2; exit 2; }
mkdir -p "$out"
out="$(cd "$out" && pwd)"
[ -z "$model" ] || model="$(realpath "$model")"
PYTHON="${PYTHON:-python3.12}"
read -r -a pip <<<"${PIP:-python3 -m pip}"

# wheels: exact versions, because pip refuses a folder with two versions of a package
rm -rf "$out/wheels"
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
"${pip[@]}" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]}" \
    --dest "$out/wheels" --requirement "$here/wheels.txt"
echo "wheels: $(find "$out/wheels" -name '*.whl' | wc -l) files, $(du -sh "$out/wheels" | cut -f1)"

# kernels: gpu.sh names the folder that they lie in there (move_cache.py)
# (compiled under a name of their own first: a half-made cache is never packed)
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
usable='import sys, benchmarks.gpu.compile_kernels
sys.exit(sys.version_info[:2] != (3, 12) and "it is another version of Python")'
if (cd "$repo" && "$PYTHON" -W ignore -c "$usable") 2>"$work/why"; then
    (cd "$repo" && TRITON_INTERPRET=0 TRITON_CACHE_DIR="$work/cache" \
        "$PYTHON" -W ignore -m benchmarks.gpu.compile_kernels --capability "${CAPABILITY:-90}")
    rm -rf "$out/triton-cache"
    mkdir "$out/triton-cache"
    (cd "$work/cache" && find . \( -name '*.cubin' -o -name '*.json' \) \
        -exec cp --parents -t "$out/triton-cache" {} +)
    "$PYTHON" -W ignore - <<'PY'
import triton
print(f"kernels: compiled by triton {triton.__version__}; the GPU machine must have the same")
PY
else
    echo "kernels: not packed, because $PYTHON is no Python 3.12 with all that PYTHON needs (above):" \
        "$(tail -n 1 "$work/why"). They are compiled on the GPU machine, which takes minutes of a CPU."
fi

# model
if [ -n "$model" ]; then
    rm -f "$out"/model-*
    split --bytes "${PART_MIB:-40}M" --numeric-suffixes "$model" "$out/model-"
    (cd "$out" && sha256sum "$model" | cut -d' ' -f1 >model.sha256)
    echo "model: $(find "$out" -name 'model-*' | wc -l) parts"
fi
du -sh "$out"/*
