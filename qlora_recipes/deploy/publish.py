"""Publish a run on the hub in one commit: adapter, tokenizer, template, card, receipt, loss curve and report.

Held-out rows, answers to them, secrets and folders of this machine are never in it. Loads no model.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub import errors as hub

from qlora_recipes.comparison.findings import Report
from qlora_recipes.errors import CheckError, RunFolderError, UsageError
from qlora_recipes.masking import masked
from qlora_recipes.report.card import model_card
from qlora_recipes.report.page import read_report, write_report
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.run.weights import adapter_file_sha256

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FOLDERS = re.compile(r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?(?:[\\/][\w. +@-]+)+[\\/](?=[\w.+@-])")
"""The folders before a name, in a path from the root of a disk; not those of a URL."""
_HELD_OUT = "held_out"  # what the names of the tasks on held-out rows begin with
_CONNECTION = cast("type[Exception]", hub.HfHubHTTPError.__bases__[0])  # of the client that the hub's library uses


def publish(folder: RunFolder, repository: str, *, base: str | None = None, private: bool = False) -> str:
    """Upload a run in one commit and return the address of the commit.

    `base` is the hub id of the base where the run was trained on a folder. The report beside the run is published too.

    Raises:
        RunFolderError: when the run is not finished, or a file of it is missing.
        CheckError: when a check failed, or the adapter is not the one of the receipt.
        UsageError: when the base is a folder and no id is given, or the hub refuses.
    """
    files = published_files(folder, base=base)
    api, title = HfApi(), f"{folder.path.parent.name}/{folder.path.name}"
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return api.create_commit(repository, operations, commit_message=f"Add {title}").commit_url
    except hub.HFValidationError as error:
        raise UsageError(f"{repository!r} is no name of a repository: expected OWNER/NAME ({error})") from error
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        fix = "run: hf auth login, with a token that may write" if status in (401, 403, 404) else "try later"
        raise UsageError(f"the hub refuses {repository} ({status}: {_first_line(error)}); {fix}") from error
    except (_CONNECTION, OSError) as error:
        raise UsageError(f"the hub cannot be reached ({_first_line(error)}); nothing was published") from error


def published_files(folder: RunFolder, *, base: str | None = None) -> dict[str, bytes]:
    """Return path in the repository to content of everything that `publish` uploads; raises as it does."""
    receipt = folder.receipt()
    _refuse_unproven(folder, receipt)
    model = base or receipt.base.model
    if base is None and (Path(model).exists() or receipt.demo):
        raise UsageError(
            f"{folder.path} was trained on {model}, which others cannot load by that name. Give --base and the hub id "
            "of the same weights"
        )
    report = _report_on(folder, receipt)
    revision = receipt.base.revision if model == receipt.base.model else None  # a commit of another repository
    shown = replace(receipt, base=replace(receipt.base, model=model, revision=revision))
    verdicts = [contrast.sentence for contrast in report.contrasts] if report else []
    files = {file.name: file.read_bytes() for file in sorted(folder.adapter.iterdir()) if file.is_file()}
    if missing := {_CONFIG, _WEIGHTS} - set(files):
        raise RunFolderError(f"{folder.adapter} has no {missing.pop()}; train again, or restore it from a copy")
    config = json.loads(files[_CONFIG])
    files[_CONFIG] = _as_json(config | {"base_model_name_or_path": model, "revision": shown.base.revision})
    files["README.md"] = model_card(shown, verdicts).encode()
    files["run.json"] = _as_json(asdict(shown))
    if folder.loss_plot.is_file():
        files[folder.loss_plot.name] = folder.loss_plot.read_bytes()
    if report:
        files |= _report_files(report)
    return {name: _cleaned(name, content) for name, content in files.items()}


def _refuse_unproven(folder: RunFolder, receipt: Receipt) -> None:
    failed = [check.name for check in receipt.checks if check.verdict == "fail"]
    if failed:
        raise CheckError(f"{folder.path}: {failed[0]} failed, and what failed is not published. Train again")
    found, expected = adapter_file_sha256(folder.adapter / _WEIGHTS), receipt.adapter.final_sha256
    if found != expected:
        raise CheckError(
            f"{folder.adapter / _WEIGHTS} is not the adapter that was trained: its hash is {found[:12]}, the receipt "
            f"has {expected[:12]}. Train again, or restore it from a copy"
        )


def _report_on(folder: RunFolder, receipt: Receipt) -> Report | None:
    """Return the report beside a run, where it is about this run and others."""
    report = read_report(folder.path.parent / "report")
    if report is None or report.limit is not None or report.recipe != receipt.recipe:
        return None
    arms = [arm.precision for arm in report.arms]
    return report if receipt.precision in arms and receipt.seed in report.seeds else None


def _report_files(report: Report) -> dict[str, bytes]:
    """Return the files of a report without the answers to held-out rows, which are rows."""
    contrasts = [
        replace(one, changed=[answer for answer in one.changed if not answer.task.startswith(_HELD_OUT)])
        for one in report.contrasts
    ]
    with tempfile.TemporaryDirectory() as scratch:
        write_report(replace(report, contrasts=contrasts), Path(scratch))
        found = sorted(file for file in Path(scratch).rglob("*") if file.is_file())
        return {f"report/{file.relative_to(scratch).as_posix()}": file.read_bytes() for file in found}


def _cleaned(name: str, content: bytes) -> bytes:
    """Return a file without secrets and without the folders of this machine; weights and pictures as they are."""
    if name.endswith(".json") and not name.startswith("tokenizer"):
        return _as_json(json.loads(content))
    if name == "tokenizer_config.json":
        return _as_json({key: _without_folders(value) for key, value in json.loads(content).items()})
    if name.endswith(".md"):
        return str(masked(_without_folders(content.decode()))).encode()
    return content


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(masked(_without_folders(content)), indent=2) + "\n").encode()


def _without_folders(value: Any) -> Any:
    """Return a value with the name alone of every absolute path in its text."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(part) for part in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
