"""How much memory a run needs, from dimensions alone, and what fits a machine. Arithmetic; imports no torch."""
