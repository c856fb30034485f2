"""Time to switch the masks of a resident transformers model, against a copy of its weights, and the
memory of one model with K masks against K models.

python -m benchmarks.mask_swap --threads 1 --json mask-swap.json
python -m benchmarks.mask_swap --hf models/dense code=code.safetensors prose=prose.safetensors
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import megamask
from benchmarks.common import Work, interleave, parser, report, table
from megamask.masks.file import MaskSet
from megamask.sparsity.pattern import Pattern
from megamask.user_paths import path_argument
from megamask.weights.fingerprint import model_linears

SWITCH, DENSE, APPLY, COPY = "mask to mask", "dense, mask", "apply_masks", "copy of the weights"
SIDES = (SWITCH, DENSE, APPLY, COPY)
Given = dict[str, MaskSet] | dict[str, dict[str, torch.Tensor]]


def main(argv: list[str] | None = None) -> int:
    """Time the switches of a model of SmolLM2-135M's shape, or of ``--hf``; print and write the
    figures.
    """
    known = parser(__doc__ or "")
    known.add_argument("--pattern", default="2:4", help="of the random masks")
    known.add_argument("--layers", type=int, default=30, help="of the random model")
    known.add_argument("--keep", choices=("device", "cpu"), default="device")
    known.add_argument(
        "--hf", type=path_argument, metavar="FOLDER", help="a real model and its masks"
    )
    known.add_argument("masks", nargs="*", metavar="NAME=FILE", help="mask files for --hf")
    options = known.parse_args(argv)
    if (options.hf is None) == bool(options.masks) or len(options.masks) == 1:
        known.error("--hf and at least two NAME=FILE belong together")
    if options.threads:
        torch.set_num_threads(options.threads)
    is_cuda = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if is_cuda else "cpu")
    figures = measure(options, device)
    about = options.hf.name if options.hf else "SmolLM2-135M's shape"
    about = f"{figures['layers']} layers of {about} in bf16"
    times = f"{about} on {device}, the fastest of {options.rounds} rounds"
    table(
        times,
        ["", *SIDES],
        [
            ["ms a layer", *(figures[f"ms_a_layer {side}"] for side in SIDES)],
            ["ms in all", *(figures[f"ms_a_layer {side}"] * figures["layers"] for side in SIDES)],
        ],
    )
    count = len(figures["masks"])
    table(
        f"{about}, {count} masks, MB",
        ["", "model", "masks", "dense weights", "in all", f"{count} models"],
        [[where, *map(float, figures[f"MB {where}"].values())] for where in ("memory", "files")],
    )
    report("mask_swap", options, figures, device)
    return 0


def measure(options: Any, device: torch.device) -> dict[str, Any]:
    """Milliseconds a layer of every side, and the memory of the parts."""
    model, layers = _model(options, device)
    masks = _masks(options, model, device)
    first, second = list(masks)[:2]
    # Bytes of the tensors that live, on all devices.
    before = _tensor_bytes()
    named = megamask.Masks(model, masks, keep=options.keep)
    of_masks = _tensor_bytes() - before
    named.use(first)
    of_dense = _tensor_bytes() - before - of_masks
    of_model = sum(one.nbytes for one in model.parameters())
    sizes = {
        "memory": _parts(of_model, of_masks, of_dense, len(masks)),
        "files": _parts(of_model, _file_bytes(masks), 0, len(masks)),
    }
    linears = model_linears(model)
    other, _ = _model(options, device)
    pairs = [(one.weight.detach(), torch.empty_like(one.weight)) for one in linears.values()]

    def switch() -> None:
        named.use(second)
        named.use(first)

    def dense_and_back() -> None:
        named.use(None)
        named.use(first)

    sides: dict[str, Work] = {
        SWITCH: switch,
        DENSE: dense_and_back,
        APPLY: lambda: megamask.apply_masks(other, masks[first]),
        COPY: lambda: [target.copy_(weight) for weight, target in pairs],
    }
    timings = interleave(sides, options.rounds, device)
    calls = {SWITCH: 2, DENSE: 2, APPLY: 1, COPY: 1}
    found = {
        f"ms_a_layer {side}": 1e3 * min(timings.seconds[side]) / calls[side] / layers
        for side in sides
    }
    megabytes = {f"MB {where}": parts for where, parts in sizes.items()}
    return {"layers": layers, "masks": list(masks), **megabytes, **found}


def _parts(model: int, masks: int, dense: int, count: int) -> dict[str, float]:
    parts = {"model": model, "masks": masks, "dense": dense, "all": model + masks + dense}
    return {part: size / 1e6 for part, size in {**parts, "models": count * model}.items()}


def _file_bytes(masks: Given) -> int:
    """Bytes of the mask files; random masks have none."""
    return sum(one.size for one in masks.values() if isinstance(one, MaskSet))


def _tensor_bytes() -> int:
    """Bytes of all tensors that live; tensors that share memory count once."""
    gc.collect()
    storages = {
        (storage.device, storage.data_ptr()): storage.nbytes()
        for one in gc.get_objects()
        if issubclass(type(one), torch.Tensor)  # isinstance would ask, and wake, lazy objects
        for storage in [one.untyped_storage()]
    }
    return sum(storages.values())


def _masks(options: Any, model: nn.Module, device: torch.device) -> Given:
    if options.hf:
        pairs = [one.partition("=") for one in options.masks]
        return {name: megamask.load_masks(file) for name, _, file in pairs}
    pattern = Pattern.parse(options.pattern)
    return {
        name: {
            linear: pattern.best(torch.rand(module.weight.shape, device=device))
            for linear, module in model_linears(model).items()
        }
        for name in ("code", "prose")
    }


def _model(options: Any, device: torch.device) -> tuple[nn.Module, int]:
    """The model on its device, and how many layers it has."""
    if options.hf:
        model = AutoModelForCausalLM.from_pretrained(options.hf, dtype=torch.bfloat16)
        return model.to(device), model.config.num_hidden_layers
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,  # no part of a switch
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).to(device), options.layers


if __name__ == "__main__":
    sys.exit(main())
