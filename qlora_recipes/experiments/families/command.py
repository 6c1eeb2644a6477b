"""`eval/families.py`: make the architectures in small, take each through this package, and tell what came out."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.progress import Progress

from qlora_recipes.commands.flags import Parser, count, file_to_write
from qlora_recipes.errors import UsageError, nearest
from qlora_recipes.experiments.families import results
from qlora_recipes.experiments.families.architectures import ARCHITECTURES
from qlora_recipes.fields import Field

_WIDTH = 160
_FLAGS = (
    Field("families", "list[str]", "only these (all)", "NAME", None),
    Field("make", "str", "write the models into folders here, and do no more", "FOLDER", None),
    count("steps", "steps of each training (4)", 4, least=2),
    count("rows", "conversations of the bundled rows (60)", 60, least=20),
    Field("speed", "bool", "tokens/s beside the plain TRL script as well, each in its own process", default=True),
    file_to_write("json", "write the figures here", ".json"),
    file_to_write("markdown", "write the table here", ".md"),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for what a user can fix.
    """
    about = "A small random model of each architecture, through every check and a short training."
    asked = SimpleNamespace(**Parser("eval/families.py", about, {"flags": _FLAGS}).parse(argv))
    names = asked.families or list(ARCHITECTURES)
    for name in names:
        if name not in ARCHITECTURES:
            raise UsageError(
                f"no architecture {name!r}.{nearest(name, ARCHITECTURES)} They are: {', '.join(ARCHITECTURES)}"
            )
    from qlora_recipes.experiments.families.make import make  # after --help

    if asked.make:
        for name in names:
            make(name, Path(asked.make) / name)
        return
    from qlora_recipes.experiments.families.examine import examine, write_rows

    found = []
    with (
        tempfile.TemporaryDirectory(prefix="families-") as scratch,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        rows = write_rows(asked.rows, Path(scratch))
        for name in progress.track(names, description="architectures"):
            folder = make(name, Path(scratch) / name)
            found.append(examine(name, folder, rows, steps=asked.steps, speed=asked.speed))
    results.print_table(found, Console(width=None if sys.stdout.isatty() else _WIDTH))
    if asked.json:
        text = json.dumps([results.as_dict(each) for each in found], indent=1)
        Path(asked.json).write_text(text + "\n", encoding="utf-8")
    if asked.markdown:
        command = " ".join(["python eval/families.py", *argv])
        Path(asked.markdown).write_text(results.markdown(found, command), encoding="utf-8")
