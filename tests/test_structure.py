"""The house: data flows one way, and a module imports only what stands above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qlora_recipes"

# Top to bottom. A module may import what stands above it.
ORDER = [
    "errors",
    "masking",
    "environment",
    "chat_templates",
    "formatters",
    "families",
    "models",
    "precision",
    "fields",
    "recipe",
    "standins",
    "run",
    "settings",
    "kernels",
    "data",
    "base",
    "memory",
    "stages",
    "evaluation",
    "comparison",
    "report",
    "preflight",
    "training",
    "deploy",
    "api",
    "commands",
    "experiments",
    "cli",
]
# The one door back: `Recipe.main` hands the recipe to its command line.
DOORS = {("recipe", "commands")}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "lm_eval", "matplotlib"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in FILES} == set(ORDER)


def test_contributing_shows_the_same_order() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").split("reads the imports:")[1]
    block = text.split("One door")[0]
    assert block.replace(",", " ").split() == ORDER


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path: Path) -> None:
    own = ORDER.index(room(path))
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "qlora_recipes" and len(parts) > 1 and parts[1] in ORDER and parts[1] != room(path):
            assert ORDER.index(parts[1]) < own or (room(path), parts[1]) in DOORS, f"{path.name} imports {name}"


def test_recipes_and_the_experiment_are_never_imported() -> None:
    for path in FILES:
        assert not {name.split(".")[0] for name in imported(path)} & {"recipes", "eval"}, path


def test_a_recipe_is_declared_without_heavy_imports() -> None:
    """`list` and `--help` answer in under two seconds only while nothing on their way loads torch."""
    import subprocess
    import sys

    light = [path for path in FILES if room(path) in ("commands", "cli") or path.name == "command.py"]
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in light]
    code = f"import sys, {', '.join(modules)}\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_real() -> None:
    import qlora_recipes

    assert all(hasattr(qlora_recipes, name) for name in qlora_recipes.__all__)
    assert qlora_recipes.__all__ == sorted(qlora_recipes.__all__)
