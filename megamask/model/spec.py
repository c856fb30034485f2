"""The Megatron layer spec: every linear can carry a mask.

Norm and attention come from Transformer Engine where it can be imported, else from PyTorch.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megamask.parallel.masked_linear import MaskedColumnParallelLinear, MaskedRowParallelLinear
from megamask.weights.architecture import Architecture


class FrozenRMSNorm(torch.nn.Module):
    """PyTorch's RMSNorm, one fused kernel on CUDA, with a frozen weight.

    A frozen weight needs no sum of gradients under sequence parallel.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        device = torch.cuda.current_device() if not config.use_cpu_initialization else "cpu"
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """weight * x / rms(x), computed in fp32."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SdpaCoreAttention(MegatronModule):
    """Causal attention through PyTorch's scaled_dot_product_attention.

    It needs neither an S x S mask nor CUDA's random state.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        **_: Any,
    ) -> None:
        super().__init__(config=config)

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
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def has_transformer_engine(device: torch.device) -> bool:
    """Whether Transformer Engine's norm and attention are used: on CUDA, when importable."""
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def _norm_and_attention(device: torch.device) -> tuple[Any, Any]:
    if not has_transformer_engine(device):
        return FrozenRMSNorm, SdpaCoreAttention
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

    return TENorm, TEDotProductAttention


def block_spec(arch: Architecture, device: torch.device) -> TransformerBlockSubmodules:
    """The spec of all layers.

    The biases come from the architecture, because Megatron has only one switch for the two biases
    of Llama's attention.
    """
    norm, attention = _norm_and_attention(device)
    self_attention = SelfAttentionSubmodules(
        linear_qkv=_linear(MaskedColumnParallelLinear, arch.attention_bias),
        core_attention=attention,
        linear_proj=_linear(MaskedRowParallelLinear, arch.attention_out_bias),
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    mlp = MLPSubmodules(
        linear_fc1=_linear(MaskedColumnParallelLinear, arch.mlp_bias),
        linear_fc2=_linear(MaskedRowParallelLinear, arch.mlp_bias),
    )
    layer = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=self_attention,
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=ModuleSpec(module=MLP, submodules=mlp),
        mlp_bda=get_bias_dropout_add,
    )
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * arch.num_layers, layer_norm=norm)


def _linear(linear: type, bias: bool) -> Any:
    return ModuleSpec(module=linear, params={"force_bias": bias})
