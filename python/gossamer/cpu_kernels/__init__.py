"""Launchers of the native CPU kernels in ``gossamer._C``: tensors in, tensors out, one module per primitive."""
