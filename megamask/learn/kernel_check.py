"""One tile of every kernel of a run against plain PyTorch, before the model is loaded.

A package that is installed may still not work: Triton needs a compiler and Python's headers at its
first launch, and numba compiles for the CPU at hand. The check takes a forward and a backward pass
of a small layer, its hard mask, and where the update of its logits is compiled, an update.

Shapes: O out_features, I in_features, L logits a group, G groups per row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.learn.method import TrialUpdate
from megamask.learn.methods import find_method
from megamask.model.build import DTYPES
from megamask.parallel.mesh import Mesh
from megamask.sparsity.backends import choose_backend
from megamask.sparsity.draw import Sample, Site
from megamask.sparsity.noise import NoiseKey
from megamask.sparsity.operator import sample_mask, sampler_at
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.shard import Placement

log = logging.getLogger(__name__)

ROWS, GROUPS, TOKENS = 6, 37, 5  # GROUPS is no multiple of a tile
# Kernels and reference round differently, some 1e-5 of a mask and 2^-8 of a weight in bf16; a wrong
# mask, noise or gradient differs by its own size.
ALLOWED = 0.03
EXACT = ("hard codes", "hard mask")


def with_proven_kernels(config: Config, patterns: Sequence[Pattern], mesh: Mesh) -> Config:
    """The settings of a run whose kernels work here: the given ones, or plain PyTorch in the place
    of kernels that ``learn.sampling.backend=auto`` chose and that fail or are missing on a rank.
    Every pattern of the run is tried.

    All ranks must call this, and all ranks get the same settings.

    Raises:
        ConfigError: the backend was named and fails, a kernel left the device unusable, or as
            ``choose_backend``.
    """
    distribution, asked = find_method(config.learn.method).distribution, config.learn.sampling
    backend = choose_backend(asked.backend, mesh.device, distribution)
    problem = ""
    for pattern in patterns if backend != "torch" else ():
        site = Site(pattern, Placement.whole(ROWS, GROUPS), distribution)
        problem = problem or sampling_problem(config, site, mesh.device, backend)
        problem = problem or update_problem(config, site, mesh.device, backend)
    # A rank whose packages are missing votes too: ranks that sample otherwise round otherwise.
    if not mesh.any(bool(problem) or backend == "torch"):
        return config
    if backend == "torch":
        return _with_backend(config, backend)
    problem = problem or "they fail or are missing on another rank"
    if asked.backend != "auto":
        raise _refused(backend, f"a test of one tile failed: {problem}", "Use auto, or torch.")
    if mesh.is_main:
        log.warning(
            "sampling in plain PyTorch, several times slower: the %s kernels fail here (%s)",
            backend,
            problem,
        )
    return _with_backend(config, "torch")


def _refused(backend: str, why: str, fix: str) -> ConfigError:
    allowed = f"kernels that work here, and {why}"
    return ConfigError("learn.sampling.backend", backend, allowed, fix)


def sampling_problem(config: Config, site: Site, device: torch.device, backend: str) -> str:
    """What is wrong with the sampling kernels of ``backend``; empty if nothing is.

    Raises:
        ConfigError: a kernel left the CUDA context unusable, so that nothing runs on it any more.
    """
    try:
        found = results(config, site, device, backend)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the errors of kernels come late
    except Exception as error:  # a compiler's, a driver's or our own
        return _survived(error, device, backend)
    for name, plain in results(config, site, device, "torch").items():
        off, scale = _distance(found[name], plain)
        if not off <= (0 if name in EXACT else ALLOWED * scale):
            return f"{name}: {off:.3g} off, of {scale:.3g}"
    return ""


def _survived(error: Exception, device: torch.device, backend: str) -> str:
    """An error of a kernel in words.

    Raises:
        ConfigError: nothing runs on the device any more.
    """
    if _is_lost(device):
        why = f"a test of one tile left the device unusable: {_in_words(error)}"
        raise _refused(backend, why, "Start again with torch.") from None
    return _in_words(error)


def _is_lost(device: torch.device) -> bool:
    """Whether an error, such as a wrong address, ended the CUDA context of this process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _distance(mine: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    """(largest difference, largest number of plain PyTorch)."""
    off = float((mine.double().cpu() - plain.double().cpu()).abs().max())
    return off, float(plain.double().abs().max())


def update_problem(config: Config, site: Site, device: torch.device, backend: str) -> str:
    """What is wrong with the compiled update of mask logits; empty if nothing is.

    Raises:
        ConfigError: as ``sampling_problem``.
    """
    update = trial_update(config, site, device, backend)
    if update is None:
        return ""
    try:
        found = update.make(True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        expected = update.make(False)
    except Exception as error:
        return _survived(error, device, backend)
    for mine, plain in zip(found, expected, strict=True):
        off, scale = _distance(mine, plain)
        if not off <= update.tolerance * scale:
            if not update.tolerance:
                return f"the update of {update.name} gives other bits than plain PyTorch"
            return f"the update of {update.name}: {off:.3g} off, of {scale:.3g}"
    return ""


def require_update(config: Config, mesh: Mesh) -> None:
    """Refuse an update rule whose compiler fails on any rank. All ranks must call this.

    Raises:
        MegamaskError: as ``Mesh.leave_together``, which rank 0 tells.
    """
    failure = None
    try:
        find_method(config.learn.method).try_update(config, mesh.device)
    except Exception as error:  # a compiler's, a linker's or a driver's
        allowed = f"an optimizer that compiles here, and a step failed: {_in_words(error)}"
        fix = "Mend the compiler, or use lion8bit, which needs none."
        kind = config.learn.optimizer.kind
        failure = ConfigError("learn.optimizer.kind", kind, allowed, fix)
    mesh.leave_together(failure, "compile the update")


def trial_update(
    config: Config, site: Site, device: torch.device, backend: str
) -> TrialUpdate | None:
    """The update of the logits of a layer, with which ``update_problem`` compares; None where it is
    not compiled.
    """
    logits, _, gradient = _tensors(config, site, device)
    method = find_method(config.learn.method)
    return method.trial_update(config, site, logits, gradient, backend)


def results(
    config: Config, site: Site, device: torch.device, backend: str
) -> dict[str, torch.Tensor]:
    """What the kernels make of a layer, by name: masked weight, sums, hard codes and gradient of
    the logits under one draw, and the mask that evaluations and mask files take.
    """
    logits, weight, _ = _tensors(config, site, device)
    logits.requires_grad_()
    learn = config.learn
    is_hard = learn.sampling.mode == "hard" or find_method(learn.method).forward_passes(learn) > 0
    # A fixed key: the scores of a hard draw that nearly tie could fall either way.
    sample = Sample(NoiseKey(0, 1), 100.0, 1.0, is_hard, learn.sampling.noise)
    sampler = sampler_at(site, backend)
    masked, sums, codes = sample_mask(logits, weight, site, sample, sampler, statistics=True)
    tokens = torch.ones(TOKENS, weight.shape[1], dtype=weight.dtype, device=device)
    with torch.enable_grad():
        (tokens @ masked.t()).float().square().mean().backward()
    assert logits.grad is not None
    mask, confidence = sampler.mask_statistics(logits.detach(), site, sample.kappa)
    return {
        "masked weight": masked.detach(),
        "sums": sums,
        "hard codes": codes,
        "gradient": logits.grad,
        "hard mask": mask,
        "confidence": confidence,
    }


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
