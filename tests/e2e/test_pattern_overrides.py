"""One model with masks of three patterns, through every verb."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import megamask
from megamask import load_masks, save_masks
from megamask.config import load_config
from megamask.errors import ArtifactError
from megamask.masks.margins import load_margins
from megamask.prepare.run_inputs import RunInputs
from megamask.sparsity.pattern import Pattern
from megamask.verbs.evaluate import find_masks
from tests.e2e.program import Finished, contents, here, in_process, refusal
from tests.e2e.test_pipeline import transformers_perplexity
from tests.masks import is_valid

pytestmark = pytest.mark.slow
Settings = Callable[[Path], list[str]]
ENTRIES = {"*.down_proj": "6:8", "model.layers.0.self_attn.*": "4:8:pair"}
MIXED = f"pattern_overrides={json.dumps(ENTRIES)}"
ONE_SHOT = ("magnitude", "sparsegpt")
OTHERS = ("wanda", "ria", "gblm", "pruner_zero", "admm", "sparsegpt_update", "admm_update")
WORDS = {
    "prune": (f"prune.methods=[{', '.join(ONE_SHOT)}]",),
    "learn": ("data.seq_length=16",),
    "evaluate": ("evaluate.masks={learned: learned}", "evaluate.compare_tokens=0"),
}
VERBS = ("prune", "learn", "export", "evaluate", "report", "inspect")


def expected(name: str) -> Pattern:
    """The pattern of a linear of this run, by a plain loop over the entries."""
    own = [text for entry, text in ENTRIES.items() if fnmatchcase(name, entry)]
    return Pattern.parse(own[0] if own else "2:4")


@pytest.fixture(scope="module")
def pipeline(
    prepared: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Finished]]:
    """A run folder in which every verb has run, and what they said."""
    run_dir = Path(shutil.copytree(prepared, tmp_path_factory.mktemp("mixed") / "run"))
    shutil.rmtree(run_dir / "masks")  # of 2:4
    said = {verb: here(verb, *settings(run_dir), MIXED, *WORDS.get(verb, ())) for verb in VERBS}
    return run_dir, said


def test_every_linear_has_its_own_pattern(pipeline: tuple[Path, dict[str, Finished]]) -> None:
    for method in (*ONE_SHOT, "learned"):
        path = pipeline[0] / "masks" / f"{method}.safetensors"
        masks = load_masks(path)
        masks.verify()
        assert len(masks) == 2 * 7 and masks.meta["format_version"] == 4
        for name, mask in masks.items():
            assert is_valid(expected(name), mask), (method, name)
            assert masks.patterns[name] == expected(name)
        assert str(masks.patterns) == "4:8:pair, 2:4 and 6:8" == masks.meta["pattern"]
        with pytest.raises(ArtifactError, match="several patterns"):
            _ = masks.pattern
        if method != "learned":
            load_margins(path.with_suffix(".margins"), masks.content_sha256).check_whole()


@pytest.mark.parametrize(
    "method", ["ria", *(pytest.param(one, marks=pytest.mark.nightly) for one in OTHERS)]
)
def test_every_criterion_and_the_polish(
    prepared: Path, settings: Settings, tmp_path: Path, method: str
) -> None:
    run_dir = Path(
        shutil.copytree(prepared, tmp_path / "run", ignore=shutil.ignore_patterns("masks"))
    )
    here("prune", *settings(run_dir), MIXED, f"prune.methods=[{method}]", "prune.polish=1")
    masks = load_masks(run_dir / "masks" / f"{method}.safetensors")
    assert len(masks) == 2 * 7
    assert all(is_valid(expected(name), mask) for name, mask in masks.items())


def test_a_linear_is_pruned_as_in_a_model_of_its_pattern_alone(
    pipeline: tuple[Path, dict[str, Finished]], prepared: Path, model: Path
) -> None:
    """Magnitude looks at a weight alone; SparseGPT's first linears see the same inputs."""
    masks = load_masks(pipeline[0] / "masks" / "magnitude.safetensors")
    dense = load_file(model / "model.safetensors")
    for name, mask in masks.items():
        assert torch.equal(mask, expected(name).best(dense[f"{name}.weight"].float().abs()))
        if expected(name) != Pattern(2, 4):  # the comparison sees another pattern
            assert not torch.equal(mask, Pattern(2, 4).best(dense[f"{name}.weight"].abs()))


