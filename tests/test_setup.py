"""The set-up: what setup.cfg asks for, what constraints.txt pins, and what the Makefile does with them."""

import ast
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "qlora_recipes"
PYTHONS = ["3.11", "3.12", "3.13"]
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"

# The first releases without the vulnerabilities that were known when the pins were chosen.
SAFE_FROM = {"torch": "2.10", "transformers": "5.3", "datasets": "5.2"}


@pytest.fixture(scope="module")
def setup_cfg() -> ConfigParser:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def applies(requirement: Requirement, python: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python})


def dependencies(config: ConfigParser, python: str, extras: bool = True) -> list[Requirement]:
    lines = lines_of(config["options"]["install_requires"])
    if extras:
        lines += [line for extra in config["options.extras_require"].values() for line in lines_of(extra)]
    return [requirement for requirement in map(Requirement, lines) if applies(requirement, python)]


def pins(python: str, file: str = "constraints.txt") -> dict[str, Version]:
    """Name to version of what a file pins for a Python; each name once, each with one version."""
    pinned = {}
    for requirement in map(Requirement, lines_of((ROOT / file).read_text())):
        if applies(requirement, python):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{requirement} is not a pin"
            name = canonicalize_name(requirement.name)
            assert name not in pinned, f"{name} is pinned twice for Python {python}"
            pinned[name] = Version(specifier.version)
    return pinned


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_inside_its_range(setup_cfg: ConfigParser, python: str) -> None:
    pinned = pins(python)
    for requirement in dependencies(setup_cfg, python):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name} for Python {python}"
        assert version in requirement.specifier, f"{requirement} leaves out the pinned {version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_range_has_two_ends_and_holds_no_known_vulnerability(setup_cfg: ConfigParser, python: str) -> None:
    for requirement in dependencies(setup_cfg, python):
        ends = {specifier.operator: Version(specifier.version) for specifier in requirement.specifier}
        assert set(ends) == {">=", "<"}, f"{requirement} is not a range"
        assert ends[">="] >= Version(SAFE_FROM.get(requirement.name, "0")), str(requirement)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_oldest_versions_are_the_lower_ends(setup_cfg: ConfigParser, python: str) -> None:
    oldest = pins(python, "constraints-oldest.txt")
    for requirement in dependencies(setup_cfg, python, extras=False):
        (lower,) = (specifier.version for specifier in requirement.specifier if specifier.operator == ">=")
        assert oldest[canonicalize_name(requirement.name)] == Version(lower), requirement


def test_the_pinned_versions_are_the_ones_installed(setup_cfg: ConfigParser) -> None:
    names = [canonicalize_name(requirement.name) for requirement in dependencies(setup_cfg, RUNNING, extras=False)]
    # `2.13.0+cpu` is a build of 2.13.0.
    installed = {name: Version(Version(importlib.metadata.version(name)).public) for name in names}
    ends = [pins(RUNNING, file) for file in ("constraints.txt", "constraints-oldest.txt")]
    assert installed in [{name: pinned[name] for name in names} for pinned in ends]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_has_hashes_of_the_same_version(python: str) -> None:
    hashed = {}
    for line in lines_of((ROOT / "constraints-hashes.txt").read_text().replace("\\\n", " ")):
        pin, *hashes = line.split()
        name, version = pin.split("==")
        assert hashes and all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", word) for word in hashes), pin
        hashed[canonicalize_name(name)] = Version(version)
    pinned = pins(python)
    assert {name: hashed.get(name) for name in pinned} == pinned, "run: make hashes"


@pytest.mark.parametrize("right", [True, False])
def test_pip_holds_to_the_hash_of_a_constraint(tmp_path: Path, right: bool) -> None:
    """What `make install HASHES=1` rests on; a pip that reads no hashes in constraints would check nothing."""
    wheel, constraints = tmp_path / "held-1.0-py3-none-any.whl", tmp_path / "constraints.txt"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("held-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: held\nVersion: 1.0\n")
        archive.writestr("held-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("held-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes() if right else b"another").hexdigest()
    constraints.write_text(f"held==1.0 \\\n    --hash=sha256:{digest}\n")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--find-links", str(tmp_path)]
    words = [*pip, "--constraint", str(constraints), "--no-require-hashes", "held"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == right, done.stderr
    assert ("DO NOT MATCH THE HASHES" in done.stderr) != right


def test_what_the_library_imports_is_declared(setup_cfg: ConfigParser) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in dependencies(setup_cfg, RUNNING)}
    homes = importlib.metadata.packages_distributions()
    missing = {}
    for path in LIBRARY.rglob("*.py"):
        for module in imported(path) - sys.stdlib_module_names - {LIBRARY.name}:
            if not declared & {canonicalize_name(home) for home in homes.get(module, [])}:
                missing.setdefault(module, []).append(path.relative_to(ROOT).as_posix())
    assert not missing, f"imported, and not in setup.cfg: {missing}"


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


