"""The names of the methods of learning, and the distribution of masks that each of them learns."""

from __future__ import annotations

from typing import Literal

# method -> distribution, by the names of megamask/sparsity/distributions.py
DISTRIBUTION_OF: dict[str, Literal["linear", "categorical"]] = {
    "subset": "linear",
    "categorical": "categorical",
    "maskpro": "linear",
}
