"""The families, by the ``model_type`` of config.json. A new family is one file like llama.py and
one line here.
"""

from __future__ import annotations

from megamask.weights.family import Family
from megamask.weights.llama import LLAMA

FAMILIES: dict[str, Family] = {"llama": LLAMA}
