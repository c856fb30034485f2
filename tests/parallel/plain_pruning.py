"""The plain reference of one-shot pruning for ``test_oneshot.py``.

The reference knows nothing of Megatron, fused linears or shards: it runs the whole transformers
model with hooks on one decoder layer at a time, prunes that layer's linears in place, and goes on.
Criteria are the papers', in fp64.

Shapes: N samples, S sequence, O out_features, I in_features, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.parallel.plain_oneshot import (
    GROUP,
    admm_textbook,
    gblm_score,
    keep_largest,
    least_squares,
    margins_under,
    polish_by_trial,
    pruner_zero_score,
    ria_score,
    scores_by_trial,
    sparsegpt_textbook,
    wanda_score,
)

DENSE_LINEAR = "model.layers.1.self_attn.o_proj"  # kept out with model.exclude
SAMPLES = 16


@dataclass
class Reference:
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    margins: dict[str, torch.Tensor] = field(default_factory=dict)
    gap: float = 1.0


Hessian = Callable[[torch.Tensor], torch.Tensor]
Score = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of W, X, G
SCORES: dict[str, Score] = {
    "magnitude": lambda weight_OI, *_: weight_OI.abs(),
    "wanda": lambda weight_OI, x_TI, _: wanda_score(weight_OI, x_TI),
    "ria": lambda weight_OI, x_TI, _: ria_score(weight_OI, x_TI),
    "gblm": lambda weight_OI, x_TI, g_OI: gblm_score(weight_OI, x_TI, g_OI, SAMPLES),
    "pruner_zero": lambda weight_OI, _, g_OI: pruner_zero_score(weight_OI, g_OI),
}


def gradient_norms(hf: Path, tokens_NS: torch.Tensor) -> dict[str, torch.Tensor]:
    """Norms over the samples of the gradients of the dense model, (O, I) fp64, as transformers
    takes the loss of labels.
    """
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float64)
    squares: dict[str, torch.Tensor] = {}
    for tokens_S in tokens_NS:
        model.zero_grad()
        model(input_ids=tokens_S[None], labels=tokens_S[None]).loss.backward()
        for name, one in model.named_parameters():
            if name.endswith("proj.weight") and one.grad is not None:
                module = name.removesuffix(".weight")
                squares[module] = squares.get(module, 0) + one.grad.double().square()
    return {name: total_OI.sqrt() for name, total_OI in squares.items()}


def whole_hessian(x_TI: torch.Tensor) -> torch.Tensor:
    return x_TI.double().T @ x_TI.double()


def inputs_of(
    linears: dict[str, torch.nn.Linear], model: torch.nn.Module, tokens_NS: torch.Tensor
) -> dict[str, torch.Tensor]:
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)})
        )
        for name, linear in linears.items()
    ]
    model(tokens_NS)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def recovered(
    hf: Path,
    tokens_NS: torch.Tensor,
    masks: Mapping[str, torch.Tensor],
    dense_prefix: bool = False,
) -> dict[str, torch.Tensor]:
    """The weights of every linear of ``masks`` by least squares, layer by layer."""
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    found: dict[str, torch.Tensor] = {}
    for index in range(len(model.model.layers)):
        names = [name for name in masks if name.startswith(f"model.layers.{index}.")]
        linears = {name: model.get_submodule(name) for name in names}
        inputs = inputs_of(linears, model, tokens_NS)
        for name in names:
            weight = linears[name].weight
            assert isinstance(weight, torch.Tensor)
            found[name] = least_squares(weight.detach(), masks[name], inputs[name]).float()
            if not dense_prefix:
                weight.copy_(found[name])
    return found


@torch.no_grad()
def reference(
    hf: Path,
    tokens_NS: torch.Tensor,
    method: str,
    hessian: Hessian = whole_hessian,
    pruned_prefix: bool = True,
    score: Score | None = None,
    gradients: Mapping[str, torch.Tensor] | None = None,
    sweeps: int = 0,
) -> Reference:
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    result, dense = Reference(), {name: one.clone() for name, one in model.state_dict().items()}
    for index, layer in enumerate(model.model.layers):
        linears = {
            f"model.layers.{index}.{name}": one
            for name, one in layer.named_modules()
            if isinstance(one, torch.nn.Linear)
        }
        linears.pop(DENSE_LINEAR, None)
        inputs = inputs_of(linears, model, tokens_NS)
        for name, linear in linears.items():
            x_TI, weight_OI = inputs[name], dense[f"{name}.weight"]
            if method in SCORES:
                g_OI = (gradients or {}).get(name, weight_OI)
                scores_OI = (score or SCORES[method])(weight_OI, x_TI, g_OI)
                mask_OI, margin_OI, gap = keep_largest(scores_OI)
                if sweeps:
                    gram_II = whole_hessian(x_TI)
                    mask_OI = polish_by_trial(weight_OI, mask_OI, gram_II, GROUP, sweeps)
                    margin_OI = margins_under(scores_by_trial(weight_OI, mask_OI, gram_II), mask_OI)
                new_OI = weight_OI * mask_OI
            else:
                textbook = admm_textbook if method.startswith("admm") else sparsegpt_textbook
                mask_OI, updated_OI, margin_OI, gap = textbook(weight_OI, hessian(x_TI))
                new_OI = updated_OI if method.endswith("_update") else weight_OI * mask_OI
            result.masks[name], result.weights[name] = mask_OI, new_OI
            result.margins[name], result.gap = margin_OI, min(result.gap, gap)
            if pruned_prefix:
                linear.weight.copy_(new_OI)
    return result
