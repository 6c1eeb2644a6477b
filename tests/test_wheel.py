"""The wheel is the product: what is in it, and every code block of the README, word for word, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TICKETS = "subject,reply\n" + "".join(f"Ticket {i},Reply {i}.\n" for i in range(30))
QUICK = "--max_steps 2"
TRIAL = f"--demo {QUICK} --limit 2 --no_controls"

# What a block that is no list of commands is compared with.
WRITTEN = {
    '"""Llama-2-7b-chat-hf on tickets.csv."""': "the file that `new` writes",
    "class Mine(Recipe):": "the three lines of a recipe, which test_any_model.py trains",
    "Trained an adapter": "the summary that a demo prints",
    "warn     duplicates": "the table of checks that a demo prints",
    "recipes/          choices only": "the layout, which test_readme.py checks",
}
# Command of the README -> what runs in its place, where it needs a checkout, a 7B model, a network or minutes.
INSTEAD = {
    "pip install -c constraints.txt .": "",  # done by the fixture, from a wheel
    "qlora-recipes demo": f"qlora-recipes demo --jobs 1 {TRIAL.removeprefix('--demo ')}",
    "qlora-recipes benchmark llama2_guanaco --demo --precisions bf16 int8 nf4 nf4-single fp4": (
        "qlora-recipes benchmark --help"
    ),
    "qlora-recipes train llama2_guanaco --demo": f"qlora-recipes train llama2_guanaco --demo {QUICK}",
    "qlora-recipes train llama2_guanaco": "qlora-recipes train llama2_guanaco --help",
    "qlora-recipes train llama2_guanaco --precision bf16": "qlora-recipes plan llama2_guanaco --precision bf16",
    "qlora-recipes train llama2_guanaco --plan": "qlora-recipes train llama2_guanaco --plan --demo",
    "qlora-recipes train falcon_faq --dataset my_questions.json": "qlora-recipes plan falcon_faq --dataset faq.json",
    "accelerate launch tickets.py --demo --seed 1": f"accelerate launch tickets.py --demo --seed 1 {QUICK}",
    "accelerate launch -m qlora_recipes.cli train llama2_guanaco": (
        "python -m qlora_recipes.cli train llama2_guanaco --help"
    ),
    "qlora-recipes train tickets --demo": f"qlora-recipes train tickets --demo {QUICK}",
    "qlora-recipes train tickets --demo --precision bf16": (
        f"qlora-recipes train tickets --demo --precision bf16 {QUICK}"
    ),
    "qlora-recipes train tickets": "qlora-recipes train tickets --help",
    "qlora-recipes benchmark llama2_guanaco --precisions nf4 bf16 --seeds 0 1 2": (
        f"qlora-recipes benchmark llama2_guanaco --precisions nf4 bf16 --seeds 0 {TRIAL}"  # the demo's runs again
    ),
    "qlora-recipes train llama2_attention_only --demo --from_run runs/tickets-demo/nf4-seed0": (
        f"qlora-recipes train llama2_attention_only --demo --from_run runs/tickets-demo/nf4-seed0 {QUICK}"
    ),
    "qlora-recipes serve runs/tickets-demo/nf4-seed0": "qlora-recipes serve --help",
    "qlora-recipes push runs/tickets/nf4-seed0 OWNER/NAME": (
        "qlora-recipes push runs/tickets-demo/nf4-seed0 OWNER/NAME --base owner/base --dry_run"
    ),
    "qlora-recipes evaluate runs/tickets-demo/nf4-seed0 runs/tickets-demo/bf16-seed0": (
        "qlora-recipes evaluate runs/tickets-demo/nf4-seed0 runs/tickets-demo/bf16-seed0 --limit 2"
    ),
    # test_launch_files.py starts these.
    "accelerate launch --config_file recipes/launch/ddp.yaml --num_processes 8 recipes/llama2_guanaco.py": "",
    "accelerate launch --config_file recipes/launch/fsdp_qlora.yaml --num_processes 8 recipes/llama2_guanaco.py": "",
    "sbatch --nodes 2 --gpus-per-node 8 recipes/launch/slurm.sh recipes/llama2_guanaco.py": "",
    "qlora-recipes benchmark llama2_guanaco --precisions nf4 bf16 --seeds 0 1 2 --jobs 4": (
        "qlora-recipes benchmark --help"
    ),
    (
        "qlora-recipes benchmark llama2_guanaco --precisions nf4 bf16 --seeds 0 1 2 --jobs 16 "
        "--slurm partition=gpu time=240"
    ): "qlora-recipes benchmark --help",
    "accelerate launch --num_processes 4 -m qlora_recipes.cli evaluate runs/llama2_guanaco/nf4-seed0": (
        "qlora-recipes evaluate --help"
    ),
    "qlora-recipes throughput --rows guanaco_llama2.jsonl --tokenizer LLAMA2_FOLDER --max_length 1024": (
        "qlora-recipes throughput --help"
    ),
}


# Runs commands of ours one after another, since most of a short one's time goes to importing torch.
IN_TURN = """
import contextlib, io, json, shlex, sys
from qlora_recipes import cli
said = {}
for command in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main(shlex.split(command)[1:])
        except SystemExit as ended:
            if ended.code:
                sys.exit(f"{command} ended with {ended.code}")
    said[command] = out.getvalue()
