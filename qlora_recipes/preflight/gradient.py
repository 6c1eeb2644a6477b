"""One batch forward and backward: what trains is the adapter, all of it, and an evaluation changes nothing."""

from __future__ import annotations

import math

import torch

from qlora_recipes.preflight.probes import forward, gradients, logits, probe_batch
from qlora_recipes.preflight.verdicts import fail_unless, passed, warn_unless
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import ReadyRun

_TRAINED = ("lora_", "modules_to_save", "trainable_tokens")  # PEFT's names for what an adapter trains
_NOISE = 1e-3  # GPUs add in another order each time; the defect looked for halves the gradient


def gradient(run: ReadyRun) -> Check:
    """Every adapter tensor has a finite gradient, and nothing else has one."""
    found = gradients(run, probe_batch(run))
    trained = {name: found[name] for name, weight in run.model.named_parameters() if weight.requires_grad}
    missing = [name for name, value in trained.items() if value is None]
    broken = [name for name, value in trained.items() if value is not None and not torch.isfinite(value).all()]
    outside = [
        name for name, value in found.items() if value is not None and not any(part in name for part in _TRAINED)
    ]
    # A stays without a gradient as long as B is zero; B has one at once
    idle = [name for name, value in trained.items() if "lora_B" in name and value is not None and not value.any()]
    faults = {"without": missing, "not finite": broken, "zero": idle, "outside the adapter": outside}
    figure = "; ".join(f"{len(names)} {fault}, {names[0]} first" for fault, names in faults.items() if names)
    return fail_unless(
        not figure,
        figure or f"{len(trained)} tensors, norm {_norm(trained):.3g}; none outside the adapter",
        "Leave modules that no token passes out of target_modules; if not finite, use --dtype bfloat16.",
    )


def _norm(found: dict[str, torch.Tensor | None]) -> float:
    return math.sqrt(sum(float(value.float().square().sum()) for value in found.values() if value is not None))


def gradient_after_evaluation(run: ReadyRun) -> Check:
    """An evaluation pass in between leaves the gradient as it was; on some CPUs it repacks 4-bit weights."""
    batch = probe_batch(run)
    before = gradients(run, batch)
    logits(run, batch)
    after = gradients(run, batch)
    pairs = [(before[name], after[name]) for name in before if before[name] is not None]
    lost = any(after is None for _, after in pairs)
    moved = _norm({str(i): first - second for i, (first, second) in enumerate(pairs) if second is not None})
    share = 1.0 if lost else moved / max(_norm(before), 1e-12)
    return fail_unless(
        share <= _NOISE,
        f"moved by {share:.2g} of its norm",
        "repairs.keep_4bit_gradients mends it for bitsandbytes' Linear4bit; until then train without evaluation.",
    )


def starting_loss(run: ReadyRun) -> Check:
    """A pretrained model is better than chance from the start; one with weights that did not load is not."""
    run.model.train()
    with torch.no_grad():
        loss = float(forward(run, probe_batch(run)).loss)
    chance = math.log(run.model.config.vocab_size)
    figure = f"{loss:.2f} nats a token on two rows, chance is {chance:.2f}"
    if not math.isfinite(loss):
        return fail_unless(False, figure, "Use --dtype bfloat16; float16 overflows beyond 65,504.")
    return warn_unless(loss < 0.9 * chance, figure, "Is this a pretrained model, and its own tokenizer?")


def adapter_starts_at_base(run: ReadyRun) -> Check:
    """Before the first step the adapter changes nothing, so that what is learned starts from the base."""
    if run.settings.lora.get("init_lora_weights", True) not in (True, "gaussian"):
        return passed("not by this init_lora_weights")
    batch = probe_batch(run)
    with_adapter = logits(run, batch)
    with run.model.disable_adapter():
        without = logits(run, batch)
    moved = float((with_adapter - without).abs().max())
    return fail_unless(moved == 0, f"logits moved by {moved:.2g}", "Take init_lora_weights out of the recipe.")
