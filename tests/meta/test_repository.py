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
from pydantic import BaseModel

from megamask import __main__ as program
from megamask.__main__ import main
from megamask.config import load_config
from megamask.config.tree import Config
from megamask.errors import EXIT_USER_ERROR
from megamask.sparsity.pattern import Pattern
from megamask.verbs.table import VERBS
from tests.conftest import FIRST

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
    taken = ", arguments: [A-Za-z]+Arguments( = [A-Z_]+)?" if VERBS[verb].fields else ""
    taken += r", stop: StopRequest \| None = None" if VERBS[verb].saves_on_signal else ""
    assert re.search(
        rf"^def run\(config: Config{taken}\)", Path(found.origin).read_text(), re.MULTILINE
    )


DOCUMENTS = sorted(
    {
        *REPO.glob("*.md"),
        *REPO.glob("docs/**/*.md"),
        *REPO.glob("configs/**/*.md"),
        *REPO.glob("docker/*.md"),
        REPO / "benchmarks" / "README.md",
        *REPO.glob("benchmarks/gpu/*.md"),
    }
)


GENERATED = {
    "docs/settings.md",
    "docs/results/evidence.md",
    "docs/results/learners.md",
    "docs/results/domains.md",
}
HISTORY = {"docs/log.md", "CHANGELOG.md"}  # they name files that are gone
MAX_COLUMNS = 100
SUFFIXES = (".py", ".sh", ".sbatch", ".md", ".html", ".json", ".yaml")
MAX_README_WORDS = 1250


FOLDERS = "examples|launch|benchmarks|configs|docker|docs|megamask|studies|tests"


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
        re.findall(
            rf"(?<![\w/])(?:\./)?((?:{FOLDERS})/[\w./-]*\w)",
            text,
        )
    )
    return verbs, files


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_named_commands_exist(document: Path) -> None:
    verbs, files = named_commands(document.read_text())
    assert verbs <= set(VERBS), verbs - set(VERBS)
    is_history = str(document.relative_to(REPO)) in HISTORY
    missing = [
        file
        for file in sorted(files)
        if not (REPO / file).exists()
        and file != "configs/recipes/X.yaml"
        and not (is_history and file.startswith("megamask/"))
    ]
    assert not missing, missing


def test_a_missing_command_is_seen() -> None:
    verbs, files = named_commands(
        "`python -m megamask lern --config x`, ./launch/tset.sh and megamask export a.b=1"
    )
    assert verbs == {"lern", "export"} and files == {"launch/tset.sh"}


def unknown_settings(text: str) -> set[str]:
    """Dotted settings that a text names and the tree does not have."""
    names = "|".join(
        name for name, one in Config.model_fields.items() if is_section(one.annotation)
    )
    found = re.findall(rf"(?<![\w./\"])((?:{names})\.[a-z_]+[a-z_.]*[a-z_])(?![\w/]|\.\*)", text)
    return {key for key in found if not key.endswith(SUFFIXES) and not is_setting(key)}


def is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def is_setting(key: str) -> bool:
    section: type[BaseModel] = Config
    for name in key.split("."):
        if name not in section.model_fields:
            return False
        annotation = section.model_fields[name].annotation
        if not is_section(annotation):
            return True  # below it, if there is more, lie the user's own names
        assert isinstance(annotation, type)
        section = annotation
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_named_settings_exist(document: Path) -> None:
    if str(document.relative_to(REPO)) not in {*HISTORY, *GENERATED}:
        assert not unknown_settings(document.read_text())


def test_an_unknown_setting_is_seen() -> None:
    text = "`learn.stepz=3`, `learn.optimizer.lr`, launch/learn.sh, learn.sh and data.blend.code"
    assert unknown_settings(text) == {"learn.stepz"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_recipes_in_documents_load(document: Path, tmp_path: Path) -> None:
    for text in re.findall(r"(?ms)^```yaml\n(.*?)^```", document.read_text()):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text)
        config = load_config(recipe)
        assert set(config.data.blend) <= set(config.data.domains)


def long_lines(text: str) -> list[str]:
    """Lines of more than MAX_COLUMNS columns, outside tables, code blocks and lines that a link
    makes long.
    """
    is_code, found = False, []
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        is_exempt = is_code or line.lstrip().startswith("|") or line.startswith("    ")
        is_link = "](" in line and len(line.split("](")[0]) < MAX_COLUMNS
        if len(line) > MAX_COLUMNS and not is_exempt and not is_link:
            found.append(line)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_lines_of_a_document_are_short(document: Path) -> None:
    if str(document.relative_to(REPO)) not in GENERATED:
        assert not long_lines(document.read_text())


