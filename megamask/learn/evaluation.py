"""Held-out perplexity of the hard mask while learning."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch

from megamask.config import Config
from megamask.data.heldout import evaluation_windows
from megamask.learn.masked_model import MaskedModel
from megamask.model.perplexity import perplexity
from megamask.parallel.masked_linear import MaskedLinear, folded_in_turn
from megamask.parallel.mesh import Mesh


def monitor_windows(config: Config) -> dict[str, torch.Tensor]:
    """The first held-out windows of every domain that is evaluated, (N, S) tokens.

    Raises:
        ConfigError, ArtifactError: see :func:`megamask.data.heldout.evaluation_windows`.
    """
    tokens = config.learn.monitor.evaluate_windows * config.evaluate.window
    return evaluation_windows(config, tokens)


def windows_digest(windows: Mapping[str, torch.Tensor]) -> str:
    """What tells scores apart that do not compare: a digest of the windows of each domain."""
    digest = hashlib.sha256()
    for domain, tokens_NS in sorted(windows.items()):
        digest.update(f"{domain}:{tuple(tokens_NS.shape)}:".encode())
        digest.update(tokens_NS.long().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def hard_mask_perplexity(
    masked_model: MaskedModel,
    mesh: Mesh,
    windows: Mapping[str, torch.Tensor],
    micro_batch: int,
    after_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Perplexity per domain of the model under its hard mask.

    A linear's masked weight is made when the linear computes and freed after it, so an evaluation
    needs room for one masked weight and not for a second model.

    Args:
        masked_model: the model.
        mesh: process groups and device of this rank.
        windows: domain -> its windows, (N, S) tokens.
        micro_batch: number of windows that run together.
        after_batch: called after each batch: an evaluation may take many steps' time.
    """
    with folded_in_turn(masked_model.linears.values(), MaskedLinear.hard_codes):
        masked_model.model.eval()
        return {
            domain: perplexity(masked_model.model, mesh, tokens, micro_batch, after_batch)
            for domain, tokens in windows.items()
        }


def mean_log_perplexity(by_domain: Mapping[str, float]) -> float:
    """One number to compare evaluations by: the mean over domains of log perplexity, so that no
    domain outweighs another.
    """
    return sum(math.log(value) for value in by_domain.values()) / len(by_domain)
