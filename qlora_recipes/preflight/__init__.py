"""What is checked of a run, and when: the lists below are the preflight.

A check is a function of the run that returns a `Check`; its own name is the check's. `fail_unless` and `warn_unless`
make one. A recipe adds checks of its own with `checks = (my_check,)`; they get a `ReadyRun`.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_recipes.preflight import (
    answers,
    budget,
    dtypes,
    gradient,
    launch,
    loss,
    machine,
    packing,
    prompts,
    rows,
    steps,
    storage,
    tokens,
    trained,
)
from qlora_recipes.preflight.running import CheckFunction, check_names, refuse_failed, run_checks
from qlora_recipes.preflight.table import print_checks, tally
from qlora_recipes.preflight.verdicts import fail_unless, passed, warn_unless
from qlora_recipes.recipe import Recipe
from qlora_recipes.stages import LoadedRun, ReadRun, ReadyRun, TrainedRun

BEFORE_LOADING: Sequence[CheckFunction] = (
    machine.versions,
    machine.writable_folder,
    machine.hub,
    budget.memory_free,
    rows.rows_dropped,
    rows.row_lengths,
    rows.duplicates,
    rows.short_answers,
    rows.held_out_rows,
    rows.contamination,
    loss.loss_is_the_answers,
    loss.rows_without_loss,
    loss.answers_cut,
    loss.end_of_turn,
    loss.beginning_of_text,
    prompts.template_agrees,
    prompts.spaces_as_pretrained,
    prompts.forged_turns,
    prompts.control_tokens,
    tokens.padding_token,
    tokens.unknown_tokens,
)
"""Made on a ReadRun: what can be refused before minutes go into loading a base."""

BEFORE_TRAINING: Sequence[CheckFunction] = (
    tokens.embedding_covers_ids,
    tokens.context_length,
    tokens.generation_stops,
    loss.trainer_keeps_the_loss,
    steps.steps,
    launch.processes,
    launch.wrapper,
    launch.device,
    launch.mixed_precision,
    machine.disk_space,
    storage.quantized_linears,
    budget.base_bytes,
    storage.checkpoint_names,
    storage.quantization_error,
    dtypes.base_dtype,
    dtypes.compute_dtype,
    dtypes.adapter_dtype,
    dtypes.optimizer_state_dtype,
    gradient.gradient,
    gradient.gradient_after_evaluation,
    gradient.starting_loss,
    gradient.adapter_starts_at_base,
    packing.packing_leak,
)
"""Made on a ReadyRun: everything that the first step needs is there."""

AFTER_TRAINING: Sequence[CheckFunction] = (
    trained.losses_finite,
    trained.adapter_finite,
    trained.adapter_changed,
    trained.loss_fell,
    trained.optimizer_state_kept,
    trained.base_unchanged,
    budget.peak_as_planned,
)
"""Made on a TrainedRun, before anything of it is saved."""

AFTER_SAVING: Sequence[CheckFunction] = (
    trained.adapter_reloads,
    trained.tokenizer_reloads,
    answers.answers_end,
)
"""Made on a TrainedRun whose adapter lies in its folder."""


def names(recipe: type[Recipe]) -> list[str]:
    """Return the name of every check that a run of the recipe makes."""
    stages = (BEFORE_LOADING, BEFORE_TRAINING, recipe.checks, AFTER_TRAINING, AFTER_SAVING)
    return [check.__name__ for stage in stages for check in stage]


__all__ = [
    "AFTER_SAVING",
    "AFTER_TRAINING",
    "BEFORE_LOADING",
    "BEFORE_TRAINING",
    "CheckFunction",
    "LoadedRun",
    "ReadRun",
    "ReadyRun",
    "TrainedRun",
    "check_names",
    "fail_unless",
    "names",
    "passed",
    "print_checks",
    "refuse_failed",
    "run_checks",
    "tally",
    "warn_unless",
]
