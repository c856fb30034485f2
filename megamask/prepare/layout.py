"""The rules that a layout must fulfil, for every verb: each is stated here, or composed here from
the room that owns its numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from megamask.config import Config
from megamask.data.batches import check_batch
from megamask.errors import ConfigError
from megamask.parallel.partition import owners
from megamask.process.place import this_place
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import Architecture
from megamask.weights.mapping import check_tp, rules

PROTOCOL = "evaluate.protocol"


@dataclass(frozen=True)
class Layout:
    """A model split over ``tp`` ranks, in ``dp`` replicas.

    Attributes:
        tp: ranks that share a layer.
        dp: replicas of the model, which see different data.
        sequence_parallel: whether the ranks of a replica also divide the sequence between layers.

    Raises:
        ConfigError: sequence parallelism on one rank.
    """

    tp: int
    dp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError(
                "parallel.sequence_parallel",
                True,
                "needs parallel.tp > 1",
                "Switch it off or raise parallel.tp.",
            )

    @classmethod
    def planned(cls, config: Config, dp: int) -> Layout:
        """The layout of a run that is not launched yet. Raises as the class."""
        return cls(config.parallel.tp, dp, config.parallel.sequence_parallel)

    @classmethod
    def launched(cls, config: Config) -> Layout:
        """The layout of the processes that the launcher started.

        Raises:
            ConfigError: ``parallel.tp`` does not divide their number, or as the class.
        """
        tp, world = config.parallel.tp, this_place().world
        if world % tp:
            raise ConfigError(
                "parallel.tp",
                tp,
                f"must divide the number of processes, here {world}",
                f"Start {tp} processes (torchrun --nproc-per-node {tp}) or a multiple, or set "
                f"parallel.tp to a divisor of {world}.",
            )
        return cls.planned(config, world // tp)

    def check_model(self, arch: Architecture) -> None:
        """Check that the heads and the feed-forward part split over ``tp``.

        Raises:
            ConfigError: naming the values of ``parallel.tp`` that work.
        """
        check_tp(arch, self.tp)

    def check_rows(self, arch: Architecture, plan: Mapping[str, Pattern]) -> None:
        """Check that M divides every row, as it lies on a rank, of the linears that are pruned.

        Args:
            arch: the model.
            plan: HF name -> N:M of the linears to prune; linears that stay dense may have any rows.

        Raises:
            ConfigError: naming the first linear whose rows do not split into groups.
        """
        for rule in rules(arch):
            pruned = [name for name in rule.modules if name in plan]
            if rule.is_linear and pruned:
                split, first = self.tp if rule.kind == "row" else 1, pruned[0]
                plan[first].groups(rule.shape(self.tp)[-1], f"in_features of {first}", split)

    def check_lengths(self, config: Config, keys: Collection[str]) -> None:
        """Check that the ranks can divide every sequence that the verb runs.

        Args:
            config: the settings.
            keys: dotted settings with the lengths, ``data.seq_length`` for example.

        Raises:
            ConfigError: under sequence parallelism, a length that ``tp`` does not divide.
        """
        for key in keys if self.sequence_parallel else ():
            length = length_of(config, key)
            if length % self.tp:
                raise _bad_length(
                    config,
                    key,
                    f"a multiple of parallel.tp={self.tp} under sequence parallel",
                    "Change it, or switch sequence parallel off.",
                )

    def check_batch(self, config: Config) -> None:
        """Check that the global batch deals out to replicas and micro-batches.

        Raises:
            ConfigError: naming the nearest global batches that do.
        """
        check_batch(config.learn.global_batch, config.learn.micro_batch, self.dp)

    def check_owners(self, config: Config, arch: Architecture, modules: Collection[str]) -> None:
        """Check that every replica of a distributed optimizer gets a layer to update.

        Raises:
            ConfigError: more replicas than linears that are pruned.
        """
        if config.learn.optimizer.distributed:
            chosen = set(modules)
            linears = [
                rule for rule in rules(arch) if rule.is_linear and chosen.intersection(rule.modules)
            ]
            owners([1] * len(linears), self.dp)  # the sizes decide who owns, not whether

    def check_samples(self, config: Config) -> None:
        """Check what a learning run asks of its samples: the batch, and the lengths of the
        sequences that it learns on (``data.seq_length``) and evaluates (``evaluate.window``).

        Raises:
            ConfigError: see ``check_batch`` and ``check_lengths``.
        """
        self.check_batch(config)
        self.check_lengths(config, ("data.seq_length", "evaluate.window"))

    def check_linears(
        self, config: Config, arch: Architecture, plan: Mapping[str, Pattern]
    ) -> None:
        """Check what a learning run asks of the model: heads, rows and owners.

        Raises:
            ConfigError: see ``check_model``, ``check_rows`` and ``check_owners``.
        """
        self.check_model(arch)
        self.check_rows(arch, plan)
        self.check_owners(config, arch, plan)


def check_positions(config: Config, arch: Architecture, keys: Collection[str]) -> None:
    """Check that no sequence is longer than the model's positions.

    Args:
        config: the settings.
        arch: the model.
        keys: dotted settings with the lengths, ``data.seq_length`` for example.

    Raises:
        ConfigError: a length above ``max_position_embeddings`` of the model.
    """
    for key in keys:
        length = length_of(config, key)
        if length > arch.max_positions:
            allowed = f"at most {arch.max_positions:,}, the positions of the model"
            raise _bad_length(config, key, allowed, "Lower it.")


def evaluated_length(config: Config) -> str:
    """The setting that decides how long the windows of the verb evaluate are."""
    return PROTOCOL if config.evaluate.is_published else "evaluate.window"


def length_of(config: Config, key: str) -> int:
    """The length of a sequence that a dotted setting says: its value, or the window of the
    protocol that it names.
    """
    if key == PROTOCOL:
        return config.evaluate.protocol_window
    section, name = key.split(".")
    length: int = getattr(getattr(config, section), name)
    return length


def _bad_length(config: Config, key: str, allowed: str, fix: str) -> ConfigError:
    length = length_of(config, key)
    if key != PROTOCOL:
        return ConfigError(key, length, allowed, fix)
    allowed = f"its windows have {length:,} tokens, not {allowed}"
    return ConfigError(key, config.evaluate.protocol, allowed, "Choose another protocol.")
