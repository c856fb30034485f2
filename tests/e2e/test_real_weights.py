"""Real weights of published models through every verb: what transformers says of the model and of
the exported folder is what megamask measured, and the licence goes where the weights go.

A run takes minutes a model. ``MEGAMASK_REAL_RUNS`` names a folder for the runs, where a run that
was stopped goes on.
"""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megamask.weights.hf_files import open_checked
from tests.e2e.program import here
from tests.parallel.ranks import run_ranks
from tests.parity.megatron import Output, hf_tensors, output_of_weights, transformers_output
from tests.parity.real_models import REAL_MODELS, find_model, licences_beside
from tests.unit.weights.test_from_gguf import write_gguf

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(3600)]
WINDOW, TOKENS = 256, 1024  # of an evaluation; tokens of each domain
LENGTH = 128  # tokens of a sample that is learned from, and of a window of logits
STEPS = 20
DOMAINS = {"code": "stdlib", "prose": "pydocs"}
SETTINGS = (
    *("dtype=fp32", "data.domains={}"),
    *(
        f"data.domains.{name}={{kind: {kind}, max_bytes: 400000, heldout: 0.1}}"
        for name, kind in DOMAINS.items()
    ),
    *(f"data.seq_length={LENGTH}", "prune.methods=[wanda]"),
    *(f"calibration.seq_length={LENGTH}", "calibration.samples=8"),
    *("learn.preset=best", "learn.prior.mask=wanda", f"learn.steps={STEPS}"),
    # the defaults, in the place of the recipe's rate of a toy
    *("learn.optimizer.lr=null", "learn.optimizer.min_lr=null", "learn.sampling.noise=0"),
    *("learn.micro_batch=1", "learn.global_batch=1", f"learn.snapshot.every={STEPS}"),
    *("learn.monitor.evaluate_every=0", "evaluate.micro_batch=1", "evaluate.compare_tokens=0"),
    *(f"evaluate.window={WINDOW}", f"evaluate.max_tokens={TOKENS}"),
)


@dataclass(frozen=True)
class Run:
    """A run of a model after every verb: the file or folder that the model came from, its Hugging
    Face folder, and the folder of the run.
    """

    name: str
    source: Path
    hf: Path
    folder: Path


