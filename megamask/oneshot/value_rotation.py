"""Rotations of the value channels of each KV head after which N:M masks lose less.

A rotation R of a KV head turns its values v into R^T v and the columns W of its query heads in the
output projection into W R. The function stays, and R folds into both weights. DenoiseRotator (Gu et
al., NeurIPS 2025) learns rotations that lower the entropy of the weights' importance, for masks of
any kind; here the importance that the best N:M mask removes is lowered itself.

Shapes: K KV heads, Q query heads of a KV head, D channels of a head, R rows, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megamask.oneshot.channel_search import ROWS, Found, InputMoments, kind_of, readers
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.architecture import Architecture
from megamask.weights.mapping import rules
from megamask.weights.rule import block
from megamask.weights.source import WeightSource

STEPS, RATE, WARMUP = 80, 1e-2, 5  # of Adam, at the entries of a skew-symmetric matrix
BETAS = (0.9, 0.98)


def rotation_of(entries_KDD: Tensor) -> Tensor:
    """The rotation (I - A)^-1 (I + A) of the skew-symmetric part A: Cayley's transform."""
    skew_KDD = (entries_KDD - entries_KDD.mT) / 2
    one_DD = torch.eye(skew_KDD.shape[-1], dtype=skew_KDD.dtype, device=skew_KDD.device)
    rotation_KDD: Tensor = torch.linalg.solve(one_DD - skew_KDD, one_DD + skew_KDD)
    return rotation_KDD


def find_rotations(
    reader: WeightSource,
    arch: Architecture,
    plan: PatternPlan,
    moments: InputMoments,
    found: Found,
    device: torch.device,
) -> None:
    """Add to ``found.orders`` a rotation for the values of every layer whose output projection will
    be pruned, in the order of channels that is there. A layer where none is better gets none.

    Args:
        reader: the dense model.
        arch: its architecture.
        plan: the linears that will be pruned, all with one pattern.
        moments: of ``input_moments``, with those within heads.
        found: the orders.
        device: where the rotations are learned.
    """
    by_name, pattern = {rule.megatron: rule for rule in rules(arch)}, plan.only
    assert pattern is not None  # the verb refuses several
    for rule in readers(arch, plan):
        if kind_of(rule) != "value" or arch.head_dim % pattern.m:
            continue
        place = rule.megatron.removesuffix("linear_proj.weight")
        layer, values = int(place.split(".")[2]), by_name[f"{place}linear_qkv.weight"]
        order_KD = found.orders.value[layer].to(device)
        out_OI = reader.tensor(rule.hf[0]).float().to(device)
        out_KQRD = out_OI.unflatten(1, (arch.kv_heads, -1, arch.head_dim)).permute(1, 2, 0, 3)
        out_KQRD = out_KQRD[:, :, :: max(-(-len(out_OI) // ROWS), 1)]
        index_KQRD = order_KD[:, None, None].expand(out_KQRD.shape)
        moment_KQDD = moments.within_head[place + "linear_proj"].to(device)
        moment_KQDD = moment_KQDD.unflatten(0, (arch.kv_heads, -1))
        index_KQDD = order_KD[:, None, None].expand(moment_KQDD.shape)
        moment_KQDD = moment_KQDD.gather(3, index_KQDD).gather(2, index_KQDD.mT)
        value_KDI = square_I = None
        if set(values.modules) & set(plan) and arch.hidden % pattern.m == 0:
            fused = values.shard(lambda name, r, c: block(reader.tensor(name), r, c), 0, 1)
            value_KDI = fused.unflatten(0, (arch.kv_heads, -1))[:, -arch.head_dim :].float()
            square_I = moments.mean_square[place + "linear_qkv"]
            if found.orders.hidden is not None:
                value_KDI = value_KDI[..., found.orders.hidden]
                square_I = square_I[found.orders.hidden]
            value_KDI, square_I = value_KDI.to(device), square_I.to(device)
            value_KDI = value_KDI.gather(1, order_KD[..., None].expand(value_KDI.shape))
        loss = _loss(out_KQRD.gather(3, index_KQRD), moment_KQDD, value_KDI, square_I, pattern)
        rotation_KDD = _learned(loss, order_KD.shape[0], arch.head_dim, device)
        stay = torch.eye(arch.head_dim, device=device).expand_as(rotation_KDD)
        before, after = loss(stay), loss(rotation_KDD)
        if float(sum(after)) < float(sum(before)):
            found.orders.rotation[layer] = rotation_KDD.double().cpu()
        else:
            after = before
        found.shares.setdefault("rotated", []).append((float(before[0]), float(after[0])))


Shares = tuple[Tensor, Tensor]


def _loss(
    out_KQRD: Tensor,
    moment_KQDD: Tensor,
    value_KDI: Tensor | None,
    square_I: Tensor | None,
    pattern: Pattern,
) -> Callable[[Tensor], Shares]:
    """The importance that the best mask removes from a layer's output projection and from its
    values, as a function of the rotations; both as shares of the importance before any.
    """
    diagonal_KQ1D = moment_KQDD.diagonal(dim1=-2, dim2=-1)[:, :, None]
    tiny = torch.finfo(torch.float32).tiny
    out_total = (out_KQRD.square() * diagonal_KQ1D).sum().clamp_min(tiny)

    def shares(rotation_KDD: Tensor) -> Shares:
        rotation_K1DD = rotation_KDD[:, None]
        square_KQD = ((moment_KQDD @ rotation_K1DD) * rotation_K1DD).sum(-2)
        out = (out_KQRD @ rotation_K1DD).square() * square_KQD[:, :, None]
        removed = _removed(out, pattern) / out_total
        if value_KDI is None or square_I is None:
            return removed, torch.zeros_like(removed)
        value_total = (value_KDI.square() * square_I).sum().clamp_min(tiny)
        turned = (rotation_KDD.mT @ value_KDI).square() * square_I
        return removed, _removed(turned, pattern) / value_total

    return shares


def _removed(importance: Tensor, pattern: Pattern) -> Tensor:
    groups = importance.unflatten(-1, (-1, pattern.m))
    return groups.topk(pattern.m - pattern.n, dim=-1, largest=False).values.sum()


def _learned(
    loss: Callable[[Tensor], Shares], heads: int, channels: int, device: torch.device
) -> Tensor:
    """The rotations that Adam reaches from none; fp32 (K, D, D)."""
    entries_KDD = torch.zeros(heads, channels, channels, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([entries_KDD], lr=RATE, betas=BETAS)
    with torch.enable_grad():
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 - step / STEPS)
            optimizer.zero_grad()
            out, value = loss(rotation_of(entries_KDD))
            (out + value).backward()
            optimizer.step()
    return rotation_of(entries_KDD.detach().double()).float()
