"""The verb push: a mask, or the model under it, goes to the Hugging Face Hub with a card of what
was measured on it.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from megamask.config import Config, run_paths
from megamask.config.nested import flatten
from megamask.config.published import without_places
from megamask.errors import ArtifactError, ConfigError
from megamask.masks.file import MaskSet
from megamask.masks.find import own_weights
from megamask.masks.verify import check_configured, check_strictly, configured_masks
from megamask.prepare.same_model import check_converted, digest_of_model
from megamask.publish.base_facts import base_facts
from megamask.publish.hub import Stale, check_repo, logged_in, open_repo, upload
from megamask.publish.upload_folder import (
    CARD,
    STAMP,
    WRITTEN,
    Publication,
    build,
    uploaded_files,
)
from megamask.storage import file_sha256
from megamask.terminal import tell
from megamask.verbs.export import open_own
from megamask.verbs.own_arguments import PushArguments
from megamask.weights.base_model import base_model
from megamask.weights.own_folder import check_output
from megamask.weights.side_files import check_side_files


def run(config: Config, arguments: PushArguments) -> None:
    """Write the folder ``{run_dir}/push`` with all that is published, and upload it.

    Raises:
        ConfigError: there is no token that may write, no such name or no mask; found before
            anything else.
        ArtifactError: the mask does not fit the model, a file of results belongs to another mask,
            or the Hub refuses the repository; found before anything is built. Or the Hub refuses
            the commit.
    """
    check_repo(arguments.repo)
    if arguments.base_name is not None:
        check_repo(arguments.base_name)
    api = None if arguments.dry_run else logged_in()
    paths, base = run_paths(config), base_model(config)
    out, is_model = paths.run_dir / "push", arguments.what == "model"
    with base.open() as source:
        masks = _masks(config, is_model)
        check_strictly(masks, base)
        check_configured(masks, base.architecture(), config)
        check_converted(base, paths.weights)
        model = digest_of_model(base, paths.weights)
        about = base_facts(base.home, arguments.base_name)
        one = Publication.of(arguments.repo, paths, base, about, masks, is_model, model)
        check_output(out, STAMP, "run_dir", base)
        if is_model:
            check_side_files(base.hf_dir)
        weights = own_weights(masks, paths)
        if api is not None:
            open_repo(api, arguments.repo, arguments.private)
        with nullcontext(source) if weights is None else open_own(weights, base) as tensors:
            own_weights(masks, paths)  # they may have been replaced before they were opened
            build(out, one, tensors)
    _tell(out)
    if api is None:
        tell(f"nothing was uploaded: {out} holds what would go to {arguments.repo}")
        return
    message = f"{masks.method} {masks.patterns} {arguments.what} {masks.content_sha256[:12]}"
    stale = Stale(STAMP, WRITTEN)
    tell(f"uploaded: {upload(api, arguments.repo, out, message, stale)}")


def _masks(config: Config, is_model: bool) -> MaskSet:
    """The mask that is published.

    Raises:
        ConfigError: ``export.mask`` names no mask file.
        ArtifactError: the mask belongs to updated weights, and is to go without them, or the
            header of a file that is to go holds a path of this machine.
    """
    masks = configured_masks(config)
    if masks is None or not masks.path.is_file():
        fix = "Name a mask file; megamask extract makes one of a snapshot."
        raise ConfigError("export.mask", config.export.mask, "a mask file", fix)
    if masks.has_own_weights and not is_model:
        problem = "belongs to weights that were updated with it, and means nothing without them"
        raise ArtifactError(masks.path, problem, "Push the model: --what model.")
    if not is_model and (told := _place_in(masks)):
        problem = f"holds a path of this machine in its header: {told}"
        fix = (
            f"Write it without: megamask extract {masks.path} NEW.safetensors; then push with "
            "export.mask=NEW.safetensors."
        )
        raise ArtifactError(masks.path, problem, fix)
    return masks


def _place_in(masks: MaskSet) -> str:
    """The first entry of a header that holds an absolute path; "" where there is none."""
    said = flatten({key: value for key, value in masks.meta.items() if key != "tensors"})
    found = (f"{key} = {value}" for key, value in said.items() if without_places(value) != value)
    return next(found, "")


def _tell(folder: Path) -> None:
    """Print the files, with size and checksum."""
    for path in uploaded_files(folder):
        name = path.relative_to(folder).as_posix()
        tell(f"{path.stat().st_size:>15,} {file_sha256(path)[:12]} {name}")
    tell(f"the card is {folder / CARD}")
