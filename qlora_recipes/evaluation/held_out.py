"""Scores a run on the conversations that it kept from training: loss, bits per byte, and answers.

They are rendered by the encoder that training used, so the tokens scored are in the format trained on.
Knows nothing of lm-eval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from qlora_recipes.data.encoding import IGNORED, Encoded
from qlora_recipes.errors import DataError
from qlora_recipes.evaluation.bar import Bar
from qlora_recipes.evaluation.batches import in_order
from qlora_recipes.evaluation.generation import Generation, context_length, ended, generate
from qlora_recipes.evaluation.loaded import HeldOutRow, RestoredRun
from qlora_recipes.evaluation.reasoning import reasoning_end, without_reasoning
from qlora_recipes.evaluation.records import SHOWN, DocRecord, Scores, sha256
from qlora_recipes.evaluation.task_loading import PREFERENCES
from qlora_recipes.formatters import answer_of, before_last_answer, is_trained


def score_held_out(run: RestoredRun, *, batch_size: int, limit: int | None, bar: Bar) -> Scores:
    """Return the negative log-likelihood of the assistant's words.

    `loss` is in nats per supervised token, the end-of-turn token included, as in training; `bits_per_byte` divides the
    same sum by the UTF-8 bytes of the words, and can be compared between tokenizers.

    Raises:
        DataError: when no row fits into the model's context.
    """
    rows = run.held_out[:limit]
    encoded = [run.encoder.encode(row.messages, row.tools) for row in rows]
    longest = context_length(run.model) or math.inf
    fitting = [i for i, row in enumerate(encoded) if len(row.input_ids) <= longest]
    if not fitting:
        raise DataError(f"no held-out conversation of {run.folder.path} fits into the model's context")
    bar.start(len(fitting))
    nats_by_row = row_losses(run, [encoded[i] for i in fitting], batch_size, advance=bar.advance)
    losses = dict(zip(fitting, nats_by_row, strict=True))
    docs = []
    for i in fitting:
        words = scored_words(run, rows[i])
        bits, length = losses[i] / math.log(2), sum(len(text.encode()) for text in words)
        ids, target = encoded[i].input_ids, "\n".join(words)
        docs.append(_record("held_out", i, rows[i], ids, target, bits / length, bits=bits, bytes=length))
    nats = sum(losses.values())
    return Scores(
        docs=docs,
        higher_is_better=False,
        metrics={
            "bits_per_byte": nats / math.log(2) / sum(doc.bytes or 0 for doc in docs),
            "loss": nats / sum(encoded[i].supervised for i in fitting),
        },
        truncated=len(rows) - len(fitting),
    )


def score_answers(
    run: RestoredRun, *, batch_size: int, limit: int | None, bar: Bar, settings: Generation | None = None
) -> Scores:
    """Return ROUGE-L, BLEU and chrF of answers to the last question, and the share that ended by themselves.

    A document's score is its ROUGE-L, from 0 to 1; BLEU and chrF are of all answers together, from 0 to 100. Reasoning
    is no part of what is compared.

    Raises:
        DataError: when no question fits into the model's context with its answer.
    """
    from qlora_recipes.evaluation.text_metrics import Bleu, ChrF, RougeL  # evaluate, which takes seconds to import

    settings = settings or Generation()
    rows = [row for row in run.held_out[:limit] if before_last_answer(row.messages)]  # a plain text asks nothing
    prompts = [run.encoder.encode_prompt(before_last_answer(row.messages), row.tools) for row in rows]
    room = (context_length(run.model) or math.inf) - settings.max_new_tokens
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
    if not fitting:
        raise DataError(f"no held-out question of {run.folder.path} fits into the model's context")
    bar.start(len(fitting))
    end, pad = run.encoder.end_id, run.tokenizer.pad_token_id
    lengths = [(len(prompts[i]) + settings.max_new_tokens) * settings.num_beams for i in fitting]

    def answer(place: int, batch: list[int]) -> list[list[int]]:
        torch.manual_seed(settings.seed + place)  # what is drawn does not depend on the batches before
        asked = [prompts[fitting[i]] for i in batch]
        found = generate(run.model, asked, end=end, pad=pad, settings=settings)
        bar.advance(len(batch))
        return found

    answers = dict(zip(fitting, in_order(lengths, batch_size, answer), strict=True))
    thought = reasoning_end(run.encoder)
    said = [without_reasoning(answers[i], thought) for i in fitting]
    texts = [str(run.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in said]
    references = [_reference(rows[i]) for i in fitting]
    rouge = RougeL(keep_in_memory=True).compute(predictions=texts, references=references)
    chrf = ChrF(keep_in_memory=True).compute(predictions=texts, references=references)
    bleu = Bleu(keep_in_memory=True).compute(predictions=texts, references=references)
    docs = [
        _record("held_out_answers", i, rows[i], prompts[i], reference, score, answer=text[:SHOWN])
        for i, text, reference, score in zip(fitting, texts, references, rouge["documents"], strict=True)
    ]
    share_ended = sum(ended(run.model, end, answers[i]) for i in fitting) / len(fitting)
    return Scores(
        docs=docs,
        higher_is_better=True,
        metrics={"rougeL": rouge["rougeL"], "bleu": bleu["bleu"], "chrf": chrf["chrf"], "ended": share_ended},
        truncated=len(rows) - len(fitting),
    )


def score_preferences(run: RestoredRun, *, batch_size: int, limit: int | None, bar: Bar) -> Scores:
    """Return the share of rows whose chosen answer is likelier than the rejected one, token by token summed.

    Raises:
        DataError: when the run kept no rows with two answers, or none fits into the model's context.
    """
    rows = [row for row in run.held_out[:limit] if row.rejected is not None]
    if not rows:
        raise DataError(f"the held-out rows of {run.folder.path} have one answer each, expected two: chosen, rejected")
    pairs = [(_last_answer(run, row), _last_answer(run, row, row.rejected)) for row in rows]
    longest = context_length(run.model) or math.inf
    fitting = [i for i, pair in enumerate(pairs) if max(len(answer.input_ids) for answer in pair) <= longest]
    if not fitting:
        raise DataError(f"no held-out conversation of {run.folder.path} fits into the model's context")
    bar.start(2 * len(fitting))
    nats = row_losses(run, [answer for i in fitting for answer in pairs[i]], batch_size, advance=bar.advance)
    docs = []
    for i, chosen, rejected in zip(fitting, nats[::2], nats[1::2], strict=True):
        right, ids = chosen < rejected, pairs[i][0].input_ids
        words = str(rows[i].messages[-1]["content"]), str(rows[i].rejected)
        target = "\n".join(words)
        docs.append(_record(PREFERENCES, i, rows[i], ids, target, float(right), answer=words[not right][:SHOWN]))
    accuracy = sum(doc.score for doc in docs) / len(docs)
    return Scores(docs=docs, higher_is_better=True, metrics={"acc": accuracy}, truncated=len(rows) - len(fitting))


def _last_answer(run: RestoredRun, row: HeldOutRow, answer: str | None = None) -> Encoded:
    """Return a conversation of preferences, of which the last answer alone has labels, or another in its place."""
    messages = row.messages if answer is None else [*row.messages[:-1], {**row.messages[-1], "content": answer}]
    return run.encoder.encode(messages, row.tools)


def scored_words(run: RestoredRun, row: HeldOutRow) -> list[str]:
    """Return what each turn in the loss says, without the reasoning that the template leaves out of it."""
    left, words = run.encoder.render(row.messages, row.tools).in_loss, []
    for turn in filter(is_trained, row.messages):
        before, _, left = left.partition(turn["content"])  # a later turn may have thought the same
        words.append(
            answer_of(turn if turn.get("reasoning_content", "") in before else {**turn, "reasoning_content": ""})
        )
    return words


def row_losses(
    run: RestoredRun, rows: Sequence[Encoded], batch_size: int, *, advance: Callable[[int], None] = lambda _: None
) -> list[float]:
    """Return each row's negative log-likelihood in nats over its labels; `advance` hears of every batch."""

    def compute(_: int, batch: list[int]) -> list[float]:
        losses = _losses(run, [rows[i] for i in batch])
        advance(len(batch))
        return losses

    return in_order([len(row.input_ids) for row in rows], batch_size, compute)


