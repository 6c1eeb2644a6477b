"""What one run will do: the recipe's declarations, the demo's and the flags in one record.

Settings become final in this order, and nothing else changes them:

1. `settings.resolve`: library, recipe, stand-in and command line, the later overriding the earlier. What nobody set is
   named in `auto_fields`.
2. `training.journal.restore_batch`, with `--resume` only: what is open becomes what it was when the run began.
3. `memory.fitting.fit_to_memory`: what is still open is chosen to fit the machine.
   `training.train.finalize_settings` calls 2 and 3.
4. `training.faults.halve_batch`, out of memory under `--auto_find_batch_size`: half the batch, and the run resumes.

`experiments.benchmark.plan.plan_benchmark` takes step 1 for every arm, whose own process takes the others.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_recipes.errors import UsageError, nearest
from qlora_recipes.masking import masked
from qlora_recipes.models import ModelSpec
from qlora_recipes.precision import Precision, precision_named, resolve_dtype
from qlora_recipes.recipe import DatasetSpec, Recipe, bound_faults
from qlora_recipes.standins import ROWS, STANDINS, StandIn

RUNS = Path("runs")
STORAGES = ("packed", "expanded")
AUTO_FIELDS = {
    "batch": {"per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"},
    "checkpointing": {"gradient_checkpointing", "gradient_checkpointing_kwargs"},
}
"""What can be fitted to the machine, and the fields that decide it where one of them is set."""
STANDIN = "standin-"
"""Before a family's name: the model of that name that ships with the package."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. Two runs of equal settings give the same adapter."""

    recipe: type[Recipe]
    model: str
    """Hub id or folder of the base, or `standin-` and a family."""
    revision: str | None
    """Commit of a hub model; None for a folder."""
    dataset: str
    """Hub id or file of the rows."""
    precision: Precision
    dtype: str
    """The 16-bit dtype that the base is loaded and computed in."""
    lora: Mapping[str, Any]
    """LoraConfig fields."""
    training: Mapping[str, Any]
    """SFTConfig fields."""
    output_dir: Path
    """The run folder."""
    demo: bool = False
    storage: str = "auto"
    """Whether 4-bit weights are dequantized for every product (`packed`) or once (`expanded`); `auto`: as they fit."""
    auto_fields: frozenset[str] = frozenset()
    """What nobody set and the machine decides: `batch` (how a step is cut up), `checkpointing`."""

    @property
    def seed(self) -> int:
        return int(self.training["seed"])

    @property
    def trust_remote_code(self) -> bool:
        """Whether code of the model's repository may run; only where a flag or the recipe says so."""
        return bool(self.training.get("trust_remote_code"))

    @property
    def spec(self) -> ModelSpec:
        return self.recipe.model

    @property
    def data(self) -> DatasetSpec:
        return self.recipe.dataset

    @property
    def dataset_name(self) -> str:
        """The dataset as receipts name it: a hub id, or a file without the folders that are this machine's."""
        return Path(self.dataset).name if Path(self.dataset).exists() else self.dataset

    @property
    def name(self) -> str:
        """Name of the recipe, as runs are filed under."""
        return recipe_name(self.recipe) + ("-demo" if self.demo else "")


def recipe_name(recipe: type[Recipe]) -> str:
    """Return the name of the recipe's file, or of its class where it has none."""
    module = sys.modules.get(recipe.__module__)
    file = getattr(module, "__file__", None)
    name = Path(file).stem if file else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", recipe.__name__).lower()
    return re.sub(r"[^\w.-]", "_", name).lstrip(".") or "recipe"  # it names a folder: "..py" must not lead out of it


