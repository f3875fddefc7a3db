"""Rows → examples → batches, and the activations of the frozen prefix."""
