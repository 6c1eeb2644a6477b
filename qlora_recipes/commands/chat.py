"""`qlora-recipes chat RUN...`: talk to trained runs, in the precision and with the template they were trained with.

Knows nothing of training.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_recipes.commands.flags import GENERATION, OTHER_TEMPLATE, RUNS, TRUST_REMOTE_CODE, Parser
from qlora_recipes.errors import DataError, UsageError, nearest
from qlora_recipes.fields import Field
from qlora_recipes.formatters import Message
from qlora_recipes.run.folder import RunFolder

if TYPE_CHECKING:
    from qlora_recipes.deploy.mixing import MixedRuns
    from qlora_recipes.evaluation.generation import Generation

_ABOUT = """Talk to trained runs of one base. /use NAME goes to another run and /base to the base before tuning, in \
the same conversation; an empty line starts a new one, and the end of the input ends the program."""
_FLAGS = (
    *GENERATION,
    Field("base", "bool", "begin with the base before tuning", default=False),
    OTHER_TEMPLATE,
    TRUST_REMOTE_CODE,
)
_COMMAND = re.compile(r"/(\w+)(?:\s+(\S+))?")


def main(argv: Sequence[str]) -> None:
    """Read questions from the terminal, or one a line from a pipe, and print the answers as they are made."""
    flags = Parser("qlora-recipes chat", _ABOUT, {"flags": _FLAGS}, words=RUNS).parse(argv)
    folders = [RunFolder(Path(run)) for run in flags["run"]]
    for folder in folders:
        folder.receipt()  # before torch, which takes seconds to import
    from qlora_recipes.deploy.mixing import BASE, restore_runs
    from qlora_recipes.evaluation.generation import Generation, own_defaults

    settings = Generation(**{flag.name: flags[flag.name] for flag in GENERATION})
    allowed = {name: flags[name] for name in ("other_template", "trust_remote_code")}
    with restore_runs(folders, **allowed) as runs:
        print(
            f"answers: {settings}; the model's own defaults, not used: {own_defaults(runs.model) or 'none'}",
            file=sys.stderr,
        )
        _converse(runs, settings, BASE if flags["base"] else next(name for name in runs.adapters if name != BASE))


def _converse(runs: MixedRuns, settings: Generation, name: str) -> None:
    asking = sys.stdin.isatty()
    if asking:
        switches = ", ".join("/base" if other == "base" else f"/use {other}" for other in runs.adapters)
        print(f"{name} answers ({switches}). An empty line starts a new conversation, Ctrl-D ends.")
    messages: list[Message] = []
    while True:
        try:
            question = input(f"{name}> " if asking else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if not question:
                messages = []
            elif command := _COMMAND.fullmatch(question):
                name = _switched(runs, *command.groups())
            else:
                asked: list[Message] = [*messages, {"role": "user", "content": question}]
                messages = [*asked, {"role": "assistant", "content": answer(runs, name, asked, settings)}]
        except (DataError, UsageError) as error:  # such as a question that holds a role marker; it is not asked
            print(f"error: {error}", file=sys.stderr)


def _switched(runs: MixedRuns, verb: str, name: str | None) -> str:
    """Return who answers from now on."""
    if verb == "base" and name is None:
        name = "base"
    elif verb != "use" or name is None:
        raise UsageError(f"unknown command /{verb}, expected /use NAME or /base.{nearest(verb, ('use', 'base'))}")
    if name not in runs.adapters:
        raise UsageError(f"got /use {name}, expected one of {', '.join(runs.adapters)}.{nearest(name, runs.adapters)}")
    print(f"{name} answers", file=sys.stderr)
    return name


def answer(runs: MixedRuns, name: str, messages: Sequence[Message], settings: Generation) -> str:
    """Print an answer to the last message as it is made, and return it.

    Raises:
        DataError: when a message holds a role marker of the template, or the question outgrows the context.
    """
    from transformers import TextStreamer

    from qlora_recipes.deploy.history import fit_history
    from qlora_recipes.evaluation.generation import context_length, generate, seeded

    tokenizer, encode = runs.run.tokenizer, runs.run.encoder.encode_prompt
    length = context_length(runs.model)
    room = None if length is None else length - settings.max_new_tokens
    fitting, left_out = fit_history(messages, encode, room)
    if left_out:
        print(f"the conversation outgrows {length} tokens: left out its first {left_out} questions", file=sys.stderr)
    # Of several beams none is known before the end.
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if settings.num_beams == 1 else None
    with runs.only(name), seeded(settings, runs.model.device):
        (found,) = generate(
            runs.model,
            [encode(fitting)],
            end=runs.run.encoder.end_id,
            pad=tokenizer.pad_token_id,
            settings=settings,
            streamer=streamer,
        )
    text = str(tokenizer.decode(found, skip_special_tokens=True)).strip()
    if streamer is None:
        print(text)
    return text
