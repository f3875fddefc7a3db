"""What one run keeps: its folder, checkpoints, metrics, result."""
