"""The same learning steps twice from the same state: are logits and losses equal bit for bit?

``python -m benchmarks.gpu.repeat --model smollm2-135m --layers 8``

The answer for a GPU depends on attention's backward pass, which may add in another order each time.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import now, parser, report, table
from benchmarks.lab import add_model_options, open_lab

STEPS = 6


@dataclass(frozen=True)
class Learned:
    """Losses and mask logits after ``STEPS`` steps, and the seconds of a step."""

    losses: list[float]
    logits: list[torch.Tensor]
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Learn twice, compare, print, write. Unequal bits are a result, not a failure."""
    options = read_options(argv)
    first, second = learn(options), learn(options)
    figures = compare(first, second)
    rows: list[list[Any]] = [[name, value] for name, value in figures.items()]
    table(f"two runs of {STEPS} steps", ["what", "measured"], rows)
    report("repeat", options, figures, first.logits[0].device)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    add_model_options(options)
    options.set_defaults(accumulate=2)
    return options.parse_args(argv)


def learn(options: argparse.Namespace) -> Learned:
    """``STEPS`` steps from the seed's weights, logits and tokens."""
    with open_lab(options, STEPS) as lab:
        assert lab.learner is not None
        losses, device = [], lab.mesh.device
        for step in range(STEPS):
            if step == 1:  # the first step compiles
                begin = now(device)
            losses.append(lab.learner.step(step, lab.plan).lm_loss)
        seconds = (now(device) - begin) / (STEPS - 1)
        logits = [one.detach().clone() for one in lab.masked_model.mask_logits]
        return Learned(losses, logits, seconds)


def compare(first: Learned, second: Learned) -> dict[str, Any]:
    """How far two runs are apart.

    Returns:
        ``logits that differ`` as a share of all logits, ``largest difference``, ``losses equal``,
        and the seconds of a step.
    """
    pairs = list(zip(first.logits, second.logits, strict=True))
    differing = sum(int((one != other).sum()) for one, other in pairs)
    largest = max(float((one.float() - other.float()).abs().max()) for one, other in pairs)
    return {
        "logits that differ": differing / sum(one.numel() for one in first.logits),
        "largest difference": largest,
        "losses equal": first.losses == second.losses,
        "seconds of a step": second.seconds,
    }


if __name__ == "__main__":
    sys.exit(main())
