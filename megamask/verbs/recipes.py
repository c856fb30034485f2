"""The verb recipes: the recipes that come with the program."""

from __future__ import annotations

from megamask.config import Config
from megamask.config.recipes import recipe_named, recipes, summary
from megamask.terminal import tell
from megamask.verbs.own_arguments import RecipesArguments


def run(config: Config, arguments: RecipesArguments) -> None:
    """List the recipes, or print the recipe ``arguments.name``.

    Raises:
        ConfigError: there is no such recipe.
    """
    if arguments.name:
        text = recipe_named(arguments.name, "NAME").read_text(encoding="utf-8")
        tell(text.removesuffix("\n"))
        return
    known = recipes()
    width = max(map(len, known))
    for name, path in known.items():
        tell(f"{name:<{width}}  {summary(path)}")
