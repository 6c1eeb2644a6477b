"""Private names of libraries: all that the package uses are listed, and none has changed since it was read."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from trl import SFTTrainer

import qlora_recipes
from qlora_recipes.training.trainer import RunTrainer, _Faults

PACKAGE = Path(qlora_recipes.__path__[0])
DOCS = PACKAGE.parent / "docs"


class Private(NamedTuple):
    """One row of docs/upstream.md."""

    file: str
    owner: str
    name: str
    reason: str
    until: str
    fingerprint: str


PAGE = (DOCS / "upstream.md").read_text(encoding="utf-8")
ENTRIES = [
    Private(*row.replace("`", "").strip("| ").split(" | ")) for row in PAGE.splitlines() if row.startswith("| `")
]
VERSIONS = dict(re.findall(r"([\w-]+) (\d[\d.]*\d)", PAGE.partition("Read in ")[2].partition("\n")[0]))
LISTED = {private.name for private in ENTRIES}
LIBRARIES = {*VERSIONS, "lm_eval", "accelerate", "bitsandbytes", "peft"}
STANDARD = {"_actions", "_asdict", "_exit"}
"""Names of Python's standard library."""
PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def fingerprint(private: Private) -> str:
    module, _, kind = private.owner.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, kind) if kind else owner
    found = [line.strip() for line in inspect.getsource(owner).splitlines() if re.search(rf"\b{private.name}\b", line)]
    value = getattr(owner, private.name, None)
    if (
        getattr(value, "__module__", None) == module and owner is not torch
    ):  # neither an instance's nor replaced by ours
        found.append(inspect.getsource(value))
    if owner is torch:
        found.append(str(getattr(torch.ops.aten, private.name).default._schema))
    assert found, f"{private.owner} no longer has {private.name}"
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:8]


@pytest.mark.parametrize("private", ENTRIES, ids=lambda private: private.name)
def test_a_private_name_is_as_it_was_read(private: Private) -> None:
    found = fingerprint(private)
    assert found == private.fingerprint, (
        f"{private.name} of {private.owner} is not what was read in {VERSIONS}: read it again beside {private.file}, "
        f"and write {found} into docs/upstream.md"
    )
    assert re.search(rf"\b{private.name}\b", (PACKAGE / private.file).read_text(encoding="utf-8")), "no longer used"


def test_the_versions_are_those_that_are_pinned() -> None:
    text = (PACKAGE.parent / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    assert {name: pinned[name][: len(version)] for name, version in VERSIONS.items()} == VERSIONS


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in PACKAGE.rglob("*.py"):
        yield path.name, ast.parse(path.read_text(encoding="utf-8"))


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def defined() -> set[str]:
    """Private names that the package itself defines."""
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
    return found


def used(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a file reads from an object, asks for by name, or imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            yield from (
                part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def test_no_private_name_is_used_that_is_not_listed() -> None:
    known = defined() | LISTED | STANDARD
    found = {(file, name) for file, tree in trees() for name in used(tree) if PRIVATE.fullmatch(name)}
    assert not {(file, name) for file, name in found if name not in known}


def classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(qlora_recipes.__path__, "qlora_recipes."):
        loaded = importlib.import_module(module.name)
        yield from (each for each in vars(loaded).values() if inspect.isclass(each) and each.__module__ == module.name)


def test_no_class_takes_a_private_name_of_its_base_that_is_not_listed() -> None:
    """Also by accident: a class of ours that calls something `_tokenizer` breaks an SFTTrainer."""
    for kind in classes():
        bases = [base for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
        source = "\n".join(inspect.getsource(base) for base in bases if base.__module__ != "torch._C")
        file = kind.__module__.partition(".")[2].replace(".", "/") + ".py"
        listed = {private.name for private in ENTRIES if private.file == file}
        for name in set(re.findall(r"\b(?:self\.|def )(_[a-z]\w*)", inspect.getsource(kind))) - listed:
            assert not re.search(rf"\b(self\.|def ){name}\b", source), f"{kind.__name__}.{name} is its base's, too"


def test_the_page_of_the_trainer_has_every_override_and_every_event() -> None:
    """What docs/trainer.md tells is there, and what is there it tells."""
    page = (DOCS / "trainer.md").read_text(encoding="utf-8")
    overridden = {name for name in vars(RunTrainer) if name in dir(SFTTrainer) and not name.startswith("__")}
    events = {name for name in vars(_Faults) if name.startswith("on_")}
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == overridden | events
    tests = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", page))
