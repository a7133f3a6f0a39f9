"""Generators of the Triton source of kernels."""
