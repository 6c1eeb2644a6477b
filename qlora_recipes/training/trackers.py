"""The figures of a run for the trackers that follow its loss (`--report_to`), given to them before they close."""

from __future__ import annotations

from typing import Any, cast

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qlora_recipes.stages import Run
from qlora_recipes.training.accounting import describe_training
from qlora_recipes.training.trainer import RunTrainer


class RunFigures(TrainerCallback):
    """Logs the figures of the receipt under `run/` when training ends; no checks after it, which come later."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = cast(RunTrainer, self.run.trainer)
        training = describe_training(trainer)  # of all processes together
        data, base = self.run.data.receipt, self.run.base
        figures = {
            "rows_used": data.rows_used,
            "rows_held_out": data.rows_held_out,
            "rows_dropped": sum(data.rows_dropped.values()),
            "supervised_tokens": data.supervised_tokens,
            "base_bytes": base.bytes,
            "linears_quantized": base.quantized.found,
            "first_loss": training.first_loss,
            "final_loss": training.final_loss,
            "tokens_per_second": training.tokens_per_second,
            "seconds": training.seconds,
        }
        named = {f"run/{name}": value for name, value in figures.items()}
        for callback in trainer.callback_handler.callbacks:
            if type(callback) in INTEGRATION_TO_CALLBACK.values():
                callback.on_log(args, state, control, logs=named, **kwargs)


def add_run_figures(run: Run) -> None:
    """Have the trackers of a run told its figures, before their own end of training closes them."""
    if run.trainer.args.report_to:
        run.trainer.callback_handler.callbacks.insert(0, RunFigures(run))
