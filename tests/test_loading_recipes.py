"""A recipe is found by name or file, and its file is never run as a program by a command that only reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_recipes import DatasetSpec, Recipe, cli, load_recipe
from qlora_recipes.commands.recipe_cli import parse, settings_from
from qlora_recipes.errors import UsageError
from qlora_recipes.experiments.benchmark.plan import plan_benchmark
from qlora_recipes.recipe import SHIPPED, find_recipe
from qlora_recipes.standins import ROWS

ROOT = Path(__file__).parent.parent
TICKETS = """
from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.models import LLAMA_2_7B_CHAT
{}
class Tickets(Recipe):
    model = LLAMA_2_7B_CHAT
    dataset = DatasetSpec("tickets.csv")

    def format_row(self, row):
        return [{{"role": "user", "content": row["subject"]}}, {{"role": "assistant", "content": row["reply"]}}]
{}
"""
ENDINGS = {
    "bare": "Tickets.main()",
    "guarded": 'if __name__ == "__main__":\n    Tickets.main()',
    "neither": "",
    "with flags": 'Tickets.main(["--demo", "--no_such_flag"])',
}


def write(ending: str, before: str = "") -> Path:
    Path("tickets.csv").write_text("subject,reply\n" + "".join(f"Ticket {i},Reply {i}.\n" for i in range(30)))
    Path("tickets.py").write_text(TICKETS.format(before, ending))
    return Path("tickets.py")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("ending", ENDINGS)
def test_with_and_without_the_guard(ending: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(ENDINGS[ending])
    cli.main(["plan", "tickets", "--demo"])
    assert "tickets-demo" in capsys.readouterr().out
    cli.main(["list", "."])
    assert "tickets.csv" in capsys.readouterr().out
    cli.main(["inspect", "tickets.py", "--demo"])
    assert "tickets.csv: 30 rows" in capsys.readouterr().out
    plan = plan_benchmark(file, precisions=["nf4", "bf16"], seeds=[0], margin=1.0, flags={"demo": True})
    assert [arm.settings.dataset for arm in plan.arms] == ["tickets.csv"] * 2
    assert sorted(each.name for each in here.iterdir()) == ["tickets.csv", "tickets.py"]


SIDE_EFFECTS = {
    "it exits": ("import sys\nsys.exit(3)", "line 5: the recipe's file exits (with 3) while it is read"),
    "it says why": ("raise SystemExit('no GPU')", "line 4: the recipe's file exits (with 'no GPU')"),
    "it needs flags": (
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('file')\nparser.parse_args()",
        "line 7: the recipe's file exits (with 2)",
    ),
    "it asks": ("name = input('name? ')", "line 4: the recipe's file fails with EOFError"),
    "it fails": ("1 / 0", "line 4: the recipe's file fails with ZeroDivisionError"),
}


@pytest.mark.parametrize("case", SIDE_EFFECTS)
@pytest.mark.parametrize("verb", ["plan", "inspect", "train", "benchmark"])
def test_what_a_file_does_is_contained_and_told_in_one_message(
    case: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, message = SIDE_EFFECTS[case]
    write("", before)
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "tickets.py", *(["--precisions", "nf4", "bf16"] if verb == "benchmark" else [])])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert message in said.err and said.err.count("error: tickets.py, line") == 1
    assert "Traceback" not in said.err


def test_a_file_sees_no_flags_of_ours_and_prints_beside_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    write("", "import argparse, sys\nprint('argv', sys.argv)\nargparse.ArgumentParser().parse_args()")
    cli.main(["list", "."])
    said = capfd.readouterr()
    assert "argv ['tickets.py']" in said.err and "argv" not in said.out


def test_a_file_may_import_its_neighbor_and_a_variant_a_recipe() -> None:
    write("Tickets.main()")
    Path("longer.py").write_text(
        "from tickets import Tickets\nclass Longer(Tickets):\n    training = dict(max_length=64)\nLonger.main()\n"
    )
    assert load_recipe("longer.py").training["max_length"] == 64


def test_main_is_a_program_again_after_reading(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError):
        load_recipe(write("1 / 0"))
    recipe = load_recipe(write(""))
    with pytest.raises(SystemExit):
        recipe.main(["--no_such_flag"])
    assert "unknown flag --no_such_flag" in capsys.readouterr().err


def test_a_recipe_is_found_by_path_by_name_here_and_by_the_name_that_ships() -> None:
    assert find_recipe("llama2_guanaco") == SHIPPED / "llama2_guanaco.py" == ROOT / "recipes" / "llama2_guanaco.py"
    file = write("")
    assert find_recipe("tickets") == find_recipe("tickets.py") == file
    Path("llama2_guanaco.py").write_text("")
    assert find_recipe("llama2_guanaco") == Path("llama2_guanaco.py")
    with pytest.raises(UsageError, match="Did you mean 'falcon_faq'"):
        find_recipe("falcon_fqa")
    with pytest.raises(UsageError, match="no recipe at xxx"):
        find_recipe("x" * 5000)


def test_a_demo_reads_the_rows_that_a_recipe_declares_where_they_are(recipe_for: Callable[..., type[Recipe]]) -> None:
    recipe = recipe_for(dataset=DatasetSpec("mine.jsonl", demo="faq"))
    demo = parse(recipe, ["--demo"])
    assert settings_from(recipe, demo).dataset == str(ROWS["faq"])
    Path("mine.jsonl").write_text("{}\n")
    assert settings_from(recipe, demo).dataset == "mine.jsonl"
    assert settings_from(recipe_for(dataset=DatasetSpec("mine.jsonl")), demo).dataset == "mine.jsonl"
    assert settings_from(recipe, parse(recipe, ["--demo", "--dataset", "other.csv"])).dataset == "other.csv"
