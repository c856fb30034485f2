"""A GGUF file to a plain Hugging Face folder in bf16, one tensor at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megamask.errors import ArtifactError, MegamaskError
from megamask.file_kinds import GGUF, file_kind, require_file, wrong_file
from megamask.machine_errors import explained, reading
from megamask.storage import atomic_dir, file_sha256, read_object, write_json
from megamask.terminal import tell
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.families.registry import FAMILIES
from megamask.weights.file_stream import Streamed
from megamask.weights.gguf_header import ARCHITECTURES, ROPE_FACTORS, Header
from megamask.weights.gguf_layout import GGUF_STAMP, read_layout
from megamask.weights.gguf_tokenizer import HeaderTokenizer
from megamask.weights.hf_files import open_checked, write_tensors
from megamask.weights.licences import copy_licences
from megamask.weights.mapping import expected_tensors
from megamask.weights.own_folder import check_output, own_files
from megamask.weights.source import all_finite

log = logging.getLogger(__name__)
FIX = "Point model.gguf at a GGUF file."
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
TOKENIZER = 2  # a folder whose stamp has another number has another tokenizer


def unpack(source: Path, out: Path) -> None:
    """Write the model and tokenizer of the GGUF file ``source`` to ``out``.

    Raises:
        ArtifactError: the file is missing, is no GGUF file of a supported model or asks for a
            feature that is not built, or ``out`` holds other files.
        MegamaskError: the machine does not let it be read, or lacks the memory.
    """
    _require_gguf(source)
    read_layout(source, ARCHITECTURES)  # before the file is hashed, which takes long
    if not (out / GGUF_STAMP).exists():
        check_output(out, GGUF_STAMP, "model.hf")
    stamp = {"file": source.name, "sha256": _sha256(source), "tokenizer": TOKENIZER}
    if _is_done(out, stamp):
        tell(f"{out}: already unpacked from {source.name}")
        return
    check_output(out, GGUF_STAMP, "model.hf")
    fields, stored = _read(source)
    header = Header(fields, source)
    if EMBEDDING not in stored:
        raise _damaged(source, f"misses {EMBEDDING}")
    factors = stored.pop(ROPE_FACTORS, None)
    config = header.config(
        vocab=int(stored[EMBEDDING].shape[-1]),
        tied=HEAD not in stored,
        factors=None if factors is None else _values(factors),
    )
    biases = {
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
    }
    model_type = header.family.model_type
    if model_type == "llama":
        config |= biases
    tokenizer = HeaderTokenizer(fields, source)
    weights = 0
    with atomic_dir(out) as folder:
        names = {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]}
        settings = AutoConfig.for_model(model_type, **config, **names, dtype=torch.bfloat16)
        settings.save_pretrained(folder)
        GenerationConfig.from_model_config(settings).save_pretrained(folder)
        arch = read_architecture(folder)
        places = _places(arch, stored, source)
        tokenizer.write(folder)  # before the tensors, which take long
        write_tensors(folder, _tensors(arch, header, places, source))
        copy_licences(source.parent, folder, is_of_model=False)
        write_json(folder / GGUF_STAMP, {**stamp, **own_files(folder)})
        weights = sum(int(np.prod(shape)) for shape in expected_tensors(arch).values())
    tell(f"{out}: {weights:,} weights in bf16 from {source.name}")


def _require_gguf(source: Path) -> None:
    require_file(source, GGUF, FIX)
    with reading(source, FIX):
        if (kind := file_kind(source)) is None or kind.what != GGUF:
            raise wrong_file(source, GGUF, FIX)


def _sha256(source: Path) -> str:
    with reading(source, FIX):
        return file_sha256(source)


def _is_done(out: Path, stamp: Mapping[str, Any]) -> bool:
    """Whether a folder was made from the same file, and is whole.

    Raises:
        ArtifactError: the stamp of the folder cannot be read.
    """
    if not (out / GGUF_STAMP).exists():
        return False
    made = read_object(out / GGUF_STAMP, f"Remove {out}.", {})
    if not stamp.items() <= made.items():
        return False
    files = made.get("files")
    lost = [str(one) for one in files or () if not (out / str(one)).is_file()]
    try:
        with open_checked(out):
            problem = f"{lost[0]} is missing" if lost else ""
    except MegamaskError as error:
        problem = str(error)
    if problem:
        log.info("%s is not whole, and is unpacked again: %s", out, problem)
    return not problem


def _read(source: Path) -> tuple[dict[str, Any], dict[str, ReaderTensor]]:
    """The fields, and the tensors, which stay on the disk."""
    try:
        reader = GGUFReader(source)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises errors of many types
        problem = f"cannot be read as a GGUF file ({error})"
        raise explained(error) or _damaged(source, problem) from error
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _damaged(source: Path, problem: str) -> ArtifactError:
    return ArtifactError(source, problem, "Use a GGUF file that was made from a whole model.")


def _places(
    arch: Architecture, stored: dict[str, ReaderTensor], source: Path
) -> dict[str, ReaderTensor]:
    """HF name -> tensor of the file.

    Raises:
        ArtifactError: the file holds other tensors or shapes than the model.
    """
    left, places = dict(stored), {}
    for hf, shape in expected_tensors(arch).items():
        name = _gguf_name(arch, hf)
        tensor = left.pop(name, None)
        if tensor is None:
            raise _damaged(source, f"misses {name}")
        found = tuple(int(size) for size in reversed(tensor.shape))
        if found != shape:
            raise _damaged(source, f"{name} has the shape {found}, not {shape}")
        places[hf] = tensor
    if left:
        problem = f"holds tensors that no part of the model reads: {', '.join(list(left)[:3])}"
        raise ArtifactError(source, problem, "Use a Hugging Face folder of the model.")
    return places


def _gguf_name(arch: Architecture, hf: str) -> str:
    """The name of an HF tensor in a GGUF file, which has the same names for all families."""
    names = FAMILIES[arch.family].names
    stem, _, leaf = hf.rpartition(".")
    whole = {names.embedding: "token_embd", names.final_norm: "output_norm", names.head: "output"}
    if stem in whole:
        return f"{whole[stem]}.{leaf}"
    parts = {names.attention_norm: "attn_norm", names.out: "attn_output", names.down: "ffn_down"}
    parts |= dict(zip(names.qkv, ("attn_q", "attn_k", "attn_v"), strict=True))
    parts |= dict(zip(names.up, ("ffn_gate", "ffn_up"), strict=True))
    parts |= {names.query_norm: "attn_q_norm", names.key_norm: "attn_k_norm"}
    if arch.post_norms:
        parts |= {names.attention_post_norm: "post_attention_norm"}
        parts |= {names.mlp_post_norm: "post_ffw_norm"}
    parts |= {names.mlp_norm: "ffn_norm"}
    before, _, after = names.layer.partition("{}")
    number, _, part = stem.removeprefix(before).partition(after)
    return f"blk.{number}.{parts[part]}.{leaf}"


def _tensors(
    arch: Architecture, header: Header, places: dict[str, ReaderTensor], source: Path
) -> Iterator[tuple[str, Streamed]]:
    """The tensors as the model has them, in bf16, each decoded when it is written."""
    shapes = expected_tensors(arch)
    for hf, tensor in places.items():
        decode = partial(_decoded, arch, header, hf, tensor, source)
        yield hf, Streamed(shapes[hf], torch.bfloat16, decode)


def _decoded(
    arch: Architecture, header: Header, hf: str, tensor: ReaderTensor, source: Path
) -> tuple[torch.Tensor]:
    """A tensor as the model has it.

    Raises:
        ArtifactError: it holds numbers that are not finite.
    """
    values = _values(tensor)
    if not all_finite(values):
        raise _damaged(source, f"{hf} holds numbers that are not finite")
    if header.family.permuted and ".attn_q." in tensor.name:
        values = _unpermuted(values, arch.heads)
    if header.family.permuted and ".attn_k." in tensor.name:
        values = _unpermuted(values, arch.kv_heads)
    if header.family.one_plus and tensor.name.endswith("norm.weight"):
        values = values - 1
    return (values,)


def _values(tensor: ReaderTensor) -> torch.Tensor:
    """The numbers of a tensor in fp32."""
    plain = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(plain, dtype=np.float32))


def _unpermuted(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of transformers: llama.cpp rotates neighbours, transformers the halves of a
    head.
    """
    pairs = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)
