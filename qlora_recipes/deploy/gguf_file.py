"""A model or an adapter as a GGUF file, as llama.cpp reads it. Folders in, one file out; loads no model.

What each architecture renames and reorders is llama.cpp's own convention: names by `gguf.get_tensor_name_map`, queries
and keys of Llama in the order of its rotary embedding (pairs side by side), Falcon's product as queries, keys, values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open
from transformers import AutoConfig

from qlora_recipes.chat_templates import without_markers
from qlora_recipes.errors import ModelError, TemplateError
from qlora_recipes.families.falcon import FALCON

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
"""Types of a file's matrices; vectors are always float32. Fewer bits make another model than was trained."""
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK = 32  # weights of a row that share a scale in q8_0
_Config = Mapping[str, Any]


def _as_it_is(config: _Config, name: str, rows: np.ndarray) -> np.ndarray:
    return rows


def _llama_rows(config: _Config, name: str, rows: np.ndarray) -> np.ndarray:
    """Reorder the outputs of a query or key projection: the halves of each head become pairs."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for part, count in heads.items():
        if f".{part}." in name:
            return rows.reshape(count, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
    return rows


def _falcon_rows(config: _Config, name: str, rows: np.ndarray) -> np.ndarray:
    """Reorder the outputs of the fused product: from queries, key and value of each group to all of each."""
    if ".query_key_value." not in name:
        return rows
    groups, heads = config["num_kv_heads"], config["num_attention_heads"]
    grouped = rows.reshape(groups, heads // groups + 2, -1, *rows.shape[1:])
    parts = (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])


@dataclass(frozen=True)
class _Architecture:
    """What llama.cpp calls an architecture, and how the outputs of its projections are ordered there."""

    arch: gguf.MODEL_ARCH
    rows: Callable[[_Config, str, np.ndarray], np.ndarray] = _as_it_is


_ARCHITECTURES = {
    "llama": _Architecture(gguf.MODEL_ARCH.LLAMA, _llama_rows),
    "mistral": _Architecture(gguf.MODEL_ARCH.LLAMA, _llama_rows),
    "falcon": _Architecture(gguf.MODEL_ARCH.FALCON, _falcon_rows),
    "qwen2": _Architecture(gguf.MODEL_ARCH.QWEN2),
    "qwen3": _Architecture(gguf.MODEL_ARCH.QWEN3),
}
"""`model_type` to architecture. Others are refused: a file that is read without an error may still be another model."""


def write_model(folder: Path, file: Path, kind: str, *, name: str) -> None:
    """Write the model in a folder of safetensors, with its tokenizer and chat template, as one of TYPES.

    One tensor is in memory at a time.

    Raises:
        ModelError: for an architecture, a tokenizer or a tensor that has no place in the format, naming it.
    """
    config, architecture = _read(folder)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture.arch], use_temp_file=True)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    _add_sizes(writer, config)
    _add_tokenizer(writer, folder, config["vocab_size"])
    places = gguf.get_tensor_name_map(architecture.arch, config["num_hidden_layers"])
    for tensor, rows in _tensors(folder):
        if tensor == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        place = _place(places, tensor)
        _add(writer, place, architecture.rows(config, tensor, rows), kind)
    _close(writer)


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one matrix: scaling x B A."""

    place: str
    """Name of the matrix in the file."""
    a: np.ndarray
    """[rank, inputs]."""
    b: np.ndarray
    """[outputs, rank], the outputs in the order of the file."""
    scaling: float


def read_updates(adapter: Path, base: Path) -> list[Update]:
    """Return what the adapter in a folder adds to the base whose `config.json` is in another.

    Raises:
        ModelError: for an architecture or a tensor that has no place in the format, naming it.
    """
    config, architecture = _read(base)
    lora = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    places = gguf.get_tensor_name_map(architecture.arch, config["num_hidden_layers"])
    sides: dict[str, dict[str, np.ndarray]] = {}
    for tensor, rows in _tensors(adapter):
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", tensor)
        if not found:
            raise ModelError(
                f"the tensor {tensor} of {adapter} has no place in a GGUF adapter, which is LoRA on linear layers "
                "alone. Merge the run, and export that"
            )
        sides.setdefault(f"{found[1]}.weight", {})[found[2]] = rows
    updates = []
    for name, side in sides.items():
        b, scaling = architecture.rows(config, name, side["B"]), _scaling(lora, name, len(side["A"]))
        updates.append(Update(_place(places, name), side["A"], b, scaling))
    return updates


def write_adapter(adapter: Path, base: Path, file: Path, kind: str, *, name: str) -> None:
    """Write the adapter in a folder as one of TYPES, as llama.cpp's `--lora` reads it; raises as `read_updates`."""
    updates = read_updates(adapter, base)
    _, architecture = _read(base)
    alpha = updates[0].scaling * len(updates[0].a)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture.arch], use_temp_file=True)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for update in updates:
        usual = alpha / len(update.a)  # what llama.cpp scales by, whatever the adapter does
        _add(writer, f"{update.place}.lora_a", update.a, kind)
        _add(writer, f"{update.place}.lora_b", update.b * np.float32(update.scaling / usual), kind)
    _close(writer)


def _scaling(lora: Mapping[str, Any], name: str, rank: int) -> float:
    """Return what PEFT multiplies the update of a weight by."""
    patterns, module = lora.get("alpha_pattern") or {}, name.removesuffix(".weight")
    own = (alpha for key, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))
    alpha = float(next(own, lora["lora_alpha"]))
    return alpha / (rank**0.5 if lora.get("use_rslora") else rank)


