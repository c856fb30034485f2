"""The language model on Megatron's GPTModel, which every version of Megatron-Core has so far."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.model.language_model import LanguageModel


class GptLanguageModel(LanguageModel, GPTModel):
    """A GPTModel that ends with the hidden states.

    Args:
        config: Megatron's settings of the model.
        block: the specs of all layers and of the last norm.
        sizes: the other arguments, which GPTModel and HybridModel share.
    """

    def __init__(
        self, config: TransformerConfig, block: TransformerBlockSubmodules, **sizes: Any
    ) -> None:
        super().__init__(config=config, transformer_layer_spec=block, **sizes)

    def _postprocess(self, *, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Megatron calls this method after the last layer (by keyword from 0.14 on) to make logits
        or a loss; this model returns the hidden states as they are.
        """
        return hidden_states
