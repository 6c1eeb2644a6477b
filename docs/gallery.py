"""Make docs/gallery.md and the pages and pictures in docs/gallery/: `.venv/bin/python docs/gallery.py [NAME...]`.

Runs the demo of every recipe, or of those named, in runs/gallery, and keeps what is finished there: remove it to
measure anew. Needs Chromium.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from PIL import Image

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "docs" / "gallery"
RECIPES = {
    "llama2_guanaco": """\
Tunes Llama-2-7b-chat on a thousand Guanaco conversations, with LoRA of rank 64 on every linear layer, as
in the QLoRA paper. Start with this one: it is what `make demo` runs.""",
    "llama2_attention_only": """\
Tunes the same model on the same conversations, with LoRA of rank 8 on the query and value projections alone, as
in the LoRA paper. It needs less memory, and learns less.""",
    "llama2_preferences": """\
Tunes Llama-2-7b-chat on pairs of answers, of which people chose one.""",
    "falcon_faq": """\
Tunes Falcon-7b on your own questions and answers, given with `--dataset FILE`. Such files are short, so it takes three
passes over them.""",
    "falcon_guanaco": """\
Tunes Falcon-7b on the conversations of OpenAssistant-Guanaco, with LoRA of rank 64 on every linear layer. It is
llama2_guanaco for another architecture, which has its own chat template, layers and repairs.""",
    "llama3_no_robots": """\
Tunes Llama-3.1-8B-Instruct on conversations that people wrote. Its chat template is its tokenizer's own, marked around
the answers here.""",
    "qwen3_tools": """\
Tunes Qwen3-8B to call functions, with the schemas of the functions in every row. Where a row has none, the model
answers by itself.""",
    "qwen3_reasoning": """\
Tunes Qwen3-8B to think before it answers, with the thoughts in the loss.""",
    "gemma3_faq": """\
Tunes Gemma 3 of 1B, with windows of attention, on your own questions and answers, given with `--dataset FILE`.""",
    "mistral_ultrachat": """\
Tunes Mistral-7B-Instruct-v0.3 on conversations of several turns, with the settings that made Zephyr.""",
    "smollm3_smoltalk": """\
Tunes SmolLM3-3B, of which every fourth layer has no positions, on conversations that were made for small models.""",
    "gpt_oss_reasoning": """\
Tunes gpt-oss-20b, a mixture of experts, to think before it answers, in a channel of its own.""",
}
PAGE = """\
# {name}

{purpose}

`recipes/{name}.py`, the whole file:

```python
{recipe}```

## The verdict of its demo

    {command}

trains NF4 and 16 bits on a [stand-in](../../qlora_recipes/standins/README.md), with the stand-in's rank and training
settings. It shows what you get, and says nothing about a model of 7B.

> {verdict}

![The top of the report of {name}]({name}-report.png)

## The loss of its NF4 run

![The loss of {name}, step by step]({name}-loss.png)

## What its NF4 run printed

```text
{transcript}```
"""
INDEX = """\
# Gallery

Every recipe with the verdict, the report, the loss and the output of its demo, made by `docs/gallery.py`. The models
are [stand-ins](../qlora_recipes/standins/README.md).

| recipe | what it is for | the report of its demo |
|---|---|---|
"""


def main() -> None:
    """Run what has not run yet, and write the pages asked for and the list of all that are there."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("chromium is not on the PATH")
    GALLERY.mkdir(exist_ok=True)
    for name in sys.argv[1:] or RECIPES:
        make_page(name, browser)
    index = INDEX
    for name, purpose in RECIPES.items():
        if not (GALLERY / f"{name}.md").exists():
            continue
        picture = f"[![The report of {name}](gallery/{name}-report.png)](gallery/{name}.md)"
        index += f"| [{name}](gallery/{name}.md) | {' '.join(purpose.split())} | {picture} |\n"
    (ROOT / "docs" / "gallery.md").write_text(index, encoding="utf-8")


def make_page(name: str, browser: str) -> None:
    """Run the benchmark of a recipe, and write its page and its two pictures."""
    folder, command = f"runs/gallery/{name}", f"qlora-recipes benchmark {name} --demo --precisions nf4 bf16 --seeds 0"
    program, *arguments = command.split()
    subprocess.run([Path(sys.executable).with_name(program), *arguments, "--output", folder], cwd=ROOT, check=True)
    output = ROOT / folder
    shutil.copy(output / "nf4-seed0" / "loss.png", GALLERY / f"{name}-loss.png")
    top_of(output / "report" / "index.html", browser).save(GALLERY / f"{name}-report.png", optimize=True)
    printed = (output / "logs" / "nf4-seed0.log").read_text(encoding="utf-8")
    parts = {
        "purpose": RECIPES[name],
        "recipe": (ROOT / "recipes" / f"{name}.py").read_text(encoding="utf-8"),
        "verdict": json.loads((output / "report" / "report.json").read_bytes())["contrasts"][0]["sentence"],
        "transcript": "".join(f"{line.rstrip()}\n" for line in printed.splitlines()),
    }
    (GALLERY / f"{name}.md").write_text(PAGE.format(name=name, command=command, **parts), encoding="utf-8")


def top_of(page: Path, browser: str) -> Image.Image:
    """Return what a window of 1,200 by 900 pixels shows of a page, to its last broad gap."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --window-size=1200,900"
    with tempfile.TemporaryDirectory() as folder:
        own = [f"--user-data-dir={folder}/profile", f"--screenshot={folder}/page.png"]
        subprocess.run([browser, *flags.split(), *own, page.as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(f"{folder}/page.png") as shot:
            picture = shot.convert("RGB")
    pixels = numpy.asarray(picture)
    blank = (pixels == pixels[0, 0]).all(axis=(1, 2))
    end = next(end for end in range(len(blank), 0, -1) if blank[end - 20 : end].all())  # not through a plot
    return picture.crop((0, 0, picture.width, end))


if __name__ == "__main__":
    main()
