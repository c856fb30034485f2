"""A model with its channels in another order: the same function, other groups.

Three kinds of channels may be permuted, because everything that reads and writes them can be
permuted with them:

- the channels of the residual stream, with one order for the whole model: columns of embeddings,
  head and of the linears that read the stream, rows of the linears that write it, and its norms;
- the intermediate channels of a feed-forward part: columns of the second linear, and rows of the
  first, in every part of a gated linear;
- the value channels of a KV head: columns of the output projection in every query head that reads
  the KV head, and rows of the values.

Each weight keeps its bits. What changes is the order of additions, so outputs agree to rounding.
The value channels of a KV head may be rotated too, with its rows of the values and the columns that
read them; these weights are rounded anew.
The rows of queries and keys stay: they are columns of no linear, and the rotary embedding pairs
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor

from megamask.weights.family import Architecture
from megamask.weights.file_stream import Streamed
from megamask.weights.mapping import rules
from megamask.weights.rule import Rule, block
from megamask.weights.source import WeightSource


@dataclass(frozen=True)
class ChannelOrders:
    """Orders of channels: the old channel at each new place, int64. An order that is missing
    leaves its channels where they are.

    Attributes:
        hidden: of the residual stream, (hidden,).
        ffn: layer -> of its intermediate channels, (ffn,).
        value: layer -> of the value channels of each KV head, (kv_heads, head_dim).
        rotation: layer -> orthogonal matrix R of each KV head, (kv_heads, head_dim, head_dim) fp64:
            the channels v in their new order become R^T v.
    """

    hidden: Tensor | None = None
    ffn: Mapping[int, Tensor] = field(default_factory=dict)
    value: Mapping[int, Tensor] = field(default_factory=dict)
    rotation: dict[int, Tensor] = field(default_factory=dict)


Order = Callable[[Architecture, ChannelOrders, int], Tensor | None]


def reordered(
    reader: WeightSource, arch: Architecture, orders: ChannelOrders
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model as (HF name, tensor) in the new order, tensor by tensor.

    Args:
        reader: the model's files.
        arch: its architecture.
        orders: the orders.
    """
    for rule in rules(arch):
        yield from _of_rule(reader, arch, orders, rule).items()


def reordered_streamed(
    reader: WeightSource, arch: Architecture, orders: ChannelOrders
) -> Iterator[tuple[str, Streamed]]:
    """As ``reordered``, of tensors that are made when they are written: those of two rules at most
    are in memory.
    """

    @lru_cache(maxsize=2)  # by name, q, k and v of a layer stand before and behind its o
    def made(rule: Rule) -> dict[str, Tensor]:
        return _of_rule(reader, arch, orders, rule)

    def blocks(rule: Rule, name: str) -> tuple[Tensor]:
        return (made(rule)[name],)

    for rule in rules(arch):
        for name, shape in zip(rule.hf, rule.shapes, strict=True):
            dtype = reader.read(name, slice(0, 0)).dtype
            yield name, Streamed(shape, dtype, partial(blocks, rule, name))


def _of_rule(
    reader: WeightSource, arch: Architecture, orders: ChannelOrders, rule: Rule
) -> dict[str, Tensor]:
    """The HF tensors of a Megatron tensor in the new order."""
    rows, columns = _orders_of(rule, arch, orders)
    tensors = {}
    for name, rows_O in _hf_rows(rule, rows).items():
        tensor = reader.tensor(name)
        tensor = tensor if rows_O is None else tensor[rows_O]
        tensors[name] = tensor if columns is None else tensor[:, columns]
    return _rotated(rule, tensors, orders)


def _rotated(rule: Rule, tensors: dict[str, Tensor], orders: ChannelOrders) -> dict[str, Tensor]:
    """The HF tensors of a rule with the value channels of each KV head rotated, in fp64."""
    place, _, leaf = rule.megatron.rpartition(".")
    module = place.rpartition(".")[2]
    if not place.startswith("decoder.layers.") or module not in ("linear_qkv", "linear_proj"):
        return tensors
    rotation_KDD = orders.rotation.get(int(place.split(".")[2]))
    if rotation_KDD is None or (module == "linear_proj" and leaf == "bias"):
        return tensors
    heads, channels = rotation_KDD.shape[:2]
    full = rule.shard(lambda name, rows, cols: block(tensors[name], rows, cols), 0, 1).clone()
    if module == "linear_proj":
        columns = full.unflatten(1, (heads, -1, channels)).double()
        full = torch.einsum("okqd,kde->okqe", columns, rotation_KDD).flatten(1).to(full.dtype)
    else:
        values = full.unflatten(0, (heads, -1))[:, -channels:]
        values.copy_(torch.einsum("kde,kd...->ke...", rotation_KDD, values.double()))
    return rule.to_hf(full)


