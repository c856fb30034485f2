"""The registry of model families, by the ``model_type`` of config.json.

To add a family, write a file like ``granite.py`` beside this one and add a line here. The file says
how the keys of config.json become an ``Architecture``, and which names the tensors have. The
arithmetic of all families is in ``megamask.model.spec``, which knows architectures and no family.
"""

from __future__ import annotations

from megamask.weights.families.gemma import GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES
from megamask.weights.families.gpt2 import GPT2
from megamask.weights.families.gpt_neox import GPT_NEOX
from megamask.weights.families.granite import GRANITE
from megamask.weights.families.llama import LLAMA
from megamask.weights.families.mistral import MISTRAL
from megamask.weights.families.mixtral import MIXTRAL
from megamask.weights.families.nemotron import NEMOTRON
from megamask.weights.families.olmo2 import OLMO2
from megamask.weights.families.phi3 import PHI3
from megamask.weights.families.qwen import QWEN2, QWEN3
from megamask.weights.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from megamask.weights.families.smollm3 import SMOLLM3
from megamask.weights.families.stablelm import STABLELM
from megamask.weights.families.starcoder2 import STARCODER2
from megamask.weights.family import Family

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "phi3": PHI3,
    "granite": GRANITE,
    "stablelm": STABLELM,
    "nemotron": NEMOTRON,
    "starcoder2": STARCODER2,
    "gpt_neox": GPT_NEOX,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gemma3": GEMMA3_WITH_IMAGES,
    "olmo2": OLMO2,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
}
