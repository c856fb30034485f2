"""A GGUF file to a plain Hugging Face folder in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megamask.errors import ArtifactError
from megamask.file_kinds import GGUF, file_kind, require_file, wrong_file
from megamask.machine_errors import reading
from megamask.storage import atomic_dir, file_sha256, read_json, require_writable, write_json
from megamask.terminal import tell
from megamask.weights.hf_files import require_own, share

STAMP = "megamask_gguf.json"  # this file in the new folder names the GGUF file
# The settings of a Llama that a GGUF file can carry. The loaded config also holds settings that
# only the loader needs.
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def unpack(source: Path, out: Path) -> None:
    """Write the model and tokenizer of the GGUF file ``source`` to ``out``.

    Raises:
        ArtifactError: the file is missing or is no GGUF file of a Llama, or ``out`` holds other
            files.
    """
    stamp = _stamp(source)
    require_own(out, STAMP, "model.hf")
    if (out / STAMP).exists() and read_json(out / STAMP, f"Remove {out}.") == stamp:
        tell(f"{out}: already unpacked from {source.name}")
        return
    require_writable(out.parent, "model.hf")
    model, tokenizer = _load(source)
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            fix = "Use a GGUF file that was made from a whole model."
            raise ArtifactError(source, f"{name} holds numbers that are not finite", fix)
    with atomic_dir(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        share(folder)
        write_json(folder / STAMP, stamp)
    weights = sum(parameter.numel() for parameter in model.parameters())
    tell(f"{out}: {weights:,} weights in bf16 from {source.name}")


def _stamp(source: Path) -> dict[str, str]:
    fix = "Point model.gguf at a GGUF file."
    require_file(source, GGUF, fix)
    with reading(source, fix):
        if (kind := file_kind(source)) is None or kind.what != GGUF:
            raise wrong_file(source, GGUF, fix)
        return {"file": source.name, "sha256": file_sha256(source)}


def _load(source: Path) -> tuple[LlamaForCausalLM, Any]:
    where = {"gguf_file": source.name, "local_files_only": True}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    except Exception as error:  # the loaders raise errors of many types, also bare Exception
        raise ArtifactError(
            source,
            f"cannot be loaded as a GGUF model ({error})",
            "Use a GGUF file of a Llama model.",
        ) from error
    if loaded.config.model_type != "llama":
        raise ArtifactError(
            source, f"holds a {loaded.config.model_type} model", "Use a GGUF file of a Llama model."
        )
    # A new model carries no settings of the GGUF loader, so save_pretrained writes a plain folder.
    settings = loaded.config.to_dict()
    config = LlamaConfig(
        **{key: settings[key] for key in KEPT if key in settings}, dtype=torch.bfloat16
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    return model, tokenizer
