"""The one parser of every command: how a flag is declared, read, refused and written back.

A flag is a `Field`: a name, a type and a sentence of help. An unknown flag is refused with the nearest name, a value of
another type with what was expected, a flag given twice at once. Imports nothing heavy, so that `--help` and a misspelt
flag answer at once.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_recipes.errors import UsageError, nearest
from qlora_recipes.fields import ABSENT, Field

OTHER_TEMPLATE = Field("other_template", "bool", "take a chat template edited after training", default=False)
TRUST_REMOTE_CODE = Field("trust_remote_code", "bool", "run the code of a base trained with it", default=False)
RUN = Field("run", "str", "run folder, such as runs/llama2_guanaco-demo/nf4-seed0", "RUN")
RUNS = Field("run", "list[str]", "run folders, such as runs/falcon_faq/nf4-seed0", "RUN")
_FLAG = re.compile(r"--[^\s=]+(=|$)")
_PLAIN = re.compile(r"[\w.][\w.-]*")
_COLUMN, _WIDTH = 26, 100


def count(name: str, help: str, default: int | None = None, *, least: int = 1) -> Field:
    """Return a flag that counts something."""
    return Field(name, "int", help, "N", default, lambda value: value >= least, f"a whole number from {least} up")


def file_to_read(name: str, help: str) -> Field:
    """Return a flag that names a file to read."""
    return Field(name, "str", help, "FILE", None, lambda file: Path(file).is_file(), "a file that exists")


def file_to_write(name: str, help: str, suffix: str) -> Field:
    """Return a flag that names a file to write, with this suffix: a file of another kind is not replaced by it."""

    def valid(file: str) -> bool:
        path = Path(file).absolute()
        return path.suffix.lower() == suffix and path.parent.is_dir() and not path.is_dir()

    return Field(name, "str", help, "FILE", None, valid, f"a file in a folder that exists, such as new{suffix}")


GENERATION = (
    Field("temperature", "float", "draw answers; 0 takes the likeliest words", "T", 0.0),
    Field("top_p", "float", "draw from the likeliest words that make up this share", "P", 1.0),
    count("top_k", "draw from the N likeliest words; 0 does not limit them", 0, least=0),
    Field("repetition_penalty", "float", "above 1, words that are there already become unlikelier", "R", 1.0),
    count("max_new_tokens", "where an answer is cut", 256),
    count("num_beams", "continuations kept beside each other", 1),
    count("seed", "of what is drawn", 0, least=0),
)
"""How answers are generated; `evaluation.generation.Generation` has the same names."""


class Parser:
    """Reads one command's flags, and the words before or between them where the command takes any."""

    def __init__(
        self,
        prog: str,
        about: str,
        sections: Mapping[str, Iterable[Field]],
        *,
        words: Field | None = None,
        hidden: Iterable[Field] = (),
        more: Mapping[str, Iterable[Field]] | None = None,
        derived: Mapping[str, str] | None = None,
    ) -> None:
        """Declare a command: its flags under the headings that `--help` shows, and those that it does not list.

        `words` is what stands without a flag, such as run folders. `more` are the headings that `--help all` adds.
        `derived` are names that are no flags, with what to give in their place.
        """
        self.prog, self.about, self.words = prog, about, words
        self._sections = {title: list(flags) for title, flags in sections.items()}
        self._more = {title: list(flags) for title, flags in (more or {}).items()}
        shown = [flag for flags in (*self._more.values(), *self._sections.values()) for flag in flags]
        self._flags = {flag.name: flag for flag in (*hidden, *shown)}
        self._derived = derived or {}

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return name to value for what was given, and for flags that have a default.

        `--help` and `--help all` print and end the program. A bare `--debug` is left to `run_command`.

        Raises:
            UsageError: for what is unknown, given twice, missing, or of another type.
        """
        if {"-h", "--help"} & set(argv):
            print(self.help(all="all" in argv))
            sys.exit(0)
        given: dict[str, Any] = {}
        loose, rest = [], list(argv)
        while rest:
            word = rest.pop(0)
            if not _FLAG.match(word):
                loose.append(word)
                continue
            name, equals, value = word.removeprefix("--").partition("=")
            has_debug = "debug" in self._flags and self.words is None  # SFTConfig's own, which has a value
            if name == "debug" and not equals and not (has_debug and rest and not _FLAG.match(rest[0])):
                continue
            if name in self._derived:
                raise UsageError(f"--{name} is not set by hand; it follows from {self._derived[name]}")
            if name not in self._flags:
                raise UsageError(f"unknown flag --{name}.{nearest(name, self._flags)} --help lists the flags")
            if name in given:
                raise UsageError(f"--{name} is given twice")
            flag = self._flags[name]
            try:
                given[name] = flag.parse([value] if equals else self._following(flag, rest))
            except UsageError as error:
                raise UsageError(f"--{error}") from error
        given |= self._loose(loose)
        return {name: flag.default for name, flag in self._flags.items() if flag.default is not ABSENT} | given

    def _following(self, flag: Field, rest: list[str]) -> list[str]:
        """Take the words that belong to a flag from those after it."""
        count = next((at for at, word in enumerate(rest) if _FLAG.match(word)), len(rest))
        taken = rest[: count if list in flag.kinds else min(count, 1)]
        is_word = self.words is not None and flag.kinds == [bool] and not _is_value(flag, taken)
        if bool in flag.kinds and (not taken or is_word):
            return ["true"]
        del rest[: len(taken)]
        return taken

    def _loose(self, loose: Sequence[str]) -> dict[str, Any]:
        """Name the words that belong to no flag, after refusing an empty one, one too many and none."""
        words = self.words
        extra = list(loose if words is None else [] if list in words.kinds else loose[1:])
        if extra or "" in loose:
            raise UsageError(f"unexpected word {[*extra, ''][0]!r}; flags start with --")
        if words is None:
            return {}
        if not loose and words.default is ABSENT:
            raise UsageError(f"{words.metavar} is missing: {words.help}. {self.prog} --help says more")
        return {words.name: list(loose) if list in words.kinds else [*loose, words.default][0]}

    def help(self, *, all: bool = False) -> str:
        """Return what `--help` prints, or `--help all`."""
        word = f" {self.words.metavar}{' ...' if list in self.words.kinds else ''}" if self.words else ""
        lines = [f"usage: {self.prog}{word} [--flag value ...]", "", *textwrap.wrap(self.about, _WIDTH)]
        lines += ["", *_described(self.words.metavar, self.words.help)] if self.words else []
        for title, flags in (self._sections | (self._more if all else {})).items():
            lines += ["", f"{title}:", *(line for flag in flags for line in _described(_with_value(flag), flag.help))]
        lines += _described("--debug", "show the traceback of an error")
        if self._more and not all:
            lines += ["", "--help all lists the other settings."]
        return "\n".join(lines)


def _with_value(flag: Field) -> str:
    value = flag.metavar or flag.annotation.replace(" ", "")
    return f"--{flag.name}" + ("" if value == "bool" else f" {value}{' ...' if list in flag.kinds else ''}")


def _is_value(flag: Field, words: Sequence[str]) -> bool:
    try:
        flag.parse(words)
    except UsageError:
        return False
    return True


def _described(name: str, text: str) -> list[str]:
    lines = textwrap.wrap(text, _WIDTH - _COLUMN)
    head = f"  {name}"
    if len(head) < _COLUMN and lines:
        head += " " * (_COLUMN - len(head)) + lines.pop(0)
    return [head, *(" " * _COLUMN + line for line in lines)]


def argv_of(flags: Mapping[str, Any]) -> list[str]:
    """Return the command line that `Parser.parse` reads as these values."""
    return [word for name, value in flags.items() for word in _written(name, value)]


def _written(name: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list) and len(value) > 1 and all(isinstance(i, str) and _PLAIN.fullmatch(i) for i in value):
        return [f"--{name}", *value]
    text = value if isinstance(value, str) else json.dumps(value)
    return [f"--{name}={text}"] if _FLAG.match(text) else [f"--{name}", text]
