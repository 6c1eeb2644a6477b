"""The tokenizer fits the rows: nothing unknown, and padding that no row holds."""

from __future__ import annotations

from itertools import chain

from qlora_recipes.preflight.checks import fail_unless, passed, warn_unless
from qlora_recipes.preflight.samples import count_and_first
from qlora_recipes.run.receipt import Check
from qlora_recipes.stages import Run


def padding_token(run: Run) -> Check:
    """A padding token inside a row would be taken for padding, and its answer would lose a token."""
    pad = run.tokenizer.pad_token_id
    holding, first = count_and_first(row.place for row in run.data.train if pad in row.encoded.input_ids)
    return fail_unless(
        not holding and pad != run.tokenizer.eos_token_id,
        f"{run.tokenizer.pad_token} stands in {holding} rows, {first} first"
        if holding
        else f"{run.tokenizer.pad_token} stands in no row, and ends none",
        "Set ModelSpec.pad_token to a token that no text holds.",
    )


def unknown_tokens(run: Run) -> Check:
    """Characters that the tokenizer has no token for come out as one and the same."""
    unknown = run.tokenizer.unk_token_id
    if unknown is None or unknown == run.tokenizer.eos_token_id:
        return passed("the vocabulary covers every byte")
    count = sum(row.encoded.input_ids.count(unknown) for row in run.data.train)
    return warn_unless(
        count <= 0.001 * run.data.receipt.tokens,
        f"{count:,} of {run.data.receipt.tokens:,} tokens",
        f"The model sees {run.tokenizer.unk_token} in their place; take these rows out, or another model.",
    )


def embedding_covers_ids(run: Run) -> Check:
    """An id beyond the embedding is a crash on a CPU and garbage on some GPUs."""
    rows = run.model.get_input_embeddings().weight.shape[0]
    largest = max(max(row.encoded.input_ids) for row in chain(run.data.train, run.data.held_out))
    return fail_unless(
        max(largest, run.tokenizer.pad_token_id) < rows,
        f"largest id {largest:,}, {rows:,} rows",
        "This tokenizer belongs to another model; take both from one folder.",
    )


def context_length(run: Run) -> Check:
    """Positions beyond those of pretraining work without an error and mean nothing to the model."""
    positions = getattr(run.model.config, "max_position_embeddings", None)
    longest = run.settings.training["max_length"]
    return warn_unless(
        positions is None or longest <= positions,
        f"max_length {longest:,}, pretrained on {positions or 'any':,}" if positions else f"max_length {longest:,}",
        "Lower --max_length to what the model was pretrained on.",
    )


def generation_stops(run: Run) -> Check:
    """The token that training ends answers with is the one that generation stops at."""
    stops = run.model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    end = run.tokenizer.eos_token_id
    return warn_unless(
        end in stops,
        f"generation stops at {stops}, training ends answers with {end}",
        "Set eos_token_id in the model's generation_config.json, or answers run on.",
    )
