"""The command line of a recipe: flags and a config file in, one run out.

Imports nothing heavy before the flags are right.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

from rich.console import Console

from qlora_recipes.api import Choices, train
from qlora_recipes.commands.config_file import read_config
from qlora_recipes.commands.entry import run_command
from qlora_recipes.commands.flags import Parser
from qlora_recipes.commands.quick_imports import quick_imports
from qlora_recipes.errors import UsageError
from qlora_recipes.fields import Field, fields_of
from qlora_recipes.masking import masked, names_secret
from qlora_recipes.precision import DTYPES, PRECISIONS
from qlora_recipes.recipe import DERIVED, METHODS, Recipe, config_of, find_recipe
from qlora_recipes.run.display import say
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import AUTO_FIELDS, STANDIN, Settings, recipe_name, resolve

_OWN_FLAGS = (
    Field("precision", "str", "how the frozen base is stored (default: nf4)", "|".join(PRECISIONS)),
    Field("dtype", "str", "16-bit dtype to load and compute in (default: bfloat16)", "|".join(DTYPES)),
    Field("storage", "str", "how frozen weights are kept (default: the fastest)", "auto|packed|expanded|blocked"),
    Field("demo", "bool", "stand-in model and bundled rows, through the same code"),
    Field("model", "str", "another source of the base", "ID_OR_FOLDER"),
    Field("dataset", "str", "another source of the rows", "ID_OR_FILE"),
    Field("from_run", "str", "train the adapter of a finished run further, in place of a new one", "RUN"),
    Field("output_dir", "str", "run folder (default: runs/<recipe>/<precision>-seed<seed>)", "FOLDER"),
    Field("plan", "bool", "print what would be done and what was checked, and train nothing"),
    Field("checks", "Literal['brief', 'all']", "show checks by group, or each on a line (default: brief)", "brief|all"),
    Field("skip_checks", "list[str]", "checks to skip; the receipt says which", "NAME", expected="a list of names"),
    Field("resume", "bool", "resume from the newest intact checkpoint in the run folder"),
    Field("overwrite", "bool", "replace the run that is in the run folder, when the new one is finished"),
    Field("config", "str", "flags from a file; those on the command line win", "FILE.yaml"),
)
# The settings that are changed most, in the order and the words of `--help`.
_COMMON = {
    "learning_rate": "step size of the optimizer",
    "num_train_epochs": "passes over the rows",
    "max_steps": "optimizer steps, in place of epochs",
    "max_length": "tokens of a row; the rest of a longer one is cut off",
    "per_device_train_batch_size": "rows of one forward pass on each device",
    "gradient_accumulation_steps": "forward passes of one optimizer step",
    "packing": "fill rows up to max_length with several conversations",
    "r": "rank of the adapter; a larger one fits more and takes more memory",
    "lora_alpha": "scale of the adapter: its update is multiplied by lora_alpha / r",
    "target_modules": "linear layers that carry the adapter, or all-linear, or a pattern",
    "seed": "of the adapter's first weights, the order of the rows and dropout",
    "save_steps": "steps between two checkpoints, or their share of all steps",
    "eval_strategy": "when the loss of the held-out rows is taken: no, steps or epoch",
    "eval_steps": "steps between two such losses, or their share of all steps",
    "report_to": "tracker that gets the loss, such as tensorboard",
}
_TYPES = {bool: "true|false", int: "N", float: "NUMBER", str: "TEXT", dict: "JSON"}
_MANY = 8  # words that `--help` does not list


def main(recipe: type[Recipe], argv: Sequence[str] | None = None) -> None:
    """Run a recipe's command line; exits with 2 and one message when a user can fix what is wrong."""
    run_command(lambda given: run(recipe, parse(recipe, given), [recipe_name(recipe), *given]), argv)


def run(recipe: type[Recipe], flags: Mapping[str, Any], command: Sequence[str]) -> None:
    """Train a recipe with these flags, or only plan it; the receipt keeps the command.

    Raises:
        RecipesError: for what a user can fix.
    """
    settings = settings_from(recipe, flags)
    is_first_process = os.environ.get("RANK", "0") == "0"
    if is_first_process:
        if settings.model.startswith(STANDIN):
            print(f"{settings.model} knows only its own invented world: a demo shows that a recipe works, not how well")
        say(f"{settings.name}, {settings.precision.name}: starting PyTorch, Transformers and TRL", Console())
    with quick_imports():
        from qlora_recipes.training.progress import print_summary
    skip_checks, all_checks = flags.get("skip_checks", ()), flags.get("checks") == "all"
    if flags.get("plan"):
        from qlora_recipes.memory.table import print_plan
        from qlora_recipes.training.train import finalize_settings, prepare_run

        settings = finalize_settings(settings)
        print_plan(settings)
        prepare_run(settings, skip_checks=skip_checks, all_checks=all_checks)
        return
    run = train(
        recipe,
        command=without_secrets(command),
        overwrite=flags.get("overwrite", False),
        resume=flags.get("resume", False),
        skip_checks=skip_checks,
        all_checks=all_checks,
        **choices_from(flags),
    )
    if is_first_process:
        print_summary(RunFolder(run.path))


