"""The program on a Megatron-Core whose GPTModel was deleted: nothing can import the package of the
model, neither this project's code nor Megatron's own.

    python -m tests.e2e.without_gpt VERB …
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

GONE = "megatron.core.models.gpt"


class Deleted:
    """Says of a package that it does not exist."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if f"{name}.".startswith(f"{GONE}."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def main() -> int:
    """The program, after the deletion."""
    assert not [name for name in sys.modules if name.startswith(GONE)]
    sys.meta_path.insert(0, Deleted())
    from megamask.__main__ import main as program

    code = program()
    assert "megamask.model.hybrid_backbone" in sys.modules, "no model was made of HybridModel"
    return code


if __name__ == "__main__":
    sys.exit(main())
