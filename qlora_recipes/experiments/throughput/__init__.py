"""How fast a recipe trains compared with scripts that use TRL alone, and with the machine's bound.

`arms.py` makes the base and trains one arm in its own process, `bound.py` measures the machine, `command.py` lets the
arms take turns and `results.py` shows the figures.
"""
