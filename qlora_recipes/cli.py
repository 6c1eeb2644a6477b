"""The console command `qlora-recipes`: one verb a line, each done by the module that knows how."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from qlora_recipes.commands.recipe_cli import quiet_libraries, run_command
from qlora_recipes.errors import UsageError, nearest

# Verb to the module whose `main(arguments)` does it, and what it is for. Imported only when called.
VERBS = {
    "list": ("qlora_recipes.commands.list", "recipes in a folder (default: recipes/)"),
    "plan": ("qlora_recipes.commands.plan", "memory of a recipe in every precision, without loading anything"),
    "inspect": ("qlora_recipes.commands.inspect", "what of a recipe's rows is in the loss, token by token"),
    "evaluate": ("qlora_recipes.commands.evaluate", "score a run with lm-eval and on its held-out rows"),
    "compare": ("qlora_recipes.commands.compare", "hold two evaluated runs against each other"),
    "merge": ("qlora_recipes.commands.merge", "write the adapter into 16-bit weights"),
    "chat": ("qlora_recipes.commands.chat", "talk to a trained run"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `qlora-recipes`; exits with 2 and one message when a user can mend what is wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    run_command(lambda: _dispatch(words), debug="--debug" in words)


def _dispatch(words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return
    verb, *rest = [word for word in words if word != "--debug"]
    if verb not in VERBS:
        raise UsageError(f"unknown command {verb!r}.{nearest(verb, VERBS)}\n{_usage()}")
    quiet_libraries()
    importlib.import_module(VERBS[verb][0]).main(rest)


def _usage() -> str:
    lines = [f"  {verb:<9} {purpose}" for verb, (_, purpose) in VERBS.items()]
    return "usage: qlora-recipes COMMAND ...\n\n" + "\n".join(lines) + "\n\nqlora-recipes COMMAND --help says more."


if __name__ == "__main__":
    main()
