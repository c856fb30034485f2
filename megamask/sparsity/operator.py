"""The sampling operator as PyTorch custom ops: (mask logits, frozen weight, draw) -> masked weight,
differentiable in the logits.

As ``torch.library`` ops with fake tensors and a backward, they work under ``torch.compile``,
activation recompute and DDP. The backward
keeps nothing but the inputs: the noise is drawn again from its key. Settings travel as integers and
one small CPU tensor: plain floats would be baked into compiled graphs, and each step has others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from megamask.sparsity.backends import backend_by_name
from megamask.sparsity.distributions import DISTRIBUTIONS
from megamask.sparsity.draw import Draw, Sampled, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement, RowBlock


def sample_mask(
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Site,
    draw: Draw,
    backend: str,
    into: torch.Tensor | None = None,
) -> Sampled:
    """Sample a mask and apply it to the weight.

    Args:
        mask_logits: (O, C or M, G) fp32 or bf16.
        weight: (O, I), frozen.
        site: pattern, distribution and place of the shard.
        draw: the draw.
        backend: name of a backend (``backends.choose_backend``).
        into: where the backward adds the gradient of the logits, fp32 or bf16; None returns it to
            autograd.
    """
    if torch.compiler.is_compiling():
        masked, sums, hard_codes = torch.ops.megamask.sample_mask(
            mask_logits, weight, into, *_numbers(site, draw), backend
        )
        return Sampled(masked, sums.detach(), hard_codes)
    return Sampled(*_Eager.apply(mask_logits, weight, into, site, draw, backend))  # type: ignore[no-untyped-call]


class _Eager(torch.autograd.Function):
    """The same without the op's dispatch, which costs 160 microseconds a layer forward and
    backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mask_logits: torch.Tensor,
        weight: torch.Tensor,
        into: torch.Tensor | None,
        site: Site,
        draw: Draw,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(mask_logits, weight)
        ctx.into, ctx.site, ctx.draw, ctx.backend = into, site, draw, backend
        ctx.set_materialize_grads(False)
        masked, sums, hard_codes = backend_by_name(backend, site.distribution).forward(
            mask_logits, weight, site, draw
        )
        ctx.mark_non_differentiable(sums, hard_codes)
        return masked, sums, hard_codes

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """Gradient at the logits alone: the weight is frozen, sums and winners are for looking
        at.
        """
        mask_logits, weight = ctx.saved_tensors
        dlogits = None
        if grad is not None and ctx.needs_input_grad[0]:
            module = backend_by_name(ctx.backend, ctx.site.distribution)
            dlogits = module.backward(grad, mask_logits, weight, ctx.site, ctx.draw, ctx.into)
        return (dlogits if ctx.into is None else None), *[None] * 5


@torch.library.custom_op("megamask::sample_mask", mutates_args=())
def _sample(
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    into: torch.Tensor | None,
    site: Sequence[int],
    key: Sequence[int],
    scale: torch.Tensor,
    hard: bool,
    watch: bool,
    fresh: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    place, draw = _objects(site, key, scale, hard, watch)
    return tuple(
        backend_by_name(backend, place.distribution).forward(
            mask_logits.detach(), weight.detach(), place, draw
        )
    )


@_sample.register_fake
def _(mask_logits, weight, into, site, key, scale, hard, watch, fresh, backend):  # type: ignore[no-untyped-def]
    rows, _, groups = mask_logits.shape
    sums = weight.new_empty(2, dtype=torch.float64)
    hard_codes = weight.new_empty(
        (rows, groups) if watch else (0,), dtype=_site(tuple(site)).code_dtype
    )
    return torch.empty_like(weight, memory_format=torch.contiguous_format), sums, hard_codes


@torch.library.custom_op("megamask::sample_mask_backward", mutates_args=())
def _gradient(
    grad: torch.Tensor,
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Sequence[int],
    key: Sequence[int],
    scale: torch.Tensor,
    hard: bool,
    backend: str,
) -> torch.Tensor:
    place, draw = _objects(site, key, scale, hard)
    return backend_by_name(backend, place.distribution).backward(
        grad, mask_logits, weight, place, draw
    )


@_gradient.register_fake
def _(grad, mask_logits, weight, site, key, scale, hard, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(mask_logits)


@torch.library.custom_op("megamask::sample_mask_backward_", mutates_args=("into",))
def add_gradient(
    into: torch.Tensor,
    grad: torch.Tensor,
    mask_logits: torch.Tensor,
    weight: torch.Tensor,
    site: Sequence[int],
    key: Sequence[int],
    scale: torch.Tensor,
    hard: bool,
    fresh: bool,
    backend: str,
) -> None:
    """Add the gradient at the logits to ``into``, or put it there."""
    place, draw = _objects(site, key, scale, hard, fresh=fresh)
    backend_by_name(backend, place.distribution).backward(
        grad, mask_logits, weight, place, draw, into
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    mask_logits, weight, ctx.into, ctx.site, ctx.key, scale, ctx.hard, _, ctx.fresh, ctx.backend = (
        inputs
    )
    ctx.save_for_backward(mask_logits, weight, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    dlogits = None
    if grad is not None and ctx.needs_input_grad[0]:
        mask_logits, weight, scale = ctx.saved_tensors
        arguments = (grad, mask_logits, weight, ctx.site, ctx.key, scale, ctx.hard)
        if ctx.into is None:
            dlogits = torch.ops.megamask.sample_mask_backward(*arguments, ctx.backend)
        else:
            torch.ops.megamask.sample_mask_backward_(ctx.into, *arguments, ctx.fresh, ctx.backend)
    return dlogits, *[None] * 9


_sample.register_autograd(_backward, setup_context=_keep_inputs)


def _numbers(site: Site, draw: Draw) -> tuple[list[int], list[int], torch.Tensor, bool, bool, bool]:
    place = site.placement
    blocks = [
        number for block in place.blocks for number in (block.start, block.rows, block.global_start)
    ]
    key = draw.key
    return (
        [
            site.pattern.n,
            site.pattern.m,
            DISTRIBUTIONS.index(site.distribution),
            place.first_group,
            place.groups_in_row,
            *blocks,
        ],
        [key.seed, key.step, key.micro_batch, key.parameter],
        torch.tensor([draw.kappa, draw.tau, draw.norm_coef], dtype=torch.float64),
        draw.hard,
        draw.watch,
        draw.fresh,
    )


def _objects(
    site: Sequence[int],
    key: Sequence[int],
    scale: torch.Tensor,
    hard: bool,
    watch: bool = False,
    fresh: bool = False,
) -> tuple[Site, Draw]:
    kappa, tau, norm_coef = scale.tolist()
    return _site(tuple(site)), Draw(NoiseKey(*key), kappa, tau, hard, norm_coef, watch, fresh)


@lru_cache(maxsize=4096)
def _site(numbers: tuple[int, ...]) -> Site:
    n, m, distribution, first_group, groups_in_row, *blocks = numbers
    triples = zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True)
    placement = Placement(
        tuple(RowBlock(*triple) for triple in triples), first_group, groups_in_row
    )
    return Site(Pattern(n, m), placement, DISTRIBUTIONS[distribution])
