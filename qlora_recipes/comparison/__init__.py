"""From the scores of evaluated runs to a verdict and its page. Files in, page out; imports no torch."""
