"""Scores a restored run with lm-eval: the run as lm-eval's model, and each document's answer as one of our records."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence

from qlora_recipes.errors import DataError, RecipesError
from qlora_recipes.evaluation.bar import Bar, silence_lm_eval
from qlora_recipes.evaluation.batches import in_batches, in_order
from qlora_recipes.evaluation.generation import Generation, own_settings_off, stopping_ids
from qlora_recipes.evaluation.loaded import RestoredRun
from qlora_recipes.evaluation.ranks import over_ranks
from qlora_recipes.evaluation.reasoning import answer_start, reasoning_end
from qlora_recipes.evaluation.records import SHOWN, DocRecord, Scores
from qlora_recipes.evaluation.task_loading import EvalTask

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

Item = TypeVar("Item")


class RunLanguageModel(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """The model and tokenizer of a run, as lm-eval asks them, with log-likelihoods in float32.

    Upstream: HFLM (lm-eval 0.4.13) has no callbacks, so three of its private methods are overridden:
    `_loglikelihood_tokens` to count what is cut, which it only warns of, and to share out batches where it would share
    documents (see `ranks`); `_model_call` and `_model_generate` to advance the bar. The first can go when lm-eval
    reports truncation with its results and shares batches, the others when it takes a progress bar. The first and the
    last also take no more rows at a time than fit: its own size is rows, however long.
    """

    add_bos_token: bool | None  # HFLM's own, like the next
    think_end_token: int | None

    def __init__(
        self,
        run: RestoredRun,
        batch_size: int,
        bar: Bar,
        decoded: Mapping[str, Any] | None = None,
        *,
        room: int = Generation.max_new_tokens,
    ) -> None:
        self._encoded: dict[object, list[int]] = {}
        # Computed in 16 bits, 5 % of the choices tie exactly.
        super().__init__(pretrained=run.model, tokenizer=run.tokenizer, batch_size=batch_size, softmax_dtype="float32")
        self._encoder = run.encoder
        self._answer_start, self._reasoning_end = answer_start(run.encoder), reasoning_end(run.encoder)
        self._prompts: set[str] = set()  # rendered, each up to where the answer begins
        self._bar = bar
        self._decoded = decoded or {}
        self._room = room  # at least so many tokens for reasoning and answer together
        self.truncated = 0
        """Requests that lost their beginning."""
        self.prompts_unlike_training = 0
        """Rendered prompts whose tokens differ from those of training, as when a document spells a control token."""

    @property
    def eot_token_id(self) -> int:
        """Where generation stops: at the token that ends a turn, which need not be the tokenizer's EOS."""
        return self._encoder.end_id

    @functools.cached_property
    def max_length(self) -> int:
        """The longest row, which HFLM looks up in the configuration several times for each request."""
        return int(super().max_length)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Encode as HFLM does, but the prompt of a question with choices not with each of them again."""
        key = (string, self.add_bos_token, args, *kwargs.items())
        if key not in self._encoded:
            if len(self._encoded) == 8:
                self._encoded.clear()
            self._encoded[key] = super().tok_encode(string, *args, **kwargs)
        return list(self._encoded[key])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render as HFLM does, and compare the tokens with those of training."""
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            try:
                trained = self._encoder.encode_prompt(chat_history)
            except RecipesError:
                trained = []
            self.prompts_unlike_training += self.tok_encode(text) != trained
            self._prompts.add(text)
            self.think_end_token = self._reasoning_end  # HFLM drops what stands before it
        return text

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """Start the bar, and let each answer to a rendered prompt begin as in training."""
        self._bar.start(len(requests))
        return super().loglikelihood([self._as_trained(one) for one in requests], disable_tqdm=disable_tqdm)

    def _as_trained(self, request: Instance) -> Instance:
        prompt, answer = request.args
        if self._answer_start is None or prompt not in self._prompts:
            return request
        start = self._answer_start.rstrip()
        return replace(request, arguments=(prompt + start, self._answer_start[len(start) :] + answer.lstrip()))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """Start the bar, and leave out the tokenizer's BOS.

        Upstream: HFLM (lm-eval 0.4.13) starts each window with a BOS and lets the tokenizer add another, which is then
        scored as if it were text. Can go when `test_lm_eval_still_scores_a_second_bos` fails.
        """
        self._bar.start(len(requests))
        rolling = super().loglikelihood_rolling
        before, self.add_bos_token = self.add_bos_token, False
        try:
            found = over_ranks(
                _cut(requests, self.batch_size), lambda _, batch: rolling(batch, disable_tqdm=disable_tqdm)
            )
            return list(chain(*found))
        finally:
            self.add_bos_token = before

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> Any:
        """Start the bar, and share the batches out; each draws from its own seed."""
        self._bar.start(len(requests))
        generate, seed, truncated = super().generate_until, torch.initial_seed(), self.truncated

        def alike(i: int) -> tuple[str, int, str]:
            prompt, settings = requests[i].args
            return repr(sorted(settings.items())), -len(self.tok_encode(prompt)), prompt

        def answer(place: int, batch: Sequence[int]) -> tuple[list[str], int]:
            torch.manual_seed(seed + place)
            self.truncated = 0
            return generate([requests[i] for i in batch], disable_tqdm=disable_tqdm), self.truncated

        keys = {i: alike(i) for i in range(len(requests))}
        batches = []
        for _, group in groupby(sorted(keys, key=lambda i: keys[i]), key=lambda i: keys[i][0]):
            batches += _cut(list(group), self.batch_size)
        found = over_ranks(batches, answer)
        self.truncated = truncated + sum(cut for _, cut in found)
        answers = dict(zip(chain(*batches), chain(*(said for said, _ in found)), strict=True))
        return [answers[i] for i in range(len(requests))]

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Count what is cut from the left, and share out batches of as many rows as there is room for.

        HFLM makes one row of requests that differ in nothing but their last token, so these stay together. Rolling text
        comes here in batches, which are shared out already.
        """
        score = super()._loglikelihood_tokens
        self.truncated += sum(len(context) + len(words) > self.max_length + 1 for _, context, words in requests)
        tokens = [context + words for _, context, words in requests]
        rows: dict[tuple[int, ...], list[int]] = {}
        for i in sorted(range(len(requests)), key=tokens.__getitem__):  # as HFLM has those of one length
            rows.setdefault(tuple(tokens[i][:-1]), []).append(i)
        same = list(rows.values())

        def compute(_: int, batch: list[int]) -> list[list[Any]]:
            scores = iter(score([requests[i] for row in batch for i in same[row]], *args, **kwargs))
            return [[next(scores) for _ in same[row]] for row in batch]

        shared = not kwargs.get("override_bs")
        found = in_order([min(len(row), self.max_length) for row in rows], self.batch_size, compute, shared=shared)
        answers = dict(zip(chain(*same), chain(*found), strict=True))
        return [answers[i] for i in range(len(requests))]

    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count what is cut from the left."""
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        if left_truncate_len is None:
            return ids, mask
        self.truncated += int((mask.sum(1) > left_truncate_len).sum())
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Advance the bar."""
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self._bar.advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Advance the bar, decode as asked in place of what the task says, and as many rows as there is room for.

        Where a rendered turn may open with reasoning, what ends an answer in the task would end the reasoning: the turn
        goes on to its end, and HFLM cuts what follows `think_end_token` where the task says.
        """
        stops = stopping_ids(self.model, self.eot_token_id)
        if self.think_end_token is not None:
            kwargs["stop"] = [self.tok_decode(self.eot_token_id, skip_special_tokens=False)]
            kwargs["max_length"] = min(self.max_length, max(kwargs["max_length"], context.shape[1] + self._room))
        with own_settings_off(self.model):
            asked = {"eos_token_id": stops, **kwargs, **self._decoded}
            mask, answer = asked.pop("attention_mask"), super()._model_generate
            longest = int(asked["max_length"]) * int(asked.get("num_beams") or 1)
            parts: list[torch.Tensor] = []
            for rows, ids in in_batches(
                [longest] * len(context),
                len(context),
                lambda rows: answer(context[rows], *args, attention_mask=mask[rows], **asked),
            ):
                parts += ids  # all are as long, so they come in their order
                self._bar.advance(len(rows))
        return pad_sequence(parts, batch_first=True, padding_value=int(self.tokenizer.pad_token_id))


