"""A mixture of experts in the place of a layer's feed-forward part.

Every rank holds a part of every expert, as of any other linear, and the router whole. The layer
takes all tokens of the replica in and hands the sum over the ranks out, once each, so its linears
exchange nothing. The gradients of the inputs, those through the router included, are parts on
every rank, and are summed where the tokens came in.

Megatron's own layer would send tokens between ranks, and refuses tensor parallelism without
sequence parallelism in training. It divides experts among ranks, which is not offered here.

Shapes: S sequence (the slice of a rank under sequence parallel), B batch, H hidden, T tokens, E
experts, K experts of a token.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.model.layer_parts import frozen_parameter
from megamask.weights.family import Experts


class MixtureOfExperts(MegatronModule):
    """Router, experts, and the expert of every token if there is one.

    Every expert computes in every forward pass, with no tokens too, so that each mask is drawn and
    each of its gradients is made.

    Args:
        config: Megatron's settings of the model.
        experts: numbers and widths.
        parts: linears and activation of a feed-forward part.
    """

    def __init__(
        self, config: TransformerConfig, *, experts: Experts, parts: MLPSubmodules, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.facts = experts
        self.router = FrozenLinear(config, experts.count)
        self.experts = ExpertList(config, experts, parts)
        self.shared_expert, self.shared_gate = None, None
        if experts.shared_ffn is not None:
            self.shared_expert = _expert(config, experts.shared_ffn, parts)
            self.shared_gate = FrozenLinear(config, 1)

    def forward(
        self, hidden_SBH: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(S, B, H) -> (S, B, H), and no bias for the residual sum."""
        split = self.config.sequence_parallel
        if split:
            all_SBH = gather_from_sequence_parallel_region(hidden_SBH)
        else:
            all_SBH = copy_to_tensor_model_parallel_region(hidden_SBH)
        out_SBH = self._routed(all_SBH.flatten(0, 1)).view_as(all_SBH)
        if self.shared_expert is not None and self.shared_gate is not None:
            out_SBH = out_SBH + self.shared_expert(all_SBH)[0] * self.shared_gate(all_SBH).sigmoid()
        if split:
            return reduce_scatter_to_sequence_parallel_region(out_SBH), None
        return reduce_from_tensor_model_parallel_region(out_SBH), None

    def _routed(self, x_TH: torch.Tensor) -> torch.Tensor:
        """The sum of the experts' outputs of each token, times their factors, as far as this rank
        computes it.
        """
        factors_TK, chosen_TK = self.choose(x_TH)
        order = chosen_TK.flatten().argsort(stable=True)  # by expert, then by token
        counts = torch.bincount(chosen_TK.flatten(), minlength=self.facts.count).tolist()
        inputs = x_TH[order // self.facts.top_k].split(counts)
        outputs = [expert(one)[0] for expert, one in zip(self.experts, inputs, strict=True)]
        by_token = torch.cat(outputs)[order.argsort()].view(*chosen_TK.shape, -1)
        return (by_token * factors_TK[..., None]).sum(1)

    def choose(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors, in the dtype of the tokens, and numbers of the experts of each token, (T, K)."""
        probabilities_TE = self.router(x_TH).softmax(-1, dtype=torch.float32)
        factors_TK, chosen_TK = probabilities_TE.topk(self.facts.top_k)
        if self.facts.renormalise:
            factors_TK = factors_TK / factors_TK.sum(-1, keepdim=True)
        return factors_TK.to(x_TH.dtype), chosen_TK


class ExpertList(MegatronModule):
    """The experts by number; the names of their tensors in a checkpoint are those in the model."""

    def __init__(self, config: TransformerConfig, experts: Experts, parts: MLPSubmodules) -> None:
        super().__init__(config=config)
        for number in range(experts.count):
            self.add_module(str(number), _expert(config, experts.ffn, parts))

    def __iter__(self) -> Any:
        return self.children()


class FrozenLinear(MegatronModule):
    """x W^T with a frozen W, (rows, H), that every rank holds whole."""

    def __init__(self, config: TransformerConfig, rows: int) -> None:
        super().__init__(config=config)
        self.weight = frozen_parameter(config, torch.zeros(rows, config.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., rows)."""
        return F.linear(x, self.weight)


def _expert(config: TransformerConfig, ffn: int, parts: MLPSubmodules) -> MLP:
    """A feed-forward part of the width ``ffn`` whose linears exchange nothing."""
    own = copy.copy(config)
    own.ffn_hidden_size = ffn
    expert = MLP(own, parts, ffn_hidden_size=ffn)
    for linear in (expert.linear_fc1, expert.linear_fc2):
        linear.exchange_nothing()
    return expert
