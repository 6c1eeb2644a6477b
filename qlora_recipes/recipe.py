"""What a recipe declares: a model, a dataset, and the settings of the adapter and of training.

A recipe only declares. Functions elsewhere do the work; `Recipe.main` passes it to the command line.
Knows nothing of weights.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, ClassVar

from qlora_recipes.errors import EXIT_CODE, RecipeError, RecipesError, UsageError, nearest
from qlora_recipes.fields import fields_of
from qlora_recipes.formatters import Formatted
from qlora_recipes.formatters.datasets import DATASETS, dataset_faults, function_faults
from qlora_recipes.formatters.datasets import DatasetSpec as DatasetSpec
from qlora_recipes.models import ModelSpec, spec_named

METHODS = {"sft": "SFTConfig", "dpo": "DPOConfig"}
"""What can be learned, to the class of TRL that has its settings."""
# Fields that follow from other choices, and what to set instead.
DERIVED = {
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "assistant_only_loss": "the chat template's {% generation %} markers",
    "completion_only_loss": "the chat template's {% generation %} markers",
    "chat_template_path": "the chat_template of the recipe's ModelSpec",
    "dataset_text_field": "a formatter",
    "dataset_kwargs": "a formatter",
    "eos_token": "the chat template",
    "pad_token": "the pad_token of the recipe's ModelSpec",
    "model_init_kwargs": "--precision, --dtype and the recipe's ModelSpec",
    "resume_from_checkpoint": "--resume",
    "restore_callback_states_from_checkpoint": "--resume, which always does",
    "ignore_data_skip": "--resume, which continues with the rows that are left",
    "save_only_model": "--resume, which needs the optimizer's state",
    "enable_jit_checkpoint": "nothing; SIGTERM and SIGINT always save the running step",
    "logging_nan_inf_filter": "nothing; a NaN stops the run",
    "activation_checkpointing": "--gradient_checkpointing",
    "activation_checkpointing_kwargs": "--gradient_checkpointing_kwargs",
    "use_cpu": "the devices found; CUDA_VISIBLE_DEVICES= hides them",
    "disable_tqdm": "nothing; the display is this package's",
    "push_to_hub": "qlora-recipes push RUN OWNER/NAME, once the run is proven: TRL uploads before there is a receipt",
    "deepspeed": "nothing; FSDP2 divides a base (recipes/launch/fsdp_qlora.yaml), and its checkpoints are safe to read",
    "fsdp": "accelerate launch --use_fsdp",
    "fsdp_config": "the --fsdp_ flags of accelerate launch",
    "task_type": "nothing; it is CAUSAL_LM",
    "peft_type": "nothing; it is LORA",
    "base_model_name_or_path": "--model",
    "inference_mode": "nothing; training needs it off",
}


class Recipe:
    """A model, a dataset and the settings to tune the model on it. Subclass it and set the attributes.

    `lora` and `training` hold fields of `LoraConfig` and `SFTConfig` under their own names. A subclass sets only what
    it changes; it inherits every other field. Invalid recipes are rejected as soon as the class is defined, with every
    problem listed in one error.
    """

    model: ClassVar[ModelSpec]
    """The model to tune; a hub id or a folder stands for the spec of ours that has it, or `ModelSpec(it)`."""
    dataset: ClassVar[DatasetSpec | Sequence[DatasetSpec]]
    """The rows to tune it on, or a list of such; a hub id or a file stands for `DatasetSpec(it)`."""
    lora: ClassVar[Mapping[str, Any]] = dict(
        r=16,  # a larger rank fits more and costs memory
        lora_alpha=16,  # scale of the update is lora_alpha / r
        lora_dropout=0.0,  # dropout reduces memorization; 0 is faster
    )
    """Fields of `peft.LoraConfig`."""
    training: ClassVar[Mapping[str, Any]] = dict(
        learning_rate=2e-4,  # as in QLoRA for 7B and 13B; halve it if the loss is unstable
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # share of all steps; Adam's first estimates are noisy
        num_train_epochs=1,
        per_device_train_batch_size=1,  # larger is faster per token where memory allows
        gradient_accumulation_steps=16,  # keeps the global batch at 16 rows; costs no memory
        max_length=1024,  # longer rows are truncated; memory grows with it
        packing=True,  # fills every row to max_length; conversations do not attend to each other
        max_grad_norm=0.3,  # as in QLoRA
        seed=0,  # for the adapter, the order of the rows and dropout
        logging_steps=1,
        save_strategy="steps",
        save_steps=0.05,  # share of all steps; a crash loses at most this much work
        save_total_limit=2,  # a checkpoint takes three times the adapter's size
        report_to="none",
    )
    """Fields of `trl.SFTConfig`, or with `method = "dpo"` of `trl.DPOConfig`."""
    method: ClassVar[str] = "sft"
    """What is learned: `sft`, the answers of the rows; `dpo`, which of two answers to prefer (arXiv 2305.18290)."""
    explicit_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that the recipe or a base class sets itself; some of the others are chosen to fit the machine."""
    format_row: ClassVar[Callable[..., Formatted] | None] = None
    """For your own data: a function from row to messages, with or without `self`. It overrides the dataset's."""
    eval_tasks: ClassVar[Sequence[str]] = ()
    """lm-eval tasks to score the run on."""
    checks: ClassVar[Sequence[Callable[[Any], Any]]] = ()
    """Your own checks before training: functions of the run that return what `preflight.fail_unless` makes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, spec in (("model", spec_named), ("dataset", DatasetSpec)):
            if isinstance(source := cls.__dict__.get(name), str) and source.strip():
                setattr(cls, name, spec(source))
        if isinstance(several := cls.__dict__.get("dataset"), list | tuple):
            cls.dataset = [DatasetSpec(each) if isinstance(each, str) else each for each in several]
        for name in ("lora", "training"):
            if isinstance(declared := cls.__dict__.get(name, {}), Mapping):
                inherited = next(vars(base)[name] for base in cls.__mro__[1:] if name in vars(base))
                if name == "training":  # what another method trains with may know fewer fields
                    inherited = {key: value for key, value in inherited.items() if key in fields_of(config_of(cls))}
                setattr(cls, name, {**inherited, **declared})
                cls.explicit_fields = cls.explicit_fields | set(declared)
        own = cls.__dict__.get("format_row")
        if inspect.isfunction(own) and len(inspect.signature(own).parameters) == 1:
            cls.format_row = staticmethod(own)  # written without `self`
        if faults := list(_faults(cls)):
            message = "\n".join([f"{cls.__name__} cannot work:", *(f"  - {fault}" for fault in faults)])
            if cls.__module__ == "__main__" and hasattr(sys.modules["__main__"], "__file__"):
                print(f"error: {message}", file=sys.stderr)  # the recipe is the program: no traceback
                sys.exit(EXIT_CODE)
            raise RecipeError(message)

    @classmethod
    def datasets(cls) -> tuple[DatasetSpec, ...]:
        """Return the recipe's datasets, of which most have one."""
        return (cls.dataset,) if isinstance(cls.dataset, DatasetSpec) else tuple(cls.dataset)

    @classmethod
    def formatter(cls, dataset: DatasetSpec | None = None) -> Callable[[Mapping[str, Any]], Formatted] | None:
        """Return the recipe's `format_row`, or else the dataset's (the first one's); None if neither is set."""
        return (dataset or cls.datasets()[0]).format_row if cls.format_row is None else cls().format_row

    @classmethod
    def main(cls, arguments: Sequence[str] | None = None) -> None:
        """Train this recipe with these command-line arguments (default: those of the process).

        Does nothing while `load_recipe` reads the file that calls it: with and without `if __name__ == "__main__"`.
        """
        if _loading:
            return
        from qlora_recipes.commands.recipe_cli import main  # late, since the command line imports this module

        main(cls, arguments)


