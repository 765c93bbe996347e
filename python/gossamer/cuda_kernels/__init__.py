"""Launchers of the CUDA kernels in ``gossamer._C``: tensors in, tensors out, one module per primitive."""
