"""A run's adapter merged into 16-bit weights: into those that lose the least, measured on what was written.

Never into 4-bit weights: quantizing the sum again makes another model than the one that was trained.
Knows nothing of training.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qlora_recipes.base.checkpoint import weight_files
from qlora_recipes.chat_templates import without_markers
from qlora_recipes.comparison.paired import BitsPerByte
from qlora_recipes.deploy import choice
from qlora_recipes.deploy.choice import DEQUANTIZED, SIXTEEN_BIT, Bits, Documents
from qlora_recipes.deploy.weights import Changes, merged_bytes, read_changes, write_configuration, write_merged
from qlora_recipes.errors import CheckError, DataError, RunFolderError, UsageError
from qlora_recipes.evaluation import loaded
from qlora_recipes.evaluation.loaded import BaseKey, RestoredRun, check_remote_code, restore_run
from qlora_recipes.evaluation.records import disk_faults
from qlora_recipes.precision import precision_named
from qlora_recipes.run.files import read_record, write_json
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.standins import HELD_OUT_TEXT

RECEIPT = "merge.json"
_ADVICE = "Free some space, or give --output a folder that can be made and written"
_STACKED = "4-bit experts are quantized as one stack, which checkpoints keep in other pieces"
_LARGEST_SHARE = 0.5  # of what the adapter does; a merge that lost the adapter has 1


@dataclass(frozen=True)
class Candidate:
    """One way to merge, measured on what was written."""

    loss: Mapping[str, BitsPerByte]
    """Of the merged model (a) beside the run as trained (b), by kind of document."""
    moved: float
    """Mean absolute difference of a document from the run as trained, in bits per byte."""
    seconds_per_token: float


@dataclass(frozen=True)
class MergeReceipt:
    """What was merged into what, why, and what it changed."""

    adapter_sha256: str
    base: str
    revision: str | None
    trained_on: str
    """Precision of the base in training."""
    dtype: str
    merged_into: str
    """`16bit` or `dequantized`."""
    because: str
    verdict: str
    """Whether what is lost matters, in words."""
    candidates: Mapping[str, Candidate]
    adapter_effect: float
    """Mean absolute difference that the adapter itself makes to a document, in bits per byte."""
    unmerged_seconds_per_token: float
    """Of the run as trained, with its adapter beside the base."""
    text: str
    """Name of the file that the text is from."""
    bytes: int
    """Of the merged weights."""


@dataclass(frozen=True)
class _AsTrained:
    """What is known of the run as trained when its base is out of memory again."""

    asked: Documents
    bits: Bits
    effect: float
    seconds_per_token: float
    changes: Changes
    run: RestoredRun


def merge(
    folder: RunFolder,
    output: Path,
    *,
    base: str | None = None,
    text: Path | None = None,
    trust_remote_code: bool = False,
) -> MergeReceipt:
    """Write a merged model that `from_pretrained` loads, with `merge.json` beside it, and return what is in that.

    A 4-bit run is merged into the 16-bit base and into its dequantized weights, each written, loaded by plain
    Transformers and measured; the better one stays. `base`, `16bit` or `dequantized`, chooses beforehand.

    Raises:
        RunFolderError: when the output folder holds something, or there is no room.
        UsageError: for an adapter that cannot be merged, or code of the base that is not allowed to run.
        CheckError: when what was written does not answer as the run.
    """
    receipt = folder.receipt()
    check_remote_code(receipt, allowed=trust_remote_code)
    ways = _ways(receipt, base)
    lines = _lines(text or HELD_OUT_TEXT)
    with disk_faults(output, _ADVICE):  # before the base is loaded, which takes minutes
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise RunFolderError(f"{output} is not empty; give --output another folder")
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = output.with_name(f".{output.name}.{os.getpid()}")  # as `write_text` does
        aside.mkdir()
        try:
            made = _merge(folder, receipt, ways, aside, lines, (text or HELD_OUT_TEXT).name)
            write_json(aside / made.merged_into / RECEIPT, asdict(made))
            if output.exists():
                output.rmdir()
            (aside / made.merged_into).rename(output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return made


def _ways(receipt: Receipt, base: str | None) -> list[str]:
    """Return the ways to merge that are tried."""
    if receipt.settings.lora.get("target_parameters"):
        raise UsageError(
            "the adapter trains parameters (target_parameters), such as experts, which cannot be merged. Expected LoRA "
            "or DoRA on linear layers and modules_to_save; keep this adapter beside its base"
        )
    four_bits = precision_named(receipt.precision).quant_type is not None
    if _has_experts(receipt):
        if base == DEQUANTIZED:
            raise UsageError(f"--base dequantized: {_STACKED}. Expected --base 16bit")
        return [SIXTEEN_BIT]
    if base == DEQUANTIZED and not four_bits:
        raise UsageError(f"--base dequantized is for 4-bit runs, and this one is {receipt.precision}. Leave it out")
    return [base] if base else [SIXTEEN_BIT, DEQUANTIZED] if four_bits else [SIXTEEN_BIT]


def _has_experts(receipt: Receipt) -> bool:
    """Whether experts are in 4 bits."""
    return "Experts4bit" in receipt.base.linears


def _lines(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
    if not lines:
        raise DataError(f"{file} has no words; expected a text with a document on each line")
    return lines


def _merge(
    folder: RunFolder, receipt: Receipt, ways: Sequence[str], aside: Path, lines: Sequence[str], text: str
) -> MergeReceipt:
    """Write and measure every way in the folder `aside`, and return what is found."""
    trained = _measure_as_trained(folder, receipt, lines)
    files = weight_files(receipt.base.model, receipt.base.revision)
    dtype = getattr(torch, receipt.dtype)
    size = merged_bytes(files, dtype)
    if (free := shutil.disk_usage(aside).free) < len(ways) * size:
        raise RunFolderError(
            f"{aside.parent} has {free / 1e9:.1f} GB free, expected {len(ways) * size / 1e9:.1f} GB for "
            f"{' and '.join(ways)}. {_ADVICE}; --base with one of them needs half of it"
        )
    candidates, bits = {}, {}
    end = trained.run.encoder.end_id
    for way in ways:
        through = precision_named(receipt.precision) if way == DEQUANTIZED else None
        write_merged(files, trained.changes, aside / way, dtype, through=through)
        write_configuration(next(iter(files.values())).parent, aside / way, receipt.dtype, end)
        trained.run.tokenizer.save_pretrained(aside / way)
        template = aside / way / "chat_template.jinja"  # other servers do not know the tags of training
        template.write_text(without_markers(template.read_text(encoding="utf-8")), encoding="utf-8")
        candidates[way], bits[way] = _measure(trained, aside / way, receipt)
    _check_written(candidates, trained, receipt)
    if len(ways) > 1:
        chosen, because = choice.choose(bits[SIXTEEN_BIT], bits[DEQUANTIZED], trained.asked)
    else:
        (chosen,), because = ways, _STACKED if _has_experts(receipt) else "no other was asked for"
    return MergeReceipt(
        adapter_sha256=receipt.adapter.final_sha256,
        base=receipt.base.model,
        revision=receipt.base.revision,
        trained_on=receipt.precision,
        dtype=receipt.dtype,
        merged_into=chosen,
        because=because,
        verdict=choice.in_words(candidates[chosen].loss),
        candidates=candidates,
        adapter_effect=trained.effect,
        unmerged_seconds_per_token=trained.seconds_per_token,
        text=text,
        bytes=size,
    )


def _measure_as_trained(folder: RunFolder, receipt: Receipt, lines: Sequence[str]) -> _AsTrained:
    key = BaseKey.of(receipt)
    with restore_run(folder, loaded.restore_base(key), key) as run:
        changes = read_changes(run.model, weight_files(receipt.base.model, receipt.base.revision))
        asked = choice.documents(run, lines)
        bits = choice.bits_of(run, run.model, asked)
        with run.model.disable_adapter():
            without = choice.bits_of(run, run.model, asked)
        return _AsTrained(
            asked,
            bits,
            choice.moved(bits, without, asked),
            choice.seconds_per_token(run.model, _prompt(asked)),
            changes,
            replace(run, model=None),  # which would keep the base in memory
        )


def _measure(trained: _AsTrained, folder: Path, receipt: Receipt) -> tuple[Candidate, Bits]:
    """Load what was written with plain Transformers, over GPUs, memory and disk as it fits, and measure it."""
    gc.collect()
    torch.cuda.empty_cache()  # what is cached counts as taken where it is decided what goes to the GPU
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, receipt.dtype),
        device_map="auto",
        offload_folder=folder.parent / "offload",
        trust_remote_code=BaseKey.of(receipt).trust_remote_code,
    ).eval()
    bits = choice.bits_of(trained.run, model, trained.asked)
    moved = choice.moved(bits, trained.bits, trained.asked)
    if not math.isfinite(moved):
        raise CheckError(
            f"merged into the {choice.WEIGHTS[folder.name]}, the model gives no finite figures in {receipt.dtype}. "
            "Keep the adapter beside the base, or give --base with the other weights"
        )
    loss = choice.compared(bits, trained.bits, trained.asked)
    return Candidate(loss, moved, choice.seconds_per_token(model, _prompt(trained.asked))), bits


def _prompt(asked: Documents) -> list[int]:
    """Return a few tokens to begin with."""
    return next(row.input_ids[:16] for rows in asked.rows.values() for row in rows)


def _check_written(candidates: Mapping[str, Candidate], trained: _AsTrained, receipt: Receipt) -> None:
    """Refuse a merge into the weights that were trained on which does not answer as the run did.

    What an adapter does by less than the margin cannot be told from rounding.
    """
    way = SIXTEEN_BIT if not precision_named(receipt.precision).quantized else DEQUANTIZED
    bits_per_byte = choice.moved(trained.bits, {kind: 0 * bits for kind, bits in trained.bits.items()}, trained.asked)
    if trained.effect < choice.MARGIN * bits_per_byte or way not in candidates:
        return
    if candidates[way].moved > _LARGEST_SHARE * trained.effect:
        raise CheckError(
            f"the merged model is {candidates[way].moved:.4f} bits per byte from the run, and the adapter itself makes "
            f"{trained.effect:.4f}: it is lost in the rounding to {receipt.dtype}, or the checkpoint names its weights "
            "in another way. Keep the adapter beside the base"
        )


def merge_receipt(folder: RunFolder) -> MergeReceipt:
    """Return what was merged in a run's folder.

    Raises:
        RunFolderError: when nothing was, or another adapter than the run's.
    """
    fix = f"Run: qlora-recipes merge {folder.path}"
    try:
        merged = read_record(folder.merged / RECEIPT, MergeReceipt, fix=fix)
    except FileNotFoundError:
        raise RunFolderError(f"{folder.path} is not merged: there is no {folder.merged}. {fix}") from None
    if merged.adapter_sha256 != folder.receipt().adapter.final_sha256:
        raise RunFolderError(f"{folder.merged} is of another adapter than the run's. Remove it. {fix}")
    return merged
