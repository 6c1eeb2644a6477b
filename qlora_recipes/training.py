"""Train one run: prepare, load, verify, hand it to SFTTrainer, verify what came out, write the run folder."""

from __future__ import annotations

import datetime
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import PartialState
from jinja2 import Environment, PackageLoader
from rich.console import Console
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from qlora_recipes import environment, preflight, repairs
from qlora_recipes.adapters import (
    ADAPTER,
    WEIGHTS,
    adapted_modules,
    adapter_sha256,
    adapter_tensors,
    attach,
)
from qlora_recipes.data import PreparedData, prepare
from qlora_recipes.encoding import IGNORED, ConversationEncoder
from qlora_recipes.errors import RunFolderError, UsageError
from qlora_recipes.loading import load_base, load_tokenizer
from qlora_recipes.preflight import LoadedRun, ReadRun, ReadyRun, TrainedRun
from qlora_recipes.progress import MetricsFile, ProgressDisplay, plot_loss
from qlora_recipes.runs import (
    AdapterReceipt,
    Check,
    MemoryReceipt,
    Receipt,
    RunFolder,
    TrainingReceipt,
    write_json,
)
from qlora_recipes.settings import Settings


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


class CountingTrainer(SFTTrainer):
    """SFTTrainer that counts the tokens it was given, padding apart."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.count = TokenCount()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.count.add(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def prepare_run(
    settings: Settings, *, skip_checks: Sequence[str] = (), console: Console | None = None
) -> tuple[ReadyRun, list[Check]]:
    """Do everything that comes before the first step, print what was checked of it, and write nothing.

    Raises:
        RecipesError: for anything that would make the run fail or mean something else than it says.
    """
    preflight.check_names(skip_checks, preflight.names(settings.recipe))
    read = read_run(settings)
    checks = preflight.run_checks(preflight.BEFORE_LOADING, read, skip_checks)
    _refuse_failed(checks, "Before loading the base", console)  # which takes minutes
    loaded = load_run(read)
    run = ReadyRun(**vars(loaded), trainer=build_trainer(loaded, RunFolder(settings.output_dir)))
    own = [*preflight.BEFORE_TRAINING, *settings.recipe.checks]
    checks += preflight.run_checks(own, run, skip_checks)
    _show(checks, "Before training", console)
    preflight.refuse_failed(checks)
    return run, checks


def read_run(settings: Settings) -> ReadRun:
    """Return a run with its rows read and encoded.

    Raises:
        RecipesError: when the tokenizer or the rows cannot be had, or no row can be used.
    """
    environment.share_threads(PartialState().num_processes)
    tokenizer = load_tokenizer(settings.spec, settings.model, settings.revision)
    encoder = ConversationEncoder(tokenizer, settings.spec.chat_template)
    return ReadRun(settings, tokenizer, encoder, prepare(settings, encoder))


def load_run(run: ReadRun) -> LoadedRun:
    """Return a run with its base loaded and counted, and a new adapter on it.

    Raises:
        RecipesError: when the base cannot be had, or is not stored as the precision says.
    """
    settings, device = run.settings, PartialState().device
    base, receipt, made = load_base(
        settings.model, settings.revision, settings.precision, settings.dtype, device=device
    )
    base_bytes = environment.peak_bytes(device.type)
    model = attach(base, settings.lora, settings.seed)
    made = [*run.tokenizer.repairs, *made]
    return LoadedRun(**vars(run), base=receipt, model=model, repairs=made, base_bytes=base_bytes)


def _refuse_failed(checks: Sequence[Check], title: str, console: Console | None) -> None:
    """Show the checks when one of them failed, and raise."""
    if any(check.verdict == "fail" for check in checks):
        _show(checks, title, console)
    preflight.refuse_failed(checks)


def _show(checks: Sequence[Check], title: str, console: Console | None) -> None:
    if PartialState().is_main_process:
        preflight.print_checks(checks, title, console or Console())


def train(
    settings: Settings,
    *,
    command: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    skip_checks: Sequence[str] = (),
    console: Console | None = None,
) -> RunFolder:
    """Train one run and return its folder, which has a receipt when and only when everything in it is proven.

    `skip_checks` names checks to go without; the receipt says which.

    Raises:
        RecipesError: for anything that would make the run fail or mean something else than it says.
    """
    started = datetime.datetime.now(datetime.UTC)
    folder = RunFolder(settings.output_dir)
    checkpoint = _newest_checkpoint(folder) if resume else None
    if not resume:
        folder.check_free(overwrite=overwrite)
    run, checks = prepare_run(settings, skip_checks=skip_checks, console=console)
    trainer = run.trainer
    main = PartialState().is_main_process
    if main and not resume:
        folder.claim(overwrite=overwrite)
    PartialState().wait_for_everyone()
    initial = adapter_sha256(run.model)
    before = {name: tensor.clone() for name, tensor in adapter_tensors(run.model)}
    if main:
        trainer.add_callback(ProgressDisplay(console or Console()))
        trainer.add_callback(MetricsFile(folder.metrics))
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    adapter = _describe_adapter(run, initial, before)
    training = _describe_training(trainer, outcome.metrics["train_runtime"])
    checks += _prove(TrainedRun(**vars(run), adapter=adapter, folder=folder), skip_checks, console)
    if main:
        adapter.bytes = (folder.adapter / WEIGHTS).stat().st_size
        receipt = Receipt(
            recipe=settings.name,
            precision=settings.precision.name,
            dtype=settings.dtype,
            seed=settings.seed,
            demo=settings.demo,
            settings={
                "lora": dict(settings.lora),
                "training": _public(settings.training),
                "eval_tasks": list(settings.recipe.eval_tasks),
            },
            command=list(command),
            versions=environment.versions(),
            git=environment.git_state(),
            started=started.isoformat(timespec="seconds"),
            data=run.data.receipt,
            template=run.data.template,
            base=run.base,
            adapter=adapter,
            training=training,
            memory=MemoryReceipt(
                peak_bytes=environment.peak_bytes(trainer.args.device.type), base_bytes=run.base_bytes
            ),
            repairs=run.repairs,
            checks=checks,
        )
        plot_loss(folder.metrics, folder.loss_plot, f"{settings.name}, {settings.precision.name}, seed {settings.seed}")
        _write_model_card(folder, receipt)
        write_json(
            folder.held_out,
            [{"place": row.place, "messages": row.messages} for row in run.data.held_out],
        )
        folder.write_receipt(receipt)
    PartialState().wait_for_everyone()
    return folder


def build_trainer(run: LoadedRun, folder: RunFolder) -> CountingTrainer:
    """Return the SFTTrainer of a run, with float32 adapter weights whatever the base."""
    held_out = run.data.held_out if run.settings.training.get("eval_strategy", "no") != "no" else None
    with (
        repairs.float32_adapter(run.model) as cast,
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory() as aside,  # the Trainer makes its output folder at once; nothing is written yet
    ):
        # Raised for every model that TRL did not load itself; the loss mask is ours and is counted.
        warnings.filterwarnings("ignore", message=".*You passed `model_init_kwargs`.*")
        trainer = CountingTrainer(
            model=run.model,
            args=_sft_config(run.settings, aside),
            train_dataset=PreparedData.dataset(run.data.train),
            eval_dataset=PreparedData.dataset(held_out) if held_out else None,
            processing_class=run.tokenizer,
        )
    trainer.args.output_dir = str(folder.checkpoints)
    if cast:
        run.repairs.append("float32_adapter")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _sft_config(settings: Settings, folder: str) -> SFTConfig:
    """Return the recipe's SFTConfig fields, and those that follow from other choices."""
    try:
        return SFTConfig(
            **settings.training,
            output_dir=folder,
            bf16=settings.dtype == "bfloat16",
            fp16=settings.dtype == "float16",
            use_cpu=PartialState().device.type == "cpu",
            disable_tqdm=True,  # the display is ours
            logging_nan_inf_filter=False,  # or a NaN is logged as a loss of 0.0
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"SFTConfig refuses these settings: {error}") from error


