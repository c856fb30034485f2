"""The keys of a config.json: each is read with its type, and the keys that nobody reads are
refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from megamask.errors import ConfigError
from megamask.weights.family import Activation, Architecture, Experts, Family, Layer, Rope
from megamask.weights.known_keys import HARMLESS, NEUTRAL

# The sizes that every architecture needs.
SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
}
MAX_LAYERS = 10_000
MAX_EXPERTS = 4096
ROPE_FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# The rotary embeddings of a model that has two of them.
ROPES = ("full_attention", "sliding_attention")
# Names that transformers has for a GELU; three are the tanh form, and differ in their
# rounding alone.
GELUS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
EXPERT_COUNTS = ("num_local_experts", "num_experts")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Meaning = TypeVar("Meaning")


class ConfigKeys:
    """A parsed config.json. Every reading method names the key in its error.

    An absent key has the default of the family's class in transformers. Null is not absent: it
    means what the caller of a method says.

    Args:
        config: the parsed file.
        path: the file, for messages.
        name: the family, for messages.
        family: its defaults, and the keys that change nothing.
        ignored: keys that the user lets through (``model.ignore_keys``).
        place: what stands before every key in messages and in ``ignored``: ``text_config.``, where
            ``config`` is that object of the file.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        path: Path,
        name: str,
        family: Family,
        ignored: Collection[str] = (),
        place: str = "",
    ) -> None:
        self._config, self._path, self._name, self._family = config, path, name, family
        self._place = place
        self._read: set[str] = set()
        self._ignored = frozenset(ignored)

    def architecture(self) -> Architecture:
        """Read everything.

        Raises:
            ConfigError: a key is missing, unknown or of another type, or changes the arithmetic in
                a way that is not built.
        """
        aliases = self._family.aliases
        sizes: dict[str, int] = {}
        for name, key in SIZES.items():
            factor = self._family.ffn_factor if name == "ffn" else None
            usual = None if factor is None else factor * sizes["hidden"]
            sizes[name] = self.whole(aliases.get(key, key), usual)
        heads = sizes["heads"]
        if sizes["num_layers"] > MAX_LAYERS:
            key = aliases.get(SIZES["num_layers"], SIZES["num_layers"])
            raise self.error(key, sizes["num_layers"], f"at most {MAX_LAYERS:,} layers are read")
        kv_heads = self.whole("num_key_value_heads", heads)
        if heads % kv_heads:
            problem = f"must divide num_attention_heads ({heads})"
            raise self.error("num_key_value_heads", kv_heads, problem)
        plain = Architecture(
            family=self._name,
            num_layers=sizes["num_layers"],
            hidden=sizes["hidden"],
            ffn=sizes["ffn"],
            heads=heads,
            vocab=sizes["vocab"],
            kv_heads=kv_heads,
            head_dim=self.whole("head_dim", max(sizes["hidden"] // heads, 1)),
            max_positions=self.whole(
                aliases.get("max_position_embeddings", "max_position_embeddings")
            ),
            tied=self.flag("tie_word_embeddings"),
            dtype=self._dtype(),
        )
        arch = self._family.read(self, plain)
        for rope in arch.ropes:
            if int(arch.head_dim * rope.share) % 2:  # transformers rotates one dimension more
                problem = f"rotates an odd number of the {arch.head_dim} dimensions of a head"
                raise self.error("the share of rotated dimensions", rope.share, problem)
        self.refuse_unread()
        return arch

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a key. An absent key has the family's default, else ``default``; a key that
        is null has ``default``.
        """
        self._read.add(key)
        value = self._config.get(key, self._family.defaults.get(key))
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number below 2^31."""
        value = self.value(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(key, value, "a positive whole number is needed")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        return self.positive(self.value(key, default), key)

    def positive(self, value: Any, shown: str) -> float:
        """A positive finite number of the key ``shown``."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(shown, value, "a positive number is needed")
        return float(value)

    def cap(self, key: str) -> float | None:
        """A positive number; null means no cap."""
        return None if self.value(key) is None else self.real(key)

    def window(self, key: str = "sliding_window") -> int | None:
        """Number of keys that a query sees; null means all."""
        return None if self.value(key) is None else self.whole(key)

    def one_window(self, plain: Architecture) -> tuple[Layer, ...]:
        """Layers that all have the window of ``sliding_window``."""
        return (Layer(window=self.window()),) * plain.num_layers

    def refuse_groups(self, plain: Architecture) -> None:
        """Refuse KV heads that several queries share, in a family that has none."""
        if plain.kv_heads != plain.heads:
            problem = f"the family {self._name} has a KV head for each of its {plain.heads} heads"
            raise self.error("num_key_value_heads", plain.kv_heads, problem)

    def flag(self, key: str) -> bool:
        """true or false; false where the family has no default."""
        value = self.value(key, False)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false is needed")
        return value

    def layer_windows(
        self, window: int | None, otherwise: Sequence[bool], rope: int | None = 0
    ) -> tuple[Layer, ...]:
        """The layers of a model whose ``layer_types`` says which have a window.

        Args:
            window: number of keys that a query of such a layer sees.
            otherwise: which layers have a window where the key is absent.
            rope: of every layer.
        """
        kinds = {"full_attention": False, "sliding_attention": True}
        limited = self.list_of("layer_types", kinds, len(otherwise)) or otherwise
        return tuple(Layer(rope, window if one else None) for one in limited)

    def choice(self, key: str, meanings: Mapping[str, Meaning]) -> Meaning:
        """The meaning of a value; other values are not built."""
        value = self.value(key)
        if not isinstance(value, str) or value not in meanings:
            raise self.error(key, value, f"only {' or '.join(map(repr, meanings))} is built")
        return meanings[value]

    def list_of(
        self, key: str, meanings: Mapping[Any, Meaning], count: int
    ) -> list[Meaning] | None:
        """``count`` values, one for each layer; None where the key is absent or null."""
        value = self.value(key)
        if value is None:
            return None
        allowed = ", ".join(map(repr, meanings))
        problem = f"a list of {count} values of {allowed} is needed"
        if not isinstance(value, list) or len(value) != count:
            raise self.error(key, value, problem)
        if any(not isinstance(one, str | int) or one not in meanings for one in value):
            raise self.error(key, value, problem)
        return [meanings[one] for one in value]

    def rope(
        self,
        theta_key: str = "rope_theta",
        share_key: str | None = None,
        inside: str | None = None,
        scaled: bool = True,
    ) -> Rope:
        """A rotary embedding. transformers 4 writes it as rope_theta and rope_scaling, transformers
        5 as rope_parameters.

        Args:
            theta_key: key of the base outside of these objects.
            share_key: key of the share of a head that is rotated; None builds whole heads only.
            inside: one of ``ROPES``, the name within rope_parameters, where there are two.
            scaled: whether rope_scaling is that of this embedding.
        """
        key = "rope_parameters" if "rope_parameters" in self._config else "rope_scaling"
        self._read.update(("rope_parameters", "rope_scaling"))
        old, given = self._config.get("rope_scaling"), self.value(key, {})
        if key == "rope_scaling" and not scaled:
            given = {}
        if key == "rope_parameters" and old is not None and old != given:
            raise self.error("rope_scaling", old, "disagrees with rope_parameters")
        if inside is not None and key == "rope_parameters":
            for name, value in given.items() if isinstance(given, dict) else ():
                if name not in ROPES and value is not None:
                    raise self.error(f"{key}.{name}", value, f"only {' and '.join(ROPES)} are read")
            key = f"{key}.{inside}"
            given = given.get(inside) if isinstance(given, dict) else None
            given = {} if given is None else given
        if not isinstance(given, dict):
            raise self.error(key, given, "an object is needed")
        rope = {name: value for name, value in given.items() if value is not None}
        theta = self._twice(rope, "rope_theta", theta_key, key)
        share = self._twice(
            rope, "partial_rotary_factor", share_key or "partial_rotary_factor", key
        )
        share = 1.0 if share is None else share
        shown = share_key or "partial_rotary_factor"
        if share_key is None and share != 1.0:
            raise self.error(
                f"{key}.{shown}" if shown in given else shown, share, "only 1.0 is built"
            )
        if self.positive(share, shown) > 1:
            raise self.error(shown, share, "at most 1.0")
        old_type = rope.pop("type", "default")
        kind = rope.pop("rope_type", old_type)
        factors = ROPE_FACTORS.get(kind) if isinstance(kind, str) else None
        if factors is None:
            allowed = f"only {', '.join(ROPE_FACTORS)} are built"
            raise self.error(f"{key}.rope_type", kind, allowed)
        for name in sorted(rope.keys() ^ set(factors)):
            problem = (
                "megamask does not know this key" if name in rope else f"rope type {kind} needs it"
            )
            raise self.error(f"{key}.{name}", rope.get(name), problem)
        for name in rope:
            self.positive(rope[name], f"{key}.{name}")
        theta = self.positive(10000.0 if theta is None else theta, theta_key)
        return Rope(theta, {"type": kind, **rope} if factors else None, float(share))

    def experts(self, ffn: int, renormalise: bool, shared_ffn: int | None = None) -> Experts:
        """The experts of a model. Their number has another name in some files of transformers 5
        than in those of transformers 4.
        """
        names = [name for name in EXPERT_COUNTS if self._config.get(name) is not None]
        names = names or [name for name in EXPERT_COUNTS if name in self._family.defaults]
        self._read.update(EXPERT_COUNTS)
        count = self.whole(names[0])
        if len(names) == 2 and self.whole(names[1]) != count:
            problem = f"disagrees with {names[0]} = {count}"
            raise self.error(names[1], self.value(names[1]), problem)
        if count > MAX_EXPERTS:
            raise self.error(names[0], count, f"at most {MAX_EXPERTS:,}")
        top_k = self.whole("num_experts_per_tok")
        if top_k > count:
            raise self.error("num_experts_per_tok", top_k, f"there are {count} experts")
        return Experts(count, top_k, ffn, renormalise, shared_ffn)

    def error(self, key: str, value: Any, problem: str) -> ConfigError:
        """The error of a key."""
        fix = (
            "Point model.hf at a plain checkpoint of a supported family, "
            f"or correct {self._path} if the key has no effect there."
        )
        return ConfigError(f"config.json: {self._place}{key}", value, problem, fix)

    def _twice(self, rope: dict[str, Any], inner_key: str, outer_key: str, place: str) -> Any:
        """A value that may stand inside and outside of an object, and must then be the same."""
        inner, outer = rope.pop(inner_key, None), self._config.get(outer_key)
        self._read.add(outer_key)
        if inner is not None and outer is not None and inner != outer:
            raise self.error(outer_key, outer, f"disagrees with {place}.{inner_key} = {inner}")
        if inner is None and outer is None:
            return self._family.defaults.get(outer_key)
        return outer if inner is None else inner

    def _dtype(self) -> torch.dtype:
        self._read.update(("dtype", "torch_dtype"))
        key = "dtype" if self._config.get("dtype") is not None else "torch_dtype"
        name = str(self.value(key, "float32")).removeprefix("torch.")
        older = self._config.get("torch_dtype")
        if older is not None and str(older).removeprefix("torch.") != name:
            raise self.error("torch_dtype", older, f"disagrees with dtype = {name}")
        if name not in DTYPES:
            raise self.error(key, name, f"one of {', '.join(DTYPES)}")
        return DTYPES[name]

    def refuse_unread(self) -> None:
        """Refuse the keys that nobody has read and that may change the arithmetic.

        Raises:
            ConfigError: the first such key.
        """
        own = self._family.neutral
        neutral = {key: NEUTRAL.get(key, ()) + own.get(key, ()) for key in {*NEUTRAL, *own}}
        known = self._read | HARMLESS | self._family.harmless
        for key, value in self._config.items():
            if value is None or key in known:
                continue
            shown = f"{self._place}{key}"
            if key not in neutral and shown in self._ignored:
                continue
            if key not in neutral:
                raise ConfigError(
                    f"config.json: {shown}",
                    value,
                    "megamask does not know this key, so it cannot tell what it changes",
                    f"If it changes nothing, set model.ignore_keys=[{shown}]; "
                    "otherwise this model is not supported.",
                )
            if value not in neutral[key]:
                allowed = " or ".join(map(repr, neutral[key])) or "null"
                problem = f"only {allowed} is built for the family {self._name}"
                raise self.error(key, value, problem)
