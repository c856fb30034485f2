"""The verb convert: a Hugging Face folder, or a checkpoint of Megatron-LM, becomes the Megatron
weights of a run, tensor by tensor, at any TP.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from megamask import storage
from megamask.config import Config, run_paths
from megamask.errors import MegamaskError
from megamask.model.build import padded_vocab
from megamask.model.checkpoint import read_note
from megamask.model.streamed_weights import save_streamed
from megamask.parallel.mesh import start
from megamask.prepare.layout import Layout
from megamask.safe_checkpoint import NOTE, read_index
from megamask.weights.base_model import BaseModel, base_model
from megamask.weights.fingerprint import fingerprints_of
from megamask.weights.model_identity import (
    FILES,
    architecture_facts,
    difference,
    files_of,
    identity_note,
    is_complete,
)

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Write ``run_paths(config).weights`` in the dtype of the source, unless the folder holds this
    model already.

    Raises:
        ConfigError: the model has a feature that is not supported, or its heads do not split over
            ``parallel.tp``.
        ArtifactError: a file is missing or does not fit config.json, or the output cannot be
            written.
    """
    paths = run_paths(config)
    base = base_model(config)
    arch = base.architecture()
    # The model comes first: a tensor parallel size that its heads forbid needs no processes.
    Layout.planned(config, dp=1).check_model(arch)
    Layout.launched(config)
    storage.require_writable(paths.run_dir)
    with base.open() as reader, start(config) as mesh:
        note: dict[str, object] = {
            "dtype": str(arch.dtype).removeprefix("torch."),
            "padded_vocab": padded_vocab(arch, mesh.tp),
        }
        linears = {"fingerprint": fingerprints_of(reader, arch).exact}
        mesh.require_same("inputs", {**note, **linears, "config.json": architecture_facts(arch)})
        note["source"] = str(base.place)
        if mesh.from_main(mesh.is_main and _is_done(paths.weights, base, note)):
            if mesh.is_main:
                log.info("%s already holds this model", paths.weights)
            return
        begin = time.perf_counter()
        if mesh.is_main:
            note |= identity_note(base, reader)
        with base.config_file() as config_file:
            weights = save_streamed(reader, arch, paths.weights, mesh, note, files=[config_file])
        if mesh.is_main:
            seconds = time.perf_counter() - begin
            what = "wrote %s: %.0f M parameters in %s, %.1f s"
            log.info(what, paths.weights, weights / 1e6, arch.dtype, seconds)


def _is_done(weights: Path, base: BaseModel, note: dict[str, object]) -> bool:
    """Whether the folder holds the model already. Where its files were moved or touched and hold
    what they held, the note gets their new places and times, so that no verb reads them again.
    """
    try:
        found = read_note(weights)
        read_index(weights)
    except MegamaskError as error:
        if weights.exists():
            log.info("%s is made again: %s", weights, error)
        return False
    if any(found.get(key) != note[key] for key in ("dtype", "padded_vocab")):
        return False
    if not is_complete(found, base):
        log.info("%s was converted by a version that noted less of the model", weights)
        return False
    if problem := difference(found, base):
        log.info("%s: the model %s than the converted one", weights, problem)
        return False
    if found[FILES] != (files := files_of(base)):
        storage.write_json(weights / NOTE, {**found, "source": note["source"], FILES: files})
    return True