@pytest.fixture(scope="module", params=list(REAL_MODELS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    source = find_model(request.param, request.config.cache)
    kept = os.environ.get("MEGAMASK_REAL_RUNS")
    folder = Path(kept, request.param) if kept else tmp_path_factory.mktemp(request.param)
    return every_verb(request.param, source, folder)


def every_verb(name: str, source: Path, folder: Path) -> Run:
    """Take a GGUF file or a Hugging Face folder through every verb that is not done yet."""
    hf = source if source.is_dir() else folder / "hf"
    words = [f"run_dir={folder}", f"model.hf={hf}", *SETTINGS]
    first = [] if hf == source else ["gguf"]
    for verb in (*first, "convert", "tokenize", "prune", "learn", "export", "evaluate"):
        done = folder / f"{verb}.done"
        if not done.exists():
            more = [f"model.gguf={source}"] if verb == "gguf" else []
            print(f"{verb}: {here(verb, *words, *more).seconds:.0f} s")
            done.touch()
    return Run(name, source, hf, folder)


def tokens_of(run: Run) -> torch.Tensor:
    """(1, S): English prose about Python, with the BOS that the tokenizer puts before it."""
    from transformers import AutoTokenizer

    text = pydoc_data.topics.topics["assignment"]
    tokens = AutoTokenizer.from_pretrained(run.hf, local_files_only=True)(text)["input_ids"]
    return torch.tensor(tokens[:LENGTH])[None]


def check_logits(run: Run) -> Output:
    """What transformers says of the model, which is what megamask says, and not of the export."""
    tokens_NS = tokens_of(run)
    expected = transformers_output(run.hf, tokens_NS)
    (found,) = run_ranks(output_of_weights, 1, run.folder / "weights", tokens_NS, 1)
    print(
        f"logits differ by {found.distance(expected):.1e} of their scale, "
        f"perplexity {found.perplexity:.6g}, {expected.perplexity:.6g}"
    )
    assert found.agrees(expected)
    assert not found.agrees(transformers_output(run.folder / "export", tokens_NS))
    return expected


def test_logits_are_those_of_transformers(run: Run) -> None:
    # the model reads English; a model of noise has thousands
    assert 3 < check_logits(run).perplexity < 100


def test_the_weights_come_back_bit_for_bit(run: Run) -> None:
    check_weights(run)


def check_weights(run: Run) -> None:
    back = hf_tensors(run.folder / "weights")
    with open_checked(run.hf) as source:
        assert set(back) == set(source.names())
        for name, tensor in back.items():
            original = source.tensor(name)
            assert tensor.dtype == original.dtype, name
            assert torch.equal(tensor.view(torch.uint8), original.view(torch.uint8)), name


def perplexity(hf: Path, run: Run, domain: str) -> float:
    """The protocol in plain numpy, torch and transformers: windows of the held-out stream, each
    with a BOS of its own where documents begin with one.
    """
    from transformers import AutoModelForCausalLM

    shards = run.folder / "shards" / domain
    meta = json.loads((shards / "meta.json").read_text())
    bos = meta["tokenizer"]["bos"] if meta["prepend_bos"] else None
    stream = np.fromfile(shards / "heldout.bin", dtype=meta["dtype"]).tolist()
    windows: list[list[int]] = []
    while len(windows) < TOKENS // WINDOW:
        first = [] if bos is None or stream[0] == bos else [bos]
        taken = WINDOW - len(first)
        windows.append(first + stream[:taken])
        stream = stream[taken:]
    model = AutoModelForCausalLM.from_pretrained(
        hf, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()
    losses = []
    with torch.no_grad():
        for window in windows:
            tokens = torch.tensor([window])
            logits = model(tokens).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def check_perplexities(run: Run) -> list[tuple[float, float, float]]:
    """Perplexity of the dense model, the learned mask and its prior in each domain; the first two
    are compared with transformers.
    """
    rows = []
    measured = json.loads((run.folder / "results.json").read_text())["perplexity"]
    for domain in DOMAINS:
        dense, learned, prior = (measured[row][domain] for row in ("dense", "learned", "wanda"))
        found = perplexity(run.folder / "export", run, domain)
        plain = perplexity(run.hf, run, domain)
        print(
            f"{domain}: dense {dense:.6g} and {plain:.6g} in transformers, learned {learned:.6g} "
            f"and {found:.6g}, wanda {prior:.6g}"
        )
        assert found == pytest.approx(learned, rel=5e-5)  # four digits
        assert plain == pytest.approx(dense, rel=5e-5)
        rows.append((dense, learned, prior))
    return rows


def test_both_paths_measure_the_same_perplexity(run: Run) -> None:
    for dense, learned, prior in check_perplexities(run):
        assert dense < 0.9 * learned and learned < prior


def test_the_licence_goes_where_the_weights_go(run: Run, tmp_path: Path) -> None:
    check_licences(run, tmp_path)


def check_licences(run: Run, tmp_path: Path) -> None:
    model, beside = REAL_MODELS[run.name], run.source if run.source.is_dir() else run.source.parent
    licences = licences_beside(beside)
    if not os.environ.get(model.variable):  # out of the packages
        assert set(model.licences) <= set(licences)
    out = tmp_path / "megatron"
    words = [f"run_dir={run.folder}", f"model.hf={run.hf}", *SETTINGS]
    here("export", *words, "export.format=megatron", f"export.out={out}")
    for folder in (run.hf, run.folder / "export", out):
        for one in licences:
            assert (folder / one).read_bytes() == (beside / one).read_bytes(), (folder, one)
    shutil.rmtree(out)


@pytest.mark.parametrize("is_folder", [False, True], ids=["gguf", "folder"])
def test_a_qwen_that_a_variable_names_goes_the_same_way(
    is_folder: bool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A random model of one layer in the place of real weights, which no package has."""
    file = tmp_path / "given" / "qwen.gguf"
    file.parent.mkdir()
    write_gguf(file, arch="qwen2", context=2 * WINDOW)
    (file.parent / "LICENSE").write_text("Apache License 2.0")
    named = file
    if is_folder:
        named = tmp_path / "hf"
        here("gguf", f"model.gguf={file}", f"model.hf={named}")
    monkeypatch.setenv("MEGAMASK_QWEN", str(named))
    source = find_model("qwen", request.config.cache)
    assert source == named
    run = every_verb("qwen", source, tmp_path / "run")
    assert (run.hf == source) == is_folder
    check_logits(run)
    check_weights(run)
    check_perplexities(run)
    check_licences(run, tmp_path)
    assert (run.folder / "export" / "LICENSE").read_text() == "Apache License 2.0"