def _read(folder: Path) -> tuple[dict[str, Any], _Architecture]:
    """Return the configuration of a model, every count in it under one name, and its architecture."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ModelError(f"{folder}: no GGUF of the architecture {kind!r} here, only of {', '.join(_ARCHITECTURES)}")
    config = AutoConfig.from_pretrained(folder).to_dict() | config  # files leave out what is usual
    heads = config["num_attention_heads"]
    if kind == "falcon":
        if config.get("alibi") or not config.get("parallel_attn", True):
            raise ModelError(f"{folder}: llama.cpp knows Falcon with rotary positions and parallel attention only")
        config["num_kv_heads"] = FALCON.sizes_of(config).num_key_value_heads
        config["intermediate_size"] = config.get("ffn_hidden_size") or 4 * config["hidden_size"]
    config["num_key_value_heads"] = config.get("num_kv_heads") or config.get("num_key_value_heads") or heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ModelError(f"{folder}: no GGUF of rotary positions scaled as {rope.get('rope_type')!r} here")
    config["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    return config, _ARCHITECTURES[kind]


def _add_sizes(writer: gguf.GGUFWriter, config: _Config) -> None:
    size, heads = config["hidden_size"], config["num_attention_heads"]
    writer.add_context_length(config.get("max_position_embeddings", 2048))
    writer.add_embedding_length(size)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(config["rope_theta"])
    head = config.get("head_dim") or size // heads
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        writer.add_sliding_window(config["sliding_window"])


# ---- Tokenizer ----

_NEWLINES = r"\s*[\r\n]"
_SPLITS = {
    "llama-bpe": r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _NEWLINES,
    "qwen2": r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _NEWLINES,
}
"""Name of a way to split text into words in llama.cpp -> a part of its expression."""


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add the vocabulary, its merges, the special tokens and the chat template."""
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = words["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{folder}: no GGUF of a tokenizer of the type {model['type']} here, only of BPE")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    added = {token["id"]: token for token in words["added_tokens"]}
    vocabulary = {number: word for word, number in model["vocab"].items()}
    vocabulary |= {number: token["content"] for number, token in added.items()}
    numbers = range(vocab_size)
    writer.add_token_list([vocabulary.get(number, f"[PAD{number}]") for number in numbers])
    writer.add_token_types([_type_of(number, vocabulary, added) for number in numbers])
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        first: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            first.setdefault(merge.replace(" ", ""), rank)
        # The pair with the highest score is joined first, as the merge of the lowest rank is.
        writer.add_token_scores([-float(first.get(vocabulary.get(number, ""), len(merges))) for number in numbers])
        writer.add_add_space_prefix(True)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(words, folder))
    writer.add_token_merges(merges)
    _add_special_tokens(writer, folder, vocabulary)


def _type_of(number: int, vocabulary: Mapping[int, str], added: Mapping[int, Mapping[str, Any]]) -> gguf.TokenType:
    if number not in vocabulary:
        return gguf.TokenType.UNUSED
    if number in added:
        unknown = added[number]["content"] == "<unk>"
        special = gguf.TokenType.UNKNOWN if unknown else gguf.TokenType.CONTROL
        return special if added[number]["special"] else gguf.TokenType.USER_DEFINED
    return gguf.TokenType.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", vocabulary[number]) else gguf.TokenType.NORMAL


def _pre_tokenizer(words: Mapping[str, Any], folder: Path) -> str:
    """Return the name that llama.cpp has for the way a byte-level tokenizer splits text into words."""
    own = words["pre_tokenizer"]
    parts = own.get("pretokenizers", [own])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Punctuation", "ByteLevel", "Digits", "Split"]:
        return "falcon"
    if kinds == ["Split", "ByteLevel"]:
        expression = parts[0]["pattern"].get("Regex", "")
        for name, part in _SPLITS.items():
            if part in expression:
                return name
    raise ModelError(
        f"{folder}: llama.cpp has no name here for how its tokenizer.json splits words ({', '.join(kinds)})"
    )


def _add_special_tokens(writer: gguf.GGUFWriter, folder: Path, vocabulary: Mapping[int, str]) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {word: number for number, word in vocabulary.items()}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            getattr(writer, f"add_{name}_token_id")(ids[token])
    stops = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    if stops is not None:
        writer.add_eot_token_id(stops[0] if isinstance(stops, list) else stops)
    writer.add_add_bos_token(False)  # the chat template writes it
    template = folder / "chat_template.jinja"
    if not template.is_file():
        raise TemplateError(f"{folder} has no {template.name}; expected the folder that qlora-recipes merge wrote")
    writer.add_chat_template(without_markers(template.read_text(encoding="utf-8")))


# ---- Tensors ----


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors in a folder's safetensors as float32, one at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                yield name, weights.get_tensor(name).float().numpy()


def _place(places: gguf.TensorNameMap, name: str) -> str:
    place = places.get_name(name, try_suffixes=(".weight", ".bias"))
    if place is None:
        raise ModelError(f"the tensor {name} has no place in a GGUF file of this architecture")
    return place


def _add(writer: gguf.GGUFWriter, name: str, rows: np.ndarray, kind: str) -> None:
    """Add a tensor: a matrix in the type asked for, a vector or one that does not divide into blocks in float."""
    rows, wanted = np.ascontiguousarray(rows, dtype=np.float32), TYPES[kind]
    if rows.ndim == 1:
        wanted = gguf.GGMLQuantizationType.F32
    elif kind == "q8_0" and rows.shape[-1] % _BLOCK:
        wanted = gguf.GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quants.quantize(rows, wanted), raw_dtype=wanted)


def _close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
