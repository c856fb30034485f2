"""One tile of every kernel of a run against plain PyTorch, before the model is loaded.

A package that is installed may still not work: Triton needs a compiler and Python's headers at its
first launch, and numba compiles for the CPU at hand. The check takes a forward and a backward pass
of a small layer, and an update of its logits.

Shapes: O out_features, I in_features, L logits a group, G groups per row.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.learn.methods import find_method
from megamask.model.build import DTYPES
from megamask.optim.optimizers import epsilon, find_rule
from megamask.parallel.mesh import Mesh
from megamask.sparsity.backends import choose_backend
from megamask.sparsity.draw import Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sample_mask, sampler_for
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement

log = logging.getLogger(__name__)

ROWS, GROUPS, TOKENS = 6, 37, 5  # GROUPS is no multiple of a tile
# Kernels and reference round differently, some 1e-5 of a mask and 2^-8 of a weight in bf16; a wrong
# mask, noise or gradient differs by its own size.
ALLOWED = 0.03


def with_proven_kernels(config: Config, pattern: Pattern, mesh: Mesh) -> Config:
    """The settings of a run whose kernels work here: the given ones, or plain PyTorch in the place
    of kernels that ``learn.sampling.backend=auto`` chose and that fail. All ranks must call this.

    Raises:
        ConfigError: the backend was named and fails, or as ``choose_backend``.
    """
    distribution, asked = find_method(config.learn.method).distribution, config.learn.sampling
    backend = choose_backend(asked.backend, mesh.device, distribution)
    if backend == "torch":
        return _with_backend(config, backend)
    site = Site(pattern, Placement.whole(ROWS, GROUPS), distribution)
    problem = sampling_problem(config, site, mesh.device, backend)
    if not problem and backend == "numba":
        problem = update_problem(config, site)
    if not mesh.any(bool(problem)):
        return config
    problem = problem or "they fail on another rank"
    if asked.backend != "auto":
        allowed = f"kernels that work here, and a test of one tile failed: {problem}"
        raise ConfigError("learn.sampling.backend", backend, allowed, "Use auto, or torch.")
    if mesh.is_main:
        log.warning(
            "sampling in plain PyTorch, several times slower: the %s kernels fail here (%s)",
            backend,
            problem,
        )
    return _with_backend(config, "torch")


def sampling_problem(config: Config, site: Site, device: torch.device, backend: str) -> str:
    """What is wrong with the sampling kernels of ``backend``; empty if nothing is."""
    try:
        found = _pass(config, site, device, backend)
    except Exception as error:  # a compiler's, a driver's or our own
        return _in_words(error)
    for name, mine, plain in zip(
        ("masked weight", "sums", "hard codes", "gradient"),
        found,
        _pass(config, site, device, "torch"),
        strict=True,
    ):
        scale = float(plain.double().abs().max())
        off = float((mine.double().cpu() - plain.double().cpu()).abs().max())
        if not off <= (0 if name == "hard codes" else ALLOWED * scale):
            return f"{name}: {off:.3g} off, of {scale:.3g}"
    return ""


def update_problem(config: Config, site: Site) -> str:
    """What is wrong with the compiled update of mask logits; empty if nothing is.

    The compiled update gives the bits of plain PyTorch.
    """
    learn = config.learn
    if find_method(learn.method).forward_passes(learn):  # a method without an optimizer
        return ""
    rule = find_rule(learn.optimizer.kind)
    if not rule.uses_numba(learn.state.logits):
        return ""
    states = []
    try:
        for use_numba in (True, False):
            logits, _, gradient = _tensors(config, site, torch.device("cpu"))
            linear: Any = SimpleNamespace(
                mask_logits=torch.nn.Parameter(logits), parameter_id=1, site=site
            )
            linear.mask_logits.main_grad = gradient.clone()
            optimizer = rule.build(
                learn.optimizer,
                [linear],
                config.seed,
                use_numba=use_numba,
                logits_dtype=learn.state.logits,
                epsilon=epsilon(learn.optimizer, logits.numel()),
            )
            optimizer.step(0, 1e-3, torch.tensor(0.5))
            states.append([linear.mask_logits.detach(), *optimizer.state_tensors()])
    except Exception as error:
        return _in_words(error)
    same = all(torch.equal(mine, plain) for mine, plain in zip(*states, strict=True))
    return "" if same else f"the update of {rule.name} gives other bits than plain PyTorch"


def _pass(config: Config, site: Site, device: torch.device, backend: str) -> list[torch.Tensor]:
    """Masked weight, sums, hard codes and gradient of the logits of a layer under one draw."""
    logits, weight, _ = _tensors(config, site, device)
    logits.requires_grad_()
    sampling = config.learn.sampling
    sample = Sample(NoiseKey(config.seed, 1), 100.0, 1.0, hard=sampling.mode == "hard")
    sampler = sampler_for(backend, site.distribution)
    masked, sums, codes = sample_mask(logits, weight, site, sample, sampler, statistics=True)
    tokens = torch.ones(TOKENS, weight.shape[1], dtype=weight.dtype, device=device)
    with torch.enable_grad():
        (tokens @ masked.t()).float().square().mean().backward()
    assert logits.grad is not None
    return [masked.detach(), sums, codes, logits.grad]


def _tensors(
    config: Config, site: Site, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random logits (O, L, G), weight (O, I), and a gradient of the logits."""
    noise, state = torch.Generator().manual_seed(0), config.learn.state
    shape = (ROWS, site.logits_per_group, GROUPS)
    logits = 0.01 * torch.randn(shape, generator=noise)
    weight = torch.randn(ROWS, GROUPS * site.pattern.m, generator=noise)
    gradient = 0.01 * torch.randn(shape, generator=noise)
    return (
        logits.to(device, DTYPES[state.logits]),
        weight.to(device, DTYPES[config.dtype]),
        gradient.to(device, DTYPES[state.grads]),
    )


def _with_backend(config: Config, backend: str) -> Config:
    sampling = config.learn.sampling.model_copy(update={"backend": backend})
    return config.model_copy(
        update={"learn": config.learn.model_copy(update={"sampling": sampling})}
    )


def _in_words(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"
