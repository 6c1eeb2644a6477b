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
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn

from qlora_recipes.kernels import experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_recipes.precision import Precision


def plain_linears(model: nn.Module) -> bool:
    """Make linear layers of a class of their own plain `nn.Linear`s, which bitsandbytes replaces. Call before it does.

    Transformers 5.23, `integrations/bitsandbytes.py`, `replace_with_bnb_linear`: only `type(module) is nn.Linear` is
    replaced, and Falcon's are a subclass. `load_in_4bit=True` leaves every layer in 16 bits, reports
    `is_loaded_in_4bit`, and warns of another method ("eetq"). A class that does more than multiply and add, as a
    router's, stays. Falcon's adds its bias after a rounding of its own; Falcon-7b has no bias.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    kinds = {type(layer): layer for layer in layers if type(layer) is not nn.Linear}
    plain = {kind for kind, layer in kinds.items() if _computes_linear(layer)}
    for layer in layers:
        if type(layer) in plain:
            layer.__class__ = nn.Linear
    return bool(plain)


def _computes_linear(layer: nn.Linear) -> bool:
    """Whether a layer multiplies and adds, and does nothing else: tried with small weights, which are not its own."""
    draw = torch.Generator("cpu").manual_seed(0)
    sizes = ((3, 16), (8, 16), (8,))
    x, weight, bias = (
        torch.randn(*size, generator=draw, device="cpu") for size in sizes
    )  # a model may be made as meta
    given = {"weight": weight} | ({} if layer.bias is None else {"bias": bias})
    try:
        found = torch.func.functional_call(layer, given, x)
    except Exception:  # whatever it does, it is no linear layer
        return False
    return isinstance(found, torch.Tensor) and torch.allclose(found, nn.functional.linear(x, **given), atol=1e-5)


@contextlib.contextmanager
def quantize_experts(precision: Precision) -> Iterator[list[str]]:
    """Quantize while loading what bitsandbytes has a storage for and Transformers overlooks; yield the repairs made.

    Transformers 5.23, `quantizers/quantizer_bnb_4bit.py`, `param_needs_quantization`: only `Linear4bit` is quantized.
    The experts of Qwen3-MoE, Mixtral, OLMoE or gpt-oss are stacks of matrices in one parameter since version 5, and
    stay in 16 bits: most of the model. Here each stack is quantized as it is loaded, so that at most one is in memory
    in 16 bits. bitsandbytes has no int8 for them. Linear layers of a class of their own: see `plain_linears`.
    """
    from bitsandbytes.nn.modules import Params4bit
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    made: list[str] = []
    overlooked: dict[str, tuple[nn.Module, str, Any]] = {}
    plain_prepare, plain_needs = HfQuantizer.preprocess_model, Bnb4BitHfQuantizer.param_needs_quantization
    plain_convert = Bnb4bitQuantize.convert

    def preprocess_model(self: Any, model: Any, *arguments: Any, **others: Any) -> None:
        if plain_linears(model):
            made.append("plain_linears")
        layers = [layer for layer in model.modules() if hasattr(layer, "gradient_checkpointing")]
        owner = {module: layer for layer in layers for _, module, _ in experts.stacks(layer)}  # the innermost
        if precision.quant_type:
            overlooked.update({full: (module, name, owner.get(module)) for full, module, name in experts.stacks(model)})
        plain_prepare(self, model, *arguments, **others)

    def param_needs_quantization(self: Any, model: Any, param_name: str, **others: Any) -> bool:
        return param_name in overlooked or plain_needs(self, model, param_name, **others)

    def convert(self: Any, input_dict: dict[str, Any], **others: Any) -> dict[str, torch.Tensor]:
        if not input_dict.keys() & overlooked.keys():
            return plain_convert(self, input_dict, **others)
        kind: Any = {"quant_type": precision.quant_type, "compress_statistics": precision.double_quant}
        whole = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        make: Any = Params4bit
        packed = {name: make(value, **kind).to(value.device) for name, value in whole.items()}
        for name, weight in packed.items():
            first, original = experts.Dequantize()(weight)[0].float(), whole[name][0].float()
            vars(weight)["error"] = float((first - original).norm() / original.norm())
        return packed

    with (
        mock.patch.object(HfQuantizer, "preprocess_model", preprocess_model),
        mock.patch.object(Bnb4BitHfQuantizer, "param_needs_quantization", param_needs_quantization),
        mock.patch.object(Bnb4bitQuantize, "convert", convert),
    ):
        yield made
    packed = [found for found in overlooked.values() if isinstance(getattr(found[0], found[1]), Params4bit)]
    for module, name, layer in packed:
        experts.pack(module, name, layer)
    if packed:
        made.append("quantize_experts")


def _falcon() -> Any:
    """Return Transformers' module of Falcon, untyped because repairs replace what is in it."""
    from transformers.models.falcon import modeling_falcon

    return modeling_falcon


