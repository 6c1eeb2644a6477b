"""What is checked on the loaded model: each fault is provoked, and refused in words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from peft.tuners.lora import LoraLayer
from preflight_runs import changed, ready, verdict_of, with_data
from torch import nn

from qlora_recipes import Recipe
from qlora_recipes.base.checkpoint import layer_errors, weight_files
from qlora_recipes.base.loading import base_sha256
from qlora_recipes.data.encoding import Encoded
from qlora_recipes.errors import CheckError
from qlora_recipes.kernels import output_layer
from qlora_recipes.preflight import (
    BEFORE_TRAINING,
    Run,
    gradient,
    launch,
    loss,
    machine,
    run_checks,
    tokens,
    weights,
)
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import prepare_run

Tiny = Callable[[str], Path]
RecipeFor = Callable[..., type[Recipe]]
PACKED = dict(packing=True, max_length=128, per_device_train_batch_size=1)


@pytest.fixture
def run(tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path) -> Run:
    return ready(recipe_for("llama2"), tiny("llama2"), tmp_path / "run")


def layer_of(run: Run) -> LoraLayer:
    return next(module for module in run.model.modules() if isinstance(module, LoraLayer))


@pytest.mark.parametrize("family", ["llama2", "falcon"])
@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
def test_a_sound_run_passes_everything(
    family: str, precision: str, tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    run = ready(recipe_for(family), tiny(family), tmp_path / "run", precision=precision, training=PACKED)
    checks = {check.name: check for check in run_checks(BEFORE_TRAINING, run)}
    assert {name for name, check in checks.items() if check.verdict in ("fail", "untested")} == set()
    # random weights, and a run of three steps
    assert {name for name, check in checks.items() if check.verdict == "warn"} <= {"starting_loss", "steps"}
    assert list(checks) == [check.__name__ for check in BEFORE_TRAINING]
    assert not (tmp_path / "run").exists()
    assert base_sha256(run.model) == run.base.sha256  # int8 scales move from the weight to its state in a pass


def test_probes_leave_the_run_as_it_was(run: Run) -> None:
    modes = [module.training for module in run.model.modules()]
    weights = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    before, counts = torch.get_rng_state(), vars(run.trainer.count).copy()
    run_checks(BEFORE_TRAINING, run)
    assert torch.equal(torch.get_rng_state(), before)
    assert vars(run.trainer.count) == counts
    assert run.trainer._total_train_tokens == 0
    assert not any(run.trainer._metrics.values())
    assert "gather_for_metrics" not in vars(run.trainer.accelerator)
    assert [module.training for module in run.model.modules()] == modes
    assert all(weight.grad is None for weight in run.model.parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in run.model.named_parameters())


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_leak_between_packed_conversations_is_refused(
    precision: str, tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.falcon import modeling_falcon

    run = ready(recipe_for("falcon"), tiny("falcon"), tmp_path / "run", precision=precision, training=PACKED)
    mended = verdict_of(gradient.packing_leak, run)
    assert mended.verdict == "pass"
    assert mended.figure.startswith("0 in the next") and "separate_packed" in mended.figure
    repaired = modeling_falcon.create_causal_mask

    def without_positions(*args: object, **kwargs: object) -> object:
        return repaired(*args, **{**kwargs, "position_ids": None})

    monkeypatch.setattr(modeling_falcon, "create_causal_mask", without_positions)
    check = verdict_of(gradient.packing_leak, run)
    assert check.verdict == "fail"
    assert "--packing false" in check.advice


def test_outlier_columns_of_int8_are_not_taken_for_a_leak_of_the_mask(
    tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    run = ready(recipe_for("llama2"), tiny("llama2"), tmp_path / "run", precision="int8", training=PACKED)
    layers = [module for module in run.model.modules() if isinstance(module, Linear8bitLt)]
    assert {layer.state.threshold for layer in layers} == {6.0} == {run.base.quantized.outlier_threshold}
    for layer in layers:
        layer.state.threshold = 3.5  # random weights have no activation of 6
    check = verdict_of(gradient.packing_leak, run)
    assert check.verdict == "warn"
    assert check.figure.startswith("0 in the next") and "through the outlier columns of LLM.int8" in check.figure
    assert {layer.state.threshold for layer in layers} == {3.5}


def test_packing_without_a_mask_is_warned_of(tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path) -> None:
    wrapped = {**PACKED, "packing_strategy": "wrapped"}
    run = ready(recipe_for("llama2"), tiny("llama2"), tmp_path / "run", training=wrapped)
    assert verdict_of(gradient.packing_leak, run).verdict == "warn"


def test_a_frozen_adapter_tensor_without_gradient_is_refused(run: Run) -> None:
    run.model.base_model.model.extra = nn.ModuleDict({"lora_B": nn.Linear(2, 2)})  # in the model, in no forward pass
    check = verdict_of(gradient.gradient, run)
    assert check.verdict == "fail"
    assert "without" in check.figure and "lora_B" in check.figure


def test_a_gradient_outside_the_adapter_is_refused(run: Run) -> None:
    run.model.get_input_embeddings().weight.requires_grad_(True)
    check = verdict_of(gradient.gradient, run)
    assert check.verdict == "fail"
    assert "outside the adapter" in check.figure


def test_a_kernel_that_computes_another_loss_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict_of(gradient.starting_loss, run).verdict != "fail"
    plain = output_layer.LogProbs

    class Wrong:
        @staticmethod
        def apply(*arguments: object) -> tuple[torch.Tensor, ...]:
            log_probs, *others = plain.apply(*arguments)
            return 1.1 * log_probs, *others

    monkeypatch.setattr(output_layer, "LogProbs", Wrong)
    check = verdict_of(gradient.starting_loss, run)
    assert check.verdict == "fail"
    assert "nats a token by the trainer" in check.figure


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs."),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),  # as without Python's headers
    ],
)
def test_kernels_that_cannot_be_compiled_are_one_message_before_the_folder_is_taken(
    tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Uncompiled:
        @staticmethod
        def apply(*_: object) -> None:
            raise error

    monkeypatch.setattr(output_layer, "LogProbs", Uncompiled)
    settings = resolve(recipe_for(), model=str(tiny("llama2")), output_dir=tmp_path / "run")
    with pytest.raises(CheckError) as caught:
        prepare_run(settings)
    message = str(caught.value)
    assert "gradient, gradient_after_evaluation, starting_loss: Triton cannot build the GPU kernels" in message
    assert message.count("apt-get install gcc python3-dev") == 1
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_is_refused(run: Run) -> None:
    next(iter(layer_of(run).lora_A.values())).weight.data.fill_(float("inf"))
    for check in (gradient.gradient, gradient.starting_loss):
        assert verdict_of(check, run).verdict == "fail"


def test_an_adapter_that_moves_the_base_is_refused(run: Run) -> None:
    assert verdict_of(gradient.adapter_starts_at_base, run).verdict == "pass"
    next(iter(layer_of(run).lora_B.values())).weight.data.fill_(0.1)
    check = verdict_of(gradient.adapter_starts_at_base, run)
    assert check.verdict == "fail"
    assert "init_lora_weights" in check.advice


def test_a_gradient_that_an_evaluation_changes_is_refused(run: Run) -> None:
    scale = layer_of(run).scaling

    def evaluate(module: nn.Module, *_: object) -> None:
        if not module.training:
            scale["default"] *= 0.5  # as a repacked weight does, for good

    run.model.register_forward_pre_hook(evaluate)
    check = verdict_of(gradient.gradient_after_evaluation, run)
    assert check.verdict == "fail"
    assert "keep_4bit_gradients" in check.advice


def test_weights_of_no_pretraining_are_warned_of(run: Run) -> None:
    check = verdict_of(gradient.starting_loss, run)
    assert check.verdict == "warn"
    assert "pretrained" in check.advice


def test_linears_that_were_passed_over_are_refused(run: Run) -> None:
    run.base.quantized.found -= 1
    check = verdict_of(weights.quantized_linears, run)
    assert check.verdict == "fail"
    assert "13 of 14" in check.figure


def test_bytes_beyond_the_plan_are_warned_of(run: Run) -> None:
    assert verdict_of(machine.base_bytes, run).verdict == "pass"
    run.base.bytes *= 2
    assert verdict_of(machine.base_bytes, run).verdict == "warn"


def test_weights_that_are_not_the_checkpoints_are_refused(run: Run) -> None:
    weight = layer_of(run).get_base_layer().weight
    weight.data = weight.data.flip(0)
    check = verdict_of(weights.quantization_error, run)
    assert check.verdict == "fail"
    assert "not the checkpoint's" in check.advice


@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_weights_that_no_checkpoint_names_are_warned_of(
    precision: str, tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny("llama2"), tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    lost = "model.norm.weight"
    del stored[lost]
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = ready(recipe_for("llama2"), model, tmp_path / "run", precision=precision)
    check = verdict_of(weights.checkpoint_names, run)
    assert check.verdict == "warn"
    assert check.figure == f"1 of {len(stored) + 1} weights are not in the checkpoint, {lost} first"


def test_layers_that_the_checkpoint_does_not_name_are_not_tested(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "weight_files", lambda *_: {"other.weight": Path()})
    check = verdict_of(weights.quantization_error, run)
    assert check.verdict == "untested"
    assert check.figure == "not tested: no linear layer has its name in the checkpoint"


def test_the_error_of_a_sample_is_by_the_definition_of_the_whole(run: Run, tiny: Tiny) -> None:
    """Frobenius norm of (stored - original) over that of the original, computed here from the packed weights."""
    from bitsandbytes.functional import dequantize_4bit
    from safetensors.torch import load_file

    name = "model.layers.0.self_attn.q_proj"
    original = load_file(tiny("llama2") / "model.safetensors")[f"{name}.weight"].float()
    weight = layer_of(run).get_base_layer().weight
    stored = dequantize_4bit(weight.data, weight.quant_state).float()
    files = weight_files(run.settings.model, None)
    whole, sampled = (dict(layer_errors(run.model, files, torch.bfloat16, sample=n)) for n in (None, 64 * 8))
    assert len(whole) == len(sampled) == 14
    assert whole[name] == pytest.approx(float((stored - original).norm() / original.norm()))
    assert sampled[name] == pytest.approx(float((stored - original)[:8].norm() / original[:8].norm()))


def test_another_dtype_than_the_runs_is_refused(run: Run) -> None:
    run = changed(run, settings=replace(run.settings, dtype="float16"))
    for check in (weights.base_dtype, weights.compute_dtype, launch.mixed_precision):
        assert verdict_of(check, run).verdict == "fail"


def test_an_adapter_in_16_bits_is_refused(run: Run) -> None:
    next(iter(layer_of(run).lora_A.values())).to(torch.bfloat16)
    check = verdict_of(weights.adapter_dtype, run)
    assert check.verdict == "fail"
    assert check.figure == "bfloat16, float32"


def test_the_optimizers_state_is_of_its_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float32" in verdict_of(weights.optimizer_state_dtype, run).figure
    small = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})

    class Small(torch.optim.SGD):
        def step(self) -> None:
            self.state[self.param_groups[0]["params"][0]]["kept"] = torch.zeros(128, 64, dtype=torch.bfloat16)

    monkeypatch.setattr(run.trainer, "get_optimizer_cls_and_kwargs", lambda *_: (Small, small[1]))
    check = verdict_of(weights.optimizer_state_dtype, run)
    assert check.verdict == "fail"
    assert "bfloat16" in check.figure


def test_labels_that_the_trainer_loses_are_refused(run: Run) -> None:
    run.trainer.train_dataset = run.data.train[1:].dataset()
    check = verdict_of(loss.trainer_keeps_the_loss, run)
    assert check.verdict == "fail"
    assert "expected" in check.figure


def test_ids_beyond_the_embedding_are_refused(run: Run) -> None:
    row, *others = run.data.train
    wrong = replace(row, encoded=Encoded([*row.encoded.input_ids, 10**6], [*row.encoded.labels, 10**6]))
    run = with_data(run, train=[wrong, *others])
    check = verdict_of(tokens.embedding_covers_ids, run)
    assert check.verdict == "fail"
    assert "1,000,000" in check.figure


def test_positions_beyond_pretraining_are_warned_of(run: Run) -> None:
    run.model.config.max_position_embeddings = 64
    assert verdict_of(tokens.context_length, run).verdict == "warn"


def test_a_generation_that_stops_elsewhere_is_warned_of(run: Run) -> None:
    run.model.generation_config.eos_token_id = [7]
    assert verdict_of(tokens.generation_stops, run).verdict == "warn"


def test_a_run_of_a_few_steps_is_warned_of(run: Run) -> None:
    assert verdict_of(launch.steps, run).verdict == "warn"
    run.trainer.args.max_steps = 100
    assert verdict_of(launch.steps, run).verdict == "pass"


def test_a_full_disk_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    check = verdict_of(machine.disk_space, run)
    assert check.verdict == "fail"
    assert "--output_dir" in check.advice


def test_fewer_processes_than_asked_for_are_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")  # as a cluster may set for all that runs on it
    assert verdict_of(launch.num_processes, run).verdict == "pass"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check = verdict_of(launch.num_processes, run)
    assert check.verdict == "fail"
    assert check.figure == "1 of several asked for" and "torchrun" in check.advice
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert verdict_of(launch.num_processes, run).figure == "1 of 4 asked for"


@pytest.mark.parametrize(("processes", "asked"), [("1", "None"), ("2", "several")])
def test_what_the_launcher_was_asked_for_is_found(tmp_path: Path, processes: str, asked: str) -> None:
    script = tmp_path / "asked_for.py"
    script.write_text("from qlora_recipes.preflight import launch\nprint('asked for', launch.asked_processes())\n")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes]
    quiet = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([*launch, *quiet, script], capture_output=True, text=True, check=False, env=environment)
    assert result.stdout.count(f"asked for {asked}") == 1, result.stderr  # one process, whatever was asked for


def test_fsdp_that_became_something_else_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check = verdict_of(launch.distributed_type, run)
    assert check.verdict == "fail"
    assert "FSDP was asked for" in check.figure


def test_an_idle_gpu_is_warned_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    assert verdict_of(launch.device, run).verdict == "warn"


@pytest.mark.parametrize(("processes", "verdict"), [("1", "warn"), ("4", "pass")])
def test_gpus_without_a_process_are_warned_of(processes: str, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    for name, value in dict(is_available=True, device_count=4, get_device_name="NVIDIA L4").items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    gpu = torch.device("cuda:0")
    fake = Mock(**{"trainer.args.device": gpu, "model.parameters": lambda: iter([Mock(device=gpu)])})
    check = launch.device(fake)
    assert (check.verdict, "3 more" in check.figure) == (verdict, verdict == "warn")
