"""What the plan says of several GPUs, compared with what two processes hold, send and allocate."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked import in_processes
from rich.console import Console
from torch import distributed

from qlora_recipes import Recipe
from qlora_recipes.commands import plan
from qlora_recipes.errors import UsageError
from qlora_recipes.memory.ranks import divided_bytes, gathered_bytes, root_bytes, sharded_memory, ways
from qlora_recipes.memory.sizes import adapter_parameters, sizes_of
from qlora_recipes.memory.step import base_bytes
from qlora_recipes.memory.table import print_plan
from qlora_recipes.memory.workload import Workload
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.settings import resolve

ROOT = Path(__file__).parent.parent
NF4 = PRECISIONS["nf4"]
SEVEN = LLAMA_2_7B_CHAT.sizes
SEVENTY = replace(
    SEVEN,
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
)
WORK = Workload(rows=1, length=2048, rank=64, targets=LLAMA_2_7B_CHAT.linear_layers, processes=8)


# ---- Which way fits ----


def fitting(sizes: Any, gpu_gib: float, processes: int = 8) -> list[str]:
    found = ways(sizes, NF4, replace(WORK, processes=processes), gpu_gib)
    return [f"{way.wrapper} {way.precision.name}" for way in found if way.rows]


def test_what_fits_follows_from_the_sizes() -> None:
    assert fitting(SEVEN, 24) == ["DDP nf4", "DDP bf16", "FSDP nf4", "FSDP bf16"]
    assert fitting(SEVENTY, 24) == ["FSDP nf4"]
    assert fitting(SEVENTY, 80) == ["DDP nf4", "FSDP nf4", "FSDP bf16"]
    assert fitting(SEVENTY, 24, processes=64) == ["FSDP nf4", "FSDP bf16"]
    assert fitting(SEVENTY, 8) == []


def test_ddp_divides_nothing_and_fsdp_all_but_the_constants() -> None:
    ddp, _, fsdp, _ = ways(SEVENTY, NF4, WORK, 80)
    assert ddp.training.base == base_bytes(SEVENTY, NF4)
    constants = base_bytes(SEVENTY, NF4) - divided_bytes(SEVENTY, NF4)
    assert fsdp.training.base == divided_bytes(SEVENTY, NF4) // 8 + constants
    assert 0.98 < constants / (SEVENTY.num_hidden_layers * 855_638_016 / 64) < 1.1  # a byte for each 64 weights
    assert fsdp.training.adapter == ddp.training.adapter // 8


def test_accumulated_gradients_stay_whole() -> None:
    one, several = (sharded_memory(SEVEN, NF4, replace(WORK, accumulation=n)) for n in (1, 2))
    assert several.gradients == 8 * several.adapter > 4 * one.gradients


def test_int8_is_not_divided() -> None:
    assert [way.wrapper for way in ways(SEVEN, PRECISIONS["int8"], WORK, 24) if way.precision.name == "int8"] == ["DDP"]


# ---- What is printed ----


def printed(recipe: type[Recipe], model: Path, sizes: Any, **choices: Any) -> str:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    fields = {name: getattr(sizes, name) for name in (*names, "vocab_size")}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    output = io.StringIO()
    print_plan(resolve(recipe, model=str(model)), console=Console(width=80, file=output), **choices)
    return output.getvalue()


def test_the_plan_names_the_way_that_fits_and_its_command(recipe_for: Callable[..., Any], tmp_path: Path) -> None:
    text = printed(recipe_for(), tmp_path, SEVENTY, gpu_gib=24, processes=8)
    assert max(len(line) for line in text.splitlines() if line.startswith(" ")) <= 80  # the tables
    assert re.search(r"each micro-batch gathers \d\d\.\d\d GiB in nf4, \d{3}\.\d\d GiB in bf16; ", text)
    command = text.splitlines()[-1]
    assert "It fits by FSDP in nf4." in text
    assert command.startswith("accelerate launch --config_file recipes/launch/fsdp_qlora.yaml --num_processes 8 ")
    assert f"--model {tmp_path} --precision nf4 --per_device_train_batch_size 2" in command
    alone = printed(recipe_for(), tmp_path, SEVENTY, gpu_gib=24)
    assert "accelerate" not in alone
    assert "Nothing fits 2 GPUs of 8 GiB" in printed(recipe_for(), tmp_path, SEVENTY, gpu_gib=8, processes=2)


def test_the_command_takes_the_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([str(ROOT / "recipes" / "llama2_guanaco.py"), "--gpu", "24", "--processes", "8"])
    assert (
        "--config_file recipes/launch/ddp.yaml --num_processes 8 recipes/llama2_guanaco.py" in capsys.readouterr().out
    )
    with pytest.raises(UsageError, match="--processes: got '0', expected a number of GPUs, such as 8"):
        plan.main([str(ROOT / "recipes" / "llama2_guanaco.py"), "--processes", "0"])


# ---- Two processes ----

LAYERS, WAYS = 2, [("FSDP2", "nf4"), ("DDP", "nf4")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `eval/collectives.py` counts in the first of two processes, with the sizes and the work of its model."""
    spec = importlib.util.spec_from_file_location("collectives", ROOT / "eval" / "collectives.py")
    assert spec and spec.loader
    collectives = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(collectives)
    folder = tmp_path_factory.mktemp("collectives")
    collectives.make_base(folder, LAYERS)

    def measure(rank: int) -> None:
        distributed.init_process_group("gloo", rank=rank, world_size=2)
        found = {wrapper: collectives.measure(folder, wrapper, precision) for wrapper, precision in WAYS}
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))

    in_processes(2, measure, folder / "log.txt")
    work = replace(WORK, length=collectives.TOKENS, rank=collectives.RANK, processes=2, device="cpu")
    return {**json.loads((folder / "found.json").read_text()), "sizes": sizes_of(folder), "work": work}


def test_a_process_holds_what_is_planned(measured: dict[str, Any]) -> None:
    found, sizes, work = measured["FSDP2"], measured["sizes"], measured["work"]
    planned, constants = sharded_memory(sizes, NF4, work), base_bytes(sizes, NF4) - divided_bytes(sizes, NF4)
    assert found["held"] == planned.base - constants + planned.adapter
    assert measured["DDP"]["held"] == 2 * found["held"]
    # At the output layer: what is in no layer, and the last layer, which is next; once more while it is copied.
    gathered = found["peak"] - measured["DDP"]["peak"]
    assert root_bytes(sizes) < gathered < planned.gathered + root_bytes(sizes)


def test_layers_are_gathered_twice_a_step_and_adapters_reduced_once(measured: dict[str, Any]) -> None:
    found, sizes, work = measured["FSDP2"], measured["sizes"], measured["work"]
    trained = 4 * adapter_parameters(sizes, work.rank, work.targets)
    assert found["calls"] == {"allgather_base": 2 * LAYERS + 3, "reduce_scatter_base": LAYERS}
    assert found["bytes"]["allgather_base"] == pytest.approx(gathered_bytes(sizes, NF4, work), rel=0.002)
    assert found["bytes"]["reduce_scatter_base"] == trained
    assert measured["DDP"]["bytes"]["allreduce"] == trained
