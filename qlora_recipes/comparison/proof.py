"""What a run's files say of each other: layers counted, weights hashed, scores averaged. A contradiction is refused.

It finds what was mislabelled, swapped, overwritten or edited; who edits every file and makes every hash anew is not
found. Files in, errors out; knows nothing of statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from qlora_recipes.errors import ComparisonError
from qlora_recipes.evaluation.records import DocRecord, TaskResult
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.run.weights import adapter_file_sha256

_LAYERS = ({"Linear4bit", "Experts4bit"}, {"Linear8bitLt"})  # bitsandbytes' names, and the one of base/counting.py
_TRAIN = "Restore its files from a copy, or train it again"


def check_storage(run: Path, receipt: Receipt) -> None:
    """Refuse a receipt whose linear layers are not those of its precision.

    Raises:
        ComparisonError: naming both.
    """
    precision, base = PRECISIONS[receipt.precision], receipt.base
    counted, quantized = base.linears, base.quantized
    expected = quantized.expected
    if precision.quantized:
        kinds = _LAYERS[0] if precision.quant_type else _LAYERS[1]
        stored = sum(number for kind, number in counted.items() if kind in kinds)
        skipped = any(check.name == "quantized_linears" and check.verdict == "off" for check in receipt.checks)
        holds = 0 < quantized.found == stored and (skipped or expected == stored == sum(counted.values()))
        layers = (
            f"{expected} {' and '.join(sorted(kinds & counted.keys()) or sorted(kinds)[-1:])}, all of them quantized"
        )
    else:
        holds = not (expected or quantized.found or counted.keys() & set.union(*_LAYERS))
        layers = "none that is quantized"
    if not holds:
        found = ", ".join(f"{number} {name}" for name, number in counted.items()) or "none"
        raise ComparisonError(
            f"{run} is {receipt.precision} by its receipt, and its linear layers are {found} with {quantized.found} of "
            f"{expected} quantized; expected {layers}. {_TRAIN}"
        )


def check_adapter(run: Path, receipt: Receipt, file: Path) -> None:
    """Refuse an adapter's file whose weights are not those that the receipt has the hash of.

    Raises:
        ComparisonError: naming both hashes.
        RunFolderError: when the file is damaged.
    """
    if (got := adapter_file_sha256(file)) != receipt.adapter.final_sha256:
        raise ComparisonError(
            f"{file} has weights with the hash {got[:12]}, expected {receipt.adapter.final_sha256[:12]}, those that "
            f"{run} ended with: it was swapped or overwritten after training. {_TRAIN}"
        )


def check_start(run: Path, receipt: Receipt) -> None:
    """Refuse a receipt whose first adapter is not the one that the run it began with ended with.

    Raises:
        ComparisonError: naming both hashes.
    """
    first, start = receipt.adapter.initial_sha256, receipt.start
    if start and first != start.receipt.adapter.final_sha256:
        raise ComparisonError(
            f"{run} began with the adapter {first[:12]}, and {start.run}, which it is to start from, ended with "
            f"{start.receipt.adapter.final_sha256[:12]}. {_TRAIN}"
        )


def check_arms(runs: Sequence[tuple[Path, Receipt]]) -> None:
    """Refuse two runs that are one: the same adapter twice, or one base under the names of two precisions.

    Two bases under the name of one precision are refused too: what is stored alike is alike to the bit.

    Raises:
        ComparisonError: naming both runs.
    """
    for i, (path, run) in enumerate(runs):
        for earlier_path, earlier in runs[:i]:
            if run.precision == earlier.precision and run.base.sha256 != earlier.base.sha256:
                raise ComparisonError(
                    f"{earlier_path} and {path} are both {run.precision}, on bases with the hashes "
                    f"{earlier.base.sha256[:12]} and {run.base.sha256[:12]}; expected the same base. Train one of them "
                    "again"
                )
            twice = "adapter" if run.adapter.final_sha256 == earlier.adapter.final_sha256 else None
            if run.precision != earlier.precision and run.base.sha256 == earlier.base.sha256:
                twice = "base"
            if twice:
                raise ComparisonError(
                    f"{earlier_path} ({earlier.precision}, seed {earlier.seed}) and {path} ({run.precision}, seed "
                    f"{run.seed}) have the same {twice}, to the bit; expected two runs. One is a copy of the other: "
                    "train what it stands for"
                )


def check_scores(name: str, result: TaskResult, documents: Sequence[DocRecord]) -> None:
    """Refuse a result whose number of documents, or whose figure, is not that of its documents.

    The metrics of tasks of the kind `score` may be other figures than means, and are not compared.

    Raises:
        ComparisonError: naming the run, the task and both figures.
    """
    again = f"Evaluate {result.task} again with --overwrite"
    if result.n_docs != len(documents):
        raise ComparisonError(
            f"{name}: {result.task} is the result of {result.n_docs:,} documents, and {len(documents):,} are there. "
            f"{again}"
        )
    if not documents or result.kind == "score":
        return
    if result.kind == "accuracy" and (odd := [doc for doc in documents if doc.score not in (0, 1)]):
        raise ComparisonError(
            f"{name}: document {odd[0].doc_id} of {result.task} has the score {odd[0].score:g}, expected 0 for wrong "
            f"or 1 for right. {again}"
        )
    if result.kind == "bits_per_byte":
        expected = sum(doc.bits or 0.0 for doc in documents) / sum(doc.bytes or 0 for doc in documents)
    else:
        expected = math.fsum(doc.score for doc in documents) / len(documents)
    if not math.isclose(got := result.metrics[result.metric], expected, rel_tol=1e-9, abs_tol=1e-9):
        raise ComparisonError(
            f"{name}: {result.task} has {result.metric} {got:.6g}, and its documents have {expected:.6g}: one of the "
            f"two was edited. {again}"
        )
