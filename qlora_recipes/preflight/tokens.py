"""The tokenizer fits the rows and the model: no unknown tokens, padding that no row contains, ids in range.

Changes nothing of the run.
"""

from __future__ import annotations

import numpy

from qlora_recipes.preflight.checks import fail_unless, passed, warn_unless
from qlora_recipes.preflight.rows import count_and_first
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run


def padding_token(run: Run) -> Check:
    """A padding token inside a row would be mistaken for padding, and its answer would lose a token."""
    token = run.tokenizer.pad_token
    count, first = count_and_first(run.data.train, run.data.figures["padding"])
    return fail_unless(
        not count and run.tokenizer.pad_token_id not in (run.tokenizer.eos_token_id, run.encoder.end_id),
        f"{token} occurs in {count} rows, {first} first" if count else f"{token} occurs in no row and ends none",
        "Set ModelSpec.pad_token to a token that no text contains.",
    )


def unknown_tokens(run: Run) -> Check:
    """All characters that the tokenizer has no token for become the same token."""
    unknown = run.tokenizer.unk_token_id
    if unknown is None or unknown in (run.tokenizer.eos_token_id, run.encoder.end_id):
        return passed("the vocabulary covers every byte")
    count = int(run.data.figures["unknown"].sum())
    return warn_unless(
        count <= 0.001 * run.data.receipt.tokens,
        f"{count:,} of {run.data.receipt.tokens:,} tokens",
        f"The model sees {run.tokenizer.unk_token} in their place; remove these rows, or use another model.",
    )


def embedding_covers_ids(run: Run) -> Check:
    """An id beyond the embedding crashes on a CPU and reads garbage on some GPUs."""
    rows = run.model.get_input_embeddings().weight.shape[0]
    data = run.data
    largest = int(numpy.concatenate([data.figures["largest_id"], data.held_out_figures["largest_id"]]).max())
    return fail_unless(
        max(largest, run.tokenizer.pad_token_id) < rows,
        f"largest id {largest:,}, {rows:,} rows",
        "This tokenizer belongs to another model; load both from the same folder.",
    )


def context_length(run: Run) -> Check:
    """Positions beyond those of pretraining raise no error and mean nothing to the model."""
    positions = getattr(run.model.config, "max_position_embeddings", None)
    longest = run.settings.training["max_length"]
    return warn_unless(
        positions is None or longest <= positions,
        f"max_length {longest:,}" + (f", pretrained on {positions:,}" if positions else ""),
        "Lower --max_length to what the model was pretrained on.",
    )


def generation_stops(run: Run) -> Check:
    """The model's generation_config.json stops at the token that ends answers in training, as generation here does."""
    stops, end = run.model.generation_config.eos_token_id, run.encoder.end_id
    stops = stops if isinstance(stops, list) else [stops]
    return warn_unless(
        end in stops,
        f"generation_config.json stops at {stops}, training ends answers with {end}",
        "Chat, evaluation and `merge` stop at both; elsewhere give it as a stop token, or answers will not stop.",
    )
