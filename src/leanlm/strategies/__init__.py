"""A plan applied to a model: how the work is cut over devices and micro-batches."""
