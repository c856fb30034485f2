"""One-shot criteria as plain fp64 code from the papers, for ``test_oneshot.py``.

Shapes: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

import torch

KEEP, GROUP, DAMP = 2, 4, 0.01


def wanda_score(weight_OI: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    return weight_OI.double().abs() * x_TI.double().norm(dim=0)


def ria_score(weight_OI: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
    """Eq. 3 and 4 of the RIA paper with a = 0.5, weight by weight."""
    weight = weight_OI.double().abs().tolist()
    rows = [sum(row) for row in weight]
    columns = [sum(column) for column in zip(*weight, strict=True)]
    norms = x_TI.double().norm(dim=0).tolist()
    score = [
        [
            (w / column + w / row_sum) * norm**0.5
            for w, column, norm in zip(row, columns, norms, strict=True)
        ]
        for row, row_sum in zip(weight, rows, strict=True)
    ]
    return torch.tensor(score, dtype=torch.float64)


def keep_largest(score_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mask, margins (the distances from the middle between the last kept and the first dropped
    score of a group), and the smallest relative gap between these two.
    """
    grouped = score_OI.unflatten(1, (-1, GROUP))
    values, order = grouped.sort(dim=-1, descending=True)
    mask = (
        torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order[..., :KEEP], True).flatten(1)
    )
    kept, dropped = values[..., KEEP - 1 : KEEP], values[..., KEEP : KEEP + 1]
    margin_OI = (grouped - (kept + dropped) / 2).abs().flatten(1)
    return mask, margin_OI, float(((kept - dropped) / kept).min())


def sparsegpt_textbook(
    weight_OI: torch.Tensor, hessian_II: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Algorithm 1 of the SparseGPT paper, column by column: mask, updated weight, margins, smallest
    gap. The scores are the roots of the paper's.
    """
    hessian_II = hessian_II + DAMP * hessian_II.diagonal().mean() * torch.eye(
        len(hessian_II), dtype=torch.float64
    )
    factor_II = torch.linalg.cholesky(
        torch.linalg.inv(hessian_II)
    ).T  # upper: row j belongs to the inverse of columns j, j + 1, ...
    work_OI, gaps = weight_OI.double().clone(), []
    mask_OI, margin_OI = torch.ones_like(weight_OI, dtype=torch.bool), torch.zeros_like(work_OI)
    for column in range(weight_OI.shape[1]):
        if column % GROUP == 0:
            here = slice(column, column + GROUP)
            score_OM = work_OI[:, here].abs() / factor_II.diagonal()[here]
            mask_OI[:, here], margin_OI[:, here], gap = keep_largest(score_OM)
            gaps.append(gap)
        error_O = torch.where(mask_OI[:, column], 0, work_OI[:, column]) / factor_II[column, column]
        work_OI[:, column:] -= error_O[:, None] * factor_II[column, column:]
    return mask_OI, torch.where(mask_OI, work_OI, 0), margin_OI, min(gaps)
