"""How answers are generated: greedy to the token, drawn by their seed, and never as a model's own file says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from qlora_recipes.evaluation.generation import Generation, generate, own_defaults, seeded

PROMPTS = [[1, 40, 41, 42], [1, 50], [1, 60, 61]]


@pytest.fixture(scope="module")
def model(tiny: Callable[[str], Path]) -> Any:
    found = AutoModelForCausalLM.from_pretrained(tiny("llama2"), dtype=torch.float32).eval()
    own = dict(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=3.0, no_repeat_ngram_size=1)
    found.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, **own)
    return found


def answered(model: Any, **settings: Any) -> list[list[int]]:
    made = Generation(**{"max_new_tokens": 12, **settings})
    with seeded(made, model.device):
        return generate(model, PROMPTS, end=2, pad=0, settings=made)


@torch.no_grad()
def test_a_temperature_of_zero_is_greedy_to_the_token(model: Any) -> None:
    for prompt, answer in zip(PROMPTS, answered(model), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (ids == prompt or ids[-1] != 2):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]
    assert model.generation_config.no_repeat_ngram_size == 1  # its own again


def test_what_is_drawn_is_repeated_by_its_seed(model: Any) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = answered(model, temperature=2.0, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == answered(model, temperature=2.0, seed=3) != answered(model, temperature=2.0, seed=4)
    assert answered(model, temperature=2.0, top_k=1) == answered(model)


def test_penalty_and_beams_change_the_answer(model: Any) -> None:
    plain = answered(model)
    assert answered(model, repetition_penalty=5.0) != plain
    assert len(answered(model, num_beams=3)) == len(plain)
    assert (
        str(Generation(temperature=0.5, top_k=9, num_beams=2))
        == "temperature 0.5, top_p 1.0, top_k 9, seed 0, num_beams 2"
    )


def test_the_models_own_defaults_are_shown(model: Any) -> None:
    assert own_defaults(model) == "do_sample True, temperature 0.6, top_p 0.9, repetition_penalty 3.0"


def test_a_mixture_that_balances_its_experts_answers_as_without(small: Callable[[str], Path]) -> None:
    """Transformers' load_balancing_loss_func takes the mask of the whole batch, and logits of the newest token."""
    mixture = AutoModelForCausalLM.from_pretrained(small("qwen3_moe"), dtype=torch.float32).eval()
    expected = answered(mixture)
    mixture.config.output_router_logits = True
    assert answered(mixture) == expected
    assert mixture.config.output_router_logits
