"""Count what processes send each other in one step of LoRA on a base that FSDP2 divides, or that DDP copies.

    python eval/collectives.py

Two processes on this machine, joined by gloo, take two steps of a small Llama; the second is counted. Prints one line
for each way: how often each collective was called, and the bytes that it gathered or reduced. docs/scale.md says what
follows for large models. What NCCL does with the same calls on GPUs is not measured here.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

PROCESSES, TOKENS, RANK = 2, 256, 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WAYS = [("FSDP2", "bf16", 2), ("FSDP2", "nf4", 2), ("FSDP2", "nf4", 4), ("DDP", "nf4", 2)]
"""How the processes are joined, the precision of the base, and its layers."""


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called, and the bytes of the larger side of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = str(function).split(".")[1].strip("_")
            sides = [part if isinstance(part, list) else [part] for part in args[:2]]
            self.calls[name] += 1
            self.bytes[name] += max(sum(tensor.nbytes for tensor in side if torch.is_tensor(tensor)) for side in sides)
        return function(*args, **(kwargs or {}))


def make_base(folder: Path, layers: int) -> None:
    """Save a random Llama of a width of 256 in 16 bits."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=4, vocab_size=1536,
        tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def load(folder: Path, precision: str) -> PeftModel:
    """Return a base with an adapter; 4-bit weights are stored under the name of a 16-bit dtype, which FSDP2 divides."""
    stored = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=stored if precision == "nf4" else None
    )
    base.gradient_checkpointing_enable()
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    return cast(PeftModel, model.train())  # layers are checkpointed in training only


def divide(model: PeftModel) -> None:
    """Divide a model by layer, embedding and the rest, as runs are divided."""
    base: Any = model.get_base_model()
    for module in (*base.model.layers, base.get_input_embeddings(), model):
        fully_shard(module)


def held(model: torch.nn.Module) -> int:
    """Return the bytes of what this process holds of the weights."""
    return sum(getattr(weight, "_local_tensor", weight).nbytes for weight in model.parameters())


def measure(folder: Path, wrapper: str, precision: str) -> dict[str, Any]:
    """Return the collectives of one step, and the bytes held and allocated at its peak; in every process together."""
    model: Any = load(folder, precision)
    if wrapper == "FSDP2":
        divide(model)
    module = DistributedDataParallel(model) if wrapper == "DDP" else model
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(0, 1536, (1, TOKENS))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Collectives() as counted:
        step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return {"calls": counted.calls, "bytes": counted.bytes, "held": held(model), "peak": peak}


def _process(rank: int, port: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    for wrapper, precision, layers in WAYS:
        found = measure(Path(folder, str(layers)), wrapper, precision)
        if rank == 0:
            calls = ", ".join(f"{n} {name} of {found['bytes'][name]:,} bytes" for name, n in found["calls"].items())
            print(f"{wrapper} {precision}, {layers} layers: {calls}; {found['held']:,} bytes of weights held")
    distributed.destroy_process_group()


def main() -> None:
    """Count every way and print it."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for layers in {layers for *_, layers in WAYS}:
            make_base(Path(folder, str(layers)), layers)
        server.close()
        torch.multiprocessing.spawn(_process, (port, folder), nprocs=PROCESSES)


if __name__ == "__main__":
    sys.exit(main())
