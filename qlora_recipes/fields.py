"""The fields of SFTConfig and LoraConfig, read from the installed source, and how words become their values.

Importing TRL takes seconds; `--help`, `list` and the check of a recipe's class body need names and types only.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_recipes.errors import SetupError, UsageError, nearest

# Later files override earlier ones, as the subclasses they hold do.
_SOURCES = {
    "SFTConfig": (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/sft_config.py", "SFTConfig"),
    ),
    "LoraConfig": (("peft", "config.py", "PeftConfig"), ("peft", "tuners/lora/config.py", "LoraConfig")),
}
# The narrowest first: `true` is a bool before it is text, and 3 an int before it is a float.
_PLAIN: dict[str, type] = {"bool": bool, "int": int, "float": float, "list": list, "dict": dict, "str": str}
_NAMES = re.compile(r"[\w.]+(,[\w.]*)*")
_INT = re.compile("[-+]?(0|[1-9][0-9]{0,30})")
_NO_VALUE = object()
ABSENT = object()
"""The default of a flag that is not in the result when it was not given."""


@dataclass(frozen=True)
class Field:
    """One field of a configuration class, or one flag of a command."""

    name: str
    annotation: str
    """Source text of the type, such as `int | None`."""
    help: str
    """First sentence of its documentation, or an empty string."""
    metavar: str = ""
    """Stands for the value in `--help`; the annotation does where it is empty."""
    default: Any = ABSENT
    valid: Callable[[Any], bool] = lambda value: True
    """Whether a value of the right type can be used; a command's flags are held to it."""
    expected: str = ""
    """What a refusal says was expected; the annotation where it is empty."""

    def parse(self, words: Sequence[str]) -> Any:
        """Turn the words after a flag into a value of the field's type. Nothing is read as YAML: text stays as typed.

        Whole numbers have no leading zeros: `010` is refused, being 10 to some programs and 8 to others. Mappings are
        JSON; lists are `a b`, `a,b` or JSON. `null` is None where the field may be None, and so is `none` where it
        takes no text. Of a field that takes a list or text, names make a list (`q_proj`) and anything else, such as
        `all-linear` or a pattern, is text; where its type names text first, a single name is text too.

        Raises:
            UsageError: when the words are no value of that type.
        """
        if not words:
            raise UsageError(f"{self.name}: got no value, expected {self._expected}")
        value = self._json(words[0]) if len(words) == 1 else _NO_VALUE
        if value is not _NO_VALUE:
            value = self.check(value)
        elif self._is_list(words):
            item = Field(self.name, self._type.item, "", expected=self.expected)
            value = [item.parse_scalar(part) for word in words for part in word.split(",")]
        elif len(words) == 1:
            value = self.parse_scalar(words[0])
        if value is _NO_VALUE or not self.valid(value):
            raise self._refusal(" ".join(words))
        return value

    def parse_scalar(self, word: str) -> Any:
        """Turn one word into a value that is neither a list nor a mapping, or raise UsageError."""
        if self._is_none(word):
            return None
        for kind in self._type.kinds:
            if kind is bool and word.lower() in ("true", "false"):
                return word.lower() == "true"
            if kind is int and _INT.fullmatch(word):
                return int(word)
            if kind is float and "_" not in word and (number := _as_float(word)) is not None:
                return number
            if kind is str and word.strip() and self._allows(word):
                return word
        raise self._refusal(word)

    def check(self, value: object) -> Any:
        """Return the value in the field's type (`"2e-4"` becomes a float), or raise UsageError."""
        if value is None and self._type.optional:
            return None
        for kind in self._type.kinds:
            if kind is bool and isinstance(value, bool):
                return value
            if kind is int and isinstance(value, int) and not isinstance(value, bool):
                return value
            if kind is float and (number := _as_float(value)) is not None:
                return number
            if kind is str and isinstance(value, (str, int, float)) and self._allows(str(value)):
                return str(value)
            if kind is list and isinstance(value, (list, tuple)):
                item = Field(self.name, self._type.item, "")
                return [item.check(each) if item.annotation else each for each in value]
            if kind is dict and isinstance(value, Mapping):
                return dict(value)
        raise self._refusal(value)

    @property
    def is_switch(self) -> bool:
        """Whether the flag alone, without a value, means true."""
        return bool in self._type.kinds

    @property
    def takes_list(self) -> bool:
        """Whether several words can follow the flag."""
        return list in self._type.kinds

    def _json(self, word: str) -> Any:
        if word[:1] not in ("{", "[") or not {dict, list} & set(self._type.kinds):
            return _NO_VALUE
        try:
            return json.loads(word)
        except (ValueError, RecursionError):
            if word[0] == "[" and str in self._type.kinds:
                return _NO_VALUE  # a pattern, such as [qv]_proj
        raise UsageError(f'{self.name}: got {_shortened(word)}, expected JSON, such as {{"name": 1}} or ["a", "b"]')

    def _is_list(self, words: Sequence[str]) -> bool:
        if not self._type.item or (len(words) == 1 and self._is_none(words[0])):
            return False
        if len(words) > 1 or str not in self._type.kinds:
            return True
        return _NAMES.fullmatch(words[0]) is not None and (self._type.list_first or "," in words[0])

    def _allows(self, word: str) -> bool:
        return not self._type.choices or word in self._type.choices

    def _is_none(self, word: str) -> bool:
        return self._type.optional and (word == "null" or (word.lower() == "none" and str not in self._type.kinds))

    def _refusal(self, value: object) -> UsageError:
        word = value if isinstance(value, str) else ""
        hint = nearest(word, self._type.choices)
        hint = ", without a leading zero" if re.fullmatch("[-+]?0[0-9]+", word) else f".{hint}" if hint else ""
        return UsageError(f"{self.name}: got {_shortened(value)}, expected {self._expected}{hint}")

    @property
    def _expected(self) -> str:
        if self._type.choices:
            return f"one of {', '.join(self._type.choices)}"
        return self.expected or {"bool": "true or false", "str": "text"}.get(self.annotation, self.annotation)

    @property
    def _type(self) -> _Type:
        return _type_of(self.annotation)


