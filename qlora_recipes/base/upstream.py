"""Names of other libraries that are private or replaced here: what was read of them, and what has changed since.

upstream.md beside this file is the table. Its tests hold it against the installed versions; the preflight does for a
version outside the tested range, because a change there may make what replaces it wrong.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qlora_recipes.base import repairs

TABLE = Path(__file__).with_name("upstream.md")
PACKAGE = Path(__file__).parent.parent
ABSENT = "absent"


class Name(NamedTuple):
    """One row of upstream.md."""

    file: str
    owner: str
    """`module`, `module:class`, or PyTorch's operators: `torch.ops.library`."""
    name: str
    reason: str
    until: str
    fingerprints: str
    """One for each version that has another source, or `absent`."""

    def is_replaced(self) -> bool:
        """Whether this package defines the name anew or assigns to it, instead of only reading it."""
        source = (PACKAGE / self.file).read_text(encoding="utf-8")
        return re.search(rf"\bdef {self.name}\(|\.{self.name} [+]?= ", source) is not None


def names() -> list[Name]:
    """Return all rows of upstream.md."""
    rows = (row for row in TABLE.read_text(encoding="utf-8").splitlines() if row.startswith("| `"))
    return [Name(*row.replace("`", "").strip("| ").split(" | ")) for row in rows]


def fingerprint(name: Name) -> str:
    """Return a hash of the name's source and of the lines of its owner that mention it, or `absent`."""
    module, _, kind = name.owner.partition(":")
    if module.startswith("torch.ops."):
        operator = getattr(getattr(torch.ops, module.rpartition(".")[2]), name.name, None)
        return ABSENT if operator is None else hashlib.sha256(str(operator.default._schema).encode()).hexdigest()[:8]
    try:
        owner = importlib.import_module(module)
        owner = getattr(owner, kind) if kind else owner
    except (ImportError, AttributeError):
        return ABSENT
    found = [line.strip() for line in inspect.getsource(owner).splitlines() if re.search(rf"\b{name.name}\b", line)]
    value: Any = getattr(owner, name.name, None)
    if owner is torch:
        found.append(str(getattr(torch.ops.aten, name.name).default._schema))
    elif getattr(value, "__module__", None) == module:  # neither an instance's nor replaced by ours
        found.append(inspect.getsource(value))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:8] if found else ABSENT


def changed(library: str) -> list[Name]:
    """Return the names of a library that are not as they were read."""
    owned = (name for name in names() if name.owner.split(":")[0].split(".")[0] == library.replace("-", "_"))
    return [name for name in owned if fingerprint(name) not in name.fingerprints.split()]


def repaired(library: str) -> list[str]:
    """Return the repairs of a library's defects, each with the version in which the defect was read."""
    found = []
    for name, function in vars(repairs).items():
        if read := re.search(rf"^ +{library} ([\d.]+\d)", getattr(function, "__doc__", None) or "", re.I | re.M):
            found.append(f"{name} ({read[1]})")
    return found
