"""The distance of the layers from the dense model's, against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megamask.model.hidden_match import HiddenMatch, gradient_


def layers(dtype: torch.dtype) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    return [torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()).to(dtype) for _ in range(3)]


def states(inputs: torch.Tensor, model: list[torch.nn.Module]) -> list[torch.Tensor]:
    found = []
    for layer in model:
        inputs = layer(inputs)
        found.append(inputs)
    return found


def distance(masked: list[torch.Tensor], dense: list[torch.Tensor]) -> torch.Tensor:
    """The definition, in fp64."""
    pairs = [(h.double(), t.double()) for h, t in zip(masked, dense, strict=True)]
    errors = torch.stack([(h - t).norm(dim=-1) / t.norm(dim=-1) for h, t in pairs])
    assert (errors > 1).any() and (errors < 1).any()
    return torch.nn.functional.huber_loss(errors, torch.zeros_like(errors), reduction="sum") * 2


@pytest.mark.parametrize("recomputes", [False, True])
def test_value_and_gradient_are_those_of_the_definition(recomputes: bool) -> None:
    model, scale = layers(torch.float32), 0.25
    inputs, other = torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    top = torch.randn(5, 2, 8)
    # the reference: plain autograd
    dense = [one.detach() for one in states(other, model)]
    leaf = inputs.clone().requires_grad_()
    masked = states(leaf, model)
    expected = distance(masked, dense)
    (scale * expected + (masked[-1] * top).sum()).backward()
    # the gradient that hooks add
    match = HiddenMatch(model, scale)
    with match.recording(), torch.no_grad():
        states(other, model)
    mine = inputs.clone().requires_grad_()
    with match.matching():
        if recomputes:
            hidden = mine
            for layer in model:
                hidden = checkpoint(layer, hidden, use_reentrant=True)
        else:
            hidden = states(mine, model)[-1]
    (hidden * top).sum().backward()
    # sums of a few dozen numbers in fp32
    torch.testing.assert_close(match.measured(), expected, rtol=1e-6, atol=0)
    found, right = mine.grad, leaf.grad
    assert found is not None and right is not None
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    # without the comparison, and at another scale, the gradient is another
    match.drop()
    without = torch.autograd.grad((states(leaf, model)[-1] * top).sum(), leaf)[0]
    assert not torch.allclose(without, right, rtol=1e-2, atol=1e-3)
    other_scale = without + 1.02 * (found - without)
    assert not torch.allclose(other_scale, right, rtol=1e-5, atol=1e-6)


def test_nothing_happens_outside_of_a_micro_batch() -> None:
    model = layers(torch.float32)
    inputs = torch.randn(5, 2, 8)
    plain = states(inputs, model)
    match = HiddenMatch(model, 1.0)
    with match.recording(), torch.no_grad():
        states(inputs + 1, model)
    with match.matching():
        states(inputs, model)
    match.drop()
    leaf = inputs.clone().requires_grad_()
    found = states(leaf, model)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    found[-1].sum().backward()
    reference = inputs.clone().requires_grad_()
    states(reference, layers(torch.float32))[-1].sum().backward()
    assert leaf.grad is not None and reference.grad is not None
    assert torch.equal(leaf.grad, reference.grad)


def test_a_bf16_state_is_compared_in_fp32_and_states_of_zeros_give_no_nan() -> None:
    torch.manual_seed(0)
    dense = torch.randn(4, 3, 16).bfloat16()
    state = dense + (2 * torch.rand(4, 3, 1) * torch.randn(4, 3, 16)).bfloat16()
    dense[0, 0] = 0
    state[0, 0] = 0
    target, scale = dense.clone(), 0.5
    leaf = state.double().requires_grad_()
    expected = distance([leaf.flatten(0, 1)[1:]], [target.double().flatten(0, 1)[1:]])
    expected.backward()
    found = gradient_(dense, state, scale)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=0)
    assert leaf.grad is not None and dense.isfinite().all()
    # the gradient is rounded to bf16 once: 2^-9
    torch.testing.assert_close(dense.double(), scale * leaf.grad, rtol=2.0**-8, atol=0)
