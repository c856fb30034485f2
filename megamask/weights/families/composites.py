"""Models of several parts whose text part is a model of a family of its own.

The names are those of the published files, which transformers writes too:
``language_model.model.layers…`` for the text part, ``vision_tower…`` and ``multi_modal_projector…``
for the rest. Files of training programs, which hold the names of the modules in memory, begin with
``model.`` and have the head outside.
"""

from __future__ import annotations

from dataclasses import replace

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Architecture, Composite, Family

TEXT = "language_model."
OTHERS = ("vision_tower.", "multi_modal_projector.")
IN_MEMORY = {  # of transformers 4.52 and newer
    f"{TEXT}model.": f"model.{TEXT}",
    f"{TEXT}lm_head.": "lm_head.",
    **{beginning: f"model.{beginning}" for beginning in OTHERS},
}


def with_images(family: Family, text: str, keys: frozenset[str]) -> Family:
    """The family of models whose text part has an image tower and a projector beside it, with the
    names of LLaVA.

    Args:
        family: of the text part.
        text: its ``model_type``.
        keys: keys of config.json that say nothing of the text part.
    """
    names = family.names

    def read(keys: ConfigKeys, plain: Architecture) -> Architecture:
        found = family.read(keys, plain)
        if found.logit_cap is not None:
            problem = "null for a model with images: transformers does not apply it there"
            raise keys.error("final_logit_softcapping", found.logit_cap, problem)
        return found

    return replace(
        family,
        read=read,
        names=replace(
            names,
            embedding=f"{TEXT}{names.embedding}",
            layer=f"{TEXT}{names.layer}",
            final_norm=f"{TEXT}{names.final_norm}",
            head=f"{TEXT}{names.head}",
        ),
        composite=Composite(text, keys, OTHERS, (IN_MEMORY,)),
    )
