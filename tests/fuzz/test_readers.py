"""Whatever a file holds, a reader reads it or says one error of ours: no other exception leaves, no
reader waits, and none takes the memory that a length in the file asks for.
"""

from __future__ import annotations

import json
import mmap
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megamask.config import load_config, run_paths
from megamask.config.paths import margins_path
from megamask.data.shards import FORMAT, read_shards
from megamask.errors import ArtifactError
from megamask.machine_errors import reading
from megamask.masks.codings import CODED, coding_of
from megamask.masks.file import load_masks, save_masks
from megamask.masks.from_snapshot import load_snapshot
from megamask.masks.header import Facts, header_digest
from megamask.masks.margins import load_margins, save_margins
from megamask.masks.save import save_coded
from megamask.model.checkpoint import read_note
from megamask.report.html import findings, render_report
from megamask.report.reading import read_run
from megamask.report.results_table import format_table
from megamask.safe_checkpoint import INDEX, NOTE, check_common
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan
from megamask.weights.architecture import read_architecture
from megamask.weights.from_gguf import unpack
from megamask.weights.gguf_header import ARCHITECTURES
from megamask.weights.gguf_layout import read_layout
from megamask.weights.hf_files import HFReader
from tests.fuzz import mutations
from tests.fuzz.mutations import (
    TooLong,
    bytes_writer,
    json_writer,
    mutated,
    mutated_bytes,
    patience,
    peak_mib,
    put,
    reset_peak,
    survives,
)  # fmt: skip
from tests.unit.weights.test_from_gguf import write_gguf

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = ROOT / "tests" / "e2e" / "golden" / "old-snapshot-subset" / "step-00000002"
TINY = ROOT / "configs" / "models" / "tiny-llama.json"


def test_weights_notes(tmp_path: Path) -> None:
    note = {"fingerprint": "a" * 64, "dtype": "bfloat16", "padded_vocab": 512, "source": "x"}
    survives(lambda: read_note(tmp_path), json_writer(tmp_path / "megamask.json", note))


def test_shard_notes(tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.bin").write_bytes(b"12345678")
        (tmp_path / f"{name}.idx").write_bytes(b"12345678")
    files = {
        split: {f"{split}{end}": {"size": 8, "sha256": "0" * 64} for end in (".bin", ".idx")}
        for split in ("train", "heldout")
    }
    counts = {"documents": 1, "tokens": 4, "bytes": 8, "largest_id": 3}
    meta = {
        "format": FORMAT,
        "domain": "x", "settings_sha256": "0", "dtype": "uint16", "append_eod": True,
        "tokenizer": {"name": "x", "fingerprint": "0", "vocab_size": 512, "eod": 1, "bos": None},
        "splits": {split: {**counts, "files": files[split]} for split in files},
    }  # fmt: skip
    survives(lambda: read_shards(tmp_path), json_writer(tmp_path / "meta.json", meta))


@pytest.mark.parametrize(
    "name", ["tiny-llama", "llama3-8b", "gemma-3-4b", "nemotron-4-15b", "qwen2.5-7b"]
)
def test_model_configs(tmp_path: Path, name: str) -> None:
    known = ROOT / "megamask" / "weights" / "known" / f"{name}.json"
    source = known if known.exists() else ROOT / "configs" / "models" / f"{name}.json"
    config = json.loads(source.read_text())
    if name.startswith("gemma"):  # within the config of a model with images
        config = {"model_type": "gemma3", "mm_tokens_per_image": 256, "text_config": config}
    write = json_writer(tmp_path / "config.json", config)
    survives(lambda: read_architecture(tmp_path), write)


def test_mask_files(tmp_path: Path) -> None:
    path, pattern = tmp_path / "mask.safetensors", Pattern(2, 4)
    scores = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
    masks = {name: pattern.best(scores) for name in ("model.layers.0.a", "model.layers.0.b")}
    save_masks(path, masks, pattern, fingerprint="f", method="magnitude")
    survives(lambda: load_masks(path).verify(), container_writer(path))


def test_coded_mask_files(tmp_path: Path) -> None:
    """Format version 3, with a linear of each coding; none of its words decodes to a wrong mask."""
    path, pattern = tmp_path / "mask.safetensors", Pattern(2, 4)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    masks = {
        "model.layers.0.a": pattern.best(weight.abs()),
        "model.layers.0.b": pattern.best(weight),
    }
    index = {
        name: pattern.index_of(mask).numpy().reshape(-1).astype("u8")
        for name, mask in masks.items()
    }
    shapes = dict.fromkeys(masks, (64, 64))
    facts = Facts("f" * 64, "magnitude")
    save_coded(
        path,
        shapes,
        index.items(),
        PatternPlan.uniform([*shapes], pattern),
        facts,
        lambda name: weight,
    )
    codings = {name: coding_of(about) for name, about in load_masks(path).meta["tensors"].items()}
    assert set(codings.values()) == set(CODED)

    def read() -> None:
        found = load_masks(path).with_weights(lambda name: weight)
        for name in found:
            if name in masks and found.pattern == pattern:
                found[name]

    survives(read, container_writer(path), count=500)


def test_margin_files(tmp_path: Path) -> None:
    path, shape = tmp_path / "mask.safetensors", (8, 16)
    levels = torch.randint(16, shape, generator=torch.Generator().manual_seed(0)).byte()
    names = ("model.layers.0.a", "model.layers.0.b")
    margins = margins_path(path)
    save_margins(margins, "f", dict.fromkeys(names, shape), ((name, levels) for name in names))

    def read() -> None:
        for one in load_margins(path, "f").values():
            assert one.shape == shape

    survives(read, container_writer(margins))


def container_writer(path: Path) -> Callable[[random.Random], None]:
    """Writes a changed copy of a file of packed words: of its bytes, or of a value of its header
    with a checksum that fits, so that the values are looked at.
    """
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["megamask"])

    def write(choose: random.Random) -> None:
        if choose.random() < 0.5:
            put(path, mutated_bytes(data, choose))
            return
        changed = mutated(inner, choose)
        if isinstance(changed, dict):
            changed["sha256"] = header_digest(changed)
        text = {**header, "__metadata__": {"megamask": json.dumps(changed)}}
        encoded = json.dumps(text).encode()
        encoded += b" " * (-len(encoded) % 8)
        put(path, len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])

    return write


