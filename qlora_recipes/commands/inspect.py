"""What of a recipe's rows is in the loss, token by token: on the terminal, and as a page. Loads no model.

Without a recipe, a model and a file do: `qlora-recipes inspect --model ID_OR_FOLDER --dataset FILE`.
"""

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
from qlora_recipes.formatters import TEXT
from qlora_recipes.recipe import Recipe, load_recipe
from qlora_recipes.run.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_recipes.data.arrow_rows import Conversation
    from qlora_recipes.data.encoding import ConversationEncoder
    from qlora_recipes.preflight import Run
    from qlora_recipes.run.receipt import Check

_ABOUT = (
    "Show the shortest, the longest and a random row, and the first with calls, reasoning or a plain text, with the "
    "tokens that are in the loss in another color. In place of a recipe, --model and --dataset are enough."
)
_FLAGS = (file_to_write("html", "also write a page that shows every token", ".html"),)
_SHOWN_TURNS = 12
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
    notes: list[str]
    rows: list[ShownRow]
    lengths: list[int]
    checks: list[Check]


def main(argv: Sequence[str]) -> None:
    """Run `qlora-recipes inspect`.

    Raises:
        RecipesError: for a recipe, a flag or data that cannot be used.
    """
    flags = parse_with_recipe("qlora-recipes inspect", _ABOUT, _FLAGS, argv, instead=("model", "dataset"))
    declared = {"model": flags.get("model"), "dataset": flags.get("dataset")}
    recipe = load_recipe(flags["recipe"]) if flags["recipe"] else type("Inspected", (Recipe,), declared)
    settings = settings_from(recipe, flags)
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
    lengths: list[int] = []
    first: dict[str, int] = {}
    for number, row in enumerate(run.data.train):
        lengths.append(len(row.encoded.input_ids))
        for kind in _kinds(row):
            first.setdefault(kind, number)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    chosen = {
        "The shortest row": order[0],
        "The longest row": order[-1],
        "A random row": random.Random(run.settings.seed).choice(order),
    }
    chosen |= {f"The first row with {kind}": at for kind, at in first.items() if at not in chosen.values()}
    receipt, template = run.data.receipt, run.data.template
    return Page(
        name=run.settings.name,
        summary=f"{receipt.source}: {receipt.rows_in:,} rows, of which {receipt.rows_used:,} train, "
        f"{receipt.rows_held_out:,} are held out and {sum(receipt.rows_dropped.values()):,} are dropped. "
        f"{receipt.supervised_tokens:,} of {receipt.tokens:,} tokens "
        f"({receipt.supervised_tokens / receipt.tokens:.0%}) are in the loss. "
        f"Template: {template.name} ({template.origin}); {template.end_token} ends an answer, and "
        f"{run.tokenizer.pad_token} pads.",
        notes=list(_notes(run)),
        rows=[_show(run.encoder, title, run.data.train[number]) for title, number in chosen.items()],
        lengths=sorted(lengths),
        checks=checks,
    )


def _kinds(row: Conversation) -> Iterator[str]:
    """Yield what a row has that most rows have not."""
    if row.messages[0]["role"] == TEXT:
        yield "a plain text"
    if any("tool_calls" in message for message in row.messages):
        yield "a call"
    if any("reasoning_content" in message for message in row.messages):
        yield "reasoning"


def _notes(run: Run) -> Iterator[str]:
    """Yield a sentence for each dataset of several, for what the rows hold, and for what is not obvious of it."""
    receipt, contents = run.data.receipt, run.data.receipt.contents
    for part in receipt.datasets:
        drawn = f"{part.share:.0%} drawn: " if part.share < 1 else ""
        yield (
            f"{part.source}: {drawn}{part.rows_in:,} rows, of which {part.rows_used:,} train, {part.rows_held_out:,} "
            f"are held out and {sum(part.rows_dropped.values()):,} are dropped; {part.tokens:,} tokens "
            f"({part.tokens / receipt.tokens:.0%} of all), {part.supervised_tokens:,} of them in the loss."
        )
    yield f"They hold {', '.join(f'{count:,} {what}' for what, count in contents.items())}."
    if texts := contents.get(TEXT):
        yield f"{texts:,} are plain texts: no template is used, and all of each is in the loss."
    if contents.get("developer") and not run.encoder.knows_developer:
        yield "The template has no developer; a developer's message is rendered as the system's."
    if contents.get("reasoning left out by the template"):
        yield "The template leaves out the reasoning of turns before the last, as it does when the model answers."
    if run.data.receipt.rows_dropped:
        dropped = (f"{count:,} {reason}" for reason, count in run.data.receipt.rows_dropped.items())
        yield f"Dropped: {', '.join(dropped)}."


def _spoken(row: Conversation) -> str:
    """Return who speaks in a row, what is called, and what is not in the loss."""
    turns = []
    for message in row.messages:
        calls = ", ".join(call["function"]["name"] for call in message.get("tool_calls", ()))
        thinks = " with reasoning" if "reasoning_content" in message else ""
        outside = " (outside the loss)" if message.get("train") is False else ""
        turns.append(f"{message['role']}{thinks}{f' calls {calls}' if calls else ''}{outside}")
    tools = f"; tools: {', '.join(tool['function']['name'] for tool in row.tools)}" if row.tools else ""
    return f"{', '.join(turns[:_SHOWN_TURNS])}{', ...' if len(turns) > _SHOWN_TURNS else ''}{tools}"


def _show(encoder: ConversationEncoder, title: str, row: Conversation) -> ShownRow:
    tokens, supervised = len(row.encoded.input_ids), row.encoded.supervised
    cut = f", cut here: {row.supervised_lost:,} more tokens of its answers are lost" if row.truncated else ""
    return ShownRow(
        title=f"{title} ({row.place})",
        figures=f"{tokens:,} tokens, {supervised:,} in the loss ({supervised / tokens:.0%}){cut}. {_spoken(row)}",
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

    for line in (page.summary, *page.notes):
        console.print(Text(line))
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
