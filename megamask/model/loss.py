"""Language-model loss of a vocabulary-parallel GPTModel."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy

from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import Architecture


def vocab_parallel_logits(model: Any, arch: Architecture, mesh: Mesh, tokens_BS: torch.Tensor) -> torch.Tensor:
    """This rank's part of the logits, (B, S, V / tp); columns that only pad the vocabulary hold -inf."""
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    logits_BSV = model(input_ids=tokens_BS, position_ids=positions, attention_mask=None)
    local = logits_BSV.shape[-1]
    real = min(max(arch.vocab - mesh.tp_rank * local, 0), local)
    if real < local:
        padding = torch.arange(local, device=logits_BSV.device) >= real
        logits_BSV = logits_BSV.masked_fill(padding, float("-inf"))
    return logits_BSV


def token_losses(model: Any, arch: Architecture, mesh: Mesh, tokens_BS: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every target, (B, S) fp32 nats, equal on all TP ranks."""
    logits = vocab_parallel_logits(model, arch, mesh, tokens_BS)
    losses: torch.Tensor = vocab_parallel_cross_entropy(logits.transpose(0, 1).contiguous(), labels_BS.transpose(0, 1).contiguous())
    return losses.transpose(0, 1)


def full_logits(model: Any, arch: Architecture, mesh: Mesh, tokens_BS: torch.Tensor) -> torch.Tensor:
    """All logits on every rank, (B, S, V): for comparisons, not for learning."""
    logits = vocab_parallel_logits(model, arch, mesh, tokens_BS)
    whole: torch.Tensor = gather_from_tensor_model_parallel_region(logits)
    return whole[..., : arch.vocab]
