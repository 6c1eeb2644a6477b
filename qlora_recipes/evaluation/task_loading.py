"""Turns the names on the command line into lm-eval tasks that are known to work before a model is loaded.

A name is one of our tasks, a folder or YAML file, `openllm`, or any task or group of lm-eval's. No models here.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_recipes.data.reading import read_rows
from qlora_recipes.errors import DataError, UsageError, nearest
from qlora_recipes.evaluation.bar import silence_lm_eval

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

SHIPPED = Path(__file__).parent / "tasks"
STANDIN_TASKS = ("standin_choice", "standin_answer", "standin_text")
PREFERENCES = "held_out_preferences"
HELD_OUT_TASKS = {
    "held_out": ("bits_per_byte", "bits_per_byte"),
    "held_out_answers": ("rougeL", "generation"),
    PREFERENCES: ("acc", "accuracy"),
}
"""Name to metric and kind, as in EvalTask."""
OWN = (*STANDIN_TASKS, *HELD_OUT_TASKS)

# Shots and metric of the first Open LLM Leaderboard; the shots are those of lm_eval/tasks/benchmarks/openllm.yaml. That
# group also has truthfulqa_gen, which needs a network to score, and truthfulqa_mc1; the leaderboard used neither.
LEADERBOARD = {
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
    "mmlu": (5, "acc"),
    "truthfulqa_mc2": (0, "acc"),
    "winogrande": (5, "acc"),
    "gsm8k": (5, "exact_match"),
}

# A task, group or tag is defined at the start of a line; list items are tags or the parts of a group.
_DEFINED = re.compile(r"""^["']?(?:task|group|tag)["']?: *["']?([\w.:+-]+)["']?\s*$""", re.MULTILINE)
_LISTED = re.compile(r"""^\s*- *["']?([\w.:+-]+)["']?\s*$""", re.MULTILINE)


@dataclass(frozen=True)
class EvalTask:
    """One task as it is run and reported."""

    name: str
    parts: tuple[ConfigurableTask, ...]
    """lm-eval's tasks: one, or those of a group, which become its subjects; none for our held-out tasks."""
    metric: str
    """The metric of each document's score."""
    kind: str
    """`accuracy`, `bits_per_byte`, `generation` or `score`, as in TaskResult."""
    chat_template: bool
    """Whether it is rendered with the chat template unless told otherwise."""

    @property
    def num_fewshot(self) -> int:
        """Examples before each question; of a group, the most that a part has."""
        return max((part.config.num_fewshot or 0 for part in self.parts), default=0)

    @property
    def version(self) -> str:
        """The task's own version, as its author counts."""
        return str(self.parts[0].VERSION) if self.parts else "1"

    @property
    def generates(self) -> bool:
        """Whether the model writes its answers."""
        return self.kind == "generation" or any(part.OUTPUT_TYPE == "generate_until" for part in self.parts)

    @property
    def samples(self) -> bool:
        """Whether the task itself asks for answers that are drawn, not the likeliest."""
        return any((part.config.generation_kwargs or {}).get("do_sample") for part in self.parts)

    def rendered(self, asked: bool | None) -> bool:
        """Return whether prompts are rendered with the chat template when `asked` is what the user said."""
        fixed = not self.parts or self.kind == "bits_per_byte"  # as in training; or text, which has no prompt
        return self.chat_template if fixed or asked is None else asked


def usual_tasks(demo: bool, declared: Sequence[str], *, held_out: bool, preferences: bool = False) -> list[str]:
    """Return what is scored unless told otherwise: tasks `declared` by the recipe, a demo's own, or held-out rows.

    Raises:
        UsageError: when the recipe declares none and no rows are held out.
    """
    own = ["held_out", *([PREFERENCES] if preferences else []), "held_out_answers"] if held_out else []
    tasks = [*STANDIN_TASKS, *own[: 1 + preferences]] if demo else list(declared) or own
    if not tasks:
        raise UsageError("the run kept no rows and its recipe names no eval_tasks; give --tasks, such as --tasks mmlu")
    return tasks


def load_tasks(names: Sequence[str]) -> dict[str, list[EvalTask]]:
    """Return, for each name, the tasks that it stands for, loaded and with metrics that lm-eval knows.

    Raises:
        UsageError: for an unknown name, naming the nearest, or a metric that lm-eval does not know.
        DataError: for a broken YAML file, or data that cannot be loaded.
    """
    meant = {name: list(LEADERBOARD) if name == "openllm" else [name] for name in names}
    with silence_lm_eval():
        asked = [part for parts in meant.values() for part in parts]
        standard = _standard_tasks([name for name in asked if name not in OWN and not _is_path(name)])
        return {name: [task for part in parts for task in _load(part, standard)] for name, parts in meant.items()}


