"""The dimensions of the model that a run loads, and the weights counted from them. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from qlora_recipes.errors import UnreadableModelError
from qlora_recipes.families import sizes_from
from qlora_recipes.families.configuration import read_config
from qlora_recipes.families.family import Sizes
from qlora_recipes.settings import Settings, model_location


def sizes_for(settings: Settings) -> Sizes:
    """Return the dimensions of the model that a run loads, from its `config.json`.

    A recipe declares those of its own model, which can be planned before anything is fetched and without a network.

    Raises:
        UnreadableModelError: for a model other than the recipe's whose `config.json` cannot be fetched or read.
        ModelError: when it is no decoder of text that can be tuned.
    """
    location = model_location(settings.model)
    try:
        config = read_config(location, settings.revision)
        return sizes_from(config, location, settings.revision, trust_remote_code=settings.trust_remote_code)
    except UnreadableModelError:
        if settings.spec.sizes and settings.model == settings.spec.hub_id:
            return settings.spec.sizes
        raise


def sizes_of(folder: Path) -> Sizes:
    """Return the dimensions of a model in a folder, from its `config.json`; raises as `sizes_from` does."""
    return sizes_from(read_config(str(folder)), str(folder))


def linear_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Return name to (inputs, outputs) of the linear layers; where blocks differ, of the last kind."""
    return {each.name: (each.inputs, each.outputs) for each in sizes.linears}


def parameter_count(sizes: Sizes) -> int:
    """Return the number of weights of the base; an embedding that is also the output layer counts once."""
    return linear_parameters(sizes) + unquantized_parameters(sizes)


def linear_parameters(sizes: Sizes) -> int:
    """Return the number of weights that 4 bits can hold: those of linear layers, and of experts."""
    return sum(each.count * each.numel for each in sizes.weights)


def unquantized_parameters(sizes: Sizes) -> int:
    """Return the number of all other weights: embedding, output layer, norms and what else was counted."""
    if sizes.counted:
        return sizes.counted.other_parameters
    embeddings = sizes.vocab_size * (1 if sizes.tied_embeddings else 2)
    norms = sizes.family.norms * sizes.num_hidden_layers + 1
    return (embeddings + norms * sizes.family.norm.weights) * sizes.hidden_size


def described(sizes: Sizes) -> dict[str, str]:
    """Return what was found of a model, in words: what it is to the plan, and to the receipt."""
    counted, weights = sizes.counted, parameter_count(sizes)
    heads = f"{sizes.num_attention_heads} of {sizes.head_size}, {sizes.num_key_value_heads} for keys and values"
    experts = f"{counted.num_experts}, {counted.experts_per_token} a token" if counted and counted.num_experts else ""
    windowed = counted.windowed_layers if counted else sizes.num_hidden_layers
    window = f"{sizes.sliding_window:,} tokens in {windowed} layers" if sizes.sliding_window else ""
    rows = {
        "architecture": f"{sizes.family.model_types[0]}, {sizes.num_hidden_layers} layers of {sizes.hidden_size:,}",
        "heads": heads if sizes.num_attention_heads else "none: no layer attends",
        "experts": experts,
        "window": window,
        "output layer": f"{'tied to' if sizes.tied_embeddings else 'beside'} an embedding of {sizes.vocab_size:,} rows",
        "linears": ", ".join(sizes.linear_layers),
        "weights": f"{weights:,}, of which {linear_parameters(sizes) / weights:.1%} can be 4-bit",
    }
    return {name: text for name, text in rows.items() if text}


def adapter_parameters(sizes: Sizes, rank: int, targets: Collection[str], experts: Collection[str] = ()) -> int:
    """Return the number of LoRA weights: A is rank x inputs, B outputs x rank (arXiv 2106.09685), for each expert."""
    targeted = [each for each in sizes.weights if each.name in (experts if each.experts else targets)]
    return sum(each.count * max(each.experts, 1) * rank * (each.inputs + each.outputs) for each in targeted)
