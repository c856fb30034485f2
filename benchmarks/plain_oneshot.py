"""One-shot pruning of a transformers Llama as a plain loop over its decoder layers.

Written from the formulas of Wanda (Sun et al., 2023, Eq. 1) and SparseGPT (Frantar & Alistarh,
2023, Algorithm 1): hooks in front of every linear of a layer sum up its inputs over all samples,
the linears are pruned, and the samples run again through the pruned layer, which makes the inputs
of the next layer.

Shapes: N samples, S sequence, B micro-batch, H hidden, T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from megamask.sparsity.pattern import Pattern

BLOCK, DAMP = 128, 0.01  # of SparseGPT


@torch.no_grad()
def prune_model(
    model: LlamaForCausalLM, tokens_NS: Tensor, method: str, pattern: Pattern, micro_batch: int
) -> dict[str, Tensor]:
    """Prune every linear of every decoder layer in place; returns the masks, (O, I) bool, by HF
    name.

    Args:
        model: a model whose head and embedding stay dense.
        tokens_NS: the calibration samples.
        method: magnitude, wanda, sparsegpt (the weights that stay do not change) or
            sparsegpt_update.
        pattern: N:M of single weights.
        micro_batch: samples of a forward pass.
    """
    masks: dict[str, Tensor] = {}
    layers: Any = model.model.layers
    if method == "magnitude":
        for name, linear in linears_of(layers, "model.layers").items():
            masks[name] = best(linear.weight.abs(), pattern)
            linear.weight.mul_(masks[name])
        return masks
    states, others = first_inputs(model, tokens_NS, micro_batch)
    for number, layer in enumerate(layers):
        linears = linears_of(layer, f"model.layers.{number}")
        sums = {name: InputSums(one, method != "wanda") for name, one in linears.items()}
        handles = [linears[name].register_forward_hook(one.add) for name, one in sums.items()]
        for hidden_BSH in states:
            layer(hidden_BSH, **others)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            if method == "wanda":
                score_OI = linear.weight.float().abs() * sums[name].sums.sqrt()
                masks[name] = best(score_OI, pattern)
                linear.weight.mul_(masks[name])
            else:
                hessian_II = sums.pop(name).hessian()
                masks[name], updated_OI = sparsegpt(linear.weight, hessian_II, pattern)
                if method == "sparsegpt_update":
                    linear.weight.copy_(updated_OI)
                else:
                    linear.weight.mul_(masks[name])
        for index, hidden_BSH in enumerate(states):
            states[index] = layer(hidden_BSH, **others)
    return masks


def linears_of(module: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """HF name -> linear."""
    found = module.named_modules(prefix=prefix)
    return {name: one for name, one in found if isinstance(one, nn.Linear)}


class _Caught(Exception):  # noqa: N818 - ends a forward pass, and is no error
    """The first layer has its input."""


def first_inputs(
    model: LlamaForCausalLM, tokens_NS: Tensor, micro_batch: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """The inputs of the first decoder layer, (B, S, H) each, and the other arguments of a layer."""
    states: list[Tensor] = []
    others: dict[str, Any] = {}

    def catch(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        states.append(inputs[0])
        others.update(named)
        raise _Caught

    layers: Any = model.model.layers
    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for tokens_BS in tokens_NS.split(micro_batch):
        with suppress(_Caught):
            model.model(tokens_BS, use_cache=False)
    handle.remove()
    return states, others


class InputSums:
    """Sums over the inputs of a linear, fp32: X X^T, or its diagonal alone."""

    def __init__(self, linear: nn.Linear, hessian: bool) -> None:
        shape = [linear.in_features] * (2 if hessian else 1)
        self.sums = torch.zeros(shape, device=linear.weight.device)
        self.tokens = 0

    def add(self, _: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        """A hook that adds the inputs of a forward pass."""
        x_TI = inputs[0].flatten(0, -2).float()
        self.tokens += len(x_TI)
        if self.sums.dim() == 2:
            self.sums.addmm_(x_TI.t(), x_TI)
        else:
            self.sums += x_TI.square().sum(0)

    def hessian(self) -> Tensor:
        """2 X X^T / T."""
        return self.sums.mul_(2 / self.tokens)


def best(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Bool mask of the n largest scores of every group; which of equal scores is left open."""
    groups = score_OI.unflatten(-1, (-1, pattern.m))
    kept = groups.topk(pattern.n, dim=-1, sorted=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)


def sparsegpt(weight_OI: Tensor, hessian_II: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The mask and the updated weight, fp32, both (O, I)."""
    work_OI, diagonal_I = weight_OI.float(), hessian_II.diagonal()
    dead_I = diagonal_I == 0
    diagonal_I[dead_I] = 1
    work_OI = work_OI.masked_fill(dead_I, 0)
    diagonal_I += DAMP * diagonal_I.mean()
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    factor_II = torch.linalg.cholesky(inverse_II, upper=True)
    mask_OI = torch.zeros_like(work_OI, dtype=torch.bool)
    for start in range(0, work_OI.shape[1], BLOCK):
        here, rest = slice(start, start + BLOCK), slice(start + BLOCK, None)
        block, keep, factor = work_OI[:, here].clone(), mask_OI[:, here], factor_II[here, here]
        errors = torch.zeros_like(block)
        for column in range(block.shape[1]):
            if column % pattern.m == 0:
                group = slice(column, column + pattern.m)
                score = block[:, group].square() / factor.diagonal()[group].square()
                keep[:, group] = best(score, pattern)
            removed = block[:, column].masked_fill(keep[:, column], 0)
            errors[:, column] = removed / factor[column, column]
            block[:, column:].addr_(errors[:, column], factor[column, column:], alpha=-1)
        work_OI[:, here] = block
        work_OI[:, rest].addmm_(errors, factor_II[here, rest], alpha=-1)
    return mask_OI, work_OI.mul_(mask_OI)