@torch.no_grad()
def _losses(run: RestoredRun, rows: Sequence[Encoded]) -> list[float]:
    """Return each row's negative log-likelihood in nats; padding is on the right, where no token attends to it."""
    pad = run.tokenizer.pad_token_id
    ids = pad_sequence([torch.tensor(row.input_ids) for row in rows], batch_first=True, padding_value=pad)
    labels = pad_sequence([torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=IGNORED)
    ids, labels = ids.to(run.model.device), labels.to(run.model.device)[:, 1:]
    logits = run.model(input_ids=ids).logits[:, :-1]
    scored = labels != IGNORED
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    losses[scored] = torch.nn.functional.cross_entropy(logits[scored].float(), labels[scored], reduction="none")
    return [float(total) for total in losses.double().sum(1)]


def _reference(row: HeldOutRow) -> str:
    """Return what the last turn in the loss says; a turn that only calls says the calls."""
    answer = row.messages[len(before_last_answer(row.messages))]
    return str(answer["content"]) or answer_of(answer)


def hash_conversation(row: HeldOutRow) -> str:
    """Return the hash that a held-out conversation has as a document."""
    tools = json.dumps(row.tools, ensure_ascii=False) if row.tools else ""
    return sha256(json.dumps(row.messages, ensure_ascii=False) + tools + (row.rejected or ""))


def _record(
    task: str, index: int, row: HeldOutRow, ids: list[int], target: str, score: float, **more: Any
) -> DocRecord:
    question = "\n".join(message["content"] for message in before_last_answer(row.messages))
    return DocRecord(
        task=task,
        subject=None,
        doc_id=str(index),
        doc_hash=hash_conversation(row),
        prompt_hash=sha256(str(ids)),
        target_hash=sha256(target),
        score=score,
        target=target[:SHOWN],
        prompt=question[-SHOWN:],
        **{"answer": "", **more},
    )
