"""A decoder of any architecture that Transformers knows, made without its weights and counted.

The only file of this folder that imports torch, and late: a family with arithmetic of its own needs none. Counts are
exact; what activations take follows from them by the rules fitted to Llama (where the MLP has a gate) and Falcon.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from qlora_recipes.errors import ModelError, UnreadableModelError
from qlora_recipes.families.falcon import FALCON
from qlora_recipes.families.family import LAYER_NORM, OTHER_RMS_NORM, RMS_NORM, Counted, Norm, Sizes, Weight
from qlora_recipes.families.llama import LLAMA

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_top_k")
_MODALITIES = ("vision", "audio", "vq_")


def count(
    config: Mapping[str, Any], location: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> Sizes:
    """Return the dimensions of the model that a `config.json` describes.

    Raises:
        UnreadableModelError: when Transformers cannot make the model.
        ModelError: when it is no decoder of text.
    """
    return _count(json.dumps(config, sort_keys=True), location, revision, trust_remote_code)


@functools.lru_cache(maxsize=16)
def _count(text: str, location: str, revision: str | None, trust_remote_code: bool) -> Sizes:
    import torch
    from transformers import AutoModelForCausalLM

    made = _configuration(json.loads(text), location, revision, trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, trust_remote_code=trust_remote_code)
        return sizes_of_model(model)
    except Exception as error:  # a configuration that does not fit its architecture may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableModelError(
            f"cannot load {location}: Transformers cannot make a {made.model_type} of its config.json: {reason}"
        ) from error


def _configuration(config: dict[str, Any], location: str, revision: str | None, trusted: bool) -> PretrainedConfig:
    """Return the configuration of a decoder of text that Transformers, or trusted code of the model's, can make."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig
    from transformers import __version__ as version

    kind = config["model_type"]
    own_code = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if own_code and trusted:
        return cast("PretrainedConfig", AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=True))
    if kind not in CONFIG_MAPPING:
        code = "; its repository has code for it, which --trust_remote_code runs" if own_code else ""
        raise ModelError(
            f"cannot load {location}: Transformers {version} does not know the model_type {kind!r}{code}. Expected an "
            "architecture that it knows, or a newer Transformers"
        )
    try:
        made = CONFIG_MAPPING[kind].from_dict(config)
    except Exception as error:  # every field is checked by the class of its architecture
        reason = " ".join(str(error).split())
        raise UnreadableModelError(f"cannot load {location}: {kind} refuses its config.json: {reason}") from error
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(made), None)
    parts = getattr(made, "sub_configs", {})
    text = parts.get("text_config")
    is_text_alone = model is not None and text is not None and model.config_class is text
    if (text or any(each in name for name in parts for each in _MODALITIES)) and not is_text_alone:
        raise ModelError(
            f"cannot load {location}: {kind} sees or hears ({', '.join(parts)}), and only decoders of text are tuned "
            "here. Expected a model of text alone, such as the text part saved on its own"
        )
    is_encoder = type(made) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(made, "is_decoder", False)
    if model is None or is_encoder:
        what = "reads a text in both directions" if is_encoder else "is no language model"
        raise ModelError(
            f"cannot load {location}: {kind} {what}. Expected a decoder, which answers by continuing a text"
        )
    return made


def is_llama_norm(module: nn.Module) -> bool:
    """Whether a module normalizes as Llama's RMSNorm, to the instruction: Mistral's does, Gemma's adds one."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return bool(_code(type(module)) == _code(LlamaRMSNorm))


def is_llama_mlp(module: nn.Module) -> bool:
    """Whether a module is a gated MLP as Llama's, to the instruction, with its activation."""
    from torch import nn
    from transformers.activations import SiLUActivation
    from transformers.models.llama.modeling_llama import LlamaMLP

    return bool(_code(type(module)) == _code(LlamaMLP) and isinstance(module.act_fn, SiLUActivation | nn.SiLU))


def _code(kind: type[nn.Module]) -> Any:
    """Return what the `forward` of a class does."""
    code = getattr(kind.forward, "__code__", None)
    return code and (code.co_code, code.co_names, code.co_consts)


def _norm(norms: Sequence[nn.Module]) -> Norm:
    if norms and type(norms[0]).__name__ == "LayerNorm":
        return LAYER_NORM
    return RMS_NORM if norms and is_llama_norm(norms[0]) else OTHER_RMS_NORM


def _mlp_kept(model: nn.Module, *, gated: bool) -> int:
    if not gated:
        return FALCON.mlp_kept
    return LLAMA.mlp_kept if any(map(is_llama_mlp, model.modules())) else LLAMA.mlp_kept + 1  # an activated gate too


