"""Triton kernels and their launchers: tensors in, tensors out, one module per primitive."""

if __name__ != "gossamer.triton_kernels":
    raise ImportError(
        f"these are Gossamer's kernels, imported as gossamer.triton_kernels, not as {__name__!r}: a checkout of "
        "Gossamer is on sys.path ahead of the package you asked for; run from another folder or remove it from sys.path"
    )
