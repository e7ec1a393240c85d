"""Optimizers of whole parameters and of those that are spread over devices, and their learning rates."""