print(json.dumps({"cli": cli.__file__, "said": said}))
"""


@dataclass(frozen=True)
class Installed:
    """A wheel in a folder of its own, which comes before whatever else is installed."""

    wheel: Path
    site: Path
    here: Path
    """An empty folder to stand in."""

    def run(self, *words: str, stdin: str = "") -> str:
        """Return what a program prints; it must end well."""
        path = os.pathsep.join([str(self.site / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=self.here, env=environment, input=stdin, capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel from a copy of the files, without what earlier builds left, and install it without a network."""
    source, site, here = (tmp_path_factory.mktemp(name) for name in ("source", "site", "here"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("qlora_recipes", "recipes", "eval", "tests", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(source), str(source)], check=True
    )
    (wheel,) = source.glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", str(site), str(wheel)], check=True)
    return Installed(wheel, site, here)


def test_the_wheel_holds_the_package_and_nothing_else(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    package = {path for name in names if (path := Path(name)).parts[0] == "qlora_recipes"}
    assert {Path(name).parts[0] for name in names} == {"qlora_recipes", "qlora_recipes-0.1.0.dist-info"}
    expected = {
        Path(path.relative_to(ROOT))
        for path in (ROOT / "qlora_recipes").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "recipes" / "launch").iterdir()]
    expected |= {Path("qlora_recipes") / path.relative_to(ROOT) for path in recipes}
    assert package == expected
    suffixes = {path.suffix for path in package}
    assert {".yaml", ".css", ".jinja", ".safetensors", ".jsonl"} <= suffixes


def blocks() -> list[list[str]]:
    """Return the lines of each indented block of the README."""
    found = re.findall(r"(?:^(?: {4}.*)?\n)+", README, re.MULTILINE)
    return [textwrap.dedent(text).strip("\n").splitlines() for text in found if text.strip()]


def commands() -> list[str]:
    """Return the commands of the README, without their comments."""
    lines = [line for block in blocks() if not any(block[0].startswith(start) for start in WRITTEN) for line in block]
    return [command for line in lines if (command := re.sub(r"\s+#.*", "", line))]


def block(start: str) -> list[str]:
    (found,) = [block for block in blocks() if block[0].startswith(start)]
    return found


def test_every_block_and_every_substitute_is_known() -> None:
    for start in WRITTEN:
        block(start)
    assert set(INSTEAD) <= set(commands())
    assert len(commands()) >= 15


def test_every_command_of_the_readme_runs_in_an_empty_folder(installed: Installed) -> None:
    (installed.here / "tickets.csv").write_text(TICKETS)
    (installed.here / "questions.txt").write_text("What does Ticket 1 say?\n")
    shutil.copy(ROOT / "qlora_recipes" / "standins" / "data" / "faq.json", installed.here)
    runs = {command: INSTEAD.get(command, command) for command in commands()}
    own = [run for run in runs.values() if run.startswith("qlora-recipes ")]
    found = json.loads(installed.run(sys.executable, "-c", IN_TURN, stdin=json.dumps(own)))
    assert Path(found["cli"]).is_relative_to(installed.site)
    for run in runs.values():
        if run and run not in own:
            installed.run(*shlex.split(run))
    said = {command: found["said"][run] for command, run in runs.items() if run in own}
    assert (installed.here / "tickets.py").read_text().splitlines() == block('"""Llama-2-7b-chat-hf')
    assert "runs/llama2_guanaco-demo/benchmark/report" in said["qlora-recipes demo"]
    assert said["qlora-recipes list"] == installed.run("qlora-recipes", "list")
    summary = said["qlora-recipes train llama2_guanaco --demo"]
    for start in re.findall(r"^[A-Z]\w+ \w+", "\n".join(block("Trained an adapter")), re.MULTILINE):
        assert start in summary, start
    for line in block("warn     duplicates"):
        assert re.search(rf"\b{line.split()[1]}\b", summary), line