def _newest_checkpoint(folder: RunFolder) -> str:
    from transformers.trainer_utils import get_last_checkpoint

    newest = get_last_checkpoint(str(folder.checkpoints)) if folder.checkpoints.is_dir() else None
    if newest is None:
        raise RunFolderError(
            f"{folder.path} has no checkpoint to go on from. Train with --save_strategy steps --save_steps N, "
            "or leave --resume out"
        )
    return newest


def _describe_adapter(run: ReadyRun, initial: str, before: Mapping[str, torch.Tensor]) -> AdapterReceipt:
    after = dict(adapter_tensors(run.model))
    modules = adapted_modules(run.model)
    return AdapterReceipt(
        targets=sorted({name.rsplit(".")[-1] for name in modules}),
        modules=len(modules),
        parameters=sum(tensor.numel() for tensor in after.values()),
        dtype=", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in after.values()})),
        initial_sha256=initial,
        final_sha256=adapter_sha256(run.model),
        all_finite=all(bool(torch.isfinite(tensor).all()) for tensor in after.values()),
        unchanged=sorted(name for name, tensor in after.items() if torch.equal(tensor, before[name])),
        bytes=0,
    )


def _prove(run: TrainedRun, skip_checks: Sequence[str], console: Console | None) -> list[Check]:
    """Check what was trained, save it, and check what was saved; raises where one fails, and no receipt is written."""
    checks = preflight.run_checks(preflight.AFTER_TRAINING, run, skip_checks)
    _refuse_failed(checks, "After training", console)
    _save_adapter(run.trainer, run.folder)
    PartialState().wait_for_everyone()
    checks += preflight.run_checks(preflight.AFTER_SAVING, run, skip_checks)
    _show(checks, "After training", console)
    preflight.refuse_failed(checks)
    return checks


