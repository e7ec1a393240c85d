"""What a plan will need, and which plan to take. Training works without this folder, except for `strategy=auto`."""
