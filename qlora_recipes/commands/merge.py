"""`qlora-recipes merge RUN`: write the adapter into 16-bit weights, and measure what that changes.

Never into 4-bit weights: quantizing the sum again makes another model than the one that was trained.
Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_recipes.commands.flags import RUN, TRUST_REMOTE_CODE, Parser
from qlora_recipes.errors import RunFolderError
from qlora_recipes.evaluation.records import disk_faults
from qlora_recipes.fields import Field
from qlora_recipes.precision import PRECISIONS
from qlora_recipes.run.files import write_json
from qlora_recipes.run.folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from qlora_recipes.evaluation.loaded import BaseKey, RestoredRun

_FLAGS = (Field("output", "str", "folder to write (default: RUN/merged)", "FOLDER", None), TRUST_REMOTE_CODE)
_ADVICE = "Give --output a folder that can be made and written"
PROBES = 16
"""Held-out conversations whose log-likelihoods are compared before and after."""


def main(argv: Sequence[str]) -> None:
    """Merge a run into a folder that `from_pretrained` loads, with `merge.json` beside the weights."""
    about = "Write the adapter into 16-bit weights."
    flags = Parser("qlora-recipes merge", about, {"flags": _FLAGS}, words=RUN).parse(argv)
    folder = RunFolder(Path(flags["run"]))
    output = Path(flags["output"] or folder.merged)
    report = merge(folder, output, trust_remote_code=flags["trust_remote_code"])
    print(
        f"merged into {output}, {report['dtype']}. Mean |difference| of held-out log-likelihoods per token: "
        f"{report['merging']:.4f} by merging"
        + (f", {report['storage']:.4f} between {report['trained_on']} and 16 bits" if report["storage"] else "")
    )


def merge(folder: RunFolder, output: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Write the merged model and return what is in its `merge.json`.

    Raises:
        RunFolderError: when the output folder holds something already, or takes no files.
        UsageError: when the base brings code of its own and that is not allowed.
    """
    receipt = folder.receipt()
    from qlora_recipes.evaluation.loaded import BaseKey, check_remote_code, restore_base, restore_run  # torch

    check_remote_code(receipt, allowed=trust_remote_code)
    with disk_faults(output, _ADVICE):  # before the base is loaded, which takes minutes
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()):
            raise RunFolderError(f"{output} is not empty; give --output another folder")
    trained = BaseKey.of(receipt)
    wide = BaseKey.of(receipt, next(name for name, kind in PRECISIONS.items() if kind.dtype == receipt.dtype))
    as_trained = _log_likelihoods_of(folder, trained) if trained != wide else None
    with restore_run(folder, restore_base(wide), wide) as run:
        unmerged = _log_likelihoods(run, run.model)
        merged = run.model.merge_and_unload()
        after = _log_likelihoods(run, merged)
        with disk_faults(output, _ADVICE):
            merged.save_pretrained(output)
            run.tokenizer.save_pretrained(output)
    report = {
        "adapter_sha256": receipt.adapter.final_sha256,
        "base": receipt.base.model,
        "trained_on": receipt.precision,
        "dtype": receipt.dtype,
        "merging": _mean_difference(unmerged, after),
        "storage": _mean_difference(as_trained, unmerged) if as_trained else None,
    }
    write_json(output / "merge.json", report)
    return report


def _log_likelihoods_of(folder: RunFolder, key: BaseKey) -> list[float]:
    from qlora_recipes.evaluation.loaded import restore_base, restore_run

    with restore_run(folder, restore_base(key), key) as run:
        return _log_likelihoods(run, run.model)


def _log_likelihoods(run: RestoredRun, model: nn.Module) -> list[float]:
    """Return the log-likelihood in nats of every token of a few held-out conversations."""
    import torch

    values: list[float] = []
    for row in run.held_out[:PROBES]:
        ids = torch.tensor([run.encoder.encode(row.messages, row.tools).input_ids], device=run.model.device)
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
        values += scores.gather(1, ids[0, 1:, None]).squeeze(1).tolist()
    return values


def _mean_difference(a: Sequence[float], b: Sequence[float]) -> float:
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return sum(differences) / max(1, len(differences))
