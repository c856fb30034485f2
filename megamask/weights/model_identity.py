"""Which model a run, a mask or a number is of: the one rule for "the same model".

A model is the fingerprint of its linears (``fingerprint``), a digest of every other tensor, and the
facts of its config.json. The verb convert writes them into the note beside the weights of a run.
Whoever computes on the weights or hands the model out compares the model of the settings with this
note, and results, masks and snapshots have the note's ``model_sha256``. Notes of older versions
hold less; what both sides have is compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from megamask.config.nested import what_differs
from megamask.weights.base_model import BaseModel
from megamask.weights.family import Architecture
from megamask.weights.file_layout import file_layout
from megamask.weights.fingerprint import fingerprints_of
from megamask.weights.mapping import expected_tensors, linear_shapes
from megamask.weights.other_tensors import digest_of
from megamask.weights.source import WeightSource

FINGERPRINT = "fingerprint"  # keys of the note
UNMASKED = "unmasked_tensors"  # digest of the tensors of the text part that can have no mask
OTHERS = "other_tensors"  # digest of what lies beside the text part
ARCHITECTURE = "architecture"
FILES = "source_files"  # path -> [size, time of the last change] of the files that were read
MODEL = "model_sha256"  # key of what results, masks and snapshots have of the note
# Of an Architecture: names in files, the dtype of the note, and how transformers' class of the
# family rounds a factor.
NO_FACTS = ("family", "dtype", "rounds_embedding_scale")
OTHER_PARTS = "other norms, embedding, head or config.json"  # where the fingerprints are equal
WHAT = {
    UNMASKED: "norms, embedding, head or biases",
    OTHERS: "tensors beside its text part",
}


def architecture_facts(arch: Architecture) -> dict[str, Any]:
    """What decides the arithmetic of a model, as JSON values. The defaults are neutral and are left
    out, so a field that a later version adds changes nothing of older models.
    """
    layers = [_facts(arch.layer(index)) for index in range(arch.num_layers)]
    plain = {key: one for key, one in _facts(arch).items() if key not in NO_FACTS}
    facts: dict[str, Any] = json.loads(json.dumps({**plain, "layers": layers}))
    return facts


def _facts(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_facts(one) for one in value]
    if not is_dataclass(value):
        return value
    found = {}
    for field in fields(value):
        one = getattr(value, field.name)
        if field.default is MISSING or one != field.default:
            found[field.name] = _facts(one)
    return found


def identity_note(base: BaseModel, source: WeightSource) -> dict[str, Any]:
    """The part of a note that tells which model was converted. All tensors that can have no mask
    are read, such as the embedding.

    Args:
        base: the model.
        source: its weights.
    """
    files, arch = files_of(base), base.architecture()
    found = fingerprints_of(source, arch)
    note: dict[str, Any] = {
        FINGERPRINT: found.exact,
        "float16_fingerprints": list(found.float16),
        ARCHITECTURE: architecture_facts(arch),
        FILES: files,
    }
    names = _names(arch, source)
    return note | {key: digest_of(source, some) for key, some in names.items()}


def difference(note: Mapping[str, Any], base: BaseModel) -> str:
    """What of a model is not as its note says, as a predicate; "" where the model is the same. The
    tensors are read only if a file is another one, or was changed, since the note was written;
    those of a folder that has lost its weights are not compared.

    Raises:
        ConfigError, ArtifactError: see ``BaseModel.open``.
    """
    if _is_untouched(note, base):
        return ""
    arch, known = base.architecture(), note.get(ARCHITECTURE)
    if isinstance(known, dict) and (facts := architecture_facts(arch)) != known:
        keys = sorted(key for key in {*known, *facts} if known.get(key) != facts.get(key))
        return f"has another config.json ({', '.join(keys)})"
    if not base.has_weights():
        return ""
    with base.open() as source:
        if (found := fingerprints_of(source, arch).exact) != note[FINGERPRINT]:
            return f"has other weights (fingerprint {found[:12]}, not {note[FINGERPRINT][:12]})"
        for key, names in _names(arch, source).items():
            if key in note and digest_of(source, names) != note[key]:
                return f"has other {WHAT[key]}"
    return ""


def _is_untouched(note: Mapping[str, Any], base: BaseModel) -> bool:
    """Whether all files are those of the note. A GGUF file that the settings do not name, or that
    is no longer there, may be missing: the folder that was unpacked from it is compared.
    """
    if base.gguf is not None and not base.gguf.is_file():
        base.check_gguf()
    known, now = note.get(FILES), files_of(base)
    if not isinstance(known, dict) or not now.items() <= known.items():
        return False
    return all(path.endswith(".gguf") for path in known.keys() - now.keys())


def files_of(base: BaseModel) -> dict[str, list[int]]:
    """Path -> size in bytes and time of the last change, of the files that decide a model."""
    found = {}
    for path in base.files():
        about = path.stat()
        found[str(path.absolute())] = [about.st_size, about.st_mtime_ns]
    return found


def is_complete(note: Mapping[str, Any], base: BaseModel) -> bool:
    """Whether a note has all that a note of this version has of the model."""
    has_others = bool(file_layout(base.architecture()).others)
    wanted = (FINGERPRINT, UNMASKED, ARCHITECTURE, *((OTHERS,) if has_others else ()))
    return all(key in note for key in wanted)


def model_facts_of(note: Mapping[str, Any]) -> dict[str, str]:
    """The digest of a model, under its key, from the note beside its weights; {} where an older
    version wrote the note. What lies beside the text part is not in it: masks, and numbers that
    text gives, are of the text part.
    """
    known = [note.get(key) for key in (FINGERPRINT, UNMASKED, ARCHITECTURE)]
    if None in known:
        return {}
    return {MODEL: hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()}


def recipe_differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between two records of what a result was made from, as ``what_differs`` says it.
    The digest of the model is compared where both have it: records of older versions have the
    fingerprint alone.
    """
    if None in (found.get(MODEL), wanted.get(MODEL)):
        records = (found, wanted)
        found, wanted = ({key: each[key] for key in each if key != MODEL} for each in records)
    return what_differs(found, wanted)


def is_model_of(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two records name one model; a record that names none fits every model."""
    either = (found.get(MODEL), wanted.get(MODEL))
    return None in either or either[0] == either[1]


def _names(arch: Architecture, source: WeightSource) -> dict[str, list[str]]:
    """Key of the note -> names of the tensors of which it has the digest."""
    weights = {f"{name}.weight" for name in linear_shapes(arch)}
    found = {UNMASKED: [name for name in expected_tensors(arch) if name not in weights]}
    layout = file_layout(arch)
    if layout.others:
        found[OTHERS] = [name for name in source.names() if layout.is_other(name)]
    return found
