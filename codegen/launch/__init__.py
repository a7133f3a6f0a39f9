"""Launching generated kernels."""
