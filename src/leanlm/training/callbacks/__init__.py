"""What is watched and kept during a run."""
