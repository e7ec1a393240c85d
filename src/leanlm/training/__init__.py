"""One run: what is built of a configuration, the step, the checkpoints, what is watched."""
