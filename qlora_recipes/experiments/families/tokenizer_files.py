"""Write a small tokenizer in the files of a real repository: the words of the stand-ins' world, its own control tokens.

Knows nothing of models.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_recipes.experiments.families.vocabularies import Vocabulary
from qlora_recipes.standins import ROWS
from qlora_recipes.standins.tokenizer import FALCON_SPECIAL, LLAMA_2_SPECIAL, train_falcon, train_llama2

_WORDS = 900
# As the tokenizers of Llama 3 and Qwen cut words before they merge; GPT-2's is that of `ByteLevel`.
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_GPT_2_CLASSES = ("GPTNeoXTokenizer", "GPT2Tokenizer", "CohereTokenizer")


def write_tokenizer(vocabulary: Vocabulary, folder: Path) -> dict[str, int]:
    """Write `tokenizer.json` and `tokenizer_config.json`, and return token to id."""
    tokenizer = _build(vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    added = {
        str(ids[token]): {"content": token, **_flags(vocabulary, token)}
        for token in (*vocabulary.first, *vocabulary.last)
    }
    config = {
        "add_bos_token": vocabulary.adds_bos,
        "added_tokens_decoder": added,
        **{f"{name}_token": getattr(vocabulary, name) for name in ("bos", "eos", "unk")},
        **({"pad_token": vocabulary.pad} if vocabulary.pad else {}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": vocabulary.tokenizer_class,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return ids


def _build(vocabulary: Vocabulary) -> Tokenizer:
    build = _byte_level if vocabulary.kind == "bytes" else _pieces
    tokenizer = build(vocabulary)
    for token in (*vocabulary.first, *vocabulary.last):
        tokenizer.add_tokens([AddedToken(token, **_flags(vocabulary, token))])
    if vocabulary.adds_bos:
        bos = str(vocabulary.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _flags(vocabulary: Vocabulary, token: str) -> dict[str, bool]:
    return {"special": token not in vocabulary.plain, "normalized": False, "rstrip": token in vocabulary.swallows}


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    words, merges = _trained("bytes")
    tokenizer = Tokenizer(models.BPE(_numbered([*vocabulary.first, *words]), merges))
    tokenizer.decoder = decoders.ByteLevel()
    if vocabulary.tokenizer_class in _GPT_2_CLASSES:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _pieces(vocabulary: Vocabulary) -> Tokenizer:
    """As SentencePiece's models are converted: spaces become ▁, and what is in no piece is written in bytes."""
    words, merges = _trained("pieces")
    bare = vocabulary.kind == "pieces-bare"
    own = ["\n", "▁▁"] if bare else []
    tokenizer = Tokenizer(
        models.BPE(
            _numbered([*vocabulary.first, *own, *words]),
            merges,
            unk_token=vocabulary.unk,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = spaces if bare else normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if bare else [*steps, decoders.Strip(content=" ", left=1)])
    return tokenizer


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


@cache
def _trained(kind: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return words and merges of a BPE over the stand-ins' questions and answers, without control tokens."""
    texts = ROWS["openassistant_guanaco"].read_text(encoding="utf-8").splitlines()
    train, special = (train_falcon, FALCON_SPECIAL) if kind == "bytes" else (train_llama2, LLAMA_2_SPECIAL)
    trained: PreTrainedTokenizerFast = train([json.loads(line)["text"] for line in texts], _WORDS)
    model: dict[str, Any] = json.loads(trained.backend_tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=lambda word: int(model["vocab"][word]))
    return [word for word in words if word not in special], [(left, right) for left, right in model["merges"]]
