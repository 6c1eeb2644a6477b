"""The SFTTrainer of a run: it counts its tokens, refuses a NaN, and goes on after a fault as if there had been none."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from qlora_recipes.base.adapters import ADAPTER, WEIGHTS
from qlora_recipes.data.encoding import IGNORED
from qlora_recipes.data.prepare import Conversation
from qlora_recipes.errors import RunFolderError
from qlora_recipes.preflight.probes import preserving_state
from qlora_recipes.run import checkpoints
from qlora_recipes.run.files import write_json
from qlora_recipes.run.signals import Stopped, StopSignals
from qlora_recipes.training import non_finite

if TYPE_CHECKING:
    from transformers.trainer_utils import TrainOutput


@dataclass
class TokenCount:
    """What this process has run through the model."""

    positions: int = 0
    real: int = 0
    supervised: int = 0
    micro_batches: int = 0

    def add(self, inputs: Mapping[str, Any]) -> None:
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        self.micro_batches += 1
        self.positions += ids.numel()
        self.real += ids.numel() if mask is None else int(mask.sum())
        self.supervised += int((inputs["labels"] != IGNORED).sum())


class _EvaluationStopped(Exception):
    """A signal came while held-out rows were scored."""


class RunTrainer(SFTTrainer):
    """SFTTrainer with checkpoints that are whole or do not count, from which a run goes on to the same bits.

    Beyond what upstream keeps, a checkpoint holds the token counts, the figures gathered since the last logged step
    and the time spent; an evaluation that a fault prevented is made up for before the next step.
    """

    def __init__(self, *args: Any, rows: Sequence[Conversation], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = TokenCount()
        self.signals = StopSignals()
        """Those that the caller listens to; nobody's until it says so."""
        self.stopping = False
        self.rows = rows
        """What is trained on, to be named when it goes wrong."""
        self.seconds_before = 0.0
        """Time that earlier sessions spent on the steps that are kept."""
        self._continued: Path | None = None
        self._aside: Path | None = None
        self._step_batches: list[Mapping[str, Any]] = []
        self._overflows = 0
        self.add_callback(_Faults(self))

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._continued = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # ---- A step ----

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.count.add(inputs)
        self._step_batches.append({name: inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")})
        loss = super().training_step(model, inputs, *args, **kwargs)
        # With several processes one of them alone would raise, and leave the others waiting; its gradient reaches all.
        if self.accelerator.num_processes == 1 and not torch.isfinite(loss):
            self._refuse("loss", float(loss))
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        finite = norm is None or bool(torch.isfinite(torch.as_tensor(norm)).all())  # DeepSpeed may have none to give
        self._overflows = 0 if finite else self._overflows + 1
        if self._overflows > (non_finite.SCALER_TRIES if self.accelerator.scaler is not None else 0):
            self._refuse("gradient norm", float(norm))
        self._step_batches.clear()
        return norm

    def _refuse(self, what: str, value: float) -> None:
        step = self.state.global_step + 1
        non_finite.refuse(what, value, step, self._step_batches, self.rows, self.processing_class)

    # ---- Stopping ----

    def check_signals(self) -> bool:
        """Return whether any process was told to stop; all processes must ask together."""
        self.stopping = self.signals.received is not None
        if self.accelerator.num_processes > 1:
            told = torch.tensor([int(self.stopping)], device=self.args.device)
            self.stopping = bool(self.accelerator.reduce(told, "sum").item())
        return self.stopping

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: torch.nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except _EvaluationStopped:
            self._save_checkpoint(model, trial)
        if self.stopping:
            raise self.stopped()

    def stopped(self) -> Stopped:
        """Return what ends the run: the signal, and the step that was saved, if one was."""
        return Stopped(self.signals.received or signal.SIGTERM, self.state.global_step or None)

    # ---- Saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        if checkpoints.Checkpoint(folder / name).fault() is None:
            return  # of the same step, and so of the same bits
        best = self.state.best_model_checkpoint
        if self.args.should_save:
            checkpoints.prepare(folder)
        self.accelerator.wait_for_everyone()
        self._aside = folder / checkpoints.WRITING
        try:
            super()._save_checkpoint(model, trial)
            write_json(self._aside / name / self._progress_file, self._progress())
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.publish(folder / checkpoints.WRITING / name, folder)
        self.state.best_model_checkpoint = self._best(folder) or best
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoints.rotate(folder, self.args.save_total_limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def _best(self, folder: Path) -> str | None:
        """Return the checkpoint of the step that scored best, where there is one."""
        path = folder / f"checkpoint-{self.state.best_global_step}"
        return str(path) if path.is_dir() else None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save adapter and tokenizer, and not upstream's training_args.bin: a pickle that can hold the hub token."""
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card into the checkpoints; the run's own is written with its receipt."""

    # ---- Going on ----

    @property
    def _progress_file(self) -> str:
        return f"progress-{self.args.process_index}.json"

    def _progress(self) -> dict[str, Any]:
        """Return what upstream forgets between two sessions."""
        return {
            "count": asdict(self.count),
            "seconds": self.seconds,
            "loss_since_log": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "metrics_since_log": dict(self._metrics["train"]),
            "tokens": self._total_train_tokens,
        }

    @property
    def seconds(self) -> float:
        """Time spent on the steps so far, over all sessions."""
        return self.seconds_before + time.monotonic() - self._began

    def go_on(self) -> None:
        """Start the clock, and take up what the checkpoint holds."""
        self._began = time.monotonic()
        if not self._continued:
            return
        self.args.eval_on_start = False  # this is not the start
        progress = json.loads((self._continued / self._progress_file).read_text(encoding="utf-8"))
        self.count = TokenCount(**progress["count"])
        self.seconds_before = progress["seconds"]
        self._tr_loss += progress["loss_since_log"]
        self._globalstep_last_logged = progress["last_logged_step"]
        self._metrics["train"].update(progress["metrics_since_log"])
        self._total_train_tokens = progress["tokens"]
        if self.state.best_model_checkpoint:  # as it was called where it was written
            best = Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._make_up_evaluation()
        if self.state.global_step >= self.state.max_steps or self._out_of_patience():
            self.control.should_training_stop = True  # nothing is left; upstream would go one step further
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any) -> TrainOutput:
        self._make_up_evaluation()
        if self.check_signals():
            self._save_checkpoint(self.model, None)
            raise self.stopped()
        self.signals.loop_runs = False
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # upstream deletes without looking
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def _make_up_evaluation(self) -> None:
        """Score the held-out rows where a fault came between a step and its evaluation."""
        if self._continued and self._evaluation_due():
            try:
                self._determine_best_metric(self._evaluate(None, None), None)
            except _EvaluationStopped:
                raise self.stopped() from None
        self._continued = None

    def _evaluation_due(self) -> bool:
        step, epoch, strategy = self.state.global_step, self.state.epoch or 0, self.args.eval_strategy
        scored = {entry["step"] for entry in self.state.log_history if "eval_loss" in entry}
        if strategy == "no" or step in scored:
            return False
        last = step >= self.state.max_steps
        if strategy == "steps":
            return step >= self.args.eval_delay and (last or step % self.state.eval_steps == 0)
        return epoch >= self.args.eval_delay and (last or float(epoch).is_integer())

    def _out_of_patience(self) -> bool:
        stoppers = [call for call in self.callback_handler.callbacks if isinstance(call, EarlyStoppingCallback)]
        return any(call.early_stopping_patience_counter >= call.early_stopping_patience for call in stoppers)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the held-out rows without moving the random numbers that training draws."""
        with preserving_state(None):
            return super().evaluate(*args, **kwargs)

    def _load_best_model(self) -> None:
        best = checkpoints.Checkpoint(Path(self.state.best_model_checkpoint))
        if fault := best.fault():
            raise RunFolderError(
                f"{best.path} has the best held-out loss and is damaged: {fault}. Restore it from a copy and give "
                "--resume, or train again with --overwrite"
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:  # upstream's way freezes the adapter, which is then counted as nothing
            set_peft_model_state_dict(self.model, load_file(best.path / WEIGHTS), adapter_name=ADAPTER)


class _Faults(TrainerCallback):
    """Looks for a signal where a run can stop, and takes up a checkpoint where one is gone on from."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.trainer.go_on()
        self.trainer.signals.loop_runs = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self.trainer.check_signals():
            control.should_save, control.should_evaluate = True, False

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        if self.trainer.check_signals():
            raise _EvaluationStopped if state.global_step else self.trainer.stopped()
