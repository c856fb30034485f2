"""Speed, memory and parity, measured: run as ``python -m benchmarks.NAME`` from the repository's
root.
"""

import warnings

warnings.filterwarnings(
    "ignore", module=r"megatron\."
)  # which optional packages are absent: the reports say it
