"""The verb export: a Hugging Face folder and a mask file become a masked folder that plain
transformers loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from megamask.config import Config, run_paths
from megamask.errors import ArtifactError, ConfigError
from megamask.export.masked_folder import STAMP, export
from megamask.masks.find import own_weights
from megamask.masks.verify import check_strictly, configured_masks
from megamask.sparsity.pattern import Pattern
from megamask.storage import real_path, require_writable
from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import HFReader, open_checked
from megamask.weights.own_folder import require_own


def run(config: Config) -> None:
    """Write ``run_paths(config).export`` from model.hf (or export.weights) and export.mask, and
    verify the written files.

    Raises:
        ConfigError, ArtifactError: the mask is of another pattern or model, or a folder is
            incomplete or cannot be written.
    """
    paths = run_paths(config)
    if real_path(paths.export) == real_path(paths.hf):
        raise ConfigError(
            "export.out",
            str(paths.export),
            "a folder other than model.hf",
            "The base model must stay as it is.",
        )
    require_own(paths.export, STAMP, "export.out")
    require_writable(paths.export.parent, "export.out")
    reader = open_checked(paths.hf, config.model.ignore_keys)
    masks = configured_masks(config)
    if masks is not None:
        check_strictly(masks, paths.hf, config.model.ignore_keys)
        masks.check(pattern=Pattern.parse(config.pattern))
    weights = Path(config.export.weights) if config.export.weights else None
    if weights is None and masks is not None:
        weights = own_weights(masks, paths)
    with tensors_of(config, reader, weights) as tensors:
        export(paths.hf, paths.export, tensors, masks, config.model.ignore_keys)


@contextmanager
def tensors_of(
    config: Config, reader: HFReader, weights: Path | None
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """The tensors to export, by Hugging Face name: those of Megatron ``weights``, else the model's.

    Raises:
        ArtifactError: ``weights`` are missing or torn.
    """
    if weights is None:
        yield ((name, reader.tensor(name)) for name in reader.names())
        return
    if not weights.is_dir():
        fix = "Point export.weights at Megatron weights that convert or prune made."
        raise ArtifactError(weights, "is missing", fix)
    # Only an export of Megatron weights needs Megatron-Core, and then one process on the CPU.
    from megamask.model.checkpoint import megatron_to_hf
    from megamask.parallel.mesh import start
    from megamask.process.place import Place

    alone = config.parallel.model_copy(update={"tp": 1, "sequence_parallel": False})
    with start(config.model_copy(update={"parallel": alone, "device": "cpu"}), place=Place()):
        arch = read_architecture(run_paths(config).hf, config.model.ignore_keys)
        yield megatron_to_hf(weights, arch)
