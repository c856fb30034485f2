"""The names of the methods of learning, and the distribution of masks that each of them learns."""

from __future__ import annotations

# method -> distribution, by the names of megamask/sparsity/distributions.py
DISTRIBUTION_OF: dict[str, str] = {
    "subset": "subset",
    "categorical": "categorical",
    "maskpro": "subset",
}
