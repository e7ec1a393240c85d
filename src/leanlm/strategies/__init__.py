"""A plan applied to a model: how the work is cut, and a checkpoint that any plan can read."""
