"""An adapter merged into the weights that lose the least: what is written, what is chosen, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_runs import LINEAR_LAYERS, MODEL, deploy_run, single_turns
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_recipes.base.checkpoint import weight_files
from qlora_recipes.deploy import choice, merging, weights
from qlora_recipes.deploy.choice import DEQUANTIZED, SIXTEEN_BIT
from qlora_recipes.deploy.merging import merge
from qlora_recipes.errors import CheckError, DataError, RunFolderError, UsageError
from qlora_recipes.evaluation.loaded import BaseKey, restore_base, restore_run
from qlora_recipes.kernels.dequantize import dequantized
from qlora_recipes.precision import precision_named
from qlora_recipes.run.folder import RunFolder

RANK = 64


def correct_the_quantization(model: Any) -> None:
    """Make the adapter what 4 bits took from each weight, as far as its rank allows."""
    files = weight_files(MODEL, None)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            key = name.removeprefix("base_model.model.") + ".weight"
            with safe_open(files[key], "pt") as stored:
                lost = stored.get_tensor(key).float() - dequantized(layer.get_base_layer()).float()
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            layer.lora_A["default"].weight.copy_(v[:RANK])
            layer.lora_B["default"].weight.copy_(u[:, :RANK] * s[:RANK] / layer.scaling["default"])


@pytest.fixture(scope="module")
def correcting(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("merging") / "correcting"
    lora = {"r": RANK, "lora_alpha": RANK}
    return deploy_run(folder, [], single_turns(40), precision="fp4", change=correct_the_quantization, lora=lora)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    rows = single_turns(200)
    return deploy_run(tmp_path_factory.mktemp("merging") / "plain", rows[40:], rows[:40], precision="fp4", steps=8)


def test_an_adapter_that_corrects_the_quantization_goes_into_the_dequantized_weights(
    correcting: RunFolder, tmp_path: Path
) -> None:
    made = merge(correcting, tmp_path / "merged")
    print(made)
    assert made.merged_into == DEQUANTIZED


def test_an_adapter_that_does_not_goes_into_the_16_bit_base(plain: RunFolder, tmp_path: Path) -> None:
    made = merge(plain, tmp_path / "merged")
    print(made)
    assert made.merged_into == SIXTEEN_BIT
