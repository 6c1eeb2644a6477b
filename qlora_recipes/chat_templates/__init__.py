"""Chat templates: how a conversation becomes the text that a family of models was trained on.

Knows nothing of tokenizers or models. The sources of each format are in the README beside this file.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from qlora_recipes.errors import TemplateError

HERE = Path(__file__).parent


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with `{% generation %}` markers around the text in the loss."""

    path: Path
    """The `.jinja` file."""

    role_markers: str
    """Regular expression for the plain-text strings that open or close a turn. A message that contains one could
    forge a turn, since no tokenizer can tell it from the template's own; such a row is dropped and counted."""

    @property
    def source(self) -> str:
        """The text of the template.

        Raises:
            TemplateError: when the file cannot be read.
        """
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError as error:
            raise TemplateError(f"no chat template at {self.path}: {error.strerror}") from error

    @property
    def sha256(self) -> str:
        """Hash of the template's text, as written into receipts."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def forged_marker(self, text: str) -> str | None:
        """Return the first role marker inside a message's text, or None."""
        found = re.search(self.role_markers, text)
        return found.group() if found else None


LLAMA_2_CHAT = ChatTemplate(HERE / "llama2.jinja", role_markers=r"\[/?INST\]|<</?SYS>>")
FALCON_CHAT = ChatTemplate(HERE / "falcon.jinja", role_markers=r"(?m)^[ \t]*(?:System|User|Assistant):")
