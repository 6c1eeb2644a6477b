"""The comparison of speeds: bases of the right shapes, a bound by arithmetic, and arms that train on the same."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from trl.kernels import ChunkedLogProbFunction, chunked_logprob
from trl.trainer import utils

from qlora_recipes import standins
from qlora_recipes.commands.entry import run_command
from qlora_recipes.errors import UsageError
from qlora_recipes.experiments.throughput import arms, bound, command, results
from qlora_recipes.experiments.throughput.arms import Specification
from qlora_recipes.families.family import Sizes
from qlora_recipes.families.llama import LLAMA
from qlora_recipes.kernels.blocked import is_available
from qlora_recipes.memory.sizes import linear_shapes, parameter_count, sizes_of
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT
from qlora_recipes.training.build import prepare_rows

ROOT = Path(__file__).parent.parent
SEVEN = {"llama2": (4096, LLAMA_2_7B_CHAT.sizes), "falcon": (4544, FALCON_7B.sizes)}


@pytest.mark.parametrize("family", SEVEN)
def test_the_full_shape_is_the_7b_model(family: str, tmp_path: Path) -> None:
    hidden, sizes = SEVEN[family]
    arms.base_config(family, hidden, 32, sizes.vocab_size).save_pretrained(tmp_path)
    assert sizes_of(tmp_path) == sizes


@pytest.mark.parametrize(("family", "hidden"), [("llama2", 256), ("falcon", 192)])
def test_a_base_of_a_shape_is_loaded_as_that_shape(family: str, hidden: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = arms.SPECS[family]
    tokenizer = AutoTokenizer.from_pretrained(standins.STANDINS[family].folder, **spec.tokenizer)
    arms.make_base(arms.base_config(family, hidden, 2, 1600), tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert sum(weight.numel() for weight in model.parameters()) == parameter_count(sizes_of(tmp_path))
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path)("Hello").input_ids == tokenizer("Hello").input_ids
    heads = {"llama2": 128, "falcon": 64}[family]
    assert sizes_of(tmp_path).num_attention_heads == hidden // heads


@pytest.mark.parametrize(("family", "hidden"), [("llama2", 1000), ("llama2", 64), ("falcon", 4545), ("falcon", 0)])
def test_a_width_that_no_heads_make_up_is_refused(family: str, hidden: int) -> None:
    with pytest.raises(UsageError, match=f"--hidden_size {hidden}: expected a multiple of"):
        arms.base_config(family, hidden, 2, 1000)


SMALL = Sizes(
    family=LLAMA,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=16,
    vocab_size=100,
    tied_embeddings=False,
)
WEIGHTS = 2 * (4 * 8 * 8 + 3 * 8 * 16)


def test_the_bound_by_hand() -> None:
    machine = bound.Machine(flops=1000.0, copied=500.0)
    linears = bound.tokens_per_second(machine, SMALL, 0.0, None)
    assert linears == pytest.approx(1000 / (4 * WEIGHTS))
    half = bound.tokens_per_second(machine, SMALL, 0.5, None)
    assert half == pytest.approx(1000 / (4 * (WEIGHTS + 100 * 8 * 0.5)))
    packed = bound.tokens_per_second(machine, SMALL, 0.5, 64.0)
    dequantized = 2 * (0.5 + 2) * WEIGHTS / 500 / 64
    assert 1 / packed == pytest.approx(1 / half + dequantized)


def test_the_bound_of_llama_2_7b() -> None:
    """6.48 G weights in linear layers: 4 flop each, and 1 TFLOP/s make 38.6 tokens a second."""
    found = bound.tokens_per_second(bound.Machine(1e12, 1e11), LLAMA_2_7B_CHAT.sizes, 0.0, None)
    assert found == pytest.approx(1e12 / 4 / 6_476_005_376)


def turn(speed: float, **others: Any) -> dict[str, Any]:
    found = {"tokens_per_second": speed, "supervised_tokens_per_second": speed / 4, "peak_bytes": 1000}
    return {**found, "losses": [speed], **others}


def test_the_median_turn_stands_for_all() -> None:
    found = command._median([turn(30.0, peak_bytes=5), turn(10.0, peak_bytes=9), turn(20.0, peak_bytes=7)])
    assert found["tokens_per_second"] == 20
    assert found["losses"] == [20.0]
    assert found["tokens_per_second_range"] == [10, 30]
    assert found["supervised_tokens_per_second"] == 5
    assert found["peak_bytes"] == 7
    assert found["peak_bytes_range"] == [5, 9]
    even = command._median([turn(10.0), turn(20.0)])
    assert even["tokens_per_second"] == even["losses"][0] == 10  # of one turn, all of it
    assert command._median([turn(7.0)])["tokens_per_second_range"] == [7, 7]


def test_the_machine_is_measured_and_the_median_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "_COPIED", 2**10)
    monkeypatch.setattr(bound, "_TOKENS", 4)
    seconds = iter([2.0, 4.0, 0.5])  # forward, backward, copy
    monkeypatch.setattr(bound, "_seconds", lambda work, device: work() is None or next(seconds))
    machine = bound.measure(SMALL, torch.device("cpu"), torch.bfloat16)
    assert machine.flops == pytest.approx(2 * (2 * 4 * 8 * 16) / 6)
    assert machine.copied == pytest.approx(2 * 2**10 / 0.5)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--steps", "1"], "--steps: got '1', expected a whole number from 2 up"),
        (["--repeats", "0"], "--repeats: got '0', expected a whole number from 1 up"),
        (["--vocab_size", "100"], "--vocab_size: got 100, expected at least the tokenizer's 1,536"),
        (["--num_hidden_layers", "0"], "--num_hidden_layers: got '0', expected a whole number from 1 up"),
        (["--precision", "nf"], "unknown precision 'nf'"),
        (["--storage", "expandd"], "unknown --storage 'expandd'"),
        (["--rows", "missing.jsonl"], "--rows: got 'missing.jsonl', expected a file that exists"),
        (["--json", "missing/figures.json"], "expected a file in a folder that exists"),
        (["--hidden_size", "1000"], "--hidden_size 1000: expected a multiple of 128"),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(command.main, words)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert part in message
    assert "Traceback" not in message


def specification(family: str, **others: Any) -> Specification:
    """Return what arms on a family's stand-in share."""
    given = dict(
        family=family,
        model=str(standins.STANDINS[family].folder),
        rows=str(standins.ROWS[command._FORMATS[family]]),
        precision="nf4",
        dtype="bfloat16",
        max_length=256,
        steps=2,
        r=16,
        storage="auto",
    )
    return Specification(**{**given, **others})


