"""What of settings and results is published: values without the folders of a machine, and the
digest by which a mask and the settings that it was learned with know each other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megamask.config.deciding import free_settings
from megamask.config.nested import flatten

SETTINGS_SHA256 = "settings_sha256"  # key of the header of a learned mask
NO_PLACES = ("eod", "join")  # a token may be [/INST]
# The start of an absolute path: at the start of a text, or after a space or a mark; not the two
# slashes of an address.
_PLACE = re.compile(r"""(?:^|(?<=[\s,;("'=\[|{`])|(?<=:)(?!//))(?:(?:file:)?/|~[^\s/]*/)(?=\S)""")


def without_places(value: Any) -> Any:
    """A JSON value whose absolute paths are cut to their last name: folders of a machine are not
    published. A path within a text reaches to the end of the text, because folders may hold spaces.
    Settings whose texts are no paths (``NO_PLACES``) stay as they are.
    """
    if isinstance(value, Mapping):
        return {
            key: inner if _is_no_place(str(key), inner) else without_places(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    found = _PLACE.search(value) if isinstance(value, str) else None
    return value if found is None else value[: found.start()] + Path(value[found.start() :]).name


def _is_no_place(key: str, value: Any) -> bool:
    """Whether a setting is a text that is no path. A domain may have the name of such a setting."""
    return isinstance(value, str) and key.rpartition(".")[2] in NO_PLACES


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Digest of the settings that decide content, SHA-256 in hex. Free settings (machine, run
    folder) and the folders of absolute paths have no part in it, so that equal runs in two folders
    have equal digests.

    Args:
        settings: the resolved settings as nested JSON values.
    """
    free = free_settings()
    kept = {key: value for key, value in flatten(settings).items() if key not in free}
    text = json.dumps(without_places(kept), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
