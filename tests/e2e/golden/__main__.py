"""``python -m tests.e2e.golden`` writes the golden masks again, with the code as it is. Say in the
commit why they changed. The old snapshots stay: only the code of their time can make them.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import torch

from tests.e2e.conftest import VERBS, make_corpus, make_model, run_settings
from tests.e2e.golden.runs import regenerate
from tests.e2e.program import here


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model, corpus = make_model(work / "model", seed=0), make_corpus(work / "corpus")
        for verb in VERBS:
            here(verb, *run_settings(work / "prepared", model, corpus))
        numbers = itertools.count()

        def fresh() -> list[str]:
            run_dir = Path(shutil.copytree(work / "prepared", work / f"run-{next(numbers)}"))
            return run_settings(run_dir, model, corpus)

        regenerate(fresh)


if __name__ == "__main__":
    main()
