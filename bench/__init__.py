"""Measurements; in Triton's interpreter, where all that a kernel does is a call of Python, with less of these."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from bench.interpreter import quicken

    quicken()
