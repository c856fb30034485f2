"""Masks that change places on a resident transformers model.

While a linear shows masked weights, its dense weight is remembered beside it: one copy, however
many masks there are. A mask takes a bit per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from megamask.errors import ArgumentError, ArtifactError
from megamask.masks.apply import GIVEN, SWITCHED, as_given, items, place_of
from megamask.masks.arguments import as_flag, as_model
from megamask.masks.bits import as_integers, masked_by_bits, pack_bits
from megamask.masks.file import MaskSet
from megamask.masks.obstacles import first_obstacle
from megamask.weights.expert_parts import modules_of
from megamask.weights.fingerprint import weight_OI

Keep = Literal["device", "cpu"]
Given = MaskSet | Mapping[str, Tensor] | Path | str
Digest = tuple[int, ...]


@dataclass(frozen=True)
class LinearMask:
    """The mask of a linear.

    Attributes:
        bits: see ``pack_bits``.
        dense: digest of the dense weight that the mask was checked against.
    """

    bits: Tensor
    dense: Digest


@dataclass(frozen=True)
class Remembered:
    """A linear that shows masked weights.

    Attributes:
        dense_OI: the dense weight.
        mask: the mask that the linear shows.
        digest: of the masked weight, to tell whether somebody else changed it.
    """

    dense_OI: Tensor
    mask: LinearMask
    digest: Digest


Look = Mapping[nn.Module, LinearMask]  # the linears of a model that show masked weights

_REMEMBERED: WeakKeyDictionary[nn.Module, Remembered] = SWITCHED


class Swap:
    """The result of a swap: a context manager, at whose end the model shows again what it showed
    before the swap, also after an exception.
    """

    def __init__(self, model: nn.Module, look: Look, keep: Keep) -> None:
        self._model, self._look, self._keep = model, look, keep
        self._before = _show(model, look, keep)

    def __enter__(self) -> nn.Module:
        """Return the model, and show the masks again where an earlier ``with`` ended them or other
        masks were shown since.
        """
        now = _show(self._model, self._look, self._keep)
        is_shown = now.keys() == self._look.keys()
        if not is_shown or any(now[one] is not mask for one, mask in self._look.items()):
            self._before = now
        return self._model

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Show what the model showed before the swap.

        Raises:
            ArtifactError: the weights were changed meanwhile.
        """
        _show(self._model, self._before, self._keep)


class Masks:
    """Named masks on a loaded transformers model: one frozen model, many masks.

    All masks are checked as by :func:`megamask.apply_masks` and decoded here, so a switch moves
    weights alone. A mask takes a bit per weight.

    Args:
        hf_model: the dense model that the masks were made for; it may show a mask of ``swap`` or
            ``Masks``, and not zeros of ``apply_masks``.
        masks: name -> masks, each as ``apply_masks`` takes them.
        keep: where masks, and the dense weights while a mask is shown, are kept: ``"device"`` (of
            each weight) or ``"cpu"``.
        check_fingerprint: see ``apply_masks``.

    Raises:
        ArgumentError: an argument has another type.
        ArtifactError: a mask does not fit; see ``apply_masks``. The model stays as it is.
    """

    def __init__(
        self,
        hf_model: nn.Module,
        masks: Mapping[str, Given],
        keep: Keep = "device",
        check_fingerprint: bool = True,
    ) -> None:
        self._model = as_model("Masks: hf_model", hf_model)
        self._keep = _as_keep("Masks: keep", keep)
        as_flag("Masks: check_fingerprint", check_fingerprint)
        is_named = isinstance(masks, Mapping) and not isinstance(masks, MaskSet) and masks
        if not is_named or any(isinstance(one, Tensor) for one in masks.values()):
            allowed = 'a mapping from names to masks is needed, as {"code": "code.safetensors"}'
            raise ArgumentError("Masks: masks", masks, allowed)
        for name in masks:
            if not isinstance(name, str):
                raise ArgumentError("Masks: masks: a key", name, "the name of a mask is a text")
        self._looks = {
            name: _look(f"Masks: masks[{name!r}]", self._model, one, self._keep, check_fingerprint)
            for name, one in masks.items()
        }

    def use(self, name: str | None) -> Swap:
        """Show the masks of a name, or the dense weights for None.

        A linear without a mask of that name shows its dense weight.

        Returns:
            A context manager that brings back what the model showed before; it need not be used.

        Raises:
            ArgumentError: there are no masks of that name.
            ArtifactError: the weights were changed by something else, or cannot be written. The
                model stays as it is.
        """
        if name is not None and (not isinstance(name, str) or name not in self._looks):
            allowed = f"{', '.join(map(repr, self._looks))} or None (dense) is needed"
            raise ArgumentError("Masks.use: name", name, allowed)
        return Swap(self._model, {} if name is None else self._looks[name], self._keep)


def swap(
    hf_model: nn.Module,
    masks: Given | None,
    keep: Keep = "device",
    check_fingerprint: bool = True,
) -> Swap:
    """Change the masks of a loaded transformers model in place.

    The linears of the masks show their dense weights with +0.0 in pruned places. All other linears
    of the model that showed masked weights of an earlier swap show their dense weights again. To
    change masks often, give them names once: ``Masks``.

    Args:
        hf_model: the dense model that the masks were made for, or a model with masks of a swap.
        masks: as ``apply_masks`` takes them; None shows the dense weights.
        keep: where the dense weights are kept meanwhile: ``"device"`` (of each weight) or
            ``"cpu"``.
        check_fingerprint: see ``apply_masks``.

    Returns:
        A context manager that brings back what the model showed before; it need not be used.

    Raises:
        ArgumentError: an argument has another type.
        ArtifactError: the masks do not fit (see ``apply_masks``), or the weights were changed by
            something else since the last swap. The model stays as it is.
    """
    model, keep = as_model("swap: hf_model", hf_model), _as_keep("swap: keep", keep)
    as_flag("swap: check_fingerprint", check_fingerprint)
    if masks is None:
        return Swap(model, {}, keep)
    return Swap(model, _look("swap: masks", model, masks, keep, check_fingerprint), keep)