def config_of(recipe: type[Recipe]) -> str:
    """Return the name of the class of TRL whose fields a recipe's `training` holds."""
    return METHODS.get(recipe.method, METHODS["sft"])


def _faults(cls: type[Recipe]) -> Iterable[str]:
    yield from _unknown_attributes(cls)
    yield from _typed(cls, "model", ModelSpec, 'a hub id or a folder, such as "Qwen/Qwen3-8B", or a ModelSpec')
    if hasattr(cls, "dataset"):
        yield from dataset_faults(cls.dataset)
    else:
        yield f"dataset: missing, expected {DATASETS}"
    yield from _settings_faults(cls, "lora", "LoraConfig")
    yield from _settings_faults(cls, "training", config_of(cls))
    if cls.method not in METHODS:
        yield f"method: got {cls.method!r}, expected one of {', '.join(METHODS)}"
    with suppress(TypeError, AttributeError):  # a value of the wrong type has been reported above
        yield from bound_faults(cls.lora, cls.training)
    yield from function_faults("format_row", cls.format_row)
    if isinstance(cls.eval_tasks, str) or not all(isinstance(task, str) for task in cls.eval_tasks):
        yield f"eval_tasks: got {cls.eval_tasks!r}, expected a list of lm-eval task names"
    if not isinstance(cls.checks, (list, tuple)) or not all(map(callable, cls.checks)):
        yield f"checks: got {cls.checks!r}, expected a list of functions from a run to a Check"


