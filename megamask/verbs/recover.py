"""The verb recover: new values of the weights that a mask keeps, as a model of its own: a mask
file with its weights, and a Hugging Face folder. All say that the model is recovered.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megamask import storage
from megamask.config import Config
from megamask.data.heldout import evaluated_domains, evaluation_windows, heldout_digests
from megamask.errors import ConfigError, MegamaskError
from megamask.evaluate.rows import not_finite_outputs
from megamask.evaluate.sensitivity import whole_masks
from megamask.export.folded import STAMP
from megamask.export.masked_folder import export
from megamask.masks.file import MaskSet, load_masks, save_masks
from megamask.masks.find import mask_path, open_masks, own_weights
from megamask.masks.identity import (
    OF_ANOTHER_RUN,
    RECOVERED,
    recipe_of,
    recovered_label,
    recovery_of,
)
from megamask.masks.verify import check_asked, check_strictly
from megamask.model.build import build_model, masked_linears
from megamask.model.checkpoint import float16_fingerprints, load_weights
from megamask.model.mask_shards import linear_rules, mask_shard
from megamask.model.perplexity import perplexity
from megamask.model.settled_masks import settled
from megamask.model.updated_weights import save_updated
from megamask.parallel.mesh import Mesh, start
from megamask.prepare.layout import check_positions
from megamask.prepare.learned_text import MASK_TEXT, TEXT, warn_of_learned_text
from megamask.prepare.run_inputs import RunInputs
from megamask.recovery.recoveries import RECOVERIES
from megamask.recovery.recovery import Recovered, Recovery, RecoveryJob
from megamask.recovery.unfinished import Unfinished
from megamask.safe_checkpoint import read_index
from megamask.terminal import tell
from megamask.weights.base_model import BaseModel, base_model
from megamask.weights.fingerprint import fingerprints_of
from megamask.weights.mapping import linear_shapes
from megamask.weights.model_identity import model_facts_of, recipe_differs
from megamask.weights.own_folder import check_output
from megamask.weights.side_files import check_side_files

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """Recover the weights that ``recover.mask`` keeps, and write ``masks/MASK-METHOD.safetensors``
    and ``weights-MASK-METHOD``, unless they were made from the same inputs and settings, and the
    folder ``recover.out``.

    Raises:
        ConfigError, ArtifactError: a setting, a layout, the mask, the model or the text does not
            fit, or an output cannot be written; found before the first layer where possible.
    """
    inputs, recovery = RunInputs(config), RECOVERIES[config.recover.method]
    recovery.check_early(inputs)
    paths, base = inputs.paths, base_model(config)
    lengths = _lengths(config, recovery)
    inputs.layout.check_lengths(config, lengths)
    masks = whole_masks(open_masks(config.recover.mask, config, inputs.arch), "recover.mask")
    check_asked(masks, inputs.arch, config)
    masks.check(shapes=linear_shapes(inputs.arch), fingerprint=inputs.fingerprint)
    inputs.layout.check_model(inputs.arch)
    inputs.layout.check_rows(inputs.arch, masks.patterns)
    check_positions(config, inputs.arch, lengths)
    inputs.check_text()
    check_strictly(masks, base)
    one = Task.of(inputs, base, masks, recovery)
    one.require_free_name()
    check_output(one.out, STAMP, "recover.out", base)
    check_side_files(base.hf_dir)
    storage.require_writable(paths.masks)
    windows = _heldout(config)
    if windows:
        warn_of_learned_text(config, {config.recover.mask: masks})
    with start(config) as mesh:
        facts = {"weights": inputs.fingerprint, **one.made_from}
        facts |= {"held-out text": heldout_digests(config)} if windows else {}
        mesh.require_same("inputs", facts)
        if not mesh.from_main(one.is_done()):
            _recover(one, mesh, windows)
        mesh.barrier()
        is_main = mesh.is_main
    if is_main:  # the other ranks are through: none waits for the files of a large model
        shutil.rmtree(one.unfinished, ignore_errors=True)  # of a run that was killed at its end
        one.export()
        _tell(one)


@dataclass(frozen=True)
class Task:
    """A recovery and where its results go.

    Attributes:
        inputs: the inputs of the run.
        base: the base model.
        masks: the mask that stays.
        recovery: the method.
        name: of the result: its mask file, its weights and its folder.
        out: the Hugging Face folder.
        made_from: everything that decides the result, as JSON values.
        is_of_another_run: whether the mask lies outside the run, where a mask of the run may have
            its name.
    """

    inputs: RunInputs
    base: BaseModel
    masks: MaskSet
    recovery: Recovery
    name: str
    out: Path
    made_from: dict[str, Any]
    is_of_another_run: bool

    @classmethod
    def of(cls, inputs: RunInputs, base: BaseModel, masks: MaskSet, recovery: Recovery) -> Task:
        """With the names that follow from mask and method.

        Raises:
            MegamaskError: text that is missing.
        """
        config, section, paths = inputs.config, inputs.config.recover, inputs.paths
        place = storage.real_path(mask_path(section.mask, paths))
        is_own, source = place.is_relative_to(storage.real_path(paths.run_dir)), place.stem
        name = f"{source}-{section.method}"
        facts = {
            "method": section.method,
            "mask": source,
            "mask_method": masks.method,
            "mask_sha256": masks.content_sha256,
            "settings": {key: getattr(section, key) for key in recovery.reads},
            "dtype": config.dtype,
        }
        of_mask = recipe_of(masks.meta)
        if read := {key: of_mask[key] for key in TEXT if key in of_mask}:
            facts[MASK_TEXT] = read
        out = paths.recovered if section.out else paths.recovered / name
        made_from = {**recovery.text(config), **model_facts_of(inputs.note), RECOVERED: facts}
        plain = storage.as_read(made_from)
        return cls(inputs, base, masks, recovery, name, out, plain, not is_own)

    def require_free_name(self) -> None:
        """Check that no result of another mask would be replaced. A mask of the run that was made
        anew replaces its own result.

        Raises:
            ConfigError: a mask of this run and a mask of another run have one name.
        """
        try:
            about = recovery_of(self.written().meta)
        except MegamaskError:
            return
        before, now = (one.get("mask_sha256") for one in (about, self.made_from[RECOVERED]))
        if before != now and (self.is_of_another_run or about.get(OF_ANOTHER_RUN)):
            source = self.made_from[RECOVERED]["mask"]
            name = f"another name than {source}"
            allowed = f"a mask file with {name}: {self.mask_file} belongs to another mask"
            fix = "Copy the mask file to another name, or delete that result first."
            raise ConfigError("recover.mask", self.inputs.config.recover.mask, allowed, fix)

    @property
    def mask_file(self) -> Path:
        """The mask file, which is written after the weights that it belongs to."""
        return self.inputs.paths.mask(self.name)

    @property
    def weights(self) -> Path:
        """The Megatron weights."""
        return self.inputs.paths.updated_weights(self.name)

    @property
    def unfinished(self) -> Path:
        """The folder of finished parts, until the whole is done."""
        return self.inputs.paths.run_dir / f"recovering-{self.name}"

    @property
    def wanted(self) -> dict[str, Any]:
        """``made_from``, and the model of the run: a mask may have been made on a copy of it in
        another dtype.
        """
        return {**self.made_from, "fingerprint": self.inputs.fingerprint}

    def written(self) -> MaskSet:
        """The written mask file. Raises ArtifactError where there is none."""
        return load_masks(self.mask_file)

    def is_done(self) -> bool:
        """Whether mask and weights were made from the same inputs and settings; the log says what
        differs.
        """
        try:
            found = self.written()
            found.verify()
            own_weights(found, self.inputs.paths)
            read_index(self.weights)
            made_from = {**recipe_of(found.meta), "fingerprint": found.fingerprint}
        except (MegamaskError, KeyError, TypeError, AttributeError, ValueError):
            return False
        other = recipe_differs(made_from, self.wanted)
        said = f"made from other {other}: made again" if other else "reused"
        log.info("%s: %s", self.mask_file, said)
        return not other

    def export(self) -> None:
        """Write the folder, also where an earlier run has written it: what lies beside the weights
        of the base model, such as a chat template, is that of today.

        Raises:
            ArtifactError: it cannot be written.
        """
        with self.base.of_weights(self.weights, "Run the verb recover again.") as source:
            export(self.base, self.out, source, self.written())


def _lengths(config: Config, recovery: Recovery) -> tuple[str, ...]:
    """The settings with the lengths of all sequences that run through the model: those of the
    method, and the windows on which its result is measured.
    """
    return (*recovery.lengths(), *(("evaluate.window",) if _holds_out(config) else ()))


def _holds_out(config: Config) -> bool:
    return any(corpus.heldout for corpus in config.data.domains.values())


def _heldout(config: Config) -> dict[str, torch.Tensor]:
    """The held-out windows that the verb evaluate takes; {} where no domain holds out text."""
    if not _holds_out(config):
        return {}
    evaluated_domains(config)
    return evaluation_windows(config, config.evaluate.max_tokens)


@torch.no_grad()
def _recover(one: Task, mesh: Mesh, windows: Mapping[str, torch.Tensor]) -> None:
    """Recover, measure and write mask and weights."""
    inputs, begin = one.inputs, time.perf_counter()
    config, arch, note = inputs.config, inputs.arch, inputs.note
    model = build_model(config, arch, mesh)
    load_weights(model, inputs.paths.weights)
    model.eval()
    unfinished = Unfinished(one.unfinished, one.wanted, mesh)
    one = replace(one, masks=settled(one.masks, one.unfinished / "mask.safetensors", mesh))
    table, shards, linears = linear_rules(arch), {}, {}
    for name, linear in masked_linears(model).items():
        if (mask_OI := mask_shard(one.masks, table[name], mesh)) is not None:
            shards[name], linears[name] = mask_OI.cpu(), linear
    plan, dtype = one.masks.patterns, getattr(torch, note["dtype"])
    job = RecoveryJob(config, mesh, arch, plan, model, linears, shards, dtype, unfinished)
    if mesh.is_main:
        log.info("%s: %s on %d linears", one.name, plan, len(linears))

    def measure(weights: str) -> dict[str, float]:
        model.eval()
        batch = config.evaluate.micro_batch
        found = {name: perplexity(model, mesh, rows, batch) for name, rows in windows.items()}
        if mesh.is_main and found:
            log.info("%-18s %s", weights, _shown(found))
        for domain in (name for name, value in found.items() if math.isnan(value)):
            raise not_finite_outputs(inputs.paths.weights, domain, weights)
        return found

    for name, linear in linears.items():
        linear.fold(shards[name])
    evaluation: dict[str, Any] = {"window": config.evaluate.window, "frozen": measure("frozen")}
    for linear in linears.values():
        linear.fold(None)
    found = one.recovery.recover(job)
    for name, linear in linears.items():
        linear.folded_weight = found.weights_OI[name].to(linear.weight)
    evaluation |= {"perplexity": measure("recovered"), **found.measured}
    _write(one, mesh, found, shards, evaluation, time.perf_counter() - begin)
    unfinished.finish()


def _write(
    one: Task,
    mesh: Mesh,
    found: Recovered,
    shards: Mapping[str, torch.Tensor],
    evaluation: Mapping[str, Any],
    seconds: float,
) -> None:
    """Write the weights, then the mask file. An older mask file goes first: it does not belong to
    the new weights.
    """
    inputs, masks = one.inputs, one.masks
    if mesh.is_main:
        one.mask_file.unlink(missing_ok=True)
    mesh.barrier()
    note = {**inputs.note, "method": one.name, "recipe": one.made_from}
    save_updated(
        inputs.config, inputs.arch, mesh, found.weights_OI, one.weights, note, masks_OI=shards
    )
    if not mesh.is_main:
        return
    with one.base.of_weights(one.weights, "Run the verb recover again.") as source:
        weights = fingerprints_of(source, inputs.arch).exact
    about = {**one.made_from[RECOVERED], "weights": weights}
    if one.is_of_another_run:
        about[OF_ANOTHER_RUN] = True
    data = {**one.made_from, RECOVERED: about}
    save_masks(
        one.mask_file,
        masks,
        masks.patterns,
        fingerprint=inputs.fingerprint,
        method=one.name,
        data=data,
        evaluation=evaluation,
        updated_weights=True,
        float16_fingerprints=float16_fingerprints(inputs.note),
        seconds=seconds,
    )
    log.info("wrote %s and %s, %.1f s", one.mask_file, one.weights, seconds)


def _shown(by_domain: Mapping[str, float]) -> str:
    return "  ".join(f"{domain} {value:.2f}" for domain, value in by_domain.items())


def _tell(one: Task) -> None:
    """Print what the model is, and the perplexities that its mask file holds, with the window that
    they were measured on: a result that is reused keeps those of its own run.
    """
    header = one.written().meta
    tell(f"{one.name}: {recovered_label(header)}, no result of the frozen weights")
    if header["evaluation"].get("perplexity"):
        window = header["evaluation"]["window"]
        tell(f"perplexity, measured when it was made, in held-out windows of {window} tokens:")
    for kind, title in (("frozen", "frozen weights"), ("perplexity", "recovered")):
        if by_domain := header["evaluation"].get(kind):
            tell(f"{title:<16} {_shown(by_domain)}")
