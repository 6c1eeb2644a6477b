"""What nobody stated is fitted to the machine; what was stated and the global batch stay, when resumed too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from preflight_runs import read
from rich.console import Console

from qlora_recipes import DatasetSpec, Recipe, environment
from qlora_recipes.commands.recipe_cli import main, parse, settings_from
from qlora_recipes.errors import UsageError
from qlora_recipes.memory import fitting
from qlora_recipes.memory.estimate import GIB, training_memory
from qlora_recipes.memory.fitting import ENOUGH_TOKENS, Machine, describe, fit_to_memory
from qlora_recipes.memory.sizes import sizes_for
from qlora_recipes.memory.workload import Workload, workload_of
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import AUTO_FIELDS, Settings, resolve
from qlora_recipes.training import build
from qlora_recipes.training import train as train_module
from qlora_recipes.training.build import load_model
from qlora_recipes.training.configuration import make_sft_config
from qlora_recipes.training.journal import restore_batch
from qlora_recipes.training.train import finalize_settings, train

BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
ALL_OPEN = frozenset(AUTO_FIELDS)


class Seven(Recipe):
    model = LLAMA_2_7B_CHAT
    dataset = DatasetSpec("rows.jsonl")
    training = dict(max_length=1024)


class SevenOfFalcon(Seven):
    model = FALCON_7B


class Unpacked(Seven):
    training = dict(packing=False)


def machine(gib: float, device: str = "cuda", **others: Any) -> Machine:
    return Machine(device, int(gib * GIB), **others)


def cut(settings: Settings) -> tuple[int, int, int]:
    """Return rows, accumulation, and every how many layers there is a checkpoint (0: none)."""
    work = workload_of(settings)
    return work.rows, work.accumulation, work.checkpoint_every


def needed(settings: Settings, here: Machine, **changes: Any) -> int:
    work = replace(workload_of(settings, here.device, here.processes), **changes)
    return training_memory(sizes_for(settings), settings.precision, work).total


@pytest.mark.parametrize("recipe", [Seven, SevenOfFalcon, Unpacked])
@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_global_batch_is_kept_and_the_memory_suffices(recipe: type[Recipe], precision: str, device: str) -> None:
    asked = resolve(recipe, precision=precision)
    assert asked.auto_fields == ALL_OPEN
    for batch in (1, 2, 6, 7, 16, 24):
        several = replace(asked, training={**asked.training, ACCUMULATION: batch})
        for gib in (1, 8, 12, 16, 20, 24, 40, 80, 200):
            here = machine(gib, device)
            found = fit_to_memory(several, here)
            rows, accumulation, every = cut(found)
            assert rows * accumulation == batch
            assert found.auto_fields == frozenset()
            assert found.storage in ("packed", "expanded")  # none is a CPU that multiplies in bfloat16
            kept = {**found.training}
            for name in AUTO_FIELDS["batch"] | AUTO_FIELDS["checkpointing"]:
                kept.pop(name, None)
            assert kept.items() <= several.training.items()
            if needed(found, here) > here.bytes:  # only where nothing fits; then as the library's defaults say
                assert needed(several, here, rows=1, checkpoint_every=1, storage="packed") > here.bytes
                assert (rows, every) == (1, 1)


def test_less_memory_takes_the_next_slower_way() -> None:
    asked = resolve(Seven, precision="bf16")
    seen: list[tuple[int, int, int]] = []
    for gib in range(100, 12, -1):
        here = machine(gib)
        found = fit_to_memory(asked, here)
        if not seen or cut(found) != seen[-1]:
            seen.append(cut(found))
        if needed(found, here) > here.bytes:
            break
    assert seen[0] == (16, 1, 0)
    assert seen[-1] == (1, 16, 1)
    assert len(set(seen)) == len(seen)  # none comes back
    costs = [fitting._cost(every, rows * 1024) for rows, _, every in seen]
    assert costs == sorted(costs)
    assert {every for _, _, every in seen} == {0, 1, 2, 4}


def test_of_the_ways_that_fit_the_fastest_is_taken() -> None:
    asked = resolve(Unpacked, precision="bf16")
    for gib in (14, 16, 18, 21, 26, 34, 50, 90):
        here = machine(gib)
        work = workload_of(asked, here.device)
        fitting_ways = [
            way
            for way in fitting._workloads(asked, replace(work, storage="packed"))
            if training_memory(sizes_for(asked), asked.precision, way).total <= here.bytes
        ]
        if not fitting_ways:
            continue
        best = min(fitting_ways, key=lambda way: fitting._cost(way.checkpoint_every, way.rows * 256))
        assert cut(fit_to_memory(asked, here)) == (best.rows, best.accumulation, best.checkpoint_every)


def test_checkpointing_every_layer_costs_more_than_a_few_small_micro_batches() -> None:
    assert fitting._cost(0, 1024) < fitting._cost(4, 1024) < fitting._cost(2, 1024) < fitting._cost(1, 1024)
    assert fitting._cost(0, 2048) < fitting._cost(0, 1024)
    assert fitting._cost(0, 1024) < fitting._cost(1, 16384)


def test_a_micro_batch_is_no_larger_than_gains_anything() -> None:
    for device, enough in ENOUGH_TOKENS.items():
        for recipe, per_row in ((Seven, 1024), (Unpacked, 256)):
            asked = resolve(recipe)
            many = replace(asked, training={**asked.training, ACCUMULATION: 256})
            assert cut(fit_to_memory(many, machine(10_000, device)))[0] == enough // per_row


@pytest.mark.parametrize("gib", [6, 10, 16, 20, 24, 40, 80])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("recipe", [Seven, SevenOfFalcon])
def test_all_precisions_of_one_dtype_are_cut_up_alike_where_the_widest_fits(
    recipe: type[Recipe], device: str, gib: float
) -> None:
    here = machine(gib, device)
    arms = {name: fit_to_memory(resolve(recipe, precision=name), here) for name in ("bf16", "nf4", "nf4-single", "fp4")}
    if needed(arms["bf16"], here) > here.bytes:
        assert cut(arms["bf16"]) == (1, 16, 1)
        return
    assert len({cut(arm) for arm in arms.values()}) == 1


def test_what_is_stated_stays() -> None:
    here = machine(10_000)
    for stated, name in (
        ({BATCH: 2}, "batch"),
        ({ACCUMULATION: 4}, "batch"),
        ({"auto_find_batch_size": True}, "batch"),
        ({"gradient_checkpointing": True}, "checkpointing"),
        ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "checkpointing"),
    ):
        of_flags = resolve(Seven, training=stated)
        of_recipe = resolve(type("Stated", (Seven,), {"training": stated, "__module__": __name__}))
        for asked in (of_flags, of_recipe):
            assert asked.auto_fields == ALL_OPEN - {name}
            found = fit_to_memory(asked, here).training
            assert stated.items() <= found.items()
            if name == "batch":
                assert found["gradient_checkpointing"] is False
                assert (found[BATCH], found[ACCUMULATION]) == (asked.training[BATCH], asked.training[ACCUMULATION])
            else:
                assert found[BATCH] == 16


def test_what_a_recipe_above_states_is_stated() -> None:
    class Stated(Seven):
        training = {BATCH: 2}

    class Below(Stated):
        training = dict(learning_rate=1e-5)

    class Beside(Seven):
        training = dict(learning_rate=1e-5)

    class Silent(Stated):
        lora = dict(r=2)

    assert Recipe.explicit_fields == frozenset()
    assert Seven.explicit_fields == {"max_length"}
    assert BATCH in Below.explicit_fields
    assert "learning_rate" in Below.explicit_fields
    assert BATCH not in Beside.explicit_fields
    assert resolve(Silent).auto_fields == resolve(Below).auto_fields == {"checkpointing"}
    assert resolve(Beside).auto_fields == ALL_OPEN


def test_a_stand_in_leaves_nothing_open(recipe_for: Callable[..., type[Recipe]]) -> None:
    recipe = recipe_for(training=dict(max_steps=3))
    assert resolve(recipe, demo=True).auto_fields == frozenset()
    assert resolve(recipe).auto_fields == ALL_OPEN
    words = ("--gradient_checkpointing", "false")
    assert settings_from(recipe, parse(recipe, words)).auto_fields == {"batch"}


def test_4_bit_weights_are_expanded_where_there_is_room() -> None:
    asked = resolve(Seven, precision="nf4", training={BATCH: 1, "gradient_checkpointing": True})
    kept, once = (needed(asked, machine(1), storage=storage) for storage in ("packed", "expanded"))
    assert once > kept
    assert fit_to_memory(asked, Machine("cuda", once)).storage == "expanded"
    assert fit_to_memory(asked, Machine("cuda", once - 1)).storage == "packed"
    assert fit_to_memory(replace(asked, storage="packed"), machine(10_000)).storage == "packed"
    assert fit_to_memory(replace(asked, storage="expanded"), Machine("cuda", kept)).storage == "expanded"
    for precision in ("bf16", "int8"):
        assert fit_to_memory(resolve(Seven, precision=precision), machine(10_000)).storage == "packed"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_expanded_weights_of_no_4_bits_are_refused(
    precision: str, recipe_for: Callable[..., type[Recipe]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(recipe_for(), ["--precision", precision, "--storage", "expanded"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"--storage expanded is for 4-bit weights; {precision} has none" in message
    assert "Traceback" not in message
    assert resolve(recipe_for(), precision=precision, storage="packed").storage == "packed"


def test_an_unknown_storage_names_the_nearest(recipe_for: Callable[..., type[Recipe]]) -> None:
    with pytest.raises(UsageError, match=r"unknown --storage 'expandd', expected auto.*Did you mean 'expanded'"):
        resolve(recipe_for(), storage="expandd")


@pytest.mark.parametrize(
    ("changes", "here"),
    [
        ({"model": "nobody/nothing"}, machine(80)),
        ({"lora": {"use_dora": True}}, machine(80)),
        ({"lora": {"target_modules": ".*proj"}}, machine(80)),
        ({"training": {"activation_offloading": True}}, machine(80)),
        ({}, machine(80, sharded=True)),
        ({}, machine(0.1)),
    ],
    ids=str,
)
def test_what_cannot_be_planned_keeps_the_defaults(changes: dict[str, Any], here: Machine) -> None:
    asked = resolve(Seven, **changes)
    found = fit_to_memory(asked, here)
    assert found.auto_fields == frozenset()
    assert found.storage == "packed"
    assert (found.training[BATCH], found.training[ACCUMULATION]) == (1, 16)
    assert found.training.get("gradient_checkpointing", True)
    assert fit_to_memory(found, here) == found  # what is settled stays settled


def test_what_was_fitted_is_said_in_one_line(recipe_for: Callable[..., type[Recipe]]) -> None:
    console = Console(record=True, width=200)
    asked = resolve(Seven)
    found = finalize_settings(asked, console=console)
    line = console.export_text()
    assert line.count("\n") == 1
    assert line.startswith("fitted to this machine: ")
    rows, accumulation, _ = cut(found)
    assert f"{rows} x {accumulation} rows a step" in line
    finalize_settings(found, console=console)
    assert console.export_text() == ""  # nothing was open
    assert describe(replace(asked, model="nobody/nothing"), machine(80)) == ""


def test_usable_memory_is_a_share_of_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    one, four = (environment.usable_bytes("cpu", processes) for processes in (1, 4))
    assert 0 < one <= psutil.virtual_memory().total // 2
    assert four == one // 4
    assert environment.usable_bytes("cpu", 1) == one
    for name in ("FSDP", "DEEPSPEED"):
        assert environment.sharding_asked() is None
        for value, sharded in (("true", True), ("True", True), ("1", True), ("false", False)):
            monkeypatch.setenv(f"ACCELERATE_USE_{name}", value)
            assert environment.sharding_asked() == (name if sharded else None)
            assert train_module.machine().sharded == sharded


# ---- Runs ----


@pytest.fixture
def open_run(
    tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path: Path
) -> Callable[..., Settings]:
    """Return the settings of a run of 4 steps that leaves open how each is cut up."""
    shared = dict(max_length=128, max_steps=4, save_strategy="steps", save_steps=2)
    recipe = recipe_for(training=shared)

    def make(**flags: Any) -> Settings:
        return resolve(
            recipe, model=str(tiny("llama2")), output_dir=tmp_path / "run", training={"packing": False, **flags}
        )

    return make


def test_a_resumed_run_is_cut_up_as_it_started(
    open_run: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = open_run()
    assert asked.auto_fields == ALL_OPEN
    folder = RunFolder(asked.output_dir)
    sizes = {"large": 2**40, "small": 2**20}
    monkeypatch.setattr(environment, "usable_bytes", lambda device, processes: sizes["large"])
    large = finalize_settings(asked)
    train(asked)
    started = json.loads(folder.started.read_text())["run"]["training"]
    whole = folder.receipt().adapter.final_sha256
    folder.path.joinpath("run.json").unlink()
    checkpoints = sorted(path.name for path in folder.checkpoints.glob("checkpoint-*"))
    assert checkpoints
    monkeypatch.setattr(environment, "usable_bytes", lambda device, processes: sizes["small"])
    small = finalize_settings(replace(asked, output_dir=folder.path.parent / "another"))
    assert cut(small) != cut(large)
    assert cut(finalize_settings(asked, resume=True)) == cut(restore_batch(asked, folder)) == cut(large)
    train(asked, resume=True)
    receipt = folder.receipt()
    assert receipt.adapter.final_sha256 == whole
    assert receipt.settings.training[BATCH] == started[BATCH] == cut(large)[0]
    assert receipt.settings.training["gradient_checkpointing"] is False


def test_a_resumed_run_with_another_cut_stated_is_refused(open_run: Callable[..., Settings]) -> None:
    asked = open_run()
    train(asked)
    RunFolder(asked.output_dir).path.joinpath("run.json").unlink()
    rows = finalize_settings(asked).training[BATCH]
    from qlora_recipes.errors import RunFolderError

    with pytest.raises(RunFolderError, match=f"training.{BATCH}: was {rows}, now {rows * 2}"):
        train(open_run(**{BATCH: rows * 2}), resume=True)


def losses(folder: RunFolder) -> list[float]:
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("family", ["llama2", "falcon"])
def test_a_step_of_one_row_at_a_time_is_a_step_of_eight(
    family: str, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]], tmp_path: Path
) -> None:
    found = {}
    for rows in (1, 8):
        recipe = recipe_for(family)
        shared = {"packing": False, BATCH: rows, ACCUMULATION: 8 // rows, "max_steps": 3, "learning_rate": 1e-3}
        settings = resolve(
            recipe, model=str(tiny(family)), precision="bf16", output_dir=tmp_path / str(rows), training=shared
        )
        folder = train(settings)
        counted = folder.receipt().training
        found[rows] = losses(folder), counted.tokens, counted.supervised_tokens, counted.padding_share
    assert found[1][0] == pytest.approx(found[8][0], rel=2e-3)
    assert found[1][1:] == found[8][1:]
    assert found[8][3] == 0


@pytest.mark.parametrize(
    ("asked", "padding_free", "max_length"),
    [
        ({"packing": False}, True, None),
        ({"packing": True}, False, 128),
        ({"packing": False, "padding_free": False}, False, 128),
        ({"packing": False, "padding_free": True}, True, None),
        ({"packing": False, "eval_packing": True}, False, 128),
    ],
    ids=str,
)
def test_rows_that_are_not_packed_are_not_padded_either(
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
    tmp_path: Path,
    asked: dict[str, bool],
    padding_free: bool,
    max_length: int | None,
) -> None:
    run = load_model(read(recipe_for(), tiny("llama2"), output_dir=tmp_path, training=asked))
    config = make_sft_config(run.settings, str(tmp_path), padding_free=build.has_own_attention(run))
    assert (config.padding_free, config.max_length) == (padding_free, max_length)
    run.model.config._attn_implementation = "sdpa"  # which would attend with a mask over all rows
    config = make_sft_config(run.settings, str(tmp_path), padding_free=build.has_own_attention(run))
    assert config.padding_free == asked.get("padding_free", False)


def test_the_plan_counts_what_is_trained(recipe_for: Callable[..., type[Recipe]]) -> None:
    padded, free = (
        workload_of(resolve(recipe_for(), training={"packing": False, "padding_free": each})) for each in (False, True)
    )
    assert isinstance(free, Workload)
    assert (padded.packing, free.packing) == (False, True)
