"""`qlora-recipes serve RUN`: answer OpenAI's API on this machine with a merged run, by `transformers serve`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qlora_recipes.commands.flags import RUN, Parser
from qlora_recipes.errors import UsageError
from qlora_recipes.fields import Field
from qlora_recipes.run.folder import RunFolder

_ABOUT = """Serve a merged run (see qlora-recipes merge) on localhost with OpenAI's API, by `transformers serve`. \
Prompts are rendered with the run's chat template, and answers end where it was trained to. No other machine can reach \
it."""
_FLAGS = (
    Field("port", "int", "port of localhost", "PORT", 8000, lambda port: 0 < port < 2**16, "1 to 65535"),
    Field("others", "bool", "print what starts the run in vLLM, TGI and llama.cpp, and start nothing", default=False),
)
_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")


def main(argv: Sequence[str]) -> None:
    """Become the server; it ends with Ctrl-C.

    Raises:
        RecipesError: for a run that is not merged, or packages of the server that are missing.
    """
    flags = Parser("qlora-recipes serve", _ABOUT, {"flags": _FLAGS}, words=RUN).parse(argv)
    folder = RunFolder(Path(flags["run"]))
    folder.receipt()  # before torch, which takes seconds to import
    if flags["others"]:
        from qlora_recipes.deploy.servers import commands

        print("\n".join(f"{server}:\n  {command}" for server, command in commands(folder).items()))
        return
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{', '.join(missing)} not installed; run: pip install 'transformers[serving]'")
    from qlora_recipes.deploy.merging import merge_receipt  # torch, which --help can do without

    merge_receipt(folder)
    address = f"http://127.0.0.1:{flags['port']}/v1"
    print(f"{folder.merged} answers at {address} when it is loaded; its name there is {folder.merged}", flush=True)
    command = ["-m", "transformers.cli.transformers", "serve", str(folder.merged), "--host", "127.0.0.1"]
    command += ["--port", str(flags["port"])]
    os.execve(sys.executable, [sys.executable, *command], {**os.environ, "HF_HUB_OFFLINE": "1"})  # it is all here
