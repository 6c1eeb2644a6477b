"""The libraries' own objects that settings become, tried before anything is loaded: a refusal then costs seconds.

Reads no rows and no weights.
"""

from __future__ import annotations

import copy
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl.trainer.sft_config import SFTConfig

from qlora_recipes.base.adapters import attach
from qlora_recipes.base.loading import load_outline
from qlora_recipes.errors import RecipesError, UsageError
from qlora_recipes.settings import Settings

_PACKAGE = Path(__file__).parent.parent
_STEPS = 100  # of the schedule that is tried
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_settings(settings: Settings) -> None:
    """Make of these settings what the libraries make of them, on the smallest scale.

    Raises:
        UsageError: for what a library refuses, naming the fields at fault.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again with the real objects
        _try("SFTConfig", settings.training, lambda fields: _try_training(replace(settings, training=fields)))
        outline = load_outline(settings.model, settings.revision, trust_remote_code=settings.trust_remote_code)
        _try("LoraConfig", settings.lora, lambda fields: _try_adapter(outline, fields))


@contextmanager
def refusals(settings: Settings) -> Iterator[None]:
    """Turn what a library refuses in spite of `check_settings` into one message, with the fields that it mentions.

    Raises:
        UsageError: for an exception that a library raised, and that is about a value.
    """
    try:
        yield
    except RecipesError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ImportError, NotImplementedError) as error:
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(_PACKAGE):
            raise  # a fault of ours
        fields = {**settings.lora, **settings.training}
        named = {name: value for name, value in fields.items() if re.search(rf"\b{name}\b", str(error))}
        raise UsageError(f"{_given(named)}: a library refuses that: {_reason(error)}") from error


def make_sft_config(settings: Settings, folder: str, *, padding_free: bool) -> SFTConfig:
    """Return the settings' SFTConfig fields, and those that follow from other choices.

    Raises:
        UsageError: when the best checkpoint is asked for and nothing is evaluated.
    """
    training = dict(settings.training)
    training.pop("auto_find_batch_size", None)  # upstream's starts over with a half-trained adapter; ours does not
    packed = training.get("packing") or training.get("eval_packing")
    if not packed and training.setdefault("padding_free", padding_free):
        training["max_length"] = None  # rows are cut already, and TRL would have to be told not to
    if training.pop("early_stopping_patience", None) is not None:
        training = {"metric_for_best_model": "loss", "load_best_model_at_end": True, **training}
    if training.get("load_best_model_at_end") and not evaluates_held_out(settings):
        raise UsageError(
            "the best checkpoint and early stopping are chosen by the held-out loss: give --eval_strategy steps "
            "--eval_steps N, and --save_strategy steps with a --save_steps that N divides"
        )
    return SFTConfig(
        **training,
        output_dir=folder,
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        use_cpu=PartialState().device.type == "cpu",
        disable_tqdm=True,  # the display is ours
        logging_nan_inf_filter=False,  # or a NaN is logged as a loss of 0.0
        restore_callback_states_from_checkpoint=True,  # early stopping's patience continues where it was
    )


def evaluates_held_out(settings: Settings) -> bool:
    """Whether the loss of the held-out rows is taken while training."""
    return bool(settings.training.get("eval_strategy", "no") != "no")


def _try(config: str, fields: Mapping[str, Any], make: Callable[[Mapping[str, Any]], object]) -> None:
    """Call `make`; when it raises, name the fields without which it does not, each left out in turn."""
    try:
        make(fields)
    except RecipesError:
        raise
    except Exception as error:  # a library may raise anything
        without = {name: {key: fields[key] for key in fields if key != name} for name in fields}
        at_fault = {name: fields[name] for name, others in without.items() if _works(make, others)}
        raise UsageError(f"{_given(at_fault)}: {config} refuses that: {_reason(error)}") from error


def _given(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"--{name}: got {value!r}" for name, value in fields.items()) or "these settings"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _works(make: Callable[[Mapping[str, Any]], object], fields: Mapping[str, Any]) -> bool:
    try:
        make(fields)
    except Exception:
        return False
    return True


def _try_training(settings: Settings) -> None:
    """Make the configuration, and an optimizer of one weight, its schedule, an empty loader and the trackers."""
    with tempfile.TemporaryDirectory() as folder:
        args = make_sft_config(settings, folder, padding_free=False)
    weight = torch.nn.Linear(1, 1)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, weight)
    group = {"params": list(weight.parameters()), "weight_decay": args.weight_decay}
    optimizer = kind([group], **options)
    get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(_STEPS),
        num_training_steps=_STEPS,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    DataLoader(
        [0],
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    for name, tracker in zip(args.report_to, get_reporting_integration_callbacks(args.report_to), strict=True):
        try:
            tracker()
        except (ImportError, RuntimeError) as error:
            package = _PACKAGES.get(name, name)
            raise UsageError(f"--report_to {name}: {package} is not installed; run: pip install {package}") from error


def _try_adapter(outline: PreTrainedModel | None, lora: Mapping[str, Any]) -> None:
    """Put the adapter on a copy of the model's outline; a start that is computed from the weights is left out."""
    if outline is None:
        LoraConfig(task_type="CAUSAL_LM", **lora)
        return
    start = lora.get("init_lora_weights", True)
    LoraConfig(task_type="CAUSAL_LM", **lora)
    attach(copy.deepcopy(outline), {**lora, "init_lora_weights": start in (True, False, "gaussian") and start}, seed=0)
