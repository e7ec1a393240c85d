"""corpus -> tokens on disk -> the global batch of step s. Knows nothing of models or Lightning."""
