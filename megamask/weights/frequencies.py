"""The frequencies of a rotary embedding, as its scaling changes them."""

from __future__ import annotations

import math

import torch

from megamask.weights.family import Rope

# The constants of Llama 3.1 to 3.3. A GGUF holds only the divisors that follow from them, and
# Megatron-Core has them in its code.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def scaled_frequencies(width: int, rope: Rope) -> torch.Tensor:
    """The inverse frequencies of ``width`` dimensions, (width / 2,) fp32, scaled as
    ``rope.scaling`` says.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    plain = 1.0 / (rope.theta**exponent)
    scaling = rope.scaling
    if scaling is None:
        return plain
    factor = scaling["factor"]
    return plain / factor if scaling["type"] == "linear" else _llama3(plain, scaling)


def _llama3(plain: torch.Tensor, scaling: dict[str, float]) -> torch.Tensor:
    """The scaling of Llama 3.1 ("llama3" in transformers).

    Low frequencies are divided by the factor, high frequencies are kept, and frequencies between
    both are a blend.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    # The number of periods within the original context.
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - blend) + plain * blend
