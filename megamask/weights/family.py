"""The facts of a model family: the numbers that fix its arithmetic, and the names in its files.

Every default is neutral: an ``Architecture`` with the defaults is a plain Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from megamask.weights.config_keys import ConfigKeys


@dataclass(frozen=True)
class Norm:
    """A norm over the hidden states.

    Attributes:
        kind: ``rms`` divides by the root mean square, ``layer`` also subtracts the mean.
        eps: added to the mean square.
        plus_one: the factor is 1 + weight in the place of weight.
        bias: whether a bias is added.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    plus_one: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Rope:
    """A rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        scaling: None, or ``{"type": "linear", "factor": f}``, or ``{"type": "llama3"}`` with the
            keys ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
            ``original_max_position_embeddings``.
        share: share of each head that is rotated, from its first dimension on.
    """

    theta: float = 10000.0
    scaling: dict[str, Any] | None = field(default=None, hash=False)
    share: float = 1.0


@dataclass(frozen=True)
class Experts:
    """The feed-forward parts of a layer that is a mixture of experts.

    A router gives every expert a probability, softmax(x W^T) in fp32, and a token is computed by
    the experts of the largest probabilities, which are the factors of their outputs.

    Attributes:
        count: number of experts.
        top_k: number of experts that compute a token.
        ffn: width of an expert.
        renormalise: whether the factors of a token are divided by their sum.
        shared_ffn: width of the expert that computes every token, whose output has the factor
            sigmoid(x g); None for no such expert.
    """

    count: int
    top_k: int
    ffn: int
    renormalise: bool
    shared_ffn: int | None = None


@dataclass(frozen=True)
class Layer:
    """The facts in which layers of a model differ.

    Attributes:
        rope: index of the layer's rotary embedding in ``Architecture.ropes``; None rotates nothing.
        window: number of keys that a query sees, its own included; None lets it see all before it.
        experts: whether the feed-forward part is ``Architecture.experts``.
    """

    rope: int | None = 0
    window: int | None = None
    experts: bool = False


Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]


@dataclass(frozen=True)
class Architecture:
    """The numbers and choices that fix the arithmetic of a decoder, in one form for every family.

    Attributes:
        family: key of ``megamask.weights.families.registry.FAMILIES``.
        ffn: width of the feed-forward part.
        max_positions: number of positions; a table of positions has so many rows.
        tied: whether the head shares the weight of the embedding.
        norm: every norm of the model.
        ropes: the rotary embeddings; none means a learned table of positions.
        layers: the facts of each layer; empty means that all are ``Layer()``.
        attention_bias: whether the projections of queries, keys and values have a bias.
        attention_out_bias: whether the output projection of the attention has a bias.
        mlp_bias: whether the linears of the feed-forward part have biases.
        activation: the nonlinearity of the feed-forward part; ``gelu`` is exact.
        gated: whether the activation of one projection multiplies another projection.
        experts: those of the layers that have experts; None where no layer has.
        pre_norms: whether the inputs of attention and feed-forward part are normalised.
        post_norms: whether their outputs are normalised before the residual sum.
        qk_norm: norm of queries and keys: per ``head``, or over ``all heads`` together.
        attention_scale: factor of the attention scores; None is 1 / sqrt(head_dim).
        attention_cap: scores become cap * tanh(score / cap).
        logit_cap: the same for the logits.
        logit_scale: factor of the logits.
        embedding_scale: factor of the embedding's output.
        rounds_embedding_scale: whether this factor has the dtype of the weights (bf16: 25.25 for
            25.298), as in transformers' classes of the family.
        residual_scale: factor of the outputs of attention and feed-forward part.
        parallel_residual: attention and feed-forward part read the same residual stream.
        dtype: the dtype that the config names.
    """

    family: str
    num_layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool
    norm: Norm = Norm()
    ropes: tuple[Rope, ...] = (Rope(),)
    layers: tuple[Layer, ...] = ()
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    gated: bool = True
    experts: Experts | None = None
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: Literal["head", "all heads"] | None = None
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    rounds_embedding_scale: bool = False
    residual_scale: float = 1.0
    parallel_residual: bool = False
    dtype: torch.dtype = torch.float32

    def layer(self, index: int) -> Layer:
        """The facts of a layer."""
        return self.layers[index] if self.layers else Layer(rope=0 if self.ropes else None)

    def widths(self) -> dict[str, int]:
        """The widths of the feed-forward parts that the model has, by name."""
        of_layers = {self.layer(index).experts for index in range(self.num_layers)}
        found = {"intermediate_size": self.ffn} if False in of_layers else {}
        if self.experts is not None:
            found["the width of an expert"] = self.experts.ffn
            if self.experts.shared_ffn is not None:
                found["shared_expert_intermediate_size"] = self.experts.shared_ffn
        return found

    def experts_of(self, index: int) -> Experts | None:
        """The experts of a layer; None where its feed-forward part is dense."""
        return self.experts if self.layer(index).experts else None