def _cut(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def score_with_lm_eval(
    run: RestoredRun,
    task: EvalTask,
    *,
    batch_size: int,
    limit: int | None,
    chat_template: bool,
    decoded: Mapping[str, Any],
    max_new_tokens: int | None,
    bar: Bar,
) -> Scores:
    """Return lm-eval's scores of a run in one task; `decoded` takes the place of what the task says of decoding.

    Calls `evaluate` rather than `simple_evaluate`, which does no more for a loaded model but runs `pip list` each time.

    Raises:
        DataError: when the task's metric gives no number for a document.
    """
    for part in task.parts:
        part.set_fewshot_seed(1234)  # lm-eval's own
        if max_new_tokens is not None:
            part.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    with silence_lm_eval():
        model = RunLanguageModel(run, batch_size, bar, decoded, room=max_new_tokens or Generation.max_new_tokens)
        outcome = evaluate(
            model,
            {"tasks": {part.task_name: part for part in task.parts}, "groups": {}, "group_map": {}},
            limit=limit,
            cache_requests=False,  # the cache's key leaves out the task's own text, so it can return old prompts
            bootstrap_iters=1000,  # for the few metrics without a formula; 0 would drop the others' standard errors too
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    docs = []
    for part in task.parts:
        samples = outcome["samples"][part.task_name]  # of each filter; tasks list the strictest first
        docs += [_record(task, part, sample) for sample in samples if sample["filter"] == samples[0]["filter"]]
    metrics, stderr = _aggregates(task, outcome, docs)
    said = outcome["higher_is_better"][task.parts[0].task_name].get(task.metric)
    return Scores(
        docs=docs,
        metrics=metrics,
        stderr=stderr,
        higher_is_better=task.kind != "bits_per_byte" if said is None else bool(said),
        truncated=model.truncated,
        prompts_unlike_training=model.prompts_unlike_training,
    )


def _record(task: EvalTask, part: ConfigurableTask, sample: Mapping[str, Any]) -> DocRecord:
    doc_id, doc = str(sample["doc_id"]), sample["doc"]
    alone = len(task.parts) == 1
    subject = doc.get("subject") if alone else part.task_name
    shown = _shown(task, part, sample)
    bits: float | None = None
    length: int | None = None
    if task.kind == "bits_per_byte":
        bits, length = -sample["filtered_resps"][0] / math.log(2), len(shown["target"].encode())
        score = bits / length
    else:
        value: Any = sample.get(task.metric)
        try:
            score = float(value)
        except (TypeError, ValueError):
            raise DataError(
                f"{task.name}: got {value!r} from the metric {task.metric} for document {doc_id}, expected a number. "
                "Put a metric with one number per document first in the task's metric_list, such as acc"
            ) from None
    return DocRecord(
        task=task.name,
        subject=None if subject is None else str(subject),
        doc_id=doc_id if alone else f"{part.task_name}/{doc_id}",
        doc_hash=sample["doc_hash"],
        prompt_hash=sample["prompt_hash"],
        target_hash=sample["target_hash"],
        score=score,
        answer=shown.pop("answer")[:SHOWN],
        target=shown.pop("target")[:SHOWN],
        prompt=shown.pop("prompt")[-SHOWN:],
        bits=bits,
        bytes=length,
        **shown,
    )


def _shown(task: EvalTask, part: ConfigurableTask, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return answer, target and prompt as a person reads them; of a choice, the one that the metric picks."""
    doc, given, found = sample["doc"], str(sample["arguments"][0][0]), sample["filtered_resps"]
    if task.kind == "bits_per_byte":
        return {"answer": "", "target": str(part.doc_to_target(doc)), "prompt": ""}
    if part.OUTPUT_TYPE != "multiple_choice":
        answer = str(found[0][0] if isinstance(found[0], (list, tuple)) else found[0])
        return {"answer": answer, "target": str(sample["target"]), "prompt": given}
    choices = part.doc_to_choice(doc)
    right = part.doc_to_text(doc) if part.multiple_input else sample["target"]
    lengths = {"acc_norm": map(len, choices), "acc_bytes": (len(choice.encode()) for choice in choices)}
    divisors = lengths.get(task.metric, [1] * len(choices))
    scores = [response[0] / length for response, length in zip(found[: len(choices)], divisors, strict=True)]
    picked = scores.index(max(scores))
    target = _choice_text(choices, right)
    return {"answer": choices[picked], "target": target, "prompt": given, "choices": len(choices), "picked": picked}


def _choice_text(choices: Sequence[str], right: Any) -> str:
    if isinstance(right, (list, tuple)):
        return " or ".join(_choice_text(choices, one) for one in right)
    return choices[right] if isinstance(right, int) and right < len(choices) else str(right)


def _aggregates(task: EvalTask, outcome: Any, docs: list[DocRecord]) -> tuple[dict[str, float], dict[str, float]]:
    """Return metrics and standard errors: lm-eval's for a single task; for a group, all documents pooled."""
    if task.kind == "bits_per_byte":
        pooled = sum(doc.bits or 0 for doc in docs) / sum(doc.bytes or 0 for doc in docs)
    else:
        pooled = sum(doc.score for doc in docs) / len(docs)
    if len(task.parts) > 1:
        return {task.metric: pooled}, {}
    name = task.parts[0].task_name
    way = outcome["samples"][name][0]["filter"]
    figures = {
        key.removesuffix(f",{way}"): value
        for key, value in outcome["results"][name].items()
        if key.endswith(f",{way}") and isinstance(value, (int, float))
    }
    stderr = {key.removesuffix("_stderr"): float(value) for key, value in figures.items() if key.endswith("_stderr")}
    metrics = {key: float(value) for key, value in figures.items() if not key.endswith("_stderr")}
    return {task.metric: pooled, **metrics}, stderr
