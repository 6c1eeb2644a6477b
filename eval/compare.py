"""Hold evaluated runs against each other: `python eval/compare.py RUN_A RUN_B --margin 1.0`."""

import sys

from qlora_recipes.commands.compare import main
from qlora_recipes.commands.recipe_cli import quiet_libraries, run_command

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--debug"]
    quiet_libraries()
    run_command(lambda: main(words), debug="--debug" in sys.argv)
