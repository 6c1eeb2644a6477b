"""Text from models and data made safe to display: nothing invisible, nothing that reverses the text around it.

Knows nothing of reports.
"""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

# Control characters, lone surrogates, and the marks that change the direction of what follows them.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# Letters written from right to left.
_TURNED = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~#$])")

_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",  # noqa: RUF001
    "±": r"$\pm$",
    "‖": r"$\|$",
}


def plain(text: object) -> str:
    """Return text with every invisible character replaced by a symbol; line feeds and tabs stay."""
    return _UNSEEN.sub(lambda found: _symbol(found.group()), str(text))


def visible(value: Any) -> Any:
    """Markup passes; in anything else invisible characters become symbols, and Jinja escapes the rest."""
    return value if isinstance(value, Markup) else plain(value)


def _symbol(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    return "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def markdown(value: object) -> str:
    """Escape text for a line or a table cell of Markdown; markup passes unchanged."""
    if isinstance(value, Markup):
        return str(value)
    text = plain(value).replace("&", "&amp;").replace("\t", "␉").replace("\n", "␊")
    text = _MARKDOWN.sub(r"\\\1", text).replace("\\<", "&lt;").replace("\\>", "&gt;")
    return f"\u2068{text}\u2069" if _TURNED.search(text) else text


def spreadsheet(text: str) -> str:
    """Return text that a spreadsheet takes for text, and never for a formula."""
    text = plain(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def latex(text: str) -> str:
    """Escape text for a line of LaTeX; what its default fonts lack in signs is written as mathematics."""
    return "".join(_LATEX.get(character, character) for character in " ".join(plain(text).split()))
