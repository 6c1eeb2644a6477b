"""How fast a recipe trains beside the plain script that a user would otherwise write, and how near the machine's bound.

`models.py` makes the base, `arms.py` trains one arm in a process of its own, `bound.py` measures the machine,
`command.py` takes turns and `results.py` tells what came out.
"""
