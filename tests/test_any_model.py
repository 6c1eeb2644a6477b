"""Any decoder: its sizes and linear layers from `config.json` alone, or a refusal in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published import PUBLISHED

from qlora_recipes import DatasetSpec, ModelSpec, Recipe, cli
from qlora_recipes.base.loading import load_base
from qlora_recipes.errors import ModelError, UnreadableModelError
from qlora_recipes.families import sizes_from
from qlora_recipes.families.outline import sizes_of_model
from qlora_recipes.memory.estimate import evaluation_memory, training_memory
from qlora_recipes.memory.sizes import adapter_parameters, linear_parameters, parameter_count, sizes_of
from qlora_recipes.memory.step import base_bytes
from qlora_recipes.memory.workload import Workload
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.settings import resolve
from qlora_recipes.standins import STANDINS

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=704, vocab_size=512)
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=512)


def outline(config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))


def write(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def of_folder(folder: Path | str) -> type[Recipe]:
    return type("Mine", (Recipe,), {"model": str(folder), "dataset": "rows.jsonl", "__module__": __name__})


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_those_of_the_published_model(name: str) -> None:
    config, weights = PUBLISHED[name]
    sizes, model = sizes_from(config, name), outline(config)
    assert parameter_count(sizes) == weights == sum(parameter.numel() for parameter in model.parameters())
    output = model.get_output_embeddings()
    linears = {path: each for path, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    experts = [each for path, each in model.named_parameters() if ".experts." in path and each.dim() == 3]
    counted = [each.weight for each in linears.values() if each is not output] + experts
    assert linear_parameters(sizes) == sum(each.numel() for each in counted)
    targeted = [each for path, each in linears.items() if path.rpartition(".")[-1] in sizes.linear_layers]
    assert len(targeted) == len(linears) - 1  # all but the output layer: routers of these are no linear layers
    assert adapter_parameters(sizes, 3, sizes.linear_layers) == sum(
        3 * (each.in_features + each.out_features) for each in targeted
    )
    assert sizes.tied_embeddings == (output.weight is model.get_input_embeddings().weight)
    assert sizes.head_size == config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Mistral-Nemo"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_counted_gives_the_plan_of_what_is_computed(name: str, device: str) -> None:
    config, _ = PUBLISHED[name]
    computed, counted = sizes_from(config, name), sizes_of_model(outline(config))
    assert computed.counted is None and counted.counted is not None
    assert counted.linear_layers == computed.linear_layers == LLAMA_LINEARS
    for precision in PRECISIONS.values():
        for packing in (True, False):
            work = Workload(2, 1024, rank=8, targets=LLAMA_LINEARS, packing=packing, device=device)
            assert training_memory(counted, precision, work) == training_memory(computed, precision, work)
            assert evaluation_memory(counted, precision, work) == evaluation_memory(computed, precision, work)


LINEARS = {
    "Phi-3-mini-4k": {"o_proj", "qkv_proj", "gate_up_proj", "down_proj"},
    "gpt-neox-20b": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "LFM2-1.2B": {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
    "Qwen3-30B-A3B": {"q_proj", "k_proj", "v_proj", "o_proj"},  # experts and routers are no linear layers
    "gemma-3-1b": set(LLAMA_LINEARS),
}


@pytest.mark.parametrize("name", LINEARS)
def test_default_targets_are_the_linear_layers_of_the_blocks(name: str) -> None:
    assert set(sizes_from(PUBLISHED[name][0], name).linear_layers) == LINEARS[name]


def test_a_router_and_what_is_outside_of_the_blocks_are_no_targets() -> None:
    moe = sizes_from(dict(model_type="qwen2_moe", num_experts=8, moe_intermediate_size=32, **TINY), "")
    assert set(moe.linear_layers) == set(LLAMA_LINEARS)  # of the shared expert
    assert "shared_expert_gate" in {each.name for each in moe.linears}
    gemma = sizes_from(dict(model_type="gemma4_text", vocab_size_per_layer_input=512, **TINY), "")
    assert "per_layer_model_projection" in {each.name for each in gemma.linears}
    assert "per_layer_model_projection" not in gemma.linear_layers
    assert {each.outputs for each in gemma.linears if each.name == "q_proj"} == {4 * 256, 4 * 512}  # heads differ


def test_windows_experts_and_layers_that_do_not_attend() -> None:
    gemma, lfm, moe = (sizes_from(PUBLISHED[name][0], name) for name in ("gemma-3-1b", "LFM2-1.2B", "gpt-oss-20b"))
    assert gemma.cached_positions(4096) == 22 * 512 + 4 * 4096
    assert lfm.cached_positions(4096) == 6 * 4096
    assert moe.counted and (moe.counted.num_experts, moe.counted.experts_per_token) == (32, 4)
    assert moe.intermediate_size == 4 * 2880
    mistral = sizes_from({**PUBLISHED["Mistral-7B-v0.3"][0], "sliding_window": 4096}, "")
    assert mistral.cached_positions(8192) == 32 * 4096


@pytest.mark.parametrize(
    "config",
    [
        dict(model_type="qwen3", head_dim=128, num_key_value_heads=2, tie_word_embeddings=True, **SMALL),
        dict(model_type="gpt_neox", **SMALL),
        dict(model_type="phi3", pad_token_id=0, **SMALL),
        dict(model_type="lfm2", layer_types=["conv", "full_attention"], **SMALL),
        dict(model_type="llama", attention_bias=True, mlp_bias=True, head_dim=32, **SMALL),
    ],
    ids=lambda config: config["model_type"],
)
def test_bytes_of_a_base_are_those_of_a_loaded_model(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(tmp_path)
    _, receipt, _ = load_base(str(tmp_path), None, PRECISIONS["nf4"], "bfloat16", device=torch.device("cpu"))
    sizes = sizes_of(tmp_path)
    assert parameter_count(sizes) == receipt.parameters
    assert base_bytes(sizes, PRECISIONS["nf4"]) == pytest.approx(receipt.bytes, rel=0.005)


# ---- Recipes ----


def test_a_recipe_of_three_lines_from_a_folder_of_its_own(tmp_path: Path) -> None:
    """Without torch where the architecture has arithmetic of its own."""
    lines = ["from qlora_recipes import Recipe", "class Mine(Recipe):"]
    lines += [f"    model = {str(STANDINS['llama2'].folder)!r}", "    dataset = 'rows.jsonl'"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    code = (
        "import sys; from qlora_recipes.commands.plan import main; main(sys.argv[1:]);"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    words = [sys.executable, "-c", code, "mine.py"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said.splitlines()[-1] == "[]"
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj" in " ".join(said.split())
    assert "can be 4-bit" in said


THREE_LINES = "from qlora_recipes import Recipe\nclass Mine(Recipe):\n    model = {!r}\n    dataset = 'rows.jsonl'\n"
LINEAR_NAMES = {"falcon": FALCON_7B.linear_layers or (), "llama2": LLAMA_LINEARS}


@pytest.mark.parametrize("family", LINEAR_NAMES)
def test_a_recipe_of_three_lines_trains(
    family: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With byte-level tokens, and with those of Llama 2, whose class reads `legacy` and does not save it."""
    monkeypatch.chdir(tmp_path)
    rows = ({"question": f"How many is {i}?", "answer": f"It is {i}."} for i in range(40))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(THREE_LINES.format(str(tiny(family))))
    cli.main(["train", "mine.py", "--max_steps", "2", "--max_length", "128", "--save_strategy", "no"])
    receipt = json.loads((tmp_path / "runs/mine/nf4-seed0/run.json").read_text())
    assert set(receipt["adapter"]["targets"]) == set(LINEAR_NAMES[family])
    assert receipt["base"]["architecture"]["architecture"] == f"{family.rstrip('2')}, 2 layers of 64"
    assert receipt["base"]["architecture"]["linears"] == ", ".join(LINEAR_NAMES[family])


