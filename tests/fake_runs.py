"""Evaluated run folders made of files alone: what training and evaluation would have left, without either."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from qlora_recipes.evaluation.records import DocRecord, TaskResult, sha256, write_task
from qlora_recipes.run.receipt import (
    AdapterReceipt,
    BaseReceipt,
    Check,
    DataReceipt,
    MemoryReceipt,
    QuantizedReceipt,
    Receipt,
    SettingsReceipt,
    SpreadReceipt,
    TemplateReceipt,
    TrainingReceipt,
)
from qlora_recipes.run.weights import weights_sha256

# What the demo's receipts count.
STORED = {
    "nf4": {"bfloat16": 788736, "uint8": 439296, "float32": 31040},
    "nf4-single": {"bfloat16": 788736, "uint8": 425984, "float32": 55296},
    "int8": {"bfloat16": 788736, "int8": 851968, "float32": 23808},
    "bf16": {"bfloat16": 2492672, "float32": 256},
}
RESULT = TaskResult(
    task="standin_choice",
    kind="accuracy",
    metric="acc",
    higher_is_better=True,
    metrics={"acc": 0.5},
    stderr={},
    n_docs=0,
    limit=None,
    num_fewshot=0,
    chat_template=True,
    template_sha256="template",
    prompts_unlike_training=0,
    truncated=0,
    batch_size=64,
    loglikelihood_dtype="float32",
    version="1.0",
    precision="bf16",
    base_sha256="",
    adapter_sha256=None,
    adapter_on_off_difference=3.25,
    device="cpu",
    seconds=1.5,
)


def adapter_weights(precision: str, seed: int) -> np.ndarray:
    """The one tensor of a run's adapter."""
    return np.array([[float(seed), *precision.encode()]], dtype=np.float32)


def adapter_file(weights: np.ndarray) -> bytes:
    """An adapter's file."""
    return save({"q_proj.lora_A.weight": weights})


def receipt(precision: str, seed: int, **changes: Any) -> Receipt:
    """A receipt; keyword arguments replace dotted keys, with `__` for the dot."""
    quantized = 0 if precision in ("bf16", "fp16") else 28
    layer = "Linear" if not quantized else "Linear8bitLt" if precision == "int8" else "Linear4bit"
    weights = adapter_weights(precision, seed)
    found = Receipt(
        recipe="llama2_guanaco-demo",
        precision=precision,
        dtype="bfloat16",
        seed=seed,
        demo=True,
        settings=SettingsReceipt(
            lora={"r": 8, "lora_alpha": 16}, training={"learning_rate": 3e-3, "seed": seed}, eval_tasks=[]
        ),
        command=["llama2_guanaco", "--precision", precision],
        versions={"trl": "1.16.0", "torch": "2.13.0"},
        git=None,
        started="2026-01-01T00:00:00+00:00",
        data=DataReceipt(
            source="guanaco_llama2.jsonl",
            fingerprint="f1",
            rows_in=1200,
            rows_used=1140,
            rows_held_out=60,
            rows_dropped={},
            tokens=54075,
            supervised_tokens=14169,
            rows_truncated=0,
            answers_truncated=0,
            supervised_tokens_lost=0,
            max_length=256,
        ),
        template=TemplateReceipt(
            name="llama2.jinja",
            sha256="template",
            role_markers="",
            bos_per_row=[1, 1],
            end_token="</s>",
            end_token_trained=True,
        ),
        base=BaseReceipt(
            model="standin-llama2",
            revision=None,
            dtype="bfloat16",
            linears={layer: 28},
            quantized=QuantizedReceipt(expected=quantized, found=quantized),
            parameters=1246336,
            bytes=1259072 if quantized else 2492928,
            bytes_by_storage=STORED.get(precision, STORED["nf4" if quantized else "bf16"]),
            sha256=f"base-{precision}",
        ),
        adapter=AdapterReceipt(
            targets=["q_proj"],
            modules=28,
            parameters=81920,
            dtype="float32",
            initial_sha256=f"initial-{seed}",
            final_sha256=weights_sha256(
                [("q_proj.lora_A.default.weight", weights.shape, "float32", weights.tobytes())]
            ),
            all_finite=True,
            unchanged=[],
            bytes=334768,
        ),
        training=TrainingReceipt(
            steps=20,
            micro_batches=20,
            epochs=1.0,
            first_loss=6.0,
            final_loss=1.25,
            tokens=15336 + seed,
            supervised_tokens=4046 + seed,
            padding_share=0.0,
            tokens_per_second=400.0,
            seconds=38.0,
            packed=False,
            processes=1,
            device="cpu",
            attention="sdpa",
        ),
        memory=MemoryReceipt(peak_bytes=2**30, base_bytes=2**29, training_bytes=2**28, planned_bytes=None),
        repairs=[],
        checks=[Check("quantized_linears", "pass", "28 of 28")],
        spread=SpreadReceipt(dtypes={"autocast": "bf16"}, peak_bytes=[2**30]),
    )
    for key, value in changes.items():
        *path, last = key.split("__")
        section: Any = found
        for part in path:
            section = getattr(section, part)
        assert hasattr(section, last), key
        setattr(section, last, value)
    return found


