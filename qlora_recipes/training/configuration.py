"""The libraries' own objects that settings become, tried before anything is loaded: a refusal then costs seconds.

Reads no rows and no weights.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from qlora_recipes.base.adapters import attach
from qlora_recipes.base.loading import check_reachable, load_outline
from qlora_recipes.base.sharding import refuse_unsupported
from qlora_recipes.errors import RecipesError, UsageError
from qlora_recipes.settings import Settings
from qlora_recipes.training.faults import is_machine_fault

_PACKAGE = Path(__file__).parent.parent
_STEPS = 100  # of the schedule that is tried
_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check_settings(settings: Settings) -> None:
    """Make of these settings what the libraries make of them, on the smallest scale.

    Raises:
        UsageError: for what a library refuses, naming the fields at fault.
        ModelError: for a model that is neither in the cache nor to be had.
    """
    check_reachable(settings.model, settings.revision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again with the real objects
        _try(settings.training, lambda fields: _try_training(replace(settings, training=fields)))
        outline = load_outline(settings.model, settings.revision, trust_remote_code=settings.trust_remote_code)
        _try(settings.lora, lambda fields: _try_adapter(outline, fields))


@contextmanager
def refusals(settings: Settings) -> Iterator[None]:
    """Turn what a library refuses in spite of `check_settings` into one message, with the fields that it mentions.

    Raises:
        UsageError: for what a library raised, unless the machine is at fault.
    """
    try:
        yield
    except Exception as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if isinstance(error, RecipesError) or raised_in.is_relative_to(_PACKAGE) or is_machine_fault(error):
            raise
        fields = {**settings.lora, **settings.training}
        named = {name: value for name, value in fields.items() if _mentions(str(error).lower(), name, value)}
        raise UsageError(f"{_given(named)}: refused by the libraries: {_reason(error)}") from error


def _mentions(text: str, name: str, value: object) -> bool:
    words = [name, value.lower()] if isinstance(value, str) else [name]
    return any(re.search(rf"\b{re.escape(word)}\b", text) for word in words)


def make_sft_config(settings: Settings, folder: str, *, padding_free: bool) -> SFTConfig | DPOConfig:
    """Return the settings' fields of SFTConfig or DPOConfig, and those that follow from other choices.

    Raises:
        UsageError: when the best checkpoint is asked for and nothing is evaluated.
    """
    training = dict(settings.training)
    training.pop("auto_find_batch_size", None)  # upstream's starts over with a half-trained adapter; ours does not
    packed = training.get("packing") or training.get("eval_packing")
    if settings.of_preferences:
        training["max_length"] = None  # rows are cut already
    elif not packed and training.setdefault("padding_free", padding_free):
        training["max_length"] = None  # rows are cut already, and TRL would have to be told not to
    training.pop("loraplus_lr_ratio", None)  # RunTrainer makes its optimizer
    training.setdefault("router_aux_loss_coef", 0.0)  # routers are frozen, and the loss is that of the answers
    if training.pop("early_stopping_patience", None) is not None:
        training = {"metric_for_best_model": "loss", "load_best_model_at_end": True, **training}
    if training.get("load_best_model_at_end") and not evaluates_held_out(settings):
        raise UsageError(
            "the best checkpoint and early stopping are chosen by the held-out loss: give --eval_strategy steps "
            "--eval_steps N, and --save_strategy steps with a --save_steps that N divides"
        )
    # Every weight has a gradient; for a model of PEFT's, upstream would look for those without at each step.
    training.setdefault("ddp_find_unused_parameters", False)
    kind = DPOConfig if settings.of_preferences else SFTConfig
    made = kind(
        **training,
        output_dir=folder,
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        use_cpu=PartialState().device.type == "cpu",
        disable_tqdm=True,  # the display is ours
        logging_nan_inf_filter=False,  # or a NaN is logged as a loss of 0.0
        restore_callback_states_from_checkpoint=True,  # early stopping's patience continues where it was
    )
    made._n_gpu = min(made.n_gpu, 1)  # or a process that sees several would divide each batch among them
    return made


def evaluates_held_out(settings: Settings) -> bool:
    """Whether the loss of the held-out rows is taken while training."""
    return bool(settings.training.get("eval_strategy", "no") != "no")


def _try(fields: Mapping[str, Any], make: Callable[[Mapping[str, Any]], object]) -> None:
    """Call `make`; when it raises, name the fields without which it does not, each left out in turn."""
    try:
        make(fields)
    except RecipesError:
        raise
    except Exception as error:  # a library may raise anything
        without = {name: {key: fields[key] for key in fields if key != name} for name in fields}
        at_fault = {name: fields[name] for name, others in without.items() if _works(make, others)}
        raise UsageError(f"{_given(at_fault)}: refused by the libraries: {_reason(error)}") from error


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
    _refuse_what_fails_later(settings, args)
    weight: Any = torch.nn.Linear(1, 1)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, weight)
    group = {"params": list(weight.parameters()), "weight_decay": args.weight_decay}
    optimizer = kind([group], **options)
    get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(_STEPS),
        num_training_steps=_STEPS,
        scheduler_specific_kwargs=cast(dict[str, Any] | None, args.lr_scheduler_kwargs),
    )
    DataLoader(
        cast(Any, [0]),
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_persistent_workers,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    names = cast(list[str], args.report_to)
    for name, tracker in zip(names, get_reporting_integration_callbacks(names), strict=True):
        try:
            tracker()
        except (ImportError, RuntimeError) as error:
            package = _PACKAGES.get(name, name)
            raise UsageError(f"--report_to {name}: {package} is not installed; run: pip install {package}") from error


def _refuse_what_fails_later(settings: Settings, args: SFTConfig | DPOConfig) -> None:
    """Refuse what is accepted now and fails once the trainer is there, or at the first step."""
    args.get_process_log_level()  # type: ignore[no-untyped-call]  # not annotated
    if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise UsageError("--use_liger_kernel: liger-kernel is not installed; run: pip install liger-kernel")
    refuse_unsupported(settings)
    start, precision = settings.lora.get("init_lora_weights"), settings.precision
    if start == "loftq" and not precision.quantized:
        raise UsageError("--init_lora_weights loftq starts from what quantizing took away; expected --precision nf4")
    if start == "mica" and precision.quantized:
        raise UsageError("--init_lora_weights mica takes its directions from 16-bit weights; expected --precision bf16")
    if settings.lora.get("use_dora") and precision.quantized and not precision.quant_type:
        raise UsageError("--use_dora: PEFT cannot read int8 weights once they have computed; expected 4 or 16 bits")
    if args.eval_on_start and not evaluates_held_out(settings):
        raise UsageError("--eval_on_start: nothing is evaluated; give --eval_strategy steps --eval_steps N too")
    backend = args.torch_compile_backend
    if backend is not None and backend not in torch.compiler.list_backends(exclude_tags=()):  # which loads them all
        known = ", ".join(torch.compiler.list_backends())
        raise UsageError(f"--torch_compile_backend: got {backend!r}, expected one of {known}")
    for name in ("torch_compile", "activation_offloading"):
        if getattr(args, name) and PartialState().device.type == "cpu":
            raise UsageError(f"--{name} needs a GPU, and there is none here; leave it out")


def _try_adapter(outline: PreTrainedModel | None, lora: Mapping[str, Any]) -> None:
    """Put the adapter on a copy of the model's outline; a start that is computed from the weights is left out."""
    if outline is None:
        LoraConfig(task_type="CAUSAL_LM", **lora)
        return
    computed = {"init_lora_weights": False} if lora.get("init_lora_weights") == "mica" else {}
    model = attach(copy.deepcopy(outline), {**lora, **computed}, seed=0)
    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise UsageError("--target_modules: got the output layer, which TRL computes the loss from without an adapter")
