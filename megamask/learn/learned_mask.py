"""The mask files of a learning run, and what they say about how they were learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.config import Config
from megamask.config.changed import Changed, write_changes
from megamask.config.published import SETTINGS_SHA256, settings_digest
from megamask.data.blend import blend_weights
from megamask.errors import MegamaskError
from megamask.learn.masked_model import MaskedModel
from megamask.masks.file import load_masks
from megamask.masks.header import Facts
from megamask.masks.identity import PRIOR_SHA256
from megamask.masks.save import save_codes
from megamask.model.mask_shards import gather_codes, hf_shapes
from megamask.parallel.mesh import Mesh

WINDOWS = "windows_sha256"  # of the evaluation in a header: what its perplexities are of


def save_learned_mask(
    path: Path,
    masked_model: MaskedModel,
    mesh: Mesh,
    data: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> None:
    """Write the hard mask of the model. All ranks must call this; the main rank writes.

    Args:
        path: the mask file.
        masked_model: the model whose logits are read.
        mesh: process groups of this rank.
        data: what the mask was learned from.
        evaluation: how good it is.
    """
    linears, arch = masked_model.linears, masked_model.arch
    codes_of = {name: linear.hard_codes for name, linear in linears.items()}
    distributions = {linear.site.distribution for linear in linears.values()}
    codes = gather_codes(codes_of, arch, mesh)
    if mesh.is_main:
        (distribution,) = distributions
        facts = Facts(
            masked_model.fingerprint,
            "learned",
            data=dict(data),
            evaluation=dict(evaluation),
            float16_fingerprints=masked_model.float16_fingerprints,
        )
        save_codes(
            path,
            hf_shapes(linears, arch),
            codes,
            distribution.index_of,
            masked_model.plan,
            facts,
        )
    for _ in codes:
        pass  # the other ranks take part in gathering
    mesh.barrier()


def learned_from(
    config: Config,
    text_sha256: Mapping[str, str],
    steps: int,
    prior: tuple[str, str] | None,
    changes: list[Changed],
) -> dict[str, Any]:
    """What the header of a mask file says about a run of ``steps`` steps, in which ``changes`` of
    the settings were made; ``text_sha256`` has the digest of each domain's training tokens, and
    ``prior`` says how the prior was made and has the digest of its masks. By the digest of the
    settings ``push`` knows whether ``learn/config.yaml`` is of this very mask.
    """
    budget = config.model.exclude_sensitive
    return {
        "blend": blend_weights(config),
        "text_sha256": dict(text_sha256),
        "seq_length": config.data.seq_length,
        "tokens": steps * config.learn.global_batch * config.data.seq_length,
        "prior": prior[0] if prior else None,
        **({PRIOR_SHA256: prior[1]} if prior else {}),
        "method": config.learn.method,
        **({"exclude_sensitive": budget} if budget else {}),
        SETTINGS_SHA256: settings_digest(config.model_dump(mode="json")),
        **write_changes(changes),
    }


def evaluation_of(path: Path, windows: str = "") -> tuple[int, dict[str, float]] | None:
    """The step of the evaluation in a mask file, and the perplexity of each domain, {} where it
    says none; None where there is no such file or evaluation.

    Args:
        path: the mask file.
        windows: digest of the windows that perplexities must be of; empty: of any.
    """
    try:
        evaluation = load_masks(path).meta.get("evaluation")
    except MegamaskError:
        return None
    known = evaluation if isinstance(evaluation, dict) else {}
    step, by_domain = known.get("step"), known.get("perplexity")
    if not isinstance(step, int):
        return None
    if not isinstance(by_domain, dict) or windows not in ("", known.get(WINDOWS)):
        return step, {}
    return step, by_domain
