"""Questions answered in batches whose rows go to different runs, and the proof that each row is answered as alone.

Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from qlora_recipes.deploy.mixing import ALLOWED, BASE, MixedRuns
from qlora_recipes.errors import CheckError, DataError, UsageError, nearest
from qlora_recipes.evaluation.generation import Generation, context_length, ended, generate, seeded
from qlora_recipes.formatters import Message, Tools

LARGEST_SHARE = 0.1
"""Of what an adapter does to the logits, as much as mixing may do. A row that another adapter answers has about 1."""
_PROBES, _PROBE_TOKENS = 2, 64
_HELLO: list[Message] = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class Request:
    """One conversation that ends with a question, and who answers it."""

    messages: Sequence[Message]
    adapter: str = BASE
    """Name of a run, or `base`."""
    place: str = "the prompt"
    """Where it is from, for messages."""
    tools: Tools | None = None
    """What the assistant may call."""


@dataclass(frozen=True)
class Answer:
    """What was answered to a request."""

    text: str
    tokens: int
    ended: bool
    """Whether it ended by itself, and was not cut at `max_new_tokens`."""


@dataclass(frozen=True)
class MixingProof:
    """How far the rows of a mixed batch are from what their adapters answer alone.

    Differences are root mean squares over the logits of a row, the largest of all rows.
    """

    rows: int
    from_alone: float
    """Of a row in the mixed batch and among rows of its own adapter only."""
    by_neighbors: float
    """Of a row when the adapters of the other rows are exchanged."""
    of_adapters: float
    """What an adapter does to the logits of a row, the smallest of all adapters: the measure of the other two."""


def answer(
    runs: MixedRuns, requests: Sequence[Request], settings: Generation | None = None, *, batch_size: int = 8
) -> list[Answer]:
    """Answer requests, longest first, in batches that mix adapters wherever they can be mixed.

    Drawn answers depend on the batch size too: a batch draws from one generator.

    Raises:
        DataError: for a request that does not fit into the context with its answer, or spells a role marker.
        UsageError: for an adapter that is not among the runs.
    """
    settings = settings or Generation()
    prompts = [_prompt(runs, request, settings) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: -len(prompts[i]))
    if runs.unmixable:
        order.sort(key=lambda i: requests[i].adapter)
    found: dict[int, Answer] = {}
    with seeded(settings, runs.model.device):
        while order:
            first = requests[order[0]].adapter
            batch = [i for i in order[:batch_size] if not runs.unmixable or requests[i].adapter == first]
            order = order[len(batch) :]
            answers = _generate(runs, [prompts[i] for i in batch], [requests[i].adapter for i in batch], settings)
            found |= zip(batch, answers, strict=True)
    return [found[i] for i in range(len(requests))]


def _prompt(runs: MixedRuns, request: Request, settings: Generation) -> list[int]:
    if request.adapter not in runs.adapters:
        hint = nearest(request.adapter, runs.adapters)
        known = ", ".join(runs.adapters)
        raise UsageError(f"{request.place}: got the adapter {request.adapter!r}, expected one of {known}.{hint}")
    try:
        prompt = runs.run.encoder.encode_prompt(request.messages, request.tools)
    except DataError as error:
        raise DataError(f"{request.place}: {error}") from error
    length = context_length(runs.model)
    if length is not None and len(prompt) + settings.max_new_tokens > length:
        raise DataError(
            f"{request.place}: got {len(prompt)} tokens and {settings.max_new_tokens} of its answer, expected at most "
            f"{length}, the model's context. Shorten it or lower --max_new_tokens"
        )
    return prompt


def _generate(runs: MixedRuns, prompts: list[list[int]], names: list[str], settings: Generation) -> list[Answer]:
    tokenizer: Any = runs.run.tokenizer
    end = runs.run.encoder.end_id
    batch: dict[str, Any] = dict(end=end, pad=tokenizer.pad_token_id, settings=settings)
    if runs.unmixable:
        with runs.only(names[0]):
            found = generate(runs.model, prompts, **batch)
    else:
        found = generate(runs.model, prompts, adapter_names=[runs.adapters[name] for name in names], **batch)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    return [Answer(text.strip(), len(ids), ended(runs.model, end, ids)) for text, ids in zip(texts, found, strict=True)]


@torch.no_grad()
def prove_mixing(runs: MixedRuns) -> MixingProof:
    """Compare rows of a mixed batch with each adapter alone, and with the same batch under other neighbors.

    Raises:
        UsageError: for runs that cannot be mixed, with the reason.
        CheckError: when a row is not answered as by its adapter alone.
    """
    if runs.unmixable:
        raise UsageError(f"{runs.unmixable}. Expected {ALLOWED}; ask this run by itself")
    encoder = runs.run.encoder
    held_out = [encoder.encode(row.messages, row.tools).input_ids for row in runs.run.held_out[:_PROBES]]
    probes = held_out or [encoder.encode_prompt(_HELLO)]
    names = list(runs.adapters)
    rows = [(name, ids[:_PROBE_TOKENS]) for ids in probes for name in names]
    mixed = _logits(runs, [ids for _, ids in rows], [name for name, _ in rows])
    alone: dict[str, list[torch.Tensor]] = {}
    for name in names:
        with runs.only(name):
            alone[name] = _logits(runs, [ids[:_PROBE_TOKENS] for ids in probes])
    by_row = [alone[name][number // len(names)] for number, (name, _) in enumerate(rows)]
    moved = []
    for kept in (0, 1):  # every second row keeps its adapter, the others take the next one
        others = [n if i % 2 == kept else names[(names.index(n) + 1) % len(names)] for i, (n, _) in enumerate(rows)]
        exchanged = _logits(runs, [ids for _, ids in rows], others)
        moved += [_distance(mixed[i], exchanged[i]) for i in range(kept, len(rows), 2)]
    proof = MixingProof(
        rows=len(rows),
        from_alone=max(_distance(one, other) for one, other in zip(mixed, by_row, strict=True)),
        by_neighbors=max(moved),
        of_adapters=min(
            _distance(one, base)
            for name in names
            if name != BASE
            for one, base in zip(alone[name], alone[BASE], strict=True)
        ),
    )
    largest = max(proof.from_alone, proof.by_neighbors)
    if not largest <= LARGEST_SHARE * proof.of_adapters:
        raise CheckError(
            f"a row of a mixed batch is {largest:.3g} (root mean square of its logits) from its adapter alone, and the "
            f"adapter itself changes them by {proof.of_adapters:.3g}; expected at most {LARGEST_SHARE:.0%} of that"
            + ("; ask each run by itself" if len(names) > 2 else "")
        )
    return proof


def _logits(runs: MixedRuns, rows: Sequence[list[int]], names: Sequence[str] = ()) -> list[torch.Tensor]:
    """Return each row's logits in float32, (tokens, words); padding is on the right, where no token attends to it."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(runs.model.device)
    mixed = {"adapter_names": [runs.adapters[name] for name in names]} if names else {}
    logits = runs.model(input_ids=ids, **mixed).logits
    return [logits[i, : len(row)].float() for i, row in enumerate(rows)]


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().mean().sqrt())


def described(proof: MixingProof) -> str:
    """Say what was proven."""
    figures = {name: f"{value:.3g}" for name, value in asdict(proof).items()}
    return (
        f"{proof.rows} rows mixed: each as its adapter alone to {figures['from_alone']} (root mean square of the "
        f"logits, which adapters change by {figures['of_adapters']} or more), moved by its neighbors' adapters by "
        f"{figures['by_neighbors']}"
    )
