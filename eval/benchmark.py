"""Train arms and seeds of a recipe, evaluate, compare and report.

python eval/benchmark.py recipes/llama2_guanaco.py --demo --precisions nf4 bf16 --seeds 0 1 2
"""

from qlora_recipes.commands.entry import run_command
from qlora_recipes.experiments.benchmark.command import main

if __name__ == "__main__":
    run_command(main)