def separate_packed(outline: PreTrainedModel) -> bool:
    """Pass the position ids to the masks of a model that forgets them, so that packed conversations stay apart.

    Transformers 5.23, `models/falcon/modeling_falcon.py` and `models/gpt_oss/modeling_gpt_oss.py`: `create_causal_mask`
    is called without `position_ids`, from which it tells packed rows apart. The logits of the second conversation of a
    row move by 0.7 when the first one changes; Llama's by 0. Whether a model forgets them is tried on it, without its
    weights. Call before loading; it changes the class.
    """
    backbone: Any = type(outline.base_model)
    if hasattr(backbone.forward, "separates_packed"):
        return True
    forward, scope = backbone.forward, inspect.unwrap(backbone.forward).__globals__
    makers = {name: maker for name, maker in scope.items() if re.fullmatch(r"create_\w*mask", name)}
    if not makers or not _forgets_positions(outline, scope, makers):
        return False
    current: list[torch.Tensor | None] = [None]

    def with_positions(maker: Any) -> Any:
        @functools.wraps(maker)
        def make(*args: Any, **kwargs: Any) -> Any:
            kwargs.setdefault("position_ids", current[0])
            return maker(*args, **kwargs)

        return make

    @functools.wraps(forward)
    def forward_with_positions(*args: Any, **kwargs: Any) -> Any:
        current[0] = kwargs.get("position_ids")
        try:
            return forward(*args, **kwargs)
        finally:
            current[0] = None

    vars(forward_with_positions)["separates_packed"] = True
    scope.update({name: with_positions(maker) for name, maker in makers.items()})
    backbone.forward = forward_with_positions
    return True


def _forgets_positions(outline: PreTrainedModel, scope: dict[str, Any], makers: dict[str, Any]) -> bool:
    """Whether the first mask that a model asks for is asked for without the position ids that the model was given."""
    given: list[Any] = []

    def stop(maker: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> None:
            given.append(inspect.signature(maker).bind_partial(*args, **kwargs).arguments.get("position_ids"))
            raise InterruptedError

        return make

    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    with mock.patch.dict(scope, {name: stop(maker) for name, maker in makers.items()}):
        try:
            outline.base_model(input_ids=ids, position_ids=torch.arange(4, device="meta")[None], use_cache=False)
        except Exception:  # a model may fail in other ways without its weights; then it is left as it is
            return bool(given) and given[0] is None
    return False


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


def read_tokenizer_file(
    tokenizer: PreTrainedTokenizerBase, load: Callable[..., PreTrainedTokenizerBase]
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer as its tokenizer.json has it, where its class makes another of it; else None.

    Transformers 5.23, `models/llama/tokenization_llama.py`, `LlamaTokenizer.__init__`: of tokenizer.json it takes the
    words and merges, and puts a pre-tokenizer of its own in front. Unless tokenizer_config.json says `legacy`, which
    those of Llama 2's time do not or say otherwise, the text after a control token begins with `[` where the file (as
    Meta) has `▁[`, and three spaces are two. `load(cls)` calls a class's `from_pretrained` for the same model.
    """
    from transformers import PreTrainedTokenizerFast

    names = ("bos_token", "eos_token", "unk_token")  # which a class may have where the files name none
    named = {name: token for name in names if (token := getattr(tokenizer, name)) is not None}
    plain = load(PreTrainedTokenizerFast, **named)
    texts = ("[a] b", "a  b", "   a\n  b\n\n\tc", "don't x_y(z): é 漢 1234 12.5%")
    probes = [start + text for start in ("", *named.values()) for text in texts]
    made, filed = (each(probes, add_special_tokens=False)["input_ids"] for each in (tokenizer, plain))
    return plain if made != filed else None


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
