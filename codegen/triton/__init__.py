"""Writers of the Triton source of kernels."""
