"""Reads the file that `--config` names: `flag: value` lines, each refused with its line number. Knows no flag."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qlora_recipes.data.reading import KINDS
from qlora_recipes.errors import UsageError, nearest
from qlora_recipes.fields import Field
from qlora_recipes.recipe import DERIVED

LARGEST = 2**20
"""Bytes of a config file. All flags there are take a hundredth of that."""
# What YAML 1.2 has. YAML 1.1, which PyYAML reads, makes a bool of `no`, 750 of 12:30 and a date of 2024-02-28.
_SCALARS = {
    "null": "|~|null|Null|NULL",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+",
}


class _Loader(yaml.SafeLoader):
    """Reads values that are written out: no anchors, whose aliases can multiply, no tags, and no key twice."""

    yaml_implicit_resolvers = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]  # types-PyYAML leaves the parser untyped
        found = getattr(event, "tag", None) or event.anchor
        if found:
            kind = "tag" if found != event.anchor else "alias" if isinstance(event, yaml.AliasEvent) else "anchor"
            raise self.fault(event, f"got the {kind} {found}, expected values written out")
        node = super().compose_node(parent, index)
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise self.fault(key, "got a list or a mapping, expected a name")
            if key.value in seen:
                raise self.fault(key, f"{key.value} is given twice")
            seen.add(key.value)
        return node

    def fault(self, found: Any, message: object) -> UsageError:
        return UsageError(f"{self.name}, line {found.start_mark.line + 1}: {message}")


for _name, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), None)


def read_config(file: str, flags: Mapping[str, Field]) -> dict[str, Any]:
    """Return flag to value for the lines of a YAML file.

    A word is read as on the command line (`save_strategy: no` is the word no); lists and mappings are YAML's.

    Raises:
        UsageError: for what is no such file, and with its line for an unknown flag, a key that is there twice, a value
            that is missing or of another type, an anchor, an alias and a tag.
    """
    try:
        loader = _Loader(_read(file))
        loader.name = file
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            kind = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a word"}.get(type(root), "nothing")
            raise UsageError(f"--config {file} holds {kind}, expected `flag: value` lines")
        return {key.value: _value(loader, key, node, flags) for key, node in root.value}
    except UsageError:
        raise
    except RecursionError as error:
        raise UsageError(f"--config {file} is nested too deep, expected `flag: value` lines") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"--config {file} is not YAML: {' '.join(str(error).split())}") from error


def _read(file: str) -> str:
    if "://" in file:
        raise UsageError(f"--config {file} is a URL, expected a file; download it first")
    try:
        kind = stat.filemode(Path(file).stat().st_mode)[0]
        if kind in KINDS:
            raise UsageError(f"--config {file} is {KINDS[kind]}, expected a YAML file")
        with Path(file).open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UsageError(f"--config {file} has more than {LARGEST:,} bytes, expected `flag: value` lines")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--config {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {file} is not UTF-8: byte {error.start}; save it as UTF-8") from error


def _value(loader: _Loader, key: yaml.Node, node: yaml.Node, flags: Mapping[str, Field]) -> Any:
    name = key.value
    if name in DERIVED:
        raise loader.fault(key, f"{name} is not set by hand; it follows from {DERIVED[name]}")
    if name not in flags:
        raise loader.fault(key, f"unknown flag {name!r}.{nearest(str(name), flags)}")
    field = flags[name]
    try:
        if not isinstance(node, yaml.ScalarNode):
            return field.check(loader.construct_object(node, deep=True))
        if not node.value.strip():
            return field.parse(())
        if node.tag.endswith(":null"):
            return field.check(None)
        return field.check(node.value) if node.style else field.parse_scalar(node.value)  # in quotes it is text
    except UsageError as error:
        raise loader.fault(node, error) from error
