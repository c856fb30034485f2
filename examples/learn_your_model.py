"""Prune and learn a mask of your own model, from a Hugging Face folder to a folder that any runtime
loads:

    python examples/learn_your_model.py models/dense texts/ runs/mine learn.steps=500

The first argument is the model, the second a folder of text files, the third the run folder; what
follows are settings as on the command line. A second start goes on where the first one stopped.
"""

import json
import sys
from pathlib import Path

import yaml

from megamask.__main__ import main as megamask

hf, texts, run_dir, *overrides = sys.argv[1:]

# 1. The recipe: which model, which pattern, which text. Settings that are not here have defaults,
#    and docs/settings.md lists all of them.
recipe = Path(run_dir) / "recipe.yaml"
recipe.parent.mkdir(parents=True, exist_ok=True)
settings = {
    "run_dir": run_dir,
    "pattern": "2:4",
    "model": {"hf": hf},
    # A twentieth of the documents is held out. The masks never see them, and evaluate reads them.
    "data": {"domains": {"mine": {"kind": "text", "path": texts, "heldout": 0.05}}},
    "prune": {"methods": ["magnitude", "sparsegpt"]},
    "learn": {"prior": {"mask": "sparsegpt"}},
}
recipe.write_text(yaml.safe_dump(settings))


def run(verb: str) -> None:
    """One stage: megamask VERB --config recipe.yaml key.sub=value …"""
    code = megamask([verb, "--config", str(recipe), *overrides])
    if code:
        sys.exit(code)


# 2. What masks are made from: weights that any tensor parallel size reads, and token shards.
run("convert")
run("tokenize")

# 3. One-shot masks. They are the rows to beat, and SparseGPT's is where learning starts.
run("prune")

# 4. Learning: the weights stay as they are, and the logits of the mask move. A snapshot is written
#    now and then, and learn goes on from the last one.
run("learn")

# 5. Perplexity of the dense model and of every mask, on the held-out documents.
run("evaluate")
results = json.loads((Path(run_dir) / "results.json").read_text())
for method, by_domain in results["perplexity"].items():
    print(f"perplexity of {method}: {by_domain['mine']:.2f}")

# 6. A plain Hugging Face folder with +0.0 in pruned places, and report.html, which opens offline.
run("export")
run("report")
print(f"kept weights: {results['density']['learned']:.0%}")
