"""The path of this device against the reference, plain PyTorch on the CPU: noise, sampling
operator, a few learning steps.

python -m benchmarks.parity --device cuda --json parity.json
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from benchmarks.common import parser, report, table
from benchmarks.lab import LOGIT_STD, Lab, add_model_options, open_lab
from benchmarks.sampling import available_backends
from megamask.parallel.mesh import choose_device
from megamask.sparsity.categorical import gumbel_softmax
from megamask.sparsity.categorical.categorical import CATEGORICAL
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.draw import GradientSink, Sample, Sampler, Site
from megamask.sparsity.noise import NoiseKey, words
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement
from megamask.sparsity.subset import k_subset
from megamask.sparsity.subset.subset import SUBSET

STEPS = 6
SINK = GradientSink(norm_coef=1e-3)
ROWS, GROUPS = 256, 96
PATTERNS: dict[Distribution, tuple[str, ...]] = {
    CATEGORICAL: ("2:4", "1:4", "4:8"),
    SUBSET: ("2:4", "4:8", "8:16"),
}
REFERENCES = {CATEGORICAL: gumbel_softmax, SUBSET: k_subset}
KEY = NoiseKey(seed=2**32 - 2, step=7, micro_batch=3, parameter=0xDEADBEEF)
# tau = 0.5 makes logits of up to 20 / 0.5 = 40, so an fp32 rounding (6e-8) there moves a
# probability by 5e-6 at most; the log and exp of two libraries differ by a few such roundings.
# Under subset a set adds up the scores of min(N, M - N) positions: as many times that.
SOFT_FP32 = 5e-5
SOFT_BF16 = 2.0**-8  # one rounding to bf16 that falls to the other side
# share of groups whose two best candidates lie within rounding of each other, with room to spare
NEAR_TIES = 1e-4
SUMS = 1e-5  # fp64 sums of values that each differ by rounding
# Six fp32 steps: gradients differ by rounding, AdamW's first steps turn a gradient near zero into a
# full step of either sign.
LOSSES = 1e-4
HARD_CODES = 1e-2


@dataclass(frozen=True)
class Check:
    """One measured difference and the most it may be."""

    what: str
    measured: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.measured <= self.allowed


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a check fails."""
    options = read_options(argv)
    device = choose_device(options.device)
    checks = [check_words(device)]
    for distribution, patterns in PATTERNS.items():
        for name, backend in available_backends(device, distribution).items():
            if device.type == "cpu" and backend is REFERENCES[distribution]:
                continue  # the reference itself
            for pattern in patterns:
                if options.patterns and pattern not in options.patterns:
                    continue
                checks += check_operator(
                    name, backend, Pattern.parse(pattern), distribution, device
                )
    transport, learned = check_learning(options, device)
    checks += learned
    rows = [
        [
            check.what,
            f"{check.measured:.2e}",
            f"{check.allowed:.0e}",
            "ok" if check.passed else "FAILED",
        ]
        for check in checks
    ]
    table(
        f"{device.type} against plain PyTorch on the CPU",
        ["what", "difference", "allowed", ""],
        rows,
    )
    print(f"\ncollectives of the learning steps: {transport}")
    report(
        "parity",
        options,
        {"checks": [asdict(check) for check in checks], "collectives": transport},
        device,
    )
    return int(not all(check.passed for check in checks))


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    add_model_options(options)
    options.add_argument(
        "--patterns", nargs="+", metavar="N:M", help="of those below: these; default: all"
    )
    options.set_defaults(model="toy", dtype="fp32", micro=2, accumulate=2, seq=64)
    return options.parse_args(argv)


def check_words(device: torch.device) -> Check:
    """The generator's integers must be the same bits, also for group ids above 2^32."""
    ids = torch.cat([torch.arange(50_000), 2**32 - 5 + torch.arange(50_000)])
    wrong = (words(KEY, ids.to(device), 8).cpu() != words(KEY, ids, 8)).sum()
    return Check("generator words that differ", float(wrong), 0.0)


