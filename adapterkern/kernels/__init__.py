"""The fused adapter as Triton kernels: torch and triton alone, no autograd, no checks, no dispatch (`adapterkern.ops` has those)."""
