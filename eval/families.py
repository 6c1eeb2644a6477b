"""Take a small random model of each architecture through every check and a short training.

python eval/families.py --json families.json --markdown families.md
python eval/families.py --make FOLDER
"""

from qlora_recipes.commands.entry import run_command
from qlora_recipes.experiments.families.command import main

if __name__ == "__main__":
    run_command(main)