def document(i: int, score: float, task: str = "standin_choice", **changes: Any) -> DocRecord:
    """One document, the same in every run but for its score and its answer."""
    return DocRecord(
        **{
            "task": task,
            "subject": f"subject {i % 8}",
            "doc_id": str(i),
            "doc_hash": sha256(f"{task} {i}"),
            "prompt_hash": sha256(f"prompt {i}"),
            "target_hash": sha256(f"target {i}"),
            "score": score,
            "answer": "In Kropa." if score else f"In Samul {i % 3}.",
            "target": "In Kropa.",
            "prompt": f"Where does person {i} live?",
            **changes,
        }
    )


def answers(n: int, *, wrong: float = 0.3, seed: int = 0) -> np.ndarray:
    """Scores of 0 and 1, of which a share is wrong."""
    return (np.random.default_rng(seed).uniform(size=n) >= wrong).astype(float)


def write_results(
    folder: Path,
    run: Receipt,
    scores: Sequence[float],
    *,
    adapter: bool = True,
    change: Callable[[DocRecord], DocRecord] = lambda document: document,
    text: bool = True,
    **result: Any,
) -> None:
    """Write scores of `standin_choice`, and of a text in bits per byte, as an evaluation of that run."""
    weights = {
        "precision": run.precision,
        "base_sha256": run.base.sha256,
        "adapter_sha256": run.adapter.final_sha256 if adapter else None,
    }
    metric = result.get("metric", RESULT.metric)
    mean = {"metrics": {metric: float(np.mean(scores)) if len(scores) else 0.0}}
    measured = replace(RESULT, **{**weights, **mean, **result})
    write_task(folder, measured, [change(document(i, score, measured.task)) for i, score in enumerate(scores)])
    if text:
        worse = 0.02 if run.precision != "bf16" else 0.0
        docs = [document(i, 1 + worse, "standin_text", bits=(100 + i) * (1 + worse), bytes=100 + i) for i in range(30)]
        kind = {"task": "standin_text", "kind": "bits_per_byte", "metric": "bits_per_byte", "higher_is_better": False}
        kind |= {"metrics": {"bits_per_byte": 1 + worse}}
        write_task(folder, replace(measured, **kind), docs)


def make_run(root: Path, precision: str, seed: int = 0, scores: Sequence[float] | None = None, **options: Any) -> Path:
    """Write a trained and evaluated run and return its folder; `receipt` holds changes to the receipt."""
    folder = root / f"{precision}-seed{seed}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(adapter_file(adapter_weights(precision, seed)))
    run = receipt(precision, seed, **options.pop("receipt", {}))
    (folder / "run.json").write_text(json.dumps(asdict(run)), encoding="utf-8")
    losses = [{"step": step, "loss": 6 / (1 + step / 5)} for step in range(1, 21)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, losses)) + "\n", encoding="utf-8")
    if scores is not None:
        write_results(folder / "evaluation", run, scores, **options)
    return folder


def flipped(scores: np.ndarray, lost: int, won: int = 0) -> np.ndarray:
    """The same scores with the first so many right answers lost and wrong answers won."""
    changed = scores.copy()
    changed[np.flatnonzero(scores == 1)[:lost]] = 0
    changed[np.flatnonzero(scores == 0)[:won]] = 1
    return changed