def parse(recipe: type[Recipe], argv: Sequence[str], prog: str = "") -> dict[str, Any]:
    """Return flag to value for the flags given, on the command line or in the file that `--config` names.

    `prog` is how the help calls the program, where it is not the recipe's file.

    Raises:
        UsageError: for a flag that is unknown (naming the nearest), given twice, or of another type.
    """
    about = (recipe.__doc__ or sys.modules[recipe.__module__].__doc__ or "").strip()
    ours, *_ = sections = _sections(config_of(recipe))
    shown = {ours: sections.pop(ours), "most used, with the values of this recipe": _common(recipe)}
    prog = prog or f"{recipe_name(recipe)}.py"
    return _with_config(Parser(prog, about, shown, more=sections, derived=DERIVED).parse(argv))


def parse_with_recipe(
    prog: str, about: str, flags: Iterable[Field], argv: Sequence[str], *, instead: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the flags of a command that takes a recipe's file, under `recipe`, and every flag of a recipe.

    `instead` names the flags that a command can do with where no recipe is given; it is None then.

    Raises:
        UsageError: as for `parse`.
    """
    about = f"{about} Any flag of the recipe can follow; qlora-recipes train RECIPE --help all lists them."
    recipe = Field("recipe", "str", "a recipe's file, or the name of one that ships, such as llama2_guanaco", "RECIPE")
    hidden = [flag for section in _sections().values() for flag in section]
    words = replace(recipe, default=None) if instead else recipe
    given = Parser(prog, about, {"flags": flags}, words=words, hidden=hidden, derived=DERIVED).parse(argv)
    if given["recipe"] is not None:
        return _with_config(given | {"recipe": str(find_recipe(given["recipe"]))})
    if any(given.get(name) is None for name in instead):
        other = " and ".join(f"--{name}" for name in instead)
        raise UsageError(f"RECIPE is missing: {recipe.help}; or give {other} in its place. {prog} --help says more")
    return _with_config(given)


def settings_from(recipe: type[Recipe], flags: Mapping[str, Any]) -> Settings:
    """Return the settings that flags make of a recipe; flags that no setting follows from are passed over."""
    return resolve(recipe, **choices_from(flags))


def choices_from(flags: Mapping[str, Any]) -> Choices:
    """Return what flags choose for a run, as `api.train` takes it."""
    if flags.get("resume") and flags.get("overwrite"):
        raise UsageError("--resume continues a run and --overwrite replaces it; give one of them")
    own = {flag.name for flag in _OWN_FLAGS}
    lora, training = (
        {name: flags[name] for config in configs for name in fields_of(config) if name in flags and name not in own}
        for configs in (("LoraConfig",), METHODS.values())
    )
    chosen = {name: flags[name] for name in Choices.__annotations__ if name in flags}
    return cast(Choices, {**chosen, "lora": lora, "training": training})


def _common(recipe: type[Recipe]) -> list[Field]:
    """Return the flags that are used most, each with its value in the recipe."""
    fields = {**fields_of(config_of(recipe)), **fields_of("LoraConfig")}
    linears = recipe.model.linear_layers or "every linear layer of a decoder block"
    values = {"target_modules": linears, **recipe.lora, **recipe.training}
    if not AUTO_FIELDS["batch"] & recipe.explicit_fields:
        values |= dict.fromkeys(AUTO_FIELDS["batch"], "fitted to the machine")
    shown = {name: f" (here: {_in_words(values[name])})" if name in values else "" for name in _COMMON}
    common = {name: help + shown[name] for name, help in _COMMON.items() if name in fields}
    return [_readable(replace(fields[name], help=help)) for name, help in common.items()]


def _in_words(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _readable(field: Field) -> Field:
    """Return the field with its type in words, for `--help`."""
    types = {**_TYPES, list: "N" if field.item == "int" else "NAME"}
    words = field.allowed if 0 < len(field.allowed) < _MANY else [types[kind] for kind in field.kinds]
    nested = {bool, dict} <= set(field.kinds)  # a configuration of its own
    return replace(field, metavar="JSON" if nested else "|".join(dict.fromkeys(words)))


def _sections(*configs: str) -> dict[str, list[Field]]:
    """Every flag of a recipe under the heading that `--help` shows; of every method unless one is named."""
    configs = (*(configs or METHODS.values()), "LoraConfig")
    taken = {*DERIVED, *(flag.name for flag in _OWN_FLAGS)}
    fields = {config: [f for name, f in fields_of(config).items() if name not in taken] for config in configs}
    return {"this package": list(_OWN_FLAGS)} | {
        f"{config}, every field under its own name": list(map(_readable, fields[config])) for config in configs
    }


def _with_config(given: dict[str, Any]) -> dict[str, Any]:
    if "config" not in given:
        return given
    known = {flag.name: flag for section in _sections().values() for flag in section if flag.name != "config"}
    return read_config(given.pop("config"), known) | given


def without_secrets(argv: Sequence[str]) -> list[str]:
    """Return a command line as files may hold it, with the value of every token flag and every secret taken out."""
    shown = []
    for before, word in pairwise(["", *map(masked, argv)]):
        flag, equals, _ = word.partition("=")
        if equals and flag.startswith("--") and names_secret(flag):
            word = f"{flag}=***"
        elif before.startswith("--") and "=" not in before and names_secret(before) and not word.startswith("--"):
            word = "***"
        shown.append(word)
    return shown
