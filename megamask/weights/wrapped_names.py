"""The parts that wrappers of modules add to the names of what they hold."""

from __future__ import annotations

# Attributes under which wrappers hold a module within a model: torch.compile, FSDP, activation
# checkpointing. PEFT keeps the frozen linear beside its adapters, as ``base_layer``.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
ADAPTED = "base_layer"


def unwrapped(name: str) -> str:
    """The name of a module without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in (*WRAPPED, ADAPTED))
