"""Train the stand-in with every kind of adapter and with several optimizers, and print the tables of docs/adapters.md.

python eval/adapters.py --json adapters.json

Every row trains on the same rows in the same order, one after the other in one process.
The rounds take turns, so that what else the machine does falls on all rows alike; figures are medians. What is kept for
the backward pass is counted in one micro-batch: tensors that autograd saves, each once, the base's weights left out.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from qlora_recipes.commands.entry import run_command
from qlora_recipes.commands.flags import Parser, count, file_to_write
from qlora_recipes.recipe import SHIPPED, load_recipe
from qlora_recipes.run.receipt import Receipt
from qlora_recipes.settings import Settings, resolve

_FLAGS = (
    count("rounds", "times that every row is trained (2)", 2),
    count("steps", "steps of each (40)", 40),
    file_to_write("json", "write the figures here", ".json"),
)
_Row = tuple[dict[str, Any], dict[str, Any]]
ADAPTERS: dict[str, _Row] = {
    "LoRA": ({}, {}),
    "rsLoRA": ({"use_rslora": True}, {}),
    "DoRA": ({"use_dora": True}, {}),
    "LoRA+, ratio 4": ({}, {"loraplus_lr_ratio": 4.0}),
    "PiSSA": ({"init_lora_weights": "pissa"}, {}),
    "PiSSA, fast (`pissa_niter_16`)": ({"init_lora_weights": "pissa_niter_16"}, {}),
    "OLoRA": ({"init_lora_weights": "olora"}, {}),
    "LoftQ": ({"init_lora_weights": "loftq"}, {}),
    "`rank_pattern`, 16 for `down_proj`": ({"rank_pattern": {"down_proj": 16}}, {}),
    "`embed_tokens` too": ({"target_modules": ".*(_proj|embed_tokens)"}, {}),
    "dropout 0.1": ({"lora_dropout": 0.1}, {}),
    "DoRA, dropout 0.1": ({"use_dora": True, "lora_dropout": 0.1}, {}),
    "NEFTune 5": ({}, {"neftune_noise_alpha": 5.0}),
}
OPTIMIZERS: dict[str, _Row] = {
    f"`{name}`": ({"r": 32}, {"optim": name})  # bitsandbytes keeps float32 of tensors below 4,096 elements
    for name in (
        "adamw_torch_fused",
        "adamw_torch",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "adafactor",
        "ademamix",
        "lion_32bit",
        "lion_8bit",
        "rmsprop",
        "sgd",
    )
}


def train_row(row: _Row, steps: int, folder: Path) -> Receipt:
    """Train the stand-in of Llama-2 in NF4 with a row's settings, and return its receipt."""
    from qlora_recipes.preflight import names
    from qlora_recipes.training.train import train

    settings = settings_of(row, folder, max_steps=steps)
    skip = names(settings.recipe)  # tests make them on each of these adapters
    return train(settings, overwrite=True, skip_checks=skip, console=Console(quiet=True)).receipt()


def settings_of(row: _Row, folder: Path, **training: Any) -> Settings:
    """Return the demo of a recipe with a row's settings."""
    recipe = load_recipe(SHIPPED / "llama2_guanaco.py")
    return resolve(recipe, demo=True, output_dir=folder, lora=row[0], training={**training, **row[1]})


def kept_bytes(row: _Row) -> int:
    """Return the bytes that one micro-batch keeps for its backward pass."""
    import torch

    from qlora_recipes.preflight import names
    from qlora_recipes.training.train import prepare_run

    settings = settings_of(row, Path("unused"))
    run, _ = prepare_run(settings, skip_checks=names(settings.recipe), console=Console(quiet=True))
    weights = {weight.untyped_storage().data_ptr() for weight in run.model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    run.model.train()
    batch = next(iter(run.trainer.get_train_dataloader()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run.trainer.compute_loss(run.model, batch)
    assert loss.requires_grad  # holds what was kept, so that no address is used twice
    return sum(found.values())


def measure(rows: Mapping[str, _Row], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Return row to its figures, medians over rounds that take turns."""
    kept = {name: kept_bytes(row) for name, row in rows.items()}
    receipts: dict[str, list[Receipt]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, row in rows.items():
                receipts[name].append(train_row(row, steps, Path(folder, "run")))
    return {
        name: {
            "loss": median(each.training.final_loss for each in made),
            "trained": made[0].adapter.parameters,
            "saved_bytes": made[0].adapter.bytes,
            "state_bytes": sum(made[0].training.optimizer_state.values()),
            "kept_bytes": kept[name],
            "seconds": median(each.training.seconds for each in made),
        }
        for name, made in receipts.items()
    }


def table(found: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Return the figures as a table in Markdown; the first row is what the others' speed is compared with."""
    plain = next(iter(found.values()))["seconds"]
    lines = [
        f"| {title} | loss | trained weights | file, KiB | optimizer, KiB | kept for backward, MiB | speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['loss']:.3f} | {row['trained']:,} | {row['saved_bytes'] / 1024:,.0f} | "
            f"{row['state_bytes'] / 1024:,.0f} | {row['kept_bytes'] / 2**20:,.1f} | {plain / row['seconds']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Read the flags, train, and print or write what was found."""
    about = "Train the stand-in with every kind of adapter and with several optimizers."
    flags = Parser("adapters.py", about, {"flags": _FLAGS}).parse(argv)
    found = {
        title: measure(rows, flags["rounds"], flags["steps"])
        for title, rows in {"adapter": ADAPTERS, "optimizer": OPTIMIZERS}.items()
    }
    print("\n\n".join(table(rows, title) for title, rows in found.items()))
    if flags["json"]:
        Path(flags["json"]).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
