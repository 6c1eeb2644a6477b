"""Everything that only a GPU can show: tests, demos, resuming, the speed and memory of 7B shapes, attention, a profile.

python eval/on_gpu.py --json gpu.json --markdown docs/gpu.md
"""

from qlora_recipes.commands.entry import run_command
from qlora_recipes.experiments.gpu.command import main

if __name__ == "__main__":
    run_command(main)
