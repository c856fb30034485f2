"""The dataset under torch.distributed: rank 0 writes the cache, every rank reads the same samples
as one process alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from megamask.config import Config
from megamask.data.blend import train_dataset
from megamask.verbs import tokenize

PROGRAM = """
import sys, torch
from pathlib import Path
from megamask.config import Config
from megamask.data.blend import train_dataset
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
meeting = f"file://{folder}/meet"
torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
config = Config.model_validate_json((folder / "config.json").read_text())
dataset = train_dataset(config, 30, 16, seed=1)
tokens = torch.stack([dataset[index]["tokens"] for index in range(30)])
torch.save(tokens, folder / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_two_ranks_read_what_one_process_reads(
    two_domains: Callable[..., Config], tmp_path: Path
) -> None:
    config = two_domains()
    tokenize.run(config)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    dataset = train_dataset(config, 30, 16, seed=1)
    alone = torch.stack([dataset[index]["tokens"] for index in range(30)])
    for number in range(2):
        assert torch.equal(torch.load(tmp_path / f"rank{number}.pt"), alone)
