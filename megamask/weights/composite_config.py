"""The config.json of a model of several parts: the config of its text part is an object within."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megamask.weights.config_keys import ConfigKeys
from megamask.weights.family import Family

DTYPES = ("dtype", "torch_dtype")
TIED = "tie_word_embeddings"


def text_section(
    config: Mapping[str, Any],
    path: Path,
    name: str,
    family: Family,
    ignore_keys: Collection[str] = (),
) -> dict[str, Any]:
    """The config of the text part, with the facts that stand outside of it.

    The dtype of the whole file is that of the text part. So is whether the head is tied, which
    transformers 5 asks of the whole config and not of its text part.

    Args:
        config: the parsed file.
        path: the file, for messages.
        name: the family, for messages.
        family: of the text part, with what surrounds it.
        ignore_keys: unknown keys that the user lets through.

    Raises:
        ConfigError: there is no such object, it is of another family, both disagree, or a key
            outside of it is unknown.
    """
    composite = family.composite
    assert composite is not None
    about = Family(family.read, defaults={TIED: family.defaults.get(TIED)}, harmless=composite.keys)
    outside = ConfigKeys(config, path, name, about, ignore_keys)
    text = outside.value(composite.section)
    if not isinstance(text, dict):
        raise outside.error(composite.section, text, "an object is needed: the text part's config")
    found = text.get("model_type", composite.text)
    if found != composite.text:
        key = f"{composite.section}.model_type"
        raise outside.error(key, found, f"only {composite.text} is built within {name}")
    tied = outside.flag(TIED)
    if text.get(TIED, tied) != tied:
        problem = f"disagrees with {TIED} = {str(tied).lower()} of the whole model"
        raise outside.error(f"{composite.section}.{TIED}", text[TIED], problem)
    dtypes = {key: config[key] for key in DTYPES if outside.value(key) is not None}
    outside.refuse_unread()
    own = {key: value for key, value in text.items() if not dtypes or key not in DTYPES}
    return {**own, TIED: tied, **dtypes}