def _orders_of(
    rule: Rule, arch: Architecture, orders: ChannelOrders
) -> tuple[Tensor | None, Tensor | None]:
    """The order of rows and of columns of a Megatron tensor."""
    place, _, leaf = rule.megatron.rpartition(".")
    layer = -1
    if place.startswith("decoder.layers."):
        _, _, number, place = place.split(".", 3)
        layer = int(number)
    rows, columns = CHANNELS[place]
    return rows(arch, orders, layer), columns(arch, orders, layer) if leaf == "weight" else None


def _hf_rows(rule: Rule, rows: Tensor | None) -> dict[str, Tensor | None]:
    """The order of rows of each HF tensor, from the order of rows of the Megatron tensor that they
    are fused into. No row moves to another HF tensor.
    """
    if rows is None or rule.kind in ("replicate", "row"):
        return dict.fromkeys(rule.hf, rows)
    first, numbered = 0, {}
    for name, shape in zip(rule.hf, rule.shapes, strict=True):
        numbered[name] = torch.arange(first, first + shape[0])
        first += shape[0]
    fused = rule.shard(lambda name, some, cols: block(numbered[name], some, cols), 0, 1)
    return {name: one - numbered[name][0] for name, one in rule.to_hf(fused[rows]).items()}


def _none(arch: Architecture, orders: ChannelOrders, layer: int) -> None:
    return None


def _hidden(arch: Architecture, orders: ChannelOrders, layer: int) -> Tensor | None:
    return orders.hidden


def _ffn(arch: Architecture, orders: ChannelOrders, layer: int) -> Tensor | None:
    return orders.ffn.get(layer)


def _ffn_parts(arch: Architecture, orders: ChannelOrders, layer: int) -> Tensor | None:
    """[gate; up], or the only part."""
    order = orders.ffn.get(layer)
    if order is None or not arch.gated:
        return order
    return torch.cat([order, arch.ffn + order])


def _value_rows(arch: Architecture, orders: ChannelOrders, layer: int) -> Tensor | None:
    """The values are the last head_dim rows of each KV group."""
    order = orders.value.get(layer)
    if order is None:
        return None
    width = (arch.heads // arch.kv_heads + 2) * arch.head_dim
    rows = torch.arange(arch.kv_heads * width).view(arch.kv_heads, width)
    rows[:, -arch.head_dim :] = rows[:, -arch.head_dim :].gather(1, order)
    return rows.flatten()


def _value_columns(arch: Architecture, orders: ChannelOrders, layer: int) -> Tensor | None:
    """Query heads of a KV group follow each other and share its values."""
    order = orders.value.get(layer)
    if order is None:
        return None
    of_head = order.repeat_interleave(arch.heads // arch.kv_heads, dim=0)
    return (torch.arange(arch.heads)[:, None] * arch.head_dim + of_head).flatten()


# Megatron module -> the order of its rows and of its columns. A module that is not listed here is
# an error, because nobody has thought about its channels.
CHANNELS: dict[str, tuple[Order, Order]] = {
    "embedding.word_embeddings": (_none, _hidden),
    "embedding.position_embeddings": (_none, _hidden),
    "input_layernorm": (_hidden, _none),
    "self_attention.linear_qkv": (_value_rows, _hidden),
    "self_attention.q_layernorm": (_none, _none),
    "self_attention.k_layernorm": (_none, _none),
    "self_attention.linear_proj": (_hidden, _value_columns),
    "self_attn_bda.norm": (_hidden, _none),
    "pre_mlp_layernorm": (_hidden, _none),
    "mlp.linear_fc1": (_ffn_parts, _hidden),
    "mlp.linear_fc2": (_hidden, _ffn),
    "mlp_bda.norm": (_hidden, _none),
    "decoder.final_layernorm": (_hidden, _none),
    "output_layer": (_none, _hidden),
}
