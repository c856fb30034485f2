"""The benchmark of codings, on a toy."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import mask_codings


def test_sizes_are_in_order(tmp_path: Path) -> None:
    words = ["--patterns", "2:4", "8:16", "--rows", "128", "--columns", "256", "--rounds", "1"]
    assert mask_codings.main([*words, "--json", str(tmp_path / "x.json")]) == 0
    text = (tmp_path / "x.json").read_text()
    figures = json.loads(text)["figures"] if "figures" in json.loads(text) else json.loads(text)
    two, eight = figures["2:4"], figures["8:16"]
    assert two["bits given-weights"] < 0.5 < two["bits uniform"] < two["bits words"]
    assert "bits given-weights" not in eight
    assert all(one["ns uniform"] > 0 for one in (two, eight))
