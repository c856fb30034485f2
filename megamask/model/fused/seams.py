"""Where Megatron-Core takes the fused kernels: in the place of its gated activation and of its
rotation.

Both places carry Transformer Engine's name in Megatron, and need nothing of it: a module in the
place of the activation (``use_te_activation_func``), and a function in the place of the rotation
(``apply_rope_fusion``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.config import Config
from megamask.model.fused.coverage import covers_activation, covers_rotation
from megamask.model.fused.launcher import KINDS, has_kernels
from megamask.model.fused.rotation import can_rotate, rotate
from megamask.model.fused.swiglu import swiglu
from megamask.model.fused.trial import activation_problem, rotation_problem
from megamask.parallel.mesh import Mesh
from megamask.weights.architecture import Architecture

log = logging.getLogger(__name__)


class SwiGlu(MegatronModule):
    """The fused activation of a gated feed-forward part."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up: (..., 2 F) -> (..., F)."""
        return swiglu(both)


@dataclass(frozen=True)
class Fusions:
    """Which kernels a model uses.

    Attributes:
        activation: SwiGLU's.
        rotation: that of queries and keys.
    """

    activation: bool
    rotation: bool

    @classmethod
    def of(cls, config: Config, arch: Architecture, mesh: Mesh, dtype: torch.dtype) -> Fusions:
        """The kernels of this architecture that ``parallel.fused`` allows and a trial has shown to
        give the bits of the separate passes here. Others are named in a warning.

        Another activation than a gated SiLU, and a model that rotates a part of each head, keep
        Megatron's passes.
        """
        runs = config.parallel.fused and dtype in KINDS and has_kernels(mesh.device)
        activation = runs and covers_activation(arch)
        rotation = runs and covers_rotation(arch)
        if activation:
            widths = sorted({width // mesh.tp for width in arch.widths().values()})
            problems = (activation_problem(width, dtype, mesh.device) for width in widths)
            activation = not _warned("SwiGLU", next(filter(None, problems), ""))
        if rotation:
            heads = [max(count // mesh.tp, 1) for count in (arch.heads, arch.kv_heads)]
            found = rotation_problem(heads, arch.head_dim, dtype, mesh.device)
            rotation = not _warned("rotation", found)
        return cls(activation, rotation)

    def settings(self) -> dict[str, bool]:
        """Megatron's settings, for its TransformerConfig. Megatron's function for a fused rotation,
        a global of its module, becomes ours first, because TransformerConfig asks for one.
        """
        if self.rotation:
            rope_utils.fused_apply_rotary_pos_emb = _rotate
        return {
            "use_te_activation_func": self.activation,
            "apply_rope_fusion": self.rotation,
        }


def _warned(part: str, problem: str) -> bool:
    """Whether there is a problem, which is then logged."""
    if problem:
        log.warning("%s in separate passes: the fused kernel fails here (%s)", part, problem)
    return bool(problem)


def _rotate(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Megatron's call of a fused rotation; its passes take what the kernel does not cover."""
    if not interleaved and can_rotate(t, freqs):
        return rotate(t, freqs)
    plain: torch.Tensor = rope_utils._apply_rotary_pos_emb_bshd(t, freqs, interleaved)
    return plain
