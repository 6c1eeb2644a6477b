"""The dimensions of the model that a run loads, and the weights counted from them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from qlora_recipes.environment import hub_answers
from qlora_recipes.errors import ModelError
from qlora_recipes.families import family_of
from qlora_recipes.families.family import Sizes
from qlora_recipes.settings import Settings, model_location


def sizes_for(settings: Settings) -> Sizes:
    """Return the dimensions of the model that a run loads, from its `config.json`.

    A recipe declares those of its own model, which can be planned before anything is fetched and without a network.

    Raises:
        ModelError: for a hub model other than the recipe's whose `config.json` cannot be fetched or read.
    """
    location, declared = model_location(settings.model), None
    if Path(location).is_dir():
        return sizes_of(Path(location))
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if location == settings.spec.hub_id:
        declared = settings.spec.sizes
        cached = try_to_load_from_cache(location, "config.json", revision=settings.revision)
        if not isinstance(cached, str) and not hub_answers():
            return declared
    try:
        return sizes_of(Path(hf_hub_download(location, "config.json", revision=settings.revision)).parent)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        if declared:
            return declared
        raise ModelError(
            f"the dimensions of {location} are unknown, because its config.json cannot be fetched "
            f"({str(error).splitlines()[0]}). Expected a hub id that can be reached, or a folder (--model)"
        ) from error


def sizes_of(folder: Path) -> Sizes:
    """Return the dimensions of a model in a folder, from its `config.json`.

    Raises:
        ModelError: when the file is missing, damaged, or of an unknown architecture.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return family_of(config["model_type"]).sizes_of(config)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    except OSError as error:
        raise ModelError(f"no {file}: {error.strerror}. Expected a folder with config.json") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"cannot read the dimensions of a model from {file}: {error!r}") from error


def linear_shapes(sizes: Sizes) -> dict[str, tuple[int, int]]:
    """Return name to (inputs, outputs) of the linear layers of one decoder block."""
    return {linear.name: linear.shape(sizes) for linear in sizes.family.linears}


def parameter_count(sizes: Sizes) -> int:
    """Return the number of weights of the base; an embedding that is also the output layer counts once."""
    return linear_parameters(sizes) + unquantized_parameters(sizes)


def linear_parameters(sizes: Sizes) -> int:
    """Return the number of weights in the linear layers of all decoder blocks."""
    return sizes.num_hidden_layers * sum(inputs * outputs for inputs, outputs in linear_shapes(sizes).values())


def unquantized_parameters(sizes: Sizes) -> int:
    """Return the number of weights in embedding, output layer and norms."""
    embeddings = sizes.vocab_size * (1 if sizes.tied_embeddings else 2)
    norms = sizes.family.norms * sizes.num_hidden_layers + 1
    return (embeddings + norms * sizes.family.norm.weights) * sizes.hidden_size


def adapter_parameters(sizes: Sizes, rank: int, targets: Iterable[str]) -> int:
    """Return the number of LoRA weights: A is rank x inputs, B outputs x rank (arXiv 2106.09685)."""
    shapes = linear_shapes(sizes)
    return sizes.num_hidden_layers * sum(rank * sum(shapes[target]) for target in targets)
