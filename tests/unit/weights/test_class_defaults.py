"""What transformers does where a config.json is silent: an absent key means the default of the
class, and a name of an activation means its function.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.activations import ACT2FN

from megamask.model.activations import ACTIVATIONS
from megamask.weights.architecture import read_architecture
from megamask.weights.config_keys import GELUS, SIZES
from megamask.weights.families.registry import FAMILIES
from megamask.weights.family import Activation

LENGTH = "max_position_embeddings"
# Key of an old file -> its place within rope_parameters of transformers 5.
ROPES = {
    "rope_theta": ("rope_theta",),
    "partial_rotary_factor": ("partial_rotary_factor",),
    "rotary_pct": ("partial_rotary_factor",),
    "rope_local_base_freq": ("sliding_attention", "rope_theta"),
}


def default_of(model_type: str, key: str) -> Any:
    """The value that the class of transformers gives to an absent key."""
    more = {"use_sliding_window": True} if model_type.startswith("qwen") else {}
    config = AutoConfig.for_model(model_type, **more)  # without the switch a window is null
    if key not in ROPES:
        return getattr(config, key)
    value, place = config.rope_parameters, ROPES[key]
    if model_type == "gemma3_text" and key == "rope_theta":
        place = ("full_attention", *place)
    for name in place:
        value = value[name]
    return value


@pytest.mark.parametrize("name", list(FAMILIES))
def test_defaults_are_those_of_transformers(name: str) -> None:
    defaults, composite = FAMILIES[name].defaults, FAMILIES[name].composite
    text = composite.text if composite else name
    assert defaults == {key: default_of(text, key) for key in defaults}
    if composite:  # the head is tied as the whole config says
        assert defaults["tie_word_embeddings"] == default_of(name, "tie_word_embeddings")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_silent_file_means_what_transformers_would_write(tmp_path: Path, name: str) -> None:
    """A family may have forgotten a default: transformers writes out every one."""
    aliases = FAMILIES[name].aliases
    sizes = {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 12}
    sizes |= {"num_attention_heads": 64, "vocab_size": 1000}
    if LENGTH not in FAMILIES[name].defaults:
        sizes[LENGTH] = 512
    assert set(SIZES.values()) <= set(sizes)
    said: dict[str, Any] = {aliases.get(key, key): value for key, value in sizes.items()}
    if composite := FAMILIES[name].composite:
        said = {composite.section: said}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **said}))
    silent = read_architecture(tmp_path)
    AutoConfig.for_model(name, **said, dtype="float32").save_pretrained(tmp_path)
    written = read_architecture(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    if composite:
        whole, said = whole[composite.section], said[composite.section]
    assert len(whole) > len(said) + 8
    assert silent == written
    assert replace(silent, tied=not silent.tied) != written


@pytest.mark.parametrize("name", list(GELUS))
def test_the_names_of_a_gelu_are_those_of_transformers(name: str) -> None:
    """Rounding of fp64 alone is allowed; the two forms of a GELU differ by 5e-4."""
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    theirs = ACT2FN[name](x)
    other: Activation = "gelu_tanh" if GELUS[name] == "gelu" else "gelu"
    assert torch.allclose(ACTIVATIONS[GELUS[name]](x), theirs, rtol=0, atol=1e-10)
    assert not torch.allclose(ACTIVATIONS[other](x), theirs, rtol=0, atol=1e-4)
