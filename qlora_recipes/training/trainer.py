"""The SFTTrainer of a run: counts its tokens, refuses a NaN, and resumes after a fault as if there had been none.

docs/trainer.md explains every method that replaces one of upstream; base/upstream.md lists the private names.
Knows nothing of recipes.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl, set_seed
from trl import DPOTrainer, SFTTrainer

from qlora_recipes.base.adapters import ADAPTER, adapter_tensors, set_weights
from qlora_recipes.data.arrow_rows import Conversation
from qlora_recipes.errors import RunFolderError
from qlora_recipes.kernels.attention import packed_batch
from qlora_recipes.preflight.probes import preserving_state
from qlora_recipes.run import checkpoints
from qlora_recipes.run.files import read_record, write_json
from qlora_recipes.run.signals import Stopped, StopSignals
from qlora_recipes.training import non_finite
from qlora_recipes.training.carried_over import CarriedOver, of_other_processes
from qlora_recipes.training.token_count import TokenCount

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.trainer_utils import TrainOutput


class _EvaluationStopped(Exception):
    """A signal arrived while held-out rows were scored."""


class ExactResume(Trainer):
    """What a trainer of TRL lacks: checkpoints that are whole or do not count, and give the same bits when resumed.

    In addition to what upstream saves, a checkpoint holds the token counts, the metrics gathered since the last logged
    step and the time spent. An evaluation that a fault prevented is done before the next step.
    """

    _metrics: Any  # of TRL's trainers, each with another type
    _total_train_tokens: int

    def __init__(
        self, *args: Any, rows: Sequence[Conversation], loraplus_lr_ratio: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tokenizer = cast("PreTrainedTokenizerBase", self.processing_class)
        self.count = TokenCount()
        self.signals = StopSignals()
        """The caller puts its own here, which listens to signals; this one does not."""
        self.stopping = False
        """Whether any process was told to stop."""
        self.rows = rows
        """The training rows, which an error names."""
        self.loraplus_lr_ratio = loraplus_lr_ratio
        """LoRA+ (arXiv 2402.12354): learning rate of every B as a multiple of that of every A; None for one rate."""
        self._continued: Path | None = None
        """Checkpoint that is resumed, until a step or an evaluation is about to begin."""
        self._aside: Path | None = None
        self.skipped_steps = 0
        """Steps that float16's loss scaler did not apply, since their gradients overflowed."""
        self._skipped_in_a_row = 0
        self._overflowed = False
        self._step_batches: list[Mapping[str, Any]] = []
        self._step_losses: list[torch.Tensor] = []
        self.add_callback(_Faults(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._continued = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.loraplus_lr_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        adapted = cast(PeftModel, self.model if model is None else model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, cast("PreTrainedModel", adapted))
        rates = {"loraplus_lr_ratio": self.loraplus_lr_ratio, "loraplus_weight_decay": self.args.weight_decay}
        self.optimizer = create_loraplus_optimizer(adapted, kind, **rates, **options)
        return self.optimizer

    # ---- A step ----

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.count.add(inputs)
        self._step_batches.append({name: inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids")})
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_losses.append(loss)
        return loss

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with packed_batch(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def probe_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return the loss that trains, of one batch and this process alone, without counting or logging it."""
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        vars(self.accelerator)["gather_for_metrics"] = lambda figure, *_: figure
        try:
            with self.compute_loss_context_manager():
                return cast(torch.Tensor, self.compute_loss(cast(torch.nn.Module, self.model), dict(inputs)))
        finally:
            del vars(self.accelerator)["gather_for_metrics"]
            self._metrics, self._total_train_tokens = metrics, tokens

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float | None:
        """Read the losses and the gradient norm of a step, once: for each reading the GPU runs dry."""
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[no-untyped-call]  # transformers
        loss = torch.stack(self._step_losses).sum()
        self._step_losses.clear()
        if self.accelerator.num_processes > 1:  # or one alone would raise, and leave the others waiting
            loss = self.accelerator.reduce(loss, "sum")
        if not math.isfinite(loss):
            self._refuse(f"the loss of step {self.state.global_step + 1} is {float(loss)}, expected a finite number")
        norm = None if norm is None else float(norm)
        self._overflowed = norm is not None and not math.isfinite(norm)
        if self._overflowed and not self.args.fp16:
            self._refuse(f"the gradient norm of step {self.state.global_step + 1} is {norm}, expected a finite number")
        return None if self._overflowed else norm

    def count_skipped(self) -> None:
        """Count a step that float16's loss scaler skipped, and end the run where it skips too many.

        Fused optimizers, the default among them, skip it themselves, and accelerate 1.15 takes it for done.
        """
        skipped = self._overflowed or self.accelerator.optimizer_step_was_skipped
        self.skipped_steps += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        steps = self.state.global_step + 1
        if fault := non_finite.too_many_skipped(self._skipped_in_a_row, self.skipped_steps, steps):
            self._refuse(fault)
        self._step_batches.clear()

    def _refuse(self, fault: str) -> None:
        non_finite.refuse(fault, self._step_batches, self.rows, self.tokenizer, float16=self.args.fp16)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.args.fp16:
            logs["skipped_steps"] = self.skipped_steps
        super().log(logs, *args, **kwargs)

    # ---- Stopping ----

    def check_signals(self) -> bool:
        """Return whether any process was told to stop; all processes must call this together."""
        self.stopping = self.signals.received is not None
        if self.accelerator.num_processes > 1:
            told = torch.tensor([int(self.stopping)], device=self.args.device)
            self.stopping = bool(self.accelerator.reduce(told, "sum").item())
        return self.stopping

    def stopped(self) -> Stopped:
        """Return what ends the run: the signal, and the step that was saved, if one was."""
        return Stopped(self.signals.received or signal.SIGTERM, self.state.global_step or None)

    # ---- Saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside) if self._aside else super()._get_output_dir(trial)

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: torch.nn.Module | None, trial: Any) -> None:
        folder, name = self._folder, f"checkpoint-{self.state.global_step}"
        if checkpoints.Checkpoint(folder / name).fault() is None:
            return  # of the same step, and so with the same bits
        best = self.state.best_model_checkpoint
        if self.args.should_save:
            checkpoints.prepare(folder)
        self.accelerator.wait_for_everyone()
        self._aside = folder / checkpoints.WRITING
        try:
            super()._save_checkpoint(cast(torch.nn.Module, model), trial)
            file = checkpoints.PROGRESS.format(self.args.process_index)
            write_json(self._aside / name / file, asdict(self._progress()))
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.publish(folder / checkpoints.WRITING / name, folder)
        self.accelerator.wait_for_everyone()  # or the others would not see yet that the best is this one
        scored_best = folder / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = best = str(scored_best) if scored_best.is_dir() else best
        if self.args.should_save:
            checkpoints.rotate(folder, self.args.save_total_limit, Path(best) if best else None)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gather the adapter alone where FSDP divides it; upstream would gather the base on one process, too."""
        if self.is_fsdp_enabled:
            self._save(output_dir, state_dict=dict(adapter_tensors(cast(PeftModel, self.model))))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save adapter and tokenizer, but not upstream's training_args.bin: a pickle that can hold the hub token."""
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            # By default PEFT compares the vocabulary with what the hub holds on `main` by now, and may save more.
            # The reference of preferences is the start, which is made again from it.
            own = {"selected_adapters": [ADAPTER], "save_embedding_layers": False}
            model.save_pretrained(output_dir, state_dict=state_dict, **own)
            self.tokenizer.save_pretrained(str(output_dir))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card into checkpoints; the run writes its own with its receipt."""

    # ---- Resuming ----

    def _progress(self) -> CarriedOver:
        return CarriedOver(
            count=self.count.read(),
            seconds=self.seconds,
            loss_since_log=self._tr_loss.item(),
            loss_logged=self._total_loss_scalar,
            last_logged_step=self._globalstep_last_logged,
            metrics_since_log=dict(self._metrics["train"]),
            tokens=self._total_train_tokens,
            skipped_steps=self.skipped_steps,
        )

    @property
    def seconds(self) -> float:
        """Time spent on the steps so far, over all sessions."""
        return time.monotonic() - self._began

    def begin(self) -> None:
        """Start the clock, and restore what upstream does not restore from the checkpoint."""
        self._began = time.monotonic()
        if not self._continued:
            return
        self.args.eval_on_start = False  # this is not the start
        fix = "Remove the checkpoint to resume from the one before it"
        files, rank = checkpoints.Checkpoint(self._continued).progress, self.args.process_index
        if len(files) == self.args.world_size:
            progress = read_record(files[rank], CarriedOver, fix=fix)
        else:
            progress = of_other_processes([read_record(file, CarriedOver, fix=fix) for file in files], rank)
        self.count = progress.count
        self._began -= progress.seconds  # of earlier sessions, on the steps that were kept
        self._tr_loss += progress.loss_since_log
        self._total_loss_scalar = progress.loss_logged
        self._initial_global_step = 0  # the mean loss and speed in the last line are those of all sessions
        self._globalstep_last_logged = progress.last_logged_step
        self._metrics["train"].update(progress.metrics_since_log)
        self._total_train_tokens = progress.tokens
        self.skipped_steps = progress.skipped_steps
        if self.state.best_model_checkpoint:  # a path in the folder where it was written
            best = self._folder / Path(self.state.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random numbers of this process; another number of processes begins with new ones of each rank."""
        if checkpoint is None or len(checkpoints.Checkpoint(Path(checkpoint)).progress) == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:
            drawn = np.random.SeedSequence([self.args.seed, self.state.global_step, self.args.process_index])
            set_seed(int(drawn.generate_state(1)[0]))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._make_up_evaluation()
        stoppers = [call for call in self.callback_handler.callbacks if isinstance(call, EarlyStoppingCallback)]
        impatient = any(call.early_stopping_patience_counter >= call.early_stopping_patience for call in stoppers)
        if self.state.global_step >= self.state.max_steps or impatient:
            self.control.should_training_stop = True  # nothing is left to do; upstream would take one more step
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]  # transformers

    def _finalize_training(self, trial: Any, samples: float, start_time: float) -> TrainOutput:
        self._make_up_evaluation()
        if self.check_signals():
            self._save_checkpoint(self.model, None)
            raise self.stopped()
        self.signals.loop_runs = False
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # upstream deletes without checking
        try:
            began = time.time() - self.seconds
            output = super()._finalize_training(trial, samples, began)  # type: ignore[no-untyped-call]  # transformers
            return cast("TrainOutput", output)
        finally:
            self.args.save_total_limit = limit

    def _make_up_evaluation(self) -> None:
        """Score the held-out rows if a fault came between a step and its evaluation."""
        if self._continued and self._evaluation_due():
            self._determine_best_metric(self._evaluate(None, None), None)
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the held-out rows without changing the random numbers that training draws.

        A signal meanwhile saves the step, unless that is the one resumed from, and ends the run.
        """
        try:
            with preserving_state(None):
                return super().evaluate(*args, **kwargs)
        except _EvaluationStopped:
            if self.state.global_step and not self._continued:
                self._save_checkpoint(self.model, None)
            raise self.stopped() from None

    def _load_best_model(self) -> None:
        best = checkpoints.Checkpoint(Path(str(self.state.best_model_checkpoint)))
        if fault := best.fault():
            raise RunFolderError(
                f"{best.path} has the best held-out loss and is damaged: {fault}. Restore it from a copy and give "
                "--resume, or train again with --overwrite"
            )
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:  # upstream freezes the adapter, whose weights would then count as 0
            set_weights(cast(PeftModel, self.model), best.path)


class RunTrainer(ExactResume, SFTTrainer):
    """SFTTrainer, with all that `ExactResume` adds."""


class PreferenceTrainer(ExactResume, DPOTrainer):
    """DPOTrainer on rows that are encoded already, with all that `ExactResume` adds.

    Its reference is a copy of the adapter as it started.
    """

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


class _Faults(TrainerCallback):
    """Looks for a signal wherever a run can stop, and restores a checkpoint that is resumed."""

    def __init__(self, trainer: ExactResume) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kw: Any) -> None:
        self.trainer.begin()
        self.trainer.signals.loop_runs = True

    def on_optimizer_step(self, args: Any, state: Any, control: TrainerControl, **kw: Any) -> None:
        self.trainer.count_skipped()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kw: Any) -> None:
        if self.trainer.check_signals():
            control.should_save, control.should_evaluate = True, False

    def on_save(self, args: Any, state: Any, control: TrainerControl, **kw: Any) -> None:
        if self.trainer.stopping:
            raise self.trainer.stopped()

    def on_prediction_step(self, args: Any, state: Any, control: TrainerControl, **kw: Any) -> None:
        if self.trainer.check_signals():
            raise _EvaluationStopped
