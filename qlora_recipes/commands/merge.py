"""`qlora-recipes merge RUN`: write the adapter into the 16-bit weights that lose the least, and say what is lost.

Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qlora_recipes.commands.flags import RUN, TRUST_REMOTE_CODE, Parser, file_to_read
from qlora_recipes.fields import Field
from qlora_recipes.run.folder import RunFolder

_ABOUT = """Merge the adapter into 16-bit weights. A 4-bit run is merged into the 16-bit base and into its dequantized \
4-bit weights, both are measured on held-out answers and on a text, and the better one is kept."""
_FLAGS = (
    Field("base", "Literal['16bit', 'dequantized']", "merge into these alone", "16bit|dequantized", None),
    file_to_read("text", "also measure on this text, a document a line (default: one that ships)"),
    Field("output", "str", "folder to write (default: RUN/merged)", "FOLDER", None),
    TRUST_REMOTE_CODE,
)


def main(argv: Sequence[str]) -> None:
    """Merge a run into a folder that `from_pretrained` loads, with `merge.json` beside the weights."""
    flags = Parser("qlora-recipes merge", _ABOUT, {"flags": _FLAGS}, words=RUN).parse(argv)
    folder = RunFolder(Path(flags["run"]))
    output = Path(flags["output"] or folder.merged)
    folder.receipt()  # before torch, which takes seconds to import
    from qlora_recipes.deploy.choice import WEIGHTS
    from qlora_recipes.deploy.merging import merge

    text = Path(flags["text"]) if flags["text"] else None
    made = merge(folder, output, base=flags["base"], text=text, trust_remote_code=flags["trust_remote_code"])
    for way, candidate in made.candidates.items():
        for kind, loss in candidate.loss.items():
            low, high = loss.interval_95
            print(
                f"{WEIGHTS[way]}, {kind}: {loss.a:.4f} bits per byte, {loss.b:.4f} as trained "
                f"({loss.difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, {loss.n} documents)"
            )
    merged = made.candidates[made.merged_into].seconds_per_token
    print(
        f"merged into {output}: {WEIGHTS[made.merged_into]}, {made.dtype}, because {made.because}.\n"
        f"What is lost: {made.verdict}.\n"
        f"A token takes {1000 * merged:.1f} ms merged, {1000 * made.unmerged_seconds_per_token:.1f} ms as trained "
        f"({made.trained_on} and adapter)."
    )
