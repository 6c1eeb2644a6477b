"""A merged run behind OpenAI's API, asked by OpenAI's own client."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from deploy_runs import deploy_run, single_turns
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_recipes.commands.serve import main
from qlora_recipes.deploy import servers
from qlora_recipes.deploy.merging import merge
from qlora_recipes.errors import RunFolderError
from qlora_recipes.run.folder import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    rows = single_turns(160)
    run = deploy_run(tmp_path_factory.mktemp("serve") / "run", rows, rows[:4], precision="bf16", steps=20)
    merge(run, run.merged)
    return run


@pytest.fixture(scope="module")
def client(run: RunFolder) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "qlora_recipes.cli", "serve", str(run.path), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)


def test_a_client_gets_the_answers_of_the_run(run: RunFolder, client: openai.OpenAI) -> None:
    model, tokenizer = (kind.from_pretrained(run.merged) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for question, _ in single_turns(3):
        reply = client.chat.completions.create(model=str(run.merged), messages=[question], temperature=0, max_tokens=24)
        asked = tokenizer.apply_chat_template(
            [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**asked, do_sample=False, max_new_tokens=24)[0, asked["input_ids"].shape[1] :]
        (choice,) = reply.choices
        assert choice.message.content == tokenizer.decode(ids, skip_special_tokens=True)
        assert choice.finish_reason == "stop"  # at the token that it was trained to end with


def test_a_run_that_is_not_merged_is_refused(tmp_path: Path) -> None:
    run = deploy_run(tmp_path / "run", [], single_turns(2), precision="bf16")
    with pytest.raises(RunFolderError, match=r"is not merged.*Run: qlora-recipes merge"):
        main([str(run.path)])


def test_other_servers_get_what_they_read(tmp_path: Path) -> None:
    run = deploy_run(tmp_path / "run", [], single_turns(2), precision="bf16", lora={"r": 12})
    found = servers.commands(run)
    assert "--max-lora-rank 16 " in found["vLLM, the adapter on the 16-bit base"]
    assert f"run={run.adapter}" in found["vLLM, the adapter on the 16-bit base"]
    assert found["TGI, merged"] == f"first: qlora-recipes merge {run.path}"
    (run.path / "q8_0.gguf").touch()
    assert servers.commands(run)["llama.cpp"] == f"llama-server --model {run.path / 'q8_0.gguf'} --jinja"
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    for change, reason in (
        ({"use_dora": True}, "the adapter has use_dora"),
        ({"r": 1024}, "the rank is 1024"),
        ({"rank_pattern": {"q_proj": 4}}, "ranks or scales of their own"),
    ):
        (run.adapter / "adapter_config.json").write_text(json.dumps(config | change))
        assert reason in servers.commands(run)["vLLM, the adapter on the 16-bit base"]
