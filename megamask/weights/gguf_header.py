"""The header of a GGUF file as the keys of a config.json.

Every key of the model in the header is read, or known to change nothing, or refused by name. The
keys of the tokenizer are read in ``gguf_tokenizer``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamask.errors import ArtifactError
from megamask.weights.family import Rope
from megamask.weights.frequencies import LLAMA3, scaled_frequencies

FIX = "Use a Hugging Face folder of the model, or a GGUF file that has no such feature."
# Keys that say nothing about the arithmetic, by their beginnings.
NOTES = ("general.", "tokenizer.", "quantize.", "GGUF.")
# Header key after the architecture's name -> key of config.json, in every family.
COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
# The sizes that every header needs.
SIZES = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count")
# Tokens of the tokenizer -> key of config.json.
TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
ROPE_FACTORS = "rope_freqs.weight"  # tensor of those divisors
EXACT = 1e-5  # relative; the divisors are fp32


@dataclass(frozen=True)
class GGUFFamily:
    """What is particular about the files of an architecture.

    Attributes:
        model_type: of config.json.
        keys: as ``COMMON``, more of them.
        permuted: the rows of queries and keys are in the order of llama.cpp's rotation.
        one_plus: the file holds 1 + weight of each norm, the model the weight.
        more: keys of config.json that follow from others.
    """

    model_type: str
    keys: Mapping[str, str]
    permuted: bool = False
    one_plus: bool = False
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}


def _gemma3(config: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp recognises the model of 27 billion weights by its 62 layers, and divides its
    scores by the root of hidden / heads in the place of the root of the head's width.
    """
    is_27b = config["num_hidden_layers"] == 62
    scale = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    return {"query_pre_attn_scalar": scale}


ARCHITECTURES = {
    "llama": GGUFFamily("llama", {}, permuted=True),
    "qwen2": GGUFFamily("qwen2", {}),
    "qwen3": GGUFFamily("qwen3", {}),
    "gemma3": GGUFFamily(
        "gemma3_text",
        {"attention.sliding_window": "sliding_window"},
        one_plus=True,
        more=_gemma3,
    ),
}


class Header:
    """The fields of a GGUF file.

    Args:
        fields: name -> value.
        path: the file, for messages.
    """

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self.fields, self.path = fields, path
        self.architecture = str(fields.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            problem = f"holds a {self.architecture} model"
            known = ", ".join(ARCHITECTURES)
            raise ArtifactError(path, problem, f"Use a GGUF file of one of {known}.")

    @property
    def family(self) -> GGUFFamily:
        """What is particular about the file's architecture."""
        return ARCHITECTURES[self.architecture]

    def config(self, vocab: int, tied: bool, factors: torch.Tensor | None) -> dict[str, Any]:
        """The keys of config.json.

        Args:
            vocab: rows of the embedding.
            tied: whether the file has no head of its own.
            factors: divisors of the rotary frequencies (rotated dimensions / 2,), if it has some.

        Raises:
            ArtifactError: a key is missing, or asks for a feature that is not built.
        """
        left = self._own_keys()
        keys = {**COMMON, **self.family.keys}
        config = {keys[name]: left.pop(name) for name in list(left) if name in keys}
        for name in SIZES:
            value = config.get(keys[name])
            if type(value) is not int or value < 1:
                raise self._refused(name, value, "a positive whole number is needed")
        heads = config["num_attention_heads"]
        config.setdefault("num_key_value_heads", heads)
        if config.setdefault("vocab_size", vocab) != vocab:
            raise self._refused("vocab_size", config["vocab_size"], f"there are {vocab} rows")
        rotated = left.get("rope.dimension_count")
        config.setdefault("head_dim", rotated or config["hidden_size"] // heads)
        for name in ("rope.dimension_count", "attention.value_length"):
            width = left.pop(name, None)
            if width not in (None, config["head_dim"]):
                raise self._refused(name, width, f"{config['head_dim']} is built")
        theta = config.pop("rope_theta", 10000.0)
        scaling = self._scaling(left, config["head_dim"], theta, factors)
        self._refuse(left)
        tokens = {
            key: self.fields[f"tokenizer.ggml.{name}_token_id"]
            for name, key in TOKENS.items()
            if f"tokenizer.ggml.{name}_token_id" in self.fields
        }
        config |= {"tie_word_embeddings": tied, **tokens, **self.family.more(config)}
        if self.architecture == "gemma3":
            local = {"rope_type": "default", "rope_theta": 10000.0}
            config["rope_parameters"] = {
                "full_attention": {**scaling, "rope_theta": theta},
                "sliding_attention": local,
            }
        else:
            config["rope_parameters"] = {**scaling, "rope_theta": theta}
        return config

    def _own_keys(self) -> dict[str, Any]:
        """The keys of the architecture without its name; others must be notes."""
        prefix, found = f"{self.architecture}.", {}
        for name, value in self.fields.items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = value
            elif not name.startswith((*NOTES, "split.")):
                raise self._refused(name, value, "megamask does not know this key")
        return found

    def _scaling(
        self, left: dict[str, Any], width: int, theta: float, factors: torch.Tensor | None
    ) -> dict[str, Any]:
        """The scaling of the rotary frequencies: of the header, or of the tensor of divisors."""
        kind = left.pop("rope.scaling.type", None)
        factor = left.pop("rope.scaling.factor", left.pop("rope.scale_linear", None))
        for note in ("rope.scaling.original_context_length", "rope.scaling.finetuned"):
            left.pop(note, None)
        if kind not in (None, "none", "linear"):
            raise self._refused("rope.scaling.type", kind, "only none and linear are built")
        linear = factor not in (None, 0, 1) and kind != "none"
        if factors is None:
            return {"rope_type": "linear", "factor": factor} if linear else {"rope_type": "default"}
        found = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
        scaled = {"type": "llama3", **{key: found[key] for key in found if key != "rope_type"}}
        plain = scaled_frequencies(width, Rope(theta))
        expected = plain / scaled_frequencies(width, Rope(theta, scaled))
        same = factors.shape == expected.shape and torch.allclose(factors, expected, rtol=EXACT)
        if linear or not same or self.architecture != "llama":
            problem = "its divisors are not those of Llama 3.1 to 3.3"
            raise self._refused(ROPE_FACTORS, f"{float(factors.max()):g} at most", problem)
        return found

    def _refuse(self, left: Mapping[str, Any]) -> None:
        """Refuse the keys that nobody read, but for values that mean nothing."""
        neutral: dict[str, tuple[Any, ...]] = {
            "attention.causal": (True,),
            "expert_count": (0,),
            "expert_used_count": (0,),
            "use_parallel_residual": (False,),
        }
        for name, value in left.items():
            if value not in neutral.get(name, ()):
                raise self._refused(name, value, "megamask does not read this key")

    def _refused(self, name: str, value: Any, problem: str) -> ArtifactError:
        return ArtifactError(self.path, f"has {name} = {value!r}: {problem}", FIX)
