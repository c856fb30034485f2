"""Where each artefact of a run lives. Verbs hand over through these paths and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megamask.config.tree import Config

DENSE = "dense"  # the row of the model without a mask
LEARNED = "learned"  # the learned mask of a run, and its row
LEARNED_BEST = "learned-best"  # the mask with the lowest held-out perplexity of all evaluations


@dataclass(frozen=True)
class RunPaths:
    """Paths below ``run_dir``, unless a setting points elsewhere."""

    run_dir: Path
    hf: Path  # Hugging Face folder
    weights: Path  # Megatron weights, any TP
    shards: Path  # token shards, one folder a domain
    masks: Path  # one-shot masks: {method}.safetensors
    learn: Path  # learning run: config, log, metrics, snapshots
    export: Path  # folder of an export, in its format
    recovered: Path  # Hugging Face folder of a recovered model; unless set, a folder of them
    results: Path  # perplexities under evaluate.protocol: results.json for held-out documents

    def mask(self, method: str) -> Path:
        """The mask file of a method of this run (``LEARNED`` is the learned one)."""
        return self.masks / f"{method}.safetensors"

    def margins(self, method: str) -> Path:
        """The margins of that mask."""
        return margins_path(self.mask(method))

    def results_under(self, protocol: str) -> Path:
        """The perplexities under a protocol."""
        return self.run_dir / results_file(protocol)

    def updated_weights(self, method: str) -> Path:
        """Megatron weights that a one-shot method changed."""
        return self.run_dir / f"weights-{method}"


def margins_path(mask_file: Path) -> Path:
    """The file of the margins that belong to a mask file: beside it, METHOD.margins."""
    return mask_file.with_suffix(".margins")


def results_file(protocol: str) -> str:
    """The name of the file with the perplexities under a protocol. Each protocol has a file of its
    own, because numbers of two protocols do not compare.
    """
    return "results.json" if protocol == "heldout" else f"results-{protocol}.json"


def export_folder(config: Config) -> str:
    """The folder of an export unless ``export.out`` names another: one for each format, so that no
    export replaces another.
    """
    chosen = config.export.format
    return "export" if chosen == "hf" else f"export-{chosen}"


def run_paths(config: Config) -> RunPaths:
    """The paths of a configured run."""
    run_dir, protocol = Path(config.run_dir), config.evaluate.protocol
    return RunPaths(
        run_dir=run_dir,
        hf=Path(config.model.hf) if config.model.hf else run_dir / "hf",
        weights=run_dir / "weights",
        shards=run_dir / "shards",
        masks=run_dir / "masks",
        learn=run_dir / "learn",
        export=Path(config.export.out) if config.export.out else run_dir / export_folder(config),
        recovered=Path(config.recover.out) if config.recover.out else run_dir / "recovered",
        results=run_dir / results_file(protocol),
    )
