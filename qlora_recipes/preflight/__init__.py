"""What is checked of a run, and when: the lists below are the preflight.

A check is a function of the run at its stage (stages.py) that returns a `Check`; its own name is the check's.
`fail_unless` and `warn_unless` make one. A recipe adds its own with `checks = (my_check,)`; they are made before
training, on a `Run`. A check that fails before training stops the run before anything is written; one that fails
afterwards leaves a folder without a receipt, and in it what was trained, in `unproven`.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_recipes.preflight import (
    gradient,
    launch,
    loss,
    machine,
    preferences,
    prompts,
    rows,
    tokens,
    trained,
    weights,
)
from qlora_recipes.preflight.checks import (
    CheckFunction,
    check_names,
    fail_unless,
    passed,
    print_checks,
    print_groups,
    refuse_failed,
    run_checks,
    tally,
    untested,
    warn_unless,
)
from qlora_recipes.recipe import Recipe
from qlora_recipes.stages import Run

BEFORE_LOADING: Sequence[CheckFunction] = (
    machine.versions,
    machine.writable_folder,
    machine.hub,
    machine.memory_free,
    rows.rows_dropped,
    rows.columns_unread,
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
"""Made on a run whose rows are prepared: what can be refused before minutes go into loading a base."""

BEFORE_TRAINING: Sequence[CheckFunction] = (
    tokens.embedding_covers_ids,
    tokens.context_length,
    tokens.generation_stops,
    loss.trainer_keeps_the_loss,
    launch.steps,
    launch.num_processes,
    launch.distributed_type,
    launch.device,
    launch.mixed_precision,
    machine.disk_space,
    weights.quantized_linears,
    machine.base_bytes,
    weights.checkpoint_names,
    weights.quantization_error,
    weights.base_dtype,
    weights.compute_dtype,
    weights.adapter_dtype,
    weights.optimizer_state_dtype,
    gradient.gradient,
    gradient.gradient_after_evaluation,
    gradient.starting_loss,
    gradient.adapter_starts_at_base,
    gradient.packing_leak,
)
"""Made on a run with its model and trainer: everything that the first step needs is there."""

AFTER_TRAINING: Sequence[CheckFunction] = (
    trained.losses_finite,
    trained.adapter_finite,
    trained.adapter_changed,
    trained.loss_fell,
    trained.optimizer_state_kept,
    trained.base_unchanged,
    machine.peak_as_planned,
)
"""Made on a trained run."""

AFTER_SAVING: Sequence[CheckFunction] = (
    trained.adapter_reloads,
    trained.tokenizer_reloads,
    trained.answers_end,
)
"""Made of what was saved of a trained run, which becomes its adapter when all of them pass."""


OF_PREFERENCES: Sequence[CheckFunction] = (preferences.answers_alone, preferences.reference_is_the_start)
"""Made with those before training where preferences are learned."""


def before_training(recipe: type[Recipe]) -> list[CheckFunction]:
    """Return the checks of a run with its model and trainer: ours, and the recipe's own."""
    return [*BEFORE_TRAINING, *(OF_PREFERENCES if recipe.method == "dpo" else ()), *recipe.checks]


def after_training(recipe: type[Recipe]) -> list[CheckFunction]:
    """Return the checks of a trained run."""
    return [*AFTER_TRAINING, *((preferences.margins_rise,) if recipe.method == "dpo" else ())]


GROUPS = {
    check.__name__: check.__module__.rpartition(".")[2]
    for checks in (
        BEFORE_LOADING,
        BEFORE_TRAINING,
        OF_PREFERENCES,
        AFTER_TRAINING,
        (preferences.margins_rise,),
        AFTER_SAVING,
    )
    for check in checks
}
"""Check to the file that it is in, which is what it looks at."""


def names(recipe: type[Recipe]) -> list[str]:
    """Return the name of every check that a run of the recipe makes."""
    lists = (BEFORE_LOADING, before_training(recipe), after_training(recipe), AFTER_SAVING)
    return [check.__name__ for checks in lists for check in checks]


__all__ = [
    "AFTER_SAVING",
    "AFTER_TRAINING",
    "BEFORE_LOADING",
    "BEFORE_TRAINING",
    "GROUPS",
    "OF_PREFERENCES",
    "CheckFunction",
    "Run",
    "after_training",
    "before_training",
    "check_names",
    "fail_unless",
    "names",
    "passed",
    "print_checks",
    "print_groups",
    "refuse_failed",
    "run_checks",
    "tally",
    "untested",
    "warn_unless",
]  # fmt: skip
