"""Tokens/s, peak memory and loss of a recipe beside scripts that use TRL alone, in turns on one machine.

python eval/throughput.py --hidden_size 1024 --num_hidden_layers 8 --precision nf4 --json throughput.json
"""

from qlora_recipes.commands.entry import run_command
from qlora_recipes.experiments.throughput.command import main

if __name__ == "__main__":
    run_command(main)
