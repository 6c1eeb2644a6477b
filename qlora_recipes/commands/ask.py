"""`qlora-recipes ask RUN...`: answers of the base and of tuned runs side by side, as JSON lines and as a page.

Knows nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_recipes.commands.flags import (
    GENERATION,
    OTHER_TEMPLATE,
    RUNS,
    TRUST_REMOTE_CODE,
    Parser,
    count,
    file_to_read,
)
from qlora_recipes.errors import CheckError, RunFolderError, UsageError
from qlora_recipes.fields import Field
from qlora_recipes.run.files import write_text
from qlora_recipes.run.folder import RunFolder

if TYPE_CHECKING:
    from qlora_recipes.deploy.answering import Answer
    from qlora_recipes.deploy.prompts import Prompt

_ABOUT = """Ask runs of one base, and the base before tuning, everything in a file, in batches whose rows go to \
different adapters. Writes answers.jsonl and answers.html."""
_PROMPTS = "questions: lines of a .txt, or rows with prompt or messages, which may have tools and name their adapter"
_FLAGS = (
    file_to_read("prompts", _PROMPTS),
    *GENERATION,
    count("batch_size", "rows of a batch", 8),
    Field("output", "str", "folder to write (default: asked/ in the first RUN)", "FOLDER", None),
    Field("overwrite", "bool", "replace the answers that are there", default=False),
    OTHER_TEMPLATE,
    TRUST_REMOTE_CODE,
)
JSONL, HTML = "answers.jsonl", "answers.html"


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for anything a user can fix.
    """
    flags = Parser("qlora-recipes ask", _ABOUT, {"flags": _FLAGS}, words=RUNS).parse(argv)
    if not flags["prompts"]:
        raise UsageError("--prompts is missing: a file of questions, one a line")
    folders = [RunFolder(Path(run)) for run in flags["run"]]
    for folder in folders:
        folder.receipt()  # before torch, which takes seconds to import
    output = Path(flags["output"] or folders[0].asked)
    if not flags["overwrite"] and (there := next((name for name in (JSONL, HTML) if (output / name).exists()), None)):
        raise RunFolderError(f"{output} holds {there}. Give --output another folder, or --overwrite to replace it")
    from qlora_recipes.deploy.answering import Request, answer, described, prove_mixing
    from qlora_recipes.deploy.mixing import BASE, restore_runs
    from qlora_recipes.deploy.prompts import read_prompts
    from qlora_recipes.evaluation.generation import Generation, own_defaults
    from qlora_recipes.evaluation.records import disk_faults

    prompts = read_prompts(Path(flags["prompts"]))
    settings = Generation(**{flag.name: flags[flag.name] for flag in GENERATION})
    allowed = {name: flags[name] for name in ("other_template", "trust_remote_code")}
    with restore_runs(folders, **allowed) as runs:
        try:
            proof = described(prove_mixing(runs))
        except (CheckError, UsageError) as error:
            if len(folders) > 1:
                raise
            runs = replace(runs, unmixable=runs.unmixable or str(error))
            proof = f"not mixed: {runs.unmixable}"
        asked = [(prompt, name) for prompt in prompts for name in _asked(prompt, list(runs.adapters))]
        requests = [Request(prompt.messages, name, prompt.place, prompt.tools) for prompt, name in asked]
        found = answer(runs, requests, settings, batch_size=flags["batch_size"])
        own = own_defaults(runs.model) or "none"
    answers: dict[str, dict[str, Answer]] = {prompt.place: {} for prompt in prompts}
    for (prompt, name), given in zip(asked, found, strict=True):
        answers[prompt.place][name] = given
    columns = [BASE, *(name for name in runs.adapters if name != BASE)]
    facts = {"runs": ", ".join(str(folder.path) for folder in folders), "answers": str(settings)}
    facts |= {"the model's own defaults, not used": own, "batches": proof}
    with disk_faults(output, "Give --output a folder that can be made and written"):
        output.mkdir(parents=True, exist_ok=True)
        rows = (json.dumps(_row(prompt, answers[prompt.place]), ensure_ascii=False) for prompt in prompts)
        write_text(output / JSONL, "".join(f"{row}\n" for row in rows))
        write_text(output / HTML, render_html(prompts, answers, columns, facts))
    print(f"{len(found)} answers to {len(prompts)} prompts in {output / JSONL} and {output / HTML}\n{proof}")


def _asked(prompt: Prompt, names: list[str]) -> list[str]:
    return names if prompt.adapter is None else list(dict.fromkeys(["base", prompt.adapter]))


def _row(prompt: Prompt, answers: dict[str, Answer]) -> dict[str, Any]:
    return {"place": prompt.place, "messages": prompt.messages, "answers": {n: vars(a) for n, a in answers.items()}}


def render_html(
    prompts: Sequence[Prompt], answers: dict[str, dict[str, Answer]], columns: Sequence[str], facts: dict[str, str]
) -> str:
    """Return one self-contained page, the base's answer beside those of the runs; every text in it is escaped."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    from qlora_recipes.report import escape

    here = Path(escape.__file__)
    css = Markup(here.with_name("report.css").read_text(encoding="utf-8"))
    loader = PackageLoader("qlora_recipes.commands", ".")
    shown = Environment(loader=loader, autoescape=True, trim_blocks=True, finalize=escape.visible)
    page = shown.get_template("ask.html.jinja")
    return page.render(prompts=prompts, answers=answers, columns=columns, facts=facts, css=css)
