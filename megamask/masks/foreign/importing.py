"""Masks of another tool become a mask file, after every mask was compared with the base model."""

from __future__ import annotations

import logging
from pathlib import Path

from megamask.errors import ArtifactError
from megamask.masks import codec
from megamask.masks.foreign.kind import FIX, Base
from megamask.masks.foreign.kinds import kind_of
from megamask.masks.header import Facts
from megamask.masks.save import save_words
from megamask.masks.times import forget_seconds
from megamask.sparsity.pattern import Pattern
from megamask.weights.base_model import BaseModel
from megamask.weights.mapping import linear_shapes

log = logging.getLogger(__name__)


def import_masks(source: Path, out: Path, model: BaseModel, pattern: Pattern) -> None:
    """Write the masks of ``source`` as a mask file; nothing is written unless all of them fit.

    Args:
        source: file or folder of another tool, see ``masks.foreign.kinds``.
        out: the mask file.
        model: the base model.
        pattern: the pattern that every mask must have.

    Raises:
        ArtifactError: the source or the base model is damaged, or they do not fit each other.
    """
    kind = kind_of(source)
    arch = model.architecture()
    shapes = linear_shapes(arch)
    words: dict[str, codec.Words] = {}
    with model.open() as weights:
        base = Base(arch, weights, pattern, tuple(model.ignore_keys))
        for name, mask_OI in kind.read(source, base):
            try:
                bits = pattern.bits_of(mask_OI)
                words[name] = codec.pack(bits, pattern.num_candidates, pattern.index_of_bits)
            except ValueError:
                problem = f"does not keep {pattern.in_words} of {name}"
                fix = f"Set --pattern to its pattern, if that is not {pattern}."
                raise ArtifactError(source, problem, fix) from None
    if not words:
        raise ArtifactError(source, "prunes no linear of the base model", FIX)
    if missing := [name for name in shapes if name not in words]:
        some = ", ".join(missing[:3]) + (" and others" if len(missing) > 3 else "")
        log.warning("%d linears have no mask and stay dense: %s", len(missing), some)
    prints = model.fingerprints()
    about = {"imported": {"kind": kind.name, "from": source.name}}
    facts = Facts(prints.exact, kind.name, about, float16_fingerprints=prints.float16)
    forget_seconds(out)
    save_words(out, {name: shapes[name] for name in words}, words.items(), pattern, facts)
    log.info("imported %s masks of %d linears from %s to %s", pattern, len(words), source, out)
