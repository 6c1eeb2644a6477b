"""Recipes as a user runs them without `--demo`: through the real hub code, against a hub on localhost."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import pyarrow
import pyarrow.parquet
import pytest
from hub import Hub, Repository

from qlora_recipes.models import FALCON_7B, LLAMA_2_7B_CHAT
from qlora_recipes.standins import ROWS

ROOT = Path(__file__).parent.parent
GUANACO, OPENASSISTANT = "mlabonne/guanaco-llama2-1k", "timdettmers/openassistant-guanaco"
LLAMA = ("models", LLAMA_2_7B_CHAT.hub_id)
ROWS_OF = ("datasets", GUANACO)
MMLU = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
SHORT = ("--max_steps 2 --max_length 128 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --r 4").split()


@dataclass
class User:
    """Somebody at a command line, with the hub and an empty folder."""

    hub: Hub
    folder: Path
    process: subprocess.Popen[str]

    def run(self, *words: str) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def train(self, recipe: str, output: str, *flags: str) -> dict[str, Any]:
        run = str(self.folder / output)
        return self.run(str(ROOT / "recipes" / f"{recipe}.py"), "--output_dir", run, *SHORT, *flags)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS[name].read_text(encoding="utf-8").splitlines()[:60]]


def questions(number: int) -> list[tuple[str, list[str], int]]:
    return [
        (f"How many are {n} and {n % 7}?", [str(n + n % 7 + shift) for shift in range(4)], 0) for n in range(number)
    ]


def tasks() -> dict[tuple[str, str], Repository]:
    """Return documents under the ids that lm-eval's own tasks read, in their columns: 5 a subject of MMLU, 100 else."""
    arc = [
        {
            "id": str(n),
            "question": text,
            "choices": {"text": choices, "label": list("ABCD")},
            "answerKey": "ABCD"[right],
        }
        for n, (text, choices, right) in enumerate(questions(100))
    ]
    hellaswag = [
        {"ind": n, "activity_label": "Sums", "ctx_a": text, "ctx_b": "it is", "endings": choices, "label": str(right)}
        for n, (text, choices, right) in enumerate(questions(100))
    ]
    mmlu = [{"question": text, "choices": choices, "answer": right} for text, choices, right in questions(5)]
    subjects = sorted(file.stem.removeprefix("mmlu_") for file in MMLU.glob("mmlu_*.yaml"))
    assert len(subjects) == 57
    return {
        ("datasets", "allenai/ai2_arc"): configs({"ARC-Easy": arc}, "train validation test"),
        ("datasets", "Rowan/hellaswag"): configs({"default": hellaswag}, "train validation"),
        ("datasets", "cais/mmlu"): configs(dict.fromkeys(subjects, mmlu), "test dev"),
    }


