"""A GPU that PyTorch cannot use is refused with both versions, unless the CPU is asked for; what is freed is freed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preflight_runs import read
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from qlora_recipes import Recipe
from qlora_recipes.base import device
from qlora_recipes.base.adapters import adapter_tensors
from qlora_recipes.base.device import check_gpu, torch_device
from qlora_recipes.errors import SetupError
from qlora_recipes.preflight.probes import preserving_state
from qlora_recipes.settings import resolve
from qlora_recipes.training import build, configuration
from qlora_recipes.training import train as train_module
from qlora_recipes.training.trainer import RunTrainer

PYPI = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
"""What torch 2.13.0 from PyPI has kernels for."""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what makes this a machine with a GPU, its driver and a build of PyTorch."""

    def make(
        driver: str | None = "580.65.06",
        *,
        cuda: str | None = "13.0",
        usable: bool = False,
        card: tuple[str, int, int] = ("NVIDIA H100", 9, 0),
        built: list[str] = PYPI,
    ) -> None:
        for name in ("nvidia0", "nvidiactl"):
            (tmp_path / name).touch()
        (tmp_path / "version").unlink(missing_ok=True)
        if driver:
            (tmp_path / "version").write_text(
                f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n"
                "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
            )
        monkeypatch.setattr(device, "_NODES", tmp_path)
        monkeypatch.setattr(device, "_DRIVER", tmp_path / "version")
        for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: card[0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: card[1:])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)

    return make


def refused(*words: str) -> None:
    with pytest.raises(SetupError) as caught:
        check_gpu()
    for word in (*words, "CUDA_VISIBLE_DEVICES="):
        assert word in str(caught.value)


def test_a_driver_that_is_older_than_the_cuda_of_torch_is_refused(machine: Callable[..., None]) -> None:
    machine("550.54.15")
    refused("driver 550.54.15", "torch 2.13.0+cu130", "CUDA 13.0", "expected driver 580 or newer", "whl/cu126")
    machine("470.256.02", cuda="12.6")
    refused("470.256.02", "CUDA 12.6", "expected driver 525 or newer. Update the driver. ")


def test_a_build_without_cuda_beside_a_gpu_is_refused(machine: Callable[..., None]) -> None:
    machine("580.65.06", cuda=None)
    refused("driver 580.65.06", "built without CUDA", "torch==2.13.0 --index-url https://pypi.org/simple")
    machine(None, cuda=None)
    refused("driver of an unknown version")


