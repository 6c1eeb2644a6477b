"""LLM.int8 couples the rows of a batch, so every arm is scored on the same batches, and a comparison says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_runs import answers, make_run

from qlora_recipes import Recipe, environment
from qlora_recipes.comparison.folders import compare_folders
from qlora_recipes.evaluation import harness
from qlora_recipes.evaluation.harness import Options, evaluate_many
from qlora_recipes.evaluation.loaded import BaseKey, RestoredRun, restore_run
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import QuantizedReceipt
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train


def test_every_arm_is_scored_on_the_same_batches(
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "share_threads", lambda: None)
    run = train(resolve(recipe_for("llama2"), precision="int8", model=str(tiny("llama2")), output_dir=tmp_path / "run"))
    seen: dict[str, list[Any]] = {}

    @contextmanager
    def watched(folder: RunFolder, base: Any, key: BaseKey, **options: Any) -> Iterator[RestoredRun]:
        def record(module: Any, arguments: Any) -> None:
            if arguments[0].shape[1] > 1:  # not a token that is generated, which is the arm's own
                seen[key.precision].append(arguments[0].tolist())

        with restore_run(folder, base, key, **options) as restored:
            seen[key.precision] = []
            restored.model.get_input_embeddings().register_forward_pre_hook(record)
            yield restored

    monkeypatch.setattr(harness, "restore_run", watched)
    for precision in ("int8", "bf16"):
        options = Options(precision=precision, limit=10, batch_size=4)
        evaluate_many([run], ["standin_choice", "standin_answer", "held_out"], options=options)
    assert seen["int8"] == seen["bf16"]
    assert {len(batch) for batch in seen["int8"]} >= {2, 4}  # of 4 rows, and what is left of 10


def test_a_comparison_with_int8_says_what_its_scores_depend_on(tmp_path: Path) -> None:
    threshold = {"receipt": {"base__quantized": QuantizedReceipt(28, 28, 6.0)}}
    int8 = make_run(tmp_path, "int8", scores=answers(200), **threshold)
    bf16, nf4 = (make_run(tmp_path, precision, scores=answers(200)) for precision in ("bf16", "nf4"))
    (said,) = (caveat for caveat in compare_folders([int8, bf16], 1.0).caveats if "In int8" in caveat)
    assert "every arm was scored on the same batches, of up to 64 rows" in said
    assert not any("In int8" in caveat for caveat in compare_folders([nf4, bf16], 1.0).caveats)
