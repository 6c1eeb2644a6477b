"""Several runs on one base in memory: switched, or mixed in one batch whose rows go to different adapters.

PEFT computes a mixed batch (its `adapter_names`); here runs that it cannot mix are refused, and that every row is
answered as by its adapter alone is measured when the runs are loaded. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from qlora_recipes.base.adapters import ADAPTER, WEIGHTS, add_adapter
from qlora_recipes.errors import CheckError, ModelError, UsageError
from qlora_recipes.evaluation import loaded
from qlora_recipes.evaluation.loaded import BaseKey, RestoredRun, check_remote_code, restore_run
from qlora_recipes.kernels.lora_linear import fuse_lora_layers
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.run.weights import adapter_file_sha256

BASE = "base"
"""What the base before tuning is called among the runs."""
_PEFT_BASE = "__base__"  # PEFT's own word for it
_SHARED_FILES = ("tokenizer.json", "chat_template.jinja")
ALLOWED = "LoRA adapters of any rank, alpha and target modules, rank-stabilized ones too, on one base of one precision"
# LoraConfig field to why PEFT cannot mix an adapter that sets it.
_NOT_MIXED = {
    "use_dora": "DoRA's magnitudes are of the whole batch",
    "modules_to_save": "modules_to_save replaces whole modules",
    "target_parameters": "an adapter on parameters (target_parameters) has no rows",
    "trainable_token_indices": "trainable_token_indices changes the embedding",
    "alora_invocation_tokens": "an activated LoRA starts inside of a row",
}


@dataclass(frozen=True)
class MixedRuns:
    """Runs in memory on one base."""

    run: RestoredRun
    """The first one; base, tokenizer and template are those of all."""
    adapters: Mapping[str, str]
    """A run's name, or `base`, to what PEFT calls it."""
    unmixable: str = ""
    """Why rows of one batch cannot go to different adapters; empty where they can."""

    @property
    def model(self) -> PeftModel:
        """The base with every adapter on it."""
        model: PeftModel = self.run.model
        return model

    @contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Answer with one run, or with `base`, while the context lasts."""
        if name != BASE:
            self.model.set_adapter(self.adapters[name])
        with self.model.disable_adapter() if name == BASE else nullcontext():
            yield

    def bytes_of(self, name: str) -> int:
        """Return the memory that a run's adapter takes beside the base."""
        adapter = self.adapters[name]
        return sum(weight.nbytes for path, weight in self.model.named_parameters() if adapter in path.split("."))


@contextmanager
def restore_runs(
    folders: Sequence[RunFolder], *, other_template: bool = False, trust_remote_code: bool = False
) -> Iterator[MixedRuns]:
    """Load the base of some runs once, and every run's adapter on it, each proven to be the run's.

    Raises:
        UsageError: when the runs cannot share a base in memory, or its code is not allowed to run.
        CheckError: when tokenizer, base or an adapter are not what the receipt says.
        ModelError: when an adapter is missing or does not fit the base.
        RunFolderError: when a run is unfinished or a file of it is damaged.
    """
    receipts = [folder.receipt() for folder in folders]
    for receipt in receipts:
        check_remote_code(receipt, allowed=trust_remote_code)
    names = run_names(folders)
    for folder, receipt in zip(folders[1:], receipts[1:], strict=True):
        _check_same_base(folders[0], receipts[0], folder, receipt)
    key = BaseKey.of(receipts[0])
    with restore_run(folders[0], loaded.restore_base(key), key, other_template=other_template) as run:
        adapters = {BASE: _PEFT_BASE, names[0]: ADAPTER}
        for folder, receipt, name in zip(folders[1:], receipts[1:], names[1:], strict=True):
            adapters[name] = f"{ADAPTER}_{len(adapters)}"
            _add(run.model, folder, receipt, adapters[name])
        run.model.set_adapter(ADAPTER)
        unmixable = (unmixable_because(folder.path, receipt) for folder, receipt in zip(folders, receipts, strict=True))
        yield MixedRuns(run, adapters, next(filter(None, unmixable), ""))


def run_names(folders: Sequence[RunFolder]) -> list[str]:
    """Return what each run is called: as many last parts of its folder's path as tell it from the others.

    Raises:
        UsageError: for a run that is given twice.
    """
    paths = [folder.path.resolve() for folder in folders]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise UsageError(f"{twice} is given twice; expected different runs")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names) and BASE not in names:
            break
    return names


def _check_same_base(first: RunFolder, expected: Receipt, folder: RunFolder, got: Receipt) -> None:
    """Refuse a run that another one's base, tokenizer or template would not serve."""
    same = {
        "base": (got.base.model, expected.base.model),
        "precision": (got.precision, expected.precision),
        "dtype": (got.dtype, expected.dtype),
        "revision": (got.base.revision, expected.base.revision),
        "stored base": (got.base.sha256, expected.base.sha256),
        "chat template": (_template(got), _template(expected)),
    }
    for what, (one, other) in same.items():
        if one != other:
            if what in ("stored base", "chat template"):  # hashes say nothing to a reader
                raise UsageError(f"{folder.path} and {first.path} have another {what}. Expected {ALLOWED}")
            raise UsageError(f"{folder.path} has the {what} {one}, and {first.path} has {other}. Expected {ALLOWED}")
    for name in _SHARED_FILES:
        if _content(folder.adapter / name) != _content(first.adapter / name):
            raise UsageError(f"{folder.adapter / name} and that of {first.path} differ. Expected {ALLOWED}")


def _template(receipt: Receipt) -> tuple[str, str | None, str]:
    """Return what a prompt depends on; the rest of what the receipt has is of the rows."""
    return receipt.template.sha256, receipt.template.role_markers, receipt.template.end_token


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None  # the run that has none is refused where it is loaded


def unmixable_because(folder: Path, receipt: Receipt) -> str:
    """Return why a run's rows cannot share a batch with those of other adapters, or an empty string."""
    lora = receipt.settings.lora
    if receipt.precision == "int8":
        return f"{folder}: int8 computes outlier columns of the whole batch, so that rows move each other"
    if lora.get("bias", "none") != "none":
        return f"{folder}: PEFT mixes no adapter that trains biases (bias {lora['bias']})"
    return next((f"{folder}: {why}" for field, why in _NOT_MIXED.items() if lora.get(field)), "")


def _add(model: PeftModel, folder: RunFolder, receipt: Receipt, name: str) -> None:
    """Put one more adapter on the base, frozen and in float32."""
    if not (folder.adapter / WEIGHTS).is_file():
        raise ModelError(f"no adapter at {folder.adapter}: {WEIGHTS} is missing. Expected that of a finished run")
    found, expected = adapter_file_sha256(folder.adapter / WEIGHTS), receipt.adapter.final_sha256
    if found != expected:
        raise CheckError(
            f"the adapter is not this run's: its hash is {found[:12]}, the receipt of {folder.path} has "
            f"{expected[:12]}. The weights in adapter/ are another run's or damaged: train again"
        )
    try:
        read = add_adapter(model, folder.adapter, name)
        if lost := [*read.missing_keys, *read.unexpected_keys]:
            raise ValueError(f"{lost[0]} is in one of them only")
    except Exception as error:  # a damaged file makes PEFT and safetensors raise anything
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(f"the adapter at {folder.adapter} does not fit this base: {first}") from error
    model.set_adapter(name)
    fuse_lora_layers(model)
    model.eval()
