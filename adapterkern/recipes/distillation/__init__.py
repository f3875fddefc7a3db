"""Soft labels of a teacher."""
