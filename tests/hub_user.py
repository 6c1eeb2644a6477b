"""Runs command lines in one process, as a user would one after the other, with the hub at HF_ENDPOINT.

Reads one JSON list of words per line and answers each with one JSON line: exit code, standard output and error. Torch
is imported once, and the waits between two tries of a download are left out: with them a fault takes a minute.
"""

from __future__ import annotations

import io
import json
import resource
import runpy
import shutil
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path


def run(words: list[str]) -> dict[str, object]:
    """Run a program (or the installed `qlora-recipes`), `forget` what was downloaded, or `limit` files to bytes."""
    if words == ["forget"]:
        from datasets.config import HF_DATASETS_CACHE
        from huggingface_hub.constants import HF_HUB_CACHE

        for folder in (HF_HUB_CACHE, HF_DATASETS_CACHE):
            shutil.rmtree(folder, ignore_errors=True)
        return {}
    if words[0] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(words[1]), resource.RLIM_INFINITY))
        return {}
    out, error, code = io.StringIO(), io.StringIO(), 0
    sys.argv = words
    with redirect_stdout(out), redirect_stderr(error):
        try:
            if words[0] == "qlora-recipes":
                from qlora_recipes.cli import main

                main()
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else bool(exit.code)
        except BaseException:
            traceback.print_exc()
            code = 1
    return {"code": code, "out": out.getvalue(), "error": error.getvalue()}


if __name__ == "__main__":
    import torch

    from qlora_recipes import environment

    sys.path.insert(0, str(Path(__file__).parent.parent))
    torch.set_num_threads(1)  # two test processes share two cores
    environment.share_threads = lambda: None
    time.sleep = lambda seconds: None
    answers = sys.stdout
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)