def _unknown_attributes(cls: type[Recipe]) -> Iterable[str]:
    """A misspelled attribute would be ignored silently; private names and functions may be added."""
    valid = {name for name in vars(Recipe) if not name.startswith("_")} | {"model", "dataset"}
    for name, value in vars(cls).items():
        if not (name.startswith("_") or name in valid or callable(value) or isinstance(value, classmethod)):
            yield f"{name}: a recipe has no such attribute.{nearest(name, valid)}"


def _typed(cls: type[Recipe], name: str, kind: type, expected: str) -> Iterable[str]:
    if not hasattr(cls, name):
        yield f"{name}: missing, expected {expected}"
    elif not isinstance(getattr(cls, name), kind):
        yield f"{name}: got {getattr(cls, name)!r}, expected {expected}"


def _settings_faults(cls: type[Recipe], name: str, config: str) -> Iterable[str]:
    settings = getattr(cls, name)
    if not isinstance(settings, Mapping):
        yield f"{name}: got {settings!r}, expected a dict of {config} fields"
        return
    for key, value in settings.items():
        try:
            check_field(config, key, value)
        except UsageError as error:
            yield f"{name}: {error}"


def check_field(config: str, name: str, value: object) -> object:
    """Return the value in the type of a `SFTConfig` or `LoraConfig` field.

    Raises:
        UsageError: for an unknown field (naming the nearest), one that is not set by hand, or a value of a wrong type.
    """
    fields = fields_of(config)
    if name not in fields:
        raise UsageError(f"{config} has no field {name!r}.{nearest(name, fields)}")
    if name in DERIVED:
        raise UsageError(f"{name} is not set by hand; it follows from {DERIVED[name]}")
    return fields[name].check(value)


def _is_multiple(value: Any) -> bool:
    return value in (None, "auto") or (str(value).isdecimal() and int(value) >= 1)


def _is_mapping(value: Any) -> bool:
    every = value.get("every_n_layers", 1) if isinstance(value, Mapping) else 0
    return value is None or (isinstance(every, int) and every >= 1)


def _start(value: Any) -> Any:
    """Return an `init_lora_weights` by its kind: with N for a number of iterations."""
    return re.sub("_niter_[1-9][0-9]*$", "_niter_N", value) if isinstance(value, str) else value


_FROM_WEIGHTS = ("pissa", "pissa_niter_N", "olora", "loftq")
_STARTS = (True, False, "gaussian", "orthogonal", "mica", *_FROM_WEIGHTS)
"""Ways to start an adapter that need no rows; those from the weights leave the base as it is (base/starts.py)."""
_BEST = (None, "loss", "eval_loss")

