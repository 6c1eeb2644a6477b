"""The dimensions of the model that a run loads, and what can be counted from them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_recipes.errors import ModelError
from qlora_recipes.models import Sizes
from qlora_recipes.settings import Settings, model_location


def sizes_for(settings: Settings) -> Sizes:
    """Return the dimensions of the model that a run loads: its folder's where it is one, else the recipe's.

    Raises:
        ModelError: for a hub model other than the recipe's, whose `config.json` cannot be had.
    """
    location = model_location(settings.model)
    if Path(location).is_dir():
        return sizes_of(Path(location))
    if location == settings.spec.hub_id:
        return settings.spec.sizes
    return sizes_of(_downloaded_config(location, settings.revision).parent)


def _downloaded_config(hub_id: str, revision: str | None) -> Path:
    """Fetch a hub model's `config.json`, or find the one that was fetched before."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(hub_id, "config.json", revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"the dimensions of {hub_id} are not known: its config.json cannot be had "
            f"({str(error).splitlines()[0]}). Expected a hub id that can be reached, or a folder (--model)"
        ) from error


def sizes_of(folder: Path) -> Sizes:
    """Return the dimensions of a model in a folder, from its `config.json`.

    Raises:
        ModelError: when the file is missing, damaged, or of an architecture other than Llama's or Falcon's.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return _falcon_sizes(config) if config["model_type"] == "falcon" else _llama_sizes(config)
    except OSError as error:
        raise ModelError(f"no {file}: {error.strerror}. Expected a folder with config.json") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is no configuration of a Llama or a Falcon: {error!r}") from error


def _llama_sizes(config: Mapping[str, Any]) -> Sizes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if (config.get("head_dim") or hidden // heads) * heads != hidden:
        raise ValueError(f"its {heads} heads of {config['head_dim']} do not make up {hidden}")
    return Sizes(
        hidden_size=hidden,
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        gated_mlp=True,
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def _falcon_sizes(config: Mapping[str, Any]) -> Sizes:
    """Falcon's key/value heads follow from three flags; only its second generation reads `num_kv_heads`."""
    heads = config["num_attention_heads"]
    if config.get("new_decoder_architecture"):
        key_value_heads = config.get("num_kv_heads") or heads
    else:
        key_value_heads = 1 if config.get("multi_query", True) else heads
    return Sizes(
        hidden_size=config["hidden_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        vocab_size=config["vocab_size"],
        gated_mlp=False,
        tied_embeddings=config.get("tie_word_embeddings", True),
    )


def linear_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Return name to (inputs, outputs) of the linear layers of one decoder block."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    key_value = sizes.num_key_value_heads * hidden // sizes.num_attention_heads
    if sizes.gated_mlp:
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
    return {
        "query_key_value": (hidden, hidden + 2 * key_value),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (hidden, inner),
        "dense_4h_to_h": (inner, hidden),
    }


def parameter_count(sizes: Sizes) -> int:
    """Return the number of weights of the base; an embedding that is the output layer too counts once."""
    linears = sum(inputs * outputs for inputs, outputs in linear_shapes(sizes).values())
    return sizes.num_hidden_layers * linears + unquantized_parameters(sizes)


def unquantized_parameters(sizes: Sizes) -> int:
    """Embedding, output layer and norms: two RMS norms a Llama layer, a LayerNorm with bias a Falcon one."""
    embeddings = sizes.vocab_size * sizes.hidden_size * (1 if sizes.tied_embeddings else 2)
    norms = 2 * sizes.num_hidden_layers + (1 if sizes.gated_mlp else 2)
    return embeddings + norms * sizes.hidden_size


def adapter_parameters(sizes: Sizes, rank: int, targets: Iterable[str]) -> int:
    """Return the number of LoRA weights: A is rank x inputs, B outputs x rank (arXiv 2106.09685)."""
    shapes = linear_shapes(sizes)
    return sizes.num_hidden_layers * sum(rank * sum(shapes[target]) for target in targets)
