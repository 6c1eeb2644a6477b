"""The command line: one file a command, all of whose flags go through one parser."""
