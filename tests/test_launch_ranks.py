"""Processes of one run that do not fit together: one clear error, from one of them, and all of them end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from forked_ranks import Ranks, start_ranks

from qlora_recipes import Recipe
from qlora_recipes.data import prepare as prepare_module
from qlora_recipes.errors import DataError
from qlora_recipes.preflight import ranks
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import resolve
from qlora_recipes.training import build, train
from qlora_recipes.training.trainer import RunTrainer

Start = Callable[..., Ranks]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that forks ranks, which are ended with the test."""
    started: list[Ranks] = []

    def begin(count: int, target: Callable[[int], object], **options: Any) -> Ranks:
        started.append(start_ranks(count, target, tmp_path / f"ranks-{len(started)}", **options))
        return started[-1]

    yield begin
    for each in started:
        each.end()


def the_error(started: Ranks) -> str:
    """Return the only error, when every rank has ended with the exit code of one."""
    assert set(started.wait().values()) == {2}
    (message,) = started.errors
    assert message.count("error: ") == 1
    return message


# ---- Agreeing ----


def test_ranks_that_are_alike_meet(start: Start) -> None:
    assert start(3, lambda rank: ranks.meet({"lora": {"r": 4}}, 20)).wait() == {0: 0, 1: 0, 2: 0}


def test_a_rank_that_differs_is_named_with_what_differs(start: Start) -> None:
    facts = {"recipe file": "same", "versions": {"trl": "1.16.0"}, "rows": "aa"}
    odd = {**facts, "recipe file": "other", "versions": {"trl": "1.15.0"}}
    message = the_error(start(3, lambda rank: ranks.meet(odd if rank == 2 else facts, 20)))
    assert "rank 2 on" in message and "rank 1" not in message
    assert "recipe file is other, expected same" in message and "versions.trl is 1.15.0, expected 1.16.0" in message
    assert "rows" not in message


def test_other_gpus_and_another_launch_file_are_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_device", lambda: f"GPU of rank {os.environ['RANK']}")
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    message = the_error(start(2, lambda rank: ranks.meet({}, 20), variables=lambda rank: sharded if rank else {}))
    assert "device is GPU of rank 1, expected GPU of rank 0" in message
    assert "launch.FSDP_VERSION is 2, expected nothing" in message


def test_two_nodes_with_the_same_number_are_told_so(start: Start) -> None:
    message = the_error(start(2, lambda rank: ranks.meet({}, 20), variables=lambda rank: {"RANK": "0"}))
    assert "two processes have rank 0" in message and "--machine_rank" in message


def test_a_rank_that_does_not_come_is_named(start: Start) -> None:
    started = start(3, lambda rank: ranks.meet({}, 2) if rank < 2 else time.sleep(30))
    assert started.wait(ranks=[0, 1]) == {0: 2, 1: 2}
    (message,) = started.errors
    assert "waited 2 s for rank 2 of 3" in message


def test_a_rank_that_nobody_answers_says_where_it_looked(start: Start) -> None:
    started = start(
        2, lambda rank: ranks.meet({}, 1) if rank else None, variables=lambda rank: {"MASTER_PORT": "9"}, nodes=2
    )
    assert started.wait()[1] == 2
    assert "got no answer from rank 0 at 127.0.0.1:9 within 1 s" in started.errors[0]


