"""What starts a run in other servers, and why one cannot take it. Reads the run folder; starts nothing.

What each reads: vLLM `vllm/lora/peft_helper.py` (keys of adapter_config.json), `vllm/config/lora.py` (ranks); TGI the
merged folder, whose template its Rust Jinja must know every tag of; llama.cpp a GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qlora_recipes.run.folder import RunFolder

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` takes."""
_NOT_LORA = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices")


def commands(folder: RunFolder) -> dict[str, str]:
    """Return server to the command that starts it with this run, or to why it cannot take the run as it is."""
    config = json.loads((folder.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    merged = any((folder.merged / f"model.safetensors{end}").exists() for end in ("", ".index.json"))
    merge, export = (f"qlora-recipes {verb} {folder.path}" for verb in ("merge", "export"))
    files = sorted(file for file in folder.path.glob("*.gguf") if not file.name.startswith("adapter-"))
    return {
        "vLLM, the adapter on the 16-bit base": _vllm(folder, config),
        "vLLM, merged": f"vllm serve {folder.merged}" if merged else f"first: {merge}",
        "TGI, merged": f"text-generation-launcher --model-id {folder.merged}" if merged else f"first: {merge}",
        "llama.cpp": (
            f"llama-server --model {files[0]} --jinja"
            if files
            else f"first: {'' if merged else f'{merge} && '}{export} --type q8_0"
        ),
    }


def _vllm(folder: RunFolder, config: Mapping[str, Any]) -> str:
    if unknown := [name for name in _NOT_LORA if config.get(name)]:
        return f"cannot: the adapter has {unknown[0]}, and vLLM takes LoRA on linear layers alone. Merge it"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "cannot: some layers have ranks or scales of their own, and vLLM reads one of each. Merge it"
    rank = config["r"]
    allowed = next((each for each in VLLM_RANKS if each >= rank), None)
    if allowed is None:
        return f"cannot: the rank is {rank}, and vLLM takes up to {VLLM_RANKS[-1]}. Merge it"
    template = folder.adapter / "chat_template.jinja"
    return (
        f"vllm serve {folder.receipt().base.model} --enable-lora --max-lora-rank {allowed} "
        f"--lora-modules {folder.path.name}={folder.adapter} --chat-template {template}"
    )
