"""The sizes of a planned learning run, from which its memory and time are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from megamask.config import Config
from megamask.config.presets import MEMORIES
from megamask.learn.method import PARTS, WIDTH, Method, StateOf
from megamask.learn.methods import find_method, state_bytes
from megamask.model.mask_shards import patterns_by_linear
from megamask.parallel.partition import largest_share
from megamask.prepare.layout import Layout, check_positions
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.architecture import Architecture
from megamask.weights.layer_plan import asked_patterns, layer_plan
from megamask.weights.mapping import rules


@dataclass(frozen=True)
class Linear:
    """A Megatron linear of one rank.

    Attributes:
        layer: the number of its decoder layer, from 0.
        weights: weights of this rank's shard.
        whole: weights of the whole linear.
        pattern: of its mask; None for a dense linear.
        is_recomputed: whether ``parallel.recompute`` computes it twice.
        is_gated: whether it holds [gate; up], whose halves a checkpoint saves apart.
        share: the share of the tokens that it computes; below 1 for an expert, on average.
    """

    layer: int
    weights: int
    whole: int
    pattern: Pattern | None
    is_recomputed: bool
    is_gated: bool
    share: float = 1.0

    @property
    def is_masked(self) -> bool:
        """Whether it gets a mask."""
        return self.pattern is not None


@dataclass(frozen=True)
class Workload:
    """A learning run on ``dp`` replicas of ``parallel.tp`` ranks.

    Attributes:
        config: the settings of the run.
        arch: the model.
        dp: replicas of the model.
    """

    config: Config
    arch: Architecture
    dp: int = 1

    def check(self) -> Workload:
        """Refuse a run that fits no device of any size; return self.

        Raises:
            ConfigError: an unknown method, settings that it cannot work with, a pattern too large
                for its distribution, a sample or window longer than the model's positions, or a
                layout that breaks a rule of :class:`megamask.prepare.layout.Layout`.
        """
        for pattern in asked_patterns(self.config):
            self.distribution.logits_per_group(pattern)
            self.method.check_settings(self.config, pattern)
        layout = Layout.planned(self.config, self.dp)
        layout.check_samples(self.config)
        check_positions(self.config, self.arch, ("data.seq_length", "evaluate.window"))
        layout.check_linears(self.config, self.arch, self.plan)
        return self

    @cached_property
    def plan(self) -> PatternPlan:
        """The linears that get a mask, and their patterns.

        Raises:
            ConfigError: see ``layer_plan``.
        """
        return layer_plan(self.arch, self.config)

    @property
    def distribution(self) -> Distribution:
        """Of the masks that are learned."""
        return self.method.distribution

    def logits_of(self, pattern: Pattern) -> float:
        """Mask logits of a weight under a pattern."""
        return self.distribution.logits_per_group(pattern) / pattern.m

    def code_bytes_of(self, pattern: Pattern) -> float:
        """Bytes of hard codes of a weight under a pattern."""
        return self.distribution.code_dtype(pattern).itemsize / pattern.m

    def mean(self, of: Callable[[Pattern], float]) -> float:
        """The mean of a number that depends on the pattern, over the masked weights of a rank."""
        sizes = self.masked_by_pattern
        if len(sizes) == 1:
            return of(next(iter(sizes)))
        total = sum(size * of(pattern) for pattern, size in sizes.items())
        return total / max(self.masked_weights, 1)

    def most(
        self,
        of: Callable[[Pattern], float],
        size: Callable[[Linear], int] = lambda one: one.weights,
    ) -> float:
        """The most that one masked linear takes of a number a weight that depends on the pattern.

        Args:
            of: the number.
            size: weights of a linear; those of a rank by default.
        """
        masked = ((one, one.pattern) for one in self.linears)
        found = (size(one) * of(pattern) for one, pattern in masked if pattern is not None)
        return max(found, default=0.0)

    @property
    def method(self) -> Method:
        """The method of learning.

        Raises:
            ConfigError: there is none of that name.
        """
        return find_method(self.config.learn.method)

    @property
    def forward_passes(self) -> int:
        """Forward passes of a micro-batch of a method without a backward pass; 0 = it has one."""
        return self.method.forward_passes(self.config.learn)

    @property
    def tp(self) -> int:
        """Ranks that share a layer."""
        return self.config.parallel.tp

    @property
    def accumulations(self) -> int:
        """Micro-batches that one replica runs in a step."""
        return self.config.learn.global_batch // (self.config.learn.micro_batch * self.dp)

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.config.learn.micro_batch * self.config.data.seq_length

    @property
    def tokens_a_step(self) -> int:
        """Tokens in a global batch."""
        return self.config.learn.global_batch * self.config.data.seq_length

    @property
    def width(self) -> int:
        """Bytes of one weight or activation."""
        return WIDTH[self.config.dtype]

    @property
    def vocab_rows(self) -> int:
        """Rows of the padded vocabulary that one rank holds."""
        return math.ceil(self.arch.vocab / self.tp)

    @cached_property
    def linears(self) -> list[Linear]:
        """All linears of one rank, masked or not, in model order."""
        recompute = self.config.parallel.recompute
        experts, pattern_of = self.arch.experts, patterns_by_linear(self.plan, self.arch)
        routed = 1.0 if experts is None else experts.top_k / experts.count
        return [
            Linear(
                int(rule.megatron.split(".")[2]),
                math.prod(rule.shape(self.tp)),
                math.prod(rule.shape(1)),
                pattern_of.get(rule.megatron.removesuffix(".weight")),
                recompute is True or (recompute == "mlp" and ".mlp." in rule.megatron),
                rule.kind == "gated",
                routed if ".experts." in rule.megatron else 1.0,
            )
            for rule in rules(self.arch)
            if rule.is_linear
        ]

    @cached_property
    def masked_weights(self) -> int:
        """Weights of one rank that get a mask."""
        return sum(self.masked_sizes)

    @cached_property
    def masked_sizes(self) -> list[int]:
        """Weights of each linear of one rank that gets a mask."""
        return [linear.weights for linear in self.linears if linear.is_masked]

    @cached_property
    def masked_by_pattern(self) -> dict[Pattern, int]:
        """Pattern -> weights of one rank with masks of it."""
        sizes: dict[Pattern, int] = {}
        for linear in self.linears:
            if linear.pattern is not None:
                sizes[linear.pattern] = sizes.get(linear.pattern, 0) + linear.weights
        return sizes

    @cached_property
    def all_masked_weights(self) -> int:
        """Weights of the whole model that get a mask."""
        return sum(linear.whole for linear in self.linears if linear.is_masked)

    @cached_property
    def recomputed_weights(self) -> float:
        """Weights of the whole model's linears, masked or not, that a token is computed with
        twice.
        """
        return sum(linear.whole * linear.share for linear in self.linears if linear.is_recomputed)

    @cached_property
    def ffn(self) -> int:
        """The width of the feed-forward parts that a token passes in a layer: of the widest layer,
        where layers differ, and of all experts of a token together.
        """
        return max(self.ffn_of(layer) for layer in range(self.arch.num_layers))

    def mlp_inputs(self, layer: int) -> float:
        """Hidden states of a token that a rank saves around the feed-forward part of a layer: the
        input of its first linear. Experts keep a copy for each expert of a token, and as many
        outputs for their factors, whole on each rank; the expert of every token keeps its input and
        output. The router is frozen, and keeps nothing.
        """
        experts = self.arch.experts_of(layer)
        if experts is None:
            return 1 / (self.tp if self.config.parallel.sequence_parallel else 1)
        return 2 * (experts.top_k + (experts.shared_ffn is not None))

    def ffn_of(self, layer: int) -> int:
        """The width of the feed-forward parts that a token passes in a layer, of all its experts
        together.
        """
        experts = self.arch.experts_of(layer)
        if experts is None:
            return self.arch.ffn
        return experts.top_k * experts.ffn + (experts.shared_ffn or 0)

    @cached_property
    def other_weights(self) -> int:
        """Weights of one rank without a mask: embedding, head, norms, biases, dense linears."""
        padded = rules(self.arch, self.vocab_rows * self.tp)
        return sum(math.prod(rule.shape(self.tp)) for rule in padded) - self.masked_weights

    @cached_property
    def updated_share(self) -> float:
        """The share of the masked weights whose logits the busiest replica updates."""
        return (
            largest_share(self.masked_sizes, self.dp)
            if self.config.learn.optimizer.distributed
            else 1.0
        )

    @cached_property
    def recomputed_share(self) -> float:
        """The share of the masked weights that ``parallel.recompute`` computes with twice."""
        return sum(
            linear.weights for linear in self.linears if linear.is_masked and linear.is_recomputed
        ) / max(self.masked_weights, 1)

    @property
    def state(self) -> dict[str, float]:
        """Bytes per masked weight by part: ``state_bytes`` of this run, the mean where linears have
        several patterns.
        """
        parts = {one: state_bytes(self.state_of(one)) for one in self.masked_by_pattern}

        def mean_of(part: str) -> float:
            return self.mean(lambda one: parts[one][part])

        return {part: mean_of(part) for part in PARTS}

    def state_of(self, pattern: Pattern) -> StateOf:
        """The run with masks of one pattern, as methods count its state."""
        return StateOf(
            pattern,
            self.config.learn,
            self.accumulations,
            self.config.dtype,
            self.recomputed_share,
            self.updated_share,
            self.dp,
        )

    @cached_property
    def mask_uses(self) -> list[int]:
        """How many micro-batches of a replica each of its masks of a step serves."""
        return self.config.learn.sampling.uses(self.accumulations, self.dp)

    @cached_property
    def evaluating(self) -> Workload:
        """The same run with the windows of an evaluation in the place of its micro-batches."""
        section = self.config.evaluate
        settings = {
            "learn.micro_batch": section.micro_batch,
            "data.seq_length": section.window,
            "learn.distillation.share": 0.0,
            "learn.distillation.hidden": 0.0,
        }
        return self.with_settings(settings)

    @property
    def saved_bytes(self) -> float:
        """Bytes that the busiest rank writes into a snapshot."""
        mean = self.mean(lambda one: self.method.saved_bytes(self.state_of(one)))
        return self.masked_weights * mean

    def with_settings(self, settings: Mapping[str, object], dp: int | None = None) -> Workload:
        """The same run with other settings.

        Args:
            settings: dotted key -> value. ``learn.memory`` also sets what its name stands for.
            dp: replicas; None keeps their number.

        Raises:
            ConfigError: a setting that does not exist or takes no such value.
        """
        # Settings that were given stay distinguishable from defaults.
        values = self.config.model_dump(exclude_unset=True)
        memory = MEMORIES[str(settings.get("learn.memory", "default"))].get("learn", {})
        implied = {
            f"learn.{section}.{key}": value
            for section, inner in memory.items()
            for key, value in inner.items()
        }
        for path, value in {**implied, **settings}.items():
            *sections, key = path.split(".")
            place = values
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        return replace(self, config=Config.model_validate(values), dp=self.dp if dp is None else dp)
