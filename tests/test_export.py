"""A run as GGUF: another reader finds the same tokens and the same predictions in it."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import jinja2
import numpy as np
import pytest
from deploy_runs import deploy_run, single_turns
from safetensors.torch import load_file, save_file

from qlora_recipes.chat_templates import without_markers
from qlora_recipes.commands.export import main
from qlora_recipes.deploy import gguf_file
from qlora_recipes.deploy.export import ExportReceipt, _refuse_another, export
from qlora_recipes.deploy.gguf_file import read_updates
from qlora_recipes.deploy.merging import merge
from qlora_recipes.errors import CheckError, ModelError, RunFolderError, UsageError
from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.settings import model_location

SPECS = {"standin-llama2": LLAMA_2_7B_CHAT, "standin-falcon": FALCON_7B}


@pytest.fixture(scope="module", params=SPECS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a merged run of each of the two models."""
    rows, folder = single_turns(120), tmp_path_factory.mktemp("export") / request.param
    lora = {"rank_pattern": {"k_proj|dense": 4}, "use_rslora": True, "lora_alpha": 4}
    run = deploy_run(
        folder, rows[8:], rows[:8], model=request.param, spec=SPECS[request.param], precision="bf16", steps=4, lora=lora
    )
    merge(run, run.merged)
    return run


def test_another_reader_finds_the_run_in_the_file(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run.path), "--type", "f16"])
    file = run.path / "f16.gguf"
    made = json.loads((run.path / "f16.gguf.json").read_text())
    assert f"{file}: " in capsys.readouterr().out
    assert made["texts_encoded_alike"] == made["answers_alike"] == made["texts"] == 16
    assert made["same_prediction"] == 1.0 and made["largest_change"] < 0.01
    fields = gguf.GGUFReader(file).fields
    template = fields["tokenizer.chat_template"].contents()
    assert "generation" not in template.replace("add_generation_prompt", "")
    assert fields["tokenizer.ggml.eot_token_id"].contents() == fields["tokenizer.ggml.eos_token_id"].contents()
    with pytest.raises(RunFolderError, match="is there already"):
        export(run, file, "f16")


def test_eight_bits_are_told_from_sixteen(run: RunFolder, tmp_path: Path) -> None:
    made = export(run, tmp_path / "new" / "run.gguf", "q8_0")
    assert 0.001 < made.largest_change < 0.2
    assert made.bytes < 0.7 * (run.merged / "model.safetensors").stat().st_size


def test_the_adapter_alone_adds_what_it_adds_in_training(run: RunFolder, tmp_path: Path) -> None:
    """The updates of the file, added to the matrices of a file of the base, make those of the merged run's file."""
    export(run, tmp_path / "adapter.gguf", "f32", adapter_only=True)
    base = Path(model_location(run.receipt().base.model))
    for name, folder in (("base", base), ("merged", run.merged)):
        for extra in ("generation_config.json", "chat_template.jinja"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / extra).write_bytes((run.merged / extra).read_bytes())
        for file in folder.iterdir():
            if file.suffix in (".json", ".safetensors") and not (tmp_path / name / file.name).exists():
                (tmp_path / name / file.name).symlink_to(file)
        gguf_file.write_model(tmp_path / name, tmp_path / f"{name}.gguf", "f32", name=name)
    files = {name: gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("base", "merged", "adapter")}
    of = {name: {str(each.name): each.data for each in file.tensors} for name, file in files.items()}
    alpha = files["adapter"].fields["adapter.lora.alpha"].contents()
    updated = [name.removesuffix(".lora_a") for name in of["adapter"] if name.endswith(".lora_a")]
    assert len({len(of["adapter"][f"{name}.lora_a"]) for name in updated}) == 2  # ranks
    for name in updated:
        a, b = (of["adapter"][f"{name}.lora_{side}"] for side in "ab")
        update, found = alpha / len(a) * (b @ a), of["merged"][name] - of["base"][name]
        assert np.abs(found - update).mean() < 0.2 * np.abs(update).mean()  # merged in bfloat16


@pytest.mark.parametrize(
    ("step", "said"), [(-1, "reads another model than the run.*"), (2, r"reader cannot load the file.*\. ")]
)
def test_a_file_that_is_another_model_is_not_kept(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, said: str
) -> None:
    def changed(config: object, name: str, rows: np.ndarray) -> np.ndarray:
        return rows[::step] if "layers.0.self_attn.q_proj" in name or "h.0.self_attention.query" in name else rows

    kind = json.loads((run.merged / "config.json").read_text())["model_type"]
    known = gguf_file._ARCHITECTURES[kind]
    monkeypatch.setitem(gguf_file._ARCHITECTURES, kind, gguf_file._Architecture(known.arch, changed))
    with pytest.raises(CheckError, match=rf"{said}Nothing was written"):
        export(run, tmp_path / "run.gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_figures_that_are_no_numbers_are_refused() -> None:
    found = ExportReceipt("run.gguf", 1, "f16", "", None, "reader", largest_change=float("nan"))
    with pytest.raises(CheckError, match="figures differ by up to nan"):
        _refuse_another(found)


def test_what_has_no_place_is_refused_by_name(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"got 'q8', expected one of f32, f16, bf16, q8_0. Did you mean 'q8_0'"):
        export(run, tmp_path / "run.gguf", "q8")
    config = json.loads((run.merged / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    with pytest.raises(ModelError, match="no GGUF of the architecture 'gpt_neox' here"):
        gguf_file.write_model(tmp_path, tmp_path / "run.gguf", "f16", name="")
    for file in run.adapter.glob("adapter_config.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(run.adapter / "adapter_model.safetensors")
    name, tensor = next(iter(weights.items()))
    save_file({name.replace("lora_A", "lora_magnitude_vector"): tensor}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"lora_magnitude_vector.* has no place in a GGUF adapter"):
        read_updates(tmp_path, run.merged)


def test_a_run_that_is_not_merged_is_refused(tmp_path: Path) -> None:
    run = deploy_run(tmp_path / "run", [], single_turns(2), precision="bf16")
    with pytest.raises(RunFolderError, match="Run: qlora-recipes merge"):
        export(run, tmp_path / "run.gguf", "f16")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_template_renders_the_same_without_markers(spec: object) -> None:
    source = spec.chat_template.source
    messages = [{"role": role, "content": f" {role} "} for role in ("system", "user", "assistant", "user", "assistant")]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = plain.from_string(without_markers(source)).render(messages=messages, bos_token="<s>", eos_token="</s>")
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template([messages], chat_template=source, bos_token="<s>", eos_token="</s>")
    assert text == expected
