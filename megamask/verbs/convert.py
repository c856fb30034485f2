"""The verb convert: a Hugging Face folder, or a checkpoint of Megatron-LM, becomes the Megatron
weights of a run, tensor by tensor, at any TP.
"""

from __future__ import annotations

import logging
import time

from megamask import storage
from megamask.config import Config, run_paths
from megamask.errors import MegamaskError
from megamask.model.build import padded_vocab
from megamask.model.checkpoint import OTHER_TENSORS, read_note
from megamask.model.streamed_weights import save_streamed
from megamask.parallel.mesh import start
from megamask.prepare.layout import Layout
from megamask.weights.base_model import base_model
from megamask.weights.fingerprint import fingerprints_of

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
        found = fingerprints_of(reader, arch)
        note: dict[str, object] = {
            "fingerprint": found.exact,
            "float16_fingerprints": list(found.float16),
            "dtype": str(arch.dtype).removeprefix("torch."),
            "padded_vocab": padded_vocab(arch, mesh.tp),
        }
        mesh.require_same("inputs", note)
        note["source"] = str(base.place)
        others = base.other_tensors() if mesh.is_main else None
        if others is not None:
            note[OTHER_TENSORS] = others
        if mesh.from_main(_is_done(config, note)):
            if mesh.is_main:
                log.info("%s already holds this model", paths.weights)
            return
        begin = time.perf_counter()
        with base.config_file() as config_file:
            weights = save_streamed(reader, arch, paths.weights, mesh, note, files=[config_file])
        if mesh.is_main:
            seconds = time.perf_counter() - begin
            what = "wrote %s: %.0f M parameters in %s, %.1f s"
            log.info(what, paths.weights, weights / 1e6, arch.dtype, seconds)


def _is_done(config: Config, note: dict[str, object]) -> bool:
    try:
        found = read_note(run_paths(config).weights)
    except MegamaskError:
        return False
    keys = ("fingerprint", "dtype", "padded_vocab", OTHER_TENSORS)
    return all(found.get(key) == note.get(key) for key in keys)
