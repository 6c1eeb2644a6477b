"""The fields of SFTConfig, DPOConfig and LoraConfig, read from the installed source, and how words become their values.

Importing TRL takes seconds; `--help`, `list` and the check of a recipe's class body need names and types only.
Imports neither TRL nor PEFT.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
    "DPOConfig": (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", "trainer/dpo_config.py", "DPOConfig"),
    ),
    "LoraConfig": (("peft", "config.py", "PeftConfig"), ("peft", "tuners/lora/config.py", "LoraConfig")),
}
# The narrowest first: `true` is a bool before it is text, and 3 an int before it is a float.
_PLAIN: dict[str, type] = {"bool": bool, "int": int, "float": float, "list": list, "dict": dict, "str": str}
_NAMES = re.compile(r"[\w.]+(,[\w.]*)*")
_INT = re.compile("[-+]?(0|[1-9][0-9]{0,30})")
_PATHS = ("FILE", "FOLDER", "FILE.yaml", "ID_OR_FILE", "ID_OR_FOLDER")
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
    choices: tuple[str, ...] = ()
    """The only words allowed, where the annotation does not say so itself."""

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
            item = Field(self.name, self.item, "", expected=self.expected)
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
        typed = int(word) if _INT.fullmatch(word) else {"true": True, "false": False}.get(word.lower(), word)
        for reading in (typed, word) if word.strip() else ():
            with suppress(UsageError):
                return self.check(reading)
        raise self._refusal(word)

    def check(self, value: object) -> Any:
        """Return the value in the field's type (`"2e-4"` becomes a float), or raise UsageError."""
        if value is None and "None" in self._members:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        for kind in self.kinds:
            if kind is bool and isinstance(value, bool):
                return value
            if kind is int and is_number and isinstance(value, int):
                return value
            if kind is float and (is_number or isinstance(value, str)) and (number := _as_float(value)) is not None:
                return number
            if kind is str and (is_number or isinstance(value, str)) and self._is_choice(str(value)):
                # A shell leaves the ~ of --name=~/x, and pathlib fails for a user that is not there.
                return os.path.expanduser(str(value)) if self.metavar in _PATHS else str(value)  # noqa: PTH111
            if kind is list and isinstance(value, (list, tuple)):
                return [Field(self.name, self.item, "").check(each) if self.item else each for each in value]
            if kind is dict and isinstance(value, Mapping):
                return dict(value)
        raise self._refusal(value)

    def _json(self, word: str) -> Any:
        if word[:1] not in ("{", "[") or not {dict, list} & set(self.kinds):
            return _NO_VALUE
        try:
            return json.loads(word)
        except (ValueError, RecursionError):
            if word[0] == "[" and str in self.kinds:
                return _NO_VALUE  # a pattern, such as [qv]_proj
        raise UsageError(f'{self.name}: got {_shortened(word)}, expected JSON, such as {{"name": 1}} or ["a", "b"]')

    def _is_list(self, words: Sequence[str]) -> bool:
        if not self.item or (len(words) == 1 and self._is_none(words[0])):
            return False
        if len(words) > 1 or str not in self.kinds:
            return True
        names = list(self._members)
        list_first = "str" not in names or names.index("list") < names.index("str")
        return _NAMES.fullmatch(words[0]) is not None and (list_first or "," in words[0])

    def _is_none(self, word: str) -> bool:
        return "None" in self._members and (word == "null" or (word.lower() == "none" and str not in self.kinds))

    def _refusal(self, value: object) -> UsageError:
        word = value if isinstance(value, str) else ""
        hint = nearest(word, self.allowed)
        hint = ", without a leading zero" if re.fullmatch("[-+]?0[0-9]+", word) else f".{hint}" if hint else ""
        return UsageError(f"{self.name}: got {_shortened(value)}, expected {self._expected}{hint}")

    @property
    def _expected(self) -> str:
        if self.allowed:
            return f"one of {', '.join(self.allowed)}"
        return self.expected or {"bool": "true or false", "str": "text"}.get(self.annotation, self.annotation)

    @functools.cached_property
    def _members(self) -> dict[str, ast.expr]:
        """The members of the type by name: `list` and `None` of `list[str] | None`."""
        tree = ast.parse(self.annotation, mode="eval")
        return {ast.unparse(node).split("[")[0]: node for node in _members(tree.body)}

    @functools.cached_property
    def kinds(self) -> list[type]:
        """The plain types that a value can have, the narrowest first."""
        kinds = [kind for name, kind in _PLAIN.items() if name in self._members]
        if "Literal" in self._members and str not in kinds:
            kinds.append(str)
        return kinds or [dict, bool, str]  # an enumeration or a nested configuration is given by name or mapping

    @functools.cached_property
    def allowed(self) -> list[str]:
        """The only words allowed; a part of one in brackets, as in `pissa_niter_[number of iters]`, is a number."""
        leaves = ast.walk(self._members.get("Literal", ast.Pass()))
        words = [leaf.value for leaf in leaves if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)]
        return [] if "str" in self._members and not self.choices else [*self.choices, *words]

    def _is_choice(self, word: str) -> bool:
        forms = (re.sub(r"\\\[.*\\\]", "[1-9][0-9]*", re.escape(choice)) for choice in self.allowed)
        return not self.allowed or any(re.fullmatch(form, word) for form in forms)

    @functools.cached_property
    def item(self) -> str:
        """Type of a list's items where words can be items, else an empty string."""
        node = self._members.get("list")
        return node.slice.id if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name) else ""


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


