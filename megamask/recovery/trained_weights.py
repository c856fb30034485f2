"""Weights under a mask as functions of what is trained: the kept weights themselves, or a low-rank
change of them. Whatever the parameters are, the weight is +0.0 outside the mask, and a row without
a removed weight is the frozen row: it is of a part of a fused linear that has no mask, and the
recovered model keeps it (``model/updated_weights.py``).

Shapes: O local out_features, I local in_features, R rank of the change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh


class TrainedWeight(ABC):
    """The weight of one linear.

    Attributes:
        parameters: fp32 leaves.
        is_shared: for each parameter, whether all ranks that share the layer hold the whole of it,
            so that their gradients are parts of one sum.
    """

    parameters: list[torch.Tensor]
    is_shared: list[bool]

    def __init__(self, linear: MaskedLinear, mask_OI: torch.Tensor) -> None:
        self.weight_OI = linear.weight.detach()
        self.mask_OI = mask_OI.to(self.weight_OI.device)
        frozen_O1 = self.mask_OI.all(dim=1, keepdim=True)
        self.frozen_O1 = frozen_O1 if bool(frozen_O1.any()) else None

    def under_mask(self, new_OI: torch.Tensor) -> torch.Tensor:
        """``new_OI`` where the mask keeps, +0.0 elsewhere, and the frozen rows."""
        kept_OI = torch.where(self.mask_OI, new_OI, 0)
        if self.frozen_O1 is None:
            return kept_OI
        return torch.where(self.frozen_O1, self.weight_OI.float(), kept_OI)

    @abstractmethod
    def weight(self) -> torch.Tensor:
        """This rank's shard (O, I), fp32, differentiable by the parameters."""

    def reduce_gradients(self, mesh: Mesh) -> torch.Tensor:
        """Make the gradients of the parameters those of the global batch, in place. Returns this
        rank's part of their squared norm, 0-d fp64; the parts of all shards add up to the whole.
        """
        square = torch.zeros((), dtype=torch.float64, device=mesh.device)
        for parameter, is_shared in zip(self.parameters, self.is_shared, strict=True):
            assert parameter.grad is not None
            mesh.mean_over_dp(parameter.grad)
            if is_shared:
                mesh.sum_over_tp(parameter.grad)
            own = parameter.grad.square().sum(dtype=torch.float64)
            square += own / mesh.tp if is_shared else own
        return square


class KeptWeights(TrainedWeight):
    """Every kept weight is trained, and no other: the gradient of a removed weight is zero.

    Args:
        linear: the frozen linear.
        mask_OI: this rank's shard of the mask.
    """

    def __init__(self, linear: MaskedLinear, mask_OI: torch.Tensor) -> None:
        super().__init__(linear, mask_OI)
        self.kept_OI = torch.where(self.mask_OI, self.weight_OI.float(), 0).requires_grad_()
        self.parameters, self.is_shared = [self.kept_OI], [False]

    def weight(self) -> torch.Tensor:
        """The kept weights."""
        return self.under_mask(self.kept_OI)


class LowRank(TrainedWeight):
    """W' = M * (W + s B A) (LoRA, Hu et al., arXiv 2106.09685, under the mask M): B (O, R) starts
    at zero and A (R, I) at random, and the frozen weight W stays. The mask lies around the sum, so
    the merged weight is the weight of training, and keeps every zero. Linears that Megatron fuses
    share A.

    Args:
        linear: the frozen linear.
        mask_OI: this rank's shard of the mask.
        rank: R.
        scale: s.
        seed: of A, the same on all ranks.
    """

    def __init__(
        self, linear: MaskedLinear, mask_OI: torch.Tensor, rank: int, scale: float, seed: int
    ) -> None:
        super().__init__(linear, mask_OI)
        self.scale = scale
        size, place = linear.tp_group.size(), linear.tp_group.rank()
        columns = self.weight_OI.shape[1]
        is_row_parallel = linear.shard_axis == 1
        whole = columns * size if is_row_parallel else columns
        noise_RI = torch.rand(rank, whole, generator=torch.Generator().manual_seed(seed))
        if is_row_parallel:
            noise_RI = noise_RI.chunk(size, dim=1)[place]
        device = self.weight_OI.device
        self.a_RI = ((2 * noise_RI - 1) / whole**0.5).to(device).contiguous().requires_grad_()
        self.b_OR = torch.zeros(len(self.weight_OI), rank, device=device).requires_grad_()
        self.parameters = [self.a_RI, self.b_OR]
        self.is_shared = [not is_row_parallel, is_row_parallel]

    def weight(self) -> torch.Tensor:
        """The merged weight."""
        change_OI = self.scale * (self.b_OR @ self.a_RI)
        return self.under_mask(self.weight_OI.float() + change_OI)
