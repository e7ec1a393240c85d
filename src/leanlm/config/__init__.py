"""The configuration of a run: its schema, every check before any work starts, the command line."""
