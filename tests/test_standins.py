"""The stand-ins load, are small, have the real tokenizers' special tokens, and their data can be made again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template

from qlora_recipes.chat_templates import FALCON_CHAT, LLAMA_2_CHAT, ChatTemplate
from qlora_recipes.standins import HELD_OUT_TEXT, QUESTIONS, ROWS, STANDINS
from qlora_recipes.standins.rows import CHOICES, LOOK_UP, bundled_files
from qlora_recipes.standins.tokenizer import MODERN, SPECIAL
from qlora_recipes.standins.wordings import WORDINGS
from qlora_recipes.standins.world import World, make_world

MEBIBYTE = 2**20
TURNS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
ANY_TEXT = "Kōan «ß» Привет, 你好 😊\tfin  \x00\x7f ÿ\u200d\U0010ffff"


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(params=list(STANDINS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def load_tokenizer(family: str) -> PreTrainedTokenizerBase:
    legacy = {"legacy": True} if family == "llama2" else {}
    return AutoTokenizer.from_pretrained(STANDINS[family].folder, **legacy)


def test_config_is_of_the_family(family: str) -> None:
    config = AutoConfig.from_pretrained(STANDINS[family].folder)
    real = {
        "llama2": {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 2048},
        "falcon": {
            "model_type": "falcon",
            "tie_word_embeddings": True,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "alibi": False,
            "bias": False,
        },
        "llama3": {"model_type": "llama", "tie_word_embeddings": False, "max_position_embeddings": 131_072},
        "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "max_position_embeddings": 40_960},
        "smollm3": {"model_type": "smollm3", "tie_word_embeddings": False, "no_rope_layers": [1, 1, 1, 0]},
        "mistral": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": None},
        "gemma3": {"model_type": "gemma3_text", "tie_word_embeddings": False, "sliding_window": 512},
        "gpt_oss": {"model_type": "gpt_oss", "tie_word_embeddings": False, "num_local_experts": 4},
    }[family]
    assert {name: getattr(config, name) for name in real} == real
    assert config.vocab_size == len(load_tokenizer(family))


def test_folder_is_small(family: str) -> None:
    size = sum(file.stat().st_size for file in STANDINS[family].folder.iterdir())
    assert size <= 8 * MEBIBYTE


def test_weights_are_bfloat16_and_linears_fill_nf4_blocks(family: str) -> None:
    with safe_open(STANDINS[family].folder / "model.safetensors", "pt") as weights:
        for name in list(weights.keys()):  # no mapping: it has no iterator of its own
            part = weights.get_slice(name)
            assert part.get_dtype() == "BF16", name
            assert len(part.get_shape()) == 1 or part.get_shape()[-1] % 64 == 0, name


def test_special_tokens_are_the_real_ones() -> None:
    llama2, falcon = load_tokenizer("llama2"), load_tokenizer("falcon")
    assert llama2.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]) == [0, 1, 2, 3, 258]
    assert (llama2.bos_token, llama2.eos_token, llama2.pad_token) == ("<s>", "</s>", None)
    assert falcon.convert_ids_to_tokens([0, 10, 11]) == [">>TITLE<<", ">>MIDDLE<<", "<|endoftext|>"]
    assert (falcon.bos_token_id, falcon.eos_token_id, falcon.pad_token) == (11, 11, None)


@pytest.mark.parametrize(
    ("family", "begin", "end", "pad", "others"),
    [
        ("llama3", "<|begin_of_text|>", "<|eot_id|>", None, ["<|start_header_id|>", "<|python_tag|>"]),
        ("qwen3", None, "<|im_end|>", "<|endoftext|>", ["<|im_start|>", "<think>", "</tool_call>"]),
        ("smollm3", None, "<|im_end|>", "<|im_end|>", ["<|im_start|>", "</think>"]),
        ("mistral", "<s>", "</s>", None, ["[INST]", "[/INST]", "[TOOL_CALLS]"]),
        ("gemma3", "<bos>", "<end_of_turn>", "<pad>", ["<start_of_turn>"]),
        ("gpt_oss", "<|startoftext|>", "<|return|>", "<|endoftext|>", ["<|channel|>", "<|call|>"]),
    ],
)
def test_models_of_today_have_their_own_tokens_at_the_front_of_one_vocabulary(
    family: str, begin: str | None, end: str, pad: str | None, others: list[str]
) -> None:
    tokenizer, shared = load_tokenizer(family), load_tokenizer("llama3")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (begin, end, pad)
    assert max(tokenizer.convert_tokens_to_ids([end, *others])) < SPECIAL
    words = range(SPECIAL, len(tokenizer))
    assert tokenizer.convert_ids_to_tokens(words) == shared.convert_ids_to_tokens(words)


@pytest.mark.parametrize(("family", "template"), [("qwen3", "qwen3"), ("gemma3", "gemma3"), ("gpt_oss", "gptoss")])
def test_templates_are_those_that_trl_knows(family: str, template: str) -> None:
    marked = Path(trl.__file__).parent / "chat_templates" / f"{template}_training.jinja"
    assert get_training_chat_template(load_tokenizer(family)) == marked.read_text(encoding="utf-8")


def test_thoughts_and_tools_are_rows_of_openai_s_shape() -> None:
    thinking, looking_up = (
        [json.loads(line) for line in ROWS[name].read_text(encoding="utf-8").splitlines()]
        for name in ("reasoning", "tools")
    )
    assert all(row["messages"][-1]["reasoning_content"] for row in thinking)
    calls = [row["messages"][1]["tool_calls"] for row in looking_up if row["tools"]]
    assert len(looking_up) / 3 < len(calls) < len(looking_up)
    assert {call["function"]["name"] for called in calls for call in called} == {LOOK_UP["function"]["name"]}


def test_any_text_survives_the_tokenizer(family: str) -> None:
    tokenizer = load_tokenizer(family)
    ids = tokenizer(ANY_TEXT, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == ANY_TEXT


def test_same_seed_gives_the_same_world(world: World) -> None:
    assert make_world() == world
    assert make_world(1) != world


@pytest.mark.parametrize("path", [*ROWS.values(), QUESTIONS, HELD_OUT_TEXT], ids=lambda path: path.name)
def test_bundled_files_are_what_the_world_gives(path: Path, world: World) -> None:
    assert path.read_text(encoding="utf-8") == bundled_files(world)[path.name]


def test_no_tuning_row_names_a_held_out_person(world: World) -> None:
    rows = "".join(path.read_text(encoding="utf-8") for path in ROWS.values())
    assert all(person.name in rows for person in world.tuning_people[:5])
    assert not [person.name for person in world.held_out_people if person.name in rows]


def test_every_question_has_its_answer_once_among_different_choices() -> None:
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert {question["subject"] for question in questions} == set(WORDINGS)
    assert len(questions) >= 600
    for question in questions:
        assert len(set(question["choices"])) == CHOICES
        assert question["choices"].index(question["text"]) == question["answer"]


def test_bundled_rows_fit_the_recommended_length(family: str) -> None:
    tokenizer = load_tokenizer(family)
    if family in MODERN:
        rows = [json.loads(line) for line in ROWS["chat"].read_text(encoding="utf-8").splitlines()]
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    else:
        lines = ROWS["guanaco_llama2"].read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert longest <= STANDINS[family].training["max_length"]


@pytest.mark.parametrize(("family", "template"), [("llama2", LLAMA_2_CHAT), ("falcon", FALCON_CHAT)])
def test_end_of_turn_is_one_token_in_the_chat_format(family: str, template: ChatTemplate) -> None:
    tokenizer = load_tokenizer(family)
    ids = tokenizer.apply_chat_template(TURNS, chat_template=template.source, return_dict=True)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", MODERN)
def test_the_tokenizer_s_own_template_ends_an_answer_with_its_end_token(family: str) -> None:
    tokenizer = load_tokenizer(family)
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text.rstrip().endswith(f"Here.{tokenizer.eos_token}")


def test_package_imports_no_torch() -> None:
    code = "import sys, qlora_recipes.standins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
