"""What a trained model is used for: generating text, and scoring it."""
