"""The models a recipe can name: hub id, revision, chat template, pad rule, LoRA targets and sizes.

Names and numbers only; knows nothing about weights. What a spec leaves out is found from the checkpoint's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_recipes.chat_templates import FALCON_CHAT, LLAMA_2_CHAT, ChatTemplate
from qlora_recipes.errors import ModelError
from qlora_recipes.families import sizes_from
from qlora_recipes.families.configuration import read_config
from qlora_recipes.families.falcon import FALCON
from qlora_recipes.families.family import Sizes
from qlora_recipes.families.llama import LLAMA


@dataclass(frozen=True)
class ModelSpec:
    """One base model and everything a recipe must know about it; only the first field is needed.

    What is None is found: linear layers and sizes from `config.json`, pad token and chat template with the tokenizer.
    """

    hub_id: str
    """Repository on the hub, or a local folder."""
    revision: str | None = None
    """Commit to load, so that a run can be repeated after the repository has changed; None takes the newest."""
    family: str | None = None
    """Name of the stand-in that `--demo` puts in its place (None: `llama2`); the architecture is `sizes.family`."""
    chat_template: ChatTemplate | None = None
    pad_token: str | None = None
    """A token of the vocabulary that no conversation contains. Never the end-of-turn token, which some collators would
    then take for padding and leave out of the loss; never a new token, which resizes the embedding."""
    linear_layers: tuple[str, ...] | None = None
    """Names of every linear layer inside a decoder block, the default LoRA targets."""
    sizes: Sizes | None = None
    tokenizer: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments for the tokenizer, each with its reason next to it."""
    spaces_merge_last: bool = False
    """Whether the sentencepiece of pretraining joined runs of spaces after all other pieces (by scores of -1e9)."""

    @classmethod
    def from_pretrained(cls, hub_id: str, revision: str | None = None, *, trust_remote_code: bool = False) -> ModelSpec:
        """Return the spec of a model on the hub or in a folder, with what its `config.json` says.

        Raises:
            UnreadableModelError: when that cannot be had or read.
            ModelError: when the model cannot be tuned here, with the reason.
        """
        config = read_config(hub_id, revision)
        return cls(hub_id, revision).completed(config, hub_id, revision, trust_remote_code=trust_remote_code)

    def completed(
        self, config: Mapping[str, Any], location: str, revision: str | None = None, *, trust_remote_code: bool = False
    ) -> ModelSpec:
        """Return the spec with the linear layers and sizes of this `config.json` where it has none; raises as above."""
        if self.linear_layers is not None:
            return self
        sizes = sizes_from(config, location, revision, trust_remote_code=trust_remote_code)
        if not sizes.linear_layers:
            raise ModelError(f"cannot tune {location}: no linear layer was found in a block of {config['model_type']}")
        return replace(self, linear_layers=sizes.linear_layers, sizes=self.sizes or sizes)

    def is_copied_by(self, config: Mapping[str, Any]) -> bool:
        """Whether a `config.json` is of this model as far as it shows: same `model_type`, same number of tokens.

        True too where nothing is known of this model's own.
        """
        try:
            own = _identity(self.sizes or read_config(self.hub_id, self.revision))
        except ModelError:
            return True
        return own == _identity(config)


def _identity(of: Sizes | Mapping[str, Any]) -> tuple[str, int | None]:
    if isinstance(of, Sizes):
        return of.family.model_types[0], of.vocab_size
    return of["model_type"], of.get("vocab_size")


LLAMA_2_7B_CHAT = ModelSpec(
    hub_id="NousResearch/Llama-2-7b-chat-hf",  # the ungated copy; --model meta-llama/Llama-2-7b-chat-hf is Meta's
    revision="351844e75ed0bcbbe3f10671b3c808d2b83894ee",
    family="llama2",
    chat_template=LLAMA_2_CHAT,
    pad_token="<unk>",  # byte fallback leaves <unk> without a use
    linear_layers=LLAMA.linear_layers,
    sizes=Sizes(
        family=LLAMA,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        tied_embeddings=False,
    ),
    # Meta encodes each turn as "▁[", "INST"; without legacy=True Transformers 5 gives "[", "INST" after <s>,
    # ids the model never saw in training.
    tokenizer={"legacy": True},
    spaces_merge_last=True,
)

FALCON_7B = ModelSpec(
    hub_id="tiiuae/falcon-7b",
    revision="ec89142b67d748a1865ea4451372db8313ada0d8",
    family="falcon",
    chat_template=FALCON_CHAT,
    pad_token=">>SUFFIX<<",  # reserved in the vocabulary; <|endoftext|> ends the answers
    linear_layers=FALCON.linear_layers,
    sizes=Sizes(
        family=FALCON,
        hidden_size=4544,
        num_hidden_layers=32,
        num_attention_heads=71,
        num_key_value_heads=1,
        intermediate_size=18176,
        vocab_size=65024,
        tied_embeddings=True,
    ),
)

MODELS = {"LLAMA_2_7B_CHAT": LLAMA_2_7B_CHAT, "FALCON_7B": FALCON_7B}


def spec_named(source: str) -> ModelSpec:
    """Return the spec of ours with this hub id, or one that says nothing else, so that all of it is found."""
    return next((spec for spec in MODELS.values() if spec.hub_id == source), ModelSpec(source))
