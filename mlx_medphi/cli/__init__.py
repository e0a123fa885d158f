"""The command line: one module for each group of verbs, and the only room that prints."""