def test_a_long_line_is_seen() -> None:
    long = "word " * 21
    assert long_lines(f"short\n{long}\n") == [long]
    assert not long_lines(f"| {long} |\n```\n{long}\n```\n    {long}\n[short](https://{long})")


SCRIPTS = [*sorted((REPO / "launch").glob("*.s*")), *sorted((REPO / "benchmarks").glob("*.sh"))]
SCRIPTS += [REPO / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_lines_of_a_script_are_short(script: Path) -> None:
    assert [line for line in script.read_text().splitlines() if len(line) > MAX_COLUMNS] == []


def test_the_readme_is_short() -> None:
    words = re.findall(r"\S*\w\S*", (REPO / "README.md").read_text())
    assert len(words) <= MAX_README_WORDS


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


PINS = ("constraints.txt", "constraints-newest.txt")


def pins(name: str) -> dict[str, str]:
    """Package -> version of a file of constraints; for the newest Python of several."""
    lines = re.findall(r"(?m)^([\w.-]+)==([^\s;]+)(.*)$", (REPO / name).read_text())
    return {
        re.sub(r"[-_.]+", "-", package).lower(): version
        for package, version, rest in lines
        if 'python_version < "3.11"' not in rest
    }


@pytest.mark.parametrize("name", PINS)
def test_constraints_cover_the_requirements(name: str) -> None:
    """Every package that pyproject.toml asks for is pinned, for each supported Python, and the
    unrelated "apex" is not asked for.
    """
    project = (REPO / "pyproject.toml").read_text().partition("[project]")[2]
    asked = {
        re.sub(r"[-_.]+", "-", package).lower()
        for package in re.findall(r'"([A-Za-z][\w.-]*)(?:\[\w+\])?>=', project)
    }
    assert "apex" not in asked and {"torch", "megatron-core"} <= asked
    assert asked - pins(name).keys() == {
        "transformer-engine"
    }  # built against the machine's own torch and CUDA


def test_the_second_stack_differs_in_megatron_alone() -> None:
    """With any other difference the golden masks would compare two things at once."""
    first, second = map(pins, PINS)
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {"megatron-core"}
    assert first["megatron-core"] < second["megatron-core"]


def test_the_chosen_tests_of_the_second_stack_are_there() -> None:
    lines = (REPO / "tests/second_stack/chosen.txt").read_text().splitlines()
    chosen = [line for line in lines if not line.startswith("#")]
    assert len(chosen) == len(set(chosen)) > 5
    for line in chosen:
        path, _, test = line.partition("::")
        assert (REPO / path).exists(), path
        assert f"def {test.partition('[')[0]}(" in (REPO / path).read_text() if test else True


@pytest.mark.parametrize(
    ("asked", "code"),
    [({}, 0), ({"SECOND_SKIP": "fail"}, 1), ({"SECOND_SKIP": "fail", "SECOND_STACK": "off"}, 0)],
)
def test_a_skipped_second_stack_fails_where_it_has_to_run(asked: dict[str, str], code: int) -> None:
    command = ["bash", str(REPO / "tests/second_stack/run.sh")]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SECOND_")}
    environment = {**clean, "SECOND_HOME": "/proc/none", **asked}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "were skipped: " in done.stdout.splitlines()[-1]


def test_pre_commit_uses_the_pinned_tools() -> None:
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lines = (REPO / "constraints.txt").read_text().splitlines()
    asked = [package for hook in hooks for package in hook.get("additional_dependencies", [])]
    assert len(asked) >= 3 and set(asked) <= set(lines)


def test_help_names_every_verb() -> None:
    command = [sys.executable, "-m", "megamask", "--help"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
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
def test_a_user_error_is_one_message(
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert expected in told and len(told.strip().splitlines()) == 1
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(program, "TURN", 0.0)  # rank 0, which is not there, has no turn
    assert main(arguments) == EXIT_USER_ERROR
    assert "(rank 3)" in capsys.readouterr().err


def test_files_that_are_tested_first_are_there() -> None:
    for name in FIRST:
        (file,) = (path for path in (REPO / "tests").rglob("*.py") if path.match(name))
        assert "mark.slow" in file.read_text(), "files without slow tests come last"
