"""After training: answers of several runs on one base, and the adapter merged into its weights."""
