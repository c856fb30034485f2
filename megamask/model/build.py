"""From an architecture to a frozen model of Megatron-Core whose linears can carry masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megamask.config import Config
from megamask.model.activations import ACTIVATIONS
from megamask.model.fused.seams import Fusions
from megamask.model.language_model import LanguageModel
from megamask.model.model_class import model_class
from megamask.model.rope import RotarySets, inverse_frequencies
from megamask.model.spec import block_spec
from megamask.model.vocabulary import VocabularyShard
from megamask.parallel.mask_context import MaskSwitch
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh
from megamask.sparsity.backends import choose_backend
from megamask.sparsity.distribution import Distribution
from megamask.sparsity.noise import parameter_ids
from megamask.sparsity.pattern import Pattern
from megamask.weights.architecture import Architecture
from megamask.weights.layer_plan import layer_plan
from megamask.weights.mapping import Rule, check_tp, rules

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RECOMPUTE: dict[bool | str, dict[str, Any]] = {  # parallel.recompute in Megatron's words
    False: {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    True: {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def padded_vocab(arch: Architecture, tp: int) -> int:
    """The size of the vocabulary, rounded up to a multiple of ``tp``."""
    return -(-arch.vocab // tp) * tp


def model_rules(arch: Architecture, tp: int) -> list[Rule]:
    """The mapping table of the model that ``build_model`` makes at this TP."""
    return rules(arch, padded_vocab(arch, tp))


def transformer_config(
    config: Config, arch: Architecture, mesh: Mesh, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's settings for a frozen model.

    Fusions that need a gradient buffer of the weight are off.
    """
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        add_bias_linear=False,  # the spec sets each linear's own bias
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm.eps,
        activation_func=ACTIVATIONS[arch.activation],
        gated_linear_unit=arch.gated,
        qk_layernorm=arch.qk_norm is not None,
        softmax_scale=arch.attention_scale,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=mesh.tp,
        sequence_parallel=config.parallel.sequence_parallel,
        use_cpu_initialization=mesh.device.type == "cpu",
        perform_initialization=False,  # weights are loaded
        gradient_accumulation_fusion=False,  # a masked linear sets it while main_grad is there
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        hetereogenous_dist_checkpoint=True,  # one checkpoint key a layer, so that layers may differ
        **RECOMPUTE[config.parallel.recompute],
        **Fusions.of(config, arch, mesh, dtype).settings(),
    )


def build_model(
    config: Config, arch: Architecture, mesh: Mesh, dtype: torch.dtype | None = None
) -> LanguageModel:
    """A frozen model on ``mesh.device`` with uninitialised weights.

    Args:
        config: the settings.
        arch: the architecture.
        mesh: process groups and device of this rank.
        dtype: dtype of the weights; None takes ``config.dtype``.

    Raises:
        ConfigError: the architecture does not split over this TP, or the environment asks for a
            class of models that the installed Megatron-Core lacks.
    """
    check_tp(arch, mesh.tp)
    settings = transformer_config(config, arch, mesh, dtype or DTYPES[config.dtype])
    model: LanguageModel = model_class()(
        config=settings,
        block=block_spec(arch, settings, mesh.device),
        vocab_size=padded_vocab(arch, mesh.tp),
        max_sequence_length=arch.max_positions,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope" if arch.ropes else "learned_absolute",
    ).to(mesh.device)
    if arch.ropes:
        frequencies = [inverse_frequencies(arch, rope).to(mesh.device) for rope in arch.ropes]
        model.rotary_pos_emb = RotarySets(frequencies)
    else:  # Megatron makes the table in fp32, whatever the dtype of the model
        model.embedding.position_embeddings.to(settings.params_dtype)
    model.logit_cap = arch.logit_cap
    rows = padded_vocab(arch, mesh.tp) // mesh.tp
    first = mesh.tp_rank * rows
    model.shard = VocabularyShard(first, min(max(arch.vocab - first, 0), rows), rows, mesh.tp_group)
    model.requires_grad_(False)
    if arch.embedding_scale != 1:
        scale = arch.embedding_scale
        if arch.rounds_embedding_scale:
            scale = torch.tensor(scale, dtype=settings.params_dtype).item()
        model.embedding.register_forward_hook(lambda module, inputs, output: output * scale)
    # A recomputed layer passes gradients on only if its input requires a gradient. The output of a
    # frozen embedding requires none, so the hook asks for it.
    if config.parallel.recompute:
        model.embedding.register_forward_hook(
            lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled())
        )
    return model


def masked_linears(model: torch.nn.Module) -> dict[str, MaskedLinear]:
    """The linears that can carry a mask, by Megatron name (``decoder.layers.3.mlp.linear_fc1``)."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)
    }


def prunable_linears(
    model: torch.nn.Module, config: Config, arch: Architecture
) -> dict[str, MaskedLinear]:
    """The linears that the settings leave to prune, by Megatron name."""
    chosen = set(layer_plan(arch, config))
    names = {
        rule.megatron.removesuffix(".weight")
        for rule in rules(arch)
        if rule.is_linear and chosen.intersection(rule.modules)
    }
    return {name: linear for name, linear in masked_linears(model).items() if name in names}


def attach_logits(
    linears: dict[str, MaskedLinear],
    patterns: Mapping[str, Pattern],
    backend: str,
    device: torch.device,
    distribution: Distribution,
    dtype: str = "fp32",
) -> MaskSwitch:
    """Give every linear zero mask logits, ``fp32`` or ``bf16``, and one common switch.

    Args:
        linears: by Megatron name.
        patterns: Megatron name -> pattern.
        backend: the setting ``learn.sampling.backend``.
        device: of the run.
        distribution: of the masks.
        dtype: of the logits.

    Raises:
        ConfigError: M does not divide a local row; the pattern is too large for the distribution;
            the backend cannot run here.
    """
    switch, chosen, ids = (
        MaskSwitch(),
        choose_backend(backend, device, distribution),
        parameter_ids(linears),
    )
    sites = {
        name: linear.make_site(patterns[name], name, distribution)
        for name, linear in linears.items()
    }
    for name, linear in linears.items():
        linear.attach_logits(sites[name], ids[name], switch, chosen, DTYPES[dtype])
    return switch
