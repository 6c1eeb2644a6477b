"""One training run, from settings to a proven receipt."""
