"""Whatever stands in the place of a run folder or one of its files: one error on each command, and nothing changes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runs import answers, make_run, receipt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_damaged_files import MESSAGES, RECIPE

from qlora_recipes import cli
from qlora_recipes.base.adapters import adapter_sha256, attach
from qlora_recipes.base.loading import load_base
from qlora_recipes.base.tokenizer import load_tokenizer
from qlora_recipes.chat_templates import LLAMA_2_CHAT
from qlora_recipes.errors import RunFolderError, SetupError
from qlora_recipes.evaluation import harness, loaded
from qlora_recipes.evaluation.loaded import RestoredBase
from qlora_recipes.models import LLAMA_2_7B_CHAT
from qlora_recipes.precision import precision_named
from qlora_recipes.recipe import load_recipe
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.training import train as training

Damage = Callable[[Path], object]

COMMANDS: dict[str, Callable[[Path], object]] = {
    "compare": lambda run: cli.main(["compare", str(run), str(run)]),
    "evaluate": lambda run: cli.main(["evaluate", str(run), "--tasks", "held_out"]),
    "chat": lambda run: cli.main(["chat", str(run)]),
    "merge": lambda run: cli.main(["merge", str(run), "--output", str(run.parent / "merged")]),
    "train": lambda run: load_recipe(RECIPE).main(["--demo", "--output_dir", str(run)]),
    "resume": lambda run: load_recipe(RECIPE).main(["--demo", "--resume", "--output_dir", str(run)]),
    "overwrite": lambda run: load_recipe(RECIPE).main(["--demo", "--overwrite", "--output_dir", str(run)]),
}
READ = ("compare", "evaluate", "chat", "merge")
REACHED = "nothing stands in the way of a training"


@pytest.fixture(scope="module")
def base(tiny: Callable[[str], Path]) -> Any:
    device = torch.device("cpu")
    return load_base(str(tiny("llama2")), None, precision_named("bf16"), "bfloat16", device=device)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Any, tiny: Callable[[str], Path]) -> Path:
    """A run that can be chatted with, without a training: an adapter as it is before the first step, but for one."""
    folder = RunFolder(make_run(tmp_path_factory.mktemp("whole"), "bf16", scores=answers(40)))
    shutil.rmtree(folder.adapter)
    model = attach(base, {"r": 4, "target_modules": ["q_proj"]}, 0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(weight, 0.01)
    model.save_pretrained(str(folder.adapter))
    tokenizer = load_tokenizer(LLAMA_2_7B_CHAT, str(tiny("llama2")), None)
    tokenizer.chat_template = LLAMA_2_CHAT.source
    tokenizer.save_pretrained(str(folder.adapter))
    made = receipt("bf16", 0, adapter__final_sha256=adapter_sha256(model), template__sha256=LLAMA_2_CHAT.sha256)
    model.unload()
    folder.write_receipt(replace(made, template=replace(made.template, role_markers=LLAMA_2_CHAT.role_markers)))
    folder.held_out.write_text(json.dumps([{"place": "line 1", "messages": MESSAGES}]))
    folder.started.write_text(json.dumps({"started": "", "run": {"lora": {}, "training": {}}, "versions": {}}))
    (folder.checkpoints / "checkpoint-2").mkdir(parents=True)
    (folder.checkpoints / "checkpoint-2" / "manifest.json").write_text('{"files": {}}')
    return folder.path


@pytest.fixture
def run(whole: Path, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a copy of that run; a command that loads finds its base, and one that trains ends before it does."""

    def prepare_run(*args: object, **options: object) -> None:
        raise SetupError(REACHED)

    def hung(*_: object) -> None:
        raise AssertionError("it hangs")

    for module in (loaded, harness):
        monkeypatch.setattr(module, "restore_base", lambda key: RestoredBase(deepcopy(base), "base-bf16"))
    monkeypatch.setattr(training, "prepare_run", prepare_run)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(120)
    yield Path(shutil.copytree(whole, tmp_path / "run"))
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def picture(root: Path) -> dict[str, object]:
    """Return what is in a folder: kinds, sizes, targets of links, and hashes of contents."""

    def part(path: Path) -> object:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return str(path.readlink())
        if stat.S_ISREG(mode) and path.stat().st_size < 2**26:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        return stat.S_IFMT(mode), 0 if path.is_dir() else path.lstat().st_size

    return {str(path.relative_to(root)): part(path) for path in sorted(root.rglob("*"))}


