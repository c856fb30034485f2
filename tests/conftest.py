"""Settings that every test shares. Helpers live beside the tests that use them."""

from __future__ import annotations

import os
from pathlib import Path

# Processes that tests start find the package too, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch  # noqa: E402 - after the environment is set

torch.set_num_threads(min(2, os.cpu_count() or 1))  # small tensors: more threads only wait for each other
