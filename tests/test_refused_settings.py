"""What a library would refuse late is refused before rows are read: exit code 2, the flag named, no folder made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_recipes import Recipe, environment
from qlora_recipes.commands.recipe_cli import main
from qlora_recipes.errors import UsageError
from qlora_recipes.fields import fields_of
from qlora_recipes.recipe import DERIVED
from qlora_recipes.settings import resolve
from qlora_recipes.training import train as train_module
from qlora_recipes.training.configuration import refusals

FLAGS = """
--target_modules nothere
--target_modules q_proj,v_prj
--target_modules lm_head
--target_modules .*lm_head
--target_modules .*
--target_modules .*nothere
--modules_to_save nothere
--exclude_modules nothere
--layers_to_transform 99
--layers_to_transform 0,99
--layers_to_transform -1
--layers_pattern foo
--layer_replication [[0,9]]
--rank_pattern {"q_proj":0}
--rank_pattern 4
--rank_pattern {"nothere":4}
--rank_pattern {"lm_head":4}
--alpha_pattern {"nothere":4}
--alpha_pattern {"q_proj(":4}
--target_parameters nothere
--target_parameters model.layers.0.mlp.down_proj.weight
--bias foo
--lora_bias
--bias all
--bias lora_only
--init_lora_weights foo
--init_lora_weights eva
--init_lora_weights corda
--init_lora_weights lora_ga
--init_lora_weights pissa_niter_0
--init_lora_weights pissa --use_dora
--init_lora_weights olora --weight_decay 0.1
--init_lora_weights loftq --precision bf16
--init_lora_weights mica --precision nf4
--use_dora --precision int8
--loftq_config {"loftq_bits":4}
--modules_to_save lm_head
--loraplus_lr_ratio 0.5
--r -1
--r 0
--lora_alpha 0
--lora_alpha -1
--lora_dropout 1
--lora_dropout -0.5
--megatron_config {"a":1}
--eva_config {"rho":0}
--arrow_config {"nothere":0}
--alora_invocation_tokens foo
--seed -1
--seed 4294967296
--data_seed -1
--loss_type foo
--report_to foo
--report_to tensorboard,none
--adam_beta1 2
--adam_beta2 -1
--adam_epsilon -1
--weight_decay -1
--learning_rate 0
--learning_rate inf
--learning_rate nan
--num_train_epochs inf
--optim foo
--optim lomo
--optim galore_adamw
--optim apollo_adamw
--optim schedule_free_adamw
--optim grokadamw
--optim stable_adamw
--optim adamw_torch_8bit
--optim adamw_torch_4bit
--optim adamw_anyprecision
--optim adamw_torch_xla
--optim adamw_torch_npu_fused
--optim_args foo
--lr_scheduler_type foo
--lr_scheduler_type cosine_with_min_lr
--lr_scheduler_type warmup_stable_decay
--lr_scheduler_type reduce_lr_on_plateau
--lr_scheduler_kwargs {"nothere":1}
--lr_scheduler_kwargs 3
--warmup_steps -3
--neftune_noise_alpha -5
--label_smoothing_factor 2
--dataloader_num_workers -1
--dataloader_prefetch_factor 2
--dataloader_persistent_workers
--dataloader_multiprocessing_context foo
--dataset_num_proc 0
--pad_to_multiple_of 0
--pad_to_multiple_of foo
--packing_strategy foo
--truncation_mode foo
--logging_steps 0
--logging_steps -1
--logging_steps 1.5
--logging_strategy foo
--eval_strategy foo
--eval_steps 0
--eval_delay -1
--eval_on_start
--per_device_eval_batch_size 0
--eval_accumulation_steps 0
--metric_for_best_model foo
--save_strategy foo
--save_steps 1.5 --save_strategy steps
--save_total_limit 0
--hub_strategy foo
--debug=foo
--log_level foo
--ddp_backend foo
--ddp_timeout -1
--tf32 true
--torch_empty_cache_steps 0
--torch_compile_backend foo
--train_sampling_strategy foo
--use_liger_kernel
--activation_offloading
--accelerator_config {"nothere":1}
--gradient_checkpointing_kwargs 3
--fsdp full_shard
--fsdp_config {"version":2}
--deepspeed zero.json
--max_grad_norm -1
--max_steps 0
--max_length 1
""".strip().splitlines()

ACCEPTED = """
--target_modules q_proj
--target_modules q_proj,v_proj
--target_modules all-linear
--target_modules .*[qv]_proj
--layers_to_transform 0,1
--init_lora_weights orthogonal
--init_lora_weights gaussian
--init_lora_weights mica --precision bf16
--init_lora_weights pissa
--init_lora_weights pissa_niter_4
--init_lora_weights olora --precision bf16
--init_lora_weights loftq
--use_dora
--loraplus_lr_ratio 16
--use_rslora
--rank_pattern {"q_proj":2}
--rank_pattern {"layers.[01].*v_proj":2}
--alpha_pattern {"model.layers.0.self_attn.q_proj":2}
--optim adafactor
--optim paged_adamw_8bit
--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-5}
--lr_scheduler_type reduce_lr_on_plateau --eval_strategy steps --eval_steps 1
--neftune_noise_alpha 5
--report_to none
--dataloader_num_workers 1 --dataloader_prefetch_factor 2
--logging_steps 0.5
--seed 0
""".strip().splitlines()

LAUNCHES: list[tuple[dict[str, str], str]] = [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: got 'abc', expected a whole number"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE: got ''"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: got '-1'"),
    ({"WORLD_SIZE": "2"}, "RANK: not set, expected with WORLD_SIZE=2"),
    ({"WORLD_SIZE": "0"}, "RANK: got 0, expected less than WORLD_SIZE=0"),
    ({"LOCAL_RANK": "1"}, "RANK: not set, expected with LOCAL_RANK=1"),
    ({"LOCAL_RANK": "0"}, "RANK: not set, expected with LOCAL_RANK=0"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK: got 'x'"),
    ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE: got 'two'"),
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK: got 0, expected less than LOCAL_WORLD_SIZE=0"),
    ({"RANK": "1"}, "WORLD_SIZE: not set, expected with RANK=1"),
    ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK: got 3, expected less than WORLD_SIZE=2"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR: not set"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT: got 'http'"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed: its checkpoints are pickles"),
    ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION: got 1, expected 2"),
    (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
        "FSDP_STATE_DICT_TYPE: got SHARDED_STATE_DICT, expected FULL_STATE_DICT: with another no adapter is saved",
    ),
]


class Reached(Exception):
    """The settings were accepted, and rows would be read now."""


@pytest.fixture
def start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Callable[[str], Path],
    recipe_for: Callable[..., type[Recipe]],
) -> Callable[..., None]:
    """Return a function that starts a run of a tiny model in an empty folder, up to where its rows would be read."""

    def stop(*_: object) -> None:
        raise Reached

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_module, "prepare_rows", stop)
    recipe, model = recipe_for(), str(tiny("llama2"))
    return lambda *words: main(recipe, ["--model", model, *words])


@pytest.fixture
def refused(start: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return a function that starts a run, checks that it is refused with one message, and returns that."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            start(*words)
        message = capsys.readouterr().err
        assert ended.value.code == 2
        assert message.count("error: ") == 1 and "Traceback" not in message
        assert not list(tmp_path.iterdir())
        return message[message.index("error: ") :]

    return run


def words_of(line: str) -> list[str]:
    return line.split(" ")


@pytest.mark.parametrize("line", FLAGS)
def test_a_flag_that_a_library_would_refuse_is_named(refused: Callable[..., str], line: str) -> None:
    message = refused(*words_of(line))
    assert words_of(line)[0].removeprefix("--").split("=")[0] in message
    assert len(message) < 1_500


@pytest.mark.parametrize("line", ACCEPTED)
def test_what_the_libraries_take_is_accepted(start: Callable[..., None], line: str) -> None:
    with pytest.raises(Reached):
        start(*words_of(line))


@pytest.mark.parametrize(("variables", "part"), LAUNCHES)
def test_half_a_launch_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], part: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert part in refused()


def test_a_script_that_trains_is_refused_as_a_command_is(
    recipe_for: Callable[..., type[Recipe]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="DeepSpeed: its checkpoints are pickles"):
        train_module.train(resolve(recipe_for(), demo=True))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "10.0.0.1"},
        {
            **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        },
    ],
)
def test_a_whole_launch_is_accepted(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.check_launch()


def test_all_of_what_is_at_fault_is_named(refused: Callable[..., str]) -> None:
    message = refused("--dataloader_num_workers", "0", "--dataloader_prefetch_factor", "2", "--weight_decay", "0.1")
    assert "--dataloader_prefetch_factor: got 2" in message and "weight_decay" not in message


def test_a_tracker_that_is_missing_comes_with_its_command(refused: Callable[..., str]) -> None:
    assert "--report_to clearml: clearml is not installed; run: pip install clearml" in refused("--report_to=clearml")


def raise_in_a_library(message: str) -> None:
    raise ValueError(message)


def test_what_a_library_refuses_later_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = SimpleNamespace(lora={"use_dora": True, "bias": "none"}, training={"optim": "lomo"})
    with pytest.raises(UsageError, match="--optim: got 'lomo': refused by the libraries"), refusals(run):
        raise_in_a_library("LOMO is not installed")
    with pytest.raises(UsageError, match="--use_dora: got True: refused"), refusals(run):
        raise_in_a_library("use_dora is not for this base")
    with pytest.raises(FileNotFoundError), refusals(run):  # a fault of the machine, which has an error of its own
        Path("nowhere").read_text()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "use_dora")
    with pytest.raises(ValueError, match="invalid literal"), refusals(run):  # a fault of this package
        environment.local_processes()


# ---- Anything at all ----

NAMES = sorted({*fields_of("SFTConfig"), *fields_of("LoraConfig")} - {*DERIVED, "output_dir", "push_to_hub"})
VALUES = st.one_of(
    st.sampled_from(["true", "false", "null", "none", "-1", "0", "1", "2", "0.5", "1e9", "nan", "inf", "all", "steps"]),
    st.sampled_from(["[]", "{}", '{"a": 1}', '["a"]', "[[0, 1]]", '{"q_proj": -1}', "foo", "foo,bar", "..", "a=1"]),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(max_size=8),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), VALUES), min_size=1, max_size=3, unique_by=lambda pair: pair[0]))
def test_no_flag_ends_in_a_traceback(start: Callable[..., None], tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    with pytest.raises((SystemExit, Reached)) as ended:
        start(*(f"--{name}={value}" for name, value in pairs))
    assert ended.type is Reached or ended.value.code == 2  # type: ignore[union-attr]  # a SystemExit has one
    assert not list(tmp_path.iterdir())
