"""2:4 kernels in a loaded model, where a measured table says that they are faster."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensor

from megamask.errors import ArgumentError, ArtifactError
from megamask.masks.arguments import as_flag, as_model, as_path
from megamask.masks.held_model import plain_names, shared_weights
from megamask.masks.obstacles import first_obstacle
from megamask.runtime.device_facts import lacking
from megamask.runtime.measure_speed import CudaDevice, Device, measure_shape, told
from megamask.runtime.sparse_kernels import (
    KERNELS,
    NONE_24,
    Shape,
    bytes_of,
    is_exact,
    is_two_of_four,
    short,
)
from megamask.runtime.speed_table import FILE, MOST_TOKENS, Choice, Passes, SpeedTable, read_table
from megamask.tables import table
from megamask.terminal import tell
from megamask.weights.fingerprint import is_linear, weight_OI

ROUNDS = 7  # of a measurement on the spot
WORKLOAD: Passes = {512: 1, 1: 128}  # a prompt of 512 tokens and 128 tokens of one answer
NOT_24 = "its weights are not 2:4"
ALREADY = "uses the kernel already"


@dataclass(frozen=True)
class LinearSpeed:
    """What became of a linear.

    Attributes:
        name: of the linear in the model.
        shape: (O, I).
        kernel: the 2:4 kernel that it uses now; None where it stayed dense.
        why: the reason.
        dense_bytes, bytes: of the weight, before and now.
    """

    name: str
    shape: Shape
    kernel: str | None
    why: str
    dense_bytes: int
    bytes: int


def accelerate(
    hf_model: nn.Module,
    table: Path | str | None = None,
    tokens: int | Mapping[int, int] | None = None,
    measure: bool = False,
    quiet: bool = False,
) -> tuple[LinearSpeed, ...]:
    """Let the 2:4 linears of a transformers model on a GPU use 2:4 kernels, in place, where they
    are faster. All other linears stay as they are. For inference alone: the weights of these
    linears become ``torch.sparse.SparseSemiStructuredTensor``, which take no gradient and cannot be
    saved.

    Args:
        hf_model: the model, loaded in bf16 or fp16 on a CUDA device, with zeros in pruned places.
        table: ``speed.json`` of the verb ``speed``, measured on this device with this PyTorch. None
            looks in the folder that the model was loaded from and in the folder above it, which is
            the run folder of an export.
        tokens: the forward passes that matter, as tokens in a pass -> number of such passes, or the
            tokens of every pass. A prompt of 512 tokens and 128 tokens of an answer, for 4
            sequences at once, are ``{2048: 1, 4: 128}``. None takes those of the table.
        measure: measure the shapes of this model now, in the place of a table.
        quiet: print nothing.

    Returns:
        Each linear of the model with what it uses now, and why.

    Raises:
        ArgumentError: an argument has another type, or there is no table.
        ArtifactError: there is no such device, no linear has 2:4 weights that a kernel takes, or
            the table is of another device or PyTorch. The model stays as it is.
    """
    model = as_model("accelerate: hf_model", hf_model)
    passes = _as_passes(tokens)
    as_flag("accelerate: measure", measure)
    as_flag("accelerate: quiet", quiet)
    path = None if table is None else as_path("accelerate: table", table)
    if measure and path is not None:
        allowed = "a table is read, or measure=True measures in its place"
        raise ArgumentError("accelerate: table", table, allowed)
    if missing := lacking():
        fix = "A CPU runs the model as it is: it needs no change."
        raise ArtifactError(type(model).__name__, missing, fix)
    places = {one.device for one in model.parameters() if one.is_cuda}
    if not places:
        fix = 'Call model.to("cuda") first.'
        raise ArtifactError(type(model).__name__, "lies on no CUDA device", fix)
    # Linears on other GPUs stay as they are: the times are those of one.
    device = CudaDevice(min(places, key=lambda one: one.index or 0))
    if missing := lacking(device.place):
        raise ArtifactError(type(model).__name__, missing, "Put the model on another GPU.")
    found = None
    if not measure:
        path = path or _beside(model)
        found = read_table(path)
        found.require(device.facts(), path)
    with torch.cuda.device(device.place):
        return accelerate_on(model, device, found, passes, quiet)


def accelerate_on(
    model: nn.Module,
    device: Device,
    measured: SpeedTable | None,
    passes: Passes | None,
    quiet: bool = False,
) -> tuple[LinearSpeed, ...]:
    """``accelerate`` with its arguments checked.

    Args:
        model: the model.
        device: whose times are measured, and which converts weights.
        measured: the table; None measures the shapes of the model.
        passes: tokens in a pass -> number of passes; None = those of the table.
        quiet: print nothing.
    """
    linears = {name: one for name, one in plain_names(model).items() if is_linear(one)}
    modules = dict(model.named_modules())
    shared = {modules[name] for pair in shared_weights(model) for name in pair}
    reasons = {
        name: "shares its weight with another module" if one in shared else ""
        for name, one in linears.items()
    }
    reasons |= {n: why_dense(model, n, one, device) for n, one in linears.items() if not reasons[n]}
    two_four = {name: one for name, one in linears.items() if not reasons[name]}
    reasons |= {name: why_not_taken(one, device) for name, one in two_four.items()}
    fitting = {name: one for name, one in two_four.items() if not reasons[name]}
    if not fitting and ALREADY not in reasons.values():
        _refuse(model, reasons, [reasons[name] for name in two_four])
    passes = passes or (WORKLOAD if measured is None else measured.passes)
    shown = {name: (tuple(_weight(one).shape), _weight(one).dtype) for name, one in fitting.items()}
    if measured is None:
        rows = [
            row
            for shape, dtype in dict.fromkeys(shown.values())
            for row in measure_shape(device, shape, dtype, passes, ROUNDS)
        ]
        measured = SpeedTable(device.facts(), passes, rows)
    done = []
    for name, linear in linears.items():
        shape = tuple(_weight(linear).shape)
        choice = Choice(None, reasons[name])
        if reasons[name] == ALREADY:
            choice = Choice(cast(Any, linear.weight).BACKEND, ALREADY)
        elif name in fitting:
            choice = measured.choose(shape, short(shown[name][1]), passes)
        before = bytes_of(_weight(linear))
        if name in fitting and choice.kernel is not None:
            choice = _convert(linear, choice, device)
        now = bytes_of(_weight(linear))
        done.append(LinearSpeed(name, shape, choice.kernel, choice.why, before, now))
    if not quiet:
        tell(choices_table(done))
    return tuple(done)


def why_dense(model: nn.Module, name: str, linear: nn.Module, device: Device) -> str:
    """Why a linear is none that could use a 2:4 kernel; empty if it is."""
    if isinstance(getattr(linear, "weight", None), SparseSemiStructuredTensor):
        return ALREADY
    obstacle = first_obstacle(model, {name: linear})
    if obstacle is not None:
        return f"a linear {obstacle[0].partition(', ')[2] or 'that cannot be changed'}"
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return f"its class, {type(linear).__name__}, multiplies in a way of its own"
    weight = _weight(linear)
    if weight.device != device.place:
        return f"lies on {weight.device}"
    if not bool(torch.isfinite(weight).all()):
        return "its weights are not finite"
    return "" if is_two_of_four(weight) else NOT_24


def why_not_taken(linear: nn.Module, device: Device) -> str:
    """Why no kernel takes the 2:4 weight of a linear; empty if one does."""
    weight = _weight(linear)
    whys = [KERNELS[one].why_not(tuple(weight.shape), weight.dtype) for one in device.kernels]
    return whys[0] if all(whys) else ""


@dataclass(frozen=True)
class AlikeLinears:
    """Linears with one shape and one reason, whose names differ in their numbers alone.

    Attributes:
        names: the names, with stars for the numbers.
        count: how many they are.
        shape, kernel, why: see ``LinearSpeed``.
    """

    names: str
    count: int
    shape: Shape
    kernel: str | None
    why: str


def grouped(done: Sequence[LinearSpeed]) -> list[AlikeLinears]:
    """The linears by name, shape and reason, in the order of the model."""
    found = Counter((re.sub(r"\d+", "*", one.name), one.shape, one.kernel, one.why) for one in done)
    return [AlikeLinears(key[0], count, *key[1:]) for key, count in found.items()]


def choices_table(done: Sequence[LinearSpeed]) -> str:
    """What became of the linears as a Markdown table."""
    lines = [
        [
            one.names,
            str(one.count),
            f"{one.shape[0]} x {one.shape[1]}",
            one.kernel or "dense",
            one.why,
        ]
        for one in grouped(done)
    ]
    sparse = [one for one in done if one.kernel]
    before, now = (sum(getattr(one, key) for one in done) for key in ("dense_bytes", "bytes"))
    total = (
        f"{len(sparse)} of {len(done)} linears use a 2:4 kernel; their weights take "
        f"{now / 1e6:,.1f} MB in the place of {before / 1e6:,.1f} MB"
    )
    return "\n".join([*table(["linear", "number", "shape", "uses", "why"], lines), f"\n{total}."])


def _as_passes(tokens: Any) -> Passes | None:
    """Tokens in a pass -> number of passes."""
    if tokens is None:
        return None
    given = {tokens: 1} if isinstance(tokens, int) else tokens
    if not isinstance(given, Mapping) or not given:
        allowed = "tokens in a pass, or a mapping from tokens in a pass to passes, is needed"
        raise ArgumentError("accelerate: tokens", tokens, allowed)
    for count, number in given.items():
        for name, value in (("a key", count), ("a value", number)):
            is_count = isinstance(value, int) and not isinstance(value, bool)
            if not is_count or not 0 < value <= MOST_TOKENS:
                allowed = f"a whole number from 1 to {MOST_TOKENS:,} is needed"
                raise ArgumentError(f"accelerate: tokens: {name}", value, allowed)
    return dict(given)


def _beside(model: nn.Module) -> Path:
    """The table beside the folder that the model was loaded from.

    Raises:
        ArgumentError: there is none.
    """
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    looked = []
    if isinstance(name, str) and name:
        looked = [Path(name) / FILE, Path(name).absolute().parent / FILE]
    for path in looked:
        if path.is_file():
            return path
    places = " and ".join(map(str, looked)) or "the model names no folder"
    raise ArgumentError(
        "accelerate: table",
        None,
        f"no measured times were found ({places})",
        "Run the verb speed and pass its speed.json, or pass measure=True.",
    )


def _refuse(model: nn.Module, reasons: Mapping[str, str], of_two_four: Sequence[str]) -> None:
    """Say why no linear can use a 2:4 kernel.

    Args:
        model: the model.
        reasons: of all linears.
        of_two_four: of the linears whose weights are 2:4.

    Raises:
        ArtifactError: always.
    """
    kind = type(model).__name__
    if not of_two_four and (not reasons or NOT_24 in reasons.values()):
        fix = "Load a folder that megamask export wrote with a 2:4 mask, or apply_masks first."
        raise ArtifactError(kind, NONE_24, fix)
    ((why, count),) = Counter(of_two_four or reasons.values()).most_common(1)
    problem = f"has no linear that a 2:4 kernel takes; {count} of {len(reasons)}: {why}"
    fix = "Load the whole model in bf16 or fp16 on one GPU, with a 2:4 mask applied."
    raise ArtifactError(kind, problem, fix)


def _convert(linear: nn.Module, choice: Choice, device: Device) -> Choice:
    """Put the converted weight in the place of the dense one, unless it fails or is not exact."""
    weight = _weight(linear)
    with torch.no_grad():
        try:
            converted = device.convert(str(choice.kernel), weight)
            is_same = is_exact(converted, weight)
        except (RuntimeError, NotImplementedError) as error:
            return Choice(None, f"not possible: {told(error)}")
    if not is_same:
        return Choice(None, "not possible: the converted weight holds other numbers")
    linear.weight = nn.Parameter(converted, requires_grad=False)
    return choice


def _weight(linear: nn.Module) -> Tensor:
    return weight_OI(linear).detach() if isinstance(linear, nn.Linear) else weight_OI(linear)
