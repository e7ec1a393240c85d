"""Optimizers of plain and of distributed parameters, and their learning rates."""
