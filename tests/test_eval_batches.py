"""Rows scored at a time: as many as there is room for; out of memory takes half and gives the same scores."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from rich.console import Console

from qlora_recipes import DatasetSpec, Recipe
from qlora_recipes.errors import SetupError
from qlora_recipes.evaluation import batches, held_out
from qlora_recipes.evaluation.bar import Bar
from qlora_recipes.evaluation.batches import in_batches
from qlora_recipes.evaluation.lm_eval_model import RunLanguageModel
from qlora_recipes.evaluation.loaded import BaseKey, RestoredRun, restore_base, restore_run
from qlora_recipes.memory.estimate import EVALUATED_POSITIONS, evaluation_memory
from qlora_recipes.memory.workload import Workload
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.86 GiB")


def sizes_of(lengths: list[int], most: int = 8) -> list[tuple[int, int]]:
    """Return rows and longest row of every batch."""
    found = list(in_batches(lengths, most, lambda batch: len(batch)))
    assert sorted(i for batch, _ in found for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == made for batch, made in found)
    return [(len(batch), max(lengths[i] for i in batch)) for batch, _ in found]


def test_batches_have_no_more_positions_than_were_planned() -> None:
    assert sizes_of([4096] * 3) == [(1, 4096)] * 3
    assert sizes_of([5000, 100, 1000, 1000, 1000, 1000, 1000]) == [(1, 5000), (4, 1000), (2, 1000)]
    assert sizes_of([100] * 10) == [(8, 100), (2, 100)]
    assert sizes_of([]) == []


def test_the_plan_has_room_for_every_batch() -> None:
    """Eight rows of 4,096 tokens would have had 6 GiB of logits, where those of one row were planned."""
    for length in (256, 1024, 4096, 8192):
        work = Workload(rows=1, length=length, rank=8, targets=LLAMA_2_7B_CHAT.linear_layers)
        planned = evaluation_memory(LLAMA_2_7B_CHAT.sizes, PRECISIONS["bf16"], work)
        logits = (2 + 4) * 32_000 * max(length, EVALUATED_POSITIONS)
        assert planned.logits + planned.workspace + planned.cache >= logits


def test_out_of_memory_takes_half_of_the_rows_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[int] = []

    def compute(batch: list[int]) -> list[int]:
        asked.append(len(batch))
        if len(batch) > 3:
            raise NO_MEMORY
        return batch

    found = [i for batch, made in in_batches([100] * 16, 16, compute) for i in made]
    assert sorted(found) == list(range(16))
    assert asked == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert "out of memory with 16 rows of up to 100 tokens; now 8 at a time" in capsys.readouterr().err


def test_out_of_memory_with_one_row_is_one_error() -> None:
    def compute(batch: list[int]) -> None:
        raise NO_MEMORY

    with pytest.raises(SetupError, match=r"one row of 4,096 tokens \(CUDA out of memory"):
        list(in_batches([4096] * 2, 8, compute))
    with pytest.raises(ValueError, match="other"):
        list(in_batches([1], 8, lambda batch: int("other")))


@pytest.fixture(scope="module")
def run(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RestoredRun]:
    """A run of two steps, restored."""
    recipe = recipe_for()
    rows = DatasetSpec(recipe.dataset.source, held_out=0.2)
    settings = resolve(
        recipe_for(dataset=rows), model=str(tiny("llama2")), output_dir=tmp_path_factory.mktemp("runs") / "run"
    )
    skipped = ("answers_end", "gradient", "packing_leak", "starting_loss", "tokenizer_reloads", "adapter_changed")
    folder = train(settings, skip_checks=skipped)
    key = BaseKey.of(folder.receipt())
    with restore_run(folder, restore_base(key), key) as restored:
        yield restored


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int], list[tuple[int, ...]]]:
    """Return what lets a model run out of memory above so many positions, and lists the shapes it took."""

    def starve(model: Any, positions: int) -> list[tuple[int, ...]]:
        taken: list[tuple[int, ...]] = []
        plain = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            if ids.numel() > positions:
                raise NO_MEMORY
            taken.append(tuple(ids.shape))
            return plain(*args, **kwargs)

        monkeypatch.setattr(model, "forward", forward)
        return taken

    return starve


def test_scores_are_the_same_whatever_fits(
    run: RestoredRun, short_of_memory: Callable[[Any, int], list[tuple[int, ...]]]
) -> None:
    words = [f" The town of person {i} is Belthel{', which is old' * (i % 3)}." for i in range(6)]
    choices = [Instance("loglikelihood", {}, ("Anna lives in", word), i) for i, word in enumerate(words)]
    texts = [Instance("loglikelihood_rolling", {}, (word * 4,), i) for i, word in enumerate(words[:4])]
    asked = [
        Instance("generate_until", {}, (f"Question {i}:", {"until": ["\n"], "max_gen_toks": 8}), i) for i in range(3)
    ]
    bar = Bar("task", Console(file=io.StringIO()))
    with torch.no_grad():
        model = RunLanguageModel(run, 8, bar)
        rows = [run.encoder.encode(row.messages, row.tools) for row in run.held_out[:4]]
        ways: tuple[Callable[[], Any], ...] = (
            lambda: [score for score, _ in model.loglikelihood(choices)],
            lambda: model.loglikelihood_rolling(texts),
            lambda: held_out.row_losses(run, rows, 8),
        )
        plenty, answers = [way() for way in ways], model.generate_until(asked)
        taken = short_of_memory(run.model, 100)
        few = [way() for way in ways]
        assert model.generate_until(asked) == answers
    assert taken
    for before, after in zip(plenty, few, strict=True):
        assert after == pytest.approx(before, rel=1e-2)  # other shapes round otherwise in 16 bits


def test_choices_of_one_token_stay_one_row(run: RestoredRun, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    plain = HFLM._model_call

    def call(self: Any, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(inps.shape))
        return plain(self, inps, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", call)
    model = RunLanguageModel(run, 8, Bar("task", Console(file=io.StringIO())))
    requests = [(("", ""), [5, 6, 7 + prompt], [choice]) for prompt in range(3) for choice in range(9, 13)]
    found = model._loglikelihood_tokens(requests)
    alone = [model._loglikelihood_tokens([request])[0] for request in requests]
    assert shapes[0] == (3, 3)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], rel=1e-2)


def test_what_ran_out_of_memory_is_freed_before_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    held: list[bool] = []
    monkeypatch.setattr(batches, "release_memory", lambda: held.append(sys.exc_info()[0] is not None))

    def compute(batch: list[int]) -> SimpleNamespace:
        if len(batch) > 1:
            raise NO_MEMORY
        return SimpleNamespace()

    list(in_batches([10, 10], 8, compute))
    assert held == [False]
