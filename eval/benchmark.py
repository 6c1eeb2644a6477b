"""Train arms and seeds of a recipe, evaluate, compare and report.

python eval/benchmark.py recipes/llama2_guanaco.py --demo --precisions nf4 bf16 --seeds 0 1 2
"""

import sys

from qlora_recipes.commands.recipe_cli import quiet_libraries, run_command
from qlora_recipes.experiments.benchmark.command import main

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--debug"]
    quiet_libraries()
    run_command(lambda: main(words), debug="--debug" in sys.argv)
