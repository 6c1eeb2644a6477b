"""`qlora-recipes push RUN REPO`: publish a proven run on the hub, in one commit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_recipes.commands.flags import Parser
from qlora_recipes.errors import UsageError
from qlora_recipes.fields import Field
from qlora_recipes.run.folder import RunFolder

_ABOUT = """Publish a run in one commit: adapter, tokenizer, chat template, card, receipt, loss curve and the report \
beside it. A run with a failed check is refused. Held-out rows, secrets and folders of this machine are left out."""
_WORDS = Field("run", "list[str]", "a run's folder, and the repository to publish it in", "RUN OWNER/NAME")
_FLAGS = (
    Field("base", "str", "hub id of the base, where the run was trained on a folder", "ID", None),
    Field("private", "bool", "make the repository private, if it is new", default=False),
    Field("dry_run", "bool", "list what would be published, and publish nothing", default=False),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for a run that is not proven, or a hub that refuses.
    """
    flags = Parser("qlora-recipes push", _ABOUT, {"flags": _FLAGS}, words=_WORDS).parse(argv)
    if len(flags["run"]) != 2:
        raise UsageError(f"got {' '.join(flags['run'])!r}, expected a run's folder and a repository: RUN OWNER/NAME")
    run, repository = flags["run"]
    from qlora_recipes.deploy.publish import publish, published_files  # the hub's library, which --help can do without

    folder = RunFolder(Path(run))
    if flags["dry_run"]:
        for name, content in published_files(folder, base=flags["base"]).items():
            print(f"{len(content):>12,}  {name}")
        return
    print(f"published: {publish(folder, repository, base=flags['base'], private=flags['private'])}")
