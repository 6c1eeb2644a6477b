"""A run folder on disk: its receipt, its checkpoints, and the signals that stop a run. Knows nothing of models."""
