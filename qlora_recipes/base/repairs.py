"""Upstream defects, one function each: what is wrong, where, since when, and how to tell that it is fixed.

A repair looks for its defect instead of comparing versions, does nothing where there is none, and returns whether
it did something. Tests show each defect without its repair, and fail with a message once upstream has fixed it.
Knows nothing of runs or recipes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def quantize_falcon_linears() -> bool:
    """Make Falcon's layers plain `nn.Linear`s, so that bitsandbytes replaces them. Call before loading.

    Transformers 5.23, `integrations/bitsandbytes.py`, `replace_with_bnb_linear`: only `type(module) is nn.Linear` is
    replaced, and Falcon's are a subclass. `load_in_4bit=True` leaves every layer in 16 bits, reports
    `is_loaded_in_4bit`, and warns of another method ("eetq"). The subclass multiplies and adds the bias in two
    roundings instead of one; Falcon-7b has no bias, and its float32 logits do not change.
    """
    falcon = _falcon()
    if falcon.FalconLinear is torch.nn.Linear:
        return False
    falcon.FalconLinear = torch.nn.Linear
    return True


def _falcon() -> Any:
    """Return Transformers' module of Falcon, untyped because repairs replace what is in it."""
    from transformers.models.falcon import modeling_falcon

    return modeling_falcon


def separate_packed_falcon() -> bool:
    """Pass the position ids to Falcon's mask, so that packed conversations cannot see each other.

    Transformers 5.23, `models/falcon/modeling_falcon.py`, `FalconModel.forward`: `create_causal_mask` is called
    without `position_ids`, from which it tells packed rows apart. The logits of the second conversation of a row move
    by 0.7 when the first one changes; Llama's by 0.
    """
    falcon = _falcon()
    forward = falcon.FalconModel.forward
    source = inspect.getsource(forward)
    call = source.partition("create_causal_mask(")[2].partition("\n        )")[0]
    if "position_ids=" in call or hasattr(forward, "separates_packed"):
        return False
    plain_mask = falcon.create_causal_mask
    current: list[torch.Tensor | None] = [None]

    def create_causal_mask(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("position_ids", current[0])
        return plain_mask(*args, **kwargs)

    @functools.wraps(forward)
    def forward_with_positions(*args: Any, **kwargs: Any) -> Any:
        current[0] = kwargs.get("position_ids")
        try:
            return forward(*args, **kwargs)
        finally:
            current[0] = None

    vars(forward_with_positions)["separates_packed"] = True
    falcon.create_causal_mask = create_causal_mask
    falcon.FalconModel.forward = forward_with_positions
    return True


def route_falcon_attention(name: str) -> bool:
    """Make Falcon's layers call the registered attention function of that name. Call before loading.

    Transformers 5.23, `models/falcon/modeling_falcon.py`: `FALCON_ATTENTION_CLASSES` knows three names and none that is
    registered, and `FalconAttention.forward` gives PyTorch one key head for 71 query heads, which no fused kernel
    takes: the scores of every head are computed in float32.
    """
    from transformers import AttentionInterface

    falcon = _falcon()
    if name in falcon.FALCON_ATTENTION_CLASSES:
        return False

    def forward(self: Any, hidden_states: Any, alibi: Any, attention_mask: Any, **given: Any) -> Any:
        heads = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (part.transpose(1, 2) for part in heads)
        query, key = falcon.apply_rotary_pos_emb(query, key, *given["position_embeddings"])
        if given.get("layer_past") is not None:
            key, value = given["layer_past"].update(key, value, self.layer_idx)
        self.num_key_value_groups = query.shape[1] // key.shape[1]  # which attention functions read
        attention = AttentionInterface()[name]
        output, _ = attention(self, query, key, value, attention_mask, scaling=self.inv_norm_factor)
        return self.dense(output.flatten(2)), None

    routed = type("RoutedFalconAttention", (falcon.FalconAttention,), {"forward": forward})
    falcon.FALCON_ATTENTION_CLASSES[name] = routed
    return True


def merge_spaces_last(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Put the merges that consist of spaces after all others, where sentencepiece has them. For Llama-2's vocabulary.

    Transformers 5.23, `convert_slow_tokenizer.py`, `SentencePieceExtractor.extract`: where tokenizer.json is made from
    tokenizer.model, merges are ordered by id instead of by score. Runs of spaces have low ids and the score -1e9: two
    spaces before a word become `▁▁`, `word` instead of `▁`, `▁word`, in 58 of 500 Guanaco rows.
    """
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = content["model"].get("merges", [])
    # A stable sort: everything else keeps its order.
    ordered = sorted(merges, key=lambda merge: set("".join(merge)) == {"▁"})
    if ordered == merges:
        return False
    content["model"]["merges"] = ordered
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return True


def keep_4bit_gradients(model: PreTrainedModel) -> bool:
    """Keep 4-bit weights in the layout that has a gradient. Call after loading.

    bitsandbytes 0.50, `nn/modules.py`, `Linear4bit.forward`: on CPUs with avx512_bf16 a forward in evaluation mode
    repacks the weights for inference, and every training forward after it goes through a kernel without autograd. The
    gradient norm falls from 0.609 to 0.304 with one UserWarning.
    """
    found = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for module in found:
        vars(module)["support_avx512bf16_for_cpu"] = False
    return bool(found)


def float32_dora_norm() -> bool:
    """Take DoRA's norms in float32, whatever the weights are stored in. Call before an adapter is attached or loaded.

    PEFT 0.21, `tuners/lora/dora.py`, `DoraLinearLayer.get_weight_norm`: the norm of each output's weights is taken in
    their dtype. On a 16-bit base the magnitudes start as norms rounded to 16 bits, and the forward pass divides them by
    norms of another rounding: logits move by 0.4 before the first step, in float32 by 0.
    """
    from peft.tuners.lora.dora import DoraLinearLayer

    layer: Any = DoraLinearLayer
    plain, two = layer.get_weight_norm, torch.ones(1, 2, dtype=torch.bfloat16)
    if plain(layer(False), two, two, 1.0).dtype == torch.float32:
        return False

    @functools.wraps(plain)
    def get_weight_norm(self: Any, weight: torch.Tensor, lora_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain(self, weight.float(), lora_weight.float(), *args, **kwargs)

    layer.get_weight_norm = get_weight_norm
    return True


@contextlib.contextmanager
def float32_adapter(model: PreTrainedModel) -> Iterator[list[str]]:
    """Keep the adapter's weights as they are while an SFTTrainer is built around them.

    TRL 1.16, `trainer/sft_trainer.py`, `SFTTrainer.__init__`: where the base is quantized the adapter is cast to
    bfloat16, elsewhere it stays float32. Two arms of a comparison would differ in more than the base, and a resumed
    run (whose adapter loads as float32) from an uninterrupted one. Yields the names of the weights that were cast,
    filled in on exit.
    """
    weights = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    cast: list[str] = []
    yield cast
    for name, weight in model.named_parameters():
        if name in weights and weight.dtype != weights[name].dtype:
            weight.data = weights[name]
            cast.append(name)
