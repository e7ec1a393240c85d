"""What a plan will need, and which plan to take."""
