"""Export a merged run, or its adapter alone, as GGUF, and compare what another reader makes of it with the run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_recipes.base.checkpoint import weight_files
from qlora_recipes.deploy.gguf_file import TYPES, Update, read_updates, write_adapter, write_model
from qlora_recipes.deploy.merging import merge_receipt
from qlora_recipes.errors import CheckError, RunFolderError, UsageError, nearest
from qlora_recipes.evaluation.loaded import read_held_out
from qlora_recipes.evaluation.records import disk_faults
from qlora_recipes.run.files import write_json
from qlora_recipes.run.folder import RunFolder

_ADVICE = "Free some space, or give --output a file that can be written"
_LARGE = 4 * 10**9  # bytes of weights
_PROBES, _LONGEST, _NEW = 8, 256, 16  # conversations, their tokens, and tokens that are generated
_LARGEST_CHANGE = {"f32": 1e-3, "f16": 0.05, "bf16": 0.2, "q8_0": 0.2}
"""Of a logit's spread (its standard deviation over the vocabulary): what rounding to a type may do, with room."""


@dataclass(frozen=True)
class ExportReceipt:
    """What was written, and what another reader found in it."""

    file: str
    bytes: int
    type: str
    adapter_sha256: str
    """Of the run."""
    merged_into: str | None
    """The weights that the adapter was merged into; None for the adapter alone."""
    reader: str
    """What read the file again, with its version."""
    texts: int = 0
    """Texts of held-out rows that both tokenizers encoded, and predictions were compared on."""
    texts_encoded_alike: int = 0
    same_prediction: float = 1.0
    """Share of the positions at which both predict the same token."""
    largest_change: float = 0.0
    """Largest difference of a logit, as a share of the standard deviation of logits; of a weight for an adapter."""
    answers_alike: int = 0
    """Texts after which both continue with the same tokens."""


def export(folder: RunFolder, file: Path, kind: str, *, adapter_only: bool = False) -> ExportReceipt:
    """Write a run as GGUF, read it again with another reader, and return what was found; it is in FILE.json too.

    Raises:
        UsageError: for a type that does not exist.
        ModelError: for what the format has no place for.
        RunFolderError: when the run is not merged, or the file is there already.
        CheckError: when what is read is not the run.
    """
    if kind not in TYPES:
        raise UsageError(f"--type: got {kind!r}, expected one of {', '.join(TYPES)}.{nearest(kind, TYPES)}")
    receipt = folder.receipt()
    if file.exists():
        raise RunFolderError(f"{file} is there already; give --output another file")
    merged = None if adapter_only else merge_receipt(folder)
    name = f"{receipt.recipe}, {receipt.precision}, seed {receipt.seed}"
    aside = file.with_name(f".{file.stem}.{os.getpid()}.gguf")
    with disk_faults(file, _ADVICE):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            if merged is None:
                base = _base_folder(receipt.base.model, receipt.base.revision)
                write_adapter(folder.adapter, base, aside, kind, name=name)
                found = _read_adapter(read_updates(folder.adapter, base), aside)
            else:
                write_model(folder.merged, aside, kind, name=name)
                found = _read_model(folder, aside)
            made = ExportReceipt(
                file=file.name,
                bytes=aside.stat().st_size,
                type=kind,
                adapter_sha256=receipt.adapter.final_sha256,
                merged_into=merged.merged_into if merged else None,
                **found,
            )
            _refuse_another(made)
            aside.rename(file)
        finally:
            aside.unlink(missing_ok=True)
        write_json(file.with_name(f"{file.name}.json"), asdict(made))
    return made


def _base_folder(model: str, revision: str | None) -> Path:
    return next(iter(weight_files(model, revision).values())).parent


def _refuse_another(made: ExportReceipt) -> None:
    allowed = _LARGEST_CHANGE[made.type]
    if not made.largest_change <= allowed or made.texts_encoded_alike < made.texts:
        raise CheckError(
            f"{made.reader} reads another model than the run: {made.texts_encoded_alike} of {made.texts} texts are "
            f"encoded alike, and figures differ by up to {made.largest_change:.3f} of their spread, where rounding to "
            f"{made.type} may do {allowed}. Nothing was written"
        )


@torch.no_grad()
def _read_model(folder: RunFolder, file: Path) -> dict[str, Any]:
    """Return what Transformers' own reader of GGUF makes of a file, beside the merged folder; one model at a time."""
    own = AutoTokenizer.from_pretrained(folder.merged)
    other = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    said = (message["content"] for row in read_held_out(folder)[:_PROBES] for message in row.messages)
    texts = list(filter(None, said)) or ["Hello."]  # a turn that only calls a tool has no words
    ids, others = (words(texts, add_special_tokens=False)["input_ids"] for words in (own, other))
    start = [] if own.bos_token_id is None else [own.bos_token_id]
    prompts = [start + each[:_LONGEST] for each in ids]
    expected = _predictions(folder.merged, None, prompts)
    try:
        found = _predictions(file.parent, file.name, prompts)
    except RuntimeError as error:  # shapes that the reader takes for others, such as Qwen3's heads unless they are 128
        shapes = "it expects weights of other shapes. Nothing was written"
        raise CheckError(f"Transformers' reader cannot load the file: {shapes}") from error
    pairs = list(zip(expected, found, strict=True))
    same = torch.cat([ours.logits.argmax(-1) == theirs.logits.argmax(-1) for ours, theirs in pairs])
    changes = [(ours.logits - theirs.logits).abs().max() / ours.logits.std() for ours, theirs in pairs]
    return {
        "reader": f"transformers {version('transformers')}",
        "texts": len(texts),
        "texts_encoded_alike": sum(one == another for one, another in zip(ids, others, strict=True)),
        "same_prediction": float(same.float().mean()),
        "largest_change": float(torch.stack(changes).max()),  # NaN where one is
        "answers_alike": sum(ours.answer == theirs.answer for ours, theirs in pairs),
    }


@dataclass(frozen=True)
class _Prediction:
    """What a model makes of one prompt."""

    logits: torch.Tensor
    """[tokens, words], float32."""
    answer: list[int]
    """The ids that follow greedily."""


def _predictions(folder: Path, gguf_file: str | None, prompts: Sequence[Sequence[int]]) -> list[_Prediction]:
    """Load a model, from a GGUF file in the folder where one is named, and ask it."""
    # In 16 bits a large one takes half the memory, and what its own products round is within what is allowed.
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = torch.bfloat16 if size > _LARGE else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = dict(max_new_tokens=_NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        found.append(_Prediction(model(input_ids=ids).logits[0].float(), answer[0, len(prompt) :].tolist()))
    return found


def _read_adapter(updates: Sequence[Update], file: Path) -> dict[str, Any]:
    """Return how far what the file adds to each matrix is from what the adapter does."""
    reader = gguf.GGUFReader(file)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    stored = {str(tensor.name): gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    changes = []
    for update in updates:
        a, b = (stored[f"{update.place}.lora_{side}"] for side in "ab")
        expected = update.scaling * (update.b @ update.a)
        changes.append(float(np.abs(alpha / len(a) * (b @ a) - expected).max() / expected.std()))
    return {"reader": f"gguf {version('gguf')}", "largest_change": float(np.max(changes))}  # NaN where one is
