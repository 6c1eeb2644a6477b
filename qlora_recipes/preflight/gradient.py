"""One batch forward and backward: the adapter trains, all of it and alone, and no conversation sees another.

Changes nothing of the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import cast

import torch
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qlora_recipes.base.adapters import adapter_sha256
from qlora_recipes.base.starts import distance_from_checkpoint, takes_a_part
from qlora_recipes.data.encoding import Encoded
from qlora_recipes.preflight.checks import fail_unless, passed, untested, warn_unless
from qlora_recipes.preflight.probes import (
    NOISE,
    collate,
    forward,
    gradients,
    keeps_apart,
    logits,
    probe_batch,
    trainer_loss,
    without_outlier_columns,
)
from qlora_recipes.run.receipt import Check, StartReceipt
from qlora_recipes.stages import Run

_TRAINED = ("lora_", "modules_to_save", "trainable_tokens")  # PEFT's names for what an adapter trains
_AT_ONCE = re.compile("lora_B|lora_magnitude_vector")
_ROUNDING = 2**-7  # of the largest logit: two steps of bfloat16
_TOKENS = 300  # of each of two packed conversations: together more than those that attention tells apart by a mask


def gradient(run: Run) -> Check:
    """Every adapter tensor has a finite gradient, and nothing else has one."""
    found = gradients(run, probe_batch(run))
    trained = [name for name, weight in run.model.named_parameters() if weight.requires_grad]
    faults = {
        "without": [name for name in trained if name not in found],
        "not finite": [name for name, value in found.items() if not torch.isfinite(value).all()],
        # A stays without a gradient as long as B is zero; B and DoRA's magnitudes have one at once
        "zero": [name for name, value in found.items() if _AT_ONCE.search(name) and not value.any()],
        "not frozen": [name for name, value in found.items() if _frozen_half(run, name, value).any()],
        "outside the adapter": [name for name in found if not any(part in name for part in _TRAINED)],
    }
    figure = "; ".join(f"{len(names)} {fault}, {names[0]} first" for fault, names in faults.items() if names)
    return fail_unless(
        not figure,
        figure or f"{len(trained)} tensors, norm {_norm(found.values()):.3g}; none outside the adapter",
        "Leave modules that no token passes out of target_modules; if not finite, use --dtype bfloat16.",
    )


def _frozen_half(run: Run, name: str, gradient: torch.Tensor) -> torch.Tensor:
    """Return what must be zero of a gradient: that of the half that PiSSA and OLoRA freeze (base/starts.py)."""
    part = re.search("lora_[AB]", name) if takes_a_part(run.settings.lora.get("init_lora_weights")) else None
    return gradient.tensor_split(2, dim="AB".index(part[0][-1]))[1] if part else gradient[:0]


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.float().square().sum()) for tensor in tensors))


def gradient_after_evaluation(run: Run) -> Check:
    """An evaluation pass in between leaves the gradient as it was; on some CPUs it repacks 4-bit weights."""
    batch = probe_batch(run)
    before = gradients(run, batch)
    logits(run, batch)
    after = gradients(run, batch)
    lost = before.keys() - after.keys()
    share = 1.0 if lost else _norm(before[name] - after[name] for name in before) / max(_norm(before.values()), 1e-12)
    return fail_unless(
        share <= NOISE,
        f"moved by {share:.2g} of its norm",
        "repairs.keep_4bit_gradients fixes it for bitsandbytes' Linear4bit; until then train without evaluation.",
    )


def starting_loss(run: Run) -> Check:
    """A pretrained model is better than chance from the start; one with weights that did not load is not.

    The loss that trains, which the trainer computes without logits, is also the plain cross-entropy of the logits.
    """
    batch = probe_batch(run)
    with torch.no_grad():
        loss = float(trainer_loss(run, batch))
        torch.manual_seed(0)
        plain = forward(run, batch)
    chance = math.log(run.model.config.vocab_size)
    figure = f"{loss:.2f} nats a token on two rows, chance is {chance:.2f}"
    if not math.isfinite(loss):
        return fail_unless(False, figure, "Use --dtype bfloat16; float16 overflows beyond 65,504.")
    args = cast(SFTConfig, run.trainer.args)
    on_purpose = args.loss_type != "nll" or args.label_smoothing_factor or args.router_aux_loss_coef
    if not on_purpose and abs(loss - float(plain.loss)) > _ROUNDING * float(plain.logits.abs().max()):
        figure = f"{loss:.4f} nats a token by the trainer, {float(plain.loss):.4f} by the logits"
        return fail_unless(False, figure, "The loss that trains is another one: report this with the model's name.")
    return warn_unless(loss < 0.9 * chance, figure, "Is this a pretrained model, and its own tokenizer?")


def adapter_starts_at_base(run: Run) -> Check:
    """Before the first step the adapter changes nothing, so that what is learned starts from the base.

    PiSSA and OLoRA take away what they add, up to rounding; LoftQ starts nearer to the checkpoint than the base is.
    A run that starts from another one begins with its adapter, to the bit, and on its base.
    """
    if run.settings.start:
        return _starts_at_run(run, run.settings.start)
    start = run.settings.lora.get("init_lora_weights", True)
    if start == "loftq":
        stored, adapted = distance_from_checkpoint(run.model, run.base.revision)
        figure = f"{stored:.2%} of the weights' norm from the checkpoint, {adapted:.2%} with the adapter"
        return fail_unless(adapted < stored, figure, "Raise r, or take init_lora_weights out of the recipe.")
    if start not in (True, "gaussian") and not takes_a_part(start):
        return untested("this init_lora_weights starts elsewhere on purpose")
    batch = probe_batch(run)
    with_adapter = logits(run, batch)
    with run.model.disable_adapter():
        without = logits(run, batch)
    moved = float((with_adapter - without).abs().max())
    allowed = _ROUNDING * float(without.abs().max()) if takes_a_part(start) else 0.0
    return fail_unless(
        moved <= allowed, f"logits moved by {moved:.2g}", "Take init_lora_weights and use_dora out of the recipe."
    )


def _starts_at_run(run: Run, start: StartReceipt) -> Check:
    was, base, got = start.receipt, start.receipt.base, adapter_sha256(run.model)
    figure = f"the adapter of {start.run}, sha256 {got[:12]}"
    if got != was.adapter.final_sha256:
        return fail_unless(False, f"{figure}; it ended with {was.adapter.final_sha256[:12]}", "Train that run again.")
    if (was.precision, was.dtype) == (run.settings.precision.name, run.settings.dtype):
        return fail_unless(
            run.base.sha256 == base.sha256,
            f"{figure}, on its base, sha256 {run.base.sha256[:12]}; that was {base.sha256[:12]}",
            "The base has changed since, or was quantized on another kind of device: train both on one.",
        )
    return warn_unless(
        False,
        f"{figure}, trained on {was.precision} in {was.dtype}: it goes on with the weights of another rounding",
        f"Leave --precision and --dtype out to go on with {was.precision}, unless you compare the two.",
    )


def packing_leak(run: Run) -> Check:
    """Change one packed conversation, and watch the logits of the next.

    The mask is judged without LLM.int8's outlier columns: they are those of a whole batch, and couple its rows whatever
    the mask is. How much they do is told beside it.
    """
    if run.settings.of_preferences:
        return passed("not packed; one conversation a row")
    args = cast(SFTConfig, run.trainer.args)
    if not cast(SFTTrainer, run.trainer).padding_free:
        mixes = not run.settings.packing_asked and not keeps_apart(run.model)
        alone = "not packed, because this model would mix conversations of one row; one a row"
        return warn_unless(
            not args.packing,
            f"packing_strategy {args.packing_strategy} lays conversations end to end, without a mask between"
            if args.packing
            else alone
            if mixes
            else "not packed; one conversation a row",
            "Set --packing_strategy bfd, which keeps them apart.",
        )
    with without_outlier_columns(run.model) as int8:
        own, leak = _moved(run)
    repaired = ", after separate_packed" if "separate_packed" in run.repairs else ""
    figure = f"{leak:.2g} in the next conversation's logits, {own:.2g} in its own{repaired}"
    if not int8 or leak > NOISE * own:
        repair = "Repair the mask, which ignores position_ids, in base/repairs.py"
        return fail_unless(leak <= NOISE * own, figure, f"{repair}, or set --packing false --padding_free false.")
    _, coupled = _moved(run)
    return warn_unless(
        coupled <= NOISE * own,
        f"{figure}; {coupled:.2g} through the outlier columns of LLM.int8",
        "They are those of a whole batch: a score depends on the rows beside it. Compare arms at one batch size.",
    )


def _moved(run: Run) -> tuple[float, float]:
    """Return how far the logits of a packed conversation move when it is changed, and those of the next one."""
    first, second = (_repeated(run.data.train[i % len(run.data.train)].encoded.input_ids) for i in (0, 1))
    changed = [*first[:1], *reversed(first[1:])]  # words in another order: the same length, other keys and values
    plain, moved = (
        logits(run, collate(run, [Encoded(ids, ids) for ids in (part, second)]))[0] for part in (first, changed)
    )
    own, other = (float(part.abs().max()) for part in (plain - moved).tensor_split([len(first)]))
    return own, other


def _repeated(ids: list[int]) -> list[int]:
    return (ids * math.ceil(_TOKENS / len(ids)))[:_TOKENS]