def test_what_torch_says_of_a_driver_that_is_new_enough_is_passed_on(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment.\nmore")

    machine()
    monkeypatch.setattr(torch.cuda, "init", fail)
    refused("580.65.06", "incorrectly set up environment. nvidia-smi")


def test_a_gpu_without_kernels_in_this_build_is_refused(machine: Callable[..., None]) -> None:
    machine(usable=True, card=("Tesla V100-SXM2-16GB", 7, 0))
    refused("V100", "got sm_70, expected sm_75", "torch==2.13.0 --index-url", "whl/cu126", "--dtype float16")
    machine(usable=True, card=("NVIDIA Next", 13, 0))
    refused("got sm_130", "Update PyTorch")


@pytest.mark.parametrize(
    ("card", "built"),
    [((8, 9), PYPI), ((9, 0), ["sm_90a"]), ((7, 0), ["sm_60", "sm_70"]), ((12, 1), PYPI), ((13, 0), ["compute_120"])],
)
def test_a_gpu_runs_kernels_of_its_generation_and_what_it_compiles(
    card: tuple[int, int], built: list[str], machine: Callable[..., None]
) -> None:
    machine(usable=True, card=("a card", *card), built=built)
    check_gpu()
    assert torch_device().type == "cuda"


def test_each_process_of_a_launcher_evaluates_on_its_own_gpu(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(usable=True)
    assert torch_device() == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert torch_device() == torch.device("cuda", 1)


@pytest.mark.parametrize("asked", [{"ACCELERATE_USE_CPU": "true"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_a_cpu_that_is_asked_for_is_taken(
    asked: dict[str, str], machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("550.54.15")
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    assert torch_device().type == "cpu"


def test_training_and_evaluation_refuse_before_anything_is_loaded(
    machine: Callable[..., None], recipe_for: Callable[..., type[Recipe]]
) -> None:
    machine("550.54.15")
    with pytest.raises(SetupError, match=r"driver 550\.54\.15"):
        train_module.train(resolve(recipe_for(), demo=True))
    with pytest.raises(SetupError, match=r"driver 550\.54\.15"):
        torch_device()


def test_one_process_trains_on_one_gpu_of_several(
    recipe_for: Callable[..., type[Recipe]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers counts all that it sees, and TRL refuses more than one, once the base is loaded."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(configuration, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda")))
    settings = replace(resolve(recipe_for(), demo=True), dtype="float32")  # 16 bits need a GPU that is there
    args = configuration.make_sft_config(settings, str(tmp_path), padding_free=False)
    assert SFTConfig(output_dir=str(tmp_path), bf16=False).n_gpu == 4
    assert (args.n_gpu, args.train_batch_size) == (1, args.per_device_train_batch_size)


def test_a_deterministic_run_says_so_before_its_first_product(
    recipe_for: Callable[..., type[Recipe]], tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer says so after the probe of `build_trainer`, and PyTorch then refuses every product on a GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    asked: list[str | None] = []
    monkeypatch.setattr(build, "load_base", lambda *_, **__: asked.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
    for training in ({}, {"full_determinism": True}):
        with pytest.raises(TypeError):  # nothing was loaded
            build.load_model(read(recipe_for(), tiny("llama2"), training=training))
    assert asked == [None, ":4096:8"]


def test_probes_name_the_gpus_whose_random_numbers_they_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch warns of several that it finds by itself, and here warnings are errors."""
    states = {0: torch.zeros(1), 1: torch.ones(1)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((device, state)))
    restored: list[tuple[int, torch.Tensor]] = []
    with preserving_state(None):
        pass
    assert restored == list(states.items())


@pytest.mark.parametrize("text", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_a_library_without_memory_is_out_of_memory(text: str) -> None:
    assert device.is_out_of_memory(RuntimeError(text))


def test_expandable_segments_are_asked_for_before_torch_is_imported() -> None:
    code = (
        "import os, sys; from qlora_recipes.commands.entry import run_command; run_command(lambda argv: None, []);"
        "print('torch' in sys.modules, os.environ.get('PYTORCH_ALLOC_CONF'), os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))"
    )
    for given, expected in (
        ({}, "False expandable_segments:True None"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "False None max_split_size_mb:64"),
    ):
        clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
        words = [sys.executable, "-c", code]
        output = subprocess.run(words, capture_output=True, text=True, check=True, env={**clean, **given}).stdout
        assert output.strip() == expected


class _Steps(Exception):
    """Where the first step would begin."""


def test_no_second_adapter_is_in_memory_when_the_first_step_begins(
    recipe_for: Callable[..., type[Recipe]],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[int, int]] = []

    def float32_tensors() -> list[torch.Tensor]:
        objects = [part for part in gc.get_objects() if type(part) in (torch.Tensor, torch.nn.Parameter)]
        return [tensor for tensor in objects if tensor.dtype == torch.float32]

    def count(launch: Any, run: Any, *_: Any) -> None:
        adapter = dict(adapter_tensors(run.model))
        shapes = {tensor.shape for tensor in adapter.values()}
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in float32_tensors() if tensor.shape in shapes
        }
        for tensor in of_other_tests:
            storages.pop(tensor.untyped_storage().data_ptr(), None)
        found.append((sum(storages.values()), sum(tensor.nbytes for tensor in adapter.values())))
        raise _Steps

    monkeypatch.setattr(train_module, "_run_steps", count)
    settings = resolve(recipe_for(), model=str(tiny("llama2")), output_dir=tmp_path / "run")
    of_other_tests = float32_tensors()
    with pytest.raises(_Steps):
        train_module.train(settings, skip_checks=("gradient", "packing_leak", "starting_loss", "tokenizer_reloads"))
    ((held, adapter),) = found
    assert held == adapter


def test_the_base_is_gone_when_a_run_that_ran_out_of_memory_loads_it_again(
    recipe_for: Callable[..., type[Recipe]],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error that ends the first attempt holds, by its traceback, every frame that holds the model."""
    models: list[weakref.ref[object]] = []
    load, step = AutoModelForCausalLM.from_pretrained, RunTrainer.training_step

    def loads(*args: Any, **kwargs: Any) -> Any:
        assert not any(model() for model in models), "the base of the attempt before is still in memory"
        found = load(*args, **kwargs)
        models.append(weakref.ref(found[0] if isinstance(found, tuple) else found))
        return found

    def runs_out(self: RunTrainer, model: Any, inputs: Any, *more: Any) -> Any:
        if self.args.per_device_train_batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, model, inputs, *more)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    monkeypatch.setattr(RunTrainer, "training_step", runs_out)
    training = dict(auto_find_batch_size=True, packing=False, max_steps=2, per_device_train_batch_size=2)
    settings = resolve(recipe_for(), model=str(tiny("llama2")), output_dir=tmp_path / "run", training=training)
    gc.disable()  # what only the collector frees must be freed by who loads
    try:
        train_module.train(settings, skip_checks=("gradient", "packing_leak", "starting_loss", "tokenizer_reloads"))
    finally:
        gc.enable()
    assert len(models) == 2
