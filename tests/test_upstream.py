"""Private names of libraries: all that the package uses are listed, and none has changed since it was read."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from trl import DPOTrainer, SFTTrainer

import qlora_recipes
from qlora_recipes.base import repairs, upstream
from qlora_recipes.training.trainer import ExactResume, PreferenceTrainer, RunTrainer, _Faults

PACKAGE = Path(qlora_recipes.__path__[0])
DOCS = PACKAGE.parent / "docs"
ENTRIES = upstream.names()
# Of each library, the newest version that was read, and the oldest.
READ_IN = {
    library: versions.split(" and ")
    for library, versions in re.findall(
        r"([\w-]+) (\d[\d.]*\d(?: and \d[\d.]*\d)?)",
        " ".join(upstream.TABLE.read_text(encoding="utf-8").partition("Read in ")[2].partition(";")[0].split()),
    )
}
LISTED = {name.name for name in ENTRIES}
LIBRARIES = {*READ_IN, "lm_eval", "accelerate"}
STANDARD = {"_actions", "_asdict", "_exit"}
"""Names of Python's standard library."""
PRIVATE = re.compile(r"_[a-zA-Z]\w*")


@pytest.mark.parametrize("name", ENTRIES, ids=lambda name: name.name)
def test_a_name_is_as_it_was_read(name: upstream.Name) -> None:
    found = upstream.fingerprint(name)
    assert found in name.fingerprints.split(), (
        f"{name.name} of {name.owner} is not what was read in {READ_IN}: read it again beside {name.file}, "
        f"and write {found} into upstream.md"
    )
    assert re.search(rf"\b{name.name}\b", (PACKAGE / name.file).read_text(encoding="utf-8")), "no longer used"


@pytest.mark.parametrize(("file", "end"), [("constraints.txt", 0), ("constraints-oldest.txt", -1)])
def test_the_versions_are_those_that_are_pinned(file: str, end: int) -> None:
    text = (PACKAGE.parent / file).read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    assert len(READ_IN) == 7
    assert all(pinned[library].startswith(versions[end]) for library, versions in READ_IN.items()), READ_IN


def test_a_name_that_another_version_lacks_is_absent() -> None:
    gone = ENTRIES[0]._replace(name="_no_longer_there")
    assert upstream.fingerprint(gone) == upstream.ABSENT
    assert upstream.fingerprint(gone._replace(owner="transformers.trainer:Moved")) == upstream.ABSENT
    assert upstream.fingerprint(gone._replace(owner="transformers.moved")) == upstream.ABSENT


def test_what_is_replaced_is_told_from_what_is_read() -> None:
    replaced = {name.name for name in ENTRIES if name.is_replaced()}
    assert replaced >= {"_save", "_use_triton", "_tr_loss", "_model_call", "forward"}
    assert not replaced & {"_metrics", "_attn_implementation", "_commit_hash", "_split_heads"}


def test_every_repair_is_of_a_library_in_a_version() -> None:
    told = [line for library in READ_IN for line in upstream.repaired(library)]
    functions = {name for name, each in vars(repairs).items() if inspect.isfunction(each) and not name.startswith("_")}
    assert {line.partition(" ")[0] for line in told} == functions - {"TYPE_CHECKING"}
    assert "float32_adapter (1.16)" in upstream.repaired("trl")


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
        listed = {name.name for name in ENTRIES if name.file == file}
        for name in set(re.findall(r"\b(?:self\.|def )(_[a-z]\w*)", inspect.getsource(kind))) - listed:
            assert not re.search(rf"\b(self\.|def ){name}\b", source), f"{kind.__name__}.{name} is its base's, too"


def test_the_page_of_the_trainer_has_every_override_and_every_event() -> None:
    """What docs/trainer.md tells is there, and what is there it tells."""
    page = (DOCS / "trainer.md").read_text(encoding="utf-8")
    classes = ((ExactResume, SFTTrainer), (RunTrainer, SFTTrainer), (PreferenceTrainer, DPOTrainer))
    overridden = {name for ours, base in classes for name in vars(ours) if name in dir(base)}
    overridden = {name for name in overridden if not name.startswith("__")}
    events = {name for name in vars(_Faults) if name.startswith("on_")}
    assert set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE)) == overridden | events
    tests = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", page))
