"""Recipes load, files stay short, and the commands that the documents name exist."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megamask.config import load_config
from megamask.sparsity.pattern import Pattern
from megamask.verbs.table import VERBS

REPO = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPO / "configs" / "recipes").glob("*.yaml"))
MAX_LINES = 350


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_fits(recipe: Path) -> None:
    config = load_config(recipe)
    assert Pattern.parse(config.pattern).density < 1
    assert config.learn.global_batch % config.learn.micro_batch == 0
    assert set(config.data.blend) <= set(config.data.domains)
    assert config.run_dir == f"runs/{recipe.stem}"  # two recipes never share a folder


def test_recipes_are_found() -> None:
    assert {path.stem for path in RECIPES} >= {"quickstart", "debug", "maskllm-llama2-7b"}
    assert not set((REPO / "configs").rglob("*.yml")), "recipes end in .yaml"
    assert set((REPO / "configs").rglob("*.yaml")) == set(RECIPES), (
        "every YAML file is a recipe, and so is tested"
    )


def test_the_tiny_model_divides_among_8_ranks() -> None:
    model = json.loads((REPO / "configs" / "models" / "tiny-llama.json").read_text())
    for tp in (1, 2, 4, 8):
        assert model["num_attention_heads"] % tp == 0 and model["num_key_value_heads"] % tp == 0
        for in_features in (
            model["num_attention_heads"] * model["head_dim"],
            model["intermediate_size"],
        ):  # the row-parallel linears
            assert (in_features // tp) % 4 == 0


@pytest.mark.parametrize(
    "path", sorted((REPO / "megamask").rglob("*.py")), ids=lambda path: str(path.relative_to(REPO))
)
def test_a_file_is_short_enough_to_read(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(REPO)} has {lines} lines"


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_verb_exists(verb: str) -> None:
    found = importlib.util.find_spec(VERBS[verb].module)
    assert found is not None and found.origin is not None, VERBS[verb].module
    taken = ", arguments: [A-Za-z]+Arguments" if VERBS[verb].fields else ""
    assert re.search(
        rf"^def run\(config: Config{taken}\)", Path(found.origin).read_text(), re.MULTILINE
    )


DOCUMENTS = sorted(
    {
        *REPO.glob("*.md"),
        *REPO.glob("docs/*.md"),
        *REPO.glob("configs/**/*.md"),
        *REPO.glob("docker/*.md"),
    }
)


def named_commands(text: str) -> tuple[set[str], set[str]]:
    """(verbs, files): what a text tells the reader to run."""
    verbs = set(
        re.findall(
            r"(?:-m megamask|(?<![\w./-])megamask) (?!VERB)([a-z]+)(?= --config| [a-z_.]+=|`|$)",
            text,
            re.MULTILINE,
        )
    )
    files = set(
        re.findall(r"(?<![\w/])(?:\./)?((?:launch|benchmarks|configs|docker)/[\w./-]*\w)", text)
    )
    return verbs, files


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_named_commands_exist(document: Path) -> None:
    verbs, files = named_commands(document.read_text())
    assert verbs <= set(VERBS), verbs - set(VERBS)
    missing = [
        file
        for file in sorted(files)
        if not (REPO / file).exists() and file != "configs/recipes/X.yaml"
    ]
    assert not missing, missing


def test_a_missing_command_is_seen() -> None:
    verbs, files = named_commands(
        "`python -m megamask lern --config x`, ./launch/tset.sh and megamask export a.b=1"
    )
    assert verbs == {"lern", "export"} and files == {"launch/tset.sh"}


@pytest.mark.parametrize(
    "script", sorted((REPO / "launch").glob("*.s*")), ids=lambda path: path.name
)
def test_a_script_parses_and_carries_no_settings(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name == "env.sh" or os.access(script, os.X_OK), (
        "env.sh is sourced, the others are run"
    )
    assert not re.search(
        r"\b(learn|optimizer|sampling|prune|calibration)\.[a-z_]+=\d",
        re.sub(r"(?m)^\s*#.*$", "", script.read_text()),
    )


def test_constraints_cover_the_requirements() -> None:
    """Every package that pyproject.toml asks for is pinned, for each supported Python, and the
    unrelated "apex" is not asked for.
    """
    project = (REPO / "pyproject.toml").read_text().partition("[project]")[2]
    asked = {
        re.sub(r"[-_.]+", "-", name).lower()
        for name in re.findall(r'"([A-Za-z][\w.-]*)(?:\[\w+\])?>=', project)
    }
    pinned = {
        re.sub(r"[-_.]+", "-", name).lower()
        for name in re.findall(r"(?m)^([\w.-]+)==", (REPO / "constraints.txt").read_text())
    }
    assert "apex" not in asked and {"torch", "megatron-core"} <= asked
    assert asked - pinned == {
        "transformer-engine"
    }  # built against the machine's own torch and CUDA


def test_pre_commit_uses_the_pinned_tools() -> None:
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = (REPO / "constraints.txt").read_text().splitlines()
    asked = [package for hook in hooks for package in hook.get("additional_dependencies", [])]
    assert len(asked) >= 3 and set(asked) <= set(pins)


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megamask", *arguments]
    return subprocess.run(
        command,
        cwd=REPO,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_names_every_verb() -> None:
    done = run_cli("--help")
    assert done.returncode == 0 and all(
        re.search(rf"^  {verb} ", done.stdout, re.MULTILINE) for verb in VERBS
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lern"], "Did you mean learn?"),
        (["learn", "--recipe", "x"], "--config FILE"),
        (["learn", "--config"], "needs a recipe file"),
        (["learn", "--config", "no/such.yaml"], "no/such.yaml"),
        (["learn", "learn.stepz=3"], "Did you mean learn.steps?"),
        (["learn", "learn.steps"], "key.sub=value"),
    ],
)
def test_a_user_error_is_one_message(arguments: list[str], expected: str) -> None:
    done = run_cli(*arguments, RANK="0")
    assert done.returncode == 2
    assert (
        expected in done.stderr
        and "Traceback" not in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )
    assert "(rank 3)" in run_cli(*arguments, RANK="3").stderr