NAMES = ["debug", "domains", "quickstart", "quickstart-gemma3", "maskllm-llama2-7b"]


@pytest.mark.parametrize("recipe", NAMES)
def test_recipes(tmp_path: Path, recipe: str) -> None:
    import yaml

    text = (ROOT / "configs" / "recipes" / f"{recipe}.yaml").read_text()
    value, path = yaml.safe_load(text), tmp_path / "recipe.yaml"

    def write(choose: random.Random) -> None:
        if choose.random() < 0.5:
            put(path, json.dumps(mutated(value, choose)).encode("utf-8", "surrogatepass"))
        else:
            put(path, mutated_bytes(text.encode(), choose))

    survives(lambda: load_config(path), write, count=1200)


def test_recipes_in_old_words(tmp_path: Path) -> None:
    """Every old word, beside the new word that it became."""
    old = {
        "learn": {
            "learner": "maskpro", "distribution": "linear", "footprint": "lean",
            "loss": {"kind": "mix", "share": 0.5}, "weight_norm": {"coef": 1e-5, "decay": "none"},
            "optimizer": {"eps": 1e-8, "eps_rms": 0.1, "epsilon": [1e-8, 0.1]},
            "monitor": {"patience": 3, "tensorboard": True, "wandb": "off", "sinks": []},
            "maskpro": {"baseline": "winner"},
            "method": "subset", "distillation": {"share": 0.1}, "memory": "lean",
        },
        "data": {"append_eod": True, "eod_token": "x", "eod": "auto"},
        "plan": {"dp": 2, "gpu": "h100"}, "diff": {"a": "x"},
    }  # fmt: skip
    write = json_writer(tmp_path / "recipe.yaml", old)
    survives(lambda: load_config(tmp_path / "recipe.yaml"), write, count=800)


def test_safetensors_of_models(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"layer.{number}.weight": torch.ones(4, 4) for number in range(4)}, path)

    def read() -> None:
        with HFReader(tmp_path) as reader:
            for name in reader.names():
                reader.read(name, slice(0, 2))
                reader.tensor(name)

    survives(read, bytes_writer(path, path.read_bytes()), count=2500)


def test_indices_of_models(tmp_path: Path) -> None:
    for number in range(2):
        save_file({f"{number}.weight": torch.ones(4)}, tmp_path / f"{number}.safetensors")
    index = {
        "metadata": {"total_size": 32},
        "weight_map": {f"{number}.weight": f"{number}.safetensors" for number in range(2)},
    }
    write = json_writer(tmp_path / "model.safetensors.index.json", index)
    survives(lambda: HFReader(tmp_path).names(), write, count=1500)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path)
    return path.read_bytes()


def test_gguf_headers(tmp_path: Path, gguf: bytes) -> None:
    """Half of the mutations lie in the first KiB, where the counts and the facts are."""
    path = tmp_path / "m.gguf"

    def write(choose: random.Random) -> None:
        part = 1024 if choose.random() < 0.5 else len(gguf)
        put(path, mutated_bytes(gguf[:part], choose) + gguf[part:])

    outcomes = survives(lambda: read_layout(path, ARCHITECTURES), write, count=4000)
    assert outcomes["read"] > 25, outcomes  # weights and texts may hold anything


def test_gguf_files(tmp_path: Path, gguf: bytes) -> None:
    """What the check of the header lets through goes to the readers of libraries."""
    path, out = tmp_path / "m.gguf", tmp_path / "hf"

    def read() -> None:
        shutil.rmtree(out, ignore_errors=True)
        unpack(path, out)

    survives(read, bytes_writer(path, gguf), count=60)


