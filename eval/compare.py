"""Compare evaluated runs: `python eval/compare.py RUN_A RUN_B --margin 1.0`."""

from qlora_recipes.commands.compare import main
from qlora_recipes.commands.entry import run_command

if __name__ == "__main__":
    run_command(main)