def test_masks_of_the_run_have_the_patterns_that_are_asked_for(
    pipeline: tuple[Path, dict[str, Finished]], model: Path
) -> None:
    """A mask may be older than the settings. Settings without a pattern take the masks' own."""
    words = [f"run_dir={pipeline[0]}", f"model.hf={model}"]
    for asked in ([], [MIXED]):
        found = find_masks(RunInputs(load_config(None, [*words, *asked])))
        assert set(found) == {*ONE_SHOT, "learned"}
    for asked in (["pattern=2:4"], ['pattern_overrides={"*.down_proj": "6:8"}']):
        with pytest.raises(ArtifactError, match="Masks that evaluate.masks names"):
            find_masks(RunInputs(load_config(None, [*words, *asked])))
    named = [*words, "pattern=2:4", "evaluate.masks={learned: learned}"]
    assert set(find_masks(RunInputs(load_config(None, named)))) == {"learned"}
    results = json.loads((pipeline[0] / "results.json").read_text())
    assert results["pattern"] == {"learned": "4:8:pair, 2:4 and 6:8"}


def test_learning_moves_every_pattern(pipeline: tuple[Path, dict[str, Finished]]) -> None:
    folder = pipeline[0] / "masks"
    learned, prior = (load_masks(folder / f"{one}.safetensors") for one in ("learned", "sparsegpt"))
    moved = {learned.patterns[name] for name in learned if not learned[name].equal(prior[name])}
    assert moved == set(learned.patterns.distinct)


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        ("categorical", "torch"),
        ("maskpro", "torch"),
        pytest.param("categorical", "numba", marks=pytest.mark.nightly),
        pytest.param("maskpro", "numba", marks=pytest.mark.nightly),
        pytest.param("subset", "torch", marks=pytest.mark.nightly),
    ],
)
def test_the_other_methods_and_backends(
    pipeline: tuple[Path, dict[str, Finished]],
    settings: Settings,
    tmp_path: Path,
    method: str,
    backend: str,
) -> None:
    run_dir = Path(
        shutil.copytree(pipeline[0], tmp_path / "run", ignore=shutil.ignore_patterns("learn*"))
    )
    own = (f"learn.method={method}", f"learn.sampling.backend={backend}", "learn.steps=1")
    here("learn", *settings(run_dir), MIXED, *WORDS["learn"], *own)
    masks = load_masks(run_dir / "masks" / "learned.safetensors")
    assert all(is_valid(expected(name), mask) for name, mask in masks.items())


def test_a_killed_run_ends_the_same_and_its_snapshots_are_masks(
    pipeline: tuple[Path, dict[str, Finished]], settings: Settings, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(pipeline[0], tmp_path / "run"))
    learned = run_dir / "masks" / "learned.safetensors"
    whole = load_masks(pipeline[0] / "masks" / "learned.safetensors")
    for coding in ("words", "given-weights"):
        out = tmp_path / f"{coding}.safetensors"
        here(
            "extract",
            *settings(run_dir),
            str(run_dir / "learn/snapshots"),
            str(out),
            "--coding",
            coding,
        )
        again = load_masks(out, settings(run_dir)[1].partition("=")[2])
        assert again.patterns == whole.patterns and again.content_sha256 == whole.content_sha256
        assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert "2:4" in here("inspect", *settings(run_dir), str(out)).stdout

    # As after a kill in step 3: the last snapshot is that of step 2.
    shutil.rmtree(run_dir / "learn" / "snapshots" / "step-00000004")
    learned.unlink()
    here("learn", *settings(run_dir), MIXED, *WORDS["learn"])
    assert load_masks(learned).content_sha256 == whole.content_sha256
    # Another plan is another run, and its masks are no prior of this one.
    message = refusal(in_process("learn", *settings(run_dir)))
    assert "pattern_overrides" in message
    shutil.rmtree(run_dir / "learn")
    message = refusal(in_process("learn", *settings(run_dir)))
    assert "holds a 4:8:pair mask of model.layers.0.self_attn.q_proj, wanted 2:4" in message
    here(
        "learn",
        *settings(run_dir),
        MIXED,
        f"learn.prior.mask={pipeline[0]}/learn/snapshots",
        *WORDS["learn"],
        "learn.steps=1",
    )


