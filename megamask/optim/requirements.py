"""What is refused about an optimizer and its schedule before the model is loaded."""

from __future__ import annotations

import logging

from megamask.config import Config
from megamask.optim.optimizers import check_rule
from megamask.optim.schedule import check_schedule, learning_rates

log = logging.getLogger(__name__)


def check_optimizer(config: Config) -> None:
    """Check the update rule, its state and its schedule. Logs a warning if the learning rate is too
    high for the rule.

    Raises:
        ConfigError: an update rule that does not exist or is not installed, a dtype that it cannot
            update, a schedule that cannot work.
    """
    rule, (highest, _) = check_rule(config), learning_rates(config)
    check_schedule(config)
    # A derived rate has been divided for the rule already.
    if config.learn.optimizer.lr is not None and highest >= rule.warning_rate:
        log.warning("learn.optimizer.lr=%g with kind=%s: %s", highest, rule.name, rule.rate_advice)
