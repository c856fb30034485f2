"""The distribution of masks that each method of version 0.1.0 learned.

The notes of its snapshots name the method alone. A snapshot of today names its distribution, so
that a new method needs no line here: learn/methods.py holds the methods.
"""

from __future__ import annotations

# method -> distribution, by the names of megamask/sparsity/distributions.py
DISTRIBUTION_OF: dict[str, str] = {
    "subset": "subset",
    "categorical": "categorical",
    "maskpro": "subset",
}
