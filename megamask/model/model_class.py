"""Which class of Megatron a model is made of: GPTModel, or HybridModel where GPTModel is gone.

Megatron-Core 0.19 deprecates GPTModel in favour of HybridModel. Parameters, weights on disk,
snapshots and masks are the same with either. MEGAMASK_MODEL_CLASS=hybrid in the environment takes
HybridModel where both are there, and MEGAMASK_MODEL_CLASS=gpt insists on GPTModel.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from megamask.errors import ConfigError
from megamask.megatron_range import installed_version
from megamask.model.language_model import LanguageModel

VARIABLE = "MEGAMASK_MODEL_CLASS"
MODELS = "megatron.core.models."  # where Megatron has its models

Maker = Callable[..., LanguageModel]  # called with ``config``, ``block`` and the sizes


def _gpt() -> Maker:
    from megamask.model.gpt_backbone import GptLanguageModel

    return GptLanguageModel


def _hybrid() -> Maker:
    from megamask.model.hybrid_backbone import HybridLanguageModel

    return HybridLanguageModel


CLASSES: dict[str, Callable[[], Maker]] = {"gpt": _gpt, "hybrid": _hybrid}  # first choice first


def model_class() -> Maker:
    """The class of language models.

    Raises:
        ConfigError: the installed Megatron-Core lacks the class that the environment asks for, or
            both classes.
    """
    asked = os.environ.get(VARIABLE)
    if asked is not None and asked not in CLASSES:
        allowed = f"{' or '.join(CLASSES)}, in the environment"
        raise ConfigError(VARIABLE, asked, allowed, "Unset it.")
    for find in CLASSES.values() if asked is None else [CLASSES[asked]]:
        try:
            return find()
        except ImportError as error:
            if not (error.name or "").startswith(MODELS):
                raise  # Megatron has the class, and something else is missing
    problem = f"a class that Megatron-Core {installed_version()} has; this version lacks it"
    raise ConfigError(VARIABLE, asked, problem, "Unset it, or install megatron-core 0.19.")