def test_rows_of_a_length_are_cut_there(tmp_path: Path) -> None:
    settings = arms.settings_of(specification("llama2", rows=command._rows_of(96, tmp_path), max_length=96))
    assert settings.auto_fields == {"batch", "checkpointing"}
    assert settings.training["per_device_train_batch_size"] * settings.training["gradient_accumulation_steps"] == 8
    rows = prepare_rows(settings).data.train
    assert len(rows) == 256
    assert {len(row.encoded.input_ids) for row in rows} == {96}


def linears_of(family: str) -> int:
    sizes = sizes_of(standins.STANDINS[family].folder)
    return sizes.num_hidden_layers * len(linear_shapes(sizes))


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return family to a file of the first of its bundled rows, which are soon read."""
    folder = tmp_path_factory.mktemp("rows")
    found = {}
    for family, name in command._FORMATS.items():
        found[family] = folder / f"{family}.jsonl"
        found[family].write_text("".join(standins.ROWS[name].read_text().splitlines(keepends=True)[:40]))
    return found


@pytest.fixture(scope="module")
def comparison(few_rows: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Return what a whole comparison on Falcon's stand-in found, each arm in its own process, and what it printed."""
    folder = tmp_path_factory.mktemp("comparison")
    words = ["--standin", "--steps", "2", "--repeats", "1", "--max_length", "256", "--json", "figures.json"]
    done = subprocess.run(
        [sys.executable, ROOT / "eval" / "throughput.py", *words, "--family", "falcon", "--rows", few_rows["falcon"]],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in folder.iterdir()] == ["figures.json"]
    return json.loads((folder / "figures.json").read_text()), done.stdout


