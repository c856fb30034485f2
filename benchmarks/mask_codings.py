"""Size and decoding time of the codings of a mask, against a copy of its weights.

python -m benchmarks.mask_codings --threads 1 --json mask-codings.json
python -m benchmarks.mask_codings --mask runs/quickstart/masks/learned.safetensors \
    --base runs/quickstart/hf
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Work, interleave, parser, report, table
from megamask.masks import codec, radix, ranked
from megamask.masks.codings import mask_digest
from megamask.masks.file import load_masks
from megamask.sparsity.pattern import Pattern
from megamask.user_paths import path_argument
from megamask.weights.base_model import BaseModel

WORDS, UNIFORM, RANKED = "words", "uniform", "given-weights"
ENTROPY, CHECK, COPY = "log2(C) / M", "checksum of the mask", "copy of the weights"


def main(argv: list[str] | None = None) -> int:
    """Measure each pattern, or a mask file; print and write the figures."""
    known = parser(__doc__ or "")
    known.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "8:16"])
    known.add_argument("--rows", type=int, default=4096)
    known.add_argument("--columns", type=int, default=4096)
    known.add_argument("--noise", type=float, default=0.25, help="of the log-magnitudes")
    known.add_argument("--mask", type=path_argument, help="mask file, in the place of random masks")
    known.add_argument("--base", type=path_argument, help="Hugging Face folder of its model")
    options = known.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.mask:
        figures = {str(options.mask): of_file(options)}
    else:
        figures = {text: of_pattern(Pattern.parse(text), options) for text in options.patterns}
    codings = (WORDS, UNIFORM, RANKED)
    table(
        "bits a weight",
        ["masks", ENTROPY, *codings],
        [[name, one[ENTROPY], *(one.get(f"bits {c}", "-") for c in codings)]
         for name, one in figures.items()],
    )  # fmt: skip
    sides = (*codings, CHECK, COPY)
    table(
        f"ns a weight to decode, the fastest of {options.rounds} rounds",
        ["masks", *sides],
        [[name, *(one.get(f"ns {side}", "-") for side in sides)] for name, one in figures.items()],
    )
    report("mask_codings", options, figures, torch.device("cpu"))
    return 0


def of_pattern(pattern: Pattern, options: Any) -> dict[str, float]:
    """Figures of a random mask that mostly keeps the largest of normal weights."""
    shape = (options.rows, options.columns // pattern.m * pattern.m)
    weight = torch.randn(shape).to(torch.bfloat16)
    noise = options.noise * torch.randn(shape)
    mask_OI = pattern.best(weight.float().abs().log() + noise)
    return measure(pattern, {"linear": mask_OI}, {"linear": weight}, options.rounds)


def of_file(options: Any) -> dict[str, float]:
    """Figures of all masks of a file; times of its largest."""
    masks = load_masks(options.mask, model=options.base)
    with BaseModel(options.base).open() as source:
        weights = {name: source.tensor(f"{name}.weight") for name in masks}
    return measure(masks.pattern, masks, weights, options.rounds)


def measure(
    pattern: Pattern, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], rounds: int
) -> dict[str, float]:
    """Bits a weight of all masks, and nanoseconds a weight of the largest."""
    base, bits, total = pattern.num_candidates, dict.fromkeys((WORDS, UNIFORM, RANKED), 0), 0
    sides: dict[str, Work] = {}
    largest = 0
    for name, mask_OI in masks.items():
        index = pattern.index_of(mask_OI).numpy().reshape(-1).astype(np.uint64)
        coded = {WORDS: codec.pack(index, base), UNIFORM: radix.pack(index, base)}
        keys = ranked.keys_of(weights[name])
        if ranked.has_model(pattern):
            coded[RANKED] = ranked.encode(index, keys, pattern)
            assert np.array_equal(ranked.decode(coded[RANKED], keys, pattern), index)
        assert np.array_equal(radix.unpack(coded[UNIFORM], len(index), base), index)
        for coding, words in coded.items():
            bits[coding] += 64 * len(words)
        total += mask_OI.numel()
        if mask_OI.numel() > largest:
            largest = mask_OI.numel()
            sides = _sides(coded, index, weights[name], pattern)
    timings = interleave(sides, rounds, torch.device("cpu"))
    return {
        ENTROPY: math.log2(base) / pattern.m,
        **{f"bits {coding}": one / total for coding, one in bits.items() if one},
        **{f"ns {side}": 1e9 * min(timings.seconds[side]) / largest for side in sides},
    }


def _sides(
    coded: Mapping[str, Any], index: Any, weight: Tensor, pattern: Pattern
) -> dict[str, Work]:
    """What is timed: decoding to candidate indices, and a copy of the weights."""
    base, count = pattern.num_candidates, len(index)
    target, narrow = torch.empty_like(weight), radix.unpack(coded[UNIFORM], count, base)
    sides: dict[str, Work] = {
        WORDS: lambda: codec.unpack(coded[WORDS], count, base),
        UNIFORM: lambda: radix.unpack(coded[UNIFORM], count, base),
        CHECK: lambda: mask_digest(narrow, pattern),
        COPY: lambda: target.copy_(weight),
    }
    if RANKED in coded:
        sides[RANKED] = lambda: ranked.decode(coded[RANKED], ranked.keys_of(weight), pattern)
    return sides


if __name__ == "__main__":
    sys.exit(main())