def resolve(
    recipe: type[Recipe],
    *,
    precision: str = "nf4",
    dtype: str | None = None,
    demo: bool = False,
    model: str | None = None,
    dataset: str | None = None,
    output_dir: str | Path | None = None,
    storage: str = "auto",
    lora: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Settings:
    """Return the settings of one run; `lora` and `training` are what the command line overrides.

    Library, recipe, stand-in (with `demo`), command line: the later override the earlier.

    Raises:
        UsageError: for an unknown or contradictory choice, or a demo without bundled rows.
    """
    stored = precision_named(precision)
    check_storage(storage, stored)
    standin = STANDINS.get(recipe.model.family) if demo else None
    if demo and standin is None and model is None:
        raise UsageError(f"--demo has no stand-in for {recipe.model.family!r}; it has {', '.join(STANDINS)}")
    lora = {
        "target_modules": list(recipe.model.linear_layers),
        **recipe.lora,
        **(standin.lora if standin else {}),
        **(lora or {}),
    }
    above = {**(_of_standin(standin) if standin else {}), **(training or {})}
    training = {**recipe.training, **above}
    if faults := list(bound_faults(lora, training)):
        raise UsageError("; ".join(faults))
    source = model or (f"{STANDIN}{standin.family}" if standin else recipe.model.hub_id)
    revision = lora.pop("revision", None) or (recipe.model.revision if source == recipe.model.hub_id else None)
    _check_remote_code(training, source, revision)
    settings = Settings(
        recipe=recipe,
        model=source,
        revision=revision,
        dataset=dataset or (_bundled_rows(recipe) if demo else recipe.dataset.source),
        precision=stored,
        dtype=resolve_dtype(stored, dtype),
        lora=lora,
        training=training,
        output_dir=Path(),
        demo=demo,
        storage=storage,
        auto_fields=frozenset(
            name for name, fields in AUTO_FIELDS.items() if not fields & (recipe.explicit_fields | above.keys())
        ),
    )
    folder = Path(output_dir) if output_dir else RUNS / settings.name / f"{precision}-seed{settings.seed}"
    return Settings(**{**vars(settings), "output_dir": folder})


def check_storage(storage: str, precision: Precision) -> None:
    """Refuse an unknown storage, or one that a precision has no use for.

    Raises:
        UsageError: naming the valid ones.
    """
    if storage not in ("auto", *STORAGES):
        raise UsageError(
            f"unknown --storage {storage!r}, expected auto, packed or expanded.{nearest(storage, STORAGES)}"
        )
    if storage == "expanded" and precision.quant_type is None:
        raise UsageError(f"--storage expanded is for 4-bit weights; {precision.name} has none to expand. Leave it out")


def _check_remote_code(training: Mapping[str, Any], source: str, revision: str | None) -> None:
    """Code of a moving branch can change after somebody has read it."""
    pinned = re.fullmatch("[0-9a-f]{40}", revision or "") is not None
    if training.get("trust_remote_code") and not pinned and not Path(source).is_dir():
        raise UsageError(
            f"--trust_remote_code runs code of {source} at {revision or 'its newest revision'}, which can change; pin "
            "the commit that you have read: --revision and its 40 hexadecimal digits"
        )


def _of_standin(standin: StandIn) -> dict[str, Any]:
    return {**standin.training, "save_strategy": "no"}  # a demo takes less time than its checkpoints are worth


def public(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without secrets, as files may hold them."""
    return {name: masked(value) for name, value in training.items() if "token" not in name or "tokens" in name}


def _bundled_rows(recipe: type[Recipe]) -> str:
    name = recipe.dataset.demo
    if name in ROWS:
        return str(ROWS[name])
    raise UsageError(
        f"--demo has no bundled rows for {recipe_name(recipe)}; give --dataset FILE, or set "
        f"DatasetSpec(demo=...) to one of {', '.join(ROWS)}"
    )


def model_location(model: str) -> str:
    """Return what `from_pretrained` takes: the folder of a stand-in, anything else as it is."""
    standin = STANDINS.get(model.removeprefix(STANDIN)) if model.startswith(STANDIN) else None
    return str(standin.folder) if standin else model
