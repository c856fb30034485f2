"""The pictures of a report, drawn from the data of a run directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megamask.config import Config
from megamask.config.yaml_text import read_yaml
from megamask.data.bos import is_described
from megamask.errors import ArtifactError
from megamask.masks.file import MaskSet
from megamask.masks.find import open_masks
from megamask.report.html import Picture
from megamask.report.kept_norms import KeptNorms, norms_picture, read_kept_norms
from megamask.report.layer_pictures import layers_picture
from megamask.report.layers import read_layers
from megamask.report.mask_matrix import differing_shares, matrix_picture
from megamask.report.perplexity_pictures import methods_picture, perplexity_picture
from megamask.report.plot_style import save
from megamask.report.reading import RunData
from megamask.report.result_kinds import KINDS
from megamask.report.results_table import method_label, methods_first
from megamask.report.samples_pictures import Samples, read_samples, samples_picture
from megamask.report.step_pictures import loss_picture, mask_picture, update_picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """A picture of the report before it is drawn.

    Attributes:
        section: heading of the report that the picture belongs to.
        name: name of the PNG file.
        is_there: whether the run has the data of the picture.
        is_optional: whether the report says nothing where it is missing.
        draw: draws the picture; only called when ``is_there``.
        title, caption: the texts of the picture.
        verb: the verb that writes the data.
    """

    section: str
    name: str
    is_there: bool
    draw: Callable[[], Figure]
    title: str
    caption: str
    verb: str
    is_optional: bool = False


def draw_pictures(config: Config, data: RunData, folder: Path) -> list[Picture]:
    """Draw every picture that the run has data for into ``folder``.

    A picture of an earlier report is deleted when the run has no data for it any more.
    """
    masks, pictures = _readable(config, data), []
    plans = [*_plans(config, data, masks), *_mask_plans(config, data, masks), *_table_plans(data)]
    for name in {name for kind in KINDS for name in kind.pictures} - {one.name for one in plans}:
        (folder / f"{name}.png").unlink(missing_ok=True)
    for plan in plans:
        path = folder / f"{plan.name}.png"
        if plan.is_there:
            save(plan.draw, path)
        else:
            path.unlink(missing_ok=True)
            if plan.is_optional:
                continue
        pictures.append(
            Picture(
                section=plan.section,
                title=plan.title,
                caption=plan.caption,
                missing=f"The verb {plan.verb} writes what it shows.",
                path=path if plan.is_there else None,
            )
        )
    return pictures


def _other_protocol(data: RunData) -> str:
    """What differs between the evaluations of learning and those of the table, in words."""
    protocol, settings = data.results.get("protocol") or {}, read_yaml(data.settings) or {}
    learned = {
        "window": (settings.get("evaluate") or {}).get("window"),
        "dtype": settings.get("dtype"),
    }
    differing = [
        name
        for name, value in learned.items()
        if value is not None and protocol.get(name) not in (None, value)
    ]
    described, asked = protocol.get("bos"), (settings.get("evaluate") or {}).get("bos")
    if isinstance(described, str) and asked is not None and not is_described(asked, described):
        differing.append("BOS")
    return " and ".join(differing)


def _levels(data: RunData) -> tuple[dict[str, Any], str]:
    """The results that may stand beside the curve of learning, and why they may not."""
    if other := _other_protocol(data):
        return {}, f"The values of the table above have another {other}, and are not drawn."
    return data.results, ""


def _plans(config: Config, data: RunData, masks: Mapping[str, MaskSet]) -> list[_Plan]:
    """The pictures of a report, in order."""
    levels, about = _levels(data)
    about = (
        about
        or "Level lines are the values of the table above, which may be measured on more text."
    )
    return [
        _Plan(
            section="Methods",
            name="methods",
            is_there=bool(data.results.get("perplexity")),
            draw=lambda: methods_picture(data.results),
            title="Perplexity by method",
            caption="Held-out perplexity by method. Bars start at the dense value (black line): "
            "their length is what pruning costs.",
            verb="evaluate",
        ),
        _Plan(
            section="Learning",
            name="perplexity",
            is_there=any(record["perplexity"] for record in data.evaluations),
            draw=lambda: perplexity_picture(data.evaluations, levels),
            title="Held-out perplexity while learning",
            caption="Held-out perplexity of the hard mask (most likely candidate of each group, no "
            f"noise) while learning, on {config.learn.monitor.evaluate_windows} windows per "
            f"domain. {about}",
            verb="learn",
        ),
        _Plan(
            section="Learning",
            name="loss",
            is_there=bool(data.train),
            draw=lambda: loss_picture(data.train),
            title="Training loss",
            caption="What each step saw, with sampled masks: faint every step, strong the running "
            "median. The objective is the LM loss minus the weight-norm term.",
            verb="learn",
        ),
        _Plan(
            section="Learning",
            name="mask",
            is_there=bool(data.train),
            draw=lambda: mask_picture(data.train),
            title="How the mask settles",
            caption="Max-prob rises to 1 as the choice in each group becomes certain, while the "
            "flip rate falls to 0.",
            verb="learn",
        ),
        _Plan(
            section="Learning",
            name="updates",
            is_there=any("signal_share" in record for record in data.train),
            draw=lambda: update_picture(data.train),
            title="What the updates are made of",
            caption="From AdamW's moments, in the steps that learn.monitor.measure_every chooses. "
            "With a share s of signal, (1 - s) / s times the tokens of a step would have as much "
            "signal as noise.",
            verb="learn",
            is_optional=True,
        ),
        _Plan(
            section="Layers",
            name="layers",
            is_there="learned" in masks,
            draw=lambda: layers_picture(read_layers(masks["learned"], data.prior)),
            title="Density and change by layer",
            caption="Of the learned mask. Every masked linear has the density N/M of its pattern "
            "(a linear that is kept dense has 1); the effect of learning shows in the groups that "
            f"differ from the prior mask ({config.learn.prior.mask or 'there was none'}).",
            verb="learn",
        ),
    ]


def _mask_plans(config: Config, data: RunData, masks: Mapping[str, MaskSet]) -> list[_Plan]:
    """The pictures that read every mask file of the run; the report says nothing of those that have
    nothing to show.
    """
    levels, about = _levels(data)
    norms = read_kept_norms(config, masks)
    samples = read_samples(masks, data.prior)
    has_curve = any(record["perplexity"] for record in data.evaluations)
    names = [method_label(method) for method in masks]
    return [
        _Plan(
            section="Learning",
            name="samples",
            is_there=samples is not None and has_curve,
            is_optional=True,
            draw=lambda: samples_picture(data.evaluations, levels, samples or Samples({}, 0, 1)),
            title="Consumed samples against perplexity",
            caption="Learning begins with the calibration samples of its prior; a learning sample "
            f"has {samples.length if samples else 0:,} tokens. Squares are one-shot masks at their "
            f"calibration samples, whose length and evaluated text may differ. {about}".rstrip(),
            verb="learn",
        ),
        _Plan(
            section="Masks",
            name="differences",
            is_there=len(masks) > 1,
            is_optional=True,
            draw=lambda: matrix_picture(names, differing_shares(list(masks.values()))),
            title="Difference of any two masks",
            caption="Share of groups in which two masks of the run keep other weights; grey pairs "
            "have other patterns or models. megamask diff A B shows a pair by layer and kind.",
            verb="learn",
        ),
        _Plan(
            section="Masks",
            name="norms",
            is_there=norms is not None,
            is_optional=True,
            draw=lambda: norms_picture(norms or KeptNorms({})),
            title="L1 norm of the kept weights by layer",
            caption="Sum of |w| over the kept weights of a layer, divided by the largest such sum "
            "of the pattern, which the magnitude mask has; beside each name the mean over the "
            "layers. Masks with updated weights are left out.",
            verb="prune",
        ),
    ]


def _table_plans(data: RunData) -> list[_Plan]:
    """The pictures of the other kinds of results, each below its table."""
    return [
        _Plan(
            section=table.title,
            name=picture.name,
            is_there=True,
            draw=picture.draw,
            title=picture.title,
            caption=picture.caption,
            verb="",
        )
        for table in data.tables
        for picture in table.pictures
    ]


def _readable(config: Config, data: RunData) -> dict[str, MaskSet]:
    """The masks of the run. A mask that is coded by weights which are not there is left out."""
    found = {}
    for method in methods_first(data.masks):
        try:
            masks = open_masks(str(data.masks[method]), config)
        except ArtifactError as error:
            log.warning("the report leaves a mask out: %s", error)
            continue
        if masks.lacks_weights:
            log.warning("the report leaves out %s: it needs its model, model.hf", masks.path)
            continue
        found[method] = masks
    return found
