"""After training: several runs on one base, side by side, merged into weights, exported and published."""