@dataclass(frozen=True)
class Names:
    """Names in the files of a family; Llama's are the defaults. ``{}`` is the number of the layer.

    Several names are separate tensors that Megatron fuses, a single name is fused in the file.

    Attributes:
        positions: the learned table of positions.
        layer: what the names of a layer begin with; the names up to ``down`` follow it.
        qkv: queries, keys and values.
        qkv_by_head: the rows of the fused tensor are [query; key; value] of every head in turn,
            which is Megatron's order.
        up: [gate; up] of a gated feed-forward part, else the first linear.
        mlp_norm: the norm before the feed-forward part.
        router: of a layer with experts.
        expert: what the names of an expert begin with; ``{}`` is the number of the expert.
        shared_expert: what the names of the expert of every token begin with.
        shared_gate: the factor of that expert.
        expert_up, expert_down: as ``up`` and ``down``, of every expert.
        attention_post_norm, mlp_post_norm: norms before the residual sums.
        transposed: the file holds the weights of linears as (in_features, out_features).
        prefix: beginning of the names that some files leave out.
        buffers: endings of tensors in old files that follow from the config.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    layer: str = "model.layers.{}."
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_by_head: bool = False
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    shared_expert: str = "mlp.shared_expert."
    shared_gate: str = "mlp.shared_expert_gate"
    expert_up: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"
    mlp_post_norm: str = "post_feedforward_layernorm"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    transposed: bool = False
    prefix: str = ""
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Composite:
    """What a model holds beside its text part, which is a model of a family: an image tower, say.
    The text part gets masks; the other tensors pass through.

    Attributes:
        text: ``model_type`` of the text part.
        section: key of config.json that holds the config of the text part.
        keys: keys of config.json that say nothing of the text part.
        others: beginnings of the names of the other tensors; every such beginning has tensors.
        spellings: other spellings of the names, as of another version of transformers: beginning of
            names of ours -> beginning in such files.
    """

    text: str
    keys: frozenset[str]
    others: tuple[str, ...]
    spellings: tuple[Mapping[str, str], ...] = ()
    section: str = "text_config"


@dataclass(frozen=True)
class Family:
    """A model family: its names, and how its config.json is read.

    Attributes:
        read: ``read(keys, plain)`` returns the architecture. ``plain`` holds what the common keys
            say (sizes, tied, dtype); ``keys`` gives the others and remembers which were read.
        names: the names in the files.
        defaults: key -> value that an absent key has in the family's class of transformers.
        neutral: key that can change the arithmetic -> the values that leave it unchanged; null
            always does.
        harmless: keys of the family's published models that change nothing.
        aliases: common key -> its name in this family.
        ffn_factor: width of the feed-forward part over the hidden width, where the file has no
            width; None needs the file's.
        composite: what surrounds the text part, of which all the other attributes are; None where
            the model is the text part alone.
    """

    read: Callable[[ConfigKeys, Architecture], Architecture]
    names: Names = Names()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    ffn_factor: int | None = None
    composite: Composite | None = None
