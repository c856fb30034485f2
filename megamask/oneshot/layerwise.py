"""One-shot pruning layer by layer: each layer is judged on what it gets from the pruned layers
before it.

Shapes: N samples, S sequence, O local out_features, I local in_features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.model.language_model import LanguageModel
from megamask.model.mask_shards import linear_rules
from megamask.oneshot.calibrate import HiddenStates, input_stats
from megamask.oneshot.criteria import Criterion
from megamask.oneshot.pruned import Pruned
from megamask.oneshot.stats import InputStats
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import Architecture

log = logging.getLogger(__name__)
LOG_LINES = 10  # of progress, about


@dataclass(frozen=True)
class Subject:
    """The model, the linears to prune by Megatron name, and what to prune them to."""

    config: Config
    mesh: Mesh
    arch: Architecture
    pattern: Pattern
    model: LanguageModel
    linears: dict[str, MaskedLinear]

    def layers(self) -> Iterator[tuple[torch.nn.Module, dict[str, MaskedLinear]]]:
        """Every decoder layer up to the last one that has linears to prune, and those linears."""
        left = dict(self.linears)
        for index, layer in enumerate(self.model.decoder.layers):
            own = {
                name: linear
                for name, linear in left.items()
                if name.startswith(f"decoder.layers.{index}.")
            }
            left = {name: linear for name, linear in left.items() if name not in own}
            yield layer, own
            if not left:
                return

    def hf_names(self, name: str) -> str:
        """What users call a linear: the HF modules that it is made of."""
        return ", ".join(linear_rules(self.arch)[name].modules)


@torch.no_grad()
def prune_layerwise(
    subject: Subject, criterion: Criterion, tokens_NS: torch.Tensor | None
) -> dict[str, Pruned]:
    """This rank's shards of masks, and of updated weights, of every linear by Megatron name.

    Each layer runs twice on all samples: dense, to collect the statistics of its linears' inputs,
    and pruned, to make the inputs of the next layer. The linears end as they began: dense.

    Masks do not depend on the layout, but for near-ties that rounding decides. SparseGPT passes
    such a difference on, along the row and into the layers above, so that on a deep model another
    TP, or only another ``calibration.micro_batch``, gives masks that are as good but not the same.

    Args:
        subject: what to prune.
        criterion: how.
        tokens_NS: the calibration samples, equal on all ranks; not looked at by a criterion that
            needs no statistics.

    Raises:
        ConfigError: inputs that are not finite, or a Hessian that damping cannot mend, with the
            name of the linear.
    """
    try:
        if not criterion.needs_stats:
            return {name: _prune(subject, criterion, name, None) for name in subject.linears}
        assert tokens_NS is not None
        return _prune_on_samples(subject, criterion, tokens_NS)
    finally:
        for linear in subject.linears.values():
            linear.fold(None)


def _prune_on_samples(
    subject: Subject, criterion: Criterion, tokens_NS: torch.Tensor
) -> dict[str, Pruned]:
    config, mesh = subject.config, subject.mesh
    states = HiddenStates(subject.model, tokens_NS, config.calibration.micro_batch, mesh)
    layers, pruned, begin = list(subject.layers()), {}, time.perf_counter()
    for number, (layer, own) in enumerate(layers, start=1):
        with input_stats(
            own, criterion.needs_hessian, mesh, config.parallel.sequence_parallel
        ) as stats:
            if own:
                states.feed(layer)
        for name, linear in own.items():
            pruned[name] = _prune(subject, criterion, name, stats.pop(name))
            _use(linear, pruned[name])
        if number < len(layers):
            states.advance(layer)
        if mesh.is_main and (number % -(-len(layers) // LOG_LINES) == 0 or number == len(layers)):
            log.info("  layer %d/%d  %.1f s", number, len(layers), time.perf_counter() - begin)
    return pruned


def _prune(subject: Subject, criterion: Criterion, name: str, stats: InputStats | None) -> Pruned:
    """Prune one linear. Rows are independent, columns are not: a weight that is split over columns
    is pruned whole, on every rank.
    """
    linear, mesh, settings = subject.linears[name], subject.mesh, subject.config.prune
    weight_OI = linear.weight.detach()
    whole = stats is not None and linear.shard_axis == 1 and mesh.tp > 1
    if whole:
        weight_OI = torch.cat(mesh.gather_over_tp(weight_OI), dim=1)
    with _naming(subject.hf_names(name)):
        pruned = criterion.prune(weight_OI, stats, subject.pattern, settings)
    if pruned.damp is not None and pruned.damp != settings.damp and mesh.is_main:
        fix = "more calibration tokens would help"
        log.warning(
            "%s: prune.damp=%g is too little, used %g; %s",
            subject.hf_names(name),
            settings.damp,
            pruned.damp,
            fix,
        )
    return _own_columns(pruned, mesh) if whole else pruned


def _own_columns(pruned: Pruned, mesh: Mesh) -> Pruned:
    mask_OI, weight_OI = (
        None if one is None else one.chunk(mesh.tp, dim=1)[mesh.tp_rank]
        for one in (pruned.mask_OI, pruned.weight_OI)
    )
    assert mask_OI is not None
    return Pruned(
        mask_OI.contiguous(), None if weight_OI is None else weight_OI.contiguous(), pruned.damp
    )


def _use(linear: MaskedLinear, pruned: Pruned) -> None:
    """Compute with the pruned weight from now on."""
    if pruned.weight_OI is None:
        linear.fold(pruned.mask_OI)
    else:
        linear.folded_weight = pruned.weight_OI


@contextmanager
def _naming(linear: str) -> Iterator[None]:
    """Put the linear's name into the errors of a criterion, which does not know it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.key, error.value, f"{linear}: {error.allowed}", error.fix) from None


def damping(subject: Subject, pruned: Mapping[str, Pruned]) -> dict[str, float]:
    """The damping of the linears, by HF names, that needed more than ``prune.damp``."""
    asked = subject.config.prune.damp
    return {
        subject.hf_names(name): one.damp
        for name, one in pruned.items()
        if one.damp is not None and one.damp != asked
    }
