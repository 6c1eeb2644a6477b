"""What comes after training."""
