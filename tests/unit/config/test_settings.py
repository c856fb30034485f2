"""All settings by name, their page in the docs, and the help of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from megamask.__main__ import main
from megamask.config import describe
from megamask.config.deciding import settings_of_role
from megamask.config.load import load_config
from megamask.config.section import Role, Section
from megamask.config.tree import Config
from megamask.verbs.table import VERBS

REPO = Path(__file__).resolve().parents[3]
# A setting more is a decision: write it here under its role, which its Field says.
DECIDING = """
    seed dtype pattern pattern_overrides model.include model.exclude model.exclude_sensitive
    data.domains data.blend data.seq_length data.eod
    calibration.samples calibration.seq_length calibration.seed
    prune.methods prune.inputs prune.damp prune.block prune.gradual
    prune.alpha prune.polish
    learn.method learn.global_batch
    learn.sampling.logit_std learn.sampling.initial_noise learn.prior.strength learn.prior.margins
    learn.state.logits learn.optimizer.kind
    learn.maskpro.initial_logit learn.maskpro.samples
    evaluate.protocol evaluate.text evaluate.window evaluate.max_tokens evaluate.masks evaluate.bos
    evaluate.compare_tokens
    tasks.names tasks.include tasks.limit tasks.shots tasks.folder
    data.bos
    export.format export.mask export.weights export.out
    sensitivity.mask sensitivity.by sensitivity.rows sensitivity.keep_dense
    recover.method recover.mask recover.solver recover.damp recover.steps recover.global_batch
    recover.rate recover.distillation recover.rank recover.alpha
    speed.folder speed.dtype speed.tokens speed.prompt speed.generate speed.batch speed.rounds
"""
EACH_STEP = """
    learn.steps learn.sampling.mode learn.sampling.draws learn.sampling.kappa learn.sampling.tau
    learn.sampling.noise learn.sampling.schedule learn.sampling.annealed_by
    learn.state.grads
    learn.optimizer.lr learn.optimizer.min_lr learn.optimizer.warmup_steps
    learn.optimizer.schedule learn.optimizer.weight_decay learn.optimizer.betas
    learn.optimizer.epsilon learn.optimizer.clip
    learn.maskpro.lr learn.maskpro.masks learn.maskpro.data learn.maskpro.baseline
    learn.maskpro.tracker_decay learn.maskpro.score
    learn.distillation.share learn.distillation.temperature learn.distillation.top_k
    learn.distillation.hidden learn.weight_norm
"""
CONTENT = "model.hf model.gguf model.megatron data.tokenizer learn.prior.mask"
FREE = """
    run_dir device deterministic parallel.tp parallel.sequence_parallel parallel.recompute
    parallel.fused parallel.start_minutes parallel.first_step_minutes parallel.timeout_minutes
    parallel.threads
    calibration.micro_batch data.processes
    model.ignore_keys model.sensitivity
    learn.preset learn.memory learn.micro_batch learn.resume learn.sampling.backend
    learn.state.masked_weight learn.state.track_flips learn.optimizer.distributed
    learn.snapshot.every learn.snapshot.keep learn.snapshot.background learn.monitor.evaluate_every
    learn.monitor.evaluate_windows learn.monitor.measure_every learn.monitor.sinks
    learn.monitor.wandb_project
    evaluate.micro_batch recover.out recover.micro_batch recover.snapshot_every
    launch.launcher launch.nodes launch.processes_per_node launch.cpus_per_process launch.time
    launch.warning launch.account launch.partition launch.qos launch.sbatch launch.setup
    launch.container launch.mounts launch.retries
"""


def test_the_settings_are_these() -> None:
    roles: dict[Role, str] = {
        "decides": DECIDING,
        "each step": EACH_STEP,
        "content": CONTENT,
        "free": FREE,
    }
    for role, keys in roles.items():
        assert sorted(settings_of_role(role)) == sorted(keys.split()), role
    assert sorted(leaf.key for leaf in describe.leaves()) == sorted(
        " ".join(roles.values()).split()
    )


def test_every_setting_says_what_it_is_in_words_of_the_tree() -> None:
    sections = [Config]
    for section in sections:
        for name, field in section.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                assert issubclass(annotation, Section)
                sections.append(annotation)  # type: ignore[arg-type]
            else:
                assert field.description, name


def test_the_page_of_settings_is_up_to_date() -> None:
    page = describe.as_markdown()
    assert (REPO / "docs" / "settings.md").read_text() == page, "run megamask settings --markdown"
    settings = [leaf.key for leaf in describe.leaves()]
    assert all(f"`{key}` = `" in page for key in settings)
    assert max(map(len, page.splitlines())) <= 100


def test_defaults_are_written_as_a_recipe_reads_them() -> None:
    words = [f"{leaf.key}={leaf.default}" for leaf in describe.leaves()]
    assert load_config(None, words) == Config()


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("seed", "whole number from 0 to 4,294,967,295"),
        ("learn.optimizer.lr", "number from 1e-12 to 1e+06 | null"),
        ("learn.optimizer.epsilon", "[number from 1e-30 to 1e+06, number from 0 to 1e+06]"),
        ("learn.monitor.sinks", "list of tensorboard | wandb | wandb_offline"),
        ("parallel.recompute", "false | true | mlp"),
        ("data.domains", "name: mapping"),
    ],
)
def test_ranges_are_said(key: str, allowed: str) -> None:
    ((leaf,),) = [group.leaves for group in describe.groups([key])]
    assert (leaf.key, leaf.allowed) == (key, allowed)


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_what_a_verb_takes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert VERBS[verb].summary in said and "--dry-run" in said
    assert all(f"{leaf.key} = " in said for group in _groups(verb) for leaf in group.leaves)
    assert all(str(one.metadata["help"])[:30] in said for one in VERBS[verb].fields)
    assert _groups(verb) or verb in ("settings", "recipes")


@pytest.mark.parametrize(
    ("verb", "usage"), [("submit", "[VERB]"), ("inspect", "[MASK]"), ("extract", "SNAPSHOT FILE")]
)
def test_help_puts_what_may_be_left_out_into_brackets(
    verb: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    assert f"megamask {verb} {usage} [--config FILE]" in capsys.readouterr().out


def _groups(verb: str) -> list[describe.Group]:
    """Of every section that the table names, which must exist."""
    sections = VERBS[verb].sections
    assert all(describe.groups([section]) for section in sections), sections
    return describe.groups(sections) if sections else []


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from megamask.__main__ import main; "
        "[main([*words, '--help']) for words in ([], ['learn'])]; main(['settings']); "
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_settings_prints_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "learn.prior"]) == 0
    said = capsys.readouterr().out
    assert "learn.prior.mask = sparsegpt" in said and "learn.steps" not in said
    assert main(["settings", "learn.priors"]) == 2
    assert "PREFIX = 'learn.priors'" in (error := capsys.readouterr().err)
    assert "Did you mean learn.prior?" in error


def test_a_dry_run_prints_a_recipe_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["learn.preset=maskllm", f"run_dir={tmp_path / 'run'}"]
    assert main(["prune", "--dry-run", *words]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert load_config(recipe) == load_config(None, words) and not (tmp_path / "run").exists()