def _describe_training(trainer: CountingTrainer, seconds: float) -> TrainingReceipt:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tail = losses[-max(1, len(losses) // 10) :]
    count, total = trainer.count, _over_processes(trainer)
    return TrainingReceipt(
        steps=trainer.state.global_step,
        micro_batches=count.micro_batches,
        epochs=float(trainer.state.epoch or 0),
        first_loss=losses[0],
        final_loss=sum(tail) / len(tail),
        tokens=total.real,
        supervised_tokens=total.supervised,
        padding_share=1 - total.real / total.positions,
        tokens_per_second=total.real / seconds,
        seconds=seconds,
        packed=bool(trainer.args.packing),
        processes=trainer.accelerator.num_processes,
        device=_device_name(trainer.args.device),
        attention=trainer.model.config._attn_implementation,
    )


def _over_processes(trainer: CountingTrainer) -> TokenCount:
    counts = torch.tensor(list(asdict(trainer.count).values()), device=trainer.args.device)
    return TokenCount(*trainer.accelerator.reduce(counts, "sum").tolist())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _save_adapter(trainer: SFTTrainer, folder: RunFolder) -> None:
    trainer.save_model(str(folder.adapter))  # gathers a sharded adapter; writes the tokenizer and its template too
    (folder.adapter / "training_args.bin").unlink(missing_ok=True)  # a pickle that can hold the hub token


def _write_model_card(folder: RunFolder, receipt: Receipt) -> None:
    environment_ = Environment(loader=PackageLoader("qlora_recipes", "."), keep_trailing_newline=True)
    card = environment_.get_template("model_card.md.jinja").render(run=receipt, adapter_name=ADAPTER)
    (folder.adapter / "README.md").write_text(card, encoding="utf-8")


def _public(training: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as receipts may hold them: whatever is a secret is left out."""
    return {name: value for name, value in training.items() if "token" not in name or "tokens" in name}
