"""The fused adapter as Triton kernels: no autograd, no checks, no dispatch (operator.py, checks.py, choice.py)."""
