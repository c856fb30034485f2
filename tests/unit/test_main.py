"""The command line: flags and arguments stand for settings."""

from __future__ import annotations

import pytest

from megamask.__main__ import parse
from megamask.config import load_config
from megamask.errors import ConfigError


def test_arguments_stand_for_settings_in_their_order() -> None:
    verb, recipe, overrides = parse(
        [
            "diff",
            "run_dir=runs/x",
            "wanda",
            "--json",
            "out.json",
            "a: b/m.safetensors",
            "--picture=p.png",
        ]
    )
    config = load_config(recipe, overrides)
    assert (verb, config.run_dir, config.diff.out, config.diff.picture) == (
        "diff",
        "runs/x",
        "out.json",
        "p.png",
    )
    assert (config.diff.a, config.diff.b) == ("wanda", "a: b/m.safetensors")


@pytest.mark.parametrize("word", ["1e3", "null", "true", "2:4", "a#b", "'q'", '"', "\\n", "ä"])
def test_an_argument_is_taken_to_the_letter(word: str) -> None:
    """Overrides are YAML; file names are not."""
    assert load_config(None, parse(["extract", "x", word])[2]).extract.out == word


def test_a_path_with_an_equals_sign_can_be_given_as_a_setting() -> None:
    assert (
        load_config(None, parse(["diff", "wanda", "diff.b=runs/lr=3/m.safetensors"])[2]).diff.b
        == "runs/lr=3/m.safetensors"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["diff", "a", "b", "c"],
            "argument = 'c': diff takes A B, and key.sub=value. Leave it out.",
        ),
        (
            ["diff", "a", "--jsn", "x"],
            "option = '--jsn': --config FILE, or key.sub=value without dashes; diff also has --json, --picture",
        ),
        (
            ["extract", "a", "--json", "x"],
            "option = '--json': --config FILE, or key.sub=value without dashes. Run",
        ),
        (["diff", "a", "--json"], "--json = '': needs a value"),
        (["dif", "a", "b"], "Did you mean diff?"),
    ],
)
def test_a_wrong_word(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert said in str(caught.value)


def test_other_verbs_take_no_arguments() -> None:
    with pytest.raises(ConfigError, match="an override has the form key.sub=value"):
        load_config(None, parse(["learn", "wanda"])[2])