def test_the_plan_shows_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "moe", **PUBLISHED["gpt-oss-20b"][0])
    (tmp_path / "mine.py").write_text(
        f"from qlora_recipes import Recipe\nclass Mine(Recipe):\n    model = {str(folder)!r}\n    dataset = 'x.json'\n"
    )
    cli.main(["plan", str(tmp_path / "mine.py")])
    said = " ".join(capsys.readouterr().out.split())
    for found in (
        "gpt_oss, 24 layers of 2,880",
        "64 of 64, 8 for keys and values",
        "experts 32, 4 a token",
        "window 128 tokens in 12 layers",
        "20,914,757,184, of which 94.4% can be 4-bit",
        "linears q_proj, k_proj, v_proj, o_proj",
        "an estimate: its rules were fitted to Llama and Falcon",
    ):
        assert found in said


def test_a_spec_of_an_id_alone_is_filled(tmp_path: Path) -> None:
    spec = ModelSpec.from_pretrained(str(write(tmp_path, **PUBLISHED["Phi-3-mini-4k"][0])))
    assert set(spec.linear_layers or ()) == LINEARS["Phi-3-mini-4k"]
    assert spec.sizes and spec.sizes.query_key_value_size == 3 * 3072
    assert (spec.chat_template, spec.pad_token, spec.family) == (None, None, None)


