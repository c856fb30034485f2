"""The verb evaluate: held-out perplexity of the dense model and of every mask, per domain, with the
protocol.
"""

from __future__ import annotations

from megamask import storage
from megamask.config import Config, RunPaths, run_paths
from megamask.data.heldout import heldout_windows
from megamask.data.shards import check_vocabulary
from megamask.errors import ConfigError
from megamask.evaluate.rows import DENSE, Rows, log, results
from megamask.masks.file import MaskSet
from megamask.masks.find import open_masks, own_weights
from megamask.model.checkpoint import read_note
from megamask.parallel.mesh import check_layout, start
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.mapping import linear_shapes


def run(config: Config) -> None:
    """Evaluate, write ``run_paths(config).results`` and log one line per row.

    Raises:
        MegamaskError: weights, shards or masks that are missing or do not fit, before anything is
            computed.
    """
    paths = run_paths(config)
    check_layout(config)
    storage.require_writable(paths.run_dir)
    fingerprint: str = read_note(paths.weights)["fingerprint"]
    arch = read_architecture(paths.weights)
    check_vocabulary(config, arch.vocab)
    masks = find_masks(config, paths, arch, fingerprint)
    section = config.evaluate
    windows = {
        domain: heldout_windows(config, domain, section.window, section.max_tokens)
        for domain in config.data.domains
    }
    with start(config) as mesh:
        rows = Rows(config, paths, arch, mesh, windows)
        measured = {DENSE: rows.dense()}
        measured |= {method: rows.masked(method, found) for method, found in masks.items()}
        if mesh.is_main:
            storage.write_json(paths.results, results(config, paths, masks, windows, measured))
            log.info("wrote %s", paths.results)


def find_masks(
    config: Config, paths: RunPaths, arch: Architecture, fingerprint: str
) -> dict[str, MaskSet]:
    """The masks to evaluate, by row name, each checked against the model.

    Raises:
        ArtifactError: a mask that is missing, torn, or for another model.
        ConfigError: a mask called dense.
    """
    if DENSE in config.evaluate.masks:
        raise ConfigError(
            "evaluate.masks",
            DENSE,
            "a name for the row other than that of the model without a mask",
            "Name it otherwise.",
        )
    known = [*config.prune.methods, "learned"]
    named = config.evaluate.masks or {
        method: str(paths.mask(method)) for method in known if paths.mask(method).exists()
    }
    masks = {name: open_masks(text, config, arch) for name, text in named.items()}
    for found in masks.values():
        found.check(shapes=linear_shapes(arch), fingerprint=fingerprint)
        own_weights(found, paths)
    return masks
