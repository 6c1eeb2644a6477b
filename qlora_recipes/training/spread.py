"""How a run was spread over processes: the section `spread` of the receipt. Changes nothing of the run."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch.distributed.fsdp._fully_shard._fsdp_state import _get_module_fsdp_state
from transformers import Trainer

from qlora_recipes import environment
from qlora_recipes.run.receipt import SpreadReceipt

_DTYPES = ("param_dtype", "reduce_dtype", "output_dtype")


def describe_spread(trainer: Trainer, peak_bytes: int) -> SpreadReceipt:
    """Return how a run is spread over processes, and the peak of each; all processes must call this together."""
    accelerator, processes = trainer.accelerator, trainer.accelerator.num_processes
    divided = _get_module_fsdp_state(cast(torch.nn.Module, trainer.model))
    dtypes = {"autocast": str(accelerator.mixed_precision)}
    wrapper, sharding = "none" if processes == 1 else "DDP", "none"
    if divided is not None:
        wrapper, sharding = "FSDP2", "FULL_SHARD"
        policy = {name: getattr(divided._mp_policy, name) for name in _DTYPES}
        dtypes |= {name: str(dtype).removeprefix("torch.") for name, dtype in policy.items() if dtype}
    peak = torch.tensor([peak_bytes], device=trainer.args.device)
    return SpreadReceipt(
        processes=processes,
        nodes=math.ceil(processes / environment.local_processes()),
        wrapper=wrapper,
        sharding=sharding,
        dtypes=dtypes,
        peak_bytes=accelerator.gather(peak).tolist(),
    )