def test_strings_stand_for_specs() -> None:
    recipe = of_folder("Qwen/Qwen3-8B")
    assert recipe.model == ModelSpec("Qwen/Qwen3-8B")
    assert recipe.dataset == DatasetSpec("rows.jsonl")
    assert of_folder(LLAMA_2_7B_CHAT.hub_id).model is LLAMA_2_7B_CHAT


def test_another_model_takes_nothing_of_the_recipes(tmp_path: Path, recipe_for: Any) -> None:
    other = str(write(tmp_path / "neox", model_type="gpt_neox", **TINY))
    settings = resolve(recipe_for(), model=other)
    assert settings.spec.hub_id == other
    assert settings.spec.chat_template is None and settings.spec.pad_token is None
    assert set(settings.lora["target_modules"]) == LINEARS["gpt-neox-20b"]
    same_type = str(write(tmp_path / "llama3", **PUBLISHED["Llama-3.1-8B"][0]))  # with other tokens
    assert resolve(recipe_for(), model=same_type).spec.chat_template is None


def test_a_copy_keeps_what_the_recipe_says(tmp_path: Path, tiny: Any, recipe_for: Any) -> None:
    seven = dict(model_type="llama", vocab_size=32000, hidden_size=4096)
    for copy in (write(tmp_path / "copy", **seven), tiny("llama2"), tmp_path / "nowhere"):
        assert resolve(recipe_for(), model=str(copy)).spec is LLAMA_2_7B_CHAT
    mine = replace(LLAMA_2_7B_CHAT, hub_id="me/mine", sizes=None, linear_layers=("q_proj",))
    settings = resolve(recipe_for(model=mine), model=str(tiny("llama2")))  # whose own config.json is out of reach
    assert (settings.spec, settings.lora["target_modules"]) == (mine, ["q_proj"])


def test_a_demo_needs_no_network(recipe_for: Any) -> None:
    settings = resolve(recipe_for(model="Qwen/Qwen3-8B"), demo=True)
    assert (settings.model, settings.spec) == ("standin-llama2", LLAMA_2_7B_CHAT)


def test_a_model_that_must_be_looked_at_and_cannot_be_had() -> None:
    with pytest.raises(UnreadableModelError, match=r"cannot load nobody/nothing: .*the hub cannot be reached"):
        resolve(of_folder("nobody/nothing"))
    for name in ("/no/where", "no where", "x" * 300):
        with pytest.raises(UnreadableModelError, match="Expected a folder with config"):
            resolve(of_folder(name))


