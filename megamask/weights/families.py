"""The registry of model families, by the ``model_type`` of config.json.

To add a family, write a file like ``llama.py`` with two functions and add a line here:

- ``read(config, path)`` checks every key of config.json and returns an ``Architecture``;
- ``rules(arch, padded_vocab)`` returns the mapping table: a ``Rule`` for each Megatron tensor.

The arithmetic of the new family must be that of a Megatron GPTModel with the layer spec of
``megamask.model.spec``; the parity tests compare it with transformers.
"""

from __future__ import annotations

from megamask.weights.family import Family
from megamask.weights.llama import LLAMA

FAMILIES: dict[str, Family] = {"llama": LLAMA}
