"""The console command `qlora-recipes`: one verb a line, each done by the module that knows how.

Knows none of their flags.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from qlora_recipes import __version__
from qlora_recipes.commands.entry import run_command
from qlora_recipes.errors import UsageError, nearest

# Verb to what it is for. The module of that name in commands/ does it, or the one below; imported only when called.
VERBS = {
    "demo": "NF4 against 16 bits on a stand-in, with a report; no GPU, no network",
    "new": "write a recipe for a data file of your own",
    "train": "train a recipe, by its name or its file",
    "benchmark": "train, evaluate and compare arms and seeds of a recipe",
    "list": "recipes in a folder (default: those that ship)",
    "plan": "memory of a recipe in every precision, without loading anything",
    "inspect": "which tokens of a recipe's rows are in the loss",
    "evaluate": "score a run with lm-eval and on its held-out rows",
    "compare": "compare evaluated runs and write a report",
    "export": "write a merged run, or its adapter, as GGUF",
    "serve": "answer OpenAI's API on localhost with a merged run",
    "chat": "talk to trained runs, and switch between them",
    "ask": "answers of the base and of trained runs side by side",
    "merge": "write the adapter into 16-bit weights",
    "push": "publish a proven run on the hub, in one commit",
    "throughput": "speed and memory beside scripts that use TRL alone",
}
_EXPERIMENTS = {"demo": "demo", "benchmark": "benchmark.command", "throughput": "throughput.command"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `qlora-recipes`; exits with 2 and one message when a user can fix what is wrong."""
    run_command(_dispatch, argv)


def _dispatch(argv: Sequence[str]) -> None:
    verb, *rest = [word for word in argv if word != "--debug"] or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return
    if verb == "--version":
        print(f"qlora-recipes {__version__}")
        return
    if verb not in VERBS:
        raise UsageError(f"unknown command {verb!r}.{nearest(verb, VERBS)}\n{_usage()}")
    module = f"experiments.{_EXPERIMENTS[verb]}" if verb in _EXPERIMENTS else f"commands.{verb}"
    importlib.import_module(f"qlora_recipes.{module}").main(rest)


def _usage() -> str:
    lines = [f"  {verb:<10} {purpose}" for verb, purpose in VERBS.items()]
    return "usage: qlora-recipes COMMAND ...\n\n" + "\n".join(lines) + "\n\nqlora-recipes COMMAND --help says more."


if __name__ == "__main__":
    main()
