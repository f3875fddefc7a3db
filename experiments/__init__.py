"""The studies behind docs/: one module per study, run as ``python -m experiments.NAME``.

A study may import everything and is imported by nothing; each may be removed. This package is not installed.
"""
