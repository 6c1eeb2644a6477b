"""The command line of a recipe: flags and a config file in, one run out.

Imports nothing heavy before the flags are known to be right, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from qlora_recipes.errors import EXIT_CODE, RecipesError, UsageError, nearest
from qlora_recipes.fields import Field, fields_of
from qlora_recipes.masking import masked
from qlora_recipes.precision import DTYPES, PRECISIONS
from qlora_recipes.recipe import DERIVED, Recipe, check_field
from qlora_recipes.settings import Settings, recipe_name, resolve

_OWN_FLAGS: dict[str, dict[str, Any]] = {
    "precision": dict(metavar="|".join(PRECISIONS), help="how the frozen base is stored (default: nf4)"),
    "dtype": dict(metavar="|".join(DTYPES), help="16-bit dtype to load and compute in (default: bfloat16)"),
    "storage": dict(metavar="auto|packed|expanded", help="dequantize 4-bit weights each time, or once (default: auto)"),
    "demo": dict(flag=True, help="stand-in model and bundled rows, through the same code"),
    "model": dict(metavar="ID_OR_FOLDER", help="another source of the base"),
    "dataset": dict(metavar="ID_OR_FILE", help="another source of the rows"),
    "output_dir": dict(metavar="FOLDER", help="run folder (default: runs/<recipe>/<precision>-seed<seed>)"),
    "plan": dict(flag=True, help="print what would be done and what was checked, and train nothing"),
    "skip_checks": dict(names=True, metavar="NAME", help="checks to go without; the receipt says which"),
    "resume": dict(flag=True, help="go on from the newest intact checkpoint in the run folder"),
    "overwrite": dict(flag=True, help="replace the run that is in the run folder"),
    "config": dict(metavar="FILE.yaml", help="flags from a file; those on the command line beat it"),
}
_CONFIGS = ("SFTConfig", "LoraConfig")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Once(argparse.Action):
    """Stores a value and refuses a flag that is given twice, of which one would be lost."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if hasattr(namespace, self.dest):
            raise UsageError(f"{option} is given twice")
        setattr(namespace, self.dest, values)


def main(recipe: type[Recipe], arguments: Sequence[str] | None = None) -> None:
    """Run a recipe's command line; exits with 2 and one message when a user can mend what is wrong."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    run_command(lambda: _run(recipe, arguments), debug="--debug" in arguments)


def run_command(command: Callable[[], None], *, debug: bool = False) -> None:
    """Call a command; an error of ours is printed as one message, with its traceback under `--debug`."""
    try:
        command()
    except RecipesError as error:
        if debug:
            traceback.print_exc()
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one voice for all processes
            message = f"error: {error}".encode("utf-8", "backslashreplace").decode()  # it may quote half a character
            print(message, file=sys.stderr)
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit(130)  # what is finished lies on the disk


def _run(recipe: type[Recipe], arguments: Sequence[str]) -> None:
    flags = parse(recipe, arguments)
    settings = settings_from(recipe, flags)
    quiet_libraries()
    if flags.get("plan"):
        from qlora_recipes.commands.plan import print_plan
        from qlora_recipes.training.train import finalize_settings, prepare_run

        settings = finalize_settings(settings)
        print_plan(settings)
        prepare_run(settings, skip_checks=flags.get("skip_checks", ()))
        return
    from qlora_recipes.training.summary import print_summary
    from qlora_recipes.training.train import train

    folder = train(
        settings,
        command=_without_secrets([recipe_name(recipe), *arguments]),
        overwrite=flags.get("overwrite", False),
        resume=flags.get("resume", False),
        skip_checks=flags.get("skip_checks", ()),
    )
    if os.environ.get("RANK", "0") == "0":
        print_summary(folder)


def parse(recipe: type[Recipe], arguments: Sequence[str]) -> dict[str, Any]:
    """Return flag to value for the flags given, on the command line or in the file that `--config` names.

    Raises:
        UsageError: for a flag that is unknown (naming the nearest), given twice, or of another type.
    """
    parser = _parser(recipe)
    namespace, unknown = parser.parse_known_args(arguments, argparse.Namespace())
    if unknown:
        _refuse_unknown(unknown[0])
    given = {name: _value(name, value) for name, value in vars(namespace).items() if name != "config"}
    file = getattr(namespace, "config", None)
    return {**(_read_config(Path(file)) if file else {}), **given}


def settings_from(recipe: type[Recipe], flags: Mapping[str, Any]) -> Settings:
    """Return the settings that flags make of a recipe."""
    names = ("dtype", "storage", "demo", "model", "dataset", "output_dir")
    own = {name: flags[name] for name in names if name in flags}
    fields = {
        config: {name: flags[name] for name in fields_of(config) if name in flags and name not in _OWN_FLAGS}
        for config in _CONFIGS
    }
    if fields["SFTConfig"].get("debug") == "traceback":
        del fields["SFTConfig"]["debug"]
    if flags.get("resume") and flags.get("overwrite"):
        raise UsageError("--resume goes on with a run and --overwrite throws it away; give one of them")
    return resolve(
        recipe,
        precision=flags.get("precision", "nf4"),
        lora=fields["LoraConfig"],
        training=fields["SFTConfig"],
        **own,
    )


def _parser(recipe: type[Recipe]) -> _Parser:
    parser = _Parser(
        prog=f"{recipe_name(recipe)}.py",
        usage="%(prog)s [--flag value ...]",
        description=(recipe.__doc__ or sys.modules[recipe.__module__].__doc__ or "").strip() or None,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    own = parser.add_argument_group("this package")
    for name, options in _OWN_FLAGS.items():
        options = dict(options)
        if options.pop("flag", False):
            options.update(nargs="?", const="true", metavar="true|false")
        if options.pop("names", False):
            options.update(nargs="+")
        own.add_argument(f"--{name}", action=_Once, **options)
    for config in _CONFIGS:
        group = parser.add_argument_group(f"{config}, every field under its own name")
        for name, field in fields_of(config).items():
            if name not in _OWN_FLAGS and name not in DERIVED:
                group.add_argument(f"--{name}", action=_Once, **_field_options(field))
    return parser


def _field_options(field: Field) -> dict[str, Any]:
    options: dict[str, Any] = dict(help=field.help.replace("%", "%%"), metavar=field.annotation.replace(" ", ""))
    if field.name == "debug":
        return {**options, "nargs": "?", "const": "traceback", "help": "bare: show the traceback of an error"}
    if "bool" in field.annotation:
        options.update(nargs="?", const="true")
    elif "list" in field.annotation:
        options.update(nargs="+")
    return options


def _value(name: str, words: Any) -> Any:
    """Turn the words of the command line into a value of the flag's type."""
    if name in _OWN_FLAGS and _OWN_FLAGS[name].get("names"):
        return _own_value(name, words)
    if isinstance(words, list):
        words = words[0] if len(words) == 1 else f"[{', '.join(words)}]"
    if name in _OWN_FLAGS:
        return _own_value(name, yaml.safe_load(words) if _OWN_FLAGS[name].get("flag") else words)
    field = _field(name)
    return field.parse(words)