def test_a_folder_that_is_not_shared_is_refused(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_FILE_WAIT", 0.3)
    places = [tmp_path / "node0" / "runs" / "x", tmp_path / "node1" / "runs" / "x"]
    for place in places:
        place.parent.mkdir(parents=True)
    message = the_error(start(2, lambda rank: ranks.prove_shared(places[rank]), nodes=2))
    assert message.startswith("error: rank 1 on ") and "--output_dir" in message
    assert not any(list(place.parent.iterdir()) for place in places)
    assert start(2, lambda rank: ranks.prove_shared(places[0]), nodes=2).wait() == {0: 0, 1: 0}
    assert not list(places[0].parent.iterdir())


def test_an_error_of_one_rank_ends_all_of_them(start: Start) -> None:
    def fail(rank: int) -> None:
        ranks.meet({}, 20)
        if rank == 1:
            raise DataError("line 7 is no row")
        ranks.agree({"rows": "aa"})

    started = start(3, fail)
    assert the_error(started) == "error: line 7 is no row\n"


# ---- Rows ----


def test_rows_are_encoded_once_on_each_node(
    start: Start, tmp_path: Path, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = tmp_path / "calls"

    def counted(*given: Any) -> Any:
        with calls.open("a") as log:
            log.write(os.environ.get("RANK", "alone"))
        return prepare_module.prepare(*given)

    monkeypatch.setattr(build, "prepare", counted)
    settings = resolve(recipe_for(), model=str(tiny("llama2")), output_dir=tmp_path / "out")
    alone = build.prepare_rows(settings)

    def read(rank: int) -> None:
        run = build.prepare_rows(settings)
        assert list(run.data.train) == list(alone.data.train) and list(run.data.held_out) == list(alone.data.held_out)
        assert run.data.receipt == alone.data.receipt and (run.data.figures == alone.data.figures).all()

    calls.write_text("")
    assert set(start(4, read, nodes=2).wait().values()) == {0}
    assert sorted(calls.read_text()) == ["0", "2"]


# ---- A whole run ----


@pytest.fixture
def trained(
    start: Start, tmp_path: Path, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Ranks]:  # fmt: skip
    """Return a function that trains in two processes; keyword arguments are training settings."""
    monkeypatch.setattr(ranks, "_LAST_WORDS", 1)
    skip = ("answers_end", "gradient", "gradient_after_evaluation", "packing_leak", "starting_loss",
            "tokenizer_reloads", "adapter_reloads")  # fmt: skip

    def run(name: str, *, resume: bool = False, before: Callable[[int], object] = id, **training: Any) -> Ranks:
        settings = resolve(
            recipe_for(), model=str(tiny("llama2")), output_dir=tmp_path / name,
            training=dict(max_steps=4, save_strategy="steps", save_steps=2, **training),
        )  # fmt: skip

        def work(rank: int) -> None:
            before(rank)
            train.train(settings, resume=resume, skip_checks=skip)

        return start(2, work)

    return run


def at_step(step: int, rank: int, act: Callable[[], object]) -> Callable[[int], None]:
    """Return what makes a rank do something when it begins a step."""

    def before(this: int) -> None:
        original = RunTrainer.training_step

        def training_step(self: Any, *given: Any, **named: Any) -> Any:
            if this == rank and self.state.global_step == step:
                act()
            return original(self, *given, **named)

        RunTrainer.training_step = training_step  # type: ignore[method-assign]

    return before


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17"), reason="resumes ranks on cpu:0, which torch.load does not know"
)
def test_a_rank_that_is_killed_is_named_and_the_run_resumes_to_the_same_adapter(
    trained: Callable[..., Ranks], tmp_path: Path
) -> None:
    assert trained("whole").wait() == {0: 0, 1: 0}
    killed = trained("killed", before=at_step(3, 1, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert killed.wait() == {0: 2, 1: -signal.SIGKILL}
    (message,) = killed.errors
    assert message.startswith("error: rank 1 (process ") and "is gone or hangs" in message and "--resume" in message
    assert trained("killed", resume=True).wait() == {0: 0, 1: 0}
    whole, resumed = (RunFolder(tmp_path / name).receipt() for name in ("whole", "killed"))
    assert resumed.resumes[0].from_step == 2
    assert resumed.adapter.final_sha256 == whole.adapter.final_sha256


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_by_the_timeout_and_is_named(trained: Callable[..., Ranks]) -> None:
    hanging = trained("hangs", before=at_step(1, 1, lambda: time.sleep(60)), ddp_timeout=4)
    assert hanging.wait(ranks=[0])[0] == 2
    (message,) = hanging.errors
    assert message.startswith("error: rank 1 (process ") and "Timed out waiting 4000ms" in message
