"""The Megatron layer spec of an architecture: every linear can carry a mask.

Norm and attention come from PyTorch. With MEGAMASK_TRANSFORMER_ENGINE=1 in the environment, plain
RMSNorm and plain attention come from Transformer Engine on CUDA, which no run has tried yet.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megamask.errors import ConfigError
from megamask.model.experts import MixtureOfExperts
from megamask.model.fused.seams import SwiGlu
from megamask.model.layer_parts import (
    AllHeadsNorm,
    FrozenNorm,
    RotatedSelfAttention,
    SdpaCoreAttention,
)
from megamask.model.residual import ParallelLayer, ResidualSum
from megamask.model.rope import columns
from megamask.parallel.masked_linear import MaskedColumnParallelLinear, MaskedRowParallelLinear
from megamask.weights.architecture import Architecture
from megamask.weights.family import Layer, Norm

ENGINE = "MEGAMASK_TRANSFORMER_ENGINE"


def has_transformer_engine(device: torch.device) -> bool:
    """Whether Transformer Engine's norm and attention are used: on CUDA, where the environment asks
    for them.

    Raises:
        ConfigError: the environment asks for them and Transformer Engine is not installed.
    """
    asked = os.environ.get(ENGINE, "0")
    if asked not in ("0", "1"):
        raise ConfigError(ENGINE, asked, "0 or 1, in the environment", "Unset it.")
    if device.type != "cuda" or asked == "0":
        return False
    if importlib.util.find_spec("transformer_engine") is None:
        allowed = "1 needs the package transformer_engine, which is not installed"
        raise ConfigError(ENGINE, asked, allowed, "Unset it, or install Transformer Engine.")
    return True


def block_spec(
    arch: Architecture, config: TransformerConfig, device: torch.device
) -> TransformerBlockSubmodules:
    """The spec of all layers and of the last norm.

    Args:
        arch: the architecture.
        config: Megatron's settings of the model.
        device: device of the model.
    """
    specs = {
        facts: _layer(arch, facts, config, device)
        for facts in {arch.layer(index) for index in range(arch.num_layers)}
    }
    return TransformerBlockSubmodules(
        layer_specs=[specs[arch.layer(index)] for index in range(arch.num_layers)],
        layer_norm=_norm(arch, device, arch.logit_scale),
    )


def _layer(
    arch: Architecture, facts: Layer, config: TransformerConfig, device: torch.device
) -> ModuleSpec:
    norm = _norm(arch, device) if arch.pre_norms else IdentityOp
    rotation = None if facts.rope is None else columns(arch, facts.rope)
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=RotatedSelfAttention,
            params={"attn_mask_type": AttnMaskType.causal, "rotation": rotation},
            submodules=_attention(arch, facts, device),
        ),
        self_attn_bda=_residual(arch, config),
        pre_mlp_layernorm=norm,
        mlp=_feed_forward(arch, facts, config),
        mlp_bda=_residual(arch, config, adds=not arch.parallel_residual),
    )
    layer = ParallelLayer if arch.parallel_residual else TransformerLayer
    return ModuleSpec(module=layer, submodules=submodules)


def _feed_forward(arch: Architecture, facts: Layer, config: TransformerConfig) -> ModuleSpec:
    """The biases come from the architecture, because Megatron has fewer switches than there are
    combinations of biases.
    """
    submodules = MLPSubmodules(
        linear_fc1=_linear(MaskedColumnParallelLinear, arch.mlp_bias),
        activation_func=SwiGlu if config.use_te_activation_func else None,
        linear_fc2=_linear(MaskedRowParallelLinear, arch.mlp_bias),
    )
    if not facts.experts:
        return ModuleSpec(module=MLP, submodules=submodules)
    params = {"experts": arch.experts, "parts": submodules}
    return ModuleSpec(module=MixtureOfExperts, params=params)


def _attention(arch: Architecture, facts: Layer, device: torch.device) -> SelfAttentionSubmodules:
    core: Any = ModuleSpec(
        module=SdpaCoreAttention, params={"window": facts.window, "cap": arch.attention_cap}
    )
    if has_transformer_engine(device) and facts.window is None and arch.attention_cap is None:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        core = TEDotProductAttention
    return SelfAttentionSubmodules(
        linear_qkv=_linear(MaskedColumnParallelLinear, arch.attention_bias),
        core_attention=core,
        linear_proj=_linear(MaskedRowParallelLinear, arch.attention_out_bias),
        q_layernorm=_heads_norm(arch, arch.heads),
        k_layernorm=_heads_norm(arch, arch.kv_heads),
    )


def _norm(arch: Architecture, device: torch.device, factor: float = 1.0) -> Any:
    """The norm of hidden states, times a factor."""
    plain = arch.norm.kind == "rms" and not (arch.norm.plus_one or arch.norm.bias) and factor == 1
    if plain and has_transformer_engine(device):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return ModuleSpec(module=FrozenNorm, params={"norm": arch.norm, "factor": factor})


def _heads_norm(arch: Architecture, heads: int) -> Any:
    """The norm of queries or keys."""
    if arch.qk_norm is None:
        return IdentityOp
    norm = Norm("rms", arch.norm.eps, arch.norm.plus_one)
    if arch.qk_norm == "head":
        return ModuleSpec(module=FrozenNorm, params={"norm": norm})
    return ModuleSpec(module=AllHeadsNorm, params={"norm": norm, "width": heads * arch.head_dim})


def _residual(arch: Architecture, config: TransformerConfig, adds: bool = True) -> Any:
    """What joins the output of attention or feed-forward part with the residual stream."""
    if not arch.post_norms and arch.residual_scale == 1 and adds:
        return get_bias_dropout_add
    norm = arch.norm if arch.post_norms else None
    params = {"config": config, "norm": norm, "factor": arch.residual_scale, "adds": adds}
    return ModuleSpec(module=ResidualSum, params=params)


def _linear(linear: type, bias: bool) -> Any:
    return ModuleSpec(module=linear, params={"force_bias": bias})