@pytest.mark.slow
def test_a_comparison_holds_every_arm(comparison: tuple[dict[str, Any], str]) -> None:
    found, printed = comparison
    assert tuple(found["arms"]) == arms.ARMS == ("trl_defaults", "trl_notebook", "trl_by_hand", "recipe")
    for arm, of_arm in found["arms"].items():
        assert of_arm["tokens_per_second"] > of_arm["supervised_tokens_per_second"] > 0
        assert of_arm["tokens_per_second_range"] == [of_arm["tokens_per_second"]] * 2
        assert of_arm["peak_bytes"] > 2**26
        assert len(of_arm["losses"]) == 2
        assert arm in printed
    assert found["bound"]["tokens_per_second"] > 0
    assert found["model"]["family"] == "falcon"
    assert found["model"]["standin"]
    assert found["rows"]["max_length"] == 256
    assert found["precision"] == "nf4"
    assert f"bound {found['bound']['tokens_per_second']:,.0f} tokens/s" in printed


@pytest.mark.slow
def test_falcon_is_quantized_by_the_recipe_alone(comparison: tuple[dict[str, Any], str]) -> None:
    found = comparison[0]["arms"]
    assert [found[arm]["quantized_linears"] for arm in arms.ARMS] == [0, 0, 0, linears_of("falcon")]
    defaults, *sixteen, recipe = (found[arm]["losses"][0] for arm in arms.ARMS)
    assert sixteen == pytest.approx([defaults] * 2, rel=0.005)
    assert recipe == pytest.approx(defaults, rel=0.1)  # of a base in 4 bits, beside one in 16


@pytest.mark.slow
def test_a_comparison_is_printed_and_drawn(comparison: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    screen = io.StringIO()
    results.print_table(comparison[0], Console(file=screen, width=command._WIDTH))
    assert screen.getvalue() == comparison[1]
    assert "x 1.00" in screen.getvalue()  # the recipe beside itself
    results.plot([comparison[0]] * 2, tmp_path / "figures.png")
    assert (tmp_path / "figures.png").read_bytes()[:4] == b"\x89PNG"


def test_the_arms_train_on_the_same_and_learn_the_same(
    few_rows: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where TRL's scripts quantize too: in one process, with what this package replaces put back before each."""
    found = {}
    for arm in arms.ARMS:
        monkeypatch.setattr(utils, "_use_triton", chunked_logprob._use_triton)
        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
        found[arm] = arms.run(arm, specification("llama2", rows=str(few_rows["llama2"])))
    defaults, notebook, by_hand, recipe = found.values()
    for each in (notebook, by_hand, recipe):
        assert each["losses"] == pytest.approx(defaults["losses"], rel=0.005)
        assert each["tokens"] == defaults["tokens"]
        assert each["supervised_tokens"] == defaults["supervised_tokens"]
        assert each["padding_share"] == 0 < defaults["padding_share"]
    assert [each["micro_batch"] for each in found.values()][:3] == [8, 1, 1]
    assert [each["checkpointing"] for each in found.values()][:3] == [True, True, False]
    assert recipe["training_bytes"] >= 0
    assert recipe["planned_bytes"] > 0
    quantized = [linears_of("llama2")] * 2
    assert [each["quantized_linears"] for each in found.values()] == [*quantized, 0, quantized[0]]  # 0: dequantized
    assert recipe["storage"] == ("blocked" if is_available() else "expanded")
