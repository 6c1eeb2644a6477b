"""Scores several runs of a benchmark one after the other, in a process that imports the libraries once.

Each word is a command line: of `qlora-recipes evaluate`, or `divergence` with the reference and the runs beside it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from qlora_recipes.commands import evaluate
from qlora_recipes.commands.entry import run_command
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.signals import StopSignals


def main(argv: Sequence[str]) -> None:
    """Run the commands.

    Raises:
        RecipesError: for the first that fails; what is finished by then is kept.
    """
    for command in argv:
        verb, *words = shlex.split(command)
        if verb == "evaluate":
            evaluate.main(words)
        else:
            with StopSignals():
                _measure(*(RunFolder(Path(word)) for word in words))


def _measure(reference: RunFolder, *others: RunFolder) -> None:
    from qlora_recipes.evaluation.kl import measure  # torch

    measure(reference, others, said=print)


if __name__ == "__main__":
    run_command(main)
