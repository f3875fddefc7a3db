"""The fused adapter as Triton kernels: no autograd, no checks, no dispatch (registered.py, checks.py, choice.py)."""