# ---- What cannot be tuned ----

GPTQ = {"quant_method": "gptq", "bits": 4}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an encoder": (dict(model_type="bert"), "bert reads a text in both directions. Expected a decoder"),
    "no language model": (dict(model_type="vit"), "vit is no language model. Expected a decoder"),
    "an encoder with a decoder": (dict(model_type="t5", is_encoder_decoder=True), "t5 is an encoder with a decoder"),
    "a vision model": (dict(model_type="gemma3", vision_config={}), r"gemma3 sees or hears \(.*only decoders of text"),
    "a vision model without a decoder of its own": (dict(model_type="llava"), "llava sees or hears"),
    "GPTQ": (
        dict(model_type="llama", quantization_config=GPTQ),
        r"already quantized \(gptq\).*a copy .* in 16 bits",
    ),
    "AWQ": (dict(model_type="qwen3", quantization_config={"quant_method": "awq"}), r"already quantized \(awq\)"),
    "fp8": (dict(model_type="deepseek_v3", quantization_config={"quant_method": "fp8"}), r"quantized \(fp8\)"),
    "no model_type": (dict(hidden_size=8), "its config.json has no model_type"),
    "an unknown type": (dict(model_type="nonesuch"), "Transformers .* does not know the model_type 'nonesuch'"),
    "code of its own": (
        dict(model_type="nonesuch", auto_map={"AutoModelForCausalLM": "its.Model"}),
        "its repository has code for it, which --trust_remote_code runs",
    ),
    "sizes that do not fit": (dict(model_type="qwen3", **{**TINY, "hidden_size": "wide"}), "refuses its config.json"),
    "sizes that are missing": (dict(model_type="llama", hidden_size=8), "dimensions in config.json: KeyError"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("how", ["declared", "a flag"])
def test_what_cannot_be_tuned_is_refused(
    case: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe_for: Any
) -> None:
    config, reason = BAD[case]
    folder = str(write(tmp_path / "model", **config))
    with pytest.raises(ModelError, match=reason) as refused:
        recipe = of_folder(folder) if how == "declared" else recipe_for()
        settings = resolve(recipe, model=None if how == "declared" else folder)
        if how == "a flag" and settings.spec is LLAMA_2_7B_CHAT:  # unreadable: loading says more
            sizes_of(Path(folder))
    assert folder in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_are_no_base_are_refused(tmp_path: Path) -> None:
    for folder in ("gguf", "adapter"):
        (tmp_path / folder).mkdir()
    (tmp_path / "gguf" / "model-Q4_K_M.gguf").touch()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B"}')
    for source, reason in {
        tmp_path / "gguf": "gguf files are already quantized, for llama.cpp",
        tmp_path / "gguf" / "model-Q4_K_M.gguf": "gguf files are already quantized",
        tmp_path / "adapter": "an adapter of Qwen/Qwen3-8B, and no base",
        tmp_path / "empty": "no config.json: there is no such folder",
    }.items():
        with pytest.raises(ModelError, match=reason):
            resolve(of_folder(source))


def test_the_text_part_of_a_vision_model_alone_is_tuned(tmp_path: Path) -> None:
    """Transformers makes of it the decoder of text, with none of what sees."""
    text = dict(model_type="qwen3_5_text", layer_types=["linear_attention", "full_attention"], **TINY)
    sizes = sizes_of(write(tmp_path, model_type="qwen3_5", text_config=text, vision_config={"depth": 2}))
    assert sizes.family.model_types == ("qwen3_5_text",)
    assert sizes.counted and sizes.counted.attention_layers == 1


def test_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "model", model_type="llama", quantization_config=GPTQ)
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "llama2_guanaco", "--model", str(folder)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: cannot load") and said.count("\n") == 1
