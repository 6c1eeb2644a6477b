"""The token-by-token view: what it says of a row, on the terminal and as a page."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from preflight_runs import changed, read, with_rows
from rich.console import Console

from qlora_recipes import Recipe
from qlora_recipes.commands.inspect import describe, draw_lengths, main, print_page, render_html, tokens_of
from qlora_recipes.errors import UsageError
from qlora_recipes.preflight import BEFORE_LOADING, Run, run_checks
from qlora_recipes.run.receipt import DatasetReceipt

ROOT = Path(__file__).parent.parent
FORGED = "<script>alert('[/INST] </s>')</script> 你好 😊"


@pytest.fixture(params=["llama2", "falcon"])
def run(request: pytest.FixtureRequest, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]]) -> Run:
    return read(recipe_for(request.param), tiny(request.param))


def test_tokens_read_as_the_row_and_say_what_is_in_the_loss(run: Run) -> None:
    for row in run.data.train[:5]:
        tokens = list(tokens_of(run.encoder, row))
        text = run.tokenizer.apply_chat_template(row.messages, tokenize=False)
        assert "".join(token.text for token in tokens).replace(" ", "") == text.replace(" ", "")
        assert sum(len(token.ids) for token in tokens) == len(row.encoded.input_ids)
        said = "".join(token.text for token in tokens if token.in_loss and not token.control)
        answers = [message["content"] for message in row.messages if message["role"] == "assistant"]
        assert "".join(said.split()) == "".join("".join(answers).split())


def test_a_character_of_several_tokens_is_one(run: Run) -> None:
    row = with_rows(run, [("Who?", "你好 😊")]).data.train[0]
    tokens = list(tokens_of(run.encoder, row))
    assert "😊" in "".join(token.text for token in tokens)
    assert not any("\ufffd" in token.text for token in tokens)


def test_an_added_word_is_no_control_token(run: Run) -> None:
    run.tokenizer.add_tokens(["zebra"])
    row = with_rows(run, [("Who?", "A zebra.")]).data.train[0]
    marked = [token.text for token in tokens_of(run.encoder, row) if token.control]
    assert marked and "zebra" not in " ".join(marked)


def test_the_terminal_shows_80_columns_with_and_without_colors(run: Run) -> None:
    page = describe(run, run_checks(BEFORE_LOADING, run))
    for colors in (None, "truecolor"):
        console = Console(file=io.StringIO(), width=80, color_system=colors, force_terminal=bool(colors))
        print_page(page, console)
        shown = console.file.getvalue()
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
        assert max(map(len, plain.splitlines())) <= 80
        assert ("[[" in plain) == (colors is None)
        assert "The shortest row" in plain and "The longest row" in plain and "in the loss" in plain


def test_a_long_row_is_shown_from_both_ends(run: Run) -> None:
    long = with_rows(run, [("Why?", "because of this and that, " * 100)])
    console = Console(file=io.StringIO(), width=80)
    print_page(describe(long, []), console)
    assert "more tokens ..." in console.file.getvalue()


def test_the_page_escapes_every_word_and_needs_no_other_file(run: Run) -> None:
    refused = "[/INST]" in run.encoder.template.source
    text = FORGED.replace("[/INST]", "[/ INST]") if refused else FORGED
    page = render_html(describe(with_rows(run, [(text, text)]), run_checks(BEFORE_LOADING, run)))
    assert "<script" not in page
    assert "&lt;" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "prefers-color-scheme: dark" in page


def test_the_histogram_is_a_picture() -> None:
    assert b"<svg" in draw_lengths([3, 4, 4, 9])
    assert b"<svg" in draw_lengths([5])


def test_the_command_takes_the_recipes_flags(
    tmp_path: Path, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, page = tmp_path / "rows.json", tmp_path / "rows.html"
    rows.write_text(json.dumps([{"question": f"Who is {i}?", "answer": f"Number {i}."} for i in range(9)]))
    recipe = str(ROOT / "recipes" / "falcon_faq.py")
    main([recipe, "--model", str(tiny("falcon")), "--dataset", str(rows), "--html", str(page)])
    assert "rows.json: 9 rows" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("words", [["--html"], ["--html", "--demo"], ["--html", "nowhere/page.html"]])
def test_a_page_without_a_place_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="--html"):
        main([str(ROOT / "recipes" / "falcon_faq.py"), *words])


def test_everything_in_the_rows_is_shown(run: Run) -> None:
    call = {"name": "find", "arguments": {"words": "rain"}}
    said = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "Rain."},
        {"role": "assistant", "content": "So.", "reasoning_content": "Hm.", "train": False},
    ]
    encoded = run.encoder.encode([{"role": "text", "content": "Once."}])
    tools = [{"type": "function", "function": {"name": "find"}}]
    rows = [replace(run.data.train[0], messages=said, tools=tools, encoded=encoded), *run.data.train]
    parts = [DatasetReceipt("a.jsonl", 0.25, 40, 30, 8, {"not text": 2}, 900, 300)]
    contents = {"text": 3, "developer": 2, "reasoning left out by the template": 1}
    receipt = replace(run.data.receipt, datasets=parts, contents=contents, rows_dropped={"not text": 2}, tokens=1800)
    page = describe(changed(run, data=replace(run.data, train=rows, receipt=receipt)), [])
    notes = "\n".join(page.notes)
    assert "a.jsonl: 25% drawn: 40 rows, of which 30 train, 8 are held out and 2 are dropped; 900 tokens (50%" in notes
    assert "3 are plain texts" in notes and "no developer" in notes and "leaves out the reasoning" in notes
    assert "Dropped: 2 not text." in notes
    assert {row.title.split(" (")[0] for row in page.rows} >= {"The shortest row", "The longest row", "A random row"}
    (shown,) = {row.figures.split("). ")[1] for row in page.rows if "find" in row.figures}
    assert shown == "user, assistant calls find, tool, assistant with reasoning (outside the loss); tools: find"


def test_a_model_and_a_file_are_enough(
    tmp_path: Path, tiny: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"prompt": f"Who is {i}?", "completion": f"Number {i}."} for i in range(9)]))
    main(["--model", str(tiny("llama2")), "--dataset", str(rows)])
    assert "rows.json: 9 rows" in capsys.readouterr().out


def test_a_model_without_a_file_is_not_enough() -> None:
    with pytest.raises(UsageError, match=r"RECIPE is missing.*or give --model and --dataset in its place"):
        main(["--model", "a/b"])


def test_help_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "in the loss" in capsys.readouterr().out
