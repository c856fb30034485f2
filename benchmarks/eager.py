"""The method of MaskLLM (arXiv 2409.17481) written as plainly as PyTorch allows, to compare with:
Gumbel-softmax through autograd, fresh tensors for every stage.

bf16 logits with fp32 masters and AdamW on the masters, as mixed-precision training does it; MaskLLM
Eq. 4-8. The model, the data and the schedule are those of the masked side, so the difference is the
sampling and what is kept for its backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func

from benchmarks.lab import LOGIT_STD, Lab
from megamask.sparsity.pattern import Pattern


def sample(
    logits_OGC: torch.Tensor, weight_OI: torch.Tensor, table_CM: torch.Tensor
) -> torch.Tensor:
    """W * M, (O, I), with M the mix of candidates under Gumbel-softmax weights (MaskLLM, Eq. 4)."""
    soft_OGC = F.gumbel_softmax(logits_OGC * 100.0, tau=1.0, dim=-1)
    return weight_OI * (soft_OGC @ table_CM.to(soft_OGC)).flatten(1)


class EagerSampling:
    """The sampling of one layer alone, forward and backward, on bf16 logits."""

    def __init__(self, weight_OI: torch.Tensor, grad_OI: torch.Tensor, pattern: Pattern) -> None:
        out_features, in_features = weight_OI.shape
        self.weight, self.grad = weight_OI, grad_OI
        self.table_CM = pattern.candidates(torch.bfloat16, weight_OI.device)
        shape = (out_features, in_features // pattern.m, pattern.num_candidates)
        logits = torch.randn(shape, device=weight_OI.device).mul_(LOGIT_STD)
        self.logits = logits.to(weight_OI.dtype).requires_grad_()

    def __call__(self) -> torch.Tensor:
        """The gradient at the logits, (O, G, C)."""
        masked = sample(self.logits, self.weight, self.table_CM)
        objective = (masked * self.grad).sum() - 1e-5 * masked.float().square().sum()
        (gradient,) = torch.autograd.grad(objective, self.logits)
        return gradient


class EagerSide:
    """Steps of eager mask learning on the model of a lab. Shapes: logits (O, G, C)."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        pattern, device = lab.masked_model.plan.only, lab.mesh.device
        assert pattern is not None
        self.table_CM = pattern.candidates(torch.bfloat16, device)
        self.logits = {
            name: torch.randn(
                linear.weight.shape[0],
                linear.weight.shape[1] // pattern.m,
                pattern.num_candidates,
                device=device,
            )
            .mul_(LOGIT_STD)
            .to(linear.weight.dtype)
            .requires_grad_()
            for name, linear in lab.masked_model.linears.items()
        }
        self.masters = [one.detach().float() for one in self.logits.values()]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95)
        )
        self.norms: list[torch.Tensor] = []

    def masked_weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """W * M with M the mix of candidates under Gumbel-softmax weights."""
        masked = sample(self.logits[name], weight, self.table_CM)
        self.norms.append(masked.float().square().sum())
        return masked

    def step(self, number: int) -> None:
        """One global batch: forward, backward, clipping, AdamW."""
        lab, settings = self.lab, self.lab.masked_model.model.config
        with ExitStack() as stack:
            stack.enter_context(
                patch.multiple(settings, no_sync_func=None, finalize_model_grads_func=None)
            )
            for name, linear in lab.masked_model.linears.items():
                stack.enter_context(
                    patch.object(linear, "masked_weight", partial(self.masked_weight, name))
                )
            lab.masked_model.model.train()
            get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=lab.plan.micro_batches(number),
                model=[lab.masked_model.model],
                num_microbatches=lab.plan.accumulations,
                seq_length=lab.config.data.seq_length,
                micro_batch_size=lab.plan.micro_batch,
                forward_only=False,
            )
        self._update()

    def _forward(self, micro_batches: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        _, tokens, labels = next(micro_batches)
        device = self.lab.mesh.device
        self.norms.clear()
        losses = model.token_losses(tokens.to(device), labels.to(device))
        penalty = 1e-5 * torch.stack(self.norms).sum() / self.lab.plan.accumulations
        return losses, lambda output: (output.mean() - penalty, output.mean().detach())

    @torch.no_grad()
    def _update(self) -> None:
        for master, logits in zip(self.masters, self.logits.values(), strict=True):
            assert logits.grad is not None
            master.grad, logits.grad = logits.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        for master, logits in zip(self.masters, self.logits.values(), strict=True):
            logits.copy_(master)
