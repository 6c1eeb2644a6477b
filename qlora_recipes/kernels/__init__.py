"""The fast path: replacements for what PyTorch, PEFT and TRL compute. Imports nothing else from this package."""