# Section, field, test, what is expected: for values that the libraries accept, and then fail or train nothing with.
_BOUNDS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("lora", "r", lambda value: value >= 1, "a rank of at least 1"),
    ("lora", "lora_alpha", lambda value: value > 0, "a positive number"),
    ("lora", "lora_dropout", lambda value: 0 <= value < 1, "a probability below 1"),
    ("lora", "init_lora_weights", lambda value: _start(value) in _STARTS, f"one of {_STARTS}; others need rows"),
    (
        "lora",
        "loftq_config",
        lambda value: not value,
        "nothing; init_lora_weights loftq takes the base as stored",
    ),
    (
        "lora",
        "modules_to_save",
        lambda value: not value,
        "nothing; PEFT trains the copy in 16 bits and no check covers it: name embed_tokens in target_modules",
    ),
    (
        "lora",
        "lora_bias",
        lambda value: not value,
        "false; an adapter with biases cannot be merged into a base without",
    ),
    ("lora", "bias", lambda value: value == "none", "none; biases are the base's, which stays as it is"),
    ("training", "seed", lambda value: 0 <= value < 2**32, "a whole number from 0 up, below 2**32"),
    ("training", "data_seed", lambda value: value is None or 0 <= value < 2**32, "a whole number from 0 up"),
    ("training", "neftune_noise_alpha", lambda value: value is None or 0 < value < math.inf, "a positive number"),
    ("training", "learning_rate", lambda value: 0 < value < math.inf, "a positive number"),
    ("training", "max_length", lambda value: value is not None and value >= 8, "at least 8 tokens"),
    ("training", "max_steps", lambda value: value == -1 or value >= 1, "at least 1, or -1 for whole epochs"),
    ("training", "num_train_epochs", lambda value: 0 < value < math.inf, "a positive number"),
    ("training", "per_device_train_batch_size", lambda value: value >= 1, "at least 1"),
    ("training", "gradient_accumulation_steps", lambda value: value >= 1, "at least 1"),
    ("training", "save_steps", lambda value: value > 0, "a number of steps, or a share of them below 1"),
    ("training", "save_total_limit", lambda value: value is None or value >= 1, "at least 1 checkpoint"),
    ("training", "weight_decay", lambda value: 0 <= value < math.inf, "0 or a positive number"),
    ("training", "label_smoothing_factor", lambda value: 0 <= value < 1, "a share from 0 up to 1"),
    ("training", "logging_steps", lambda value: value > 0, "a number of steps, or a share of them below 1"),
    ("training", "eval_steps", lambda value: value is None or value > 0, "a number of steps, or a share of them"),
    ("training", "eval_delay", lambda value: value >= 0, "0 or a number of steps or epochs"),
    ("training", "per_device_eval_batch_size", lambda value: value >= 1, "at least 1"),
    ("training", "eval_accumulation_steps", lambda value: value is None or value >= 1, "at least 1"),
    ("training", "pad_to_multiple_of", _is_multiple, "auto, or at least 1"),
    ("training", "lr_scheduler_kwargs", _is_mapping, "a mapping"),
    ("training", "gradient_checkpointing_kwargs", _is_mapping, "a mapping, every_n_layers in it at least 1"),
    ("training", "dataset_num_proc", lambda value: value is None or value >= 1, "at least 1"),
    ("training", "ddp_timeout", lambda value: value >= 1, "at least 1 second"),
    ("training", "metric_for_best_model", lambda value: value in _BEST, "loss"),
    ("training", "early_stopping_patience", lambda value: value is None or value >= 1, "at least 1 evaluation"),
    ("training", "loraplus_lr_ratio", lambda value: value is None or 1 <= value < math.inf, "at least 1"),
    ("training", "beta", lambda value: 0 < value < math.inf, "a positive number"),
    (
        "training",
        "truncation_mode",
        lambda value: value == "keep_start",
        "keep_start; a row loses its end",
    ),
    ("training", "precompute_ref_log_probs", lambda value: not value, "false; its cache is not part of a checkpoint"),
    ("training", "sync_ref_model", lambda value: not value, "false; the reference is the start, and stays"),
    ("training", "max_grad_norm", lambda value: value >= 0, "0 (no clipping) or a positive number"),
)


