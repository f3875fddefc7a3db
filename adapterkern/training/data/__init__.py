"""Rows → examples → batches, and the cache of frozen-prefix activations."""
