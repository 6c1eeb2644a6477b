"""`qlora-recipes export RUN --type f16`: write a merged run, or its adapter alone, as GGUF for llama.cpp."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from qlora_recipes.commands.flags import RUN, Parser
from qlora_recipes.errors import UsageError
from qlora_recipes.fields import Field
from qlora_recipes.run.folder import RunFolder

_ABOUT = """Write a merged run (see qlora-recipes merge) as one GGUF file, with its tokenizer, chat template and stop \
token; read it again with another reader, and hold what that predicts against the run. FILE.json has the figures."""
_FLAGS = (
    Field("format", "Literal['gguf']", "the only one", "gguf", "gguf"),
    Field("type", "str", "of the matrices: f32, f16, bf16 or q8_0 (default: f16)", "TYPE", "f16"),
    Field("adapter", "bool", "the adapter alone, for llama.cpp's --lora", default=False),
    Field("output", "str", "file to write (default: RUN/TYPE.gguf, RUN/adapter-TYPE.gguf)", "FILE.gguf", None),
)


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Raises:
        RecipesError: for a run that is not merged, or a model that GGUF has no place for.
    """
    flags = Parser("qlora-recipes export", _ABOUT, {"flags": _FLAGS}, words=RUN).parse(argv)
    folder = RunFolder(Path(flags["run"]))
    folder.receipt()  # before torch, which takes seconds to import
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("gguf is not installed; run: pip install gguf")
    from qlora_recipes.deploy.export import export

    name = f"{'adapter-' * flags['adapter']}{flags['type']}.gguf"
    file = Path(flags["output"] or folder.path / name)
    made = export(folder, file, flags["type"], adapter_only=flags["adapter"])
    print(f"{file}: {made.bytes / 1e6:,.1f} MB, read again by {made.reader}")
    if made.texts:
        print(
            f"{made.texts_encoded_alike} of {made.texts} texts encoded alike, {made.same_prediction:.1%} of "
            f"predictions and {made.answers_alike} of {made.texts} answers the same; logits differ by at most "
            f"{made.largest_change:.4f} of their spread"
        )
    else:
        print(f"what it adds to a weight differs by at most {made.largest_change:.4f} of its spread")
