"""Architectures of today as small random models: rows, template and plan of each, and a whole run of a few."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from qlora_recipes.base.loading import load_outline
from qlora_recipes.data.encoding import IGNORED, Encoded
from qlora_recipes.errors import UsageError
from qlora_recipes.experiments.families import results
from qlora_recipes.experiments.families.architectures import ARCHITECTURES
from qlora_recipes.experiments.families.command import main
from qlora_recipes.experiments.families.examine import Examined, examine, mask_beside_trl, quantized_share, write_rows
from qlora_recipes.experiments.families.make import make
from qlora_recipes.run.receipt import Check

NAMES = list(ARCHITECTURES)
TRAINED = ("qwen3_moe", "gemma2", "falcon")  # experts; soft caps and windows; linears of a class of their own
SAID = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It was Ada Berg."}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of an architecture, made once."""
    folder = tmp_path_factory.mktemp("families")

    def folder_of(name: str) -> Path:
        return folder / name if (folder / name).exists() else make(name, folder / name)

    return folder_of


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(30, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("name", NAMES)
def test_folder_reads_as_it_is_declared(name: str, made: Callable[[str], Path]) -> None:
    folder, architecture = made(name), ARCHITECTURES[name]
    vocabulary = architecture.vocabulary
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Where does Ada live?\n  In Norra; that's 1234 é."
    assert tokenizer(text)["input_ids"] == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == (vocabulary.bos, vocabulary.eos)
    assert all(len(tokenizer.tokenize(token)) == 1 for token in (*vocabulary.first, *vocabulary.last))
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.convert_ids_to_tokens([ends] if isinstance(ends, int) else ends) == list(architecture.ends)
    assert bool(tokenizer.chat_template) == bool(architecture.template)
    outline = load_outline(str(folder), None)
    assert outline is not None and type(outline).__name__ == architecture.model_class


@pytest.mark.parametrize("name", NAMES)
def test_rows_template_and_plan(name: str, made: Callable[[str], Path], rows: Path) -> None:
    found = examine(name, made(name), rows, precisions=())
    assert found.reasons == {}
    assert found.mask in ("equal", "TRL has none") or "mask" in found.known
    assert found.plan["bf16"] == pytest.approx(1, abs=0.02)
    assert results.cells(found)[list(results.COLUMNS).index("forged")].startswith("0 of ")


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_in_nf4(name: str, made: Callable[[str], Path], rows: Path) -> None:
    found = examine(name, made(name), rows, steps=2, precisions=("nf4",))
    assert found.reasons == {}
    assert found.quantized_share == 1
    assert found.plan["nf4"] == pytest.approx(1, abs=0.02)
    assert found.checks["nf4"]["adapter_reloads"].verdict == "pass"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_matrix(name: str, made: Callable[[str], Path], rows: Path) -> None:
    found = examine(name, made(name), rows)
    assert found.reasons == {}
    assert set(found.losses) == {"nf4", "bf16"}


def test_a_model_that_cannot_be_read_is_told_in_every_part(tmp_path: Path, rows: Path) -> None:
    found = examine("llama2", tmp_path / "missing", rows)
    assert {"plan", "rows", "nf4", "bf16"} <= set(found.reasons)
    assert not found.passes


def test_experts_left_in_16_bits_are_seen(made: Callable[[str], Path]) -> None:
    """Transformers quantizes linear layers alone, and most weights of a mixture are those of its experts."""
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(made("mixtral"), quantization_config=four_bits, dtype=torch.bfloat16)
    outline = load_outline(str(made("mixtral")), None)
    assert outline is not None
    assert 0 < quantized_share(model, outline) < 0.5


def _run_of(ids: list[int], labels: list[int]) -> SimpleNamespace:
    return SimpleNamespace(data=SimpleNamespace(train=[SimpleNamespace(messages=SAID, encoded=Encoded(ids, labels))]))


def test_mask_beside_trl_tells_ids_and_labels_apart(made: Callable[[str], Path]) -> None:
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = AutoTokenizer.from_pretrained(made("llama3"))
    encoded = tokenizer.apply_chat_template(
        SAID, chat_template=get_training_chat_template(tokenizer), return_dict=True, return_assistant_tokens_mask=True
    )
    ids = encoded["input_ids"]
    labels = [token if part else IGNORED for token, part in zip(ids, encoded["assistant_masks"], strict=True)]
    assert mask_beside_trl(_run_of(ids, labels), made("llama3")) == "equal"
    assert mask_beside_trl(_run_of(ids, ids), made("llama3")) == "1 of 1 masks differ"
    assert mask_beside_trl(_run_of(ids[1:], labels[1:]), made("llama3")) == "1 of 1 rows have other ids"
    assert mask_beside_trl(_run_of(ids, labels), made("falcon")) == "TRL has none"


def test_table_tells_figures_and_reasons() -> None:
    good = Examined("qwen3", quantized_share=1.0, mask="equal", plan={"bf16": 1.0}, losses={"nf4": (7.0, 6.5)})
    good.checks["nf4"] = {
        "packing_leak": Check("packing_leak", "pass", "0 in the next conversation's logits, 4 in its own")
    }
    bad = Examined("gpt_oss")
    with bad.part("nf4"):
        raise ValueError("no <sinks> here")
    assert good.passes and not bad.passes
    text = results.markdown([good, bad], "python eval/families.py")
    assert "| 100.0% | - | equal | 0 | 1.000 - | - | - - | 7.00 6.50 | - | - |" in text
    assert "- gpt_oss: nf4: ValueError: no \\<sinks\\> here" in text
    assert "1 of 2 architectures" in text
    console = Console(width=160, record=True, quiet=False)
    results.print_table([good, bad], console)
    assert "gpt_oss: nf4: ValueError: no <sinks> here" in console.export_text()
    assert json.loads(json.dumps(results.as_dict(bad)))["reasons"] == {"nf4": "ValueError: no <sinks> here"}


def test_the_program_makes_folders_and_refuses_unknown_names(tmp_path: Path) -> None:
    main(["--families", "phi3", "--make", str(tmp_path)])
    assert {file.name for file in (tmp_path / "phi3").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    with pytest.raises(UsageError, match=r"no architecture 'phi'.*phi3"):
        main(["--families", "phi", "--make", str(tmp_path)])
