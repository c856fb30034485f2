"""The language model on Megatron's HybridModel, which is to replace GPTModel.

HybridModel has a spec for each kind of layer and a string of kinds: Megatron's own layers of
attention and of MLP are two. A layer of kind ``*`` may be any module that attends, so the stack
here takes the decoder layers of ``megamask.model.spec``, which do both. Every parameter then has
the name and every tensor of a checkpoint the key that GPTModel gives it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.model.language_model import LanguageModel

ATTENTION = "*"  # the kind of a layer that attends


class DecoderStack(HybridStack):
    """A stack whose layers have a spec each, and which ends with the norm of the spec.

    Args:
        config: Megatron's settings of the model.
        block: the specs of all layers and of the last norm.
        layer_type_list: the kinds of the layers, one for each.
        rest: the other arguments of HybridStack.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        block: TransformerBlockSubmodules,
        layer_type_list: list[str],
        **rest: Any,
    ) -> None:
        # Megatron's own last norm is Transformer Engine's, under another name.
        rest |= {"submodules": HybridStackSubmodules(), "post_layer_norm": False}
        super().__init__(config, layer_type_list=[], **rest)
        assert len(block.layer_specs) == len(layer_type_list)
        self.layer_type_list = layer_type_list
        for index, spec in enumerate(block.layer_specs):
            layer = build_module(
                spec, config=config, layer_number=index + 1, pg_collection=self.pg_collection
            )
            self.layers.append(layer)
        self.num_layers_per_pipeline_rank = len(self.layers)
        self.final_layernorm = build_module(
            block.layer_norm,
            config=config,
            hidden_size=config.hidden_size,
            eps=config.layernorm_epsilon,
        )

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hidden states after the last norm, (S, B, H)."""
        hidden_SBH: torch.Tensor = self.final_layernorm(super().forward(*args, **kwargs))
        return hidden_SBH


class HybridLanguageModel(LanguageModel, HybridModel):
    """A HybridModel that ends with the hidden states.

    Args:
        config: Megatron's settings of the model.
        block: the specs of all layers and of the last norm.
        sizes: the other arguments, which GPTModel and HybridModel share.
    """

    def __init__(
        self, config: TransformerConfig, block: TransformerBlockSubmodules, **sizes: Any
    ) -> None:
        super().__init__(
            config=config,
            hybrid_stack_spec=ModuleSpec(module=DecoderStack, params={"block": block}),
            hybrid_layer_pattern=ATTENTION * config.num_layers,
            **sizes,
        )

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: None
    ) -> torch.Tensor:
        """Hidden states after the last norm, (S, B, H). HybridModel's own forward pass would go on
        to the logits.

        Args:
            input_ids: (B, S).
            position_ids: (B, S).
            attention_mask: None, because the layers are causal.
        """
        hidden_SBH: torch.Tensor = self.decoder(
            hidden_states=self.embedding(input_ids=input_ids, position_ids=position_ids),
            attention_mask=attention_mask,
            rotary_pos_emb=self.rotary_angles(input_ids.shape[1]),
        )
        return hidden_SBH