def bound_faults(lora: Mapping[str, Any], training: Mapping[str, Any]) -> Iterable[str]:
    """Yield one sentence for each setting with a value that cannot train."""
    sections = {"lora": lora, "training": training}
    for section, name, holds, expected in _BOUNDS:
        if name in sections[section] and not holds(sections[section][name]):
            yield f"{section}: {name}: got {sections[section][name]!r}, expected {expected}"
    if _start(start := lora.get("init_lora_weights", True)) in _FROM_WEIGHTS:
        given = {**lora, "weight_decay": training.get("weight_decay")}
        for name in filter(given.get, ("use_dora", "target_parameters", "weight_decay")):
            yield f"lora: init_lora_weights: got {start!r} with {name}, expected one of the two"


_PACKAGE = Path(__file__).parent
# Inside the package where it is installed, and beside it in a checkout.
SHIPPED = _PACKAGE / "recipes" if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent / "recipes"
"""The folder of the recipes that ship with the package."""
_EXPECTED = "expected a Python file that declares a subclass of qlora_recipes.Recipe"
_loading = False


def find_recipe(name: str) -> Path:
    """Return a recipe's file: the one at this path, that of this name here, or the one that ships under this name.

    Raises:
        UsageError: when there is none, naming the nearest of those that ship.
    """
    for file in (Path(name), Path(f"{name}.py"), SHIPPED / f"{name}.py"):
        with suppress(OSError):  # a name that is too long for a file
            if file.is_file():
                return file
    shipped = sorted(file.stem for file in SHIPPED.glob("*.py"))
    raise UsageError(f"no recipe at {name}; {_EXPECTED}, or one of {', '.join(shipped)}.{nearest(name, shipped)}")


def load_recipe(path: str | Path) -> type[Recipe]:
    """Return the recipe declared in a Python file, which is not run as a program.

    Raises:
        UsageError: when the file is missing, fails, or does not declare exactly one recipe besides its bases.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no recipe at {path}; {_EXPECTED}")
    name = f"qlora_recipes_loaded_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file; {_EXPECTED}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _only_declaring(path):
            spec.loader.exec_module(module)
    except RecipesError:
        raise
    except (Exception, SystemExit) as error:
        raise _located(error, path) from error
    classes = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == name]
    declared = [cls for cls in classes if issubclass(cls, Recipe)]
    leaves = [cls for cls in declared if not any(other is not cls and issubclass(other, cls) for other in declared)]
    if len(leaves) != 1:
        names = ", ".join(cls.__name__ for cls in leaves) or "none"
        raise UsageError(f"{path} declares {names} as recipes; expected exactly one subclass of qlora_recipes.Recipe")
    return leaves[0]


@contextmanager
def _only_declaring(path: Path) -> Iterator[None]:
    """Let a file import its neighbors, as a program can, but train nothing and read no flags or keys of ours."""
    global _loading
    before, argv, keys = _loading, sys.argv, sys.stdin
    _loading, sys.argv, sys.stdin = True, [str(path)], io.StringIO()
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        with redirect_stdout(sys.stderr):  # what it prints is no part of a command's output
            yield
    finally:
        _loading, sys.argv, sys.stdin = before, argv, keys
        with suppress(ValueError):
            sys.path.remove(folder)


def _located(error: BaseException, path: Path) -> UsageError:
    """Return an error that names the line of the recipe's file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.absolute()]
    line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)
    where = f"{path}, line {line}" if line else str(path)
    if isinstance(error, SystemExit):
        fix = 'Put what only a program does under: if __name__ == "__main__"'
        return UsageError(f"{where}: the recipe's file exits (with {error.code!r}) while it is read. {fix}")
    return UsageError(f"{where}: the recipe's file fails with {type(error).__name__}: {error}. Fix it there")