def _as_float(value: Any) -> float | None:
    """YAML reads `2e-4` as a string, so numbers are tried in both forms."""
    try:
        return None if "_" in str(value) else float(value)
    except (ValueError, OverflowError):
        return None


# This package's own fields: a recipe and the command line give them as they give the others.
_OWN = {
    "early_stopping_patience": Field(
        "early_stopping_patience",
        "int | None",
        "Stop after so many evaluations without a better held-out loss, and keep the best adapter",
    ),
    "loraplus_lr_ratio": Field(
        "loraplus_lr_ratio", "float | None", "LoRA+: learning rate of every B, as a multiple of that of every A"
    ),
}


@functools.cache
def fields_of(config: str) -> Mapping[str, Field]:
    """Return name to Field for `"SFTConfig"`, `"DPOConfig"` or `"LoraConfig"`.

    Raises:
        SetupError: when the package that defines the class is not installed.
    """
    found: dict[str, Field] = {}
    for package, path, class_name in _SOURCES[config]:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SetupError(f"{package} is not installed; run: pip install {package}")
        tree = ast.parse(Path(spec.submodule_search_locations[0], path).read_text(encoding="utf-8"))
        classes = {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in classes[class_name]:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
                found[name] = _field(name, node)
    return found | (_OWN if config != "LoraConfig" else {})


def _field(name: str, node: ast.AnnAssign) -> Field:
    """Read one line of a configuration class: its type, and the help and choices of `field(metadata={...})`."""
    dicts = [inner for inner in ast.walk(node.value or ast.Pass()) if isinstance(inner, ast.Dict)]
    pairs = [pair for inner in dicts for pair in zip(inner.keys, inner.values, strict=True)]
    known = {key.value: _texts(value) for key, value in pairs if isinstance(key, ast.Constant)}
    return Field(
        name,
        ast.unparse(node.annotation),
        _first_sentence("".join(known.get("help", ()))),
        choices=tuple(known.get("choices", ())),
    )


def _first_sentence(text: str) -> str:
    """Return the first sentence without markup, from a capital to a full stop, as whole as upstream has it."""
    plain = re.sub(r"<[^>]+>|\[`?~?([^\]`]+)`?\](\([^)]*\))?", r"\1", " ".join(text.split()))
    sentence = re.split(r"(?<!e\.g)(?<!i\.e)(?<=[.!?]) (?=[^a-z])", plain)[0].rstrip(".,")
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def _texts(node: ast.expr) -> list[str]:
    return [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and isinstance(inner.value, str)]
