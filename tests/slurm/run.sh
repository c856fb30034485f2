#!/usr/bin/env bash
# Jobs on a Slurm cluster of two nodes on this machine (tests/slurm/lab.py). Says in its last line
# why there is none, and is no failure then. In CI it installs Debian's packages if they are missing.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/launch/env.sh"
cd "$REPO"
packages=(slurmctld slurmd slurm-client munge iproute2)
install() {
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1  # no daemon is started by the packages
    apt-get install -y --no-install-recommends "${packages[@]}" ||
        { apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"; }
}
if ! command -v slurmctld >/dev/null && [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] &&
    command -v apt-get >/dev/null; then
    install >/dev/null 2>&1 || say "Slurm cannot be installed here"
fi
python="$VENV/bin/python"
why="$("$python" -c 'from tests.slurm.lab import missing; print(missing())')"
if [ -n "$why" ]; then
    say "the tests of Slurm were skipped: $why"
    exit 0
fi
exec timeout --kill-after=30 600 "$python" -m pytest -m slurm tests/slurm "$@"
