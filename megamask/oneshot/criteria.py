"""The registry of one-shot criteria.

To add a criterion, write a file with a subclass of ``Criterion``, add a line here, and add the name
to ``OneShotMethod`` in ``megamask.config``.
"""

from __future__ import annotations

from megamask.oneshot.criterion import Criterion
from megamask.oneshot.magnitude import Magnitude
from megamask.oneshot.ria import RIA
from megamask.oneshot.sparsegpt import SparseGPT
from megamask.oneshot.wanda import Wanda

CRITERIA: dict[str, Criterion] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": RIA(),
    "sparsegpt": SparseGPT(update=False),
    "sparsegpt_update": SparseGPT(update=True),
}
