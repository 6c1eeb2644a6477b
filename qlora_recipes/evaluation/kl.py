"""How far apart two arms are beneath their answers: next-token distributions, and the stored weights themselves.

One model is in memory at a time. The baseline's log-probabilities go to disk, and every arm is read against them; the
original weights are read from their file one matrix at a time. Knows nothing of verdicts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from qlora_recipes.base.checkpoint import layer_errors, weight_files
from qlora_recipes.data.encoding import IGNORED
from qlora_recipes.errors import DataError
from qlora_recipes.evaluation import records
from qlora_recipes.evaluation.loaded import BaseKey, RestoredBase, RestoredRun, restore_base, restore_run
from qlora_recipes.run.folder import RunFolder


def measure(reference: RunFolder, others: Sequence[RunFolder], *, said: Callable[[str], None] = lambda _: None) -> None:
    """Measure how far runs are from the reference, and every base from its checkpoint; skip what is done.

    The figures go into the run folders, see `records`.

    Raises:
        RecipesError: when a run is not what its receipt says, or kept no conversation from training.
    """
    todo = [other for other in others if records.read_divergence(reference, other) is None]
    if not todo:
        return
    keys = {folder.path: BaseKey.of(folder.receipt()) for folder in (reference, *todo)}
    with tempfile.TemporaryDirectory(prefix="log-probabilities-") as scratch:
        for key in dict.fromkeys(keys.values()):  # the reference's first
            base = restore_base(key)
            _measure_quantization(next(one for one in (reference, *todo) if keys[one.path] == key), base, key)
            if keys[reference.path] == key:
                said(f"log-probabilities of {reference.path.name}")
                with restore_run(reference, base, key) as run:
                    for i, block in enumerate(_log_probabilities(run)):
                        np.save(Path(scratch, f"{i}.npy"), block.numpy())
            for folder in (folder for folder in todo if keys[folder.path] == key):
                said(f"divergence of {folder.path.name}")
                with restore_run(folder, base, key) as run:
                    records.write_divergence(reference, folder, _compare(run, Path(scratch)))
            del base, run  # each holds the model, and `restore_base` frees what nothing holds


@torch.no_grad()
def _log_probabilities(run: RestoredRun) -> Iterator[torch.Tensor]:
    """Yield a (tokens, words) block in float32 for each held-out conversation: what precedes a supervised token."""
    left = records.TOKENS
    if not run.held_out:
        raise DataError(f"{run.folder.path} kept no conversation from training; KL is measured on those")
    for kept in run.held_out:
        if left <= 0:
            return
        row = run.encoder.encode(kept.messages, kept.tools).cut(run.receipt.data.max_length)
        ids = torch.tensor([row.input_ids], device=run.model.device)
        supervised = torch.tensor(row.labels[1:]) != IGNORED
        if bool(supervised.any()):
            logits = run.model(input_ids=ids).logits[0, :-1][supervised.to(ids.device)][:left]
            left -= len(logits)
            yield torch.log_softmax(logits.float(), dim=-1).cpu()


def _compare(run: RestoredRun, folder: Path) -> records.Divergence:
    divergences, same = [], 0
    for i, block in enumerate(_log_probabilities(run)):
        reference = torch.from_numpy(np.load(folder / f"{i}.npy"))
        divergences.append((reference.exp() * (reference - block)).sum(-1, dtype=torch.float64).clamp(min=0))
        same += int((reference.argmax(-1) == block.argmax(-1)).sum())
    by_token = torch.cat(divergences)
    return records.Divergence(
        tokens=len(by_token),
        mean_kl=float(by_token.mean()),
        median_kl=float(by_token.median()),
        p99_kl=float(by_token.quantile(0.99)),
        same_top_1=100 * same / len(by_token),
    )


def _measure_quantization(folder: RunFolder, base: RestoredBase, key: BaseKey) -> None:
    if not records.read_quantization_error(folder):
        files = weight_files(key.model, key.revision)
        errors = layer_errors(base.model, files, getattr(torch, key.dtype))  # of whole layers, not of a sample
        records.write_quantization_error(folder, base.sha256, [records.LayerError(*error) for error in errors])