def _as_keep(name: str, value: Any) -> Keep:
    if isinstance(value, str) and value in ("device", "cpu"):
        return "cpu" if value == "cpu" else "device"
    raise ArgumentError(name, value, '"device" or "cpu" is needed')


@torch.no_grad()
def _look(name: str, model: nn.Module, masks: Any, keep: Keep, check_fingerprint: bool) -> Look:
    """The masks by their linears, checked and packed."""
    given = as_given(name, masks)
    place, given = place_of(model, given, check_fingerprint, dense=_dense_OI)
    targets = place.targets
    return {
        targets[one]: LinearMask(
            pack_bits(mask_OI).to(_kept_on(targets[one], keep)), _digest_of_dense(targets[one])
        )
        for one, mask_OI in items(given)
    }


def _dense_OI(linear: nn.Module) -> Tensor:
    """The dense weight of a linear, which the linear need not show."""
    found = _REMEMBERED.get(linear)
    return weight_OI(linear) if found is None else found.dense_OI


def _digest_of_dense(linear: nn.Module) -> Digest:
    found = _REMEMBERED.get(linear)
    return _digest(linear) if found is None else found.mask.dense


def _kept_on(linear: nn.Module, keep: Keep) -> torch.device:
    return torch.device("cpu") if keep == "cpu" else weight_OI(linear).device


@torch.no_grad()
def _show(model: nn.Module, look: Look, keep: Keep) -> Look:
    """Let the linears of ``look`` show masked weights, and all others of the model dense weights.
    Memory is taken and all is checked before the first change of a weight.

    Returns:
        What the model showed before.

    Raises:
        ArtifactError: a weight was changed by something else, or cannot be written.
    """
    linears = {
        raw: module for raw, module in modules_of(model) if module in look or module in _REMEMBERED
    }
    _check_linears(model, linears, look)
    before = {one: _REMEMBERED[one].mask for one in linears.values() if one in _REMEMBERED}
    changing = [one for one in linears.values() if before.get(one) is not look.get(one)]
    dense = {one: _remember(one, keep) for one in changing}
    digests = {}
    try:
        for one in changing:
            _write(one, dense[one], look.get(one))
            digests[one] = _digest(one)
    except BaseException:
        _write_all(dense, before)
        raise
    for one in changing:
        if one in look:
            _REMEMBERED[one] = Remembered(dense[one], look[one], digests[one])
        else:
            del _REMEMBERED[one]
    return before


def _check_linears(model: nn.Module, linears: Mapping[str, nn.Module], look: Look) -> None:
    """Check that the model has the linears of ``look``, that all of them can be written, and that
    each has the weight of the last swap or check.
    """
    kind = type(model).__name__
    if missing := len(look.keys() - set(linears.values())):
        problem = f"has {missing} of the linears no more that the masks were checked against"
        raise ArtifactError(kind, problem, "Make the Masks again for this model.")
    if obstacle := first_obstacle(model, linears):
        raise ArtifactError(GIVEN, *obstacle)
    for raw, linear in linears.items():
        found, wanted = _REMEMBERED.get(linear), look.get(linear)
        is_same = found is None or _digest(linear) == found.digest
        if is_same and wanted is not None:
            is_same = _digest_of_dense(linear) == wanted.dense
        if not is_same:
            raise ArtifactError(
                kind,
                f"has another weight in {raw} than the last swap or check left there; training, a "
                "cast, a merged adapter or apply_masks changed it",
                "Load the dense model again, and change its weights before masks are given to it.",
            )


def _remember(linear: nn.Module, keep: Keep) -> Tensor:
    """The dense weight of a linear, kept apart from the weight that the linear shows."""
    found, place = _REMEMBERED.get(linear), _kept_on(linear, keep)
    if found is None:
        return weight_OI(linear).to(place, copy=True)
    return found.dense_OI.to(place)


def _write_all(dense: Mapping[nn.Module, Tensor], look: Look) -> None:
    for linear, dense_OI in dense.items():
        _write(linear, dense_OI, look.get(linear))


def _write(linear: nn.Module, dense_OI: Tensor, mask: LinearMask | None) -> None:
    weight = weight_OI(linear)
    dense_OI = dense_OI.to(weight.device)
    shown = dense_OI if mask is None else masked_by_bits(dense_OI, mask.bits.to(weight.device))
    weight.copy_(shown)


def _digest(linear: nn.Module) -> Digest:
    """Two numbers that tell apart the bits of weights: sums over rows and over columns, each times
    an odd number of its own, modulo 2**64. A change of a single weight changes both.
    """
    bits_OI = as_integers(weight_OI(linear).detach())
    sums = (bits_OI.sum(1), bits_OI.sum(0))
    return tuple(
        int((one * torch.arange(1, 2 * len(one), 2, device=one.device)).sum()) for one in sums
    )
