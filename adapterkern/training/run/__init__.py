"""What a run writes and returns: its folder, checkpoints, metrics, result."""
