"""Write constraints-hashes.txt: every pin of constraints.txt with the hashes of all its files, for pip to hold to.

`make hashes` runs it. An index has a file for each Python and platform, and all of them are allowed: the hashes are
those that the index itself gives (PyPI, or PIP_INDEX_URL and PIP_EXTRA_INDEX_URL), and nothing is downloaded. With
`--installed` it asks instead whether everything in this environment is in the file: pip does not check what no
constraint names.
"""

import html
import importlib.metadata
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from packaging.requirements import Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parent.parent
INDEXES = [
    os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple"),
    *os.environ.get("PIP_EXTRA_INDEX_URL", "").split(),
]
# What PyPI's torch 2.13.0 for Linux asks for, beside what constraints.txt has. Of cuda-bindings, cuda-pathfinder and
# nvidia-nvjitlink it takes a range, and this is the newest in it. A torch that asks for others makes pip refuse.
CUDA = """
cuda-bindings==13.5.0 cuda-pathfinder==1.9.0 cuda-toolkit==13.0.3.0 nvidia-cublas==13.1.1.3 nvidia-cuda-cupti==13.0.85
nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cudnn-cu13==9.20.0.48 nvidia-cufft==12.0.0.61
nvidia-cufile==1.15.1.6 nvidia-curand==10.4.0.35 nvidia-cusolver==12.0.4.66 nvidia-cusparse==12.6.3.3
nvidia-cusparselt-cu13==0.8.1 nvidia-nccl-cu13==2.29.7 nvidia-nvjitlink==13.5.37 nvidia-nvshmem-cu13==3.4.5
nvidia-nvtx==13.0.85 triton==3.7.1
""".split()
# PyPI has no CPU builds of torch. This is the one that the tests ran with, from PyTorch's CPU index; to have those for
# other machines too, name that index in PIP_EXTRA_INDEX_URL.
CPU_BUILDS = {"torch==2.13.0": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"}


def pins(text: str) -> list[Requirement]:
    """Return the requirements of a constraints file, with hashes or without."""
    lines = [line.removesuffix("\\").strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "--hash="))]


def hashes(pin: Requirement) -> Iterator[str]:
    """Yield the SHA-256 of every wheel and source archive of a pinned version; `2.13.0+cpu` is a build of 2.13.0."""
    (specifier,) = pin.specifier
    for index in INDEXES:
        for link in re.findall(r'href="([^"]+)"', page(f"{index.rstrip('/')}/{canonicalize_name(pin.name)}/")):
            url, _, digest = html.unescape(link).partition("#sha256=")
            version = version_of(unquote(url.rpartition("/")[2]))
            if digest and version and Version(version.public) == Version(specifier.version):
                yield digest


def page(url: str) -> str:
    """Return the text of a page, which is empty where an index does not have the package."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        raise


def version_of(file: str) -> Version | None:
    """Return the version that a file's name tells, or None for what pip does not install."""
    try:
        return parse_wheel_filename(file)[1] if file.endswith(".whl") else parse_sdist_filename(file)[1]
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return None


def write(file: Path) -> None:
    """Write the file, and leave it as it was when a hash is missing."""
    text = "# Made by `make hashes` from constraints.txt: what make install HASHES=1 holds pip to.\n"
    for pin in [*pins((ROOT / "constraints.txt").read_text()), *map(Requirement, CUDA)]:
        found = {*hashes(pin)}
        if not found:
            sys.exit(f"error: the index has no file of {pin}")
        if build := CPU_BUILDS.get(str(pin)):
            found.add(build)
            text += f"# {build[:12]}... is {pin}+cpu for CPython 3.11 on x86-64 Linux, from PyTorch's CPU index.\n"
        text += " \\\n    ".join([str(pin), *(f"--hash=sha256:{digest}" for digest in sorted(found))]) + "\n"
    file.write_text(text)


def check_installed(file: Path) -> None:
    """End with an error that names what is installed and has no hash."""
    hashed = {canonicalize_name(pin.name) for pin in pins(file.read_text())} | {"qlora-recipes"}
    installed = {canonicalize_name(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    if unknown := sorted(installed - hashed):
        sys.exit(f"error: installed without a hash: {', '.join(unknown)}. Pin it, and run make hashes")


if __name__ == "__main__":
    (check_installed if "--installed" in sys.argv else write)(ROOT / "constraints-hashes.txt")
