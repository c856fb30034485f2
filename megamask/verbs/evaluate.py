"""The verb evaluate: perplexity of the dense model and of every mask, and how far each masked model
is from the dense model, on the held-out documents of each domain or under a protocol of published
tables.
"""

from __future__ import annotations

from megamask import storage
from megamask.config import Config
from megamask.config.paths import DENSE, LEARNED, LEARNED_BEST
from megamask.data.heldout import evaluated_domains
from megamask.errors import ConfigError
from megamask.evaluate.measured_text import measured_text
from megamask.evaluate.rows import Rows, by_quantity, facts_beside, log
from megamask.masks.file import MaskSet
from megamask.masks.find import open_masks, own_weights, recovered_names
from megamask.masks.identity import row_name
from megamask.masks.verify import check_asked
from megamask.model.settled_masks import all_settled
from megamask.parallel.mesh import start
from megamask.prepare.layout import check_positions, evaluated_length
from megamask.prepare.learned_text import warn_of_learned_text
from megamask.prepare.run_inputs import RunInputs
from megamask.report.results_table import format_table
from megamask.terminal import tell
from megamask.weights.mapping import linear_shapes
from megamask.weights.model_identity import model_facts_of

ANY_PATTERN = "Masks that evaluate.masks names, as {learned: learned}, may have any pattern."


def run(config: Config) -> None:
    """Evaluate, write ``run_paths(config).results`` with the protocol, log one line per row, and
    print the table.

    Raises:
        MegamaskError: weights, shards or masks are missing or do not fit; found before anything is
            computed.
    """
    inputs = RunInputs(config)
    paths, length = inputs.paths, evaluated_length(config)
    if not config.evaluate.is_published:
        evaluated_domains(config)
    inputs.layout.check_lengths(config, (length,))
    storage.require_writable(paths.run_dir)
    masks = find_masks(inputs)
    inputs.layout.check_model(inputs.arch)
    check_positions(config, inputs.arch, (length,))
    text = measured_text(inputs)
    if not config.evaluate.is_published:
        warn_of_learned_text(config, masks)
    beside = facts_beside(paths, masks, text, linear_shapes(inputs.arch))
    beside |= model_facts_of(inputs.note)
    with start(config) as mesh:
        facts = {"masks": list(masks), "digests": beside["masks"], "weights": inputs.fingerprint}
        mesh.require_same("inputs", {**facts, "protocol": beside["protocol"]})
        rows = Rows(config, paths, inputs.arch, mesh, text)
        with all_settled(masks, paths.run_dir / "measuring", mesh) as held:
            measured = {DENSE: rows.dense()}
            measured |= {method: rows.masked(method, found) for method, found in held.items()}
        if mesh.is_main:
            results = by_quantity(measured) | beside
            storage.write_json(paths.results, results)
            log.info("wrote %s", paths.results)
            tell(format_table(results))


def find_masks(inputs: RunInputs) -> dict[str, MaskSet]:
    """The masks to evaluate, by row name, each checked against the model. The row of a recovered
    model says that it is one. Masks that ``evaluate.masks`` names may have any pattern; without,
    all have that of the settings, because an older mask of the run may have another.

    Raises:
        ArtifactError: a mask that is missing, torn, for another model or of another pattern.
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
    named = config.evaluate.masks
    if not named:  # a torn file of a recovered model that nobody asks for stops nothing
        known = [*config.prune.methods, LEARNED, *recovered_names(paths)]
        named = {method: str(paths.mask(method)) for method in known if paths.mask(method).exists()}
        others = {file.stem for file in paths.masks.glob("*.safetensors")} - {*named, LEARNED_BEST}
        if others:
            text = "not measured: %s; name them in prune.methods or evaluate.masks"
            log.info(text, ", ".join(sorted(others)))
    fingerprint, shapes = inputs.fingerprint, linear_shapes(inputs.arch)
    opened = {name: open_masks(text, config, inputs.arch) for name, text in named.items()}
    masks: dict[str, MaskSet] = {}
    named_by: dict[str, str] = {}
    for name, found in opened.items():
        row = row_name(name, found.meta)
        if row in masks:
            allowed = f"names of different rows, and {named_by[row]} and {name} are both {row}"
            raise ConfigError("evaluate.masks", name, allowed, "Name one of them otherwise.")
        masks[row], named_by[row] = found, name
    for found in masks.values():
        if not config.evaluate.masks:
            check_asked(found, inputs.arch, config, ANY_PATTERN)
        found.check(shapes=shapes, fingerprint=fingerprint)
        own_weights(found, paths)
    return masks
