"""The notebook runs from top to bottom with few steps; what is committed is the output of a whole run."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "llama2_guanaco.ipynb"
# What makes a trial of the whole.
SHORTER = {
    "choices = dict(demo=True)": "choices = dict(demo=True, training=dict(max_steps=6))",
    "api.evaluate(nf4, bf16)": "api.evaluate(nf4, bf16, options=Options(limit=16))",
    "DEMO = True": "from qlora_recipes.evaluation.harness import Options\n\nDEMO = True",
}


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.slow
def test_it_runs_and_shows_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    assert all(any(short in cell.source for cell in notebook.cells) for short in SHORTER.values())
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output.data for output in outputs(notebook) if "data" in output]
    assert any("image/png" in data for data in shown) and any("image/svg+xml" in data for data in shown)
    assert any("nf4" in data.get("text/markdown", "") and "documents" in data["text/markdown"] for data in shown)
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]


def test_the_committed_outputs_are_of_a_whole_run() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = "\n".join(str(output) for output in outputs(notebook))
    assert "in 150 steps" in text and "limited to" not in text and "Traceback" not in text
    assert "/home/" not in text and "/tmp/" not in text
