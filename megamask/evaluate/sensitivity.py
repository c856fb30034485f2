"""What the pruning of one part of the model costs, all other parts dense (MaskLLM, Figure 7)."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megamask.config import Config
from megamask.config.paths import DENSE
from megamask.data.windows import Windows
from megamask.errors import ArtifactError
from megamask.evaluate.loaded_model import LoadedModel
from megamask.evaluate.rows import not_finite_outputs
from megamask.masks.file import MaskSet
from megamask.model.mask_shards import fold_masks, linear_rules
from megamask.model.perplexity import summed_loss
from megamask.weights.architecture import Architecture

Losses = dict[str, float]  # domain -> mean loss, nats a token


@dataclass(frozen=True)
class Part:
    """Linears that are pruned together.

    Attributes:
        name: a pattern of ``model.exclude`` that matches these linears.
        linears: their Megatron names.
    """

    name: str
    linears: tuple[str, ...]


def parts_of(arch: Architecture, modules: Collection[str], by: str) -> list[Part]:
    """The decoder layers, or the linears, that have a mask, in model order.

    Args:
        arch: the architecture.
        modules: HF names of the linears with a mask.
        by: ``layer`` or ``linear``.
    """
    grouped: dict[str, list[str]] = {}
    for name, rule in linear_rules(arch).items():
        if any(module in modules for module in rule.modules):
            key = name if by == "linear" else ".".join(name.split(".")[:3])
            grouped.setdefault(key, []).append(name)
    table = linear_rules(arch)
    return [
        Part(_pattern([module for name in names for module in table[name].modules]), tuple(names))
        for names in grouped.values()
    ]


def _pattern(modules: Sequence[str]) -> str:
    """The pattern of these modules: the only one, or all below their common name. Linears that are
    fused are told by the letter in which their names differ, or by their first letters and the end
    that they share.
    """
    if len(modules) == 1:
        return modules[0]
    stem = os.path.commonprefix(modules).rpartition(".")[0]
    leaves = [module[len(stem) + 1 :] for module in modules]
    if any("." in leaf for leaf in leaves):
        return f"{stem}.*"
    different = [at for at, letters in enumerate(zip(*leaves, strict=False)) if len({*letters}) > 1]
    if len({len(leaf) for leaf in leaves}) == len(different) == 1:  # w1, w3
        first, (at,) = leaves[0], different
        return f"{stem}.{first[:at]}[{_letters(leaves, at)}]{first[at + 1 :]}"
    return f"{stem}.[{_letters(leaves, 0)}]{_shared_end(leaves)}"  # gate_proj, up_proj


def _letters(leaves: Sequence[str], at: int) -> str:
    return "".join(sorted({leaf[at] for leaf in leaves}))


def _shared_end(leaves: Sequence[str]) -> str:
    """``*`` and the end that the names have in common, such as ``*_proj``."""
    return "*" + os.path.commonprefix([leaf[::-1] for leaf in leaves])[::-1]


class PartLosses:
    """The losses of a model of which one part is pruned.

    Args:
        config: the settings.
        loaded: the model.
        masks: the masks of its linears.
        windows: domain -> the windows that are measured.
    """

    def __init__(
        self, config: Config, loaded: LoadedModel, masks: MaskSet, windows: Mapping[str, Windows]
    ) -> None:
        self.config, self.loaded, self.masks, self.windows = config, loaded, masks, windows
        self.weights = loaded.use(None)

    def dense(self) -> Losses:
        """The losses of the dense model."""
        return self._losses(DENSE)

    def pruned(self, parts: Collection[Part], row: str) -> Losses:
        """The losses with the masks of ``parts`` alone; ``row`` names them in messages. At the end
        the model is dense again.
        """
        own = {name: self.loaded.linears[name] for part in parts for name in part.linears}
        fold_masks(own, self.masks, self.loaded.arch, self.loaded.mesh)
        try:
            return self._losses(row)
        finally:
            fold_masks(own, None, self.loaded.arch, self.loaded.mesh)

    def _losses(self, row: str) -> Losses:
        """Raises ArtifactError where outputs are not finite."""
        found, micro_batch = {}, self.config.evaluate.micro_batch
        for domain, windows in self.windows.items():
            total = summed_loss(self.loaded.model, self.loaded.mesh, windows, micro_batch)
            found[domain] = total / windows.targets
            if not total < float("inf"):
                raise not_finite_outputs(self.weights, domain, row)
        return found


def increases(dense: Losses, rows: Mapping[str, Losses]) -> dict[str, Losses]:
    """Part -> domain -> how much higher its loss is than the dense model's, nats a token."""
    return {
        part: {domain: loss - dense[domain] for domain, loss in losses.items()}
        for part, losses in rows.items()
    }


def ranked(dense: Losses, rows: Mapping[str, Losses]) -> list[str]:
    """The parts from the most to the least sensitive: by the mean increase over the domains, and by
    the order of the model among equals.
    """
    mean = {part: fmean(one.values()) for part, one in increases(dense, rows).items()}
    return sorted(rows, key=lambda part: -mean[part])


def kept_dense(dense: Losses, rows: Mapping[str, Losses], share: float) -> list[str]:
    """The most sensitive parts, ``share`` of all, rounded, in the order of the model."""
    chosen = set(ranked(dense, rows)[: round(share * len(rows))])
    return [part for part in rows if part in chosen]


def whole_masks(masks: MaskSet, what: str) -> MaskSet:
    """The masks, which belong to the dense weights.

    Raises:
        ArtifactError: they belong to updated weights.
    """
    if masks.has_own_weights:
        problem = "belongs to updated weights: with the dense weights it means nothing"
        raise ArtifactError(masks.path, problem, f"Name another mask: {what}=sparsegpt.")
    return masks