def _load(name: str, standard: TaskManager | None) -> list[EvalTask]:
    if name in HELD_OUT_TASKS:
        return [EvalTask(name, (), *HELD_OUT_TASKS[name], chat_template=True)]
    if name in STANDIN_TASKS:
        return _from_files(SHIPPED / "standin_world" / f"{name}.yaml")
    if _is_path(name):
        return _from_files(Path(name))
    assert standard is not None
    return _from_lm_eval(name, standard)


def _is_path(name: str) -> bool:
    return name not in OWN and (Path(name).suffix in (".yaml", ".yml") or "/" in name or Path(name).is_dir())


def _from_files(path: Path) -> list[EvalTask]:
    """Build the tasks of a YAML file or of a folder of them; one without `task` is there for others to include."""
    if not path.exists():
        raise UsageError(f"no task folder at {path}; expected a folder of YAML tasks, one YAML file, or a task's name")
    files = sorted(file for file in (path.rglob("*.yaml") if path.is_dir() else [path]) if file.is_file())
    if not files:
        found = "has no .yaml file" if path.is_dir() else "is a FIFO, a socket or a device"
        raise UsageError(f"{path} {found}; expected a folder of lm-eval tasks")
    for file in files:  # lm-eval runs the functions on loading the task
        if SHIPPED not in file.parents and "!function" in file.read_text(encoding="utf-8", errors="replace"):
            print(f"running the Python code that {file} names with !function", file=sys.stderr)
    configs = {file: _read_yaml(file) for file in files}
    tasks = {file: config for file, config in configs.items() if isinstance(config.get("task"), str)}
    if not tasks:
        raise DataError(f"{files[0]} names no task; expected `task: NAME` in it")
    return [_eval_task(config["task"], [_build(file, config)], chat_template=True) for file, config in tasks.items()]


def _read_yaml(file: Path) -> dict[str, Any]:
    """Return a task's YAML with its includes resolved and its functions imported.

    Upstream: `lm_eval.tasks._yaml_loader.load_yaml` (lm-eval 0.4.13) is private, and the public TaskManager reads
    relative data files from the working directory. Can go when
    `test_lm_eval_still_reads_relative_data_from_the_working_directory` fails.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config: dict[str, Any] = load_yaml(file)
    except Exception as error:  # of YAML, of a missing include, or of whatever a `!function` imports
        raise DataError(f"{file} cannot be read as a task: {reason(error)}") from error
    return config


def reason(error: Exception) -> str:
    """Return what an error of another library says, on one line and not endless."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _build(file: Path, config: Mapping[str, Any]) -> ConfigurableTask:
    from lm_eval.api.task import ConfigurableTask

    _check_metrics(config, str(file))
    own = {name: value for name, value in config.items() if name not in ("tag", "group")}
    if arguments := own.get("dataset_kwargs"):
        local = {name: _resolved(file, arguments[name]) for name in ("data_files", "data_dir") if name in arguments}
        own["dataset_kwargs"] = {**arguments, **local}
    try:
        return ConfigurableTask(config=own)
    except Exception as error:  # lm-eval fails with whatever its first document fails with
        _check_lines((own.get("dataset_kwargs") or {}).get("data_files"))
        if isinstance(error, IndexError) and "size 0" in str(error):  # of the first document
            raise DataError(f"{file} has no documents; expected one or more in its test split") from error
        raise DataError(f"{file}: lm-eval cannot make a task of it: {reason(error)}") from error


def _resolved(file: Path, value: Any) -> Any:
    """Make paths start from the YAML's folder; lm-eval's start from the working directory."""
    if isinstance(value, Mapping):
        return {name: _resolved(file, part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolved(file, part) for part in value]
    if "://" in str(value):
        return value
    found = file.resolve().parent / str(value)
    if not found.exists() and not any(found.parent.glob(found.name)):
        raise DataError(f"{file} names the data {value}, which is not at {found}. Paths start from the YAML's folder")
    return str(found)


def _check_lines(data_files: Any) -> None:
    """Name the line of a JSONL file that is broken, which datasets does not; do nothing where all can be read."""
    parts = data_files.values() if isinstance(data_files, Mapping) else data_files
    if isinstance(data_files, str):
        if data_files.endswith(".jsonl") and Path(data_files).is_file():  # no pattern, no address
            deque(read_rows(data_files), maxlen=0)
        return
    for part in parts or ():
        _check_lines(part)


def _standard_tasks(names: Sequence[str]) -> TaskManager | None:
    """Return an index of lm-eval's own tasks with these names; indexing all 14,000 files takes 10 s.

    Raises:
        UsageError: for a name that lm-eval does not have.
    """
    if not names:
        return None
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders, listed = _names_in(root)
    known = {*folders, *listed}
    for name in names:
        if name not in known:
            hint = nearest(name, [*OWN, "openllm", *sorted(known)])
            raise UsageError(
                f"unknown task {name!r}.{hint} Ours are {', '.join(OWN)}; lm-eval lists its own: lm-eval ls tasks"
            )
    needed = {folders.get(name, "benchmarks") for name in names}
    if "benchmarks" in needed:  # its groups name tasks of other folders
        return lm_eval.tasks.TaskManager()
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / folder for folder in sorted(needed)])


