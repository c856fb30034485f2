"""Whether a weight has been pruned before."""

from __future__ import annotations

import torch

from megamask.sparsity.pattern import Pattern


def test_already_fits() -> None:
    weight_OI = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    pattern = Pattern(2, 4)
    pruned_OI = weight_OI * pattern.best(weight_OI.abs())  # holds -0.0 too: a zero all the same
    assert bool((pruned_OI.signbit() & (pruned_OI == 0)).any())
    assert not pattern.already_fits(weight_OI)
    assert pattern.already_fits(pruned_OI)
    assert pattern.already_fits(pruned_OI.bfloat16())
    assert not Pattern(1, 4).already_fits(
        pruned_OI
    )  # 2 zeros a group are not the 3 that 1:4 removes
    assert pattern.already_fits(
        weight_OI * Pattern(1, 4).best(weight_OI.abs())
    )  # sparser than asked for
    assert not Pattern(2, 5).already_fits(pruned_OI)  # M does not divide the row
    pruned_OI[3, 4:8] = 1.0  # one dense group
    assert not pattern.already_fits(pruned_OI)
