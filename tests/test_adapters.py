"""What can be done with a trained run: chat with it, and merge it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_recipes import Recipe
from qlora_recipes.commands import chat
from qlora_recipes.deploy.merging import merge
from qlora_recipes.errors import RunFolderError
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.weights import adapter_file_sha256
from qlora_recipes.settings import resolve
from qlora_recipes.training.train import train


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path], recipe_for: Callable[..., type[Recipe]]
) -> RunFolder:
    recipe = recipe_for(training=dict(max_steps=4, max_length=128, learning_rate=3e-2))
    settings = resolve(
        recipe,
        model=str(tiny("llama2")),
        dataset=recipe.dataset.source,
        output_dir=tmp_path_factory.mktemp("run") / "run",
    )
    return train(settings)


def test_the_adapters_file_has_the_hash_of_the_weights_in_memory(folder: RunFolder) -> None:
    assert adapter_file_sha256(folder.adapter / "adapter_model.safetensors") == folder.receipt().adapter.final_sha256


def test_merging_writes_a_model_that_loads_alone_and_measures_itself(folder: RunFolder, tmp_path: Path) -> None:
    made = merge(folder, tmp_path / "merged")
    assert json.loads(json.dumps(asdict(made))) == json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert made.trained_on == "nf4"
    # NF4 moves the likelihoods more than adding the adapter does.
    assert 0 <= made.candidates["dequantized"].moved < made.candidates["16bit"].moved
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    before = load_file(Path(folder.receipt().base.model) / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.state_dict()[name].float(), before[name].float())
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_merging_never_writes_over_another_folder(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty"):
        merge(folder, tmp_path)


def test_chat_answers_each_line_of_a_pipe(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Where is it?", "", "And you?"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    asked: list[int] = []
    real = chat.answer

    def answer(runs, name, messages, settings):
        asked.append(len(messages))
        return real(runs, name, messages, settings) or "-"

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "answer", answer)
    chat.main([str(folder.path), "--max_new_tokens", "4"])
    assert asked == [1, 1]  # the empty line began a new conversation
    assert capsys.readouterr().out


def test_chat_needs_a_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no finished run"):
        chat.main([str(tmp_path)])
