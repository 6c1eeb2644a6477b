"""From the scores of evaluated runs to a verdict. Files in, one record out; imports no torch."""
