"""What was asked for at the launch is what the accelerator really holds."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from qlora_recipes.preflight.verdicts import fail_unless, warn_unless
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import ReadyRun

_LAUNCHERS = {
    *("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli"),
    *("launch.py", "accelerate_cli.py"),  # what `python -m` makes of the last two
}
_PRECISION = {"bfloat16": "bf16", "float16": "fp16"}


def processes(run: ReadyRun) -> Check:
    """`accelerate launch --cpu --num_processes 2` trains one process and says nothing."""
    got = run.trainer.accelerator.num_processes
    asked = _asked_processes()
    return fail_unless(
        asked in (None, got),
        f"{got}" if asked is None else f"{got} of {asked} asked for",
        "On GPUs launch with --multi_gpu; on CPUs with: torchrun --nproc_per_node N recipes/....py",
    )


def _asked_processes() -> int | None:
    """Return the number of processes asked for, by a launcher above this process or by its environment."""
    words = launch_words()
    if words is not None:
        return _of_accelerate(words)
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def launch_words() -> Sequence[str] | None:
    """Return the flags of the `accelerate launch` that this process runs under, or None."""
    import psutil

    for process in psutil.Process().parents():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        for i, word in enumerate(words[:4]):
            if Path(word).name in _LAUNCHERS:
                return [other for other in words[i + 1 :] if other != "launch"]
    return None


def _of_accelerate(words: Sequence[str]) -> int | None:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    flags = _flags(words)
    if flags.num_processes is not None:
        return flags.num_processes
    file = flags.config_file or (default_config_file if Path(default_config_file).is_file() else None)
    return load_config_from_file(file).num_processes if file else None


def _flags(words: Sequence[str]) -> argparse.Namespace:
    """Read a launcher's flags up to the script, with the launcher's own parser."""
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_args(list(words))


def wrapper(run: ReadyRun) -> Check:
    """FSDP that was asked for on a CPU becomes DDP without a word."""
    got = str(run.trainer.accelerator.distributed_type.value)
    asked = [
        name
        for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED"))
        if os.environ.get(variable, "false").lower() in ("true", "1")
    ]
    return fail_unless(
        not asked or got in asked,
        f"{got}, {asked[0]} was asked for" if asked and got not in asked else got.replace("NO", "none"),
        "Sharding needs GPUs here; leave the FSDP or DeepSpeed config out on a CPU.",
    )


def device(run: ReadyRun) -> Check:
    """A GPU that lies idle while a CPU trains is rarely meant."""
    got = run.trainer.args.device
    base = next(run.model.parameters()).device
    if base.type != got.type:
        return fail_unless(False, f"base on {base}, trainer on {got}", "Launch one process for each GPU.")
    name = torch.cuda.get_device_name(got) if got.type == "cuda" else f"{got.type}, threads: {torch.get_num_threads()}"
    return warn_unless(
        got.type == "cuda" or not torch.cuda.is_available(), name, "A GPU is there: leave --use_cpu and --cpu out."
    )


def mixed_precision(run: ReadyRun) -> Check:
    """The autocast of the accelerator is the run's dtype; ACCELERATE_MIXED_PRECISION can say otherwise."""
    got, expected = run.trainer.accelerator.mixed_precision, _PRECISION[run.settings.dtype]
    return fail_unless(
        got == expected,
        got if got == expected else f"{got}, expected {expected}",
        "Leave mixed_precision out of the launcher's flags and config; --dtype decides.",
    )
