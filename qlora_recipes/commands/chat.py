"""`qlora-recipes chat RUN`: talk to a trained run, in the precision and with the template it was trained with.

Knows nothing of training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_recipes.commands.flags import OTHER_TEMPLATE, RUN, TRUST_REMOTE_CODE, Parser, count
from qlora_recipes.errors import DataError
from qlora_recipes.fields import Field
from qlora_recipes.formatters import Message
from qlora_recipes.run.folder import RunFolder

if TYPE_CHECKING:
    from qlora_recipes.evaluation.loaded import RestoredRun

_FLAGS = (
    count("max_new_tokens", "where an answer is cut (default: 256)", 256),
    Field("base", "bool", "talk to the base before tuning", default=False),
    OTHER_TEMPLATE,
    TRUST_REMOTE_CODE,
)


def main(argv: Sequence[str]) -> None:
    """Read questions from the terminal, or one a line from a pipe, and print the answers as they are made."""
    flags = Parser("qlora-recipes chat", "Talk to a trained run.", {"flags": _FLAGS}, words=RUN).parse(argv)
    folder = RunFolder(Path(flags["run"]))
    receipt = folder.receipt()
    from qlora_recipes.evaluation.loaded import BaseKey, check_remote_code, restore_base, restore_run  # torch

    check_remote_code(receipt, allowed=flags["trust_remote_code"])
    key = BaseKey.of(receipt)
    template = flags["other_template"]
    with restore_run(folder, restore_base(key), key, adapter=not flags["base"], other_template=template) as run:
        _converse(run, flags["max_new_tokens"])


def _converse(run: RestoredRun, max_new_tokens: int) -> None:
    """An empty line starts a new conversation; the end of the input ends the program."""
    asking = sys.stdin.isatty()
    if asking:
        print("An empty line starts a new conversation, Ctrl-D ends.")
    messages: list[Message] = []
    while True:
        try:
            question = input("> " if asking else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not question:
            messages = []
            continue
        messages.append({"role": "user", "content": question})
        try:
            messages.append({"role": "assistant", "content": answer(run, messages, max_new_tokens)})
        except DataError as error:  # the question holds a role marker; it is not asked
            messages.pop()
            print(f"error: {error}", file=sys.stderr)


def answer(run: RestoredRun, messages: Sequence[Message], max_new_tokens: int) -> str:
    """Print a greedy answer to the last message as it is made, and return it.

    Raises:
        RowError: when a message holds a role marker of the template.
    """
    import torch
    from transformers import TextStreamer

    prompt = torch.tensor([run.encoder.encode_prompt(messages)], device=run.model.device)
    with torch.no_grad():
        output = run.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            use_cache=True,
            pad_token_id=run.tokenizer.pad_token_id,
            eos_token_id=run.encoder.end_id,
            streamer=TextStreamer(run.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return str(run.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)).strip()
