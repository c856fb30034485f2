"""Orders of a model's channels in which N:M masks lose less, from statistics of the dense model.

The importance of a weight is its square times the mean square of its input: the expected squared
error of the output when this weight alone is removed, and the square of Wanda's score.

Shapes: N samples, S sequence, O out_features, I in_features, R rows, C channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from megamask.model.language_model import LanguageModel
from megamask.oneshot.calibrate import HiddenStates, input_stats
from megamask.oneshot.layerwise import naming
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.regroup import lost, regrouped
from megamask.weights.architecture import Architecture
from megamask.weights.channel_orders import ChannelOrders
from megamask.weights.mapping import rules
from megamask.weights.rule import Rule
from megamask.weights.source import WeightSource

# A search looks at so many rows at most, evenly spaced; its time is linear in them. The rows of the
# residual stream come from all layers.
ROWS, STREAM_ROWS = 2_048, 16_384
OUT = "self_attention.linear_proj"


@dataclass
class Found:
    """Orders, and the importance that the best mask removes in the present order and in the new.

    Attributes:
        orders: the orders.
        shares: kind of channels -> (share removed in the present order, share in the new order)
            of each search.
    """

    orders: ChannelOrders
    shares: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def summary(self) -> dict[str, tuple[float, float]]:
        """Kind of channels -> mean shares over the searches."""
        return {
            kind: (
                sum(before for before, _ in pairs) / len(pairs),
                sum(after for _, after in pairs) / len(pairs),
            )
            for kind, pairs in self.shares.items()
        }


@dataclass(frozen=True)
class InputMoments:
    """Means over the calibration tokens, fp32 on the CPU, equal on all ranks.

    Attributes:
        mean_square: Megatron name of a linear -> the mean square of its input, (I,).
        within_head: name of an output projection -> the mean of x x^T within each query head,
            (heads, head_dim, head_dim); empty where it was not asked for.
    """

    mean_square: dict[str, torch.Tensor] = field(default_factory=dict)
    within_head: dict[str, torch.Tensor] = field(default_factory=dict)


@torch.no_grad()
def input_moments(
    model: LanguageModel,
    linears: Mapping[str, MaskedLinear],
    tokens_NS: torch.Tensor,
    micro_batch: int,
    mesh: Mesh,
    sequence_parallel: bool,
    head_dim: int | None = None,
) -> InputMoments:
    """Moments of the inputs of the dense model's linears, in one pass over the samples.

    Args:
        head_dim: also measure the moments within heads of so many channels.

    Raises:
        ConfigError: the inputs of a linear are not finite.
    """
    states = HiddenStates(model, tokens_NS, micro_batch, mesh)
    found = InputMoments()
    for index, layer in enumerate(model.decoder.layers):
        start = f"decoder.layers.{index}."
        own = {name: linear for name, linear in linears.items() if name.startswith(start)}
        heads = {} if head_dim is None else {k: v for k, v in own.items() if k.endswith(OUT)}
        others = {name: linear for name, linear in own.items() if name not in heads}
        with (
            input_stats(others, False, mesh, sequence_parallel) as stats,
            input_stats(heads, True, mesh, sequence_parallel) as head_stats,
        ):
            states.advance(layer)
        for name, sums in {**stats, **head_stats}.items():
            with naming(name):
                found.mean_square[name] = sums.mean_square_I.cpu()
        for name, sums in head_stats.items():
            blocks = sums.hessian_II.unflatten(0, (-1, head_dim)).unflatten(2, (-1, head_dim))
            found.within_head[name] = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).cpu()
    return found


def readers(arch: Architecture, modules: Collection[str]) -> list[Rule]:
    """The linears that hold any of these HF modules."""
    return [rule for rule in rules(arch) if rule.is_linear and set(rule.modules) & set(modules)]


def stream_patterns(arch: Architecture, plan: Mapping[str, Pattern]) -> set[Pattern]:
    """The patterns of the linears of a plan that read the residual stream."""
    stream = (rule for rule in readers(arch, plan) if kind_of(rule) == "hidden")
    return {plan[name] for rule in stream for name in rule.modules if name in plan}


def kind_of(rule: Rule) -> str:
    """The kind of channels that a linear reads: hidden, ffn or value."""
    if rule.kind != "row":
        return "hidden"
    return "ffn" if rule.megatron.endswith("mlp.linear_fc2.weight") else "value"


@torch.no_grad()
def find_orders(
    reader: WeightSource,
    arch: Architecture,
    plan: Mapping[str, Pattern],
    mean_square: Mapping[str, torch.Tensor],
    device: torch.device,
) -> Found:
    """Search an order for every kind of channels whose number M divides.

    Args:
        reader: the dense model.
        arch: its architecture.
        plan: HF name -> pattern of the linears that will be pruned; the others have no importance.
            Those that read the residual stream have one pattern.
        mean_square: of ``input_moments``.
        device: where the searches run.
    """
    hidden, ffn, value = [], {}, {}
    found = Found(ChannelOrders())
    chosen = readers(arch, plan)
    stream = [rule for rule in chosen if kind_of(rule) == "hidden"]
    step = -(-sum(sum(shape[0] for shape in rule.shapes) for rule in stream) // STREAM_ROWS)
    for rule in chosen:
        name = rule.megatron.removesuffix(".weight")
        importance_OI = _importance(reader, rule, mean_square[name]).to(device)
        if kind_of(rule) == "hidden":
            rows_OI = importance_OI[::step]
            hidden.append(rows_OI.clone() if step > 1 else rows_OI)  # a view would keep all rows
            continue
        layer, pattern = int(name.split(".")[2]), plan[rule.modules[0]]
        importance_RC = importance_OI[:: max(-(-len(importance_OI) // ROWS), 1)]
        if kind_of(rule) == "ffn" and arch.ffn % pattern.m == 0:
            ffn[layer] = _search(found, "ffn", importance_RC, pattern)
        elif kind_of(rule) == "value" and arch.head_dim % pattern.m == 0:
            # The query heads of a KV group share an order: their rows stand below each other.
            of_heads = importance_RC.unflatten(1, (arch.kv_heads, -1, arch.head_dim))
            value[layer] = torch.stack(
                [
                    _search(found, "value", of_group.flatten(0, 1), pattern)
                    for of_group in of_heads.unbind(1)
                ]
            )
    order = None
    for common in stream_patterns(arch, plan):  # at most one
        if arch.hidden % common.m == 0:
            order = _search(found, "hidden", torch.cat(hidden), common)
    found.orders = ChannelOrders(order, ffn, value)
    return found


def _search(found: Found, kind: str, importance_RC: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    order_C = regrouped(importance_RC, pattern)
    total = max(float(importance_RC.sum(dtype=torch.float64)), torch.finfo(torch.float32).tiny)
    shares = [lost(one, pattern) / total for one in (importance_RC, importance_RC[:, order_C])]
    found.shares.setdefault(kind, []).append((shares[0], shares[1]))
    return order_C


def _importance(reader: WeightSource, rule: Rule, mean_square_I: torch.Tensor) -> torch.Tensor:
    """The importance of every weight of a linear, (O, I) fp32; parts that are fused stand one after
    another.
    """
    weight_OI = torch.cat([reader.tensor(name).float() for name in rule.hf])
    return weight_OI.square() * mean_square_I
