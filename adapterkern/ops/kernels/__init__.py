"""The fused adapter as Triton kernels: no autograd, no checks, no dispatch (`adapterkern.ops` has those)."""
