"""Finished runs on a stand-in that are made in seconds: a few steps of plain PyTorch in place of a whole training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fake_runs import make_run, receipt
from torch.nn.utils.rnn import pad_sequence

from qlora_recipes.base.adapters import adapter_sha256, attach
from qlora_recipes.base.loading import load_base
from qlora_recipes.base.tokenizer import load_tokenizer
from qlora_recipes.data.encoding import IGNORED, ConversationEncoder
from qlora_recipes.formatters import Message
from qlora_recipes.models import LLAMA_2_7B_CHAT, ModelSpec
from qlora_recipes.precision import precision_named
from qlora_recipes.run.folder import RunFolder
from qlora_recipes.standins import ROWS

MODEL = "standin-llama2"
LINEAR_LAYERS = list(LLAMA_2_7B_CHAT.linear_layers)


def single_turns(count: int) -> list[list[Message]]:
    """Conversations of one question and its answer, from the bundled rows."""
    texts = [json.loads(line)["text"] for line in ROWS["guanaco_llama2"].read_text().splitlines()]
    pairs = [text.removeprefix("<s>[INST] ").removesuffix(" </s>").split(" [/INST] ") for text in texts]
    return [
        [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        for pair in pairs
        if len(pair) == 2
    ][:count]


def deploy_run(
    folder: Path,
    rows: Sequence[list[Message]],
    held_out: Sequence[list[Message]],
    *,
    model: str = MODEL,
    spec: ModelSpec = LLAMA_2_7B_CHAT,
    precision: str = "nf4",
    steps: int = 0,
    change: Callable[[Any], None] | None = None,
    lora: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Write a run whose adapter had so many steps on the rows, and then was changed."""
    settings = {"r": 8, "lora_alpha": 16, "target_modules": list(spec.linear_layers), **(lora or {})}
    base, counted, _ = load_base(model, None, precision_named(precision), "bfloat16", device=torch.device("cpu"))
    tokenizer = load_tokenizer(spec, model, None)
    adapted = attach(base, settings, 0)
    template = tokenizer.template
    encoder = ConversationEncoder(tokenizer, template)
    encoded = [encoder.encode(row) for row in rows]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(steps):
        batch = [encoded[i % len(encoded)] for i in range(16 * step, 16 * step + 16)]
        ids = pad_sequence([torch.tensor(row.input_ids) for row in batch], batch_first=True)
        labels = pad_sequence([torch.tensor(row.labels) for row in batch], batch_first=True, padding_value=IGNORED)
        adapted(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if change:
        with torch.no_grad():
            change(adapted)
    run = RunFolder(make_run(folder.parent, precision).rename(folder))
    shutil.rmtree(run.adapter)
    adapted.save_pretrained(str(run.adapter))
    tokenizer.save_pretrained(run.adapter)
    made = receipt(precision, 0, adapter__final_sha256=adapter_sha256(adapted), template__sha256=template.sha256)
    chosen = {"role_markers": template.role_markers, "end_token": tokenizer.eos_token}
    recorded = replace(made.template, **chosen, bos_per_row=[1, len(rows)])
    counted.model = model
    run.write_receipt(replace(made, template=recorded, base=counted, settings=replace(made.settings, lora=settings)))
    rows_kept = [{"place": f"line {i}", "messages": row} for i, row in enumerate(held_out, 1)]
    run.held_out.write_text(json.dumps(rows_kept))
    return run
