"""Chat templates: how a conversation becomes the text that a family of models was trained on.

Knows nothing of tokenizers or models. The sources of each format are in the README beside this file.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_recipes.errors import TemplateError

HERE = Path(__file__).parent
Origin = Literal["recipe", "package", "tokenizer", "trl", "marked", "plain"]
"""Where a template is from: the recipe, this package, the tokenizer (with marks of its own), TRL's training version of
the tokenizer's, the tokenizer's with marks found here, or the plain one for a tokenizer that has none."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with `{% generation %}` markers around the text in the loss."""

    source: str
    """The text of the template."""

    name: str
    """What receipts and errors call it."""

    role_markers: str | None = None
    """Regular expression for the plain-text strings that open or close a turn. A message that contains one could
    forge a turn, since no tokenizer can tell it from the template's own; such a row is dropped and counted. None in a
    recipe leaves finding them to `data.templates.choose_template`; None in a chosen template: it writes none."""

    origin: Origin = "recipe"

    date: str | None = None
    """The day that it writes in place of today's, in ISO 8601; None where it writes none."""

    @classmethod
    def from_file(cls, path: Path, role_markers: str | None = None, origin: Origin = "recipe") -> ChatTemplate:
        """Read a `.jinja` file.

        Raises:
            TemplateError: when it cannot be read.
        """
        try:
            return cls(path.read_text(encoding="utf-8"), path.name, role_markers, origin)
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"no chat template at {path}: {getattr(error, 'strerror', error)}") from error

    @property
    def sha256(self) -> str:
        """Hash of the template's text, as written into receipts."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def forged_marker(self, text: str) -> str | None:
        """Return the first role marker inside a message's text, or None."""
        found = re.search(self.role_markers, text) if self.role_markers else None
        return found.group() if found else None


def without_markers(template: str) -> str:
    """Return a chat template that renders the same, without the tags that only Transformers knows."""
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)


LLAMA_2_CHAT = ChatTemplate.from_file(HERE / "llama2.jinja", r"\[/?INST\]|<</?SYS>>", "package")
FALCON_CHAT = ChatTemplate.from_file(HERE / "falcon.jinja", r"(?m)^[ \t]*(?:System|User|Assistant):", "package")
PLAIN_CHAT = ChatTemplate.from_file(HERE / "plain.jinja", r"### (?:System|User|Assistant):", "plain")
"""For a tokenizer that has no template, as those of base models."""
KEEP_TEXTS = frozenset(template.source for template in (LLAMA_2_CHAT, FALCON_CHAT, PLAIN_CHAT))
"""Sources that write every text as it is, but for the space around it: what else they write depends on roles alone."""
