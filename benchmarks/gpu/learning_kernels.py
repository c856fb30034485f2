"""The Triton kernels that a learning run launches, by its settings, through the call sites of the
product. A test compares them with what a learner launches.

Whoever calls this replaces the launches: the tensors hold no numbers, and memory that nobody
touches is not taken from the machine.

Shapes: O out_features, I in_features, L logits a group, G groups per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from benchmarks.sampling import layer_shapes
from megamask.config import Config, load_config
from megamask.learn import kernel_check
from megamask.learn.annealing import sample_of
from megamask.learn.maskpro import score
from megamask.learn.method import Method
from megamask.learn.methods import find_method
from megamask.model.build import DTYPES
from megamask.optim.optimizers import find_rule, section_for
from megamask.optim.stochastic_rounding import RoundingOptimizer
from megamask.sparsity.draw import GradientSink, Sampler, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.weights.shapes import read_shape

KEY = NoiseKey(1, 2, 3, 4)
CPU = torch.device("cpu")
MEMORIES = ("default", "lean", "leanest")
# ``step`` sums dW in fp32 and replaces the gradient buffer, ``micro_batch`` replaces and adds in
# the dtype of the weight. A number is both, and adds sums in fp32.
DRAWS = ("micro_batch", "step", "4")
NOISE = ("1", "0")  # 0 has kernels of its own
COMMON = ["dtype=bf16", "learn.micro_batch=1", "learn.global_batch=8"]


class Shape(NamedTuple):
    """A masked linear: O, I, and the row blocks of its shard, 2 for a fused gate and up."""

    rows: int
    columns: int
    blocks: int = 1


def runs(masks: str, more: list[str]) -> Iterator[Config]:
    """The settings of learning runs that together launch every kernel of soft masks, by
    ``MEMORIES``, ``DRAWS`` and ``NOISE``, and, of ``subset``, the kernels of MaskPro.

    Args:
        masks: distribution/N:M.
        more: settings over those of every run.
    """
    method, _, pattern = masks.partition("/")
    for memory, draws, noise in product(MEMORIES, DRAWS, NOISE):
        sampling = [f"learn.sampling.draws={draws}", f"learn.sampling.noise={noise}"]
        words = [f"learn.method={method}", f"learn.memory={memory}", *sampling]
        yield load_config(None, [f"pattern={pattern}", *COMMON, *words, *more])
    if method == "subset":
        words = ["learn.preset=maskpro", "learn.method=maskpro"]
        config = load_config(None, [f"pattern={pattern}", *COMMON, *words, *more])
        if config.learn.state.logits == "fp32":  # which MaskPro asks for
            yield config


def shapes_of(model: str) -> Iterator[Shape]:
    """The masked linears of a layer of ``model``."""
    for name, (rows, columns) in layer_shapes(read_shape(model)).items():
        yield Shape(rows, columns, 2 if name == "fc1" else 1)


def check(config: Config) -> None:
    """The check of one tile before a run (``megamask.learn.kernel_check``)."""
    method, pattern = find_method(config.learn.method), Pattern.parse(config.pattern)
    place = Placement.whole(kernel_check.ROWS, kernel_check.GROUPS)
    site = Site(pattern, place, method.distribution)
    kernel_check.results(config, site, CPU, "triton")
    trial = kernel_check.trial_update(config, site, CPU, "triton")
    if trial is not None:
        trial.make(True)


def learn(config: Config, shape: Shape) -> None:
    """The steps, hard masks and updates of one linear."""
    method = find_method(config.learn.method)
    site, state = site_of(config, shape, method), config.learn.state
    sampler = sampler_for("triton", method.distribution)
    logits, weight = empty(site, shape, DTYPES[state.logits]), empty_weight(config, shape)
    sampler.mask_statistics(logits, site, 1.0)
    if method.forward_passes(config.learn):
        for statistics in (True, False):
            sampler.forward(logits, weight, site, score.sample_of(KEY), statistics)
        kind = score.choose_score(config.learn.maskpro.score, site.pattern)
        score.add_scores_of("triton")(logits, site, KEY, [0.5, -1.0], kind)
        return
    _gradients(config, site, sampler, logits, weight)
    update(config, shape)


def _gradients(
    config: Config, site: Site, sampler: Sampler, logits: torch.Tensor, weight: torch.Tensor
) -> None:
    """The draws of a step, and their gradients at the logits."""
    state, sample = config.learn.state, sample_of(config, 0).of(KEY.parameter)
    in_buffer = torch.float32 if state.grads == "fp32" else logits.dtype
    buffer = torch.empty_like(logits, dtype=in_buffer)
    for is_first, dtype in sorted(draws_of(config), key=str):
        sampler.forward(logits, weight, site, sample, is_first)
        sink = GradientSink(1e-5, buffer, is_first)
        sampler.backward(torch.empty_like(weight, dtype=dtype), logits, weight, site, sample, sink)
    if state.masked_weight == "regenerate" and config.learn.sampling.span == 1:
        sampler.forward(logits, weight, site, sample)


def draws_of(config: Config, replicas: int = 1) -> set[tuple[bool, torch.dtype]]:
    """(whether its gradient replaces the content of the buffer, dtype of the gradient at the
    masked weight) of every draw of a step.
    """
    learn = config.learn
    uses = learn.sampling.uses(learn.global_batch // learn.micro_batch // replicas, replicas)
    in_fp32 = learn.sampling.span > 1 and learn.state.grads == "fp32"
    return {
        (number == 0, torch.float32 if in_fp32 and used > 1 else DTYPES[config.dtype])
        for number, used in enumerate(uses)
    }


def update(config: Config, shape: Shape) -> None:
    """The update of the logits, where the optimizer has kernels."""
    method, state = find_method(config.learn.method), config.learn.state
    rule = find_rule(config.learn.optimizer.kind)
    if not rule.has_kernels(state.logits):
        return
    site = site_of(config, shape, method)
    logits = empty(site, shape, DTYPES[state.logits])
    settings: dict[str, Any] = {"use_kernels": True, "logits_dtype": state.logits, "epsilon": 1e-8}
    optimizer = rule.build(section_for(config), [], KEY.seed, **settings)
    assert isinstance(optimizer, RoundingOptimizer)
    optimizer.load_moments(optimizer.moments(), 1)
    gradient = empty(site, shape, torch.float32 if state.grads == "fp32" else logits.dtype)
    tensors = (logits, gradient, *optimizer.new_state(logits))
    numbers = optimizer.numbers(1e-3)
    optimizer.by_triton(site.placement, tensors, KEY, numbers, torch.ones(()))


def site_of(config: Config, shape: Shape, method: Method) -> Site:
    """The whole linear, unsharded."""
    pattern = Pattern.parse(config.pattern)
    place = Placement.shard(
        shape.rows, shape.columns // pattern.m, axis=0, rank=0, size=1, stride=shape.blocks
    )
    return Site(pattern, place, method.distribution)


def empty(site: Site, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """Logits, or a buffer of their gradient."""
    groups = shape.columns // site.pattern.m
    return torch.empty(shape.rows, site.logits_per_group, groups, dtype=dtype)


def empty_weight(config: Config, shape: Shape) -> torch.Tensor:
    """The frozen weight."""
    return torch.empty(shape.rows, shape.columns, dtype=DTYPES[config.dtype])
