"""Checkpoints of users of Megatron: a plain GPTModel's checkpoint becomes our weights, and our
export a plain GPTModel's, with the same logits. The other side imports nothing of ours
(``plain_megatron.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.config import Config, load_config, run_paths
from megamask.masks.file import save_masks
from megamask.sparsity.pattern import Pattern
from megamask.verbs import convert, export
from megamask.weights.architecture import read_architecture
from megamask.weights.base_model import BaseModel
from megamask.weights.mapping import linear_shapes
from tests.parallel.ranks import meet_again, run_ranks
from tests.parity import plain_megatron
from tests.parity.megatron import LOGITS, Output, output_of_weights, outputs_of_folders
from tests.parity.plain_megatron import Layout, Shape, load_all

pytestmark = pytest.mark.slow
VOCAB, PADDED = 131, 136
SHAPES = [Shape(PADDED), Shape(PADDED, qkv_bias=True, tied=True)]
# What Megatron-LM writes, what it writes beside a training run with numbered layers, and the halves
# of gated linears apart, under the beginning that NeMo gives names.
LAYOUTS = [
    Layout({"singleton_local_shards": False}, training=True),
    Layout({"non_homogeneous_layers": True}, prefix="model."),
    Layout({"singleton_local_shards": True}, prefix="module."),
]
P24 = Pattern(2, 4)


def config_json(folder: Path, shape: Shape) -> Path:
    """The Hugging Face config of a shape: a Llama, or a Qwen2 where there are biases."""
    config = {
        "model_type": "qwen2" if shape.qkv_bias else "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float32",
        "hidden_act": "silu",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(root: Path, number: int, tp: int = 1, **settings: Any) -> Config:
    """The settings of a run on the checkpoint of a shape."""
    chosen = {
        "device": "cpu",
        "dtype": "fp32",
        "run_dir": root / f"run{number}",
        "model.hf": root / f"hf{number}",
        "model.megatron": root / f"{number}-0",
        "parallel.tp": tp,
        "parallel.threads": 1,
        **settings,
    }
    return load_config(None, [f"{key}={value}" for key, value in chosen.items()])


def there(
    rank: int, root: Path, tokens_NS: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of the plain models that were saved, and of ours after the verb convert."""
    plain = plain_megatron.save_all(rank, root, SHAPES, LAYOUTS, tokens_NS)
    ours = []
    for number in range(len(SHAPES)):
        # The second has no config.json: the arguments of the checkpoint take its place.
        settings = {"model.hf": root / "none"} if number else {}
        config = config_of(root, number, tp=2, **settings)
        meet_again()
        convert.run(config)
        meet_again()
        ours.append(output_of_weights(rank, run_paths(config).weights, tokens_NS, 2).logits)
    return list(zip(plain, ours, strict=True))


@dataclass(frozen=True)
class Made:
    """What the job left: its folder, its tokens, and pairs of logits."""

    root: Path
    tokens_NS: torch.Tensor
    pairs: list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("checkpoints")
    for number, shape in enumerate(SHAPES):
        config_json(root / f"hf{number}", shape)
    tokens_NS = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    return Made(root, tokens_NS, run_ranks(there, 2, root, tokens_NS)[0])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of logits, as a share of the root mean square, without padding."""
    found, expected = found[..., :VOCAB], expected[..., :VOCAB]
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_a_plain_checkpoint_becomes_our_weights(made: Made, number: int) -> None:
    plain, ours = made.pairs[number]
    assert distance(ours, plain) < LOGITS
    assert distance(made.pairs[1 - number][1], plain) > 0.1  # other weights show


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_every_layout_holds_the_same_tensors(made: Made, number: int) -> None:
    bases = [
        BaseModel(made.root / f"hf{number}", made.root / f"{number}-{index}")
        for index in range(len(LAYOUTS))
    ]
    first, *others = ({n: s.tensor(n) for n in s.names()} for s in (b.open() for b in bases))
    assert all(
        first.keys() == one.keys() and all(torch.equal(first[name], one[name]) for name in first)
        for one in others
    )
    assert len({base.fingerprints().exact for base in bases}) == 1
    # The arguments tell the same model, with the rows that pad its vocabulary.
    for index in range(len(LAYOUTS)):
        base = BaseModel(made.root / "none", made.root / f"{number}-{index}")
        told, given = base.architecture(), bases[0].architecture()
        assert told == replace(given, vocab=PADDED) and given.vocab == VOCAB


def test_our_export_is_a_plain_checkpoint(made: Made) -> None:
    """Masked and dense, at TP 2 on the other side."""
    folders: list[Path] = []
    expected: list[Output] = []
    for number in range(len(SHAPES)):
        # The second was converted without a config.json, with the rows that pad its vocabulary.
        convert.run(config_of(made.root, number))
        base = BaseModel(made.root / f"hf{number}", made.root / f"{number}-0")
        path = made.root / f"mask{number}.safetensors"
        with base.open() as source:
            masks = {
                name: P24.best(source.tensor(f"{name}.weight").abs())
                for name in linear_shapes(base.architecture())
            }
        save_masks(path, masks, P24, fingerprint=base.fingerprints().exact, method="magnitude")
        for mask in (str(path), "dense"):
            where = made.root / f"export{len(folders)}"
            for form in ("megatron", "hf"):
                settings: dict[str, Any] = {"export.mask": mask, "export.format": form}
                settings["export.out"] = where / form
                export.run(config_of(made.root, number, 1, **settings))
            folders.append(where / "megatron")
            expected += outputs_of_folders(0, [where / "hf"], made.tokens_NS, 1)
    shapes = [shape for shape in SHAPES for _ in ("masked", "dense")]
    loaded = run_ranks(load_all, 2, folders, shapes, made.tokens_NS)[0]
    for found, ours in zip(loaded, expected, strict=True):
        assert distance(found, ours.logits) < LOGITS
    for number, (plain, _) in enumerate(made.pairs):
        assert distance(loaded[2 * number + 1], plain) < LOGITS  # there and back
        assert distance(loaded[2 * number], plain) > 0.1  # the mask shows
    # The export has the config beside its tensors, so both settings may name it.
    folder = made.root / "export1" / "megatron"
    assert read_architecture(folder).vocab == VOCAB
    assert (
        BaseModel(folder, folder).fingerprints()
        == BaseModel(made.root / "hf0", made.root / "0-0").fingerprints()
    )
