"""Runs of two processes on gloo: DDP, and FSDP2 that divides the base, in 16 and in 4 bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import make_tiny
from rich.console import Console
from safetensors.torch import load_file
from sharded_runs import FSDP, settings_of
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_recipes.base import sharding
from qlora_recipes.base.adapters import WEIGHTS
from qlora_recipes.base.loading import load_base
from qlora_recipes.errors import QuantizationError, UsageError
from qlora_recipes.precision import precision_named, quantization_config
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.standins import ROWS, STANDINS
from qlora_recipes.training.configuration import make_sft_config
from qlora_recipes.training.train import train

ROUNDING = 1e-6
"""Largest difference of adapter weights where the norm of the same gradients is added up in another order."""
ONE_PROCESS = {"one": ("bf16", 2), "one-nf4": ("nf4", 4)}
"""Runs of one process: twice the micro-batches a step of what each of two processes has."""
PAIRS = [("fsdp", "one"), ("fsdp-nf4", "one-nf4")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with every run of sharded_runs.py, and the same runs of one process."""
    folder = tmp_path_factory.mktemp("sharded")
    make_tiny("llama2", folder / "model")
    lines = ROWS["guanaco_llama2"].read_text().splitlines(keepends=True)[:120]  # no epoch ends within four steps
    (folder / "rows.jsonl").write_text("".join(lines))
    _make_large(folder / "large")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("sharded_runs.py")
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    variables["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is no longer resident
    process = subprocess.Popen(
        [*launch, str(script), str(folder)], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for name, (precision, accumulation) in ONE_PROCESS.items():
            settings = settings_of(folder, name, precision, accumulation)
            train(settings, console=Console(quiet=True), skip_checks=["answers_end"])
        said, _ = process.communicate(timeout=240)
    finally:
        process.terminate()  # torchrun ends its processes
    assert process.returncode == 0, said[-20000:]
    return folder


def _make_large(folder: Path) -> None:
    """Save a base of 100 MB, of which no weight is larger than 4 MB."""
    config = AutoConfig.from_pretrained(STANDINS["llama2"].folder)
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 768, 7, 12
    config.intermediate_size, config.num_key_value_heads, config.head_dim = 2048, 12, 64
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _receipt(folder: Path, name: str) -> Receipt:
    return RunFolder(folder / name).receipt()


def test_ddp_trains_what_one_process_trains(folder: Path) -> None:
    got, expected = _receipt(folder, "ddp"), _receipt(folder, "one")
    assert got.adapter.final_sha256 == expected.adapter.final_sha256
    assert got.training.processes == 2 and got.training.tokens == expected.training.tokens


@pytest.mark.parametrize(("divided", "one"), PAIRS)
def test_fsdp_trains_the_adapter_of_one_process(folder: Path, divided: str, one: str) -> None:
    a, b = (load_file(folder / name / "adapter" / WEIGHTS) for name in (divided, one))
    assert a.keys() == b.keys()
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < ROUNDING


@pytest.mark.parametrize(("divided", "one"), PAIRS)
def test_fsdp_has_the_base_and_the_loss_of_one_process(folder: Path, divided: str, one: str) -> None:
    got, expected = _receipt(folder, divided), _receipt(folder, one)
    # Its hash, its bytes by storage, and what is quantized of it; one process has room for a copy in 16 bits.
    assert got.base == replace(expected.base, storage="packed")
    assert got.adapter.initial_sha256 == expected.adapter.initial_sha256
    losses = [(run.training.first_loss, run.training.final_loss) for run in (got, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # in 16 bits it would be rounded by up to 0.03


@pytest.mark.parametrize("name", ["fsdp", "fsdp-nf4"])
def test_what_fsdp_trained_is_proven(folder: Path, name: str) -> None:
    verdicts = {check.name: check.verdict for check in _receipt(folder, name).checks}
    looked_at = ("base_unchanged", "adapter_reloads", "adapter_changed", "quantized_linears", "quantization_error")
    assert {check: verdicts[check] for check in looked_at} == dict.fromkeys(looked_at, "pass")
    assert "fail" not in verdicts.values()


@pytest.mark.parametrize("name", ["fsdp", "fsdp-nf4"])
def test_a_stopped_run_under_fsdp_ends_with_the_same_adapter(folder: Path, name: str) -> None:
    resumed, whole = _receipt(folder, f"{name}-stopped"), _receipt(folder, name)
    assert [resume.from_step for resume in resumed.resumes] == [2]
    assert resumed.adapter.final_sha256 == whole.adapter.final_sha256


def test_each_process_holds_its_part_alone_while_loading(folder: Path) -> None:
    for rank in (0, 1):
        grown = json.loads((folder / f"memory-{rank}.json").read_text())
        assert grown["base"] > 90e6
        assert grown["after"] <= grown["peak"] < 0.75 * grown["base"], grown  # a half, and one weight


def test_fsdp_that_became_ddp_is_refused(folder: Path) -> None:
    """When this fails, accelerate no longer takes FSDP on a CPU for DDP: sharded_runs.py need not undo it."""
    assert "distributed_type: MULTI_CPU, FSDP was asked for" in (folder / "relabeled.txt").read_text()
    assert not (folder / "relabeled" / "run.json").exists()


# ---- Without processes ----


def test_a_tensor_that_is_not_divided_is_whole() -> None:
    tensor = torch.ones(3)
    assert sharding.whole(tensor) is tensor and sharding.local(tensor) is tensor
    assert not sharding.divides()


def test_4_bits_are_stored_as_a_dtype_that_fsdp_divides() -> None:
    config = quantization_config(precision_named("nf4"), "bfloat16", divided=True)
    assert config is not None and config.bnb_4bit_quant_storage == torch.bfloat16
    plain = quantization_config(precision_named("nf4"), "bfloat16")
    assert plain is not None and plain.bnb_4bit_quant_storage == torch.uint8


def test_accelerate_would_round_the_loss() -> None:
    """When this fails, accelerate's policy keeps the output's dtype, and base/sharding.py may use it."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16


def test_ddp_does_not_look_for_unused_weights(tmp_path: Path) -> None:
    _write_inputs(tmp_path)
    config = make_sft_config(settings_of(tmp_path, "run", "bf16", 1), str(tmp_path), padding_free=False)
    assert config.ddp_find_unused_parameters is False


def _write_inputs(folder: Path) -> None:
    make_tiny("llama2", folder / "model")
    (folder / "rows.jsonl").write_text("")


def test_experts_in_4_bits_are_refused(small: Callable[[str], Path]) -> None:
    model, nf4 = str(small("mixtral")), precision_named("nf4")
    with pytest.raises(QuantizationError, match=r"has 4 stacks of fused experts .* Use --precision bf16"):
        load_base(model, None, nf4, "bfloat16", device=torch.device("cpu"), divide=True)


@pytest.mark.parametrize(
    ("variables", "changes", "said"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "--fsdp_offload_params true"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "--gradient_checkpointing true"),
        ({}, {"precision": precision_named("int8")}, "--precision int8"),
        ({}, {"storage": "expanded"}, "--storage expanded"),
        ({}, {"lora": {"init_lora_weights": "pissa"}}, "--init_lora_weights pissa"),
        ({}, {"lora": {"use_dora": True}}, "--use_dora"),
        ({}, {"lora": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
        ({}, {"lora": {"target_parameters": ["experts"]}}, "target_parameters"),
        ({}, {"of_preferences": True}, "method dpo"),
        ({}, {"training": {"optim": "paged_adamw_8bit"}}, "--optim paged_adamw_8bit"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], changes: dict[str, object], said: str
) -> None:
    for name, value in {**FSDP, **variables}.items():
        monkeypatch.setenv(name, value)
    plain = dict(lora={}, training={}, precision=precision_named("nf4"), storage="auto", of_preferences=False)
    with pytest.raises(UsageError, match="FSDP") as error:
        sharding.refuse_unsupported(SimpleNamespace(**{**plain, **changes}))
    assert said in str(error.value)
