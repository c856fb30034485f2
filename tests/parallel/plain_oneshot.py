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


def margins_under(score_OI: torch.Tensor, mask_OI: torch.Tensor) -> torch.Tensor:
    """The margins of ``keep_largest``, and 0 where ``mask_OI``, any mask, keeps another weight."""
    chosen_OI, margin_OI, _ = keep_largest(score_OI)
    return torch.where(mask_OI == chosen_OI, margin_OI, 0)


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


def admm_textbook(
    weight_OI: torch.Tensor, gram_II: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Algorithms 1 and 2 of the ADMM paper with its constants: mask, updated weight, margins,
    smallest gap. The scores are those of the last step that chooses.
    """
    eye_II = torch.eye(len(gram_II), dtype=torch.float64)
    norm_I = gram_II.diagonal().sqrt()
    gram_II = gram_II / norm_I / norm_I[:, None]
    gram_II = gram_II + 0.1 * gram_II.diagonal().mean() * eye_II
    w_OI = weight_OI.double() * norm_I
    goal_OI, inverse_II = w_OI @ gram_II, torch.linalg.inv(gram_II + eye_II)
    dual_OI, gaps = torch.zeros_like(w_OI), []
    for step in range(1, 21):
        if step <= 15:
            size_OI = (w_OI + dual_OI).abs()
            mask_OI, margin_OI, gap = keep_largest(size_OI)
            risk = size_OI[~mask_OI].sort().values
            gone = int(size_OI.numel() * (1 - KEEP / GROUP) * (1 - (1 - step / 15) ** 3))
            if gone < len(risk):
                mask_OI = mask_OI | (size_OI >= risk[gone])
                gap = min(gap, float(1 - risk[gone - 1] / risk[gone]) if gone else 1.0)
            gaps.append(gap)
        kept_OI = (w_OI + dual_OI) * mask_OI
        dual_OI = dual_OI + w_OI - kept_OI
        w_OI = (goal_OI + kept_OI - dual_OI) @ inverse_II
    return mask_OI, (w_OI + dual_OI) * mask_OI / norm_I, margin_OI, min(gaps)


def gblm_score(
    weight_OI: torch.Tensor, x_TI: torch.Tensor, gradient_OI: torch.Tensor, samples: int
) -> torch.Tensor:
    """The sum of the metric's two terms, with alpha 100; ``gradient_OI`` is the norm over the
    samples.
    """
    inputs_I = (x_TI.double().square().sum(0) / samples).sqrt()
    return weight_OI.double().abs() * inputs_I + 100 * weight_OI.double().abs() * gradient_OI


def pruner_zero_score(weight_OI: torch.Tensor, gradient_OI: torch.Tensor) -> torch.Tensor:
    scaled_OI = (gradient_OI - gradient_OI.min()) / (gradient_OI.max() - gradient_OI.min())
    return (weight_OI.double() * weight_OI.double()).abs() * scaled_OI


def polish_by_trial(
    weight_OI: torch.Tensor,
    mask_OI: torch.Tensor,
    gram_II: torch.Tensor,
    m: int,
    sweeps: int,
    unit: int = 1,
) -> torch.Tensor:
    """Try every exchange of units of every group, and keep the exchange after which the whole row
    has the least error, if that is less than before.
    """
    weight_OI, gram_II, mask_OI = weight_OI.double(), gram_II.double(), mask_OI.clone()

    def error(mask_OI: torch.Tensor) -> torch.Tensor:
        removed_OI = weight_OI * ~mask_OI
        return ((removed_OI @ gram_II) * removed_OI).sum(1)

    for _ in range(sweeps):
        for start in range(0, weight_OI.shape[1], m):
            best_OI, least_O = mask_OI, error(mask_OI)
            for back in range(start, start + m, unit):
                for away in range(start, start + m, unit):
                    can_O = ~mask_OI[:, back] & mask_OI[:, away]
                    trial_OI = mask_OI.clone()
                    trial_OI[:, back : back + unit] = True
                    trial_OI[:, away : away + unit] = False
                    error_O = torch.where(can_O, error(trial_OI), torch.inf)
                    better_O = error_O < least_O
                    best_OI = torch.where(better_O[:, None], trial_OI, best_OI)
                    least_O = torch.where(better_O, error_O, least_O)
            mask_OI = best_OI
    return mask_OI


def scores_by_trial(
    weight_OI: torch.Tensor, mask_OI: torch.Tensor, gram_II: torch.Tensor
) -> torch.Tensor:
    """Let every weight alone change sides: the error that the removal of a kept weight adds, and
    the error that the return of a removed weight takes away.
    """
    weight_OI, gram_II = weight_OI.double(), gram_II.double()

    def error(mask_OI: torch.Tensor) -> torch.Tensor:
        removed_OI = weight_OI * ~mask_OI
        return ((removed_OI @ gram_II) * removed_OI).sum(1)

    found_OI, before_O = torch.empty_like(weight_OI), error(mask_OI)
    for place in range(weight_OI.shape[1]):
        other_OI = mask_OI.clone()
        other_OI[:, place] ^= True
        change_O = error(other_OI) - before_O
        found_OI[:, place] = torch.where(mask_OI[:, place], change_O, -change_O)
    return found_OI


def least_squares(
    weight_OI: torch.Tensor, mask_OI: torch.Tensor, x_TI: torch.Tensor, damp: float = DAMP
) -> torch.Tensor:
    """The kept weights whose outputs on X are nearest to those of the dense weights, damped, fp64:
    row by row, X stacked on the root of the damping, without a Hessian.
    """
    x_TI = x_TI.double() / len(x_TI) ** 0.5
    root = (damp * x_TI.square().sum(0).mean()).sqrt()
    rows_TI = torch.cat([x_TI, root * torch.eye(x_TI.shape[1], dtype=x_TI.dtype)])
    found_OI = torch.zeros_like(weight_OI, dtype=torch.float64)
    for row_I, kept_I, new_I in zip(weight_OI.double(), mask_OI, found_OI, strict=True):
        new_I[kept_I] = torch.linalg.lstsq(rows_TI[:, kept_I], rows_TI @ row_I).solution
    return found_OI
