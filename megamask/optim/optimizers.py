"""From the settings to an optimizer of the mask logits, Megatron's schedule of its rate, and the
gradient norm over all shards.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Sequence

import torch

from megamask.config import Config
from megamask.config.tree import OptimizerSection
from megamask.optim import adamw_8bit
from megamask.optim.adamw import AdamW
from megamask.optim.adamw_bf16 import AdamWBf16
from megamask.optim.base import MaskOptimizer
from megamask.optim.lion import Lion, Lion8bit
from megamask.optim.schedule import LION, LION_RATE, check_schedule, check_state, learning_rates
from megamask.optim.stochastic_rounding import RoundingOptimizer
from megamask.optim.zero1 import Replicas
from megamask.parallel.masked_linear import MaskedLinear

log = logging.getLogger(__name__)


ROUNDING: dict[str, type[RoundingOptimizer]] = {
    "adamw": AdamWBf16,
    "lion": Lion,
    "lion8bit": Lion8bit,
}


def check_optimizer(config: Config) -> None:
    """Everything about optimizer and state that can be refused before the model is loaded. Warns of
    a rate that is too high for Lion.

    Raises:
        ConfigError: a combination that does not exist, a missing package or compiler, a schedule
            that cannot work.
    """
    _refuse(config)
    kind, highest = config.learn.optimizer.kind, learning_rates(config.learn)[0]
    if kind in LION and highest >= LION_RATE:
        advice = (
            "Lion moves every logit by the full rate: use about a third of AdamW's learning rate"
        )
        log.warning("learn.optimizer.lr=%g with kind=%s: %s", highest, kind, advice)


def _refuse(config: Config) -> None:
    learn = config.learn
    check_schedule(learn)
    check_state(learn)
    if learn.optimizer.kind == adamw_8bit.NAME:
        is_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        adamw_8bit.check_available("cuda" if is_cuda else "cpu")


def build_optimizer(
    config: Config, linears: Sequence[MaskedLinear], replicas: Replicas | None = None
) -> MaskOptimizer:
    """The optimizer ``learn.optimizer.kind`` of the logits of ``linears``, of those alone that
    ``replicas`` leaves to this one.

    Raises:
        ConfigError: as ``check_optimizer``.
    """
    _refuse(config)
    logits = config.parallel.tp * sum(
        linear.mask_logits.numel() for linear in linears if linear.mask_logits is not None
    )
    section = config.learn.optimizer.model_copy(
        update={"eps": epsilon(config.learn.optimizer, logits)}
    )
    optimizer = _build(
        section, config, [linears[number] for number in replicas.mine] if replicas else linears
    )
    optimizer.is_sole_owner = replicas is not None
    return optimizer


def epsilon(section: OptimizerSection, logits: int) -> float:
    """What AdamW adds to the root of its second moment.

    Without it every logit moves by about the rate, whatever its gradient, so that noise flips as
    many groups as evidence does, of which there is most where gradients are large. A gradient of
    norm ``clip`` has the root mean square clip / sqrt(logits).
    """
    return section.eps + section.eps_rms * section.clip / math.sqrt(logits)


def _build(
    section: OptimizerSection, config: Config, linears: Sequence[MaskedLinear]
) -> MaskOptimizer:
    if section.kind == "adamw" and config.learn.state.logits == "fp32":
        return AdamW(section, linears, config.seed)
    if section.kind == "adamw8bit":
        return adamw_8bit.AdamW8bit(section, linears, config.seed)
    on_cpu = all(linear.weight.device.type == "cpu" for linear in linears)
    use_numba = (
        on_cpu
        and config.learn.sampling.backend != "torch"
        and importlib.util.find_spec("numba") is not None
    )
    return ROUNDING[section.kind](section, linears, config.seed, use_numba)
