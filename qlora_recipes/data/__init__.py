"""From a file or a hub dataset to token ids and labels, every dropped row counted. Knows nothing of models."""
