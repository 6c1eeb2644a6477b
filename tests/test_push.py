"""Publishing: one commit, nothing in it that stays at home, and refusals that upload nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_runs import answers, flipped, make_run
from hub import Hub
from huggingface_hub import constants

from qlora_recipes.commands.entry import run_command
from qlora_recipes.commands.push import main
from qlora_recipes.comparison.folders import compare_folders
from qlora_recipes.report.page import write_report

SECRET = "hf_" + "a1" * 12
HOME = "/home/somebody/models"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", SECRET)
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run that was compared with another, and whose files name secrets and folders of this machine."""
    scores = answers(200)
    run = make_run(tmp_path, "nf4", scores=flipped(scores, 12))
    other = make_run(tmp_path, "bf16", scores=scores)
    write_report(compare_folders([run, other], 1.0), tmp_path / "report")
    receipt = json.loads((run / "run.json").read_text())
    receipt["command"] = ["recipe.py", "--dataset", f"{HOME}/rows.jsonl", f"--run_name={SECRET}"]
    receipt["demo"] = False
    receipt["base"]["model"] = "owner/base"
    (run / "run.json").write_text(json.dumps(receipt))
    (run / "held_out.json").write_text(json.dumps([{"place": "row 1", "messages": []}]))
    config = {"base_model_name_or_path": f"{HOME}/base", "r": 8}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (run / "adapter" / "tokenizer_config.json").write_text(json.dumps({"name_or_path": f"{HOME}/base"}))
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages }}")
    (run / "loss.png").write_bytes(b"picture")
    return run


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        run_command(main, argv)
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_a_run_is_published_in_one_commit(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), "owner/capitals"])
    repository = hub.repositories["models", "owner/capitals"]
    ((title, paths),) = repository.commits
    assert title == f"Add {run.parent.name}/{run.name}"
    assert f"published: {hub.url}/owner/capitals/commit/" in capsys.readouterr().out
    whole = {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "chat_template.jinja"}
    whole |= {"README.md", "run.json", "loss.png", "report/index.html", "report/report.md", "report/report.json"}
    assert whole <= set(paths)
    assert not {path for path in paths if re.search("held_out|answers.json|evaluation|started", path)}
    everything = b"".join(repository.files.values())
    for private in (SECRET, HOME, str(run.parent)):
        assert private.encode() not in everything
    assert b"rows.jsonl" in repository.files["run.json"]
    config = json.loads(repository.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "owner/base"
    card = repository.files["README.md"].decode()
    assert "## Verdict" in card and "nf4" in card
    assert repository.files["adapter_model.safetensors"] == (run / "adapter/adapter_model.safetensors").read_bytes()


def test_nothing_is_sent_on_trial(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run), "owner/capitals", "--dry_run"])
    assert "adapter_model.safetensors" in capsys.readouterr().out
    assert not hub.requests


def test_answers_to_held_out_rows_stay(hub: Hub, run: Path) -> None:
    page = run.parent / "report" / "report.json"
    report = json.loads(page.read_text())
    changed = report["contrasts"][0]["changed"][0]
    report["contrasts"][0]["changed"] = [changed | {"task": "held_out_answers", "prompt": "A question of ours"}]
    page.write_text(json.dumps(report))
    main([str(run), "owner/capitals"])
    assert b"A question of ours" not in b"".join(hub.repositories["models", "owner/capitals"].files.values())


def test_what_is_not_proven_is_refused(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "owner/capitals"]
    receipt = json.loads((run / "run.json").read_text())
    failed = receipt | {"checks": [{"name": "base_unchanged", "verdict": "fail", "figure": "", "advice": ""}]}
    (run / "run.json").write_text(json.dumps(failed))
    assert "base_unchanged failed" in refusal(words, capsys)
    (run / "run.json").write_text(json.dumps(receipt | {"demo": True}))
    assert "Give --base and the hub id" in refusal(words, capsys)
    (run / "run.json").write_text(json.dumps(receipt))
    weights = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "is not the adapter that was trained" in refusal(words, capsys)
    (run / "run.json").unlink()
    assert "holds no finished run" in refusal(words, capsys)
    assert not hub.requests


def test_a_hub_that_refuses_is_said(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.may_write = False
    message = refusal([str(run), "other/capitals"], capsys)
    assert "the hub refuses other/capitals (403" in message and "hf auth login" in message
    assert "expected OWNER/NAME" in refusal([str(run), "not a name"], capsys)
    hub.silent = True
    assert "nothing was published" in refusal([str(run), "owner/capitals"], capsys)
    assert not hub.repositories


def test_two_words_are_expected(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a run's folder and a repository" in refusal([str(run)], capsys)
