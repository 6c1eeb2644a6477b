"""The run folder: what counts as a run, and that a run is removed only when another is in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_runs import answers, make_run

from qlora_recipes.errors import RunFolderError
from qlora_recipes.run.folder import RunFolder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return name to bytes of everything in a folder, of folders None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def run(root: Path, name: str = "nf4") -> RunFolder:
    """A finished and evaluated run, with what each of its commands adds."""
    folder = RunFolder(make_run(root, name, scores=answers(5)))
    folder.started.write_text("{}")
    folder.merged.mkdir()
    (folder.merged / "model.safetensors").write_bytes(b"merged")
    (folder.path / ".run.json.123").write_text("{")
    return folder


def finished_replacement(folder: RunFolder) -> dict[str, bytes | None]:
    """Put a finished run into the replacement of a folder, and return what it holds."""
    made = make_run(folder.path, "bf16")
    (made / "started.json").write_text("{}")
    made.rename(folder.replacement.path)
    return contents(folder.replacement.path)


@pytest.mark.parametrize("name", ["evaluation", "checkpoints/mine", "sub/deep", "replacement", "link/sub"])
@pytest.mark.parametrize("left", ["run.json", "started.json"])
def test_no_run_is_made_inside_another(tmp_path: Path, name: str, left: str) -> None:
    outer = tmp_path / "nf4"
    outer.mkdir()
    (outer / left).write_text("{}")
    (outer / "link").symlink_to(outer)
    with pytest.raises(RunFolderError, match="is inside a run"):
        RunFolder(outer / name).check_free()


OTHERS: dict[str, dict[str, str]] = {
    "an adapter": {"adapter/adapter_model.safetensors": "weights"},
    "an evaluation": {"evaluation/mmlu.json": "{}"},
    "checkpoints": {"checkpoints/checkpoint-1/trainer_state.json": "{}"},
    "a curve": {"metrics.jsonl": "{}"},
    "rows": {"held_out.json": "[]"},
    "all of these": {"adapter/a": "", "evaluation/b": "", "metrics.jsonl": "", "replacement/c": "", "merged/d": ""},
    "a folder named run.json": {"run.json/mine": ""},
    "a file of mine": {"thesis.txt": "mine"},
    "a run and a file of mine": {"run.json": "{}", "thesis.txt": "mine"},
    "what could be a leftover": {".thesis.txt.123": "mine"},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_not_a_run_alone_is_never_replaced(tmp_path: Path, kind: str, overwrite: bool) -> None:
    for name, text in OTHERS[kind].items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match="other files") as caught:
        RunFolder(tmp_path).check_free(overwrite=overwrite)
    assert next(iter(OTHERS[kind])).split("/")[0] in str(caught.value) or "thesis.txt" in str(caught.value)
    with pytest.raises(RunFolderError):
        RunFolder(tmp_path).claim()
    assert contents(tmp_path) == before


def test_a_folder_in_which_a_run_was_killed_at_once_is_free(tmp_path: Path) -> None:
    (tmp_path / ".started.json.123").write_text("{")
    folder = RunFolder(tmp_path)
    assert folder.check_free() is folder
    assert folder.check_free(overwrite=True) is folder


def linked(folder: Path, root: Path) -> Path:
    (root / "link").symlink_to(folder)
    return root / "link"


@pytest.mark.parametrize("reached", [lambda folder, root: folder, lambda folder, root: Path(), linked])
def test_a_run_stays_until_its_replacement_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: Callable[[Path, Path], Path]
) -> None:
    monkeypatch.chdir(run(tmp_path).path)
    folder = RunFolder(reached(tmp_path / "nf4-seed0", tmp_path))
    before = contents(folder.path)
    with pytest.raises(RunFolderError, match=r"holds a finished run.*--overwrite to replace it"):
        folder.check_free()
    replacement = folder.check_free(overwrite=True)
    replacement.claim()
    replacement.started.write_text("{}")
    assert {name: content for name, content in contents(folder.path).items() if "replacement" not in name} == before
    assert folder.to_resume.path == replacement.path
    with pytest.raises(RunFolderError, match="which --resume continues"):
        folder.check_free()
    replacement.put_in_place()  # it is not finished
    assert folder.to_resume.path == replacement.path
    replacement.claim()  # --overwrite once more
    assert not replacement.started.exists()
    replacement.path.rmdir()
    after = finished_replacement(folder)
    assert replacement.put_in_place().path == folder.path
    assert contents(tmp_path / "nf4-seed0") == after


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", range(14))
def test_a_kill_while_a_run_is_put_in_place_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    folder = run(tmp_path)
    before, after = contents(folder.path), finished_replacement(folder)
    moves = [0]
    for owner, name in ((Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")):
        plain = getattr(owner, name)

        def counted(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            moves[0] += 1
            if moves[0] > step:
                raise Killed
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    killed = False
    try:
        folder.replacement.put_in_place()
    except Killed:
        killed = True
        there = [content for content in contents(folder.path).values() if content]
        assert all(content in there for content in (*before.values(), *after.values()) if content)
    monkeypatch.undo()
    (folder.path / "thesis.txt").write_text("mine")  # put there meanwhile
    folder.replacement.put_in_place()
    assert contents(folder.path) == {**after, "thesis.txt": b"mine"}
    assert killed == (step < 13), moves  # every one of them


def test_a_folder_of_mine_with_a_folder_named_replacement_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "replacement" / "replaced").mkdir(parents=True)
    (tmp_path / "replacement" / "replaced" / "thesis.txt").write_text("mine")
    before = contents(tmp_path)
    RunFolder(tmp_path).replacement.put_in_place()
    assert contents(tmp_path) == before


def test_a_link_named_replacement_is_not_followed(tmp_path: Path) -> None:
    mine, strangers = run(tmp_path / "mine"), run(tmp_path / "strangers")
    strangers.replacement.path.symlink_to(mine.path)
    before = contents(tmp_path)
    strangers.replacement.put_in_place()
    with pytest.raises(RunFolderError, match="holds a finished run"):
        strangers.check_free(overwrite=True).claim()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kept", ["checkpoints/checkpoint-2/a", "checkpoints/damaged-checkpoint-2-1/a", None])
def test_only_the_beginning_of_a_run_is_taken_back(tmp_path: Path, kept: str | None) -> None:
    folder = RunFolder(tmp_path / "run")
    for name in ("started.json", "checkpoints/.writing/checkpoint-2/adapter", kept or "metrics.jsonl"):
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text("x" if kept else "")
    before = contents(folder.path)
    folder.release()
    assert folder.path.exists() == bool(kept)
    assert not kept or contents(folder.path) == before


def test_a_run_that_logged_a_step_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.started.write_text("{}")
    folder.metrics.write_text("{}\n")
    folder.release()
    assert folder.started.exists() and folder.metrics.exists()
