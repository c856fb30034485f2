"""Masks on a transformers model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from megamask.errors import ArtifactError
from megamask.masks.arguments import as_flag, as_model, checked_masks
from megamask.masks.file import MaskSet, load_masks
from megamask.masks.held_model import Place, shared_weights
from megamask.masks.obstacles import first_obstacle, merged_adapter
from megamask.masks.places import Weight, fitting_places, is_base, refuse_obstacle
from megamask.weights.fingerprint import weight_OI
from megamask.weights.source import BITS

Model = TypeVar("Model", bound=nn.Module)
# The linears whose dense weights ``swap`` remembers. By linear and not by model: a wrapper, an
# adapter or a larger model holds the same linears.
SWITCHED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
GIVEN = "the given masks"
UNCHANGED = (
    "Use the model that the masks were made for, with its weights unpruned and unchanged, or pass "
    "check_fingerprint=False if the weights were changed on purpose."
)


def apply_masks(
    hf_model: Model,
    masks: MaskSet | Mapping[str, Tensor] | Path | str,
    check_fingerprint: bool = True,
) -> Model:
    """Set the pruned weights of a transformers model to +0.0, in place.

    The model may be compiled, wrapped by DataParallel or DistributedDataParallel, hold PEFT
    adapters (which stay dense), lack its head, or be a part of a larger model. All checks come
    before the first change of a weight. A model that has zeros in all pruned places already stays
    as it is.

    Args:
        hf_model: the model that the masks were made for.
        masks: the path of a mask file, the result of ``load_masks``, or a plain mapping from names
            of linears to bool or 0/1 masks (out, in). A plain mapping holds no fingerprint, so
            names and shapes alone are checked.
        check_fingerprint: False also accepts changed weights (fine-tuned, updated by SparseGPT) of
            the same shapes.

    Returns:
        ``hf_model``.

    Raises:
        ArgumentError: an argument has another type.
        ArtifactError: the masks belong to updated weights or to another base model, the file is
            corrupt, the model shows masks of ``swap`` or has no linear of a mask's name and shape,
            or the weights cannot be written: they are quantized, offloaded, sharded or
            reparametrized.
    """
    as_model("apply_masks: hf_model", hf_model)
    as_flag("apply_masks: check_fingerprint", check_fingerprint)
    given = as_given("apply_masks: masks", masks)
    place, given = place_of(hf_model, given, check_fingerprint)
    if any(linear in SWITCHED for linear in place.targets.values()):
        problem = "shows masks of swap or Masks, whose next switch would undo this"
        fix = "Show the dense weights first: masks.use(None), or the end of the with block."
        raise ArtifactError(type(hf_model).__name__, problem, fix)
    done: set[tuple[int, torch.device]] = set()
    with torch.no_grad():
        for name in given:
            weight = weight_OI(place.targets[name])
            where = (weight.data_ptr(), weight.device)
            if where in done:  # a shared weight, of equal masks; a pruned one decodes no mask
                continue
            done.add(where)
            prune_(weight, given[name].bool())
    return hf_model


def masked(weight_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """The weight with +0.0 in pruned places, and the bits that it had in the others.

    A product with the mask would leave -0.0, and some sparse kernels keep such a value. A product
    of the bits leaves none, in a thirtieth of the time of ``masked_fill`` in bf16 on a CPU.
    """
    signed = BITS.get(weight_OI.dtype)
    if signed is None or weight_OI.device.type != "cpu" or not weight_OI.is_contiguous():
        return weight_OI.masked_fill(~mask_OI.to(weight_OI.device), 0.0)
    return (weight_OI.view(signed[0]) * mask_OI.cpu()).view(weight_OI.dtype)


def prune_(weight_OI: Tensor, mask_OI: Tensor) -> None:
    """``masked`` in place."""
    signed = BITS.get(weight_OI.dtype)
    if signed is None or weight_OI.device.type != "cpu" or not weight_OI.is_contiguous():
        weight_OI.masked_fill_(~mask_OI.to(weight_OI.device), 0.0)
    else:
        weight_OI.view(signed[0]).mul_(mask_OI.cpu())


Given = MaskSet | Mapping[str, Tensor]


def as_given(name: str, masks: Any) -> Given:
    """Masks from whatever a caller names them by.

    Args:
        name: the function and its argument, for the message.
        masks: a path, a mask set, or a mapping from names of linears to masks.

    Raises:
        ArgumentError, ArtifactError: see :func:`apply_masks`.
    """
    if isinstance(masks, MaskSet):
        return masks
    if isinstance(masks, Mapping):
        return dict(checked_masks(name, masks))
    return load_masks(masks)


def items(given: Given) -> Iterator[tuple[str, Tensor]]:
    """Name and bool mask, one mask in memory at a time where they come from a file."""
    return ((name, given[name].bool()) for name in given)


def place_of(
    model: nn.Module, given: Given, check_fingerprint: bool, dense: Weight | None = None
) -> tuple[Place, Given]:
    """The place of the model where the masks belong, and the masks, which decode. All checks of
    :func:`apply_masks` are here.

    Args:
        model: the model.
        given: the masks.
        check_fingerprint: see :func:`apply_masks`.
        dense: reads the dense weight of a linear, (O, I), which the model need not show. None if
            the model shows its weights; they may be pruned by the same masks already.

    Raises:
        ArtifactError: see :func:`apply_masks`.
    """
    if isinstance(given, MaskSet) and given.has_own_weights and check_fingerprint:
        raise ArtifactError(
            given.path,
            f"belongs to weights that {given.method} updated, not to those of this model",
            f"Run megamask export export.mask={given.method} and load the folder that it "
            "writes, or use a mask of the frozen weights.",
        )
    places = fitting_places(model, _name(given), _shapes(given))
    if isinstance(given, MaskSet) and not given.needs_weights:
        given.verify()
    if isinstance(given, MaskSet) and check_fingerprint:
        places = _places_of_base(model, places, given, dense)
    if len(places) > 1:
        prefixes = " and ".join(repr(found.prefix) for found in places)
        fix = "Pass the part of the model that the masks belong to, as model.language_model."
        raise ArtifactError(_name(given), f"fits several parts of the model: {prefixes}", fix)
    (place,) = places
    if isinstance(given, MaskSet) and given.needs_weights:
        # What the masks were loaded with may be this model, which shows masks by now.
        reads = dense or weight_OI
        if given.lacks_weights or is_base(model, place, given.fingerprints, reads):
            given = given.with_weights(lambda name: reads(place.targets[name]))
        given.verify()
    _check_sharing(model, place, given)
    return place, given


def _name(given: Given) -> Path | str:
    return given.path if isinstance(given, MaskSet) else GIVEN


def _shapes(given: Given) -> dict[str, tuple[int, ...]]:
    if isinstance(given, MaskSet):
        return {name: given.shape(name) for name in given}
    return {name: tuple(mask.shape) for name, mask in given.items()}


def _places_of_base(
    model: nn.Module, places: list[Place], masks: MaskSet, dense: Weight | None
) -> list[Place]:
    """The places whose weights are those that the masks were made for; pruned already or not,
    unless ``dense`` reads the weights.

    Raises:
        ArtifactError: there is none; the message says what is in the way of it.
    """
    found = [first_obstacle(model, place.targets) for place in places]
    free = [place for place, problem in zip(places, found, strict=True) if not problem]
    fitting = [
        one
        for one in free
        if is_base(model, one, masks.fingerprints, dense or weight_OI)
        or (dense is None and not masks.lacks_weights and _is_applied(one, masks))
    ]
    if not fitting:
        refuse_obstacle(masks.path, found)  # the base may be where nothing can be compared
        _refuse_base(model, free[0], masks)
    return fitting


def _is_applied(place: Place, masks: MaskSet) -> bool:
    """Whether every pruned place is zero already: the masks were applied before."""
    weights = ((weight_OI(place.targets[name]), mask_OI) for name, mask_OI in items(masks))
    return not any(bool(weight[~mask.to(weight.device)].any()) for weight, mask in weights)


def _refuse_base(model: nn.Module, place: Place, masks: MaskSet) -> NoReturn:
    """Say which of the known causes makes the weights differ from those of the masks."""
    if adapter := merged_adapter(model):
        problem = f"was made for the weights without the adapter that is merged into {adapter}"
        fix = "Call model.unmerge_adapter() first, and merge the adapter after."
        raise ArtifactError(masks.path, problem, fix)
    refuse_obstacle(masks.path, [first_obstacle(model, place.base)])
    dtypes = sorted({str(weight_OI(module).dtype) for module in place.targets.values()})
    held = ", ".join(dtype.removeprefix("torch.") for dtype in dtypes)
    if "torch.float16" in dtypes and len(masks.fingerprints) == 1:
        problem = (
            f"does not know the weights of this {type(model).__name__} as they are in {held}: "
            "float16 rounds weights of other dtypes, or this is another base model"
        )
        fix = "Load the model with dtype=torch.bfloat16, apply the masks, then call model.half()."
        raise ArtifactError(masks.path, problem, fix)
    where = f", linears under {place.prefix!r}" if place.prefix else ""
    problem = (
        f"was made for another base model than this {type(model).__name__} in {held}{where} "
        f"(fingerprint {masks.fingerprint[:12]})"
    )
    raise ArtifactError(masks.path, problem, UNCHANGED)


def _check_sharing(model: nn.Module, place: Place, given: Given) -> None:
    """Check that no weight is set to zero by two masks, or in a module without a mask.

    Raises:
        ArtifactError: naming the modules that share a weight.
    """
    names = {id(module): name for name, module in place.targets.items()}
    modules = dict(model.named_modules())
    for one, other in shared_weights(model):
        ours, theirs = names.get(id(modules[one])), names.get(id(modules[other]))
        if ours == theirs:
            continue
        if ours and theirs and torch.equal(given[ours].bool(), given[theirs].bool()):
            continue
        problem = f"cannot be applied: {one} and {other} share a weight, and not a mask"
        raise ArtifactError(_name(given), problem, "Give both a weight of their own.")
