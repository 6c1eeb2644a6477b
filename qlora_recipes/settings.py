"""What one run will do, as decided by the library, the recipe, the stand-in of a demo and the command line.

Settings become final in this order, and nothing else changes them:

1. `settings.resolve`: each of these four overrides the ones before it; `auto_fields` names what none of them set.
2. `training.journal.restore_batch`, with `--resume` only: `auto_fields` get the values that the run started with,
   and gradients are accumulated as often as keeps its global batch with another number of processes.
3. `memory.fitting.fit_to_memory`: those that are still not set are chosen to fit the machine.
   `training.train.finalize_settings` calls 2 and 3.
4. `training.faults.halve_batch`, out of memory under `--auto_find_batch_size`: half the batch, and the run resumes.

`experiments.benchmark.plan.plan_benchmark` does step 1 for every arm; the arm's own process does the others.
Knows nothing of rows or weights.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_recipes.errors import UnreadableModelError, UsageError, nearest
from qlora_recipes.families.configuration import read_config
from qlora_recipes.fields import fields_of
from qlora_recipes.masking import masked, names_secret
from qlora_recipes.models import MODELS, ModelSpec, spec_named
from qlora_recipes.precision import Precision, precision_named, resolve_dtype
from qlora_recipes.recipe import DatasetSpec, Recipe, bound_faults, config_of
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import StartReceipt
from qlora_recipes.standins import PREFERENCES, ROWS, STANDINS

RUNS = Path("runs")
STORAGES = ("packed", "expanded", "blocked")
AUTO_FIELDS = {
    "batch": {"per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"},
    "checkpointing": {"gradient_checkpointing", "gradient_checkpointing_kwargs"},
}
"""What can be fitted to the machine, and the fields that turn this off when one of them is set."""
STANDIN = "standin-"
"""Prefix of a family, for the model of that family that ships with the package."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. Two runs with equal settings give the same adapter."""

    recipe: type[Recipe]
    spec: ModelSpec
    """What is known of the base that is loaded; see `spec_of`."""
    model: str
    """Hub id or folder of the base model, or `standin-` and a family."""
    revision: str | None
    """Commit of a hub model; None for a folder."""
    datasets: tuple[DatasetSpec, ...]
    """Where the rows come from: hub ids or files."""
    precision: Precision
    dtype: str
    """The 16-bit dtype to load the base and compute in."""
    lora: Mapping[str, Any]
    """LoraConfig fields."""
    training: Mapping[str, Any]
    """SFTConfig fields."""
    output_dir: Path
    """The run folder."""
    demo: bool = False
    storage: str = "auto"
    """How weights are kept: as stored (`packed`), 4-bit ones dequantized, too (`expanded`), or on a CPU all of them in
    16 bits as they are multiplied (`blocked`); `auto` is the fastest that memory allows."""
    auto_fields: frozenset[str] = frozenset()
    """What is not set and fitted to the machine: `batch` (how a step is divided), `checkpointing`."""
    packing_asked: bool = False
    """Whether recipe or flags say if rows are packed; a model that would mix them is not packed otherwise."""
    start: StartReceipt | None = None
    """The finished run whose adapter is trained further; None for a new adapter."""

    @property
    def of_preferences(self) -> bool:
        """Whether rows hold two answers each, of which one is to be preferred."""
        return self.recipe.method == "dpo"

    @property
    def seed(self) -> int:
        return int(self.training["seed"])

    @property
    def trust_remote_code(self) -> bool:
        """Whether code of the model's repository may run; only if a flag or the recipe allows it."""
        return bool(self.training.get("trust_remote_code"))

    @property
    def dataset(self) -> str:
        """Hub ids and files of the rows."""
        return " + ".join(spec.source for spec in self.datasets)

    @property
    def dataset_names(self) -> list[str]:
        """Each dataset as receipts name it: a hub id, or the name of a file without its folders."""
        sources = (spec.source for spec in self.datasets)
        return [Path(source).name if Path(source).exists() else source for source in sources]

    @property
    def dataset_name(self) -> str:
        """The datasets as receipts name them, with their shares."""
        shares = [f" ({spec.share:g})" if spec.share < 1 else "" for spec in self.datasets]
        return " + ".join(map(str.__add__, self.dataset_names, shares))

    @property
    def name(self) -> str:
        """Name of the recipe, and of the folder of its runs."""
        return recipe_name(self.recipe) + ("-demo" if self.demo else "")


