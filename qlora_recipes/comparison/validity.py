"""The evidence behind a comparison: every count and hash that was checked, in one table.

Knows nothing of statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qlora_recipes.comparison.evaluated import Run
from qlora_recipes.comparison.findings import Fact
from qlora_recipes.comparison.receipts import INITIAL, SEEDED, SHARED, SPREAD, own_starts
from qlora_recipes.evaluation.records import TaskResult
from qlora_recipes.run.receipt import Receipt, StartReceipt


def validity(runs: Sequence[Run]) -> list[Fact]:
    """Return the facts of runs that have been grouped and aligned, including those that would have been refused."""
    found = (*_trained(runs), *_evaluated(runs))
    facts = [Fact(name, "pass" if holds else "warn", figure) for name, holds, figure in found]
    if any(result.limit is not None for run in runs for result in run.results.tasks.values()):
        facts.append(Fact("limit", "fail", "the evaluation was limited: this is not a result"))
    return facts


def _trained(runs: Sequence[Run]) -> Iterator[tuple[str, bool, str]]:
    receipts = [run.receipt for run in runs]
    first = receipts[0]
    data, adapter = first.data, first.adapter
    own = any(own_starts(first, one) for one in receipts if one.seed == first.seed)
    spread = dict.fromkeys(map(_spread, receipts))
    spread_alike = len({how for _, how in spread}) == 1
    equal = [name for name in SHARED + SEEDED if not (own and name == INITIAL) and (spread_alike or name not in SPREAD)]
    yield "receipts", True, f"equal in {len(equal)} sections: {', '.join(equal)}"
    yield "base as stored", True, "; ".join(dict.fromkeys(_storage(receipt) for receipt in receipts))
    counted = (
        f"{data.source}: {data.rows_used:,} of {data.rows_in:,} rows, {data.rows_held_out:,} held out, "
        f"{data.supervised_tokens:,} of {data.tokens:,} tokens in the loss, {data.answers_truncated:,} "
        f"answers cut; fingerprint {data.fingerprint[:12]} in every run"
    )
    yield "data", data.answers_truncated == 0, counted
    drawn = "; ".join(dict.fromkeys(f"seed {one.seed}: sha256 {one.adapter.initial_sha256[:12]}" for one in receipts))
    weights = f"{adapter.parameters:,} weights in {adapter.dtype}"
    yield "adapter before training", True, f"{weights}; {drawn}" + (" in every precision" if not own else "")
    if starts := [one.start for one in receipts if one.start]:
        alike = "; these differ in precision alone, so that a difference is one of both trainings" if own else ""
        yield "started from", True, "; ".join(dict.fromkeys(map(_started_from, starts))) + alike
    checks = [check for receipt in receipts for check in receipt.checks]
    odd = sorted({f"{check.name}: {check.figure}" for check in checks if check.verdict in ("warn", "fail")})
    passed = sum(check.verdict == "pass" for check in checks)
    yield "checks in training", not odd, "; ".join([f"{passed} of {len(checks)} passed", *odd])
    repairs = sorted({repair for receipt in receipts for repair in receipt.repairs})
    yield "upstream defects repaired", True, ", ".join(repairs) or "none found"
    yield "versions", True, ", ".join(f"{name} {version}" for name, version in first.versions.items())
    shown = next(iter(spread))[1] if spread_alike else "; ".join(f"{precision}: {how}" for precision, how in spread)
    changes = sorted({each.processes_changed for one in receipts for each in one.resumes} - {""})
    resumed = f"; resumed by another number of processes, no longer bit-exact: {', '.join(changes)}" if changes else ""
    yield "processes", spread_alike and not changes, shown + resumed
    yield "device", True, f"{first.training.device}, attention {first.training.attention}"


def _started_from(start: StartReceipt) -> str:
    was = start.receipt
    return f"{was.recipe}, {was.precision}, seed {was.seed}: sha256 {was.adapter.final_sha256[:12]}"


def _spread(receipt: Receipt) -> tuple[str, str]:
    """Return the precision of a run, and how it was spread over processes."""
    spread, number = receipt.spread, receipt.training.processes
    nodes = f" on {spread.nodes} nodes" if spread.nodes > 1 else ""
    parts = [part for part in (spread.wrapper, spread.sharding) if part != "none"]
    dtypes = [f"{name} {dtype}" for name, dtype in spread.dtypes.items()]
    return receipt.precision, ", ".join([f"{number} process{'es' * (number > 1)}{nodes}", *parts, *dtypes])


def _storage(receipt: Receipt) -> str:
    quantized = receipt.base.quantized
    linears = ", ".join(f"{number} {name}" for name, number in receipt.base.linears.items())
    counted = f", {quantized.found} of {quantized.expected} quantized" if quantized.expected else ""
    return f"{receipt.precision}: {linears}{counted}"


def _evaluated(runs: Sequence[Run]) -> Iterator[tuple[str, bool, str]]:
    results = [result for run in runs for result in run.results.tasks.values()]
    first = runs[0].results
    weights = f"hashes of adapter and base are the receipt's in {len(runs)} of {len(runs)} runs"
    yield "weights evaluated", True, weights
    agree = (
        f"the weights of {len(runs)} adapter files have the hashes of the receipts, no two runs are the same, layers "
    )
    agree += "are those of the precision, and figures are those of the documents. Who edits every file and makes every "
    yield "files agree", True, agree + "hash anew is not found"
    differences = [r.adapter_on_off_difference for r in results if r.adapter_on_off_difference is not None]
    if differences:
        least = min(differences)
        yield "adapter acts", least > 0, f"switching it off moves a logit by {least:.3g} or more"
    documents = "; ".join(f"{task}: {len(documents):,}" for task, documents in first.documents.items())
    yield "documents", True, f"{documents}; paired by hashes of document, prompt and target"
    yield "tasks", True, "; ".join(_conditions(result) for result in first.tasks.values())
    dtypes = sorted({result.loglikelihood_dtype for result in results})
    yield "log-likelihoods", dtypes == ["float32"], f"summed in {', '.join(dtypes)}"
    for name, field in (("requests cut", "truncated"), ("prompts unlike training", "prompts_unlike_training")):
        number = sum(getattr(result, field) for result in results)
        yield name, number == 0, f"{number:,} in all runs"
    templates = {result.template_sha256 for result in results if result.chat_template}
    if templates:
        trained = {run.receipt.template.sha256 for run in runs}
        shown = ", ".join(sorted(str(template)[:12] for template in templates))
        yield "chat template", templates == trained, f"sha256 {shown}, as in training"


def _conditions(result: TaskResult) -> str:
    template = "chat template" if result.chat_template else "no chat template"
    shots = f"{result.num_fewshot} shots, {template}, batch {result.batch_size}"
    return f"{result.task} v{result.version}: {result.metric}, {shots}"