def sizes_of_model(model: PreTrainedModel) -> Sizes:
    """Return the dimensions of a model, counted; its weights are not looked at."""
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = _first(config, "num_attention_heads")
    key_value_heads = _key_value_heads(config, heads)
    experts = _first(config, *_EXPERTS)
    per_token = _first(config, *_PER_TOKEN) if experts else 0
    weights = tuple(_weights(model, hidden, experts))
    attended = max((each.inputs for each in weights if each.reads == "attention"), default=0)
    head = attended // max(heads, 1) or _first(config, "head_dim") or hidden // max(heads, 1)
    attending, windowed = _attention_layers(config, layers if heads else 0)
    inner, gated = _mlp(weights, hidden, per_token)
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    norms = [module for path, module in model.named_modules() if _in_block(path) and _is_norm(module, hidden)]
    family = replace(
        LLAMA if gated else FALCON,
        mlp_kept=_mlp_kept(model, gated=gated),
        model_types=(config.model_type,),
        linears=(),
        norm=_norm(norms),
        norms=round(len(norms) / layers),
        fused_qkv=any(each.outputs == (heads + 2 * key_value_heads) * head for each in weights),
        attention_repair=None,
        assumes={},
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    return Sizes(
        family=family,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=inner,
        vocab_size=config.vocab_size,
        tied_embeddings=output is not None and output.weight is embedding.weight,
        head_dim=None if head == hidden // max(heads, 1) else head,
        sliding_window=_first(config, "sliding_window") or None if windowed else None,
        counted=Counted(
            weights=weights,
            other_parameters=total - sum(each.count * each.numel for each in weights),
            attention_layers=attending,
            windowed_layers=windowed,
            num_experts=experts,
            experts_per_token=per_token,
        ),
    )


def _first(config: PretrainedConfig, *names: str) -> int:
    """Return the first of these fields that is a number, or 0."""
    values = (_field(config, name) for name in names)
    return next((value for value in values if isinstance(value, int) and value), 0)


def _field(config: PretrainedConfig, name: str) -> Any:
    """Return a field of a configuration; the largest value where layers differ, as heads of Gemma 4 do."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # which names the layers' own configurations
        layers: Any = config.per_layer_config
        return max(getattr(layers[layer], name) or 0 for layer in range(config.num_hidden_layers))


def _key_value_heads(config: PretrainedConfig, heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return _first(config, "num_key_value_heads", "num_kv_heads") or heads


def _attention_layers(config: PretrainedConfig, layers: int) -> tuple[int, int]:
    """Return how many layers attend, and how many of them through a window."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not kinds:
        return layers, layers if _first(config, "sliding_window") else 0
    attending = [kind for kind in kinds if ("attention" in kind and "linear" not in kind) or kind == "hybrid"]
    return len(attending), sum("sliding" in kind for kind in attending)


def _in_block(path: str) -> bool:
    """Whether a module is in a numbered layer, as all of a decoder's blocks are."""
    return any(part.isdigit() for part in path.split("."))


def _is_norm(module: nn.Module, hidden: int) -> bool:
    """Whether a module normalizes hidden states; norms of single heads are left out."""
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and (weight is None or weight.numel() == hidden)


def _weights(model: PreTrainedModel, hidden: int, experts: int) -> Iterator[Weight]:
    """Yield every linear layer but the output layer, and every parameter of experts, like ones together."""
    found: Counter[Weight] = Counter()
    output = model.get_output_embeddings()
    for path, module in model.named_modules():
        shapes = ((name, _shape(child)) for name, child in module.named_children() if child is not output)
        linears = {name: shape for name, shape in shapes if shape}
        parent = [part for part in path.split(".") if not part.isdigit()][-1]
        attends = "att" in parent and "linear" not in parent
        last = _last(linears, hidden)
        for name, (inputs, outputs) in linears.items():
            result = "attention" if attends else f"{parent} result"
            reads = result if name == last else f"{parent} {inputs}"
            routes = hasattr(module, "experts") or "router" in parent or "router" in name
            is_target = _in_block(path) and not routes
            found[Weight(name, inputs, outputs, 0, reads, is_target=is_target)] += 1
        if experts and _in_block(path):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and parameter.shape[0] == experts:
                    _, outputs, inputs = parameter.shape
                    found[Weight(name, inputs, outputs, 0, f"{parent} {name}", experts, is_target=False)] += 1
    for each, times in found.items():
        yield replace(each, count=times)


def _last(linears: Mapping[str, tuple[int, int]], hidden: int) -> str:
    """Return which of a module's linear layers reads what the others computed, or nothing."""
    names = [name for name, (_, outputs) in linears.items() if outputs == hidden] if len(linears) > 1 else []
    return next((name for name in names if name.startswith("o")), (names or [""])[-1])  # o_proj, out_proj


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Return the widths of a linear layer's input and output, or None for any other module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def _mlp(weights: tuple[Weight, ...], hidden: int, per_token: int) -> tuple[int, bool]:
    """Return the width of the MLP that a token passes, shared experts and its own added up, and whether it is gated."""
    last = [each for each in weights if each.is_target and each.outputs == hidden and each.reads != "attention"]
    dense = max((each.inputs for each in last), default=0)
    mixed = sorted(each.inputs * each.outputs // hidden for each in weights if each.experts)
    first = [each for each in weights if each.is_target and each.inputs == hidden and "att" not in each.reads]
    wide = sum(each.outputs for each in first if each.outputs >= dense)
    gated = 2 * mixed[0] == mixed[-1] if mixed else wide >= 2 * dense
    return dense + per_token * (mixed[0] if mixed else 0), gated
