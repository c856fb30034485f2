"""What keeps a mask from a linear: quantized, offloaded, sharded or reparametrized
weights, each with the way round it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from megamask.weights.expert_parts import ExpertPart
from megamask.weights.fingerprint import is_linear

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FOLDER = "Or run the verb export, which writes a masked Hugging Face folder, and load that folder."
_LOAD_WHOLE = f"Load the model into memory without offloading and apply the masks. {_FOLDER}"
_BEFORE = "Apply the masks to the whole model, before it is wrapped or sharded."
_SUMMON = f"{_BEFORE} Or apply them within FullyShardedDataParallel.summon_full_params(model)."
Obstacle = tuple[str, str]  # a predicate for the mask file, and the fix


def first_obstacle(model: nn.Module, linears: Mapping[str, nn.Module]) -> Obstacle | None:
    """What is in the way of setting weights of ``linears`` to zero: of the first that cannot be
    written, or None where all can.

    Args:
        model: the whole model, of which the message tells wrappers.
        linears: name -> module.
    """
    divided = {inner for part in model.modules() if _is_fsdp2(part) for inner in part.modules()}
    found = (_obstacle(model, name, linear, divided) for name, linear in linears.items())
    return next(filter(None, found), None)


def _obstacle(
    model: nn.Module, name: str, linear: nn.Module, divided: Collection[nn.Module]
) -> Obstacle | None:
    module = linear
    kind = type(module).__name__
    where = f"cannot be applied to {name}"
    weight = module._parameters.get("weight")
    if isinstance(module, ExpertPart):
        weight, module = cast(nn.Parameter, module.weight), module.owner
    if _is_quantized(module, weight):
        dtype = "packed" if weight is None else str(weight.dtype).removeprefix("torch.")
        fix = (
            "Load the model without quantization_config, apply the masks, and quantize the "
            f"pruned model. {_FOLDER}"
        )
        return f"{where}, which is quantized ({_kind(module, weight)}, {dtype})", fix
    if not is_linear(linear):
        return f"{where}, which is a {kind} and no linear", "Use the model of the masks."
    if weight is None:
        return _not_a_parameter(model, module, where)
    if hasattr(weight, "ds_id"):
        return f"{where}, whose weight DeepSpeed ZeRO-3 divides among ranks", _BEFORE
    if type(weight.data).__name__ == "DTensor":
        fix = f"{_BEFORE} For tensor parallelism, load without tp_plan."
        return f"{where}, whose weight is sharded over a device mesh (DTensor)", fix
    if weight.device.type == "meta":
        hook = getattr(module, "_hf_hook", None)
        if getattr(hook, "offload", False):
            return f"{where}, whose weight is offloaded to CPU or disk (device_map)", _LOAD_WHOLE
        return f"{where}, whose weight is on the meta device and has no values", _LOAD_WHOLE
    if weight.dim() != 2 and _fsdp(model):
        return f"{where}, whose weight FSDP divides among ranks", _SUMMON
    if module in divided:  # gathered for a moment: what is written now is lost with the copy
        return f"{where}, which lies in a module that FSDP (fully_shard) divides", _BEFORE
    if weight.is_inference():
        fix = "Load the model outside torch.inference_mode()."
        return f"{where}, whose weight was made under torch.inference_mode()", fix
    return None


def merged_adapter(model: nn.Module) -> str:
    """The name of a module whose adapter is merged into its weight; or nothing."""
    for raw, module in model.named_modules():
        if hasattr(module, "base_layer") and getattr(module, "merged", False) is True:
            return raw
    return ""


def _not_a_parameter(model: nn.Module, module: nn.Module, where: str) -> Obstacle:
    if hasattr(module, "parametrizations"):
        fix = "Remove it with torch.nn.utils.parametrize.remove_parametrizations."
        return f"{where}, whose weight is computed by a parametrization", fix
    if "weight_orig" in module._parameters:
        fix = "Remove it with torch.nn.utils.prune.remove, or load the dense model."
        return f"{where}, whose weight torch.nn.utils.prune computes", fix
    if _fsdp(model):
        return f"{where}, whose weight FSDP divides among ranks", _SUMMON
    return f"{where}, whose weight is no parameter", "Use a plain transformers model."


def _is_fsdp2(part: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(part).__mro__)


def _fsdp(model: nn.Module) -> bool:
    return any("FullyShardedDataParallel" in type(part).__name__ for part in model.modules())


def _is_quantized(module: nn.Module, weight: Tensor | None) -> bool:
    """Whether a weight holds something else than the numbers of the linear."""
    if weight is None:
        packed = ("qweight", "weight_packed", "qweight_packed", "packed_weight", "blocks")
        return any(hasattr(module, name) for name in packed)
    if isinstance(weight, Tensor) and type(weight.data).__name__ == "DTensor":
        return False
    is_plain = type(weight) in (nn.Parameter, Tensor) and type(weight.data) is Tensor
    return weight.dtype not in FLOATS or not (is_plain or _is_of_deepspeed(weight))


def _is_of_deepspeed(weight: Tensor) -> bool:
    return hasattr(weight, "ds_id")


def _kind(module: nn.Module, weight: Tensor | None) -> str:
    """The class that says how: of the module, or of a weight of a class of its own."""
    own = type(weight).__name__
    is_told = type(module) is nn.Linear and own not in ("Parameter", "NoneType")
    return own if is_told else type(module).__name__
