"""What every room may use: errors, files and caches, the folder of a run, number types, distributed tensors."""