def test_gguf_without_a_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader could fill a missing tensor with random numbers."""
    import gguf as library

    add = library.GGUFWriter.add_tensor
    monkeypatch.setattr(
        library.GGUFWriter,
        "add_tensor",
        lambda self, name, tensor: name == "blk.0.attn_q.weight" or add(self, name, tensor),
    )
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ArtifactError, match=r"misses blk\.0\.attn_q\.weight"):
        unpack(tmp_path / "m.gguf", tmp_path / "hf")


def test_snapshots(tmp_path: Path) -> None:
    """The note, the index and the tensors of a snapshot that 0.1.0 wrote."""
    folder = Path(shutil.copytree(SNAPSHOT, tmp_path / "step-00000002"))
    arch = read_architecture(TINY)
    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    note = json.loads(whole[NOTE])
    read = {name for name in whole if name.endswith(".distcp")} | {INDEX, NOTE}

    def write(choose: random.Random) -> None:
        for name in read:
            put(folder / name, whole[name])
        name = choose.choice(sorted(read))
        if name == NOTE:
            put(folder / NOTE, json.dumps(mutated(note, choose)).encode())
        else:
            put(folder / name, mutated_bytes(whole[name], choose))

    def masks() -> None:
        found = load_snapshot(folder, arch)
        _ = found[next(iter(found))]

    masks()  # the snapshot as it is
    survives(masks, write, count=500)


def test_common_files_of_snapshots(tmp_path: Path) -> None:
    torch.save({"steps": 3, "name": "x", "list": [1.0, None]}, tmp_path / "common.pt")
    data = (tmp_path / "common.pt").read_bytes()
    survives(lambda: check_common(tmp_path), bytes_writer(tmp_path / "common.pt", data), count=1500)


def test_results_and_metrics_of_runs(tmp_path: Path) -> None:
    config = load_config(None, [f"run_dir={tmp_path}"])
    paths = run_paths(config)
    paths.learn.mkdir()
    results = {
        "perplexity": {"dense": {"code": 7.0}, "learned": {"code": 9.0}, "wanda": {"code": 12.0}},
        "kl": {"learned": {"code": 0.3}, "wanda": {"code": 0.6}},
        "agreement": {"learned": {"code": 0.7}, "wanda": {"code": 0.5}},
        "protocol": {"window": 512, "tail": "dropped", "bos": False, "tokens": {"code": 6144}},
        "seconds": {"prune": 12.0, "wanda": 3.0},
        "density": {"dense": 1.0, "learned": 0.5},
        "mask_bytes": {"learned": 1000},
    }
    stamp = {"tokens": 10, "seconds": 1.5}
    lines = [
        {"kind": "train", "step": 1, **stamp, "loss": 3.0},
        {"kind": "evaluation", "step": 1, **stamp, "perplexity": {"code": 9.0}},
    ]

    def write(choose: random.Random) -> None:
        whole = "".join(f"{json.dumps(one)}\n" for one in lines)
        put(paths.results, json.dumps(results).encode())
        put(paths.learn / "metrics.jsonl", whole.encode())
        what = choose.random()
        if what < 0.6:
            json_writer(paths.results, results)(choose)
        else:
            line = json.dumps(mutated(choose.choice(lines), choose)).encode("utf-8", "replace")
            if what < 0.8:
                line = mutated_bytes(line, choose)
            put(paths.learn / "metrics.jsonl", line + b"\n")

    def read() -> None:
        data = read_run(config)
        findings(data.results)
        render_report(config, data, [])
        if data.results.get("perplexity"):
            format_table(data.results)

    survives(read, write, count=400)


def test_a_reader_that_waits_or_refuses_everything_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong answers: a hang that a reader takes for an error of the file, and no reading."""
    monkeypatch.setattr(mutations, "PATIENCE", 0.05)

    def waits() -> None:
        try:
            with reading(tmp_path):
                time.sleep(30)
        except Exception as error:
            raise ArtifactError(tmp_path, "is torn", "Make it.") from error

    def refuses() -> None:
        raise ArtifactError(tmp_path, "is torn", "Make it.")

    with pytest.raises(TooLong), patience():
        waits()
    for read, said in ((waits, "TooLong"), (refuses, "'refused': 20")):
        with pytest.raises(AssertionError, match=said):
            survives(read, lambda choose: None, count=20)


def test_a_reader_takes_at_most_twice_the_file(tmp_path: Path, gguf: bytes) -> None:
    """Measured at files of 32 MiB; a reader that held three copies would show."""
    size, path = 32, tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(size, 2**18)}, path)
    (tmp_path / "model.safetensors").symlink_to(path)
    padded = tmp_path / "m.gguf"
    padded.write_bytes(gguf + bytes(size * 2**20))

    def grown(read: object) -> float:
        reset_peak()
        start = peak_mib()
        assert callable(read)
        read()
        return peak_mib() - start

    assert grown(lambda: HFReader(tmp_path).tensor("a").sum()) < 2.1 * size
    assert grown(lambda: read_layout(padded, ARCHITECTURES)) < 2.1 * size

    def hold_three_copies() -> list[mmap.mmap]:
        """In new pages: memory that was freed before may still be resident, and would not show."""
        copies = [mmap.mmap(-1, size * 2**20) for _ in range(3)]
        for one in copies:
            one.write(padded.read_bytes()[: size * 2**20])
        return copies

    assert grown(hold_three_copies) > 2.5 * size  # the measure sees copies
