"""Masks of another tool become a mask file, after every mask was compared with the base model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from megamask.errors import ArtifactError
from megamask.masks import codec
from megamask.masks.foreign.kind import FIX, Base
from megamask.masks.foreign.kinds import kind_of
from megamask.masks.header import Facts
from megamask.masks.save import save_words
from megamask.masks.times import forget_seconds
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.base_model import BaseModel
from megamask.weights.layer_plan import patterns_of
from megamask.weights.mapping import linear_shapes

log = logging.getLogger(__name__)


def import_masks(
    source: Path, out: Path, model: BaseModel, pattern: str, overrides: Mapping[str, str]
) -> None:
    """Write the masks of ``source`` as a mask file; nothing is written unless all of them fit.

    Args:
        source: file or folder of another tool, see ``masks.foreign.kinds``.
        out: the mask file.
        model: the base model.
        pattern: the setting ``pattern``: what every mask must have.
        overrides: the setting ``pattern_overrides``: of linears with another pattern.

    Raises:
        ConfigError: the settings do not fit the model.
        ArtifactError: the source or the base model is damaged, or they do not fit each other.
    """
    kind = kind_of(source)
    arch = model.architecture()
    shapes = linear_shapes(arch)
    plan = patterns_of(arch, pattern, overrides, shapes)
    words: dict[str, codec.Words] = {}
    with model.open() as weights:
        base = Base(arch, weights, plan, tuple(model.ignore_keys))
        for name, mask_OI in kind.read(source, base):
            own = plan[name]
            try:
                bits = own.bits_of(mask_OI)
                words[name] = codec.pack(bits, own.num_candidates, own.index_of_bits)
            except ValueError:
                problem = f"does not keep {own.in_words} of {name}"
                fix = f"Set --pattern to its pattern, if that is not {own}."
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
    save_words(out, {name: shapes[name] for name in words}, words.items(), plan, facts)
    found = PatternPlan({name: plan[name] for name in words})
    log.info("imported %s masks of %d linears from %s to %s", found, len(words), source, out)
