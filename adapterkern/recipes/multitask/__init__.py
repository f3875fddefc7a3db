"""Many tasks, one backbone."""
