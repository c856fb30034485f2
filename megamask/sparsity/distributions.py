"""The distributions of masks, by name. A new distribution is a folder beside this file and a line
here.
"""

from __future__ import annotations

from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.subset.subset import SUBSET

DISTRIBUTIONS: dict[str, Distribution] = {one.name: one for one in (CATEGORICAL, SUBSET)}