def test_the_export_holds_the_masks_and_both_ways_measure_the_same(
    pipeline: tuple[Path, dict[str, Finished]], model: Path, settings: Settings
) -> None:
    run_dir, said = pipeline
    masks = load_masks(run_dir / "masks" / "learned.safetensors")
    written, dense = (load_file(one / "model.safetensors") for one in (run_dir / "export", model))
    for name, mask in masks.items():
        weight = dense[f"{name}.weight"]
        assert torch.equal(written[f"{name}.weight"], torch.where(mask, weight, 0.0)), name
    results = json.loads((run_dir / "results.json").read_text())
    for domain in ("prose", "code"):
        exported = transformers_perplexity(run_dir / "export", run_dir, domain)
        # as in test_pipeline
        assert exported == pytest.approx(results["perplexity"]["learned"][domain], rel=2e-5)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    density = sum(size * expected(name).density for name, size in sizes.items())
    assert results["density"]["learned"] == density / sum(sizes.values()) > 0.5
    shown = said["inspect"].stdout
    assert "4:8:pair, 2:4 and 6:8" in shown and f"{density / sum(sizes.values()):.4g}" in shown
    assert "6:8" in (run_dir / "report.html").read_text()
    # Without the settings of the mask, the mask is another one than was asked for.
    message = refusal(in_process("export", *settings(run_dir)))
    assert "o_proj, wanted 2:4" in message and "pattern_overrides" in message
    for kind, what in (("maskllm", "several patterns"), ("patch", "several patterns")):
        message = refusal(
            in_process(
                "export",
                *settings(run_dir),
                MIXED,
                f"export.format={kind}",
                f"export.out={run_dir}/out",
            )
        )
        assert what in message


def test_the_python_functions(
    pipeline: tuple[Path, dict[str, Finished]], model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = pipeline[0] / "masks" / "learned.safetensors"
    masks = load_masks(path)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    megamask.apply_masks(loaded, path)
    written = load_file(pipeline[0] / "export" / "model.safetensors")
    for name in masks:
        assert torch.equal(loaded.get_submodule(name).weight, written[f"{name}.weight"])
    assert megamask.verify(path, model).patterns == masks.patterns
    out = tmp_path / "again.safetensors"
    facts = {"fingerprint": masks.fingerprint, "method": "learned"}
    save_masks(out, masks, masks.patterns, **facts)
    assert load_masks(out).content_sha256 == masks.content_sha256
    first = next(iter(masks))
    with pytest.raises(megamask.errors.ArgumentError, match="a pattern for each mask"):
        save_masks(out, masks, {first: "2:4"}, **facts)
    with pytest.raises(megamask.errors.ArgumentError, match="keeps exactly"):
        save_masks(out, masks, dict.fromkeys(masks, "2:4"), **facts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"*.down": "6:8"}, "pattern_overrides = '*.down': a pattern that matches at least one"),
        ({"*.down_proj": "8:6"}, "pattern_overrides.*.down_proj = '8:6'"),
        ({"*.down_proj": "6:8", "model.layers.0.*": "4:8"}, "also matches *.down_proj"),
        ({"*.q_proj": "4:8"}, "which Megatron fuses"),
        ({"*.down_proj": "5:7"}, "in_features of model.layers.0.mlp.down_proj, here 128"),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "learn"])
def test_entries_that_cannot_work(
    prepared: Path, settings: Settings, verb: str, given: dict[str, str], said: str
) -> None:
    before = contents(prepared)
    entries = f"pattern_overrides={json.dumps(given)}"
    methods = "prune.methods=[ria]"  # of which no mask is there
    assert said in refusal(in_process(verb, *settings(prepared), entries, methods))
    assert contents(prepared) == before


def test_an_entry_of_dense_linears_is_refused(prepared: Path, settings: Settings) -> None:
    words = (*settings(prepared), "model.exclude=[model.layers.1.*]")
    entry = 'pattern_overrides={"model.layers.1.mlp.down_proj": "6:8"}'
    message = refusal(in_process("prune", *words, entry))
    assert "all that match it are kept dense" in message and "layers.1.mlp.down_proj" in message
    # An entry that also matches linears that are pruned is none of those.
    here("plan", *words, 'pattern_overrides={"*.down_proj": "6:8"}')
