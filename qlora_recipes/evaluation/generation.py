"""How answers are generated: the settings, checked and in words, and the one function that generates a batch.

Whatever a model's own generation_config.json says, an answer depends on these settings alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from qlora_recipes.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

_WHOLE = {"top_k": 0, "num_beams": 1, "max_new_tokens": 1, "seed": 0}
_SHOWN = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams", "max_new_tokens")


@dataclass(frozen=True)
class Generation:
    """How answers are generated. Equal settings give equal answers for the same batches on the same machine."""

    temperature: float = 0.0
    """Of the tokens that are drawn; 0 takes the likeliest and draws none."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this share of probability."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 does not limit them."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that are there already (arXiv 1909.05858); 1 leaves them."""
    max_new_tokens: int = 256
    """Where an answer is cut. More costs time on answers that never end."""
    num_beams: int = 1
    """Continuations kept beside each other; 1 searches no beams."""
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        check_generation(vars(self))

    def arguments(self) -> dict[str, Any]:
        """Return how ids are chosen, as transformers' `generate` takes it."""
        drawn: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.temperature == 0:  # greedy search would warn about a value for each
            drawn = dict.fromkeys(drawn)
        chosen = {"repetition_penalty": self.repetition_penalty, "num_beams": self.num_beams}
        return {"do_sample": self.temperature > 0, **drawn, **chosen}

    def __str__(self) -> str:
        """Say how answers are generated: all that is not at its default."""
        parts = ["greedy"]
        if self.temperature:
            parts = [f"temperature {self.temperature}, top_p {self.top_p}"]
            parts += [f"top_k {self.top_k}"] if self.top_k else []
            parts += [f"seed {self.seed}"]
        parts += [f"num_beams {self.num_beams}"] if self.num_beams > 1 else []
        parts += [f"repetition_penalty {self.repetition_penalty}"] if self.repetition_penalty != 1 else []
        parts += [f"max_new_tokens {self.max_new_tokens}"] if self.max_new_tokens != Generation.max_new_tokens else []
        return ", ".join(parts)


def check_generation(given: Mapping[str, Any]) -> None:
    """Refuse settings that cannot be, by name; what is None or absent is not set.

    Raises:
        UsageError: for the first of them, with what was expected.
    """
    named = {name: value for name, value in given.items() if value is not None}
    temperature = named.get("temperature", 0.0)
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature: got {temperature}, expected 0 or a number above")
    for name, least in _WHOLE.items():
        if name in named and (type(named[name]) is not int or named[name] < least):
            raise UsageError(f"{name}: got {named[name]!r}, expected a whole number from {least} up")
    top_p, top_k = named.get("top_p", 1.0), named.get("top_k", 0)
    if not 0 < top_p <= 1 or (top_p < 1 and not temperature):
        alone = ", expected 1" if 0 < top_p <= 1 else ", expected a share above 0, up to 1"
        raise UsageError(f"top_p: got {top_p} with temperature {given.get('temperature')}{alone}")
    if top_k and not temperature:
        raise UsageError(f"top_k: got {top_k} with temperature {given.get('temperature')}, expected 0")
    penalty = named.get("repetition_penalty", 1.0)
    if not 0 < penalty < math.inf:
        raise UsageError(f"repetition_penalty: got {penalty}, expected a number above 0; 1 changes nothing")


def own_defaults(model: PreTrainedModel | PeftModel) -> str:
    """Return what the model's generation_config.json sets, which answers here do not follow; empty for nothing."""
    own: Any = model.generation_config
    found = {name: value for name in _SHOWN if (value := getattr(own, name, None)) is not None}
    return ", ".join(f"{name} {value}" for name, value in found.items())


def context_length(model: Any) -> int | None:
    """Return how many tokens a model can attend to; None where its configuration does not say."""
    length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return length


def stopping_ids(model: PreTrainedModel | PeftModel, end: int) -> list[int]:
    """Return where answers stop: at `end`, the end of a turn, and at every eos of the model's generation_config.json.

    gpt-oss ends a call of a tool with another token than an answer, and a base model may fall back to its own eos.
    """
    own: Any = model.generation_config
    stops = own.eos_token_id
    return list(dict.fromkeys([end, *(stops if isinstance(stops, list) else [stops] if stops is not None else [])]))


def ended(model: PreTrainedModel | PeftModel, end: int, answer: Sequence[int]) -> bool:
    """Whether an answer of `generate` ended by itself; one that was cut at `max_new_tokens` did not."""
    return bool(answer) and answer[-1] in stopping_ids(model, end)


def generate(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    pad: int,
    settings: Generation | None = None,
    streamer: BaseStreamer | None = None,
    adapter_names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Continue prompts as one batch, and return the ids added to each.

    An answer ends with one of `stopping_ids(model, end)`, unless it is cut at `max_new_tokens`.
    `adapter_names` has PEFT's name of the adapter of each prompt; without it all go to the active one.
    """
    settings = settings or Generation()
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    stops = stopping_ids(model, end)
    mixed = {} if adapter_names is None else {"adapter_names": list(adapter_names)}
    generate_ids: Any = model.generate  # PEFT passes on the base's, untyped
    with own_settings_off(model), torch.no_grad():
        output = generate_ids(
            input_ids=ids,
            attention_mask=mask,
            **settings.arguments(),
            **mixed,
            use_cache=True,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=stops,
            pad_token_id=pad,
            streamer=streamer,
        )
    return [_until_first(stops, ids) for ids in output[:, width:].tolist()]


def _until_first(stops: Sequence[int], ids: list[int]) -> list[int]:
    """Return an answer without the padding behind it."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))]


@contextmanager
def seeded(settings: Generation, device: torch.device) -> Iterator[None]:
    """Draw from the settings' seed within the block, and leave the process's generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        yield


@contextmanager
def own_settings_off(model: Any) -> Iterator[None]:
    """Take away a model's own settings, from which transformers would take all that its arguments do not name.

    A mixture that returns its router's logits for a balancing loss cannot do so for a batch with padding and a cache.
    """
    holder = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, holder.generation_config = holder.generation_config, GenerationConfig()
    routes = getattr(holder.config, "output_router_logits", None)
    if routes:
        holder.config.output_router_logits = False
    try:
        yield
    finally:
        holder.generation_config = own
        if routes:
            holder.config.output_router_logits = routes
