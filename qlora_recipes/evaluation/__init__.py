"""Scores a finished run, and writes one record a document. Knows nothing of comparisons."""
