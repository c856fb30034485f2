"""One-shot pruning as the verb prune does it, against a plain loop over a transformers model.

Both sides start from a model in memory and the same random tokens, and end with masks in memory.
Files are read and written outside the timing. The models of all numbers of layers take their turns
in every round.

python -m benchmarks.oneshot --threads 1 --json oneshot.json
python -m benchmarks.oneshot --hf runs/quickstart/hf --layers 4 8 --rounds 3
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import Timings, now, parser, report, table
from benchmarks.plain_oneshot import prune_model
from megamask.config import Config, load_config
from megamask.model.build import DTYPES, build_model, prunable_linears
from megamask.model.checkpoint import fill_from_hf
from megamask.model.mask_shards import linear_rules
from megamask.oneshot.criteria import find_criterion
from megamask.oneshot.layerwise import PruningJob, prune_layerwise
from megamask.parallel.mesh import Mesh, start
from megamask.sparsity.pattern import Pattern
from megamask.user_paths import path_argument
from megamask.weights.architecture import read_architecture
from megamask.weights.hf_files import open_checked
from megamask.weights.layer_plan import layer_plan

PLAIN, MEGAMASK = "plain", "megamask"
SIDES = (PLAIN, MEGAMASK)
VOCAB = 1000  # of a random model; no part of the time
METHODS = ("magnitude", "wanda", "sparsegpt", "sparsegpt_update")
Masks = dict[str, Tensor]  # (O, I) bool by HF name
Figures = dict[str, Any]


@dataclass
class Case:
    """A model on both sides.

    Attributes:
        plain: the transformers model.
        dense: its weights, to start again from.
        job: the Megatron model with the same weights.
        tokens_NS: the calibration samples.
    """

    plain: LlamaForCausalLM
    dense: dict[str, Tensor]
    job: PruningJob
    tokens_NS: Tensor

    @property
    def pattern(self) -> Pattern:
        """The pattern of all linears."""
        return Pattern.parse(self.job.config.pattern)

    def run(self, side: str, method: str) -> tuple[float, float, Masks]:
        """Prune by one side; returns seconds, CPU seconds of this process, and the masks."""
        config, device = self.job.config, self.job.mesh.device
        micro = config.calibration.micro_batch
        self.plain.load_state_dict(self.dense)
        begin, begin_cpu = now(device), time.process_time()
        if side == PLAIN:
            with torch._C.DisableTorchFunction():  # on a CPU ``start`` looks into every call
                masks = prune_model(self.plain, self.tokens_NS, method, self.pattern, micro)
        else:
            criterion = find_criterion(method, config.prune)
            shards = prune_layerwise(self.job, {method: criterion}, self.tokens_NS)[method]
        used, took = time.process_time() - begin_cpu, now(device) - begin
        if side == MEGAMASK:
            masks = self.by_hf_name({name: one.mask_OI for name, one in shards.items()})
        return took, used, masks

    def by_hf_name(self, masks: Masks) -> Masks:
        """The masks of the Megatron linears, divided into those of the Hugging Face linears."""
        table_of = linear_rules(self.job.arch)
        parts = [table_of[name].to_hf(mask_OI) for name, mask_OI in masks.items()]
        return {name.removesuffix(".weight"): one for part in parts for name, one in part.items()}


def main(argv: list[str] | None = None) -> int:
    """Time both sides in turn; print and write the figures."""
    options = read_options(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures, device = measure(options, Path(folder))
    print_tables(options, figures)
    report("oneshot", options, {"runs": figures}, device)
    return 0


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    known = parser(__doc__ or "")
    known.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    known.add_argument("--pattern", default="2:4", help="of single weights")
    known.add_argument("--hidden", type=int, default=256, help="width of the random Llama")
    known.add_argument("--ffn", type=int, help="of the random Llama (default: 2.75 hidden)")
    known.add_argument("--hf", type=path_argument, metavar="FOLDER", help="a real Llama instead")
    known.add_argument(
        "--layers", type=int, nargs="+", help="of the models (default: 4 12, or all of --hf)"
    )
    known.add_argument("--samples", type=int, default=32, help="calibration samples")
    known.add_argument("--tokens", type=int, default=128, help="tokens of a sample")
    known.add_argument("--micro", type=int, default=4, help="samples of a forward pass")
    known.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    known.add_argument(
        "settings", nargs="*", metavar="key=value", help="megamask settings, as for its verbs"
    )
    return known.parse_args(argv)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Figures], torch.device]:
    """The figures of every method at every number of layers."""
    counts = options.layers or ([4, 12] if options.hf is None else [None])
    folders = [write_model(options, folder / str(count), count) for count in counts]
    with start(configured(options, folders[0])) as mesh:
        cases = [open_case(options, one, mesh) for one in folders]
        runs = [Run(case, method) for case in cases for method in options.methods]
        for number in range(options.rounds + 1):
            for run in runs:
                run.round(counts=number > 0)  # the first one warms up
        return [run.figures() for run in runs], mesh.device


class Run:
    """The rounds of a method on a model."""

    def __init__(self, case: Case, method: str) -> None:
        self.case, self.method = case, method
        self.seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        self.cpu_seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        self.equal = 0.0

    def round(self, counts: bool) -> None:
        """Prune by both sides; a round that does not count compares their masks."""
        masks = {}
        for side in SIDES:
            took, used, masks[side] = self.case.run(side, self.method)
            if counts:
                self.seconds[side].append(took)
                self.cpu_seconds[side].append(used)
        if not counts:
            self.equal = equal_groups(masks[PLAIN], masks[MEGAMASK], self.case.pattern.m)

    def figures(self) -> Figures:
        """Every round, and what follows from them."""
        layers = self.case.job.arch.num_layers
        wall, cpu = Timings(self.seconds), Timings(self.cpu_seconds)
        return {
            "method": self.method,
            "layers": layers,
            "ms_a_layer": {side: 1e3 * wall.median(side) / layers for side in SIDES},
            "cpu_ms_a_layer": {side: 1e3 * cpu.median(side) / layers for side in SIDES},
            "ratio": wall.ratio(MEGAMASK, PLAIN),
            "cpu_ratio": cpu.ratio(MEGAMASK, PLAIN),
            "equal_groups": self.equal,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }


def equal_groups(masks: Masks, others: Masks, group: int) -> float:
    """Share of the groups of all linears that two sets of masks prune alike."""
    assert masks.keys() == others.keys()
    alike = [
        (one == others[name]).unflatten(-1, (-1, group)).all(-1).flatten()
        for name, one in masks.items()
    ]
    return float(torch.cat(alike).double().mean())


def write_model(options: argparse.Namespace, folder: Path, layers: int | None) -> Path:
    """Write a random Llama, or the first layers of ``--hf``; returns its folder."""
    torch.manual_seed(0)
    if options.hf is None:
        sizes = LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=options.ffn or 11 * options.hidden // 4,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            max_position_embeddings=max(options.tokens, 2048),
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(sizes)
    else:
        model = LlamaForCausalLM.from_pretrained(options.hf)
        if layers is not None:
            body: Any = model.model
            body.layers = body.layers[:layers]
            model.config.num_hidden_layers = len(body.layers)
    model.to(DTYPES[options.dtype]).save_pretrained(folder)
    return folder


def configured(options: argparse.Namespace, hf: Path) -> Config:
    """The settings of a run on the model ``hf``."""
    chosen = {
        "run_dir": hf.parent / "run",
        "model.hf": hf,
        "device": options.device,
        "dtype": options.dtype,
        "pattern": options.pattern,
        "calibration.micro_batch": options.micro,
    }
    if options.threads:
        chosen["parallel.threads"] = options.threads
    words = [f"{key}={value}" for key, value in chosen.items()]
    return load_config(None, [*words, *options.settings])


def open_case(options: argparse.Namespace, hf: Path, mesh: Mesh) -> Case:
    """Load a model on both sides."""
    config, arch = configured(options, hf), read_architecture(hf)
    model = build_model(config, arch, mesh)
    with open_checked(hf) as reader:
        fill_from_hf(model, arch, mesh, reader)
    linears = prunable_linears(model, config, arch)
    job = PruningJob(config, mesh, arch, layer_plan(arch, config), model.eval(), linears)
    plain = LlamaForCausalLM.from_pretrained(hf, dtype=DTYPES[config.dtype]).eval()
    plain = plain.to(mesh.device).requires_grad_(False)
    dense = {name: one.clone() for name, one in plain.state_dict().items()}
    source = torch.Generator().manual_seed(0)
    tokens_NS = torch.randint(arch.vocab, (options.samples, options.tokens), generator=source)
    return Case(plain, dense, job, tokens_NS.to(mesh.device))


def print_tables(options: argparse.Namespace, figures: list[Figures]) -> None:
    """A row for each method and number of layers, and how the time of a layer grows."""
    rows = []
    for one in figures:
        wall, cpu = one["ms_a_layer"], one["cpu_ms_a_layer"]
        quartiles = f"{one['ratio']['low']:.2f} to {one['ratio']['high']:.2f}"
        rows.append(
            [one["method"], one["layers"], wall[PLAIN], wall[MEGAMASK], one["ratio"]["median"]]
            + [quartiles, cpu[PLAIN], cpu[MEGAMASK], one["cpu_ratio"]["median"]]
            + [f"{one['equal_groups']:.3%}"]
        )
    about = options.hf.name if options.hf else f"a random Llama of hidden {options.hidden}"
    table(
        f"{about}, {options.samples} x {options.tokens} tokens, {options.dtype}; ms a layer, "
        f"medians of {options.rounds} rounds",
        ["method", "layers", PLAIN, MEGAMASK, "ratio", "quartiles"]
        + [f"CPU ms, {PLAIN}", f"CPU ms, {MEGAMASK}", "ratio of CPU", "equal groups"],
        rows,
    )
    first, last = figures[0]["layers"], figures[-1]["layers"]
    if first == last:
        return
    by_place = {(one["method"], one["layers"]): one for one in figures}
    growth = [
        [method, *(_growth(by_place[method, first], by_place[method, last], of, side)
                   for of in ("ms_a_layer", "cpu_ms_a_layer") for side in SIDES)]
        for method in options.methods
    ]  # fmt: skip
    table(
        f"time of a layer of {last} over that of a layer of {first}; 1 is flat",
        ["method", *SIDES, *(f"CPU, {side}" for side in SIDES)],
        growth,
    )


def _growth(few: Figures, many: Figures, of: str, side: str) -> float:
    return float(many[of][side] / few[of][side])


if __name__ == "__main__":
    sys.exit(main())
