"""Answers of models that think first: where they begin and end, and what of them is scored."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_runs import receipt
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.data.templates import choose_template
from qlora_recipes.evaluation import held_out
from qlora_recipes.evaluation.bar import Bar
from qlora_recipes.evaluation.lm_eval_model import RunLanguageModel
from qlora_recipes.evaluation.loaded import HeldOutRow, RestoredRun
from qlora_recipes.evaluation.reasoning import answer_start, reasoning_end, without_reasoning
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT, ModelSpec
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.standins import STANDINS

QUESTION = {"role": "user", "content": "Where does Anna live?"}
SPECS = {"llama2": LLAMA_2_7B_CHAT, "falcon": FALCON_7B}
THOUGHTS = {
    "qwen3": "<think>\nAnna lives in Rolben.\n</think>\n\nIn Belthel.<|im_end|>",
    "gpt_oss": "<|channel|>analysis<|message|>In\nRolben.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>In Belthel.<|return|>",
}


def encoder_of(family: str) -> ConversationEncoder:
    tokenizer = AutoTokenizer.from_pretrained(STANDINS[family].folder)
    spec = SPECS.get(family, ModelSpec(str(STANDINS[family].folder)))
    template = choose_template(spec, tokenizer)
    tokenizer.chat_template = template.source  # as training saves it
    return ConversationEncoder(tokenizer, template)


def run_of(family: str, rows: list[HeldOutRow] | None = None) -> RestoredRun:
    encoder = encoder_of(family)
    model = AutoModelForCausalLM.from_pretrained(STANDINS[family].folder, dtype=torch.bfloat16).eval()
    folder, tokenizer = RunFolder(Path("run")), encoder.tokenizer
    return RestoredRun(folder, receipt("bf16", 0), model, tokenizer, encoder, rows or [], "bf16", "")


def silent() -> Bar:
    return Bar("test", Console(quiet=True))


@pytest.mark.parametrize(
    ("family", "start", "end"),
    [
        ("llama2", " ", None),
        ("falcon", " ", None),
        ("llama3", "", None),
        ("mistral", " ", None),
        ("qwen3", "<think>\n\n</think>\n\n", "</think>"),
        ("gpt_oss", "<|channel|>final<|message|>", "<|message|>"),
    ],
)
def test_where_an_answer_begins_is_found_by_rendering(family: str, start: str, end: str | None) -> None:
    encoder = encoder_of(family)
    assert answer_start(encoder) == start
    assert reasoning_end(encoder) == (end and encoder.tokenizer.convert_tokens_to_ids(end))


def test_an_answer_without_reasoning_is_all_of_it() -> None:
    assert without_reasoning([1, 5, 2, 5, 3, 4], 5) == [3, 4]
    assert without_reasoning([1, 5], 5) == []
    assert without_reasoning([1, 2], 5) == without_reasoning([1, 2], None) == [1, 2]


@pytest.mark.parametrize("family", ["llama3", "qwen3", "gpt_oss"])
def test_choices_begin_as_in_training_to_the_token(family: str) -> None:
    run = run_of(family)
    model = RunLanguageModel(run, 2, silent())
    request = Instance("loglikelihood", {}, (model.apply_chat_template([QUESTION]), " In Belthel."), 0)
    context, words = model._encode_pair(*model._as_trained(request).args)
    whole = run.encoder.encode([QUESTION, {"role": "assistant", "content": "In Belthel."}]).input_ids
    assert context + words == whole[: len(context) + len(words)]
    assert whole[len(context) + len(words)] == run.encoder.end_id
    assert model._as_trained(Instance("loglikelihood", {}, ("Anna", " lives"), 0)).args == ("Anna", " lives")


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_a_turn_goes_on_after_its_reasoning_which_is_not_scored(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = run_of(family), {}
    model = RunLanguageModel(run, 2, silent())

    def generate(self: HFLM, context: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        asked.update(kwargs, room=kwargs["max_length"] - context.shape[1])
        said = run.tokenizer(THOUGHTS[family], add_special_tokens=False, return_tensors="pt").input_ids
        return torch.cat([context, said], dim=1)

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    settings = {"until": ["\n"], "max_gen_toks": 32, "do_sample": False}
    request = Instance("generate_until", {}, (model.apply_chat_template([QUESTION]), settings), 0)
    assert model.generate_until([request]) == ["In Belthel."]
    assert asked["stop"] == [run.encoder.end_token] and run.encoder.end_id in asked["eos_token_id"]
    assert asked["room"] == 256


def test_held_out_answers_are_compared_without_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = {"role": "assistant", "content": "In Belthel.", "reasoning_content": "Anna lives in Rolben."}
    run = run_of("qwen3", [HeldOutRow("row 1", [QUESTION, answered])])
    said = run.tokenizer(THOUGHTS["qwen3"], add_special_tokens=False).input_ids
    monkeypatch.setattr(held_out, "generate", lambda *_, **__: [said])
    scores = held_out.score_answers(run, batch_size=1, limit=None, bar=silent())
    assert [(doc.answer, doc.target, doc.score) for doc in scores.docs] == [("In Belthel.", "In Belthel.", 1.0)]


def test_reasoning_that_the_template_leaves_out_is_not_counted_as_scored() -> None:
    """Some templates drop the thoughts of earlier turns; in bits per byte their bytes would stand for no bits."""
    thought = {"role": "assistant", "reasoning_content": "Anna lives in Rolben.", "content": "In Belthel."}
    row = HeldOutRow(
        "line 1", [QUESTION, thought, {**QUESTION, "content": "And Ben?"}, {**thought, "content": "There."}]
    )
    rendered = SimpleNamespace(in_loss="In Belthel.\n<think>\nAnna lives in Rolben.\n</think>\n\nThere.\n")
    run: Any = SimpleNamespace(encoder=SimpleNamespace(render=lambda *_: rendered))
    assert held_out.scored_words(run, row) == ["In Belthel.", "Anna lives in Rolben.\nThere."]