def _own_value(name: str, value: Any) -> Any:
    if _OWN_FLAGS[name].get("flag"):
        if not isinstance(value, bool):
            raise UsageError(f"--{name}: got {value!r}, expected true or false")
        return value
    if _OWN_FLAGS[name].get("names"):
        if not isinstance(value, list):
            raise UsageError(f"--{name}: got {value!r}, expected a list of names")
        return [str(item) for item in value]
    return str(value)


def _field(name: str) -> Field:
    return next(fields_of(config)[name] for config in _CONFIGS if name in fields_of(config))


def _refuse_unknown(word: str) -> NoReturn:
    if not word.startswith("--"):
        raise UsageError(f"unexpected word {word!r}; flags start with --")
    name = word[2:].split("=")[0]
    if name in DERIVED:
        raise UsageError(f"--{name} is not set by hand; it follows from {DERIVED[name]}")
    raise UsageError(f"unknown flag --{name}.{nearest(name, _flags())} --help lists them all")


def _flags() -> list[str]:
    return [*_OWN_FLAGS, *(name for config in _CONFIGS for name in fields_of(config) if name not in DERIVED)]


def _read_config(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {file} is not UTF-8: byte {error.start}; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--config {file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {file} holds {type(content).__name__}, expected `flag: value` lines")
    return {str(name): _config_value(file, str(name), value) for name, value in content.items()}


def _config_value(file: Path, name: str, value: Any) -> Any:
    if name not in _flags() or name == "config":
        expected = DERIVED.get(name)
        hint = f" It follows from {expected}." if expected else nearest(name, _flags())
        raise UsageError(f"{file}: unknown flag {name!r}.{hint}")
    if name in _OWN_FLAGS:
        return _own_value(name, value)
    config = next(config for config in _CONFIGS if name in fields_of(config))
    return check_field(config, name, value)


def _without_secrets(words: Sequence[str]) -> list[str]:
    """Return the command for the receipt, with the value of every token flag and every secret taken out."""
    shown: list[str] = []
    for word in map(masked, words):
        after_token = bool(shown) and shown[-1].startswith("--") and "token" in shown[-1] and "=" not in shown[-1]
        if after_token and not word.startswith("--"):
            word = "***"
        elif word.startswith("--") and "token" in word.split("=")[0] and "=" in word:
            word = word.split("=")[0] + "=***"
        shown.append(word)
    return shown


def quiet_libraries() -> None:
    """Leave the screen to what this package says; a library's warning that matters is a check of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every trainer that is made
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")  # theirs to each other
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "Failed to load ..." of an optional kernel