def test_every_file_of_the_library_is_shipped(setup_cfg: ConfigParser) -> None:
    listed = {Path(ROOT, *name.split(".")) for name in lines_of(setup_cfg["options"]["packages"])}
    shipped = {path for path in LIBRARY.rglob("*.py") if path.parent in listed}
    for pattern in lines_of(setup_cfg["options.package_data"][LIBRARY.name]):
        shipped |= set(LIBRARY.glob(pattern))
    files = {path for path in LIBRARY.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    left_out = sorted(path.relative_to(ROOT).as_posix() for path in files - shipped)
    assert not left_out, f"no package and no pattern of setup.cfg's package_data holds {left_out}"


def test_the_version_has_one_value(setup_cfg: ConfigParser) -> None:
    import qlora_recipes

    version = setup_cfg["metadata"]["version"]
    assert getattr(qlora_recipes, "__version__", version) == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_is_installed(setup_cfg: ConfigParser) -> None:
    (script,) = lines_of(setup_cfg["options.entry_points"]["console_scripts"])
    name, target = script.split(" = ")
    (installed,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    assert installed.value == target
    assert callable(installed.load())


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    # Without the flags of the `make test` that may be running this.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("install", "--editable"),
        ("demo", "eval/benchmark.py recipes/llama2_guanaco.py --demo --precisions nf4 bf16"),
        ("lint", "ruff format --check"),
        ("test", "-m pytest"),
    ],
)
def test_each_target_installs_first(target: str, runs: str) -> None:
    planned = make("--dry-run", "--always-make", target)
    assert planned.returncode == 0, planned.stderr
    steps = ["-m venv .venv", f"torch=={pins(RUNNING)['torch']}", "--editable '.[test]'", runs]
    places = [planned.stdout.find(step) for step in steps]
    assert -1 not in places, planned.stdout
    assert places == sorted(places), planned.stdout


def test_the_oldest_versions_have_their_own_environment() -> None:
    planned = make("--dry-run", "--always-make", "test-oldest")
    assert planned.returncode == 0, planned.stderr
    steps = [
        "-m venv .venv-oldest",
        "--constraint constraints-oldest.txt --editable '.[test]'",
        ".venv-oldest/bin/python -m pytest",
    ]
    places = [planned.stdout.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), planned.stdout


def test_an_installation_by_hash_is_one_command() -> None:
    planned = make("--dry-run", "--always-make", "install", "HASHES=1")
    assert planned.returncode == 0, planned.stderr
    installations = [line for line in planned.stdout.replace("\\\n", " ").splitlines() if "pip" in line.split("'")[0]]
    steps = ["-m venv .venv", "--require-hashes", "--constraint constraints-hashes.txt", "hashes.py --installed"]
    places = [planned.stdout.find(step) for step in steps]
    assert -1 not in places and places == sorted(places), planned.stdout
    assert all(re.search("hashes|download", line) for line in installations), planned.stdout


@pytest.mark.parametrize(
    ("python", "complaint"),
    [
        ("old-python", "old-python is Python 3.9.18, and TRL 1.16 needs 3.11 or newer."),
        ("no-python", "There is no no-python here."),
    ],
)
def test_a_python_that_cannot_do_is_refused(tmp_path: Path, python: str, complaint: str) -> None:
    for name in ("Makefile", "setup.cfg", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    if python == "old-python":
        # Answers `--version`, and fails the check that is asked of it with `-c`.
        (tmp_path / python).write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.18\n')
        (tmp_path / python).chmod(0o755)
    refused = make(f"PYTHON=./{python}", "install", folder=tmp_path)
    assert refused.returncode == 2
    assert complaint.replace(python, f"./{python}") in refused.stderr
    assert not (tmp_path / ".venv").exists()


def test_continuous_integration_runs_what_people_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
