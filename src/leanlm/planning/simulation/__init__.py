"""One training step without storage and without other processes, and what it takes."""
