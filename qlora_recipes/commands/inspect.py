"""What of a recipe's rows is in the loss, token by token: on the terminal, and as a page. Loads no model."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from qlora_recipes.commands.flags import file_to_write
from qlora_recipes.commands.recipe_cli import parse_with_recipe, settings_from
from qlora_recipes.recipe import load_recipe
from qlora_recipes.run.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_recipes.data.arrow_rows import Conversation
    from qlora_recipes.data.encoding import ConversationEncoder
    from qlora_recipes.preflight import Run
    from qlora_recipes.run.receipt import Check

_ABOUT = "Show the shortest, the longest and a random row, with the tokens that are in the loss in another color."
_FLAGS = (file_to_write("html", "also write a page that shows every token", ".html"),)
_SHOWN_TOKENS = 240  # of a long row on the terminal, from its two ends; the page has all
# Both are readable on a dark and on a light terminal; the shades take turns, so that tokens can be told apart.
_IN_LOSS = ("black on green", "black on bright_green")
_NOT_IN_LOSS = ("white on grey23", "white on grey35")


@dataclass(frozen=True)
class Token:
    """One token, or the few that make up one character."""

    text: str
    ids: tuple[int, ...]
    in_loss: bool
    control: bool


@dataclass(frozen=True)
class ShownRow:
    """One row as it is shown."""

    title: str
    figures: str
    tokens: list[Token]


@dataclass(frozen=True)
class Page:
    """Everything that is shown of a recipe's rows."""

    name: str
    summary: str
    rows: list[ShownRow]
    lengths: list[int]
    checks: list[Check]


def main(argv: Sequence[str]) -> None:
    """Run `qlora-recipes inspect`.

    Raises:
        RecipesError: for a recipe, a flag or data that cannot be used.
    """
    flags = parse_with_recipe("qlora-recipes inspect", _ABOUT, _FLAGS, argv)
    settings = settings_from(load_recipe(flags["recipe"]), flags)
    from qlora_recipes.preflight import BEFORE_LOADING, run_checks  # torch, which --help can do without
    from qlora_recipes.training.build import prepare_rows

    run = prepare_rows(settings)
    page = describe(run, run_checks(BEFORE_LOADING, run, flags.get("skip_checks", ())))
    print_page(page, Console())
    if flags["html"]:
        write_text(Path(flags["html"]), render_html(page))
        print(f"written to {flags['html']}")


def describe(run: Run, checks: list[Check]) -> Page:
    """Return what is shown of the rows of a run."""
    lengths = [len(row.encoded.input_ids) for row in run.data.train]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen = {"shortest": order[0], "longest": order[-1], "random": random.Random(run.settings.seed).choice(order)}
    receipt, template = run.data.receipt, run.data.template
    return Page(
        name=run.settings.name,
        summary=f"{receipt.source}: {receipt.rows_in:,} rows, of which {receipt.rows_used:,} train, "
        f"{receipt.rows_held_out:,} are held out and {sum(receipt.rows_dropped.values()):,} are dropped. "
        f"{receipt.supervised_tokens:,} of {receipt.tokens:,} tokens "
        f"({receipt.supervised_tokens / receipt.tokens:.0%}) are in the loss. "
        f"Template: {template.name} ({template.origin}); {template.end_token} ends an answer, and "
        f"{run.tokenizer.pad_token} pads.",
        rows=[_show(run.encoder, title, run.data.train[number]) for title, number in chosen.items()],
        lengths=sorted(lengths),
        checks=checks,
    )


def _show(encoder: ConversationEncoder, which: str, row: Conversation) -> ShownRow:
    tokens, supervised = len(row.encoded.input_ids), row.encoded.supervised
    cut = f", cut here: {row.supervised_lost:,} more tokens of its answers are lost" if row.truncated else ""
    return ShownRow(
        title=f"The {which} row ({row.place})" if which != "random" else f"A random row ({row.place})",
        figures=f"{tokens:,} tokens, {supervised:,} in the loss ({supervised / tokens:.0%}){cut}",
        tokens=list(tokens_of(encoder, row)),
    )


def tokens_of(encoder: ConversationEncoder, row: Conversation) -> Iterator[Token]:
    """Yield a row's tokens as text; those that hold a part of a character each come as one."""
    from qlora_recipes.data.encoding import IGNORED

    tokenizer, control = encoder.tokenizer, encoder.control_tokens(row.encoded.input_ids)
    held: list[int] = []
    for at, (token, label) in enumerate(zip(row.encoded.input_ids, row.encoded.labels, strict=True), 1):
        held.append(token)
        text = _text(tokenizer, held)
        is_part = "\ufffd" in text and len(held) < 4 and token not in control  # UTF-8 has at most four bytes
        if not is_part or at == len(row.encoded.labels):
            yield Token(text, tuple(held), in_loss=label != IGNORED, control=token in control)
            held = []


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of a few tokens, with the space that sentencepiece's decoder cuts off."""
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    text = tokenizer.convert_tokens_to_string(pieces)
    spaces = len(pieces[0]) - len(pieces[0].lstrip("\u2581"))
    return " " * (spaces - (len(text) - len(text.lstrip(" ")))) + text if spaces else text


def print_page(page: Page, console: Console) -> None:
    """Print rows, shares and checks in the width of the terminal."""
    from qlora_recipes.preflight import print_checks

    console.print(Text(page.summary))
    if console.color_system:
        console.print(Text.assemble(("in the loss", _IN_LOSS[0]), " ", ("not in the loss", _NOT_IN_LOSS[0])))
    else:
        console.print(Text("[[ ]] encloses what is in the loss; a bar stands between tokens."))
    for row in page.rows:
        console.print(Text(f"\n{row.title}", style="bold"), Text(f"  {row.figures}"), sep="\n")
        console.print(_colored(row.tokens, console))
    console.print()
    print_checks(page.checks, "Checks on the rows", console)


def _colored(tokens: list[Token], console: Console) -> Text:
    shown = Text()
    left_out = max(0, len(tokens) - _SHOWN_TOKENS)
    head = _SHOWN_TOKENS - _SHOWN_TOKENS // 3
    before = False
    for i, token in enumerate(tokens):
        if left_out and i == head:
            shown.append(f"\n... {left_out:,} more tokens ...\n", style="italic")
        if left_out and head <= i < head + left_out:
            continue
        if not console.color_system and i:
            shown.append(" [[" if token.in_loss and not before else "]] " if before and not token.in_loss else "|")
        before = token.in_loss
        style = (_IN_LOSS if token.in_loss else _NOT_IN_LOSS)[i % 2]
        shown.append(token.text.replace("\n", "⏎"), style=f"bold {style}" if token.control else style)
        if "\n" in token.text:
            shown.append("\n")
    if before and not console.color_system:
        shown.append("]]")
    return shown


def draw_lengths(lengths: Sequence[int]) -> bytes:
    """Return a histogram of tokens a row, an SVG that is readable on light and on dark paper."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    gray = "#808089"
    with pyplot.rc_context(dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), gray)):
        figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
        axes.hist(lengths, bins=min(40, max(5, len(set(lengths)))), color="#4f9a61")
        axes.set(xlabel="tokens", ylabel="rows")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(gray)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    return picture.getvalue()


def render_html(page: Page) -> str:
    """Return one self-contained page; every text in it is escaped."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("qlora_recipes.commands", "."), autoescape=True, trim_blocks=True)
    picture = base64.b64encode(draw_lengths(page.lengths)).decode()
    return environment.get_template("inspect.html.jinja").render(page=page, picture=picture)
