"""The memory plan against published counts, PEFT, loaded models and the allocations of real steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_recipes.base import repairs
from qlora_recipes.base.adapters import attach
from qlora_recipes.base.loading import load_base
from qlora_recipes.errors import ModelError, UsageError
from qlora_recipes.kernels.blocked import is_available, lay_out
from qlora_recipes.kernels.dequantize import expand
from qlora_recipes.kernels.elementwise import fuse_norms_and_gates
from qlora_recipes.kernels.lora_linear import fuse_lora_layers
from qlora_recipes.kernels.output_layer import score_supervised_tokens
from qlora_recipes.memory import estimate
from qlora_recipes.memory.estimate import GIB, Memory, largest_micro_batch, plan, training_memory
from qlora_recipes.memory.sizes import adapter_parameters, linear_shapes, parameter_count, sizes_of
from qlora_recipes.memory.step import base_bytes
from qlora_recipes.memory.workload import Workload, left_out, workload_of
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.settings import resolve
from qlora_recipes.standins import STANDINS

SPECS = {"llama2": LLAMA_2_7B_CHAT, "falcon": FALCON_7B}
NF4, BF16 = PRECISIONS["nf4"], PRECISIONS["bf16"]
CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(not is_available(), reason="this processor does not multiply in bfloat16")
STEP = Workload(rows=1, length=2048, rank=64, targets=LLAMA_2_7B_CHAT.linear_layers)


def configuration(family: str):
    """The architecture of a 7B model, without its weights."""
    from transformers import FalconConfig, LlamaConfig

    sizes = SPECS[family].sizes
    common = {
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "vocab_size": sizes.vocab_size,
    }
    if family == "llama2":
        return LlamaConfig(**common, intermediate_size=sizes.intermediate_size, tie_word_embeddings=False)
    return FalconConfig(**common, multi_query=True, new_decoder_architecture=False, bias=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """Return the folder of a random model of a family, large enough that its tables weigh nothing."""
    from transformers import AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            config = configuration(family)
            config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 256, 2, 4
            config.vocab_size = 1536
            if family == "llama2":
                config.intermediate_size, config.num_key_value_heads, config.head_dim = 704, 4, 64
            else:
                config.ffn_hidden_size = 1024
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(made[family])
        return made[family]

    return make


def test_parameters_of_the_published_models():
    assert parameter_count(LLAMA_2_7B_CHAT.sizes) == 6_738_415_616
    # The checkpoint's count, 7,217,189,760, has the embedding twice; tied, it lies in memory once.
    assert parameter_count(FALCON_7B.sizes) == 6_921_720_704
    assert parameter_count(replace(FALCON_7B.sizes, tied_embeddings=False)) == 7_217_189_760


@pytest.mark.parametrize("family", SPECS)
def test_adapter_parameters_are_those_of_peft(family):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    spec = SPECS[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(family))
        assert parameter_count(spec.sizes) == sum(weight.numel() for weight in model.parameters())
        model = get_peft_model(model, LoraConfig(r=64, target_modules=list(spec.linear_layers)))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert adapter_parameters(spec.sizes, 64, spec.linear_layers) == trained


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("precision", ["nf4", "nf4-single", "fp4", "int8", "bf16"])
def test_base_bytes_are_those_of_a_loaded_model(small, family, precision):
    _, receipt, _ = load_base(str(small(family)), None, PRECISIONS[precision], "bfloat16", device=CPU)
    planned = base_bytes(sizes_of(small(family)), PRECISIONS[precision])
    assert planned == pytest.approx(receipt.bytes, rel=0.005)


def test_figures_of_others_stand_near():
    """Their settings differ, so these only guard the order of magnitude."""
    seven = LLAMA_2_7B_CHAT.sizes
    assert 0.7 < base_bytes(seven, NF4) / 5048e6 < 1  # QLoRA, arXiv 2305.14314, figure 6
    assert 0.75 < training_memory(seven, NF4, STEP).total / 7.5e9 < 1.25  # LLaMA-Factory, arXiv 2403.13372
    assert 0.75 < training_memory(seven, BF16, STEP).total / 16.3e9 < 1.25
    assert 0.75 < training_memory(seven, NF4, STEP).total / 9.29e9 < 1.25  # torchtune


def peak_of_a_step(
    folder: Path, family: str, precision: str, training: dict, tmp_path: Path, *, storage: str = "packed"
) -> int:
    """Bytes of every tensor alive at the peak of the second step: what lay there, and what the step adds."""
    from datasets import Dataset
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    base, receipt, _ = load_base(str(folder), None, PRECISIONS[precision], "bfloat16", device=CPU)
    expanded = expand(base, torch.bfloat16) if storage == "expanded" else 0
    expanded += lay_out(base) if storage == "blocked" else 0
    score_supervised_tokens()
    lora = {"r": 8, "lora_alpha": 8, "target_modules": list(SPECS[family].linear_layers)}
    model = attach(base, lora, 0)
    tokenizer = AutoTokenizer.from_pretrained(STANDINS["llama2"].folder)
    tokenizer.pad_token = "<unk>"
    rows = torch.randint(3, 1500, (16, training["max_length"])).tolist()  # as long as the plan takes them to be
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        packing=True,
        bf16=True,
        use_cpu=True,
        report_to="none",
        **training,
    )
    with repairs.float32_adapter(model):
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            processing_class=tokenizer,
        )
    fuse_lora_layers(model)
    fuse_norms_and_gates(model)
    step, peaks = trainer.training_step, []

    def profiled(*args):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            loss = step(*args)
        events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
        alive = [0]
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive.append(alive[-1] + event.nbytes())
        peaks.append(max(alive))
        return loss

    trainer.training_step = profiled
    trainer.train()
    tensors = [weight for weight in model.parameters() if weight.requires_grad]
    tensors += [value for state in trainer.optimizer.state.values() for value in state.values()]
    return receipt.bytes + expanded + sum(tensor.numel() * tensor.element_size() for tensor in tensors) + peaks[-1]


@pytest.mark.parametrize(
    ("family", "precision", "checkpoint", "storage"),
    [
        ("llama2", "nf4", True, "packed"),
        ("llama2", "nf4", False, "expanded"),
        ("llama2", "bf16", False, "packed"),
        ("llama2", "int8", True, "packed"),
        ("falcon", "nf4", True, "packed"),
        ("falcon", "nf4", False, "expanded"),
        pytest.param("llama2", "bf16", False, "blocked", marks=needs_bfloat16),
        pytest.param("falcon", "nf4", True, "blocked", marks=needs_bfloat16),
    ],
)
def test_a_step_peaks_where_planned(small, family, precision, checkpoint, storage, tmp_path):
    training = {
        "max_length": 1024,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": checkpoint,
    }
    measured = peak_of_a_step(small(family), family, precision, training, tmp_path, storage=storage)
    work = Workload(
        rows=1,
        length=1024,
        rank=8,
        targets=SPECS[family].linear_layers,
        checkpoint_every=int(checkpoint),
        storage=storage,
        device="cpu",
    )
    planned = training_memory(sizes_of(small(family)), PRECISIONS[precision], work)
    assert planned.total - planned.heap == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("family", SPECS)
def test_sizes_come_from_a_folder(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = STANDINS[family].folder
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    assert parameter_count(sizes_of(folder)) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model_type": "llama", "hidden_size": 64}'])
def test_a_folder_without_a_usable_configuration_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        sizes_of(tmp_path)
    with pytest.raises(ModelError, match="Expected a folder"):
        sizes_of(tmp_path / "missing")


def test_a_hub_model_that_cannot_be_had_is_named(recipe_for):
    with pytest.raises(ModelError, match="nobody/nothing"):
        plan(resolve(recipe_for(), model="nobody/nothing"))


def test_parts_add_up_and_the_context_is_no_tensor(recipe_for):
    training = plan(resolve(recipe_for())).training
    assert sum(training.parts.values()) == training.total == training.allocated + estimate.CUDA_CONTEXT
    assert plan(resolve(recipe_for()), device="cpu").training.context == 0


def test_checkpointing_trades_activations():
    def activations(every: int) -> int:
        return training_memory(LLAMA_2_7B_CHAT.sizes, BF16, replace(STEP, checkpoint_every=every)).activations

    assert activations(1) < activations(2) < activations(4) < activations(0)


def test_int8_keeps_its_inputs_under_checkpointing():
    sizes = LLAMA_2_7B_CHAT.sizes
    int8, bf16 = (training_memory(sizes, PRECISIONS[name], STEP) for name in ("int8", "bf16"))
    assert int8.activations - bf16.activations > 2 * GIB


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [("adamw_torch_fused", 8), ("paged_adamw_32bit", 8), ("paged_adamw_8bit", 2.03125), ("sgd", 0)],
)
def test_optimizer_bytes_by_name(optim, bytes_each):
    assert estimate.optimizer_bytes(optim, 2**20) == bytes_each * 2**20


def test_accumulated_gradients_are_there_throughout():
    sizes = LLAMA_2_7B_CHAT.sizes
    one, several = (training_memory(sizes, NF4, replace(STEP, accumulation=n)) for n in (1, 2))
    assert several.gradients == several.adapter
    assert several.total >= one.total


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    sizes = LLAMA_2_7B_CHAT.sizes
    rows = largest_micro_batch(sizes, NF4, STEP, 24)
    assert training_memory(sizes, NF4, replace(STEP, rows=rows)).total <= 24 * GIB
    assert training_memory(sizes, NF4, replace(STEP, rows=rows + 1)).total > 24 * GIB
    assert largest_micro_batch(sizes, BF16, STEP, 8) == 0


@pytest.mark.parametrize("gib", [0, -1, float("nan"), float("inf")])
def test_a_gpu_of_no_size_is_refused(gib):
    with pytest.raises(UsageError, match="such as 24"):
        largest_micro_batch(LLAMA_2_7B_CHAT.sizes, NF4, STEP, gib)


def test_the_workload_is_read_from_the_settings(recipe_for):
    padded = {"packing": False, "padding_free": False}
    training = {"gradient_checkpointing_kwargs": {"every_n_layers": 2}, "optim": "sgd", **padded}
    lora = {"target_modules": ["q_proj"], "lora_dropout": 0.1}
    settings = resolve(recipe_for(), lora=lora, training=training)
    work = workload_of(settings)
    assert (work.targets, work.dropout, work.checkpoint_every, work.optim) == (("q_proj",), True, 2, "sgd")
    assert (work.rows, work.length, work.packing) == (2, 128, False)
    all_linear = resolve(recipe_for(), lora={"target_modules": "all-linear"})
    assert workload_of(all_linear).targets == tuple(linear_shapes(LLAMA_2_7B_CHAT.sizes))


def test_what_no_formula_knows_is_said(recipe_for):
    settings = resolve(recipe_for(), lora={"use_dora": True, "target_modules": ".*proj"})
    assert left_out(settings) == ["use_dora", "target_modules"]
    assert left_out(resolve(recipe_for())) == []


def test_every_part_has_a_place():
    assert set(Memory("").parts) >= {
        "base",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "context",
    }
