"""The linears of a model as its user holds it: compiled, wrapped for several devices, with
adapters, without its head, or as a part of a larger model.

Masks name linears as a plain Hugging Face model does (``model.layers.0.mlp.up_proj``). Wrappers add
parts to these names. Parts within a name are known by their wrapper and dropped. Whatever stands
before the layers is a prefix, which is found by comparing names and shapes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from megamask.weights.expert_parts import is_router, modules_of
from megamask.weights.fingerprint import is_linear, weight_OI
from megamask.weights.wrapped_names import ADAPTED, unwrapped

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """A place in a model where the masks may belong.

    Attributes:
        prefix: stands before the layers in the names of the model's modules, wrappers dropped.
        targets: name of a mask -> module of the model, for the masks that have one.
        base: plain name -> linear, for all linears of the text model: what a fingerprint covers.
    """

    prefix: str
    targets: dict[str, nn.Module]
    base: dict[str, nn.Module]


def find_places(model: nn.Module, shapes: Shapes) -> list[Place]:
    """The places where the most masks find a module of their name and, among those, of their shape.

    Args:
        model: the model.
        shapes: name of a mask -> (O, I).

    Returns:
        Nothing where no mask finds a module; several places where names and shapes leave a choice,
        such as the two towers of a model.
    """
    modules = plain_names(model)
    root = layers_root(shapes)
    stems = {name: name[len(root) :] for name in shapes}
    first = next(iter(stems.values()))
    prefixes = {
        name.removesuffix(first) for name in modules if name == first or name.endswith(f".{first}")
    }
    places = [_place(model, modules, prefix, root, stems) for prefix in sorted(prefixes)]
    if not places:
        return []
    ranks = [(len(place.targets), _fitting(place, shapes)) for place in places]
    return [place for place, rank in zip(places, ranks, strict=True) if rank == max(ranks)]


def plain_names(model: nn.Module) -> dict[str, nn.Module]:
    """Name without the parts that wrappers add -> module. Adapters are left out."""
    found: dict[str, nn.Module] = {}
    adapted: list[str] = []  # raw names of modules with adapters
    for raw, module in modules_of(model):
        if any(_is_adapter(raw, owner) for owner in adapted):
            continue
        if hasattr(module, ADAPTED):
            adapted.append(raw)
        # The inner module of a wrapper comes later and replaces the wrapper.
        found[unwrapped(raw)] = module
    return found


def _is_adapter(raw: str, owner: str) -> bool:
    """Whether a module lies in a module with adapters, and not in its frozen linear."""
    inner = raw.removeprefix(f"{owner}.")
    return inner != raw and inner.split(".")[0] != ADAPTED


def layers_root(names: Mapping[str, object]) -> str:
    """What stands before the list of layers in all names, with its dot: ``model.``; or nothing."""
    roots = set()
    for name in names:
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        container = parts[: max(numbers[0] - 1, 0)] if numbers else []
        roots.add("".join(f"{part}." for part in container))
    return roots.pop() if len(roots) == 1 else ""


def _place(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    prefix: str,
    root: str,
    stems: Mapping[str, str],
) -> Place:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return Place(
        prefix,
        {name: modules[prefix + stem] for name, stem in stems.items() if prefix + stem in modules},
        {
            root + name.removeprefix(prefix): module
            for name, module in modules.items()
            if name.startswith(prefix)
            and is_linear(module)
            and module is not head
            and not is_router(name)
        },
    )


def _fitting(place: Place, shapes: Shapes) -> int:
    """Number of masks whose module has a weight of their shape."""
    return sum(
        isinstance(getattr(module, "weight", None), Tensor)
        and tuple(weight_OI(module).shape) == shapes[name]
        for name, module in place.targets.items()
    )


def nearest(model: nn.Module, name: str) -> str:
    """The module of the model whose name is most like ``name``, with its class; or nothing."""
    weighted = {
        plain: module
        for plain, module in plain_names(model).items()
        if isinstance(getattr(module, "weight", None), Tensor) and plain
    }
    near = difflib.get_close_matches(name, list(weighted), n=1, cutoff=0)
    return f"{near[0]} ({type(weighted[near[0]]).__name__})" if near else ""


def shared_weights(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of names of modules that use one weight."""
    users: dict[int, str] = {}
    for raw, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and users.setdefault(id(weight), raw) != raw:
            yield users[id(weight)], raw