def configs(rows: Mapping[str, list[dict[str, Any]]], splits: str) -> Repository:
    """Return a dataset with a folder for each configuration, as its README says."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits.split()]}
        for name in rows
    ]
    files = {"README.md": f"---\nconfigs: {json.dumps(listed)}\n---\n".encode()}
    for name, documents in rows.items():
        content = parquet(documents)
        files |= {f"{name}/{split}-00000-of-00001.parquet": content for split in splits.split()}
    return Repository(files)


@pytest.fixture(scope="module")
def user(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    folder = tmp_path_factory.mktemp("user")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    with Hub() as hub:
        for spec in (LLAMA_2_7B_CHAT, FALCON_7B):
            files = {path.name: path.read_bytes() for path in tiny(spec.family).iterdir()}
            hub.repositories["models", spec.hub_id] = Repository(files, commit=spec.revision)
        for name, rows in ((GUANACO, "guanaco_llama2"), (OPENASSISTANT, "openassistant_guanaco")):
            files = {"data/train-00000-of-00001.parquet": parquet(lines(rows))}
            hub.repositories["datasets", name] = Repository(files)
        hub.repositories.update(tasks())
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "hub_user.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=folder,
        ) as process:
            yield User(hub, folder, process)
            process.terminate()


def test_a_recipe_trains_from_the_hub_at_its_pinned_commits(user: User) -> None:
    done = user.train("llama2_guanaco", "first", "--save_steps", "1")
    assert done["code"] == 0, done["error"]
    receipt = json.loads((user.folder / "first" / "run.json").read_text())
    assert receipt["base"]["revision"] == LLAMA_2_7B_CHAT.revision
    assert receipt["base"]["quantized"]["expected"] == receipt["base"]["quantized"]["found"] == 14
    pinned = f"/{LLAMA_2_7B_CHAT.hub_id}/resolve/{LLAMA_2_7B_CHAT.revision}/"
    asked = [request for request in user.hub.requests if LLAMA_2_7B_CHAT.hub_id in request and "/resolve/" in request]
    assert asked and all(pinned in request for request in asked), [r for r in asked if pinned not in r]


def test_a_run_resumes_from_the_cache_when_the_hub_is_down(user: User) -> None:
    (user.folder / "first" / "run.json").unlink()
    with user.hub.down():
        done = user.train("llama2_guanaco", "first", "--save_steps", "1", "--resume")
    assert done["code"] == 0, done["error"]
    assert (user.folder / "first" / "run.json").exists()


@pytest.mark.parametrize("recipe", ["llama2_attention_only", "falcon_guanaco"])
def test_the_other_recipes_train_and_plan(user: User, recipe: str) -> None:
    planned = user.train(recipe, recipe, "--plan")
    assert planned["code"] == 0, planned["error"]
    assert not (user.folder / recipe).exists()
    done = user.train(recipe, recipe)
    assert done["code"] == 0, done["error"]


def test_falcon_faq_trains_on_a_file(user: User) -> None:
    (user.folder / "faq.json").write_text(ROWS["faq"].read_text())
    done = user.train("falcon_faq", "faq", "--dataset", str(user.folder / "faq.json"))
    assert done["code"] == 0, done["error"]


def test_lm_evals_own_tasks_are_scored(user: User) -> None:
    run, evaluation = str(user.folder / "first"), user.folder / "first" / "evaluation"
    done = user.run("qlora-recipes", "evaluate", run, "--tasks", "arc_easy", "hellaswag", "mmlu", "--batch_size", "64")
    assert done["code"] == 0, done["error"]
    for name, documents in (("arc_easy", 100), ("hellaswag", 100), ("mmlu", 57 * 5)):
        result = json.loads((evaluation / f"{name}.json").read_text())
        assert result["n_docs"] == documents and 0 <= result["metrics"][result["metric"]] <= 1


def test_scored_tasks_need_no_hub_again(user: User) -> None:
    run = str(user.folder / "first")
    with user.hub.down():
        done = user.run("qlora-recipes", "evaluate", run, "--tasks", "arc_easy", "--batch_size", "64", "--overwrite")
    assert done["code"] == 0, done["error"]


@pytest.mark.slow
def test_the_benchmark_runs_from_the_hub(user: User) -> None:
    output = str(user.folder / "benchmark")
    words = ["--precisions", "nf4", "bf16", "--seeds", "0", "--tasks", "arc_easy", "--output", output, *SHORT]
    done = user.run(str(ROOT / "eval" / "benchmark.py"), str(ROOT / "recipes" / "llama2_guanaco.py"), *words)
    assert done["code"] == 0, done["error"] + done["out"]
    assert (user.folder / "benchmark" / "report" / "index.html").exists()


def model(**changed: object) -> Callable[[Hub], None]:
    return lambda hub: vars(hub.repositories[LLAMA]).update(changed)


def without(file: str) -> Callable[[Hub], None]:
    return lambda hub: vars(hub.repositories[LLAMA])["files"].pop(file)


FAULTS: dict[str, tuple[Callable[[Hub], object], str]] = {
    "gated, no token": (model(gated=401), "it is gated. Accept its terms on the hub, then run: hf auth login"),
    "gated, no access": (model(gated=403), "it is gated. Accept its terms on the hub, then run: hf auth login"),
    "rows gated": (lambda hub: setattr(hub.repositories[ROWS_OF], "gated", 403), f"{GUANACO}.* gated"),
    "model gone": (lambda hub: hub.repositories.pop(LLAMA), "not a valid model identifier"),
    "rows gone": (lambda hub: hub.repositories.pop(ROWS_OF), f"no dataset '{GUANACO}'.* doesn't exist on the Hub"),
    "no weights": (without("model.safetensors"), "does not appear to have a file named model.safetensors"),
    "no config": (without("config.json"), "Should have a `model_type` key in its config.json"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer.json"),
    "commit gone": (model(commit="f" * 40), f"{LLAMA_2_7B_CHAT.revision} is not a valid git identifier"),
    "broken off": (model(broken_after=10_000), "peer closed connection .*received 10000 bytes.* Run the same command"),
    "server error": (model(failures=[500] * 99), "the hub answers 500"),
    "too many requests": (model(failures=[429] * 99), "the hub answers 429"),
    "no answer": (lambda hub: setattr(hub, "silent", True), "the hub .* cannot be reached"),
    "no network, no cache": (
        lambda hub: hub.__exit__(),
        "the hub .* cannot be reached",
    ),
}


@pytest.fixture
def planted(request: pytest.FixtureRequest, user: User) -> Iterator[str]:
    """Plant a fault, with nothing in the cache, and return what is said of it."""
    plant, said = FAULTS[request.param]
    kept = copy.deepcopy(user.hub.repositories)
    user.run("forget")
    plant(user.hub)
    yield said
    user.hub.repositories, user.hub.silent = kept, False
    if request.param == "no network, no cache":
        user.hub.__enter__()


@pytest.mark.parametrize("planted", FAULTS, indirect=True)
def test_a_fault_of_the_hub_is_one_clear_error(user: User, planted: str) -> None:
    done = user.train("llama2_guanaco", "never")
    assert done["code"] == 2, done["error"]
    assert "Traceback" not in done["error"]
    assert re.search(planted, done["error"].split("error: ")[-1]), done["error"]
    assert not (user.folder / "never").exists()


def test_a_full_disk_ends_a_download_and_the_same_command_resumes_it(user: User) -> None:
    user.run("forget")
    user.run("limit", "100000")  # bytes of a file; the weights are larger
    full = user.train("llama2_guanaco", "full", "--plan")
    user.run("limit", "-1")
    assert full["code"] == 2, full["error"]
    assert re.search("File too large", full["error"]), full["error"]
    again = user.train("llama2_guanaco", "full", "--plan")
    assert again["code"] == 0, again["error"]


def test_a_renamed_model_and_a_few_server_errors_are_no_fault(user: User) -> None:
    user.run("forget")
    repository = user.hub.repositories[LLAMA]
    repository.failures = [500, 429, 503]
    user.hub.repositories["models", "NousResearch/renamed"] = repository
    user.hub.repositories[LLAMA] = Repository({}, moved_to="NousResearch/renamed")
    planned = user.train("llama2_guanaco", "renamed", "--plan")
    user.hub.repositories[LLAMA] = repository
    assert planned["code"] == 0, planned["error"]
    assert repository.failures == []
