"""The Megatron side of the comparisons with transformers; works in the test's process and in the
ranks of a job.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megamask.config import Config, load_config
from megamask.model.build import build_model
from megamask.model.checkpoint import fill_from_hf, load_weights, sharded_state
from megamask.model.language_model import LanguageModel
from megamask.model.perplexity import perplexity
from megamask.model.streamed_weights import save_streamed
from megamask.parallel.mesh import Mesh, start
from megamask.safe_checkpoint import read_index
from megamask.verbs.convert import run as convert
from megamask.weights.architecture import Architecture, read_architecture
from megamask.weights.dist_checkpoint.megatron_reader import MegatronReader
from megamask.weights.dist_checkpoint.stored_tensors import StoredTensors
from megamask.weights.hf_files import HFReader, open_checked

# fp32 rounding through a few dozen layers gives 1e-6 to 2e-5 of the logits' root mean square, and
# the least of the wrong readings that the tests try, another GELU, gives 8.7e-4.
LOGITS = 1e-4
PERPLEXITY = 5e-5  # half a unit of the fourth digit
Change = Callable[[Architecture, HFReader], tuple[Architecture, Any]]


@dataclass(frozen=True)
class Output:
    """What a model says about windows of tokens: logits (N, S, V) fp32 and the perplexity of their
    S - 1 targets.
    """

    logits: torch.Tensor
    perplexity: float

    def distance(self, other: Output) -> float:
        """Largest difference of the logits, as a share of the other's root mean square."""
        return float((self.logits - other.logits).abs().max() / other.logits.square().mean().sqrt())

    def agrees(self, other: Output) -> bool:
        """Whether logits and perplexity are those of ``other``."""
        return (
            self.distance(other) <= LOGITS
            and abs(self.perplexity / other.perplexity - 1) <= PERPLEXITY
        )


def settings(
    tp: int,
    run_dir: Path | None = None,
    hf: Path | None = None,
    sequence_parallel: bool | None = None,
    recompute: bool | str = False,
) -> Config:
    """fp32 on the CPU."""
    chosen = {
        "device": "cpu",
        "dtype": "fp32",
        "parallel.tp": tp,
        "run_dir": run_dir,
        "model.hf": hf,
        "parallel.sequence_parallel": sequence_parallel,
        "parallel.recompute": str(recompute).lower(),
    }
    return load_config(
        None, [f"{key}={value}" for key, value in chosen.items() if value is not None]
    )


@torch.no_grad()
def transformers_output(hf: Path, tokens_NS: torch.Tensor) -> Output:
    """The reference. The losses are fp64: PyTorch's fp32 cross entropy over 49,152 classes is off
    by 1e-5 on a CPU.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    logits = torch.cat([model(rows).logits for rows in tokens_NS.split(2)])
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), tokens_NS[:, 1:].flatten(), reduction="none"
    )
    return Output(logits, math.exp(losses.mean()))


def unchanged(arch: Architecture, reader: HFReader) -> tuple[Architecture, HFReader]:
    """The checkpoint as it is."""
    return arch, reader


def outputs_of_folders(
    rank: int, folders: list[Path], tokens_NS: torch.Tensor, tp: int, change: Change = unchanged
) -> list[Output]:
    """Megatron's outputs for Hugging Face folders at this TP, weights read straight from the files,
    after ``change``.
    """
    found = []
    config = settings(tp)
    with start(config) as mesh:
        for hf in folders:
            with open_checked(hf) as plain:
                arch, reader = change(read_architecture(hf), plain)
                model = build_model(config, arch, mesh)
                fill_from_hf(model, arch, mesh, reader)
            found.append(output(model, arch, mesh, tokens_NS))
    return found


def convert_folder(rank: int, hf: Path, run_dir: Path, tp: int) -> None:
    """The verb convert."""
    convert(settings(tp, run_dir, hf))


def output_of_weights(rank: int, weights: Path, tokens_NS: torch.Tensor, tp: int) -> Output:
    """Output of converted Megatron weights, whatever TP wrote them, at this TP."""
    config = settings(tp)
    with start(config) as mesh:
        arch = read_architecture(weights)
        model = build_model(config, arch, mesh)
        load_weights(model, weights)
        return output(model, arch, mesh, tokens_NS)


def hf_tensors(weights: Path) -> dict[str, torch.Tensor]:
    """Converted Megatron weights, back under their Hugging Face names."""
    with MegatronReader(weights, read_architecture(weights), "") as reader:
        return {name: reader.tensor(name) for name in reader.names()}


@torch.no_grad()
def output(model: LanguageModel, arch: Architecture, mesh: Mesh, tokens_NS: torch.Tensor) -> Output:
    """Logits and perplexity; every rank gets both."""
    model.eval()
    logits = torch.cat([model.full_logits(rows, arch.vocab) for rows in tokens_NS.split(2)])
    return Output(logits, perplexity(model, mesh, tokens_NS, 2))


def check_streamed(model: LanguageModel, arch: Architecture, mesh: Mesh, folder: Path) -> None:
    """What ``save_streamed`` writes of ``folder`` is what Megatron would save of the filled model:
    keys, shapes, dtypes, and the place and the numbers of every shard.
    """
    with open_checked(folder) as reader:
        save_streamed(reader, arch, folder / "streamed", mesh, {})
    state = sharded_state(model)
    apply_factories(state)
    shards = [one for one in nested_values(state) if isinstance(one, ShardedTensor)]
    with StoredTensors(folder / "streamed", "") as stored:
        index = read_index(folder / "streamed").state_dict_metadata
        assert index.keys() == {shard.key for shard in shards}
        for shard in shards:
            about = index[shard.key]
            assert isinstance(about, TensorStorageMetadata)
            assert (tuple(about.size), stored.dtype(shard.key)) == (shard.global_shape, shard.dtype)
            places = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in about.chunks]
            assert places.count((shard.global_offset, shard.local_shape)) == 1, shard.key
            offsets = zip(shard.global_offset, shard.local_shape, strict=True)
            found = stored.read(shard.key, [range(at, at + size) for at, size in offsets])
            assert torch.equal(found, shard.data), shard.key
