"""What the folder of a base model says about its name on the Hub and its licence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megamask.file_kinds import read_text
from megamask.storage import real_path
from megamask.weights.licences import LIMIT

LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseFacts:
    """The base model of a card.

    Attributes:
        name: ``OWNER/NAME`` on the Hub; None where it is unknown.
        shown: the name, or else the name of the folder.
        licence: the keys of the model's own card that name its licence; may be empty.
    """

    name: str | None
    shown: str
    licence: dict[str, str]


def base_facts(folder: Path, name: str | None) -> BaseFacts:
    """The facts of a folder.

    Args:
        folder: the Hugging Face folder of the base model.
        name: what the user says; None reads the name from the path of the Hub's cache
            (``models--OWNER--NAME/snapshots/REVISION``).
    """
    place = real_path(folder)
    if name is None and place.parent.name == "snapshots":
        parts = place.parent.parent.name.split("--")
        name = "/".join(parts[1:]) if parts[0] == "models" and len(parts) == 3 else None
    card = folder / "README.md"
    about = _front_matter(card) if card.is_file() and card.stat().st_size <= LIMIT else {}
    licence = {key: about[key] for key in LICENCE_KEYS if isinstance(about.get(key), str)}
    return BaseFacts(name, name or place.name, licence)


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines ``---`` of a card."""
    text = read_text(card, "Make it readable.")
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    try:
        found = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}  # what its constructors say of odd dates and keys
    return found if isinstance(found, dict) else {}
