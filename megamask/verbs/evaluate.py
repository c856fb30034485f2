"""The verb evaluate: held-out perplexity of the dense model and of every mask, for each domain."""

from __future__ import annotations

from megamask import storage
from megamask.config import Config
from megamask.data.heldout import evaluated_domains, evaluation_windows
from megamask.errors import ConfigError
from megamask.evaluate.rows import DENSE, Rows, facts_beside, log
from megamask.masks.file import MaskSet
from megamask.masks.find import open_masks, own_weights
from megamask.parallel.mesh import start
from megamask.prepare.layout import check_positions
from megamask.prepare.run_inputs import RunInputs
from megamask.weights.mapping import linear_shapes


def run(config: Config) -> None:
    """Evaluate, write ``run_paths(config).results`` with the protocol, and log one line per row.

    Raises:
        MegamaskError: weights, shards or masks are missing or do not fit; found before anything is
            computed.
    """
    inputs = RunInputs(config)
    paths = inputs.paths
    evaluated_domains(config)
    inputs.layout.check_lengths(config, ("evaluate.window",))
    storage.require_writable(paths.run_dir)
    masks = find_masks(inputs)
    inputs.layout.check_model(inputs.arch)
    check_positions(config, inputs.arch, ("evaluate.window",))
    inputs.check_vocabulary()
    windows = evaluation_windows(config, config.evaluate.max_tokens)
    beside = facts_beside(config, paths, masks, windows)
    with start(config) as mesh:
        mesh.require_same("masks to evaluate", list(masks))
        rows = Rows(config, paths, inputs.arch, mesh, windows)
        measured = {DENSE: rows.dense()}
        measured |= {method: rows.masked(method, found) for method, found in masks.items()}
        if mesh.is_main:
            storage.write_json(paths.results, {"perplexity": measured, **beside})
            log.info("wrote %s", paths.results)


def find_masks(inputs: RunInputs) -> dict[str, MaskSet]:
    """The masks to evaluate, by row name, each checked against the model.

    Raises:
        ArtifactError: a mask that is missing, torn, or for another model.
        ConfigError: a mask called dense.
    """
    config, paths = inputs.config, inputs.paths
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
    fingerprint, shapes = inputs.fingerprint, linear_shapes(inputs.arch)
    masks = {name: open_masks(text, config, inputs.arch) for name, text in named.items()}
    for found in masks.values():
        found.check(shapes=shapes, fingerprint=fingerprint)
        own_weights(found, paths)
    return masks
