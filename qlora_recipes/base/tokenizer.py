"""The tokenizer of a base, with the template that is trained, a token to pad with, and proof that it fits the model.

Knows nothing of rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from qlora_recipes.base import repairs
from qlora_recipes.base.loading import from_hub
from qlora_recipes.chat_templates import ChatTemplate
from qlora_recipes.data.encoding import ConversationEncoder
from qlora_recipes.data.templates import choose_template, turn_pieces
from qlora_recipes.errors import ModelError, TemplateError
from qlora_recipes.models import ModelSpec

# What reserved tokens of vocabularies are called, the likeliest for padding first; those of pictures and sounds last.
_RESERVED = (
    re.compile(r"^[<\[|]*(?!.*(?:image|video|audio|vision)).*pad", re.IGNORECASE),
    re.compile(r"reserved|unused|placeholder|control_\d|dummy|extra_id", re.IGNORECASE),
    re.compile(r"pad", re.IGNORECASE),
)
_EVERY_BYTE = ("<0x00>", "<0xFF>")  # a vocabulary with these has a token for every byte, and none is unknown


def load_tokenizer(
    spec: ModelSpec, model: str, revision: str | None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the base's tokenizer with the chosen template, which is its `template`, and a pad token.

    Raises:
        ModelError: when it cannot be loaded, or is that of another model.
        TemplateError: when no template can be used, or no token can pad.
    """
    own = dict(spec.tokenizer, trust_remote_code=trust_remote_code)
    tokenizer: Any = from_hub(AutoTokenizer.from_pretrained, model, revision, **own)
    if len(tokenizer.get_vocab()) <= len(tokenizer.added_tokens_decoder):
        raise ModelError(f"{model} has no tokenizer.json or tokenizer.model, expected one beside its config.json")
    tokenizer, repaired = _repaired(spec, tokenizer, model, revision, own)
    tokenizer.repairs = repaired  # for the receipt
    if tokenizer.eos_token_id is None:
        raise TemplateError(f"the tokenizer of {model} names no eos_token, expected one in its tokenizer_config.json")
    rows = _embedding_rows(tokenizer, model, revision, trust_remote_code)
    template = choose_template(spec, tokenizer)
    tokenizer.chat_template, tokenizer.template = template.source, template
    tokenizer.pad_token = _pad_token(spec, tokenizer, template, model, rows)
    tokenizer.padding_side = "right"
    return cast("PreTrainedTokenizerBase", tokenizer)


def _repaired(
    spec: ModelSpec, tokenizer: Any, model: str, revision: str | None, own: dict[str, Any]
) -> tuple[Any, list[str]]:
    """Return the tokenizer with its upstream defects repaired, and the names of the repairs."""
    rebuilt = tokenizer.is_fast and type(tokenizer) is not PreTrainedTokenizerFast
    if rebuilt and not spec.tokenizer and _has_file(model, revision):  # a spec that says how to load it knows better
        load = partial(_load, model=model, revision=revision, **own)
        if (plain := repairs.read_tokenizer_file(tokenizer, load)) is not None:
            return plain, ["read_tokenizer_file"]
    # What is not in init_kwargs is not saved, and a reload gives other ids; LlamaTokenizer drops its `legacy`.
    legacy = {"legacy": tokenizer.legacy} if hasattr(tokenizer, "legacy") else {}
    tokenizer.init_kwargs.update({**legacy, **spec.tokenizer})
    merged_last = spec.spaces_merge_last and repairs.merge_spaces_last(tokenizer)
    return tokenizer, ["merge_spaces_last"] if merged_last else []


def _load(cls: Any, *, model: str, revision: str | None, **own: Any) -> PreTrainedTokenizerBase:
    return cast("PreTrainedTokenizerBase", from_hub(cls.from_pretrained, model, revision, **own))


def _has_file(model: str, revision: str | None) -> bool:
    try:
        return from_hub(cached_file, model, revision, filename="tokenizer.json") is not None
    except ModelError:
        return False


def _embedding_rows(tokenizer: Any, model: str, revision: str | None, trust_remote_code: bool) -> int:
    """Return how many tokens the model knows, and refuse a tokenizer that is not the model's."""
    try:
        config = from_hub(AutoConfig.from_pretrained, model, revision, trust_remote_code=trust_remote_code)
    except ModelError:  # `load_base` says why
        return len(tokenizer)
    text = config.get_text_config()
    rows, end = getattr(text, "vocab_size", len(tokenizer)), text.eos_token_id
    advice = "This tokenizer belongs to another model; load both from the same folder"
    if tokenizer.vocab_size > rows:  # tokens that were added later may have no row, as Gemma's for pictures
        raise ModelError(
            f"{model}: the tokenizer has {tokenizer.vocab_size:,} tokens, the embedding {rows:,}. {advice}"
        )
    ends = [token for token in (end if isinstance(end, list) else [end]) if token is not None]
    if ends and min(ends) >= len(tokenizer):
        raise ModelError(
            f"{model}: eos_token_id of its config.json is {min(ends):,}, and the tokenizer has {len(tokenizer):,} "
            f"tokens. {advice}"
        )
    return int(rows)


def _pad_token(spec: ModelSpec, tokenizer: Any, template: ChatTemplate, model: str, rows: int) -> str:
    """Return the token to pad with: the recipe's, or by rule; the check `padding_token` proves it on the rows.

    Never one that ends a turn, which some collators would then leave out of the loss; never a new one, which would
    resize the embedding.
    """
    vocabulary = tokenizer.get_vocab()
    if spec.pad_token is not None and spec.pad_token not in vocabulary:
        raise TemplateError(
            f"{model} has no token {spec.pad_token!r} to pad with, and a new one would resize the embedding; "
            "set ModelSpec.pad_token to a token of its vocabulary that no conversation holds"
        )
    encoder = ConversationEncoder(tokenizer, template)
    end = encoder.end_token
    taken = {end, tokenizer.eos_token}
    if spec.pad_token in taken:
        raise TemplateError(f"{model} pads with {spec.pad_token!r} and ends turns with {end!r}; these must differ")
    for token in [spec.pad_token] if spec.pad_token else _unused(encoder):
        if token not in taken and vocabulary[token] < rows:
            return token
    raise TemplateError(
        f"{model} has no token to pad with: it ends turns with {end!r}, and its template writes all others that "
        "no text becomes; set ModelSpec.pad_token to a token of its vocabulary that no conversation holds"
    )


def _unused(encoder: ConversationEncoder) -> Iterator[str]:
    """Yield tokens that no text becomes and the template does not write, the tokenizer's own pad token first."""
    tokenizer: Any = encoder.tokenizer
    written = "\n".join([encoder.template.source, *map(encoder.spelled, turn_pieces(encoder))])
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    used = {None, tokenizer.bos_token, tokenizer.unk_token}
    free = [token for token in (tokenizer.pad_token, *special) if token not in used and token not in written]
    yield from (token for token in free if token == tokenizer.pad_token)
    for pattern in _RESERVED[:2]:
        yield from filter(pattern.search, free)
    if tokenizer.unk_token is not None and all(byte in tokenizer.get_vocab() for byte in _EVERY_BYTE):
        yield tokenizer.unk_token
    yield from filter(_RESERVED[2].search, free)
    yield from free  # such as Falcon's >>TITLE<<
