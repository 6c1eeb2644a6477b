"""Write a small random model of an architecture into a folder, in the files that a repository on the hub has."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_recipes.experiments.families.architectures import ARCHITECTURES, SIZES, Architecture
from qlora_recipes.experiments.families.tokenizer_files import write_tokenizer

_ROUNDED_TO = 64  # real embeddings have more rows than their tokenizers have tokens
_SPREAD = 0.02  # of norms and biases around their start, so that none of them could be left out unseen


def make(name: str, folder: Path) -> Path:
    """Write an architecture's folder and return it; the same bytes every time."""
    architecture = ARCHITECTURES[name]
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(architecture.vocabulary, folder)
    if architecture.template:
        (folder / "chat_template.jinja").write_text(template_text(architecture.template), encoding="utf-8")
    config = _write(folder / "config.json", _config(architecture, ids))
    _write_weights(folder)
    (folder / "config.json").write_text(config, encoding="utf-8")  # as declared: Transformers has rewritten it
    ends = [ids[token] for token in architecture.ends]
    named = {f"{kind}_token_id": ids.get(str(getattr(architecture.vocabulary, kind))) for kind in ("bos", "pad")}
    known = {key: value for key, value in named.items() if value is not None}
    _write(folder / "generation_config.json", {**known, "eos_token_id": ends if len(ends) > 1 else ends[0]})
    return folder


def template_text(name: str) -> str:
    """Return a chat template by name: one of `templates/`, or else TRL's copy of the real one."""
    own = Path(__file__).parent / "templates" / f"{name}.jinja"
    source = own if own.is_file() else files("trl") / "chat_templates" / f"{name}.jinja"
    return source.read_text(encoding="utf-8")


def _config(architecture: Architecture, ids: dict[str, int]) -> dict[str, object]:
    vocabulary = architecture.vocabulary
    rows = -(-len(ids) // _ROUNDED_TO) * _ROUNDED_TO
    return {
        "architectures": [architecture.model_class],
        **SIZES,
        **architecture.sizes,
        "initializer_range": SIZES["hidden_size"] ** -0.5,  # keeps the size of activations, as in a trained model
        **architecture.config,
        "vocab_size": rows,
        **({"vocab_size_per_layer_input": rows} if "hidden_size_per_layer_input" in architecture.config else {}),
        "bos_token_id": ids.get(str(vocabulary.bos)),
        "eos_token_id": ids[architecture.ends[0]],
        "pad_token_id": ids.get(str(vocabulary.pad)),
        "torch_dtype": "bfloat16",
    }


def _write(file: Path, content: dict[str, object]) -> str:
    text = json.dumps(content, indent=2) + "\n"
    file.write_text(text, encoding="utf-8")
    return text


@torch.no_grad()
def _write_weights(folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += _SPREAD * torch.randn_like(weight)
    model.save_pretrained(folder)
