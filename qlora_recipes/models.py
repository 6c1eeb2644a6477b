"""The models a recipe can name: hub id, revision, chat template, pad rule, LoRA targets and sizes.

Names and numbers only; knows nothing about weights, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_recipes.chat_templates import FALCON_CHAT, LLAMA_2_CHAT, ChatTemplate
from qlora_recipes.families.falcon import FALCON
from qlora_recipes.families.family import Sizes
from qlora_recipes.families.llama import LLAMA


@dataclass(frozen=True)
class ModelSpec:
    """One base model and everything a recipe must know about it."""

    hub_id: str
    """Repository on the hub, or a local folder."""
    revision: str
    """Commit to load, so that a run can be repeated after the repository has changed."""
    family: str
    """Name of the stand-in that `--demo` puts in its place; the architecture is `sizes.family`."""
    chat_template: ChatTemplate | None
    pad_token: str | None
    """A token of the vocabulary that no conversation contains. Never the end-of-turn token, which some collators would
    then take for padding and leave out of the loss; never a new token, which resizes the embedding."""
    linear_layers: tuple[str, ...]
    """Names of every linear layer inside a decoder block, the default LoRA targets."""
    sizes: Sizes
    tokenizer: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments for the tokenizer, each with its reason next to it."""
    spaces_merge_last: bool = False
    """Whether the sentencepiece of pretraining joined runs of spaces after all other pieces (by scores of -1e9)."""


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