def check_operator(
    name: str,
    backend: Sampler,
    pattern: Pattern,
    distribution: Distribution,
    device: torch.device,
) -> list[Check]:
    """Forward, backward and mask statistics of one backend."""
    site, plain = (
        Site(pattern, Placement.whole(ROWS, GROUPS), distribution),
        REFERENCES[distribution],
    )
    name, positions = (
        f"{name} {distribution}",
        min(pattern.n, pattern.m - pattern.n) if distribution is SUBSET else 1,
    )
    torch.manual_seed(0)
    logits = LOGIT_STD * torch.randn(ROWS, site.logits_per_group, GROUPS)
    checks = []
    for dtype, soft in ((torch.float32, SOFT_FP32 * positions), (torch.bfloat16, SOFT_BF16)):
        weight, grad = (torch.randn(ROWS, GROUPS * pattern.m).to(dtype) for _ in range(2))
        sample = Sample(KEY, kappa=300.0, tau=0.5)
        grad_here, logits_here, weight_here = (one.to(device) for one in (grad, logits, weight))
        expected, (norm, _), _ = plain.forward(logits, weight, site, sample)
        found, (found_norm, _), _ = backend.forward(logits_here, weight_here, site, sample)
        label = f"{name} {pattern} {str(dtype).removeprefix('torch.')}"
        checks += [
            Check(f"{label}: masked weight", _distance(found, expected), soft),
            Check(
                f"{label}: sum of squares",
                abs(float(found_norm) / float(norm) - 1),
                SUMS if dtype == torch.float32 else soft,
            ),
            Check(
                f"{label}: gradient",
                _distance(
                    backend.backward(grad_here, logits_here, weight_here, site, sample, SINK),
                    plain.backward(grad, logits, weight, site, sample, SINK),
                ),
                soft,
            ),
        ]
    hard = Sample(KEY, kappa=300.0, tau=0.5, hard=True)
    ones = torch.ones(ROWS, GROUPS * pattern.m)
    changed = (
        backend.forward(logits.to(device), ones.to(device), site, hard)[0].cpu()
        != plain.forward(logits, ones, site, hard)[0]
    )
    groups = changed.unflatten(1, (-1, pattern.m)).any(-1)
    (hard_codes, largest), (found_codes, found_largest) = (
        plain.mask_statistics(logits, site, 300.0),
        backend.mask_statistics(logits.to(device), site, 300.0),
    )
    return [
        *checks,
        Check(
            f"{name} {pattern}: groups with another hard mask",
            float(groups.double().mean()),
            NEAR_TIES,
        ),
        Check(
            f"{name} {pattern}: other hard codes",
            float((found_codes.cpu() != hard_codes).sum()),
            0.0,
        ),
        Check(
            f"{name} {pattern}: largest probabilities",
            abs(float(found_largest) / float(largest) - 1),
            SUMS,
        ),
    ]


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    return float(
        (found.cpu().double() - expected.double()).abs().max() / expected.double().abs().max()
    )


def check_learning(options: argparse.Namespace, device: torch.device) -> tuple[str, list[Check]]:
    """The same steps of the same model on the CPU in plain PyTorch, then on the device; fp32."""
    reference = learn(options, "cpu", "torch", None)
    here = learn(options, device.type, "auto", reference.initial)
    losses = max(
        abs(one - other) / other for one, other in zip(here.losses, reference.losses, strict=True)
    )
    pairs = zip(here.hard_codes, reference.hard_codes, strict=True)
    differing = torch.cat([(one != other).flatten() for one, other in pairs]).double().mean()
    moved = torch.cat(
        [
            (one != other).flatten()
            for one, other in zip(reference.hard_codes, reference.first_codes, strict=True)
        ]
    )
    assert moved.any(), "the steps changed no hard mask, so comparing them shows nothing"
    return here.transport, [
        Check(f"loss of {STEPS} learning steps", losses, LOSSES),
        Check(f"weights under another hard mask after {STEPS} steps", float(differing), HARD_CODES),
    ]


@dataclass(frozen=True)
class Learned:
    """What a few steps gave."""

    initial: dict[str, torch.Tensor]
    first_codes: list[torch.Tensor]
    losses: list[float]
    hard_codes: list[torch.Tensor]
    transport: str


def learn(
    options: argparse.Namespace, device: str, backend: str, initial: dict[str, torch.Tensor] | None
) -> Learned:
    """``STEPS`` steps from the parameters ``initial`` (None: random ones)."""
    settings = [*options.settings, f"learn.sampling.backend={backend}"]
    chosen = argparse.Namespace(**{**vars(options), "device": device, "settings": settings})
    with open_lab(chosen, STEPS) as lab:
        parameters = dict(lab.masked_model.model.named_parameters())
        with torch.no_grad():
            for name, value in (initial or {}).items():
                parameters[name].copy_(value)
        initial = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
        first = hard_codes(lab)
        assert lab.learner is not None
        losses = [lab.learner.step(step, lab.plan).lm_loss for step in range(STEPS)]
        return Learned(initial, first, losses, hard_codes(lab), dist.get_backend())


def hard_codes(lab: Lab) -> list[torch.Tensor]:
    """The hard masks, on the CPU."""
    return [linear.hard_mask().cpu() for linear in lab.masked_model.linears.values()]


if __name__ == "__main__":
    sys.exit(main())
