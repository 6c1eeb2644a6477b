"""How the frozen base is stored, and how far its weights are from those of the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from qlora_recipes.base.loading import base_name
from qlora_recipes.kernels.dequantize import dequantized
from qlora_recipes.preflight.verdicts import fail_unless, passed, warn_unless
from qlora_recipes.run.receipt import Check
from qlora_recipes.settings import model_location
from qlora_recipes.stages import ReadyRun

if TYPE_CHECKING:
    from peft import PeftModel

_SAMPLE = 2**16  # weights of each layer that are compared; 224 layers of 7B give 15 million
# Root mean square error of blocks of 64 normal weights, relative to the weights; 16 bits round at 2**-9.
_EXPECTED_ERROR = {"nf4": 0.095, "nf4-single": 0.095, "fp4": 0.13, "int8": 0.012, "bf16": 0.002, "fp16": 0.002}


def quantized_linears(run: ReadyRun) -> Check:
    """Linear layers by class, and how many of those that should be are stored in fewer bits."""
    found, expected = run.base.quantized.found, run.base.quantized.expected
    classes = ", ".join(f"{count} {name}" for name, count in run.base.linears.items())
    figure = f"{found} of {expected} as {run.settings.precision.name} ({classes})"
    return fail_unless(found == expected, figure, "Use --precision bf16, or add a repair for this architecture.")


def quantization_error(run: ReadyRun) -> Check:
    """The weights in memory beside those in the checkpoint: mean and worst layer."""
    errors = dict(_layer_errors(run))
    if not errors:
        return passed("no layer has its name in the checkpoint")
    mean = sum(errors.values()) / len(errors)
    worst = max(errors, key=lambda name: errors[name])
    expected = _EXPECTED_ERROR[run.settings.precision.name]
    return fail_unless(
        mean <= 2 * expected and errors[worst] <= 5 * expected,
        f"{mean:.2%} of the weights' norm, worst {errors[worst]:.2%} ({_short(worst)})",
        f"About {expected:.1%} is normal for {run.settings.precision.name}: these are not the checkpoint's weights.",
    )


def _layer_errors(run: ReadyRun) -> Iterator[tuple[str, float]]:
    """Yield each linear layer's relative error over its first rows; tensors are read in slices, not whole."""
    files = _checkpoint(run)
    output = run.model.get_output_embeddings()
    for name, module in _base_modules(run.model):
        key = f"{name}.weight"
        if not isinstance(module, nn.Linear) or module is output or key not in files:
            continue
        with safe_open(files[key], "pt") as stored:
            expected = stored.get_slice(key)[: max(1, _SAMPLE // module.in_features)].float()
        got = dequantized(module)[: len(expected)].float().cpu()
        yield name, float((got - expected).norm() / expected.norm())


def checkpoint_names(run: ReadyRun) -> Check:
    """A weight that the checkpoint does not name is drawn at random when the base is loaded."""
    files = _checkpoint(run)
    tied = {id(weight) for weight in (run.model.get_input_embeddings().weight,)}
    names = {base_name(name): weight for name, weight in run.model.named_parameters() if "lora_" not in name}
    missing = [name for name, weight in names.items() if name not in files and id(weight) not in tied]
    return warn_unless(
        not missing,
        f"{len(missing)} of {len(names)} weights are not in the checkpoint, {missing[0]} first"
        if missing
        else f"all {len(names)} weights are in the checkpoint",
        "They are random unless Transformers renamed them; is this the model that the checkpoint was made for?",
    )


def _checkpoint(run: ReadyRun) -> dict[str, Path]:
    """Return weight name to the safetensors file that holds it."""
    index = _file(run, SAFE_WEIGHTS_INDEX_NAME)
    if index:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        parts = {part: _file(run, part) for part in set(names.values())}
        return {name: parts[part] for name, part in names.items() if parts[part]}
    whole = _file(run, SAFE_WEIGHTS_NAME)
    if not whole:
        return {}
    with safe_open(whole, "pt") as stored:
        return dict.fromkeys(stored.keys(), whole)


def _file(run: ReadyRun, name: str) -> Path | None:
    found = cached_file(
        model_location(run.settings.model),
        name,
        revision=run.base.revision,
        local_files_only=True,  # the base was just loaded from these
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _base_modules(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base's modules under the names that they have without an adapter."""
    return ((base_name(name), module) for name, module in model.named_modules() if "lora_" not in name)


def _short(name: str) -> str:
    return ".".join(name.split(".")[-3:])
