"""The registry of one-shot criteria.

To add a criterion, write a file with a subclass of ``Criterion``, add a line here, and add the name
to ``OneShotMethod`` in ``megamask.config``.
"""

from __future__ import annotations

from megamask.config.tree import PruneSection
from megamask.oneshot.admm import ADMM
from megamask.oneshot.criterion import Criterion
from megamask.oneshot.gblm import GBLM
from megamask.oneshot.magnitude import Magnitude
from megamask.oneshot.polish import Polished
from megamask.oneshot.pruner_zero import PrunerZero
from megamask.oneshot.ria import RIA
from megamask.oneshot.sparsegpt import SparseGPT
from megamask.oneshot.wanda import Wanda

CRITERIA: dict[str, Criterion] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "ria": RIA(),
    "gblm": GBLM(),
    "pruner_zero": PrunerZero(),
    "sparsegpt": SparseGPT(update=False),
    "sparsegpt_update": SparseGPT(update=True),
    "admm": ADMM(update=False),
    "admm_update": ADMM(update=True),
}


def find_criterion(method: str, settings: PruneSection) -> Criterion:
    """The criterion of a method under these settings: polished where ``prune.polish`` says so and
    the weights stay, because updated weights belong to their mask.
    """
    plain = CRITERIA[method]
    return Polished(plain) if settings.polish and not plain.updates_weight else plain
