"""Time to switch the masks of a resident transformers model, against a copy of its weights.

python -m benchmarks.mask_swap --threads 1 --json mask-swap.json
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import megamask
from benchmarks.common import Work, interleave, parser, report, table
from megamask.sparsity.pattern import Pattern
from megamask.weights.fingerprint import model_linears

SWITCH, DENSE, APPLY, COPY = "mask to mask", "dense, mask", "apply_masks", "copy of the weights"


def main(argv: list[str] | None = None) -> int:
    """Time the switches of a model of SmolLM2-135M's shape; print and write the figures."""
    known = parser(__doc__ or "")
    known.add_argument("--pattern", default="2:4")
    known.add_argument("--layers", type=int, default=30)
    known.add_argument("--keep", choices=("device", "cpu"), default="device")
    options = known.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    is_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if is_cuda else "cpu")
    figures = measure(options, device)
    table(
        f"{options.layers} layers of SmolLM2-135M's shape in bf16, {options.pattern}, on "
        f"{device}, ms a layer, the fastest of {options.rounds} rounds",
        [SWITCH, DENSE, APPLY, COPY],
        [[figures[f"ms_a_layer {side}"] for side in (SWITCH, DENSE, APPLY, COPY)]],
    )
    report("mask_swap", options, figures, device)
    return 0


def measure(options: Any, device: torch.device) -> dict[str, Any]:
    """Milliseconds a layer of every side."""
    pattern = Pattern.parse(options.pattern)
    model = _model(options.layers).to(device)
    linears = model_linears(model)
    masks = {
        name: {
            linear: pattern.best(torch.rand(module.weight.shape, device=device))
            for linear, module in linears.items()
        }
        for name in ("code", "prose")
    }
    named = megamask.Masks(model, masks, keep=options.keep)
    other = _model(options.layers).to(device)
    pairs = [(one.weight.detach(), torch.empty_like(one.weight)) for one in linears.values()]

    def switch() -> None:
        named.use("prose")
        named.use("code")

    def dense_and_back() -> None:
        named.use(None)
        named.use("code")

    sides: dict[str, Work] = {
        SWITCH: switch,
        DENSE: dense_and_back,
        APPLY: lambda: megamask.apply_masks(other, masks["code"]),
        COPY: lambda: [target.copy_(weight) for weight, target in pairs],
    }
    named.use("code")
    timings = interleave(sides, options.rounds, device)
    calls = {SWITCH: 2, DENSE: 2, APPLY: 1, COPY: 1}
    return {
        f"ms_a_layer {side}": 1e3 * min(timings.seconds[side]) / calls[side] / options.layers
        for side in sides
    }


def _model(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,  # no part of a switch
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
