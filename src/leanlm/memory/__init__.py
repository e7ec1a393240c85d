"""What trades time for bytes. Knows a model's contract and nothing else of it."""
