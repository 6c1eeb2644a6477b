"""A model's `config.json`: found in a folder or on the hub, and refused where what it describes cannot be tuned.

Imports no torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_recipes.environment import hub_answers
from qlora_recipes.errors import ModelError, UnreadableModelError

_EXPECTED = "Expected a folder with config.json and safetensors, or a hub id that can be reached (--model)"


def read_config(location: str, revision: str | None = None) -> dict[str, Any]:
    """Return the `config.json` of a folder or of a hub model.

    Raises:
        UnreadableModelError: when it is missing, damaged or cannot be fetched.
        ModelError: when it, or what is there in its place, is of something that cannot be tuned.
    """
    try:
        config = json.loads(_file(location, revision).read_text(encoding="utf-8"))
    except ModelError:
        raise
    except OSError as error:
        raise UnreadableModelError(f"cannot load {location}: no config.json: {error.strerror}. {_EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableModelError(f"cannot load {location}: broken config.json: {error}. {_EXPECTED}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UnreadableModelError(
            f"cannot load {location}: its config.json has no model_type, which names the architecture. Expected the "
            "file that save_pretrained writes"
        )
    _check_usable(config, location)
    return config


def _file(location: str, revision: str | None) -> Path:
    folder = Path(location)
    if folder.suffix.lower() == ".gguf" or (
        folder.is_dir() and not (folder / "config.json").exists() and any(folder.glob("*.gguf"))
    ):
        raise ModelError(
            f"cannot load {location}: gguf files are already quantized, for llama.cpp. Expected the model that they "
            "were made from, in safetensors (--model)"
        )
    if (adapter := folder / "adapter_config.json").is_file():
        raise _is_adapter(location, adapter)
    return folder / "config.json" if folder.exists() else _from_hub(location, revision)


@functools.cache  # the plan asks for it many times
def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repository, name, revision=revision))

    reason = "the hub cannot be reached, and the cache does not have it"
    try:
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(cached, str) or hub_answers():
            try:
                return fetch("config.json")
            except EntryNotFoundError:
                raise _is_adapter(repository, fetch("adapter_config.json")) from None
    except ModelError:
        raise
    except GatedRepoError:
        reason = "it is gated. Accept its terms on the hub, then run: hf auth login"
    except RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private; then run: hf auth login"
    except HFValidationError:
        reason = "there is no such folder, and no hub id has this form"
    except Exception as error:  # of the hub's library, or of its HTTP client
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    raise UnreadableModelError(f"cannot load {repository}: no config.json: {reason}. {_EXPECTED}")


def _is_adapter(location: str, file: Path) -> ModelError:
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return ModelError(
        f"cannot load {location}: it is an adapter of {base or 'another model'}, and no base. Give the base (--model), "
        "or merge the adapter into it first: qlora-recipes merge"
    )


def _check_usable(config: Mapping[str, Any], location: str) -> None:
    """Refuse what the fields alone show: weights in fewer bits, an encoder that has to be fed."""
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ModelError(
            f"cannot load {location}: its weights are already quantized ({method or 'quantization_config'}), and "
            "quantized again they would be another model. Expected a copy of it in 16 bits (--model)"
        )
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"cannot load {location}: {config['model_type']} is an encoder with a decoder. Expected a decoder alone, "
            "which answers by continuing a text"
        )
