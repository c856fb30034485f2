"""The digest of what a task of lm-evaluation-harness asks."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from typing import Any


def digest_of(task: Any, limit: int | None) -> str:
    """SHA-256 of the documents of a task, and of every request that it makes of them: contexts with
    description, delimiters and examples, and answers.

    Args:
        task: a task of the harness, whose examples are drawn as they are for the scores.
        limit: how many documents count, from the first on; None = all.
    """
    digest = hashlib.sha256()
    for document in islice(task.eval_docs, limit):
        digest.update(_line([document, task.doc_to_target(document)]))
    task.build_all_requests(limit=limit)
    for instance in task.instances:
        digest.update(_line([instance.doc_id, instance.arguments]))
    return digest.hexdigest()


def _line(said: list[Any]) -> bytes:
    return json.dumps(said, sort_keys=True, default=str).encode() + b"\n"
