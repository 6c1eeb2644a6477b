"""Train the stand-in with every kind of adapter and with several optimizers, and print the tables of docs/adapters.md.

python eval/adapters.py --json adapters.json

Every row trains on the same rows in the same order, one after the other in one process. Speed is in processor time; the
rounds take turns, and figures are medians. The loss is the mean of the last tenth of the steps. What is kept for the
backward pass is counted in one micro-batch: tensors that autograd saves, each once, the model's weights left out.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_recipes.commands.entry import run_command
from qlora_recipes.commands.flags import Parser, count, file_to_write
from qlora_recipes.recipe import SHIPPED, load_recipe
from qlora_recipes.settings import resolve

if TYPE_CHECKING:
    from qlora_recipes.stages import Run

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


def measure(rows: Mapping[str, _Row], rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Return row to its figures, medians over rounds that take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, row in rows.items():
                found[name].append(train_row(row, steps, Path(folder)))
    return {name: {figure: median(each[figure] for each in made) for figure in made[0]} for name, made in found.items()}


def train_row(row: _Row, steps: int, folder: Path) -> dict[str, float]:
    """Train the stand-in of Llama-2 in NF4 with a row's settings, and return its figures."""
    from qlora_recipes.base.adapters import adapter_tensors
    from qlora_recipes.preflight import names
    from qlora_recipes.training.accounting import optimizer_state
    from qlora_recipes.training.train import prepare_run

    recipe = load_recipe(SHIPPED / "llama2_guanaco.py")
    training = {"max_steps": steps, **row[1]}
    settings = resolve(recipe, demo=True, output_dir=folder, lora=row[0], training=training)
    run, _ = prepare_run(settings, skip_checks=names(recipe), console=Console(quiet=True))
    kept, began = kept_bytes(run), time.process_time()
    run.trainer.train()
    seconds = time.process_time() - began
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    return {
        "loss": mean(losses[-max(1, len(losses) // 10) :]),
        "weights": sum(tensor.numel() for _, tensor in adapter_tensors(run.model)),
        "state_bytes": sum(optimizer_state(run.trainer.optimizer).values()),
        "kept_bytes": kept,
        "seconds": seconds,
    }


def kept_bytes(run: Run) -> int:
    """Return the bytes that one micro-batch keeps for its backward pass."""
    import torch

    weights = {weight.untyped_storage().data_ptr() for weight in run.model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    run.model.train()
    with torch.random.fork_rng():
        batch = next(iter(run.trainer.get_train_dataloader()))
        saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with run.trainer.compute_loss_context_manager(), saved:
            loss = run.trainer.compute_loss(run.model, batch)
    assert loss.requires_grad  # holds what was kept until here, so that no address is used twice
    return sum(found.values())


def table(found: Mapping[str, Mapping[str, float]], title: str) -> str:
    """Return the figures as a table in Markdown; the first row is what the others' speed is compared with."""
    plain = next(iter(found.values()))["seconds"]
    lines = [f"| {title} | loss | weights | optimizer, KiB | kept, MiB | speed |", "|---|---|---|---|---|---|"]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['loss']:.3f} | {row['weights']:,.0f} | {row['state_bytes'] / 1024:,.0f} | "
            f"{row['kept_bytes'] / 2**20:,.1f} | {plain / row['seconds']:.2f} |"
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
