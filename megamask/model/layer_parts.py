"""The parts of a decoder layer that are our own: norms with frozen weights, and causal attention
with or without rotation, with a window, with capped scores.

Shapes: S sequence, B batch, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megamask.weights.family import Norm


class RotatedSelfAttention(SelfAttention):
    """Megatron's self-attention that takes its own columns of the rotary angles.

    Args:
        rotation: columns of the angles of all sets; None rotates nothing.
    """

    def __init__(self, *args: Any, rotation: slice | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotation = rotation

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As Megatron's; ``rotary_pos_emb`` holds the angles of all sets."""
        angles = None
        if self.rotation is not None and rotary_pos_emb is not None:
            angles = rotary_pos_emb[..., self.rotation]
        found: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
            hidden_states, attention_mask, *args, rotary_pos_emb=angles, **kwargs
        )
        return found


class SdpaCoreAttention(MegatronModule):
    """Causal attention through PyTorch's scaled_dot_product_attention.

    It needs no random state of CUDA, and an S x S mask only where a window cuts keys off. Such a
    mask shuts out the kernels of CUDA that read grouped keys and values, so these are repeated for
    every head; without that CUDA would make S x S scores.

    Args:
        softmax_scale: factor of the scores; None is 1 / sqrt(D).
        window: number of keys that a query sees, its own included; None lets it see all before it.
        cap: scores become cap * tanh(score / cap), which needs S x S scores per head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        window: int | None = None,
        cap: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale, self.window, self.cap = softmax_scale, window, cap

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """(S, B, heads, D) queries and (S, B, kv heads, D) keys and values -> (S, B, heads * D)."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.cap is not None:
            out = self._capped(q, k, v)
        else:
            cut = self.window is not None and q.shape[2] > self.window
            if cut:
                k, v = _repeated(q, k, v)
            out = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=self._seen(q) if cut else None,
                is_causal=not cut,
                scale=self.scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _seen(self, q: torch.Tensor) -> torch.Tensor:
        """Which keys each query sees, (S, S) bool."""
        ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
        seen = ones.tril()
        return seen if self.window is None else seen.triu(1 - self.window)

    def _capped(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cap, scale = self.cap, q.shape[-1] ** -0.5 if self.scale is None else self.scale
        assert cap is not None
        k, v = _repeated(q, k, v)
        scores = torch.tanh(q @ k.transpose(-1, -2) * scale / cap) * cap
        scores = scores.masked_fill(~self._seen(q), -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _repeated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values for every head of the queries, (B, heads, S, D) each."""
    shared = q.shape[1] // k.shape[1]
    if shared == 1:
        return k, v
    return k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)


class FrozenNorm(torch.nn.Module):
    """PyTorch's RMSNorm or LayerNorm, one fused kernel on CUDA, with frozen parameters.

    Frozen parameters need no sum of gradients under sequence parallel.

    Args:
        config: names dtype and device.
        hidden_size: width of the inputs.
        eps: Megatron's, which is that of ``norm``.
        norm: kind, eps, 1 + weight, bias.
        factor: of the outputs.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float | None = None,
        *,
        norm: Norm,
        factor: float = 1.0,
        **_: Any,
    ) -> None:
        super().__init__()
        self.norm, self.factor = norm, factor
        self.weight = frozen_parameter(config, torch.ones(hidden_size))
        self.bias = frozen_parameter(config, torch.zeros(hidden_size)) if norm.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """weight * x / rms(x) or weight * (x - mean) / std(x) + bias, computed in fp32."""
        weight = self.weight + 1 if self.norm.plus_one else self.weight
        if self.norm.kind == "rms":
            y = F.rms_norm(x, weight.shape, weight, self.norm.eps)
        else:
            y = F.layer_norm(x, weight.shape, weight, self.bias, self.norm.eps)
        return y if self.factor == 1 else y * self.factor


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm over all heads of a token together, when each rank holds a part of the heads.

    Args:
        config: names dtype and device.
        width: number of dimensions of all heads of all ranks.
        norm: an RMSNorm.
    """

    def __init__(self, config: TransformerConfig, width: int, norm: Norm, **_: Any) -> None:
        super().__init__()
        ranks = config.tensor_model_parallel_size
        self.norm, self.width, self.ranks = norm, width, ranks
        self.weight = frozen_parameter(config, torch.ones(width // ranks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """weight * x / rms(x) of (S, B, heads of this rank, D), computed in fp32."""
        wide = x.flatten(-2).float()
        total = wide.square().sum(-1, keepdim=True)
        if self.ranks > 1:
            # The sum over ranks feeds every rank's heads, so its gradient is summed over them too.
            total = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(total)
            )
        y = wide * torch.rsqrt(total / self.width + self.norm.eps)
        return (self.weight * y.to(x.dtype)).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The weight is split over the ranks."""
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return sharded


def frozen_parameter(config: TransformerConfig, values: torch.Tensor) -> torch.nn.Parameter:
    """A parameter of these values in the dtype and on the device of the model."""
    device = torch.cuda.current_device() if not config.use_cpu_initialization else "cpu"
    return torch.nn.Parameter(values.to(dtype=config.params_dtype, device=device))