def recipe_name(recipe: type[Recipe]) -> str:
    """Return the name of the recipe's file, or of its class if it has no file."""
    module = sys.modules.get(recipe.__module__)
    file = getattr(module, "__file__", None)
    name = Path(file).stem if file else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", recipe.__name__).lower()
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "recipe"  # a folder's name: "..py" must not lead out of it


def resolve(
    recipe: type[Recipe],
    *,
    precision: str | None = None,
    dtype: str | None = None,
    demo: bool = False,
    model: str | None = None,
    dataset: str | None = None,
    from_run: str | Path | None = None,
    output_dir: str | Path | None = None,
    storage: str = "auto",
    lora: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Settings:
    """Return the settings of one run; `lora` and `training` are the fields that the command line sets.

    The recipe overrides the library, the stand-in (with `demo`) the recipe, and the command line all of them. A run to
    start from (`from_run`) decides the adapter and the revision, and the precision and dtype that are not given.

    Raises:
        UsageError: for an unknown or contradictory choice, or a demo without rows.
        RunFolderError: for a run to start from that is not finished, or damaged.
        ModelError: for a model that cannot be tuned, or that must be looked at and cannot be had.
    """
    start = RunFolder(Path(from_run)).as_start() if from_run is not None else None
    stored = precision_named(precision or (start.receipt.precision if start else "nf4"))
    if start and not stored.dtype:
        dtype = dtype or start.receipt.dtype
    check_storage(storage, stored)
    standin = STANDINS.get(recipe.model.family or "llama2") if demo else None
    if demo and standin is None and model is None:
        raise UsageError(f"--demo has no stand-in for {recipe.model.family!r}; it has {', '.join(STANDINS)}")
    # A demo saves no checkpoints: starting again takes less time.
    demo_lora, demo_training = (standin.lora, {**standin.training, "save_strategy": "no"}) if standin else ({}, {})
    if standin and recipe.method == "dpo":
        demo_training = {**demo_training, **PREFERENCES}
    known = fields_of(config_of(recipe))
    if unknown := [name for name in training or () if name not in known]:
        raise UsageError(f"{config_of(recipe)} has no field {unknown[0]!r}.{nearest(unknown[0], known)}")
    demo_training = {name: value for name, value in demo_training.items() if name in known}
    lora = dict(lora or {})
    revision = lora.pop("revision", None)
    lora = _adapter_of(start, lora) if start else {**recipe.lora, **demo_lora, **lora}
    above = {**demo_training, **(training or {})}
    training = {**recipe.training, **above}
    if faults := list(bound_faults(lora, training)):
        raise UsageError("; ".join(faults))
    source = model or (f"{STANDIN}{standin.family}" if standin else recipe.model.hub_id)
    revision = revision or (recipe.model.revision if source == recipe.model.hub_id else None)
    if start:
        revision = _check_base(start, source, revision)
    _check_remote_code(training, source, revision)
    spec = spec_of(recipe.model, source, revision, trust_remote_code=bool(training.get("trust_remote_code")))
    lora = {"target_modules": list(spec.linear_layers or ()), **lora}
    settings = Settings(
        recipe=recipe,
        spec=spec,
        model=source,
        revision=revision,
        datasets=_datasets(recipe, dataset, demo),
        precision=stored,
        dtype=resolve_dtype(stored, dtype),
        lora=lora,
        training=training,
        output_dir=Path(),
        demo=demo,
        storage=storage,
        packing_asked=bool({"packing", "padding_free"} & (recipe.explicit_fields | above.keys())),
        auto_fields=frozenset(
            name for name, fields in AUTO_FIELDS.items() if not fields & (recipe.explicit_fields | above.keys())
        ),
        start=start,
    )
    folder = Path(output_dir or RUNS / settings.name / f"{stored.name}-seed{settings.seed}")
    if start and os.path.realpath(folder) == os.path.realpath(start.run):
        raise UsageError(f"--from_run {start.run}: the new run would replace it. Give --output_dir another folder")
    return replace(settings, output_dir=folder)


def _adapter_of(start: StartReceipt, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the adapter that is trained further, and refuse flags that would make it another one."""
    lora = start.receipt.settings.lora
    for name, value in given.items():
        was = lora.get(name)
        if (value or was) and value != was and not (isinstance(value, list) and set(value) == set(was or ())):
            raise UsageError(f"--{name}: got {value!r}, and the adapter of {start.run} has {was!r}. Leave it out")
    return dict(lora)


def _check_base(start: StartReceipt, source: str, revision: str | None) -> str | None:
    """Return the revision that the run to start from was trained on, and refuse another base."""
    was = start.receipt.base
    same = source == was.model or (Path(source).exists() and os.path.realpath(source) == os.path.realpath(was.model))
    if not same or (revision or was.revision) != was.revision:
        at = f" --revision {was.revision}" if was.revision else ""
        raise UsageError(
            f"--from_run {start.run}: got the base {source}{f' at {revision}' if revision else ''}, expected the one "
            f"that its adapter was trained on: --model {was.model}{at}"
        )
    return was.revision


def spec_of(spec: ModelSpec, source: str, revision: str | None, *, trust_remote_code: bool = False) -> ModelSpec:
    """Return what is known of the model at `source`, given what a recipe says of its own model.

    A spec's template, pad token and linear layers are for its `hub_id`, the stand-in of its family, and copies and
    fine-tuned versions of either: models whose `config.json` names the same `model_type` and number of tokens. Another
    model has nothing of them; all of it is found. Where the files of `source` cannot be read the spec stays as it is:
    loading says why.

    Raises:
        ModelError: for a model that cannot be tuned, or where linear layers must be found and nothing can be read.
    """
    location = model_location(source)
    is_own = source in (spec.hub_id, f"{STANDIN}{spec.family}")
    if is_own and spec.linear_layers is not None:
        return spec
    if source.startswith(STANDIN) and spec.family is None:
        return next(each for each in MODELS.values() if source == f"{STANDIN}{each.family}")
    try:
        config = read_config(location, revision)
        if not is_own and not spec.is_copied_by(config):
            standin = STANDINS.get(spec.family or "")
            if standin is None or not ModelSpec(str(standin.folder)).is_copied_by(config):
                spec = replace(spec_named(source), revision=revision)
        return spec.completed(config, location, revision, trust_remote_code=trust_remote_code)
    except UnreadableModelError:
        if spec.linear_layers is None:
            raise
        return spec


def check_storage(storage: str, precision: Precision) -> None:
    """Raise UsageError, which names the valid ones, for an unknown storage or one that does not suit the precision."""
    if storage not in ("auto", *STORAGES):
        hint = nearest(storage, STORAGES)
        raise UsageError(f"unknown --storage {storage!r}, expected auto, packed, expanded or blocked.{hint}")
    if storage == "expanded" and precision.quant_type is None:
        raise UsageError(f"--storage expanded is for 4-bit weights; {precision.name} has none to expand. Leave it out")
    if storage == "blocked" and precision.name == "int8":
        raise UsageError("--storage blocked is for weights multiplied in 16 bits; int8 multiplies in 8. Leave it out")


def _check_remote_code(training: Mapping[str, Any], source: str, revision: str | None) -> None:
    """Raise UsageError for code of a branch, which can change after you have read it."""
    pinned = re.fullmatch("[0-9a-f]{40}", revision or "") is not None
    if training.get("trust_remote_code") and not pinned and not Path(source).is_dir():
        raise UsageError(
            f"--trust_remote_code runs code of {source} at {revision or 'its newest revision'}, which can change; pin "
            "the commit that you have read: --revision and its 40 hexadecimal digits"
        )


def public(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without secrets, as they may be written to files."""
    return {name: masked(value) for name, value in fields.items() if not names_secret(name)}


def _datasets(recipe: type[Recipe], dataset: str | None, demo: bool) -> tuple[DatasetSpec, ...]:
    """Return the datasets to read; the one that the command line gives replaces all of the recipe's."""
    declared = recipe.datasets()
    if dataset:
        alike = len({spec.format_row for spec in declared}) == 1  # else the file's columns decide
        format_row = declared[0].format_row if alike else None
        revision = declared[0].revision if dataset == declared[0].source else None
        return (replace(declared[0], source=dataset, share=1.0, format_row=format_row, revision=revision),)
    return tuple(replace(spec, source=_demo_rows(recipe, spec)) if demo else spec for spec in declared)


def _demo_rows(recipe: type[Recipe], spec: DatasetSpec) -> str:
    """Return the file that a recipe declares where it is there, and otherwise bundled rows of its shape."""
    source, bundled = spec.source, spec.demo
    if Path(source).is_file():
        return source
    if bundled in ROWS:
        return str(ROWS[bundled])
    raise UsageError(
        f"--demo has no bundled rows for {recipe_name(recipe)}, and there is no file {source}; give --dataset FILE, or "
        f"set DatasetSpec(demo=...) to one of {', '.join(ROWS)}"
    )


def model_location(model: str) -> str:
    """Return what `from_pretrained` takes: the folder of a stand-in, any other model unchanged."""
    standin = STANDINS.get(model.removeprefix(STANDIN)) if model.startswith(STANDIN) else None
    return str(standin.folder) if standin else model