def _names_in(root: Path) -> tuple[dict[str, str], set[str]]:
    """Return the names that lm-eval's files define, each with its folder, and those that they list.

    Upstream: reads the YAML files in the folder of `lm_eval.tasks` (lm-eval 0.4.13), since its own index of all
    names takes 9 s instead of 1.5 s. Can go when `TaskManager()` is as fast.
    """
    folders: dict[str, str] = {}
    listed: set[str] = set()
    for file in sorted(root.rglob("*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        for name in _DEFINED.findall(text):
            folders.setdefault(name, file.relative_to(root).parts[0])  # lm-eval also takes the first of two
        listed |= set(_LISTED.findall(text))
    return folders, listed


def _from_lm_eval(name: str, manager: TaskManager) -> list[EvalTask]:
    """Load one of lm-eval's tasks or groups; a group whose parts are scored alike is one task with subjects."""
    try:
        parts = list(manager.load([name])["tasks"].values())
    except Exception as error:  # the hub's, the dataset's or a task's own
        raise DataError(
            f"the task {name} cannot be loaded: {reason(error)}. Its data come from the hub unless HF_HOME has them"
        ) from error
    shots, metric = LEADERBOARD.get(name, (None, None))
    for part in parts:
        _check_metrics(vars(part.config), part.task_name)
        if shots is not None and part.config.num_fewshot != 0:  # 0 in the YAML is the task's own prompt
            part.set_config("num_fewshot", shots)
    whole = _eval_task(name, parts, chat_template=False, metric=metric)
    alone = [_eval_task(part.task_name, [part], chat_template=False) for part in parts]
    alike = len({(task.metric, task.parts[0].OUTPUT_TYPE) for task in alone}) == 1
    return [whole] if alike else alone


def _eval_task(name: str, parts: list[ConfigurableTask], *, chat_template: bool, metric: str | None = None) -> EvalTask:
    _compile_templates_once()
    config = parts[0].config
    if config.num_fewshot is None:
        for part in parts:
            part.set_config("num_fewshot", 0)
    listed = [str(entry["metric"]) for entry in config.metric_list or ()]
    if config.output_type == "loglikelihood_rolling":
        return EvalTask(name, tuple(parts), "bits_per_byte", "bits_per_byte", chat_template=False)
    metric = metric or (listed or list(parts[0].aggregation()))[0]
    right_or_wrong = config.process_results is None and metric.split(",")[0] in ("acc", "acc_norm", "exact_match")
    return EvalTask(name, tuple(parts), metric, "accuracy" if right_or_wrong else "score", chat_template)


def _compile_templates_once() -> None:
    """Keep the templates that lm-eval compiles.

    Upstream: `lm_eval.utils.apply_template` (lm-eval 0.4.13) compiles a template for every document that it renders,
    several times each. Can go when `test_lm_eval_still_compiles_a_template_for_every_document` fails.
    """
    from lm_eval.utils import env

    if not hasattr(env.from_string, "cache_info"):
        vars(env)["from_string"] = functools.lru_cache(env.from_string)


def _check_metrics(config: Mapping[str, Any], where: str) -> None:
    """Reject a metric that lm-eval does not know: lm-eval fails only after every document has been answered."""
    import lm_eval.api.metrics  # noqa: F401 - fills the registries
    from lm_eval.api.registry import aggregation_registry, metric_registry

    if config.get("process_results") is not None:
        return  # its own code names and computes them
    for entry in config.get("metric_list") or ():
        name, aggregation = entry.get("metric"), entry.get("aggregation")
        if isinstance(name, str) and not entry.get("hf_evaluate") and name not in metric_registry:
            raise UsageError(
                f"{where}: lm-eval has no metric {name!r}.{nearest(name, metric_registry)} "
                f"It has {', '.join(sorted(metric_registry))}"
            )
        if isinstance(aggregation, str) and aggregation not in aggregation_registry:
            raise UsageError(
                f"{where}: lm-eval has no aggregation {aggregation!r}.{nearest(aggregation, aggregation_registry)}"
            )
