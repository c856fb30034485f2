"""One-shot pruning layer by layer: the inputs of a layer come from the pruned layers before it or,
with ``prune.inputs=dense``, from the dense layers.

Shapes: N samples, S sequence, O local out_features, I local in_features.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.model.language_model import LanguageModel
from megamask.model.mask_shards import linear_rules, local_shard, patterns_by_linear
from megamask.oneshot.calibrate import HiddenStates, input_stats
from megamask.oneshot.criterion import Criterion
from megamask.oneshot.stats import GradientStats, InputStats, Statistics
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.sparsity.margins import to_codes
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.terminal import is_reported
from megamask.weights.architecture import Architecture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunedShard:
    """The result for this rank's shard of one linear.

    Attributes:
        mask_OI, weight_OI, damp: as of ``Pruned``. The mask is in host memory, and so is the weight
            under ``prune.inputs=dense``, where no layer computes with it.
        margin_codes_OI: the margins of the scores, uint8 (``sparsity.margins.to_codes``), in host
            memory: a byte for each weight of the model would not fit beside it on a small card.
    """

    mask_OI: torch.Tensor
    weight_OI: torch.Tensor | None
    damp: float | None
    margin_codes_OI: torch.Tensor


@dataclass(frozen=True)
class PruningJob:
    """A model and the linears of it that are pruned.

    Attributes:
        config: the settings.
        mesh: process groups and device of this rank.
        arch: the architecture of the model.
        plan: the patterns of the masks, by HF name.
        model: the dense model.
        linears: the linears to prune, by Megatron name.
    """

    config: Config
    mesh: Mesh
    arch: Architecture
    plan: PatternPlan
    model: LanguageModel
    linears: dict[str, MaskedLinear]

    @cached_property
    def patterns(self) -> dict[str, Pattern]:
        """Megatron name -> pattern of the linears to prune."""
        return patterns_by_linear(self.plan, self.arch)

    def layers(self) -> Iterator[tuple[torch.nn.Module, dict[str, MaskedLinear], bool]]:
        """Yield (decoder layer, its linears to prune, whether it is the last), up to the last layer
        that has any. The log tells how far the caller is.
        """
        own_of: list[dict[str, MaskedLinear]] = [{} for _ in self.model.decoder.layers]
        for name, linear in self.linears.items():
            own_of[int(name.split(".")[2])][name] = linear
        count = max((number for number, own in enumerate(own_of, start=1) if own), default=0)
        begin = time.perf_counter()
        for number, own in enumerate(own_of[:count], start=1):
            yield self.model.decoder.layers[number - 1], own, number == count
            if self.mesh.is_main and is_reported(number, count):
                took = time.perf_counter() - begin
                log.info("  layer %d/%d  %.1f s", number, count, took)

    def hf_names(self, name: str) -> str:
        """The names of the HF modules that are fused into a linear, for messages."""
        return ", ".join(linear_rules(self.arch)[name].modules)


def passes(config: Config, criteria: Mapping[str, Criterion]) -> list[dict[str, Criterion]]:
    """The criteria, by method, that ``prune_layerwise`` prunes together.

    Under ``prune.inputs=dense`` all criteria that need statistics of inputs read the same inputs.
    Otherwise each reads the outputs of its own pruned layers, and has a pass of its own.
    """
    shared = {
        method: one
        for method, one in criteria.items()
        if one.needs_stats and config.prune.inputs == "dense"
    }
    alone = [{method: one} for method, one in criteria.items() if method not in shared]
    return [*alone, shared] if shared else alone


@torch.no_grad()
def prune_layerwise(
    job: PruningJob,
    criteria: Mapping[str, Criterion],
    tokens_NS: torch.Tensor | None,
    gradients: Mapping[str, GradientStats] | None = None,
) -> dict[str, dict[str, PrunedShard]]:
    """Prune every linear by every criterion; returns, by method and Megatron name, this rank's
    shards of masks, updated weights and margins. At the end all linears are dense again.

    With the inputs of pruned layers, each layer runs twice on all samples: dense, to collect the
    statistics of the inputs of its linears, and pruned, to make the inputs of the next layer. With
    the inputs of dense layers, it runs once, for all criteria.

    The layout changes masks only where rounding decides a near-tie. SparseGPT carries such a
    difference along the row and into the layers above. So on a deep model another TP, another
    ``calibration.micro_batch`` or another number of threads gives another mask, of which chance
    makes a better or a worse one: see "On many GPUs" in docs/one-shot.md.

    Args:
        job: the model and the linears to prune.
        criteria: the rules that choose the masks, by method: an entry of ``passes``.
        tokens_NS: the calibration samples, equal on all ranks; None where no criterion needs
            statistics of inputs.
        gradients: this rank's shards of a sweep, by Megatron name, on any device; None where no
            criterion needs gradients.

    Raises:
        ConfigError: inputs or gradients are not finite, or damping cannot make a Hessian positive
            definite; the message names the linear.
    """
    pruned: dict[str, dict[str, PrunedShard]] = {method: {} for method in criteria}
    gradients = gradients or {}
    if not any(one.needs_stats for one in criteria.values()):
        for name in job.linears:
            stats = Statistics(gradients=_at_hand(job, criteria, gradients, name))
            _record(pruned, name, _prune_by(job, criteria, name, stats))
        return pruned
    assert tokens_NS is not None
    try:
        _prune_on_samples(job, criteria, tokens_NS, gradients, pruned)
    finally:
        for linear in job.linears.values():
            linear.fold(None)
    return pruned


def _record(
    pruned: Mapping[str, dict[str, PrunedShard]], name: str, shards: Mapping[str, PrunedShard]
) -> None:
    for method, shard in shards.items():
        pruned[method][name] = shard


def _prune_on_samples(
    job: PruningJob,
    criteria: Mapping[str, Criterion],
    tokens_NS: torch.Tensor,
    gradients: Mapping[str, GradientStats],
    pruned: Mapping[str, dict[str, PrunedShard]],
) -> None:
    """Prune with the statistics of the calibration samples, layer by layer, into ``pruned``."""
    config, mesh = job.config, job.mesh
    states = HiddenStates(job.model, tokens_NS, config.calibration.micro_batch, mesh)
    dense = config.prune.inputs == "dense"
    hessian = any(one.needs_hessian for one in criteria.values())
    for layer, own, is_last in job.layers():
        # Dense pass: statistics of the inputs of the layer's linears.
        with input_stats(own, hessian, mesh, config.parallel.sequence_parallel) as stats:
            if dense and not is_last:
                states.advance(layer)
            elif own:
                states.feed(layer, own.values())
        warn_of_unseen(job, stats)
        # Prune the linears, then run the pruned layer for the inputs of the next layer.
        for name, linear in own.items():
            measured = _at_hand(job, criteria, gradients, name)
            of_linear = Statistics(stats.pop(name), measured)
            shards = _prune_by(job, criteria, name, of_linear)
            _record(pruned, name, shards)
            for shard in shards.values() if not dense else ():  # a single criterion
                _use(linear, shard)
        if not dense and not is_last:
            states.advance(layer)


def warn_of_unseen(job: PruningJob, stats: Mapping[str, InputStats]) -> None:
    """Name the experts that no token reached, as ``model.exclude`` takes them."""
    unseen = [name for name, sums in stats.items() if sums.is_stand_in]
    if not unseen or not job.mesh.is_main:
        return
    modules = (linear_rules(job.arch)[name].modules[0] for name in unseen)
    log.warning(
        "%s: no calibration token reached this expert, so its weights alone decide; "
        "more calibration.samples would help",
        ", ".join(dict.fromkeys(f"{module.rpartition('.')[0]}.*" for module in modules)),
    )


def _at_hand(
    job: PruningJob,
    criteria: Mapping[str, Criterion],
    gradients: Mapping[str, GradientStats],
    name: str,
) -> GradientStats | None:
    """The gradients of one linear on the device; None where no criterion needs any."""
    if not any(one.needs_gradients for one in criteria.values()):
        return None
    of_linear = gradients[name]
    return replace(of_linear, sum_square_OI=of_linear.sum_square_OI.to(job.mesh.device))


def _prune_by(
    job: PruningJob, criteria: Mapping[str, Criterion], name: str, stats: Statistics
) -> dict[str, PrunedShard]:
    """Prune one linear by every criterion; an algorithm with updated weights runs once for its
    mask alone too.
    """
    shards: dict[str, PrunedShard] = {}
    updated: dict[str, PrunedShard] = {}
    for method, one in sorted(criteria.items(), key=lambda item: not item[1].updates_weight):
        if one.algorithm in updated:
            shards[method] = replace(updated[one.algorithm], weight_OI=None)
            continue
        shards[method] = _prune(job, one, name, stats)
        if one.algorithm and one.updates_weight:
            updated[one.algorithm] = shards[method]
    return shards


def _prune(job: PruningJob, criterion: Criterion, name: str, stats: Statistics) -> PrunedShard:
    """Prune one linear.

    Columns depend on each other where there are statistics, and rows do where the criterion says
    so. A weight that is split over its columns, or whose rows depend on each other, is pruned
    whole.
    """
    linear = job.linears[name]
    split = stats.inputs is not None and linear.shard_axis == 1 and job.mesh.tp > 1
    if criterion.mixes_rows or split:
        return _prune_whole(job, criterion, name, stats)
    return _prune_rows(job, criterion, name, linear.weight.detach(), stats)


def _prune_whole(
    job: PruningJob, criterion: Criterion, name: str, stats: Statistics
) -> PrunedShard:
    """Prune the HF linears that are fused into a linear, each as a whole, and keep this rank's
    shards. Every rank gathers the weight and does the same work, so the layout changes no sum.
    """
    mesh, rule = job.mesh, linear_rules(job.arch)[name]

    def parts(shard_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        return rule.to_hf(rule.join(mesh.gather_over_tp(shard_OI)))

    stats_of = dict.fromkeys(parts_OI := parts(job.linears[name].weight.detach()), stats)
    if (gradients := stats.gradients) is not None and criterion.needs_gradients:
        for hf_name, sum_OI in parts(gradients.sum_square_OI).items():
            own_rows = replace(gradients, sum_square_OI=sum_OI)
            stats_of[hf_name] = replace(stats, gradients=own_rows)
    whole = {
        hf_name.rpartition(".")[0]: _prune_rows(job, criterion, name, part_OI, stats_of[hf_name])
        for hf_name, part_OI in parts_OI.items()
    }

    def own(whole_OI: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return local_shard(whole_OI, rule, mesh).contiguous()

    updated = {module: one.weight_OI for module, one in whole.items() if one.weight_OI is not None}
    return PrunedShard(
        mask_OI=own({module: one.mask_OI for module, one in whole.items()}),
        weight_OI=own(updated) if updated else None,
        damp=max((one.damp for one in whole.values() if one.damp is not None), default=None),
        margin_codes_OI=own({module: one.margin_codes_OI for module, one in whole.items()}),
    )


def _prune_rows(
    job: PruningJob,
    criterion: Criterion,
    name: str,
    weight_OI: torch.Tensor,
    stats: Statistics,
) -> PrunedShard:
    """Prune these rows of a linear; a damping that had to be raised is told in the log."""
    settings = job.config.prune
    with naming(job.hf_names(name)):
        pruned = criterion.prune(weight_OI, stats, job.patterns[name], settings)
    if pruned.damp is not None and pruned.damp != settings.damp and job.mesh.is_main:
        log.warning(
            "%s: prune.damp=%g is too little, used %g; more calibration tokens would help",
            job.hf_names(name),
            settings.damp,
            pruned.damp,
        )
    codes_OI = to_codes(pruned.score_OI, pruned.mask_OI, job.patterns[name]).cpu()
    updated_OI = pruned.weight_OI
    if updated_OI is not None and settings.inputs == "dense":  # no layer computes with it
        updated_OI = updated_OI.cpu()
    return PrunedShard(pruned.mask_OI.cpu(), updated_OI, pruned.damp, codes_OI)


def _use(linear: MaskedLinear, pruned: PrunedShard) -> None:
    """Compute with the pruned weight from now on."""
    if pruned.weight_OI is None:
        linear.fold(pruned.mask_OI)
    else:
        linear.folded_weight = pruned.weight_OI


@contextmanager
def naming(linear: str) -> Iterator[None]:
    """Add the name of the linear to the errors of a criterion, which does not know the name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(error.key, error.value, f"{linear}: {error.allowed}", error.fix) from None


def damping(job: PruningJob, pruned: Mapping[str, PrunedShard]) -> dict[str, float]:
    """HF names -> damping, for the linears that needed more than ``prune.damp``."""
    asked = job.config.prune.damp
    return {
        job.hf_names(name): result.damp
        for name, result in pruned.items()
        if result.damp is not None and result.damp != asked
    }
