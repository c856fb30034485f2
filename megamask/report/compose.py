"""The verb ``report``: pictures, one HTML page and the table, from whatever the run directory
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from megamask.config import Config
from megamask.masks.file import load_masks
from megamask.report.html import Picture
from megamask.report.layers import read_layers
from megamask.report.pictures import (
    layers_picture,
    loss_picture,
    mask_picture,
    methods_picture,
    perplexity_picture,
    save,
)
from megamask.report.reading import RunData


def draw_pictures(config: Config, data: RunData, folder: Path) -> Sequence[Picture]:
    """Draw what there is data for into ``folder``; delete a picture of an earlier report that there
    is none for.
    """
    has_perplexity = bool(data.results.get("perplexity"))

    def layers() -> Figure:
        return layers_picture(read_layers(load_masks(data.masks["learned"]), data.prior))

    def picture(
        section: str,
        name: str,
        is_there: bool,
        draw: Callable[[], Figure],
        title: str,
        caption: str,
        verb: str,
    ) -> Picture:
        path = folder / f"{name}.png"
        if is_there:
            save(draw(), path)
        else:
            path.unlink(missing_ok=True)
        return Picture(
            section,
            title,
            caption,
            f"The verb {verb} writes what it shows.",
            path if is_there else None,
        )

    return [
        picture(
            "Methods",
            "methods",
            has_perplexity,
            lambda: methods_picture(data.results),
            "Perplexity by method",
            "Held-out perplexity by method. Bars start at the dense value (black line): their length is what pruning costs.",
            "evaluate",
        ),
        picture(
            "Learning",
            "perplexity",
            bool(data.evaluations),
            lambda: perplexity_picture(data.evaluations, data.results),
            "Held-out perplexity while learning",
            "Held-out perplexity of the winner mask (most likely candidate of each group, no noise) while learning, on "
            f"{config.learn.monitor.evaluate_windows} windows per domain. Level lines are the values of the table above, which may be "
            "measured on more text.",
            "learn",
        ),
        picture(
            "Learning",
            "loss",
            bool(data.train),
            lambda: loss_picture(data.train),
            "Training loss",
            "What each step saw, with sampled masks: faint every step, strong the running median. The objective is the LM loss minus the "
            "weight-norm term.",
            "learn",
        ),
        picture(
            "Learning",
            "mask",
            bool(data.train),
            lambda: mask_picture(data.train),
            "How the mask settles",
            "Max-prob rises to 1 as the choice in each group becomes certain, while the flip rate falls to 0.",
            "learn",
        ),
        picture(
            "Layers",
            "layers",
            "learned" in data.masks,
            layers,
            "Density and change by layer",
            "Of the learned mask. Every masked linear has density N/M (one kept dense has 1); what learning changed shows in the groups "
            f"that differ from the prior mask ({config.learn.prior.mask or 'there was none'}).",
            "learn",
        ),
    ]