@dataclass(frozen=True)
class _Type:
    """What an annotation says of the values."""

    kinds: tuple[type, ...]
    """The narrowest first."""
    optional: bool
    item: str = ""
    """Annotation of a list's items, where words can be such items."""
    list_first: bool = False
    """Whether the annotation names the list before text."""
    choices: tuple[str, ...] = ()
    """The words that are allowed; empty where any is."""


@functools.cache
def _type_of(annotation: str) -> _Type:
    members = {ast.unparse(node).split("[")[0]: node for node in _members(ast.parse(annotation, mode="eval").body)}
    kinds = [kind for name, kind in _PLAIN.items() if name in members]
    if "Literal" in members and str not in kinds:
        kinds.append(str)
    items, names = members.get("list"), list(members)
    item = items.slice if isinstance(items, ast.Subscript) else None
    leaves = [node.value for node in ast.walk(members.get("Literal", ast.Pass())) if isinstance(node, ast.Constant)]
    choices = tuple(leaf for leaf in leaves if isinstance(leaf, str)) if "str" not in members else ()
    return _Type(
        kinds=tuple(kinds or (dict, bool, str)),  # an enumeration or a nested configuration: a name or a mapping
        optional="None" in members,
        item=ast.unparse(item) if isinstance(item, ast.Name) else "",
        list_first="str" not in members or ("list" in members and names.index("list") < names.index("str")),
        choices=() if any("[" in choice for choice in choices) else choices,  # pissa_niter_[number] is a description
    )


def _members(node: ast.expr) -> list[ast.expr]:
    """The members of a union, however it is written."""
    if isinstance(node, ast.BinOp):
        return [*_members(node.left), *_members(node.right)]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
        given = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        none = [ast.Constant(None)] if ast.unparse(node.value) == "Optional" else []
        return [*(member for each in given for member in _members(each)), *none]
    return [node]


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:98]}...{text[-98:]}"


def _as_float(value: object) -> float | None:
    """YAML reads `2e-4` as a string, so numbers are tried in both forms; a bool is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
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
                        parts = [n.value for n in ast.walk(text) if isinstance(n, ast.Constant)]
                        return "".join(str(part) for part in parts).split(". ")[0].strip()
    return ""
