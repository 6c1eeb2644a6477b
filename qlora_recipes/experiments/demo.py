"""`qlora-recipes demo`: the benchmark of a recipe on its stand-in, NF4 against 16 bits. No GPU, no network."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from qlora_recipes.experiments.benchmark import command

_ARGV = ("llama2_guanaco", "--demo", "--precisions", "nf4", "bf16")


def main(argv: Sequence[str]) -> None:
    """Run the benchmark as `make demo` does; its own flags, such as `--output FOLDER`, can follow.

    Raises:
        RecipesError: for what a user can fix.
    """
    if {"-h", "--help"} & set(argv):
        print(f"usage: qlora-recipes demo [FLAGS] is qlora-recipes benchmark {' '.join(_ARGV)} [FLAGS]\n")
    # Small models train faster on a core each than on two in turn.
    jobs = ("--jobs", "2") if shutil.which("nvidia-smi") is None and "--jobs" not in argv else ()
    command.main([*_ARGV, *jobs, *argv])
