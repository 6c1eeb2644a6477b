"""The fields of SFTConfig and LoraConfig, read from the installed source instead of imported.

Importing TRL takes seconds; `--help`, `list` and the check of a recipe's class body need names and types only.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from qlora_recipes.errors import SetupError, UsageError

# Later files override earlier ones, as the subclasses they hold do.
_SOURCES = {
    "SFTConfig": (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
    ),
    "LoraConfig": (("peft", "config.py", "PeftConfig"), ("peft", "tuners/lora/config.py", "LoraConfig")),
}


@dataclass(frozen=True)
class Field:
    """One field of a configuration class."""

    name: str
    annotation: str
    """Source text of the type, such as `int | None`."""
    help: str
    """First sentence of its documentation, or an empty string."""

    def parse(self, text: str) -> object:
        """Turn a command-line word into a value of the field's type.

        Raises:
            UsageError: when the word is no value of that type.
        """
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        return self.check(value)

    def check(self, value: object) -> object:
        """Return the value in the field's type (`"2e-4"` becomes a float), or raise UsageError."""
        for kind in self._kinds:
            if kind is type(None) and value is None:
                return None
            if kind is bool and isinstance(value, bool):
                return value
            if kind is int and isinstance(value, int) and not isinstance(value, bool):
                return value
            if kind is float and (number := _as_float(value)) is not None:
                return number
            if kind is str and not isinstance(value, (Mapping, list, tuple, type(None))):
                return value if isinstance(value, str) else str(value)
            if kind is list and isinstance(value, (list, tuple)):
                return list(value)
            if kind is dict and isinstance(value, Mapping):
                return dict(value)
        raise UsageError(f"{self.name}: got {value!r}, expected {self.annotation}")

    @property
    def _kinds(self) -> list[type]:
        """The plain types the annotation names, the narrowest first, so that `true` is no string."""
        words = {node.id for node in ast.walk(ast.parse(self.annotation)) if isinstance(node, ast.Name)}
        optional = "None" in self.annotation or "Optional" in words
        known = {"bool": bool, "int": int, "float": float, "list": list, "dict": dict, "str": str}
        kinds = [kind for name, kind in known.items() if name in words]
        if "Literal" in words or not kinds:  # an enumeration or a nested configuration is given by name or mapping
            kinds += [dict, bool, str]
        return ([type(None)] if optional else []) + kinds


def _as_float(value: object) -> float | None:
    """YAML reads `2e-4` as a string, so numbers are tried in both forms; a bool is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


# Fields that this package adds: a recipe and the command line give them as they give the others.
_ADDED = {
    "SFTConfig": (
        Field(
            "early_stopping_patience",
            "int | None",
            "Stop after so many evaluations without a better held-out loss, and keep the best adapter",
        ),
    ),
    "LoraConfig": (),
}


@functools.cache
def fields_of(config: str) -> Mapping[str, Field]:
    """Return name to Field for `"SFTConfig"` or `"LoraConfig"`.

    Raises:
        SetupError: when the package that defines the class is not installed.
    """
    found: dict[str, Field] = {}
    for package, path, class_name in _SOURCES[config]:
        found.update(_class_fields(_source(package, path), class_name))
    return found | {field.name: field for field in _ADDED[config]}


def _source(package: str, path: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"{package} is not installed; run: pip install -c constraints.txt {package}")
    return Path(spec.submodule_search_locations[0], path).read_text(encoding="utf-8")


def _class_fields(source: str, class_name: str) -> dict[str, Field]:
    body = next(
        node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    return {
        node.target.id: Field(node.target.id, ast.unparse(node.annotation), _help(node.value))
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _help(value: ast.expr | None) -> str:
    """The first sentence of `metadata={"help": ...}` in a `field(...)` call."""
    if value is not None:
        for node in ast.walk(value):
            if isinstance(node, ast.Dict):
                for key, text in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "help":
                        words = [n.value for n in ast.walk(text) if isinstance(n, ast.Constant)]
                        return "".join(str(word) for word in words).split(". ")[0].strip()
    return ""
