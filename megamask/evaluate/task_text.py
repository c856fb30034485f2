"""The digest of what a task of lm-evaluation-harness asks."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from typing import Any


def digest_of(task: Any, limit: int | None) -> str:
    """SHA-256 of the documents of a task, and of the prompts and answers that it makes of them.

    Args:
        task: a task of the harness.
        limit: how many documents count, from the first on; None = all.
    """
    digest = hashlib.sha256()
    for document in islice(task.eval_docs, limit):
        said = [document, task.doc_to_text(document), task.doc_to_target(document)]
        if task.OUTPUT_TYPE == "multiple_choice":
            said.append(task.doc_to_choice(document))
        digest.update(json.dumps(said, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