def said(command: str, run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one error that a command ends with, after looking that nothing was changed."""
    before = picture(run.parent)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command](run)
    written = capsys.readouterr().err
    assert ended.value.code == 2 and written.count("error: ") == 1 and "Traceback" not in written, written
    after = picture(run.parent)
    if not any(run.parent.glob("merged/*")):  # made before a base is loaded, to see that it can be
        before.pop("merged", None), after.pop("merged", None)
    assert after == before
    return written.partition("error: ")[2]


def test_the_whole_run_is_no_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    COMMANDS["chat"](run)
    COMMANDS["merge"](run)
    assert "merged into" in capsys.readouterr().out
    assert REACHED in said("overwrite", run, capsys)


# ---- A file of the run ----


def replaced_by(make: Damage) -> Damage:
    def damage(file: Path) -> None:
        if file.is_dir():
            shutil.rmtree(file)
        file.unlink(missing_ok=True)
        make(file)

    return damage


def huge(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**40)


FILES: dict[str, Damage] = {
    "missing": replaced_by(lambda file: None),
    "a pipe": replaced_by(os.mkfifo),
    "a device": replaced_by(lambda file: file.symlink_to("/dev/zero")),
    "a terminal": replaced_by(lambda file: file.symlink_to("/dev/tty")),
    "a folder": replaced_by(Path.mkdir),
    "a link to itself": replaced_by(lambda file: file.symlink_to(file.name)),
    "a link to nothing": replaced_by(lambda file: file.symlink_to("nothing")),
    "a link to its folder": replaced_by(lambda file: file.symlink_to(".")),
    "a TiB of zeros": replaced_by(huge),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "other bytes": lambda file: file.write_bytes(bytes(range(256))),
    "nested": lambda file: file.write_text("[" * 100_000),
    "a list": lambda file: file.write_text("[]"),
    "an object": lambda file: file.write_text("{}"),
    "a long number": lambda file: file.write_text("9" * 10_000),
    "half a character": lambda file: file.write_text('{"recipe": "\\ud800"}'),
}
KINDS = list(FILES)[:9]
"""What can stand in the place of a folder too."""
MAY_BE: dict[str, set[str]] = {  # what is as good as the file: a run without held-out rows has none
    "held_out.json": {"missing", "a link to nothing", "a list"},
}
RECEIPT = [("run.json", kind, command) for kind in FILES for command in READ]
STARTED = [("started.json", kind, "resume") for kind in FILES]
HELD_OUT = [("held_out.json", kind, "chat") for kind in FILES]
ADAPTER = [
    (f"adapter/{name}", kind, "chat")
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja")
    for kind in FILES
] + [("adapter", kind, "chat") for kind in KINDS]


@pytest.mark.parametrize(("file", "kind", "command"), [*RECEIPT, *STARTED, *HELD_OUT, *ADAPTER])
def test_a_file_that_is_none(run: Path, capsys: pytest.CaptureFixture[str], file: str, kind: str, command: str) -> None:
    if file == "started.json":
        (run / "run.json").unlink()
    FILES[kind](run / file)
    if kind in MAY_BE.get(file, ()) and command == "chat":
        COMMANDS[command](run)
        return
    message = said(command, run, capsys)
    assert str(run) in message
    if file.startswith(("run", "held_out")):
        assert Path(file).name in message


@pytest.mark.parametrize(
    ("file", "kind"),
    [(file, kind) for file in ("run.json", "started.json", "metrics.jsonl") for kind in FILES]
    + [(file, kind) for file in ("checkpoints", "adapter") for kind in KINDS],
)
@pytest.mark.parametrize("command", ["train", "overwrite"])
def test_a_training_changes_nothing_before_it_begins(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, kind: str, command: str
) -> None:
    FILES[kind](run / file)
    assert (REACHED in said(command, run, capsys)) == (command == "overwrite")


# ---- The folder ----


def emptied_but(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


FOLDERS: dict[str, Damage] = {
    "missing": replaced_by(lambda path: None),
    "a file": replaced_by(lambda path: path.write_text("mine")),
    "a pipe": replaced_by(os.mkfifo),
    "a device": replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": replaced_by(lambda path: path.symlink_to(path.name)),
    "a link to nothing": replaced_by(lambda path: path.symlink_to("nothing")),
    "an empty folder": replaced_by(Path.mkdir),
    "an adapter": emptied_but("adapter"),
    "an evaluation": emptied_but("evaluation"),
    "checkpoints": emptied_but("checkpoints"),
    "a curve": emptied_but("metrics.jsonl"),
    "a beginning": emptied_but("started.json"),
    "a receipt": emptied_but("run.json"),
    "all but the receipt": lambda path: (path / "run.json").unlink(),
    "all but the adapter": lambda path: shutil.rmtree(path / "adapter"),
    "a file of mine": lambda path: (path / "thesis.txt").write_text("mine"),
}
FREE = {"missing", "an empty folder"}
A_RUN = {"a beginning", "a receipt", "all but the receipt", "all but the adapter"}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_none(run: Path, capsys: pytest.CaptureFixture[str], kind: str, command: str) -> None:
    FOLDERS[kind](run)
    if (kind, command) in {("a file of mine", "chat"), ("a file of mine", "merge"), ("a file of mine", "evaluate")}:
        COMMANDS["chat"](run)
        return
    message = said(command, run, capsys)
    if command in ("train", "overwrite"):
        assert (REACHED in message) == (kind in FREE or (command == "overwrite" and kind in A_RUN))
    if command == "resume":
        assert (REACHED in message) == (kind in FREE)


@pytest.mark.parametrize("name", ["n" * 300, "run/run.json/below", "a\nb/" + "d/" * 2000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_cannot_be(run: Path, capsys: pytest.CaptureFixture[str], name: str, command: str) -> None:
    before = picture(run.parent)
    with pytest.raises(SystemExit, match="2"):
        COMMANDS[command](run.parent / name)
    assert capsys.readouterr().err.count("error: ") == 1
    assert picture(run.parent) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_may_not_be_read(
    run: Path, capsys: pytest.CaptureFixture[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Path, *args: Any, plain: Callable[..., Any], **kwargs: Any) -> Any:
        if run in self.parents or (run == self and plain.__name__ != "stat"):
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:  # of the system, which refuses nothing to root
        for name in ("stat", "iterdir", "open", "mkdir"):
            plain = getattr(Path, name)
            patch.setattr(Path, name, lambda self, *a, plain=plain, **k: refused(self, *a, plain=plain, **k))
        with pytest.raises(SystemExit, match="2"):
            COMMANDS[command](run)
    written = capsys.readouterr().err
    assert written.count("error: ") == 1 and "Permission denied" in written and str(run) in written


# ---- What a stranger wrote ----


def test_role_markers_that_never_end_are_stopped(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_recipes.data import encoding

    monkeypatch.setattr(encoding, "_RENDER_SECONDS", 0.3)
    content = json.loads((run / "run.json").read_text())
    content["template"]["role_markers"] = "(a+)+$"
    (run / "run.json").write_text(json.dumps(content))
    messages = [{"role": "user", "content": "a" * 60 + "!"}, MESSAGES[1]]
    (run / "held_out.json").write_text(json.dumps([{"place": "line 1", "messages": messages}]))
    for command in ("chat", "merge", "evaluate"):
        assert "it ran for 0.3 seconds" in said(command, run, capsys)


def parts(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every part of a JSON value."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in inner:
        yield (*path, name)
        yield from parts(value, (*path, name))


WHOLE = json.loads(json.dumps(asdict(receipt("nf4", 0))))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**400, 10**401) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.sampled_from(list(parts(WHOLE))), VALUES, st.booleans()), min_size=1, max_size=3))
def test_any_edit_of_a_receipt_is_a_receipt_or_one_error(tmp_path: Path, edits: list[Any]) -> None:
    content = deepcopy(WHOLE)
    for (*path, last), value, removed in edits:
        section = content
        try:
            for name in path:
                section = section[name]
            if removed:
                del section[last]
            else:
                section[last] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier edit took it away
    text = json.dumps(content)
    (tmp_path / "run.json").write_text(text)
    try:
        read = RunFolder(tmp_path).receipt()
    except RunFolderError as error:
        assert "run.json" in str(error) and len(str(error)) < 1000
    else:
        RunFolder(tmp_path).write_receipt(read)
        assert RunFolder(tmp_path).receipt() == read


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), bytes_=st.binary(max_size=4), cut=st.integers(0, 3))
def test_any_bytes_in_a_receipt_are_a_receipt_or_one_error(tmp_path: Path, at: int, bytes_: bytes, cut: int) -> None:
    content = json.dumps(WHOLE).encode()
    at %= len(content)
    (tmp_path / "run.json").write_bytes(content[:at] + bytes_ + content[at + cut :])
    try:
        RunFolder(tmp_path).receipt()
    except RunFolderError as error:
        assert "run.json" in str(error)
